"""What `predict` answers: quantiles, mean, cap, and what remains once tokens are out, also beyond the grid."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions import EDGES, LAST, gapless, predictions, progress, uncapped

from mope.errors import ConfigError
from mope.grid import cdf_at, quantiles_at, survival_integral
from mope.prediction import LengthPrediction
from mope.prediction_batch import LEAST_TAIL_INDEX, MOST_TAIL_INDEX, TAIL_SHARE, PredictionBatch

levels = st.floats(0.01, 0.99)
further = st.one_of(st.floats(0, 1000), st.floats(0, 1e6))


def index_of(prediction):
    return min(max(prediction.tail_index, LEAST_TAIL_INDEX), MOST_TAIL_INDEX)


@given(predictions(), progress, st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_quantiles_are_finite_do_not_decrease_and_respect_the_cap(prediction, generated, wanted):
    found = prediction.remaining(generated).quantiles(sorted(wanted))
    assert np.isfinite(found).all()
    assert np.all(np.diff(found) >= -1e-9)
    assert np.all(found >= 0)
    if prediction.max_tokens is not None:
        assert np.all(found <= max(prediction.max_tokens - generated, 0))


@given(uncapped(), progress, levels)
def test_however_much_is_out_something_remains(prediction, generated, level):
    rest = prediction.remaining(generated)
    assert rest.quantile(level) > 0
    assert 0 < rest.mean < np.inf
    assert rest.cdf(0) == pytest.approx(0, abs=1e-9)
    assert rest.cdf(-5) == 0


@given(predictions(), st.integers(0, 9000))
def test_with_a_cap_no_more_than_up_to_it_remains_and_nothing_after_it(prediction, generated):
    cap = prediction.max_tokens
    rest = prediction.remaining(generated)
    if cap is None:
        assert rest.median > 0
    elif generated >= cap:
        assert rest.quantiles([0.0, 0.5, 1.0]).tolist() == [0.0, 0.0, 0.0]
        assert rest.mean == 0.0
        assert rest.cdf(0) == 1.0
    else:
        assert 0 < rest.mean <= cap - generated + 1e-6
        assert rest.quantile(1.0) <= cap - generated
        assert rest.cdf(cap - generated) == 1.0


@given(predictions(), st.floats(0.01, 0.99))
def test_quantiles_are_positive_before_generation_and_the_median_is_one_of_them(prediction, level):
    assert prediction.quantile(level) > 0
    assert prediction.median == prediction.quantile(0.5) == prediction.quantiles([0.5])[0]


@given(gapless(), levels, progress)
def test_cdf_undoes_quantile_also_of_what_remains(prediction, level, generated):
    rest = prediction.remaining(generated)
    assert rest.cdf(rest.quantile(level)) == pytest.approx(level, abs=1e-6)


@given(uncapped(), st.one_of(st.floats(0, 3000), st.just(LAST)), further)
def test_what_remains_is_the_exact_conditional_probability(prediction, generated, more):
    survival = 1 - prediction.cdf(generated)
    expected = 1 - (1 - prediction.cdf(generated + more)) / survival
    assert prediction.remaining(generated).cdf(more) == pytest.approx(expected, abs=1e-6)


@given(predictions(), st.integers(0, 5000), st.integers(0, 5000), st.floats(0, 1), further)
def test_remaining_adds_up(prediction, first, second, level, more):
    twice, once = prediction.remaining(first).remaining(second), prediction.remaining(first + second)
    assert twice.quantile(level) == once.quantile(level)
    assert twice.mean == once.mean
    assert twice.cdf(more) == once.cdf(more)


@given(predictions(), st.floats(0, 1))
def test_nothing_generated_changes_nothing(prediction, level):
    same = prediction.remaining(0)
    assert same.quantile(level) == prediction.quantile(level)
    assert same.mean == prediction.mean
    assert same.cdf(50) == prediction.cdf(50)


@given(uncapped(), progress, progress, st.floats(0, 1))
def test_the_total_grows_with_what_is_out(prediction, first, second, level):
    early, late = sorted((first, second))
    total = early + prediction.remaining(early).quantile(level)
    assert late + prediction.remaining(late).quantile(level) >= total * (1 - 1e-9)
    total = early + prediction.remaining(early).mean
    assert late + prediction.remaining(late).mean >= total * (1 - 1e-9)


@given(predictions(), progress, further, further)
def test_cdf_does_not_decrease(prediction, generated, first, second):
    rest = prediction.remaining(generated)
    low, high = sorted((first, second))
    assert 0 <= rest.cdf(low) <= rest.cdf(high) <= 1


@given(predictions(), progress)
def test_mean_equals_the_mean_of_the_quantiles(prediction, generated):
    rest = prediction.remaining(generated)
    # levels 1 - u^6, weighted by the slope 6 u^5, so that the far tail gets its share of points
    u = (np.arange(20_000) + 0.5) / 20_000
    found = (rest.quantiles(1 - u**6) * 6 * u**5).mean()
    assert rest.mean == pytest.approx(found, rel=2e-2, abs=1e-2)


@given(predictions(), st.floats(0, 5000))
def test_the_mean_obeys_the_law_of_total_expectation(prediction, generated):
    cap = np.inf if prediction.max_tokens is None else prediction.max_tokens
    end = min(generated, cap)
    t = np.unique(np.concatenate([np.linspace(0, end, 2000), np.geomspace(0.4, 5000, 2000), EDGES]))
    t = t[t <= end]
    law = PredictionBatch.of([replace(prediction, max_tokens=None)])
    survival = 1 - law.take(np.zeros(len(t), int)).cdf(t)
    ended_by_then = ((survival[1:] + survival[:-1]) / 2 * np.diff(t)).sum()
    expected = ended_by_then + survival[-1] * prediction.remaining(generated).mean
    assert prediction.mean == pytest.approx(expected, rel=2e-3, abs=1e-3)


@given(uncapped(), st.floats(-4, 0), st.floats(0, 3000))
def test_where_the_prediction_knows_something_it_alone_counts(prediction, power, generated):
    survival = 1 - cdf_at(EDGES, prediction.cumulative[None], np.array([generated]))[0]
    share = 10.0**power  # of all such answers that are longer than the quantile asked for
    if TAIL_SHARE * (1 + 1e-9) < share < survival:
        level = 1 - share / survival
        wanted = np.array([1 - survival + level * survival])
        expected = quantiles_at(EDGES, prediction.cumulative[None], wanted)[0, 0] - generated
        assert prediction.remaining(generated).quantile(level) == max(expected, 0.0)


@given(uncapped())
def test_the_tail_hardly_moves_the_mean_of_a_fresh_prediction(prediction):
    plain = survival_integral(EDGES, prediction.cumulative[None], np.zeros(1), np.array([np.inf]))[0]
    # a share of 1e-4 of answers is moved, from no more than the last edge to no more than twice that in the mean
    assert abs(prediction.mean - plain) <= TAIL_SHARE * 2 * LAST


@given(uncapped(), st.one_of(st.none(), st.floats(1, 1000)), st.floats(0, 10))
def test_beyond_what_was_predicted_and_beyond_the_grid_survival_is_a_pareto_law(prediction, times, ratio):
    generated = LAST if times is None else prediction.quantile(1 - TAIL_SHARE) * times
    rest = prediction.remaining(generated)
    assert 1 - rest.cdf(generated * ratio) == pytest.approx((1 + ratio) ** -index_of(prediction), rel=1e-6)
    assert rest.median == pytest.approx(generated * (2 ** (1 / index_of(prediction)) - 1), rel=1e-6)
    assert rest.mean == pytest.approx(generated / (index_of(prediction) - 1), rel=1e-6)


@given(gapless(), st.sampled_from(["last edge", "start of the tail"]), levels)
def test_what_remains_is_continuous_where_the_tail_takes_over(prediction, where, level):
    place = LAST if where == "last edge" else prediction.quantile(1 - TAIL_SHARE)
    before, after = prediction.remaining(place * (1 - 1e-9)), prediction.remaining(place * (1 + 1e-9))
    assert before.quantile(level) == pytest.approx(after.quantile(level), rel=1e-3)
    assert before.mean == pytest.approx(after.mean, rel=1e-3)
    assert before.cdf(10) == pytest.approx(after.cdf(10), abs=1e-4)


def test_an_answer_that_outlives_its_prediction_is_not_nearly_done():
    edges = np.array([0.5, 10.5, 100.5, 1000.5])
    short = LengthPrediction(edges, np.array([0.0, 0.9, 1.0, 1.0]))  # no mass above 100 tokens
    assert short.remaining(50).median < 50
    assert short.remaining(100.4).median == pytest.approx(short.remaining(100.6).median, rel=0.01)
    assert short.remaining(1000.5).median == pytest.approx(1000.5 * (2 ** (1 / 1.5) - 1))


@pytest.mark.parametrize(("index", "used"), [(0.2, 1.5), (1.5, 1.5), (2.0, 2.0), (10.59, 3.0)])
def test_an_index_without_a_mean_or_with_hardly_a_tail_is_bounded(index, used):
    prediction = LengthPrediction(EDGES, np.linspace(0, 1, len(EDGES)), tail_index=index)
    assert prediction.remaining(10_000).mean == pytest.approx(10_000 / (used - 1))


def test_a_cap_takes_all_mass_above_it():
    prediction = LengthPrediction(np.array([0.5, 100.0, 200.0]), np.array([0.0, 0.5, 1.0]), max_tokens=120)
    assert prediction.quantile(0.99) == 120
    assert prediction.cdf(120) == 1.0
    assert prediction.cdf(119.9) < 1.0
    assert prediction.mean < 120
    assert prediction.remaining(120).mean == 0.0
    assert prediction.remaining(500).quantile(0.9) == 0.0


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan")])
def test_a_level_outside_0_and_1_is_refused(level):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        LengthPrediction(EDGES, np.linspace(0, 1, len(EDGES))).quantile(level)


@pytest.mark.parametrize("generated", [-1, float("nan"), float("inf"), None, "many", [1, 2]])
def test_generated_tokens_that_are_none_are_refused_in_one_line(generated):
    with pytest.raises(ConfigError, match=r"^generated: .*expected") as refusal:
        LengthPrediction(EDGES, np.linspace(0, 1, len(EDGES))).remaining(generated)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("generated", [40, 40.0, np.int32(40), np.float32(40), np.array(40)])
def test_generated_tokens_may_be_any_number(generated):
    prediction = LengthPrediction(EDGES, np.linspace(0, 1, len(EDGES)))
    assert prediction.remaining(generated).median == prediction.remaining(40.0).median


def test_repr_says_median_spread_and_source():
    text = repr(LengthPrediction(np.array([0.5, 100.0]), np.array([0.0, 1.0]), source="fallback:no text"))
    assert text == "LengthPrediction(median=7, 80% within 1..59, expert=-1, source='fallback:no text')"
