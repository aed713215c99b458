"""A model repository for NVIDIA Triton: a copy of a saved predictor for serving, and what Triton needs around it.

    README.md                how to start Triton and how to ask, the page TRITON.md of this folder
    NAME/config.pbtxt        inputs, outputs, batching, instances
    NAME/warmup/prompt       a request that each instance answers before it is ready
    NAME/1/model.py          `triton_model.py` of this folder
    NAME/1/artifact/         the predictor, without the weights that PyTorch needs

Needs neither torch nor onnx where the predictor was exported before.
"""

from __future__ import annotations

import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mope import artifact
from mope.backends.onnx_backend import (
    MANIFEST,
    Precision,
    choose_precision,
    copy_graph,
    exported_precisions,
    has_weights,
    read_manifest,
)
from mope.errors import ConfigError
from mope.export.copies import lean_copy
from mope.extras import require
from mope.files import room_for, write_text

HERE = Path(__file__).parent
PAGE_NAME = "chat-small"  # what the model is called in TRITON.md
WARM_UP = "Explain TCP slow start."
LEVELS = (0.1, 0.5, 0.9, 0.99)

CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {max_batch}  # requests of one pass, and rows of one request

# each request gives one of the two
input [
  {{ name: "PROMPT" data_type: TYPE_STRING dims: [ 1 ] optional: true }},
  {{ name: "REQUEST" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "MEDIAN" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "MEAN" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "QUANTILES" data_type: TYPE_FP32 dims: [ -1 ] }},
  {{ name: "SOURCE" data_type: TYPE_STRING dims: [ 1 ] }}
]
parameters [ {{ key: "levels" value {{ string_value: "{levels}" }} }} ]  # of QUANTILES

dynamic_batching {{
  max_queue_delay_microseconds: {delay_us}
  default_queue_policy {{ max_queue_size: 256 }}  # Triton refuses further requests
}}
instance_group [ {{ count: {instances} kind: {kind} }} ]
model_warmup [
  {{
    name: "prompt"
    batch_size: 1
    inputs {{ key: "PROMPT" value {{ data_type: TYPE_STRING dims: [ 1 ] input_data_file: "prompt" }} }}
  }}
]
"""
# A pass through a CPU costs each row the same, so small batches answer sooner. A GPU gains by waiting for more rows.
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {"max_batch": 8, "delay_us": 0, "instances": 2, "kind": "KIND_CPU"},
    "cuda": {"max_batch": 32, "delay_us": 1500, "instances": 1, "kind": "KIND_GPU"},
}


def export_triton(
    folder: Path,
    output: Path,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    data: str | None = None,
    max_test_rows: int = 1000,
) -> dict[str, Any]:
    """Write a model repository for Triton. It appears whole or not at all, and `folder` stays as it is.

    The graph is the fastest that was exported for the CPU, or the one in fp16 for a GPU. If there is none, int8 or fp16
    is exported into the copy.

    Args:
        folder: of the saved predictor; the model is named after it.
        output: the repository, a folder that is empty or does not exist.
        device: where Triton runs the model.
        data: see `mope.export.run.export_onnx`; used if a graph is exported.
        max_test_rows: see `mope.export.run.export_onnx`; used if a graph is exported.

    Returns:
        The manifest of the ONNX graphs in the repository.

    Raises:
        ConfigError: `output` holds files, or can't be written.
        ArtifactError: not a saved predictor, or a copy for serving without a graph for `device`.
        MissingExtraError: an export needs packages that are not installed.
        ExportError: see `mope.export.run.export_onnx`.
    """
    config = artifact.check(folder)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name)
    if not has_weights(folder):
        read_manifest(folder)  # says what is wrong with it, if it is that
    exported = exported_precisions(folder)
    precision: Precision = "int8" if device == "cpu" else "fp16"  # what `onnx-gpu` runs
    if device == "cpu" and exported:
        precision = choose_precision(read_manifest(folder))
    with _new_folder(output) as repository:
        version = repository / name / "1"
        version.mkdir(parents=True)
        if precision in exported:
            manifest = read_manifest(folder)
            manifest["graphs"] = [graph for graph in manifest["graphs"] if graph["precision"] == precision]
            with lean_copy(folder, config, version / "artifact") as onnx:
                for graph in manifest["graphs"]:
                    copy_graph(folder, graph, onnx)
                artifact.write_json(onnx / MANIFEST, manifest)
        else:
            artifact.check_weights(folder, config, f"an export in {precision}")
            require("torch", "mope-export")
            from mope.export.run import export_onnx

            manifest = export_onnx(
                folder, precision, data=data, max_test_rows=max_test_rows, output=version / "artifact"
            )
        shutil.copyfile(HERE / "triton_model.py", version / "model.py")
        levels = ",".join(f"{level:g}" for level in LEVELS)
        write_text(version.parent / "config.pbtxt", CONFIG.format(name=name, levels=levels, **SETTINGS[device]))
        (version.parent / "warmup").mkdir()
        text = WARM_UP.encode()
        (version.parent / "warmup" / "prompt").write_bytes(struct.pack("<I", len(text)) + text)
        page = (HERE / "TRITON.md").read_text(encoding="utf-8")
        write_text(repository / "README.md", page.replace(PAGE_NAME, name))
    return manifest


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends without an error."""
    output = output.resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(
            f"--output {output} exists; a model repository is a new folder: choose another, then copy the model's "
            "folder from it into a repository of yours"
        )
    with room_for(f"--output {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            artifact.put_in_place(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
