"""Rows in are rows kept and rows named: no record and no answer of a log is lost in silence, whatever it holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from all_log_forms import FORMS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_forms import NUM
from word_rows import WordRows

from mope.errors import DataError
from mope.log_records import NAMES, logged, unpacked
from mope.training.data import problems as reasons
from mope.training.data.batches import opened
from mope.training.data.build import DataSet
from mope.training.data.formats import FORMATS, Unusable, detect_format, normaliser
from mope.training.data.problems import NOTES, Problems

INNER = ("role", "function", "arguments", "parts", "functionCall", "thought", "key", "value", "stringValue", "body",
         "completion_tokens", "reasoning_tokens", "candidatesTokenCount", "text", "index", "from",
         "gen_ai.prompt.0.role", "gen_ai.input.messages", "gen_ai.usage.output_tokens", "message", "output",
         "custom_id")  # fmt: skip
WORDS = st.sampled_from(
    ("", "a b c", "user", "assistant", "length", "stop", "12", "[", '{"a": [1', "reasoning", "message", "tool_use",
     "\ud800\0", "succeeded", "[{'role': 'user'}]")
)  # fmt: skip
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-2, 2**40), st.floats(), WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from((*sorted(NAMES), *INNER)), inner, max_size=4)
    ),
    max_leaves=12,
)
RECORDS = st.dictionaries(st.sampled_from((*sorted(NAMES), *INNER)), VALUES, max_size=6)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is made of some records; None if there is nothing to learn from them."""
    rows = WordRows(tmp_path_factory.mktemp("accounts"))

    def call(records: list[dict[str, Any]], data_format: str) -> DataSet | None:
        try:
            return rows.of_records(records, data_format=data_format)
        except DataError:
            return None

    return call


@given(RECORDS)
@settings(max_examples=200, deadline=None)
def test_nothing_in_a_record_is_an_error(record: dict[str, Any]) -> None:
    for one in unpacked(record):
        logged(one)
    for _, one in opened(iter([("f:1", record)]), Problems()):
        detect_format([one])
        for name in FORMATS:
            try:
                chat = normaliser(name, Problems(), drop_redacted=True, drop_flagged=True)(one, "f:1")
            except Unusable:
                continue
            assert chat.turns


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_record_with_any_value_of_a_known_name_is_read_or_named(name: str) -> None:
    for value in (
        1,
        True,
        0.5,
        "x",
        "[1]",
        '{"a": 1}',
        [1],
        ["x"],
        [[]],
        [{}],
        {"a": 1},
        [{"role": 1}],
        {"role": "user"},
    ):
        for more in ({}, {"prompt": "p"}, {"messages": [{"role": "user", "content": "p"}]}, {"completion_tokens": 3}):
            record, problems = {**more, name: value}, Problems()
            found = [one for _, one in opened(iter([("f:1", record)]), problems)]
            assert len(found) + _num_lost(problems) >= sum(1 for _ in unpacked(record)), record
            for one in found:
                assert detect_format([one]) in (None, *FORMATS), record
                said = logged(one)
                if said is not None:
                    assert said.family, record
                    assert not (said.lacking and said.request), record
                    assert all(num is None or num >= 0 for num in said.usage[:2]), record


def _num_lost(problems: Problems) -> int:
    return sum(count for reason, count in problems.counts.items() if reason not in NOTES)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, one in inner for place in _places(one, (*path, key))]


