"""A trunk without attention: one vector per token, averaged over the prompt and over what stands beside it.

What a transformer does in milliseconds, a table look-up does in microseconds, at some cost in accuracy. Averages know
no order of words; filters over three tokens in a row, each by its strongest response anywhere in the prompt (Kim, 2014,
arXiv 1408.5882), know some of it. Knows token ids; how its vectors are distilled from a transformer is in
`mope.training.static`.

Shape suffixes: B rows, S tokens, V vocabulary, D size of a vector, F filters, H = 2 D + F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_TYPE = "static"


@dataclass(frozen=True)
class StaticConfig:
    """The architecture, in the words that `transformers` uses.

    Attributes:
        vocab_size: V.
        vector_size: D.
        sep_token_id: the token between the prompt and its context.
        num_filters: F, 0 for averages alone.
    """

    vocab_size: int
    vector_size: int
    sep_token_id: int
    num_filters: int = 0
    model_type: str = MODEL_TYPE

    @property
    def hidden_size(self) -> int:
        """Width of what the encoder gives: a mean over the prompt, one over its context, and the filters."""
        return 2 * self.vector_size + self.num_filters


class StaticEncoder(nn.Module):
    """Token ids to one vector of the text.

    Args:
        config: sizes.
    """

    def __init__(self, config: StaticConfig) -> None:
        super().__init__()
        self.config = config
        self.vectors = nn.Embedding(config.vocab_size, config.vector_size)
        self.filters = nn.Linear(3 * config.vector_size, config.num_filters) if config.num_filters else None

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of vectors."""
        return self.vectors

    def forward(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """The text's vector, shape (B, H): means over prompt and context, then filters; zeros without any context."""
        vectors_BSD = self.vectors(input_ids_BS)
        is_sep_BS = (input_ids_BS == self.config.sep_token_id).long()
        seps_before_BS = is_sep_BS.cumsum(dim=1) - is_sep_BS
        part_BS = seps_before_BS + 2 * (1 - attention_mask_BS)  # 0: prompt, 1: context, above: padding
        is_part_B2S = (part_BS.unsqueeze(1) == torch.tensor([[0], [1]], device=part_BS.device)).to(vectors_BSD.dtype)
        means_B2D = (is_part_B2S @ vectors_BSD) / is_part_B2S.sum(dim=-1, keepdim=True).clamp(min=1.0)
        means_BH: Tensor = means_B2D.flatten(start_dim=1)
        if self.filters is None:
            return means_BH
        inside_BSD = vectors_BSD * attention_mask_BS.unsqueeze(-1)
        before_BSD, after_BSD = F.pad(inside_BSD, (0, 0, 1, 0))[:, :-1], F.pad(inside_BSD, (0, 0, 0, 1))[:, 1:]
        responses_BSF = F.relu(self.filters(torch.cat([before_BSD, inside_BSD, after_BSD], dim=-1)))
        strongest_BF = (responses_BSF * is_part_B2S[:, 0].unsqueeze(-1)).amax(dim=1)
        return torch.cat([means_BH, strongest_BF], dim=1)
