"""`metrics.json` as tables, on the terminal and as Markdown for the model card.

Knows the shape of the metrics dictionary and renders whatever part of it is there; computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mope.errors import DataError

Metrics = Mapping[str, Any]

PARTS = {"first_turn": "first turns", "all_turns": "all turns"}
PREDICTORS = {
    "mope": "MoPE",
    "mope_oracle_routed": "oracle-routed (1)",
    "teacher": "its teacher",
    "single_head": "single head",
    "single_expert": "single expert",
    "ranker": "ranker",
    "tfidf_ridge": "TF-IDF ridge",
    "lexical_gbm": "lexical GBM",
    "embedding_gbm": "embedding GBM",
    "previous_answers": "previous answers",
    "prompt_length": "prompt length",
    "constant": "constant",
}
ORACLE_NOTE = "(1) not reachable by a server: it knows the true bucket"
BREAKDOWNS = {
    "by_length": "true length (tokens)",
    "by_expert": "expert",
    "by_dataset": "data set",
    "by_language": "language",
    "by_target_llm": "target LLM",
}


def _tokens(value: float) -> str:
    return f"{value:,.1f}"


def _signed(value: float) -> str:
    return f"{value:+,.1f}"


def _two_digits(value: float) -> str:
    return f"{value:.2f}"


def _three_digits(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _count(value: float) -> str:
    return f"{value:,.0f}"


@dataclass(frozen=True)
class Column:
    """How one metric is headed, written and compared; `distance` is 0 for the best value that can be."""

    heading: str
    write: Callable[[float], str]
    distance: Callable[[float], float] | None = None


def _lower(value: float) -> float:
    return value


def _higher(value: float) -> float:
    return -value


COLUMNS = {
    "num_rows": Column("rows", _count),
    "mae": Column("MAE", _tokens, _lower),
    "mae_end_to_end": Column("MAE\nend to end", _tokens, _lower),
    "median_ae": Column("median\nAE", _tokens, _lower),
    "rmse": Column("RMSE", _tokens, _lower),
    "bias": Column("bias", _signed),
    "kendall_tau": Column("tau", _three_digits, _higher),
    "r2": Column("R²", _three_digits, _higher),
    "pinball": Column("pinball", _tokens, _lower),
    "coverage_90": Column("≤ q90", _percent, lambda value: abs(value - 0.9)),
    "accuracy": Column("accuracy", _percent, _higher),
    "log_loss": Column("log loss", _three_digits, _lower),
    "stated": Column("stated", _percent),
    "observed": Column("observed", _percent),
}
INTERVALS = {"mae": "mae_ci", "observed": "observed_ci"}
PREDICTOR_COLUMNS = ("mae", "median_ae", "rmse", "kendall_tau", "r2", "pinball", "coverage_90")


@dataclass(frozen=True)
class Section:
    """A table that is not yet drawn: cells as text, and which of them are the best of their column."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    best: set[tuple[int, int]] = field(default_factory=set)
    note: str = ""

    def rich(self) -> Table:
        """Drawn for a terminal; it fits 80 columns."""
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, min_width=len(self.title))
        table.title, table.title_style, table.title_justify = self.title, "bold", "left"
        table.caption, table.caption_justify = self.note or None, "left"
        for index, heading in enumerate(self.header):
            table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0)
        for row, cells in enumerate(self.rows):
            styles = ["bold green" if (row, column) in self.best else "" for column in range(len(cells))]
            table.add_row(*(Text(cell, style) for cell, style in zip(cells, styles, strict=True)))
        return table

    def markdown(self) -> str:
        """Drawn as a Markdown table, the title as a heading of the third level."""
        lines = [f"### {self.title}", "", _markdown_row(self.header), "|---" + "|---:" * (len(self.header) - 1) + "|"]
        for row, cells in enumerate(self.rows):
            lines.append(
                _markdown_row(
                    [f"**{cell}**" if (row, column) in self.best else cell for column, cell in enumerate(cells)]
                )
            )
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


def metrics_table(metrics: Metrics, part: str) -> Table:
    """All predictors on one part of the test rows, for a terminal.

    Args:
        metrics: what `metrics.json` holds.
        part: `"first_turn"` or `"all_turns"`.

    Raises:
        DataError: the metrics have no such part.
    """
    parts = metrics.get("test", {})
    if part not in parts:
        raise DataError(f"got the part {part!r}; these metrics have {', '.join(map(repr, parts)) or 'no test results'}")
    return _predictors(part, parts[part]).rich()


def metrics_markdown(metrics: Metrics) -> str:
    """Everything that `metrics.json` holds as Markdown tables, for the model card."""
    return "\n\n".join(section.markdown() for section in _sections(metrics)) + "\n"


def print_metrics(metrics: Metrics, console: Console, *, short: bool = False) -> None:
    """What `metrics.json` holds, on the terminal; in short the predictors and the coverage alone."""
    for section in _headline(metrics) if short else _sections(metrics):
        console.print(section.rich())


