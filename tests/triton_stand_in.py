"""What `model.py` of a Triton repository uses of `triton_python_backend_utils`, which only Triton's processes have."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np


class Tensor:
    def __init__(self, name: str, values: Any) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._values


class TritonError:
    INVALID_ARG = 2

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.error = error


class InferenceRequest:
    """Inputs by name; each a list of rows, which become a tensor of shape (rows, 1)."""

    def __init__(self, **inputs: list[bytes]) -> None:
        self.inputs = {
            name: Tensor(name, np.array([[row] for row in rows], dtype=np.object_)) for name, rows in inputs.items()
        }


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.inputs.get(name)


def module() -> ModuleType:
    utils = ModuleType("triton_python_backend_utils")
    vars(utils).update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        get_input_tensor_by_name=get_input_tensor_by_name,
    )
    return utils
