"""The commands as a user types them: results on stdout, the rest on stderr, mistakes in one line and status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from commands import Run, mistake

from mope.cli import COMMANDS

TCP = "Explain TCP slow start."


# --- mope ---


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_every_command_explains_itself_with_an_example(arguments: list[str], run: Run, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 0
    text = capsys.readouterr().out
    usage = " ".join(["mope", *arguments[:-1]])
    assert text.startswith(f"usage: {usage}")
    assert f"  {usage} " in text.partition("example:\n")[2]


WITHOUT_EXTRAS = """
import sys
from mope.extras import EXTRAS

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


@pytest.mark.parametrize(
    "arguments",
    [*(f"mope.cli {name} --help" for name in COMMANDS), "mope.training.cli --help", "mope.training.cli --list-recipes",
     "mope.export.cli --help"],
)  # fmt: skip
def test_help_needs_no_extras(arguments: str) -> None:
    module, *words = arguments.split()
    code = f"{WITHOUT_EXTRAS}\nfrom {module} import main\nsys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "example:" in done.stdout or "--list-recipes" in words


def test_help_lists_the_commands(run: Run, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and summary in text for name, (_, summary) in COMMANDS.items())


def test_version(run: Run, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        run("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"mope {version('mope-llm')}\n"


def test_the_package_is_the_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "mope", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"mope {version('mope-llm')}\n")


def test_no_command_and_an_unknown_one_are_mistakes(run: Run) -> None:
    assert "COMMAND" in mistake(run())
    line = mistake(run("predct"))
    assert "'predct'" in line
    assert "mope --help" in line


# --- mope evaluate ---


def test_evaluate_hands_data_over_and_prints_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def evaluate(
        folder: str, data: Any, output: Path | None, *, baselines: Sequence[str], observe: Sequence[int], device: str
    ) -> dict[str, Any]:
        asked.append((folder, data, output, device, baselines, observe))
        return {"test": {"first_turn": {"mope": {"mae": 1.5}}}}

    monkeypatch.setattr("mope.training.evaluate_saved.evaluate_artifact", evaluate)
    status, out, _ = run(
        "evaluate",
        "runs/demo",
        "--data",
        "chats.jsonl",
        "--turns",
        "first",
        "--languages",
        "en,de",
        "--observe",
        "20",
        "200",
        "--output",
        "o",
        "--json",
    )
    assert status == 0
    assert json.loads(out) == {"test": {"first_turn": {"mope": {"mae": 1.5}}}}
    ((folder, data, output, device, baselines, observe),) = asked
    assert observe == [20, 200]
    assert baselines == ("constant", "prompt_length", "previous_answers", "lexical_gbm", "tfidf_ridge")
    assert (folder, output, device) == ("runs/demo", Path("o"), "cpu")
    assert (data.source, data.turns, data.languages) == ("chats.jsonl", "first", ("en", "de"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tiny}"], "--data"),
        (
            ["{tiny}", "--data", "x.jsonl", "--max-rows", "0"],
            "--max-rows: got '0'; expected greater than or equal to 1",
        ),
        (["{tiny}", "--data", "x.jsonl", "--turns", "last"], "--turns: invalid choice: 'last'"),
        (["{tiny}", "--data", "x.jsonl", "--label-tokenizer", "cl100k_base"], "--label-tokenizer"),
        (["{tiny}", "--data", "x.jsonl", "--observe", "0"], "--observe: got '0'; expected a number of answers"),
        (["nowhere", "--data", "x.jsonl"], "nowhere"),
        (["{tiny}", "--data", "nofile.jsonl"], "nofile.jsonl"),
    ],
)
def test_mistakes_of_evaluate(run: Run, tiny: Path, arguments: list[str], said: str) -> None:
    assert said in mistake(run("evaluate", *(argument.format(tiny=tiny) for argument in arguments)))


# --- how all of them end ---


def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mope.training.run.train", broken)
    with pytest.raises(ZeroDivisionError):
        run("train", "--recipe", "demo", "--output", "x")


def test_a_mistyped_path_is_told_before_anything_slow(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mope.training.quiet.quiet", lambda: pytest.fail("imported Lightning first"))
    assert "source 'chatz.jsonl' does not exist" in mistake(run("train", "chatz.jsonl", "--output", "x"))
