"""A web application for gunicorn that makes a predictor and uses it at import: before the fork, with `--preload`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from typing import Any

from mope import LengthPredictor, ServingPredictor

predictor = LengthPredictor.from_pretrained(os.environ["MOPE_TEST_ARTIFACT"], backend="onnx", num_threads=2)
serving = ServingPredictor(predictor)
FIRST = asyncio.run(serving.predict("before the fork")).source


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer with the worker's process id and where its prediction comes from."""
    prediction = asyncio.run(serving.predict(environ["PATH_INFO"], deadline_s=5.0))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {FIRST} {prediction.source}".encode()]
