"""Stand-ins for a GPU: NVIDIA's CUDA runtime and TensorRT as far as mope calls them, on the CPU.

They are as strict as the real ones where a mistake would show on a GPU alone: work is done when a stream is waited for
and not before, nothing may be allocated while a graph is recorded, copies stay inside of what was allocated, and a
context runs only with a profile, all shapes and all addresses. A "GPU's" memory is ordinary memory, an "engine" is
an ONNX graph in ONNX Runtime.
"""

from __future__ import annotations

import ctypes
import io
import json
import zipfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

Work = Callable[[], None]


class CudaRuntime:
    """`cuda.bindings.runtime`: functions return a status and what they give."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, gpu: str = "NVIDIA A100-SXM4-40GB", compute_capability: tuple[int, int] = (8, 0)) -> None:
        self.gpu, self.compute_capability = gpu, compute_capability
        self.memory: dict[int, Any] = {}  # address -> what keeps it
        self.streams: dict[int, list[Work]] = {}
        self.recording: dict[int, list[Work]] = {}
        self.num_launches = 0

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, f"error {error}".encode()

    def cudaSetDevice(self, index: int) -> tuple[int]:
        return (0 if index == 0 else 101,)

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:
        major, minor = self.compute_capability
        return 0, SimpleNamespace(name=self.gpu.encode() + b"\0\0", major=major, minor=minor)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        stream = 1000 + len(self.streams)
        self.streams[stream] = []
        return 0, stream

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if self.recording:
            return 900, 0
        memory = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple[int]:
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree

    def put(self, stream: int, work: Work) -> None:
        self.recording.get(stream, self.streams[stream]).append(work)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        if any(size > len(self.memory[address]) for address in (to, source)):
            return (1,)
        self.put(stream, lambda: ctypes.memmove(to, source, size) and None)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if self.recording:
            return (900,)
        for work in self.streams[stream]:
            work()
        self.streams[stream].clear()
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.recording[stream] = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, list[Work]]:
        return 0, self.recording.pop(stream)

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[int, list[Work]]:
        return 0, list(graph)

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[int]:
        graph.clear()
        return (0,)

    def cudaGraphLaunch(self, graph: list[Work], stream: int) -> tuple[int]:
        self.num_launches += 1
        self.streams[stream].extend(graph)
        return (0,)


class TensorRT:
    """The module `tensorrt` at run time and as a builder; a plan is a ZIP of the graph and its profiles."""

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VERSION_COMPATIBLE")
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS")

    class ILogger:
        """As a base class."""

        ERROR, INTERNAL_ERROR = "error", "internal error"

    class Logger:
        """To stderr."""

        ERROR = "error"

        def __init__(self, severity: str) -> None: ...

    def __init__(self, cuda: CudaRuntime, version: str = "11.4.0.106", scale: float = 1.0) -> None:
        self.cuda, self.__version__ = cuda, version
        self.scale = scale  # of outputs: anything but one is an engine that does not say what its graph says
        self.num_built = 0
        self.runtimes: list[Any] = []

    def nptype(self, dtype: Any) -> Any:
        return dtype

    def Builder(self, logger: Any) -> Any:
        def build(network: Any, config: Any) -> bytes:
            self.num_built += 1
            plan = io.BytesIO()
            with zipfile.ZipFile(plan, "w") as file:
                file.writestr("graph", network.graph)
                file.writestr("profiles", json.dumps([profile.shapes for profile in config.profiles]))
            return plan.getvalue()

        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(flags=flags),
            create_builder_config=BuilderConfig,
            create_optimization_profile=Profile,
            build_serialized_network=build,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse(graph: bytes) -> bool:
            network.graph = graph
            inputs = onnxruntime.InferenceSession(network.graph, providers=["CPUExecutionProvider"]).get_inputs()
            shapes = [[-1 if isinstance(axis, str) else axis for axis in tensor.shape] for tensor in inputs]
            network.num_inputs = len(inputs)
            network.get_input = lambda i: SimpleNamespace(name=inputs[i].name, shape=shapes[i])
            return True

        return SimpleNamespace(parse=parse)

    def Runtime(self, logger: Any) -> Any:
        self.runtimes.append(SimpleNamespace(deserialize_cuda_engine=lambda plan: Engine(self, plan)))
        return self.runtimes[-1]


class Profile:
    """Shapes of an optimisation profile: smallest, best, largest of each input."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, smallest: Any, best: Any, largest: Any) -> None:
        self.shapes[name] = [list(smallest), list(best), list(largest)]


class BuilderConfig:
    """Options of a build, with a timing cache that says what was built before."""

    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.flags: set[str] = {"TF32"}
        self.cache = b""

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.remove(flag)

    def create_timing_cache(self, serialized: bytes) -> bytes:
        return serialized

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return cache != b"of another GPU"

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.cache + b"measured.")


class Engine:
    """`ICudaEngine`."""

    def __init__(self, trt: TensorRT, plan: bytes) -> None:
        with zipfile.ZipFile(io.BytesIO(plan)) as file:
            graph, self.profiles = file.read("graph"), json.loads(file.read("profiles"))
        self.trt = trt
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        self.outputs = {tensor.name: tensor for tensor in self.session.get_outputs()}
        self.tensors = {**self.inputs, **self.outputs}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[i]

    def get_tensor_mode(self, name: str) -> str:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return {"tensor(int64)": np.int64, "tensor(float)": np.float32}[self.tensors[name].type]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        shapes: list[list[int]] = self.profiles[index][name]
        return shapes

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    """`IExecutionContext`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        smallest, _, largest = self.engine.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        axes = self.engine.tensors[name].shape
        return tuple(self.shapes["input_ids"][0] if isinstance(axis, str) else axis for axis in axes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def _array(self, name: str) -> Any:
        shape, dtype = self.get_tensor_shape(name), np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        memory = self.engine.trt.cuda.memory[self.addresses[name]]
        return np.frombuffer(memory, dtype, size // dtype.itemsize).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        if self.profile is None or set(self.shapes) != set(engine.inputs) or set(self.addresses) != set(engine.tensors):
            return False

        def work() -> None:
            found = engine.session.run(None, {name: self._array(name) for name in engine.inputs})
            for name, value in zip(engine.outputs, found, strict=True):
                self._array(name)[...] = value * engine.trt.scale

        engine.trt.cuda.put(stream, work)
        return True
