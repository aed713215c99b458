"""What training minimises: likelihood and CRPS of the mixture, the experts' own likelihood, the gate's.

A student learns from its teacher's distributions, too. Knows tensors and the grid; no encoder, no Lightning.

Shape suffixes: B rows, D draws, K experts, N bins (the body's and one for the tail), E = N - 1 upper edges of the body.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mope.errors import ConfigError


@dataclass(frozen=True)
class Loss:
    """The loss to minimise and its parts, for the logs."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Labels:
    """What was answered to the rows of a batch.

    Attributes:
        tokens_BD: answers of one LLM to the same request in tokens, drawn several times; NaN where there are fewer.
        censored_B: True where the answer hit a cap; such a row has one draw.
        weight_B: share of each row in the batch's loss; the shares of a usual batch sum to 1.
        scale_B: tokens that each row's CRPS is divided by, usually the typical length of its data set.
    """

    tokens_BD: Tensor
    censored_B: Tensor
    weight_B: Tensor
    scale_B: Tensor

    @classmethod
    def of(cls, tokens_B: Tensor, censored_B: Tensor, scale: float = 1.0) -> Labels:
        """One draw for each row, and all rows alike."""
        alike_B = torch.ones_like(tokens_B)
        return cls(tokens_B.unsqueeze(-1), censored_B, alike_B / len(tokens_B), alike_B * scale)

    @property
    def first_B(self) -> Tensor:
        """The first draw of each row."""
        return self.tokens_BD[:, 0]

    @property
    def drawn_BD(self) -> Tensor:
        """1.0 for each draw, 0.0 where there is none."""
        return (~self.tokens_BD.isnan()).float()

    def filled_BD(self) -> Tensor:
        """The draws, the first one in place of those that are not there."""
        return torch.where(self.tokens_BD.isnan(), self.first_B.unsqueeze(-1), self.tokens_BD)

    def mean(self, values_B: Tensor) -> Tensor:
        """Of one value a row, weighted."""
        return (values_B * self.weight_B).sum()


