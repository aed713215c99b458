"""`mope-export`: from an artifact to the graphs in its folder `onnx/`, checked before they appear there.

Knows folders, manifests and the order of the work; how a graph is made and checked is in `graphs` and `precisions`,
what it is worth on real rows in `quality`.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mope import artifact
from mope.artifact import weight_files
from mope.backends.cuda_runtime import Cuda
from mope.backends.onnx_backend import (
    MANIFEST,
    MANIFEST_VERSION,
    ONNX_FOLDER,
    Graph,
    OnnxBackend,
    Precision,
    copy_graph,
    exported_precisions,
    graph_file,
    parse_manifest,
    read_graphs,
)
from mope.backends.torch_backend import TorchBackend
from mope.config import PredictorConfig, network_names
from mope.console import console, progress
from mope.errors import ArtifactError, ConfigError
from mope.export.copies import lean_copy
from mope.export.graphs import OPSET, TOLERANCES, check_form, check_values, write_graph
from mope.export.precisions import Inputs, write_fp16, write_int8, write_qdq
from mope.export.tensorrt import HardwareCompatibility, export_tensorrt
from mope.extras import require
from mope.files import room_for
from mope.flags import NONE
from mope.predictor import LengthPredictor
from mope.provenance import file_sha256
from mope.sealed import Sealed

PACKAGES = ("mope-llm", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
QUALITY_MODULES = ("pyarrow", "sklearn", "scipy", "tiktoken", "matplotlib")
MAX_TEST_ROWS = 1000
NUM_THREADS = 1  # of each call whose latency is measured


def export_onnx(
    folder: Path,
    precision: Precision = "fp32",
    *,
    data: str | None = None,
    max_test_rows: int = MAX_TEST_ROWS,
    output: Path | None = None,
) -> dict[str, Any]:
    """Write the networks of a saved predictor as ONNX graphs into its folder `onnx/`, beside other precisions there.

    Each graph is checked before it appears: form, operators, names, types and axes; its values against PyTorch over
    lengths up to the predictor's widest input, batches and padding; then the whole predictor on real test rows. If
    anything fails, nothing changes. Graphs of other weights, which an earlier training left, are removed.

    Args:
        folder: of the saved predictor.
        precision: `"fp32"`; `"fp16"`; `"int8"`, dynamic, for CPUs; `"qdq"`, static int8 for TensorRT.
        data: source of the rows that the quality is measured on and `"qdq"` is calibrated with, as `mope-train` takes
            it; None for what the predictor was trained on, `"none"` to measure neither quality nor latency.
        max_test_rows: test rows that the quality is measured on, at most.
        output: write a copy for serving there, without the weights that PyTorch needs, instead of changing `folder`.

    Returns:
        The manifest.

    Raises:
        ArtifactError: not a saved predictor, or one without weights.
        ConfigError: rows that can't be had, or an output that can't be written.
        MissingExtraError: packages of the extra `export`, or for the quality those of `train`, are not installed.
        ExportError: a graph is not what its network is, or costs more than 1 % of the mean absolute error.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "mope-export")
    config = artifact.check(folder)
    artifact.check_weights(folder, config, "an export")
    reference = LengthPredictor.from_pretrained(folder, backend="torch")
    saved = Sealed(folder)
    exported_from = {name: saved.files[name].sha256 for name in weight_files(config) if name in saved}
    with _adding(folder) if output is None else lean_copy(folder, config, output) as temporary:
        earlier = _kept(folder if output is None else output, precision, exported_from, temporary)
        quality = latency = calibration = None
        if data == NONE:
            if precision == "qdq":
                raise ConfigError(f"qdq is calibrated on training rows; --data {NONE} leaves it without any")
            console().print("quality and latency are not measured: there are no rows (--data none)", highlight=False)
        else:
            rows = _quality().find_rows(folder, reference, data, max_test_rows)
            if precision == "qdq":
                calibration = rows.calibration_batches(reference)
        max_tokens = config.max_input_tokens
        graphs = _write_graphs(folder, config, precision, max_tokens, temporary, calibration)
        if data != NONE:
            exported = copy.copy(reference)
            exported.backend = OnnxBackend(
                [Graph(temporary / graph["file"], graph["sha256"]) for graph in graphs],
                config,
                NUM_THREADS,
                precision=precision,
            )
            quality = _quality().measure_quality(reference, exported, rows)
            _quality().check_quality(precision, quality)
            console().print("measuring latency", highlight=False)
            latency = _quality().measure_latency(exported, rows.latency_requests(), NUM_THREADS)
        manifest = {
            "format_version": MANIFEST_VERSION,
            "exported_from": exported_from,
            "max_input_tokens": max_tokens,
            "graphs": [*earlier["graphs"], *graphs],
            "quality": {**earlier["quality"], precision: quality},
            "latency": {**earlier["latency"], precision: latency},
            "versions": {package: version(package) for package in PACKAGES},
        }
        artifact.write_json(temporary / MANIFEST, manifest)
    return manifest


