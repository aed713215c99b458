"""Random batches for a predictor's network, as if requests had been encoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mope.config import PredictorConfig
from mope.features import EncodedRequests
from mope.grid import Array


def random_requests(config: PredictorConfig, lengths: Sequence[int], seed: int = 0) -> EncodedRequests:
    """One request of each length in tokens."""
    rng = np.random.default_rng(seed)
    return EncodedRequests(
        [rng.integers(0, config.encoder_config["vocab_size"], length).tolist() for length in lengths],
        rng.normal(size=(len(lengths), len(config.number_mean))).astype(np.float32),
        rng.integers(0, len(config.target_llms) + 1, len(lengths)),
        [],
    )


def random_inputs(config: PredictorConfig, lengths: Sequence[int], seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """The same as a network's inputs: token ids (B, S), attention mask (B, S), numbers (B, F), target LLM (B,)."""
    encoded = random_requests(config, lengths, seed)
    return (*encoded.padded(config.special_ids[2]), encoded.numbers_BF, encoded.llm_B)
