"""`mope doctor`: right about what is installed and about a command, with and without vLLM."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stewards import busy_steward, guard

from mope import packaged
from mope.cli import main
from mope.errors import ConfigError
from mope.serving_hooks import checks, doctor
from mope.serving_hooks.checks import Finding
from mope.serving_hooks.metrics import start
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.vllm import commands, compat

LOGGER = logging.getLogger("test.doctor")
GOOD = shlex.split(commands.START.replace("\\\n", " "))


@pytest.fixture(autouse=True)
def quick_predictors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest one stands for all, but where a test is about them."""
    monkeypatch.setattr(checks, "_NUM_TIMED", 3)
    monkeypatch.setattr("mope.packaged.names", lambda: ["chat-micro"])


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Says which vLLM is installed; its classes are as they should be."""

    def say(name: str | None) -> None:
        monkeypatch.setattr(compat, "installed", lambda: name)
        monkeypatch.setattr(doctor, "_probed", lambda *_: Finding("installed", "ok", "as expected"))

    return say


def statuses(report: dict[str, Any], part: str) -> list[str]:
    return [finding["status"] for finding in report["findings"] if finding["part"] == part]


def texts(found: Any, status: str) -> str:
    return "\n".join(finding.text for finding in found if finding.status == status)


# -- what is installed


def test_without_vllm_it_says_so_and_what_to_do(
    capsys: pytest.CaptureFixture[str], release: Callable[[str | None], None]
) -> None:
    release(None)
    assert main(["doctor", "vllm"]) == 1
    shown = capsys.readouterr().out
    assert "vLLM is not installed" in shown
    assert "chat-micro: loads in" in shown
    assert commands.START in shown
    assert len(shown.splitlines()) < 40


def test_a_tested_release_is_fine(capsys: pytest.CaptureFixture[str], release: Callable[[str | None], None]) -> None:
    release("0.32.0+cpu")
    assert main(["doctor", "vllm", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert (report["engine"], report["release"]) == ("vllm", "0.32.0+cpu")
    assert set(statuses(report, "installed")) == {"ok"}
    assert set(statuses(report, "predictors")) == {"ok"}


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("0.99.0", "warning", "newer than the tested"),
        ("0.9.2", "failed", "older than"),
        ("0.26.0", "warning", "between"),
    ],
)
def test_other_releases_are_told_of(name: str, status: str, words: str, release: Callable[[str | None], None]) -> None:
    release(name)
    report = doctor.examine("vllm")
    (told,) = [finding for finding in report["findings"] if f"vLLM {name}" in finding["text"]]
    assert told["status"] == status
    assert words in told["text"]
    assert report["ok"] is (status != "failed")


def test_no_engine_at_all_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert main(["doctor"]) == 0
    assert "dashboard" in capsys.readouterr().out


def test_an_engine_without_a_hook_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.ENGINES, "tgi", "TGI")
    report = doctor.examine("tgi")
    assert not report["ok"]
    assert any("no hook for TGI" in finding["text"] for finding in report["findings"])


def test_a_missing_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_versions", lambda names: [])
    report = doctor.examine(None)
    told = [finding["text"] for finding in report["findings"] if finding["status"] == "warning"]
    assert len(told) == 2
    assert all("pip install 'mope-llm[vllm]'" in text for text in told)


@pytest.mark.parametrize("argv", [["doctor", "tgi"], ["doctor", "vllm", "--url", "file:///etc/passwd"]])
def test_what_cannot_be_asked_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: ")


# -- the engine's classes, in a process of their own

QUEUE = """
class RequestQueue:
    def add_request(self, request): ...
    def pop_request(self): ...
    def peek_request(self): ...
    def prepend_request(self, request): ...
    def prepend_requests(self, requests): ...
    def remove_requests(self, requests): ...
"""
REQUEST = """
class RequestStatus: ...
class Request:
    num_output_tokens = num_tokens = 0
    def is_finished(self): ...
