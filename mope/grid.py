"""The bins of a length distribution, and the arithmetic of distributions over them.

A distribution over response tokens is its cumulative probability at the grid's edges. Between two edges the
cumulative probability is linear in log(tokens). Edges lie at half tokens, so that the bin of the single count
5 is (4.5, 5.5]. Knows numbers only: no network, no request.

Shape suffixes: B rows, N bins, E = N + 1 edges, Q quantile levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mope.errors import ConfigError

Array = npt.NDArray[Any]

FLOOR = 0.5  # the lowest edge: an answer has at least one token


def body_edges(top: int, num_bins: int) -> Array:
    """Log-spaced edges from half a token to `top` + 0.5.

    Args:
        top: the largest response length of the body, in tokens (training uses the 99th percentile).
        num_bins: bins asked for; fewer result where log-spacing would fall below one token.

    Returns:
        Increasing half-integer edges, shape (E,).
    """
    if top < 2:
        raise ConfigError(f"the 99th percentile of response lengths is {top} tokens; bins need at least 2")
    return np.concatenate([[FLOOR], np.unique(np.round(np.geomspace(1, top, num_bins))) + 0.5])


def tail_edges(start: float, top: int, num_bins: int) -> Array:
    """Log-spaced edges above `start` (an edge of the body) up to `top` + 0.5, shape (num_bins,)."""
    top_edge = max(top + 0.5, 2 * start)
    return np.geomspace(start, top_edge, num_bins + 1)[1:]


def pareto_tail(
    lengths: Array, censored: Array, start: float, *, prior_index: float = 1.0, prior_count: float = 20.0
) -> float:
    """The Pareto index of the lengths above `start`, shrunk towards a heavy tail where few were seen.

    Maximum likelihood (Hill's estimator, with censored lengths counted in exposure alone): index =
    (answers above start that ended + n0) / (sum of log(length / start) + n0 / prior_index).

    Args:
        lengths: response tokens, shape (rows,).
        censored: True where the answer hit a cap, shape (rows,).
        start: where the tail begins, in tokens.
        prior_index: index assumed before any answer is seen; 1 has an infinite mean, hence is cautious.
        prior_count: how many answers the prior is worth.
    """
    above = lengths > start
    exposure = float(np.log(lengths[above] / start).sum())
    ended = float((above & ~censored).sum())
    return (ended + prior_count) / (exposure + prior_count / prior_index)


def tail_shares(start: float, edges: Array, index: float) -> Array:
    """Share of the tail's mass in each tail bin under a Pareto law cut at the last edge; sums to 1."""
    survival = np.concatenate([[1.0], (np.asarray(edges) / start) ** -index])
    shares = -np.diff(survival)
    return np.asarray(shares / shares.sum())


def cdf_at(edges_E: Array, cdf_BE: Array, tokens_B: Array) -> Array:
    """P(length <= tokens) per row, shape (B,). O(B N)."""
    tokens = np.asarray(tokens_B, dtype=np.float64)
    x = np.log(np.minimum(np.maximum(tokens, edges_E[0]), edges_E[-1]))
    log_edges = np.log(edges_E)
    right = np.minimum(np.maximum(np.searchsorted(log_edges, x, side="left"), 1), len(edges_E) - 1)
    rows = np.arange(len(cdf_BE))
    low, high = cdf_BE[rows, right - 1], cdf_BE[rows, right]
    share = (x - log_edges[right - 1]) / (log_edges[right] - log_edges[right - 1])
    return np.asarray(low + (high - low) * share)


def quantiles_at(edges_E: Array, cdf_BE: Array, levels_BQ: Array) -> Array:
    """Quantiles in tokens, shape (B, Q), non-decreasing in the level. O(B Q N).

    Args:
        edges_E: the grid's edges in tokens.
        cdf_BE: cumulative probability at the edges, from 0 to 1 in each row.
        levels_BQ: probabilities in [0, 1], shape (B, Q) or (Q,).
    """
    levels = np.asarray(levels_BQ, dtype=np.float64)
    if levels.ndim == 1 or len(levels) != len(cdf_BE):
        levels = np.broadcast_to(levels, (len(cdf_BE), levels.shape[-1]))
    right = np.minimum(np.maximum((cdf_BE[:, None, :] < levels[:, :, None]).sum(-1), 1), len(edges_E) - 1)
    rows = np.arange(len(cdf_BE))[:, None]
    low, high = cdf_BE[rows, right - 1], cdf_BE[rows, right]
    share = np.minimum(np.maximum((levels - low) / np.maximum(high - low, 1e-12), 0.0), 1.0)
    log_edges = np.log(edges_E)
    return np.asarray(np.exp(log_edges[right - 1] + share * (log_edges[right] - log_edges[right - 1])))


def survival_integral(edges_E: Array, cdf_BE: Array, start_B: Array, end_B: Array) -> Array:
    """Integral of P(length > t) over t from `start` to `end`, per row, shape (B,). O(B N).

    From 0 to infinity this is the mean; E[min(length, cap)] is the integral up to the cap.
    """
    start = np.asarray(start_B, dtype=np.float64)
    end = np.maximum(np.asarray(end_B, dtype=np.float64), start)
    a, b = edges_E[:-1], edges_E[1:]
    width = np.log(b / a)
    share = (b * (width - 1) + a) / width  # integral of log(t / a) / width over a whole bin
    whole_BN = (b - a) - cdf_BE[:, :-1] * (b - a - share) - cdf_BE[:, 1:] * share
    to_edge_BE = np.zeros(cdf_BE.shape)
    np.cumsum(whole_BN, axis=1, out=to_edge_BE[:, 1:])
    rows = np.arange(len(cdf_BE))

    def from_zero(t_B: Array) -> Array:
        t = np.minimum(np.maximum(t_B, edges_E[0]), edges_E[-1])
        n = np.maximum(np.searchsorted(edges_E, t, side="left"), 1) - 1
        low, high = cdf_BE[rows, n], cdf_BE[rows, n + 1]
        part = (t - a[n]) * (1 - low) - (high - low) * (t * (np.log(t / a[n]) - 1) + a[n]) / width[n]
        return np.asarray(np.minimum(t_B, edges_E[0]) + to_edge_BE[rows, n] + part)

    return np.asarray(from_zero(end) - from_zero(start))
