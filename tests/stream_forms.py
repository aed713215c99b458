"""Logged streams of responses: as text from the wire, or as lists of chunks."""

from __future__ import annotations

import json
from typing import Any

from log_forms import (
    CUT,
    FLAGS,
    NUM,
    Form,
    Record,
    Row,
    access_line,
    anthropic_request,
    ask,
    chat_request,
    every_third,
    gemini,
    ollama,
    recorded,
    responses,
    say,
    stop,
    think,
    usage,
    user,
)  # fmt: skip

from mope.training.data import problems as reasons


def sse(events: list[Record], *, named: bool = False) -> str:
    """Server-sent events as they went over the wire."""
    lines = [(f"event: {event['type']}\n" if named else "") + f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join(lines) + ("" if named else "data: [DONE]\n\n")


def pieces(text: str) -> list[str]:
    """A text in pieces of four characters."""
    return [text[start : start + 4] for start in range(0, len(text), 4)]


def chat_chunks(i: int, **last: Any) -> list[Record]:
    def chunk(delta: Record, finish: str | None = None) -> Record:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {"id": f"c{i}", "object": "chat.completion.chunk", "model": "gpt-4o", "choices": [choice], "usage": None}

    texts = [chunk({"content": piece}) for piece in pieces(say(i))]
    end = [chunk({}, stop(i, "length", "stop")), {"object": "chat.completion.chunk", "choices": [], **last}]
    return [chunk({"role": "assistant", "content": ""}), *texts, *(end if last else [])]


def anthropic_events(i: int) -> list[Record]:
    start = {"id": f"msg_{i}", "type": "message", "role": "assistant", "model": "claude", "content": [],
             "usage": {"input_tokens": 9, "output_tokens": 1}}  # fmt: skip
    found: list[Record] = [{"type": "message_start", "message": start}]
    for index, (kind, text) in enumerate((("thinking", think(i)), ("text", say(i)))):
        found.append({"type": "content_block_start", "index": index, "content_block": {"type": kind, kind: ""}})
        for piece in pieces(text):
            delta = {"type": f"{kind}_delta", kind: piece}
            found.append({"type": "content_block_delta", "index": index, "delta": delta})
    end = {"stop_reason": stop(i, "max_tokens", "end_turn")}
    return [
        *found,
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 100 + i}},
        {"type": "message_stop"},
    ]


def responses_events(i: int) -> list[Record]:
    deltas = [{"type": "response.output_text.delta", "delta": piece} for piece in pieces(say(i))]
    end = {"type": "response.incomplete" if every_third(i) else "response.completed", "response": responses(i)}
    return [{"type": "response.created", "response": {"id": f"resp_{i}"}}, *deltas, end]


def gemini_chunks(i: int) -> list[Record]:
    whole = gemini(i)["response"]
    (candidate,) = whole["candidates"]
    begin = [{"candidates": [{"content": {"parts": [part]}}]} for part in candidate["content"]["parts"]]
    return [*begin, {**whole, "candidates": [{**candidate, "content": {"parts": [{"text": ""}]}}]}]


def ollama_lines(i: int) -> str:
    said = [
        {"model": "m", "message": {"role": "assistant", "content": piece}, "done": False} for piece in pieces(say(i))
    ]
    end = {**ollama(i), "message": {"role": "assistant", "content": ""}}
    return "".join(json.dumps(one) + "\n" for one in [*said, end])


STREAMS: dict[str, Form] = {
    "access log, streamed": Form(
        lambda i: access_line(i, chat_request(i), sse(chat_chunks(i, usage=usage(i)))), CUT, request=FLAGS
    ),
    "access log, streamed, chunks as a list": Form(
        lambda i: access_line(i, chat_request(i), chat_chunks(i, usage=usage(i))), CUT, request=FLAGS
    ),
    "access log, streamed, without usage": Form(
        lambda i: access_line(i, chat_request(i), sse(chat_chunks(i, created=1))),
        lambda i: [Row(5 + i, censored=every_third(i), label_from="counted")],
        request=FLAGS,
        counts={reasons.COUNTED: NUM},
    ),
    "access log, streamed, client gone": Form(
        lambda i: access_line(i, chat_request(i), sse(chat_chunks(i))),
        lambda i: [Row(5 + i, censored=True, label_from="counted")],
        request=FLAGS,
        counts={reasons.COUNTED: NUM},
    ),
    "response as a stream": Form(
        lambda i: {"id": f"r{i}", **chat_request(i), "response": sse(chat_chunks(i, usage=usage(i)))},
        CUT,
        request=FLAGS,
    ),
    "anthropic, streamed": Form(
        lambda i: access_line(i, anthropic_request(i), sse(anthropic_events(i), named=True)),
        lambda i: [Row(100 + i, 30 + i, every_third(i))],
        counts={reasons.COUNTED_THOUGHTS: NUM},
    ),
    "openai responses, streamed": Form(
        lambda i: access_line(i, {"model": "o4-mini", "input": ask(i)}, sse(responses_events(i), named=True)),
        recorded(60, every_third),
    ),
    "gemini, streamed": Form(
        lambda i: access_line(i, gemini(i)["request"], sse(gemini_chunks(i))), recorded(60, every_third)
    ),
    "ollama, streamed": Form(lambda i: access_line(i, {"model": "m", "messages": [user(i)]}, ollama_lines(i)), CUT),
}
