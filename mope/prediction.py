"""What `predict` answers: a distribution over the tokens of one response.

Knows its grid, its route and the request's cap; does not know how the numbers came about. The arithmetic is that of
`prediction_batch`, with one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mope.grid import Array
from mope.prediction_batch import LEAST_TAIL_INDEX, PredictionBatch, generated_tokens
from mope.thoughts import Thoughts, parts_of

if TYPE_CHECKING:
    from mope.corrector import Answering


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
        target_llm: the LLM that will answer, as it was named, if it was.
        predicted_like: the LLM, or group of LLMs, among those of the training rows whose answers stand for it: the
            LLM itself, its nearest relative, or None.
        answering: how its name was read, and how the LLM is asked: what `LengthPredictor.observe` keeps apart.
        generated: tokens already generated, all figures then count what is still to come.
        raw_cumulative: the same before recalibration, for `LengthPredictor.observe`.
        tail_index: Pareto index of the lengths beyond what was predicted, see `PredictionBatch`.
        thought_share: share of thoughts in the whole response, None if unknown; see `thoughts`.
    """

    edges: Array
    cumulative: Array
    expert: int = -1
    route_probabilities: tuple[float, ...] = ()
    source: str = "model"
    max_tokens: int | None = None
    target_llm: str | None = None
    predicted_like: str | None = None
    answering: Answering | None = None
    generated: float = 0.0
    raw_cumulative: Array | None = None
    tail_index: float = LEAST_TAIL_INDEX
    thought_share: float | None = None

    @property
    def llm(self) -> str:
        """What the LLM's name was read as, such as `"llama-3.3-70b-instruct"`; empty without a name."""
        return self.answering.llm if self.answering is not None else ""

    @property
    def llm_known(self) -> bool:
        """Whether the predictor was trained on answers of this LLM."""
        return self.answering is not None and self.answering.known

    @property
    def mode(self) -> str:
        """How the LLM is asked, as far as that changes what it answers: such as `"thinking"` or `"tools+json"`."""
        return self.answering.mode if self.answering is not None else ""

    @property
    def median(self) -> float:
        """The length that half of such answers stay under, in tokens."""
        return self.quantile(0.5)

    @property
    def mean(self) -> float:
        """Expected length in tokens, the request's cap applied."""
        return float(self._row.mean[0])

    @property
    def thoughts(self) -> Thoughts | None:
        """Expected tokens of thoughts and of the visible answer, together `mean`; None where nothing is known of them.

        All other figures are of the whole response: what the engine generates.
        """
        if self.thought_share is None:
            return None
        budget = self.answering.thinking_budget if self.answering is not None else None
        return parts_of(self.thought_share, self.mean, self.generated, budget)

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

    def to_dict(self, levels: Sequence[float] = (0.1, 0.5, 0.9, 0.99)) -> dict[str, Any]:
        """The figures as plain JSON values.

        Args:
            levels: quantiles to give.

        Raises:
            ConfigError: a level is not between 0 and 1.
        """
        return {
            "median": self.median,
            "mean": self.mean,
            "quantiles": dict(zip(map("{:g}".format, levels), self.quantiles(levels).tolist(), strict=True)),
            "expert": self.expert,
            "route_probabilities": list(self.route_probabilities),
            "source": self.source,
            "max_tokens": self.max_tokens,
            "target_llm": self.target_llm,
            "llm": self.llm,
            "llm_known": self.llm_known,
            "predicted_like": self.predicted_like,
            "mode": self.mode,
            "generated": self.generated,
            "thoughts": None if (thoughts := self.thoughts) is None else thoughts._asdict(),
        }

    @property
    def _row(self) -> PredictionBatch:
        return PredictionBatch.of([self])

    def __repr__(self) -> str:
        low, median, high = self.quantiles([0.1, 0.5, 0.9])
        return (
            f"LengthPrediction(median={median:.0f}, 80% within {low:.0f}..{high:.0f}, expert={self.expert}, "
            f"source={self.source!r})"
        )
