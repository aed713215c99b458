"""How far unknown LLMs may be from what is predicted: measured where there are enough LLMs, else assumed."""

from dataclasses import replace

import numpy as np
import pytest
from make_tiny_artifact import TINY
from rows import learnable

from mope import LengthPredictor
from mope.features import LLM_NUMBERS, NUMBER_NAMES
from mope.training.batches import encode_rows
from mope.training.unknown_llms import (
    ASSUMED_FACTORS,
    LONG_FACTORS,
    LONG_SHARE,
    MIN_ROWS,
    MODE_FACTORS,
    NUM_FACTORS,
    llm_factors,
    unknown_llms,
    without_llms,
)


@pytest.fixture(scope="module")
def predictor():
    return LengthPredictor.from_pretrained(TINY, backend="torch")


@pytest.fixture(scope="module")
def rows(predictor):
    return encode_rows(learnable(60), predictor.encoder, "rows")


def varied(config, *names):
    """The config of a predictor whose training rows differed in these flags, and in no others."""
    scale = np.ones(len(NUMBER_NAMES))
    for name in ("thinking", "tools", "response_format"):
        scale[NUMBER_NAMES.index(name)] = float(name in names)
    return config.model_copy(update={"number_scale": tuple(scale)})


def test_without_the_llm_nothing_of_it_is_left(rows):
    rows.numbers_RF[:, list(LLM_NUMBERS)] = 3.0
    found = without_llms(replace(rows, llm_R=np.ones_like(rows.llm_R)))
    assert not found.llm_R.any()
    assert not found.numbers_RF[:, list(LLM_NUMBERS)].any()
    others = [column for column in range(rows.numbers_RF.shape[1]) if column not in LLM_NUMBERS]
    assert np.array_equal(found.numbers_RF[:, others], rows.numbers_RF[:, others])
    assert (rows.numbers_RF[:, list(LLM_NUMBERS)] == 3.0).all()


def test_factors_are_medians_of_llms_with_enough_rows(rows):
    llms = np.repeat([1, 2, 3, 0], [20, 20, MIN_ROWS - 1, 60 - 40 - MIN_ROWS + 1])
    medians = rows.tokens_R / np.select([llms == 1, llms == 2], [5.0, 0.5], 1.0)
    medians[0] *= 1000  # one that is far off does not matter
    assert llm_factors(replace(rows, llm_R=llms), medians) == pytest.approx([0.5, 5.0])


def test_many_llms_are_taken_as_they_are_and_long_ones_are_added(predictor):
    factors = list(np.geomspace(0.25, 4.0, 40))
    found = unknown_llms(varied(predictor.config, "thinking", "tools", "response_format"), factors)
    assert list(found) == [""]
    weights = dict(found[""])
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-3)
    assert sum(weights[factor] for factor in LONG_FACTORS) >= LONG_SHARE - 1e-3
    assert len(weights) in (NUM_FACTORS + len(LONG_FACTORS) - 1, NUM_FACTORS + len(LONG_FACTORS))
    middle = sorted(factor for factor in weights if factor not in LONG_FACTORS)[NUM_FACTORS // 2]
    assert middle == pytest.approx(1.0, rel=0.1)


def test_few_llms_say_nothing(predictor):
    found = unknown_llms(varied(predictor.config, "thinking", "tools", "response_format"), [3.0] * 7)
    assert {factor for factor, _ in found[""]} == {*ASSUMED_FACTORS, *LONG_FACTORS}


def test_flags_that_no_row_had_are_assumed_to_shift_the_length(predictor):
    def mean_log(pairs):
        total = sum(weight for _, weight in pairs)
        return sum(weight * np.log(factor) for factor, weight in pairs) / total

    found = unknown_llms(varied(predictor.config, "tools"), [])
    assert set(found) == {"", "thinking", "json"}
    assert mean_log(found["thinking"]) > mean_log(found[""]) + 1.0
    assert mean_log(found["json"]) < mean_log(found[""])
    for pairs in found.values():
        assert all(factor > 0 and weight > 0 for factor, weight in pairs)
    for mode, pairs in MODE_FACTORS.items():
        assert sum(weight for _, weight in pairs) == pytest.approx(1.0), mode
