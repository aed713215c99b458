"""`mope-export`: from an artifact to the graphs in its folder `onnx/`, checked before they appear there.

Knows folders and manifests; how a graph is made and checked is in `graphs`.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mope import artifact
from mope.backends.onnx_backend import MANIFEST, MANIFEST_VERSION, ONNX_FOLDER
from mope.backends.torch_backend import TorchBackend
from mope.config import network_names
from mope.console import progress
from mope.export.graphs import OPSET, check_form, check_values, write_graph
from mope.extras import require
from mope.provenance import file_sha256

PACKAGES = ("mope-llm", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def export_onnx(folder: Path) -> dict[str, Any]:
    """Write the networks of a saved predictor as ONNX graphs into its folder `onnx/`.

    Each graph is checked: form, operators, names, free axes, and its values against PyTorch over lengths up to
    the predictor's widest input, batches and padding. An earlier export is replaced; if a check fails, it stays.

    Args:
        folder: of the saved predictor.

    Returns:
        The manifest.

    Raises:
        ArtifactError: not a saved predictor.
        MissingExtraError: packages of the extra `export` are not installed.
        ExportError: a graph is not what its network is.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "mope-export")
    config = artifact.check(folder)
    networks = TorchBackend.load(folder, config).networks
    copies = TorchBackend.load(folder, config).networks
    max_tokens = config.max_input_tokens
    graphs: list[dict[str, Any]] = []
    temporary = Path(tempfile.mkdtemp(prefix=f".{ONNX_FOLDER}-", dir=folder))
    temporary.chmod(0o755)
    try:
        with progress("exporting networks", len(networks)) as advance:
            for name, network, own in zip(network_names(config), networks, copies, strict=True):
                path = temporary / f"{name}.onnx"
                write_graph(own, path, max_tokens)
                check_form(path, network)
                graphs.append(
                    {
                        "network": name,
                        "file": path.name,
                        "precision": "fp32",
                        "opset": OPSET,
                        "bytes": path.stat().st_size,
                        "sha256": file_sha256(path),
                        "max_difference": check_values(path, network, max_tokens),
                    }
                )
                advance(1)
        weights = [f"{name}.safetensors" for name in network_names(config)]
        manifest = {
            "format_version": MANIFEST_VERSION,
            "exported_from": {name: file_sha256(folder / name) for name in weights},
            "max_input_tokens": max_tokens,
            "graphs": graphs,
            "versions": {package: version(package) for package in PACKAGES},
        }
        artifact.write_json(temporary / MANIFEST, manifest)
        shutil.rmtree(folder / ONNX_FOLDER, ignore_errors=True)
        temporary.rename(folder / ONNX_FOLDER)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest
