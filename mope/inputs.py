"""Requests as Python callers write them: a prompt, a mapping, a `Request`; and what is no request is refused.

The reading is that of `mope.reader`, which servers and training use, too. What they pass over is an error here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

from mope.errors import DataError
from mope.reader import FIELDS, SYSTEM, TEXTS, TOP_NAMES, Field, read_flags, shown
from mope.request import TOKEN_UNITS, TOOL_CHOICES, Request, clean, role_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class RequestFlags(TypedDict, total=False):
    """What may be said of a request beside its text: the keywords of `LengthPredictor.predict`.

    Attributes:
        system: the system prompt.
        target_llm: name of the LLM that will answer, in any spelling.
        max_tokens: the request's cap on response tokens.
        temperature: sampling temperature, 0 to 100.
        tools: the tools that are offered, or whether there are any.
        num_tools: how many tools are offered, where `tools` does not list them.
        tool_chars: characters of their definitions as JSON, where `tools` does not list them.
        tool_choice: `"auto"`, `"required"`, `"none"`, or OpenAI's mapping that names a tool.
        response_format: a name such as `"json_object"`, or OpenAI's mapping with `type`.
        thinking: whether the LLM is asked to think before it answers.
        thinking_budget: cap on the tokens of its thoughts.
        effort: how hard it is asked to think: `"none"`, `"minimal"`, `"low"`, `"medium"`, `"high"`, `"xhigh"`, or a
            number from 0 to 5.
        token_unit: what response tokens are counted in: `"own"` (tokens of the target LLM) or `"cl100k_base"`.
        llm_family: family of the target LLM, such as `"qwen"`, where its name does not tell.
        llm_size: billions of parameters of the target LLM, where its name does not tell.
        llm_reasoning: whether the target LLM writes long thoughts, where its name does not tell.
        llm_year: year in which the target LLM was released, where its name does not tell.
    """

    system: str | None
    target_llm: str | None
    max_tokens: int | None
    temperature: float | None
    tools: bool | Sequence[Any] | Mapping[str, Any] | None
    num_tools: int | None
    tool_chars: int | None
    tool_choice: str | Mapping[str, Any] | None
    response_format: str | Mapping[str, Any] | None
    thinking: bool | None
    thinking_budget: int | None
    effort: float | str | None
    token_unit: str | None
    llm_family: str | None
    llm_size: float | None
    llm_reasoning: bool | None
    llm_year: int | None


LIKE = 0.8  # how like a known name a misspelt one is
# fields of servers that are like known names and are none of them
NOT_MISSPELT = frozenset({"rid", "models"})
FLAGS = frozenset(RequestFlags.__annotations__)
_ITEMS = ("function_call", "custom_tool_call", "reasoning")
_OTHER = {"system", "tools", "tool_choice", "response_format", "token_unit"}
_VALUES = tuple((name, FIELDS[name][0]) for name in sorted(FLAGS - _OTHER))
_FIELDS = TOP_NAMES.union(FLAGS, TEXTS, ("history", "id"))
# names that servers have for what is named otherwise among the keywords of `predict`
_OUR_NAMES = {
    name.partition(".")[0]: flag
    for flag, fields in FIELDS.items()
    for field in fields
    for name in field.names
    if name not in FLAGS
} | {name: "system" for name in SYSTEM if name != "system"}


def as_request(request: Request | str | Mapping[str, Any]) -> Request:
    """A `Request` from a prompt, or from a mapping: the body of an HTTP request, or our own names of the same things.

    A mapping has `prompt`, `messages` or `input`, optionally `history` (the messages before `prompt`), and flags under
    any name that `mope.reader.FIELDS` knows. What else a server may be asked for is passed over.

    Raises:
        DataError: neither prompt nor messages, a key that is nearly one of these names, or a value that cannot be read.
    """
    if isinstance(request, str):
        return request_from({"prompt": request})
    if isinstance(request, Request):
        return _checked(request)
    if not isinstance(request, Mapping):
        raise DataError(f"a request is a prompt, a mapping or a Request; got {type(request).__name__}")
    for name in request:
        if not isinstance(name, str) or (name not in _FIELDS and _meant(name) is not None):
            raise DataError(unknown_field(name, _FIELDS))
    return request_from(request)


@lru_cache(maxsize=1024)
def _meant(name: str) -> str | None:
    """The field that a misspelt one was meant to be; None for a field of its own, such as `stream` or `top_p`."""
    near = get_close_matches(name, sorted(_FIELDS), n=1, cutoff=LIKE)
    return near[0] if near and name not in NOT_MISSPELT else None


def as_requests(requests: Iterable[Request | str | Mapping[str, Any]]) -> list[Request]:
    """A batch of requests, each read by `as_request`.

    Raises:
        DataError: not a batch, or see `as_request`.
    """
    is_single = isinstance(requests, str | bytes) or (
        isinstance(requests, Mapping) and any(name in requests for name in TEXTS)
    )
    if is_single or not isinstance(requests, Iterable):
        raise DataError(f"a batch is a list of requests; got {type(requests).__name__}; put one request into [...]")
    read: list[Request] = []
    for number, request in enumerate(requests):
        try:
            read.append(as_request(request))
        except DataError as error:
            raise DataError(f"request {number} of the batch (the first is 0): {error}") from error
    return read


def request_from(body: Mapping[str, Any]) -> Request:
    """A `Request` from a mapping whose keys were looked at.

    Raises:
        DataError: see `as_request`.
    """
    texts = [name for name in ("prompt", "messages", "input") if body.get(name) is not None]
    if not texts:
        texts = [name for name in ("text", "inputs") if isinstance(body.get(name), str)]
    if len(texts) != 1:
        raise DataError("give either a prompt or messages; got " + (" and ".join(texts) if texts else "neither"))
    (name,) = texts
    flags = read_flags(body, strict=True)
    if (unit := body.get("token_unit")) is not None:
        flags["token_unit"] = _unit(unit)
    given, earlier = body[name], body.get("history")
    earlier = [] if earlier is None else _listed(earlier, "history")
    if name == "prompt" and not isinstance(given, str):
        if not (isinstance(given, list) and len(given) == 1 and isinstance(given[0], str)):
            raise DataError(f"prompt is {type(given).__name__}; expected a string")
        (given,) = given
    if name == "prompt" and not earlier and not any(system in body for system in SYSTEM):
        return Request(prompt=clean(given), **flags)
    if isinstance(given, str) and name != "messages":
        conversation = [*earlier, {"role": "user", "content": given}]
    elif earlier:
        raise DataError(f"{name} hold the history already; give history with prompt alone")
    else:
        conversation = _listed(given, name)
        # items of the Responses API that are not messages, also where a log calls its input messages
        conversation = [one for one in conversation if not _is_item(one, name)]
    for system in SYSTEM:
        if (said := body.get(system)) is not None:
            if not isinstance(said, str | list):
                raise DataError(f"{system} is a text; got {shown(said)}")
            if said:
                conversation.insert(0, {"role": "system", "content": said})
                break
    return Request.from_messages(conversation, **flags)


def _is_item(one: Any, name: str) -> bool:
    return isinstance(one, Mapping) and role_of(one) is None and (name == "input" or one.get("type") in _ITEMS)


def _unit(unit: Any) -> str:
    if not isinstance(unit, str) or unit not in TOKEN_UNITS:
        raise DataError(f"token_unit is {' or '.join(TOKEN_UNITS)}; got {shown(unit)}")
    return unit


def unknown_field(name: Any, known: Iterable[str]) -> str:
    """What is wrong with a field that nothing here is called by, and what may have been meant."""
    text = shown(name)
    keywords = f"known are prompt, messages, history, {', '.join(sorted(FLAGS))}"
    if not isinstance(name, str):
        return f"a field of a request has a text for its name; got {text}"
    if known is not FLAGS:
        return f"unknown request field {text} (did you mean {_meant(name)}?)"
    near = _OUR_NAMES.get(name) or next(iter(get_close_matches(name[:80], sorted(FLAGS), n=1, cutoff=LIKE)), None)
    if near is not None:
        return f"unknown request field {text} (did you mean {near}?); {keywords}"
    return f"unknown request field {text}; {keywords}; other fields of a server's request go into predict({{...}})"


def _is_read(value: Any, field: Field) -> bool:
    """Whether a value is what the reader makes of it: a number, not a text that says one."""
    try:
        read = field.read(value)
    except ValueError:
        return False
    is_number = type(value) in (int, float)
    return bool(read == value) and (is_number or type(read) is type(value))


def has_text(request: Request) -> bool:
    """Whether there is anything but blanks for a network to read."""
    return any(text and not text.isspace() for text in (request.prompt, request.previous_prompt, request.system))


def _listed(messages: Any, name: str) -> list[Any]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise DataError(f"{name} is {type(messages).__name__}; expected a list of messages")
    return list(messages)


def _checked(request: Request) -> Request:
    """A request that a caller made, after looking at what a network would stumble over."""
    for name in ("prompt", "system", "previous_prompt", "response_format"):
        if not isinstance(getattr(request, name), str):
            raise DataError(f"{name} is {type(getattr(request, name)).__name__}; expected a string")
    for name, field in _VALUES:
        value = getattr(request, name)
        if value is not None and not _is_read(value, field):
            raise DataError(f"{name} is {field.expected}; got {shown(value)}")
    if not isinstance(request.tools, bool):
        raise DataError(f"tools of a Request is true or false; got {shown(request.tools)}")
    if not isinstance(request.last_is_tool_result, bool):
        raise DataError(f"last_is_tool_result is true or false; got {shown(request.last_is_tool_result)}")
    if request.tool_choice not in TOOL_CHOICES:
        raise DataError(
            f"tool_choice of a Request is {', '.join(TOOL_CHOICES[1:])} or empty; got {shown(request.tool_choice)}"
        )
    if request.token_unit is not None:
        _unit(request.token_unit)
    for name in ("num_earlier_turns", "num_tool_results", "other_chars"):
        if not _is_size(getattr(request, name)):
            raise DataError(f"{name} is a whole number, 0 or more; got {shown(getattr(request, name))}")
    if not isinstance(request.answer_estimates, tuple) or not all(map(_is_size, request.answer_estimates)):
        raise DataError(
            f"answer_estimates is a tuple of whole numbers, 0 or more; got {shown(request.answer_estimates)}"
        )
    return request


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
