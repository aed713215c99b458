"""Tools of a request: how many, how large, whether one has to be called."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.tool_use import choice_of, json_chars, listed_tools

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-99, 9999)
    | st.text(st.characters(codec="ascii", exclude_characters='"\\'), max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz", max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(st.dictionaries(st.text("abc", min_size=1, max_size=8), values, max_size=4), min_size=1, max_size=5))
def test_the_size_is_about_that_of_the_json(tools: list[dict[str, object]]) -> None:
    written = sum(len(json.dumps(tool, separators=(",", ":"))) for tool in tools)
    num_parts = sum(json.dumps(tool).count(sign) for tool in tools for sign in ",:[{") + len(tools)
    assert abs(json_chars(tools) - written) <= 5 * num_parts


def test_many_tools_are_as_large_as_those_that_are_measured() -> None:
    tool = {"name": "look_up", "description": "words " * 20}
    assert json_chars([tool] * 200) == 200 * json_chars([tool])


def test_the_work_is_bounded() -> None:
    huge = [
        {"name": "look_up", "enum": list(range(10**6)), "inner": {str(number): [number] for number in range(10**5)}}
    ]
    started = time.perf_counter()
    assert json_chars(huge * 1000) > 0
    assert time.perf_counter() - started < 0.05


def test_googles_lists_are_taken_apart() -> None:
    assert listed_tools([{"functionDeclarations": ["a", "b"]}, {"googleSearch": {}}]) == [
        "a",
        "b",
        {"googleSearch": {}},
    ]
    assert listed_tools({"name": "f"}) == [{"name": "f"}]
    assert listed_tools({"look_up": {"a": 1}, "book": {"b": 2}}) == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        ("auto", "auto"), ("ANY", "required"), ("required", "required"), ("none", "none"), ("banana", ""), (3, ""),
        ({"type": "any"}, "required"), ({"type": "tool", "name": "f"}, "named"), ({"type": "none"}, "none"),
        ({"type": "function", "function": {"name": "f"}}, "named"), ({"name": "f"}, "named"), ({}, ""),
        ({"type": "allowed_tools", "mode": "required", "tools": []}, "required"), ({"type": "web_search"}, "named"),
    ],
)  # fmt: skip
def test_choices(said: object, choice: str) -> None:
    assert choice_of(said) == choice
