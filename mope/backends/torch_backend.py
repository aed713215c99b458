"""PyTorch engine: runs a saved predictor on CPU or GPU as it was trained.

Knows the weight files of an artifact; not the router, the mixture or calibration.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model

from mope.backends import ChooseExperts, RawOutputs, RunNetwork, run_networks
from mope.backends.network import MopeNetwork, build_encoder
from mope.config import PredictorConfig, network_names
from mope.errors import ArtifactError, ConfigError
from mope.features import EncodedRequests
from mope.grid import Array


def weight_files(config: PredictorConfig) -> list[str]:
    """Names of an artifact's weight files, in the order of `mope.config.network_names`."""
    return [f"{name}.safetensors" for name in network_names(config)]


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
        """Networks with the weights of an artifact folder, whose hashes the caller has checked.

        Raises:
            ArtifactError: the folder has no weights; it was made for serving by other engines.
        """
        if missing := [name for name in weight_files(config) if not (folder / name).exists()]:
            raise ArtifactError(
                f"{folder} has no weights for PyTorch ({', '.join(missing)}): it was exported for serving alone; use "
                'backend="onnx", or the folder that it was exported from'
            )
        networks = empty_networks(config)
        for network, name in zip(networks, weight_files(config), strict=True):
            load_model(network, folder / name)
        return cls(networks, config, device)

    def save(self, folder: Path) -> None:
        """Write the weight files into a folder."""
        for network, name in zip(self.networks, weight_files(self._config), strict=True):
            save_model(network, str(folder / name))

    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch, in float32."""
        return run_networks([self._runner(network) for network in self.networks], self._config, encoded, choose)

    def _runner(self, network: MopeNetwork) -> RunNetwork:
        @torch.inference_mode()
        def run(*inputs: Array) -> tuple[Array | None, Array | None, Array]:
            gate, heads, embedding = network(*(torch.from_numpy(array).to(self._device) for array in inputs))
            return (
                None if gate is None else gate.float().cpu().numpy(),
                None if heads is None else heads.float().cpu().numpy(),
                embedding.float().cpu().numpy(),
            )

        return run
