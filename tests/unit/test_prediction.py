"""What `predict` answers: quantiles, mean, cap, and what remains once tokens are out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.errors import ConfigError
from mope.grid import body_edges
from mope.prediction import LengthPrediction

EDGES = body_edges(800, 16)
caps = st.one_of(st.none(), st.integers(1, 2000))


@st.composite
def predictions(draw, max_tokens=caps):
    masses = draw(st.lists(st.floats(1e-3, 1.0), min_size=len(EDGES) - 1, max_size=len(EDGES) - 1))
    cdf = np.concatenate([[0.0], np.cumsum(masses)])
    return LengthPrediction(EDGES, cdf / cdf[-1], max_tokens=draw(max_tokens))


@given(predictions(), st.floats(0, 600), st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_quantiles_do_not_decrease_and_respect_the_cap(prediction, generated, levels):
    found = prediction.remaining(generated).quantiles(sorted(levels))
    assert np.all(np.diff(found) >= -1e-9)
    assert np.all(found >= 0)
    if prediction.max_tokens is not None:
        assert np.all(found <= max(prediction.max_tokens - generated, 0) + 1e-9)


@given(predictions(), st.floats(0.01, 0.99))
def test_quantiles_are_positive_before_generation_and_the_median_is_one_of_them(prediction, level):
    assert prediction.quantile(level) > 0
    assert prediction.median == prediction.quantile(0.5) == prediction.quantiles([0.5])[0]


@given(predictions(max_tokens=st.none()), st.floats(0.01, 0.99), st.floats(0, 400))
def test_cdf_undoes_quantile_also_of_what_remains(prediction, level, generated):
    rest = prediction.remaining(generated)
    assert rest.cdf(rest.quantile(level)) == pytest.approx(level, abs=1e-6)


@given(predictions(max_tokens=st.none()), st.floats(0, 500), st.floats(0, 900))
def test_what_remains_is_the_exact_conditional_probability(prediction, generated, further):
    survival = 1 - prediction.cdf(generated)
    expected = 1 - (1 - prediction.cdf(generated + further)) / survival
    assert prediction.remaining(generated).cdf(further) == pytest.approx(expected, abs=1e-9)


@given(predictions(), st.floats(0, 300), st.floats(0, 300), st.floats(0, 1))
def test_remaining_adds_up(prediction, first, second, level):
    twice, once = prediction.remaining(first).remaining(second), prediction.remaining(first + second)
    assert twice.quantile(level) == pytest.approx(once.quantile(level), abs=1e-6)
    assert twice.mean == pytest.approx(once.mean, abs=1e-6)


@given(predictions(), st.floats(0, 1))
def test_nothing_generated_changes_nothing(prediction, level):
    same = prediction.remaining(0)
    assert same.quantile(level) == prediction.quantile(level)
    assert same.mean == prediction.mean
    assert same.cdf(50) == prediction.cdf(50)


@given(predictions(max_tokens=st.none()), st.floats(0, 300), st.floats(0, 300), st.floats(0.01, 0.99))
def test_the_total_grows_with_what_is_out(prediction, first, second, level):
    early, late = sorted((first, second))
    assert (
        late + prediction.remaining(late).quantile(level) >= early + prediction.remaining(early).quantile(level) - 1e-6
    )


@given(predictions(), st.floats(0, 300), st.floats(0, 300), st.floats(0, 300))
def test_cdf_does_not_decrease(prediction, generated, first, second):
    rest = prediction.remaining(generated)
    low, high = sorted((first, second))
    assert 0 <= rest.cdf(low) <= rest.cdf(high) <= 1


@given(predictions(), st.floats(0, 500))
def test_mean_equals_the_mean_of_the_quantiles(prediction, generated):
    rest = prediction.remaining(generated)
    middles = (np.arange(20_000) + 0.5) / 20_000
    assert rest.mean == pytest.approx(rest.quantiles(middles).mean(), rel=5e-3, abs=1e-2)


@given(predictions(), st.one_of(st.floats(801, 1e12), st.just(800.5)))
def test_beyond_the_grid_everything_is_finite_and_nothing_remains(prediction, generated):
    rest = prediction.remaining(generated)
    assert rest.mean == pytest.approx(0.0, abs=1e-3)
    assert rest.quantiles([0.0, 0.5, 1.0]) == pytest.approx([0.0, 0.0, 0.0], abs=1e-3)
    assert rest.cdf(1.0) == 1.0


def test_a_cap_takes_all_mass_above_it():
    prediction = LengthPrediction(np.array([0.5, 100.0, 200.0]), np.array([0.0, 0.5, 1.0]), max_tokens=120)
    assert prediction.quantile(0.99) == 120
    assert prediction.cdf(120) == 1.0
    assert prediction.cdf(119.9) < 1.0
    assert prediction.mean < 120
    assert prediction.remaining(120).mean == 0.0
    assert prediction.remaining(500).quantile(0.9) == 0.0


@pytest.mark.parametrize("level", [-0.1, 1.1])
def test_a_level_outside_0_and_1_is_refused(level):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        LengthPrediction(EDGES, np.linspace(0, 1, len(EDGES))).quantile(level)


def test_negative_generated_tokens_are_refused():
    with pytest.raises(ConfigError, match="can't be negative; got -1"):
        LengthPrediction(EDGES, np.linspace(0, 1, len(EDGES))).remaining(-1)


def test_repr_says_median_spread_and_source():
    text = repr(LengthPrediction(np.array([0.5, 100.0]), np.array([0.0, 1.0]), source="fallback:no text"))
    assert text == "LengthPrediction(median=7, 80% within 1..59, expert=-1, source='fallback:no text')"
