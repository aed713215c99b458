"""Engines that run a trained network: one protocol, each engine guards its own import.

Shape suffixes: B requests, K experts, N bins (the body's and one for the tail), H encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mope.config import PredictorConfig, network_names
from mope.features import EncodedRequests
from mope.grid import Array
from mope.rules import NO_HITS
from mope.sealed import Sealed

# (gate logits (B, K), embedding (B, H)) -> which experts each row needs, bool (B, K)
ChooseExperts = Callable[[Array, Array], Array]


@dataclass(frozen=True, slots=True)
class RawOutputs:
    """What the network says, before router, mixture and calibration.

    Attributes:
        gate_BK: logits of the learned gate, float32.
        heads_BKN: logits of each expert over the bins, float32; zeros where an expert was not asked.
        embedding_BH: the trunk's (or gate network's) embedding of the text, float32.
    """

    gate_BK: Array
    heads_BKN: Array
    embedding_BH: Array


class Backend(Protocol):
    """Runs the network of one artifact."""

    name: str

    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch. A design with separate experts runs those that `choose` asks for."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weight files into a folder."""
        ...


# token ids (B, S), attention mask (B, S), numbers (B, F), target LLM (B,) -> gate logits (B, K) or None, head logits
# (B, heads, N) or None, embedding (B, H); float32
RunNetwork = Callable[[Array, Array, Array, Array], tuple[Array | None, Array | None, Array]]


def run_networks(
    networks: Sequence[RunNetwork], config: PredictorConfig, encoded: EncodedRequests, choose: ChooseExperts
) -> RawOutputs:
    """Run the networks of an artifact on a batch: the first one on all rows, separate experts where they are needed.

    Args:
        networks: in the order of `mope.config.network_names`.
        config: of the artifact.
        encoded: the batch.
        choose: see `Backend.run`.
    """
    num_rows, num_experts = len(encoded.token_ids), config.num_experts
    inputs = (*encoded.padded(config.special_ids[2]), encoded.numbers_BF, encoded.llm_B)
    gate_BK, heads_BKN, embedding_BH = networks[0](*inputs)
    if gate_BK is None:
        gate_BK = np.zeros((num_rows, num_experts), np.float32)
    if heads_BKN is None:
        needed_BK = choose(gate_BK, embedding_BH)
        heads_BKN = np.zeros((num_rows, num_experts, config.num_body_bins + 1), np.float32)
        for k, expert in enumerate(networks[1:]):
            rows = np.flatnonzero(needed_BK[:, k])
            if len(rows):
                _, own_B1N, _ = expert(*(array[rows] for array in inputs))
                assert own_B1N is not None, "the network of an expert has a head"
                heads_BKN[rows, k] = own_B1N[:, 0]
    return RawOutputs(gate_BK, heads_BKN, embedding_BH)


def copy_weights(artifact: Path, folder: Path, config: PredictorConfig) -> None:
    """Copy an artifact's weight files into a folder, as far as it has any: one made for serving alone has none.

    Raises:
        ArtifactError: a file is not the one that was saved.
    """
    saved = Sealed(artifact)
    for name in map("{}.safetensors".format, network_names(config)):
        if name in saved:
            saved.verify(name, copy_to=folder / name)


def largest_input(config: PredictorConfig, *, short: bool) -> EncodedRequests:
    """A request of the largest ids that a network of this config takes, as wide as any unless it is to be short."""
    vocab_size, context = config.encoder_config["vocab_size"], config.max_context_tokens
    num_between = 1 if short else config.max_prompt_tokens + (context + 1 if context else 0)
    cls, sep, _ = config.special_ids
    return EncodedRequests(
        token_ids=[[cls, *[vocab_size - 1] * num_between, sep]],
        numbers_BF=np.array([config.number_mean], dtype=np.float32),
        llm_B=np.array([len(config.target_llms)], dtype=np.int64),
        rule_hits=[NO_HITS],
    )
