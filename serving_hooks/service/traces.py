"""What a trace says of a request to `mope serve`, where OpenTelemetry is installed and a span is open.

The span is that of whoever instruments the application, such as `opentelemetry-instrument`. Names are those of the
semantic conventions for generative AI where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

trace: Any = None  # an application without OpenTelemetry has no spans
with suppress(ImportError):
    trace = import_module("opentelemetry.trace")


def predicted(answer: Mapping[str, Any], high: float) -> None:
    """Notes a prediction.

    Args:
        answer: what the service answers.
        high: the 90 % quantile in tokens.
    """
    _note(
        {
            "gen_ai.request.model": answer["llm"] or None,
            "gen_ai.request.max_tokens": answer["max_tokens"],
            "mope.output_tokens.expected": answer["mean"],
            "mope.output_tokens.q90": round(high, 2),
            "mope.source": answer["source"],
        }
    )


def finished(tokens: int, more: Mapping[str, float], reason: str | None) -> None:
    """Notes how long an answer was.

    Args:
        tokens: that were generated.
        more: `prompt_tokens` and others, as far as they are known.
        reason: why it ended.
    """
    prompt = more.get("prompt_tokens")
    _note(
        {
            "gen_ai.usage.output_tokens": tokens,
            "gen_ai.usage.input_tokens": None if prompt is None else int(prompt),
            "gen_ai.response.finish_reasons": None if reason is None else [reason],
        }
    )


def _note(attributes: Mapping[str, Any]) -> None:
    if trace is None:
        return
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
