"""Counting label tokens, with and without a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mope.errors import ConfigError
from mope.training.data import tokens
from mope.training.data.tokens import FileCounter, TiktokenCounter, load_counter

TEXTS = ["hello world", "", "Tokens of <|endoftext|> inside are text.", "日本語 😀", "a" * 5000]


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(WordLevel({"[UNK]": 0, "[CLS]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["[CLS]"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    path = tmp_path / "llm" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return path


def test_file_counter_ignores_truncation_and_padding(tokenizer_file: Path) -> None:
    for place in (tokenizer_file, tokenizer_file.parent):
        counter = load_counter(str(place), num_workers=1, cache_dir=tokenizer_file.parent)
        assert counter.count(["one two three", "", "four"]) == [3, 0, 1]
        assert counter.name == "llm"


def test_file_counter_identity_follows_the_content(tokenizer_file: Path) -> None:
    before = FileCounter(tokenizer_file).identity
    tokenizer_file.write_text(tokenizer_file.read_text().replace("[UNK]", "[unk]"))
    assert FileCounter(tokenizer_file).identity != before


def test_damaged_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"can't be read as a tokenizer\.json"):
        load_counter(str(tmp_path), num_workers=1, cache_dir=tmp_path)


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'cl200k'.*--label-tokenizer cl100k_base"):
        load_counter("cl200k", num_workers=1, cache_dir=tmp_path)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_tiktoken_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    pytest.importorskip("bpe_openai")
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    counter = load_counter("cl100k_base", num_workers=num_workers, cache_dir=tmp_path)
    counts = counter.count(TEXTS)
    assert counts[:2] == [2, 0]
    assert counts[2] > 10  # <|endoftext|> alone would be one token
    assert counts[4] == 625
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    encoding = tiktoken.get_encoding("cl100k_base")  # loaded by now
    assert counts == [len(encoding.encode_ordinary(text)) for text in TEXTS]


def test_no_vocabulary_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str) -> None:
        raise ConnectionError(f"no route to {name}")

    monkeypatch.setattr(tokens.tiktoken, "get_encoding", no_network)
    counter = TiktokenCounter("p50k_base", num_workers=1, cache_dir=tmp_path)  # nothing is loaded yet
    with pytest.raises(ConfigError, match=r"'p50k_base' can't be had.*pip install bpe-openai") as caught:
        counter.count(["x"])
    assert "\n" not in str(caught.value)
