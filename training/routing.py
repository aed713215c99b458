"""Fitting what stands behind the networks: the router's parts, the choice of combination, the calibration.

Everything here is fitted on validation rows, but for the rules and the look-up, which are taken from training
rows. Knows networks' outputs; trains no network.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from sklearn.linear_model import LogisticRegression

from mope.backends import Backend, RawOutputs
from mope.calibration import Calibration
from mope.config import Combination, PredictorConfig
from mope.console import progress
from mope.grid import Array, cdf_at, quantiles_at
from mope.mixture import assemble
from mope.router import PARTS, Lookup, Router, parts_key
from mope.rules import RuleTable
from mope.training.batches import EncodedRows
from mope.training.config import ModelConfig

BATCH_ROWS = 64
COMBINATIONS: tuple[Combination, ...] = ("top1", "mixture")


def collect(backend: Backend, rows: EncodedRows, num_experts: int, description: str) -> RawOutputs:
    """The network's outputs for many rows, every expert asked, with a progress bar."""

    def everyone(gate_BK: Array, embedding_BH: Array) -> Array:
        return np.ones((len(gate_BK), num_experts), dtype=bool)

    order: list[Array] = []
    outputs: list[RawOutputs] = []
    with progress(description, total=len(rows)) as advance:
        for batch in rows.by_length(BATCH_ROWS):
            outputs.append(backend.run(rows.requests(batch), everyone))
            order.append(batch)
            advance(len(batch))
    back = np.argsort(np.concatenate(order))
    return RawOutputs(
        gate_BK=np.concatenate([o.gate_BK for o in outputs])[back],
        heads_BKN=np.concatenate([o.heads_BKN for o in outputs])[back],
        embedding_BH=np.concatenate([o.embedding_BH for o in outputs])[back],
    )


def buckets(tokens: Array, boundaries: Array) -> Array:
    """Index of the expert whose bucket each length falls into, shape of `tokens`."""
    return np.searchsorted(boundaries, tokens)


def lookup_sample(train: EncodedRows, num_rows: int, seed: int) -> EncodedRows:
    """Training rows for the look-up: answers that ended, drawn at random."""
    ended = np.flatnonzero(~train.censored_R)
    chosen = np.random.default_rng(seed).permutation(ended)[:num_rows]
    return train.take(np.sort(chosen))


def fit_router(
    config: PredictorConfig,
    model: ModelConfig,
    train: EncodedRows,
    neighbours: EncodedRows,
    neighbour_outputs: RawOutputs,
    validation: EncodedRows,
    outputs: RawOutputs,
) -> Router:
    """Fit rules and look-up on training rows, and a combiner for every set of parts on validation rows.

    Args:
        config: of the predictor.
        model: sizes of the look-up.
        train: training rows, for the rules and the prior.
        neighbours: training rows of the look-up (`lookup_sample`).
        neighbour_outputs: the network's outputs for them.
        validation: validation rows.
        outputs: the network's outputs for them.
    """
    boundaries = np.asarray(config.boundaries)
    num_experts = config.num_experts
    ended = ~train.censored_R
    counts = np.bincount(buckets(train.tokens_R[ended], boundaries), minlength=num_experts)
    prior = (counts + 1.0) / (counts.sum() + num_experts)
    hits = [hit for hit, is_ended in zip(train.rule_hits, ended, strict=True) if is_ended]
    rules = RuleTable.fit(hits, train.tokens_R[ended])
    lookup = None
    if "lookup" in config.router_parts:
        embeddings = neighbour_outputs.embedding_BH
        unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        own = buckets(neighbours.tokens_R, boundaries).astype(np.uint8)
        lookup = Lookup(unit.astype(np.float16), own, min(model.lookup_neighbours, len(own)))
    router = Router(boundaries, prior, rules, lookup, {}, tuple(config.router_parts))
    if num_experts == 1:
        return router
    combiners: dict[str, tuple[Array, Array]] = {}
    known = ~validation.censored_R
    truth = buckets(validation.tokens_R[known], boundaries)
    for size in range(1, len(config.router_parts) + 1):
        for parts in combinations([part for part in PARTS if part in config.router_parts], size):
            votes = router.votes(parts, outputs.gate_BK, outputs.embedding_BH, validation.rule_hits)[known]
            combiners[parts_key(parts)] = _fit_combiner(votes, truth, num_experts)
    return Router(boundaries, prior, rules, lookup, combiners, tuple(config.router_parts))


def _fit_combiner(votes: Array, truth: Array, num_experts: int) -> tuple[Array, Array]:
    """Weights (D, K) and bias (K,) of a multinomial logistic regression.

    One faint row per expert is added, so that an expert without a validation row is unlikely, not impossible.
    """
    rows = np.concatenate([votes, np.zeros((num_experts, votes.shape[1]))])
    labels = np.concatenate([truth, np.arange(num_experts)])
    weights = np.concatenate([np.ones(len(votes)), np.full(num_experts, 0.1)])
    regression = LogisticRegression(C=1.0, max_iter=2000).fit(rows, labels, sample_weight=weights)
    if num_experts == 2:  # scikit-learn gives one column for two classes
        return np.concatenate([-regression.coef_, regression.coef_]).T / 2, np.array(
            [-0.5, 0.5]
        ) * regression.intercept_
    return np.asarray(regression.coef_.T), np.asarray(regression.intercept_)


def medians(config: PredictorConfig, cdf_BE: Array) -> Array:
    """Median of each row in tokens, shape (B,)."""
    return np.asarray(quantiles_at(np.asarray(config.edges), cdf_BE, np.array([0.5]))[:, 0])


def choose_combination(
    config: PredictorConfig, router: Router, validation: EncodedRows, outputs: RawOutputs, has_history: Array
) -> dict[str, float]:
    """Mean absolute error of each combination on the validation rows that ended, in tokens."""
    known = ~validation.censored_R
    errors: dict[str, float] = {}
    for combination in COMBINATIONS:
        result = assemble(
            config, router, Calibration.identity(), outputs, validation.rule_hits, has_history, combination=combination
        )
        error = np.abs(medians(config, result.cdf_BE) - validation.tokens_R)[known]
        errors[combination] = float(error.mean())
    return errors


def fit_calibration(
    config: PredictorConfig, router: Router, validation: EncodedRows, outputs: RawOutputs, has_history: Array
) -> Calibration:
    """Fit the calibration of the routed mixture on validation rows."""
    result = assemble(config, router, Calibration.identity(), outputs, validation.rule_hits, has_history)
    levels = cdf_at(np.asarray(config.edges), result.cdf_BE, validation.tokens_R)
    return Calibration.fit(levels, validation.censored_R, has_history)


def marginal(config: PredictorConfig, train: EncodedRows) -> Array:
    """Cumulative distribution of the training answers at the grid's edges, to fall back on, shape (E,)."""
    ended = np.sort(train.tokens_R[~train.censored_R])
    cdf = np.searchsorted(ended, np.asarray(config.edges), side="right") / max(len(ended), 1)
    cdf = (cdf * len(ended) + np.linspace(0, 1, len(cdf))) / (len(ended) + 1)  # no bin without any mass
    cdf[0], cdf[-1] = 0.0, 1.0
    return np.asarray(np.maximum.accumulate(cdf))
