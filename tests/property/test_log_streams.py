"""Logged streams: however a stream is cut into chunks, the answer is the same; what is no stream stays as it is."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mope.log_answers import answers_of
from mope.log_streams import unstreamed

NAMES = st.sampled_from(
    ("object", "type", "choices", "delta", "content", "index", "candidates", "parts", "message", "usage", "done",
     "model", "text", "tool_calls", "function", "arguments", "response", "content_block", "error", "finish_reason")
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(),
    st.sampled_from(("", "a", "chat.completion.chunk", "message_start", "content_block_delta", "response.created",
                     "text_delta", "response.completed")),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)
CHUNKS = st.lists(st.dictionaries(NAMES, VALUES, max_size=5), max_size=4)


@given(CHUNKS)
def test_no_stream_raises(chunks: list[dict[str, Any]]) -> None:
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    for stream in (text, chunks, "\n".join(map(json.dumps, chunks)), text[: len(text) // 2]):
        answers_of(stream)


@given(st.lists(st.text(), min_size=1))
def test_pieces_make_the_same_answer(pieces: list[str]) -> None:
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    (answer,) = answers_of("".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n" for chunk in chunks))
    assert (answer.text, answer.finish) == ("".join(pieces), "stop")


@given(st.text() | st.sampled_from(("data: 5 rows", "id: 7\ndata: yes", '{"task": "a", "done": true}\n{"done": 1}')))
def test_text_stays_as_it_is(text: str) -> None:
    assert unstreamed(text) == text


def test_tool_calls_and_choices_are_kept_apart() -> None:
    def delta(index: int, call: int, **function: str) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": {"tool_calls": [{"index": call, "function": function}]}}]}

    chunks = [delta(0, 0, name="f", arguments=""), delta(1, 0, name="g", arguments="{}"), delta(0, 0, arguments='{"a"'),
              delta(0, 1, name="h", arguments="{}"), delta(0, 0, arguments=": 1}")]  # fmt: skip
    first, second = answers_of("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks))
    assert [json.loads(call) for call in first.calls.split("\n")] == [
        {"name": "f", "arguments": {"a": 1}}, {"name": "h", "arguments": {}},
    ]  # fmt: skip
    assert json.loads(second.calls) == {"name": "g", "arguments": {}}
    assert first.finish == "aborted"
