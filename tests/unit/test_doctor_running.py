"""`mope doctor --url`: what it makes of a server's metrics, and of those at the ports of its schedulers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from stewards import busy_steward, guard
from web import answering

from mope.cli import main
from mope.serving_hooks import doctor
from mope.serving_hooks.front import Front
from mope.serving_hooks.front_metrics import front_collector
from mope.serving_hooks.identity import Identity
from mope.serving_hooks.metrics import Exporter, start
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.vllm import commands

LOGGER = logging.getLogger("test.doctor")
BOTH = ["vllm", "serve", "m", "--scheduler-cls", commands.SCHEDULER, "--middleware", commands.MIDDLEWARE]


def serving(text: str) -> AbstractContextManager[str]:
    """A server whose /metrics is the given text."""
    return answering({"/metrics": (200, text)})


def front(port: int, predictor: str = "chat-small", *, predicts: bool = True, **predictions: int) -> str:
    registry = CollectorRegistry()
    counts = {
        "predicts": predicts,
        "requests": {"/v1/completions": 9},
        "predictions": predictions or {"made": 7, "late": 2},
        "latency": {"bounds_s": (0.01,), "counts": (9, 0), "sum_s": 0.01},
    }
    front_collector(lambda: counts, HookOptions(metrics_port=port, predictor=predictor), registry)
    return generate_latest(registry).decode()


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    a_guard = guard()
    found = start(busy_steward(metrics_port=0), a_guard, engine="vLLM 0.32.0")
    assert found is not None
    yield found
    found.close()


def test_a_server_with_all_of_it_on(exporter: Exporter) -> None:
    with serving(front(exporter.port)) as url:
        first, second = doctor.running(url)
    assert first.status == second.status == "ok"
    assert "7 predictions made, 2 not" in first.text
    assert "policy equinox in vLLM 0.32.0, 5 requests so far" in second.text


@pytest.mark.parametrize(
    ("shown", "status", "told"),
    [
        ({"predicts": False, "made": 0, "late": 0}, "warning", "no predictor runs"),
        ({"predicts": False, "predictor": "none", "made": 0}, "ok", "0 predictions made, 0 not"),
        ({"made": 0, "late": 0}, "ok", "0 predictions made, 0 not"),
        ({"made": 0, "late": 5}, "warning", 'raise deadline_ms, or take "predictor": "chat-micro"'),
        ({"made": 0, "late": 1, "failed": 4}, "warning", "1 late, 4 failed"),
    ],
)
def test_a_server_that_predicts_nothing_is_warned_of(shown: dict[str, Any], status: str, told: str) -> None:
    with serving(front(0, **shown)) as url:
        found = doctor.running(url)[0]
    assert found.status == status
    assert told in found.text


def test_a_front_end_whose_predictor_is_broken_says_that_none_runs(tmp_path: Path) -> None:
    options = HookOptions(predictor=str(tmp_path))
    broken = Front.load(options, Identity(options, secret=b"", logger=LOGGER), logger=LOGGER)
    assert broken.snapshot()["predicts"] is False


RANKS = (
    'vllm:num_requests_running{engine="0",model_name="m"} 0\nvllm:num_requests_running{model_name="m",engine="1"} 0\n'
)


@pytest.fixture
def two_ranks() -> Iterator[list[Exporter]]:
    """At ports in a row, where there are any."""
    for _ in range(50):
        first = start(busy_steward(metrics_port=0), guard(), engine="vLLM 0.32.0")
        assert first is not None
        second = start(busy_steward(metrics_port=first.port), guard(), rank=1, engine="vLLM 0.32.0")
        assert second is not None
        if second.port == first.port + 1:
            break
        first.close()
        second.close()
    yield [first, second]
    first.close()
    second.close()


def test_the_ports_of_all_ranks_are_looked_at(two_ranks: list[Exporter]) -> None:
    first, second = two_ranks
    with serving(front(first.port) + RANKS) as url:
        found = doctor.running(url)
        assert [finding.status for finding in found] == ["ok", "ok", "ok"]
        assert f":{second.port}/metrics: rank 1: policy equinox" in found[2].text
    with serving(front(first.port)) as url:
        assert len(doctor.running(url)) == 2
        assert len(doctor.running(url, num_ranks=2)) == 3
    second.close()
    with serving(front(first.port) + RANKS) as url:
        found = doctor.running(url)
        assert [finding.status for finding in found] == ["ok", "ok", "warning"]
        assert "Rank 1 may be on another machine" in found[2].text


def test_how_many_ranks_a_command_starts() -> None:
    assert commands.num_ranks([*BOTH, "-dp", "4"]) == 4
    assert commands.num_ranks([*BOTH, "--data-parallel-size=2"]) == 2
    assert commands.num_ranks(BOTH) == commands.num_ranks([*BOTH, "-dp", "x"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        'mope_front_on{metrics_port="x"} y\n',
        'mope_front_on{metrics_port="99999999",identity="\x1b[31m"} 1\nmope_front_predictions_total{} nan\n',
        "mope_front_on{" + "a" * 2_000_000 + "\n",
        "vllm:x{" + 'a="b",' * 200_000 + "\n",
    ],
)
def test_strange_metrics_are_findings_that_a_terminal_may_show(text: str) -> None:
    with serving(text) as url:
        found = doctor.running(url)
    assert found
    assert all(finding.text.isprintable() for finding in found)


def test_a_server_without_any_of_it() -> None:
    with serving("vllm:num_requests_running 0\n") as url:
        found = doctor.running(url)
    assert [finding.status for finding in found] == ["failed", "note"]


def test_a_scheduler_without_the_middleware(exporter: Exporter) -> None:
    with serving("") as url:
        first, second = doctor.running(url, exporter.port)
    assert (first.status, second.status) == ("failed", "ok")


def test_a_hook_that_has_failed_is_told_of() -> None:
    a_guard = guard()
    exporter = start(busy_steward(metrics_port=0), a_guard)
    assert exporter is not None
    a_guard.fail(ValueError('of "quotes"'), "picking")
    with serving(front(exporter.port)) as url:
        found = doctor.running(url)
    exporter.close()
    assert found[-1].status == "failed"
    assert "ValueError while picking" in found[-1].text


def test_a_port_of_somebody_elses_is_told_of() -> None:
    with serving("up 1\n") as url:
        found = doctor.running(url, int(url.rpartition(":")[2]))
    assert "is not mope's" in found[-1].text


def test_a_server_that_does_not_answer_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mope.packaged.names", lambda: [])
    with serving("") as url:
        pass
    assert main(["doctor", "vllm", "--url", url]) == 1
    assert "does not answer" in capsys.readouterr().out
