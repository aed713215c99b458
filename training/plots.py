"""The pictures of an evaluation, one function and one PNG each.

Knows arrays and the shapes of `metrics.json`; does not know predictors, rows or the artifact folder.
Titles say what is measured and in which units; MoPE is always blue, whatever it is compared with is not.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mope.errors import DataError
from mope.figures import MOPE_BLUE, OTHERS, figure_to

FloatArray = npt.NDArray[np.float64]

ORANGE = "#d9772b"
GREY = "#8a8f98"
MAX_RIVALS = 4  # lines beside MoPE's that can still be told apart
MAX_STRIPS = 8  # LLMs in one picture


def predicted_vs_true(
    actual_N: npt.ArrayLike,
    predicted_N: npt.ArrayLike,
    path: Path,
    *,
    low_N: npt.ArrayLike | None = None,
    high_N: npt.ArrayLike | None = None,
) -> None:
    """Density of predicted against true lengths, both axes in tokens on a log scale.

    Args:
        actual_N: true lengths.
        predicted_N: predicted lengths (medians).
        path: PNG to write.
        low_N: 10 % quantile of each prediction; drawn with `high_N` as a band of its median per predicted length.
        high_N: 90 % quantile of each prediction.
    """
    actual = np.maximum(np.asarray(actual_N, dtype=np.float64), 1.0)
    predicted = np.maximum(np.asarray(predicted_N, dtype=np.float64), 1.0)
    _some_rows(actual)
    with figure_to(path, 5.6, 5.0) as figure:
        axes = figure.subplots()
        limits = _log_limits(np.concatenate([actual, predicted]))
        bins = axes.hexbin(
            predicted, actual, gridsize=45, xscale="log", yscale="log", mincnt=1, cmap="Blues",
            norm=LogNorm(vmin=0.5), linewidths=0.1, extent=(*np.log10(limits), *np.log10(limits)),
        )  # fmt: skip
        axes.plot(limits, limits, color="#333333", linewidth=1.0, label="true = predicted")
        if low_N is not None and high_N is not None:
            centre, low, high = _band(predicted, np.asarray(low_N, np.float64), np.asarray(high_N, np.float64))
            axes.plot(centre, low, color=ORANGE, linewidth=1.4, label="predicted 10 % and 90 % quantiles")
            axes.plot(centre, high, color=ORANGE, linewidth=1.4)
        axes.set(
            xlim=limits, ylim=limits, xlabel="predicted response tokens (median)", ylabel="true response tokens",
            title=f"True against predicted response tokens, {len(actual):,} test rows",
        )  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            _token_ticks(axis)
        axes.legend(loc="upper left")
        bar = figure.colorbar(bins, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("rows per cell")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.outline.set_visible(False)


def calibration_curve(
    levels_Q: Sequence[float], coverage_Q: Sequence[float], num_rows: int, path: Path, *, label: str = "MoPE"
) -> None:
    """Share of rows below each predicted quantile against the share that the quantile states.

    Args:
        levels_Q: stated shares, between 0 and 1; many levels give a curve, four give four points.
        coverage_Q: observed shares.
        num_rows: rows they were observed on; sets the 95 % binomial band around perfect calibration.
        path: PNG to write.
        label: whose quantiles these are.
    """
    order = np.argsort(levels_Q)
    levels, coverage = np.asarray(levels_Q, np.float64)[order], np.asarray(coverage_Q, np.float64)[order]
    _some_rows(levels)
    with figure_to(path, 5.0, 4.6) as figure:
        axes = figure.subplots()
        grid = np.linspace(0.0, 1.0, 201)
        half_width = 1.96 * np.sqrt(grid * (1.0 - grid) / num_rows)
        axes.fill_between(
            grid, grid - half_width, grid + half_width, color="#cccccc", linewidth=0,
            label=f"95 % binomial band, {num_rows:,} rows",
        )  # fmt: skip
        axes.plot([0, 1], [0, 1], color="#555555", linewidth=0.8, linestyle="--", label="perfectly calibrated")
        axes.plot(levels, coverage, color=MOPE_BLUE, marker="o", markersize=4, linewidth=1.4, label=label)
        worst = int(np.argmax(np.abs(coverage - levels)))
        axes.set(
            xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="stated share (quantile level)",
            ylabel="observed share of true lengths below",
            title=f"Calibration of quantiles: at most {100 * abs(coverage[worst] - levels[worst]):.1f} points off",
        )  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.legend(loc="upper left")


def error_by_length(
    actual_N: npt.ArrayLike,
    predictions: Mapping[str, npt.ArrayLike],
    path: Path,
    *,
    edges: Sequence[float] | None = None,
) -> None:
    """MAE and bias of several predictors by true length, in tokens.

    Args:
        actual_N: true lengths.
        predictions: predicted lengths by predictor; the first is drawn as MoPE, of the others the
            `MAX_RIVALS` with the lowest MAE.
        path: PNG to write.
        edges: inner borders of the buckets; deciles of the true lengths if None.
    """
    actual = np.asarray(actual_N, dtype=np.float64)
    _some_rows(actual)
    first, *others = predictions
    others.sort(key=lambda name: float(np.abs(np.asarray(predictions[name], np.float64) - actual).mean()))
    shown = [first, *others[:MAX_RIVALS]]
    if edges is None:
        edges = np.unique(np.quantile(actual, np.arange(0.1, 1.0, 0.1))).tolist()
    bucket_N = np.searchsorted(np.asarray(edges), actual, side="right")
    buckets = np.unique(bucket_N)
    borders = [actual.min(), *edges, actual.max() + 1]
    names = [f"{borders[bucket]:.0f}-{max(borders[bucket + 1] - 1, borders[bucket]):.0f}" for bucket in buckets]
    with figure_to(path, 8.0, 5.6) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for index, name in enumerate(shown):
            error_N = np.asarray(predictions[name], np.float64) - actual
            line = _line_style(index)
            mae = [np.abs(error_N[bucket_N == bucket]).mean() for bucket in buckets]
            upper.plot(range(len(buckets)), mae, label=_shown(name), **line)
            lower.plot(range(len(buckets)), [error_N[bucket_N == bucket].mean() for bucket in buckets], **line)
        lower.axhline(0.0, color="#555555", linewidth=0.8)
        upper.margins(y=0.25)  # room for the legend
        upper.set(ylabel="MAE (tokens)", ylim=(0, None), title="Mean absolute error by true response length (tokens)")
        lower.set(
            ylabel="bias (tokens)", xlabel="true response tokens",
            title="Bias, predicted minus true: above zero is too long (tokens)",
        )  # fmt: skip
        lower.set_xticks(range(len(buckets)), names)
        upper.legend(ncols=min(4, len(shown)), loc="upper left")


def router_confusion(confusion: npt.ArrayLike, expert_names: Sequence[str], path: Path) -> None:
    """Which expert the router chose for the rows of each true bucket: row shares, with counts.

    Args:
        confusion: counts, shape (true buckets, chosen experts).
        expert_names: one per expert, for example its range of tokens.
        path: PNG to write.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    size = len(expert_names)
    if counts.shape != (size, size):
        raise DataError(f"got a confusion matrix of shape {counts.shape}; expected ({size}, {size}), one per expert")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    accuracy = np.trace(counts) / max(counts.sum(), 1.0)
    with figure_to(path, 2.4 + 0.95 * size, 2.0 + 0.8 * size, **{"axes.grid": False}) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        for row, column in np.ndindex(size, size):
            axes.text(
                column, row, f"{100 * shares[row, column]:.0f} %\n{counts[row, column]:,.0f}", ha="center", va="center",
                color="white" if shares[row, column] > 0.55 else "#222222", fontsize=8,
            )  # fmt: skip
        axes.set_xticks(range(size), expert_names)
        axes.set_yticks(range(size), expert_names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="expert chosen (tokens)", ylabel="true bucket (tokens)")
        axes.set_title(f"Router: {100 * accuracy:.1f} % of {counts.sum():,.0f} rows in the true bucket", fontsize=9)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.03)
        bar.set_label("share of the true bucket")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        bar.outline.set_visible(False)


