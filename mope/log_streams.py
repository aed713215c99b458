"""Logged streams: the chunks of a streamed response put together, as if it had not been streamed.

Knows the streams of OpenAI (chat, completions, Responses), Anthropic, Gemini and Ollama, as the text that went over the
wire or as a list of its chunks. What a response says is read by `mope.log_answers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Chunk = Mapping[str, Any]
BROKEN_OFF = "aborted"  # why an answer ended whose stream has no end
_SSE = ("data:", "event:", "id:", ":")
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "text", "thinking")
_ENDS = ("response.completed", "response.incomplete", "response.failed")  # events that hold a whole response
_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "input"}


def unstreamed(response: Any) -> Any:
    """The whole response of a logged stream; anything else as it is.

    An answer whose stream breaks off has the finish reason `"aborted"`.

    Args:
        response: a response, the text of a stream (server-sent events, or one JSON object a line), or its chunks.
    """
    chunks = _chunks(response)
    if not chunks:
        return response
    if any(isinstance(chunk.get("choices"), list) for chunk in chunks):
        return _openai(chunks)
    if any(chunk.get("type") == "message_start" for chunk in chunks):
        return _anthropic(chunks)
    if any(str(chunk.get("type")).startswith("response.") for chunk in chunks):
        return _responses(chunks)
    if any("candidates" in chunk for chunk in chunks):
        return _gemini(chunks)
    if any("done" in chunk and "model" in chunk for chunk in chunks):
        return _ollama(chunks)
    return next((chunk for chunk in chunks if "error" in chunk), response)


def _chunks(response: Any) -> list[Chunk]:
    """The chunks of a stream in order; empty if this is none."""
    if isinstance(response, list):
        first = response[0] if response and isinstance(response[0], Mapping) else {}
        is_stream = str(first.get("object")).endswith(".chunk") or first.get("type") in (
            "message_start", "response.created",
        )  # fmt: skip
        return [one for one in response if isinstance(one, Mapping)] if is_stream else []
    if not isinstance(response, str):
        return []
    begin = response[:64].lstrip()
    if begin.startswith(_SSE):
        lines = [line[5:] for line in response.split("\n") if line.startswith("data:")]
    elif begin.startswith("{") and '"done"' in response:
        lines = response.split("\n")
    else:
        return []
    found = []
    for line in lines:
        try:
            chunk = json.loads(line)
        except (ValueError, RecursionError):
            continue  # [DONE], or a line that breaks off
        if isinstance(chunk, Mapping):
            found.append(chunk)
    return found


def _append(place: dict[str, Any], delta: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if isinstance(said := delta.get(name), str):
            place[name] = place.get(name, "") + said


def _index(place: Mapping[str, Any]) -> str:
    return str(place.get("index", 0))


def _last(chunks: Sequence[Chunk], name: str) -> Any:
    return next((chunk[name] for chunk in reversed(chunks) if chunk.get(name)), None)


def _openai(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Chunks of chat or of text completions."""
    choices: dict[str, dict[str, Any]] = {}
    calls: dict[tuple[str, str], dict[str, Any]] = {}
    is_chat = False
    for chunk in chunks:
        listed = chunk.get("choices")
        for one in listed if isinstance(listed, list) else ():
            if not isinstance(one, Mapping):
                continue
            number = _index(one)
            choice = choices.setdefault(number, {"message": {"role": "assistant", "content": ""}, "text": ""})
            _append(choice, one, ("text",))
            choice["finish_reason"] = one.get("finish_reason") or choice.get("finish_reason")
            delta = one.get("delta")
            if not isinstance(delta, Mapping):
                continue
            is_chat = True
            _append(choice["message"], delta, _TEXTS)
            parts = delta.get("tool_calls")
            for part in parts if isinstance(parts, list) else ():
                function = part.get("function") if isinstance(part, Mapping) else None
                if isinstance(function, Mapping):
                    call = calls.setdefault((number, _index(part)), {})
                    _append(call, function, ("name", "arguments"))
    for (number, _), call in calls.items():
        choices[number]["message"].setdefault("tool_calls", []).append({"type": "function", "function": call})
    for choice in choices.values():
        choice["finish_reason"] = choice["finish_reason"] or BROKEN_OFF
        choice.pop("text" if is_chat else "message")
    whole = {name: _last(chunks, name) for name in ("id", "model", "usage", "error")}
    return {**{name: value for name, value in whole.items() if value}, "choices": list(choices.values())}


