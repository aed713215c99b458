"""The plan of a run: its counts are those of the data, its times follow from what was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mope.errors import ConfigError, DataError
from mope.training.config import TrainConfig
from mope.training.plan import Plan, _duration, main_rows, make_plan
from mope.training.recipe import load_recipe

NUM_CHATS = 900


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, dict[str, Any]]:
    """A config for generated chats."""
    folder = tmp_path_factory.mktemp("plan")
    rows = [
        {"prompt": f"write about {number} " + "and more " * (number % 5), "response": "word " * (1 + 37 * number % 290)}
        for number in range(NUM_CHATS)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": {"source": str(folder / "chats.jsonl"), "cache_dir": folder / "cache", "label_tokenizer": "encoder"},
        "model": {"encoder": str(tiny_encoder), "max_prompt_tokens": 24, "max_context_tokens": 8, "lookup_rows": 50},
        "fit": {"accelerator": "cpu", "devices": "1", "precision": "32-true", "batch_size": 16},
    }


def config(base: dict[str, dict[str, Any]], **changes: dict[str, Any]) -> TrainConfig:
    return load_recipe(None, {name: {**base.get(name, {}), **changes.get(name, {})} for name in {*base, *changes}})


@pytest.fixture(scope="module")
def plan(base: dict[str, dict[str, Any]]) -> Plan:
    return make_plan(config(base), measure_s=0.3)


def test_counts_are_those_of_the_data(plan: Plan) -> None:
    assert plan.teachers == ()
    assert sum(plan.num_rows.values()) < NUM_CHATS  # reserved rows are not used
    assert plan.num_rows["train"] == pytest.approx(0.7 * NUM_CHATS, rel=0.1)
    assert plan.reports == ()  # mope data's screen has said it
    assert plan.num_steps == 3 * -(-plan.num_rows["train"] // 16)


def test_input_tokens_are_measured(plan: Plan) -> None:
    median, high = plan.input_tokens
    assert 4 < median < high <= 24 + 8 + 3
    assert high >= plan.padded_tokens >= 4


def test_speed_and_memory_are_measured(plan: Plan) -> None:
    measured = plan.measured
    assert measured is not None
    assert measured.steps >= 1
    assert measured.seconds >= 0.3 or measured.steps == -(-plan.num_rows["train"] // 16)
    assert measured.tokens_per_s > 0
    assert measured.inference_tokens_per_s > 0
    assert measured.peak_bytes > 50 * 2**20  # torch alone needs more
    assert plan.memory_bytes > measured.peak_bytes
    assert (measured.hardware, measured.gpu_bytes, measured.world_size) == ("cpu, 32-true", 0, 1)
    assert 0 < plan.num_trained < plan.num_parameters  # embeddings are frozen


def test_lines_say_what_is_measured_and_what_is_not(plan: Plan) -> None:
    text = "\n".join(plan.lines())
    assert "training speed: " in text
    assert "(measured: " in text
    assert "extrapolated, if no network stops early" in text
    assert "not in it: " in text
    for stage, _ in plan.stages:
        assert f"  {stage} " in text


def test_times_follow_from_speed_rows_and_epochs(plan: Plan) -> None:
    names = [name for name, _ in plan.stages]
    fine_tuned = ("single_head", "single_expert", "ranker")
    assert names[:4] == ["training model of MoPE", *(f"training {name}" for name in fine_tuned)]
    assert names[-1] == "embeddings for embedding_gbm"
    assert plan.measured is not None
    one_pass = plan.num_rows["train"] * plan.padded_tokens / plan.measured.tokens_per_s
    seconds = dict(plan.stages)
    assert 3 * one_pass < seconds["training model of MoPE"] < 4.5 * one_pass  # 3 epochs, with validation
    assert seconds["training ranker"] == seconds["training model of MoPE"]
    assert plan.seconds == pytest.approx(sum(seconds.values()))


def test_without_trial_steps_there_are_steps_and_no_times(
    base: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("trial steps were taken")

    monkeypatch.setattr("mope.training.plan._measure", never)
    found = make_plan(config(base, fit={"epochs": 2}))
    assert (found.measured, found.stages, found.memory_bytes) == (None, (), 0.0)
    text = "\n".join(found.lines())
    assert f"steps of a network: {2 * -(-found.num_rows['train'] // 16):,} of 16 rows (2 epochs)" in text
    assert "not measured; add --measure-speed" in text
    assert "rows/s" not in text


def test_rows_to_look_at_are_counted_with_the_encoder_s_tokenizer(base: dict[str, dict[str, Any]]) -> None:
    data = main_rows(config(base, data={"min_rows": 10**6}))
    assert data.report.num_records == NUM_CHATS
    assert data.report.label_tokenizer != "cl100k_base"


def test_samples_and_switched_off_baselines_are_left_out(base: dict[str, dict[str, Any]]) -> None:
    less: dict[str, Any] = {"fine_tuned": (), "baselines": (), "max_test_rows": 10}
    found = make_plan(config(base, fit={"max_train_rows": 64}, evaluation=less), measure_s=0.1)
    assert found.num_rows == {"train": 64, "validation": 10, "test": 10}
    assert [name for name, _ in found.stages] == ["training model of MoPE", "router, calibration and test of MoPE"]


def test_each_network_of_the_separate_design_has_its_own_time(base: dict[str, dict[str, Any]]) -> None:
    separate = config(base, model={"design": "separate"}, fit={"overlap": 0.15}, evaluation={"fine_tuned": ()})
    seconds = dict(make_plan(separate, measure_s=0.1).stages)
    experts = [seconds[f"training expert-{k} of MoPE"] for k in range(3)]
    gate = seconds["training gate of MoPE"]
    assert all(0 < one < 0.6 * gate for one in experts)
    assert sum(experts) > gate  # the buckets overlap


def test_another_data_set_s_test_rows_are_counted(base: dict[str, dict[str, Any]]) -> None:
    found = make_plan(config(base, test_data={"source": base["data"]["source"]}), measure_s=0.1)
    assert found.num_rows["other test"] == found.num_rows["test"]
    assert sum("900 records read as pairs" in line for line in found.reports) == 1


def test_teachers_are_named_loaded_and_checked(
    base: dict[str, dict[str, Any]], tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A name that is both a recipe's and a folder's is the recipe's; the plan says so."""
    shutil.copytree(tiny, tmp_path / "chat-small")
    monkeypatch.chdir(tmp_path)
    model = {"teacher": str(tiny), "co_teachers": ("chat-small", "./chat-small"), "encoder": None}
    asked = config(base, data={"label_tokenizer": "cl100k_base"}, model=model)
    first, second, third, *_ = make_plan(asked, measure_s=0.1).lines()
    saved = "the predictor saved there (preset small on tiny-random-bert, 1 layers; 3 experts; knows "
    assert first.startswith(f"--teacher {tiny}: {saved}")
    assert second == (
        "--co-teachers chat-small: the recipe (not the packaged predictor; "
        "not the folder of that name: type --co-teachers ./chat-small for it), which is trained first, after the "
        "teachers of its own: chat-e5, chat-minilm"
    )
    assert third.startswith(f"--co-teachers ./chat-small: {saved}")
    with pytest.raises(ConfigError, match="counts tokens with 'cl100k_base'; type --label-tokenizer cl100k_base"):
        make_plan(config(base, model=model))


def test_too_few_rows_are_refused_as_by_the_run(base: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="--min-rows"):
        make_plan(config(base, data={"min_rows": 5000}))


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (89.4, "89 s"), (150, "2 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
