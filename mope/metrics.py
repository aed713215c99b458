"""How good predicted lengths are: errors, ranks, quantiles, and 95 % intervals over whole conversations.

Knows arrays of response tokens, predictions and conversation groups; does not know predictors, files or plots.
Every number is a finite float, so that a dictionary of them is strict JSON. Rows whose true length is unknown
(censored) are for the caller to leave out.

Shapes: N rows, G conversation groups, Q quantile levels, M quantities averaged over rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mope.errors import DataError
from mope.extras import require

FloatArray = npt.NDArray[np.float64]

QUANTILES = (0.1, 0.5, 0.9, 0.99)
INTERVAL_PERCENTILES = (2.5, 97.5)
NUM_RANK_SAMPLES = 200  # a resampled rank correlation costs O(N log N), a resampled mean only O(G)


def point_metrics(actual_N: npt.ArrayLike, predicted_N: npt.ArrayLike) -> dict[str, float]:
    """Errors of one predicted length per row.

    Returns:
        `mae`, `median_ae` and `rmse` in tokens, `kendall_tau` (see `ranking`), and `r2`, the share of the
        variance of the true lengths that is explained; where all true lengths are equal, `r2` is 1.0 for
        perfect predictions and 0.0 for others.

    Raises:
        DataError: no rows, different numbers of rows, or a value that is not finite.
    """
    actual_N, predicted_N = _vectors(actual_N, predicted_N)
    error_N = predicted_N - actual_N
    squared_error = float(error_N @ error_N)
    variation = float(np.sum((actual_N - actual_N.mean()) ** 2))
    return {
        "mae": float(np.abs(error_N).mean()),
        "median_ae": float(np.median(np.abs(error_N))),
        "rmse": float(np.sqrt(squared_error / len(error_N))),
        "kendall_tau": ranking(actual_N, predicted_N),
        "r2": 1.0 - squared_error / variation if variation else float(squared_error == 0.0),
    }


def ranking(actual_N: npt.ArrayLike, scores_N: npt.ArrayLike) -> float:
    """Kendall's tau-b between true lengths and scores, from -1 to 1.

    Scores or lengths that are all equal order nothing; tau-b is then 0/0 and 0.0 is returned.
    """
    stats = require("scipy.stats", "Kendall's tau")
    actual_N, scores_N = _vectors(actual_N, scores_N)
    if np.ptp(actual_N) == 0.0 or np.ptp(scores_N) == 0.0:
        return 0.0
    return float(stats.kendalltau(actual_N, scores_N, variant="b").statistic)


def quantile_metrics(actual_N: npt.ArrayLike, quantiles_NQ: npt.ArrayLike, levels: Sequence[float]) -> dict[str, Any]:
    """Pinball loss and coverage of predicted quantiles.

    The pinball loss of a quantile q at level t is max(t (y - q), (t - 1) (y - q)) (Koenker and Bassett 1978);
    at t = 0.5 it is half the absolute error.

    Returns:
        `pinball`: mean over levels, in tokens; `pinball_by_level` and `coverage`: a number per level, where
        coverage is the share of rows whose true length is at most the quantile. Keys are `str(level)`.

    Raises:
        DataError: `quantiles_NQ` is not of shape (rows, levels), or a value is not finite.
    """
    actual_N, quantiles_NQ, levels_Q = _quantiles(actual_N, quantiles_NQ, levels)
    error_NQ = actual_N[:, None] - quantiles_NQ
    pinball_Q = np.maximum(levels_Q * error_NQ, (levels_Q - 1.0) * error_NQ).mean(axis=0)
    return {
        "pinball": float(pinball_Q.mean()),
        "pinball_by_level": _by_level(levels, pinball_Q),
        "coverage": _by_level(levels, (error_NQ <= 0.0).mean(axis=0)),
    }


def bootstrap(
    metric_fn: Callable[[npt.NDArray[np.intp]], dict[str, float]],
    groups_N: npt.ArrayLike,
    *,
    num_samples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """95 % percentile intervals of any metric, resampling whole conversations (Efron and Tibshirani 1993, ch. 13).

    The turns of one conversation resemble each other, so rows resampled one by one would give intervals that
    are too narrow.

    Args:
        metric_fn: takes row positions (with repetitions) and returns numbers by name. For plain means,
            `bootstrap_means` gives the same intervals far faster.
        groups_N: the conversation of each row, any hashable numbers or strings.
        num_samples: how often to resample.
        seed: of the resampling; equal seeds and groups give equal resamples.

    Returns:
        `[low, high]` by name.
    """
    group_of_N, num_groups = _group_numbers(groups_N)
    rows_N = np.arange(len(group_of_N))
    samples = [
        metric_fn(np.repeat(rows_N, times_G[group_of_N])) for times_G in _resampled(num_groups, num_samples, seed)
    ]
    return {name: _interval(np.array([sample[name] for sample in samples])) for name in samples[0]}


def bootstrap_means(
    values_NM: npt.ArrayLike, groups_N: npt.ArrayLike, *, num_samples: int = 1000, seed: int = 0
) -> list[list[float]]:
    """95 % percentile intervals of the column means of `values_NM`, resampling whole conversations.

    Works on sums per conversation: O(N + num_samples * G * M).

    Returns:
        `[low, high]` per column.
    """
    group_of_N, num_groups = _group_numbers(groups_N)
    values_NM = np.asarray(values_NM, dtype=np.float64)
    if values_NM.ndim != 2 or len(values_NM) != len(group_of_N):
        raise DataError(f"got values of shape {values_NM.shape}; expected ({len(group_of_N)} rows, columns)")
    columns = [np.bincount(group_of_N, weights=column_N, minlength=num_groups) for column_N in values_NM.T]
    sums_GM = np.stack(columns, axis=1)
    sizes_G = np.bincount(group_of_N, minlength=num_groups)
    means_SM = np.array(
        [times_G @ sums_GM / (times_G @ sizes_G) for times_G in _resampled(num_groups, num_samples, seed)]
    )
    return [_interval(means_S) for means_S in means_SM.T]


def evaluate(
    actual_N: npt.ArrayLike,
    predicted_N: npt.ArrayLike,
    groups_N: npt.ArrayLike,
    *,
    quantiles_NQ: npt.ArrayLike | None = None,
    levels: Sequence[float] = QUANTILES,
    num_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that `metrics.json` says of one predictor on one set of rows.

    Returns:
        `num_rows`, the numbers of `point_metrics` with `mae_ci` and `kendall_tau_ci`; with quantiles also
        `pinball`, `coverage` and `coverage_ci` of `quantile_metrics`.

    Raises:
        DataError: no rows, shapes that do not fit, or a value that is not finite.
    """
    actual_N, predicted_N = _vectors(actual_N, predicted_N)
    groups_N = np.asarray(groups_N)
    if groups_N.shape != actual_N.shape:
        raise DataError(f"got groups of shape {groups_N.shape}; expected one per row, ({len(actual_N)},)")
    averaged = [np.abs(predicted_N - actual_N)]
    quantile_results: dict[str, Any] = {}
    if quantiles_NQ is not None:
        quantile_results = quantile_metrics(actual_N, quantiles_NQ, levels)
        del quantile_results["pinball_by_level"]
        averaged += list(actual_N <= np.asarray(quantiles_NQ, dtype=np.float64).T)
    mae_ci, *coverage_cis = bootstrap_means(np.stack(averaged, axis=1), groups_N, num_samples=num_samples, seed=seed)
    if quantile_results:
        quantile_results["coverage_ci"] = {str(level): ci for level, ci in zip(levels, coverage_cis, strict=True)}
    if np.ptp(predicted_N) == 0.0:
        tau_ci = [0.0, 0.0]
    else:
        tau_ci = bootstrap(
            lambda rows: {"kendall_tau": ranking(actual_N[rows], predicted_N[rows])},
            groups_N,
            num_samples=min(NUM_RANK_SAMPLES, num_samples),
            seed=seed,
        )["kendall_tau"]
    points = point_metrics(actual_N, predicted_N)
    return {"num_rows": len(actual_N), **points, "mae_ci": mae_ci, "kendall_tau_ci": tau_ci, **quantile_results}


