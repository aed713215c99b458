"""What a server's answer says: its texts, how many tokens were generated, and why it ended.

Tables say under which names OpenAI, Anthropic, Google, Ollama, vLLM, SGLang and tracing tools have these three. To read
a further name, add it there: training and `mope predict --input` then read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mope.log_streams import unstreamed
from mope.reader import MAX_TOKENS, number, parsed, shown, true_or_false
from mope.request import ROLES, role_of


class Usage(NamedTuple):
    """Tokens as a server counted them.

    Attributes:
        tokens: all that was generated, thoughts and tool calls included; None: not recorded.
        thoughts: how many of them are thoughts; None: not known.
        unreadable: what stands in place of a count, in words; empty if nothing does.
    """

    tokens: int | None = None
    thoughts: int | None = None
    unreadable: str = ""


class LoggedAnswer(NamedTuple):
    """One answer of an LLM.

    Attributes:
        text: what a user sees; None: not logged.
        thoughts: reasoning that stands apart from the text.
        calls: tool calls, each as one line of JSON with `name` and `arguments`.
        hidden: whether thoughts were generated that are not in the log, such as encrypted ones.
        finish: why it ended, in lower case; None: not said.
        usage: tokens of this answer alone.
    """

    text: str | None = None
    thoughts: str = ""
    calls: str = ""
    hidden: bool = False
    finish: str | None = None
    usage: Usage = Usage()

    @property
    def cut(self) -> bool:
        """Whether it ended before the LLM was done: by a cap, an abort, a filter or a failure."""
        return self.finish in CUT


class Count(NamedTuple):
    """Where a server writes how many tokens it generated; `a.b` is `b` inside of `a`.

    Attributes:
        tokens: where the count stands.
        thoughts: where the count of thoughts stands.
        apart: thoughts are not part of `tokens`, unless `total` says that they are.
        total: where tokens of prompt and answer together stand.
        prompt: where tokens of the prompt stand, and of what else is in the total.
    """

    tokens: str
    thoughts: tuple[str, ...] = ()
    apart: bool = False
    total: str = ""
    prompt: tuple[str, ...] = ()


_LANGFUSE = ("usageDetails", "usage_details")
_GOOGLE = (
    "candidatesTokenCount",
    "thoughtsTokenCount",
    "totalTokenCount",
    "promptTokenCount",
    "toolUsePromptTokenCount",
)


def _snake_case(name: str) -> str:
    return re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", name)


def _google(spelled: Callable[[str], str]) -> Count:
    """Google's count: as JSON has it, or as Python's clients spell it."""
    tokens, thoughts, total, *prompt = (f"{spelled('usageMetadata')}.{spelled(name)}" for name in _GOOGLE)
    return Count(tokens, (thoughts,), apart=True, total=total, prompt=tuple(prompt))


# the first that says something counts
USAGE: tuple[Count, ...] = (
    Count(
        "usage.completion_tokens",
        ("usage.completion_tokens_details.reasoning_tokens", "usage.reasoning_tokens"),
        total="usage.total_tokens",
        prompt=("usage.prompt_tokens",),
    ),
    Count(
        "usage.output_tokens",
        ("usage.output_tokens_details.reasoning_tokens", "usage.output_tokens_details.thinking_tokens"),
        total="usage.total_tokens",
        prompt=("usage.input_tokens",),
    ),
    _google(str),
    _google(_snake_case),
    Count("usage_metadata.output_tokens", ("usage_metadata.output_token_details.reasoning",)),
    *(
        Count(
            f"{name}.output",
            (f"{name}.output_reasoning_tokens", f"{name}.output_reasoning"),
            apart=True,
            total=f"{name}.total",
            prompt=(f"{name}.input", f"{name}.input_cached_tokens"),
        )
        for name in (*_LANGFUSE, "usage")
    ),
    *(Count(f"{name}.{own}") for name in _LANGFUSE for own in ("output_tokens", "completion_tokens")),
    Count("usage.completionTokens"),
    Count("usage.outputTokens"),
    Count("meta_info.completion_tokens", ("meta_info.reasoning_tokens",)),
    Count("details.generated_tokens"),
    *(
        Count(name, ("reasoning_tokens", "thinking_tokens", "thought_tokens"))
        for name in (
            "response_tokens", "output_tokens", "completion_tokens", "generated_tokens", "eval_count",
            "tokens_predicted", "completionTokens", "outputTokens", "output_len",
        )
    ),
)  # fmt: skip
TOKEN_LISTS = ("token_ids", "output_token_ids", "output_ids")  # ids of what was generated

# why an answer ended; the first that says something counts
FINISH = (
    "finish_reason", "finishReason", "finish_reasons", "done_reason", "stop_reason", "stopReason", "stop_type",
    "meta_info.finish_reason", "details.finish_reason", "incomplete_details.reason", "native_finish_reason",
)  # fmt: skip
CUT = frozenset(
    {
        "length", "max_tokens", "max_output_tokens", "max_new_tokens", "max_length", "model_length", "token_limit",
        "limit", "model_context_window_exceeded", "context_length_exceeded", "abort", "aborted", "cancel", "cancelled",
        "canceled", "incomplete", "interrupted", "timeout", "error", "pause_turn", "content_filter", "safety",
        "recitation", "blocklist", "prohibited_content", "spii",
    }
)  # fmt: skip

# where the text of an answer stands in a response
RESPONSES = (
    "choices",
    "candidates",
    "output",
    "message",
    "generated_text",
    "response",
    "completion",
    "answer",
    "reply",
)
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts", "reasoning_details")
CALLS = ("tool_calls", "function_call")
ASSISTANT = frozenset(name for name, role in ROLES.items() if role == "assistant")
_CALL_TYPES = frozenset(
    {"tool_use", "server_tool_use", "mcp_tool_use", "tool_call", "function_call", "custom_tool_call", "mcp_call"}
)
_HIDDEN_TYPES = frozenset({"redacted_thinking", "reasoning.encrypted"})
# values of a flag of the same name as thoughts have
_MODES = frozenset({"", "none", "minimal", "low", "medium", "high", "auto", "enabled", "disabled", "adaptive"})


def at(place: Mapping[str, Any], path: str) -> Any:
    """What stands at a path such as `usage.completion_tokens`; JSON text on the way is read. None if nothing does."""
    value: Any = place
    for name in path.split("."):
        value = parsed(value)
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return parsed(value)


def usage_of(place: Mapping[str, Any]) -> Usage:
    """Tokens that a server counted, from a response, a record or a message."""
    for count in USAGE:
        if count.tokens.partition(".")[0] not in place:
            continue
        said = at(place, count.tokens)
        thoughts = next((found for path in count.thoughts if (found := _whole(at(place, path))) is not None), None)
        if said in (None, "") and count.apart and thoughts:
            said = 0  # all of it are thoughts
        if said in (None, ""):
            continue
        tokens = _whole(said)
        if tokens is None:
            return Usage(unreadable=f"{count.tokens} is {shown(said)}")
        return Usage(tokens + (thoughts if thoughts and _is_apart(place, count, tokens, thoughts) else 0), thoughts)
    for name in TOKEN_LISTS:
        if isinstance(ids := parsed(place.get(name)), list) and ids and isinstance(ids[0], int):
            return Usage(len(ids))
    return Usage()


def _is_apart(place: Mapping[str, Any], count: Count, tokens: int, thoughts: int) -> bool:
    """Whether thoughts are to be added to the tokens: a total that fits decides, then what is usual."""
    total = _whole(at(place, count.total)) if count.total else None
    if total is not None:
        prompt = sum(_whole(at(place, path)) or 0 for path in count.prompt)
        if total in (prompt + tokens, prompt + tokens + thoughts):
            return total != prompt + tokens
    return count.apart


def _whole(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and found.is_integer() and 0 <= found <= MAX_TOKENS else None


def finish_of(place: Mapping[str, Any]) -> str | None:
    """Why an answer ended, in lower case, from a response, a choice, a record or a message."""
    if true_or_false(place.get("censored")):
        return "length"
    for path in FINISH:
        if path.partition(".")[0] not in place:
            continue
        said = at(place, path)
        if isinstance(said, list):
            said = parsed(said[0]) if said else None
        if isinstance(said, Mapping):  # SGLang's {"type": "length", "length": 64}
            said = said.get("type")
        if isinstance(said, str) and said:
            return said.rpartition(".")[2].lower()  # also "FinishReason.MAX_TOKENS"
    if place.get("done") is False:
        return "incomplete"
    status = place.get("status")
    return status.lower() if isinstance(status, str) and status.lower() in CUT else None


def answers_of(response: Any) -> tuple[LoggedAnswer, ...]:
    """The answers in a response: one, or one of each choice. Empty if it holds none.

    Args:
        response: the JSON of a response of any family, its stream, a message, a list of messages, or a text.
    """
    response = unstreamed(parsed(response))
    if isinstance(response, str):
        return (LoggedAnswer(text=response),)
    if isinstance(response, list):
        return _of_list(response)
    if not isinstance(response, Mapping):
        return ()
    found = _of_fields(response)
    if not found and (
        any(name in response for name in ("content", "parts", *CALLS)) and role_of(response) in (None, *ASSISTANT)
    ):
        found = (message_answer(response),)
    if not found and isinstance(response.get("text"), str):
        found = (_with_thoughts(LoggedAnswer(text=response["text"]), response),)
    if not found and any(name in response for name in ("finish_reason", "meta_info", "done_reason")):
        found = (LoggedAnswer(),)
    if len(found) != 1:
        return found
    (answer,) = found
    usage = answer.usage if answer.usage.tokens is not None else usage_of(response)
    return (answer._replace(finish=answer.finish or finish_of(response), usage=usage),)


def _of_fields(place: Mapping[str, Any]) -> tuple[LoggedAnswer, ...]:
    """The answers under the first of `RESPONSES` that holds any."""
    for name in RESPONSES:
        value = parsed(place.get(name))
        if value in (None, "") and not (name in place and value == "" and name != "message"):
            continue
        if name in ("choices", "candidates"):
            found = tuple(_choice(one) for one in value if isinstance(one, Mapping)) if isinstance(value, list) else ()
        elif name == "message":
            is_answer = isinstance(value, Mapping) and role_of(value) in ASSISTANT
            found = (message_answer(value),) if is_answer else ()
        elif name == "output" and _are_items(value):
            found = (_gathered(value),)
        else:
            found = answers_of(value)
        if found:
            return tuple(_with_thoughts(one, place) for one in found) if len(found) == 1 else found
    return ()


def _of_list(listed: Sequence[Any]) -> tuple[LoggedAnswer, ...]:
    if _are_items(listed):
        return (_gathered(listed),)
    return tuple(message_answer(one) for one in listed if isinstance(one, Mapping) and role_of(one) in ASSISTANT)


def _are_items(value: Any) -> bool:
    """Whether a list holds items of the Responses API rather than messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) for item in value)
        and all(item.get("type") for item in value)
        and not any(isinstance(item.get("parts"), list) for item in value)
    )


