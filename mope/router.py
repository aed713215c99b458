"""The router: which expert answers, as calibrated probabilities.

Three parts vote: rules (what the prompt asks for in so many words), a look-up (training prompts with similar
embeddings), and the network's learned gate. A multinomial logistic regression over their log-votes, fitted on
validation rows, combines whichever parts are switched on. Knows votes and experts; not lengths.

Shape suffixes: B requests, K experts, H embedding width, M stored neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import log
from typing import Any

import numpy as np

from mope.errors import ConfigError
from mope.grid import Array
from mope.rules import RuleHits, RuleTable

PARTS = ("gate", "rules", "lookup")
LEAST_VOTE = 1e-6  # a part that is sure of itself cannot silence the others


@lru_cache(maxsize=64)
def _parts_key(parts: tuple[str, ...]) -> str:
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigError(f"unknown router part {unknown[0]!r}; known are {', '.join(PARTS)}")
    return "+".join(part for part in PARTS if part in parts) or "prior"


def parts_key(parts: Sequence[str]) -> str:
    """`"gate+rules"` for parts in any order; `"prior"` for none.

    Raises:
        ConfigError: an unknown part.
    """
    return _parts_key(tuple(parts))


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def log_softmax(logits: Array) -> Array:
    """Logarithm of the softmax over the last axis, float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True)
class Lookup:
    """Training prompts' embeddings and the bucket each answer fell into.

    Attributes:
        embeddings_MH: of unit length, float16.
        buckets_M: expert index of each answer, uint8.
        neighbours: how many neighbours vote.
        sharpness: weight of a neighbour is exp(sharpness * (cosine - 1)).
    """

    embeddings_MH: Array
    buckets_M: Array
    neighbours: int
    sharpness: float = 10.0

    @cached_property
    def _index(self) -> Any:
        import faiss

        index = faiss.IndexFlatIP(self.embeddings_MH.shape[1])
        index.add(self.embeddings_MH.astype(np.float32))
        return index

    def votes(self, embedding_BH: Array, num_experts: int, prior: Array) -> Array:
        """Share of each bucket among the neighbours, smoothed by the prior, shape (B, K)."""
        unit = embedding_BH / np.maximum(np.linalg.norm(embedding_BH, axis=1, keepdims=True), 1e-12)
        count = min(self.neighbours, len(self.buckets_M))
        cosine, found = self._index.search(np.ascontiguousarray(unit, dtype=np.float32), count)
        weight = np.exp(self.sharpness * (cosine - 1.0))
        votes = np.tile(prior, (len(unit), 1)).astype(np.float64)
        for k in range(num_experts):
            votes[:, k] += (weight * (self.buckets_M[found] == k)).sum(axis=1)
        return np.asarray(votes / votes.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Router:
    """Combines the votes of its parts to probabilities over the experts.

    Attributes:
        boundaries: the K - 1 inner borders of the buckets in tokens.
        prior: share of each bucket in the training rows, shape (K,).
        rules: how answers follow rules.
        lookup: similar training prompts; None where it was not built.
        combiners: key of parts (`parts_key`) -> (weights (D, K), bias (K,)) of the logistic regression.
        parts: the parts that are switched on.
    """

    boundaries: Array
    prior: Array
    rules: RuleTable
    lookup: Lookup | None
    combiners: Mapping[str, tuple[Array, Array]]
    parts: tuple[str, ...]

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.prior)

    def votes(self, parts: Sequence[str], gate_BK: Array, embedding_BH: Array, hits: list[RuleHits]) -> Array:
        """Log-votes of the given parts side by side, shape (B, parts * K)."""
        columns: list[Array] = []
        for part in PARTS:
            if part not in parts:
                continue
            if part == "gate":
                columns.append(np.maximum(log_softmax(gate_BK), log(LEAST_VOTE)))
            elif part == "rules":
                columns.append(np.log(self.rules.votes(hits, self.boundaries, self.prior) / self.prior))
            elif self.lookup is None:
                raise ConfigError("this predictor was trained without the router part 'lookup'")
            else:
                votes = self.lookup.votes(embedding_BH, self.num_experts, self.prior)
                columns.append(np.log(np.maximum(votes, LEAST_VOTE)))
        if len(columns) == 1:
            return columns[0]
        return np.concatenate(columns, axis=1) if columns else np.zeros((len(hits), 0))

    def probabilities(
        self, gate_BK: Array, embedding_BH: Array, hits: list[RuleHits], parts: Sequence[str] | None = None
    ) -> Array:
        """Probability of each expert, shape (B, K), rows summing to 1.

        Args:
            gate_BK: logits of the learned gate.
            embedding_BH: embedding of the text.
            hits: rules that each prompt matches.
            parts: use these parts in place of `self.parts`, for ablations.

        Raises:
            ConfigError: no combiner was fitted for these parts.
        """
        if self.num_experts == 1:
            return np.ones((len(hits), 1))
        key = parts_key(self.parts if parts is None else parts)
        if key == "prior":
            return np.tile(self.prior, (len(hits), 1))
        if key not in self.combiners:
            raise ConfigError(f"no router was fitted for the parts {key}; fitted are {', '.join(self.combiners)}")
        weights, bias = self.combiners[key]
        return softmax(self.votes(key.split("+"), gate_BK, embedding_BH, hits) @ weights + bias)
