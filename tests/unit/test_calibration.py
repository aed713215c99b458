"""Calibration: stated probabilities come to mean what they say, also where answers were cut off."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.calibration import KNOTS, Calibration, cumulative_map


def overconfident(num_rows, seed):
    """Levels of a predictor whose quantiles lie too near its median."""
    u = np.random.default_rng(seed).random(num_rows)
    return np.where(u < 0.5, 0.5 * (2 * u) ** 1.3, 1 - 0.5 * (2 * (1 - u)) ** 1.3)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.99])
def test_stated_levels_cover_what_they_say_on_fresh_rows(level):
    num_rows = 40_000
    rows = [(False, overconfident(num_rows, 0)), (True, overconfident(num_rows, 1) ** 1.2)]
    levels, history = np.concatenate([own for _, own in rows]), np.repeat([False, True], num_rows)
    calibration = Calibration.fit(levels, np.zeros(2 * num_rows, bool), history)
    for has_history, fresh in ((False, overconfident(num_rows, 2)), (True, overconfident(num_rows, 3) ** 1.2)):
        corrected = calibration(fresh[:, None], np.full(num_rows, has_history))[:, 0]
        assert (corrected <= level).mean() == pytest.approx(level, abs=0.007)
        if has_history:
            assert (fresh <= level).mean() != pytest.approx(level, abs=0.009)  # it was wrong before


def test_censored_answers_do_not_bias_the_map():
    """A third of the answers are cut at random: Kaplan and Meier find the truth, counting cut answers as whole not."""
    rng = np.random.default_rng(4)
    true = rng.random(30_000) ** 2
    cut_at = rng.random(30_000)
    levels, censored = np.minimum(true, cut_at), cut_at < true
    knots = KNOTS
    truth = np.sqrt(knots)
    inner = knots <= 0.95  # few are at risk above
    found = cumulative_map(levels, censored, knots, knots, 0.0)
    naive = cumulative_map(levels, np.zeros_like(censored), knots, knots, 0.0)
    assert np.abs(found - truth)[inner].max() < 0.02
    assert np.abs(naive - truth)[inner].max() > 0.05


def test_kaplan_and_meier_by_hand():
    levels = np.array([0.1, 0.2, 0.3, 0.4])
    censored = np.array([False, True, False, False])
    found = cumulative_map(levels, censored, np.array([0.05, 0.15, 0.25, 0.35, 0.45]), np.zeros(5), 0.0)
    assert found == pytest.approx([0.0, 1 / 4, 1 / 4, 1 - 3 / 4 * 1 / 2, 1.0])


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), max_size=40),
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
)
def test_the_map_is_monotone_with_its_ends_fixed(rows, stated):
    levels, censored, history = (
        np.array([row[i] for row in rows], dtype) for i, dtype in enumerate((float, bool, bool))
    )
    calibration = Calibration.fit(levels, censored, history)
    cdf = np.array([[0.0, *sorted(stated), 1.0]] * 2)
    corrected = calibration(cdf, np.array([False, True]))
    assert np.all(np.diff(corrected, axis=1) >= 0)
    assert corrected[:, 0].tolist() == [0.0, 0.0]
    assert corrected[:, -1].tolist() == [1.0, 1.0]


def test_few_rows_change_little():
    calibration = Calibration.fit(np.array([0.9, 0.95]), np.zeros(2, bool), np.zeros(2, bool))
    assert calibration.first_turn == pytest.approx(calibration.knots, abs=0.06)


def test_kinds_of_turn_have_maps_of_their_own():
    levels = np.concatenate([np.full(5000, 0.2), np.full(5000, 0.8)])
    calibration = Calibration.fit(levels, np.zeros(10_000, bool), np.repeat([False, True], 5000))
    first, later = calibration(np.array([[0.5], [0.5]]), np.array([False, True]))[:, 0]
    assert first > 0.9
    assert later < 0.1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_identity_changes_nothing(cdf):
    same = Calibration.identity()(np.array([sorted(cdf)]), np.array([True]))
    assert same[0] == pytest.approx(sorted(cdf))