class MopeObjective:
    """Loss of gate and heads.

    mixture: -log sum_k gate_k p_k(bin), the likelihood of what a server gets;
    crps: continuous ranked probability score of the mixture over the body, in tokens, scaled: its minimum
    is the true distribution (Gneiting and Raftery, 2007), and it looks at tokens where likelihood looks at bins;
    experts: each head's likelihood on the rows of its own bucket, widened by an overlap margin;
    gate: cross-entropy of the gate against the true bucket.

    A censored row enters by its tail: the probability of its bin and all above, of its bucket and all
    above, and CRPS at the edges below it alone. Several draws of one answer count as their mean.

    Args:
        edges: edges of the body's bins in tokens, length N (the tail is the N-th bin).
        boundaries: inner borders of the buckets in tokens, length K - 1.
        overlap: margin of each bucket, as a share of its borders: 0.5 trains an expert on half as much
            again each side.
        crps_weight: weight of the CRPS.
        expert_weight: weight of the experts' own likelihood.
        gate_weight: weight of the gate's cross-entropy.
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
    ) -> None:
        self._upper_E = torch.tensor(edges[1:], dtype=torch.float32)
        self._width_E = torch.tensor(edges[1:], dtype=torch.float32) - torch.tensor(edges[:-1], dtype=torch.float32)
        self._borders = torch.tensor(boundaries, dtype=torch.float32)
        self._low_K = torch.tensor([0.0, *boundaries]) * (1 - overlap)
        self._high_K = torch.tensor([*boundaries, math.inf]) * (1 + overlap)
        self.crps_weight, self.expert_weight, self.gate_weight = crps_weight, expert_weight, gate_weight

    def __call__(self, gate_BK: Tensor | None, heads_BKN: Tensor | None, labels: Labels) -> Loss:
        """Mean loss over the rows. A network without a gate must have one head, and the other way round none."""
        device = labels.tokens_BD.device
        tokens_BD, drawn_BD, censored_B = labels.filled_BD(), labels.drawn_BD, labels.censored_B
        parts: dict[str, Tensor] = {}
        total = tokens_BD.new_zeros(())
        log_gate_BK = None if gate_BK is None else F.log_softmax(gate_BK, dim=-1)
        if log_gate_BK is not None:
            bucket_BD = torch.bucketize(tokens_BD, self._borders.to(device))
            parts["gate"] = labels.mean(mean_nll(log_gate_BK, bucket_BD, drawn_BD, censored_B))
            total = total + (self.gate_weight if heads_BKN is not None else 1.0) * parts["gate"]
        if heads_BKN is None:
            return Loss(total, parts)
        log_p_BKN = F.log_softmax(heads_BKN, dim=-1)
        bin_BD = torch.bucketize(tokens_BD, self._upper_E.to(device))
        if log_gate_BK is not None:
            log_mix_BN = torch.logsumexp(log_gate_BK.unsqueeze(-1) + log_p_BKN, dim=1)
            parts["experts"] = self._experts(log_p_BKN, bin_BD, labels)
            total = total + self.expert_weight * parts["experts"]
        elif log_p_BKN.shape[1] == 1:
            log_mix_BN = log_p_BKN[:, 0]
        else:
            raise ConfigError(f"{log_p_BKN.shape[1]} heads need a gate to mix them")
        parts["mixture"] = labels.mean(mean_nll(log_mix_BN, bin_BD, drawn_BD, censored_B))
        cdf_BE = log_mix_BN.exp().cumsum(-1)[:, :-1]
        # of each edge the share of the draws that lie below it; of one draw 0 or 1
        below_BDE = (tokens_BD.unsqueeze(-1) <= self._upper_E.to(device)) * drawn_BD.unsqueeze(-1)
        below_BE = below_BDE.sum(1) / drawn_BD.sum(-1, keepdim=True)
        seen_BE = 1.0 - below_BE * censored_B.unsqueeze(-1).float()
        squared_BE = (cdf_BE**2 - 2 * cdf_BE * below_BE + below_BE) * seen_BE  # the draws' mean of (cdf - below)^2
        parts["crps"] = labels.mean(squared_BE @ self._width_E.to(device) / labels.scale_B)
        total = total + parts["mixture"] + self.crps_weight * parts["crps"]
        return Loss(total, parts)

    def _experts(self, log_p_BKN: Tensor, bin_BD: Tensor, labels: Labels) -> Tensor:
        """Each head's own likelihood on the draws of its bucket, a mean over all that are in one."""
        low_K, high_K = (limits_K.to(bin_BD.device) for limits_K in (self._low_K, self._high_K))
        tokens_BD1, censored_B11 = labels.filled_BD().unsqueeze(-1), labels.censored_B[:, None, None]
        own_BDK = (tokens_BD1 <= high_K) & ((tokens_BD1 >= low_K) | censored_B11)
        nll_BKD = -log_p_BKN.gather(2, bin_BD.unsqueeze(1).expand(-1, log_p_BKN.shape[1], -1))
        tail_BK = torch.stack(
            [class_nll(log_p_BN, bin_BD[:, 0], labels.censored_B) for log_p_BN in log_p_BKN.unbind(1)], dim=1
        )
        nll_BKD = torch.where(censored_B11, tail_BK.unsqueeze(-1), nll_BKD)
        share_BD = labels.drawn_BD * (labels.weight_B / labels.drawn_BD.sum(-1)).unsqueeze(-1)
        weight_BKD = own_BDK.mT * share_BD.unsqueeze(1)
        return (nll_BKD * weight_BKD).sum() / weight_BKD.sum().clamp(min=1e-12) * labels.weight_B.sum()

    def distance(self, log_p_BN: Tensor, log_q_BN: Tensor) -> Tensor:
        """Squared difference of two cumulative distributions over the body, in tokens, shape (B,)."""
        cdfs = [log_BN.exp().cumsum(-1)[:, :-1] for log_BN in (log_p_BN, log_q_BN)]
        distance_B: Tensor = (cdfs[0] - cdfs[1]) ** 2 @ self._width_E.to(log_p_BN.device)
        return distance_B


