"""Fits which share of a response are thoughts: by LLM, family and prompt.

Learns from rows whose thoughts are known. Minimises the absolute error of the visible tokens, smoothed around 0.

Shape suffixes: R rows, F numbers, C coefficients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from mope.grid import Array
from mope.target_llm import describe
from mope.thoughts import MOST_DEVIATIONS, PROMPT_NUMBERS, ThoughtsModel
from mope.training.data.table import RowTable

MIN_ROWS = 100  # with thoughts that a model is fitted on
MAX_ROWS = 100_000  # of them that are used, evenly spaced: some ten seconds and 200 MB
MIN_LLM_ROWS = 5  # of an LLM with known thoughts, before it counts as one without
# Weights of the penalties, in tokens of error. Chosen on validation rows: of numbers from 1 to 300 times that of LLMs.
LLM_PENALTY, NUMBER_PENALTY = 100.0, 100_000.0
SET_POWER = 0.25  # of a set's number of rows: what it weighs in all
SMOOTH_TOKENS = 20.0  # below which the error counts by its square


def fit_thoughts(
    llms: Sequence[str],
    total_R: Array,
    thoughts_R: Array,
    numbers_RF: Array,
    names: Sequence[str],
    sets: Sequence[str] | None = None,
) -> ThoughtsModel | None:
    """A model of the share of thoughts; None if too few rows have any.

    Args:
        llms: name of each row's LLM, as the data has it; empty if unknown.
        total_R: response tokens, thoughts included.
        thoughts_R: how many of them are thoughts; NaN where that is not known.
        numbers_RF: numbers of the requests.
        names: of the numbers, in order.
        sets: the data set of each row: a set of more rows weighs more, but not as much more. None: all are of one.
    """
    read = {name: describe(name) for name in set(llms)}
    canonical_R = np.array([read[name].name for name in llms], dtype=object)
    is_known_R = ~np.isnan(thoughts_R) & (total_R > 0)
    has_thoughts_R = is_known_R & (thoughts_R > 0)
    num_known, num_thinking = Counter(canonical_R[is_known_R]), Counter(canonical_R[has_thoughts_R])
    thinkers = {name for name, count in num_thinking.items() if name and 2 * count >= num_known[name]}
    without = {name for name, count in num_known.items() if name and count >= MIN_LLM_ROWS and name not in thinkers}
    rows = np.flatnonzero(has_thoughts_R)
    if len(rows) < MIN_ROWS:
        return None
    rows = rows[:: -(-len(rows) // MAX_ROWS)]

    columns = [list(names).index(name) for name in PROMPT_NUMBERS if name in names]
    numbers_RF = numbers_RF[rows][:, columns].astype(np.float64)
    deviation_F = numbers_RF.std(axis=0)
    varies = deviation_F > 1e-4
    numbers_RF, kept = (
        numbers_RF[:, varies],
        [names[column] for column, own in zip(columns, varies, strict=True) if own],
    )
    mean_F, scale_F = numbers_RF.mean(axis=0), 1.0 / deviation_F[varies]
    known_llms = sorted(thinkers)
    families = sorted({read_family for name in known_llms if (read_family := describe(name).family)})
    family_R = np.array([describe(name).family for name in canonical_R[rows]], dtype=object)
    design_RC = np.column_stack(
        [
            np.ones(len(rows)),
            *(family_R == family for family in families),
            *(canonical_R[rows] == name for name in known_llms),
            np.clip((numbers_RF - mean_F) * scale_F, -MOST_DEVIATIONS, MOST_DEVIATIONS),
        ]
    ).astype(np.float64)
    num_llms = len(families) + len(known_llms)
    penalty_C = np.array([0.0, *[LLM_PENALTY] * num_llms, *[NUMBER_PENALTY] * len(kept)])
    weight_R = np.ones(len(rows))
    if sets is not None:
        set_R = np.array(sets, dtype=object)[rows]
        sizes = Counter(set_R)
        weight_R = np.array([sizes[name] ** (SET_POWER - 1.0) for name in set_R])
        weight_R *= len(rows) / weight_R.sum()
    found_C = _fit(
        design_RC, total_R[rows].astype(np.float64), thoughts_R[rows].astype(np.float64), weight_R, penalty_C
    )

    of_family = dict(zip(families, found_C[1:], strict=False))
    of_llm = dict(zip(known_llms, found_C[1 + len(families) :], strict=False))
    odds = {name: of_family.get(describe(name).family or "", 0.0) + own for name, own in of_llm.items()}
    return ThoughtsModel(
        bias=_rounded(found_C[0]),
        llms={name: _rounded(odds[name]) if name in odds else None for name in sorted({*odds, *without})},
        families={family: _rounded(own) for family, own in of_family.items()},
        number_names=tuple(kept),
        number_mean=tuple(map(_rounded, mean_F)),
        number_scale=tuple(map(_rounded, scale_F)),
        weights=tuple(map(_rounded, found_C[1 + num_llms :])),
    )


def thoughts_of(rows: RowTable, numbers_RF: Array, names: Sequence[str]) -> ThoughtsModel | None:
    """`fit_thoughts` of the rows of a table that were not cut and whose LLM was not asked not to think.

    Args:
        rows: training rows.
        numbers_RF: their numbers.
        names: of the numbers, in order.
    """
    asked_not_to = np.array([said is False for said in rows.table["thinking"].to_pylist()], dtype=bool)
    chosen = np.flatnonzero(~rows.censored & ~asked_not_to)
    taken = rows.take(chosen)
    thoughts_R = np.array([np.nan if own is None else own for own in taken.table["thought_tokens"].to_pylist()], float)
    return fit_thoughts(
        taken.strings("target_llm"),
        taken.response_tokens,
        thoughts_R,
        numbers_RF[chosen],
        names,
        taken.strings("dataset"),
    )


def _fit(design_RC: Array, total_R: Array, thoughts_R: Array, weight_R: Array, penalty_C: Array) -> Array:
    """Coefficients of the log odds of a visible token."""
    visible_R = total_R - thoughts_R

    def loss(coefficients_C: Array) -> tuple[float, Array]:
        share_R = expit(design_RC @ coefficients_C)
        error_R = total_R * share_R - visible_R
        smooth_R = np.sqrt(error_R**2 + SMOOTH_TOKENS**2)
        slope_R = weight_R * error_R / smooth_R * total_R * share_R * (1.0 - share_R)
        penalty = float(penalty_C @ coefficients_C**2)
        return float(weight_R @ smooth_R) + penalty, design_RC.T @ slope_R + 2.0 * penalty_C * coefficients_C

    found: Any = minimize(loss, np.zeros(design_RC.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return np.asarray(found.x)


def _rounded(number: float) -> float:
    return round(float(number), 5)
