"""Spans of OpenTelemetry: the call of an LLM in `gen_ai.*` attributes, as OTLP writes them or flattened into columns.

Knows the semantic conventions, the older numbered attributes of OpenLLMetry, and which operations are no calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mope.reader import parsed

Record = Mapping[str, Any]

PREFIX = "gen_ai."
# operations that are no calls: agents, tools, retrieval
_OPERATIONS = frozenset({"invoke_agent", "create_agent", "invoke_workflow", "execute_tool", "embeddings", "retrieval"})
# attribute -> name of the flag in a body; of several for one flag the last counts
_FLAGS = {
    "request.model": "model",
    "request.max_tokens": "max_tokens",
    "request.max_completion_tokens": "max_completion_tokens",
    "request.temperature": "temperature",
    "request.n": "n",
    "request.choice.count": "n",
    "request.reasoning_effort": "reasoning_effort",
    "tool.definitions": "tools",
    "request.tools": "tools",
}
_SCHEMAS = ("request.structured_output_schema", "openai.request.response_format")
_TOKENS = ("usage.output_tokens", "usage.completion_tokens")
_THOUGHTS = ("usage.reasoning.output_tokens", "usage.reasoning_tokens", "usage.output_tokens.reasoning")
_FINISH = ("response.finish_reasons", "response.finish_reason", "response.stop_reason")
# full names of the attributes that are read
ATTRIBUTES = frozenset(
    PREFIX + name
    for name in (
        *_FLAGS, *_SCHEMAS, *_TOKENS, *_THOUGHTS, *_FINISH, "input.messages", "output.messages", "system_instructions",
        "prompt", "completion", "response.model", "conversation.id", "output.type", "operation.name",
    )
)  # fmt: skip


class Span(NamedTuple):
    """A call from the attributes of its span.

    Attributes:
        request: the body as OpenAI's API would have got it; empty if the span holds no messages.
        response: the answer, its usage and its finish reason, under names of `mope.log_answers`.
        record: the response again, with what went wrong.
        is_call: False for agents, tools and retrieval.
    """

    request: Record
    response: Record
    record: Record
    is_call: bool = True


def attributes_of(record: Record) -> dict[str, Any] | None:
    """The `gen_ai.*` attributes of a span without that prefix, JSON text read; None if it has none."""
    given = parsed(record.get("attributes"))
    found: dict[str, Any] = {}
    if isinstance(given, list):  # OTLP: [{"key", "value": {"stringValue"}}]
        found = {one["key"]: _otlp(one.get("value")) for one in given if isinstance(one, Mapping) and "key" in one}
    elif isinstance(given, Mapping):
        found = dict(given)
        if isinstance(inner := parsed(given.get("gen_ai")), Mapping):
            found |= {f"{PREFIX}{name}": value for name, value in _flattened(inner)}
    for name, value in record.items():
        if isinstance(name, str) and PREFIX in name:
            found[name[name.index(PREFIX) :]] = value
    named = {name[len(PREFIX) :]: parsed(value) for name, value in found.items() if str(name).startswith(PREFIX)}
    events = parsed(record.get("events"))
    for event in events if isinstance(events, list) else ():
        if isinstance(event, Mapping) and (inner := attributes_of({"attributes": event.get("attributes")})):
            named = {**inner, **named}
    return named or None


def _flattened(place: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in place.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")


def _otlp(value: Any) -> Any:
    """The value of an attribute in OTLP's JSON."""
    if not isinstance(value, Mapping):
        return value
    if isinstance(listed := value.get("arrayValue"), Mapping):
        return [_otlp(one) for one in listed.get("values") or ()]
    if isinstance(pairs := value.get("kvlistValue"), Mapping):
        return {one.get("key"): _otlp(one.get("value")) for one in pairs.get("values") or ()}
    return next((inner for name, inner in value.items() if name.endswith("Value")), None)


