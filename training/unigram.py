"""Unigram tokenizers (Kudo, 2018, arXiv 1804.10959): which pieces a smaller one keeps, and what else it needs.

Works on the JSON text of the library `tokenizers`; other kinds of tokenizers pass unchanged or are refused.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers.normalizers import Normalizer

from mope.errors import ConfigError
from mope.features import ends
from mope.grid import Array

# first words of the Unicode names of letters; pieces with other letters stay only where they are one character
SCRIPTS = frozenset(
    (
        "ARABIC",
        "CJK",
        "CYRILLIC",
        "GREEK",
        "HANGUL",
        "HIRAGANA",
        "IDEOGRAPHIC",
        "KATAKANA",
        "KATAKANA-HIRAGANA",
        "LATIN",
    )
)  # fmt: skip
SPACE = "▁"  # begins a word in a piece
NEWLINE = "␊"  # U+240A stands for a run of newlines and the indentation after it
NEWLINE_PIECE = SPACE + NEWLINE
TEXT_SHARE = 0.5  # weight of the texts' frequencies; the rest is the vocabulary's own
MAX_TEXTS, MAX_CHARS = 20_000, 1000  # texts that are counted, and characters of each
UNWRITABLE = 100.0  # how far a special token's score lies below all others
_CHUNK = 1024


def normalizer() -> Normalizer:
    """What sentencepiece does to characters first (`nmt_nfkc`): NFKC, no control characters, one space for a run."""
    collapsed = normalizers.Replace(Regex(" {2,}"), " ")
    return normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip(), collapsed])


def served(tokenizer_json: str) -> str:
    """The same tokenizer as a predictor uses it; one that is not Unigram stays as it is.

    No text becomes a special token: "<s>" is written with the pieces of its letters. A Unigram model takes its special
    tokens for pieces with the best of all scores, also where the library is told to read them as text. And characters
    are normalised where the tokenizer has lost its rules: `transformers` 5 leaves out those of XLM-R.
    """
    settings = json.loads(tokenizer_json)
    model = settings["model"]
    if model.get("type") != "Unigram":
        return tokenizer_json
    special = _special_ids(settings)
    lowest = min((score for id, (_, score) in enumerate(model["vocab"]) if id not in special), default=0.0)
    for id in special:
        model["vocab"][id][1] = lowest - UNWRITABLE
    if settings["normalizer"] is None:
        bare = Tokenizer(models.Unigram())
        bare.normalizer = normalizer()
        settings["normalizer"] = json.loads(bare.to_str())["normalizer"]
    return json.dumps(settings, ensure_ascii=False)


def kept_pieces(tokenizer_json: str, size: int, texts: Sequence[str] = ()) -> tuple[int, ...]:
    """Ids of the pieces to keep, ascending: special tokens, single characters, then the most frequent.

    A piece's frequency is the mean of its frequency in `texts` and of what its score says, which is its frequency in
    the text that the vocabulary was made of; so languages that are rare in `texts` keep their common pieces, too.

    Args:
        tokenizer_json: a Unigram tokenizer.
        size: how many pieces.
        texts: what a predictor will read, for example training prompts; without any, scores alone decide. A sample
            of them is counted.

    Raises:
        ConfigError: not a Unigram tokenizer, or `size` is less than what always stays.
    """
    settings = json.loads(tokenizer_json)
    if settings["model"].get("type") != "Unigram":
        raise ConfigError(
            f"a vocabulary can be cut where the tokenizer is of the kind Unigram, got {settings['model'].get('type')}; "
            "leave the size of the vocabulary out, or type --encoder e5"
        )
    pieces = [piece for piece, _ in settings["model"]["vocab"]]
    if any(added["id"] >= len(pieces) for added in settings["added_tokens"]):
        raise ConfigError("the tokenizer has tokens besides its pieces, which can't be cut; type --encoder e5")
    if size >= len(pieces):
        return tuple(range(len(pieces)))
    always = _special_ids(settings) | {id for id, piece in enumerate(pieces) if len(piece.removeprefix(SPACE)) <= 1}
    if size < len(always):
        raise ConfigError(
            f"a vocabulary of {size} pieces is too small; special tokens and single characters are {len(always)}"
        )
    is_open_V = np.array([id not in always and _is_of_scripts(piece) for id, piece in enumerate(pieces)])
    own_V = np.where(is_open_V, np.exp([score for _, score in settings["model"]["vocab"]]), 0.0)
    counts_V = np.where(is_open_V, _counts(tokenizer_json, texts, len(pieces)), 0.0)
    frequency_V = own_V / max(own_V.sum(), 1e-300)
    if counts_V.any():
        frequency_V = (1 - TEXT_SHARE) * frequency_V + TEXT_SHARE * counts_V / counts_V.sum()
    chosen = np.argsort(-frequency_V, kind="stable")[: size - len(always)]
    return tuple(sorted(always.union(chosen[is_open_V[chosen]].tolist())))


def cut_tokenizer(tokenizer_json: str, kept: Sequence[int], *, newlines: bool) -> str:
    """A Unigram tokenizer with the pieces `kept` alone, renumbered in their order.

    Args:
        tokenizer_json: the whole one.
        kept: ids, ascending, special tokens among them.
        newlines: a run of newlines is one more piece, the last; else it is a space.
    """
    settings = json.loads(tokenizer_json)
    model = settings["model"]
    new_ids = {old: new for new, old in enumerate(kept)}
    special = _special_ids(settings)
    vocabulary = [model["vocab"][id] for id in kept]
    model["unk_id"] = new_ids[model["unk_id"]]
    if newlines:
        # no other piece has the symbol: any score will do
        best = max((model["vocab"][id][1] for id in kept if id not in special), default=0.0)
        vocabulary.append([NEWLINE_PIECE, best])
        settings["normalizer"] = _newlines_first(settings["normalizer"])
    model["vocab"] = vocabulary
    for added in settings["added_tokens"]:
        added["id"] = new_ids[added["id"]]
    settings["post_processor"] = None  # `mope.features` adds the special tokens
    return json.dumps(settings, ensure_ascii=False)


def _special_ids(settings: dict[str, Any]) -> set[int]:
    """Special tokens that are pieces of the model, and `<unk>`."""
    ids = {settings["model"]["unk_id"], *(added["id"] for added in settings["added_tokens"])}
    return ids & set(range(len(settings["model"]["vocab"])))


def _is_of_scripts(piece: str) -> bool:
    return all(unicodedata.name(letter, "").partition(" ")[0] in SCRIPTS for letter in piece if letter.isalpha())


def _counts(tokenizer_json: str, texts: Sequence[str], num_pieces: int) -> Array:
    """How often each piece is used in a sample of the texts, evenly drawn, shape (V,)."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    counts: Counter[int] = Counter()
    step = max(1, -(-len(texts) // MAX_TEXTS))
    rest: Iterable[str] = iter(texts[::step])
    while chunk := [ends(text, MAX_CHARS) for text in islice(rest, _CHUNK)]:
        for encoded in tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
            counts.update(encoded.ids)
    return np.array([counts[id] for id in range(num_pieces)], dtype=np.float64)


def _newlines_first(normalizer: dict[str, Any] | None) -> dict[str, Any]:
    """A normalizer that makes a run of newlines, with the indentation after it, into one symbol between spaces."""
    first = {"type": "Replace", "pattern": {"Regex": r"\n\s*"}, "content": f" {NEWLINE} "}
    rest: Sequence[Any] = []
    if normalizer is not None:
        rest = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return {"type": "Sequence", "normalizers": [first, *rest]}
