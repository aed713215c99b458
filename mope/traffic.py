"""An expert that learns the traffic it serves: Bayesian linear regression of log length on traits of each request.

Traits are a fixed projection of what the network made of a request, in small whole numbers. Of finished requests only
sums of traits and residuals are kept, also in whole numbers: they add up exactly, wherever the requests were served.
How far the expert is believed follows from the evidence for it (Bayes factor). Knows sums and priors; no requests, no
clock.

Shape suffixes: B requests, X inputs of the projection, D traits, M sums (see `num_sums`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import exp, lgamma, log, pi, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from mope.errors import ArtifactError
from mope.grid import Array

Traits = npt.NDArray[np.int8]

TRAIT_UNIT = 32.0  # traits have a variance of about 1 and are rounded to 1 / TRAIT_UNIT
MOST_TRAIT = 127
RESIDUAL_UNIT = 256.0
MOST_RESIDUAL = 2.5  # log units: answers that are further off count as that far: a twelfth, or twelve times
_OFFSETS = (MOST_TRAIT, round(MOST_RESIDUAL * RESIDUAL_UNIT))  # make all sums sums of positive numbers

SHAPE = 3.0  # of the inverse gamma prior of the residuals' variance: answers that the prior is worth, and a half
PRIOR_ODDS = log(0.02 / 0.98)  # that traits tell anything beyond the prediction: what is lost at most is -log(0.98)
MOST_SHIFT = 1.5  # log units that the expert moves a prediction at most
RELATIVES_COUNT = 40.0  # answers of all relatives together that count as much as answers of the target itself


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """What of a request the expert looks at, and what is believed of it before any answer.

    Attributes:
        projection_XD: from the network's embedding and the request's numbers to traits.
        centre_D: is taken off.
        variance_D: prior variance of each trait's weight, in square log units.
        noise: prior variance of residuals, in square log units.
    """

    projection_XD: Array
    centre_D: Array
    variance_D: Array
    noise: float

    def __post_init__(self) -> None:
        num_traits = self.projection_XD.shape[1]
        if not (
            self.centre_D.shape == self.variance_D.shape == (num_traits,)
            and np.isfinite(self.projection_XD).all()
            and np.isfinite(self.centre_D).all()
            and (self.variance_D > 0).all()
            and np.isfinite(self.variance_D).all()
            and 0 < self.noise < 100
        ):
            raise ArtifactError("the directions of the traffic's expert do not fit together; copy the folder again")

    @property
    def num_traits(self) -> int:
        """D."""
        return int(self.projection_XD.shape[1])

    def traits(self, inputs_BX: Array) -> Traits:
        """Traits of requests, shape (B, D)."""
        found_BD = np.rint(TRAIT_UNIT * (inputs_BX @ self.projection_XD - self.centre_D))
        return np.asarray(np.clip(found_BD, -MOST_TRAIT, MOST_TRAIT).astype(np.int8))


def num_sums(num_traits: int) -> int:
    """How many numbers are kept of requests with so many traits, M: counts, first moments, second moments."""
    size = num_traits + 2
    return size * (size + 1) // 2


@lru_cache(maxsize=8)
def _triangle(num_traits: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    return np.triu_indices(num_traits + 2)


def lesson(traits_D: Traits, residual: float) -> npt.NDArray[np.int64]:
    """What is added to the sums of a target for one finished request, shape (M,), whole numbers, none below zero.

    Args:
        traits_D: of the request.
        residual: log of true over predicted median length. Of a cut answer: what is expected of it, given that it is
            longer, see `expected_residual`.
    """
    most_trait, most_residual = _OFFSETS
    row = np.empty(len(traits_D) + 2, np.int64)
    row[0] = 1
    row[1:-1] = traits_D
    row[1:-1] += most_trait
    row[-1] = round(RESIDUAL_UNIT * min(max(residual, -MOST_RESIDUAL), MOST_RESIDUAL)) + most_residual
    return np.asarray(np.outer(row, row)[_triangle(len(traits_D))])


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums of some answers, in log units and traits of variance 1.

    Attributes:
        total: answers.
        mean_D: mean traits.
        mean_residual: mean residual.
        scatter_DD: sum of the outer products of traits less their mean.
        cross_D: sum of the same traits times residuals less their mean.
        squares: sum of the squares of residuals less their mean.
    """

    total: float
    mean_D: Array
    mean_residual: float
    scatter_DD: Array
    cross_D: Array
    squares: float

    @classmethod
    def of(cls, sums_M: Array, num_traits: int) -> Moments:
        """From sums of `lesson`, perhaps shares of them."""
        size = num_traits + 2
        whole = np.zeros((size, size))
        whole[_triangle(num_traits)] = sums_M
        whole = whole + np.triu(whole, 1).T
        total = float(whole[0, 0])
        if total <= 0:
            nothing_D = np.zeros(num_traits)
            return cls(0.0, nothing_D, 0.0, np.zeros((num_traits, num_traits)), nothing_D, 0.0)
        mean = whole[0] / total
        centred = whole - total * np.outer(mean, mean)
        unit = np.full(size, TRAIT_UNIT)
        unit[-1] = RESIDUAL_UNIT
        centred /= np.outer(unit, unit)
        return cls(
            total,
            (mean[1:-1] - _OFFSETS[0]) / TRAIT_UNIT,
            float(mean[-1] - _OFFSETS[1]) / RESIDUAL_UNIT,
            centred[1:-1, 1:-1],
            centred[1:-1, -1],
            max(float(centred[-1, -1]), 0.0),
        )

    def plus(self, other: Moments, share: float) -> Moments:
        """Within-group sums of both, the other's counted in part: what two targets say of the weights alone."""
        return Moments(
            self.total + share * other.total,
            self.mean_D,
            self.mean_residual,
            self.scatter_DD + share * other.scatter_DD,
            self.cross_D + share * other.cross_D,
            self.squares + share * other.squares,
        )


