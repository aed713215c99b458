"""The picture of a benchmark: how latency is spread, for each subject.

Knows arrays of milliseconds; does not know predictors. Imports matplotlib, which is optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mope.bench.report import three_digits
from mope.figures import MOPE_BLUE, OTHERS, figure_to
from mope.grid import Array

PANELS = ("wall time", "processor time")


def latency_plot(times: Mapping[str, tuple[Array, Array]], path: Path, *, goal_ms: float | None = None) -> None:
    """Share of calls that took at most so many milliseconds, with p50 and p99 marked.

    Args:
        times: wall and processor milliseconds of all calls, of any shape, by subject.
        path: PNG to write.
        goal_ms: where to draw a line, if anywhere.
    """
    colours = (MOPE_BLUE, *OTHERS)
    every = np.concatenate([np.ravel(array) for pair in times.values() for array in pair])
    every = np.append(every[every > 0], goal_ms or [])  # a coarse clock may say 0, which has no place on a log scale
    low, high = every.min(), every.max()
    with figure_to(path, 9.5, 4.0 + 0.2 * len(times)) as figure:
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for column, (axes, panel) in enumerate(zip(panels, PANELS, strict=True)):
            for index, (name, pair) in enumerate(times.items()):
                sorted_ms = np.sort(np.ravel(pair[column]))
                colour = colours[index % len(colours)]
                p50, p99 = np.quantile(sorted_ms, [0.5, 0.99])
                axes.step(
                    np.append(sorted_ms[0], sorted_ms), np.linspace(0, 1, len(sorted_ms) + 1), where="post",
                    color=colour, linewidth=1.6,
                    label=f"{name}: p50 {three_digits(p50)} ms, p99 {three_digits(p99)} ms",
                )  # fmt: skip
                axes.plot([p50, p99], [0.5, 0.99], "o", color=colour, markersize=5, markeredgecolor="white", zorder=3)
            if goal_ms is not None:
                axes.axvline(goal_ms, color="#333333", linewidth=1.0, linestyle="--", label=f"goal {goal_ms:g} ms")
            axes.set(xscale="log", xlim=(low * 0.8, high * 1.25), ylim=(0, 1.02), title=f"{panel} of one request")
            axes.set_xlabel("milliseconds, log scale (dots: p50 and p99)")
            axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
            axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.16))
        panels[0].set_ylabel("share of calls that took at most this long")
