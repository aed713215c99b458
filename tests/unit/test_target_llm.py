"""Names of target LLMs: spellings, relatives, sizes, and the table that finds the nearest known one."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.target_llm import MAX_SIZE, LlmTable, canonical, describe, known_names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("meta-llama/Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct@hyperbolic", "llama_3.1_8b_instruct"),
         "llama-3.1-8b-instruct"),
        (("Llama-2-70B-chat-GPTQ", "TheBloke/Llama-2-70B-Chat-AWQ", "llama-2-70b-chat-int4"), "llama-2-70b-chat"),
        (("gpt-4o", "openai/gpt-4o", " GPT-4o "), "gpt-4o"),
        (("Sky-T1-32B/checkpoint-105", "Sky-T1-32B/step_7", "runs/Sky-T1-32B"), "sky-t1-32b"),
        (("us.anthropic.claude-3-haiku",), "anthropic.claude-3-haiku"),
    ],
)  # fmt: skip
def test_spellings_of_a_name_are_one(names, expected):
    assert {canonical(name) for name in names} == {expected}


@pytest.mark.parametrize(
    ("name", "size", "reasoning"),
    [
        ("Llama-3.1-405B-Instruct", 405, False),
        ("Mixtral-8x7B-Instruct-v0.1", 56, False),
        ("SmolLM2-135M", 0.135, False),
        ("Qwen2.5-0.5B", 0.5, False),
        ("gpt-4o-2024-08-06", None, False),
        ("o1-mini-2024-09-12", None, True),
        ("DeepSeek-R1-Distill-Qwen-7B", 7, True),
        ("QwQ-32B-Preview", 32, True),
        ("Phi-3-mini-128k-instruct", None, False),
        ("go1-lite", None, False),  # not o1
        ("x-99999b", None, False),  # no such size
    ],
)
def test_size_and_kind_are_read_from_the_name(name, size, reasoning):
    found = describe(name)
    assert found.size == (None if size is None else pytest.approx(size))
    assert found.reasoning is reasoning


def test_a_lineage_goes_from_the_name_to_its_family():
    assert describe("meta-llama/Llama-3.1-8B-Instruct").lineage == (
        "llama-3.1-8b-instruct", "llama-3.1-8b", "llama-3.1", "llama-3", "llama",
    )  # fmt: skip
    assert describe("gpt-4o-mini").family == "gpt"
    for nothing in (None, "", "  ", "@x", "/"):
        assert describe(nothing) == describe(None)
        assert describe(nothing).family is None


@given(st.text(max_size=300))
def test_any_text_is_a_name_or_none(name):
    found = describe(name)
    assert found.lineage[:1] == ((found.name,) if found.name else ())
    assert all(found.name.startswith(start) for start in found.lineage)
    lengths = list(map(len, found.lineage))
    assert lengths == sorted(set(lengths), reverse=True)
    assert found.size is None or 0 < found.size <= MAX_SIZE
    assert describe(found.name).name == canonical(found.name)


TABLE = LlmTable(("gpt-3.5-turbo", "gpt-4", "gpt-4o-2024-08-06", "llama-3", "llama-3-70b", "llama-3-8b", "qwen2-7b"))


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("GPT-4", None, "gpt-4"),
        ("meta-llama/Llama-3-8B-Instruct", None, "llama-3-8b"),  # nearest: the name without what is not known
        ("llama-3-405b", None, "llama-3"),
        ("gpt-4o", None, "gpt-4o-2024-08-06"),  # another word for the only one of that beginning
        ("gpt-4o-2024-11-20", None, "gpt-4o-2024-08-06"),
        ("qwen", None, "qwen2-7b"),
        ("llama-4", None, "llama-3"),
        ("phi-4", None, ""),
        ("my-finetune", None, ""),
        ("my-finetune", "llama-3", "llama-3"),
        (None, None, ""),
        (None, "qwen2", "qwen2-7b"),
    ],
)
def test_the_nearest_known_relative_is_found(name, family, expected):
    assert ("", *TABLE.names)[TABLE.find(name, family)] == expected


def test_a_relative_is_not_the_llm_itself():
    assert TABLE.knows("gpt-4")
    assert TABLE.knows("openai/gpt-4o")
    assert not TABLE.knows("gpt-4o-2024-11-20")
    assert not TABLE.knows("llama-3-8b-instruct")
    assert not TABLE.knows(None)


def test_families_are_the_shortest_words_that_find_something():
    assert TABLE.families() == ("gpt-3", "gpt-4", "gpt-4o", "llama", "qwen")
    assert all(TABLE.find(family) for family in TABLE.families())
    assert LlmTable(()).families() == ()


def test_parents_are_relatives_in_the_table():
    parents = dict(zip(TABLE.names, TABLE.parents()[1:], strict=True))
    assert TABLE.parents()[0] == 0
    assert [TABLE.names[parents[name] - 1] for name in ("llama-3-8b", "llama-3-70b")] == ["llama-3"] * 2
    assert parents["gpt-4"] == parents["llama-3"] == 0
    assert LlmTable(()).parents() == [0]


def test_llms_with_rows_and_beginnings_of_several_are_known():
    counts = {
        "Llama-3-8B-Instruct": 60,
        "meta-llama/llama-3-8b-instruct": 10,
        "Llama-3-70B-Instruct": 40,
        "gpt-4": 99,
        "": 500,
    }
    assert known_names(counts, 50) == ("gpt-4", "llama-3", "llama-3-8b-instruct")
    assert known_names(counts, 200) == ()
    assert known_names({}, 1) == ()


names = st.from_regex(r"(llama|qwen|gpt)-[1-3](\.[12])?(-(8|70)b)?(-chat|-it)?", fullmatch=True)


@given(st.dictionaries(names, st.integers(1, 100), max_size=12), st.integers(1, 150))
def test_a_known_name_finds_itself_and_an_unknown_one_something_that_it_begins_with(counts, min_rows):
    table = LlmTable(known_names(counts, min_rows))
    rows = Counter()
    for name, count in counts.items():
        for start in describe(name).lineage:
            rows[start] += count
    for position, name in enumerate(table.names, start=1):
        assert table.find(name) == position
        assert rows[name] >= min_rows
    for name, count in counts.items():
        assert table.find(name) or count < min_rows
    parents = table.parents()
    for index, parent in enumerate(parents):
        assert parent == 0 or table.names[index - 1].startswith(table.names[parent - 1])
