"""What the config of an encoder may say, and what `transformers` is told of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mope import LengthPredictor, artifact
from mope.backends.encoder_fields import ENCODERS, allowed_fields
from mope.backends.network import build_encoder, load_encoder
from mope.errors import ArtifactError, ConfigError
from mope.training.encoders import find_encoder

BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 100,
}  # fmt: skip


def passed_on(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> dict[str, Any]:
    """What of a config reaches the builder of `transformers`."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(AutoModel, "from_config", lambda config, **_: seen.append(config.to_dict()))
    build_encoder(config)
    return seen[0]


@pytest.mark.parametrize(
    "field",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": {"": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
        {"auto_map": {"AutoModel": "evil/repo--mod.Evil"}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"trust_remote_code": True},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**31},
        {"hidden_size": 10**400},
        {"layer_norm_eps": float("nan")},
        {"hidden_act": "../../etc/passwd"},
        {"hidden_act": {"a": {"b": {"c": {"d": {"e": 1}}}}}},
        {"model_type": "timm_wrapper"},
        {"model_type": "vision-text-dual-encoder"},
        {"model_type": ["bert"]},
        {"model_type": None},
    ],
)
def test_what_asks_for_more_than_layers_is_refused(field: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        allowed_fields({**BERT, **field})
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["encoder_config"].update(field)
    (folder / "config.json").write_text(json.dumps(config))
    artifact.seal(folder)
    with pytest.raises(ArtifactError) as caught:
        LengthPredictor.from_pretrained(folder, backend="torch")
    assert str(caught.value).isprintable()


def test_fields_that_are_no_layers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**BERT, "_name_or_path": "evil/repo", "gguf_file": "x", "task_specific_params": {"a": 1}, "name": "x"}
    assert allowed_fields(config) == BERT
    assert passed_on(monkeypatch, config)["_name_or_path"] == ""


def test_sizes_and_kinds_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**BERT, "hidden_act": "relu", "layer_norm_eps": 1e-6, "attn_implementation": "eager", "pad_token_id": 3}
    found = passed_on(monkeypatch, config)
    assert {name: found[name] for name in config if name != "attn_implementation"} == {
        name: value for name, value in config.items() if name != "attn_implementation"
    }


@pytest.mark.parametrize("kind", sorted(ENCODERS & set(CONFIG_MAPPING.keys())))
def test_every_known_encoder_keeps_what_its_layers_depend_on(kind: str) -> None:
    written = CONFIG_MAPPING[kind]().to_dict()
    kept = allowed_fields(written)
    again = CONFIG_MAPPING[kind](**{name: value for name, value in kept.items() if name != "model_type"})
    assert again.to_dict() == written


def test_an_encoder_that_is_trained_on_is_held_to_the_same(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "evil/kernel"}))
    assert not [name for name in find_encoder(str(folder)).config if "attn" in name]
    assert load_encoder(str(folder)).config._attn_implementation in ("sdpa", "eager")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "evil"}}))
    with pytest.raises(ConfigError, match="asks for code that is not this predictor's"):
        find_encoder(str(folder))
    with pytest.raises(ArtifactError, match="asks for code that is not this predictor's"):
        load_encoder(str(folder))


def test_weights_that_are_a_pickle_run_nothing(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil(tmp_path / "pwned")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl"):
        load_encoder(str(folder))
    assert not (tmp_path / "pwned").exists()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)
