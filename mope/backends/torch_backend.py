"""PyTorch engine: runs a saved predictor on CPU or GPU as it was trained.

Knows the weight files of an artifact; not the router, the mixture or calibration.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from mope.backends import ChooseExperts, RawOutputs
from mope.backends.network import MopeNetwork, build_encoder
from mope.config import PredictorConfig
from mope.errors import ConfigError
from mope.features import EncodedRequests
from mope.grid import Array


def weight_files(config: PredictorConfig) -> list[str]:
    """Names of an artifact's weight files: one network, or a gate and one per expert."""
    if config.design == "shared":
        return ["model.safetensors"]
    return ["gate.safetensors", *(f"expert-{k}.safetensors" for k in range(config.num_experts))]


def empty_networks(config: PredictorConfig) -> list[MopeNetwork]:
    """Networks in the order of `weight_files`, with fresh weights."""

    def network(*, gate: bool, num_heads: int) -> MopeNetwork:
        encoder = build_encoder(copy.deepcopy(config.encoder_config))
        return MopeNetwork.of(config, encoder, gate=gate, num_heads=num_heads)

    if config.design == "shared":
        return [network(gate=config.num_experts > 1, num_heads=config.num_experts)]
    return [
        network(gate=True, num_heads=0),
        *(network(gate=False, num_heads=1) for _ in range(config.num_experts)),
    ]


class TorchBackend:
    """Runs networks in PyTorch.

    Args:
        networks: in the order of `weight_files`.
        config: of the artifact.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
    """

    name = "torch"

    def __init__(self, networks: Sequence[MopeNetwork], config: PredictorConfig, device: str = "cpu") -> None:
        try:
            self._device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device {device!r} can't be used: {reason}; expected cpu, cuda, cuda:1, ...") from error
        self.networks = [network.to(self._device).eval() for network in networks]
        self._config = config

    @classmethod
    def load(cls, folder: Path, config: PredictorConfig, device: str = "cpu") -> TorchBackend:
        """Networks with the weights of an artifact folder, whose hashes the caller has checked."""
        networks = empty_networks(config)
        for network, name in zip(networks, weight_files(config), strict=True):
            load_model(network, folder / name)
        return cls(networks, config, device)

    def save(self, folder: Path) -> None:
        """Write the weight files into a folder."""
        for network, name in zip(self.networks, weight_files(self._config), strict=True):
            save_model(network, str(folder / name))

    @torch.inference_mode()
    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch, in float32."""
        num_rows, num_experts = len(encoded.token_ids), self._config.num_experts
        ids_BS, mask_BS = encoded.padded(self._config.special_ids[2])
        inputs = [
            torch.from_numpy(array).to(self._device) for array in (ids_BS, mask_BS, encoded.numbers_BF, encoded.llm_B)
        ]
        gate, heads, embedding = self.networks[0](*inputs)
        embedding_BH = embedding.float().cpu().numpy()
        gate_BK = np.zeros((num_rows, num_experts), np.float32) if gate is None else gate.float().cpu().numpy()
        if heads is not None:
            return RawOutputs(gate_BK, heads.float().cpu().numpy(), embedding_BH)
        needed_BK: Array = choose(gate_BK, embedding_BH)
        heads_BKN = np.zeros((num_rows, num_experts, self._config.num_body_bins + 1), np.float32)
        for k in range(num_experts):
            rows = np.flatnonzero(needed_BK[:, k])
            if len(rows):
                chosen = torch.from_numpy(rows).to(self._device)
                _, head, _ = self.networks[1 + k](*(tensor[chosen] for tensor in inputs))
                heads_BKN[rows, k] = head[:, 0].float().cpu().numpy()
        return RawOutputs(gate_BK, heads_BKN, embedding_BH)
