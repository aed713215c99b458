"""The commands as a user types them: results on stdout, the rest on stderr, mistakes in one line and status 2."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rows import write_lengths

from mope import console as terminal
from mope import packaged
from mope.cli import COMMANDS, LEVELS, main
from mope.errors import DataError
from mope.predictor import LengthPredictor
from mope.training import cli as training_cli
from mope.training.quiet import quiet
from mope.training.recipe import load_recipe, recipe_names

Run = Callable[..., tuple[int, str, str]]
TCP = "Explain TCP slow start."


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; its status, stdout and stderr."""

    def call(*arguments: str, program: Callable[[list[str]], int] = main) -> tuple[int, str, str]:
        terminal.console.cache_clear()  # its stderr is the one that was there when it was made
        status = program([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def mistake(result: tuple[int, str, str]) -> str:
    """The one line that a user's mistake ends in."""
    status, out, err = result
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


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


def test_no_command_and_an_unknown_one_are_mistakes(run: Run) -> None:
    assert "COMMAND" in mistake(run())
    line = mistake(run("predct"))
    assert "'predct'" in line
    assert "mope --help" in line


# --- mope predict ---


def test_prompts_become_a_table(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    status, out, err = run("predict", tiny, TCP, "Thanks!")
    assert (status, err) == (0, "")
    predicted = LengthPredictor.from_pretrained(tiny).predict_batch([TCP, "Thanks!"])
    header, *rows = out.splitlines()[1:]
    assert header.split("  ")[0] == "prompt"
    for row, prediction, prompt in zip(rows, predicted, (TCP, "Thanks!"), strict=True):
        assert row.startswith(prompt)
        assert f" {prediction.median:,.0f} " in row
        assert f" {prediction.quantile(0.1):,.0f} to {prediction.quantile(0.9):,.0f} " in row
        assert f"{prediction.expert}: " in row
        assert f"{max(prediction.route_probabilities):.0%}" in row


def test_a_prompt_with_markup_and_line_breaks_stays_text(run: Run, tiny: Path) -> None:
    status, out, _ = run("predict", tiny, "[red]a\n\nb[/]")
    assert status == 0
    assert "[red]a b[/]" in out


def test_an_empty_prompt_gets_the_fallback_and_says_so(run: Run, tiny: Path) -> None:
    status, out, _ = run("predict", tiny, "")
    assert status == 0
    assert "fallback:no text" in out


def test_prompts_may_stand_behind_flags(run: Run, tiny: Path) -> None:
    _, expected, _ = run("predict", tiny, "Hi", "Why?", "--json", "--max-tokens", "60")
    for arguments in (
        ["--json", tiny, "--max-tokens", "60", "Hi", "Why?"],
        [tiny, "Hi", "--max-tokens", "60", "Why?", "--json"],
    ):
        status, out, _ = run("predict", *arguments)
        assert (status, out) == (0, expected)


def test_nothing_on_stdin_is_a_mistake(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    status, out, err = run("predict", tiny)
    assert (status, out) == (2, "")
    assert "no prompt: none was typed and stdin is empty" in err


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_one_prompt_from_stdin(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    status, out, _ = run("predict", tiny, *arguments, "--json")
    assert status == 0
    expected = LengthPredictor.from_pretrained(tiny).predict("two\nlines")
    assert json.loads(out)["median"] == pytest.approx(expected.median, abs=0.01)


def test_json_for_prompts_and_flags_for_all_of_them(run: Run, tiny: Path) -> None:
    flags = {"target_llm": "llama-3-8b", "max_tokens": 60}
    status, out, _ = run("predict", tiny, TCP, "Thanks!", "--json", "--target-llm", "llama-3-8b", "--max-tokens", "60")
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == [1, 2]
    for answer, prompt in zip(answers, (TCP, "Thanks!"), strict=True):
        expected = LengthPredictor.from_pretrained(tiny).predict(prompt, **flags)
        assert set(answer) == {"id", "median", "mean", "quantiles", "expert", "source"}
        assert answer["median"] == pytest.approx(expected.median, abs=0.01)
        assert answer["mean"] == pytest.approx(expected.mean, abs=0.01)
        assert answer["quantiles"] == pytest.approx(
            dict(zip(map(str, LEVELS), expected.quantiles(LEVELS), strict=True)), abs=0.01
        )
        assert (answer["expert"], answer["source"]) == (expected.expert, "model")
        assert answer["quantiles"]["0.99"] <= 60


REQUESTS = [
    {"id": "a", "prompt": TCP, "history": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    {"id": "b", "prompt": "Thanks!", "target_llm": "gpt-4", "max_tokens": 5},
    {"id": None, "messages": [{"role": "user", "content": "Who wrote Hamlet?"}], "max_tokens": None},
    *({"id": number, "prompt": "word " * (number % 13)} for number in range(20)),
]


@pytest.mark.parametrize("batch_size", ["1", "3", "64"])
def test_lines_are_predicted_in_their_order(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: str
) -> None:
    monkeypatch.setattr("mope.cli.WINDOW_BATCHES", 2)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, REQUESTS)) + "\n")
    status, out, err = run("predict", tiny, "--input", source, "--output", target, "--batch-size", batch_size)
    assert (status, out) == (0, "")
    assert "predicting: 23/23 (100%)" in err
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b", "line 3", *range(20)]
    assert "warning" not in err
    predictor = LengthPredictor.from_pretrained(tiny)
    for answer, request in zip(answers, REQUESTS, strict=True):
        wanted = predictor.predict_batch([{name: value for name, value in request.items() if value is not None}])[0]
        assert answer["median"] == pytest.approx(wanted.median, rel=1e-3)
        assert answer["source"] == wanted.source
    assert set(tmp_path.iterdir()) == {source, target}


def test_a_line_overrides_what_was_typed_for_all(run: Run, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "write", "max_tokens": 9}\n\n{"prompt": "write"}\n')
    status, out, _ = run("predict", tiny, "--input", source, "--max-tokens", "4")
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == ["line 1", "line 3"]  # an empty line is passed over
    assert 4 < answers[0]["quantiles"]["0.99"] <= 9
    assert answers[1]["quantiles"]["0.99"] == 4


def test_bad_lines_are_answered_counted_and_do_not_stop_the_others(run: Run, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [
        b'{"id": 1, "prompt": "Thanks!"}', b"not json", b'{"id": "c", "prompt": 3}', b"[1]",
        b'{"id": "e", "promt": "x"}', b'{"id": "\xff"}', b'{"id": "g", "prompt": "x", "max_tokens": 0}',
        b'{"id": 8, "prompt": "Thanks!"}', b'{"id": NaN, "prompt": "x"}', b'{"id": [3], "prompt": "x"}',
        b'{"id": false, "prompt": "x"}',
    ]  # fmt: skip
    source.write_bytes(b"\n".join(lines))
    status, out, err = run("predict", tiny, "--input", source)
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == [
        1, "line 2", "c", "line 4", "e", "\ufffd", "g", 8, "line 9", "line 10", "line 11",
    ]  # fmt: skip
    assert [number for number, answer in enumerate(answers, start=1) if "error" in answer] == [
        2,
        3,
        4,
        5,
        6,
        7,
        9,
        10,
        11,
    ]
    assert answers[8]["error"] == "line 9: id is float; expected a text or a number"
    for number, answer in enumerate(answers, start=1):
        if "error" in answer:
            assert set(answer) == {"id", "error"}
            assert answer["error"].startswith(f"line {number}: ")
    assert "9 of 11 records are no requests" in err
    assert "the first: line 2: not JSON" in err


def test_ids_are_those_given_or_the_line_and_repeated_ones_are_told(run: Run, tiny: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = [2, None, "2", 2.0, "a", "\ud800", "a", "line 2", "\ud800"]
    source.write_text("".join(json.dumps({"id": one, "prompt": "x"}) + "\n" for one in ids))
    status, _, err = run("predict", tiny, "--input", source, "--output", target, "--batch-size", "1")
    assert status == 0
    written = [json.loads(line)["id"] for line in target.read_text().splitlines()]
    assert json.dumps(written) == json.dumps([2, "line 2", *ids[2:]])
    assert (
        'warning: 3 of 9 records have an id that a record before them has; the first: line 7 has the id "a", as' in err
    )


@pytest.mark.parametrize("content", ["", "\n\n", "promt,id\n1,2\n"])
def test_a_file_without_a_single_request_is_a_mistake_and_leaves_no_file(
    run: Run, tiny: Path, tmp_path: Path, content: str
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text(content)
    target.write_text("older\n")
    status, _, err = run("predict", tiny, "--input", source, "--output", target)
    assert status == 2
    assert "is a request" in err
    assert target.read_text() == "older\n"
    assert set(tmp_path.iterdir()) == {source, target}


def test_requests_from_stdin(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(b'{"id": "x", "prompt": "Thanks!"}\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, _ = run("predict", tiny, "--input", "-")
    assert status == 0
    assert json.loads(out)["id"] == "x"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "x"], "nowhere"),
        (["{tiny}", "x", "--input", "f"], "give one of them"),
        (["{tiny}", "x", "--output", "f"], "--output goes with --input"),
        (["{tiny}", "--input", "nofile.jsonl"], "--input nofile.jsonl can't be read: No such file"),
        (["{tiny}", "x", "--batch-size", "0"], "--batch-size: got 0; expected at least 1"),
        (["{tiny}", "x", "--max-tokens", "-3"], "--max-tokens: got -3; expected at least 1"),
        (["{tiny}", "x", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["{tiny}", "x", "--device", "abacus"], "--device: got 'abacus'; expected cpu, cuda or cuda:NUMBER"),
        (["{tiny}", "x", "--turbo"], "--turbo"),
        ([], "ARTIFACT"),
    ],
)
def test_mistakes_of_predict(run: Run, tiny: Path, arguments: list[str], said: str) -> None:
    assert said in mistake(run("predict", *(argument.format(tiny=tiny) for argument in arguments)))


def test_an_output_that_can_t_be_written_is_a_mistake(run: Run, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    assert "can't be written" in mistake(
        run("predict", tiny, "--input", source, "--output", tmp_path / "no" / "o.jsonl")
    )


def test_a_gpu_that_is_not_there_is_a_mistake(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "type --device cpu" in mistake(run("predict", tiny, "x", "--device", "cuda:0"))


def test_that_a_packaged_predictor_has_no_weights_is_said_before_that_torch_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mope.cli.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    line = mistake(run("predict", "chat-small", "x", "--backend", "torch"))
    assert "chat-small was exported for serving and has no PyTorch weights" in line
    assert "install" not in line


# --- mope-train, mope train ---


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with files that can be named; nobody reads them."""
    for name in ("chats.jsonl", "my chats.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def begun(chats: None, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The runs that were begun; none of them trains."""
    runs: list[SimpleNamespace] = []

    def train(config: Any, output: Path, **options: Any) -> None:
        runs.append(SimpleNamespace(config=config, output=output, **options))

    monkeypatch.setattr("mope.training.run.train", train)
    return runs


@pytest.mark.parametrize(
    ("program", "command"), [(main, ["mope", "train"]), (training_cli.main, ["mope-train"])], ids=["mope", "mope-train"]
)
def test_train_hands_the_config_over(run: Run, begun: list[SimpleNamespace], program: Any, command: list[str]) -> None:
    arguments = ["--recipe", "demo", "--output", "runs/x", "--epochs", "0.5", "--no-freeze-embeddings"]
    status, out, _ = run(*command[1:], *arguments, program=program)
    assert (status, out) == (0, "")
    (one,) = begun
    assert one.config == load_recipe("demo", {"fit": {"epochs": 0.5, "freeze_embeddings": False}})
    assert (one.output, one.work, one.resume) == (Path("runs/x"), Path("runs/x.work"), False)
    assert one.command == [*command, *arguments]


def test_train_on_data_without_a_recipe(run: Run, begun: list[SimpleNamespace]) -> None:
    status, _, _ = run(
        "chats.jsonl",
        "--output",
        "x",
        "--work",
        "w",
        "--resume",
        "--test-source",
        "sharegpt",
        program=training_cli.main,
    )
    assert status == 0
    (one,) = begun
    assert one.config.data.source == "chats.jsonl"
    assert one.config.test_data.source == "sharegpt"
    assert (one.work, one.resume) == (Path("w"), True)


def test_data_goes_over_the_recipe_s(run: Run, begun: list[SimpleNamespace]) -> None:
    run("chats.jsonl", "--recipe", "lmsys-base", "--test-source", "none", "--output", "x", program=training_cli.main)
    (one,) = begun
    assert one.config.data.source == "chats.jsonl"
    assert one.config.test_data is None
    assert one.config.model == load_recipe("lmsys-base").model


@pytest.mark.usefixtures("chats")
def test_ctrl_c_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mope.training.fit import TrainingInterruptedError

    def train(*_: Any, **__: Any) -> None:
        raise TrainingInterruptedError("stopped at step 7, saved")

    monkeypatch.setattr("mope.training.run.train", train)
    status, _, err = run("my chats.jsonl", "--output", "x", "--resume", program=training_cli.main)
    assert status == 130
    assert "stopped at step 7, saved" in err
    assert "mope-train 'my chats.jsonl' --output x --resume" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "mope-train --recipe demo --output runs/demo"),
        (["--recipe", "dmo", "--output", "x"], "did you mean 'demo'?"),
        (["--recipe", "demo"], "--output is missing: where to save the predictor, for example --output runs/sharegpt"),
        (["data/chats.jsonl.gz"], "for example --output runs/chats"),
        (["--recipe", "demo", "--output", "x", "--epochs", "0"], "--epochs: got '0'; expected greater than 0"),
        (["--recipe", "demo", "--output", "x", "--router-parts", "gat"], "--router-parts: got 'gat'"),
        (["--recipe", "demo", "--output", "x", "--fine-tuned", "bert"], "--fine-tuned: got 'bert'"),
        (["--recipe", "demo", "--output", "x", "--epoch", "1"], "--epoch"),
        (["--recipe", "demo", "--output", "x", "--accelerator", "abacus"], "--accelerator abacus"),
        (["--recipe", "demo", "--output", "x", "--accelerator", "cpu", "--devices", "none"], "--devices none"),
        (["--recipe", "demo", "--output", "x", "--strategy", "hope"], "--strategy hope"),
        (["--recipe", "demo", "--dry-run", "--test-source", "none", "--num-nodes", "0"], "--num-nodes: got '0'"),
        (["--recipe", "demo", "--output", "x", "--measure-speed"], "--measure-speed goes with --dry-run"),
    ],
)
def test_mistakes_of_train(run: Run, begun: list[SimpleNamespace], arguments: list[str], said: str) -> None:
    assert said in mistake(run(*arguments, program=training_cli.main))
    assert begun == []


def test_the_list_of_recipes(run: Run) -> None:
    status, out, _ = run("--list-recipes", program=training_cli.main)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:] if line[:1].strip()] == recipe_names()


@pytest.mark.parametrize("measured", [False, True])
def test_a_dry_run_shows_the_data_then_a_recipe_on_stdout_and_the_plan(
    run: Run, begun: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: bool
) -> None:
    asked: list[float | None] = []

    def plan(config: object, *, measure_s: float | None) -> SimpleNamespace:
        asked.append(measure_s)
        return SimpleNamespace(lines=lambda: ["[one] 1", "two"])

    monkeypatch.setattr("mope.training.plan.make_plan", plan)
    source = str(write_lengths(tmp_path / "rows.jsonl", 60))
    typed = ["--recipe", "demo", "--dry-run", "--seed", "3", "--cache-dir", str(tmp_path / "cache")]
    typed += ["--measure-speed"] if measured else []
    status, out, err = run(source, *typed, program=training_cli.main)
    assert status == 0
    assert f"{source}: 60 records read as lengths" in err
    assert "warning: " in err
    assert "training rows; expected at least 500 (--min-rows)" in err
    assert err.endswith("\n[one] 1\ntwo\n")
    assert err.index("records read as") < err.index("[one] 1")
    assert [seconds is not None for seconds in asked] == [measured]
    assert yaml.safe_load(out)["fit"]["seed"] == 3
    (tmp_path / "mine.yaml").write_text(out)
    changed = {"data": {"source": source, "cache_dir": tmp_path / "cache"}, "fit": {"seed": 3}}
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("demo", changed)
    assert begun == []


NO_TEACHER = "no folder there and no recipe of that name"
SERVING_ONLY = (
    "chat-small was exported for serving and has no PyTorch weights (model.safetensors); a teacher needs them: "
    "mope-train --recipe chat-small --output DIR makes such, or type {} chat-small for the recipe"
)


@pytest.mark.parametrize("ending", [["--dry-run"], ["--output", "x"]], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--co-teachers", "demo"], "--co-teachers teach beside a --teacher; got demo and no teacher"),
        (["--teacher", "nowhere"], f"--teacher nowhere: {NO_TEACHER}; expected the folder"),
        (["--teacher", "chat-smal"], f"--teacher chat-smal: {NO_TEACHER} (did you mean 'chat-small'?)"),
        (["--teacher", "demo", "--co-teachers", "dem,x"], f"--co-teachers dem: {NO_TEACHER} (did you mean 'demo'?)"),
        (["--teacher", "{packaged}/chat-small"], SERVING_ONLY.format("--teacher")),
        (["--teacher", "demo", "--co-teachers", "{packaged}/chat-small"], SERVING_ONLY.format("--co-teachers")),
    ],
)
def test_teachers_that_can_t_teach_are_told_at_once(
    run: Run, begun: list[SimpleNamespace], flags: list[str], said: str, ending: list[str]
) -> None:
    flags = [flag.format(packaged=packaged.PREDICTORS) for flag in flags]
    assert said in mistake(run("--recipe", "demo", *flags, *ending, program=training_cli.main))
    assert begun == []


def test_packages_that_are_missing_are_named_before_any_work(
    run: Run, begun: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = training_cli.find_spec
    monkeypatch.setattr(training_cli, "find_spec", lambda name: None if name in ("lightgbm", "yaml") else find(name))
    line = mistake(run("--recipe", "demo", "--output", "x", program=training_cli.main))
    assert "mope-train needs lightgbm, yaml, not installed: pip install 'mope-llm[train]'" in line
    assert begun == []


def test_quiet_hushes_tips_but_no_warning_that_matters() -> None:
    loggers = [logging.getLogger(f"lightning.{part}.utilities.rank_zero") for part in ("pytorch", "fabric")]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet()
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
        warnings.warn("the loss is not a number", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["the loss is not a number"]
    assert not any(logger.isEnabledFor(logging.INFO) for logger in loggers)
    assert all(logger.isEnabledFor(logging.WARNING) for logger in loggers)


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


@pytest.mark.usefixtures("chats")
def test_an_error_about_the_data_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise DataError("chats.jsonl: 3 training rows")

    monkeypatch.setattr("mope.training.run.train", refused)
    assert mistake(run("train", "chats.jsonl", "--output", "x")) == "error: chats.jsonl: 3 training rows"
