"""`mope report`: who used what in a period, from the counters of hooks and of `mope serve`.

Counters are read from the text of `/metrics`, at the end of the period and if wanted at its beginning, or from a
Prometheus server that has watched them. Sums are those of the counters, to the digit: nothing is extrapolated.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mope.console import progress
from mope.errors import ConfigError, DataError, ServerError
from mope.extras import require
from mope.files import check_output_file, write_text
from mope.flags import Parser
from mope.serving_hooks.fetch import fetch

# column -> counter; a column that no counter has is left out
COLUMNS = {
    "requests": "mope_client_arrived_total",
    "finished": "mope_client_finished_total",
    "aborted": "mope_client_aborted_total",
    "prompt_tokens": "mope_client_prompt_tokens_total",
    "cached_tokens": "mope_client_cached_tokens_total",
    "response_tokens": "mope_client_response_tokens_total",
    "thought_tokens": "mope_client_thought_tokens_total",
    "expected_tokens": "mope_client_expected_tokens_total",
    "gpu_seconds": "mope_client_gpu_seconds_total",
    "charged": "mope_client_hf_weighted_tokens_total",
    "reserved": "mope_budget_reserved_total",
    "settled_reserved": "mope_budget_settled_reserved_total",
    "used": "mope_budget_used_total",
    "covered": "mope_client_covered_total",
    "within": "mope_client_within_total",
}
GROUP = "group"  # the first part of a client's name: `acme` of `acme/alice`
UNNAMED = "(none)"
STEP_S, POINTS = 60.0, 1440  # between two samples of a counter, and how many a Prometheus server is asked for at once

Series = tuple[tuple[str, str], ...]  # labels of a counter, sorted, its name among them
Counters = dict[Series, float]


class Row(NamedTuple):
    """What one label value stands for used.

    Attributes:
        name: of the client, group, or whatever the report is by.
        amounts: by column.
        share: of all tokens, prompt and response, from 0 to 1.
        bias: expected by true response tokens; None without any.
        within: share of answers up to their 90 % quantile; None without any.
    """

    name: str
    amounts: Mapping[str, float]
    share: float
    bias: float | None
    within: float | None


def counters_of(text: str) -> Counters:
    """The counters of a report in the text of `/metrics`.

    Raises:
        DataError: it is no such text.
        MissingExtraError: prometheus-client is not installed.
    """
    parser = require("prometheus_client.parser", "reading the text of /metrics", "serve")
    wanted, found = set(COLUMNS.values()), Counters()
    try:
        for family in parser.text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in wanted:
                    found[_series(sample.name, sample.labels)] = float(sample.value)
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"this is no text of /metrics: {error}") from error
    return found


def _series(name: str, labels: Mapping[str, str]) -> Series:
    return tuple(sorted({**labels, "__name__": name}.items()))


def difference(before: Counters, after: Counters) -> Counters:
    """What was counted between two readings. A counter that has fallen began anew: all of it was counted since."""
    found = Counters()
    for series, value in after.items():
        earlier = before.get(series, 0.0)
        found[series] = value - earlier if value >= earlier else value
    return found


def added(readings: Iterable[Counters]) -> Counters:
    """The sum of what several servers counted; the same labels add up."""
    total: defaultdict[Series, float] = defaultdict(float)
    for reading in readings:
        for series, value in reading.items():
            total[series] += value
    return dict(total)


def of_prometheus(url: str, start: datetime, end: datetime, match: str = "", api_key: str | None = None) -> Counters:
    """What counters of a Prometheus server counted in a period.

    Each counter's samples are followed, one a minute: a counter that falls began anew, and one that appears within the
    period began at 0 then.

    Args:
        url: of the server.
        start: of the period, with a time zone.
        end: of the period.
        match: further labels, such as `job="vllm"`.
        api_key: sent as a bearer token.

    Raises:
        ServerError: it does not answer, or answers something else.
        ConfigError: the period is none.
    """
    first, last = start.timestamp(), end.timestamp()
    if not first < last:
        raise ConfigError(f"the period ends at {end.isoformat()} before it begins at {start.isoformat()}")
    found: defaultdict[Series, float] = defaultdict(float)
    spans = int((last - first) // (STEP_S * POINTS)) + 1
    with progress("reading counters", total=len(COLUMNS) * spans) as advance:
        for counter in COLUMNS.values():
            selector, newest = f"{counter}{{{match}}}", Counters()
            for span in range(spans):
                begins = first + span * POINTS * STEP_S
                until = min(begins + (POINTS - 1) * STEP_S, last)
                query = {"query": selector, "start": f"{begins:.3f}", "end": f"{until:.3f}", "step": f"{STEP_S:g}"}
                for series, samples in _matrix(
                    fetch(f"{url.rstrip('/')}/api/v1/query_range?{urlencode(query)}", api_key)
                ):
                    for time_s, value in samples:
                        earlier = newest.get(series, value if time_s < first + STEP_S / 2 else 0.0)
                        found[series] += value - earlier if value >= earlier else value
                        newest[series] = value
                advance(1)
    return dict(found)


def _matrix(text: str) -> Iterator[tuple[Series, list[tuple[float, float]]]]:
    try:
        answer = json.loads(text)
        for one in answer["data"]["result"]:
            labels = {str(key): str(value) for key, value in one["metric"].items()}
            yield tuple(sorted(labels.items())), [(float(time_s), float(value)) for time_s, value in one["values"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ServerError(
            "the server does not answer as Prometheus does; expected its address, http://HOST:9090"
        ) from error


def rows_of(counters: Counters, by: str) -> list[Row]:
    """Who used what, the largest first.

    Args:
        counters: what was counted.
        by: `client`, `group` (the first part of a client's name) or any other label.
    """
    names = {counter: column for column, counter in COLUMNS.items()}
    amounts: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for series, value in counters.items():
        labels = dict(series)
        label = labels.get("client", "").partition("/")[0] if by == GROUP else labels.get(by, "")
        amounts[label or UNNAMED][names[labels["__name__"]]] += value
    total = sum(_tokens(own) for own in amounts.values())
    rows = [
        Row(
            name,
            {column: own[column] for column in COLUMNS if column in own},
            _tokens(own) / total if total else 0.0,
            own["expected_tokens"] / own["response_tokens"] if own.get("response_tokens") else None,
            own["within"] / own["covered"] if own.get("covered") else None,
        )
        for name, own in amounts.items()
        if any(own.values())
    ]
    return sorted(rows, key=lambda row: (-row.share, row.name))


def _tokens(amounts: Mapping[str, float]) -> float:
    return amounts.get("prompt_tokens", 0.0) + amounts.get("response_tokens", 0.0)


def table(rows: Sequence[Row], by: str) -> tuple[list[str], list[list[Any]]]:
    """Headings, and a line for each row and one for all together; columns that nobody has are left out."""
    hidden = ("covered", "within")
    columns = [name for name in COLUMNS if name not in hidden and any(name in row.amounts for row in rows)]
    headings = [by, *columns, "share", "expected_by_true", "within_q90"]
    sums: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row.amounts.items():
            sums[name] += value
    whole = Row(
        "(all)",
        sums,
        1.0 if rows else 0.0,
        sums["expected_tokens"] / sums["response_tokens"] if sums["response_tokens"] else None,
        sums["within"] / sums["covered"] if sums["covered"] else None,
    )
    lines = [
        [row.name, *(_exact(row.amounts.get(name, 0.0)) for name in columns), row.share, row.bias, row.within]
        for row in (*rows, whole)
    ]
    return headings, lines


def _exact(value: float) -> float | int:
    value = round(value, 6)  # what counters add up is whole parts of a millionth
    return int(value) if value == int(value) else value


def as_csv(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """With a line of headings. A name that a spreadsheet would take for a formula begins with an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(headings)
    for name, *values in lines:
        writer.writerow(
            [f"'{name}" if name[:1] in "=+-@\t\r" else name, *("" if one is None else one for one in values)]
        )
    return out.getvalue()


def as_json(headings: Sequence[str], lines: Sequence[Sequence[Any]], **about: Any) -> str:
    """An object with `rows`, `all`, and what the report is about."""
    *rows, whole = [dict(zip(headings, line, strict=True)) for line in lines]
    return json.dumps({**about, "rows": rows, "all": whole}, indent=2, ensure_ascii=False) + "\n"


def time_of(text: str) -> datetime:
    """A time as people write it: `2026-11-01`, or with `T12:00` and a zone; UTC where none is named.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(f"got the time {text!r}; expected one such as 2026-11-01 or 2026-11-01T12:00+00:00") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)


DETAILS = """\
Who used what in a period: requests, tokens, GPU seconds, budgets, and how good predictions were.

Reads the counters of the hooks and of `mope serve`: what /metrics shows now (--metrics), less what it showed at the
beginning of the period (--since, kept then: curl -s localhost:9477/metrics > before.prom); or what a Prometheus server
saw (--prometheus, --start, --end). A sum is the sum of the counters, to the digit."""
EXAMPLE = """\
mope report --metrics http://localhost:9477/metrics http://localhost:8400/metrics
mope report --metrics after.prom --since before.prom --by group --format csv --output november.csv
mope report --prometheus http://localhost:9090 --start 2026-11-01 --end 2026-12-01 --match 'job="vllm"'"""


def main(argv: Sequence[str]) -> int:
    """Runs `mope report`.

    Args:
        argv: its arguments.

    Returns:
        0.

    Raises:
        UserError: sources that cannot be read, or options that do not go together.
    """
    arguments = _parser().parse_args(argv)
    about: dict[str, Any] = {"by": arguments.by}
    if arguments.prometheus:
        if arguments.metrics or arguments.since or not arguments.start:
            raise ConfigError("--prometheus goes with --start and --end, and not with --metrics or --since")
        end = time_of(arguments.end) if arguments.end else datetime.now(timezone.utc)
        start = time_of(arguments.start)
        about |= {"start": start.isoformat(), "end": end.isoformat()}
        key = os.environ.get(arguments.api_key_env)
        counters = of_prometheus(arguments.prometheus, start, end, arguments.match, key)
    elif arguments.metrics:
        if arguments.start or arguments.end or arguments.match:
            raise ConfigError(
                "--start, --end and --match go with --prometheus; with --metrics, --since is the beginning"
            )
        key = os.environ.get(arguments.api_key_env)
        counters = difference(_read(arguments.since, key), _read(arguments.metrics, key))
    else:
        raise ConfigError("expected --metrics or --prometheus (see mope report --help)")
    rows = rows_of(counters, arguments.by)
    if not rows:
        raise DataError("nothing was counted: no counter of mope is there, or none has moved in this period")
    headings, lines = table(rows, arguments.by)
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None:
        check_output_file(output, reads={"--metrics": [*map(Path, arguments.metrics), *map(Path, arguments.since)]})
    if arguments.format == "table" and output is None:
        _print(headings, lines)
        return 0
    text = as_csv(headings, lines) if arguments.format == "csv" else as_json(headings, lines, **about)
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(output, text)
    return 0


def _parser() -> Parser:
    parser = Parser("mope report", DETAILS, "--metrics SOURCE ... | --prometheus URL --start TIME [options]", EXAMPLE)
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="SOURCE", help="addresses or files of /metrics; several add up"
    )
    parser.add_argument(
        "--since", nargs="+", default=[], metavar="FILE", help="the same ones, kept at the beginning of the period"
    )
    parser.add_argument("--prometheus", metavar="URL", help="a Prometheus server, such as http://localhost:9090")
    parser.add_argument("--start", metavar="TIME", help="beginning of the period, such as 2026-11-01 (UTC)")
    parser.add_argument("--end", metavar="TIME", help="its end (default: now)")
    parser.add_argument("--match", default="", metavar="LABELS", help="further labels for Prometheus: 'job=\"vllm\"'")
    parser.add_argument(
        "--by",
        default="client",
        metavar="LABEL",
        help="client (default), group (the first part of acme/alice), or any label of the counters, such as job",
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="default: table")
    parser.add_argument("--output", metavar="FILE", help="write it there (a table becomes JSON)")
    parser.add_argument(
        "--api-key-env",
        default="MOPE_API_KEY",
        metavar="NAME",
        help="environment variable with a key for these addresses (default: MOPE_API_KEY)",
    )
    return parser


def _read(sources: Sequence[str], api_key: str | None) -> Counters:
    readings = []
    for source in sources:
        try:
            if source.startswith(("http://", "https://")):
                readings.append(counters_of(fetch(source, api_key)))
            else:
                readings.append(counters_of(Path(source).read_text(encoding="utf-8")))
        except (ServerError, DataError) as error:
            raise DataError(f"{source}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{source}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    return added(readings)


def _print(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    shown = Table(box=box.SIMPLE_HEAD, show_footer=False)
    names, *others = zip(headings, *lines, strict=True)
    kept = [names, *(column for column in others if any(column[1:]))]  # for people: what nobody has says nothing
    headings, *lines = map(list, zip(*kept, strict=True))
    for place, heading in enumerate(headings):
        shown.add_column(heading.replace("_", " "), justify="left" if place == 0 else "right", overflow="fold")
    forms = {"share": "{:.1%}", "expected_by_true": "{:.2f}", "within_q90": "{:.1%}"}
    for line in lines:
        cells = [
            "-" if value is None else forms.get(heading, "{:,.10g}").format(value)
            for heading, value in zip(headings[1:], line[1:], strict=True)
        ]
        shown.add_row(Text(str(line[0])), *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(shown)