@given(st.sampled_from(sorted(FORMS)), st.integers(0, NUM - 1), st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_record_gives_rows_or_a_reason(name: str, number: int, data: st.DataObject) -> None:
    made = FORMS[name].records(number)
    records = copy.deepcopy(made if isinstance(made, list) else [made])
    for record in records:
        place = data.draw(st.sampled_from(_places(record)))
        holder: Any = record
        for key in place[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[place[-1]] = data.draw(LEAVES)
        else:
            del holder[place[-1]]
    problems = Problems()
    read = normaliser(FORMS[name].read_as, problems, drop_redacted=False, drop_flagged=False)
    found = list(opened(iter([(f"f:{at}", record) for at, record in enumerate(records)]), problems))
    num_chats = 0
    for location, record in found:
        try:
            chat = read(record, location)
        except Unusable as unusable:
            problems.add(unusable.reason, location)
        else:
            num_chats += bool(chat.turns)
    lost = _num_lost(problems)
    joined = problems.counts[reasons.JOINED]
    num_inside = sum(1 for record in records for _ in unpacked(record))
    assert num_chats + lost + joined >= num_inside


SPEAKERS = st.sampled_from(("user", "assistant", "assistant", "tool", "system", "bard"))
SAID = st.sampled_from(("", "words of an answer", " \n"))
SORTS = st.sampled_from(("plain", "usage", "hidden", "call", "thoughts", "no usage"))


def _message(role: str, text: str, sort: str, number: int) -> dict[str, Any]:
    words = f"{text} {number}" if text.strip() else text
    message: dict[str, Any] = {"role": role, "content": words}
    if role != "assistant":
        return message
    if sort == "usage":
        message["usage"] = {"completion_tokens": 40}
    elif sort == "hidden":
        message["content"] = [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": words}]
    elif sort == "call":
        message["tool_calls"] = [{"function": {"name": "f", "arguments": "{}"}}]
    elif sort == "thoughts":
        message["reasoning_content"] = "well then"
    elif sort == "no usage":
        message["usage"] = {"completion_tokens": "many"}
    return message


ANSWER_LEVEL = (
    reasons.STRAY_ANSWER, reasons.EMPTY_ANSWER, reasons.HIDDEN_THOUGHTS, reasons.NO_TEXT, reasons.DUPLICATE,
    reasons.SUM_OF_CHOICES, reasons.NO_RESPONSE,
)  # fmt: skip


@given(st.lists(st.lists(st.tuples(SPEAKERS, SAID, SORTS), min_size=1, max_size=7), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_answer_of_a_conversation_is_a_row_or_counted(build: Any, made: list[list[tuple[str, str, str]]]) -> None:
    numbers = iter(range(1000))
    conversations = [[_message(*spoken, next(numbers)) for spoken in messages] for messages in made]
    anchor = [_message("user", "the first prompt", "plain", 0), _message("assistant", "its answer", "plain", 1)]
    records = [{"id": f"c{at}", "messages": messages} for at, messages in enumerate([anchor, *conversations])]
    found = build(records, "messages")
    if found is None:  # all rows are of one length
        return
    num_answers = sum(one["role"] == "assistant" for record in records for one in record["messages"])
    counted = sum(found.report.counts.get(reason, 0) for reason in ANSWER_LEVEL)
    assert sum(found.report.num_rows.values()) + counted == num_answers
    assert found.report.num_records == len(records)


CHOICES = st.lists(
    st.tuples(st.sampled_from(("text", "ids", "nothing", "hidden")), st.booleans()), min_size=1, max_size=4
)


@given(st.lists(st.tuples(CHOICES, st.sampled_from((None, 0, 90)), st.integers(1, 3)), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_choice_of_a_log_is_a_row_or_counted(build: Any, made: list[Any]) -> None:
    records = [
        {"id": "anchor", "prompt": "one", "completion_tokens": 3},
        {"id": "other", "prompt": "two", "completion_tokens": 4},
    ]
    num_answers = 2
    for at, (choices, tokens, asked) in enumerate(made):
        listed = []
        for number, (sort, cut) in enumerate(choices):
            choice: dict[str, Any] = {"finish_reason": "length" if cut else "stop"}
            if sort in ("text", "ids"):
                choice["message"] = {"role": "assistant", "content": f"answer {at} {number} " + "w " * number}
            if sort == "hidden":
                hidden = [{"type": "redacted_thinking"}, {"type": "text", "text": f"h {at} {number}"}]
                choice["message"] = {"role": "assistant", "content": hidden}
            if sort == "ids":
                choice["token_ids"] = [7] * (50 + number)
            listed.append(choice)
        usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
        request = {"messages": [{"role": "user", "content": f"question {at}"}], "n": max(asked, len(choices))}
        records.append({"id": f"r{at}", "request": request, "response": {"choices": listed, **usage}})
        num_answers += len(choices)
    found = build(records, "logs")
    assert found is not None
    counted = sum(found.report.counts.get(reason, 0) for reason in ANSWER_LEVEL)
    assert sum(found.report.num_rows.values()) + counted == num_answers
    for row in found.rows.table.to_pylist():
        if row["prompt"].startswith("question"):
            choices, _, asked = made[int(row["prompt"].split()[1])]
            assert row["response_tokens"] != 90 or (len(choices) == 1 and asked == 1)  # a sum is no label
