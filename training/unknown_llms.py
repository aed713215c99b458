"""How far the answers of an LLM that the predictor does not know may be from what it says without knowing it.

Measured on the validation rows of the LLMs that it does know, by not telling it which one answered; what no training
data shows (reasoning LLMs are few in them, requests with tools fewer) is assumed, here and nowhere else. Knows rows,
routers and networks; what serving makes of it is in `mope.recalibration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mope.config import PredictorConfig, UnknownLlms
from mope.features import LLM_NUMBERS, NUMBER_NAMES
from mope.grid import Array
from mope.training.batches import EncodedRows

MIN_LLMS = 8  # that tell how LLMs differ; fewer say nothing
MIN_ROWS = 10  # validation rows that an LLM is measured on
NUM_FACTORS = 9
# Where the data are of too few LLMs: medians of LLMs on common prompts lie that far apart (AlpacaEval, just-eval).
ASSUMED_FACTORS = (0.4, 0.6, 0.75, 0.9, 1.0, 1.15, 1.35, 1.7, 2.4)
# LLMs that reason at length are hardly in any training data, and are what hurts most: recorded on mathematics, they
# write 4 to 50 times as much as others (SkyThought).
LONG_FACTORS, LONG_SHARE = (4.0, 8.0, 20.0, 50.0), 0.12
# What a flag does to the length where no training row had it: factors and weights.
MODE_FACTORS: Mapping[str, tuple[tuple[float, float], ...]] = {
    "thinking": ((1.0, 0.1), (2.5, 0.2), (6.0, 0.3), (15.0, 0.25), (40.0, 0.15)),
    "tools": ((0.15, 0.25), (0.4, 0.25), (1.0, 0.4), (2.0, 0.1)),
    "json": ((0.3, 0.3), (0.6, 0.3), (1.0, 0.3), (1.5, 0.1)),
}
MODE_NUMBERS = {"thinking": "thinking", "tools": "tools", "json": "response_format"}


def without_llms(rows: EncodedRows) -> EncodedRows:
    """The rows as if nothing were known of the LLM."""
    numbers_RF = rows.numbers_RF.copy()
    numbers_RF[:, list(LLM_NUMBERS)] = 0.0
    return replace(rows, llm_R=np.zeros_like(rows.llm_R), numbers_RF=numbers_RF)


def llm_factors(rows: EncodedRows, medians_R: Array) -> list[float]:
    """For each LLM with enough rows, how many times as long as predicted its answers are, in increasing order.

    Args:
        rows: with the LLMs that answered.
        medians_R: predicted medians of the same rows, made without knowing the LLM.
    """
    ratios_R = np.log(rows.tokens_R / medians_R)
    found = [ratios_R[rows.llm_R == llm] for llm in np.unique(rows.llm_R[rows.llm_R > 0])]
    return sorted(float(np.exp(np.median(ratios))) for ratios in found if len(ratios) >= MIN_ROWS)


def unknown_llms(config: PredictorConfig, factors: list[float]) -> UnknownLlms:
    """Per mode of asking, factors on the length and their weights, for LLMs that the predictor does not know.

    Args:
        config: says which flags varied in the training rows; the network itself knows what those do.
        factors: see `llm_factors`.
    """
    seen = np.array(ASSUMED_FACTORS)
    if len(factors) >= MIN_LLMS:
        seen = np.quantile(factors, (np.arange(NUM_FACTORS) + 0.5) / NUM_FACTORS)
    usual = [(float(factor), (1 - LONG_SHARE) / len(seen)) for factor in seen]
    usual += [(factor, LONG_SHARE / len(LONG_FACTORS)) for factor in LONG_FACTORS]
    found = {"": usual}
    for mode, number in MODE_NUMBERS.items():
        if not config.number_scale[NUMBER_NAMES.index(number)]:
            found[mode] = [(f * g, v * w) for f, v in MODE_FACTORS[mode] for g, w in usual if g < LONG_FACTORS[0]]
    return {mode: tuple((round(f, 4), round(w, 5)) for f, w in sorted(pairs)) for mode, pairs in found.items()}
