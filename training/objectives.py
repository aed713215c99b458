"""What training minimises: likelihood and CRPS of the mixture, the experts' own likelihood, the gate's.

A student learns from its teacher's distributions, too. Knows tensors and the grid; no encoder, no Lightning.

Shape suffixes: B rows, K experts, N bins (the body's and one for the tail), E = N - 1 upper edges of the body.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mope.errors import ConfigError


@dataclass(frozen=True)
class Loss:
    """The loss to minimise and its parts, for the logs."""

    total: Tensor
    parts: dict[str, Tensor]


class MopeObjective:
    """Loss of gate and heads.

    mixture: -log sum_k gate_k p_k(bin), the likelihood of what a server gets;
    crps: continuous ranked probability score of the mixture over the body, in tokens, scaled: its minimum
    is the true distribution (Gneiting and Raftery, 2007), and it looks at tokens where likelihood looks at bins;
    experts: each head's likelihood on the rows of its own bucket, widened by an overlap margin;
    gate: cross-entropy of the gate against the true bucket.

    A censored row enters by its tail: the probability of its bin and all above, of its bucket and all
    above, and CRPS at the edges below it alone.

    Args:
        edges: edges of the body's bins in tokens, length N (the tail is the N-th bin).
        boundaries: inner borders of the buckets in tokens, length K - 1.
        overlap: margin of each bucket, as a share of its borders: 0.5 trains an expert on half as much
            again each side.
        crps_weight: weight of the CRPS.
        expert_weight: weight of the experts' own likelihood.
        gate_weight: weight of the gate's cross-entropy.
        tokens_scale: tokens that the CRPS is divided by, usually the mean length.
    """

    def __init__(
        self,
        edges: list[float],
        boundaries: list[float],
        *,
        overlap: float = 0.5,
        crps_weight: float = 1.0,
        expert_weight: float = 0.25,
        gate_weight: float = 0.25,
        tokens_scale: float = 100.0,
    ) -> None:
        self._upper_E = torch.tensor(edges[1:], dtype=torch.float32)
        self._width_E = torch.tensor(edges[1:], dtype=torch.float32) - torch.tensor(edges[:-1], dtype=torch.float32)
        self._borders = torch.tensor(boundaries, dtype=torch.float32)
        self._low_K = torch.tensor([0.0, *boundaries]) * (1 - overlap)
        self._high_K = torch.tensor([*boundaries, math.inf]) * (1 + overlap)
        self.crps_weight, self.expert_weight, self.gate_weight = crps_weight, expert_weight, gate_weight
        self._scale = tokens_scale

    def __call__(self, gate_BK: Tensor | None, heads_BKN: Tensor | None, tokens_B: Tensor, censored_B: Tensor) -> Loss:
        """Mean loss over the rows. A network without a gate must have one head, and the other way round none."""
        device = tokens_B.device
        parts: dict[str, Tensor] = {}
        total = tokens_B.new_zeros(())
        log_gate_BK = None if gate_BK is None else F.log_softmax(gate_BK, dim=-1)
        if log_gate_BK is not None:
            bucket_B = torch.bucketize(tokens_B, self._borders.to(device))
            parts["gate"] = class_nll(log_gate_BK, bucket_B, censored_B).mean()
            total = total + (self.gate_weight if heads_BKN is not None else 1.0) * parts["gate"]
        if heads_BKN is None:
            return Loss(total, parts)
        log_p_BKN = F.log_softmax(heads_BKN, dim=-1)
        bin_B = torch.bucketize(tokens_B, self._upper_E.to(device))
        if log_gate_BK is not None:
            log_mix_BN = torch.logsumexp(log_gate_BK.unsqueeze(-1) + log_p_BKN, dim=1)
            own_BK = (tokens_B.unsqueeze(-1) >= self._low_K.to(device)) & (
                tokens_B.unsqueeze(-1) <= self._high_K.to(device)
            )
            own_BK = own_BK | (censored_B.unsqueeze(-1) & (tokens_B.unsqueeze(-1) <= self._high_K.to(device)))
            nll_BK = torch.stack([class_nll(log_p, bin_B, censored_B) for log_p in log_p_BKN.unbind(1)], dim=1)
            parts["experts"] = (nll_BK * own_BK).sum() / own_BK.sum().clamp(min=1)
            total = total + self.expert_weight * parts["experts"]
        elif log_p_BKN.shape[1] == 1:
            log_mix_BN = log_p_BKN[:, 0]
        else:
            raise ConfigError(f"{log_p_BKN.shape[1]} heads need a gate to mix them")
        parts["mixture"] = class_nll(log_mix_BN, bin_B, censored_B).mean()
        cdf_BE = log_mix_BN.exp().cumsum(-1)[:, :-1]
        reached_BE = (tokens_B.unsqueeze(-1) <= self._upper_E.to(device)).float()
        seen_BE = 1.0 - reached_BE * censored_B.unsqueeze(-1).float()
        parts["crps"] = (((cdf_BE - reached_BE) ** 2 * seen_BE) @ self._width_E.to(device)).mean() / self._scale
        total = total + parts["mixture"] + self.crps_weight * parts["crps"]
        return Loss(total, parts)

    def distance(self, log_p_BN: Tensor, log_q_BN: Tensor) -> Tensor:
        """Mean squared difference of two cumulative distributions over the body, in tokens, scaled as the CRPS is."""
        cdfs = [log_BN.exp().cumsum(-1)[:, :-1] for log_BN in (log_p_BN, log_q_BN)]
        return ((cdfs[0] - cdfs[1]) ** 2 @ self._width_E.to(log_p_BN.device)).mean() / self._scale


def class_nll(log_p_BC: Tensor, class_B: Tensor, censored_B: Tensor) -> Tensor:
    """-log p(class), or for a censored row -log p(class or any above), shape (B,)."""
    classes_C = torch.arange(log_p_BC.shape[-1], device=log_p_BC.device)
    at_or_above_BC = classes_C >= class_B.unsqueeze(-1)
    allowed_BC = torch.where(censored_B.unsqueeze(-1), at_or_above_BC, classes_C == class_B.unsqueeze(-1))
    return -torch.logsumexp(log_p_BC.masked_fill(~allowed_BC, -math.inf), dim=-1)


class DistillationObjective:
    """A student's loss: that of the labels, and how far it is from its teacher's distributions.

    From the teacher: the Kullback-Leibler divergence of the mixtures over the bins and of the gates, and the squared
    difference of the cumulative distributions in tokens, which is what CRPS is against a label. Where a batch brings
    no teacher, as in validation, the labels' loss alone.

    Args:
        labels: the loss of the labels.
        weight: share of the teacher, from 0 to 1.
    """

    def __init__(self, labels: MopeObjective, weight: float) -> None:
        self._labels, self._weight = labels, weight

    def __call__(
        self,
        gate_BK: Tensor | None,
        heads_BKN: Tensor | None,
        tokens_B: Tensor,
        censored_B: Tensor,
        teacher_mix_BN: Tensor | None = None,
        teacher_gate_BK: Tensor | None = None,
    ) -> Loss:
        """Mean loss over the rows, for a network with heads."""
        own = self._labels(gate_BK, heads_BKN, tokens_B, censored_B)
        if teacher_mix_BN is None or teacher_gate_BK is None:
            return own
        if heads_BKN is None:
            raise ConfigError("a student has heads; got a network with none")
        log_mix_BN = F.log_softmax(heads_BKN, dim=-1)
        parts = dict(own.parts)
        taught = tokens_B.new_zeros(())
        if gate_BK is not None:
            log_gate_BK = F.log_softmax(gate_BK, dim=-1)
            log_mix_BN = log_mix_BN + log_gate_BK.unsqueeze(-1)
            parts["teacher_gate"] = F.kl_div(log_gate_BK, teacher_gate_BK, reduction="batchmean", log_target=True)
            taught = taught + self._labels.gate_weight * parts["teacher_gate"]
        log_mix_BN = torch.logsumexp(log_mix_BN, dim=1)
        parts["teacher_mixture"] = F.kl_div(log_mix_BN, teacher_mix_BN, reduction="batchmean", log_target=True)
        parts["teacher_crps"] = self._labels.distance(log_mix_BN, teacher_mix_BN)
        taught = taught + parts["teacher_mixture"] + self._labels.crps_weight * parts["teacher_crps"]
        return Loss((1 - self._weight) * own.total + self._weight * taught, parts)


class RegressionObjective:
    """L1 loss of one output in units of `tokens_scale` tokens: the single-BERT baseline, as SSJF trains it.

    A censored row counts only where the prediction lies below it.
    """

    def __init__(self, tokens_scale: float) -> None:
        self._scale = tokens_scale

    def __call__(self, gate_BK: Tensor | None, heads_BKN: Tensor | None, tokens_B: Tensor, censored_B: Tensor) -> Loss:
        """Mean absolute error over the rows, in units of the scale."""
        error_B = heads_BKN[:, 0, 0] - tokens_B / self._scale if heads_BKN is not None else tokens_B
        loss = torch.where(censored_B, error_B.clamp(max=0), error_B).abs().mean()
        return Loss(loss, {"l1": loss})


class RankingObjective:
    """ListMLE over the batch, longest answers first: the idea of vLLM-LTR (Fu et al., 2024), for tau."""

    def __call__(self, gate_BK: Tensor | None, heads_BKN: Tensor | None, tokens_B: Tensor, censored_B: Tensor) -> Loss:
        """Negative log likelihood of the batch's true order under Plackett-Luce, per row."""
        scores_B = heads_BKN[:, 0, 0] if heads_BKN is not None else tokens_B
        ordered = scores_B[torch.argsort(tokens_B, descending=True, stable=True)]
        remaining = torch.logcumsumexp(ordered.flip(0), dim=0).flip(0)
        loss = (remaining - ordered).mean()
        return Loss(loss, {"list_mle": loss})
