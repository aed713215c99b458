"""What is fitted behind the networks: votes and combiners, the choice of combination, calibration, fallback."""

from __future__ import annotations

import numpy as np
import pytest

from mope.backends import RawOutputs
from mope.calibration import Calibration
from mope.config import PredictorConfig
from mope.grid import Array, body_edges, cdf_at, tail_edges
from mope.mixture import assemble
from mope.predictor import LengthPredictor
from mope.rules import RuleHits
from mope.training.batches import EncodedRows
from mope.training.config import ModelConfig
from mope.training.routing import (
    buckets,
    choose_combination,
    collect,
    fit_calibration,
    fit_router,
    lookup_sample,
    marginal,
    medians,
)

BOUNDARIES = (20.5, 200.5)
NUM_BODY = len(body_edges(500, 40)) - 1


def config(predictor: LengthPredictor, parts: tuple[str, ...] = ("gate", "rules", "lookup")) -> PredictorConfig:
    body = body_edges(500, 40)
    return predictor.config.model_copy(
        update={
            "boundaries": BOUNDARIES,
            "num_experts": 3,
            "edges": (*map(float, body), *map(float, tail_edges(float(body[-1]), 5000, 4))),
            "num_body_bins": NUM_BODY,
            "tail_shares": (0.4, 0.3, 0.2, 0.1),
            "router_parts": parts,
            "combination": "mixture",
        }
    )


def world(num_rows: int, seed: int, noise: float = 1.0) -> tuple[EncodedRows, RawOutputs]:
    """Rows whose gate logits and embeddings point at their bucket, blurred, and heads that know their bucket."""
    rng = np.random.default_rng(seed)
    bucket = rng.integers(0, 3, num_rows)
    low, high = np.array([2, 21, 201])[bucket], np.array([20, 200, 480])[bucket]
    tokens = np.floor(np.exp(rng.uniform(np.log(low), np.log(high + 0.99)))).astype(np.int64)
    gate = 3.0 * (np.arange(3) == bucket[:, None]) + noise * rng.normal(size=(num_rows, 3))
    embedding = np.eye(8)[bucket] + 0.3 * noise * rng.normal(size=(num_rows, 8))
    edges = body_edges(500, 40)
    centre = np.searchsorted(np.array(BOUNDARIES), edges[:-1])
    heads = np.stack([np.where(centre == k, 4.0, -4.0) for k in range(3)])
    heads = np.concatenate([heads, np.full((3, 1), -4.0)], axis=1)
    rows = EncodedRows(
        flat_ids=np.ones(num_rows, dtype=np.int32),
        offsets=np.arange(num_rows + 1),
        numbers_RF=np.zeros((num_rows, 1), np.float32),
        llm_R=np.zeros(num_rows, np.int64),
        rule_hits=[RuleHits(("one_word",), 0.0, "one_word", 0.0) if b == 0 else RuleHits() for b in bucket],
        tokens_R=tokens,
        censored_R=np.zeros(num_rows, dtype=bool),
        pad_id=0,
    )
    return rows, RawOutputs(gate.astype(np.float32), np.tile(heads, (num_rows, 1, 1)), embedding.astype(np.float32))


@pytest.fixture
def fitted(predictor: LengthPredictor):
    settings = config(predictor)
    train, train_outputs = world(2000, 0)
    validation, outputs = world(1500, 1)
    router = fit_router(settings, ModelConfig(), train, train, train_outputs, validation, outputs)
    return settings, router, train, validation, outputs


def accuracy(router, parts: list[str], rows: EncodedRows, outputs: RawOutputs) -> float:
    chosen = router.probabilities(outputs.gate_BK, outputs.embedding_BH, rows.rule_hits, parts).argmax(axis=1)
    return float((chosen == buckets(rows.tokens_R, np.array(BOUNDARIES))).mean())


def test_every_set_of_parts_has_a_combiner(fitted) -> None:
    _, router, *_ = fitted
    assert len(router.combiners) == 7


def test_parts_together_route_better_than_each_alone_on_fresh_rows(fitted) -> None:
    _, router, *_ = fitted
    fresh, outputs = world(3000, 2)
    alone = [accuracy(router, [part], fresh, outputs) for part in ("gate", "rules", "lookup")]
    together = accuracy(router, ["gate", "rules", "lookup"], fresh, outputs)
    assert together > max(alone)
    assert min(alone) > accuracy(router, [], fresh, outputs)


def test_route_probabilities_are_calibrated_on_fresh_rows(fitted) -> None:
    _, router, *_ = fitted
    fresh, outputs = world(6000, 3, noise=2.0)
    train, train_outputs = world(2000, 4, noise=2.0)
    validation, seen = world(3000, 5, noise=2.0)
    router = fit_router(fitted[0], ModelConfig(), train, train, train_outputs, validation, seen)
    probability = router.probabilities(outputs.gate_BK, outputs.embedding_BH, fresh.rule_hits)
    right = probability.argmax(axis=1) == buckets(fresh.tokens_R, np.array(BOUNDARIES))
    sure = probability.max(axis=1)
    for low, high in ((0.4, 0.6), (0.6, 0.8), (0.8, 0.95)):
        inside = (sure >= low) & (sure < high)
        assert inside.sum() > 100
        assert abs(right[inside].mean() - sure[inside].mean()) < 0.06


def test_a_part_that_is_off_has_no_combiner_and_no_lookup(predictor: LengthPredictor) -> None:
    settings = config(predictor, ("gate", "rules"))
    rows, outputs = world(300, 0)
    router = fit_router(settings, ModelConfig(), rows, rows, outputs, rows, outputs)
    assert router.lookup is None
    assert set(router.combiners) == {"gate", "rules", "gate+rules"}


