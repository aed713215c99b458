"""How an LLM's answers differ from what was predicted, from counts: a Bayesian fit and the correction it gives.

Everything happens in log units, in r = log(true tokens / predicted median). A fit explains the counts by a shift of
r, a slope (answers that depend less or more on the prompt than predicted) and a spread, each with a prior, and then
lets the counts bend the distribution itself. Knows counts and priors; not where they come from, nor when.

Shape suffixes: R bins of r, X bins of the log predicted median, S shifts, C spreads or clients, B slopes, P levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log

import numpy as np

from mope.grid import Array

BIN = 0.125  # width of a bin of r: lengths that differ by 13 %
LOW = -5.0  # lower end of r: 150 times shorter than predicted; the upper end is 1100 times longer
NUM_BINS = 96
EDGES_R = LOW + BIN * np.arange(NUM_BINS + 1)
CENTRES_R = EDGES_R[:-1] + BIN / 2  # also the shifts that a fit considers

X_BIN = 0.5
X_LOW = 1.0
NUM_X = 20  # up to a predicted median of 60,000 tokens
CENTRES_X = X_LOW + X_BIN * (np.arange(NUM_X) + 0.5)

KNOTS = np.sin(np.linspace(0.0, np.pi / 2, 33)) ** 2  # probabilities at which the shape of residuals is known

OUTLIERS = 0.1  # share of answers that the fit of shift and slope takes for accidents
FEW_OUTLIERS = 0.03  # and that of the spread, which would come out too small if many answers did not count
LONE_OUTLIERS = 0.3  # and this share more over the number of answers: a lone one that is far off is an accident
OUTLIER_SCALE = 1.5  # how far these lie off
CUT_RATIO, CUT_COUNT = 3.0, 4.0  # cut answers weigh as much as this many times the ended ones, and this many, at most
UNSURE = 0.9  # width of the middle 90 % of the shift's posterior above which predictions are widened by it
NUM_SHIFTS = 20  # shifts that then stand for the posterior, each as likely
BEYOND = 1e-4  # probability above the grid for which it is extended
FAR = 100.0  # log units
# share of answers, and one more, that count as no longer than `REACH` says. It also holds where clients are unknown, or
# where there is only one. `mope.lessons` clips more answers, but only those of a client that differs from all others
ACCIDENTS = 0.01
REACH = (0.99, log(2.0))  # twice the 99 % quantile: the mean would follow a single answer beyond
ONE_GROUP = 0.25  # share of the answers from which on a change of the LLM may be one client's doing
SHAPE_COUNT = 100.0  # answers that the fitted distribution is worth beside the counts themselves
SPREAD_PRIOR = log(0.82)  # within an LLM lengths scatter less than over all of them, which is what was predicted
SPREAD_DEVIATION = 0.25
SLOPE_DEVIATION = 0.28  # between LLMs, as measured on AlpacaEval

_SPREADS = 0.3 * 1.2 ** np.arange(12)
_LOG_SPREADS = np.log(_SPREADS)
_UNSTRETCHED = int(np.abs(_LOG_SPREADS).argmin())
_SLOPES = np.linspace(-1.0, 0.75, 15)  # of r over the log predicted median: -1 means that the prompt does not matter
_LOG_PRIOR_SLOPE = -0.5 * (_SLOPES / SLOPE_DEVIATION) ** 2
_OFFSETS = BIN * np.arange(1 - NUM_BINS, NUM_BINS)  # residuals: a bin's centre less a shift
_CELLS = (BIN * (np.arange(2 * NUM_BINS) - NUM_BINS + 0.5)) / _SPREADS[:, None]
_WIDE = np.exp(-np.abs(_OFFSETS) / OUTLIER_SCALE)
_WIDE /= _WIDE.sum()
_TINY = 1e-300


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """What was observed: answers by predicted median and by r, and where the predictions had expected them.

    Attributes:
        ended: answers that ended, shape (X, R); weights, so not always whole.
        cut: answers of which only a lower bound of r is known, shape (X, R).
        expected: summed predicted probability of each bin of r, shape (R,), in any unit.
    """

    ended: Array
    cut: Array
    expected: Array

    @property
    def total(self) -> float:
        """Answers, ended or cut."""
        return float(self.ended.sum() + self.cut.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """What is believed of an LLM before its answers are seen.

    Attributes:
        shift: probability of each shift in `CENTRES_R`, shape (S,).
        log_spread: expected log of the factor by which residuals are wider than predicted.
        shape: what the predicted probabilities `KNOTS` mean once shift and spread are right, shape (P,).
    """

    shift: Array
    log_spread: float = SPREAD_PRIOR
    shape: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ShiftFit:
    """What the counts say, given a prior.

    Attributes:
        total: answers that it rests on.
        shift: median of r at the pivot.
        log_spread: log of the factor by which residuals are wider than predicted.
        slope: how r changes with the log predicted median.
        pivot: the log predicted median at which `shift` holds.
        expected: cumulative predicted distribution of r at `EDGES_R`.
        learned: cumulative distribution of r at `EDGES_R` that the correction makes of it.
        observed: the same with hardly any weight on what was believed before.
        shifts: probability of each shift of `CENTRES_R`, shape (S,).
    """

    total: float
    shift: float
    log_spread: float
    slope: float
    pivot: float
    expected: Array
    learned: Array
    observed: Array
    shifts: Array

    def shape(self) -> Array:
        """What the predicted probabilities `KNOTS` mean once shift and spread are right, shape (P,)."""
        raw = np.interp(KNOTS, self.expected, EDGES_R)
        values = np.interp(self.shift + exp(self.log_spread) * raw, EDGES_R, self.learned)
        values[0], values[-1] = 0.0, 1.0
        return np.asarray(values)


class Correction:
    """A monotone map of lengths: probabilities at a corrected length are those predicted at its image.

    Beyond what was observed the map goes on by a constant factor. O(E) to apply.

    As long as the shift itself is hardly known, as of an LLM that was not observed yet, there is no such map: what is
    not known of it has nothing to do with what is not known of the request. The predicted distribution is then shifted
    by each of `NUM_SHIFTS` likely shifts, and these are mixed. O(E NUM_SHIFTS) to apply.
    """

    __slots__ = ("_images", "_knots", "_pivot", "_shift", "_shifts", "_slope")

    def __init__(self, fit: ShiftFit) -> None:
        cumulative = np.concatenate([[0.0], np.cumsum(fit.shifts)])
        low, high = np.interp([0.05, 0.95], cumulative, EDGES_R)
        self._shifts = None
        if high - low > UNSURE:
            self._shifts = np.interp((np.arange(NUM_SHIFTS) + 0.5) / NUM_SHIFTS, cumulative, EDGES_R)
        least = 0.5 / (fit.total + SHAPE_COUNT)
        inner = np.flatnonzero((fit.learned > least) & (fit.learned < 1.0 - least))
        if len(inner) >= 2:
            knots, images = EDGES_R[inner], np.interp(fit.learned[inner], fit.expected, EDGES_R)
        else:
            knots, images = np.array([fit.shift]), np.zeros(1)
        # beyond what was observed the map goes on with a slope of 1: two more knots, far out
        self._knots = np.concatenate([[knots[0] - FAR], knots, [knots[-1] + FAR]])
        self._images = np.concatenate([[images[0] - FAR], images, [images[-1] + FAR]])
        self._shift, self._slope, self._pivot = fit.shift, fit.slope, fit.pivot

    def log_factor(self, log_median: float) -> float:
        """Log of corrected over predicted median, for a request with this log predicted median."""
        return self._shift + self._slope * (log_median - self._pivot)

    def __call__(self, edges: Array, log_edges: Array, cumulative: Array, log_median: float) -> tuple[Array, Array]:
        """The corrected distribution.

        Args:
            edges: edges of the predicted grid in tokens, shape (E,).
            log_edges: their logarithms.
            cumulative: predicted cumulative probabilities at the edges, shape (E,).
            log_median: log of the predicted median.

        Returns:
            Edges and cumulative probabilities: the same edges, and further ones above where answers may well be longer
            than the grid reaches. Of two grids that were made longer, one is the beginning of the other.
        """
        if self._shifts is not None:
            return _mixed(edges, log_edges, cumulative, self._shifts)
        centre = log_median + self._slope * (log_median - self._pivot)
        image = np.interp(log_edges - centre, self._knots, self._images)
        image += log_median
        corrected = np.interp(image, log_edges, cumulative)
        corrected[0] = 0.0
        if corrected[-1] < 1.0 - BEYOND:
            top = float(log_edges[-1])
            end = centre + float(np.interp(top - log_median, self._images, self._knots))
            further = _further(top, end)
            above = np.interp(
                log_median + np.interp(further - centre, self._knots, self._images), log_edges, cumulative
            )
            edges, corrected = np.concatenate([edges, np.exp(further)]), np.concatenate([corrected, above])
        corrected[-1] = 1.0
        return edges, corrected


def _further(top: float, end: float) -> Array:
    """Logarithms of further edges; steps are all the same, so that of two grids one is the beginning of the other."""
    return top + 2 * BIN * np.arange(1, 2 + int(max(end - top, 0.0) / (2 * BIN)))


def _mixed(edges: Array, log_edges: Array, cumulative: Array, shifts: Array) -> tuple[Array, Array]:
    """The mean of a distribution shifted by each of some shifts; edges and cumulative probabilities."""
    corrected = np.interp(log_edges - shifts[:, None], log_edges, cumulative).mean(axis=0)
    corrected[0] = 0.0
    if corrected[-1] < 1.0 - BEYOND:
        further = _further(float(log_edges[-1]), float(log_edges[-1] + shifts.max()))
        above = np.interp(further - shifts[:, None], log_edges, cumulative).mean(axis=0)
        edges, corrected = np.concatenate([edges, np.exp(further)]), np.concatenate([corrected, above])
    corrected[-1] = 1.0
    return edges, corrected


@lru_cache(maxsize=4096)
def bump(centre: float, width: float) -> Array:
    """Student's t with three degrees of freedom over the shifts, shape (S,): sums to 1, and rules nothing out."""
    density = (1.0 + ((CENTRES_R - centre) / width) ** 2 / 3.0) ** -2.0
    density /= density.sum()
    density.flags.writeable = False
    return np.asarray(density)


