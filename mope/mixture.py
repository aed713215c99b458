"""From the network's outputs and the route to one distribution per request.

Knows bins and probabilities; not text, files or engines.

Shape suffixes: B requests, K experts, N network bins, M grid bins (the tail spread out), E = M + 1 edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mope.backends import RawOutputs
from mope.calibration import Calibration
from mope.config import Combination, PredictorConfig
from mope.grid import Array
from mope.router import Router, softmax
from mope.rules import RuleHits


def expert_probabilities(heads_BKN: Array, tail_shares: Array) -> Array:
    """Each expert's distribution over the whole grid, shape (B, K, M): its tail bin spread by `tail_shares`."""
    probabilities = softmax(heads_BKN)
    return np.concatenate([probabilities[..., :-1], probabilities[..., -1:] * tail_shares], axis=-1)


def experts_needed(route_BK: Array, combination: Combination, threshold: float = 0.01) -> Array:
    """Which experts must run, bool (B, K): the routed one, or in a mixture all above the threshold."""
    best = np.arange(route_BK.shape[1]) == route_BK.argmax(axis=1, keepdims=True)
    return np.asarray(best if combination == "top1" else best | (route_BK >= threshold))


def cumulative(experts_BKM: Array, route_BK: Array, combination: Combination) -> Array:
    """Cumulative probability at the grid's edges, shape (B, E), from 0 to 1."""
    weights = np.where(experts_needed(route_BK, combination), route_BK, 0.0)
    if combination == "top1":
        weights = (weights > 0).astype(np.float64)
    weights = weights / weights.sum(axis=1, keepdims=True)
    mixed_BM = (weights[:, None] @ experts_BKM)[:, 0]
    cdf = np.empty((len(mixed_BM), mixed_BM.shape[1] + 1))
    cdf[:, 0] = 0.0
    np.cumsum(mixed_BM, axis=1, out=cdf[:, 1:])
    return np.asarray(cdf / cdf[:, -1:])


@dataclass(frozen=True, slots=True)
class Assembled:
    """Distributions of a batch.

    Attributes:
        cdf_BE: calibrated cumulative probability at the grid's edges.
        route_BK: the router's probabilities.
        experts_BKM: each expert's distribution over the grid, uncalibrated.
    """

    cdf_BE: Array
    route_BK: Array
    experts_BKM: Array


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
    experts_BKM = expert_probabilities(raw.heads_BKN, np.asarray(config.tail_shares))
    cdf_BE = calibration(cumulative(experts_BKM, route_BK, combination or config.combination), has_history_B)
    return Assembled(cdf_BE, route_BK, experts_BKM)
