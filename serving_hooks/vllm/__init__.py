"""vLLM: a scheduler, and an ASGI middleware that tells it who sent a request and how long the answer will be.

    vllm serve MODEL --scheduler-cls mope.serving_hooks.vllm.make_scheduler \\
        --middleware mope.serving_hooks.vllm.Middleware
    vllm serve MODEL --scheduling-policy priority --middleware mope.serving_hooks.vllm.PriorityMiddleware

Importing this imports no engine; names are looked up when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mope.serving_hooks.vllm.middleware import Middleware, PriorityMiddleware
    from mope.serving_hooks.vllm.scheduler import make_scheduler

_HOME = {"Middleware": "middleware", "PriorityMiddleware": "middleware", "make_scheduler": "scheduler"}

__all__ = ["Middleware", "PriorityMiddleware", "make_scheduler"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
