"""Which engine runs a predictor: the one that was asked for, or else the quickest that is exported and installed.

Knows names of engines, what each needs and how each is loaded; runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mope import packaged
from mope.artifact import check_weights
from mope.backends import Backend
from mope.backends.onnx_backend import MANIFEST, choose_precision, exported_precisions, has_weights, read_manifest
from mope.config import PredictorConfig
from mope.errors import ArtifactError, ConfigError
from mope.extras import require

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "qdq")
TENSORRT_FOLDER = "tensorrt"


@dataclass(frozen=True, slots=True)
class _Engine:
    """How an engine is loaded: `class_name.load(folder, config, ...)` of `module`, with the options that it `takes`."""

    module: str
    class_name: str
    takes: tuple[str, ...]
    device: str  # the kind of device that it runs on; empty for any
    packages: tuple[str, ...] = ()  # that its module imports at once


_ENGINES = {
    "torch": _Engine(
        "mope.backends.torch_backend", "TorchBackend", ("device", "precision"), "", ("torch", "transformers")
    ),
    "onnx": _Engine("mope.backends.onnx_backend", "OnnxBackend", ("num_threads", "precision"), "cpu"),
    "onnx-gpu": _Engine("mope.backends.onnx_gpu_backend", "OnnxGpuBackend", ("device", "precision"), "cuda"),
    "tensorrt": _Engine("mope.backends.tensorrt_backend", "TensorrtBackend", ("device", "precision"), "cuda"),
}
BACKENDS = tuple(_ENGINES)


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine, and why it.

    Attributes:
        backend: one of `BACKENDS`.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        precision: one of `PRECISIONS`, or None for the engine's own.
        reason: why this engine, in one sentence.
    """

    backend: str
    device: str
    precision: str | None
    reason: str

    def load(self, folder: Path, config: PredictorConfig, num_threads: int) -> Backend:
        """The engine, with the networks of an artifact folder.

        Raises:
            ArtifactError: what it runs was not exported, or is damaged; for torch, a copy for serving without weights.
            ConfigError: its device or precision can't be had.
            MissingExtraError: its packages are not installed.
        """
        engine = _ENGINES[self.backend]
        if self.backend == "torch":  # before its packages: who lacks both can't mend it by installing them
            check_weights(folder, config, "the torch backend", "let the onnx backend run its graphs")
        for package in engine.packages:
            require(package, f"the {self.backend} backend")
        settings = {"device": self.device, "num_threads": num_threads, "precision": self.precision}
        options = {name: settings[name] for name in engine.takes if settings[name] is not None}
        backend_class: Any = getattr(import_module(engine.module), engine.class_name)
        backend: Backend = backend_class.load(folder, config, **options)
        return backend


def choose(
    folder: Path,
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> Choice:
    """The engine for an artifact: the one that was asked for, or if `backend` is None the one that fits best.

    On the CPU that is ONNX Runtime if the artifact was exported for it, in the fastest precision whose quality was
    checked, else torch. On a GPU it is
    TensorRT if engines were built, then ONNX Runtime if its GPU build is installed, else torch.

    Raises:
        ArtifactError: a copy for serving, which has no weights, without graphs to run.
        ConfigError: an unknown backend or precision, or a backend that does not run on the device.
    """
    for what, got, known in (("backend", backend, BACKENDS), ("precision", precision, PRECISIONS)):
        if got is not None and got not in known:
            raise ConfigError(f"unknown {what} {got!r}; expected one of {', '.join(map(repr, known))}")
    if backend is not None:
        needed = _ENGINES[backend].device
        device = device or needed or "cpu"
        if needed and device.partition(":")[0] != needed:
            other = "onnx-gpu" if backend == "onnx" else "onnx"
            raise ConfigError(
                f"the {backend} backend runs on {'the CPU' if needed == 'cpu' else 'a GPU'}; got device {device!r}; "
                f"choose {other!r} or 'torch' for it"
            )
        return Choice(backend, device, precision, f"{backend}, since it was asked for")
    if device is None or device == "cpu":
        return _on_cpu(folder, precision)
    return _on_gpu(folder, device, precision)


def _on_cpu(folder: Path, precision: str | None) -> Choice:
    exported = exported_precisions(folder)
    if not exported or precision not in (None, *exported):
        if not has_weights(folder):
            read_manifest(folder)  # says what is wrong with it, if it is that
            raise ArtifactError(
                f"{packaged.shown(folder)} is a copy for serving: it has ONNX graphs in {', '.join(exported)} and no "
                f"weights to run or export in {precision}; use the folder that it was exported from"
            )
        wanted = precision or "any precision"
        return Choice("torch", "cpu", precision, f"torch, since there is no ONNX export in {wanted} of these weights")
    if not _is_installed("onnxruntime") and has_weights(folder):
        return Choice(
            "torch", "cpu", precision, "torch, since onnxruntime is not installed (pip install 'mope-llm[onnx]')"
        )
    best = precision or choose_precision(read_manifest(folder))
    return Choice("onnx", "cpu", best, f"onnx, since there is an ONNX export in {best}")


def _on_gpu(folder: Path, device: str, precision: str | None) -> Choice:
    if (folder / TENSORRT_FOLDER / MANIFEST).exists() and _is_installed("tensorrt"):
        return Choice("tensorrt", device, precision, "tensorrt, since engines were built and it is installed")
    if exported_precisions(folder) and _has_distribution("onnxruntime-gpu"):
        return Choice("onnx-gpu", device, precision, "onnx-gpu, since there is an ONNX export and onnxruntime-gpu")
    return Choice(
        "torch", device, precision, f"torch, since neither TensorRT engines nor onnxruntime-gpu are there for {device}"
    )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # None stands for it among the loaded modules: its import fails
        return False


def _has_distribution(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
