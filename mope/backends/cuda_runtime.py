"""The few calls of the CUDA runtime that running an engine takes: memory, one stream, recording a graph.

Uses cuda-bindings, NVIDIA's own: 8 MB with the runtime inside, where torch is some GB. Knows no network.

Written against cuda-bindings 12.8 to 13.5. Without a GPU, loading it and what it says then is checked, and the order of
calls against a stand-in; no call has reached a GPU yet.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mope.errors import ConfigError, MopeError
from mope.extras import require
from mope.grid import Array

DEFAULT_PRECISION = "fp16"  # of exported graphs on a GPU, where none is named


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's name and compute capability, such as (8, 0)."""

    name: str
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (SM{self.compute_capability[0]}{self.compute_capability[1]})"


class Buffer:
    """An array in pinned memory of the host and its twin on the GPU; both are freed with this object.

    Attributes:
        host: the array.
        address: of the memory on the GPU.
    """

    def __init__(self, cuda: Cuda, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        num_bytes = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self.address = int(cuda.call("cudaMalloc", num_bytes))
        pinned = int(cuda.call("cudaMallocHost", num_bytes))
        memory = (ctypes.c_byte * num_bytes).from_address(pinned)
        self.host: Array = np.frombuffer(memoryview(memory), dtype=dtype, count=int(np.prod(shape))).reshape(shape)
        weakref.finalize(self, _free, cuda, self.address, pinned).atexit = False  # the process ends with its memory


def _free(cuda: Cuda, address: int, pinned: int) -> None:
    cuda.call("cudaFree", address)
    cuda.call("cudaFreeHost", pinned)


class Cuda:
    """One GPU and one stream on it.

    Args:
        device: `"cuda"` or `"cuda:1"`, ...

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        ConfigError: another kind of device, or there is no such GPU.
    """

    def __init__(self, device: str = "cuda") -> None:
        self._runtime = require("cuda.bindings.runtime", "TensorRT")
        self.index = cuda_index(device)
        error, count = self._runtime.cudaGetDeviceCount()
        if int(error) != 0 or self.index >= count:
            found = f"the driver gives no NVIDIA GPU ({self._name(error)})" if int(error) else f"{count} GPUs are there"
            raise ConfigError(f"device {device!r} can't be used: {found}; nvidia-smi lists GPUs and the driver")
        self.use()
        self.stream = int(self.call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return what it gives.

        Raises:
            MopeError: it failed.
        """
        error, *values = getattr(self._runtime, function)(*arguments)
        if int(error) != 0:
            raise MopeError(f"{function} failed: {self._name(error)}")
        return values[0] if values else None

    def _name(self, error: Any) -> str:
        return str(self._runtime.cudaGetErrorString(error)[1].decode())

    def gpu(self) -> Gpu:
        """Name and compute capability."""
        properties = self.call("cudaGetDeviceProperties", self.index)
        return Gpu(properties.name.split(b"\0")[0].decode(), (int(properties.major), int(properties.minor)))

    def use(self) -> None:
        """Make this GPU the one that the calling thread works on."""
        self.call("cudaSetDevice", self.index)

    def to_gpu(self, buffer: Buffer) -> None:
        """Put a copy to the GPU into the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", buffer.address, buffer.host.ctypes.data, buffer.host.nbytes, kind, self.stream)

    def to_host(self, buffer: Buffer) -> None:
        """Put a copy from the GPU into the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", buffer.host.ctypes.data, buffer.address, buffer.host.nbytes, kind, self.stream)

    def wait(self) -> None:
        """Wait for what is in the stream."""
        self.call("cudaStreamSynchronize", self.stream)

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """A graph of what a function puts into the stream; calling it puts all of that there again."""
        # other threads of the process may use the GPU meanwhile
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        finally:
            graph = self.call("cudaStreamEndCapture", self.stream)
        executable = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return lambda: self.call("cudaGraphLaunch", executable, self.stream)


def cuda_index(device: str) -> int:
    """Index of a GPU: 0 of `"cuda"`, 1 of `"cuda:1"`.

    Raises:
        ConfigError: not a GPU's name.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ConfigError(
            f"this backend runs on an NVIDIA GPU: expected device 'cuda' or 'cuda:1', ...; got {device!r}"
        )
    return int(match[1] or 0)
