"""The length predictor as a model of Triton's Python back end. `mope-export --to triton` copies this file.

Inputs, outputs and the levels of the quantiles are in `config.pbtxt`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from mope import LengthPrediction, LengthPredictor, PredictionBatch, Request
from mope.errors import DataError, is_panic
from mope.inputs import as_request

_logger = logging.getLogger("mope")


class TritonPythonModel:
    """One instance of the model. Triton looks for this name and calls these methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the predictor that lies next to this file.

        Args:
            args: what Triton tells: the model's config as JSON, and kind and number of the instance's device.

        Raises:
            UserError: the predictor or ONNX Runtime can't be loaded; Triton then says that the model is not ready.
        """
        parameters = json.loads(args["model_config"])["parameters"]
        self._levels = [float(level) for level in parameters["levels"]["string_value"].split(",")]
        on_gpu = args["model_instance_kind"] == "GPU"
        self._predictor = LengthPredictor.from_pretrained(
            Path(__file__).with_name("artifact"),
            backend="onnx-gpu" if on_gpu else "onnx",
            device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu",
        )
        self._failed_before = False

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch of inference requests.

        A request that can't be read gets an error, and the other requests get their predictions. Rows that the network
        can't predict get the fallback.

        Args:
            requests: Triton's, each with PROMPT or REQUEST of shape (B, 1).

        Returns:
            One response per request, in order: MEDIAN and MEAN in tokens, shape (B, 1); QUANTILES in tokens, shape
            (B, levels); SOURCE, shape (B, 1).
        """
        read = [_read(request) for request in requests]
        rows = [row for one in read if isinstance(one, list) for row in one]
        predictions = iter(self._predict(rows))
        return [
            self._response(list(islice(predictions, len(one))))
            if isinstance(one, list)
            else pb_utils.InferenceResponse(error=one)
            for one in read
        ]

    def finalize(self) -> None:
        """Close the predictor."""
        self._predictor.close()

    def _predict(self, requests: list[Request]) -> list[LengthPrediction]:
        """Predict. If a batch fails, each of its requests is predicted alone, and those that fail get the fallback."""
        try:
            return self._predictor.predict_batch(requests)
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            if not self._failed_before:
                self._failed_before = True
                _logger.exception("a prediction failed; a request that fails gets the fallback (logged once)")
            if len(requests) == 1:
                return [self._predictor.fallback("error", requests[0])]
            return [self._predict([request])[0] for request in requests]

    def _response(self, predictions: list[LengthPrediction]) -> Any:
        batch = PredictionBatch.of(predictions)
        figures = {
            "MEDIAN": batch.median[:, None],
            "MEAN": batch.mean[:, None],
            "QUANTILES": batch.quantiles(self._levels),
        }
        tensors = [pb_utils.Tensor(name, values.astype(np.float32)) for name, values in figures.items()]
        sources = np.array([[prediction.source.encode()] for prediction in predictions], dtype=np.object_)
        return pb_utils.InferenceResponse([*tensors, pb_utils.Tensor("SOURCE", sources)])


def _read(request: Any) -> Any:
    """The rows of an inference request as a list of `Request`; a `TritonError` if one of them can't be read."""
    try:
        prompts, bodies = (pb_utils.get_input_tensor_by_name(request, name) for name in ("PROMPT", "REQUEST"))
        if (prompts is None) == (bodies is None):
            raise DataError(f"give either PROMPT or REQUEST; got {'neither' if prompts is None else 'both'}")
        if bodies is None:
            return [as_request(text.decode()) for text in prompts.as_numpy().flat]
        return [as_request(json.loads(text)) for text in bodies.as_numpy().flat]
    except Exception as error:
        message = str(error)
        if not isinstance(error, DataError):
            message = f"PROMPT is a text and REQUEST a JSON object, in UTF-8; got {type(error).__name__}: {message}"
        return pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