@dataclass(frozen=True, slots=True, eq=False)
class TrafficExpert:
    """What the traits of a target's requests say of its answers.

    Attributes:
        weights_D: log units per trait.
        centre_D: mean traits of the target, where the expert changes nothing.
        narrowing: residuals' deviation with the expert over that without it, at most 1.
        belief: probability that traits tell anything, from 0 to 1.
        gain: mean gain in log likelihood for each answer, in nats.
    """

    weights_D: Array
    centre_D: Array
    narrowing: float
    belief: float
    gain: float

    def shift(self, traits_D: Traits) -> float:
        """Log units by which a request's answer is expected to be longer than those of the target's usual request."""
        moved = float((traits_D / TRAIT_UNIT - self.centre_D) @ self.weights_D)
        return min(max(moved, -MOST_SHIFT), MOST_SHIFT)


def learned(directions: Directions, own: Moments, relatives: Moments | None = None) -> TrafficExpert:
    """The posterior of the weights and the evidence that they are not all zero.

    Weights have a normal prior with variances `Directions.variance_D`, the residuals' variance an inverse gamma prior.
    Both have a closed form (Bishop, Pattern Recognition and Machine Learning, 2006, section 3.5; the variance unknown:
    exercise 3.23). What relatives of the target were seen to do moves the prior. The evidence of each model is the
    product of its predictive likelihoods of one answer after the other, in any order; it is compared for the target's
    own answers alone.

    Args:
        directions: the prior.
        own: of the target's answers.
        relatives: of other targets' answers, for the prior.
    """
    precision_DD = np.diag(directions.noise / directions.variance_D)
    mean_D: Array = np.zeros(directions.num_traits)
    if relatives is not None and relatives.total > 0:
        share = RELATIVES_COUNT / (RELATIVES_COUNT + relatives.total)
        precision_DD = precision_DD + share * relatives.scatter_DD
        mean_D = np.linalg.solve(precision_DD, share * relatives.cross_D)
    posterior_DD = precision_DD + own.scatter_DD
    weights_D = np.linalg.solve(posterior_DD, precision_DD @ mean_D + own.cross_D)
    scale = SHAPE * directions.noise
    explained = own.squares + mean_D @ precision_DD @ mean_D - weights_D @ posterior_DD @ weights_D
    with_weights = max(float(explained), 0.0)
    count = max(own.total - 1.0, 0.0)  # one is spent on the mean
    ratio = 0.5 * (np.linalg.slogdet(precision_DD)[1] - np.linalg.slogdet(posterior_DD)[1])
    gain = float(ratio) + _evidence(count, with_weights, scale) - _evidence(count, own.squares, scale)
    narrowing = sqrt((scale + 0.5 * with_weights) / (scale + 0.5 * own.squares))
    odds = PRIOR_ODDS + gain
    belief = 1.0 / (1.0 + exp(-odds)) if odds > -50.0 else 0.0
    return TrafficExpert(weights_D, own.mean_D, min(narrowing, 1.0), belief, gain / count if count else 0.0)


def _evidence(count: float, squares: float, scale: float) -> float:
    """Log probability of residuals, their variance integrated out."""
    shape = SHAPE + 0.5 * count
    return (
        lgamma(shape)
        - lgamma(SHAPE)
        + SHAPE * log(scale)
        - shape * log(scale + 0.5 * squares)
        - 0.5 * count * log(2 * pi)
    )


def to_arrays(directions: Directions) -> dict[str, Array]:
    """As tensors of a safetensors file."""
    return {
        "projection": directions.projection_XD.astype(np.float32),
        "centre": directions.centre_D.astype(np.float32),
        "variance": directions.variance_D.astype(np.float32),
        "noise": np.array([directions.noise], np.float32),
    }


def from_arrays(arrays: Mapping[str, Any]) -> Directions:
    """What `to_arrays` wrote.

    Raises:
        ArtifactError: it is anything else.
    """
    try:
        projection_XD, centre_D, variance_D, noise = (
            np.asarray(arrays[name], dtype=np.float64) for name in ("projection", "centre", "variance", "noise")
        )
        return Directions(projection_XD, centre_D, variance_D, float(noise[0]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ArtifactError(f"the directions of the traffic's expert can't be read: {error!r}") from error
