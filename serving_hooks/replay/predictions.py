"""What the scheduler is told of each answer's length: nothing, the truth, or what a predictor of a given quality says.

Knows true lengths, which is why it is apart from everything that schedules. The errors are made up; their size is not:
it is that of the packaged predictors on ShareGPT's test split.

The model: natural logarithms of true and predicted lengths are jointly normal with correlation r, as Kendall's tau
says it, r = sin(pi tau / 2), and the predictor has learned what lengths are usual, m and s (`CHAT_RESPONSE`). So of a
true length t it says, as its median,

    ln median = m + r^2 (ln t - m) + r sqrt(1 - r^2) s z        z standard normal

and what it leaves unsaid is lognormal with sigma = s sqrt(1 - r^2), as it knows itself: its mean is median
exp(sigma^2 / 2). With tau = 0.554 and s = 0.75, r is 0.764 and sigma 0.48; on lengths like ShareGPT's its median is
wrong by 104 tokens on average, where chat-small, whose tau this is, is wrong by 96 (first turns: 0.456, r 0.657, sigma
0.57, 119 against 120; model_cards/results/2026-11-26-chat-small-pieces). On lengths unlike ShareGPT's it leans towards
ShareGPT's, as a predictor does that nobody has recalibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, pi, sin, sqrt
from typing import Literal

import numpy as np

from mope.serving_hooks.replay.workloads import CHAT_RESPONSE, Arrival

Prediction = Literal["none", "oracle", "noisy"]
PACKAGED_TAU = 0.554  # chat-small, all turns of ShareGPT's test split
STREAM = 7919  # of the generator, apart from the workload's


def residual_sigma(tau: float) -> float:
    """Standard deviation of ln(true / predicted median) that a predictor of this tau leaves."""
    return CHAT_RESPONSE.spread * sqrt(1.0 - _correlation(tau) ** 2)


def predict(
    arrivals: Sequence[Arrival], prediction: Prediction, *, seed: int, cap: int, tau: float = PACKAGED_TAU
) -> list[float | None]:
    """Expected response tokens of each request, as a front end would send them; None where it sends none.

    Args:
        arrivals: the requests, with their true lengths.
        prediction: `none`, `oracle` for the truth, `noisy` for the model at the head of this module.
        seed: of the errors; the same for every policy, so that policies are compared on the same predictions.
        cap: max_tokens of every request; nobody predicts more.
        tau: Kendall's tau of the noisy predictor, from 0 to 1.
    """
    if prediction == "none":
        return [None] * len(arrivals)
    if prediction == "oracle":
        return [float(min(arrival.response_tokens, cap)) for arrival in arrivals]
    usual, spread, correlation = log(CHAT_RESPONSE.median), CHAT_RESPONSE.spread, _correlation(tau)
    noise = correlation * sqrt(1.0 - correlation**2) * spread
    mean_of_median = exp(residual_sigma(tau) ** 2 / 2)
    errors = np.random.default_rng([seed, STREAM]).standard_normal(len(arrivals))
    medians = [
        exp(usual + correlation**2 * (log(arrival.response_tokens) - usual) + noise * float(error))
        for arrival, error in zip(arrivals, errors, strict=True)
    ]
    return [min(max(1.0, median * mean_of_median), float(cap)) for median in medians]


def _correlation(tau: float) -> float:
    return sin(pi * tau / 2)
