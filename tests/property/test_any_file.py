"""Whatever is written into any container is read back, and any path finds what it should."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.errors import DataError
from mope.field_map import FieldMap, found, paths_of, rewritten
from mope.record_csv import dialect_of
from mope.record_files import Entry, read_file
from mope.request import Request
from mope.request_files import read_request
from mope.training.data.formats import detect_format, normaliser
from mope.training.data.problems import Problems

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
# names of records' own fields: none that holds a list of records
records = st.lists(st.dictionaries(names.map("x".__add__), values, min_size=1, max_size=4), min_size=1, max_size=5)


class Anything:
    """Every name is a part of a record."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def read(path: Path) -> list[Any]:
    problems = Problems()
    entries = list(read_file(path, problems, parts=Anything()))
    assert not problems.counts
    assert not problems.warnings
    assert all(entry.record is not None for entry in entries)
    return [entry.record for entry in entries]


@settings(max_examples=150, deadline=None)
@given(
    records,
    st.sampled_from([".json", ".jsonl", ".ndjson", ""]),
    st.sampled_from(["", ".gz", ".zst"]),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from(["array", "lines", "blank lines", "crlf"]),
    st.booleans(),
)
def test_json_comes_back(
    written: list[Any], suffix: str, packing: str, indent: int | None, ascii_only: bool, form: str, bom: bool
) -> None:
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    if form == "array":
        text = dump(written)
    else:
        between = {"lines": "\n", "blank lines": "\n\n \n", "crlf": "\r\n"}[form]
        text = between.join(map(dump, written)) + between
    content = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    if packing == ".gz":
        content = gzip.compress(content)
    elif packing == ".zst":
        content = pa.compress(content, "zstd", asbytes=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data{suffix}{packing}"
        path.write_bytes(content)
        assert read(path) == written


tables = st.integers(1, 4).flatmap(
    lambda width: st.tuples(
        st.lists(names, min_size=width, max_size=width, unique=True),
        st.lists(st.lists(texts, min_size=width, max_size=width), min_size=1, max_size=6),
    )
)


def no_lone_carriage_return(table: Any) -> bool:
    return all("\r" not in cell and "\0" not in cell for row in table[1] for cell in row)


@settings(max_examples=300, deadline=None)
@given(
    tables.filter(no_lone_carriage_return),
    st.sampled_from([",", "\t", ";", "|"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_csv_comes_back(table: Any, delimiter: str, quoting: int, lineterminator: str) -> None:
    titles, rows = table
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=lineterminator).writerows([titles, *rows])
    if len(titles) > 1 or delimiter == ",":
        assert dialect_of(text.getvalue())["delimiter"] == delimiter
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("data.tsv" if delimiter == "\t" else "data.csv")
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
        expected = [dict(zip(titles, [cell or None for cell in row], strict=True)) for row in rows]
        if len(titles) == 1:
            expected = [record for record in expected if record[titles[0]] is not None or quoting != csv.QUOTE_MINIMAL]
        found_rows = read(path)
        assert [row for row in found_rows if any(row.values())] == [row for row in expected if any(row.values())]


@settings(max_examples=300, deadline=None)
@given(tables, st.text(st.sampled_from("ab,;|\t\"'\\\n "), max_size=80))
def test_a_comma_file_of_several_columns_is_never_split_at_anything_else(table: Any, noise: str) -> None:
    titles, _ = table
    if len(titles) > 1:
        assert dialect_of(",".join(titles) + "\n" + noise)["delimiter"] == ","


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"prompt": texts | st.none(), "n": st.integers(0, 2**40), "m": st.lists(texts, max_size=2)}
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([".parquet", ".arrow", ".feather"]),
)
def test_tables_come_back(written: list[Any], suffix: str) -> None:
    schema = pa.schema([("prompt", pa.string()), ("n", pa.int64()), ("m", pa.list_(pa.string()))])
    table = pa.Table.from_pylist(written, schema)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data{suffix}"
        if suffix == ".parquet":
            pq.write_table(table, path, row_group_size=3)
        elif suffix == ".feather":
            pa.feather.write_feather(table, path, chunksize=3)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                writer.write_table(table, max_chunksize=3)
        assert read(path) == written


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ""]))
def test_any_bytes_are_read_or_one_line(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data{suffix}"
        path.write_bytes(content)
        is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff") or content[:4] == b"\0\0\xfe\xff"
        with pytest.raises(DataError, match="UTF-") if is_utf16 else contextlib.nullcontext():
            for entry in read_file(path, Problems()):
                assert (entry.record is None) == bool(entry.mistake)
                assert isinstance(read_request(entry, {})[1], Request | str)


# --- paths ---

steps = st.lists(names | st.tuples(names, names).map(".".join) | st.integers(0, 3), min_size=1, max_size=5).filter(
    lambda way: isinstance(way[0], str)
)


@settings(max_examples=300, deadline=None)
@given(steps, st.lists(st.booleans(), min_size=5, max_size=5), texts.filter(lambda text: text[:1] not in ("[", "{")))
def test_any_path_leads_to_what_stands_there(way: list[str | int], as_text: list[bool], leaf: str) -> None:
    value: Any = leaf
    for number, step in enumerate(reversed(way)):
        value = {step: value} if isinstance(step, str) else [*([None] * step), value]
        if as_text[number] and number + 1 < len(way):
            value = json.dumps(value)
    path = ".".join(map(str, way))
    assert next(found(value, path)) == leaf
    assert FieldMap((("prompt_field", path),)).needs(str(way[0]))
    assert list(found(value, f"{path}x")) == []


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, values, max_size=4))
def test_paths_that_are_proposed_are_found(record: dict[str, Any]) -> None:
    for path in paths_of(record):
        assert list(found(record, path)) != []


logs = st.sampled_from(["request", "response", "messages", "usage", "input"])
words = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names | logs, values, max_size=5), words, st.integers(1, 10**6), names)
def test_a_mapped_record_has_the_prompt_and_the_length_that_were_named(
    record: dict[str, Any], prompt: str, tokens: int, llm: str
) -> None:
    fields = {"prompt_field": prompt, "length_field": tokens, "llm_field": llm}
    mapped = rewritten(record, fields, set(fields))
    assert detect_format([mapped]) in ("lengths", "logs")
    chat = normaliser("lengths", Problems(), drop_redacted=False, drop_flagged=False)(mapped, "x:1")
    assert [turn.prompt for turn in chat.turns] == [prompt]
    assert [turn.response_tokens for turn in chat.turns] == [tokens]
    assert chat.flags["target_llm"] == llm


known = st.sampled_from(
    ["prompt", "messages", "request", "response", "id", "usage", "body", "custom_id", "input", "events", "attributes"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(known | names, values, max_size=6))
def test_any_record_is_a_request_or_one_line(record: dict[str, Any]) -> None:
    request_id, request = read_request(Entry("line 1", record), {"max_tokens": 5})
    assert isinstance(request_id, str | int | float)
    assert isinstance(request, Request) or (request.startswith("line 1: ") and "\n" not in request)
