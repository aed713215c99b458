"""Thoughts and visible answer: the model of the share, its fit, and what a prediction says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import table

from mope import LengthPredictor, Request, artifact
from mope.errors import ArtifactError
from mope.features import NUMBER_NAMES
from mope.thoughts import PROMPT_NUMBERS, ThoughtsModel, parts_of
from mope.training.data.table import RowTable
from mope.training.thoughts import fit_thoughts, thoughts_of

MODEL = ThoughtsModel(
    bias=0.0,
    llms={"qwq-32b": -2.0, "deepseek-v3": None},
    families={"qwen": -1.0},
    number_names=("log_prompt_chars",),
    number_mean=(3.0,),
    number_scale=(1.0,),
    weights=(0.5,),
)


def made_rows(num_rows: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """One LLM thinks for a fifth of a response, one for four fifths; of a long prompt twice as much is visible."""
    rng = np.random.default_rng(0)
    llms = [("gpt-5-mini", "qwq-32b", "gpt-4o")[row % 3] for row in range(num_rows)]
    total = rng.integers(100, 4000, num_rows).astype(float)
    visible = np.where(np.arange(num_rows) % 3 == 0, 0.8, 0.2) * total
    thoughts = np.where(np.arange(num_rows) % 3 == 2, 0.0, total - visible)
    numbers = np.zeros((num_rows, len(NUMBER_NAMES)), np.float32)
    numbers[:, 0] = rng.normal(5, 1, num_rows)
    return llms, total, thoughts, numbers


def test_the_fit_finds_the_share_of_each_llm() -> None:
    llms, total, thoughts, numbers = made_rows(900)
    model = fit_thoughts(llms, total, thoughts, numbers, NUMBER_NAMES)
    assert model is not None
    assert model.llms["gpt-4o"] is None
    odds = model.prompt_odds(numbers[:1], NUMBER_NAMES)[0]
    assert model.share(Request(prompt="a", target_llm="gpt-5-mini"), odds) == pytest.approx(0.2, abs=0.02)
    assert model.share(Request(prompt="a", target_llm="Qwen/QwQ-32B"), odds) == pytest.approx(0.8, abs=0.02)
    assert model.share(Request(prompt="a", target_llm="gpt-4o-2024"), odds) is None


def test_the_prompt_decides_where_it_tells() -> None:
    llms, total, thoughts, numbers = made_rows(6000)
    is_long = numbers[:, 0] > 5
    thoughts = np.where(thoughts > 0, np.where(is_long, 0.1, 0.9) * total, 0)
    model = fit_thoughts(llms, total, thoughts, numbers, NUMBER_NAMES)
    assert model is not None
    shares = [
        model.share(Request(prompt="a", target_llm="qwq-32b"), float(odds))
        for odds in model.prompt_odds(numbers[:300], NUMBER_NAMES)
    ]
    assert np.mean(np.array(shares)[is_long[:300]]) < 0.35 < 0.65 < np.mean(np.array(shares)[~is_long[:300]])


def test_a_set_of_many_rows_does_not_settle_it_alone() -> None:
    llms = ["qwq-32b"] * 1100
    total, sets = np.full(1100, 1000.0), ["many"] * 1000 + ["few"] * 100
    thoughts = np.where(np.array(sets) == "many", 900.0, 500.0)
    numbers = np.zeros((1100, len(NUMBER_NAMES)), np.float32)
    numbers[1000:, 0] = 1.0
    names = list(NUMBER_NAMES)
    alone = fit_thoughts(llms, total, thoughts, numbers, names)
    weighed = fit_thoughts(llms, total, thoughts, numbers, names, sets)
    assert alone is not None
    assert weighed is not None
    few = [
        model.share(Request(prompt="a", target_llm="qwq-32b"), model.prompt_odds(numbers[-1:], names)[0])
        for model in (alone, weighed)
    ]
    assert abs(few[1] - 0.5) < abs(few[0] - 0.5)


def test_rows_that_tell_nothing_give_no_model() -> None:
    llms, total, thoughts, numbers = made_rows(90)
    assert fit_thoughts(llms, total, thoughts, numbers, NUMBER_NAMES) is None
    llms, total, thoughts, numbers = made_rows(900)
    assert fit_thoughts(llms, total, np.full(900, np.nan), numbers, NUMBER_NAMES) is None


def test_cut_rows_and_rows_without_thinking_teach_nothing() -> None:
    llms, total, thoughts, numbers = made_rows(900)
    requests = [
        Request(prompt="a", target_llm=llm, thinking=None if row % 2 else False) for row, llm in enumerate(llms)
    ]
    rows = table(requests, total.astype(int).tolist(), censored=[row % 5 == 0 for row in range(900)]).table
    place = rows.schema.get_field_index("thought_tokens")
    rows = rows.set_column(place, rows.schema.field(place), pa.array(thoughts.astype(np.int32)))
    kept = np.array([row % 2 == 1 and row % 5 != 0 for row in range(900)])
    expected = fit_thoughts(
        [llm for llm, own in zip(llms, kept, strict=True) if own], total[kept].astype(int),
        thoughts[kept].astype(int).astype(float), numbers[kept], NUMBER_NAMES, [""] * int(kept.sum()),
    )  # fmt: skip
    assert thoughts_of(RowTable(rows), numbers, NUMBER_NAMES) == expected


@pytest.mark.parametrize(
    ("flags", "share"),
    [
        ({"target_llm": "qwq-32b"}, 1 / (1 + np.exp(-2.0))),
        ({"target_llm": "qwq-32b", "thinking": False}, 0.0),
        ({"target_llm": "qwq-32b", "effort": 0.0}, 0.0),
        ({"target_llm": "qwen3-8b-nothink"}, 0.0),
        ({"target_llm": "qwen3-8b"}, None),
        ({"target_llm": "qwen3-8b", "thinking": True}, 1 / (1 + np.exp(-1.0))),
        ({"target_llm": "qwen3-8b-thinking"}, 1 / (1 + np.exp(-1.0))),
        ({"target_llm": "deepseek-v3"}, 0.0),
        ({"target_llm": "deepseek-v3", "effort": 3.0}, 0.5),
        ({"target_llm": "deepseek-r1"}, 0.5),
        ({}, None),
        ({"llm_reasoning": True}, 0.5),
        ({"llm_reasoning": False}, 0.0),
        ({"llm_family": "qwen", "llm_reasoning": True}, 1 / (1 + np.exp(-1.0))),
    ],
)
def test_what_is_known_of_an_llm_and_how_it_is_asked_settle_the_share(flags, share) -> None:
    assert MODEL.share(Request(prompt="a", **flags), 0.0) == (None if share is None else pytest.approx(share))


def test_numbers_count_by_their_names() -> None:
    numbers = np.array([[7.0, 4.0, 1.0]])
    assert MODEL.prompt_odds(numbers, ("tools", "log_prompt_chars", "effort")).tolist() == [0.5]
    assert MODEL.prompt_odds(numbers * 100, ("tools", "log_prompt_chars", "effort")).tolist() == [2.0]
    assert MODEL.prompt_odds(numbers, ("tools", "temperature", "effort")).tolist() == [0.0]
    assert set(PROMPT_NUMBERS) < set(NUMBER_NAMES)
    assert not {"temperature", "effort", "has_history", "log_max_tokens"} & set(PROMPT_NUMBERS)


@given(
    st.floats(0, 1), st.floats(0, 1e5), st.floats(0, 1e5), st.none() | st.integers(1, 100_000)
)  # fmt: skip
def test_the_parts_are_the_whole_and_thoughts_come_first(share, mean, generated, budget) -> None:
    found = parts_of(share, mean, generated, budget)
    assert found is not None
    assert found.tokens + found.visible_tokens == pytest.approx(mean)
    assert 0 <= found.share <= 1
    assert 0 <= found.tokens <= mean
    assert budget is None or found.tokens <= max(budget - generated, 0)
    if generated >= share * (mean + generated):
        assert found.tokens == 0
    assert parts_of(None, mean, generated, budget) is None


@pytest.fixture
def thinking(tiny: Path, tmp_path: Path) -> LengthPredictor:
    """The tiny predictor with a model of thoughts, saved and loaded."""
    predictor = LengthPredictor.from_pretrained(tiny, backend="torch")
    predictor.thoughts = MODEL
    predictor.save_pretrained(tmp_path / "thinking")
    return LengthPredictor.from_pretrained(tmp_path / "thinking", backend="torch")


def test_a_prediction_tells_thoughts_and_visible_answer_apart(thinking: LengthPredictor) -> None:
    assert thinking.thoughts is not None
    assert thinking.thoughts.model_dump() == MODEL.model_dump()
    asked = {"prompt": "Why?", "target_llm": "qwq-32b"}
    before = thinking.predict(asked)
    thoughts = before.thoughts
    assert thoughts is not None
    odds = float(np.clip(np.log1p(4) - 3.0, -4, 4) * 0.5) - 2.0
    assert thoughts.share == pytest.approx(1 / (1 + np.exp(odds)), rel=1e-5)
    assert thoughts.tokens + thoughts.visible_tokens == pytest.approx(before.mean)
    assert thinking.predict(asked).thoughts == thoughts  # from the cache
    assert before.to_dict()["thoughts"] == thoughts._asdict()
    for _ in range(60):
        thinking.observe(before, int(4 * before.mean))
    after = thinking.predict(asked)
    assert after.mean > 1.5 * before.mean
    assert after.thoughts is not None
    assert after.thoughts.tokens == pytest.approx(thoughts.share * after.mean)
    budget = thinking.predict({**asked, "thinking_budget": 3}).thoughts
    assert budget is not None
    assert budget.tokens == 3
    late = after.remaining(2 * after.mean).thoughts
    assert late is not None
    assert late.tokens < after.thoughts.tokens


def test_each_effort_is_learned_by_itself(predictor: LengthPredictor) -> None:
    lengths = {"low": 190, "medium": 720, "high": 1610}  # a tenth of what one LLM wrote in agent runs
    for _ in range(60):
        for effort, tokens in lengths.items():
            predictor.observe(predictor.predict("Why?", target_llm="gpt-oss-20b", effort=effort), tokens)
    for effort, tokens in lengths.items():
        assert predictor.predict("Why?", target_llm="gpt-oss-20b", effort=effort).median == pytest.approx(
            tokens, rel=0.3
        )
    assert predictor.predict("Why?", effort=1.2).mode == "thinking+minimal"
    assert predictor.predict(Request(prompt="Why?", effort=0.0)).mode == "no thinking"


def test_where_nothing_is_known_nothing_is_said(thinking: LengthPredictor, tiny: Path) -> None:
    assert thinking.predict("Why?").thoughts is None
    assert thinking.predict("", target_llm="qwq-32b").thoughts is None  # a fallback has read no prompt
    assert LengthPredictor.from_pretrained(tiny, backend="torch").predict("Why?", target_llm="qwq-32b").thoughts is None
    prediction = thinking.predict("Why?", target_llm="deepseek-v3")
    assert prediction.thoughts == (0.0, 0.0, prediction.mean)
    assert replace(prediction, thought_share=None).to_dict()["thoughts"] is None


@pytest.mark.parametrize("content", ["{}", "[]", '{"bias": 1}', "null"])
def test_a_broken_file_is_one_line(thinking: LengthPredictor, content: str) -> None:
    folder = thinking.folder
    assert folder is not None
    (folder / "thoughts.json").write_text(content)
    artifact.seal(folder)
    with pytest.raises(ArtifactError) as caught:
        LengthPredictor.from_pretrained(folder, backend="torch")
    assert "\n" not in str(caught.value)
