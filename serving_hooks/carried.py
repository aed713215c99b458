"""What the front end tells the scheduler of a request: its client, and how long its answer is predicted to be.

Engines carry a small mapping of strings and numbers with each request from HTTP to the scheduler (vLLM's `vllm_xargs`,
SGLang's `custom_params`). Callers can write there, too. So the front end seals what it writes with a secret that only
the server's processes know (`mope.serving_hooks.secret`), and the scheduler drops what carries no such seal. Knows no
engine.
"""

from __future__ import annotations

import logging
import secrets
import struct
from binascii import Error as NotBase64
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from hashlib import blake2b
from hmac import compare_digest
from math import nan
from typing import Any, NamedTuple

import numpy as np

from mope.grid import Array

PREFIX = "mope_"
CLIENT, TOKENS, HIGH, RAW, ANSWERING = "mope_client", "mope_tokens", "mope_high", "mope_raw", "mope_answering"
SEAL = "mope_seal"
_FLOAT = np.dtype("<f4")

logger = logging.getLogger("mope")


class Seals:
    """Seals of this process: until `use` gives it the server's secret, of a secret of its own.

    Attributes:
        num_refused: requests that came with our keys and without the right seal.
    """

    _numbers = struct.Struct("<ddiii")

    def __init__(self) -> None:
        self.num_refused = 0
        self.use(secrets.token_bytes(32))

    def use(self, secret: bytes) -> None:
        """From now on seals with this secret, of at most 64 bytes, as all processes of the server do."""
        self._blank = blake2b(key=secret, digest_size=16, person=b"mope seal")

    def seal(
        self, client: str | None, tokens: float | None, high: float | None, raw: str | None, answering: str | None
    ) -> str:
        """A keyed BLAKE2b hash of all values, 32 hexadecimal digits. One microsecond."""
        seal = self._blank.copy()
        seal.update(
            self._numbers.pack(  # lengths keep one text from running into the next
                nan if tokens is None else tokens,
                nan if high is None else high,
                -1 if client is None else len(client),
                -1 if raw is None else len(raw),
                -1 if answering is None else len(answering),
            )
            + f"{client}{raw}{answering}".encode("utf-8", "surrogatepass")
        )
        return seal.hexdigest()

    def refuse(self) -> None:
        """Counts a request whose keys are not the front end's; says so once."""
        self.num_refused += 1
        if self.num_refused == 1:
            logger.warning(
                "mope: a request came with keys %s* that the front end did not seal; its client and prediction are "
                "dropped. Either a caller wrote them, or the middleware and the scheduler have different secrets (see "
                "the option `secret`). mope_unsealed_total counts such requests",
                PREFIX,
            )


seals = Seals()


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
        """As keys and values that engines carry, sealed; empty if there is nothing to carry."""
        told = {key: value for key, value in zip(_KEYS, self, strict=True) if value is not None}
        if told:
            told[SEAL] = seals.seal(*self)
        return told

    @classmethod
    def read(cls, carried: object, *, sealed: bool = True) -> Carried:
        """From what the engine carried. Two microseconds. Never raises.

        Args:
            carried: a dict, or whatever else a caller wrote in its place.
            sealed: whether only what this server's front end sealed counts.

        Returns:
            What `write` was called on. All of it is None without the right seal.
        """
        if not isinstance(carried, dict):
            return _NOTHING
        get = carried.get
        client, tokens, high = get(CLIENT), get(TOKENS), get(HIGH)
        raw, answering = get(RAW), get(ANSWERING)
        if client is None and tokens is None and high is None and raw is None and answering is None:
            return _NOTHING
        try:
            if sealed:
                if not compare_digest(carried[SEAL], seals.seal(client, tokens, high, raw, answering)):
                    raise ValueError
            elif any(not isinstance(text, str | None) for text in (client, raw, answering)):
                raise TypeError
            return cls(
                client, None if tokens is None else float(tokens), None if high is None else float(high), raw, answering
            )
        except (KeyError, TypeError, ValueError, OverflowError, struct.error):
            seals.refuse()
            return _NOTHING


_KEYS = (CLIENT, TOKENS, HIGH, RAW, ANSWERING)
_NOTHING = Carried()


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
