"""What `predict` answers: a distribution over the tokens of one response.

Knows its grid, its route and the request's cap; does not know how the numbers came about. The arithmetic is that of
`prediction_batch`, with one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mope.grid import Array
from mope.prediction_batch import LEAST_TAIL_INDEX, PredictionBatch, generated_tokens


@dataclass(frozen=True, slots=True, eq=False)
class LengthPrediction:
    """A distribution over response tokens.

    Attributes:
        edges: edges of the bins in tokens, shape (E,).
        cumulative: P(length <= edge), shape (E,), from 0 to 1.
        expert: index of the expert with the highest route probability, -1 for a fallback.
        route_probabilities: probability of each expert, shortest answers first.
        source: `"model"`, or `"fallback:<reason>"` where the network did not answer.
        max_tokens: the request's cap: no quantile and no mean goes above it.
        target_llm: the LLM that will answer, if it was named.
        llm_family: its family, if that was named.
        mode: how it is asked, such as `"thinking"` or `"tools+json"`: `LengthPredictor.observe` keeps modes apart.
        generated: tokens already generated, all figures then count what is still to come.
        raw_cumulative: the same before recalibration, for `LengthPredictor.observe`.
        tail_index: Pareto index of the lengths beyond what was predicted, see `PredictionBatch`.
    """

    edges: Array
    cumulative: Array
    expert: int = -1
    route_probabilities: tuple[float, ...] = ()
    source: str = "model"
    max_tokens: int | None = None
    target_llm: str | None = None
    llm_family: str | None = None
    mode: str = ""
    generated: float = 0.0
    raw_cumulative: Array | None = None
    tail_index: float = LEAST_TAIL_INDEX

    @property
    def median(self) -> float:
        """The length that half of such answers stay under, in tokens."""
        return self.quantile(0.5)

    @property
    def mean(self) -> float:
        """Expected length in tokens, the request's cap applied."""
        return float(self._row.mean[0])

    def quantile(self, level: float) -> float:
        """The number of tokens that a share `level` of such answers stays under.

        Raises:
            ConfigError: `level` is not between 0 and 1.
        """
        return float(self.quantiles([level])[0])

    def quantiles(self, levels: Sequence[float]) -> Array:
        """Several quantiles at once, in tokens, shape (len(levels),); a level above 0.999999 counts as that."""
        return np.asarray(self._row.quantiles(levels)[0])

    def cdf(self, tokens: float) -> float:
        """Probability that no more than `tokens` (further) tokens come."""
        return float(self._row.cdf(tokens)[0])

    def remaining(self, generated: float) -> LengthPrediction:
        """The distribution of what is still to come once `generated` tokens are out and no end is in sight.

        Conditions on the answer being longer; costs no second pass through the network. Where the answer outlives
        what was predicted, a Pareto tail goes on: see `PredictionBatch`, which also does this for many requests.

        Raises:
            ConfigError: a negative or infinite number, or NaN.
        """
        return replace(self, generated=self.generated + float(generated_tokens(generated, 1).flat[0]))

    @property
    def _row(self) -> PredictionBatch:
        return PredictionBatch.of([self])

    def __repr__(self) -> str:
        low, median, high = self.quantiles([0.1, 0.5, 0.9])
        return (
            f"LengthPrediction(median={median:.0f}, 80% within {low:.0f}..{high:.0f}, expert={self.expert}, "
            f"source={self.source!r})"
        )