def _choice(choice: Mapping[str, Any]) -> LoggedAnswer:
    """A choice of OpenAI's, or a candidate of Google's."""
    said = next((one for name in ("message", "content") if isinstance(one := parsed(choice.get(name)), Mapping)), None)
    if said is not None:
        answer = message_answer(said)
    else:
        text = choice.get("text")
        answer = _with_thoughts(LoggedAnswer(text=text if isinstance(text, str) else None), choice)
    return answer._replace(finish=finish_of(choice), usage=usage_of(choice))


def message_answer(message: Mapping[str, Any]) -> LoggedAnswer:
    """A message of an assistant as an answer: OpenAI's, Anthropic's, Google's, or a part of a span."""
    content = message.get("content", message.get("parts", message.get("value")))
    content = parsed(content) if not isinstance(content, str) else content
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        answer = _gathered(content)
    else:
        refusal = message.get("refusal")
        text = content if isinstance(content, str) and content else refusal if isinstance(refusal, str) else ""
        answer = LoggedAnswer(text=text or (content if isinstance(content, str) else ""))
    return _with_thoughts(answer, message)._replace(finish=finish_of(message), usage=usage_of(message))


def _with_thoughts(answer: LoggedAnswer, place: Mapping[str, Any]) -> LoggedAnswer:
    """An answer with the thoughts and tool calls that stand beside its text."""
    thoughts, hidden = answer.thoughts, answer.hidden
    if not thoughts:
        for name in THOUGHTS:
            said = parsed(place.get(name))
            if isinstance(said, str) and said.lower() not in _MODES and number(said) is None:
                if true_or_false(said) is None:
                    thoughts = said
            elif isinstance(said, list):
                inner = _gathered([{"type": "thinking", **one} if isinstance(one, Mapping) else one for one in said])
                thoughts, hidden = inner.thoughts, hidden or inner.hidden
            if thoughts:
                break
    calls = answer.calls or "\n".join(_calls(place))
    if thoughts == answer.thoughts and hidden == answer.hidden and calls == answer.calls:
        return answer
    return answer._replace(thoughts=thoughts, hidden=hidden, calls=calls)


