"""Static embeddings: what a transformer says of each token of its vocabulary, in a table.

Each token goes through the transformer alone, between `[CLS]` and `[SEP]`; the averages of what comes out, turned to
their principal axes, are where the table of a `micro` predictor starts before it is trained (the idea of model2vec,
Tulkens and van Dongen, 2024). Knows encoders; not predictors.

Shape suffixes: V vocabulary, H encoder width, D size of a vector.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mope.backends.network import Encoder
from mope.backends.static_encoder import StaticConfig, StaticEncoder
from mope.console import progress
from mope.errors import ConfigError
from mope.training.encoders import Trunk

BATCH_TOKENS = 512


@dataclass(frozen=True)
class StaticTrunk:
    """A table of vectors, distilled from another trunk.

    Attributes:
        origin: the trunk that the vectors are taken from; it gives the tokenizer, too.
        vector_size: D.
        num_filters: filters over three tokens in a row, see `mope.backends.static_encoder`.
    """

    origin: Trunk
    vector_size: int
    num_filters: int = 0

    def __post_init__(self) -> None:
        width = int(self.origin.config["hidden_size"])
        if self.vector_size > width:
            raise ConfigError(f"--static-size: got {self.vector_size}; {self.name} has {width} dimensions")

    @property
    def name(self) -> str:
        """What the user called the origin."""
        return self.origin.name

    @property
    def config(self) -> dict[str, Any]:
        """The architecture."""
        vocab_size = int(self.origin.config["vocab_size"])
        return asdict(StaticConfig(vocab_size, self.vector_size, self.special_ids[1], self.num_filters))

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as one JSON text."""
        return self.origin.tokenizer_json

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Ids of the tokens that stand for `[CLS]`, `[SEP]` and padding."""
        return self.origin.special_ids

    def tokenizer(self) -> Tokenizer:
        """A fresh tokenizer."""
        return self.origin.tokenizer()

    def load(self) -> Encoder:
        """The table, freshly distilled; filters as they are before training."""
        encoder = StaticEncoder(StaticConfig(**self.config))
        vectors_VH = token_vectors(self.origin.load(), self.special_ids)
        encoder.vectors.weight.data.copy_(principal_axes(vectors_VH, self.vector_size))
        return encoder


@torch.inference_mode()
def token_vectors(encoder: Encoder, special_ids: tuple[int, int, int]) -> Tensor:
    """What an encoder says of each token by itself, shape (V, H): the mean of its last hidden states."""
    cls, sep, _ = special_ids
    found: list[Tensor] = []
    tokens_V = torch.arange(encoder.config.vocab_size)
    encoder.eval()
    with progress("distilling the vocabulary", total=len(tokens_V)) as advance:
        for ids in torch.split(tokens_V, BATCH_TOKENS):
            ids_B3 = torch.stack([torch.full_like(ids, cls), ids, torch.full_like(ids, sep)], dim=1)
            hidden: Any = encoder(input_ids=ids_B3, attention_mask=torch.ones_like(ids_B3))
            found.append(hidden.last_hidden_state.float().mean(dim=1))
            advance(len(ids))
    return torch.cat(found)


def principal_axes(vectors_VH: Tensor, size: int) -> Tensor:
    """The vectors on their first principal axes, centred, scaled to unit variance overall, shape (V, `size`)."""
    centred = vectors_VH - vectors_VH.mean(dim=0)
    axes_HH = torch.linalg.svd(centred, full_matrices=False).Vh
    turned_VD = centred @ axes_HH[:size].T
    scaled_VD: Tensor = turned_VD / turned_VD.std()
    return scaled_VD
