"""What is measured: saved predictors in an engine, and peers from the literature in their published shape.

The process that measures imports this before its clock starts: the standard library alone at the top. Knows what
to load; does not know how it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mope.bench.config import PeerName
    from mope.request import Request


@dataclass(frozen=True, slots=True)
class SavedPredictor:
    """A saved predictor, run by one backend.

    Attributes:
        name: what tables call it.
        artifact: its folder.
        backend: engine that runs it.
        precision: of its network; None for what the backend takes by itself.
        num_threads: threads of each call.
        device: where torch runs it.
    """

    name: str
    artifact: Path
    backend: str
    precision: str | None = None
    num_threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Peer:
    """A predictor of the literature with random weights: its shape and its cost, not its quality.

    Attributes:
        name: a key of `mope.bench.peers.SHAPES`.
        artifact: folder of the saved predictor whose tokenizer it reads with.
        num_threads: threads of each call.
        device: where torch runs it.
        overrides: fields of its `transformers` config that differ from the published shape.
    """

    name: PeerName
    artifact: Path
    num_threads: int = 1
    device: str = "cpu"
    overrides: Mapping[str, Any] = field(default_factory=dict)


Subject = SavedPredictor | Peer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A subject that can be asked.

    Attributes:
        answer: predicts a batch, from requests to what a scheduler reads.
        count_tokens: tokens that the network reads of each request.
    """

    answer: Callable[[Sequence[Request]], object]
    count_tokens: Callable[[Sequence[Request]], list[int]]


def load_subject(subject: Subject) -> Loaded:
    """Load what is to be measured. The one place where a benchmark makes a predictor.

    Raises:
        ArtifactError: a saved predictor, or its export, that can't be loaded.
        ConfigError: a backend, device or precision that can't be.
        MissingExtraError: the engine's packages are not installed.
    """
    if isinstance(subject, Peer):
        from mope.bench.peers import load_peer

        return load_peer(subject)
    from mope.predictor import LengthPredictor

    predictor = LengthPredictor.from_pretrained(
        subject.artifact,
        backend=subject.backend,
        device=subject.device,
        num_threads=subject.num_threads,
        precision=subject.precision,
        cache_size=0,  # a repeated request must cost what it cost the first time
    )
    return Loaded(
        predictor.predict_batch, lambda requests: [len(ids) for ids in predictor.encoder.encode(requests).token_ids]
    )


def saved_predictors(
    artifacts: Sequence[Path],
    backends: Sequence[str] = (),
    precisions: Sequence[str] = (),
    num_threads: Sequence[int] = (1,),
    device: str = "cpu",
) -> list[SavedPredictor]:
    """Each artifact in each backend, precision and number of threads, once, under names that differ.

    Args:
        artifacts: folders of saved predictors.
        backends: none stands for what is exported and installed: onnx, or else torch.
        precisions: none stands for what each backend takes by itself.
        num_threads: threads of each call.
        device: where torch runs.
    """
    found = {}
    for folder, asked, threads in product(artifacts, precisions or (None,), num_threads):
        for backend in backends or (_ready_backend(folder),):
            if backend == "torch" and len(backends) > 1 and asked not in (None, "fp32", "fp16"):
                continue  # a precision of the other backends
            precision = _own_precision(folder, backend) if asked is None else asked
            parts = [
                _short_name(folder, artifacts),
                backend,
                precision,
                f"{threads} threads" if threads != 1 else None,
            ]
            name = " ".join(part for part in parts if part)
            place = _place(backend, device)
            found[name] = SavedPredictor(name, folder, backend, precision, threads, place)
    return list(found.values())


def _short_name(folder: Path, folders: Sequence[Path]) -> str:
    """As much of the end of a folder's path as tells it from the others."""
    parts = folder.resolve().parts
    others = [other.resolve().parts for other in folders if other.resolve() != folder.resolve()]
    num_parts = next(num for num in range(1, len(parts) + 1) if all(other[-num:] != parts[-num:] for other in others))
    return "/".join(parts[-num_parts:])


def _ready_backend(folder: Path) -> str:
    from mope.backends.onnx_backend import exported_precisions  # here: a worker times the import of mope

    return "onnx" if exported_precisions(folder) and find_spec("onnxruntime") else "torch"


def _own_precision(folder: Path, backend: str) -> str | None:
    """The precision that a backend takes where none is asked for, as far as that is known before it is loaded."""
    if backend != "onnx":
        return None
    from mope.backends.onnx_backend import choose_precision, read_manifest

    return choose_precision(read_manifest(folder))


def _place(backend: str, device: str) -> str:
    if backend == "onnx":
        return "cpu"
    return "cuda" if backend in ("onnx-gpu", "tensorrt") and device == "cpu" else device
