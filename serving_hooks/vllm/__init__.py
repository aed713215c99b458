"""The hook for vLLM: `--scheduler-cls mope.serving_hooks.vllm.make_scheduler`.

Importing it loads neither vLLM nor a predictor; what is named is loaded when it is asked for.
"""

from __future__ import annotations

from typing import Any

_WHERE = {"make_scheduler": "scheduler", "Middleware": "middleware", "PriorityMiddleware": "middleware"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
