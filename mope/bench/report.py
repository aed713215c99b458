"""What a benchmark found, for people: tables for the terminal and for Markdown.

Knows the content of `bench.json` and the words of the headings; does not measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

NOTHING = "-"
Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table whose cells are text.

    Attributes:
        title: what it shows, with the unit.
        headings: one per column; the first column holds names.
        rows: cells of each subject.
    """

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]

    @classmethod
    def of(cls, title: str, columns: Mapping[str, Callable[[Result], str]], subjects: Sequence[Result]) -> TextTable:
        """One row per subject, one column per heading."""
        return cls(title, tuple(columns), [[cell(subject) for cell in columns.values()] for subject in subjects])

    def to_rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for position, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if position else "left", vertical="bottom", no_wrap=not position)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def to_markdown(self) -> str:
        """For GitHub."""
        lines = [self.headings, ("---", *["---:"] * (len(self.headings) - 1)), *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


def tables(found: Result) -> list[TextTable]:
    """Latency by two clocks, throughput, start and memory."""
    subjects, config = found["subjects"], found["config"]
    first = subjects[0]

    def table(title: str, columns: Mapping[str, Callable[[Result], str]]) -> TextTable:
        return TextTable.of(title, {"subject": lambda subject: str(subject["name"]), **columns}, subjects)

    def times(path: str) -> Callable[[Result], str]:
        return lambda subject: _ratio(_at(subject, path), _at(first, path))

    def latency(clock: str) -> dict[str, Callable[[Result], str]]:
        place = f"latency.{clock}"
        return {
            "p50": _number(f"{place}.p50"),
            "p90": _number(f"{place}.p90"),
            "p99": _number(f"{place}.p99"),
            "p99 of medians": _number(f"{place}.p99_of_medians"),
            "mean": _number(f"{place}.mean"),
            "p50, x first": times(f"{place}.p50"),
            "p99, x first": times(f"{place}.p99"),
        }

    calls = f"{found['prompts']['num_requests']:,} requests x {config['rounds']} rounds"
    shown = [
        table(f"latency of one request, wall time in ms, {calls}", latency("wall_ms")),
        table("the same calls, processor time in ms", latency("cpu_ms")),
    ]
    if first["throughput"]:
        shown.append(
            table(
                f"requests per second, median of {config['rounds']} rounds of {config['seconds']:g} s: "
                f"{config['concurrency']} callers with one request each; one caller with batches of "
                f"{config['batch_size']}",
                {
                    "callers": _number("throughput.requests_per_s"),
                    "callers, x first": times("throughput.requests_per_s"),
                    "callers, CPU ms per request": _number("throughput.cpu_ms_per_request"),
                    "batches": _number("batch_throughput.requests_per_s"),
                    "batches, x first": times("batch_throughput.requests_per_s"),
                    "batches, CPU ms per request": _number("batch_throughput.cpu_ms_per_request"),
                },
            )
        )
    shown.append(
        table(
            "start in a fresh process, and its resident memory",
            {
                "import s": _number("start.import_s"),
                "load s": _number("start.load_s"),
                "first answer ms": _number("start.first_ms"),
                "loaded MB": _number("memory_mb.loaded"),
                "one caller MB": _number("memory_mb.one_caller"),
                "peak MB": _number("memory_mb.peak"),
                "peak, x first": times("memory_mb.peak"),
            },
        )
    )
    return shown


def notes(found: Result) -> list[str]:
    """What a reader must know beside the tables."""
    machine, load, prompts = found["provenance"]["machine"], found["load_average"], found["prompts"]
    chars, tokens = prompts["prompt_chars"], prompts["prompt_tokens"]
    said = [
        f"{machine['cpu'] or 'unknown CPU'}, {machine['num_cores']} cores"
        + (f", {', '.join(machine['gpus'])}" if machine["gpus"] else "")
        + (f"; load average {load['before'][0]:.1f} before, {load['after'][0]:.1f} after" if load else ""),
        f"prompts: {prompts['source']}, {prompts['num_requests']:,} requests, {prompts['with_history']:,} of them with "
        f"history; characters p50 {chars['p50']:,.0f}, p90 {chars['p90']:,.0f}, p99 {chars['p99']:,.0f}; tokens p50 "
        f"{tokens['p50']:,.0f}, p90 {tokens['p90']:,.0f}, p99 {tokens['p99']:,.0f} before any cut",
        "p50, p90, p99 and mean are of all calls, with what the machine did beside; p99 of medians: each request's "
        "median over rounds, then the 0.99 quantile over requests. Processor time is that of the process, all its "
        "threads. x first: divided by the first row.",
        "start: files were read once before, so they come from the system's cache; load holds the import of the "
        f"engine. A bare Python takes {three_digits(_at(found['subjects'][0], 'memory_mb.python'))} MB; the peak is "
        "that of the whole benchmark.",
        "tokens that the network reads, p50 and p99: "
        + "; ".join(
            f"{one['name']} {one['input_tokens']['p50']:,.0f} and {one['input_tokens']['p99']:,.0f}"
            for one in found["subjects"]
        ),
    ]
    for name, description in found["peers"].items():
        said.append(
            f"{name}: {description}. Random weights, the prompt alone, {prompts['tokenizer']}'s tokenizer: shape and "
            "cost, not quality."
        )
    return said


def print_report(found: Result) -> None:
    """Print tables and notes on stdout."""
    console = Console()
    for table in tables(found):
        console.print(table.to_rich())
        console.print()
    for note in notes(found):
        console.print(Text(note))


def to_markdown(found: Result) -> str:
    """The tables and notes as `bench.md`."""
    command = " ".join(found["provenance"]["command"])
    parts = ["# mope bench", f"`{command}`, {found['provenance']['finished']}"]
    parts += [table.to_markdown() for table in tables(found)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(found)), found["timed"]]) + "\n"


def _at(subject: Result, path: str) -> float | None:
    value: Any = subject
    for name in path.split("."):
        if value is None:
            return None
        value = value[name]
    return None if value is None else float(value)


def _number(path: str) -> Callable[[Result], str]:
    return lambda subject: three_digits(_at(subject, path))


def three_digits(value: float | None) -> str:
    """A figure as people read it: three digits, no exponent; a dash for none."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float | None, first: float | None) -> str:
    return NOTHING if value is None or not first else f"{value / first:.2f}"
