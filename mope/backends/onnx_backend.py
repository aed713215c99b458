"""Running an exported predictor with ONNX Runtime: no torch, one thread, no spinning.

Knows the folder `onnx/` that `mope-export` wrote into an artifact; does not know how graphs are made.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import BaseModel, ValidationError

from mope.artifact import write_json
from mope.backends import ChooseExperts, RawOutputs, RunNetwork, copy_weights, run_networks
from mope.backends.onnx_scan import check_graph
from mope.config import PredictorConfig, network_names
from mope.errors import ArtifactError, ConfigError
from mope.extras import require
from mope.features import EncodedRequests
from mope.forking import after_fork
from mope.grid import Array
from mope.sealed import GIB, MOST_JSON, NETWORKS, Sealed, cleaned, parse_json, read_bytes, sha256_of, shown

ONNX_FOLDER, MANIFEST, MANIFEST_VERSION = "onnx", "manifest.json", 2
INPUTS = ("input_ids", "attention_mask", "numbers", "target_llm")
GATE, HEADS, EMBEDDING = "gate_logits", "head_logits", "text_embedding"

Precision = Literal["fp32", "fp16", "int8", "qdq"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FASTEST_ON_CPU: tuple[Precision, ...] = ("int8", "fp32", "fp16", "qdq")
MOST_BYTES = 2 * GIB  # of a graph; a protocol buffer has no more
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_logger = logging.getLogger("mope")


class Graph(NamedTuple):
    """A graph's file, and the SHA-256 that it has to have."""

    path: Path
    sha256: str

    @classmethod
    def made_here(cls, path: Path) -> Graph:
        """A graph that this process wrote."""
        return cls(path, sha256_of(path.parent, path.name, MOST_BYTES))

    def read(self) -> bytes:
        """The bytes of the file, once their hash and what they hold were checked.

        Raises:
            ArtifactError: it is missing, another file, or no graph that mope-export writes.
        """
        # the folder of the artifact, in which links may lead to the Hugging Face cache
        path = self.path.absolute()
        content = read_bytes(path.parent.parent, f"{path.parent.name}/{path.name}", MOST_BYTES)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ArtifactError(
                f"{shown(self.path)} is not the file that was exported (SHA-256 differs); copy it again"
            )
        check_graph(content, shown(self.path))
        return content


class _GraphEntry(BaseModel):
    network: str
    precision: Precision
    file: str
    sha256: str


class _Manifest(BaseModel):
    """What is read of a manifest; more may stand there."""

    exported_from: dict[str, str]
    graphs: list[_GraphEntry]
    quality: dict[str, dict[str, Any] | None]


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
    at = shown(folder)
    advice = f"type: mope-export {at} --to onnx" if has_weights(folder) else "copy the whole folder again"
    if not path.exists():
        raise ArtifactError(f"{at} has no ONNX export; {advice}")
    manifest: dict[str, Any] = parse_manifest(folder)
    version = manifest.get("format_version")
    if version != MANIFEST_VERSION:
        raise ArtifactError(
            f"{shown(path)} has version {cleaned(version, 40)}; this mope reads {MANIFEST_VERSION}: {advice}"
        )
    read_graphs(folder, manifest)
    exported_from = manifest["exported_from"]
    saved = {name: fingerprint.sha256 for name, fingerprint in Sealed(folder).files.items()}
    is_lean = not saved.keys() & exported_from.keys()
    stale = [name for name, sha256 in exported_from.items() if saved.get(name) != sha256]
    if stale and not is_lean:
        raise ArtifactError(
            f"{at}: {cleaned(', '.join(stale))} changed after the ONNX export; type again: mope-export {at} --to onnx"
        )
    return manifest


