"""`mope-train` and `mope train` as a user types them: what is handed over, dry runs, mistakes, Ctrl-C."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from commands import Run, mistake
from rows import write_lengths

from mope import packaged
from mope.cli import main
from mope.errors import DataError
from mope.training import cli as training_cli
from mope.training.quiet import quiet
from mope.training.recipe import load_recipe, recipe_names


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


@pytest.mark.usefixtures("chats")
@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ((), "interrupted before anything was trained; to begin again: mope-train 'my chats.jsonl' --output x"),
        (("last.ckpt",), "what was trained is kept in x.work; add --resume to go on: mope-train 'my chats.jsonl' --o"),
        (("weights.safetensors",), "add --resume to go on: mope-train 'my chats.jsonl' --output x --resume"),
    ],
)
def test_ctrl_c_between_the_networks_says_what_is_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, trained: Sequence[str], said: str
) -> None:
    def train(*_: Any, work: Path, **__: Any) -> None:
        for name in trained:
            (work / "model").mkdir(parents=True)
            (work / "model" / name).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("mope.training.run.train", train)
    status, out, err = run("my chats.jsonl", "--output", "x", program=training_cli.main)
    assert (status, out) == (130, "")
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err


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
    few = ["--recipe", "demo", "--dry-run", "--cache-dir", str(tmp_path / "cache")]
    status, out, err = run(source, *few, program=training_cli.main)
    assert (status, out) == (2, "")  # what the run would refuse is told before the settings
    assert err.startswith(f"reading {source} ...\n")
    assert "warning: " in err
    assert "training rows; expected at least 500 (--min-rows)" in err
    assert "; expected at least min_rows = 500: give more data, or lower --min-rows" in err.splitlines()[-1]
    typed = ["--recipe", "demo", "--dry-run", "--seed", "3", "--min-rows", "9", "--cache-dir", str(tmp_path / "cache")]
    typed += ["--measure-speed"] if measured else []
    status, out, err = run(source, *typed, program=training_cli.main)
    assert status == 0
    assert f"{source}: 60 records read as lengths" in err
    assert err.endswith("\nloading torch and Lightning ...\n[one] 1\ntwo\n")
    assert err.index("records read as") < err.index("[one] 1")
    assert [seconds is not None for seconds in asked] == [measured]
    assert yaml.safe_load(out)["fit"]["seed"] == 3
    (tmp_path / "mine.yaml").write_text(out)
    changed = {"data": {"source": source, "min_rows": 9, "cache_dir": tmp_path / "cache"}, "fit": {"seed": 3}}
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("demo", changed)
    assert begun == []


NO_TEACHER = "no folder there and no recipe of that name"
SERVING_ONLY = (
    "chat-small was exported for serving and has no PyTorch weights (model.safetensors); a teacher needs them: "
    "mope-train --recipe chat-small --output DIR makes such, or type --teacher chat-small for the recipe"
)


@pytest.mark.parametrize("ending", [["--dry-run"], ["--output", "x"]], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--co-teachers", "nowhere"], f"--co-teachers nowhere: {NO_TEACHER}; expected the folder"),
        (["--teacher", "nowhere"], f"--teacher nowhere: {NO_TEACHER}; expected the folder"),
        (["--teacher", "chat-smal"], f"--teacher chat-smal: {NO_TEACHER} (did you mean 'chat-small'?)"),
        (["--teacher", "demo", "--co-teachers", "dem,x"], f"--co-teachers dem: {NO_TEACHER} (did you mean 'demo'?)"),
        (["--teacher", "{packaged}/chat-small"], SERVING_ONLY),
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


@pytest.mark.usefixtures("chats")
def test_an_error_about_the_data_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise DataError("chats.jsonl: 3 training rows")

    monkeypatch.setattr("mope.training.run.train", refused)
    assert mistake(run("train", "chats.jsonl", "--output", "x")) == "error: chats.jsonl: 3 training rows"
