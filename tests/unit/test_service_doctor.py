"""`mope doctor serve`: packages, the options of a command, and a service that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from web import answering

pytest.importorskip("fastapi")

from mope.cli import main
from mope.serving_hooks.service import doctor
from mope.serving_hooks.service.config import ServeConfig
from mope.serving_hooks.service.memory import Memory
from mope.serving_hooks.service.metrics import ServiceMetrics

READY = json.dumps({"status": "ready"})
UP = {"/ready": (200, READY), "/v1/budgets": (200, "{}")}


def metrics(**sources: int) -> str:
    """What a service with so many predictions of each source shows."""
    config = ServeConfig()
    made = ServiceMetrics("chat-small", Memory(1, 1.0), config.metrics_clients)
    for source, number in sources.items():
        for _ in range(number):
            made.predicted(None, "model" if source == "model" else f"fallback:{source}")
    return made.exposed().decode()


@pytest.mark.parametrize(
    ("answers", "status", "expected"),
    [
        ({**UP, "/metrics": (200, metrics(model=5))}, "ok", "chat-small; 5 predictions made"),
        ({"/ready": (503, "{}")}, "failed", "it starts or ends, ask again"),
        ({"/ready": (200, json.dumps({"status": "up"}))}, "failed", "is no mope serve"),
        ({}, "failed", "/ready"),
        ({"/ready": (200, READY), "/metrics": (401, "{}")}, "failed", "give --api-key"),
        ({"/ready": (200, READY), "/metrics": (500, "{}")}, "failed", "/metrics: "),
        ({"/ready": (200, READY), "/metrics": (200, "}{ 1 2 3")}, "failed", "holds no metrics"),
    ],
)  # fmt: skip
def test_a_service_that_runs(answers: dict[str, tuple[int, str]], status: str, expected: str) -> None:
    with answering(answers) as url:
        (found,) = doctor.running(f"{url}/v1/", None)
    assert found.status == status
    assert expected in found.text


def test_predictions_that_come_too_late_are_told() -> None:
    with answering({**UP, "/metrics": (200, metrics(model=50, deadline=5))}) as url:
        first, second = doctor.running(url, None)
    assert (first.status, second.status) == ("ok", "warning")
    assert "5 of 55 predictions came too late: raise --deadline-ms, or serve chat-micro" in second.text


@pytest.mark.parametrize(
    ("answer", "status", "expected"),
    [
        ((200, json.dumps({"team-a": {}, "team-b": {}})), "ok", "its books can be read: 2 accounts"),
        ((503, "{}"), "failed", "it cannot reach its books"),
        ((500, "{}"), "failed", "/v1/budgets: HTTP 500"),
        ((404, "{}"), "warning", "does not show its books"),
    ],
)
def test_the_books_of_a_service_that_runs(answer: tuple[int, str], status: str, expected: str) -> None:
    with answering({**UP, "/metrics": (200, metrics(model=5)), "/v1/budgets": answer}) as url:
        first, books = doctor.running(url, None)
    assert first.status == "ok"
    assert books.status == status
    assert expected in books.text


def test_nobody_at_the_port_is_one_line() -> None:
    (found,) = doctor.running("http://127.0.0.1:9", None)
    assert found.status == "failed"
    assert "\n" not in found.text


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        ("mope serve chat-micro --port 0", "ok", "0 API keys"),
        ("mope serve chat-micro --port 0 --host 0.0.0.0", "warning", "no API keys: everybody"),
        ("mope serve chat-micro --deadline-ms 0", "failed", "--deadline-ms"),
        ("mope serve chat-micro --port 0 --api-keys none.json", "failed", "none.json"),
        ("mope serve chat-micro --port 0 --budgets b.json --books b.db", "ok", "0 API keys"),
        ("mope serve chat-micro --port 0 --budgets b.json", "warning", "--books memory: a restart forgets"),
        ("mope serve chat-micro --port 0 --budgets none.json", "failed", "none.json: No such file"),
        ("mope serve chat-micro --port 0 --budgets bad.json", "failed", "bad.json: clients.a.limit: got -5; expected"),
        ("mope serve chat-micro --port 0 --books no/folder.db", "failed", "books no/folder.db: unable to open"),
        ("mope serve chat-micro --port 0 --books redis://127.0.0.1:9/0", "failed", "books redis://127.0.0.1:9/0"),
        ("mope serve chat-micro --port 0 --gateways gate", "warning", "there are no keys"),
        ("mope predict chat-micro", "failed", "expected a command such as mope serve chat-small"),
    ],
)
def test_a_command_is_read_as_the_service_reads_it(
    words: str, status: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOPE_API_KEYS", raising=False)
    (tmp_path / "b.json").write_text('{"default": {"limit": 100}, "clients": {"a": null}}', encoding="utf-8")
    (tmp_path / "bad.json").write_text('{"clients": {"a": {"limit": -5}}}', encoding="utf-8")
    found, artifact, _ = doctor.command(words.split())
    assert any(expected in one.text and one.status == status for one in found)
    assert "failed" not in {one.status for one in found} or status == "failed"
    unread = status == "failed" and "books" not in expected
    assert artifact == (None if unread else "chat-micro")


def test_the_doctor_fails_where_a_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("fastapi", "no-such-package"))
    assert [finding.status for finding in doctor.packages()] == ["ok", "failed"]


def test_the_commands_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "serve", "--", "mope", "serve", "chat-micro", "--port", "0"]) == 0
    assert "chat-micro" in capsys.readouterr().out
    assert main(["doctor", "serve", "--url", "http://127.0.0.1:9"]) == 1
