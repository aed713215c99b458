"""A cut vocabulary: which pieces stay, that texts become the same pieces with new ids, and where their vectors go."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_e5 import PIECES, SCORES, save_tiny_e5

from mope.errors import ConfigError
from mope.features import RequestEncoder
from mope.request import Request
from mope.training.config import ModelConfig
from mope.training.encoders import find_encoder
from mope.training.trunks import find_trunk, with_vocabulary
from mope.training.unigram import NEWLINE_PIECE, kept_pieces
from mope.training.vocabulary import CutTrunk, cut_vocabulary

SPECIAL = {"<s>", "<pad>", "</s>", "<unk>", "<mask>"}
SINGLE = {piece for piece in PIECES if len(piece.removeprefix("▁")) <= 1}
ALWAYS = len(SPECIAL | SINGLE)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The made-up encoder."""
    return find_encoder(str(save_tiny_e5(tmp_path_factory.mktemp("e5"))))


def pieces_of(trunk):
    return [piece for piece, _ in json.loads(trunk.tokenizer_json)["model"]["vocab"]]


def tokens(trunk, text):
    tokenizer = trunk.tokenizer()
    tokenizer.encode_special_tokens = True
    vocabulary = pieces_of(trunk)
    return [vocabulary[id] for id in tokenizer.encode(text, add_special_tokens=False).ids]


def test_special_tokens_and_characters_stay_then_the_most_frequent(source):
    kept = {PIECES[id] for id in kept_pieces(source.tokenizer_json, ALWAYS + 2)}
    assert kept == SPECIAL | SINGLE | {"▁the", "▁def"}  # the best scores of the longer pieces


def test_what_texts_use_comes_before_what_scores_say(source):
    texts = ["hello world", "hello world"]
    kept = {PIECES[id] for id in kept_pieces(source.tokenizer_json, ALWAYS + 3, texts)}
    assert kept == SPECIAL | SINGLE | {"▁hello", "▁world", "▁the"}


def test_pieces_of_other_scripts_go_first(source):
    kept = {PIECES[id] for id in kept_pieces(source.tokenizer_json, len(PIECES) - 1, ["של"] * 9)}
    assert kept == set(PIECES) - {"▁של", "של"}  # also where that leaves fewer pieces than asked for
    assert {"ש", "ל", "▁како"} <= kept


def test_a_size_above_the_vocabulary_keeps_all(source):
    assert kept_pieces(source.tokenizer_json, 10_000) == tuple(range(len(PIECES)))


def test_a_vocabulary_that_is_too_small_is_refused(source):
    with pytest.raises(ConfigError, match=rf"a vocabulary of 20 pieces is too small; .* are {ALWAYS}"):
        kept_pieces(source.tokenizer_json, 20)


def test_other_tokenizers_are_refused(tiny_encoder):
    with pytest.raises(ConfigError, match="of the kind Unigram, got WordPiece; leave the size"):
        cut_vocabulary(find_encoder(str(tiny_encoder)), 50)


def test_newlines_are_a_token(source):
    trunk = cut_vocabulary(source, ALWAYS + 4)
    assert tokens(trunk, "def f(x):\n    return x\r\n\n\n") == [
        "▁def", "▁", "f", "(", "x", ")", ":", NEWLINE_PIECE, "▁return", "▁", "x", NEWLINE_PIECE
    ]  # fmt: skip
    spaces = cut_vocabulary(source, ALWAYS + 3, newlines=False)
    assert NEWLINE_PIECE not in pieces_of(spaces)
    assert tokens(spaces, "the\n\n x") == ["▁the", "▁", "x"]


def test_xlm_r_s_own_class_in_transformers_reads_texts_alike(source, tmp_path):
    """The Hub's encoders name it; since `transformers` 5 it normalises nothing."""
    folder = shutil.copytree(source.location, tmp_path / "named")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "XLMRobertaTokenizer", "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    trunk = cut_vocabulary(find_encoder(str(folder)), ALWAYS + 6)
    text = "\uff48ello\u3000\uff41\n\n b\x01c <s> 日本"
    assert tokens(trunk, text) == tokens(cut_vocabulary(source, ALWAYS + 6), text)
    assert "<unk>" not in tokens(trunk, text)


