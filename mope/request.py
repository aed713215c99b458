"""A request as the predictor sees it, in training and in serving alike.

Knows what a server knows before the first token: the prompt, what was said before, the flags. Does not know
tokenizers, numbers for a network, or the true length of the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mope.errors import DataError
from mope.token_estimate import estimate_tokens

MAX_EARLIER_ANSWERS = 8  # earlier answers whose lengths are kept, counted from the newest

RESULTS = ("function_call_output", "custom_tool_call_output")  # items of the Responses API
TOOL_CHOICES = ("", "auto", "required", "named", "none")
TOKEN_UNITS = ("own", "cl100k_base")
AS_READ = "mope_request"  # field of a body to `mope serve`: the request as `Request.to_json` gives it, and nothing else

# who speaks, in the words of OpenAI, Google and ShareGPT -> OpenAI's
ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request to an LLM.

    Attributes:
        prompt: the text of the last user message.
        system: the system prompt, empty if there is none.
        previous_prompt: the user message before `prompt`, empty on a first turn.
        answer_estimates: tokens of the conversation's earlier answers, as `estimate_tokens` has them, oldest first, at
            most the newest `MAX_EARLIER_ANSWERS`. Estimates, so that training and every server count alike.
        num_earlier_turns: how many answers the conversation already has.
        target_llm: name of the LLM that will answer, if known.
        max_tokens: the request's cap on response tokens, if any.
        temperature: sampling temperature, if known.
        tools: whether tools are offered.
        num_tools: how many tools are offered; 0 also where nobody counted them.
        tool_chars: characters of their definitions as JSON, estimated; 0 also where nobody counted them.
        tool_choice: `"auto"`, `"required"` (any tool), `"named"` (a certain tool), `"none"`, or empty if not said.
        num_tool_results: results of tools in the conversation.
        last_is_tool_result: whether the response follows a result of a tool, not a message of the user.
        other_chars: characters of all further messages: earlier prompts and responses, results of tools.
        response_format: `"json_object"`, `"json_schema"`, ... or empty for free text.
        thinking: whether a reasoning LLM is asked to think; None if unknown.
        thinking_budget: cap on the tokens of its thoughts, if any.
        effort: how hard a reasoning LLM is asked to think, from 0 (none) over 1 (minimal), 2 (low), 3 (medium) and
            4 (high) to 5 (xhigh); None if not said.
        token_unit: what response tokens are counted in: `"own"` (tokens of the target LLM), `"cl100k_base"`, or None
            for the unit of the training rows. No HTTP body says it.
        llm_family: family of the target LLM, such as `"qwen"`, where its name does not tell.
        llm_size: billions of parameters of the target LLM, where its name does not tell.
        llm_reasoning: whether the target LLM writes long thoughts, where its name does not tell.
        llm_year: year in which the target LLM was released, where its name does not tell.
    """

    prompt: str
    system: str = ""
    previous_prompt: str = ""
    answer_estimates: tuple[int, ...] = ()
    num_earlier_turns: int = 0
    target_llm: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    tools: bool = False
    num_tools: int = 0
    tool_chars: int = 0
    tool_choice: str = ""
    num_tool_results: int = 0
    last_is_tool_result: bool = False
    other_chars: int = 0
    response_format: str = ""
    thinking: bool | None = None
    thinking_budget: int | None = None
    effort: float | None = None
    token_unit: str | None = None
    llm_family: str | None = None
    llm_size: float | None = None
    llm_reasoning: bool | None = None
    llm_year: int | None = None

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, Any]], **flags: Any) -> Request:
        """Build a request from OpenAI-style messages (`{"role", "content"}`), the last of them the user's.

        Content given as parts (`[{"type": "text", "text": ...}, ...]`) is joined; parts that are not text are passed
        over. ShareGPT's `from` and `value` are read, too. A last message of the assistant is the beginning of the
        answer, or the answer as it was logged: it is not one of the earlier answers.

        Of a long conversation only what is kept is read: a message before costs a fraction of a microsecond.

        Raises:
            DataError: no user message, or a message without role and content.
        """
        systems: list[str] = []
        prompts: deque[str] = deque(maxlen=2)
        answers: deque[str] = deque(maxlen=MAX_EARLIER_ANSWERS + 1)
        num_answers = num_chars = num_results = results = results_before = 0
        role = None
        for position, message in enumerate(messages):
            said = role_of(message) if isinstance(message, Mapping) else None
            role = ROLES.get(said) if isinstance(said, str) else None
            if role is None:
                raise DataError(_no_role(position, message, said))
            text = message_text(content_of(message))
            num_chars += num_letters(text)
            results_before, results = results, results_in(message, role)
            num_results += results
            if role == "user":
                prompts.append(text)
            elif role == "assistant":
                answers.append(text)
                num_answers += 1
            elif role == "system":
                systems.append(text)
        if not prompts:
            raise DataError(
                f"no message with role 'user' among {len(messages)} messages; the prompt is the last of them"
            )
        if role == "assistant":
            num_chars -= num_letters(answers.pop())
            num_answers -= 1
            results = results_before
        prompt, system = clean(prompts[-1]), clean("\n".join(systems))
        before = clean(prompts[0]) if len(prompts) > 1 else ""
        return cls(
            prompt=prompt,
            system=system,
            previous_prompt=before,
            answer_estimates=tuple(estimate_tokens(clean(text)) for text in list(answers)[-MAX_EARLIER_ANSWERS:]),
            num_earlier_turns=num_answers,
            num_tool_results=num_results,
            last_is_tool_result=results > 0,
            other_chars=max(0, num_chars - len(prompt) - len(system) - len(before)),
            **flags,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that say something, as plain JSON values; `from_json` gives an equal request. Microseconds."""
        told = ((name, getattr(self, name)) for name in _DEFAULTS)
        return {
            name: list(value) if type(value) is tuple else value for name, value in told if value != _DEFAULTS[name]
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Request:
        """A request from what `to_json` gave. Whether its values are of the right kind is for `as_request` to say.

        Raises:
            DataError: no prompt, or a field that a request does not have.
        """
        wrong = sorted(map(str, given.keys() - _DEFAULTS.keys())) or ([] if "prompt" in given else ["no prompt"])
        if wrong:
            raise DataError(f"a request as it was read has {wrong[0][:40]!r}; known are {', '.join(_DEFAULTS)}")
        values: dict[str, Any] = {
            name: clean(value) if isinstance(value, str) else value for name, value in given.items()
        }
        if isinstance(answers := values.get("answer_estimates"), list):
            values["answer_estimates"] = tuple(answers)
        return cls(**values)


_DEFAULTS = {field.name: field.default for field in fields(Request)}  # by name; the prompt has none


def role_of(message: Mapping[str, Any]) -> Any:
    """Who speaks, as it is written; a tool where a user's message is nothing but results, as Anthropic has them.

    Results of tools are items without a role in the Responses API.
    """
    role = message.get("role", message.get("from"))
    if role is None and message.get("type") in RESULTS:
        return "tool"
    if isinstance(role, str) and role == "user" and isinstance(content := message.get("content"), list) and content:
        is_result = all(isinstance(part, Mapping) and part.get("type") == "tool_result" for part in content)
        return "tool" if is_result else role
    return role


def content_of(message: Mapping[str, Any]) -> Any:
    """What is said, as it is written: for `message_text`."""
    return message.get("content", message.get("value", message.get("output")))


def results_in(message: Mapping[str, Any], role: str) -> int:
    """Results of tools in a message: one of OpenAI's, any number of Anthropic's, also in front of a user's text.

    Args:
        message: as it is written.
        role: who speaks, in OpenAI's words.
    """
    content = message.get("content")
    if isinstance(content, list) and role in ("user", "tool"):
        num_results = sum(isinstance(part, Mapping) and part.get("type") == "tool_result" for part in content)
        return num_results or int(role == "tool")
    return int(role == "tool")


def num_letters(text: str) -> int:
    """Characters of a text without NULs, which `clean` removes."""
    return len(text) - text.count("\0")


def _no_role(position: int, message: Any, said: Any) -> str:
    if isinstance(said, str):
        return f"message {position} has the role {said[:40]!r}; known are system, user, assistant and tool"
    return (
        f"message {position} is {type(message).__name__} without a role; expected "
        '{"role": "user" | "assistant" | "system", "content": "..."}'
    )


def clean(text: str) -> str:
    """A text without NULs and lone surrogates, which neither Arrow nor tokenizers take. Next to nothing for ASCII."""
    if "\0" in text:
        text = text.replace("\0", "")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def message_text(content: Any) -> str:
    """The text of an OpenAI message's `content`: a string, a list of parts, or None."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        return "\n".join(texts)
    raise DataError(f"message content is {type(content).__name__}; expected a string or a list of parts")