def export_engines(
    folder: Path,
    precision: Precision = "fp16",
    *,
    data: str | None = None,
    max_test_rows: int = MAX_TEST_ROWS,
    hardware_compatibility: HardwareCompatibility = "none",
    version_compatible: bool = False,
    device: str = "cuda",
) -> dict[str, Any]:
    """Build TensorRT engines of a saved predictor for the GPU at hand, after exporting their graphs if need be.

    Their profiles are taken from the lengths of real training rows.

    Args:
        folder: of the saved predictor.
        precision: `"fp32"`, `"fp16"` or `"qdq"`.
        data: see `export_onnx`; with `"none"` the profiles are those of the last build.
        max_test_rows: see `export_onnx`.
        hardware_compatibility: see `mope.export.tensorrt.EngineBuilder`.
        version_compatible: see `mope.export.tensorrt.EngineBuilder`.
        device: `"cuda"`, `"cuda:1"`, ...

    Returns:
        The manifest of the engines.

    Raises:
        ConfigError: no GPU.
        MissingExtraError: TensorRT is not installed.
        ExportError: a graph or an engine is not what its network is.
    """
    require("tensorrt", "mope-export --to tensorrt")
    Cuda(device)  # a missing GPU is told before minutes of work
    artifact.check(folder)
    if precision not in exported_precisions(folder):
        export_onnx(folder, precision, data=data, max_test_rows=max_test_rows)
    lengths = None
    if data != NONE:
        predictor = LengthPredictor.from_pretrained(folder, backend="onnx", precision=precision)
        rows = _quality().find_rows(folder, predictor, data, max_test_rows)
        lengths = np.array([len(ids) for ids in predictor.encoder.encode(rows.train.requests()).token_ids])
    return export_tensorrt(
        folder,
        precision=precision,
        input_lengths=lengths,
        hardware_compatibility=hardware_compatibility,
        version_compatible=version_compatible,
        device=device,
    )


def _quality() -> ModuleType:
    """The module `quality`, which needs packages that an export without real rows does not."""
    for module in QUALITY_MODULES:
        require(module, f"the check on real rows (--data {NONE} leaves it out)")
    from mope.export import quality

    return quality


def _write_graphs(
    folder: Path,
    config: PredictorConfig,
    precision: Precision,
    max_tokens: int,
    temporary: Path,
    calibration: list[Inputs] | None,
) -> list[dict[str, Any]]:
    """Write and check the graph of each network; what the manifest says of them."""
    graphs: list[dict[str, Any]] = []
    networks = TorchBackend.load(folder, config).networks
    copies = TorchBackend.load(folder, config).networks
    with progress(f"exporting networks in {precision}", len(networks)) as advance:
        for name, network, own in zip(network_names(config), networks, copies, strict=True):
            path = temporary / graph_file(name, precision)
            if precision == "fp32":
                write_graph(own, path, max_tokens)
            elif precision == "fp16":
                write_fp16(own, path, max_tokens)
            else:
                with tempfile.TemporaryDirectory() as scratch:
                    fp32_path = temporary / graph_file(name, "fp32")
                    if not fp32_path.exists():  # not exported earlier
                        fp32_path = Path(scratch, path.name)
                        write_graph(own, fp32_path, max_tokens)
                    if precision == "int8":
                        write_int8(network, fp32_path, path)
                    else:
                        write_qdq(fp32_path, path, calibration or [])
            check_form(path, network)
            graphs.append(
                {
                    "network": name,
                    "precision": precision,
                    "file": path.name,
                    "opset": OPSET,
                    "bytes": path.stat().st_size,
                    "sha256": file_sha256(path),
                    "max_difference": check_values(path, network, max_tokens, TOLERANCES[precision]),
                }
            )
            advance(1)
    return graphs


def _kept(target: Path, precision: Precision, exported_from: Mapping[str, str], temporary: Path) -> dict[str, Any]:
    """What an earlier manifest says of other precisions of the same weights, whose graphs are copied on."""
    kept: dict[str, Any] = {"graphs": [], "quality": {}, "latency": {}}
    onnx = target / ONNX_FOLDER
    if not (onnx / MANIFEST).exists():
        return kept
    manifest = parse_manifest(target)
    if manifest.get("format_version") != MANIFEST_VERSION or manifest.get("exported_from") != exported_from:
        console().print(f"{onnx}: graphs of other weights or of an older mope are removed", highlight=False)
        return kept
    others = [graph for graph in read_graphs(target, manifest) if graph["precision"] != precision]
    damaged = set()
    for graph in others:
        try:
            copy_graph(target, graph, temporary)
            Graph(temporary / graph["file"], graph["sha256"]).read()  # nothing but what mope-export writes
        except ArtifactError:
            damaged.add(graph["precision"])
    for name in sorted(damaged):
        console().print(f"{onnx}: the graphs in {name} are damaged and are removed", highlight=False)
    for graph in others:
        if graph["precision"] in damaged:
            (temporary / graph["file"]).unlink(missing_ok=True)
    others = [graph for graph in others if graph["precision"] not in damaged]
    names = {graph["precision"] for graph in others}
    return {
        "graphs": others,
        **{part: {name: manifest[part].get(name) for name in sorted(names)} for part in ("quality", "latency")},
    }


@contextlib.contextmanager
def _adding(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes the artifact's `onnx/` when the block ends without an error."""
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{ONNX_FOLDER}-", dir=folder))
    except OSError as error:
        raise ConfigError(f"{folder} can't be written ({error.strerror}); type --output FOLDER for a copy") from error
    temporary.chmod(0o755)
    with room_for(f"{folder / ONNX_FOLDER}"):
        try:
            yield temporary
            artifact.put_in_place(temporary, folder / ONNX_FOLDER)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