def fit(counts: Counts, prior: Prior) -> ShiftFit:
    """Shift, slope, spread and distribution of r, given the counts.

    The likelihood is that of the predicted distribution, shifted, stretched and mixed with a share of accidents; cut
    answers enter by their probability of being longer. The distribution is that of the counts, with `SHAPE_COUNT` more
    answers as fitted, blurred by what is not known of shift and spread. Of answers that are far longer than the fitted
    distribution says, the longest `ACCIDENTS` are moved to where it ends for practical purposes.

    Args:
        counts: what was observed; `expected` must not be all zero.
        prior: what is believed before.
    """
    expected = np.concatenate([[0.0], np.cumsum(counts.expected, dtype=np.float64)])
    expected /= expected[-1]
    mass_CD = _residual_mass(expected, prior.shape)
    log_prior_C = -0.5 * ((_LOG_SPREADS - prior.log_spread) / SPREAD_DEVIATION) ** 2
    log_prior_S = np.log(prior.shift + _TINY)
    with_outliers_CD = (1.0 - OUTLIERS) * mass_CD + OUTLIERS * _WIDE

    used = np.flatnonzero((counts.ended + counts.cut).sum(axis=1))
    x, ended_XR, cut_XR = CENTRES_X[used], counts.ended[used], counts.cut[used]
    if cut_XR.any():  # where nearly all are cut, that may well have to do with their length
        cut_XR = cut_XR * min(1.0, (CUT_RATIO * ended_XR.sum() + CUT_COUNT) / cut_XR.sum())
    weights = (ended_XR + cut_XR).sum(axis=1)
    pivot = float(weights @ x / weights.sum()) if len(used) else 0.0
    ended_R, cut_R = ended_XR.sum(axis=0), cut_XR.sum(axis=0)
    slope = 0.0
    if len(used) > 1:
        joint_CS = _posterior(with_outliers_CD, ended_R, cut_R, log_prior_C, log_prior_S)
        spread = int(joint_CS.sum(axis=1).argmax())
        per_x_XS = _log_likelihood(with_outliers_CD[spread][None], ended_XR, cut_XR)
        slope = _mean_slope(per_x_XS, x - pivot, log_prior_S)
        ended_R, cut_R = (_without_slope(rows, slope * (x - pivot)) for rows in (ended_XR, cut_XR))
    few = FEW_OUTLIERS + LONE_OUTLIERS / (1.0 + counts.total)
    with_few_CD = (1.0 - few) * mass_CD + few * _WIDE
    joint_CS = _posterior(with_few_CD, ended_R, cut_R, log_prior_C, log_prior_S)
    base_R = _spread_out(joint_CS, mass_CD)
    ended_R, cut_R = _without_accidents(ended_R, cut_R, base_R)
    learned = distribution(ended_R, cut_R, base_R, SHAPE_COUNT)
    return ShiftFit(
        total=counts.total,
        shift=float(np.interp(0.5, learned, EDGES_R)),
        log_spread=float(joint_CS.sum(axis=1) @ _LOG_SPREADS),
        slope=slope,
        pivot=pivot,
        expected=expected,
        learned=learned,
        observed=distribution(ended_R, cut_R, base_R, 1e-6),
        shifts=joint_CS.sum(axis=0),
    )


