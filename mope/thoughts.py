"""Which share of a response are thoughts, and what is left for the visible answer.

The share depends on the LLM and on the prompt: a quiz leaves a few visible tokens, an essay most of them. It is fitted
by `mope.training.thoughts`; it does not change the predicted total.

Shape suffixes: B requests, F numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import NamedTuple

import numpy as np
from pydantic import ConfigDict, Field, PrivateAttr, model_validator
from typing_extensions import Self

from mope.config import LARGEST, Frozen
from mope.features import NUMBER_NAMES, effort_of
from mope.grid import Array
from mope.request import Request
from mope.rules import RULE_NAMES
from mope.target_llm import describe

MOST_DEVIATIONS = 4.0  # that a number of a request counts, from the mean of the training rows
# numbers of a request that may change the share: those of the prompt's text
PROMPT_NUMBERS = (
    "log_prompt_chars",
    *NUMBER_NAMES[NUMBER_NAMES.index("log_newlines") : NUMBER_NAMES.index(f"rule_{RULE_NAMES[-1]}") + 1],
    *(name for name in NUMBER_NAMES if name.startswith("share_")),
)


class Thoughts(NamedTuple):
    """The expected parts of a response that a reasoning LLM writes; together its expected length.

    Attributes:
        share: of thoughts in the response, from 0 to 1; in what remains, where some tokens are generated.
        tokens: expected tokens of thoughts.
        visible_tokens: expected tokens of the visible answer.
    """

    share: float
    tokens: float
    visible_tokens: float


class _Read(NamedTuple):
    """Where the numbers stand among those of a predictor, and what is made of them."""

    names: Sequence[str]
    columns: list[int]
    mean_F: Array
    scale_F: Array
    weights_F: Array


class ThoughtsModel(Frozen):
    """`thoughts.json` of a saved predictor: log odds of a visible token, `bias` + LLM (or its family) + numbers."""

    model_config = ConfigDict(allow_inf_nan=False)

    bias: float = Field(ge=-LARGEST, le=LARGEST, description="log odds for an LLM of an unknown family, mean prompt")
    llms: dict[str, float | None] = Field(description="for each known LLM what comes on top; null: it has no thoughts")
    families: dict[str, float] = Field(description="the same for other LLMs of a family")
    number_names: tuple[str, ...] = Field(description="numbers of a request that change the odds")
    number_mean: tuple[float, ...] = Field(description="their means in the training rows")
    number_scale: tuple[float, ...] = Field(description="one over their standard deviations")
    weights: tuple[float, ...] = Field(description="log odds per standard deviation of each number")
    _read: _Read | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        numbers = (self.number_mean, self.number_scale, self.weights)
        if any(len(own) != len(self.number_names) for own in numbers):
            raise ValueError("number_names: expected a mean, a scale and a weight for each")
        said = [*(odds for odds in self.llms.values() if odds is not None), *self.families.values()]
        if any(abs(number) > LARGEST for own in (*numbers, said) for number in own):
            raise ValueError("weights: no predictor has such numbers")
        return self

    def prompt_odds(self, numbers_BF: Array, names: Sequence[str]) -> Array:
        """What the prompts add to the log odds, shape (B,).

        Args:
            numbers_BF: numbers of the requests, shape (B, F).
            names: of the numbers, in order; those that are missing add nothing.
        """
        if self._read is None or self._read.names is not names:
            known = [row for row, name in enumerate(self.number_names) if name in names]
            columns = [list(names).index(self.number_names[row]) for row in known]
            own = (np.array(part)[known] for part in (self.number_mean, self.number_scale, self.weights))
            self._read = _Read(names, columns, *own)
        _, columns, mean_F, scale_F, weights_F = self._read
        deviations_BF = (numbers_BF[:, columns] - mean_F) * scale_F
        return np.asarray(deviations_BF.clip(-MOST_DEVIATIONS, MOST_DEVIATIONS) @ weights_F)

    def share(self, request: Request, prompt_odds: float) -> float | None:
        """The share of thoughts in the response to a request; None if nothing is known of the LLM's thoughts.

        0 where the LLM is asked not to think, or has no thoughts and is not asked for any.

        Args:
            request: who answers, and how it is asked.
            prompt_odds: see `ThoughtsModel.prompt_odds`.
        """
        if request.thinking is False or effort_of(request) == 0:
            return 0.0
        odds = self._llm_odds(request)
        if odds is None:
            return 0.0
        if odds != odds:  # NaN: unknown
            return None
        return 1.0 / (1.0 + exp(min(max(self.bias + odds + prompt_odds, -50.0), 50.0)))

    def _llm_odds(self, request: Request) -> float | None:
        """Log odds of the LLM or its family; None for an LLM without thoughts, NaN if it may have some or not."""
        named = describe(request.target_llm)
        is_asked = bool(request.thinking or request.effort or request.thinking_budget)
        if named.name in self.llms:
            own = self.llms[named.name]
            if own is not None or not is_asked:
                return own
        family = describe(request.llm_family).family or named.family
        reasons = named.reasoning if request.llm_reasoning is None else request.llm_reasoning
        if is_asked or reasons:
            return self.families.get(family or "", 0.0)
        return None if request.llm_reasoning is False else float("nan")


def parts_of(share: float | None, mean: float, generated: float, budget: float | None) -> Thoughts | None:
    """Expected thoughts and visible answer of what remains of a response. Thoughts come first.

    Args:
        share: of thoughts in the whole response; None if unknown.
        mean: expected tokens that remain.
        generated: tokens that are out already.
        budget: cap on the tokens of thoughts; None without one.
    """
    if share is None:
        return None
    whole = share * (mean + generated)
    left = max((whole if budget is None else min(whole, budget)) - generated, 0.0)
    left = min(left, mean)
    return Thoughts(left / mean if mean > 0 else 0.0, left, mean - left)