def _headline(metrics: Metrics) -> Iterator[Section]:
    parts = distinct_parts(metrics.get("test", {}))
    for part, results in parts.items():
        yield _predictors(part, results)
    yield from _coverage(parts)


def distinct_parts(parts: Metrics) -> Metrics:
    """Without the first turns where there are no others: the same numbers would be shown twice."""
    sizes = [parts[part].get("mope", {}).get("num_rows") for part in PARTS if part in parts]
    same = len(sizes) == len(PARTS) and sizes[0] is not None and len(set(sizes)) == 1
    return {part: results for part, results in parts.items() if not (same and part == "first_turn")}


def _sections(metrics: Metrics) -> Iterator[Section]:
    yield from _headline(metrics)
    yield from _router(metrics.get("router", {}))
    for key, heading in BREAKDOWNS.items():
        yield from _breakdown(metrics.get(key, {}), heading, f"MoPE by {heading}")
    yield from _observed(metrics.get("observed", {}))
    yield from _calibration(metrics.get("calibration", {}))
    yield from _seconds(metrics)
    for source, found in metrics.get("other_data", {}).items():
        for section in _other(found):
            yield replace(section, title=f"{source}: {section.title}")


def _other(metrics: Metrics) -> Iterator[Section]:
    """What is shown of data that are not the main ones."""
    yield from _coverage(distinct_parts(metrics.get("test", {})))
    for key in ("by_dataset", "by_length", "by_target_llm"):
        yield from _breakdown(metrics.get(key, {}), BREAKDOWNS[key], f"MoPE by {BREAKDOWNS[key]}")
    yield from _observed(metrics.get("observed", {}))


def _observed(sets: Metrics) -> Iterator[Section]:
    """Errors, ranking and coverage on each set, cold and after observed answers, see `evaluate_observed`."""
    if not sets:
        return
    numbers = sorted({int(number) for found in sets.values() for number in found["states"]})
    headings = {number: f"after\n{number:,}" if number else "cold" for number in numbers}
    constants = {number: f"median\nof {number:,}" for number in numbers if number}
    errors: list[tuple[str, ...]] = []
    ranks: list[tuple[str, ...]] = []
    shares: list[tuple[str, ...]] = []
    for name, found in sets.items():
        states = [found["states"].get(str(number), {}) for number in numbers]
        told = [_or_dash(state.get("observed_constant_mae"), _tokens) for state in states[1:]]
        own = found.get("constant_by_task_mae", found["constant_mae"])
        maes = [_or_dash(state.get("mae"), _tokens) for state in states]
        seen = [_or_dash(state.get("mean_observed"), _count) for state in states[1:][-1:]]
        sizes = (_count(found["num_rows"]), _count(found["median_tokens"]))
        errors.append((name, *sizes, *seen, _tokens(own), *told, *maes))
        shares.append((name, *(_or_dash(state.get("mae_over_constant"), _two_digits) for state in states)))
        taus = [_or_dash(state.get("kendall_tau_within_llm"), _three_digits) for state in states]
        below = [_or_dash(state.get("coverage_90"), _percent) for state in states]
        ranks.append((name, _three_digits(states[0]["kendall_tau"]), *taus, *below))
    shown = [headings[number] for number in numbers]
    yield Section(
        "MAE before and after observed answers of each LLM",
        ("set", "rows", "median", *(["seen\n(2)"] if constants else []), "constant\n(1)", *constants.values(), *shown),
        errors,
        note="(1) the median training answer of each LLM, where rows have samples of each task and LLM"
        + (f"; (2) of {numbers[-1]:,} answers of an LLM so many were there, mean over the rows" if constants else ""),
    )
    if len(shares) > 1:
        middle = [
            _two_digits(median(found["states"][str(number)]["mae_over_constant"] for found in sets.values()))
            for number in numbers
        ]
        shares.append(("median of the sets", *middle))
    yield Section("MAE over that of the median training answer of each LLM", ("set", *shown), shares)
    yield Section(
        "Kendall's tau (of all rows, then within one LLM), and share of answers below the 90 % quantile",
        ("set", "all rows\ncold", *(f"tau\n{one}" for one in shown), *(f"≤ q90\n{one}" for one in shown)),
        ranks,
    )