def _without_accidents(ended_R: Array, cut_R: Array, base_R: Array) -> tuple[Array, Array]:
    """Counts with the few longest answers moved to `REACH`, where they lie beyond."""
    level, further = REACH
    reach = int(np.searchsorted(np.cumsum(base_R), level) + further / BIN) + 1
    if reach >= NUM_BINS or not (ended_R[reach:].any() or cut_R[reach:].any()):
        return ended_R, cut_R
    beyond_R = (ended_R + cut_R)[reach:]
    from_top_R = np.cumsum(beyond_R[::-1])[::-1]
    left = 1.0 + ACCIDENTS * float(ended_R.sum() + cut_R.sum())
    taken_R = np.minimum(np.maximum(left - (from_top_R - beyond_R), 0.0), beyond_R)
    share_R = taken_R / np.maximum(beyond_R, _TINY)
    moved = []
    for counts_R in (ended_R.astype(np.float64), cut_R.astype(np.float64)):
        away_R = counts_R[reach:] * share_R
        counts_R[reach:] -= away_R
        counts_R[reach - 1] += away_R.sum()
        moved.append(np.asarray(counts_R))
    return moved[0], moved[1]


def distribution(ended_R: Array, cut_R: Array, base_R: Array, count: float) -> Array:
    """Cumulative distribution at the edges of the bins, from 0 to 1, non-decreasing, shape (R + 1,).

    What the cut answers would have come to is taken from the base, given that they are longer: one step of the EM
    algorithm (Dempster, Laird and Rubin, 1977) from there. Kaplan and Meier's estimator, its fixed point, would hand
    all of their mass to the few answers that happened to end beyond.

    Args:
        ended_R: answers that ended in each bin.
        cut_R: answers that were cut there.
        base_R: probability of each bin before any answer, nowhere 0.
        count: answers that this is worth.
    """
    longer_R = np.cumsum(base_R[::-1])[::-1] - 0.5 * base_R  # than the middle of each bin
    share_R = cut_R / longer_R
    cumulative = np.empty(len(base_R) + 1)
    cumulative[0] = 0.0
    np.cumsum(ended_R + base_R * (count + np.cumsum(share_R) - 0.5 * share_R), out=cumulative[1:])
    return np.asarray(cumulative / cumulative[-1])


