"""What the front end tells the scheduler of a request: its client, and how long its answer is predicted to be.

Engines carry a small mapping of strings and numbers with each request from HTTP to the scheduler (vLLM's `vllm_xargs`,
SGLang's `custom_params`). Only the front end may write our keys: it removes whatever a caller put there. Knows no
engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from operator import le
from typing import Any, NamedTuple

PREFIX = "mope_"
CLIENT, TOKENS, QUANTILES, TARGET = "mope_client", "mope_tokens", "mope_quantiles", "mope_target"
LEVELS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)  # of the quantiles


class Carried(NamedTuple):
    """What is carried with one request.

    Attributes:
        client: its path, parts joined by `/`; None where nobody said.
        tokens: expected response tokens; None without a prediction.
        quantiles: of the prediction before recalibration, at `LEVELS`, in tokens; empty without one.
        target: the LLM, its family and the mode of asking, for recalibration: `llm|family|mode`.
    """

    client: str | None = None
    tokens: float | None = None
    quantiles: tuple[float, ...] = ()
    target: str | None = None

    def write(self) -> dict[str, str | float]:
        """As keys and values that engines carry."""
        written: dict[str, str | float] = {}
        if self.client is not None:
            written[CLIENT] = self.client
        if self.tokens is not None:
            written[TOKENS] = self.tokens
        if self.quantiles:
            written[QUANTILES] = ",".join(f"{quantile:.6g}" for quantile in self.quantiles)
        if self.target is not None:
            written[TARGET] = self.target
        return written

    @classmethod
    def read(cls, carried: Mapping[str, Any] | None) -> Carried:
        """From what the engine carried; what cannot be read is as if it had not been sent."""
        if not carried:
            return cls()
        client, tokens, target = carried.get(CLIENT), carried.get(TOKENS), carried.get(TARGET)
        return cls(
            client if isinstance(client, str) else None,
            float(tokens) if isinstance(tokens, (int, float)) else None,
            _quantiles(carried.get(QUANTILES)),
            target if isinstance(target, str) else None,
        )


def without_ours(carried: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a caller sent, less what only the front end may say."""
    return {key: value for key, value in (carried or {}).items() if not str(key).startswith(PREFIX)}


def _quantiles(text: Any) -> tuple[float, ...]:
    if not isinstance(text, str):
        return ()
    try:
        found = tuple(map(float, text.split(",", len(LEVELS))))
    except ValueError:
        return ()
    usable = len(found) == len(LEVELS) and found[0] >= 0 and found[-1] < inf and all(map(le, found, found[1:]))
    return found if usable else ()
