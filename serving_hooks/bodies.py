"""What an HTTP request to an LLM server asks for: its prompts, how many answers, and flags.

Whatever cannot be read is passed over: to refuse a request is the engine's business. Knows JSON; no engine, no network,
no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mope.errors import DataError
from mope.inputs import has_text
from mope.reader import number, read_flags, read_messages
from mope.request import Request, message_text
from mope.token_estimate import estimate_tokens

Kind = Literal["completions", "chat", "batch", "responses", "messages", "other"]

COMPLETION_TOKENS = 16  # cap of a text completion that names none, as OpenAI and engines have it
MAX_PROMPTS = 32  # prompts of one request that are predicted; of more, evenly spaced ones stand for all
MAX_ANSWERS = 10_000  # answers that one request is taken to ask for
MAX_PARSED = 4 * 2**20  # bytes of JSON that are parsed, some 10 ms; `data:` URLs do not count
MAX_PARTS = 200_000  # objects, lists and items in it
_MAX_URLS = 256  # that are looked for
CHARS_PER_TOKEN = 5  # of what is priced by its size; plain English has a little less


class Asked(NamedTuple):
    """What one HTTP request asks for.

    Attributes:
        requests: one for each prompt with text, at most `MAX_PROMPTS`; they stand for all prompts of the request.
        prompt_tokens: tokens of all its prompts together, estimated where they are text.
        num_answers: answers that it asks for: prompts times `n`.
        max_tokens: cap on each answer; None if it names none.
    """

    requests: tuple[Request, ...] = ()
    prompt_tokens: int = 0
    num_answers: int = 1
    max_tokens: int | None = None


def kind_of(body: Mapping[str, Any]) -> Kind:
    """The kind of a body whose path does not tell."""
    return "chat" if "messages" in body else "completions" if "prompt" in body else "other"


def readable(body: bytes) -> bytes | None:
    """A body as it is parsed, with the `data:` URLs of images cut short; None if that would take long."""
    parts: list[bytes] = []
    start = 0
    while len(parts) < _MAX_URLS and (at := body.find(b";base64,", start)) >= 0:
        end = body.find(b'"', at)
        if end < 0:
            break
        parts.append(body[start:at])
        start = end
    short = b"".join((*parts, body[start:])) if parts else body
    if len(short) > MAX_PARSED or sum(map(short.count, (b"[", b"{", b","))) > MAX_PARTS:
        return None
    return short


def size_tokens(body: Any) -> int:
    """Tokens of everything in a body, by its size: texts wherever they stand, and token ids. `data:` URLs count little.

    For prices: what is not understood is not free.
    """
    characters, inside = 0, [body]
    while inside:
        part = inside.pop()
        if isinstance(part, str):
            characters += len(part) if not part.startswith("data:") else min(len(part), 1024)
        elif isinstance(part, list):
            characters += CHARS_PER_TOKEN * len(part)
            inside.extend(part)
        elif isinstance(part, dict):
            inside.extend(part.values())
    return characters // CHARS_PER_TOKEN


def read(kind: Kind, body: Mapping[str, Any], target_llm: str | None, **facts: Any) -> Asked:
    """What a body asks for. Never raises for what a caller wrote. Some ten microseconds.

    Args:
        kind: whose JSON it is.
        body: the JSON.
        target_llm: the LLM that will answer, whatever the caller calls it.
        **facts: what the operator says of it: `llm_family`, `llm_size`, `llm_reasoning`, `llm_year`.
    """
    flags = {**read_flags(body), **facts, "target_llm": target_llm}
    count = max(1.0, *(number(body.get(name)) or 1.0 for name in ("n", "best_of")))
    num_answers = int(min(count, MAX_ANSWERS))
    if kind == "completions":
        flags.setdefault("max_tokens", COMPLETION_TOKENS)
        return _completions(body.get("prompt"), flags, num_answers)
    if kind == "batch":
        return _batch(body, flags, num_answers)
    if kind == "responses":  # whose server reads no messages
        body = {name: value for name, value in body.items() if name != "messages"}
    return _conversation(body, flags, num_answers)


def _conversation(body: Mapping[str, Any], flags: dict[str, Any], num_answers: int) -> Asked:
    cap = flags.get("max_tokens")
    try:
        messages = read_messages(body)
        tokens = estimate_tokens("\n".join(message_text(message["content"]) for message in messages))
    except DataError:
        return Asked(num_answers=num_answers, max_tokens=cap)
    try:
        request = Request.from_messages(messages, **flags)
    except DataError:  # no message of a user
        return Asked((), tokens, num_answers, cap)
    return Asked((request,) if has_text(request) else (), tokens, num_answers, cap)


def _batch(body: Mapping[str, Any], flags: dict[str, Any], count: int) -> Asked:
    """Of several conversations, as `/v1/chat/completions/batch` takes them."""
    messages = body.get("messages")
    conversations = messages if isinstance(messages, list) else []
    step = max(1, -(-len(conversations) // MAX_PROMPTS))
    asked = [_conversation({**body, "messages": one}, flags, count) for one in conversations[::step]]
    return Asked(
        tuple(request for one in asked for request in one.requests),
        step * sum(one.prompt_tokens for one in asked),
        min(count * max(len(conversations), 1), MAX_ANSWERS),
        flags.get("max_tokens"),
    )


def _completions(prompt: Any, flags: dict[str, Any], count: int) -> Asked:
    """Of a prompt: a text, token ids, or a list of either."""
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    step = max(1, -(-len(prompts) // MAX_PROMPTS))
    tokens = estimate_tokens("\n".join(one for one in prompts if isinstance(one, str)))
    tokens += sum(len(one) for one in prompts if isinstance(one, list))
    requests = (
        Request.from_messages([{"role": "user", "content": text}], **flags)
        for text in prompts[::step]
        if isinstance(text, str)
    )
    return Asked(
        tuple(request for request in requests if has_text(request)),
        tokens,
        min(count * len(prompts), MAX_ANSWERS),
        flags["max_tokens"],
    )
