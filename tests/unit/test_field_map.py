"""The field map: any nesting to known names, paths that are not there, fields that contradict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mope.errors import ConfigError, DataError
from mope.field_map import FIELD_MAP, NAMES, SEARCH_RECORDS, FieldMap, found, rewritten
from mope.training.data.build import build_rows
from mope.training.data.config import DataConfig
from mope.training.data.sources import open_source
from mope.training.recipe import load_recipe

NUM = 80


def build(path: Path, **fields: Any) -> Any:
    return build_rows(DataConfig(source=str(path), cache_dir=path.parent / "cache", min_rows=1, **fields))


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def own(number: int, **more: Any) -> dict[str, Any]:
    """A record of a form that nobody knows."""
    return {
        "in": {"turns": [{"q": f"What is {number}?"}]},
        "out": json.dumps({"parts": [{"say": "word " * (number % 11 + 1)}], "cost": {"n": number % 11 + 5, "th": 3}}),
        "served.by": "llama-3-8b",
        "why": {"stop": "length" if number % 2 else "stop"},
        "who": f"user {number % 7}",
        **more,
    }


MAP = {
    "prompt_field": "in.turns.0.q",
    "response_field": "out.parts.-1.say",
    "length_field": "out.cost.n",
    "thought_length_field": "out.cost.th",
    "llm_field": "served.by",
    "finish_field": "why.stop",
    "group_field": "who",
    "id_field": "key",
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_form_that_nobody_knows(tmp_path: Path, suffix: str) -> None:
    records = [own(number, key=f"k{number}", other=[1.5] * 10) for number in range(NUM)]
    path = tmp_path / f"own{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        lines(path, records)
    with pytest.raises(DataError, match="fit no known format"):
        build(path)
    data = build(path, **MAP)
    table = data.rows.table.to_pydict()
    assert data.report.num_records == NUM
    columns = ("prompt", "response_tokens", "thought_tokens", "censored", "row_id")
    for prompt, tokens, thoughts, censored, row_id in zip(*(table[name] for name in columns), strict=True):
        number = int(prompt.removeprefix("What is ").removesuffix("?"))
        assert (tokens, thoughts, censored) == (number % 11 + 5, 3, bool(number % 2))
        assert row_id.startswith(f"k{number}/")
    assert set(table["target_llm"]) == {"llama-3-8b"}
    assert len(set(table["group"])) <= 7


def test_the_text_of_an_answer_is_counted_where_no_length_is_given(tmp_path: Path) -> None:
    path = lines(tmp_path / "own.jsonl", [own(number) for number in range(NUM)])
    data = build(path, prompt_field="in.turns.0.q", response_field="out.parts.0.say")
    for row in data.rows.table.to_pylist():
        number = int(row["prompt"].removeprefix("What is ").removesuffix("?"))
        assert abs(row["response_tokens"] - (number % 11 + 1)) <= 1


def test_messages_in_another_place(tmp_path: Path) -> None:
    records = [
        {"payload": {"chat": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "w " * (n + 1)}]}}
        for n in range(NUM)
    ]
    data = build(lines(tmp_path / "own.jsonl", records), messages_field="payload.chat")
    assert data.report.data_format == "messages"
    assert data.report.num_records == sum(data.report.num_rows.values()) == NUM


def test_what_is_named_goes_before_what_is_known(tmp_path: Path) -> None:
    """A log of a known form whose length, LLM and finish are wrong, and right elsewhere."""
    records = [
        {
            "request": {"model": "alias", "messages": [{"role": "user", "content": f"q {number}"}]},
            "response": {
                "choices": [{"message": {"role": "assistant", "content": "w"}, "finish_reason": "stop"}],
                "usage": {"completion_tokens": 1 + number % 2},
            },
            "meter": {"tokens": 100 + number},
            "real": "llama-3-8b",
        }
        for number in range(NUM)
    ]
    path = lines(tmp_path / "log.jsonl", records)
    assert set(build(path).rows.table.to_pydict()["response_tokens"]) == {1, 2}
    data = build(path, length_field="meter.tokens", llm_field="real")
    table = data.rows.table.to_pydict()
    assert all(
        tokens == 100 + int(prompt[2:])
        for prompt, tokens in zip(table["prompt"], table["response_tokens"], strict=True)
    )
    assert set(table["target_llm"]) == {"llama-3-8b"}


@pytest.mark.parametrize(
    ("record", "path", "value"),
    [
        ({"a": {"b": 1}}, "a.b", 1),
        ({"a": '{"b": [5, {"c": "6"}]}'}, "a.b.1.c", "6"),
        ({"a": [1, 2]}, "a.-1", 2),
        ({"a": {"0": 3}}, "a.0", 3),
        ({"a.b": 4}, "a.b", 4),
        ({"attributes": {"gen_ai.usage.output_tokens": 7}}, "attributes.gen_ai.usage.output_tokens", 7),
        ({"a": {"x": 1}, "a.b": 2}, "a.b", 2),
        ({"a": [1]}, "a.1", None),
        ({"a": [1]}, "a.-2", None),
        ({"a": [1]}, "a.b", None),
        ({"a": "text"}, "a.b", None),
        ({"a": None}, "a", None),
        ({"a": 0}, "a", 0),
    ],
)
def test_paths(record: Any, path: str, value: Any) -> None:
    assert next(found(record, path), None) == value


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt_field": "a", "messages_field": "b"}, "--prompt-field and --messages-field both say where the prompt"),
        ({"thought_length_field": "a"}, "--thought-length-field says how many tokens of --length-field"),
        ({"prompt_field": "a", "response_field": "a"}, "--prompt-field and --response-field are both a"),
        ({"prompt_field": "a..b"}, "--prompt-field 'a..b': a path is names and positions"),
        ({"prompt_field": ""}, "--prompt-field ''"),
    ],
)
def test_fields_that_contradict(tmp_path: Path, fields: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_source(DataConfig(source=str(lines(tmp_path / "own.jsonl", [{}])), **fields))
    assert said in str(caught.value)


def test_a_path_that_no_record_has_names_the_nearest(tmp_path: Path) -> None:
    path = lines(tmp_path / "own.jsonl", [own(number) for number in range(NUM)])
    for field, given, said in (
        ("length_field", "out.cost.tokens", "did you mean out.cost"),
        ("length_field", "cost.n", "did you mean out.cost.n"),
        ("prompt_field", "in.turns.q", "did you mean in.turns.0.q"),
        ("finish_field", "why.stopp", "did you mean why.stop"),
        ("llm_field", "zzzz", "on top there are in, out, served.by, who, why"),
    ):
        with pytest.raises(DataError) as caught:
            build(path, **{"prompt_field": "in.turns.0.q", "length_field": "out.cost.n", field: given})
        line = str(caught.value)
        assert line.startswith(f"--{field.replace('_', '-')} {given}: no record of own.jsonl has a value there; ")
        assert said in line
        assert "\n" not in line


def test_a_rare_field_is_a_warning_and_a_missing_length_an_error(tmp_path: Path) -> None:
    records = [own(number) for number in range(SEARCH_RECORDS + NUM)]
    records[-1]["rare"] = "length"
    path = lines(tmp_path / "own.jsonl", records)
    base = {"prompt_field": "in.turns.0.q", "length_field": "out.cost.n"}
    report = build(path, **base, finish_field="rare").report
    assert report.num_records == len(records)
    assert any("none of the first 1,000 records" in warning for warning in report.warnings)
    with pytest.raises(DataError, match="none of the first 1,000 records"):
        build(path, prompt_field="in.turns.0.q", length_field="rare")


def test_records_without_the_value_are_counted(tmp_path: Path) -> None:
    records = [own(number) for number in range(NUM)]
    records[3]["in"] = {"turns": []}
    records[4]["out"] = "broken"
    report = build(
        lines(tmp_path / "own.jsonl", records), prompt_field="in.turns.0.q", length_field="out.cost.n"
    ).report
    assert report.num_records == NUM
    assert sum(report.num_rows.values()) == NUM - 2
    assert sum(report.counts.values()) == 2


def test_columns_of_other_tables_are_loaded_by_the_first_part_of_a_path(tmp_path: Path) -> None:
    rows = [{"zz": {"n": number}, "yy.n": number, "unwanted": "x"} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    fields = FieldMap((("prompt_field", "zz.n"), ("length_field", "yy.n")))
    assert [fields.needs(name) for name in ("zz", "yy.n", "unwanted", "z", "yy")] == [True, True, False, False, True]


def test_the_rows_of_another_map_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    path = lines(tmp_path / "own.jsonl", [own(number) for number in range(NUM)])
    one = build(path, prompt_field="in.turns.0.q", length_field="out.cost.n")
    other = build(path, prompt_field="in.turns.0.q", response_field="out.parts.0.say")
    again = build(path, prompt_field="in.turns.0.q", length_field="out.cost.n")
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert again.report.from_cache


def test_a_map_belongs_to_one_source() -> None:
    config = load_recipe(None, {"data": {"source": "x", "prompt_field": "a"}, "also": [{"source": "y"}],
                                "test_data": {"source": "z"}})  # fmt: skip
    assert config.data.prompt_field == "a"
    assert config.also[0].prompt_field is None
    assert config.test_data is not None
    assert config.test_data.prompt_field is None


def test_every_field_has_a_name() -> None:
    assert set(NAMES) == set(FIELD_MAP)
    assert set(FIELD_MAP) <= set(DataConfig.model_fields)


def test_batches_keep_what_joins_them() -> None:
    half = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "q"}]}, "lang": "en"}
    assert rewritten(half, {"language_field": "en"}, {"language_field"}) == {**half, "language": "en"}


def test_a_column_of_the_map_says_nothing_else_whatever_its_name_means(tmp_path: Path) -> None:
    """A length in a column `n` is no number of choices, and one in `max_tokens` no cap."""
    for column in ("n", "max_tokens", "Best Of"):
        records = [{"q": f"What is {number}?", column: number % 11 + 5} for number in range(NUM)]
        path = lines(tmp_path / f"{column}.jsonl", records)
        table = build(path, prompt_field="q", length_field=column).rows.table
        for row in table.to_pylist():
            assert row["response_tokens"] == int(row["prompt"].removeprefix("What is ").removesuffix("?")) % 11 + 5
            assert row["max_tokens"] is None


def test_the_columns_of_an_error_are_those_of_the_file(tmp_path: Path) -> None:
    path = lines(tmp_path / "own.jsonl", [{"q": "What is a?", "words": "of it"}] * 3)
    with pytest.raises(DataError, match=r"columns q, words fit no known format; .* misses an answer or its length"):
        build(path, prompt_field="q")
