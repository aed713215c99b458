"""ONNX export: the graphs say what the networks say, serve without torch, and never go stale unnoticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from rows import write_lengths

from mope import LengthPredictor, artifact
from mope.backends.onnx_backend import (
    PRECISIONS,
    OnnxBackend,
    Precision,
    choose_precision,
    exported_precisions,
    read_manifest,
)
from mope.backends.torch_backend import TorchBackend
from mope.config import network_names
from mope.errors import ArtifactError, ConfigError, ExportError
from mope.export import run as export_run
from mope.export.cli import main
from mope.export.graphs import check_form, check_values
from mope.export.run import export_onnx

REQUESTS: list[Any] = [
    "Hi",
    {"prompt": "Explain TCP slow start in 50 words.", "target_llm": "gpt-4"},
    {"prompt": "write " * 200, "max_tokens": 64},
    {"prompt": "Why?", "history": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y " * 90}]},
]
# of the cumulative distribution; the tiny predictor's measured differences are a third of these
CLOSE = {"fp32": 1e-4, "fp16": 2e-3, "int8": 2e-2, "qdq": 2e-2}
DESIGNS = ("shared", "separate")

pytestmark = pytest.mark.usefixtures("graphs_made_once")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lengths(tmp_path_factory.mktemp("rows") / "rows.jsonl", 400)


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_separate: Path, rows: Path, graphs_made_once: None
) -> dict[str, Path]:
    """Both designs, each exported in all precisions, one after the other."""
    folders = {}
    for name, source in zip(DESIGNS, (tiny, tiny_separate), strict=True):
        folders[name] = shutil.copytree(source, tmp_path_factory.mktemp("exported") / name)
        for precision in PRECISIONS:
            export_onnx(folders[name], precision, data=str(rows) if precision == "qdq" else "none")
    return folders


@pytest.fixture
def copy(exported: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exported["shared"], tmp_path / "copy")


def load(folder: Path, precision: str | None = None) -> LengthPredictor:
    """The predictor of a folder, run by its graphs in a precision."""
    predictor = LengthPredictor.from_pretrained(folder, backend="onnx")
    predictor.backend = OnnxBackend.load(folder, predictor.config, precision=precision)
    return predictor


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("design", DESIGNS)
def test_graphs_predict_what_torch_predicts(exported: dict[str, Path], design: str, precision: str) -> None:
    by_torch = LengthPredictor.from_pretrained(exported[design], backend="torch").predict_batch(REQUESTS)
    predictor = load(exported[design], precision)
    for one, other in zip(by_torch, predictor.predict_batch(REQUESTS), strict=True):
        np.testing.assert_allclose(one.cumulative, other.cumulative, atol=CLOSE[precision])
        assert one.source == other.source
    alone = predictor.predict_batch(REQUESTS[:1])[0]  # beside longer requests there is padding, which changes little
    np.testing.assert_allclose(alone.cumulative, by_torch[0].cumulative, atol=CLOSE[precision])


def behind(graph: Any, output: str) -> set[str]:
    """Names of all that an output is computed from."""
    makers = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    wanted = [output]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            wanted += makers[name].input if name in makers else []
    return found


def test_less_precision_is_really_less(exported: dict[str, Path]) -> None:
    """Other numbers, weights of another type in the trunk, float32 in the heads; a file that is smaller."""
    answers = {name: load(exported["shared"], name).predict("Explain it.").cumulative.tobytes() for name in PRECISIONS}
    assert len(set(answers.values())) == len(PRECISIONS)
    kinds: dict[str, dict[str, set[str]]] = {}
    for precision in PRECISIONS:
        graph = onnx.load(exported["shared"] / "onnx" / f"model.{precision}.onnx").graph
        kinds[precision] = {"trunk": set(), "head": set(), "operators": {node.op_type for node in graph.node}}
        trunk = behind(graph, "text_embedding")
        for tensor in graph.initializer:
            part = "trunk" if tensor.name in trunk else "head"
            if np.prod(tensor.dims) >= 16 * 8:
                kinds[precision][part].add(onnx.TensorProto.DataType.Name(tensor.data_type))
        assert kinds[precision]["head"] == {"FLOAT"}
    assert kinds["fp32"]["trunk"] == {"FLOAT"}
    assert kinds["fp16"]["trunk"] == {"FLOAT16"}
    assert "INT8" in kinds["int8"]["trunk"]
    assert kinds["int8"]["operators"] >= {"DynamicQuantizeLinear", "MatMulInteger"}
    assert kinds["qdq"]["operators"] >= {"QuantizeLinear", "DequantizeLinear"} - {"DynamicQuantizeLinear"}


def test_every_token_s_vector_is_rounded_by_its_own_scale(exported: dict[str, Path]) -> None:
    """One scale for a whole table is what its longest row needs, and coarse for all others."""
    tensors = {}
    for precision in ("fp32", "int8"):
        graph = onnx.load(exported["shared"] / "onnx" / f"model.{precision}.onnx").graph
        tensors[precision] = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    table = next(node.input[0] for node in graph.node if "input_ids" in node.input and node.op_type == "Gather")
    name = table.removesuffix("_quantized").removesuffix("_scale")
    rows, rounded = (tensors[kind][one] for kind, one in (("fp32", name), ("int8", f"{name}_quantized")))
    assert rounded.dtype == np.int8
    steps = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert (np.abs(tensors["int8"][f"{name}_scale"] * rounded - rows) <= 0.5001 * steps).all()


def test_graphs_tell_nothing_of_the_machine(exported: dict[str, Path]) -> None:
    for path in (exported["shared"] / "onnx").iterdir():
        content = path.read_bytes()
        assert b".py" not in content
        assert str(exported["shared"].parent).encode() not in content


def test_serving_needs_no_torch(exported: dict[str, Path]) -> None:
    probe = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from mope import LengthPredictor\n"
        f"predictor = LengthPredictor.from_pretrained({str(exported['separate'])!r}, backend='onnx')\n"
        "print(predictor.predict('Explain TCP slow start.').source)\n"
        "import asyncio\n"
        "print(asyncio.run(predictor.predict_async('Explain TCP slow start.', deadline_s=60)).source)\n"
        "loaded = {name for name, module in list(sys.modules.items()) if module}\n"
        "print(sorted({'rich', 'huggingface_hub', 'torch', 'transformers'} & loaded))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "model\nmodel\n[]\n"), done.stderr


@pytest.mark.parametrize("design", DESIGNS)
def test_the_manifest_names_every_graph(exported: dict[str, Path], design: str) -> None:
    manifest = read_manifest(exported[design])
    names = network_names(LengthPredictor.from_pretrained(exported[design], backend="torch").config)
    found = {(graph["network"], graph["precision"]): graph for graph in manifest["graphs"]}
    assert set(found) == {(name, precision) for name in names for precision in PRECISIONS}
    for (name, precision), graph in found.items():
        path = exported[design] / "onnx" / graph["file"]
        assert (path.name, graph["opset"]) == (f"{name}.{precision}.onnx", 20)
        assert path.stat().st_size == graph["bytes"]
        assert 0 <= graph["max_difference"] <= {"fp32": 1e-4, "fp16": 2e-2}.get(precision, 1.0)
    assert set(manifest["quality"]) == set(manifest["latency"]) == set(PRECISIONS)
    assert manifest["quality"]["int8"] is None  # exported without rows
    assert manifest["quality"]["qdq"]["num_rows"] > 1
    assert exported_precisions(exported[design]) == PRECISIONS


def test_nothing_exported_says_what_to_type(tiny: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no ONNX export; type: mope-export .*tiny --to onnx"):
        LengthPredictor.from_pretrained(tiny, backend="onnx")
    assert exported_precisions(tiny) == ()


@pytest.mark.parametrize(
    ("checked", "exported_in", "chosen"),
    [
        ((), ("fp32", "int8"), "fp32"),  # int8 is faster, but nobody knows what it costs
        (("int8",), ("fp32", "int8", "qdq"), "int8"),
        (("qdq",), ("fp16", "qdq", "int8"), "qdq"),
        ((), ("fp16",), "fp16"),
    ],
)
def test_the_fastest_checked_precision_is_the_default(
    checked: tuple[str, ...], exported_in: tuple[str, ...], chosen: str
) -> None:
    graphs = [{"network": "model", "precision": name} for name in exported_in]
    quality = {name: {"mae": 1.0} if name in checked else None for name in exported_in}
    assert choose_precision({"graphs": graphs, "quality": quality}) == chosen


def test_a_precision_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    export_onnx(folder, "fp32", data="none")
    with pytest.raises(ArtifactError, match=r"no ONNX graph of model in int8, only fp32; type: .* --to onnx-int8"):
        load(folder, "int8")
    with pytest.raises(ConfigError, match="unknown precision 'int4'; expected one of 'fp32'"):
        load(folder, "int4")


def test_an_export_of_other_weights_is_refused_and_removed(copy: Path) -> None:
    manifest = json.loads((copy / "onnx" / "manifest.json").read_text())
    manifest["exported_from"]["model.safetensors"] = "0" * 64
    (copy / "onnx" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"model\.safetensors changed after the ONNX export"):
        LengthPredictor.from_pretrained(copy, backend="onnx")
    assert exported_precisions(copy) == ()
    export_onnx(copy, "fp32", data="none")
    assert sorted(path.name for path in (copy / "onnx").iterdir()) == ["manifest.json", "model.fp32.onnx"]


def test_a_changed_or_missing_graph_is_refused(copy: Path) -> None:
    graph = copy / "onnx" / "model.int8.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    assert load(copy, "fp32").predict("Hi").source == "model"  # the others are whole
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        load(copy, "int8")
    graph.unlink()
    with pytest.raises(ArtifactError, match=r"lacks onnx/model\.int8\.onnx"):
        load(copy, "int8")


def test_adding_a_precision_keeps_the_others_but_the_damaged(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(copy / "onnx")
    graph = copy / "onnx" / "model.qdq.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    manifest = export_onnx(copy, "int8", data="none")
    after = listing(copy / "onnx")
    assert set(before) - set(after) == {"model.qdq.onnx"}
    assert {name: after[name] for name in ("model.fp32.onnx", "model.fp16.onnx")} == {
        name: before[name] for name in ("model.fp32.onnx", "model.fp16.onnx")
    }
    assert [graph["precision"] for graph in manifest["graphs"]] == ["fp32", "fp16", "int8"]
    assert set(manifest["quality"]) == set(manifest["latency"]) == {"fp32", "fp16", "int8"}
    assert "the graphs in qdq are damaged and are removed" in " ".join(capsys.readouterr().err.split())


def test_saving_again_keeps_the_export(copy: Path, tmp_path: Path) -> None:
    for backend in ("onnx", "torch"):
        saved = LengthPredictor.from_pretrained(copy, backend=backend).save_pretrained(tmp_path / backend)
        again = LengthPredictor.from_pretrained(saved, backend="onnx")
        assert again.predict("Hi").median == LengthPredictor.from_pretrained(copy, backend="onnx").predict("Hi").median
        assert exported_precisions(saved) == PRECISIONS


def test_a_copy_for_serving_has_no_weights(copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("# Card\n\n![calibration](plots/calibration.png)\n\nText\n")
    before, serving = listing(copy), tmp_path / "serving"
    export_onnx(copy, "fp32", data="none", output=serving)
    assert listing(copy) == before
    assert sorted(path.name for path in serving.iterdir()) == sorted(
        ["README.md", "calibration.json", "config.json", "files.json", "lookup.safetensors", "metrics.json", "onnx",
         "router.json", "tokenizer.json"]
    )  # fmt: skip
    assert (serving / "README.md").read_text() == "# Card\n\nText\n"
    expected = load(copy, "fp32").predict("Explain TCP slow start.").cumulative
    np.testing.assert_array_equal(load(serving, "fp32").predict("Explain TCP slow start.").cumulative, expected)
    for refused in (
        lambda: LengthPredictor.from_pretrained(serving, backend="torch"),
        lambda: export_onnx(serving, "int8", data="none"),
    ):
        with pytest.raises(ArtifactError, match=r"no PyTorch weights \(model\.safetensors\)"):
            refused()
    saved = load(serving).save_pretrained(tmp_path / "again")
    assert load(saved).predict("Hi").source == "model"

    export_onnx(copy, "int8", data="none", output=serving)  # a second precision joins the first
    assert exported_precisions(serving) == ("fp32", "int8")


def test_a_copy_for_serving_overwrites_no_weights(copy: Path, tmp_path: Path, tiny: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    for output in (copy, other):
        before = listing(output)
        with pytest.raises(ConfigError, match="is a predictor with weights, which would be lost"):
            export_onnx(copy, "fp32", data="none", output=output)
        assert listing(output) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is not a saved predictor"):
        export_onnx(copy, "fp32", data="none", output=tmp_path / "notes")


def test_values_of_another_network_are_found_out(copy: Path) -> None:
    config = LengthPredictor.from_pretrained(copy, backend="torch").config
    (network,) = TorchBackend.load(copy, config).networks
    path = copy / "onnx" / "model.fp32.onnx"
    assert check_values(path, network, 20, 1e-4) <= 1e-4
    with torch.no_grad():
        network.heads[0].bias[-2] += 0.1
    with pytest.raises(ExportError, match="head_logits differs from PyTorch"):
        check_values(path, network, 20, 1e-4)
    with torch.no_grad():
        network.heads[0].bias[-2] = torch.nan
    with pytest.raises(ExportError, match="head_logits differs from PyTorch by nan"):
        check_values(path, network, 20, np.inf)
    network.gate = None
    with pytest.raises(ExportError, match="expected input_ids, attention_mask, numbers, target_llm, head_logits"):
        check_form(path, network)


def test_graphs_of_another_form_are_found_out(copy: Path) -> None:
    config = LengthPredictor.from_pretrained(copy, backend="torch").config
    (network,) = TorchBackend.load(copy, config).networks
    path = copy / "onnx" / "model.fp32.onnx"
    whole = path.read_bytes()

    def one_row(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    def old(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 18

    def half(model: onnx.ModelProto) -> None:
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16

    def foreign(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "com.microsoft"
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))

    for change, message in (
        (one_row, r"input_ids is INT64 \(1, tokens\); expected INT64 \(batch, tokens\)"),
        (old, "model.fp32.onnx"),
        (half, "model.fp32.onnx"),
        (foreign, "has operators of com.microsoft; expected standard ones alone"),
    ):
        model = onnx.load_from_string(whole)
        change(model)
        onnx.save(model, path)
        with pytest.raises(ExportError, match=message):
            check_form(path, network)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("write_graph", ExportError("no")),
        ("write_int8", KeyboardInterrupt()),
        ("check_form", ExportError("no")),
        ("check_values", OSError("no space left")),
        ("version", KeyboardInterrupt()),  # the last step before the folder is put in place
    ],
)
def test_a_failure_changes_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fails(*_: Any) -> None:
        raise error

    if step == "write_graph":
        (copy / "onnx" / "model.fp32.onnx").unlink()  # else int8 would be made of it
    before = listing(copy)
    monkeypatch.setattr(export_run, step, fails)
    for output in (None, tmp_path / "serving"):
        with pytest.raises(type(error)):
            export_onnx(copy, "int8", data="none", output=output)
        assert listing(copy) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, finished = tmp_path / "onnx", tmp_path / "finished"
    for folder in (old, finished):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self == finished:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"):
        artifact.put_in_place(finished, old)
    assert (old / "name").read_text() == "onnx"
    monkeypatch.undo()
    artifact.put_in_place(finished, old)
    assert listing(tmp_path) == {"onnx/name": b"finished"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tvm"}, "unknown backend 'tvm'; expected one of 'torch', 'onnx'"),
        ({"backend": "onnx", "device": "cuda"}, "runs on the CPU; got device 'cuda'"),
        ({"backend": "onnx", "num_threads": 0}, "num_threads: got 0"),
    ],
)
def test_options_that_cannot_be(copy: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LengthPredictor.from_pretrained(copy, **options)


@pytest.mark.parametrize(("target", "precision"), [("onnx", "fp32"), ("onnx-int8", "int8")])
def test_the_command(copy: Path, capsys: pytest.CaptureFixture[str], target: str, precision: Precision) -> None:
    assert main([str(copy), "--to", target, "--data", "none", "--json"]) == 0
    printed = capsys.readouterr()
    assert {graph["precision"] for graph in json.loads(printed.out)["graphs"]} == set(PRECISIONS)
    assert f"onnx/model.{precision}.onnx: 0." in printed.err
    assert "quality and latency are not measured" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "tflite"], "invalid choice: 'tflite'"),
        (["--to", "onnx"], "no saved predictor at nowhere"),
        (["--to", "onnx", "--max-test-rows", "1"], "--max-test-rows: got 1; expected at least 2"),
    ],
)
def test_mistakes_at_the_command(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_options_of_engines_are_refused_for_graphs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mope.export.cli import main

    assert main([str(tiny), "--to", "onnx", "--precision", "fp16"]) == 2
    assert "--precision goes with --to tensorrt; got --to onnx" in capsys.readouterr().err