def test_an_expert_without_validation_rows_stays_possible(predictor: LengthPredictor) -> None:
    settings = config(predictor)
    train, train_outputs = world(600, 0)
    rows, outputs = world(300, 1)
    short = np.flatnonzero(rows.tokens_R < 200)
    some = RawOutputs(outputs.gate_BK[short], outputs.heads_BKN[short], outputs.embedding_BH[short])
    router = fit_router(settings, ModelConfig(), train, train, train_outputs, rows.take(short), some)
    probability = router.probabilities(outputs.gate_BK, outputs.embedding_BH, rows.rule_hits)
    assert probability.shape == (300, 3)
    assert np.all(probability > 0)


def test_two_experts_route_to_the_right_side(predictor: LengthPredictor) -> None:
    settings = config(predictor).model_copy(update={"boundaries": (20.5,), "num_experts": 2})
    rows, outputs = world(800, 0)
    two = RawOutputs(outputs.gate_BK[:, :2], outputs.heads_BKN[:, :2], outputs.embedding_BH)
    router = fit_router(settings, ModelConfig(), rows, rows, two, rows, two)
    chosen = router.probabilities(two.gate_BK, two.embedding_BH, rows.rule_hits).argmax(axis=1)
    assert (chosen == (rows.tokens_R > 20)).mean() > 0.9


def test_a_mixture_beats_the_first_choice_when_the_route_is_unsure(predictor: LengthPredictor) -> None:
    settings = config(predictor)
    train, train_outputs = world(2000, 0, noise=4.0)
    rows, outputs = world(3000, 1, noise=4.0)
    router = fit_router(settings, ModelConfig(), train, train, train_outputs, rows, outputs)
    blind = EncodedRows(**{**rows.__dict__, "rule_hits": [RuleHits()] * len(rows)})
    errors = choose_combination(settings, router, blind, outputs, np.zeros(len(rows), dtype=bool))
    assert errors["mixture"] < errors["top1"]


def test_calibrated_quantiles_cover_what_they_say_on_fresh_rows(fitted) -> None:
    settings, router, _, validation, outputs = fitted
    squeezed = RawOutputs(outputs.gate_BK * 3, outputs.heads_BKN, outputs.embedding_BH)  # an overconfident gate
    history = np.zeros(len(validation), dtype=bool)
    calibration = fit_calibration(settings, router, validation, squeezed, history)
    fresh, seen = world(4000, 7)
    seen = RawOutputs(seen.gate_BK * 3, seen.heads_BKN, seen.embedding_BH)

    def levels(chosen: Calibration) -> Array:
        result = assemble(settings, router, chosen, seen, fresh.rule_hits, np.zeros(len(fresh), dtype=bool))
        return cdf_at(np.asarray(settings.edges), result.cdf_BE, fresh.tokens_R)

    def miss(values: Array) -> float:
        return max(abs(float((values <= level).mean()) - level) for level in (0.1, 0.25, 0.5, 0.75, 0.9))

    assert miss(levels(calibration)) < 0.03 < miss(levels(Calibration.identity()))


def test_outputs_are_collected_in_the_order_of_the_rows(predictor: LengthPredictor) -> None:
    encoded = predictor.encoder.encode(
        [*map(_prompt, ["write a long story about a fox " * 5, "hi", "explain the tides", "yes or no?"])]
    )
    lengths = [len(ids) for ids in encoded.token_ids]
    rows = EncodedRows(
        np.concatenate([np.array(ids, np.int32) for ids in encoded.token_ids]),
        np.concatenate([[0], np.cumsum(lengths)]),
        encoded.numbers_BF,
        encoded.llm_B,
        encoded.rule_hits,
        np.array([100, 2, 50, 1]),
        np.zeros(4, dtype=bool),
        predictor.encoder.pad_id,
    )
    together = collect(predictor.backend, rows, predictor.config.num_experts, "predicting")
    for row in range(4):
        alone = collect(predictor.backend, rows.take(np.array([row])), predictor.config.num_experts, "predicting")
        np.testing.assert_allclose(together.heads_BKN[row], alone.heads_BKN[0], atol=1e-5)
        np.testing.assert_allclose(together.embedding_BH[row], alone.embedding_BH[0], atol=1e-5)


def _prompt(text: str):
    from mope.request import Request

    return Request(prompt=text)


def test_the_lookup_is_a_seeded_sample_of_answers_that_ended() -> None:
    rows, _ = world(500, 0)
    cut = np.arange(500) % 2 == 0
    half = EncodedRows(**{**rows.__dict__, "censored_R": cut})
    sample = lookup_sample(half, 100, seed=3)
    assert len(sample) == 100
    assert not sample.censored_R.any()
    assert np.array_equal(sample.tokens_R, lookup_sample(half, 100, seed=3).tokens_R)
    assert not np.array_equal(sample.tokens_R, lookup_sample(half, 100, seed=4).tokens_R)
    assert len(lookup_sample(half, 10_000, seed=3)) == 250


def test_the_fallback_is_the_distribution_of_the_training_answers(predictor: LengthPredictor) -> None:
    settings = config(predictor)
    rows, _ = world(5000, 0)
    cdf = marginal(settings, rows)
    assert cdf[0] == 0.0
    assert cdf[-1] == 1.0
    assert np.all(np.diff(cdf) > 0)
    assert medians(settings, cdf[None])[0] == pytest.approx(np.median(rows.tokens_R), rel=0.1)