def training_curves(log: Path, path: Path, *, title: str = "Loss against optimizer steps") -> None:
    """Training and validation loss against optimizer steps, from Lightning's `metrics.csv`.

    Args:
        log: the CSV log; every column whose name holds "loss" and that has numbers is drawn, those of training
            thin and smoothed, the others with their lowest point.
        path: PNG to write.
        title: what was trained.

    Raises:
        DataError: the log has no step column or no loss in it.
    """
    curves = _loss_curves(log)
    with figure_to(path, 6.4, 4.0) as figure:
        axes = figure.subplots()
        colours = itertools.cycle((MOPE_BLUE, *OTHERS))
        for name, (steps, losses) in sorted(curves.items()):
            if name.startswith("train"):
                axes.plot(steps, losses, color=GREY, linewidth=0.5, alpha=0.35)
                axes.plot(steps, _smoothed(losses), color=GREY, linewidth=1.6, label=_shown(name))
            else:
                colour = next(colours)
                axes.plot(steps, losses, color=colour, marker="o", markersize=4, linewidth=1.4, label=_shown(name))
                best = int(np.argmin(losses))
                axes.annotate(
                    f"{losses[best]:.3f}", (float(steps[best]), float(losses[best])), color=colour, fontsize=8,
                    textcoords="offset points", xytext=(0, 6), ha="center",
                )  # fmt: skip
        every_loss = np.concatenate([losses for _, losses in curves.values()])
        low, high = np.quantile(every_loss, [0.0, 0.99])
        margin = 0.08 * (high - low) or 0.1
        axes.set(
            xlabel="optimizer steps", ylabel="loss", ylim=(low - 1.5 * margin, high + margin),
            title=title,
        )  # fmt: skip
        axes.legend(loc="upper right")


