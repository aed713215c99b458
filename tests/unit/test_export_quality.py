"""The check of an export on real rows: which rows, what is measured, and that a bad export is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import say_trained_on, write_lengths

from mope import LengthPredictor
from mope.artifact import read_json, write_json
from mope.backends.network import MopeNetwork
from mope.errors import ConfigError, ExportError, MissingExtraError
from mope.export import quality
from mope.export.cli import main
from mope.export.precisions import write_int8
from mope.export.run import export_onnx
from mope.training.data.build import build_rows
from mope.training.data.config import DataConfig

NUM_ROWS = 400

pytestmark = pytest.mark.usefixtures("graphs_made_once")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lengths(tmp_path_factory.mktemp("rows") / "rows.jsonl", NUM_ROWS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny: Path, rows: Path, graphs_made_once: None) -> Path:
    """The tiny predictor, said to be trained on `rows`, in fp32 and int8."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("exported") / "tiny")
    say_trained_on(folder, rows)
    export_onnx(folder, "fp32")
    export_onnx(folder, "int8", max_test_rows=20)
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def test_the_manifest_holds_quality_and_latency(exported: Path, rows: Path) -> None:
    manifest = read_json(exported / "onnx" / "manifest.json")
    fp32, int8 = manifest["quality"]["fp32"], manifest["quality"]["int8"]
    test = build_rows(DataConfig(source=str(rows), target_llm="gpt-4", min_rows=0)).rows.split("test")
    assert (fp32["num_rows"], int8["num_rows"]) == (len(test), 20)
    assert fp32["mae"] == pytest.approx(fp32["mae_fp32"], rel=1e-4)
    assert fp32["same_expert"] == 1.0
    assert fp32["data"] == "rows.jsonl"  # no path of this machine
    assert 0 < abs(int8["mae"] - int8["mae_fp32"]) <= 0.01 * int8["mae_fp32"]
    assert {"tau", "tau_fp32", "coverage_90", "coverage_90_fp32"} < set(int8)
    latency = manifest["latency"]["int8"]
    assert 0 < latency["p50_ms"] <= latency["p90_ms"] <= latency["p99_ms"]
    assert (latency["num_requests"], latency["num_threads"]) == (20, 1)


def test_quality_is_that_of_the_predictions(exported: Path, rows: Path) -> None:
    predictor = LengthPredictor.from_pretrained(exported, backend="torch")
    found = quality.find_rows(exported, predictor, None, 10**6)
    known = found.test.response_tokens
    medians = [one.median for one in predictor.predict_batch(found.test.requests())]
    quantiles = [one.quantile(0.9) for one in predictor.predict_batch(found.test.requests())]
    measured = quality.measure_quality(predictor, predictor, found)
    assert measured["mae"] == measured["mae_fp32"] == pytest.approx(np.abs(medians - known).mean(), rel=1e-3)
    assert measured["coverage_90"] == pytest.approx((known <= np.array(quantiles)).mean(), abs=0.03)


def test_only_test_rows_are_judged_and_only_training_rows_calibrate(exported: Path, rows: Path) -> None:
    predictor = LengthPredictor.from_pretrained(exported, backend="torch")
    splits = build_rows(DataConfig(source=str(rows), target_llm="gpt-4", min_rows=0)).rows
    found = quality.find_rows(exported, predictor, None, 15)
    assert len(found.test) == 15
    assert set(found.test.strings("row_id")) < set(splits.split("test").strings("row_id"))
    assert len(found.train) == quality.NUM_CALIBRATION_ROWS
    assert set(found.train.strings("row_id")) < set(splits.split("train").strings("row_id"))
    again = quality.find_rows(exported, predictor, None, 15)
    assert again.test.table == found.test.table
    batches = found.calibration_batches(predictor)
    assert sum(len(ids) for ids, *_ in batches) == len(found.train)


def test_other_rows_are_read_as_the_own_ones(exported: Path, tmp_path: Path) -> None:
    """`--data` names another place; filters and the tokenizer stay."""
    predictor = LengthPredictor.from_pretrained(exported, backend="torch")
    other = write_lengths(tmp_path / "other.jsonl", 200, seed=1)
    found = quality.find_rows(exported, predictor, str(other), 10)
    assert found.source == "other.jsonl"
    assert set(found.test.strings("target_llm")) == {"gpt-4"}


def test_a_precision_that_costs_too_much_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: here the graph is quantised, then its heads are made to say less."""
    import onnx
    from onnx import numpy_helper

    from mope.export import run

    def write_bad(network: MopeNetwork, fp32_path: Path, path: Path) -> None:
        write_int8(network, fp32_path, path)
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if "encoder" not in tensor.name and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 3:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) - 2.0, tensor.name))
        onnx.save(model, path)

    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(run, "write_int8", write_bad)
    with pytest.raises(ExportError, match=r"int8 raises the mean absolute error on \d+ test rows from .* at most \+1%"):
        export_onnx(copy, "int8")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_predictors_of_unknown_origin_need_data(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    with pytest.raises(ConfigError, match=r"does not say what it was trained on .* type --data FILE .* --data none"):
        export_onnx(folder)
    with pytest.raises(ConfigError, match="qdq is calibrated on training rows"):
        export_onnx(folder, "qdq", data="none")
    assert not (folder / "onnx").exists()


@pytest.mark.parametrize("source", ["gone.jsonl", "few.jsonl"])
def test_rows_that_cannot_be_had(copy: Path, tmp_path: Path, source: str) -> None:
    write_lengths(tmp_path / "few.jsonl", 3)
    with pytest.raises(ConfigError, match=r"type --data FILE for other rows, or --data none"):
        export_onnx(copy, "int8", data=str(tmp_path / source))


def test_settings_of_another_version(copy: Path) -> None:
    provenance = read_json(copy / "provenance.json")
    provenance["config"]["data"]["retired"] = 1
    write_json(copy / "provenance.json", provenance)
    with pytest.raises(ConfigError, match=r"provenance.json: config.data.retired: Extra inputs .* --data none"):
        export_onnx(copy, "int8")


def test_rows_that_changed_since_training_are_told(copy: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provenance = read_json(copy / "provenance.json")
    predictor = LengthPredictor.from_pretrained(copy, backend="torch")
    fingerprint = quality.find_rows(copy, predictor, None, 10).fingerprint
    for known, is_told in ((fingerprint, False), ("0" * 64, True)):
        write_json(copy / "provenance.json", {**provenance, "data": {str(rows): known}})
        quality.find_rows(copy, predictor, None, 10)
        assert ("other rows than the predictor was trained on" in capsys.readouterr().err) == is_told


def test_a_missing_package_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"--data none leaves it out\) needs the package 'pyarrow'"):
        export_onnx(copy, "int8")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"'onnxscript', which is not installed: .*mope-llm\[export\]"):
        export_onnx(copy, "int8", data="none")


def test_the_command_says_what_was_measured(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = [copy, "--to", "onnx-int8", "--max-test-rows", 10, "--json"]
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["quality"]["int8"]["num_rows"] == 10
    said = " ".join(printed.err.split())
    assert "on 10 test rows of rows.jsonl (PyTorch in brackets): mean absolute error" in said
    assert "latency of a request, tokenising included: p50" in said