def _calls(place: Mapping[str, Any]) -> Iterable[str]:
    for name in CALLS:
        said = parsed(place.get(name))
        for call in said if isinstance(said, list) else [said]:
            if isinstance(call, Mapping):
                inner = parsed(call.get("function"))
                yield _call(inner if isinstance(inner, Mapping) else call)


def _call(call: Mapping[str, Any]) -> str:
    """A tool call as a line that is near to what an LLM writes for it."""
    name = call.get("name", call.get("toolName"))
    given = next((call[key] for key in ("arguments", "input", "args", "parameters") if key in call), None)
    return json.dumps({"name": name, "arguments": parsed(given)}, ensure_ascii=False, default=str)


def _gathered(parts: Sequence[Any]) -> LoggedAnswer:
    """One answer of content parts or of items of the Responses API."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[str] = []
    hidden = False
    finish = None
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            continue
        kind = str(part.get("type") or "")
        google_call = part.get("functionCall", part.get("function_call"))
        if kind in _CALL_TYPES or isinstance(google_call, Mapping):
            calls.append(_call(google_call if isinstance(google_call, Mapping) else part))
        elif kind in _HIDDEN_TYPES:
            hidden = True
        elif kind == "message" or (not kind and role_of(part) in ASSISTANT):
            inner = message_answer(part)
            texts.append(inner.text or "")
            thoughts += [inner.thoughts] if inner.thoughts else []
            hidden, finish = hidden or inner.hidden, finish or inner.finish
        elif kind.startswith(("thinking", "reasoning")) or true_or_false(part.get("thought")):
            said = _part_text(part, ("thinking", "text", "content", "reasoning", "reasoning_content", "thought"))
            thoughts += [said] if said else []
            hidden = hidden or not said  # of the Responses API: a summary at most
        elif isinstance(code := parsed(part.get("executableCode")), Mapping):
            texts.append(str(code.get("code", "")))
        elif kind != "tool_result" and (said := _part_text(part, ("text", "content", "refusal"))):
            texts.append(said)
    return LoggedAnswer("\n".join(texts), "\n".join(thoughts), "\n".join(calls), hidden, finish)


def _part_text(part: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        said = part.get(name)
        if isinstance(said, str) and said:
            return said
        if isinstance(said, list):
            texts = [one if isinstance(one, str) else one.get("text") for one in said if isinstance(one, str | Mapping)]
            if found := "\n".join(text for text in texts if isinstance(text, str) and text):
                return found
    return ""
