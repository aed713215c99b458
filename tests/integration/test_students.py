"""Students of a trained teacher: a cut of its trunk, and a table of static vectors; their files, grids and errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train_run import settings, write_chats

from mope import LengthPredictor, artifact, packaged
from mope.backends.static_encoder import StaticEncoder
from mope.backends.torch_backend import TorchBackend
from mope.errors import ArtifactError, ConfigError
from mope.features import NUMBER_NAMES
from mope.training import run as run_module
from mope.training import teacher as teacher_module
from mope.training.batches import Targets
from mope.training.config import ModelConfig, TrainConfig
from mope.training.data.build import build_rows, resolve_label_tokenizer
from mope.training.data.table import RowTable
from mope.training.prepare import Grid
from mope.training.run import train
from mope.training.teacher import Teacher, lessons, on_grid
from mope.training.teachers import named_teachers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("students")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_encoder: Path) -> TrainConfig:
    return settings(write_chats(folder / "chats.jsonl"), tiny_encoder, folder / "cache")


@pytest.fixture(scope="module")
def teacher(folder: Path, config: TrainConfig) -> Path:
    train(config, folder / "teacher")
    return folder / "teacher"


def student(config: TrainConfig, **model: object) -> TrainConfig:
    model = {"max_prompt_tokens": 12, "router_parts": ("gate", "rules"), "encoder": None, **model}
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


@pytest.mark.parametrize(
    "model",
    [
        {"preset": "small", "num_layers": 1},
        {"preset": "micro", "static_size": 12},
        {"preset": "micro", "static_size": 12, "static_filters": 5},
    ],
    ids=["small", "micro", "filters"],
)
def test_a_student_learns_on_its_teacher_s_grid(
    model: dict[str, object], teacher: Path, config: TrainConfig, tmp_path: Path
) -> None:
    result = train(student(config, teacher=str(teacher), **model), tmp_path / "out")
    assert result is not None
    found = result.metrics["test"]["all_turns"]
    assert found["mope"]["mae"] < 0.75 * found["constant"]["mae"]
    predictor, taught = LengthPredictor.from_pretrained(result.folder), LengthPredictor.from_pretrained(teacher)
    assert (predictor.config.edges, predictor.config.boundaries) == (taught.config.edges, taught.config.boundaries)
    assert predictor.config.preset == model["preset"]
    assert predictor.config.max_prompt_tokens == 12
    assert not (result.folder / "lookup.safetensors").exists()
    assert predictor.predict("write abcdef").median > 2 * predictor.predict("name abcdef").median


def test_the_table_of_a_micro_predictor_begins_with_what_its_teacher_says_of_each_token(teacher: Path) -> None:
    from mope.training.static import token_vectors
    from mope.training.trunks import find_trunk

    found = find_trunk(ModelConfig(preset="micro", teacher=str(teacher), static_size=16), Teacher(teacher))
    encoder = found.load()
    assert isinstance(encoder, StaticEncoder)
    vectors = encoder.vectors.weight.detach()
    original = token_vectors(Teacher(teacher).load(), found.special_ids)
    assert vectors.std() == pytest.approx(1.0, abs=1e-3)
    # all 16 axes are kept: distances between tokens stay as they were, up to one factor
    ratio = torch.cdist(vectors[10:40], vectors[10:40]) / torch.cdist(original[10:40], original[10:40])
    ratio = ratio[~torch.eye(30, dtype=torch.bool)]
    assert float(ratio.max() / ratio.min()) < 1.01


def test_a_student_begins_with_its_teacher_s_gate_and_heads(teacher: Path, config: TrainConfig, tmp_path: Path) -> None:
    """Trained with a rate of nothing at all, a student with the whole trunk and window says what its teacher says."""
    still = config.fit.model_copy(update={"learning_rate": 1e-12, "head_learning_rate": 1e-12, "epochs": 0.1})
    begun = student(config, teacher=str(teacher), max_prompt_tokens=16).model_copy(update={"fit": still})
    result = train(begun, tmp_path / "out")
    assert result is not None
    networks = []
    for folder in (result.folder, teacher):
        backend = LengthPredictor.from_pretrained(folder).backend
        assert isinstance(backend, TorchBackend)
        networks.append(backend.networks[0])
    ids = torch.tensor([[2, 50, 60, 3]])
    with torch.inference_mode():
        one, other = (
            network(ids, torch.ones_like(ids), torch.zeros(1, len(NUMBER_NAMES)), torch.tensor([1]))
            for network in networks
        )
    for mine, taught in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, taught, atol=1e-4)


def test_a_teacher_that_is_a_recipe_is_trained_first_and_kept(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = config.model_copy(update={"fit": config.fit.model_copy(update={"epochs": 0.5})})
    monkeypatch.setattr(run_module, "load_recipe", lambda name, overrides: quick)
    asked = student(quick, teacher="demo")
    train(asked, tmp_path / "out")
    assert (tmp_path / "out.teacher" / "files.json").exists()
    assert "first the teacher: recipe demo" in capsys.readouterr().err
    train(asked, tmp_path / "out", overwrite=True)
    assert "is already trained" in capsys.readouterr().err
    other = quick.model_copy(update={"fit": quick.fit.model_copy(update={"seed": 7})})
    monkeypatch.setattr(run_module, "load_recipe", lambda name, overrides: other)
    with pytest.raises(ConfigError, match="not trained as recipe demo says"):
        train(asked, tmp_path / "out", overwrite=True)


def test_what_a_teacher_said_is_kept_for_a_resumed_run_and_for_other_students(
    teacher: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = student(config, teacher=str(teacher))
    train(asked, tmp_path / "out")
    assert list((config.data.cache_dir / "teachers").glob("*.safetensors"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    own = json.loads((teacher / "metrics.json").read_text())
    for part, found in metrics["test"].items():
        assert found["teacher"]["mae"] == pytest.approx(own["test"][part]["mope"]["mae"], rel=1e-6)
    encode = teacher_module.encode_rows
    monkeypatch.setattr(teacher_module, "encode_rows", lambda *_: pytest.fail("the teacher was asked again"))
    train(asked, tmp_path / "out", resume=True, overwrite=True)
    monkeypatch.setattr(teacher_module, "encode_rows", encode)
    fewer = asked.model_copy(update={"fit": asked.fit.model_copy(update={"max_train_rows": 200, "epochs": 1})})
    before = len(list((config.data.cache_dir / "teachers").iterdir()))
    train(fewer, tmp_path / "fewer")
    assert len(list((config.data.cache_dir / "teachers").iterdir())) == before + 1


def test_a_student_of_another_encoder_begins_there_and_learns_from_two_teachers(
    teacher: Path, config: TrainConfig, folder: Path, tmp_path: Path
) -> None:
    """The second teacher has another grid; both learned from the rows, so each row is taught by their mean."""
    other = config.model_copy(
        update={"model": config.model.model_copy(update={"num_experts": 2, "boundaries": (), "num_bins": 20})}
    )
    train(other, tmp_path / "other")
    begun = student(config, teacher=str(teacher), co_teachers=(str(tmp_path / "other"),), encoder=config.model.encoder)
    result = train(begun, tmp_path / "out")
    assert result is not None
    found = result.metrics["test"]["all_turns"]
    assert found["mope"]["mae"] < 0.75 * found["constant"]["mae"]
    predictor, taught = LengthPredictor.from_pretrained(result.folder), LengthPredictor.from_pretrained(teacher)
    assert (predictor.config.edges, predictor.config.boundaries) == (taught.config.edges, taught.config.boundaries)
    assert "beside it" in (result.folder / "README.md").read_text()


def test_a_teacher_is_asked_only_for_rows_like_those_that_it_learned_from(
    teacher: Path, config: TrainConfig, tmp_path: Path
) -> None:
    first = Teacher(teacher)
    data = resolve_label_tokenizer(config.data, first.tokenizer_json, tmp_path)
    table = build_rows(data).rows.split("train").take(np.arange(40))
    grid = Grid.of(first.settings)

    class Loud(Teacher):
        """Says that every answer is one token long."""

        def answers(self, table: RowTable, grid: Grid, fingerprint: str, cache_dir: Path) -> Targets:
            said = first.answers(table, grid, fingerprint, cache_dir)
            mix = np.full_like(said.log_mix_RN, np.log(1e-7))
            mix[:, 0] = 0.0
            return Targets(mix, said.log_gate_RK)

        def learned_from(self, source: str) -> bool:
            return source == "there"

    sources = ["here"] * 30 + ["there"] * 10
    asked = (table, sources, {"here": "1", "there": "2"}, grid, config.data.cache_dir)
    loud = Loud(teacher)
    alone = np.exp(lessons([first], first, *asked).log_mix_RN.astype(float))
    both = np.exp(lessons([first, loud], first, *asked).log_mix_RN.astype(float))
    np.testing.assert_allclose(both[:30], alone[:30], rtol=2e-2, atol=1e-6)
    np.testing.assert_allclose(both[30:, 0], 1.0, rtol=2e-2)  # the first did not learn from rows of "there"
    beside_none = lessons([loud], None, *asked)
    assert np.isnan(beside_none.log_mix_RN[:30]).all()
    assert np.isnan(beside_none.log_gate_RK[:30]).all()
    np.testing.assert_array_equal(np.exp(beside_none.log_mix_RN[30:].astype(float)), both[30:])
    assert not first.learned_from("there")
    assert first.learned_from(config.data.source)


def test_what_a_teacher_said_on_another_grid_is_kept_as_it_was_said(
    teacher: Path, config: TrainConfig, tmp_path: Path
) -> None:
    first = Teacher(teacher)
    table = build_rows(resolve_label_tokenizer(config.data, first.tokenizer_json, tmp_path)).rows.split("train")
    own = Grid.of(first.settings)
    for grid in (
        own,
        replace(own, boundaries=(own.edges[3],), edges=own.edges[2:], num_body_bins=own.num_body_bins - 2),
    ):
        asked = (table.take(np.arange(30)), grid, "these rows", tmp_path)
        said, kept = first.answers(*asked), first.answers(*asked)
        np.testing.assert_array_equal(kept.log_mix_RN, said.log_mix_RN)
        np.testing.assert_array_equal(kept.log_gate_RK, said.log_gate_RK)
        np.testing.assert_allclose(np.exp(kept.log_mix_RN.astype(float)).sum(axis=1), 1.0, atol=2e-2)


def test_a_predictor_that_was_exported_for_serving_can_teach_beside_another() -> None:
    """It has no weights to begin with, but what it answers is all that a co-teacher is asked for."""
    folder = packaged.PREDICTORS / "chat-micro"
    (named,) = named_teachers(ModelConfig(teacher="demo", co_teachers=(str(folder),)))[1:]
    teacher = Teacher(named.folder)
    assert teacher.predictor.backend.name == "onnx"
    assert teacher.learned_from("sharegpt")


@given(
    st.lists(st.floats(0.01, 10), min_size=8, max_size=8),
    st.lists(st.integers(2, 900), min_size=3, max_size=12, unique=True),
)
def test_a_mixture_on_another_grid_keeps_its_masses(weights: list[float], borders: list[int]) -> None:
    """What lies below an edge that both grids have is the same on both; all masses sum to 1."""
    own = Grid((20.5,), (0.5, 2.5, 5.5, 10.5, 20.5, 50.5, 100.5, 300.5, 600.5, 2000.5), 7, (0.7, 0.3), 1.0)
    inner = sorted({*(border + 0.5 for border in borders), 20.5, 300.5})
    other = Grid((20.5, 300.5), (0.5, *inner, 5000.5), len(inner), (1.0,), 1.0)
    p = np.array(weights) / sum(weights)
    moved = on_grid(np.log(p)[None], own, other)
    masses = np.exp(moved.log_mix_RN.astype(float))[0]
    gate = np.exp(moved.log_gate_RK.astype(float))[0]
    assert masses.sum() == pytest.approx(1.0, abs=5e-3)
    assert gate == pytest.approx([p[:4].sum(), p[4:7].sum(), p[7]], rel=5e-3)
    upto = inner.index(20.5) + 1
    assert masses[:upto].sum() == pytest.approx(p[:4].sum(), rel=5e-3)


def test_a_student_of_co_teachers_alone_has_a_grid_of_its_own(
    teacher: Path, config: TrainConfig, tmp_path: Path
) -> None:
    """It learns rows that no teacher knows from their lengths: all of them, where none knows any."""
    foreign = Path(shutil.copytree(teacher, tmp_path / "foreign"))
    provenance = json.loads((foreign / "provenance.json").read_text())
    artifact.write_json(foreign / "provenance.json", {**provenance, "data": {"elsewhere": "0"}})
    artifact.seal(foreign)
    own = config.model.model_copy(update={"num_experts": 2, "boundaries": (), "num_bins": 20, "teacher": None})
    maes = {}
    for name, folder in {"knows": teacher, "foreign": foreign}.items():
        model = own.model_copy(update={"co_teachers": (str(folder),)})
        result = train(config.model_copy(update={"model": model}), tmp_path / f"taught-by-{name}")
        assert result is not None
        found = result.metrics["test"]["all_turns"]
        assert "teacher" not in found
        assert found["mope"]["mae"] < 0.75 * found["constant"]["mae"]
        assert LengthPredictor.from_pretrained(result.folder).config.num_experts == 2
        assert "**Teachers**: `" in (result.folder / "README.md").read_text()
        maes[name] = found["mope"]["mae"]
    assert maes["knows"] != maes["foreign"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_experts": 2}, "has 3 experts; type --num-experts 3"),
        ({"boundaries": (20.0, 90.0)}, "settles the borders"),
        ({"design": "separate"}, "type --design shared"),
        ({"preset": "micro", "static_size": 17}, "--static-size: got 17"),
    ],
)
def test_a_student_that_cannot_learn_from_its_teacher_is_told_why(
    model: dict[str, object], message: str, teacher: Path, config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(student(config, teacher=str(teacher), **model), tmp_path / "out")


def test_a_teacher_with_another_tokenizer_or_none_at_all(teacher: Path, config: TrainConfig, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(teacher, tmp_path / "copy"))
    saved = json.loads((copy / "config.json").read_text())
    artifact.write_json(copy / "config.json", {**saved, "label_tokenizer": "o200k_base"})
    artifact.seal(copy)
    with pytest.raises(ConfigError, match="type --label-tokenizer o200k_base"):
        train(student(config, teacher=str(copy)), tmp_path / "out")
    with pytest.raises(ConfigError, match="is the teacher itself"):
        train(student(config, teacher=str(teacher)), teacher, overwrite=True)
    with pytest.raises(ConfigError, match="no folder there and no recipe of that name"):
        train(student(config, teacher=str(tmp_path / "nowhere")), tmp_path / "out")
    (copy / "model.safetensors").unlink()
    artifact.seal(copy)
    with pytest.raises(ArtifactError, match=r"no PyTorch weights .* a teacher needs them"):
        train(student(config, teacher=str(copy)), tmp_path / "out")