"""
SCHEDULER = """
class Scheduler:
    def __init__(self):
        self.waiting, self.running, self.requests, self.finished_req_ids = None, [], {}, set()
    def schedule(self): ...
    def update_from_output(self): ...
    def finish_requests(self): ...
    def add_request(self): ...
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Finding]:
    """What is said of a vLLM whose scheduler module is the given text."""
    folder = tmp_path / "vllm" / "v1" / "core" / "sched"
    folder.mkdir(parents=True)
    (folder / "request_queue.py").write_text(QUEUE, encoding="utf-8")
    (tmp_path / "vllm" / "v1" / "request.py").write_text(REQUEST, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def probed(scheduler: str, timeout_s: float = 300) -> Finding:
        (folder / "scheduler.py").write_text(scheduler, encoding="utf-8")
        return doctor._probed("vllm", timeout_s)

    return probed


def test_classes_as_expected(engine: Callable[..., Finding]) -> None:
    assert engine(SCHEDULER) == Finding("installed", "ok", "vLLM's classes are as the hook expects")


def test_classes_of_another_kind(engine: Callable[..., Finding]) -> None:
    found = engine(SCHEDULER.replace("finish_requests", "end_requests").replace("self.waiting", "self.queue"))
    assert found.status == "failed"
    assert "Scheduler has no finish_requests()" in found.text
    assert "Scheduler.__init__ sets no waiting" in found.text


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        ("raise ImportError('libcudart.so.13: cannot open')", "ImportError: libcudart.so.13: cannot open"),
        ("import os; os.abort()", "exit status"),
    ],
)
def test_an_engine_that_cannot_be_imported(scheduler: str, told: str, engine: Callable[..., Finding]) -> None:
    found = engine(scheduler)
    assert found.status == "failed"
    assert told in found.text


def test_an_engine_that_takes_too_long(engine: Callable[..., Finding]) -> None:
    found = engine("import time; time.sleep(600)", timeout_s=0.5)
    assert found.status == "warning"
    assert "--timeout" in found.text


def test_how_long_an_import_may_take_is_said_before(
    engine: Callable[..., Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    engine(SCHEDULER, timeout_s=77)
    assert "importing vLLM, for 77 s at most (--timeout)" in capsys.readouterr().err
    assert engine("raise ImportError", timeout_s=0).status == "note"


def test_options_are_checked_before_the_engine_is_imported(
    release: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    release("0.32.0")
    imported = []
    monkeypatch.setattr(doctor, "_probed", lambda *_: (imported.append(1), Finding("installed", "ok", "fits"))[1])
    wrong = doctor.examine("vllm", [*OURS, "--additional-config", '{"mope": {"polcy": "vtc"}}'])
    assert not imported
    assert "did you mean 'policy'" in str(wrong["findings"])
    assert "correct the options first" in str(wrong["findings"])
    assert "no option" not in str(doctor.examine("vllm", BOTH)["findings"])
    assert imported


# -- a command


def judged(words: list[str]) -> list[Finding]:
    return commands.mistakes(words, commands.options(commands.flags(words)))


def test_the_command_that_is_shown_is_right() -> None:
    found = judged(GOOD)
    assert [finding.status for finding in found] == ["ok"]
    assert commands.options(commands.flags(GOOD)).metrics_port == 9477


OURS = ["vllm", "serve", "m", "--api-key", "k", "--scheduler-cls", commands.SCHEDULER]
BOTH = [*OURS, "--middleware", commands.MIDDLEWARE]
TAGS = ["vllm", "serve", "m", "--api-key", "k", "--middleware", commands.PRIORITY]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["vllm", "serve", "m"], "nothing of mope is on"),
        (["vllm", "serve", "m", "--scheduler-cls", "mope.vllm.Scheduler"], "not this hook"),
        ([*BOTH, "--scheduling-policy", "priority"], "--scheduling-policy priority: leave it out"),
        ([*BOTH, "--scheduling_policy=priority"], "--scheduling-policy priority: leave it out"),
        (
            [*OURS, "--middleware", "mope.serving_hooks.vllm.Midleware"],
            "--middleware mope.serving_hooks.vllm.Midleware",
        ),
        ([*BOTH, "--middleware", commands.PRIORITY], "for vLLM's own scheduler"),
        (TAGS, "without --scheduling-policy priority"),
        ([*TAGS, "--scheduling-policy", "priority", "--api-server-count", "2"], "--api-server-count 2"),
        ([*TAGS, "--scheduling-policy", "priority", "-asc", "4"], "--api-server-count 4"),
        (["VLLM_USE_RUST_FRONTEND=1", *BOTH], "Rust front end runs no middleware"),
        (["env", "VLLM_USE_RUST_FRONTEND=true", *TAGS, "--scheduling-policy", "priority"], "Rust front end"),
        ([*BOTH, "--grpc"], "gRPC server runs no middleware"),
    ],
)
def test_common_mistakes_fail(words: list[str], told: str) -> None:
    assert told in texts(judged(words), "failed")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (OURS, "a request to a LoRA adapter counts as another client, lora/NAME"),
        ([word for word in BOTH if word not in ("--api-key", "k")], "all callers are one client"),
        ([*BOTH, "--max-num-queued-reqs", "100"], "turns the newcomer away"),
        ([*BOTH, "--runner", "pooling"], "no answer to predict"),
        ([*BOTH, "--runner=pooling"], "no answer to predict"),
    ],
)
def test_what_works_otherwise_than_one_thinks_is_a_warning(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    found = judged(words)
    assert told in texts(found, "warning")
    assert not texts(found, "failed")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*BOTH, "--kv-transfer-config", "{}"], "no more loads begin than fill a batch"),
        ([*BOTH, "--kv_transfer_config={}"], "no more loads begin than fill a batch"),
        ([*BOTH, "--max-loras", "1"], "LoRA adapters take turns"),
        ([*BOTH, "--enable-lora"], "--max-loras 1: "),
        ([*BOTH, "--enable-lora", "--max-loras", "2", "--lora-modules", "a=x", "b=y", "c=z"], "--max-loras 2: "),
    ],
)
def test_what_the_hook_looks_after_in_its_own_way_is_a_note(words: list[str], told: str) -> None:
    assert told in texts(judged(words), "note")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--schedular-cls", "--scheduler-cls"),
        ("--api-keys", "--api-key"),
        ("--scheduler_class=x", "--scheduler-cls"),
        ("--middlewear", "--middleware"),
        ("--aditional-config.mope.policy", "--additional-config"),
    ],
)
def test_a_misspelt_flag_is_a_warning(flag: str, meant: str) -> None:
    assert f"did you mean {meant}?" in texts(judged([*BOTH, flag, "x"]), "warning")


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--max-cpu-loras", "--no-enable-lora", "--max-model-len"])
def test_other_flags_of_vllm_are_not_complained_of(flag: str) -> None:
    assert [finding.status for finding in judged([*BOTH, flag, "2"])] == ["ok"]


