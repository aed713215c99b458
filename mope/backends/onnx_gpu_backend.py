"""Running an exported predictor with ONNX Runtime on an NVIDIA GPU: its CUDA or its TensorRT execution provider.

ONNX Runtime runs on the CPU, without an error, where a provider cannot be used; here that is an error. Knows the graphs
that `mope-export` wrote; needs no torch.

What onnxruntime-gpu 1.31 says without a GPU was checked, and the bound buffers are, on the CPU; it was not run on a GPU
yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mope.backends import ChooseExperts, RawOutputs, RunNetwork, copy_weights, run_networks
from mope.backends.buckets import BATCHES, Bucket, BucketRunner, grid, valid_inputs
from mope.backends.cuda_runtime import DEFAULT_PRECISION, cuda_index
from mope.backends.onnx_backend import EMBEDDING, GATE, HEADS, INPUTS, find_graphs
from mope.backends.onnx_backend import open_session as open_any_session
from mope.config import PredictorConfig
from mope.errors import ConfigError, MissingExtraError
from mope.extras import require
from mope.features import EncodedRequests
from mope.grid import Array

Provider = Literal["cuda", "tensorrt"]
PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
INSTALL = "pip uninstall onnxruntime && pip install 'mope-llm[gpu]'"  # both packages write the same folder
NEEDS = {
    "cuda": "onnxruntime-gpu from 1.27 on needs CUDA 13 and a driver from 580 on; up to 1.26, CUDA 12",
    "tensorrt": "onnxruntime-gpu 1.27 to 1.31 needs TensorRT 10 (pip install 'tensorrt-cu13>=10.13,<11'), CUDA 13 and "
    "a driver from 580 on",
}


def provider_options(
    provider: Provider,
    index: int,
    config: PredictorConfig,
    precision: str,
    *,
    cuda_graphs: bool = True,
    engine_cache: Path | None = None,
) -> list[tuple[str, dict[str, str]]]:
    """Execution providers with their options, in the order of preference, as ONNX Runtime takes them.

    With TensorRT there is no CUDA graph, since the provider keeps only one and not one per shape.

    Args:
        provider: to use; with TensorRT, CUDA takes what TensorRT leaves.
        index: of the GPU.
        config: of the artifact.
        precision: of the graph.
        cuda_graphs: record a CUDA graph per shape.
        engine_cache: folder where TensorRT's engines are kept from one start to the next; None to build them anew.
    """
    cuda = {"device_id": str(index), "enable_cuda_graph": str(int(cuda_graphs and provider == "cuda"))}
    if provider == "cuda":
        return [(PROVIDERS["cuda"], cuda)]

    def shapes(batch: int, tokens: int) -> str:
        sizes = (f"{batch}x{tokens}", f"{batch}x{tokens}", f"{batch}x{len(config.number_mean)}", str(batch))
        return ",".join(f"{name}:{size}" for name, size in zip(INPUTS, sizes, strict=True))

    tensorrt = {
        "device_id": str(index),
        "trt_fp16_enable": str(int(precision == "fp16")),
        "trt_int8_enable": str(int(precision == "qdq")),
        "trt_profile_min_shapes": shapes(1, 1),
        "trt_profile_opt_shapes": shapes(1, config.max_input_tokens // 2),
        "trt_profile_max_shapes": shapes(max(BATCHES), config.max_input_tokens),
    }
    if engine_cache is not None:
        for kind in ("engine", "timing"):
            tensorrt |= {f"trt_{kind}_cache_enable": "1", f"trt_{kind}_cache_path": str(engine_cache)}
    return [(PROVIDERS["tensorrt"], tensorrt), (PROVIDERS["cuda"], cuda)]


class BoundNetwork:
    """One graph with buffers bound on the device; its `capture` is what a `BucketRunner` takes.

    Args:
        runtime: the module `onnxruntime`.
        session: of the graph.
        device: `"cuda"`, or `"cpu"` to check the binding where there is no GPU.
        index: of the device.
        num_numbers: F, numbers beside the text.
    """

    def __init__(self, runtime: Any, session: Any, device: str, index: int, num_numbers: int) -> None:
        self._runtime, self._session, self._num_numbers = runtime, session, num_numbers
        self._device = (device, index)
        self._num_captured = 0

    def capture(self, bucket: Bucket) -> RunNetwork:
        """Bind buffers of one shape and run it once, on which the CUDA provider records its graph."""
        of_array = self._runtime.OrtValue.ortvalue_from_numpy
        of_shape = self._runtime.OrtValue.ortvalue_from_shape_and_type
        inputs = [of_array(array, *self._device) for array in valid_inputs(bucket, self._num_numbers)]
        outputs = {
            output.name: of_shape([bucket.batch, *output.shape[1:]], np.float32, *self._device)
            for output in self._session.get_outputs()
        }
        binding = self._session.io_binding()
        for name, value in zip(INPUTS, inputs, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._num_captured += 1
        options = self._runtime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._num_captured))  # one graph per shape
        self._session.run_with_iobinding(binding, options)

        def replay(*arrays: Array) -> tuple[Array | None, Array | None, Array]:
            for value, array in zip(inputs, arrays, strict=True):
                value.update_inplace(array)
            self._session.run_with_iobinding(binding, options)
            found = {name: value.numpy() for name, value in outputs.items()}
            return found.get(GATE), found.get(HEADS), found[EMBEDDING]

        return replay


class OnnxGpuBackend:
    """Runs exported graphs in ONNX Runtime on an NVIDIA GPU, padded to a few fixed shapes.

    Args:
        runners: of the networks, in the order of `mope.config.network_names`.
        config: of the artifact.
        folder: of the artifact.
    """

    name = "onnx-gpu"

    def __init__(self, runners: Sequence[BucketRunner], config: PredictorConfig, folder: Path) -> None:
        self._runners, self._config, self._folder = list(runners), config, folder

    @classmethod
    def load(
        cls,
        folder: Path,
        config: PredictorConfig,
        device: str = "cuda",
        precision: str | None = None,
        *,
        provider: Provider = "cuda",
        cuda_graphs: bool = True,
        engine_cache: Path | None = None,
    ) -> OnnxGpuBackend:
        """The graphs of an artifact folder; shapes for single requests are prepared now, others when first needed.

        Args:
            folder: of the artifact.
            config: of the artifact.
            device: `"cuda"`, `"cuda:1"`, ...
            precision: of the graphs; None for `"fp16"`.
            provider: `"cuda"`, which replays a CUDA graph per shape, or `"tensorrt"`, whose engines are built here,
                which takes minutes.
            cuda_graphs: record CUDA graphs; ONNX Runtime refuses to where a part of the graph is left to the CPU.
            engine_cache: folder where TensorRT's engines are kept from one start to the next.

        Raises:
            ArtifactError: see `mope.backends.onnx_backend.find_graphs` and `Graph.read` there.
            ConfigError: another device or provider, or one that ONNX Runtime cannot use here.
            MissingExtraError: onnxruntime-gpu is not installed.
        """
        if provider not in get_args(Provider):
            raise ConfigError(f"provider is 'cuda' or 'tensorrt'; got {provider!r}")
        index = cuda_index(device)
        runtime = gpu_runtime(provider)
        precision, graphs = find_graphs(folder, config, precision or DEFAULT_PRECISION)
        providers = provider_options(
            provider, index, config, precision, cuda_graphs=cuda_graphs, engine_cache=engine_cache
        )
        buckets = grid(config.max_input_tokens)
        runners = []
        for graph in graphs:
            session = open_session(runtime, graph.read(), providers)
            network = BoundNetwork(runtime, session, "cuda", index, len(config.number_mean))
            runner = BucketRunner(network.capture, buckets, config.special_ids[2])
            runner.warm_up(bucket for bucket in buckets if bucket.batch == 1)
            runners.append(runner)
        return cls(runners, config, folder)

    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch, in float32."""
        return run_networks(self._runners, self._config, encoded, choose)

    def save(self, folder: Path) -> None:
        """Copy the weight files, as far as the artifact has any, into a folder."""
        copy_weights(self._folder, folder, self._config)


