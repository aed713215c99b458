"""The pictures of a measured server: the fit beside the measurements, and what it leaves unexplained.

Knows measurements and fits; asks no server. Imports matplotlib, which is optional. Times are in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mope.fairness.profiles import Errors, FittedProfile
from mope.figures import MOPE_BLUE, OTHERS, figure_to
from mope.profiling.fit import Fit, FloatArray
from mope.profiling.sweep import Check, Prefill, Steps

BAND = 0.1  # relative error that is shaded, to judge the others by


def fit_plot(profile: FittedProfile, prefills: Sequence[Prefill], steps: Sequence[Steps], path: Path) -> None:
    """Measured times with the lines that the profile says: prefill by prompt, step by requests that decode together.

    Args:
        profile: what was fitted.
        prefills: measured first tokens.
        steps: measured steps.
        path: PNG to write.
    """
    costs = profile.costs()
    with figure_to(path, 9.5, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        tokens = np.array([one.prompt_tokens for one in prefills], np.float64)
        left.plot(
            tokens, [1e3 * one.seconds for one in prefills], "o", color=MOPE_BLUE, markersize=4, alpha=0.6,
            markeredgewidth=0, label=f"measured, {len(prefills)} prompts",
        )  # fmt: skip
        line = np.linspace(tokens.min(), tokens.max(), 200)
        left.plot(line, [1e3 * costs.prefill_s(float(n)) for n in line], color="#333333", linewidth=1.2, label="fit")
        left.set(
            xlabel="prompt tokens", ylabel="milliseconds", ylim=(0, None), title="Time to the first token, idle server"
        )
        left.legend(loc="upper left")
        for index, wanted in enumerate(sorted({one.wanted_context for one in steps})):
            these = [one for one in steps if one.wanted_context == wanted]
            colour = (MOPE_BLUE, *OTHERS)[index % (len(OTHERS) + 1)]
            each = float(np.mean([one.context_tokens / one.num_running for one in these]))
            right.plot(
                [one.num_running for one in these], [1e3 * one.seconds for one in these], "o", color=colour,
                markersize=4, alpha=0.6, markeredgewidth=0, label=f"{each:,.0f} tokens of context each",
            )  # fmt: skip
            most = max(one.num_running for one in these)
            right.plot(
                [1, most], [1e3 * costs.step_s(num, num * each) for num in (1, most)], color=colour, linewidth=1.2
            )
        right.set_xticks(sorted({one.num_running for one in steps}))
        right.set(
            xlabel="requests that decode together", ylabel="milliseconds", ylim=(0, None),
            title="Time of a decode step (lines: fit)",
        )  # fmt: skip
        right.legend(loc="upper left")


def residual_plot(
    prefill: Fit, step: Fit, checks: Sequence[Check], checked_N: FloatArray, profile: FittedProfile, path: Path
) -> None:
    """Relative residuals of both fits, and latencies of checks as the mapper says them against the measured ones.

    Args:
        prefill: fit of the times to the first token.
        step: fit of the times of a step.
        checks: requests beside others, which no fit has seen.
        checked_N: the mapper's latencies of them, in seconds.
        profile: with the errors that the titles state.
        path: PNG to write.
    """
    errors = profile.measured
    with figure_to(path, 12.0, 4.0) as figure:
        panels = figure.subplots(1, 3)
        _residuals(panels[0], prefill, f"First token: {_stated(errors.prefill_errors)}")
        _residuals(panels[1], step, f"Decode step: {_stated(errors.step_errors)}")
        axes = panels[2]
        if checks:
            measured = 1e3 * np.array([one.latency_s for one in checks])
            predicted = 1e3 * checked_N
            limits = (0.8 * min(measured.min(), predicted.min()), 1.25 * max(measured.max(), predicted.max()))
            axes.plot(limits, limits, color="#333333", linewidth=1.0)
            axes.fill_between(
                limits, [(1 - BAND) * x for x in limits], [(1 + BAND) * x for x in limits], color="#e4e4e4", linewidth=0
            )
            axes.plot(measured, predicted, "o", color=MOPE_BLUE, markersize=4, markeredgewidth=0)
            axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
            _milliseconds(axes.xaxis)
            _milliseconds(axes.yaxis)
        stated = _stated(errors.latency_errors) if errors.latency_errors else "not checked"
        axes.set(
            xlabel="measured milliseconds", ylabel="predicted milliseconds", title=f"Latency beside others: {stated}"
        )


def _residuals(axes: Any, fit: Fit, title: str) -> None:
    residual = 100 * (fit.predicted_s - fit.measured_s) / fit.measured_s
    axes.axhspan(-100 * BAND, 100 * BAND, color="#e4e4e4", linewidth=0)
    axes.axhline(0.0, color="#333333", linewidth=1.0)
    axes.plot(1e3 * fit.measured_s, residual, "o", color=MOPE_BLUE, markersize=4, alpha=0.6, markeredgewidth=0)
    reach = 1.1 * max(100 * BAND, float(np.abs(residual).max()))
    axes.set(xscale="log", ylim=(-reach, reach), xlabel="measured milliseconds", title=title)
    axes.set_ylabel("fitted minus measured, % of measured")
    _milliseconds(axes.xaxis)


def _milliseconds(axis: Any) -> None:
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _stated(errors: Errors) -> str:
    return f"median {100 * errors.median:.1f} % off"
