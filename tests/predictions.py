"""Distributions for property tests: on a small grid, with flat, steep and nearly empty bins, any tail and any cap."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from mope.grid import body_edges, tail_edges
from mope.prediction import LengthPrediction

EDGES = np.concatenate([body_edges(800, 16), tail_edges(800.5, 4000, 3)])
LAST = float(EDGES[-1])

caps = st.one_of(st.none(), st.integers(1, 6000))
tail_indices = st.sampled_from([0.3, 1.5, 2.2, 3.0, 10.6])
# generated tokens: over the grid, around its last edge, and far beyond
progress = st.one_of(st.integers(0, 900), st.floats(0, 5000), st.just(LAST), st.floats(LAST, 1e9))

_plain = st.floats(1e-3, 1.0)
_tiny = st.floats(-9, 0).map(lambda power: 10.0**power)
_sparse = st.sampled_from([0.0, 1e-5, 0.2, 1.0])


@st.composite
def predictions(draw: Any, max_tokens: Any = caps, masses: Any = None, generated: Any = None) -> LengthPrediction:
    """Any prediction; `masses` are strategies for the bins' weights, if not given also one that leaves bins empty."""
    kind = draw(st.sampled_from([_plain, _tiny, _sparse] if masses is None else masses))
    found = draw(st.lists(kind, min_size=len(EDGES) - 1, max_size=len(EDGES) - 1).filter(any))
    cdf = np.concatenate([[0.0], np.cumsum(found)])
    return LengthPrediction(
        EDGES,
        cdf / cdf[-1],
        max_tokens=draw(max_tokens),
        tail_index=draw(tail_indices),
        generated=float(draw(generated)) if generated is not None else 0.0,
    )


def uncapped() -> Any:
    """Any prediction for a request without a cap."""
    return predictions(max_tokens=st.none())


def gapless() -> Any:
    """Any prediction without a cap and without an empty bin, whose quantiles are continuous."""
    return predictions(max_tokens=st.none(), masses=[_plain, _tiny])
