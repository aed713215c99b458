import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mope.errors import DataError
from mope.training import baselines
from mope.training.data.table import SCHEMA, RowTable

LONG, SHORT = "write a detailed essay about topic", "answer briefly, in one word: is it true?"


def table(prompts, tokens, earlier=None, split="train"):
    earlier = earlier or [[]] * len(prompts)
    rows = [
        {
            "row_id": str(row), "group": str(row), "split": split, "turn_index": len(earlier[row]), "prompt": prompt,
            "system": "", "previous_prompt": "", "answer_estimates": earlier[row],
            "answer_tokens": earlier[row], "num_earlier_turns": len(earlier[row]), "tools": False,
            "response_format": "", "response_tokens": num_tokens, "censored": False,
        }
        for row, (prompt, num_tokens) in enumerate(zip(prompts, tokens, strict=True))
    ]  # fmt: skip
    return RowTable(pa.Table.from_pylist(rows, schema=SCHEMA))


def learnable(num_rows, seed, split="train"):
    """Prompts whose words decide between about 400 and about 20 tokens."""
    rng = np.random.default_rng(seed)
    is_long = rng.random(num_rows) < 0.5
    prompts = [f"{LONG if one else SHORT} {rng.integers(9)}" for one in is_long]
    return table(
        prompts, np.where(is_long, rng.integers(380, 420, num_rows), rng.integers(15, 25, num_rows)), None, split
    )


def embed(texts):
    """Two numbers per text that say what `learnable` decided."""
    return np.array([[text.startswith("write"), 1.0] for text in texts], dtype=np.float32)


TRAIN, VALIDATION, TEST = learnable(600, 0), learnable(200, 1, "validation"), learnable(200, 2, "test")


def error(baseline, rows=TEST):
    return float(np.abs(baseline.predict(rows) - rows.response_tokens).mean())


def test_constant_is_the_train_median():
    baseline = baselines.Constant()
    baseline.fit(table(["a", "b", "c"], [10, 20, 900]), VALIDATION)
    assert baseline.predict(table(["x", "y"], [1, 1])).tolist() == [20.0, 20.0]


def test_previous_answers_are_averaged_and_first_turns_get_the_median_of_first_turns():
    train = table(["a", "b", "c", "d"], [10, 30, 500, 700], [[], [], [10], [20]])
    baseline = baselines.PreviousAnswers()
    baseline.fit(train, VALIDATION)
    assert baseline.predict(table(["x", "y"], [1, 1], [[], [100, 50]])).tolist() == [20.0, 75.0]


def test_previous_answers_without_any_first_turn():
    baseline = baselines.PreviousAnswers()
    baseline.fit(table(["a", "b"], [10, 30], [[5], [5]]), VALIDATION)
    assert baseline.predict(table(["x"], [1])).tolist() == [20.0]


def test_text_baselines_learn_what_the_words_say():
    for baseline in baselines.default_baselines(embed):
        baseline.fit(TRAIN, VALIDATION)
        if baseline.name in ("lexical_gbm", "tfidf_ridge", "embedding_gbm", "prompt_length"):
            assert error(baseline) < 25.0, baseline.name
        else:
            assert error(baseline) > 150.0, baseline.name


def test_embedding_baseline_uses_the_embeddings():
    """Prompts alike in every lexical feature differ in their embedding alone."""
    prompts = [f"same words {row % 7}" for row in range(400)]
    tokens = np.where(np.arange(400) % 2 == 0, 300, 30)
    rows = table(prompts, tokens)

    def alternating(texts):
        return (np.arange(len(texts)) % 2)[:, None]

    by_name = {baseline.name: baseline for baseline in baselines.default_baselines(alternating)}
    for name in ("embedding_gbm", "lexical_gbm"):
        by_name[name].fit(rows, rows)
    assert error(by_name["embedding_gbm"], rows) < 10.0
    assert error(by_name["lexical_gbm"], rows) > 100.0


