"""ONNX Runtime on a GPU: where there is none, an error says what is missing; the bound buffers are right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from encoded import random_requests

from mope import artifact
from mope.backends.buckets import BucketRunner, grid
from mope.backends.onnx_backend import OnnxBackend, find_graphs
from mope.backends.onnx_gpu_backend import BoundNetwork, OnnxGpuBackend, gpu_runtime, open_session, provider_options
from mope.errors import ArtifactError, ConfigError, MissingExtraError
from mope.grid import Array

CPU = "CPUExecutionProvider"
HAS_GPU = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def everything(gate_BK: Array, _: Array) -> Array:
    """Ask every expert."""
    return np.ones_like(gate_BK, dtype=bool)


@pytest.mark.skipif(HAS_GPU, reason="onnxruntime-gpu is installed")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_runtime_for_cpus_is_refused(exported: dict[str, Path], provider: Any) -> None:
    with pytest.raises(
        MissingExtraError, match=r"needs onnxruntime-gpu; installed is .* pip install 'mope-llm\[gpu\]'"
    ):
        OnnxGpuBackend.load(exported["shared"], artifact.check(exported["shared"]), precision="fp32", provider=provider)


def runtime_that_falls_back(used: list[str]) -> Any:
    """What onnxruntime-gpu does on a machine without a GPU: it lists the providers, and then runs on the CPU."""
    return SimpleNamespace(
        __version__="1.31.1",
        get_available_providers=lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", CPU],
        InferenceSession=lambda graph, options, providers: SimpleNamespace(
            get_providers=lambda: used, disable_fallback=lambda: None
        ),
    )


@pytest.mark.parametrize(
    ("provider", "used", "message"),
    [
        ("cuda", [CPU], "can't use CUDAExecutionProvider here and took CPUExecutionProvider; .* CUDA 13"),
        (
            "tensorrt",
            ["CUDAExecutionProvider", CPU],
            r"can't use TensorrtExecutionProvider .* 'tensorrt-cu13>=10.13,<11'",
        ),
    ],
)
def test_falling_back_is_an_error(tiny: Path, provider: Any, used: list[str], message: str) -> None:
    options = provider_options(provider, 0, artifact.check(tiny), "fp16")
    with pytest.raises(ConfigError, match=message) as caught:
        open_session(runtime_that_falls_back(used), b"graph", options)
    assert "\n" not in str(caught.value)
    assert open_session(runtime_that_falls_back([options[0][0]]), b"graph", options)


def test_libraries_of_pip_are_loaded_where_the_runtime_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    runtime = runtime_that_falls_back([CPU])
    monkeypatch.setattr("mope.backends.onnx_gpu_backend.require", lambda *_: runtime)
    assert gpu_runtime("cuda") is runtime
    runtime.preload_dlls = lambda: calls.append("preload")
    gpu_runtime("tensorrt")
    assert calls == ["preload"]


def test_options_of_the_providers(tiny: Path) -> None:
    config = artifact.check(tiny)
    width, numbers = config.max_input_tokens, len(config.number_mean)
    assert provider_options("cuda", 1, config, "fp16") == [
        ("CUDAExecutionProvider", {"device_id": "1", "enable_cuda_graph": "1"})
    ]
    ((_, plain),) = provider_options("cuda", 0, config, "fp16", cuda_graphs=False)
    assert plain["enable_cuda_graph"] == "0"
    kept = provider_options("tensorrt", 0, config, "fp16", engine_cache=Path("kept"))
    (name, options), (second, cuda) = kept
    assert (name, second, cuda["enable_cuda_graph"]) == ("TensorrtExecutionProvider", "CUDAExecutionProvider", "0")
    largest = f"input_ids:32x{width},attention_mask:32x{width},numbers:32x{numbers},target_llm:32"
    assert options["trt_profile_max_shapes"] == largest
    assert options["trt_profile_min_shapes"] == f"input_ids:1x1,attention_mask:1x1,numbers:1x{numbers},target_llm:1"
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == ("1", "0")
    assert (options["trt_engine_cache_path"], options["trt_timing_cache_enable"]) == ("kept", "1")
    assert all(isinstance(value, str) for value in options.values())


def test_bound_buffers_say_what_the_plain_session_says(exported: dict[str, Path]) -> None:
    config = artifact.check(exported["shared"])
    _, (graph,) = find_graphs(exported["shared"], config, "fp32")
    session = open_session(onnxruntime, graph.read(), [(CPU, {})])
    network = BoundNetwork(onnxruntime, session, "cpu", 0, len(config.number_mean))
    runner = BucketRunner(network.capture, grid(20, step=8), config.special_ids[2])
    backend = OnnxGpuBackend([runner], config, exported["shared"])
    plain = OnnxBackend.load(exported["shared"], config)
    for lengths in ([3], [20, 1, 7], [5] * 40):
        encoded = random_requests(config, lengths)
        one, other = (engine.run(encoded, everything) for engine in (plain, backend))
        np.testing.assert_allclose(one.gate_BK, other.gate_BK, atol=2e-5)  # sums of another order
        np.testing.assert_allclose(one.heads_BKN, other.heads_BKN, atol=2e-5)
        np.testing.assert_allclose(one.embedding_BH, other.embedding_BH, atol=2e-5)


def test_saving_copies_the_weights(exported: dict[str, Path], tmp_path: Path) -> None:
    config = artifact.check(exported["shared"])
    runner = BucketRunner(lambda _: pytest.fail("nothing is run"), grid(20), 0)
    OnnxGpuBackend([runner], config, exported["shared"]).save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (exported["shared"] / "model.safetensors").read_bytes()


@pytest.mark.skipif(not HAS_GPU, reason="runs on an NVIDIA GPU with onnxruntime-gpu")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_says_what_the_cpu_says(exported: dict[str, Path], provider: Any) -> None:
    folder = exported["separate"]
    config = artifact.check(folder)
    plain = OnnxBackend.load(folder, config)
    backend = OnnxGpuBackend.load(folder, config, precision="fp32", provider=provider)
    for lengths in ([3], [20, 1, 7], [5] * 40):
        encoded = random_requests(config, lengths)
        one, other = (engine.run(encoded, everything) for engine in (plain, backend))
        np.testing.assert_allclose(one.heads_BKN, other.heads_BKN, atol=1e-2)  # the GPU may multiply in TF32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cpu"}, ConfigError, "runs on an NVIDIA GPU: expected device 'cuda' or 'cuda:1', ...; got 'cpu'"),
        ({"provider": "rocm"}, ConfigError, "provider is 'cuda' or 'tensorrt'; got 'rocm'"),
    ],
)
def test_options_that_cannot_be(exported: dict[str, Path], options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OnnxGpuBackend.load(exported["shared"], artifact.check(exported["shared"]), **options)


def test_a_precision_that_was_not_exported(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mope.backends.onnx_gpu_backend.gpu_runtime", lambda _: runtime_that_falls_back([CPU]))
    with pytest.raises(ArtifactError, match=r"no ONNX graph of model in fp16.*type: mope-export .* --to onnx-fp16"):
        OnnxGpuBackend.load(exported["shared"], artifact.check(exported["shared"]))