def _or_dash(value: float | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else write(value)


def _predictors(part: str, results: Metrics) -> Section:
    """MoPE first, then its oracle-routed number, then the others from best to worst; the oracle never wins."""
    first = [name for name in ("mope", "mope_oracle_routed") if name in results]
    names = first + sorted(results.keys() - first, key=lambda name: (results[name]["mae"], name))
    rows = {
        PREDICTORS.get(name, name): {**results[name], "coverage_90": results[name].get("coverage", {}).get("0.9")}
        for name in names
    }
    sizes = {row["num_rows"] for row in rows.values() if "num_rows" in row}
    shown_size = f", {sizes.pop():,} test rows" if len(sizes) == 1 else ""
    oracle = PREDICTORS["mope_oracle_routed"]
    return _section(
        f"Response tokens, {PARTS.get(part, part)}{shown_size}",
        "predictor",
        rows,
        columns=PREDICTOR_COLUMNS,
        compared=[label for label in rows if label != oracle],
        note=ORACLE_NOTE if oracle in rows else "",
    )


def _coverage(parts: Metrics) -> Iterator[Section]:
    rows: dict[str, Metrics] = {}
    for part, results in parts.items():
        mope = results.get("mope", {})
        for level, observed in mope.get("coverage", {}).items():
            name = f"{PARTS.get(part, part)}, {100 * float(level):g} % quantile"
            interval = mope.get("coverage_ci", {}).get(level)
            rows[name] = {"stated": float(level), "observed": observed, "observed_ci": interval}
    if rows:
        yield _section("MoPE: share of true lengths below each quantile", "quantile", rows)


def _router(router: Metrics) -> Iterator[Section]:
    title = "Router"
    if "accuracy" in router:
        title += f": {_percent(router['accuracy'])} of rows in their true bucket"
    if "ablation" in router:
        yield _section(title, "parts", router["ablation"], compared=list(router["ablation"]))
    elif "accuracy" in router:
        yield _section(title, "", {"router": {"accuracy": router["accuracy"]}})
    confusion = router.get("confusion")
    if confusion:
        header = ("true bucket", *(f"to expert {expert}" for expert in range(len(confusion))))
        rows = [(f"bucket {bucket}", *map(_count, counts)) for bucket, counts in enumerate(confusion)]
        yield Section("Router: rows by true bucket and chosen expert", header, rows)


def _breakdown(values: Metrics, heading: str, title: str) -> Iterator[Section]:
    """One table, or one for each key where results are grouped once more (by part or predictor)."""
    if values and all("mae" in row for row in values.values()):
        yield _section(title, heading, values)
        return
    for key, inner in values.items():
        yield from _breakdown(inner, heading, f"{title}, {PARTS.get(key, PREDICTORS.get(key, key))}")


def _calibration(values: Metrics) -> Iterator[Section]:
    rows = list(_numbers(values, ""))
    if rows:
        yield Section("Calibration", ("quantity", "value"), rows)


def _seconds(metrics: Metrics) -> Iterator[Section]:
    """What training took, of MoPE's networks and of each baseline."""
    networks = {f"MoPE, {name}": fit for name, fit in metrics.get("training", {}).get("networks", {}).items()}
    seconds = {name: fit["seconds"] for name, fit in networks.items() if "seconds" in fit}
    seconds |= {PREDICTORS.get(name, name): value for name, value in metrics.get("baseline_seconds", {}).items()}
    if seconds:
        rows: list[tuple[str, ...]] = [(name, _tokens(value)) for name, value in seconds.items()]
        yield Section("What training took", ("predictor", "seconds"), rows)


def _numbers(values: Metrics, prefix: str) -> Iterator[tuple[str, ...]]:
    """Every number in nested dictionaries, under the words that lead to it; lists are left to the plots."""
    for key, value in values.items():
        words = f"{prefix} {key}".replace("_", " ").strip()
        if isinstance(value, Mapping):
            yield from _numbers(value, words)
        elif isinstance(value, (int, float)):
            yield words, f"{value:,.4g}"


def _section(
    title: str,
    heading: str,
    rows: Mapping[str, Metrics],
    *,
    columns: Sequence[str] = tuple(COLUMNS),
    compared: Sequence[str] = (),
    note: str = "",
) -> Section:
    """Known columns of which at least one row has a number, the best of the compared rows marked."""
    header, cells = [heading], [[name] for name in rows]
    best: set[tuple[int, int]] = set()
    for key in columns:
        column = COLUMNS[key]
        values = {name: row[key] for name, row in rows.items() if row.get(key) is not None}
        if not values:
            continue
        written = {name: column.write(value) for name, value in values.items()}
        rivals = [name for name in compared if name in values]
        if column.distance is not None and len(rivals) > 1:
            winner = min((column.distance(values[name]), written[name]) for name in rivals)[1]
            best |= {(row, len(header)) for row, name in enumerate(rows) if name in rivals and written[name] == winner}
        header.append(column.heading)
        intervals = {name: row[INTERVALS[key]] for name, row in rows.items() if row.get(INTERVALS.get(key, ""))}
        if intervals:
            header.append("95 %\ninterval")
        for line, name in zip(cells, rows, strict=True):
            line.append(written.get(name, "-"))
            if intervals:
                low_high = intervals.get(name)
                line.append("-".join(map(column.write, low_high)) if low_high else "-")
    return Section(title, tuple(header), [tuple(line) for line in cells], best, note)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