def read_graphs(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a manifest says of its graphs.

    Raises:
        ArtifactError: a value of another kind, or a name that mope-export does not give.
    """
    where = shown(folder / ONNX_FOLDER / MANIFEST)
    try:
        for graph in _Manifest.model_validate(manifest).graphs:
            is_known = graph.network in NETWORKS and graph.file == graph_file(graph.network, graph.precision)
            if not (is_known and _SHA256.match(graph.sha256)):
                name = cleaned(repr(graph.file), 80)
                raise ArtifactError(f"{where} names {name}, which is no file of mope-export; export again")
    except ValidationError as error:
        first = error.errors()[0]
        place = cleaned(".".join(map(str, first["loc"])), 80)
        raise ArtifactError(f"{where}: {place}: {cleaned(first['msg'])}; export again") from error
    found: list[dict[str, Any]] = manifest["graphs"]
    return found


def parse_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of an artifact's ONNX graphs says, unchecked.

    Raises:
        ArtifactError: it is no regular file, or no JSON object.
    """
    name = f"{ONNX_FOLDER}/{MANIFEST}"
    manifest = parse_json(read_bytes(folder, name, MOST_JSON), folder / name)
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{shown(folder / name)} is no manifest; copy the whole folder again")
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


def find_graphs(folder: Path, config: PredictorConfig, precision: str | None = None) -> tuple[Precision, list[Graph]]:
    """The graphs of an artifact in one precision, in the order of `mope.config.network_names`; none is read yet.

    Args:
        folder: of the artifact.
        config: of the artifact.
        precision: one of `PRECISIONS`; None for `choose_precision`.

    Raises:
        ConfigError: an unknown precision.
        ArtifactError: see `read_manifest`; or the precision was not exported.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}")
    manifest = read_manifest(folder)
    chosen: Precision = choose_precision(manifest) if precision is None else precision
    graphs = {graph["network"]: graph for graph in manifest["graphs"] if graph["precision"] == chosen}
    if missing := [name for name in network_names(config) if name not in graphs]:
        raise ArtifactError(
            f"{shown(folder)} has no ONNX graph of {', '.join(missing)} in {chosen}, only "
            f"{', '.join(_precisions(manifest))}; type: mope-export {shown(folder)} --to {export_target(chosen)}"
        )
    own = folder / ONNX_FOLDER
    return chosen, [Graph(own / graph_file(name, chosen), graphs[name]["sha256"]) for name in network_names(config)]


def copy_graphs(folder: Path, target: Path) -> None:
    """Copy an artifact's ONNX graphs, checked by their hashes; graphs of other weights are left out.

    Raises:
        ArtifactError: a graph is missing, or is not the file that was exported.
    """
    if not os.path.lexists(folder / ONNX_FOLDER / MANIFEST):
        return
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        _logger.warning("left out of the copy: %s", error)
        return
    (target / ONNX_FOLDER).mkdir()
    for graph in manifest["graphs"]:
        copy_graph(folder, graph, target / ONNX_FOLDER)
    write_json(target / ONNX_FOLDER / MANIFEST, manifest)


def copy_graph(folder: Path, graph: Mapping[str, Any], target: Path) -> None:
    """Copy a graph that a manifest names into a folder, see `copy_graphs`."""
    name = f"{ONNX_FOLDER}/{graph_file(graph['network'], graph['precision'])}"
    if sha256_of(folder, name, MOST_BYTES, target / Path(name).name) != graph["sha256"]:
        raise ArtifactError(f"{shown(folder / name)} is not the file that was exported (SHA-256 differs)")


def export_target(precision: str) -> str:
    """What `mope-export --to` calls the ONNX graphs of a precision."""
    return "onnx" if precision == "fp32" else f"onnx-{precision}"


class OnnxBackend:
    """Runs exported graphs in ONNX Runtime on the CPU.

    One session serves any number of threads: ONNX Runtime releases the GIL and keeps no state between calls.

    A session does not survive a fork: its locks may be held by threads that the child lacks. A child opens sessions of
    its own at its first `run`, which takes about as long as loading did.

    Args:
        graphs: in the order of `mope.config.network_names`.
        config: of the artifact.
        num_threads: threads of each call. One is best where several calls run side by side.
        precision: of the graphs.
        folder: of the artifact, whose weights `save` copies; None if it will not be saved.
    """

    name = "onnx"

    def __init__(
        self,
        graphs: Sequence[Graph],
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
        self._graphs = list(graphs)
        self._opening = Lock()
        self._open()
        after_fork(self._leave_sessions)

    def _open(self) -> None:
        runtime = require("onnxruntime", "the onnx backend")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self._num_threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # a waiting thread must not burn a core
        self._sessions: list[Any] = []
        runners: list[RunNetwork] = []
        for graph in self._graphs:
            content = graph.read()
            session = open_session(runtime, content, ["CPUExecutionProvider"], options)
            self._sessions.append(session)
            runners.append(_runner(session, row_by_row=_quantises_a_pass(content)))
        self._runners = runners

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
                try:
                    self._open()
                except ArtifactError as error:
                    raise ArtifactError(
                        f"{error}; the graphs changed after they were loaded, so a forked process can't open them; "
                        "restart the server"
                    ) from error
            return self._runners

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
            ArtifactError: see `find_graphs` and `Graph.read`.
            ConfigError: an unknown precision, or no thread.
            MissingExtraError: ONNX Runtime is not installed.
        """
        chosen, graphs = find_graphs(folder, config, precision)
        return cls(graphs, config, num_threads, precision=chosen, folder=folder)

    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch, in float32."""
        return run_networks(self._runners or self._reopen(), self._config, encoded, choose)

    def save(self, folder: Path) -> None:
        """Copy the weight files, as far as the artifact has any, into a folder."""
        if self._folder is not None:
            copy_weights(self._folder, folder, self._config)


def open_session(runtime: Any, graph: bytes, providers: Sequence[Any], options: Any = None) -> Any:
    """A session of a graph's bytes, which are freed: ONNX Runtime keeps what it needs of them."""
    session = runtime.InferenceSession(graph, options, providers=providers)
    session.disable_fallback()  # it would open the graph again; an error stays an error, too
    if hasattr(session, "_model_bytes"):
        session._model_bytes = None
    return session


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
        try:
            found = session.run(None, dict(zip(INPUTS, inputs, strict=True)))
        except Exception as error:  # ONNX Runtime has a class of its own for each kind
            reason = cleaned((str(error).splitlines() or [type(error).__name__])[0])
            raise ArtifactError(f"the ONNX graph can't be run on a request: {reason}") from error
        return dict(zip(outputs, found, strict=True))

    return run


def _alone(inputs: Sequence[Array], row: int) -> tuple[Array, ...]:
    """One row of a batch, without its padding."""
    input_ids, mask, *others = (array[row : row + 1] for array in inputs)
    num_tokens = int(mask.sum())
    return input_ids[:, :num_tokens], mask[:, :num_tokens], *others


def _quantises_a_pass(graph: bytes) -> bool:
    """Whether a graph takes the range of its activations from all rows of a pass, so that they change each other.

    ONNX Runtime has one scale for a whole tensor. One row at a time a request is predicted the same alone and in a
    batch. On a CPU core that takes as long as a batch does, since a single request keeps the core busy.
    """
    return b"DynamicQuantizeLinear" in graph
