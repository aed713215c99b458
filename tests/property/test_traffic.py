"""The traffic's expert: its closed forms against answers taken one after the other, and what it can cost."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from mope.errors import ArtifactError
from mope.grid import Array
from mope.traffic import (
    MOST_RESIDUAL,
    MOST_SHIFT,
    PRIOR_ODDS,
    RELATIVES_COUNT,
    RESIDUAL_UNIT,
    SHAPE,
    TRAIT_UNIT,
    Directions,
    Moments,
    Traits,
    from_arrays,
    learned,
    lesson,
    num_sums,
    to_arrays,
)

NUM_TRAITS = 3


def directions(num_traits: int = NUM_TRAITS, *, noise: float = 0.4) -> Directions:
    return Directions(np.eye(num_traits), np.zeros(num_traits), np.linspace(0.3, 0.05, num_traits), noise)


def draw(seed: int, count: int, weights: Array, noise: float = 0.3) -> tuple[Traits, Array]:
    """Traits and residuals of a target whose answers depend on them as given."""
    rng = np.random.default_rng(seed)
    traits = directions(len(weights)).traits(rng.standard_normal((count, len(weights))))
    residuals = traits / TRAIT_UNIT @ weights + noise * rng.standard_normal(count)
    return traits, np.clip(np.rint(RESIDUAL_UNIT * residuals) / RESIDUAL_UNIT, -MOST_RESIDUAL, MOST_RESIDUAL)


def sums(traits: Traits, residuals: Array) -> Array:
    none = np.zeros(num_sums(traits.shape[1]), np.int64)
    return sum((lesson(one, float(r)) for one, r in zip(traits, residuals, strict=True)), none)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 5))
def test_sums_hold_all_moments_exactly_and_in_any_order(seed: int, count: int, num_traits: int) -> None:
    traits, residuals = draw(seed, count, np.linspace(0.2, -0.2, num_traits))
    whole = sums(traits, residuals)
    assert whole.dtype == np.int64
    assert (whole >= 0).all()
    order = np.random.default_rng(seed).permutation(count)
    half = count // 2
    np.testing.assert_array_equal(
        whole, sums(traits[order[:half]], residuals[order[:half]]) + sums(traits[order[half:]], residuals[order[half:]])
    )
    found = Moments.of(whole, num_traits)
    x = traits / TRAIT_UNIT
    assert found.total == count
    np.testing.assert_allclose(found.mean_D, x.mean(0), atol=1e-9)
    np.testing.assert_allclose(found.scatter_DD, (x - x.mean(0)).T @ (x - x.mean(0)), atol=1e-6)
    np.testing.assert_allclose(found.cross_D, (x - x.mean(0)).T @ (residuals - residuals.mean()), atol=1e-6)
    assert found.mean_residual == pytest.approx(residuals.mean(), abs=1e-9)
    assert found.squares == pytest.approx(((residuals - residuals.mean()) ** 2).sum(), abs=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 25))
def test_the_gain_is_that_of_predicting_one_answer_after_the_other(seed: int, count: int) -> None:
    """With Student's t of each model, of answers less their mean, rotated so that they are independent."""
    traits, residuals = draw(seed, count, np.array([0.5, -0.3, 0.1]))
    prior = directions()
    x = traits / TRAIT_UNIT
    # an orthonormal basis of what is left without the mean: centred sums of squares stay what they are
    basis = np.linalg.svd(np.eye(count) - 1.0 / count)[0][:, : count - 1]
    x, r = basis.T @ x, basis.T @ residuals

    def predictive(variances: Array) -> float:
        total, a, b = 0.0, SHAPE, SHAPE * prior.noise
        mean, covariance = np.zeros(NUM_TRAITS), np.diag(variances / prior.noise)
        for one, y in zip(x, r, strict=True):
            width = 1.0 + one @ covariance @ one
            total += student.logpdf(y, 2 * a, one @ mean, np.sqrt(b / a * width))
            step = covariance @ one / width
            a, b = a + 0.5, b + 0.5 * (y - one @ mean) ** 2 / width
            mean, covariance = mean + step * (y - one @ mean), covariance - np.outer(step, covariance @ one)
        return total

    gain = predictive(prior.variance_D) - predictive(np.zeros(NUM_TRAITS))
    found = learned(prior, Moments.of(sums(traits, residuals), NUM_TRAITS))
    assert found.gain * (count - 1) == pytest.approx(gain, rel=1e-6, abs=1e-6)
    assert log(found.belief / (1 - found.belief)) == pytest.approx(PRIOR_ODDS + gain, rel=1e-6, abs=1e-6)


