"""Files of records: every container, every dialect of CSV, and every way in which a file can be damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from mope import record_files, record_json
from mope.errors import DataError, MissingExtraError
from mope.log_records import NAMES
from mope.record_csv import dialect_of
from mope.record_files import SUFFIXES, Entry, is_known, read_file, read_stream
from mope.training.data.problems import Problems

RECORDS = [{"prompt": f"prompt {number}", "response": f'naïve "answer",\n{number}; 日本\t|'} for number in range(5)]


def read(path: Path, **options: Any) -> tuple[list[Any], Problems, list[Entry]]:
    problems = Problems()
    entries = list(read_file(path, problems, **options))
    return [entry.record for entry in entries if entry.record is not None], problems, entries


def as_csv(rows: list[list[str]], **dialect: Any) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows(rows)
    return text.getvalue()


def text_of(suffix: str, records: list[dict[str, Any]] = RECORDS) -> bytes:
    if suffix == ".json":
        return json.dumps(records, indent=1).encode()
    if suffix in (".csv", ".tsv"):
        rows = [list(records[0]), *(list(record.values()) for record in records)]
        return as_csv(rows, delimiter="\t" if suffix == ".tsv" else ",").encode()
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def packed(content: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(content)
    return pa.compress(content, "zstd", asbytes=True) if suffix.endswith(".zst") else content


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    table = pa.Table.from_pylist(records)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".feather":
        pa.feather.write_feather(table, path, chunksize=2)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        path.write_bytes(packed(text_of(record_files.suffix_of(path.name), records), path.name))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("upper", [False, True])
def test_every_container_gives_the_same_records(tmp_path: Path, suffix: str, upper: bool) -> None:
    path = write(tmp_path / f"data{suffix}")
    if upper:
        path = path.rename(tmp_path / f"DATA{suffix.upper()}")
    records, problems, entries = read(path)
    assert records == RECORDS
    assert not problems.counts
    assert not problems.warnings
    assert len({entry.place for entry in entries}) == len(RECORDS)
    assert is_known(path.name)


def test_files_of_no_suffix_are_json_and_compression_is_seen(tmp_path: Path) -> None:
    for number, content in enumerate((text_of(".jsonl"), text_of(".json"))):
        for packing in ("", ".gz", ".zst"):
            path = tmp_path / f"data{number}{packing[1:]}"
            path.write_bytes(packed(content, packing))
            assert read(path)[0] == RECORDS


def test_frames_one_after_the_other(tmp_path: Path) -> None:
    for packing in (".gz", ".zst"):
        path = tmp_path / f"data.jsonl{packing}"
        path.write_bytes(b"".join(packed(text_of(".jsonl", [record]), packing) for record in RECORDS))
        assert read(path)[0] == RECORDS


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("num_lost", [3, 200_000])
def test_what_comes_before_a_break_is_read(tmp_path: Path, packing: str, num_lost: int) -> None:
    noise = Random(0)
    records = [{"prompt": noise.randbytes(100).hex()} for _ in range(10_000)]
    path = tmp_path / f"data.jsonl{packing}"
    path.write_bytes(packed(text_of(".jsonl", records), packing)[:-num_lost])
    found, problems, _ = read(path)
    assert found == records[: len(found)]
    assert len(found) > len(records) - num_lost / 50 - 2_000
    (warning,) = problems.warnings
    assert "is a damaged or cut-off" in warning
    assert "what comes before was read" in warning


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_files_that_are_not_compressed_as_they_say(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"data{suffix}").write_bytes(b'{"prompt": "x"}\n' * 3)
    records, problems, _ = read(tmp_path / f"data{suffix}")
    assert records == []
    assert "is a damaged or cut-off" in problems.warnings[0]


@pytest.mark.parametrize(("encoding", "said"), [("utf-16", "UTF-16"), ("utf-32", "UTF-32")])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".tsv.gz"])
def test_other_encodings_are_one_line(tmp_path: Path, encoding: str, said: str, suffix: str) -> None:
    (tmp_path / f"data{suffix}").write_bytes(packed('{"prompt": "x"}'.encode(encoding), suffix))
    with pytest.raises(DataError, match=f"is {said}; expected UTF-8: iconv -f {said}"):
        read(tmp_path / f"data{suffix}")


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl.zst", "data.arrow", "data.feather"])
def test_without_pyarrow_one_line_says_what_to_install(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'pyarrow'.*pip install 'mope-llm\[files\]'"):
        read(tmp_path / name)


# --- JSON ---


@pytest.mark.parametrize(
    ("content", "records"),
    [
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        ('{\n "a": 1\n}\n{\n "a": 2\n}\n', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}{"a": 2} {"a": 3}', [{"a": 1}, {"a": 2}, {"a": 3}]),
        ('[{"a": 1}]\n[{"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('{"v": [1, 2], "data": [ {"a": 1}], "n": 3}', [{"a": 1}]),
        ('{"input_lens": [1, 2], "errors": ["", ""], "date": "x"}',
         [{"input_lens": [1, 2], "errors": ["", ""], "date": "x"}]),
        ('{"ttfts": [0.5], "itls": [[0.1]], "empty": []}', [{"ttfts": [0.5], "itls": [[0.1]], "empty": []}]),
        ('{"prompt": "p", "notes": [{"a": 1}]}', [{"prompt": "p", "notes": [{"a": 1}]}]),
        ('{"spans": [{"name": "chat"}]}', [{"spans": [{"name": "chat"}]}]),
        ('{"a": 1,\n"data": [\n{"a": 2}\n]}', [{"a": 2}]),
        ('{"data": [\n{"a": 2}\n]}', [{"a": 2}]),
        ("\n\n", []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("head_bytes", [1 << 20, 8])
def test_forms_of_json(
    tmp_path: Path, content: str, records: list[Any], monkeypatch: pytest.MonkeyPatch, head_bytes: int
) -> None:
    monkeypatch.setattr(record_json, "CHUNK_BYTES", head_bytes)
    (tmp_path / "data.json").write_text(content)
    found, problems, _ = read(tmp_path / "data.json", parts=NAMES)
    assert found == records
    assert not problems.warnings


def test_a_second_list_of_records_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"train": [{"a": 1}], "test": [{"a": 2}, {"a": 3}], "n": 1}')
    found, problems, _ = read(tmp_path / "data.json")
    assert found == [{"a": 1}]
    assert problems.warnings == ["data.json: records are read from its list 'train' alone, 'test' is left out"]


def test_indented_records_in_jsonl(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record, indent=2) for record in RECORDS))
    assert read(tmp_path / "data.jsonl")[0] == RECORDS


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_files, "MAX_RECORD_CHARS", 100)
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 1000 + '"}\n{"a": 2}\n')
    found, _, entries = read(tmp_path / "data.jsonl")
    assert found == [{"a": 1}, {"a": 2}]
    assert {entry.place for entry in entries if entry.record is None} == {"line 2"}


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "1" * 10_000 + "}", "\\", "]", "}", "nul", '{"a" 1}', "{,}x"],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_hostile_json_is_told_and_raises_nothing(tmp_path: Path, content: str, suffix: str) -> None:
    (tmp_path / f"data{suffix}").write_text(content)
    found, problems, entries = read(tmp_path / f"data{suffix}")
    assert found == [{}] if content == "{,}x" and suffix == ".json" else found == []
    assert problems.warnings or entries[-1].record is None


def test_a_pipe_is_read_to_its_end() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def read1(self, size: int | None = -1) -> bytes:
            return super().read1(min(size or 7, 7))  # as little as a pipe may give

    for content in (text_of(".jsonl"), text_of(".json"), gzip.compress(text_of(".jsonl"))):
        entries = list(read_stream("stdin", Pipe(content), Problems()))
        assert [entry.record for entry in entries] == RECORDS


# --- CSV ---

ROWS = [["prompt", "response"], ['He said "hi", ok; a\tb', "x|y\nz"], ["'a'", "b;c,d"], ["C:\\temp\\", "\\n"]]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_delimiters(tmp_path: Path, delimiter: str, quoting: int, lineterminator: str, suffix: str) -> None:
    text = as_csv(ROWS, delimiter=delimiter, quoting=quoting, lineterminator=lineterminator)
    (tmp_path / f"data{suffix}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found, problems, _ = read(tmp_path / f"data{suffix}")
    assert [list(record.values()) for record in found] == ROWS[1:]
    assert [list(record) for record in found] == [ROWS[0]] * 3
    assert not problems.counts


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ('prompt,response\n"a \\"quoted\\" word, here","b"\n', {"prompt": 'a "quoted" word, here', "response": "b"}),
        ("'prompt','response'\n'it''s, ok','b'\n", {"prompt": "it's, ok", "response": "b"}),
        ('prompt, response\na, "b, c"\n', {"prompt": "a", "response": "b, c"}),
        ('prompt\tresponse\n"quote\tb\n', {"prompt": '"quote', "response": "b"}),
        ('prompt\tresponse\n"one" word\tb\n', {"prompt": '"one" word', "response": "b"}),
        ("sep=;\nprompt;response\na,b;c\n", {"prompt": "a,b", "response": "c"}),
        ("prompt;response\na;b\nbroken\nc;d\n", {"prompt": "a", "response": "b"}),
    ],
)
def test_dialects(tmp_path: Path, text: str, record: dict[str, str]) -> None:
    suffix = ".tsv" if "\t" in text else ".csv"
    (tmp_path / f"data{suffix}").write_text(text)
    found, _, entries = read(tmp_path / f"data{suffix}")
    assert found[0] == record
    assert entries[0].place == ("line 3" if text.startswith("sep=") else "line 2")


@pytest.mark.parametrize(
    "text",
    [
        "prompt,response\na;b,c\nd|e,f\tg\n",
        "prompt;x,response\na;b,c\n",
        "prompt\na;b\nc;d\n",
        "prompt\na, b\n",
        "prompt\n",
        "",
        'a,b\n"x","y\n',  # cut off in a quoted field
        'prompt,response\n"a","b"\nragged\nragged,too,long\n',
        "prompt,response\n'a',b\n",
    ],
)
def test_a_plain_comma_file_is_never_split_otherwise(text: str) -> None:
    assert dialect_of(text) == {"delimiter": ","}


def test_a_dialect_is_found_where_the_head_ends_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["prompt", "response"], *([f'a{n};\n, "b"', "c" * (n % 50)] for n in range(500))]
    for size in (60, 1000, 1003, 1024):
        monkeypatch.setattr(record_files, "HEAD_BYTES", size)
        monkeypatch.setattr("mope.record_csv.HEAD_BYTES", size)
        (tmp_path / "data.csv").write_text(as_csv(rows, delimiter=";"), newline="")
        found, problems, _ = read(tmp_path / "data.csv")
        assert [[record["prompt"], record["response"] or ""] for record in found] == rows[1:]
        assert not problems.warnings


# --- tables ---


def test_only_wanted_columns_are_loaded(tmp_path: Path) -> None:
    rows = [{**record, "embedding": [0.5] * 3} for record in RECORDS]
    selection = record_files.Selection(lambda name: name == "prompt")
    for suffix in (".parquet", ".arrow", ".feather"):
        path = write(tmp_path / f"data{suffix}", rows)
        assert read(path, selection=selection)[0] == [{"prompt": row["prompt"]} for row in rows]
        nothing = record_files.Selection(lambda name: False)
        assert read(path, selection=nothing)[0] == rows


def test_a_file_in_arrow_s_file_format_is_read_as_well(tmp_path: Path) -> None:
    write(tmp_path / "data.feather").rename(tmp_path / "data.arrow")
    assert read(tmp_path / "data.arrow")[0] == RECORDS


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "zeros"])
def test_damaged_tables_are_one_line(tmp_path: Path, suffix: str, damage: str) -> None:
    path = write(tmp_path / f"data{suffix}")
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[: len(content) // 2], "noise": b"PAR1 not really", "empty": b"", "zeros": bytes(5000)}[damage]
    )
    with pytest.raises(DataError) as caught:
        read(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_feather_of_version_1_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data.feather").write_bytes(b"FEA1" + bytes(100))
    with pytest.raises(DataError, match="is Feather of version 1; write it anew"):
        read(tmp_path / "data.feather")


FLIP = """
import sys
from pathlib import Path
from random import Random
from mope.errors import DataError
from mope.record_files import read_file
from mope.training.data.problems import Problems
path, noise = Path(sys.argv[1]), Random(0)
content, num_damaged = path.read_bytes(), 0
for _ in range(300):
    damaged = bytearray(content)
    for _ in range(noise.choice([1, 2, 5])):
        damaged[noise.randrange(len(damaged))] = noise.choice([0, 127, 255])
    path.write_bytes(damaged)
    try:
        list(read_file(path, Problems()))
    except DataError:
        num_damaged += 1
sys.exit(0 if num_damaged > 100 else "nothing was damaged")
"""


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_flipped_bytes_crash_nothing(tmp_path: Path, suffix: str) -> None:
    records = [{"prompt": f"p {number}", "m": ["a"] * (number % 3), "r": {"x": number}} for number in range(50)]
    path = write(tmp_path / f"data{suffix}", records)
    done = subprocess.run([sys.executable, "-c", FLIP, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