def baselines_bar(results: Mapping[str, Mapping[str, Any]], path: Path, *, title: str = "test rows") -> None:
    """MAE of each predictor with its 95 % bootstrap interval, the best on top, the oracle-routed number below all.

    Args:
        results: `metrics["test"][part]`: a dictionary with `mae` and, if known, `mae_ci` by predictor. The
            oracle-routed number is drawn hollow, as no server can reach it.
        path: PNG to write.
        title: what the rows are, for example `"first turns, 911 test rows"`.
    """
    if not results:
        raise DataError("got no predictors to draw; expected at least one with a MAE")
    names = sorted(results, key=lambda name: (name != "mope_oracle_routed", -float(results[name]["mae"])))
    with figure_to(path, 7.0, 1.4 + 0.34 * len(names), **{"axes.grid.axis": "x"}) as figure:
        axes = figure.subplots()
        for row, name in enumerate(names):
            mae = float(results[name]["mae"])
            low, high = results[name].get("mae_ci", (mae, mae))
            colour = MOPE_BLUE if name.startswith("mope") else "#b9bdc4"
            hollow = name == "mope_oracle_routed"
            axes.barh(row, mae, height=0.62, color="white" if hollow else colour, edgecolor=colour, linewidth=1.0)
            axes.plot([low, high], [row, row], color="#222222", linewidth=1.2)
            axes.annotate(f"{mae:.1f}", (high, row), fontsize=8, va="center", textcoords="offset points", xytext=(4, 0))
        axes.set_yticks(range(len(names)), [_shown(name) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.08)
        axes.set(xlabel="MAE (tokens), with 95 % bootstrap interval", xlim=(0, None))
        axes.set_title(f"Mean absolute error, {title}")


def response_tokens_by_llm(
    names: Sequence[str], llm_R: npt.NDArray[np.int64], tokens_R: npt.ArrayLike, cut_R: npt.ArrayLike, path: Path
) -> None:
    """Distribution of response tokens, one strip for all rows and one for each of the largest LLMs, log axis.

    Args:
        names: LLMs by number of rows, most first.
        llm_R: position of each row's LLM in `names`.
        tokens_R: response tokens.
        cut_R: True where the answer was cut off; drawn on top of the whole answers.
        path: PNG to write.
    """
    tokens, cut = np.maximum(np.asarray(tokens_R, np.float64), 1.0), np.asarray(cut_R, bool)
    _some_rows(tokens)
    strips: list[tuple[str, npt.NDArray[np.bool_]]] = [("all rows", np.ones(len(tokens), bool))]
    if len(names) > 1:
        strips += [(name, llm_R == number) for number, name in enumerate(names[:MAX_STRIPS])]
    limits = _log_limits(tokens)
    edges = np.geomspace(*limits, 61)
    with figure_to(path, 7.0, 1.2 + 0.85 * len(strips)) as figure:
        all_axes = np.atleast_1d(figure.subplots(len(strips), 1, sharex=True))
        for axes, (name, here_R) in zip(all_axes, strips, strict=True):
            whole, cut_off = (np.histogram(tokens[here_R & mask], edges)[0] / here_R.sum() for mask in (~cut, cut))
            axes.stairs(whole, edges, fill=True, color=MOPE_BLUE, label="whole answers")
            axes.stairs(whole + cut_off, edges, baseline=whole, fill=True, color=ORANGE, label="cut off")
            axes.axvline(float(np.median(tokens[here_R])), color="#333333", linewidth=1.0, label="median")
            axes.set(xscale="log", xlim=limits, yticks=[])
            axes.spines["left"].set_visible(False)
            axes.text(
                0.0, 1.0, f"{_one_line(name)}: {here_R.sum():,} rows, median {np.median(tokens[here_R]):,.0f}, "
                f"{cut[here_R].mean():.0%} cut off",
                transform=axes.transAxes, fontsize=8, va="bottom",
            )  # fmt: skip
        _token_ticks(all_axes[-1].xaxis)
        all_axes[-1].set_xlabel("response tokens")
        all_axes[0].legend(loc="upper left")
        figure.suptitle(f"Response tokens of {len(tokens):,} rows", x=0.01, ha="left", fontsize=10, fontweight="bold")


def _some_rows(values: FloatArray) -> None:
    if not values.size:
        raise DataError("got no rows to draw; expected at least one")


def _one_line(name: str) -> str:
    """A name that users gave, cut to the width of a picture; a dollar would begin a formula."""
    return (name if len(name) <= 40 else name[:37] + "...").replace("$", r"\$")


def _shown(name: str) -> str:
    shown = {"mope": "MoPE", "mope_oracle_routed": "MoPE, oracle-routed", "tfidf_ridge": "TF-IDF ridge"}
    return shown.get(name, name.replace("_gbm", " GBM").replace("_", " "))


def _line_style(index: int) -> dict[str, Any]:
    if index == 0:
        return {"color": MOPE_BLUE, "linewidth": 2.2, "marker": "o", "markersize": 4, "zorder": 3}
    return {"color": OTHERS[(index - 1) % len(OTHERS)], "linewidth": 1.2, "marker": ".", "markersize": 4}


def _log_limits(values: FloatArray) -> tuple[float, float]:
    return max(0.8, float(values.min()) * 0.8), max(10.0, float(values.max()) * 1.25)


def _token_ticks(axis: Any) -> None:
    axis.set_major_locator(LogLocator(10))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def _band(predicted: FloatArray, low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Medians of prediction and of its quantiles, in up to 15 groups of equal size by predicted length."""
    groups = np.array_split(np.argsort(predicted, kind="stable"), min(15, len(predicted)))
    medians = [[np.median(values[rows]) for rows in groups] for values in (predicted, low, high)]
    centre, low_band, high_band = (np.maximum(np.array(values), 1.0) for values in medians)
    return centre, low_band, high_band


def _smoothed(values: FloatArray) -> FloatArray:
    """Exponential moving average over about a twentieth of the values, corrected for its start."""
    weight = min(1.0, 20.0 / len(values))
    average, norm, smooth = 0.0, 0.0, []
    for value in values:
        average += weight * (value - average)
        norm += weight * (1.0 - norm)
        smooth.append(average / norm)
    return np.array(smooth)


def _loss_curves(log: Path) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Finite losses by column, as (steps, losses); a column's per-epoch copy is left out."""
    points: dict[str, list[tuple[float, float]]] = {}
    with log.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        columns = reader.fieldnames or []
        names = [name for name in columns if "loss" in name and not name.endswith("_epoch")]
        if "step" not in columns or not names:
            raise DataError(f"{log.name} has the columns {list(columns)}; expected 'step' and at least one with 'loss'")
        for row in reader:
            for name in names:
                if row[name] and np.isfinite(float(row[name])):
                    points.setdefault(name, []).append((float(row["step"]), float(row[name])))
    if not points:
        raise DataError(f"{log.name} has no loss in it; expected at least one logged step")
    return {name: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for name, pairs in points.items()}
