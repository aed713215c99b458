"""How a command ends, and how progress looks where there is no terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mope import console as console_module
from mope.console import console, progress, run
from mope.errors import DataError


def raising(error: BaseException) -> int:
    raise error


def test_a_command_gets_its_arguments_and_its_status_is_returned() -> None:
    assert run(lambda arguments: len(arguments), ["predict", "folder", "text"]) == 3


def test_the_command_line_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mope", "predict"])
    assert run(len) == 1


def test_a_user_error_is_one_line_on_stderr_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    message = "column [prompt] is missing in data.csv; " + "expected one of prompt, messages; " * 8
    assert run(lambda _: raising(DataError(f"{message}\nsee --help")), []) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {message} see --help\n"


def test_ctrl_c_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda _: 1 // 0, [])


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    code = (
        "import sys; from mope.console import run; sys.exit(run(lambda _: [print(i) for i in range(99999)] and 0, []))"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    assert writer.stdout.readline() == b"0\n"
    writer.stdout.close()
    assert writer.stderr.read() == b""
    writer.stderr.close()
    assert writer.wait() == 141


def test_messages_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("reading rows")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "reading rows\n"


def test_progress_in_a_log_ends_with_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting tokens", 2000) as advance:
        advance(500)
        advance(1000)
    assert capsys.readouterr().err == "counting tokens: 1,500/2,000 (75%), 0 s\n"


def test_progress_in_a_log_speaks_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "LOG_INTERVAL_S", 0.0)
    with progress("reading") as advance:
        advance(3)
        advance(4)
    assert capsys.readouterr().err.splitlines() == ["reading: 3, 0 s", "reading: 7, 0 s", "reading: 7, 0 s"]


def test_progress_on_a_terminal_draws_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console(), "_force_terminal", True)
    with progress("counting tokens", 4) as advance:
        advance(4)
    assert "4/4" in capsys.readouterr().err
