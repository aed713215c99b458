"""Public sets of LLMs of 2024 to 2026: labels with thoughts and samples, splits of their own, earlier answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.errors import ConfigError
from mope.training.data import problems as reasons
from mope.training.data import splits
from mope.training.data.build import DataSet, build_rows
from mope.training.data.config import DataConfig
from mope.training.data.modern_sets import MODERN_SETS
from mope.training.data.public import sets_of
from mope.training.data.public_labels import Label, label_of
from mope.training.data.public_sets import PUBLIC_SETS
from mope.training.data.sources import open_source

PROMPTS = [f"Why are there {number} boats on the lake?" for number in range(300)]


def rule_of_the_splits(prompt: str) -> str:
    return splits.SPLITS[splits.split_of(hashlib.sha1(splits.norm(prompt).encode()).hexdigest())]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., DataSet]:
    """Rows of one set, its file written as it is given."""

    def call(name: str, rows: list[dict[str, Any]], **options: Any) -> DataSet:
        (tmp_path / "public-lengths").mkdir(exist_ok=True)
        plain = {"prompt_id": "x", "target_llm": "llama-3-8b", "response_tokens": 9, "censored": False}
        pq.write_table(
            pa.Table.from_pylist([{**plain, **row} for row in rows]), tmp_path / "public-lengths" / f"{name}.parquet"
        )
        options = {"cache_dir": tmp_path, "min_rows": 0, "num_workers": 1, **options}
        return build_rows(DataConfig(source=name, **options), learnable=False)

    return call


# --- labels -----------------------------------------------------------------------------------------------------------


def label(llm: str = "llama-3-8b", **row: Any) -> Label:
    return label_of({"response_tokens": 100, "target_llm": llm, **row}, unit="cl100k_base", tells_thoughts=True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, Label(100, 0, "cl100k_base", False)),
        ({"thinking": False, "llm": "qwen3-32b"}, Label(100, 0, "cl100k_base", False)),
        ({"llm": "qwen3-32b"}, Label(100, None, "cl100k_base", False)),  # may think
        ({"reasoning_tokens": 900, "thinking": True}, Label(1000, 900, "cl100k_base", False)),
        ({"reasoning_tokens": 0, "thinking": True, "censored": True}, Label(100, 0, "cl100k_base", True)),
        (
            {"reasoning_tokens": 900, "reasoning_source": "difference", "completion_tokens": 1000},
            Label(1000, 900, "own", False),
        ),
        ({"thinking": True, "completion_tokens": 700}, Label(700, None, "own", False)),  # hidden, but counted
        ({"thinking": True, "completion_tokens": 99}, Label(100, None, "cl100k_base", True)),  # hidden, not counted
        ({"thinking": True}, Label(100, None, "cl100k_base", True)),
        ({"llm": "deepseek-r1", "completion_tokens": 150}, Label(150, None, "own", False)),  # the name says it
        ({"llm": "QwQ-32B-Preview"}, Label(100, None, "cl100k_base", False)),  # the thoughts may be in the answer
        ({"completion_tokens": 130}, Label(100, 0, "cl100k_base", False)),  # another tokenizer, no thoughts
        ({"completion_tokens": 300}, Label(300, None, "own", False)),  # more than any tokenizer makes of it
        ({"completion_tokens": 300, "thinking": False}, Label(100, 0, "cl100k_base", False)),
    ],
)
def test_the_label_is_what_was_generated(row: dict[str, Any], expected: Label) -> None:
    assert label(**row) == expected


def test_a_set_that_tells_nothing_of_thoughts_says_nothing_of_them() -> None:
    row = {"response_tokens": 5, "target_llm": "gpt-4o"}
    assert label_of(row, unit="own", tells_thoughts=False) == Label(5, None, "own", False)


@given(
    st.integers(1, 10**6), st.none() | st.integers(0, 10**6), st.none() | st.integers(0, 10**6),
    st.none() | st.booleans(), st.booleans(), st.sampled_from(["gpt-4o", "o3-mini", "qwen3-32b"]),
)  # fmt: skip
def test_a_label_holds_the_visible_answer_and_its_thoughts(
    visible: int, reasoning: int | None, completion: int | None, thinking: bool | None, censored: bool, llm: str
) -> None:
    made = label_of(
        {
            "response_tokens": visible, "reasoning_tokens": reasoning, "completion_tokens": completion,
            "thinking": thinking, "censored": censored, "target_llm": llm,
        },
        unit="cl100k_base", tells_thoughts=True,
    )  # fmt: skip
    assert made.tokens >= visible + (made.thoughts or 0)
    assert made.censored >= censored
    if reasoning is not None:
        assert made.tokens == visible + reasoning


# --- rows -------------------------------------------------------------------------------------------------------------


def test_the_split_of_the_file_is_taken(build: Any) -> None:
    names = ("train", "validation", "test")
    rows = [
        {"prompt": prompt, "split": names[at % 3], "language": "ko", "task": f"part {at % 2}"}
        for at, prompt in enumerate(PROMPTS)
    ]
    made = build("arena_hard_ko", rows).rows.table.to_pylist()
    assert {row["prompt"]: row["split"] for row in made} == {row["prompt"]: row["split"] for row in rows}
    assert {(row["dataset"], row["language"], row["token_unit"], row["samples"]) for row in made} == {
        ("arena_hard_ko", "ko", "cl100k_base", None)
    }
    assert [row["task"] for row in made[:2]] == ["part 0", "part 1"]


def test_a_group_of_the_file_decides_the_split(build: Any) -> None:
    originals = [f"original {number}" for number in range(100)]
    rows = [{"prompt": prompt, "group": group} for prompt, group in zip(PROMPTS, originals, strict=False)]
    made = build("arena_hard_ru", rows)
    assert made.report.num_rows["reserved"] > 0
    by_prompt = {row["prompt"]: row for row in made.rows.table.to_pylist()}
    for prompt, group in zip(PROMPTS, originals, strict=False):
        expected = splits.SPLITS[splits.split_of(group)]
        if expected == "reserved":
            assert prompt not in by_prompt
        else:
            assert (by_prompt[prompt]["split"], by_prompt[prompt]["group"]) == (expected, group)


def test_castillo_keeps_its_samples_and_its_test_split(build: Any) -> None:
    sizes = [5, 7, 9, 11]
    rows = [
        {
            "prompt": prompt, "output_sizes": sizes, "response_tokens": 8, "dataset": "Mbpp", "censored": None,
            "castillo_split": ("train", "validate", "test")[at % 3], "temperature": 0.7,
        }
        for at, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    made = build("castillo", rows)
    kept = {row["prompt"]: row for row in made.rows.table.to_pylist()}
    for row in rows:
        by_rule, upstream = rule_of_the_splits(row["prompt"]), row["castillo_split"]
        if by_rule == "reserved" or (by_rule == "test" and upstream != "test"):
            assert row["prompt"] not in kept
        else:
            assert kept[row["prompt"]]["split"] == ("test" if upstream == "test" else by_rule)
    assert made.report.counts[reasons.LEFT_OUT] > 0
    assert made.report.label_tokenizer == "recorded"
    one = next(iter(kept.values()))
    assert (one["samples"], one["response_tokens"], one["censored"]) == (sizes, 8, False)
    assert (one["token_unit"], one["thought_tokens"], one["task"]) == ("own", 0, "Mbpp")


def test_no_row_is_learned_from_a_prompt_of_castillos_test_split(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "test_prompts", lambda: frozenset())
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    before = build("just_eval", rows).report.num_rows
    tested = {hashlib.sha1(splits.norm(prompt).encode()).hexdigest()[:12] for prompt in PROMPTS[:150]}
    monkeypatch.setattr(splits, "test_prompts", lambda: tested)
    again = build("oasst_sampling", rows)
    learned = [row for row in again.rows.table.to_pylist() if row["split"] != "test"]
    assert not {row["prompt"] for row in learned}.intersection(PROMPTS[:150])
    assert again.report.num_rows["test"] == before["test"]  # a test row of another set stays one
    lost = sum(before[name] - again.report.num_rows[name] for name in ("train", "validation"))
    assert again.report.counts[reasons.TEST_PROMPT] == lost > 100


def test_test_prompts_are_committed_hashes() -> None:
    assert len(splits.test_prompts()) > 900
    assert splits.is_test_prompt(splits.norm("Describe the history of Python programming language."))
    assert not splits.is_test_prompt(splits.norm("Describe the history of a language that nobody speaks."))


def test_earlier_answers_of_a_chat(build: Any) -> None:
    rows = [
        {
            "prompt_id": f"chat:1:{2 * turn + 1}", "prompt": f"turn {turn} {llm}", "history": str([9] * turn),
            "target_llm": llm, "split": "train",
        }
        for turn in (0, 1, 10, 9)
        for llm in ("a", "b")
    ]  # fmt: skip
    made = build("spiral", rows).rows.table.to_pylist()
    assert [row["num_earlier_turns"] for row in made] == [0, 0, 1, 1, 10, 10, 9, 9]
    assert [row["turn_index"] for row in made] == [0, 0, 1, 1, 10, 10, 9, 9]
    assert made[4]["answer_tokens"] == made[4]["answer_estimates"] == [9] * 8
    assert [row["previous_prompt"] for row in made[:6]] == ["", "", "turn 0 a", "turn 0 b", "turn 9 a", "turn 9 b"]
    assert {row["group"] for row in made} == {"chat"}
    assert [row["other_chars"] for row in made[:6]] == [0, 0, 36, 36, 376, 376]  # 4 a token, and prompts


def test_flags_of_a_request(build: Any) -> None:
    made = build("tau_airline", [{"prompt": "Cancel it.", "tools": True, "thinking": None, "split": "test"}])
    (row,) = made.rows.table.to_pylist()
    assert (row["tools"], row["thinking"], row["split"]) == (True, None, "test")
    rows = [{"prompt": "{}", "tools": True, "task": task, "split": "train"} for task in ("tool->text", "user->text")]
    after, other = build("tau_airline", [*rows]).rows.table.to_pylist()
    assert (after["last_is_tool_result"], after["num_tool_results"]) == (True, 1)
    assert (other["last_is_tool_result"], other["num_tool_results"], other["other_chars"]) == (False, 0, 0)


def test_whose_tokens_the_labels_of_other_sources_are(tmp_path: Path) -> None:
    pytest.importorskip("bpe_openai")
    records = [{"prompt": f"Why {at}?", "completion_tokens": at + 1} for at in range(20)]
    records += [{"prompt": f"How {at}?", "response": "so " * at} for at in range(1, 20)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(source=str(tmp_path / "mine.jsonl"), cache_dir=tmp_path, min_rows=0, data_format="logs")
    made = build_rows(config, learnable=False).rows.table.to_pylist()
    assert {(row["label_from"], row["token_unit"], row["samples"]) for row in made} == {
        ("recorded", "own", None), ("counted", "cl100k_base", None),
    }  # fmt: skip


# --- names ------------------------------------------------------------------------------------------------------------


def test_every_set_has_a_name_of_its_own_and_only_fair_ones_are_learned_from() -> None:
    names = [public.name for public in (*PUBLIC_SETS, *MODERN_SETS)]
    assert len(set(names)) == len(names)
    assert all([public.name for public in sets_of(name)] == [name] for name in names)
    assert sets_of("public-lengths") == PUBLIC_SETS  # what the packaged predictors learned from
    modern = {public.name for public in sets_of("modern-lengths")}
    assert modern == {public.name for public in MODERN_SETS} - {"livecodebench_o1", "math_50_samples", "medagents"}
    assert sets_of("sharegpt") == ()


def test_a_public_set_has_known_fields() -> None:
    with pytest.raises(ConfigError, match="castillo has known fields; leave out --data-format"):
        open_source(DataConfig(source="castillo", data_format="logs"))