@pytest.mark.parametrize(
    ("words", "statuses"),
    [
        (["vllm", "serve", "m"], ["warning"]),  # perhaps all is in the file
        (BOTH, ["warning", "ok"]),
        (["vllm", "serve", "m", "--scheduler-cls", "x.Y"], ["warning", "failed"]),
    ],
)
def test_a_file_of_flags_is_not_guessed_at(words: list[str], statuses: list[str]) -> None:
    found = judged([*words, "--config", "serve.yaml", "--api-key", "k"])
    assert sorted(finding.status for finding in found) == sorted(statuses)
    assert "--config serve.yaml: the doctor does not read this file" in texts(found, "warning")


def test_a_rust_front_end_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "Rust front end" in texts(judged(BOTH), "failed")
    assert not texts(judged(["VLLM_USE_RUST_FRONTEND=0", *BOTH]), "failed")


@pytest.mark.parametrize(
    "words",
    [
        BOTH,
        [*TAGS, "--scheduling-policy", "priority"],
        [*BOTH, "--runner", "generate"],
        [*BOTH, "--enable-lora", "--max-loras", "2", "--lora-modules", "a=x", "b=y"],
    ],
)
def test_right_commands_are_not_complained_of(words: list[str]) -> None:
    assert [finding.status for finding in judged(words)] == ["ok"]


def test_data_parallel_engines_are_explained() -> None:
    words = [*BOTH, "-dp", "2", "--additional-config", '{"mope": {"metrics_port": 9477}}']
    assert "each engine keeps books of its own" in texts(judged(words), "note")