def mean_nll(log_p_BC: Tensor, class_BD: Tensor, drawn_BD: Tensor, censored_B: Tensor) -> Tensor:
    """`class_nll`, averaged over the draws of each row, shape (B,); a censored row has one."""
    drawn_B = -(log_p_BC.gather(-1, class_BD) * drawn_BD).sum(-1) / drawn_BD.sum(-1)
    return torch.where(censored_B, class_nll(log_p_BC, class_BD[:, 0], censored_B), drawn_B)


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
    no teacher, as in validation, and for rows of which it says NaN, the labels' loss alone.

    Args:
        labels: the loss of the labels.
        weight: share of the teacher, from 0 to 1.
    """

    def __init__(self, labels: MopeObjective, weight: float) -> None:
        self._own, self._weight = labels, weight

    def __call__(
        self,
        gate_BK: Tensor | None,
        heads_BKN: Tensor | None,
        labels: Labels,
        teacher_mix_BN: Tensor | None = None,
        teacher_gate_BK: Tensor | None = None,
    ) -> Loss:
        """Mean loss over the rows, for a network with heads."""
        if teacher_mix_BN is None or teacher_gate_BK is None:
            return self._own(gate_BK, heads_BKN, labels)
        if heads_BKN is None:
            raise ConfigError("a student has heads; got a network with none")
        is_taught_B = ~teacher_mix_BN[:, 0].isnan()
        share_B = self._weight * is_taught_B
        teacher_mix_BN, teacher_gate_BK = (
            torch.where(is_taught_B.unsqueeze(-1), said, 0.0) for said in (teacher_mix_BN, teacher_gate_BK)
        )
        own = self._own(gate_BK, heads_BKN, replace(labels, weight_B=labels.weight_B * (1 - share_B)))
        whole, labels = labels.weight_B.sum(), replace(labels, weight_B=labels.weight_B * share_B)
        log_mix_BN = F.log_softmax(heads_BKN, dim=-1)
        parts = dict(own.parts)
        total = own.total
        if gate_BK is not None:
            log_gate_BK = F.log_softmax(gate_BK, dim=-1)
            log_mix_BN = log_mix_BN + log_gate_BK.unsqueeze(-1)
            parts["teacher_gate"] = labels.mean(_divergence(log_gate_BK, teacher_gate_BK))
            total = total + self._own.gate_weight * parts["teacher_gate"]
        log_mix_BN = torch.logsumexp(log_mix_BN, dim=1)
        parts["teacher_mixture"] = labels.mean(_divergence(log_mix_BN, teacher_mix_BN))
        parts["teacher_crps"] = labels.mean(self._own.distance(log_mix_BN, teacher_mix_BN) / labels.scale_B)
        total = total + parts["teacher_mixture"] + self._own.crps_weight * parts["teacher_crps"]
        of_teacher = labels.weight_B.sum() / whole
        shares = {name: 1 - of_teacher if name in own.parts else of_teacher for name in parts}
        return Loss(total, {name: part / shares[name].clamp(min=1e-6) for name, part in parts.items()})


def _divergence(log_p_BC: Tensor, log_teacher_BC: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each row from its teacher's distribution, shape (B,)."""
    return F.kl_div(log_p_BC, log_teacher_BC, reduction="none", log_target=True).sum(-1)


class RegressionObjective:
    """L1 loss of one output in units of `tokens_scale` tokens: the single-BERT baseline, as SSJF trains it.

    A censored row counts only where the prediction lies below it.
    """

    def __init__(self, tokens_scale: float) -> None:
        self._scale = tokens_scale

    def __call__(self, gate_BK: Tensor | None, heads_BKN: Tensor | None, labels: Labels) -> Loss:
        """Mean absolute error over the rows, in units of the scale."""
        assert heads_BKN is not None
        error_BD = heads_BKN[:, 0] - labels.filled_BD() / self._scale
        error_BD = torch.where(labels.censored_B.unsqueeze(-1), error_BD.clamp(max=0), error_BD).abs()
        loss = labels.mean((error_BD * labels.drawn_BD).sum(-1) / labels.drawn_BD.sum(-1))
        return Loss(loss, {"l1": loss})


class RankingObjective:
    """ListMLE over the batch, longest answers first: the idea of vLLM-LTR (Fu et al., 2024), for tau."""

    def __call__(self, gate_BK: Tensor | None, heads_BKN: Tensor | None, labels: Labels) -> Loss:
        """Negative log likelihood of the batch's true order under Plackett-Luce, per row."""
        assert heads_BKN is not None
        ordered = heads_BKN[:, 0, 0][torch.argsort(labels.first_B, descending=True, stable=True)]
        remaining = torch.logcumsumexp(ordered.flip(0), dim=0).flip(0)
        loss = (remaining - ordered).mean()
        return Loss(loss, {"list_mle": loss})
