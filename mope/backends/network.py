"""The network of MoPE: an encoder trunk, a gate over the experts and one head per expert.

One class serves both designs: `shared` is one network with a gate and K heads, `separate` is a network with a
gate and no head, and K networks with one head and no gate. Baselines of equal size use it with one plain output.
Knows tensors only; training is elsewhere.

Shape suffixes: B rows, S tokens, H encoder width, F numbers, K experts, N bins (the body's and one for the tail),
C classes in order of length (experts' buckets or bins).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from mope.backends.encoder_fields import allowed_fields
from mope.backends.static_encoder import MODEL_TYPE, StaticConfig, StaticEncoder
from mope.config import PredictorConfig

Encoder: TypeAlias = PreTrainedModel | StaticEncoder


def build_encoder(encoder_config: dict[str, Any]) -> Encoder:
    """An encoder of the given architecture with fresh weights, without a pooling layer.

    Raises:
        ArtifactError: an architecture that `allowed_fields` refuses.
    """
    fields = allowed_fields(encoder_config)
    if fields["model_type"] == MODEL_TYPE:
        return StaticEncoder(StaticConfig(**fields))
    config: PretrainedConfig = AutoConfig.for_model(**fields)
    return _without_pooler(lambda **options: AutoModel.from_config(config, **options))  # type: ignore[no-untyped-call]


def load_encoder(name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """A pre-trained encoder from a folder or the Hugging Face Hub, without a pooling layer.

    Of its config only what `allowed_fields` allows is used, and no code that comes with it.
    """
    written = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False).to_dict()
    config: PretrainedConfig = AutoConfig.for_model(**allowed_fields(written))
    return _without_pooler(
        lambda **options: AutoModel.from_pretrained(
            name_or_path,
            revision=revision,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            weights_only=True,
            **options,
        )
    )


def _without_pooler(make: Any) -> PreTrainedModel:
    try:
        model: PreTrainedModel = make(add_pooling_layer=False)
    except TypeError:  # the architecture has no pooling layer to leave out
        model = make()
    return model


def embed(encoder: Encoder, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """One vector of each text, shape (B, H), float32: of a transformer, the mean of its last hidden states."""
    if isinstance(encoder, StaticEncoder):
        static_BH: Tensor = encoder(input_ids_BS, attention_mask_BS)
        return static_BH.float()
    hidden_BSH: Tensor = encoder(input_ids=input_ids_BS, attention_mask=attention_mask_BS).last_hidden_state.float()
    weights_BS1 = attention_mask_BS.unsqueeze(-1).to(hidden_BSH.dtype)
    return (hidden_BSH * weights_BS1).sum(1) / weights_BS1.sum(1).clamp(min=1.0)


class OrdinalHead(nn.Module):
    """Logits over classes that are ranges of lengths, one above the other.

    A small perceptron gives a location and a scale on the axis of log(tokens), and a free logit per class. The
    probability of a class is that of a logistic distribution there, times exp(its free logit), normalised: where
    the answer lies is one number that shifts all classes together, what it looks like stays free. From the same
    rows this learns a better median than free logits alone.

    Args:
        width: inputs.
        hidden: hidden units.
        borders: borders between the classes in tokens, increasing, length C - 1.
        start: location before training, in tokens.
        dropout: dropout before the last layer.
    """

    log_borders: Tensor

    MIN_SCALE = 0.05  # of the logistic distribution, in log(tokens)
    FAR = 1e4  # in log(tokens)

    def __init__(self, width: int, hidden: int, *, borders: Sequence[float], start: float, dropout: float) -> None:
        super().__init__()
        self.layers = _perceptron(width, hidden, len(borders) + 3, dropout)
        # with a border so far out on either side that all lies between them
        inner = np.log(np.asarray(borders, dtype=np.float64))
        log_borders = torch.tensor([-self.FAR, *inner, self.FAR], dtype=torch.float32)
        self.register_buffer("log_borders", log_borders, persistent=False)
        self._log_start = float(np.log(start))

    @property
    def bias(self) -> Tensor:
        """Bias of the last layer: C free logits, location, scale."""
        bias: Tensor = self.layers[-1].bias  # type: ignore[assignment]
        return bias

    def forward(self, joined_BW: Tensor) -> Tensor:
        """Logits, shape (B, C), float32."""
        return self.logits(self.layers(joined_BW))

    def logits(self, raw: Tensor) -> Tensor:
        """Logits, shape (..., C), float32, of what the perceptron gives, shape (..., C + 2)."""
        raw = raw.float()
        free, location, scale = raw[..., :-2], raw[..., -2:-1] + self._log_start, raw[..., -1:]
        # log(sigmoid(b) - sigmoid(a)) = log sigmoid(b) + log sigmoid(-a) + log(1 - exp(a - b)), exact far out, too
        z = (self.log_borders - location) / (F.softplus(scale) + self.MIN_SCALE)
        # softplus, since log(sigmoid) underflows in engines that run the two one after the other
        above = F.softplus(z)
        low, high = z[..., :-1], z[..., 1:]
        inside = torch.log((1.0 - torch.exp(low - high)).clamp(min=1e-30))
        logits: Tensor = free + (high - above[..., 1:]) - above[..., :-1] + inside
        return logits


def _side_by_side(heads: Sequence[nn.Module], joined_BW: Tensor) -> Tensor:
    """Outputs of heads of one kind, shape (B, heads, outputs): one product in place of many small ones."""
    first = heads[0]
    if not isinstance(first, OrdinalHead):
        return torch.stack([head(joined_BW) for head in heads], dim=1)
    layers: list[Any] = [head.layers for head in heads]
    _, activation, dropout, _ = layers[0]
    enter_XW, bias_X = (torch.cat([getattr(one[0], name) for one in layers]) for name in ("weight", "bias"))
    hidden_BX: Tensor = dropout(activation(F.linear(joined_BW, enter_XW, bias_X)))
    leave_KCY, bias_KC = (torch.stack([getattr(one[-1], name) for one in layers]) for name in ("weight", "bias"))
    hidden_BK1Y = hidden_BX.reshape(-1, len(layers), 1, leave_KCY.shape[-1])
    return first.logits((hidden_BK1Y @ leave_KCY.mT).squeeze(-2) + bias_KC)


def _perceptron(width: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))


class PiecewiseLinear(nn.Module):
    """Piecewise linear encoding of numbers (Gorishniy et al., 2022, arXiv 2203.05556): one output for each piece.

    A piece's output rises from 0 at its lower edge to 1 at its upper one. A linear layer behind it learns any curve
    with bends at the edges, as trees learn thresholds; from the number alone a small perceptron hardly does.

    Args:
        edges: for each number the edges of its pieces, increasing; fewer than three give it no piece.
    """

    index: Tensor
    low: Tensor
    rate: Tensor

    def __init__(self, edges: Sequence[Sequence[float]]) -> None:
        super().__init__()
        bent = [(number, own) for number, own in enumerate(edges) if len(own) > 2]
        pieces = [(number, low, high) for number, own in bent for low, high in pairwise(own)]
        self.width = len(pieces)
        index = torch.tensor([number for number, _, _ in pieces], dtype=torch.int64)
        low = torch.tensor([low for _, low, _ in pieces], dtype=torch.float32)
        rate = torch.tensor([1.0 / (high - low) for _, low, high in pieces], dtype=torch.float32)
        for name, value in (("index", index), ("low", low), ("rate", rate)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, numbers_BF: Tensor) -> Tensor:
        """Shape (B, pieces), each from 0 to 1."""
        pieces_BP: Tensor = ((numbers_BF[:, self.index] - self.low) * self.rate).clamp(0.0, 1.0)
        return pieces_BP


class MopeNetwork(nn.Module):
    """Trunk, gate and heads.

    Args:
        encoder: the trunk.
        number_mean: means of the numbers, length F.
        number_scale: one over their standard deviations, 0 for constants, length F.
        num_llms: known target LLMs.
        llm_dim: size of a target LLM's embedding.
        gate_borders: inner borders of the experts' buckets in tokens, length K - 1; None for no gate.
        num_heads: expert heads, 0 for none.
        head_borders: borders between a head's bins in tokens, length N - 1; None for heads with one plain
            output, as regression and ranking baselines have.
        start: typical length, where gate and heads begin, in tokens.
        head_hidden: hidden units of the gate and of each head.
        number_edges: see `PiecewiseLinear`, length F.
        dropout: dropout before each head's last layer.
        text_dropout: dropout of the text's embedding where gate and heads read it.
    """

    number_mean: Tensor
    number_scale: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        number_mean: list[float],
        number_scale: list[float],
        num_llms: int,
        llm_dim: int,
        gate_borders: Sequence[float] | None,
        num_heads: int,
        head_borders: Sequence[float] | None,
        start: float,
        head_hidden: int,
        number_edges: Sequence[Sequence[float]] = (),
        dropout: float = 0.1,
        text_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.text_dropout = nn.Dropout(text_dropout)
        self.register_buffer("number_mean", torch.tensor(number_mean, dtype=torch.float32))
        self.register_buffer("number_scale", torch.tensor(number_scale, dtype=torch.float32))
        self.pieces = PiecewiseLinear(number_edges)
        self.llm = nn.Embedding(num_llms + 1, llm_dim)
        nn.init.zeros_(self.llm.weight)
        width = encoder.config.hidden_size + len(number_mean) + self.pieces.width + llm_dim

        def head(borders: Sequence[float] | None) -> nn.Module:
            if borders is None:
                return _perceptron(width, head_hidden, 1, dropout)
            return OrdinalHead(width, head_hidden, borders=borders, start=start, dropout=dropout)

        self.gate = None if gate_borders is None else head(gate_borders)
        self.heads = nn.ModuleList(head(head_borders) for _ in range(num_heads))

    @classmethod
    def of(
        cls,
        config: PredictorConfig,
        encoder: Encoder,
        *,
        gate: bool,
        num_heads: int,
        plain: bool = False,
        dropout: float = 0.0,
        text_dropout: float = 0.0,
    ) -> MopeNetwork:
        """A network of a predictor's sizes, borders and scales on the given trunk; `plain` for one output a head."""
        bins = config.edges[1 : config.num_body_bins + 1]
        return cls(
            encoder,
            number_mean=list(config.number_mean),
            number_scale=list(config.number_scale),
            number_edges=config.number_edges,
            num_llms=len(config.target_llms),
            llm_dim=config.llm_dim,
            gate_borders=config.boundaries if gate else None,
            num_heads=num_heads,
            head_borders=None if plain else bins,
            start=float(np.exp(np.mean(np.log(config.boundaries or bins)))),
            head_hidden=config.head_hidden,
            dropout=dropout,
            text_dropout=text_dropout,
        )

    def forward(
        self,
        input_ids_BS: Tensor,
        attention_mask_BS: Tensor,
        numbers_BF: Tensor,
        llm_B: Tensor,
        text_B: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Gate logits (B, K) or None, head logits (B, heads, outputs) or None, embedding (B, H).

        With `text_B` there are fewer texts than rows, and it says which of them each row has: a prompt that many LLMs
        answered goes through the encoder once.
        """
        embedding_BH = embed(self.encoder, input_ids_BS, attention_mask_BS)
        if text_B is not None:
            embedding_BH = embedding_BH[text_B]
        standard_BF = ((numbers_BF - self.number_mean) * self.number_scale).clamp(-8, 8)
        parts = [self.text_dropout(embedding_BH), standard_BF, self.pieces(numbers_BF), self.llm(llm_B)]
        joined = torch.cat(parts, dim=-1)
        gate_BK = self.gate(joined).float() if self.gate is not None else None
        heads_BKN = _side_by_side(list(self.heads), joined).float() if len(self.heads) else None
        return gate_BK, heads_BKN, embedding_BH
