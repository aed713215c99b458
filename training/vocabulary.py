"""A trunk with a smaller vocabulary: the most used pieces of its tokenizer, and their vectors.

XLM-R's 250,000 pieces serve a hundred languages; their table is most of a small network. Which pieces stay is in
`mope.training.unigram`. Newlines, which XLM-R reads as spaces, become a token of their own.

Shape suffixes: K kept pieces, H encoder width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mope.backends.network import Encoder
from mope.training.encoders import Trunk
from mope.training.unigram import cut_tokenizer, kept_pieces

NEWLINE_LIKE = (".", ":", ";", "!", "?")  # the vector of newlines begins as the mean of theirs


@dataclass(frozen=True)
class CutTrunk:
    """Another trunk, of whose vocabulary a part stays.

    Attributes:
        origin: the whole trunk, with a Unigram tokenizer.
        kept: ids of the pieces that stay, ascending, special tokens among them.
        newlines: whether a run of newlines is a token, the last; else it is a space.
    """

    origin: Trunk
    kept: tuple[int, ...]
    newlines: bool = True

    @property
    def name(self) -> str:
        """What the user called the origin."""
        return self.origin.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The architecture."""
        vocab_size = len(self.kept) + self.newlines
        return {**self.origin.config, "vocab_size": vocab_size, "pad_token_id": self.special_ids[2]}

    @cached_property
    def tokenizer_json(self) -> str:
        """The tokenizer as one JSON text."""
        return cut_tokenizer(self.origin.tokenizer_json, self.kept, newlines=self.newlines)

    @cached_property
    def special_ids(self) -> tuple[int, int, int]:
        """Ids of the tokens that stand for `[CLS]`, `[SEP]` and padding."""
        first, second, padding = map(self.kept.index, self.origin.special_ids)
        return first, second, padding

    def tokenizer(self) -> Tokenizer:
        """A fresh tokenizer."""
        return Tokenizer.from_str(self.tokenizer_json)

    def load(self) -> Encoder:
        """The origin's weights, with the vectors of the kept pieces alone."""
        encoder: Any = self.origin.load()
        table: Any = encoder.get_input_embeddings()
        vectors_KH: Tensor = table.weight.data[torch.tensor(self.kept)]
        if self.newlines:
            pieces = [piece for piece, _ in json.loads(self.tokenizer_json)["model"]["vocab"]]
            like = [pieces.index(piece) for piece in NEWLINE_LIKE if piece in pieces] or slice(None)
            vectors_KH = torch.cat([vectors_KH, vectors_KH[like].mean(dim=0, keepdim=True)])
        cut = torch.nn.Embedding(len(vectors_KH), vectors_KH.shape[1], padding_idx=self.special_ids[2])
        cut.weight.data.copy_(vectors_KH)
        encoder.set_input_embeddings(cut)
        encoder.config.vocab_size, encoder.config.pad_token_id = len(vectors_KH), self.special_ids[2]
        found: Encoder = encoder
        return found


def cut_vocabulary(trunk: Trunk, size: int, texts: Sequence[str] = (), *, newlines: bool = True) -> CutTrunk:
    """A trunk with `size` tokens in all, see `mope.training.unigram.kept_pieces`.

    Raises:
        ConfigError: not a Unigram tokenizer, or `size` is less than what always stays.
    """
    return CutTrunk(trunk, kept_pieces(trunk.tokenizer_json, size - newlines, texts), newlines)