def gpu_runtime(provider: Provider) -> Any:
    """The module `onnxruntime` of a build that has an execution provider, with CUDA's libraries loaded.

    Raises:
        MissingExtraError: ONNX Runtime is not installed, or without that provider.
    """
    runtime = require("onnxruntime", "the onnx-gpu backend", "gpu")
    there = runtime.get_available_providers()
    if PROVIDERS[provider] not in there:
        raise MissingExtraError(
            f"the onnx-gpu backend needs onnxruntime-gpu; installed is an ONNX Runtime {runtime.__version__} for "
            f"{', '.join(there)}: {INSTALL}"
        )
    if hasattr(runtime, "preload_dlls"):  # finds CUDA and cuDNN that pip installed; since 1.21
        runtime.preload_dlls()
    return runtime


def open_session(runtime: Any, graph: bytes, providers: Sequence[tuple[str, dict[str, str]]]) -> Any:
    """A session of a graph that really runs on the first of the providers.

    Raises:
        ConfigError: ONNX Runtime left it out, as it does where libraries or a GPU are missing.
    """
    wanted = providers[0][0]
    session = open_any_session(runtime, graph, list(providers))
    if (used := session.get_providers()[0]) != wanted:
        provider: Provider = "cuda" if wanted == PROVIDERS["cuda"] else "tensorrt"
        raise ConfigError(
            f"ONNX Runtime {runtime.__version__} can't use {wanted} here and took {used}; {NEEDS[provider]}; what it "
            "misses is in its words above"
        )
    return session