def num_alike(
    ended_KR: Array, cut_KR: Array, expected_R: Array, patience: float, clients_KC: Array | None = None
) -> int:
    """How many of some batches, newest first, come from an LLM that has not changed meanwhile.

    A batch is taken for older than a change when its likelihood is more than exp(`patience`) times higher with a shift
    of its own than with the newer ones' shift (a Bayes factor over a wide prior of shifts).

    Args:
        ended_KR: answers that ended, per batch, shape (K, R).
        cut_KR: answers that were cut, shape (K, R).
        expected_R: predicted probabilities, shape (R,), in any unit.
        patience: in log units.
        clients_KC: how many answers each of some groups of clients had, shape (K, C). One group alone cannot make a
            change: it counts only where none has much more than `ONE_GROUP` of the newer batches, or than it had of the
            older ones.
    """
    expected = np.concatenate([[0.0], np.cumsum(expected_R, dtype=np.float64)])
    mass_D = _residual_mass(expected / expected[-1], None)[_UNSTRETCHED]
    mass_D = (1.0 - OUTLIERS) * mass_D + OUTLIERS * _WIDE
    prior_S = np.log(bump(0.0, 1.0))
    own_KS = _log_likelihood(mass_D[None], ended_KR, cut_KR)
    newer_KS = np.cumsum(own_KS, axis=0)
    together = _log_sum_exp(newer_KS[1:] + prior_S)
    apart = _log_sum_exp(newer_KS[:-1] + prior_S) + _log_sum_exp(own_KS[1:] + prior_S)
    evident_K = apart - together > patience
    if clients_KC is not None:
        newer_KC = np.cumsum(clients_KC, axis=0)
        older_KC = newer_KC[-1] - newer_KC
        older_K = older_KC.sum(axis=1)
        usual_K = np.where(older_K > 0.0, older_KC.max(axis=1) / np.maximum(older_K, _TINY), 1.0)
        most_K = 1.0 + np.maximum(usual_K, ONE_GROUP) * newer_KC.sum(axis=1)
        evident_K &= (newer_KC.max(axis=1) <= most_K)[:-1]
    changed = np.flatnonzero(evident_K)
    return int(changed[0]) + 1 if len(changed) else len(ended_KR)


