"""A predictor on a Unigram vocabulary that was cut: saved, loaded, exported, and refused where its parts don't fit."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from make_tiny_artifact import make_predictor
from tiny_e5 import save_tiny_e5
from transformers import PreTrainedTokenizerFast

from mope import LengthPredictor, artifact
from mope.backends.onnx_backend import OnnxBackend, find_graphs
from mope.backends.torch_backend import TorchBackend, empty_networks
from mope.errors import ArtifactError
from mope.export.run import export_onnx
from mope.features import RequestEncoder
from mope.request import Request
from mope.training.encoders import find_encoder
from mope.training.static import StaticTrunk
from mope.training.vocabulary import CutTrunk, cut_vocabulary

SIZE = 52
REQUESTS = [
    "hello world",
    "def f(x):\n    return x\n\n\n# 안녕 日本 я",
    {"prompt": "write 안녕다 " * 60, "system": "日本 <s> </s>", "max_tokens": 40},
    {"prompt": "\u4e00\u4e01\U0001f600", "system": "a", "target_llm": "gpt-4"},
    "\n",
]  # fmt: skip
CLOSE = {"fp32": 1e-4, "int8": 3e-2}  # of the cumulative distribution


def save_trunk(trunk: CutTrunk, folder: Path) -> Path:
    """A trunk as a folder that `transformers` loads."""
    trunk.load().save_pretrained(folder)
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=trunk.tokenizer(), **names).save_pretrained(folder)
    return folder


def on_a_table(predictor: LengthPredictor, trunk: CutTrunk) -> LengthPredictor:
    """The same predictor, but a table distilled from the trunk in place of the trunk."""
    static = StaticTrunk(trunk, 12, 8)
    config = predictor.config.model_copy(update={"preset": "micro", "encoder_config": static.config})
    torch.manual_seed(0)
    (network,) = networks = empty_networks(config)
    network.encoder.load_state_dict(static.load().state_dict())
    encoder = RequestEncoder.of(config, static.tokenizer())
    backend = TorchBackend(networks, config)
    return LengthPredictor(config, backend, encoder, predictor.router, predictor.calibration, predictor._fallback)


@pytest.fixture(scope="module", params=["bert", "static"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved predictor with ONNX graphs in float32 and int8."""
    whole = find_encoder(str(save_tiny_e5(tmp_path_factory.mktemp("whole"))))
    trunk = cut_vocabulary(whole, SIZE, ["hello world write", "안녕다 日本"])
    predictor = make_predictor(save_trunk(trunk, tmp_path_factory.mktemp("cut")))
    if request.param == "static":
        predictor = on_a_table(predictor, trunk)
    saved = predictor.save_pretrained(tmp_path_factory.mktemp(request.param) / "predictor")
    for precision in ("fp32", "int8"):
        export_onnx(saved, precision, data="none")  # type: ignore[arg-type]
    return saved


def test_the_saved_predictor_reads_texts_as_the_trunk_does(folder: Path) -> None:
    predictor = LengthPredictor.from_pretrained(folder, backend="torch")
    assert predictor.config.encoder_config["vocab_size"] == SIZE
    assert predictor.config.special_ids == (0, 2, 1)
    vocabulary = [piece for piece, _ in json.loads(predictor.encoder.tokenizer_json())["model"]["vocab"]]
    ids = predictor.encoder.encode([Request(prompt="hello\n  world <s>")]).token_ids[0]
    assert [vocabulary[id] for id in ids] == ["<s>", "▁hello", "▁␊", "▁world", "▁", "<", "s", ">", "</s>"]


@pytest.mark.parametrize("precision", CLOSE)
def test_graphs_predict_what_torch_predicts(folder: Path, precision: str) -> None:
    by_torch = LengthPredictor.from_pretrained(folder, backend="torch").predict_batch(REQUESTS)
    predictor = LengthPredictor.from_pretrained(folder, backend="onnx")
    predictor.backend = OnnxBackend.load(folder, predictor.config, precision=precision)
    for one, other in zip(by_torch, predictor.predict_batch(REQUESTS), strict=True):
        np.testing.assert_allclose(one.cumulative, other.cumulative, atol=CLOSE[precision])
        assert one.source == other.source
    assert len({one.cumulative.tobytes() for one in by_torch}) > 2  # the texts are told apart


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_tokenizer_with_more_pieces_than_vectors_is_refused(folder: Path, tmp_path: Path, backend: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    settings["model"]["vocab"] += [["\u1234", 0.0], ["👋", 0.0]]  # what every predictor reads when it is loaded
    text = json.dumps(settings, ensure_ascii=False)
    (copy / "tokenizer.json").write_text(text, "utf-8")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config["tokenizer_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    artifact.seal(copy)
    if backend == "torch":
        with pytest.raises(ArtifactError, match=f"token id {SIZE + 1}; the network knows {SIZE} tokens"):
            LengthPredictor.from_pretrained(copy, backend="torch")
    else:  # ONNX Runtime looks at each request's ids
        predictor = LengthPredictor.from_pretrained(copy, backend="onnx")
        with pytest.raises(ArtifactError, match=r"can't be run on a request.*out of data bounds"):
            predictor.predict("\u1234")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_the_graph_becomes_a_tensorrt_engine(folder: Path) -> None:
    import tensorrt_rtx

    from mope.export.tensorrt import EngineBuilder, profiles

    config = artifact.check(folder)
    _, (graph,) = find_graphs(folder, config, "fp32")
    shapes = profiles([3, 9, 18], config.max_input_tokens, (1, 8))
    builder = EngineBuilder(tensorrt_rtx, compute_capability="SM80")
    assert len(builder.build(graph, shapes, precision="fp32").plan) > 10_000
