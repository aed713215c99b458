"""Running an exported predictor with ONNX Runtime: no torch, one thread, no spinning.

Knows the folder `onnx/` that `mope-export` wrote into an artifact; does not know how graphs are made.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mope.artifact import read_json
from mope.backends import ChooseExperts, RawOutputs, RunNetwork, run_networks
from mope.config import PredictorConfig, network_names
from mope.errors import ArtifactError, ConfigError
from mope.extras import require
from mope.features import EncodedRequests
from mope.grid import Array
from mope.provenance import file_sha256

ONNX_FOLDER, MANIFEST, MANIFEST_VERSION = "onnx", "manifest.json", 1
INPUTS = ("input_ids", "attention_mask", "numbers", "target_llm")
GATE, HEADS, EMBEDDING = "gate_logits", "head_logits", "text_embedding"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact's ONNX graphs, after checking that they belong to it and are unchanged.

    Raises:
        ArtifactError: nothing was exported, the weights changed since, or a graph is missing or changed.
    """
    onnx = folder / ONNX_FOLDER
    if not (onnx / MANIFEST).exists():
        raise ArtifactError(f"{folder} has no ONNX export; type: mope-export {folder} --to onnx")
    manifest: dict[str, Any] = read_json(onnx / MANIFEST)
    if manifest.get("format_version") != MANIFEST_VERSION:
        raise ArtifactError(
            f"{onnx / MANIFEST} has version {manifest.get('format_version')}; this mope reads {MANIFEST_VERSION}: "
            f"mope-export {folder} --to onnx"
        )
    saved = {name: entry["sha256"] for name, entry in read_json(folder / "files.json").items()}
    stale = [name for name, sha256 in manifest["exported_from"].items() if saved.get(name) != sha256]
    if stale:
        raise ArtifactError(
            f"{folder}: {', '.join(stale)} changed after the ONNX export; type again: mope-export {folder} --to onnx"
        )
    for graph in manifest["graphs"]:
        path = onnx / graph["file"]
        if not path.exists():
            raise ArtifactError(f"{folder} lacks {ONNX_FOLDER}/{graph['file']}; copy the whole folder again")
        if file_sha256(path) != graph["sha256"]:
            raise ArtifactError(f"{path} is not the file that was exported (SHA-256 differs); copy it again")
    return manifest


def graph_paths(folder: Path, config: PredictorConfig, precision: str = "fp32") -> tuple[str, list[Path]]:
    """The graphs of an artifact in one precision, in the order of `mope.config.network_names`, checked by their hash.

    Raises:
        ArtifactError: see `read_manifest`; or the precision was not exported.
    """
    files = {
        graph["network"]: graph["file"] for graph in read_manifest(folder)["graphs"] if graph["precision"] == precision
    }
    if missing := [name for name in network_names(config) if name not in files]:
        raise ArtifactError(
            f"{folder} has no ONNX graph of {', '.join(missing)} in {precision}; "
            f"type: mope-export {folder} --to {'onnx' if precision == 'fp32' else f'onnx-{precision}'}"
        )
    return precision, [folder / ONNX_FOLDER / files[name] for name in network_names(config)]


class OnnxBackend:
    """Runs exported graphs in ONNX Runtime on the CPU.

    One session serves any number of threads: ONNX Runtime releases the GIL and keeps no state between calls.

    Args:
        folder: of the artifact, whose manifest was checked.
        graphs: file names of the graphs in `onnx/`, in the order of `mope.config.network_names`.
        config: of the artifact.
        num_threads: threads of each call. One is best where several calls run side by side.
    """

    name = "onnx"

    def __init__(self, folder: Path, graphs: Sequence[str], config: PredictorConfig, num_threads: int = 1) -> None:
        if num_threads < 1:
            raise ConfigError(f"num_threads: got {num_threads}; expected at least 1")
        runtime = require("onnxruntime", "the onnx backend")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # a waiting thread must not burn a core
        self._folder, self._config = folder, config
        self._runners = [
            _runner(runtime.InferenceSession(folder / ONNX_FOLDER / name, options, providers=["CPUExecutionProvider"]))
            for name in graphs
        ]

    @classmethod
    def load(cls, folder: Path, config: PredictorConfig, num_threads: int = 1) -> OnnxBackend:
        """The graphs of an artifact folder.

        Raises:
            ArtifactError: see `read_manifest`.
            MissingExtraError: ONNX Runtime is not installed.
        """
        files = {graph["network"]: graph["file"] for graph in read_manifest(folder)["graphs"]}
        return cls(folder, [files[name] for name in network_names(config)], config, num_threads)

    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch, in float32."""
        return run_networks(self._runners, self._config, encoded, choose)

    def save(self, folder: Path) -> None:
        """Copy the weight files into a folder."""
        for name in network_names(self._config):
            shutil.copyfile(self._folder / f"{name}.safetensors", folder / f"{name}.safetensors")


def _runner(session: Any) -> RunNetwork:
    outputs = [output.name for output in session.get_outputs()]

    def run(*inputs: Array) -> tuple[Array | None, Array | None, Array]:
        found: Mapping[str, Array] = dict(
            zip(outputs, session.run(None, dict(zip(INPUTS, inputs, strict=True))), strict=True)
        )
        return found.get(GATE), found.get(HEADS), found[EMBEDDING]

    return run
