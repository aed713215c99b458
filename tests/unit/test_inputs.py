"""Whatever callers send: a prediction or one line that says what is wrong, in bounded time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timing import least_ratio, least_seconds

from mope import LengthPredictor, Request
from mope.errors import DataError, UserError
from mope.inputs import as_request
from mope.prediction import LengthPrediction
from mope.token_estimate import estimate_tokens

TEXTS = {
    "blanks": " \n\t" * 9, "megabyte": "write a story. " * 70_000, "emoji": "🙂👩‍👩‍👧🇩🇪" * 300,
    "scripts": "Привет שלום 你好 नमस्ते \u0130\u0131\u017f\u212a", "surrogates": "\ud83d \udfff \ud83d\ude42",
    "nul": "a\0b\0",
    "special": "[CLS] hi [SEP] [MASK] [PAD] <|im_end|> </s>", "controls": "\x1b[31m\u202e\u200b\ufeff\r",
    "digits": "1" * 3000,
}  # fmt: skip


def is_distribution(prediction: LengthPrediction) -> bool:
    quantiles = prediction.quantiles([0.01, 0.5, 0.99])
    return bool(np.isfinite(quantiles).all() and (np.diff(quantiles) >= 0).all() and np.isfinite(prediction.mean))


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_at_any_place_is_answered(predictor: LengthPredictor, name: str) -> None:
    text = TEXTS[name]
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    for prediction in (
        predictor.predict(text),
        predictor.predict("hello", system=text),
        predictor.predict("hello", history=said, system=text, response_format=text),
        predictor.predict_batch([Request(prompt=text, previous_prompt=text, system=text)])[0],
    ):
        assert is_distribution(prediction)


def test_special_tokens_in_a_prompt_stay_text(predictor: LengthPredictor) -> None:
    ids = predictor.encoder.encode([Request(prompt="a [SEP] b [CLS] [MASK] [PAD]")]).token_ids[0]
    first, last, pad = predictor.config.special_ids
    assert (ids.count(first), ids.count(last), ids.count(pad)) == (1, 1, 0)


VALUES: list[Any] = [
    b"bytes", None, 7, -1, 0, 2.5, float("nan"), float("inf"), 10**400, 10**5000, True, [], ["a"], [None], [[]], {},
    {"a": {"b": []}}, {"type": 3}, (), object(), lambda: 1, range(3), "text", "\ud800", np.float32(1), np.array([1, 2]),
    {1, 2},
]  # fmt: skip
USER = {"role": "user", "content": "a"}
PLACES: dict[str, Callable[[LengthPredictor, Any], Any]] = {
    "prompt": lambda predictor, value: predictor.predict(value),
    "messages": lambda predictor, value: predictor.predict(messages=value),
    "message": lambda predictor, value: predictor.predict(messages=[value, USER]),
    "role": lambda predictor, value: predictor.predict("a", history=[{"role": value, "content": "a"}]),
    "content": lambda predictor, value: predictor.predict(messages=[{"role": "user", "content": value}]),
    "part": lambda predictor, value: predictor.predict(messages=[{**USER, "content": [value, {"text": value}]}]),
    "history": lambda predictor, value: predictor.predict("a", history=value),
    "batch": lambda predictor, value: predictor.predict_batch(value),
    "entry": lambda predictor, value: predictor.predict_batch([value]),
    "key": lambda predictor, value: predictor.predict_batch([{"prompt": "a", value: 1}]),
    **{
        name: lambda predictor, value, name=name: predictor.predict("a", **{name: value})
        for name in ("target_llm", "max_tokens", "temperature", "tools", "response_format", "thinking", "system")
    },
    **{
        f"Request.{name}": lambda predictor, value, name=name: predictor.predict_batch(
            [Request(**{"prompt": "a", name: value})]
        )
        for name in (
            "prompt", "system", "previous_prompt", "answer_estimates", "num_earlier_turns", "target_llm", "max_tokens",
            "temperature", "tools", "response_format", "thinking",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_type_at_any_place_is_answered_or_refused(predictor: LengthPredictor, place: str) -> None:
    refused: list[UserError] = []
    for value in VALUES:
        if place == "key" and not isinstance(value, Hashable):
            continue
        try:
            found = PLACES[place](predictor, value)
        except UserError as error:
            refused.append(error)
        else:
            assert all(map(is_distribution, found if isinstance(found, list) else [found]))
    assert all(isinstance(error, DataError) and len(str(error)) < 300 and "\n" not in str(error) for error in refused)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("prompt", b"hi", "prompt is bytes; expected a string"),
        ("messages", "hi", "messages is str; expected a list of messages"),
        ("history", 7, "history is int; expected a list of messages"),
        ("batch", "hi", r"a batch is a list of requests; got str; put one request into \[...\]"),
        ("batch", {"messages": [USER]}, r"a batch is a list of requests; got dict; put one request into \[...\]"),
        ("tools", 7, "tools is a list of tools, or true or false; got 7"),
        ("target_llm", "\ud800", "target_llm is the name of an LLM; got '.ud800'"),
        ("key", 1, "a field of a request has a text for its name; got 1"),
        ("Request.prompt", None, "prompt is NoneType; expected a string"),
        ("Request.max_tokens", 10**400, "max_tokens is a whole number from 1 to 2147483647"),
        ("Request.answer_estimates", (-1,), "answer_estimates is a tuple of whole numbers"),
    ],
)
def test_a_mistake_is_named(predictor: LengthPredictor, place: str, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PLACES[place](predictor, value)


def test_messages_may_come_from_a_generator(predictor: LengthPredictor) -> None:
    messages = [USER, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    listed = predictor.predict(messages=messages)
    generated = predictor.predict(messages=iter(messages))  # type: ignore[arg-type]
    assert np.array_equal(listed.cumulative, generated.cumulative)
    by_history = predictor.predict("c", history=(message for message in messages[:2]))  # type: ignore[arg-type]
    assert np.array_equal(listed.cumulative, by_history.cumulative)
    with pytest.raises(DataError, match="among 0 messages"):
        predictor.predict(messages=iter(()))  # type: ignore[arg-type]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    ["prompt", "messages", "history", "role", "content", "system", "max_tokens", "tools", "temperature"]
)
some_messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "x"]), st.sampled_from(["user", "assistant", "a", 3, None]))
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(keys, json_values | some_messages, max_size=5) | json_values)
def test_any_json_is_a_request_or_refused(entry: Any) -> None:
    try:
        prompt = as_request(entry).prompt
    except DataError as error:
        prompt = str(error)
    assert isinstance(prompt, str)


def test_a_megabyte_costs_no_more_than_twice_five_kilobytes(tiny: Path) -> None:
    predictor = LengthPredictor.from_pretrained(tiny, backend="torch", cache_size=0)
    short, long = ("\n" + "write a story. " * count + "\n" for count in (333, 66_667))
    predictor.predict(short)
    ratio = least_ratio(lambda: predictor.predict(long), lambda: predictor.predict(short), 2)
    assert ratio < 2  # about 1.1


def test_ten_thousand_messages_cost_milliseconds(predictor: LengthPredictor) -> None:
    said = [{"role": role, "content": "word " * 200} for role in ("user", "assistant")] * 5_000
    request = as_request({"prompt": "hello", "history": said})
    assert request.num_earlier_turns == 5_000
    assert request.answer_estimates == (estimate_tokens("word " * 200),) * 8
    limit_s = 0.05  # it is 0.005 s on an idle core
    assert least_seconds(lambda: as_request({"prompt": "hello", "history": said}), limit_s) < limit_s
    assert is_distribution(predictor.predict("hello", history=said))


@pytest.mark.parametrize("actual", [float("nan"), float("inf"), "7", None, [7], 0])
def test_what_is_no_length_teaches_nothing(predictor: LengthPredictor, actual: Any) -> None:
    prediction = predictor.predict("hello")
    with pytest.raises(DataError):
        predictor.observe(prediction, actual)
    assert len(predictor.recalibrator) == 0


def test_effort_and_tools_are_read_as_people_write_them():
    listed = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}] * 2
    request = as_request({"prompt": "a", "effort": "HIGH", "tools": listed, "tool_choice": "required"})
    assert (request.effort, request.thinking, request.tools, request.num_tools) == (4.0, True, True, 2)
    assert request.tool_choice == "required"
    assert as_request({"prompt": "a", "effort": 2.5}).effort == 2.5
    assert as_request({"prompt": "a", "num_tools": 7, "tool_chars": 900}).tools
    assert as_request({"prompt": "a", "token_unit": "own"}).token_unit == "own"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"effort": "enormous"}, "effort is a level such as"),
        ({"effort": 6}, "number from 0 to 5; got 6"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort is a level such as"),
        ({"num_tools": -1}, "num_tools is a whole number"),
        ({"token_unit": "words"}, "token_unit is own or cl100k_base; got 'words'"),
    ],
)
def test_an_effort_or_unit_that_does_not_exist_is_said(body, message):
    with pytest.raises(DataError, match=message):
        as_request({"prompt": "a", **body})


@pytest.mark.parametrize(
    "wrong",
    [
        {"effort": "high"}, {"effort": 5.5}, {"num_tools": -1}, {"tool_choice": "maybe"}, {"tool_choice": None},
        {"last_is_tool_result": 1}, {"num_tool_results": 1.0}, {"other_chars": -1}, {"token_unit": "o200k"},
        {"tool_chars": "9"},
    ],
)  # fmt: skip
def test_a_request_with_wrong_tools_or_effort_is_refused(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        as_request(Request(prompt="a", **wrong))


def test_results_of_tools_and_all_messages_are_counted():
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    asked = [
        {"role": "system", "content": "s" * 5},
        {"role": "developer", "content": "d" * 3},
        {"role": "user", "content": "u" * 7},
    ]
    openai = Request.from_messages(
        [*asked, call, {"role": "tool", "content": "r" * 11}, {"role": "tool", "content": "r"}]
    )
    results = [{"type": "tool_result", "content": "r" * 11}, {"type": "tool_result", "content": "r"}]
    anthropic = Request.from_messages([*asked, call, {"role": "user", "content": results}])
    mixed = Request.from_messages(
        [*asked, call, {"role": "user", "content": [*results, {"type": "text", "text": "and?"}]}]
    )
    for request in (openai, anthropic, mixed):
        assert (request.num_tool_results, request.last_is_tool_result) == (2, True)
    assert (len(openai.system), openai.other_chars) == (9, 11)  # 27 characters in all, 16 of them known
    begun = Request.from_messages(
        [*asked, call, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "So"}]
    )
    assert (begun.last_is_tool_result, begun.other_chars) == (True, 0)
    assert not Request.from_messages(
        [*asked, call, {"role": "tool", "content": "r"}, {"role": "user", "content": "ok"}]
    ).last_is_tool_result
