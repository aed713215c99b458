"""Evaluation on each set before and after observed answers: constants, samples, draws, and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.errors import DataError
from mope.predictor import LengthPredictor
from mope.training import report
from mope.training.data.config import DataConfig
from mope.training.data.table import SCHEMA, RowTable
from mope.training.evaluate_observed import Part, _constants, _drawn, answers_of, evaluate_observed
from mope.training.evaluate_saved import evaluate_artifact

LLMS = ("llama-3-8b", "qwen-2-7b")
LONGER = {"llama-3-8b": 3.0, "qwen-2-7b": 0.5}  # than the first LLM of all


def table(rows: list[dict[str, Any]]) -> RowTable:
    plain = {
        "system": "", "previous_prompt": "", "answer_estimates": [], "answer_tokens": [], "num_earlier_turns": 0,
        "turn_index": 0, "tools": False, "response_format": "", "censored": False, "split": "train", "dataset": "one",
        "target_llm": LLMS[0], "prompt": "Why?", "response_tokens": 5,
    }  # fmt: skip
    whole = [{**plain, "row_id": str(at), "group": str(at), **row} for at, row in enumerate(rows)]
    return RowTable(pa.Table.from_pylist(whole, schema=SCHEMA))


NO_ROWS = table([])


def answered(num_rows: int, split: str, seed: int, dataset: str = "one", **more: Any) -> list[dict[str, Any]]:
    """Rows of two LLMs, one of which answers six times as long as the other."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": f"{'write' if at % 2 else 'thanks'} {at}", "split": split, "target_llm": llm, "dataset": dataset,
            "response_tokens": max(1, int(LONGER[llm] * rng.lognormal(5.0, 0.3))), **more,
        }
        for at in range(num_rows)
        for llm in LLMS
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> RowTable:
    one = answered(120, "train", 0) + answered(120, "validation", 3) + answered(40, "test", 1)
    return table(one + answered(40, "test", 2, "two"))


def test_observed_answers_teach_what_the_llms_do(predictor: LengthPredictor, rows: RowTable) -> None:
    found = evaluate_observed(predictor, rows, [5, 100], samples=20)
    assert list(found) == ["one", "two"]
    one, two = found["one"]["states"], found["two"]["states"]
    assert list(one) == ["0", "5", "100"]
    assert one["100"]["mae"] < 0.8 * one["0"]["mae"]
    assert one["100"]["kendall_tau"] > one["0"]["kendall_tau"] + 0.2  # told apart: one is longer than the other
    assert 0.8 < one["100"]["coverage_90"] <= 1.0
    assert (one["5"]["mean_observed"], one["100"]["mean_observed"]) == (5, 100)
    assert two["100"]["mean_observed"] == pytest.approx(20, abs=4)  # without validation rows: the other half alone
    assert two["100"]["mae"] < two["0"]["mae"]
    json.dumps(found, allow_nan=False)


def test_the_same_seed_gives_the_same_figures(predictor: LengthPredictor, rows: RowTable) -> None:
    first = evaluate_observed(predictor, rows, [10], samples=20)
    assert evaluate_observed(predictor, rows, [10], samples=20) == first
    other = evaluate_observed(predictor, rows, [10], samples=20, seed=1)["one"]
    assert other["states"]["0"] == first["one"]["states"]["0"]
    assert other["states"]["10"] != first["one"]["states"]["10"]


def test_what_the_predictor_has_learned_is_left_out(predictor: LengthPredictor, rows: RowTable) -> None:
    before = evaluate_observed(predictor, rows, [], samples=20)
    for _ in range(50):
        predictor.observe(predictor.predict("write 1", target_llm=LLMS[0]), 9000)
    assert evaluate_observed(predictor, rows, [], samples=20) == before


def test_each_sample_of_a_row_counts(predictor: LengthPredictor) -> None:
    sampled = table(
        [
            *({**row, "samples": [10, 20, 300], "task": "t"} for row in answered(30, "train", 0)),
            *({**row, "samples": [10, 20, 30], "response_tokens": 20} for row in answered(30, "test", 1, task="t")),
        ]
    )
    (found,) = evaluate_observed(predictor, sampled, [7], samples=20).values()
    assert (found["num_rows"], found["num_answers"]) == (60, 180)
    assert found["constant_mae"] == found["constant_by_task_mae"] == pytest.approx(20 / 3)  # 20 for 10, 20 and 30
    assert set(found["by_task"]) == {"t"}


def test_cut_answers_are_observed_as_cut_and_never_predicted(predictor: LengthPredictor) -> None:
    cut = [{**row, "censored": at % 2 == 0} for at, row in enumerate(answered(40, "test", 1))]
    (found,) = evaluate_observed(predictor, table(answered(40, "train", 0) + cut), [5], samples=20).values()
    assert found["num_rows"] == 40
    assert found["num_llms"] == 1


def test_no_test_rows_is_an_error(predictor: LengthPredictor) -> None:
    with pytest.raises(DataError, match="no set has two test rows"):
        evaluate_observed(predictor, table(answered(5, "train", 0)), [3])


