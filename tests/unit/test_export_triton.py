"""Model repositories for Triton: the config is what Triton reads, and the model answers each request by itself."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_stand_in
from triton_stand_in import InferenceRequest, InferenceResponse

from mope import LengthPredictor, packaged
from mope.backends.onnx_backend import read_manifest
from mope.errors import ArtifactError, ConfigError
from mope.export.cli import main
from mope.export.triton import export_triton

PROMPT = "Explain TCP slow start."
BODY = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def repository(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("triton") / "models"
    export_triton(exported["shared"], output)
    return output


@pytest.fixture
def model(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The repository's `model.py` as Triton loads it."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_stand_in.module())
    spec = importlib.util.spec_from_file_location("model", repository / "shared" / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = {"parameters": {"levels": {"string_value": "0.25,0.75"}}}
    model.initialize(
        {"model_config": json.dumps(config), "model_instance_kind": "CPU", "model_instance_device_id": "0"}
    )
    yield model
    model.finalize()


def ask(model: Any, *requests: InferenceRequest) -> list[InferenceResponse]:
    answers: list[InferenceResponse] = model.execute(list(requests))
    assert len(answers) == len(requests)
    return answers


def body(content: Any) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.parametrize(("device", "kind", "precision"), [("cpu", "KIND_CPU", "fp32"), ("cuda", "KIND_GPU", "fp16")])
@pytest.mark.usefixtures("graphs_made_once")
def test_triton_reads_the_config(
    tiny: Path, exported: dict[str, Path], tmp_path: Path, device: Any, kind: str, precision: str
) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    export_triton(exported["shared"], tmp_path / "models", device=device, data="none")
    folder = tmp_path / "models" / "shared"
    config = text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    assert (config.name, config.backend) == ("shared", "python")
    assert config.max_batch_size > 1
    assert config.HasField("dynamic_batching")
    kinds = model_config_pb2.ModelInstanceGroup.Kind
    assert [kinds.Name(group.kind) for group in config.instance_group] == [kind]
    types = model_config_pb2.DataType.Name
    assert [(one.name, types(one.data_type), one.optional) for one in config.input] == [
        ("PROMPT", "TYPE_STRING", True),
        ("REQUEST", "TYPE_STRING", True),
    ]
    assert [(one.name, types(one.data_type), list(one.dims)) for one in config.output] == [
        ("MEDIAN", "TYPE_FP32", [1]),
        ("MEAN", "TYPE_FP32", [1]),
        ("QUANTILES", "TYPE_FP32", [-1]),
        ("SOURCE", "TYPE_STRING", [1]),
    ]
    assert config.parameters["levels"].string_value == "0.1,0.5,0.9,0.99"
    assert {graph["precision"] for graph in read_manifest(folder / "1" / "artifact")["graphs"]} == {precision}


def test_the_warm_up_is_a_prompt_as_triton_stores_strings(repository: Path) -> None:
    content = (repository / "shared" / "warmup" / "prompt").read_bytes()
    assert content == len(PROMPT).to_bytes(4, "little") + PROMPT.encode()
    assert 'key: "PROMPT"' in (repository / "shared" / "config.pbtxt").read_text(encoding="utf-8")


def test_answers_are_those_of_the_predictor(model: Any, exported: dict[str, Path]) -> None:
    predictor = LengthPredictor.from_pretrained(exported["shared"], backend="onnx")
    first, second = ask(
        model, InferenceRequest(PROMPT=[PROMPT.encode(), b"Hi"]), InferenceRequest(REQUEST=[body(BODY)])
    )
    for answer, requests in ((first, [PROMPT, "Hi"]), (second, [BODY])):
        predictions = predictor.predict_batch(requests)
        for name, expected in (
            ("MEDIAN", [[one.median] for one in predictions]),
            ("MEAN", [[one.mean] for one in predictions]),
            ("QUANTILES", [one.quantiles([0.25, 0.75]) for one in predictions]),
        ):
            assert answer.outputs[name].dtype == np.float32
            np.testing.assert_allclose(answer.outputs[name], expected, rtol=1e-3)
        assert answer.outputs["SOURCE"].tolist() == [[b"model"]] * len(requests)
    assert (second.outputs["QUANTILES"] <= BODY["max_tokens"]).all()
    assert first.outputs["MEDIAN"][0] != first.outputs["MEDIAN"][1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (InferenceRequest(REQUEST=[b'{"prompt": ']), "REQUEST a JSON object, in UTF-8; got JSONDecodeError"),
        (InferenceRequest(REQUEST=[b"[" * 100_000]), "REQUEST a JSON object, in UTF-8; got RecursionError"),
        (InferenceRequest(REQUEST=[body([BODY])]), "a mapping or a Request; got list"),
        (InferenceRequest(REQUEST=[body(BODY), body({"max_tokens": 3})]), "either a prompt or messages"),
        (InferenceRequest(PROMPT=[b"\xff"]), "PROMPT is a text .*; got UnicodeDecodeError"),
        (InferenceRequest(), "either PROMPT or REQUEST; got neither"),
        (InferenceRequest(PROMPT=[b"Hi"], REQUEST=[body(BODY)]), "either PROMPT or REQUEST; got both"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_that_request_alone(
    model: Any, request_: InferenceRequest, message: str
) -> None:
    good = InferenceRequest(PROMPT=[b"Hi"])
    before, refused, after = ask(model, good, request_, good)
    assert refused.error is not None
    assert re.search(message, refused.error.message)
    assert refused.error.code == triton_stand_in.TritonError.INVALID_ARG
    assert refused.outputs == {}
    for answer in (before, after):
        assert answer.error is None
        assert answer.outputs["SOURCE"].tolist() == [[b"model"]]
    np.testing.assert_array_equal(before.outputs["MEDIAN"], after.outputs["MEDIAN"])
    assert ask(model, request_)[0].error is not None


def test_a_row_that_the_network_fails_for_gets_the_fallback(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    predict_batch = LengthPredictor.predict_batch

    def failing(self: LengthPredictor, requests: Any) -> Any:
        if any(request.prompt == "bad" for request in requests):
            raise RuntimeError("out of memory")
        return predict_batch(self, requests)

    monkeypatch.setattr(LengthPredictor, "predict_batch", failing)
    both, good = ask(model, InferenceRequest(PROMPT=[b"bad", b"Hi"]), InferenceRequest(PROMPT=[b"Hi"]))
    assert both.outputs["SOURCE"].tolist() == [[b"fallback:error"], [b"model"]]
    assert good.outputs["SOURCE"].tolist() == [[b"model"]]
    assert both.outputs["MEDIAN"][1] == good.outputs["MEDIAN"][0]
    assert (both.outputs["QUANTILES"] > 0).all()


def test_the_predictor_has_a_graph_and_no_weights(repository: Path, exported: dict[str, Path]) -> None:
    files = {path.name for path in (repository / "shared" / "1" / "artifact").rglob("*")}
    assert {"files.json", "tokenizer.json", "model.fp32.onnx"} <= files
    assert "model.safetensors" not in files


@pytest.mark.usefixtures("graphs_made_once")
def test_a_predictor_without_graphs_is_exported_first_and_stays_as_it_is(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "my chats")
    assert main([str(source), "--to", "triton", "--output", str(tmp_path / "models"), "--data", "none"]) == 0
    artifact = tmp_path / "models" / "my-chats" / "1" / "artifact"
    assert {graph["precision"] for graph in read_manifest(artifact)["graphs"]} == {"int8"}
    assert LengthPredictor.from_pretrained(artifact).predict(PROMPT).source == "model"
    assert not (source / "onnx").exists()
    assert "/v2/models/my-chats/infer" in (tmp_path / "models" / "README.md").read_text(encoding="utf-8")


def test_a_packaged_predictor_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["chat-micro", "--to", "triton", "--output", str(tmp_path / "models")]) == 0
    copied = tmp_path / "models" / "chat-micro" / "1" / "artifact" / "onnx" / "model.int8.onnx"
    assert copied.read_bytes() == (packaged.PREDICTORS / "chat-micro" / "onnx" / "model.int8.onnx").read_bytes()


def test_nothing_is_lost_and_nothing_is_left_half_written(repository: Path, exported: dict[str, Path], tmp_path: Path):
    with pytest.raises(ConfigError, match="models exists; a model repository is a new folder"):
        export_triton(exported["shared"], repository)
    with pytest.raises(ArtifactError, match=r"no PyTorch weights .*an export in fp16 needs them"):
        export_triton(packaged.PREDICTORS / "chat-micro", tmp_path / "models", device="cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "triton"], "--to triton writes a model repository; say where: --output FOLDER"),
        (["--to", "onnx", "--device", "cuda"], "--device goes with --to triton; got --to onnx"),
        (["--to", "triton", "--precision", "fp16"], "--precision goes with --to tensorrt; got --to triton"),
    ],
)
def test_mistakes_at_the_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat-micro", *arguments]) == 2
    assert message in capsys.readouterr().err