def test_long_runs_of_spaces_cost_no_more_than_others(source):
    import time

    tokenizer = cut_vocabulary(source, ALWAYS + 4).tokenizer()
    times = []
    for text in (" " * 20_000, "the x " * 3_333):
        began = time.perf_counter()
        tokenizer.encode(text + "a")
        times.append(time.perf_counter() - began)
    assert times[0] < 5 * times[1]


def test_special_tokens_that_a_user_writes_are_text(source):
    trunk = cut_vocabulary(source, ALWAYS + 4)
    encoder = RequestEncoder(
        trunk.tokenizer(),
        special_ids=trunk.special_ids,
        max_prompt_tokens=40,
        max_context_tokens=8,
        chars_per_token=10,
        lexical_chars=200,
    )
    ids = encoder.encode([Request(prompt="</s><s> <mask>\n<unk><pad>")]).token_ids[0]
    special = {pieces_of(trunk).index(piece) for piece in SPECIAL}
    assert special.isdisjoint(ids[1:-1])
    encoder.check_ids(trunk.config["vocab_size"])
    assert max(encoder._tokenizer.get_vocab().values()) == trunk.config["vocab_size"] - 1


def test_vectors_go_with_their_pieces(source):
    trunk = cut_vocabulary(source, ALWAYS + 5)
    whole, cut = source.load(), trunk.load()
    table, before = cut.get_input_embeddings().weight, whole.get_input_embeddings().weight
    vocabulary = pieces_of(trunk)
    assert len(table) == len(vocabulary) == trunk.config["vocab_size"] == cut.config.vocab_size == ALWAYS + 5
    for new, piece in enumerate(vocabulary[:-1]):
        torch.testing.assert_close(table[new], before[PIECES.index(piece)])
    punctuation = before[[PIECES.index(piece) for piece in ".:?"]]
    torch.testing.assert_close(table[-1], punctuation.mean(dim=0))
    assert table.requires_grad
    assert [vocabulary[id] for id in trunk.special_ids] == ["<s>", "</s>", "<pad>"]
    assert trunk.config["pad_token_id"] == trunk.special_ids[2]


def test_a_cut_trunk_says_what_the_whole_one_says_of_pieces_that_stay(source):
    trunk = cut_vocabulary(source, ALWAYS + 5)
    text = "the x def a b"
    assert tokens(trunk, text) == tokens(source, text)
    with torch.inference_mode():
        vectors = [
            one.load().eval()(input_ids=torch.tensor([one.tokenizer().encode(text, add_special_tokens=False).ids]))
            for one in (source, trunk)
        ]
    torch.testing.assert_close(vectors[0].last_hidden_state, vectors[1].last_hidden_state)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(
        alphabet=[*sorted(piece for piece in SINGLE if len(piece) == 1 and piece != "▁"), " ", "\n"], max_size=30
    ),
    extra=st.integers(0, len(PIECES)),
    newlines=st.booleans(),
)
def test_any_cut_writes_any_text_with_the_best_of_its_pieces(source, text, extra, newlines):
    trunk = CutTrunk(source, kept_pieces(source.tokenizer_json, ALWAYS + extra), newlines)
    found = tokens(trunk, text)
    words = text.replace("\n", " ␊ " if newlines else " ").split()
    if newlines:  # a run is one token
        words = [word for at, word in enumerate(words) if not (word == "␊" and words[at - 1 : at] == ["␊"])]
    assert "".join(found) == "".join(f"▁{word}" for word in words)
    assert "<unk>" not in found
    if not newlines:
        scores = dict(zip(PIECES, SCORES, strict=True))
        assert sum(scores[piece] for piece in found) <= sum(scores[piece] for piece in tokens(source, text)) + 1e-6


def test_the_settings_cut_a_trunk_and_the_table_of_micro(source):
    settings = ModelConfig(encoder=source.location, vocab_size=ALWAYS + 6, static_size=8)
    trunk = with_vocabulary(find_trunk(settings), settings, ["hello world"])
    assert trunk.config["vocab_size"] == ALWAYS + 6
    assert {"▁hello", "▁world"} <= set(pieces_of(trunk))
    micro = settings.model_copy(update={"preset": "micro"})
    static = with_vocabulary(find_trunk(micro), micro, ["hello world"])
    assert static.config["model_type"] == "static"
    assert static.load().get_input_embeddings().weight.shape == (ALWAYS + 6, 8)
    assert static.tokenizer_json == trunk.tokenizer_json
    whole = ModelConfig(encoder=source.location)
    assert with_vocabulary(found := find_trunk(whole), whole, ["hello"]) is found