@given(st.lists(st.tuples(st.sampled_from(LLMS), st.integers(1, 900)), min_size=1, max_size=40), st.integers(1, 30))
def test_draws_are_fresh_rows_of_each_llm_and_longer_ones_hold_shorter(
    given_rows: list[tuple[str, int]], most: int
) -> None:
    validation = table([{"target_llm": llm, "response_tokens": length} for llm, length in given_rows])
    part = Part.of(table([{}]), NO_ROWS, validation)
    half = int(part.half_T[0])
    drawn, all_of_them = _drawn(part, half, most, 0), _drawn(part, half, 1000, 0)
    for llm, chosen in drawn.items():
        own = [row + 1 for row, (name, _) in enumerate(given_rows) if name == llm]  # after the test row
        assert len(chosen) == len(set(chosen)) == min(most, len(own))
        assert set(chosen) <= set(own)
        assert all_of_them[llm][: len(chosen)] == chosen


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40), st.integers(0, 9))
def test_no_prompt_is_observed_before_it_is_predicted(given_rows: list[tuple[int, bool]], seed: int) -> None:
    test = table([{"group": str(group), "censored": cut} for group, cut in given_rows])
    part = Part.of(test, table([{"group": "t"}]), table([{"group": "v", "split": "validation"}]), seed)
    assert len(part.test) == sum(not cut for _, cut in given_rows)
    for half in (0, 1):
        (drawn,) = _drawn(part, half, 1000, seed).values()
        observed = part.fresh.take(np.array(drawn)).strings("group")
        predicted = part.test.take(part.half_T == half).strings("group")
        assert "v" in observed
        assert "t" not in observed
        assert not set(observed) & set(predicted)


def test_tasks_are_drawn_as_often_as_they_are_tested() -> None:
    validation = table([{"task": "code" if at % 10 else "chat", "samples": [at + 1, at + 2]} for at in range(300)])
    test = table([{"task": "code" if at % 4 == 0 else "chat", "samples": [5, 6]} for at in range(40)])
    part = Part.of(test, NO_ROWS, validation)
    (drawn,) = _drawn(part, 0, 40, 0).values()
    assert sum(part.fresh.strings("task")[row] == "code" for row in drawn) == 10
    assert len(set(drawn)) == 40


@given(
    st.lists(st.tuples(st.sampled_from(LLMS), st.integers(1, 900), st.booleans()), min_size=1, max_size=40),
    st.sampled_from(LLMS),
)
def test_a_constant_is_the_median_of_whole_answers(given_rows: list[tuple[str, int, bool]], llm: str) -> None:
    train = table(
        [{"target_llm": name, "response_tokens": length, "censored": cut} for name, length, cut in given_rows]
    )
    part = Part.of(table([{"target_llm": llm}]), train, NO_ROWS)
    (found,) = _constants(part, [[llm]], [train.strings("target_llm")])
    whole = [length for _, length, cut in given_rows if not cut]
    own = [length for name, length, cut in given_rows if not cut and name == llm]
    assert found == (np.median(own or whole) if whole else 0.0)


def test_answers_of_a_row() -> None:
    assert answers_of(table([{"response_tokens": 7}, {"response_tokens": 8, "samples": [5, 8, 9]}])) == [
        (7,),
        [5, 8, 9],
    ]


def test_evaluating_a_public_set_by_its_name(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt_id": str(at), "prompt": f"write {at}", "target_llm": LLMS[at % 2], "output_sizes": [at + 5, at + 9],
            "response_tokens": at + 7, "castillo_split": "test" if at % 3 else "train", "dataset": "Mbpp",
        }
        for at in range(150)
    ]  # fmt: skip
    (tmp_path / "public-lengths").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "public-lengths" / "castillo.parquet")
    data = DataConfig(source="castillo", cache_dir=tmp_path, num_workers=1)
    found = evaluate_artifact(tiny, data, tmp_path / "out", baselines=(), observe=[3], samples=20)
    assert list(found["observed"]["castillo"]["states"]) == ["0", "3"]
    assert found["observed"]["castillo"]["num_answers"] == 2 * found["observed"]["castillo"]["num_rows"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["observed"] == found["observed"]
    cold = evaluate_artifact(tiny, data, baselines=(), samples=20)
    assert list(cold["observed"]["castillo"]["states"]) == ["0"]


def test_tables(predictor: LengthPredictor, rows: RowTable) -> None:
    shown = report.metrics_markdown({"observed": evaluate_observed(predictor, rows, [5, 100], samples=20)})
    assert "### MAE before and after observed answers of each LLM" in shown
    assert "| set | rows | median | seen (2) | constant (1) | median of 5 | median of 100 | cold | after 5 |" in shown
    assert "(2) of 100 answers of an LLM so many were there, mean over the rows" in shown
    assert "| set | all rows cold | tau cold | tau after 5 | tau after 100 | ≤ q90 cold |" in shown
    assert "| median of the sets |" in shown
    assert report.metrics_markdown({"observed": {}}).strip() == ""