def pooled_shape(shapes: Sequence[Array], weights: Sequence[float]) -> Array:
    """The mean of shapes and of the one that changes nothing, which has a weight of 1."""
    total = KNOTS.copy()
    for shape, weight in zip(shapes, weights, strict=True):
        total += weight * shape
    return np.asarray(total / (1.0 + sum(weights)))


def _residual_mass(expected: Array, shape: Array | None) -> Array:
    """Probability of each residual cell for each spread, shape (C, D): what was predicted, reshaped and stretched."""
    cumulative = np.interp(_CELLS, EDGES_R, expected)
    if shape is not None:
        cumulative = np.interp(cumulative, KNOTS, shape)
    cumulative[:, 0], cumulative[:, -1] = 0.0, 1.0
    return np.diff(cumulative, axis=1)


def _log_likelihood(mass_KD: Array, ended_KR: Array, cut_KR: Array) -> Array:
    """Log-likelihood of each shift, shape (K, S); of one distribution or one row of counts there may be one for all."""
    num_rows = max(len(mass_KD), len(ended_KR))

    def summed(log_mass_KD: Array, counts_KR: Array) -> Array:
        rows = zip(*(np.broadcast_to(one, (num_rows, one.shape[1])) for one in (log_mass_KD, counts_KR)), strict=True)
        return np.stack([np.correlate(log_mass_D, counts_R, "valid") for log_mass_D, counts_R in rows])

    found_KS = summed(np.log(mass_KD + _TINY), ended_KR)
    if cut_KR.any():
        longer_KD = np.cumsum(mass_KD[:, ::-1], axis=1)[:, ::-1] - 0.5 * mass_KD
        found_KS += summed(np.log(longer_KD + _TINY), cut_KR)
    return np.asarray(found_KS[:, ::-1])


def _posterior(mass_CD: Array, ended_R: Array, cut_R: Array, log_prior_C: Array, log_prior_S: Array) -> Array:
    """Joint probability of spread and shift, shape (C, S)."""
    found_CS = _log_likelihood(mass_CD, ended_R[None], cut_R[None])
    return _normalised(found_CS + log_prior_C[:, None] + log_prior_S)


def _mean_slope(log_likelihood_XS: Array, x: Array, log_prior_S: Array) -> float:
    position = np.arange(NUM_BINS) + (_SLOPES[:, None] * x)[:, :, None] / BIN  # (B, X, S)
    position = np.minimum(np.maximum(position, 0.0), NUM_BINS - 1.0)
    low = np.minimum(position.astype(np.intp), NUM_BINS - 2)
    share = position - low
    row = np.arange(len(x))[:, None]
    found = log_likelihood_XS[row, low] * (1.0 - share) + log_likelihood_XS[row, low + 1] * share
    joint_BS = _normalised(found.sum(axis=1) + _LOG_PRIOR_SLOPE[:, None] + log_prior_S)
    return float(joint_BS.sum(axis=1) @ _SLOPES)


def _without_slope(counts_XR: Array, shift_X: Array) -> Array:
    """Counts of all rows, each moved back by its own shift, shape (R,)."""
    row, column = np.nonzero(counts_XR)
    counts = counts_XR[row, column]
    position = np.minimum(np.maximum(column - shift_X[row] / BIN, 0.0), NUM_BINS - 1.0)
    low = np.minimum(position.astype(np.intp), NUM_BINS - 2)
    share = position - low
    moved = np.bincount(low, counts * (1.0 - share), NUM_BINS)
    return np.asarray(moved + np.bincount(low + 1, counts * share, NUM_BINS))


def _spread_out(joint_CS: Array, mass_CD: Array) -> Array:
    """The residuals' distribution, blurred by what is not known of shift and spread, shape (R,)."""
    total_R = np.zeros(NUM_BINS)
    for weight_S, mass_D in zip(joint_CS, mass_CD, strict=True):
        if weight_S.sum() > 1e-4:
            total_R += np.convolve(mass_D, weight_S, "valid")
    total_R += 1e-9 * total_R.sum()
    return np.asarray(total_R / total_R.sum())


def _normalised(log_weights: Array) -> Array:
    weights = np.exp(log_weights - log_weights.max())
    return np.asarray(weights / weights.sum())


def _log_sum_exp(values_KS: Array) -> Array:
    top = values_KS.max(axis=-1)
    return np.asarray(top + np.log(np.exp(values_KS - top[..., None]).sum(axis=-1)))
