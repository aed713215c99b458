"""What `predict` answers: a distribution over the tokens of one response.

Knows its grid, its route and the request's cap; does not know how the numbers came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mope.errors import ConfigError
from mope.grid import Array, cdf_at, quantiles_at, survival_integral


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
        mode: how it is asked, such as `"thinking"` or `"tools+json"`: `LengthPredictor.observe` keeps modes apart.
        generated: tokens already generated, all figures then count what is still to come.
        raw_cumulative: the same before recalibration, for `LengthPredictor.observe`.
    """

    edges: Array
    cumulative: Array
    expert: int = -1
    route_probabilities: tuple[float, ...] = ()
    source: str = "model"
    max_tokens: int | None = None
    target_llm: str | None = None
    mode: str = ""
    generated: float = 0.0
    raw_cumulative: Array | None = None

    @property
    def median(self) -> float:
        """The length that half of such answers stay under, in tokens."""
        return self.quantile(0.5)

    @property
    def mean(self) -> float:
        """Expected length in tokens, the request's cap applied."""
        cap = np.inf if self.max_tokens is None else float(self.max_tokens)
        start = np.array([min(self.generated, cap)])
        integral = survival_integral(self.edges, self.cumulative[None], start, np.array([cap]))
        return float(integral[0] / self._survival_at_generated())

    def quantile(self, level: float) -> float:
        """The number of tokens that a share `level` of such answers stays under.

        Raises:
            ConfigError: `level` is not between 0 and 1.
        """
        return float(self.quantiles([level])[0])

    def quantiles(self, levels: Sequence[float]) -> Array:
        """Several quantiles at once, in tokens, shape (len(levels),)."""
        wanted = np.asarray(levels, dtype=np.float64)
        if any(not 0 <= level <= 1 for level in levels):
            raise ConfigError(f"quantile levels lie between 0 and 1; got {list(levels)}")
        if self.generated:
            wanted = 1.0 - (1.0 - wanted) * self._survival_at_generated()
        tokens = quantiles_at(self.edges, self.cumulative[None], wanted[None])[0]
        if self.max_tokens is not None:
            tokens = np.minimum(tokens, self.max_tokens)
        return np.asarray(np.maximum(tokens - self.generated, 0.0))

    def cdf(self, tokens: float) -> float:
        """Probability that no more than `tokens` (further) tokens come."""
        total = self.generated + tokens
        if self.max_tokens is not None and total >= self.max_tokens:
            return 1.0
        reached = float(cdf_at(self.edges, self.cumulative[None], np.array([total]))[0])
        if not self.generated:
            return reached
        return max(0.0, 1.0 - (1.0 - reached) / self._survival_at_generated())

    def remaining(self, generated: float) -> LengthPrediction:
        """The distribution of what is still to come once `generated` tokens are out and no end is in sight.

        Conditions on the answer being longer; costs no second pass through the network. Beyond the grid's
        last edge nothing is known, and what remains is 0.
        """
        if generated < 0:
            raise ConfigError(f"generated tokens can't be negative; got {generated}")
        return replace(self, generated=self.generated + float(generated))

    def _survival_at_generated(self) -> float:
        reached = cdf_at(self.edges, self.cumulative[None], np.array([self.generated]))[0]
        return max(1.0 - float(reached), 1e-9)

    def __repr__(self) -> str:
        low, median, high = self.quantiles([0.1, 0.5, 0.9])
        return (
            f"LengthPrediction(median={median:.0f}, 80% within {low:.0f}..{high:.0f}, expert={self.expert}, "
            f"source={self.source!r})"
        )
