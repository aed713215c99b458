"""Which engine runs a predictor: what is asked for, or else what is exported and installed."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mope import LengthPredictor, artifact
from mope.backends import choice
from mope.backends.choice import choose
from mope.backends.onnx_backend import MANIFEST_VERSION
from mope.errors import ArtifactError, ConfigError


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "tiny")


def export(folder: Path, *precisions: str, sha256: str | None = None) -> None:
    """The manifest of an export; the choice reads no graph."""
    saved = json.loads((folder / "files.json").read_text())["model.safetensors"]["sha256"]
    graphs = [
        {"network": "model", "precision": one, "file": f"model.{one}.onnx", "sha256": "0" * 64} for one in precisions
    ]
    (folder / "onnx").mkdir(exist_ok=True)
    artifact.write_json(
        folder / "onnx" / "manifest.json",
        {
            "format_version": MANIFEST_VERSION,
            "exported_from": {"model.safetensors": sha256 or saved},
            "graphs": graphs,
            "quality": {one: {"mae": 1.0} for one in precisions},
        },
    )


def test_nothing_exported_runs_in_torch(folder: Path) -> None:
    found = choose(folder)
    assert (found.backend, found.device, found.precision) == ("torch", "cpu", None)
    assert found.reason == "torch, since there is no ONNX export in any precision of these weights"


@pytest.mark.parametrize(
    ("exported", "asked", "expected"),
    [
        (["fp32"], None, ("onnx", "fp32")),
        (["fp32", "int8"], None, ("onnx", "int8")),
        (["int8"], None, ("onnx", "int8")),
        (["fp32", "int8", "qdq"], "qdq", ("onnx", "qdq")),
        (["fp32"], "int8", ("torch", "int8")),
        (["fp16"], None, ("onnx", "fp16")),
    ],
)
def test_an_export_runs_in_onnx_runtime(
    folder: Path, exported: list[str], asked: str | None, expected: tuple[str, str | None]
) -> None:
    export(folder, *exported)
    found = choose(folder, precision=asked)
    assert (found.backend, found.precision) == expected


def test_an_export_of_other_weights_does_not_count(folder: Path) -> None:
    export(folder, "int8", sha256="0" * 64)
    assert choose(folder).backend == "torch"


def test_a_copy_for_serving_runs_in_onnx_runtime(folder: Path) -> None:
    """Its weights were left out, so there are none for the export to disagree with."""
    export(folder, "int8")
    (folder / "model.safetensors").unlink()
    artifact.seal(folder)
    assert choose(folder).backend == "onnx"
    with pytest.raises(ArtifactError, match=r"a copy for serving: it has ONNX graphs in int8 and .* in fp32"):
        choose(folder, precision="fp32")
    shutil.rmtree(folder / "onnx")
    with pytest.raises(ArtifactError, match="has no ONNX export; copy the whole folder again"):
        choose(folder)


def test_without_onnxruntime_it_is_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(folder, "int8")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = choose(folder)
    assert found.backend == "torch"
    assert "onnxruntime is not installed (pip install 'mope-llm[onnx]')" in found.reason


def test_on_a_gpu_tensorrt_comes_before_onnx_runtime_before_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_is_installed", lambda module: True)
    monkeypatch.setattr(choice, "_has_distribution", lambda name: name == "onnxruntime-gpu")
    assert choose(folder, device="cuda:1").backend == "torch"
    export(folder, "fp32")
    assert choose(folder, device="cuda:1").backend == "onnx-gpu"
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "manifest.json").touch()
    found = choose(folder, device="cuda:1", precision="fp16")
    assert (found.backend, found.device, found.precision) == ("tensorrt", "cuda:1", "fp16")
    monkeypatch.undo()
    monkeypatch.setattr(choice, "_has_distribution", lambda name: False)
    monkeypatch.setattr(choice, "_is_installed", lambda module: False)
    assert choose(folder, device="cuda").backend == "torch"


@pytest.mark.parametrize(
    ("asked", "device"), [("onnx", "cpu"), ("torch", "cpu"), ("onnx-gpu", "cuda"), ("tensorrt", "cuda")]
)
def test_a_backend_asked_for_has_its_own_device(folder: Path, asked: str, device: str) -> None:
    found = choose(folder, backend=asked)
    assert (found.backend, found.device, found.reason) == (asked, device, f"{asked}, since it was asked for")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"backend": "tvm"}, "unknown backend 'tvm'; expected one of 'torch', 'onnx', 'onnx-gpu', 'tensorrt'"),
        ({"precision": "int4"}, "unknown precision 'int4'; expected one of 'fp32', 'fp16', 'bf16', 'int8', 'qdq'"),
        (
            {"backend": "onnx", "device": "cuda"},
            "onnx backend runs on the CPU; got device 'cuda'; choose 'onnx-gpu' or 'torch'",
        ),
        ({"backend": "onnx-gpu", "device": "cpu"}, "runs on a GPU; got device 'cpu'; choose 'onnx' or 'torch'"),
        ({"backend": "tensorrt", "device": "cpu"}, "the tensorrt backend runs on a GPU"),
    ],
)
def test_what_contradicts_itself_is_refused(folder: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(folder, **asked)


@pytest.mark.parametrize(
    ("backend", "module", "name", "expected"),
    [
        ("onnx", "onnx_backend", "OnnxBackend", {"num_threads": 3, "precision": "int8"}),
        ("onnx-gpu", "onnx_gpu_backend", "OnnxGpuBackend", {"device": "cuda:1", "precision": "fp16"}),
        ("tensorrt", "tensorrt_backend", "TensorrtBackend", {"device": "cuda:1", "precision": "fp16"}),
    ],
)
def test_an_engine_is_loaded_with_what_it_takes(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    module: str,
    name: str,
    expected: dict[str, Any],
) -> None:
    stand_in = ModuleType(module)
    setattr(stand_in, name, SimpleNamespace(load=lambda *places, **options: (places, options)))
    monkeypatch.setitem(sys.modules, f"mope.backends.{module}", stand_in)
    found = choose(folder, backend, expected.get("device"), expected["precision"])
    config = artifact.check(folder)
    assert found.load(folder, config, 3) == ((folder, config), expected)


def test_the_reason_is_logged_and_kept(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mope"):
        predictor = LengthPredictor.from_pretrained(tiny)
    assert predictor.backend_reason == "torch, since there is no ONNX export in any precision of these weights"
    assert predictor.backend_reason in caplog.text