def _anthropic(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Events of Anthropic's Messages API."""
    whole: dict[str, Any] = {"stop_reason": BROKEN_OFF, "usage": {}}
    blocks: dict[str, dict[str, Any]] = {}
    for chunk in chunks:
        kind, number, delta = chunk.get("type"), _index(chunk), chunk.get("delta")
        if kind == "message_start" and isinstance(message := chunk.get("message"), Mapping):
            whole |= {name: message[name] for name in ("id", "type", "role", "model") if name in message}
        elif kind == "content_block_start" and isinstance(block := chunk.get("content_block"), Mapping):
            blocks[number] = {**block, "input": ""} if "input" in block else dict(block)
        elif kind == "content_block_delta" and isinstance(delta, Mapping):
            name = _DELTAS.get(str(delta.get("type")), "")
            said = {name: delta.get("partial_json" if name == "input" else name)}
            _append(blocks.setdefault(number, {"type": name}), said, (name,))
        elif kind == "message_delta":
            if isinstance(delta, Mapping) and delta.get("stop_reason"):
                whole["stop_reason"] = delta["stop_reason"]
            if isinstance(usage := chunk.get("usage"), Mapping):
                whole["usage"] = {**whole["usage"], **usage}
        elif kind == "error":
            whole["error"] = chunk.get("error")
    return {**whole, "content": list(blocks.values())}


def _responses(chunks: Sequence[Chunk]) -> Any:
    """Events of the Responses API: the last one holds all; without it, what was said so far."""
    for chunk in reversed(chunks):
        if chunk.get("type") in _ENDS and isinstance(chunk.get("response"), Mapping):
            return chunk["response"]
    said = {"text": ""}
    for chunk in chunks:
        if chunk.get("type") == "response.output_text.delta":
            _append(said, {"text": chunk.get("delta")}, ("text",))
    begin = chunks[0].get("response")
    known = {name: begin[name] for name in ("id", "model") if name in begin} if isinstance(begin, Mapping) else {}
    message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", **said}]}
    return {**known, "object": "response", "status": "incomplete", "output": [message]}


def _gemini(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Chunks of streamGenerateContent."""
    candidates: dict[str, dict[str, Any]] = {}
    for chunk in chunks:
        listed = chunk.get("candidates")
        for one in listed if isinstance(listed, list) else ():
            if not isinstance(one, Mapping):
                continue
            held = candidates.setdefault(_index(one), {"content": {"role": "model", "parts": []}})
            held["finishReason"] = one.get("finishReason") or held.get("finishReason")
            content = one.get("content")
            parts = content.get("parts") if isinstance(content, Mapping) else None
            _add_parts(held["content"]["parts"], parts if isinstance(parts, list) else ())
    for held in candidates.values():
        held["finishReason"] = held["finishReason"] or BROKEN_OFF
    whole = {name: _last(chunks, name) for name in ("usageMetadata", "modelVersion")}
    return {**{name: value for name, value in whole.items() if value}, "candidates": list(candidates.values())}


def _add_parts(held: list[Any], parts: Sequence[Any]) -> None:
    """Append parts; texts that follow each other are one text."""
    for part in parts:
        is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        before = held[-1] if held and isinstance(held[-1], Mapping) else {}
        if is_text and "text" in before and before.get("thought") == part.get("thought"):
            held[-1] = {**before, "text": before["text"] + part["text"]}
        else:
            held.append(part)


def _ollama(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Lines of Ollama's `/api/chat` and `/api/generate`."""
    whole = dict(chunks[-1])
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    text = {"response": "", "thinking": ""}
    is_chat = False
    for chunk in chunks:
        _append(text, chunk, tuple(text))
        if isinstance(said := chunk.get("message"), Mapping):
            is_chat = True
            _append(message, said, ("content", "thinking"))
            if isinstance(said.get("tool_calls"), list):
                message["tool_calls"] = [*message.get("tool_calls", []), *said["tool_calls"]]
    return {**whole, "message": message} if is_chat else {**whole, **text}
