"""`mope report`: sums are those of the counters, over restarts and servers, in every form."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mope.cli import main
from mope.errors import ConfigError, DataError, ServerError
from mope.serving_hooks import report
from mope.serving_hooks.report import COLUMNS, added, counters_of, difference, of_prometheus, rows_of, table

CLIENTS = ("acme/alice", "acme/bob", "zeta", "")
amounts = st.dictionaries(
    st.tuples(st.sampled_from(sorted(COLUMNS.values())), st.sampled_from(CLIENTS)), st.integers(0, 2**40), max_size=12
)


def exposed(counts: dict[tuple[str, str], int]) -> str:
    registry = CollectorRegistry()
    counters: dict[str, Any] = {}
    for (name, client), value in counts.items():
        if name not in counters:
            counters[name] = Counter(name.removesuffix("_total"), "text", ["client"], registry=registry)
        counters[name].labels(client).inc(value)
    return generate_latest(registry).decode()


@given(st.lists(amounts, min_size=1, max_size=4), st.sampled_from(["client", "group", "job"]))
def test_sums_are_those_of_the_counters_to_the_digit(servers: list[dict[tuple[str, str], int]], by: str) -> None:
    counters = added(counters_of(exposed(counts)) for counts in servers)
    headings, lines = table(rows_of(counters, by), by)
    expected: defaultdict[str, int] = defaultdict(int)
    by_client: defaultdict[tuple[str, str], int] = defaultdict(int)
    for counts in servers:
        for (name, client), value in counts.items():
            expected[name] += value
            by_client[name, client] += value
    whole = dict(zip(headings, lines[-1], strict=True))
    for column, counter in COLUMNS.items():
        if column in whole:
            assert whole[column] == expected[counter]
            assert isinstance(whole[column], int)
    rows = [dict(zip(headings, line, strict=True)) for line in lines[:-1]]
    if by == "client":
        for row in rows:
            client = "" if row["client"] == report.UNNAMED else row["client"]
            for column, counter in COLUMNS.items():
                if column in row:
                    assert row[column] == by_client[counter, client]
    if by == "group":
        assert {row["group"] for row in rows} <= {"acme", "zeta", report.UNNAMED}
    shares = sum(row["share"] for row in rows)
    assert shares == pytest.approx(1.0) or shares == 0.0


@given(amounts, amounts)
def test_a_counter_that_fell_began_anew(before: dict[tuple[str, str], int], after: dict[tuple[str, str], int]) -> None:
    found = difference(counters_of(exposed(before)), counters_of(exposed(after)))
    for (name, client), value in after.items():
        earlier = before.get((name, client), 0)
        expected = value - earlier if value >= earlier else value
        assert found[(("__name__", name), ("client", client))] == expected


class FakePrometheus:
    """Holds samples of counters, and answers range queries as Prometheus does: the newest sample up to each step."""

    def __init__(self, samples: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
        self.samples, self.queries = samples, list[dict[str, list[str]]]()

    def answer(self, query: dict[str, list[str]]) -> dict[str, Any]:
        self.queries.append(query)
        start, end, step = (float(query[name][0]) for name in ("start", "end", "step"))
        assert (end - start) / step <= 11_000
        result = []
        for (name, client), samples in self.samples.items():
            if name != query["query"][0].partition("{")[0]:
                continue
            values, at = [], start
            while at <= end:
                recent = [value for time_s, value in samples if at - 300 < time_s <= at]
                if recent:
                    values.append([at, str(recent[-1])])
                at += step
            if values:
                result.append({"metric": {"__name__": name, "client": client}, "values": values})
        return {"status": "success", "data": {"resultType": "matrix", "result": result}}


@contextmanager
def served(answer: Any) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = answer(parse_qs(urlsplit(self.path).query))
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_period_of_a_prometheus_server_with_restarts_and_new_clients() -> None:
    start = datetime(2026, 11, 1, tzinfo=timezone.utc)
    begin, minute = start.timestamp(), 60.0
    name, other = COLUMNS["response_tokens"], COLUMNS["requests"]
    old = [(begin + turn * minute, 1000.0 + 10 * turn) for turn in range(-10, 1000)]
    again = [(begin + turn * minute, 7.0 * (turn - 1000)) for turn in range(1000, 3001)]  # began anew at 0
    new = [(begin + turn * minute, 5.0 + turn - 2500) for turn in range(2500, 3001)]  # first seen at 5
    server = FakePrometheus({(name, "a"): old + again, (name, "b"): new, (other, "a"): [(begin, 3.0)]})
    with served(server.answer) as url:
        end = datetime.fromtimestamp(begin + 3000 * minute, timezone.utc)
        found = of_prometheus(f"{url}/", start, end, 'job="vllm"')
    by = {dict(series)["client"]: value for series, value in found.items() if dict(series)["__name__"] == name}
    assert by == {"a": 9990.0 + 7.0 * 2000, "b": 505.0}
    assert found[(("__name__", other), ("client", "a"))] == 0.0
    assert all('{job="vllm"}' in query["query"][0] for query in server.queries)


@pytest.mark.parametrize("content", ["<html>", "[]", '{"data": 5}', '{"data": {"result": [{"metric": {}}]}}'])
def test_what_does_not_answer_as_prometheus_does_is_told(content: str) -> None:
    times = (datetime(2026, 11, day, tzinfo=timezone.utc) for day in (1, 2))
    with served(lambda _: content) as url, pytest.raises(ServerError, match="as Prometheus does"):
        of_prometheus(url, *times)


COUNTS = {
    (COLUMNS["requests"], "acme/alice"): 10,
    (COLUMNS["requests"], "=cmd()"): 1,
    (COLUMNS["prompt_tokens"], "acme/alice"): 300,
    (COLUMNS["response_tokens"], "acme/alice"): 600,
    (COLUMNS["expected_tokens"], "acme/alice"): 660,
    (COLUMNS["response_tokens"], "=cmd()"): 100,
    (COLUMNS["covered"], "acme/alice"): 10,
    (COLUMNS["within"], "acme/alice"): 9,
    (COLUMNS["cached_tokens"], "acme/alice"): 0,
}


def test_the_command_writes_a_table_csv_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "now.prom").write_text(exposed(COUNTS), encoding="utf-8")
    half = {key: value // 2 for key, value in COUNTS.items()}
    (tmp_path / "then.prom").write_text(exposed(half), encoding="utf-8")
    now, then = str(tmp_path / "now.prom"), str(tmp_path / "then.prom")
    assert main(["report", "--metrics", now]) == 0
    shown = capsys.readouterr().out
    assert "acme/alice" in shown
    assert "1.10" in shown
    assert "90.0%" in shown
    assert "cached" not in shown  # nobody used any: a column for a file, not for a terminal
    assert main(["report", "--metrics", now, "--since", then, "--by", "group", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["group"] for row in rows] == ["acme", "'=cmd()", "(all)"]
    assert [row["response_tokens"] for row in rows] == ["300", "50", "350"]
    output = tmp_path / "report.json"
    assert main(["report", "--metrics", now, now, "--format", "json", "--output", str(output)]) == 0
    saved = json.loads(output.read_text())
    assert saved["by"] == "client"
    assert saved["all"]["requests"] == 22
    assert saved["rows"][0]["within_q90"] == 0.9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "expected --metrics or --prometheus"),
        (["--metrics", "none.prom"], "none.prom: No such file"),
        (["--metrics", "http://127.0.0.1:9/metrics"], "http://127.0.0.1:9/metrics: "),
        (["--metrics", "{text}"], "no text of /metrics"),
        (["--metrics", "{empty}"], "nothing was counted"),
        (["--metrics", "{empty}", "--start", "2026-01-01"], "go with --prometheus"),
        (["--prometheus", "http://127.0.0.1:9"], "--prometheus goes with --start"),
        (["--prometheus", "http://127.0.0.1:9", "--start", "yesterday"], "got the time 'yesterday'"),
        (["--prometheus", "http://127.0.0.1:9", "--start", "2999-01-01"], "before it begins"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("{not metrics", encoding="utf-8")
    (tmp_path / "empty").write_text("", encoding="utf-8")
    names = {name: str(tmp_path / name) for name in ("text", "empty")}
    assert main(["report", *(option.format(**names) for option in options)]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert said in shown
    assert "Traceback" not in shown


def test_columns_name_counters_that_hooks_and_service_have() -> None:
    """A counter that is renamed would silently leave the report."""
    from mope.serving_hooks.metrics import COUNTERS
    from mope.serving_hooks.service.memory import Memory
    from mope.serving_hooks.service.metrics import ServiceMetrics

    service = ServiceMetrics("chat-small", Memory(1, 1.0), 10)
    families = text_string_to_metric_families(service.exposed().decode())
    known = {f"{family.name}_total" for family in families} | {f"{figure.name}_total" for figure in COUNTERS}
    assert set(COLUMNS.values()) <= known


def test_times_are_utc_where_no_zone_is_named() -> None:
    assert report.time_of("2026-11-01").isoformat() == "2026-11-01T00:00:00+00:00"
    assert report.time_of("2026-11-01T12:00:00Z") == datetime(2026, 11, 1, 12, tzinfo=timezone.utc)
    assert report.time_of("2026-11-01T12:00+02:00") == datetime(2026, 11, 1, 10, tzinfo=timezone.utc)
    for error, call in ((ConfigError, lambda: report.time_of("x")), (DataError, lambda: counters_of("a b c"))):
        with pytest.raises(error):
            call()
