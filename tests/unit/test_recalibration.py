"""Learning while serving: it converges, never breaks order, forgets slowly and is restored exactly."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope import recalibration
from mope.errors import ArtifactError, DataError
from mope.grid import body_edges, cdf_at, quantiles_at
from mope.recalibration import NUM_LEVELS, Recalibrator

EDGES = body_edges(4000, 60)
MIDDLE = np.log(np.sqrt(EDGES[:-1] * EDGES[1:]))


def lognormal(median, deviation=0.5):
    """Cumulative probabilities at the edges."""
    mass = np.exp(-0.5 * ((MIDDLE - np.log(median)) / deviation) ** 2) * np.diff(np.log(EDGES))
    cumulative = np.concatenate([[0.0], mass.cumsum()])
    return cumulative / cumulative[-1]


def median(cumulative):
    return float(quantiles_at(EDGES, cumulative[None], np.array([0.5]))[0, 0])


def serve(recalibrator, llm, factor, num_requests, seed=0, deviation=0.5):
    rng = np.random.default_rng(seed)
    for stated in np.exp(rng.normal(np.log(80), 0.7, num_requests)):
        actual = max(1, round(factor * stated * np.exp(rng.normal(0, deviation))))
        recalibrator.observe(EDGES, lognormal(stated), llm, actual, False)


observations = st.lists(
    st.tuples(
        st.sampled_from([None, "", "a", "b", "c"]),
        st.one_of(st.integers(1, 6000), st.just(10**12)),
        st.booleans(),
        st.floats(1, 4000),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(observations, st.sampled_from([None, "", "a", "unseen"]), st.floats(2, 3000))
def test_any_stream_leaves_a_distribution(stream, llm, stated):
    recalibrator = Recalibrator()
    for key, actual, censored, predicted in stream:
        recalibrator.observe(EDGES, lognormal(predicted), key, actual, censored)
    corrected = recalibrator.correct(EDGES, lognormal(stated), llm)
    assert corrected.shape == EDGES.shape
    assert np.all(np.diff(corrected) >= 0)
    assert corrected[0] == 0.0
    assert corrected[-1] == 1.0


def test_nothing_observed_changes_nothing():
    raw = lognormal(100)
    assert Recalibrator().correct(EDGES, raw, "a") is raw


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_an_llm_of_other_verbosity_is_followed(factor):
    recalibrator = Recalibrator()
    serve(recalibrator, "talker", factor, 400)
    assert median(recalibrator.correct(EDGES, lognormal(100), "talker")) == pytest.approx(factor * 100, rel=0.15)


def test_two_llms_are_told_apart():
    recalibrator = Recalibrator()
    for seed in range(40):
        serve(recalibrator, "long", 5.0, 10, seed)
        serve(recalibrator, "short", 0.5, 10, 100 + seed)
    assert median(recalibrator.correct(EDGES, lognormal(100), "long")) == pytest.approx(500, rel=0.25)
    assert median(recalibrator.correct(EDGES, lognormal(100), "short")) == pytest.approx(50, rel=0.25)


def test_an_unseen_llm_gets_what_all_llms_show():
    recalibrator = Recalibrator()
    serve(recalibrator, "a", 3.0, 300)
    for other in (None, "unseen"):
        assert median(recalibrator.correct(EDGES, lognormal(100), other)) == pytest.approx(300, rel=0.2)


@pytest.mark.parametrize("unnamed", [None, ""])
def test_an_unnamed_llm_teaches_everyone_once(unnamed):
    recalibrator = Recalibrator()
    recalibrator.observe(EDGES, lognormal(100), unnamed, 500, False)
    assert len(recalibrator) == 1
    assert median(recalibrator.correct(EDGES, lognormal(100), "a")) > 100


def test_coverage_is_mended():
    """Lengths scatter half as much again as stated: quantiles spread until they cover what they say."""
    recalibrator = Recalibrator()
    serve(recalibrator, "wild", 1.0, 600, deviation=0.75)
    actual = np.exp(np.random.default_rng(5).normal(np.log(100), 0.75, 4000))
    stated, corrected = lognormal(100), recalibrator.correct(EDGES, lognormal(100), "wild")
    before = (cdf_at(EDGES, np.tile(stated, (4000, 1)), actual) <= 0.9).mean()
    after = (cdf_at(EDGES, np.tile(corrected, (4000, 1)), actual) <= 0.9).mean()
    assert before < 0.82
    assert after == pytest.approx(0.9, abs=0.04)  # two hundred observations, shrunk


def test_old_observations_fade():
    recalibrator = Recalibrator()
    serve(recalibrator, "a", 5.0, 400)
    serve(recalibrator, "a", 1.0, 1200, seed=1)
    assert median(recalibrator.correct(EDGES, lognormal(100), "a")) == pytest.approx(100, rel=0.15)
    assert len(recalibrator) <= 200


def test_one_observation_moves_little():
    recalibrator = Recalibrator()
    recalibrator.observe(EDGES, lognormal(10), "a", 10**9, False)
    assert median(recalibrator.correct(EDGES, lognormal(100), "a")) < 200


def test_a_cut_short_answer_says_nothing_and_a_long_one_that_it_was_longer():
    recalibrator = Recalibrator()
    recalibrator.observe(EDGES, lognormal(100), "a", 20, True)
    assert len(recalibrator) == 0
    recalibrator.observe(EDGES, lognormal(100), "a", 400, True)
    assert median(recalibrator.correct(EDGES, lognormal(100), "a")) > 105
    # its mass lies at its level and above, that of a whole answer at its level alone
    assert recalibrator.to_json()["a"]["levels"][-1] == 1.0


def test_censored_levels_are_spread_upwards():
    recalibrator = Recalibrator()
    recalibrator.observe(EDGES, lognormal(100), "a", 102, True)
    levels = np.array(recalibrator.to_json()["a"]["levels"])
    assert levels.sum() == pytest.approx(1.0)
    assert np.all(levels[: NUM_LEVELS // 2] == 0.0)
    assert np.all(levels[NUM_LEVELS // 2 :] == pytest.approx(2 / NUM_LEVELS))


def test_memory_is_bounded_and_the_longest_unheard_llm_goes(monkeypatch):
    monkeypatch.setattr(recalibration, "MAX_LLMS", 3)
    recalibrator = Recalibrator()
    for llm in ("a", "b", "c", "a", "d"):
        recalibrator.observe(EDGES, lognormal(100), llm, 50, False)
    assert set(recalibrator.to_json()) == {"", "a", "c", "d"}


@settings(max_examples=30)
@given(observations, observations)
def test_saved_and_restored_it_goes_on_exactly(before, after):
    first = Recalibrator()
    for llm, actual, censored, stated in before:
        first.observe(EDGES, lognormal(stated), llm, actual, censored)
    second = Recalibrator.from_json(json.loads(json.dumps(first.to_json())))
    for llm, actual, censored, stated in after:
        for recalibrator in (first, second):
            recalibrator.observe(EDGES, lognormal(stated), llm, actual, censored)
    assert second.to_json() == first.to_json()
    corrected = [one.correct(EDGES, lognormal(70), "a") for one in (first, second)]
    assert np.array_equal(*corrected)


@pytest.mark.parametrize("actual", [0, -5])
def test_an_answer_without_tokens_is_refused(actual):
    with pytest.raises(DataError, match=f"at least 1 token; got {actual}"):
        Recalibrator().observe(EDGES, lognormal(100), "a", actual, False)


@pytest.mark.parametrize("saved", [{"a": {}}, {"a": 3}, [1], {"a": {"count": 1, "log_ratio": 0, "levels": [1, 2]}}])
def test_what_was_not_saved_by_it_is_refused(saved):
    with pytest.raises(ArtifactError, match="recalibration"):
        Recalibrator.from_json(saved)
