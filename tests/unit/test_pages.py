"""Every command and every line of Python that README.md and docs/ show is tried.

Python blocks run, together with the blocks before them, in a folder where `runs/demo` is the tiny predictor of
tests/data. Of the shell commands, `mope predict` runs there too; what would install or train is checked against the
Makefile, the extras of pyproject.toml, the recipes and the command's own --help.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, metadata
from itertools import pairwise
from pathlib import Path

import pytest
from rows import say_trained_on, write_lengths

ROOT = Path(__file__).resolve().parents[2]
TINY_PREDICTOR = ROOT / "tests" / "data" / "tiny"
PREDICTORS = ("runs/demo", "runs/mine", "runs/sharegpt-minilm", "runs/sharegpt-small")  # where the pages save
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
MAX_WORDS = 1300  # of the README: it is read in one go


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands of all shell blocks: continued lines joined, `&&` taken apart, comments and prompts removed."""
    shell = "\n".join(block for text in PAGES.values() for block in blocks(text, "bash"))
    lines = shell.replace("\\\n", " ").replace(" && ", "\n").splitlines()
    shown = (line.strip().removeprefix("$ ") for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return list(dict.fromkeys(shown))


PYTHON_BLOCKS = [(page, number) for page, text in PAGES.items() for number in range(len(blocks(text, "python")))]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as it is after the README's training commands: predictors are saved in it, and their data is known."""
    rows = write_lengths(tmp_path / "rows.jsonl", 400)
    for folder in PREDICTORS:
        say_trained_on(shutil.copytree(TINY_PREDICTOR, tmp_path / folder), rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_shows_python_and_shell() -> None:
    assert blocks(PAGES["README.md"], "python")
    assert commands()


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].split()) <= MAX_WORDS


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("page", "position"), PYTHON_BLOCKS)
def test_python_block_runs(page: str, position: int) -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks(PAGES[page], "python")[: position + 1]):
        exec(compile(block, f"{page}, Python block {number + 1}", "exec"), namespace)


def program(name: str) -> Callable[[list[str]], int]:
    """The function behind an installed command."""
    (script,) = entry_points(group="console_scripts", name=name)
    main = script.load()
    assert callable(main)
    return main  # type: ignore[no-any-return]


def call(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run an installed command in this process, as the shell would."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        return program(name)() or 0  # type: ignore[call-arg]
    except SystemExit as end:
        return int(end.code or 0)


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for argument in arguments:
        variable, equals, _ = argument.partition("=")
        pattern = rf"^{re.escape(variable)} \??=" if equals else rf"^{re.escape(argument)}:"
        assert re.search(pattern, makefile, flags=re.MULTILINE), f"the Makefile has no {argument!r}"


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    named = [re.fullmatch(r"(mope-llm|\.)(?:\[([\w,]+)\])?", argument) for argument in arguments[1:]]
    found = [match for match in named if match]
    assert found, "a pip line that does not install mope-llm"
    extras = [extra for match in found for extra in (match[2] or "").split(",") if extra]
    assert set(extras) <= set(metadata("mope-llm").get_all("Provides-Extra") or [])


def check_options(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option of a command is in its --help, and the recipe that it names exists."""
    subcommand = arguments[:1] if name == "mope" else []
    assert call(name, [*subcommand, "--help"], monkeypatch) == 0
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    used = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    assert used <= known, f"{name} has no {sorted(used - known)}"
    for option, value in pairwise(arguments):
        if option == "--recipe" and not value.endswith(".yaml"):
            assert (ROOT / "training" / "recipes" / f"{value}.yaml").is_file(), f"there is no recipe {value!r}"


@pytest.mark.usefixtures("graphs_made_once")
@pytest.mark.parametrize("command", commands())
def test_shell_command_is_right(
    command: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, _, piped_into = command.partition(" | ") if command.startswith(("echo ", "cat ")) else ("", "", command)
    words = shlex.split(piped_into, comments=True)
    name, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if name in ("git", "cd"):
        assert arguments
    elif name == "make":
        check_make(arguments)
    elif name == "pip":
        check_pip(arguments)
    elif name == "mope-export":
        assert call(name, arguments, monkeypatch) == 0
        target = arguments[arguments.index("--output") + 1] if "--output" in arguments else arguments[0]
        assert (workspace / target / "onnx" / "manifest.json").is_file()
    elif name == "mope" and arguments[0] == "predict":
        if "onnx" in arguments:
            assert call("mope-export", [arguments[1], "--to", "onnx", "--data", "none"], monkeypatch) == 0
            capsys.readouterr()
        piped = " ".join(shlex.split(command)[1:]) + "\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        for option, value in pairwise(arguments):
            if option == "--input" and value != "-":
                (workspace / value).write_text('{"id": "1", "prompt": "Explain TCP slow start."}\n', encoding="utf-8")
        status = call(name, arguments, monkeypatch)
        captured = capsys.readouterr()
        assert status == 0, captured.err
        assert captured.out or any((workspace / word).is_file() for word in arguments)
    elif name == "mope" and arguments[0] == "data":
        monkeypatch.chdir(ROOT)
        assert call(name, [*arguments, "--cache-dir", str(workspace / "cache")], monkeypatch) == 0
        shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
        assert any(f"```text\n{shown}\n```" in text for text in PAGES.values())
    elif name in ("mope", "mope-train"):
        check_options(name, arguments, monkeypatch, capsys)
    else:
        pytest.fail(f"a page shows {name!r}, and this test does not know how to try it")
