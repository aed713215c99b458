"""Requests as callers write them: a prompt, a mapping, OpenAI-style messages; and what is no request is refused.

Knows what may be written and says what is wrong with the rest; knows no tokenizer and no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from mope.errors import DataError
from mope.request import Request
from mope.target_llm import MAX_SIZE

FLAGS = frozenset(
    {"max_tokens", "temperature", "tools", "response_format", "thinking", "thinking_budget", "target_llm", "llm_family",
     "llm_size", "llm_reasoning", "system"}
)  # fmt: skip
MAX_TOKENS, MAX_TEMPERATURE = 2**31 - 1, 100
_SERVERS_NAMES = {  # of what is named otherwise here
    "model": "target_llm", "max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens",
    "enable_thinking": "thinking", "reasoning_effort": "thinking",
}  # fmt: skip
_LLM_FIELDS = ("llm_family", "llm_size", "llm_reasoning")


def as_request(request: Request | str | Mapping[str, Any]) -> Request:
    """A `Request` from a prompt or a mapping with `prompt` or `messages`, `history` and flags.

    Raises:
        DataError: neither prompt nor messages, an unknown key, or a value of another type.
    """
    if isinstance(request, str):
        return Request(prompt=request)
    if isinstance(request, Request):
        return _checked(request)
    if not isinstance(request, Mapping):
        raise DataError(f"a request is a prompt, a mapping or a Request; got {type(request).__name__}")
    flags = dict(request)
    flags.pop("id", None)
    return request_from(flags.pop("prompt", None), flags.pop("messages", None), flags.pop("history", None), flags)


def as_requests(requests: Iterable[Request | str | Mapping[str, Any]]) -> list[Request]:
    """A batch of requests, each read by `as_request`.

    Raises:
        DataError: not a batch, or see `as_request`.
    """
    is_single = isinstance(requests, str | bytes) or (isinstance(requests, Mapping) and "prompt" in requests)
    if is_single or not isinstance(requests, Iterable):
        raise DataError(f"a batch is a list of requests; got {type(requests).__name__}; put one request into [...]")
    read: list[Request] = []
    for number, request in enumerate(requests):
        try:
            read.append(as_request(request))
        except DataError as error:
            raise DataError(f"request {number} of the batch (the first is 0): {error}") from error
    return read


def request_from(prompt: Any, messages: Any, history: Any, flags: dict[str, Any]) -> Request:
    """A `Request` from what a caller gave.

    Args:
        prompt: text of the user's message, or None.
        messages: the whole conversation instead, OpenAI-style, or None.
        history: the messages before `prompt`, or None.
        flags: what else is known, of `FLAGS`.

    Raises:
        DataError: see `as_request`.
    """
    if (prompt is None) == (messages is None):
        raise DataError("give either a prompt or messages; got " + ("neither" if prompt is None else "both"))
    earlier = [] if history is None else _listed(history, "history")
    if messages is not None:
        if earlier:
            raise DataError("messages hold the history already; give history with prompt alone")
        conversation = _listed(messages, "messages")
    elif not isinstance(prompt, str):
        raise DataError(f"prompt is {type(prompt).__name__}; expected a string")
    else:
        conversation = [*earlier, {"role": "user", "content": prompt}]
    options = _checked_flags(flags)
    if system := options.pop("system", None):
        conversation.insert(0, {"role": "system", "content": system})
    return Request.from_messages(conversation, **options)


def has_text(request: Request) -> bool:
    """Whether there is anything but blanks for a network to read."""
    return any(text and not text.isspace() for text in (request.prompt, request.previous_prompt, request.system))


def _listed(messages: Any, name: str) -> list[Any]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise DataError(f"{name} is {type(messages).__name__}; expected a list of messages")
    return list(messages)


def _checked_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags in the form that `Request` has them, with `system` beside them."""
    unknown = flags.keys() - FLAGS
    if unknown:
        first = min(unknown, key=_shown)
        near = _SERVERS_NAMES.get(first) or next(iter(get_close_matches(_shown(first), FLAGS, n=1)), None)
        hint = f" (did you mean {near}?)" if near is not None else ""
        raise DataError(f"unknown request field {_shown(first)}{hint}; known are {', '.join(sorted(FLAGS))}")
    options = {name: value for name, value in flags.items() if value is not None}
    for name, value in options.items():
        if not _FLAG_CHECKS[name][0](value):
            raise DataError(f"{name} is {_FLAG_CHECKS[name][1]}; got {_shown(value)}")
    if "tools" in options:
        options["tools"] = bool(options["tools"])
    response_format = options.get("response_format", "")
    if isinstance(response_format, Mapping):  # OpenAI's {"type": "json_object"}
        response_format = str(response_format.get("type", ""))
    options["response_format"] = "" if response_format == "text" else response_format
    return options


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    """A text that can be written down as UTF-8, as the names of LLMs are when what was learned is saved."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_cap(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_TOKENS


def _is_temperature(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_TEMPERATURE


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_SIZE


_FLAG_CHECKS = {
    "target_llm": (_is_name, "the name of an LLM"),
    "system": (_is_text, "a text"),
    "max_tokens": (_is_cap, f"a whole number from 1 to {MAX_TOKENS}"),
    "temperature": (_is_temperature, f"a number from 0 to {MAX_TEMPERATURE}"),
    "thinking": (lambda value: isinstance(value, bool), "true or false"),
    "thinking_budget": (_is_cap, f"a whole number from 1 to {MAX_TOKENS}"),
    "llm_family": (_is_name, "the family of an LLM"),
    "llm_size": (_is_size, "billions of parameters, above 0"),
    "llm_reasoning": (lambda value: isinstance(value, bool), "true or false"),
    "tools": (lambda value: isinstance(value, bool | list | tuple | Mapping), "a list of tools, or true or false"),
    "response_format": (lambda value: isinstance(value, str | Mapping), 'a name such as "json_object"'),
}


def _checked(request: Request) -> Request:
    """A request that a caller made, after looking at what a network would stumble over."""
    for name in ("prompt", "system", "previous_prompt", "response_format"):
        if not isinstance(getattr(request, name), str):
            raise DataError(f"{name} is {type(getattr(request, name)).__name__}; expected a string")
    for name in ("target_llm", "max_tokens", "temperature", "thinking", "thinking_budget", *_LLM_FIELDS):
        value = getattr(request, name)
        if value is not None and not _FLAG_CHECKS[name][0](value):
            raise DataError(f"{name} is {_FLAG_CHECKS[name][1]}; got {_shown(value)}")
    if not isinstance(request.tools, bool):
        raise DataError(f"tools of a Request is true or false; got {_shown(request.tools)}")
    sizes = (
        (request.num_earlier_turns, *request.answer_estimates)
        if isinstance(request.answer_estimates, tuple)
        else (None,)
    )
    if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise DataError(
            "answer_estimates is a tuple of whole numbers, and num_earlier_turns one; none of them negative"
        )
    return request


def _shown(value: Any) -> str:
    """A value in an error message, on one line and not longer than that."""
    try:
        text = repr(value)
    except Exception as error:  # whatever a caller's class does
        text = f"{type(value).__name__} ({type(error).__name__} in its repr)"
    return text if len(text) <= 80 else f"{text[:77]}..."