def read_span(attributes: Mapping[str, Any]) -> Span | None:
    """The call in some attributes, see `attributes_of`; None if they say nothing of one."""
    if str(attributes.get("operation.name")) in _OPERATIONS:
        return Span({}, {}, {}, is_call=False)
    asked = attributes.get("input.messages") or _indexed(attributes, "prompt")
    said = attributes.get("output.messages") or _indexed(attributes, "completion")
    tokens, thoughts = _first(attributes, _TOKENS), _first(attributes, _THOUGHTS)
    if asked is None and said is None and tokens is None:
        return None
    messages = [_message(one) for one in asked if isinstance(one, Mapping)] if isinstance(asked, list) else []
    if isinstance(asked, str) and asked:
        messages = [{"role": "user", "content": asked}]
    if system := attributes.get("system_instructions"):
        messages.insert(0, _message({"role": "system", "parts": system}))
    response: dict[str, Any] = {"output": said}
    if tokens is not None:
        response["usage"] = {"output_tokens": tokens, "reasoning_tokens": thoughts}
        if thoughts is not None:
            response["usage"] = {"output_tokens": tokens, "output_tokens_details": {"reasoning_tokens": thoughts}}
    if finish := _first(attributes, _FINISH):
        response["finish_reasons"] = finish
    body = {**_flags(attributes), "messages": messages} if messages else {}
    return Span(body, response, {**response, "error": attributes.get("error.type")})


def _first(attributes: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((attributes[name] for name in names if attributes.get(name) is not None), None)


def _flags(attributes: Mapping[str, Any]) -> dict[str, Any]:
    found = {flag: attributes[name] for name, flag in _FLAGS.items() if attributes.get(name) is not None}
    if "model" not in found and isinstance(attributes.get("response.model"), str):
        found["model"] = attributes["response.model"]
    if attributes.get("output.type") == "json":
        found["response_format"] = "json_object"
    schema, form = (attributes.get(name) for name in _SCHEMAS)
    if schema or isinstance(form, str):
        found["response_format"] = "json_schema" if schema else form
    return found


def _message(message: Record) -> dict[str, Any]:
    """A message of a span with OpenAI's names of its parts."""
    parts = parsed(message.get("parts", message.get("content")))
    role = message.get("role")
    if not isinstance(parts, list):
        return {"role": role, "content": parts}
    content = []
    for part in parts:
        if isinstance(part, Mapping):
            kind, text = part.get("type", "text"), part.get("content", part.get("text"))
            if kind == "tool_call_response":
                role = "tool"
            if kind == "text" and isinstance(text, str):
                content.append({"type": "text", "text": text})
        elif isinstance(part, str):
            content.append({"type": "text", "text": part})
    return {"role": role, "content": content}


def _indexed(attributes: Mapping[str, Any], name: str) -> list[dict[str, Any]] | None:
    """Messages that are written as attributes `prompt.0.role`, `prompt.0.content`, `completion.0.finish_reason`."""
    found: dict[int, dict[str, Any]] = {}
    for key, value in attributes.items():
        first, _, rest = key.partition(".")
        index, _, field = rest.partition(".")
        if first == name and index.isascii() and index.isdigit() and len(index) < 6 and field:
            if field.startswith("tool_calls."):
                _, _, place = field.partition(".")
                at_call, _, field_of_call = place.partition(".")
                calls = found.setdefault(int(index), {}).setdefault("calls", {})
                calls.setdefault(at_call, {})[field_of_call] = value
            else:
                found.setdefault(int(index), {})[field] = value
    if not found:
        said = attributes.get(name)
        if isinstance(said, list):
            return [dict(one) for one in said if isinstance(one, Mapping)]
        return [{"role": "assistant" if name == "completion" else "user", "content": said}] if said else None
    messages = [found[index] for index in sorted(found)]
    for message in messages:
        if "calls" in message:
            message["tool_calls"] = list(message.pop("calls").values())
        if name == "completion":
            message.setdefault("role", "assistant")
    return messages
