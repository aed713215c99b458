"""Bins and the arithmetic over them: order, inverses, integrals, the tail."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.errors import ConfigError
from mope.grid import body_edges, cdf_at, pareto_tail, quantiles_at, survival_integral, tail_edges, tail_shares

EDGES = np.concatenate([body_edges(500, 12), tail_edges(500.5, 4000, 3)])
weights = st.lists(st.floats(1e-3, 1.0), min_size=len(EDGES) - 1, max_size=len(EDGES) - 1)
# also bins without any mass, which leave flat steps
sparse = st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=len(EDGES) - 1, max_size=len(EDGES) - 1).filter(any)


def cumulative(masses):
    cdf = np.concatenate([[0.0], np.cumsum(masses)])
    return (cdf / cdf[-1])[None]


@given(st.integers(2, 50_000), st.integers(4, 200))
def test_edges_are_increasing_half_tokens(top, num_bins):
    edges = body_edges(top, num_bins)
    assert edges[0] == 0.5
    assert edges[-1] == top + 0.5
    assert np.all(np.diff(edges) >= 1)
    assert np.all(edges % 1 == 0.5)
    assert len(edges) <= num_bins + 1


def test_a_body_of_one_token_is_refused():
    with pytest.raises(ConfigError, match="is 1 tokens"):
        body_edges(1, 10)


@given(st.floats(2, 5000), st.integers(2, 100_000), st.integers(1, 40))
def test_tail_edges_go_on_upwards(start, top, num_bins):
    edges = np.concatenate([[start], tail_edges(start, top, num_bins)])
    assert len(edges) == num_bins + 1
    assert np.all(np.diff(edges) > 0)
    assert edges[-1] >= top


@given(st.one_of(weights, sparse), st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_quantiles_do_not_decrease_and_stay_on_the_grid(masses, levels):
    found = quantiles_at(EDGES, cumulative(masses), np.sort(levels))[0]
    assert np.all(np.diff(found) >= -1e-9)
    assert np.all((found >= EDGES[0] - 1e-9) & (found <= EDGES[-1] + 1e-6))


@given(weights, st.floats(0.001, 0.999))
def test_cdf_undoes_quantile(masses, level):
    cdf = cumulative(masses)
    tokens = quantiles_at(EDGES, cdf, np.array([level]))[:, 0]
    assert cdf_at(EDGES, cdf, tokens)[0] == pytest.approx(level, abs=1e-9)


@given(st.one_of(weights, sparse))
def test_cdf_passes_through_the_edges_and_is_0_and_1_outside(masses):
    cdf = cumulative(masses)
    at_edges = [cdf_at(EDGES, cdf, np.array([edge]))[0] for edge in EDGES]
    assert at_edges == pytest.approx(cdf[0].tolist(), abs=1e-9)
    assert cdf_at(EDGES, cdf, np.array([0.0]))[0] == 0.0
    assert cdf_at(EDGES, cdf, np.array([1e9]))[0] == 1.0


@given(weights, st.floats(0, 5000), st.floats(0, 5000))
def test_survival_integral_equals_numeric_integration(masses, start, end):
    cdf = cumulative(masses)
    start, end = min(start, end), max(start, end)
    t = np.unique(np.concatenate([np.linspace(start, end, 4000), EDGES[(start < EDGES) & (end > EDGES)]]))
    survival = 1.0 - cdf_at(EDGES, np.repeat(cdf, len(t), axis=0), t)
    exact = survival_integral(EDGES, cdf, np.array([start]), np.array([end]))[0]
    trapezoids = (survival[1:] + survival[:-1]) / 2 * np.diff(t)
    assert exact == pytest.approx(trapezoids.sum(), rel=2e-3, abs=1e-6)


def test_mean_of_one_bin_is_that_of_a_log_uniform_law():
    edges = np.array([10.0, 40.0])
    mean = survival_integral(edges, np.array([[0.0, 1.0]]), np.zeros(1), np.array([np.inf]))[0]
    assert mean == pytest.approx((40 - 10) / np.log(4))


@pytest.mark.parametrize("index", [0.8, 1.5, 3.0])
def test_pareto_index_is_recovered_with_and_without_censoring(index):
    rng = np.random.default_rng(1)
    lengths = 100.0 * (1 + rng.pareto(index, 20_000))
    assert pareto_tail(lengths, np.zeros(len(lengths), bool), 100.0) == pytest.approx(index, rel=0.03)
    cut = lengths > 300
    assert pareto_tail(np.minimum(lengths, 300), cut, 100.0) == pytest.approx(index, rel=0.04)


def test_an_unseen_tail_is_heavy():
    assert pareto_tail(np.array([5.0]), np.array([False]), 100.0) == pytest.approx(1.0)


@given(st.floats(0.2, 5.0), st.integers(1, 20))
def test_tail_shares_sum_to_one_and_follow_the_law(index, num_bins):
    edges = tail_edges(100.5, 20_000, num_bins)
    shares = tail_shares(100.5, edges, index)
    assert shares.sum() == pytest.approx(1.0)
    assert np.all(shares > 0)
    # log-spaced bins of a Pareto law shrink by one and the same factor
    assert shares[1:] / shares[:-1] == pytest.approx(np.full(num_bins - 1, (edges[0] / 100.5) ** -index))
