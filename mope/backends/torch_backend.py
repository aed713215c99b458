"""PyTorch engine: runs a saved predictor on CPU or GPU as it was trained.

Knows the weight files of an artifact; not the router, the mixture or calibration.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save_model

from mope.artifact import check_weights, weight_files
from mope.backends import ChooseExperts, RawOutputs, RunNetwork, copy_weights, run_networks
from mope.backends.buckets import BucketRunner, grid
from mope.backends.cuda_graphs import CudaGraphs
from mope.backends.network import MopeNetwork, build_encoder
from mope.config import PredictorConfig
from mope.errors import ArtifactError, ConfigError
from mope.features import EncodedRequests
from mope.grid import Array
from mope.sealed import Sealed, cleaned, shown

PRECISIONS = ("fp32", "fp16")


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


def load_weights(network: MopeNetwork, content: bytes, where: str) -> None:
    """Give a network the weights of a safetensors file.

    Raises:
        ArtifactError: they are those of another network.
    """
    tensors = load(content)
    own = network.state_dict()
    shared = {tensor.data_ptr() for name, tensor in own.items() if name in tensors}
    missing = [name for name, tensor in own.items() if name not in tensors and tensor.data_ptr() not in shared]
    others = [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]
    if missing or others:
        first = cleaned(repr((missing + others)[0]))
        raise ArtifactError(f"{where} has not the weights that config.json describes ({first}); copy both again")
    network.load_state_dict(tensors, strict=False)


def each_text_once(ids_BS: Array, mask_BS: Array, numbers_BF: Array, llm_B: Array) -> tuple[Array, ...]:
    """The inputs of `MopeNetwork.forward`, a text that many rows share among them once."""
    texts_TX, text_B = np.unique(np.concatenate([ids_BS, mask_BS], axis=1), axis=0, return_inverse=True)
    if len(texts_TX) == len(ids_BS):
        return ids_BS, mask_BS, numbers_BF, llm_B
    ids_TS, mask_TS = np.split(texts_TX, 2, axis=1)
    return np.ascontiguousarray(ids_TS), np.ascontiguousarray(mask_TS), numbers_BF, llm_B, text_B.reshape(-1)


class TorchBackend:
    """Runs networks in PyTorch.

    Args:
        networks: in the order of `weight_files`.
        config: of the artifact.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        folder: of the artifact whose weight files `save` copies; None if it writes the networks' own weights.
    """

    name = "torch"

    def __init__(
        self,
        networks: Sequence[MopeNetwork],
        config: PredictorConfig,
        device: str = "cpu",
        *,
        folder: Path | None = None,
    ) -> None:
        try:
            self._device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device {device!r} can't be used: {reason}; expected cpu, cuda, cuda:1, ...") from error
        self.networks = [network.to(self._device).eval() for network in networks]
        self._config, self._folder = config, folder
        self._runners: list[RunNetwork] = [self._runner(network) for network in self.networks]

    @classmethod
    def load(
        cls, folder: Path, config: PredictorConfig, device: str = "cpu", precision: str | None = None
    ) -> TorchBackend:
        """Networks for serving, with the weights of an artifact folder, checked by their hashes.

        On a GPU they are run as CUDA graphs: those for single requests are recorded now, others when first needed.

        Args:
            folder: of the artifact.
            config: of the artifact.
            device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
            precision: `"fp32"`, or `"fp16"` for a trunk in half precision, which is quick on GPUs alone; the mean
                over tokens, gate and heads stay float32. None for `"fp32"`.

        Raises:
            ArtifactError: the folder has no weights, since it was made for serving by other engines, or they are not
                those that were saved, or not of the networks that the config describes.
            ConfigError: the device can't be used, or an unknown precision.
        """
        if precision not in (None, *PRECISIONS):
            raise ConfigError(f"the torch backend runs in {' or '.join(PRECISIONS)}; got precision {precision!r}")
        check_weights(folder, config, "the torch backend", "let the onnx backend run its graphs")
        saved, networks = Sealed(folder), empty_networks(config)
        for network, name in zip(networks, weight_files(config), strict=True):
            load_weights(network, saved.read(name), shown(folder / name))
            if precision == "fp16":
                network.encoder.half()
        backend = cls(networks, config, device, folder=folder if precision == "fp16" else None)
        if backend._device.type == "cuda":
            backend._use_graphs()
        return backend

    def _use_graphs(self) -> None:
        buckets = grid(self._config.max_input_tokens)
        runners = [
            BucketRunner(CudaGraphs(network, self._device).capture, buckets, self._config.special_ids[2])
            for network in self.networks
        ]
        for runner in runners:
            runner.warm_up(bucket for bucket in buckets if bucket.batch == 1)
        self._runners = list(runners)

    def save(self, folder: Path) -> None:
        """Write the weight files into a folder, in the precision that they were trained in."""
        if self._folder is not None:
            copy_weights(self._folder, folder, self._config)
            return
        for network, name in zip(self.networks, weight_files(self._config), strict=True):
            save_model(network, str(folder / name))

    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch, in float32."""
        return run_networks(self._runners, self._config, encoded, choose)

    def _runner(self, network: MopeNetwork) -> RunNetwork:
        @torch.inference_mode()
        def run(*inputs: Array) -> tuple[Array | None, Array | None, Array]:
            tensors = (torch.from_numpy(array).to(self._device) for array in each_text_once(*inputs))
            gate, heads, embedding = network(*tensors)
            return (
                None if gate is None else gate.float().cpu().numpy(),
                None if heads is None else heads.float().cpu().numpy(),
                embedding.float().cpu().numpy(),
            )

        return run