def paired_difference(
    actual_N: npt.ArrayLike,
    predicted_a_N: npt.ArrayLike,
    predicted_b_N: npt.ArrayLike,
    groups_N: npt.ArrayLike,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """MAE of predictor a minus MAE of predictor b on the same rows, with a paired 95 % interval.

    An interval below zero says that a is better; both are resampled together, so what is hard for both cancels.

    Returns:
        `mae_difference` in tokens and `ci`, `[low, high]`.
    """
    actual_N, predicted_a_N, predicted_b_N = _vectors(actual_N, predicted_a_N, predicted_b_N)
    difference_N = np.abs(predicted_a_N - actual_N) - np.abs(predicted_b_N - actual_N)
    (ci,) = bootstrap_means(difference_N[:, None], groups_N, seed=seed)
    return {"mae_difference": float(difference_N.mean()), "ci": ci}


def by_bucket(
    actual_N: npt.ArrayLike, predicted_N: npt.ArrayLike, edges: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Errors by true length, shortest bucket first; buckets without rows are left out.

    Args:
        actual_N: true lengths in tokens.
        predicted_N: predicted lengths in tokens.
        edges: the inner borders, increasing. A length equal to a border belongs to the bucket above it.

    Returns:
        `num_rows`, `mae`, `median_ae` and `bias` (mean of predicted minus true) by bucket, for example
        `"<153"`, `"153-316"`, `">=316"`.
    """
    actual_N, predicted_N = _vectors(actual_N, predicted_N)
    if not len(edges) or np.any(np.diff(edges) <= 0):
        raise DataError(f"got bucket borders {list(edges)}; expected at least one, each above the one before")
    inner = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(edges)]
    names = [f"<{edges[0]:g}", *inner, f">={edges[-1]:g}"]
    bucket_N = np.searchsorted(np.asarray(edges), actual_N, side="right")
    return {
        name: _errors(actual_N[bucket_N == bucket], predicted_N[bucket_N == bucket])
        for bucket, name in enumerate(names)
        if np.any(bucket_N == bucket)
    }


def by_label(
    actual_N: npt.ArrayLike, predicted_N: npt.ArrayLike, labels: Sequence[str | None]
) -> dict[str, dict[str, float]]:
    """Errors by label (language, target LLM, expert), the most frequent first; no label becomes `"unknown"`.

    Returns:
        `num_rows`, `mae`, `median_ae` and `bias` (mean of predicted minus true) by label.
    """
    actual_N, predicted_N = _vectors(actual_N, predicted_N)
    if len(labels) != len(actual_N):
        raise DataError(f"got {len(labels)} labels; expected one per row, {len(actual_N)}")
    names, label_N, sizes = np.unique([label or "unknown" for label in labels], return_inverse=True, return_counts=True)
    by_size = sorted(range(len(names)), key=lambda index: (-sizes[index], names[index]))
    return {str(names[index]): _errors(actual_N[label_N == index], predicted_N[label_N == index]) for index in by_size}


def _errors(actual_N: FloatArray, predicted_N: FloatArray) -> dict[str, float]:
    error_N = predicted_N - actual_N
    return {
        "num_rows": len(error_N),
        "mae": float(np.abs(error_N).mean()),
        "median_ae": float(np.median(np.abs(error_N))),
        "bias": float(error_N.mean()),
    }


def _vectors(*vectors: npt.ArrayLike) -> list[FloatArray]:
    arrays = [np.asarray(vector, dtype=np.float64) for vector in vectors]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1 or arrays[0].ndim != 1:
        shown = " and ".join(str(array.shape) for array in arrays)
        raise DataError(f"got arrays of shape {shown}; expected one number per row, as many in each")
    if not arrays[0].size:
        raise DataError("got no rows to evaluate; expected at least one")
    if not all(np.isfinite(array).all() for array in arrays):
        raise DataError("got lengths that are not finite (NaN or infinity); expected numbers of tokens")
    return arrays


def _quantiles(
    actual_N: npt.ArrayLike, quantiles_NQ: npt.ArrayLike, levels: Sequence[float]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    (actual_N,) = _vectors(actual_N)
    quantiles_NQ = np.asarray(quantiles_NQ, dtype=np.float64)
    levels_Q = np.asarray(levels, dtype=np.float64)
    if quantiles_NQ.shape != (len(actual_N), len(levels_Q)) or not len(levels_Q):
        expected = f"({len(actual_N)} rows, {len(levels_Q)} levels)"
        raise DataError(f"got quantiles of shape {quantiles_NQ.shape}; expected {expected}")
    if not np.isfinite(quantiles_NQ).all():
        raise DataError("got quantiles that are not finite (NaN or infinity); expected numbers of tokens")
    if np.any(levels_Q <= 0.0) or np.any(levels_Q >= 1.0):
        raise DataError(f"got quantile levels {list(levels)}; expected numbers between 0 and 1")
    return actual_N, quantiles_NQ, levels_Q


def _by_level(levels: Sequence[float], values_Q: FloatArray) -> dict[str, float]:
    return {str(level): float(value) for level, value in zip(levels, values_Q, strict=True)}


def _group_numbers(groups_N: npt.ArrayLike) -> tuple[npt.NDArray[np.intp], int]:
    names, group_of_N = np.unique(np.asarray(groups_N), return_inverse=True)
    if not len(names):
        raise DataError("got no rows to resample; expected at least one")
    return group_of_N, len(names)


def _resampled(num_groups: int, num_samples: int, seed: int) -> Iterator[npt.NDArray[np.intp]]:
    """How often each group is drawn, once per sample: G draws with replacement from G groups."""
    rng = np.random.default_rng(seed)
    for _ in range(num_samples):
        yield np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)


def _interval(values: FloatArray) -> list[float]:
    return [float(value) for value in np.percentile(values, INTERVAL_PERCENTILES)]