def test_without_answers_it_says_nothing() -> None:
    found = learned(directions(), Moments.of(np.zeros(num_sums(NUM_TRAITS)), NUM_TRAITS))
    assert found.belief == pytest.approx(0.02)
    assert not found.weights_D.any()
    assert found.narrowing == 1.0
    assert found.gain == 0.0


def test_what_depends_on_traits_is_learned_and_what_does_not_is_left() -> None:
    weights = np.array([0.5, -0.3, 0.1])
    told = learned(directions(), Moments.of(sums(*draw(1, 200, weights)), NUM_TRAITS))
    assert told.belief > 0.99
    np.testing.assert_allclose(told.weights_D, weights, atol=0.08)
    assert told.narrowing < 0.6
    untold = learned(directions(), Moments.of(sums(*draw(1, 200, np.zeros(3))), NUM_TRAITS))
    assert untold.belief < 0.01


@given(st.integers(0, 2**32 - 1), st.integers(1, 400))
def test_what_it_can_cost_is_bounded(seed: int, count: int) -> None:
    """The mixture's likelihood is at least 98 % of that without the expert: the regret is 0.02 nats in all."""
    traits, residuals = draw(seed, count, np.zeros(NUM_TRAITS), noise=1.0)
    found = learned(directions(), Moments.of(sums(traits, residuals), NUM_TRAITS))
    total_gain = found.gain * max(count - 1, 0)
    assert np.logaddexp(log(0.98), log(0.02) + total_gain) >= log(0.98) - 1e-12


def test_relatives_move_the_prior_and_count_no_more_than_stated() -> None:
    weights = np.array([0.5, -0.3, 0.1])
    prior, few = directions(), Moments.of(sums(*draw(2, 10, weights)), NUM_TRAITS)
    related = Moments.of(sums(*draw(3, 2000, weights)), NUM_TRAITS)
    alone, helped = learned(prior, few), learned(prior, few, related)
    assert np.abs(helped.weights_D - weights).sum() < np.abs(alone.weights_D - weights).sum()
    misled = learned(prior, Moments.of(sums(*draw(4, 20 * int(RELATIVES_COUNT), weights)), NUM_TRAITS), related)
    other_way = Moments.of(sums(*draw(5, 100_000, -weights)), NUM_TRAITS)
    against = learned(prior, Moments.of(sums(*draw(4, 20 * int(RELATIVES_COUNT), weights)), NUM_TRAITS), other_way)
    np.testing.assert_allclose(against.weights_D, misled.weights_D, atol=0.15)


def test_far_traits_and_residuals_are_bounded() -> None:
    prior = directions(1)
    traits = prior.traits(np.array([[1e9], [-1e9]]))
    assert traits.tolist() == [[127], [-127]]
    far = Moments.of(lesson(traits[0], 50.0) + lesson(traits[1], -50.0), 1)
    assert far.squares == pytest.approx(2 * MOST_RESIDUAL**2)
    found = learned(prior, Moments.of(1000 * (lesson(traits[0], 2.0) + lesson(traits[1], -2.0)), 1))
    assert abs(found.shift(traits[0])) <= MOST_SHIFT


def test_what_is_written_is_read_and_what_does_not_fit_is_refused() -> None:
    saved = to_arrays(directions())
    again = from_arrays(saved)
    np.testing.assert_allclose(again.variance_D, directions().variance_D, rtol=1e-6)
    assert again.noise == pytest.approx(0.4)
    for name in saved:
        with pytest.raises(ArtifactError):
            from_arrays({key: value for key, value in saved.items() if key != name})
    with pytest.raises(ArtifactError, match="do not fit together"):
        from_arrays({**saved, "variance": np.array([0.1, -0.1, 0.1])})
