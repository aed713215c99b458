"""The fit behind a correction: it finds what made the counts, and its parts keep their promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.shift_fit import (
    BIN,
    CENTRES_R,
    CENTRES_X,
    EDGES_R,
    KNOTS,
    LOW,
    NUM_BINS,
    NUM_X,
    X_BIN,
    X_LOW,
    Correction,
    Counts,
    Prior,
    ShiftFit,
    bump,
    distribution,
    fit,
    num_alike,
    pooled_shape,
)

EXPECTED = np.exp(-0.5 * (CENTRES_R / 0.8) ** 2)
few = st.lists(st.tuples(st.integers(0, NUM_BINS - 1), st.integers(1, 50)), max_size=8)


def counted(x, r, cut=None):
    """Counts of observations of log predicted medians and r."""
    table = np.zeros((2, NUM_X, NUM_BINS))
    rows = np.clip(((x - X_LOW) / X_BIN).astype(int), 0, NUM_X - 1)
    columns = np.clip(((r - LOW) / BIN).astype(int), 0, NUM_BINS - 1)
    np.add.at(table, (np.zeros(len(x), dtype=int) if cut is None else cut.astype(int), rows, columns), 1)
    return Counts(table[0], table[1], EXPECTED)


def table(pairs):
    counts = np.zeros(NUM_BINS)
    for column, count in pairs:
        counts[column] += count
    return counts


@pytest.mark.parametrize(("shift", "slope", "spread"), [(0.0, 0.0, 1.0), (-1.2, -0.4, 0.6), (3.4, 0.3, 1.4)])
def test_a_fit_finds_shift_slope_and_spread(shift, slope, spread):
    rng = np.random.default_rng(0)
    x = rng.normal(5.5, 0.8, 2000)
    r = shift + slope * (x - 5.5) + rng.normal(0, 0.8 * spread, 2000)
    found = fit(counted(x, r), Prior(bump(0.0, 0.35)))
    assert found.shift + found.slope * (5.5 - found.pivot) == pytest.approx(shift, abs=0.06)
    assert found.slope == pytest.approx(slope, abs=0.08)
    assert np.exp(found.log_spread) == pytest.approx(spread, rel=0.15)


def test_cut_answers_are_neither_whole_nor_nothing():
    rng = np.random.default_rng(1)
    x, r = rng.normal(5.5, 0.3, 2000), 1.0 + rng.normal(0, 0.6, 2000)
    limit = rng.normal(1.2, 0.8, 2000)
    found = fit(counted(x, np.minimum(r, limit), cut=r > limit), Prior(bump(0.0, 0.35)))
    assert (r > limit).mean() > 0.35
    assert found.shift == pytest.approx(1.0, abs=0.08)
    for wrong in (counted(x, np.minimum(r, limit)), counted(x[r <= limit], r[r <= limit])):
        assert fit(wrong, Prior(bump(0.0, 0.35))).shift < 0.85


def test_answers_that_are_all_cut_raise_the_shift_a_little():
    x = np.full(5000, 5.5)
    found = fit(counted(x, np.full(5000, 0.5), cut=np.ones(5000, dtype=bool)), Prior(bump(0.0, 0.35)))
    assert 0.5 < found.shift < 2.0


def test_without_counts_the_prior_is_all_there_is():
    found = fit(Counts(np.zeros((NUM_X, NUM_BINS)), np.zeros((NUM_X, NUM_BINS)), EXPECTED), Prior(bump(2.0, 0.1)))
    assert found.shift == pytest.approx(2.0, abs=0.1)
    assert found.total == 0.0


@given(few, st.floats(0.1, 1000))
def test_a_distribution_without_cut_answers_is_a_weighted_mean(pairs, count):
    counts, base = table(pairs), EXPECTED / EXPECTED.sum() + 1e-9
    found = distribution(counts, np.zeros(NUM_BINS), base, count)
    mean = (counts + count * base) / (counts.sum() + count * base.sum())
    assert np.diff(found) == pytest.approx(mean, abs=1e-9)


@given(few, few, st.floats(0.1, 1000))
def test_a_distribution_rises_from_0_to_1_and_cut_answers_move_it_up(ended, cut, count):
    base = bump(0.0, 0.5)
    found = distribution(table(ended), table(cut), base, count)
    assert found[0] == 0.0
    assert found[-1] == 1.0
    assert np.all(np.diff(found) >= 0)
    whole = distribution(table(ended) + table(cut), np.zeros(NUM_BINS), base, count)
    first = min((column for column, _ in cut), default=0)
    assert np.all(found[first + 2 :] <= whole[first + 2 :] + 1e-9) or not cut


@given(few, few, few)
@settings(max_examples=60)
def test_a_fit_of_any_counts_is_finite_and_ordered(first, second, cut):
    ended, longer = np.zeros((NUM_X, NUM_BINS)), np.zeros((NUM_X, NUM_BINS))
    ended[3], ended[9], longer[5] = table(first), table(second), table(cut)
    with np.errstate(all="raise", under="ignore"):
        found = fit(Counts(ended, longer, EXPECTED), Prior(bump(0.0, 0.35)))
        shape = found.shape()
    for cumulative in (found.learned, found.observed, found.expected):
        assert np.all(np.diff(cumulative) >= 0)
        assert cumulative[0] == 0.0
        assert cumulative[-1] == 1.0
    assert np.all(np.diff(shape) >= 0)
    assert np.isfinite([found.shift, found.slope, found.log_spread, found.pivot]).all()


def a_fit(learned, slope=0.0, pivot=0.0):
    expected = np.concatenate([[0.0], np.cumsum(EXPECTED)]) / EXPECTED.sum()
    shift = float(np.interp(0.5, learned, EDGES_R))
    return ShiftFit(400.0, shift, 0.0, slope, pivot, expected, learned, learned, bump(shift, 0.01))


def test_what_was_predicted_right_is_not_corrected():
    edges = np.geomspace(0.5, 30_000, 60)
    raw = np.linspace(0, 1, 60) ** 2
    log_edges, log_median = np.log(edges), float(np.interp(0.5, raw, np.log(edges)))
    expected = np.concatenate([[0.0], np.cumsum(EXPECTED)]) / EXPECTED.sum()
    kept, corrected = Correction(a_fit(expected))(edges, log_edges, raw, log_median)
    assert kept is edges
    assert corrected == pytest.approx(raw, abs=1e-9)


def test_beyond_what_was_observed_lengths_are_shifted_alike():
    """A correction by e^2 everywhere, also above the grid, which is extended."""
    edges = np.geomspace(0.5, 3_000, 80)
    log_edges = np.log(edges)
    raw = np.clip((log_edges - log_edges[0]) / (log_edges[-1] - log_edges[0]), 0, 1)
    expected = np.concatenate([[0.0], np.cumsum(EXPECTED)]) / EXPECTED.sum()
    learned = np.interp(EDGES_R - 2.0, EDGES_R, expected)
    learned[-1] = 1.0
    log_median = float(np.interp(0.5, raw, log_edges))
    longer, corrected = Correction(a_fit(learned))(edges, log_edges, raw, log_median)
    assert longer[: len(edges)] == pytest.approx(edges)
    assert np.all(np.diff(longer) > 0)
    for level in (0.2, 0.5, 0.9, 0.99):
        before, after = np.interp(level, raw, log_edges), np.interp(level, corrected, np.log(longer))
        assert after - before == pytest.approx(2.0, abs=0.02)


def test_a_slope_moves_long_and_short_predictions_apart():
    edges = np.geomspace(0.5, 30_000, 200)
    log_edges = np.log(edges)
    expected = np.concatenate([[0.0], np.cumsum(EXPECTED)]) / EXPECTED.sum()
    correction = Correction(a_fit(expected, slope=-1.0, pivot=5.0))
    for log_median in (4.0, 5.0, 6.5):
        raw = np.interp(log_edges - log_median, EDGES_R, expected)
        raw[0], raw[-1] = 0.0, 1.0
        _, corrected = correction(edges, log_edges, raw, log_median)
        assert np.interp(0.5, corrected, log_edges) == pytest.approx(5.0, abs=0.05)  # whatever was predicted


@pytest.mark.parametrize(("shifts", "alike"), [([0.3, 0.3, 0.3], 3), ([2.0, 0.0, 0.0], 1), ([0.5, 0.6, -1.5, 0.5], 2)])
def test_a_change_is_noticed(shifts, alike):
    rng = np.random.default_rng(3)
    ended = np.stack([np.histogram(shift + rng.normal(0, 0.6, 40), bins=EDGES_R)[0].astype(float) for shift in shifts])
    assert num_alike(ended, np.zeros_like(ended), EXPECTED, 4.0) == alike


def test_one_odd_answer_is_no_change():
    ended = np.zeros((3, NUM_BINS))
    ended[0, NUM_BINS - 5] = 1
    ended[1:] = 40 * EXPECTED / EXPECTED.sum()
    assert num_alike(ended, np.zeros_like(ended), EXPECTED, 4.0) == 3


@pytest.mark.parametrize(
    ("newer", "older", "is_change"),
    [
        ([40, 0, 0], [30, 25, 25], False),  # one group's doing
        ([12, 14, 14], [30, 25, 25], True),
        ([40, 0, 0], [80, 0, 0], True),  # there is one group only
        ([0, 0, 0], [0, 0, 0], True),  # nobody says whose they are
        ([40, 0, 0], [0, 0, 0], True),
    ],
)
def test_one_group_of_clients_alone_makes_no_change(newer, older, is_change):
    rng = np.random.default_rng(3)
    ended = np.stack(
        [np.histogram(shift + rng.normal(0, 0.6, 40), bins=EDGES_R)[0].astype(float) for shift in (2.0, 0.0, 0.0)]
    )
    clients = np.array([newer, np.array(older) / 2, np.array(older) / 2])
    assert num_alike(ended, np.zeros_like(ended), EXPECTED, 4.0, clients) == (1 if is_change else 3)


def test_shapes_are_averaged_with_no_change():
    assert pooled_shape([], []).tolist() == KNOTS.tolist()
    bent = KNOTS**2
    assert pooled_shape([bent], [3.0]) == pytest.approx((KNOTS + 3 * bent) / 4)


@given(st.floats(-8, 10), st.floats(0.05, 3))
def test_a_bump_is_a_distribution_that_rules_nothing_out(centre, width):
    density = bump(centre, width)
    assert density.sum() == pytest.approx(1.0)
    assert density.min() > 0


def test_bins_of_the_predicted_median_cover_what_is_predicted():
    assert np.exp(CENTRES_X[0]) < 5
    assert np.exp(CENTRES_X[-1]) > 32_768
