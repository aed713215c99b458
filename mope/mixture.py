"""From the network's outputs and the route to one distribution per request.

Knows bins and probabilities; not text, files or engines.

Shape suffixes: B requests, K experts, N network bins, M grid bins (the tail spread out), E = M + 1 edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mope.backends import RawOutputs
from mope.calibration import Calibration
from mope.config import Combination, PredictorConfig
from mope.grid import Array
from mope.router import Router, softmax
from mope.rules import RuleHits

LEAST_WEIGHT = 0.01  # of an expert in a mixture; one below it neither runs nor counts


def expert_probabilities(heads_BKN: Array, tail_shares: Array) -> Array:
    """Each expert's distribution over the whole grid, shape (B, K, M): its tail bin spread by `tail_shares`."""
    probabilities = softmax(heads_BKN)
    return np.concatenate([probabilities[..., :-1], probabilities[..., -1:] * tail_shares], axis=-1)


def experts_needed(route_BK: Array, combination: Combination) -> Array:
    """Which experts must run, bool (B, K): the routed one, or in a mixture all above `LEAST_WEIGHT`.

    The routed one is always above it: of at most eight experts it has at least an eighth.
    """
    if combination == "top1":
        return np.asarray(np.arange(route_BK.shape[1]) == route_BK.argmax(axis=1, keepdims=True))
    return np.asarray(route_BK >= LEAST_WEIGHT)


def cumulative(heads_BKN: Array, route_BK: Array, tail_shares: tuple[float, ...], combination: Combination) -> Array:
    """Cumulative probability of the routed mixture at the grid's edges, shape (B, E), from 0 to 1.

    The same as mixing `expert_probabilities`, in fewer steps: a single request takes microseconds.

    Args:
        heads_BKN: logits of the experts.
        route_BK: the router's probabilities.
        tail_shares: share of the tail's mass in each tail bin.
        combination: top1 or mixture.
    """
    logits_BKN = np.asarray(heads_BKN, dtype=np.float64)
    masses_BKN = np.exp(logits_BKN - logits_BKN.max(axis=-1, keepdims=True))
    weights_BK = experts_needed(route_BK, combination) * (1.0 if combination == "top1" else route_BK)
    mixed_BN = ((weights_BK / masses_BKN.sum(axis=-1))[:, None] @ masses_BKN)[:, 0]
    num_body = mixed_BN.shape[1] - 1
    cdf_BE = np.empty((len(mixed_BN), num_body + 1 + len(tail_shares)))
    cdf_BE[:, 0] = 0.0
    mixed_BN[:, :-1].cumsum(axis=1, out=cdf_BE[:, 1 : num_body + 1])
    cdf_BE[:, num_body + 1 :] = cdf_BE[:, num_body, None] + mixed_BN[:, -1:] * _cumulative_shares(tail_shares)
    return np.asarray(cdf_BE / cdf_BE[:, -1:])


@lru_cache(maxsize=64)
def _cumulative_shares(tail_shares: tuple[float, ...]) -> Array:
    return np.cumsum(tail_shares)


@dataclass(frozen=True, slots=True)
class Assembled:
    """Distributions of a batch.

    Attributes:
        cdf_BE: calibrated cumulative probability at the grid's edges.
        route_BK: the router's probabilities.
    """

    cdf_BE: Array
    route_BK: Array


def assemble(
    config: PredictorConfig,
    router: Router,
    calibration: Calibration,
    raw: RawOutputs,
    hits: list[RuleHits],
    has_history_B: Array,
    *,
    parts: Sequence[str] | None = None,
    combination: Combination | None = None,
) -> Assembled:
    """Route, mix and calibrate the network's outputs.

    Args:
        config: of the predictor.
        router: gives the route.
        calibration: corrects the mixture.
        raw: the network's outputs.
        hits: rules that each prompt matches.
        has_history_B: False on first turns.
        parts: router parts in place of the configured ones, for ablations.
        combination: in place of the configured one.
    """
    route_BK = router.probabilities(raw.gate_BK, raw.embedding_BH, hits, parts)
    mixed_BE = cumulative(raw.heads_BKN, route_BK, config.tail_shares, combination or config.combination)
    return Assembled(calibration(mixed_BE, has_history_B), route_BK)
