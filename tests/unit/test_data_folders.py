"""Which files of a folder are training data: splits by name as `datasets` has them, and what `save_to_disk` wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from mope.errors import DataError
from mope.record_folders import KEYWORDS, split_of
from mope.training.data.build import build_rows
from mope.training.data.config import DataConfig
from mope.training.data.problems import Problems
from mope.training.data.sources import open_source

ROWS = [{"prompt": f"prompt {number}", "response": f"answer {number}"} for number in range(4)]


def read(source: Path | str, **options: Any) -> tuple[list[str], list[str]]:
    """Prompts that a source gives, and its warnings."""
    problems = Problems()
    records = open_source(DataConfig(source=str(source), **options)).records(problems)
    return [record["prompt"] for _, record in records], problems.warnings


def write(path: Path, prompt: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompt": prompt, "response": "r"}) + "\n")


# --- splits in names ---

NAMES = [
    "train.jsonl", "train-00000-of-00001.jsonl", "training_2.jsonl", "a-train.jsonl", "trainer.jsonl", "test.jsonl",
    "my_test.jsonl", "my.test.v2.jsonl", "tests.jsonl", "latest.jsonl", "contest-1.jsonl", "testing.jsonl",
    "eval 1.jsonl", "evaluation.jsonl", "evaluations.jsonl", "dev.jsonl", "devices.jsonl", "val.jsonl", "value.jsonl",
    "valid-1.jsonl", "invalid.jsonl", "validation.jsonl", "test7.jsonl", "7test.jsonl", "TEST.jsonl",
    "train_test.jsonl", "logs.jsonl", "test_sft-00000-of-00001.jsonl",
]  # fmt: skip


def test_keywords_are_those_of_datasets() -> None:
    data_files = pytest.importorskip("datasets.data_files")
    assert {str(split): tuple(words) for split, words in data_files.SPLIT_KEYWORDS.items()} == KEYWORDS


@pytest.mark.parametrize("as_folder", [False, True])
def test_splits_are_those_that_datasets_finds(tmp_path: Path, as_folder: bool) -> None:
    data_files = pytest.importorskip("datasets.data_files")
    names = [f"{name.removesuffix('.jsonl')}/data.jsonl" for name in NAMES] if as_folder else NAMES
    for name in names:
        write(tmp_path / name, name)
    theirs: dict[str, str] = {}
    for split, patterns in data_files.get_data_patterns(str(tmp_path)).items():
        for pattern in patterns:
            try:
                found = data_files.resolve_pattern(pattern, str(tmp_path))
            except FileNotFoundError:
                continue
            for path in found:
                theirs.setdefault(Path(path).relative_to(tmp_path).as_posix(), str(split))
    assert len(set(theirs.values())) == 3
    assert {name: split_of(PurePosixPath(name)) for name in theirs} == theirs
    assert {split_of(PurePosixPath(name)) for name in set(names) - set(theirs)} == {"train"}  # of no split: read


def test_other_splits_are_left_out_and_named(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "more.jsonl", "test-0.jsonl", "data/validation-0.jsonl", "eval/a.jsonl"):
        write(tmp_path / name, name)
    prompts, warnings = read(tmp_path)
    assert prompts == ["more.jsonl", "train-0.jsonl"]
    (warning,) = warnings
    assert "files of other splits were left out (3): data/validation-0.jsonl, eval/a.jsonl, test-0.jsonl" in warning
    assert read(tmp_path, hub_split="test")[0] == ["eval/a.jsonl", "test-0.jsonl"]


def test_what_is_given_by_name_or_glob_is_read_whatever_its_name(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / name, name)
    assert read(tmp_path / "test.jsonl") == (["test.jsonl"], [])
    assert read(tmp_path / "*.jsonl") == (["test.jsonl", "train.jsonl"], [])


def test_the_name_of_the_folder_itself_is_no_split(tmp_path: Path) -> None:
    write(tmp_path / "eval" / "logs.jsonl", "x")
    assert read(tmp_path / "eval") == (["x"], [])


def test_a_folder_of_other_splits_alone_says_how_to_read_it(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", "x")
    with pytest.raises(DataError, match="holds no files of the split 'train', but such of test: type --hub-split test"):
        read(tmp_path)


def test_shards_of_a_split_with_a_name_of_its_own(tmp_path: Path) -> None:
    for split in ("train_sft", "train_gen", "test_sft"):
        write(tmp_path / "data" / f"{split}-00000-of-00001.jsonl", split)
    assert read(tmp_path)[0] == ["train_gen", "train_sft"]
    assert read(tmp_path, hub_split="test_sft")[0] == ["test_sft"]


def test_the_report_names_what_was_left_out(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"prompt": f"p {n}", "response": "word " * (n % 9 + 1)}) + "\n" for n in range(60))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(lines)
    config = DataConfig(source=str(tmp_path / "data"), cache_dir=tmp_path / "cache", min_rows=1)
    assert build_rows(config).report.warnings == ()
    (tmp_path / "data" / "test.jsonl").write_text(lines)
    for _ in range(2):  # also from the cache
        report = build_rows(config).report
        assert report.num_records == 60
        assert any("test.jsonl" in warning for warning in report.warnings)


# --- save_to_disk ---


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    expected = [row["prompt"] for row in ROWS]
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert read(tmp_path / "one") == (expected, [])
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"not one of its files")
    assert read(tmp_path / "one") == (expected, [])
    assert read(tmp_path)[0] == expected  # the folder around it
    assert len(read(tmp_path / "one" / "data-*.arrow")[0]) == len(ROWS)


def test_saved_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": ROWS[:3], "test": ROWS[3:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(
        str(tmp_path / "both")
    )
    prompts, warnings = read(tmp_path / "both")
    assert prompts == [row["prompt"] for row in ROWS[:3]]
    assert "left out (1): test/" in warnings[0]
    assert read(tmp_path / "both", hub_split="test")[0] == [ROWS[3]["prompt"]]
    with pytest.raises(DataError, match="holds no split 'dev'; there are train, test: type --hub-split train"):
        read(tmp_path / "both", hub_split="dev")
    shutil.rmtree(tmp_path / "both" / "train")
    with pytest.raises(DataError, match=r"state\.json can't be read .*save_to_disk"):
        read(tmp_path / "both")


@pytest.mark.parametrize(
    "state",
    ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [{"filename": "../secret.arrow"}]}',
     '{"_data_files": [{"filename": "gone.arrow"}]}', "[" * 100_000],
)  # fmt: skip
def test_damaged_state_is_one_line(tmp_path: Path, state: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    (tmp_path / "one" / "state.json").write_text(state)
    with pytest.raises(DataError, match="save_to_disk") as caught:
        read(tmp_path / "one")
    assert "\n" not in str(caught.value)
