"""From measurements to a profile's coefficients, and how far off they are on what they have not seen.

Knows arrays of times; asks no server. Coefficients are non-negative, since nothing makes a step shorter; errors are
relative, since a prompt of 32 tokens matters as much as one of 4,000; and single hiccups of the server weigh little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mope.errors import DataError
from mope.extras import require
from mope.fairness.engine_costs import Load
from mope.fairness.mapper import MetricsMapper
from mope.fairness.profiles import MIN_TIME_S, Errors, FittedProfile
from mope.profiling.sweep import Check, Prefill, Steps

FloatArray = npt.NDArray[np.float64]

PREFILL_TERMS = ("prefill_fixed_s", "prefill_token_s", "prefill_square_s")
STEP_TERMS = ("step_fixed_s", "step_request_s", "step_context_s")
MAX_CONDITION = 300.0  # of the scaled terms: beyond, an error of 1 % in a time is one of several times a coefficient
HUBER = 1.345  # residuals above so many robust standard deviations lose weight (95 % efficiency on normal errors)
MIN_SPREAD = 0.002  # relative; below, residuals are not told from rounding
MAX_ROUNDS = 50


@dataclass(frozen=True)
class Fit:
    """Coefficients with how good they are.

    Attributes:
        coefficients: by name, in seconds.
        errors: relative errors of each measurement by the fit of all other settings.
        predicted_s: times that the fit of all measurements says, in their order.
        measured_s: times that were measured.
    """

    coefficients: dict[str, float]
    errors: Errors
    predicted_s: FloatArray
    measured_s: FloatArray


def fit_prefill(prefills: Sequence[Prefill]) -> Fit:
    """Fit times to the first token as a + b·n + c·n² of the prompt tokens n.

    Raises:
        DataError: the measurements don't tell the terms apart.
    """
    if len({one.setting for one in prefills}) < 4:
        raise DataError(
            f"prompts of {_listed(one.wanted_tokens for one in prefills)} tokens were measured; at least 4 lengths are "
            "needed to tell the terms of a prefill apart, as in --prompt-tokens 32,256,1024,2048"
        )
    tokens = np.array([one.prompt_tokens for one in prefills], np.float64)
    terms = np.stack([np.ones_like(tokens), tokens, tokens**2], axis=1)
    return _fit(PREFILL_TERMS, terms, prefills, "--prompt-tokens further apart")


def fit_steps(steps: Sequence[Steps]) -> Fit:
    """Fit times of decode steps as a + b·B + c·C of running requests B and their tokens of context C.

    Raises:
        DataError: the measurements don't tell the terms apart.
    """
    concurrency, contexts = {one.num_running for one in steps}, {one.wanted_context for one in steps}
    if len(concurrency) < 2 or len(contexts) < 2:
        raise DataError(
            f"decoding was measured with {_listed(concurrency)} requests together and prompts of {_listed(contexts)} "
            "tokens; at least 2 of each are needed to tell apart what a step, a request and a token of context cost, "
            "as in --concurrency 1,4,16 --context-tokens 32,1024"
        )
    num_running = np.array([one.num_running for one in steps], np.float64)
    context = np.array([one.context_tokens for one in steps], np.float64)
    terms = np.stack([np.ones_like(context), num_running, context], axis=1)
    return _fit(STEP_TERMS, terms, steps, "--concurrency and --context-tokens further apart")


def _fit(names: tuple[str, ...], terms_NT: FloatArray, found: Sequence[Prefill | Steps], remedy: str) -> Fit:
    measured_N = np.array([one.seconds for one in found], np.float64)
    relative_NT = terms_NT / measured_N[:, None]
    scaled_NT = relative_NT / np.linalg.norm(relative_NT, axis=0)
    condition = float(np.linalg.cond(scaled_NT))
    if not condition <= MAX_CONDITION:
        raise DataError(
            f"{', '.join(names)} can't be told apart by {len(found)} measurements (condition {condition:,.0f}, at most "
            f"{MAX_CONDITION:g}); measure {remedy}"
        )
    settings = [one.setting for one in found]
    unseen_N = np.empty_like(measured_N)
    for setting in sorted(set(settings)):
        held_out_N = np.array([one == setting for one in settings])
        unseen_N[held_out_N] = terms_NT[held_out_N] @ nonnegative(terms_NT[~held_out_N], measured_N[~held_out_N])
    coefficients_T = nonnegative(terms_NT, measured_N)
    if coefficients_T[0] < MIN_TIME_S:
        raise DataError(
            f"{names[0]} came out as 0 s from {len(found)} measurements, which no server can do: they are too noisy. "
            "Measure while the server and this machine do nothing else, or with more --rounds"
        )
    return Fit(
        dict(zip(names, coefficients_T.tolist(), strict=True)),
        relative_errors(unseen_N, measured_N),
        terms_NT @ coefficients_T,
        measured_N,
    )


def nonnegative(terms_NT: FloatArray, measured_N: FloatArray) -> FloatArray:
    """Non-negative coefficients with the least relative errors, by Huber's loss.

    Iteratively reweighted non-negative least squares (Lawson and Hanson, 1974; Huber, 1964). Rows are divided by the
    measured time, so that residuals are relative; the scale is the median absolute residual.

    Args:
        terms_NT: what each coefficient is multiplied with, N measurements by T terms.
        measured_N: measured times, above 0.

    Returns:
        T coefficients.
    """
    nnls = require("scipy.optimize", "mope profile", "profile").nnls
    relative_NT = terms_NT / measured_N[:, None]
    size_T = np.linalg.norm(relative_NT, axis=0)
    size_T[size_T == 0] = 1.0
    scaled_NT = relative_NT / size_T
    weight_N = np.ones_like(measured_N)
    before_T = np.zeros(terms_NT.shape[1])
    for _ in range(MAX_ROUNDS):
        root_N = np.sqrt(weight_N)
        found_T, _ = nnls(scaled_NT * root_N[:, None], root_N)
        residual_N = np.abs(scaled_NT @ found_T - 1.0)
        if np.allclose(found_T, before_T, rtol=1e-6, atol=1e-12):
            break
        before_T = found_T
        spread = max(1.4826 * float(np.median(residual_N)), MIN_SPREAD)
        weight_N = np.minimum(1.0, HUBER * spread / np.maximum(residual_N, 1e-12))
    return np.asarray(found_T / size_T, np.float64)


def relative_errors(predicted_N: FloatArray, measured_N: FloatArray) -> Errors:
    """Median and 0.9 quantile of |predicted - measured| / measured."""
    error_N = np.abs(predicted_N - measured_N) / measured_N
    median, p90 = np.quantile(error_N, [0.5, 0.9])
    return Errors(num_measurements=len(error_N), median=round(float(median), 4), p90=round(float(p90), 4))


def saturation(steps: Sequence[Steps]) -> tuple[int, float]:
    """Running requests at the highest throughput that was measured, and response tokens per second there.

    The throughput of a setting is the median of its measurements.
    """
    by_setting: dict[tuple[int, ...], list[float]] = {}
    for one in steps:
        by_setting.setdefault(one.setting, []).append(one.num_running / one.seconds)
    best = max(sorted(by_setting), key=lambda setting: float(np.median(by_setting[setting])))
    return best[0], float(np.median(by_setting[best]))


def checked(profile: FittedProfile, checks: Sequence[Check]) -> tuple[Errors | None, FloatArray]:
    """Relative errors of the mapper's latency on requests that no fit has seen, and its latencies in seconds."""
    mapper = MetricsMapper(profile)
    predicted_N = np.array(
        [
            mapper.estimate(one.prompt_tokens, one.response_tokens, Load(one.num_running, one.context_tokens)).latency_s
            for one in checks
        ],
        np.float64,
    )
    measured_N = np.array([one.latency_s for one in checks], np.float64)
    return (relative_errors(predicted_N, measured_N) if checks else None), predicted_N


def _listed(values: object) -> str:
    found = sorted(set(values))  # type: ignore[call-overload]
    return ", ".join(f"{value:,}" for value in found) or "no"
