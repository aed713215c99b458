"""What the front end tells the scheduler of a request: its client, and how long its answer is predicted to be.

Engines carry a small mapping of strings and numbers with each request from HTTP to the scheduler (vLLM's `vllm_xargs`,
SGLang's `custom_params`). Only the front end may write our keys: it removes whatever a caller put there. Knows no
engine.
"""

from __future__ import annotations

from binascii import Error as NotBase64
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mope.grid import Array

PREFIX = "mope_"
CLIENT, TOKENS, HIGH, RAW, ANSWERING = "mope_client", "mope_tokens", "mope_high", "mope_raw", "mope_answering"
_FLOAT = np.dtype("<f4")


class Carried(NamedTuple):
    """What is carried with one request. It is read quickly; `raw` and `answering` are decoded where they are needed.

    Attributes:
        client: its path, parts joined by `/`; None where nobody said.
        tokens: expected response tokens, as the front end knows them; None without a prediction.
        high: the 90 % quantile of the same prediction, in tokens; None without a prediction.
        raw: the prediction before any correction, see `pack`; None where the scheduler corrects nothing.
        answering: which LLM answers and how it is asked, see `Answering.write`.
    """

    client: str | None = None
    tokens: float | None = None
    high: float | None = None
    raw: str | None = None
    answering: str | None = None

    def write(self) -> dict[str, str | float]:
        """As keys and values that engines carry."""
        return {key: value for key, value in zip(_KEYS, self, strict=True) if value is not None}

    @classmethod
    def read(cls, carried: Mapping[str, Any] | None) -> Carried:
        """From what the engine carried; what cannot be read is as if it had not been sent."""
        if not carried:
            return cls()
        client, tokens, high, raw, answering = map(carried.get, _KEYS)
        return cls(
            client if isinstance(client, str) else None,
            float(tokens) if isinstance(tokens, (int, float)) else None,
            float(high) if isinstance(high, (int, float)) else None,
            raw if isinstance(raw, str) else None,
            answering if isinstance(answering, str) else None,
        )


_KEYS = (CLIENT, TOKENS, HIGH, RAW, ANSWERING)


def pack(raw_E: Array) -> str:
    """Cumulative probabilities as a text: base64 of float32. What `mope.corrector.as_carried` gave stays exact."""
    return b2a_base64(raw_E.astype(_FLOAT).tobytes(), newline=False).decode()


def unpack(text: str, num_edges: int) -> Array | None:
    """What `pack` wrote, shape (num_edges,); None if it is anything else. Two microseconds.

    That it rises is left to whoever learns from it.
    """
    if len(text) > 8 * num_edges:
        return None
    try:
        found = np.frombuffer(a2b_base64(text), _FLOAT).astype(np.float64)
    except (NotBase64, ValueError):
        return None
    if len(found) != num_edges or found[0] != 0.0 or found[-1] != 1.0:
        return None
    return found


def without_ours(carried: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a caller sent, less what only the front end may say."""
    return {key: value for key, value in (carried or {}).items() if not str(key).startswith(PREFIX)}
