"""Running an exported predictor with ONNX Runtime: no torch, one thread, no spinning.

Knows the folder `onnx/` that `mope-export` wrote into an artifact; does not know how graphs are made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

import numpy as np

from mope.artifact import read_json
from mope.backends import ChooseExperts, RawOutputs, RunNetwork, copy_weights, run_networks
from mope.config import PredictorConfig, network_names
from mope.errors import ArtifactError, ConfigError
from mope.extras import require
from mope.features import EncodedRequests
from mope.forking import after_fork
from mope.grid import Array
from mope.provenance import file_sha256

ONNX_FOLDER, MANIFEST, MANIFEST_VERSION = "onnx", "manifest.json", 2
INPUTS = ("input_ids", "attention_mask", "numbers", "target_llm")
GATE, HEADS, EMBEDDING = "gate_logits", "head_logits", "text_embedding"

Precision = Literal["fp32", "fp16", "int8", "qdq"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FASTEST_ON_CPU: tuple[Precision, ...] = ("int8", "fp32", "fp16", "qdq")


def graph_file(network: str, precision: str) -> str:
    """Name of a graph's file in `onnx/`."""
    return f"{network}.{precision}.onnx"


def has_weights(folder: Path) -> bool:
    """Whether an artifact has the weights of its networks; a copy for serving has ONNX graphs alone."""
    return any((folder / f"{name}.safetensors").exists() for name in ("model", "gate"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact's ONNX graphs, after checking that it belongs to the artifact.

    A folder without any weights, as `mope-export --output` writes it for serving, has none that could have changed.

    Raises:
        ArtifactError: nothing was exported, the manifest is of another version, or the weights changed since.
    """
    path = folder / ONNX_FOLDER / MANIFEST
    advice = f"type: mope-export {folder} --to onnx" if has_weights(folder) else "copy the whole folder again"
    if not path.exists():
        raise ArtifactError(f"{folder} has no ONNX export; {advice}")
    manifest: dict[str, Any] = read_json(path)
    if manifest.get("format_version") != MANIFEST_VERSION:
        raise ArtifactError(
            f"{path} has version {manifest.get('format_version')}; this mope reads {MANIFEST_VERSION}: {advice}"
        )
    exported_from = manifest["exported_from"]
    saved = {name: entry["sha256"] for name, entry in read_json(folder / "files.json").items()}
    is_lean = not saved.keys() & exported_from.keys()
    stale = [name for name, sha256 in exported_from.items() if saved.get(name) != sha256]
    if stale and not is_lean:
        raise ArtifactError(
            f"{folder}: {', '.join(stale)} changed after the ONNX export; type again: mope-export {folder} --to onnx"
        )
    return manifest


def exported_precisions(folder: Path) -> tuple[Precision, ...]:
    """Precisions that an artifact's ONNX graphs can be loaded in; none if there are no graphs of its weights."""
    try:
        return _precisions(read_manifest(folder))
    except ArtifactError:
        return ()


def _precisions(manifest: Mapping[str, Any]) -> tuple[Precision, ...]:
    found = {graph["precision"] for graph in manifest["graphs"]}
    return tuple(precision for precision in PRECISIONS if precision in found)


def choose_precision(manifest: Mapping[str, Any]) -> Precision:
    """The precision to run on a CPU where none is named: the fastest whose quality was checked on real rows.

    Graphs in fp32 need no such check: their values are those of PyTorch.
    """

    def rank(precision: Precision) -> tuple[bool, int]:
        is_checked = precision == "fp32" or manifest["quality"].get(precision) is not None
        return not is_checked, FASTEST_ON_CPU.index(precision)

    return min(_precisions(manifest), key=rank)


def graph_paths(folder: Path, config: PredictorConfig, precision: str | None = None) -> tuple[Precision, list[Path]]:
    """The graphs of an artifact in one precision, in the order of `mope.config.network_names`, checked by their hash.

    Args:
        folder: of the artifact.
        config: of the artifact.
        precision: one of `PRECISIONS`; None for `choose_precision`.

    Raises:
        ConfigError: an unknown precision.
        ArtifactError: see `read_manifest`; or the precision was not exported, or a graph is missing or changed.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}")
    manifest = read_manifest(folder)
    chosen: Precision = choose_precision(manifest) if precision is None else precision
    graphs = {graph["network"]: graph for graph in manifest["graphs"] if graph["precision"] == chosen}
    if missing := [name for name in network_names(config) if name not in graphs]:
        raise ArtifactError(
            f"{folder} has no ONNX graph of {', '.join(missing)} in {chosen}, only {', '.join(_precisions(manifest))}; "
            f"type: mope-export {folder} --to {export_target(chosen)}"
        )
    paths = []
    for name in network_names(config):
        path = folder / ONNX_FOLDER / graphs[name]["file"]
        if not path.exists():
            raise ArtifactError(f"{folder} lacks {ONNX_FOLDER}/{path.name}; copy the whole folder again")
        if file_sha256(path) != graphs[name]["sha256"]:
            raise ArtifactError(f"{path} is not the file that was exported (SHA-256 differs); copy it again")
        paths.append(path)
    return chosen, paths


def export_target(precision: str) -> str:
    """What `mope-export --to` calls the ONNX graphs of a precision."""
    return "onnx" if precision == "fp32" else f"onnx-{precision}"


class OnnxBackend:
    """Runs exported graphs in ONNX Runtime on the CPU.

    One session serves any number of threads: ONNX Runtime releases the GIL and keeps no state between calls.

    A session does not survive a fork: its locks may be held by threads that the child lacks. A child opens sessions of
    its own at its first `run`, which takes about as long as loading did.

    Args:
        graphs: files of the graphs, in the order of `mope.config.network_names`.
        config: of the artifact.
        num_threads: threads of each call. One is best where several calls run side by side.
        precision: of the graphs.
        folder: of the artifact, whose weights `save` copies; None if it will not be saved.
    """

    name = "onnx"

    def __init__(
        self,
        graphs: Sequence[Path],
        config: PredictorConfig,
        num_threads: int = 1,
        *,
        precision: str = "fp32",
        folder: Path | None = None,
    ) -> None:
        if num_threads < 1:
            raise ConfigError(f"num_threads: got {num_threads}; expected at least 1")
        self.precision = precision
        self._folder, self._config, self._num_threads = folder, config, num_threads
        self._graphs = [(path, _version(path)) for path in graphs]
        self._opening = Lock()
        self._sessions = self._open()
        self._row_by_row = [_quantises_a_pass(path) for path in graphs]
        self._runners = self._new_runners()
        after_fork(self._leave_sessions)

    def _open(self) -> list[Any]:
        runtime = require("onnxruntime", "the onnx backend")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self._num_threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # a waiting thread must not burn a core
        return [runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path, _ in self._graphs]

    def _leave_sessions(self) -> None:
        """In the child of a fork: leave the parent's sessions alone for good.

        Deleting a session waits for its threads, which are not there. Its memory stays shared with the parent.
        """
        for session in self._sessions:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))  # it outlives even the end of the interpreter
        self._sessions, self._runners, self._opening = [], [], Lock()

    def _reopen(self) -> list[RunNetwork]:
        with self._opening:
            if not self._runners:
                for path, loaded in self._graphs:
                    if not path.exists() or _version(path) != loaded:
                        raise ArtifactError(
                            f"{path} changed after it was loaded, so a forked process can't open it; restart the server"
                        )
                self._sessions = self._open()
                self._runners = self._new_runners()
            return self._runners

    def _new_runners(self) -> list[RunNetwork]:
        pairs = zip(self._sessions, self._row_by_row, strict=True)
        return [_runner(session, row_by_row=row_by_row) for session, row_by_row in pairs]

    @classmethod
    def load(
        cls, folder: Path, config: PredictorConfig, num_threads: int = 1, precision: str | None = None
    ) -> OnnxBackend:
        """The graphs of an artifact folder.

        Args:
            folder: of the artifact.
            config: of the artifact.
            num_threads: threads of each call.
            precision: one of `PRECISIONS`; None for `choose_precision`.

        Raises:
            ArtifactError: see `graph_paths`.
            ConfigError: an unknown precision, or no thread.
            MissingExtraError: ONNX Runtime is not installed.
        """
        chosen, paths = graph_paths(folder, config, precision)
        return cls(paths, config, num_threads, precision=chosen, folder=folder)

    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch, in float32."""
        return run_networks(self._runners or self._reopen(), self._config, encoded, choose)

    def save(self, folder: Path) -> None:
        """Copy the weight files, as far as the artifact has any, into a folder."""
        if self._folder is not None:
            copy_weights(self._folder, folder, self._config)


def _version(path: Path) -> tuple[int, int]:
    """Changes when a file is replaced."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _runner(session: Any, *, row_by_row: bool) -> RunNetwork:
    outputs = [output.name for output in session.get_outputs()]

    def run(*inputs: Array) -> tuple[Array | None, Array | None, Array]:
        if row_by_row and len(inputs[0]) > 1:
            rows = [ask(*_alone(inputs, row)) for row in range(len(inputs[0]))]
            found = {name: np.concatenate([row[name] for row in rows]) for name in outputs}
        else:
            found = ask(*inputs)
        return found.get(GATE), found.get(HEADS), found[EMBEDDING]

    def ask(*inputs: Array) -> dict[str, Array]:
        return dict(zip(outputs, session.run(None, dict(zip(INPUTS, inputs, strict=True))), strict=True))

    return run


def _alone(inputs: Sequence[Array], row: int) -> tuple[Array, ...]:
    """One row of a batch, without its padding."""
    input_ids, mask, *others = (array[row : row + 1] for array in inputs)
    num_tokens = int(mask.sum())
    return input_ids[:, :num_tokens], mask[:, :num_tokens], *others


def _quantises_a_pass(graph: Path) -> bool:
    """Whether a graph takes the range of its activations from all rows of a pass, so that they change each other.

    ONNX Runtime has one scale for a whole tensor. One row at a time a request is predicted the same alone and in a
    batch. On a CPU core that takes as long as a batch does, since a single request keeps the core busy.
    """
    return b"DynamicQuantizeLinear" in graph.read_bytes()