@pytest.mark.parametrize(
    "words",
    [
        ["--additional-config", '{"mope": {"policy": "vtc", "alpha": 0.5}}'],
        ['--additional-config={"mope": {"policy": "vtc", "alpha": 0.5}}'],
        ["--additional-config.mope.policy", "vtc", "--additional_config.mope.alpha=0.5"],
    ],
)
def test_options_are_found_as_vllm_finds_them(words: list[str]) -> None:
    found = commands.options(commands.flags(["vllm", "serve", "m", *words]))
    assert (found.policy, found.alpha) == ("vtc", 0.5)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{mope: {}}", "is no JSON"),
        ("[]", "expected"),
        ('{"policy": "vtc"}', 'type {"mope": {"policy": ...}}'),
        ('{"mope": {"polcy": "vtc"}}', "did you mean 'policy'"),
        ('{"mope": {"alpha": 7}}', "alpha is 7"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(config: str, told: str) -> None:
    with pytest.raises(ConfigError, match="--additional-config") as caught:
        commands.options(commands.flags(["--additional-config", config]))
    assert told in str(caught.value)


def test_a_command_behind_two_dashes_is_looked_at(
    capsys: pytest.CaptureFixture[str], release: Callable[[str | None], None]
) -> None:
    release("0.32.0")
    assert main(["doctor", "vllm", "--", *BOTH, "--additional-config", '{"mope": {"predictor": "chat-micro"}}']) == 0
    assert "clients by api-key, predictor chat-micro" in capsys.readouterr().out
    assert main(["doctor", "vllm", "--", *BOTH, "--additional-config", '{"mpoe": {"policy": "vtc"}}']) == 1
    assert "got the key 'mpoe'" in capsys.readouterr().out
    assert main(["doctor", "vllm", "--", *BOTH, "--additional-config", '{"mope": {"polcy": 1}}']) == 1
    assert "did you mean 'policy'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        ({"api_keys": "/nonexistent/keys.json"}, "failed", "api_keys"),
        ({"state": "/dev/null/mope.json"}, "warning", "nothing is kept"),
        ({"secret": "file:/nonexistent/secret"}, "failed", "secret: /nonexistent/secret cannot be read"),
        ({"metrics_port": 0, "metrics_host": "0.0.0.0"}, "warning", "names of clients"),
        ({"identity": "header"}, "note", "only if a gateway sets the header x-client-id"),
        ({"identity": "user"}, "note", "only if a gateway sets the body's user"),
        ({"predicted_admission": True, "kv_margin": 0.5}, "note", "preempts"),
    ],
)
def test_options_that_this_machine_cannot_serve(options: dict[str, Any], status: str, told: str) -> None:
    assert told in texts(checks.options(HookOptions(**options)), status)


@pytest.mark.parametrize(
    ("text", "status", "told"), [("{}", "warning", "tells nobody apart"), ("{", "failed", "no JSON")]
)
def test_the_file_of_keys_is_read(tmp_path: Path, text: str, status: str, told: str) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(text)
    assert told in texts(checks.options(HookOptions(api_keys=keys)), status)


def test_a_port_in_use_is_told_of() -> None:
    exporter = start(busy_steward(metrics_port=0), guard())
    assert exporter is not None
    options = HookOptions(metrics_port=exporter.port)
    assert "is in use now" in texts(checks.options(options), "warning")
    exporter.close()
    assert checks.options(options) == []


def test_predictors_are_tried() -> None:
    assert checks.predictor("chat-micro", 10_000).status == "ok"
    assert checks.predictor("none", 30).status == "note"
    missing = checks.predictor("/nonexistent/predictor", 30)
    assert missing.status == "failed"
    assert "/nonexistent/predictor" in missing.text


def test_a_predictor_that_misses_the_deadline_is_a_warning(tmp_path: Path) -> None:
    other = shutil.copytree(packaged.PREDICTORS / "chat-micro", tmp_path / "other")
    slow = checks.predictor(str(other), 0.0001)
    assert slow.status == "warning"
    assert "longer than deadline_ms, 0.0001, so most requests go without a prediction: raise deadline_ms" in slow.text
    assert '"predictor": "chat-micro"' in slow.text
    assert '"predictor"' not in checks.predictor("chat-micro", 0.0001).text


def test_the_deadline_is_that_of_the_command(release: Callable[[str | None], None]) -> None:
    release("0.32.0")
    config = '{"mope": {"predictor": "chat-micro", "deadline_ms": 0.0001}}'
    report = doctor.examine("vllm", [*BOTH, "--additional-config", config])
    assert statuses(report, "predictors") == ["warning"]
    assert "deadline_ms, 0.0001" in str(report["findings"])


def test_no_predictor_is_tried_for_a_command_with_wrong_options(release: Callable[[str | None], None]) -> None:
    release("0.32.0")
    assert not statuses(doctor.examine("vllm", [*BOTH, "--additional-config", '{"mope": {"polcy": 1}}']), "predictors")


def test_all_options_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "options", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(HookOptions.model_fields)
    assert all(row["text"] and row["values"] for row in rows)
    assert {row["name"]: row["default"] for row in rows}["policy"] == "equinox"
    assert main(["doctor", "options"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}  default" in shown for name in HookOptions.model_fields)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    assert textwrap.indent(doctor.EXAMPLE, "  ") in capsys.readouterr().out
