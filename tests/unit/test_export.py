"""ONNX export: the graphs say what the networks say, serve without torch, and never go stale unnoticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mope import LengthPredictor
from mope.backends.torch_backend import TorchBackend
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_separate: Path) -> dict[str, Path]:
    folders = {}
    for name, source in (("shared", tiny), ("separate", tiny_separate)):
        folders[name] = shutil.copytree(source, tmp_path_factory.mktemp("exported") / name)
        export_onnx(folders[name])
    return folders


@pytest.fixture
def copy(exported: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exported["shared"], tmp_path / "copy")


@pytest.mark.parametrize("design", ["shared", "separate"])
def test_graphs_predict_what_torch_predicts(exported: dict[str, Path], design: str) -> None:
    by_torch = LengthPredictor.from_pretrained(exported[design], backend="torch").predict_batch(REQUESTS)
    predictor = LengthPredictor.from_pretrained(exported[design], backend="onnx")
    for one, other in zip(by_torch, predictor.predict_batch(REQUESTS), strict=True):
        np.testing.assert_allclose(one.cumulative, other.cumulative, atol=1e-4)
        assert (one.expert, one.source) == (other.expert, other.source)
    alone = predictor.predict_batch(REQUESTS[:1])[0]  # padding beside longer requests changes nothing
    np.testing.assert_allclose(alone.cumulative, by_torch[0].cumulative, atol=1e-4)


def test_serving_needs_no_torch(exported: dict[str, Path]) -> None:
    probe = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from mope import LengthPredictor\n"
        f"predictor = LengthPredictor.from_pretrained({str(exported['separate'])!r}, backend='onnx')\n"
        "print(predictor.predict('Explain TCP slow start.').source)\n"
        "import asyncio\n"
        "print(asyncio.run(predictor.predict_async('Explain TCP slow start.', deadline_s=60)).source)\n"
        "print(sorted({'rich', 'huggingface_hub', 'torch', 'transformers'} & {n for n, m in sys.modules.items() if m}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "model\nmodel\n[]\n"), done.stderr


def test_the_manifest_names_every_graph(exported: dict[str, Path]) -> None:
    manifest = json.loads((exported["separate"] / "onnx" / "manifest.json").read_text())
    assert [graph["network"] for graph in manifest["graphs"]] == ["gate", "expert-0", "expert-1"]
    assert {graph["opset"] for graph in manifest["graphs"]} == {20}
    assert all(0 <= graph["max_difference"] <= 1e-4 for graph in manifest["graphs"])
    assert str(exported["separate"].parent) not in json.dumps(manifest)


def test_nothing_exported_says_what_to_type(tiny: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no ONNX export; type: mope-export .*tiny --to onnx"):
        LengthPredictor.from_pretrained(tiny, backend="onnx")


def test_an_export_of_other_weights_is_refused(copy: Path, exported: dict[str, Path]) -> None:
    manifest = json.loads((copy / "onnx" / "manifest.json").read_text())
    manifest["exported_from"]["model.safetensors"] = "0" * 64
    (copy / "onnx" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"model\.safetensors changed after the ONNX export"):
        LengthPredictor.from_pretrained(copy, backend="onnx")


def test_a_changed_or_missing_graph_is_refused(copy: Path) -> None:
    graph = copy / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        LengthPredictor.from_pretrained(copy, backend="onnx")
    graph.unlink()
    with pytest.raises(ArtifactError, match=r"lacks onnx/model\.onnx"):
        LengthPredictor.from_pretrained(copy, backend="onnx")


def test_saving_again_keeps_the_export(copy: Path, tmp_path: Path) -> None:
    for backend in ("onnx", "torch"):
        saved = LengthPredictor.from_pretrained(copy, backend=backend).save_pretrained(tmp_path / backend)
        again = LengthPredictor.from_pretrained(saved, backend="onnx")
        assert again.predict("Hi").median == LengthPredictor.from_pretrained(copy, backend="onnx").predict("Hi").median


def test_values_of_another_network_are_found_out(copy: Path) -> None:
    config = LengthPredictor.from_pretrained(copy).config
    (network,) = TorchBackend.load(copy, config).networks
    path = copy / "onnx" / "model.onnx"
    assert check_values(path, network, 20) <= 1e-4
    with torch.no_grad():
        network.heads[0].bias[-2] += 0.1
    with pytest.raises(ExportError, match="head_logits differs from PyTorch"):
        check_values(path, network, 20)
    network.gate = None
    with pytest.raises(ExportError, match="expected input_ids, attention_mask, numbers, target_llm, head_logits"):
        check_form(path, network)


def test_a_failed_check_leaves_the_earlier_export(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> float:
        raise ExportError("no")

    before = sorted(path.name for path in copy.iterdir())
    monkeypatch.setattr(export_run, "check_values", fails)
    with pytest.raises(ExportError):
        export_onnx(copy)
    assert sorted(path.name for path in copy.iterdir()) == before
    assert LengthPredictor.from_pretrained(copy, backend="onnx").predict("Hi").source == "model"


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


def test_the_command(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy), "--to", "onnx", "--json"]) == 0
    assert [graph["file"] for graph in json.loads(capsys.readouterr().out)["graphs"]] == ["model.onnx"]
    assert main([str(copy.parent), "--to", "onnx"]) == 2
