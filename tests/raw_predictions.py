"""Raw predictions as a front end carries them, for tests of what corrects and learns."""

from __future__ import annotations

from math import erf, log, sqrt

import numpy as np

from mope.artifact import find, read_config
from mope.corrector import Answering, Corrector, as_carried
from mope.grid import Array
from mope.serving_hooks.carried import Carried, pack

CONFIG = read_config(find("chat-small"))
EDGES = np.asarray(CONFIG.edges)
KNOWN = Answering("gpt-4o", "gpt", "", "", True)
UNKNOWN = Answering("mine", "mine", "", "", False)


def corrector() -> Corrector:
    """Of a packaged predictor, with nothing learned."""
    return Corrector(CONFIG)


def lognormal(median: float, deviation: float = 0.75) -> Array:
    """Cumulative probabilities at the edges of the packaged predictors' grid."""
    scores = (np.log(EDGES) - log(median)) / (deviation * sqrt(2))
    cumulative = np.array([0.5 * (1 + erf(score)) for score in scores])
    cumulative = (cumulative - cumulative[0]) / (cumulative[-1] - cumulative[0])
    return as_carried(cumulative)


def carried(
    client: str | None, tokens: float | None, answering: Answering = KNOWN, *, median: float | None = None
) -> Carried:
    """What a front end says: `tokens`, and a distribution around `median`, by default about that."""
    if tokens is None:
        return Carried(client)
    middle = tokens / 1.3 if median is None else median
    return Carried(client, tokens, 2.5 * middle, pack(lognormal(middle)), answering.write())