def test_repeated_runs_agree():
    def predictions():
        return baselines.fit_and_predict(baselines.default_baselines(embed, seed=3), TRAIN, VALIDATION, TEST)

    first, second = predictions(), predictions()
    assert list(first) == [
        "constant", "previous_answers", "prompt_length", "lexical_gbm", "tfidf_ridge", "embedding_gbm",
    ]  # fmt: skip
    for name, fitted in first.items():
        predicted = fitted.predicted
        assert fitted.seconds > 0
        assert predicted.shape == (len(TEST),)
        assert predicted.dtype == np.float64
        assert np.array_equal(predicted, second[name].predicted)
        assert predicted.min() >= 1.0


def test_one_line_is_printed_for_each_baseline():
    console = Console(file=io.StringIO(), width=100)
    baselines.fit_and_predict(
        [baselines.Constant(), baselines.PreviousAnswers()], TRAIN, VALIDATION, TEST, console=console
    )
    lines = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines if "fitted on 600 rows" in line] == ["constant", "previous_answers"]


def test_tiny_and_wordless_data_do_not_break_a_run():
    rows = table(["", " \n", "?", "\x00"], [1, 2, 3, 4])
    predicted = baselines.fit_and_predict(baselines.default_baselines(embed), rows, rows, rows)
    assert all(np.isfinite(fitted.predicted).all() for fitted in predicted.values())


def test_no_validation_rows_is_a_mistake_of_the_data():
    with pytest.raises(DataError, match="600 train and 0 validation rows"):
        baselines.fit_and_predict([baselines.Constant()], TRAIN, TRAIN.take(np.array([], dtype=np.int64)), TEST)


def feature(prompt, name):
    return float(baselines.lexical_features([prompt])[0][baselines.LEXICAL_FEATURES.index(name)])


@pytest.mark.parametrize(
    ("prompt", "name", "expected"),
    [
        ("one two\nthree", "chars", 13),
        ("one two\nthree", "words", 3),
        ("one two\nthree", "lines", 2),
        ("aa bbbb", "mean_word_chars", 3),
        ("a a b c", "distinct_word_share", 0.75),
        ("ABcd", "upper_case_share", 0.5),
        ("éa", "non_ascii_share", 0.5),
        ("list 10 of 250", "largest_number", 250),
        ("Is it so? Really?", "question_marks", 2),
        ("Is it so?", "yes_no_opening", 1),
        ("What is it?", "yes_no_opening", 0),
        ("What and WHY", "question_words", 2),
        ("```py\nx = 1\n```", "code_fences", 2),
        ("- a\n- b\n3. c", "list_items", 3),
        ("Translate to French", "translate", 1),
        ("Summarize, then give a summary", "summarise", 2),
        ("an untranslatable mistranslates", "translate", 0),
        ("please continue", "continue", 1),
        ("in-depth and comprehensive", "ask_long", 2),
        ("Briefly, in one word", "ask_short", 2),
    ],
)
def test_lexical_features_count_what_they_say(prompt, name, expected):
    assert feature(prompt, name) == pytest.approx(expected)


@settings(max_examples=50)
@given(st.lists(st.text(max_size=80), max_size=4))
def test_lexical_features_of_any_text_are_finite(prompts):
    features = baselines.lexical_features(prompts)
    assert features.shape == (len(prompts), len(baselines.LEXICAL_FEATURES))
    assert np.isfinite(features).all()
    assert np.array_equal(features[:, :3], baselines.prompt_sizes(prompts))


def test_there_are_at_least_twenty_lexical_features_with_distinct_names():
    assert len(set(baselines.LEXICAL_FEATURES)) == len(baselines.LEXICAL_FEATURES) >= 20


def test_size_is_counted_beyond_what_patterns_read():
    prompt = "word " * 10_000 + "?"
    assert feature(prompt, "chars") == 50_001
    assert feature(prompt, "question_marks") == 0
