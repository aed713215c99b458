"""The network of MoPE: an encoder trunk, a gate over the experts and one head per expert.

One class serves both designs: `shared` is one network with a gate and K heads, `separate` is a network with a
gate and no head, and K networks with one head and no gate. Baselines of equal size use it with one output.
Knows tensors only; training is elsewhere.

Shape suffixes: B rows, S tokens, H encoder width, F numbers, K experts, N bins (the body's and one for the tail).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from mope.config import PredictorConfig


def build_encoder(encoder_config: dict[str, Any]) -> PreTrainedModel:
    """An encoder of the given architecture with fresh weights, without a pooling layer."""
    config: PretrainedConfig = AutoConfig.for_model(**encoder_config)
    return _without_pooler(lambda **options: AutoModel.from_config(config, **options))  # type: ignore[no-untyped-call]


def load_encoder(name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """A pre-trained encoder from a folder or the Hugging Face Hub, without a pooling layer."""
    return _without_pooler(
        lambda **options: AutoModel.from_pretrained(name_or_path, revision=revision, dtype=torch.float32, **options)
    )


def _without_pooler(make: Any) -> PreTrainedModel:
    try:
        model: PreTrainedModel = make(add_pooling_layer=False)
    except TypeError:  # the architecture has no pooling layer to leave out
        model = make()
    return model


class MopeNetwork(nn.Module):
    """Trunk, gate and heads.

    Args:
        encoder: the trunk, a Hugging Face encoder.
        number_mean: means of the numbers, length F.
        number_scale: one over their standard deviations, 0 for constants, length F.
        num_llms: known target LLMs.
        llm_dim: size of a target LLM's embedding.
        num_gate: outputs of the gate, 0 for none.
        num_heads: expert heads, 0 for none.
        num_outputs: outputs of a head: bins, or 1 for a regression or ranking baseline.
        head_hidden: hidden units of the gate and of each head.
        dropout: dropout before each head's last layer.
    """

    number_mean: Tensor
    number_scale: Tensor

    def __init__(
        self,
        encoder: PreTrainedModel,
        *,
        number_mean: list[float],
        number_scale: list[float],
        num_llms: int,
        llm_dim: int,
        num_gate: int,
        num_heads: int,
        num_outputs: int,
        head_hidden: int,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("number_mean", torch.tensor(number_mean, dtype=torch.float32))
        self.register_buffer("number_scale", torch.tensor(number_scale, dtype=torch.float32))
        self.llm = nn.Embedding(num_llms + 1, llm_dim)
        nn.init.zeros_(self.llm.weight)
        width = encoder.config.hidden_size + len(number_mean) + llm_dim

        def head(outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Linear(width, head_hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(head_hidden, outputs)
            )

        self.gate = head(num_gate) if num_gate else None
        self.heads = nn.ModuleList(head(num_outputs) for _ in range(num_heads))

    @classmethod
    def of(
        cls,
        config: PredictorConfig,
        encoder: PreTrainedModel,
        *,
        num_gate: int,
        num_heads: int,
        num_outputs: int | None = None,
        dropout: float = 0.0,
    ) -> MopeNetwork:
        """A network of a predictor's sizes and scales on the given trunk; a head's outputs are its bins by default."""
        return cls(
            encoder,
            number_mean=list(config.number_mean),
            number_scale=list(config.number_scale),
            num_llms=len(config.target_llms),
            llm_dim=config.llm_dim,
            num_gate=num_gate,
            num_heads=num_heads,
            num_outputs=num_outputs or config.num_body_bins + 1,
            head_hidden=config.head_hidden,
            dropout=dropout,
        )

    def embed(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """Mean of the trunk's last hidden states over the text, shape (B, H), float32."""
        hidden_BSH: Tensor = self.encoder(
            input_ids=input_ids_BS, attention_mask=attention_mask_BS
        ).last_hidden_state.float()
        weights_BS1 = attention_mask_BS.unsqueeze(-1).to(hidden_BSH.dtype)
        return (hidden_BSH * weights_BS1).sum(1) / weights_BS1.sum(1).clamp(min=1.0)

    def forward(
        self, input_ids_BS: Tensor, attention_mask_BS: Tensor, numbers_BF: Tensor, llm_B: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Gate logits (B, K) or None, head logits (B, heads, outputs) or None, embedding (B, H)."""
        embedding_BH = self.embed(input_ids_BS, attention_mask_BS)
        standard_BF = ((numbers_BF - self.number_mean) * self.number_scale).clamp(-8, 8)
        joined = torch.cat([embedding_BH, standard_BF, self.llm(llm_B)], dim=-1)
        gate_BK = self.gate(joined).float() if self.gate is not None else None
        heads_BKN = torch.stack([head(joined) for head in self.heads], dim=1).float() if len(self.heads) else None
        return gate_BK, heads_BKN, embedding_BH
