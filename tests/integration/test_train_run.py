"""Whole runs on generated chats with a tiny encoder: train, save, load, predict, evaluate, resume."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope import LengthPredictor
from mope.errors import ArtifactError, ConfigError, DataError
from mope.training.config import EvaluationConfig, FitConfig, ModelConfig, TrainConfig
from mope.training.data.config import DataConfig
from mope.training.evaluate_saved import evaluate_artifact, named_baselines
from mope.training.fit import FitModule, TrainingInterruptedError
from mope.training.run import RunResult, train
from mope.training.work import locked

NUM_CHATS = 900


def write_chats(path: Path, seed: int = 0) -> Path:
    """OpenAI messages of two turns; the first word says how long the answer is, the LLM doubles it."""
    draw = random.Random(seed)
    lines = []
    for number in range(NUM_CHATS):
        llm = draw.choice(["brief-llm", "wordy-llm"])
        messages = []
        for _turn in range(2):
            kind = draw.choice(["name", "explain", "write"])
            words = draw.randint(1, 4) * {"name": 1, "explain": 12, "write": 70}[kind] * (1 + (llm == "wordy-llm"))
            subject = "".join(draw.choices("abcdefghij", k=6))
            messages += [
                {"role": "user", "content": f"{kind} {subject}"},
                {"role": "assistant", "content": f"{subject} " * words},
            ]
        lines.append(json.dumps({"id": f"{seed}-{number}", "model": llm, "messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings(chats: Path, encoder: Path, cache: Path, **model: object) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(source=str(chats), label_tokenizer="encoder", cache_dir=cache),
        model=ModelConfig(
            encoder=str(encoder), max_prompt_tokens=16, max_context_tokens=8, lookup_rows=100, min_llm_rows=50, **model
        ),
        fit=FitConfig(
            epochs=4, learning_rate=5e-3, head_learning_rate=5e-3, checks_per_epoch=1, accelerator="cpu", devices="1",
            precision="32-true", freeze_embeddings=False,
        ),
        evaluation=EvaluationConfig(baselines=("constant", "previous_answers"), fine_tuned=(), bootstrap_samples=20),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_encoder: Path) -> TrainConfig:
    config = settings(write_chats(folder / "chats.jsonl"), tiny_encoder, folder / "cache")
    return config.model_copy(
        update={
            "evaluation": config.evaluation.model_copy(
                update={"fine_tuned": ("single_head", "single_expert", "ranker")}
            )
        }
    )


@pytest.fixture(scope="module")
def run(folder: Path, config: TrainConfig) -> RunResult:
    result = train(config, folder / "out", command=["mope-train", "chats.jsonl"])
    assert result is not None
    return result


def test_a_run_learns_what_there_is_to_learn(run: RunResult) -> None:
    for part in ("first_turn", "all_turns"):
        found = run.metrics["test"][part]
        fine_tuned = {"single_head", "single_expert", "ranker"}
        assert set(found) == {"mope", "mope_oracle_routed", "constant", "previous_answers", *fine_tuned}
        assert found["single_head"]["mae"] < 0.7 * found["constant"]["mae"]
        assert found["mope"]["mae"] < 0.7 * found["constant"]["mae"]
        assert found["mope_oracle_routed"]["mae"] < found["mope"]["mae"]
        assert found["mope"]["kendall_tau"] > 0.5
    assert run.metrics["router"]["accuracy"] > 0.6


def test_what_a_run_leaves_is_all_there_and_strict_json(run: RunResult) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "router.json", "lookup.safetensors", "calibration.json",
        "files.json", "metrics.json", "provenance.json", "README.md", "plots",
    } <= names  # fmt: skip
    assert not [path for path in run.folder.rglob("*") if path.suffix in (".pkl", ".pt", ".ckpt", ".joblib")]
    for name in ("metrics.json", "provenance.json", "config.json"):
        json.loads((run.folder / name).read_text(), parse_constant=pytest.fail)
    assert len(list((run.folder / "plots").glob("*.png"))) >= 8
    card = (run.folder / "README.md").read_text()
    assert "for the owner of the data to choose" in card  # it learned from a file, of which nothing is known
    assert f"{run.metrics['test']['all_turns']['mope']['mae']:.1f}" in card
    assert str(run.folder.parent) not in (run.folder / "provenance.json").read_text()


def test_the_saved_predictor_predicts_what_was_evaluated(run: RunResult, config: TrainConfig) -> None:
    again = evaluate_artifact(run.folder, config.data)
    for part, found in again["test"].items():
        assert found["mope"]["mae"] == pytest.approx(run.metrics["test"][part]["mope"]["mae"], rel=1e-6)


def test_the_predictor_tells_short_from_long_and_one_llm_from_another(run: RunResult) -> None:
    predictor = LengthPredictor.from_pretrained(run.folder)
    assert predictor.config.target_llms == ("brief-llm", "wordy-llm")
    long = predictor.predict("write abcdef", target_llm="wordy-llm")
    short = predictor.predict("name abcdef", target_llm="wordy-llm")
    assert long.median > 5 * short.median
    assert long.expert > short.expert
    assert long.median > predictor.predict("write abcdef", target_llm="brief-llm").median


def test_resume_takes_what_is_trained_and_gives_the_same(
    run: RunResult, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_, **__: pytest.fail("trained again"))
    again = train(config, run.folder, resume=True, overwrite=True, command=["mope-train", "--resume"])
    assert again is not None
    assert again.metrics["test"] == run.metrics["test"]


def test_an_unfinished_run_is_thrown_away_only_when_told_so(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "out.work" / "model" / "last.ckpt"

    def interrupted(*_: object, **__: object) -> None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(b"hours of work")
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning.Trainer.fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "out")
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=r"holds an unfinished run \(of model\).*--resume.*--overwrite"):
        train(config, tmp_path / "out")
    assert checkpoint.read_bytes() == b"hours of work"
    with pytest.raises(ConfigError, match=r"last\.ckpt is damaged .*type rm .* and then --resume"):
        train(config, tmp_path / "out", resume=True)
    assert checkpoint.read_bytes() == b"hours of work"
    monkeypatch.setattr("lightning.Trainer.fit", interrupted)
    checkpoint.with_name("stale").touch()
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "out", overwrite=True)
    assert not checkpoint.with_name("stale").exists()


def test_a_finished_predictor_is_replaced_only_when_told_so(
    run: RunResult, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_, **__: pytest.fail("trained"))
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"is a saved predictor, which would be lost; add --overwrite"):
            train(config, run.folder, resume=resume)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


HOLDER = """
import sys, time
from pathlib import Path
from mope.training.work import locked
with locked(Path(sys.argv[1]), Path(sys.argv[2])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_two_runs_do_not_share_a_folder_and_a_killed_one_blocks_nobody(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, work = tmp_path / "out", tmp_path / "out.work"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(output), str(work)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        who = rf"is in use: process {holder.pid} on {socket.gethostname()} .* trains there"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=who):
                train(config, output, **options)
        with pytest.raises(ConfigError, match=who):  # by another name, and with another work folder
            train(config, tmp_path / "." / "out", work=tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match=who):
            train(config, tmp_path / "other", work=work)
        monkeypatch.setenv("LOCAL_RANK", "1")  # a helper process of that very run
        with locked(output, work):
            pass
        monkeypatch.delenv("LOCAL_RANK")
    finally:
        holder.kill()
        holder.wait()
    with locked(output, work):
        assert json.loads((work / "running.lock.json").read_text())["pid"] == os.getpid()


def test_a_work_folder_that_is_something_else_is_refused(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is no work folder of a run \(it holds model\)"):
        train(config, tmp_path / "out", work=tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "model" / "thesis.txt").read_text() == "years of work"


def test_the_card_tells_of_all_parts_of_a_run(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of MoPE's network, and resumed: commands, time and curve of both parts."""
    evaluation = config.evaluation.model_copy(update={"fine_tuned": (), "baselines": ("constant",)})
    config = config.model_copy(update={"evaluation": evaluation})
    calls = 0
    step = FitModule.training_step

    def stopped(self: FitModule, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 60:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(FitModule, "training_step", stopped)
    with pytest.raises(TrainingInterruptedError):
        train(config, tmp_path / "out", command=["mope-train", "--recipe", "one"])
    with pytest.raises(ArtifactError, match=r"holds its unfinished run; .*add --resume"):
        LengthPredictor.from_pretrained(tmp_path / "out")
    result = train(config, tmp_path / "out", resume=True, command=["mope-train", "--resume"])
    assert result is not None
    provenance = json.loads((result.folder / "provenance.json").read_text())
    assert provenance["command"] == ["mope-train", "--recipe", "one"]
    assert [part["command"][1] for part in provenance["parts"]] == ["--recipe", "--resume"]
    assert "in 2 parts" in (result.folder / "README.md").read_text()
    with (tmp_path / "out.work" / "model" / "csv" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert min(steps) < 20
    assert max(steps) > 60
    assert steps == sorted(steps)
    assert result.metrics["baseline_seconds"]["constant"] >= 0


def test_resume_refuses_other_settings_and_says_which(run: RunResult, config: TrainConfig) -> None:
    other = config.model_copy(update={"fit": config.fit.model_copy(update={"dropout": 0.3})})
    with pytest.raises(ConfigError, match=r"fit\.dropout"):
        train(other, run.folder, resume=True, overwrite=True)


def test_an_output_that_is_something_else_is_refused_before_training(
    folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_, **__: pytest.fail("trained"))
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a saved predictor"):
        train(config, folder / "mine")
    assert (folder / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ({"design": "separate", "num_experts": 2, "combination": "top1"}, 3),
        ({"num_experts": 1}, 1),
        ({"num_experts": 4, "router_parts": ("gate",), "boundaries": (5, 40, 150)}, 1),
    ],
)
def test_other_designs(
    model: dict[str, object], weights: int, folder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    config = settings(folder / "chats.jsonl", tiny_encoder, folder / "cache", **model)
    config = config.model_copy(update={"fit": config.fit.model_copy(update={"epochs": 2.0})})
    result = train(config, tmp_path / "out")
    assert result is not None
    assert len([p for p in result.folder.glob("*.safetensors") if p.name != "lookup.safetensors"]) == weights
    found = result.metrics["test"]["all_turns"]
    assert found["mope"]["mae"] < found["constant"]["mae"]
    predictor = LengthPredictor.from_pretrained(result.folder)
    assert predictor.config.num_experts == model["num_experts"]
    assert np.isfinite(predictor.predict("write abcdef").mean)


def test_evaluation_on_other_data_and_on_too_little(run: RunResult, tmp_path: Path) -> None:
    other = DataConfig(source=str(write_chats(tmp_path / "other.jsonl", seed=9)), cache_dir=tmp_path / "cache")
    found = evaluate_artifact(run.folder, other, tmp_path / "evaluated", samples=20)
    assert found["test"]["all_turns"]["mope"]["num_rows"] > 50
    assert (tmp_path / "evaluated" / "metrics.json").exists()
    baselines = set(found["test"]["all_turns"]) - {"mope", "mope_oracle_routed"}
    assert baselines == {"constant", "prompt_length", "previous_answers", "lexical_gbm", "tfidf_ridge"}
    assert found["test"]["all_turns"]["mope"]["mae"] < found["test"]["all_turns"]["constant"]["mae"]
    assert list((tmp_path / "evaluated" / "plots").glob("*.png"))
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "response": "b c"}\n{"prompt": "d", "response": "e"}\n')
    with pytest.raises(DataError, match="test rows"):
        evaluate_artifact(run.folder, DataConfig(source=str(few), cache_dir=tmp_path / "cache"))


def test_baselines_of_an_evaluation_are_chosen_by_name() -> None:
    assert named_baselines("constant, tfidf_ridge") == ("constant", "tfidf_ridge")
    assert named_baselines("none") == ()
    with pytest.raises(ConfigError, match=r"--baselines: got embedding_gbm; expected constant, .* or none"):
        named_baselines("constant,embedding_gbm")


def test_further_data_are_learned_from_and_reported_apart(folder: Path, config: TrainConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(write_chats(tmp_path / "chats.jsonl", seed=1).read_text().replace("brief-llm", "third-llm"))
    also = config.data.model_copy(update={"source": str(other)})
    fit = config.fit.model_copy(update={"epochs": 0.5})
    evaluation = config.evaluation.model_copy(update={"fine_tuned": (), "baselines": ("constant",)})
    result = train(config.model_copy(update={"also": (also,), "fit": fit, "evaluation": evaluation}), tmp_path / "out")
    assert result is not None
    predictor = LengthPredictor.from_pretrained(result.folder)
    assert predictor.config.target_llms == ("brief-llm", "third-llm", "wordy-llm")
    alone, both = (json.loads((path / "metrics.json").read_text()) for path in (folder / "out", result.folder))
    assert both["training"]["rows"]["train"] > 1.8 * alone["training"]["rows"]["train"]
    assert both["training"]["rows"]["test"] == alone["training"]["rows"]["test"]
    assert both["other_data"]["other.jsonl"]["test"]["all_turns"]["mope"]["num_rows"] > 100
    assert len(json.loads((result.folder / "provenance.json").read_text())["data"]) == 2
