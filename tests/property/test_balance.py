"""Balanced data sets: texts of a set alike, answers to a text share its weight, a set counts as a power of its size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.training.balance import WHOLE_TEXTS, balance, set_medians

num_texts = st.sampled_from([1, 3, 40, WHOLE_TEXTS, 5 * WHOLE_TEXTS])


@settings(max_examples=40)
@given(st.lists(num_texts, min_size=1, max_size=4), st.floats(0, 1), st.integers(1, 5))
def test_a_set_counts_as_a_power_of_its_texts_whatever_was_answered_to_each(sizes, power, most_answers):
    rng = np.random.default_rng(0)
    answers = [rng.integers(1, most_answers + 1, size) for size in sizes]
    sets = np.concatenate([np.full(own.sum(), f"set {i}") for i, own in enumerate(answers)])
    texts = np.repeat(np.arange(sum(sizes)), np.concatenate(answers))
    tokens = rng.integers(1, 1000, len(texts))
    found = balance(sets, texts, tokens, set_medians(sets, tokens), power)
    of_text = np.bincount(texts, weights=found.weight_R) * found.keep_T
    ends = np.cumsum(sizes)
    for size, end in zip(sizes, ends, strict=True):
        own = of_text[end - size : end]
        assert own == pytest.approx(own[0])
        assert own.sum() == pytest.approx(WHOLE_TEXTS * (size / WHOLE_TEXTS) ** power)
    assert (found.keep_T <= 1).all()
    assert (found.weight_R > 0).all()


def test_the_scale_of_a_row_is_the_typical_answer_of_its_set():
    sets, tokens = np.array(["a", "a", "a", "b"]), np.array([10, 20, 900, 5000])
    medians = set_medians(sets, tokens)
    assert medians == {"a": 20.0, "b": 5000.0}
    found = balance(np.array(["b", "a", "new"]), np.arange(3), np.array([1, 2, 3]), medians, 0.5)
    assert found.scale_R.tolist() == [5000.0, 20.0, 2.0]  # of a set without training rows the rows' own median
