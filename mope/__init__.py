"""mope: how many tokens an LLM will answer, known before the first one, and fair scheduling by it.

Nothing heavy is imported here: names are looked up when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mope.prediction import LengthPrediction
    from mope.prediction_batch import PredictionBatch
    from mope.predictor import LengthPredictor
    from mope.request import Request
    from mope.serving import ServingPredictor

__all__ = ["LengthPrediction", "LengthPredictor", "PredictionBatch", "Request", "ServingPredictor", "__version__"]

_HOMES = {
    "LengthPrediction": "mope.prediction",
    "LengthPredictor": "mope.predictor",
    "PredictionBatch": "mope.prediction_batch",
    "Request": "mope.request",
    "ServingPredictor": "mope.serving",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("mope-llm")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
