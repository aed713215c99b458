"""Made-up files in the forms that public tools write, with the rows that training has to make of them.

Each form says where its shape is from. `write` makes the file, `FORMS` has what is right; further forms are in
`stream_forms`, `engine_forms` and `lossy_forms`, all of them in `all_log_forms`.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mope.training.data import problems as reasons

Record = dict[str, Any]
NUM = 8  # requests in each file
TOOL = {"type": "function", "function": {"name": "search", "parameters": {}}}


def ask(i: int) -> str:
    """The prompt of request `i`; each is another."""
    return f"Tell me about subject {i} please"


def say(i: int) -> str:
    """Its answer: 5 + i words."""
    return " ".join(f"word{i}" for _ in range(5 + i))


def think(i: int) -> str:
    """The thoughts before it: 30 + i words."""
    return " ".join(f"thought{i}" for _ in range(30 + i))


def user(i: int) -> Record:
    return {"role": "user", "content": ask(i)}


def assistant(i: int, **more: Any) -> Record:
    return {"role": "assistant", "content": say(i), **more}


CALL = json.dumps({"name": "search", "arguments": {"q": "a b c"}})  # seven words
NUM_CALL = len(CALL.split())
TOOL_CALLS = [{"id": "c", "type": "function", "function": {"name": "search", "arguments": '{"q": "a b c"}'}}]


@dataclass(frozen=True)
class Row:
    """What is right for one answer: the label, how much of it is thoughts, whether it was cut, where it is from."""

    label: int
    thoughts: int | None = None
    censored: bool = False
    label_from: str = "recorded"


@dataclass(frozen=True)
class Form:
    """A file and what is right for it.

    Attributes:
        records: of request `i`.
        rows: of request `i`, in the order of its answers.
        read_as: the format that is detected.
        counts: what the report counts, with how many.
        suffix: of the file.
        refused: what the error says, where there is no row.
        request: flags that every request has to have.
        prompt: of request `i` where it is not `ask(i)`.
    """

    records: Callable[[int], Record | list[Record]]
    rows: Callable[[int], list[Row]] = lambda i: []
    read_as: str = "logs"
    counts: Mapping[str, int] = field(default_factory=dict)
    suffix: str = ".jsonl"
    refused: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)
    prompt: Callable[[int], str] = ask


def recorded(thoughts: int | None = None, cut: Callable[[int], bool] = lambda i: False) -> Callable[[int], list[Row]]:
    return lambda i: [Row(100 + i, thoughts, cut(i))]


def counted(more: int = 0, thoughts: Callable[[int], int | None] = lambda i: None) -> Callable[[int], list[Row]]:
    return lambda i: [Row(5 + i + more + (thoughts(i) or 0), thoughts(i), label_from="counted")]


def every_third(i: int) -> bool:
    return i % 3 == 0


def stop(i: int, cut: str, whole: str) -> str:
    return cut if every_third(i) else whole


def usage(i: int, **more: Any) -> Record:
    return {"prompt_tokens": 9, "completion_tokens": 100 + i, "total_tokens": 109 + i, **more}


def chat_response(i: int, **more: Any) -> Record:
    choice = {"index": 0, "finish_reason": stop(i, "length", "stop"), "message": assistant(i), **more}
    return {"id": f"c{i}", "object": "chat.completion", "model": "gpt-4o", "choices": [choice], "usage": usage(i)}


def chat_request(i: int) -> Record:
    return {"model": "gpt-4o", "messages": [user(i)], "max_tokens": 900, "temperature": 0.5}


def responses(i: int) -> Record:
    text = {"type": "output_text", "text": say(i), "annotations": []}
    cut = every_third(i)
    return {
        "id": f"resp_{i}", "object": "response", "model": "o4-mini", "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [{"type": "reasoning", "summary": []}, {"type": "message", "role": "assistant", "content": [text]}],
        "usage": {"input_tokens": 9, "output_tokens": 100 + i, "output_tokens_details": {"reasoning_tokens": 60}},
    }  # fmt: skip


def anthropic(i: int, **more: Any) -> Record:
    blocks = [
        {"type": "thinking", "thinking": think(i), "signature": "x"},
        {"type": "text", "text": say(i)},
        {"type": "tool_use", "id": "t", "name": "search", "input": {"q": "a b c"}},
    ]
    return {"id": f"msg_{i}", "type": "message", "role": "assistant", "model": "claude", "content": blocks,
            "stop_reason": stop(i, "max_tokens", "tool_use"), "usage": {"input_tokens": 9, "output_tokens": 100 + i},
            **more}  # fmt: skip


def anthropic_request(i: int) -> Record:
    content = [{"type": "text", "text": ask(i)}]
    return {
        "model": "claude",
        "max_tokens": 1024,
        "system": "Be kind.",
        "messages": [{"role": "user", "content": content}],
    }


def litellm(i: int) -> Record:
    return {
        "request_id": f"l{i}", "call_type": "acompletion", "spend": 0.001, "total_tokens": 109 + i, "prompt_tokens": 9,
        "completion_tokens": 100 + i, "model": "gpt-4o", "custom_llm_provider": "openai", "status": "success",
        "messages": [user(i)], "response": chat_response(i), "proxy_server_request": chat_request(i),
    }  # fmt: skip


def langfuse(i: int) -> Record:
    return {
        "id": f"o{i}", "traceId": f"t{i}", "type": "GENERATION", "model": "gpt-4o", "level": "DEFAULT",
        "modelParameters": {"max_tokens": 900, "temperature": 0.5}, "input": [user(i)], "output": assistant(i),
        "usageDetails": {"input": 9, "output": 40 + i, "output_reasoning_tokens": 60, "total": 109 + i},
    }  # fmt: skip


def helicone(i: int) -> Record:
    return {"request_id": f"h{i}", "request_body": chat_request(i), "response_body": chat_response(i),
            "response_status": 200, "completion_tokens": 100 + i, "total_tokens": 109 + i}  # fmt: skip


def span(i: int, *, otlp: bool) -> Record:
    asked = [{"role": "user", "parts": [{"type": "text", "content": ask(i)}]}]
    said = [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": say(i)}],
            "finish_reason": stop(i, "length", "stop"),
        }
    ]
    found: Record = {"gen_ai.request.model": "gpt-4o", "gen_ai.request.max_tokens": 900,
                     "gen_ai.request.temperature": 0.5, "gen_ai.usage.output_tokens": 100 + i,
                     "gen_ai.input.messages": asked, "gen_ai.output.messages": said}  # fmt: skip
    if not otlp:
        return {"name": "chat gpt-4o", "spanId": f"s{i}", "attributes": found}

    def value(one: Any) -> Record:
        if isinstance(one, int):
            return {"intValue": str(one)}
        return (
            {"doubleValue": one}
            if isinstance(one, float)
            else {"stringValue": one if isinstance(one, str) else json.dumps(one)}
        )

    attributes = [{"key": key, "value": value(one)} for key, one in found.items()]
    spans = [{"traceId": f"t{i}", "spanId": f"s{i}", "attributes": attributes}]
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": spans}]}]}


def openllmetry(i: int) -> Record:
    """A span of OpenLLMetry's instrumentation since 0.5."""
    asked = json.dumps([{"role": "user", "parts": [{"type": "text", "content": ask(i)}]}])
    parts = [{"type": "reasoning", "content": think(i)}, {"type": "text", "content": say(i)}]
    return {"span_id": f"s{i}", "attributes": {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-4o",
        "gen_ai.request.max_completion_tokens": 900, "gen_ai.request.temperature": 0.5, "gen_ai.request.n": 1,
        "gen_ai.request.reasoning_effort": "high", "gen_ai.request.structured_output_schema": '{"type": "object"}',
        "gen_ai.input.messages": asked, "gen_ai.output.messages": json.dumps([{"role": "assistant", "parts": parts}]),
        "gen_ai.response.finish_reason": stop(i, "length", "stop"), "gen_ai.usage.output_tokens": 100 + i,
        "gen_ai.usage.reasoning_tokens": 60, "gen_ai.usage.total_tokens": 109 + i,
    }}  # fmt: skip


def old_span(i: int) -> Record:
    return {"spanId": f"s{i}", "attributes": {
        "gen_ai.request.model": "gpt-4o", "gen_ai.request.max_tokens": 900, "gen_ai.request.temperature": 0.5,
        "gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": ask(i), "gen_ai.completion.0.content": say(i),
        "gen_ai.completion.0.finish_reason": stop(i, "length", "stop"), "gen_ai.usage.completion_tokens": 100 + i,
    }}  # fmt: skip


def wildchat(i: int) -> Record:
    details = {"completion_tokens_details": {"reasoning_tokens": 60}}
    messages = [{**user(i), "turn_identifier": i, "toxic": False}, {**assistant(i), "usage": usage(i, **details)}]
    return {
        "conversation_hash": f"w{i}",
        "model": "o1-mini",
        "conversation": messages,
        "turn": 1,
        "language": "English",
    }


def gemini(i: int) -> Record:
    body = {"systemInstruction": {"parts": [{"text": "Be brief."}]},
            "contents": [{"role": "user", "parts": [{"text": ask(i)}]}],
            "generationConfig": {"maxOutputTokens": 900, "temperature": 0.5}}  # fmt: skip
    parts = [{"text": think(i), "thought": True}, {"text": say(i)}]
    candidate = {"content": {"role": "model", "parts": parts}, "finishReason": stop(i, "MAX_TOKENS", "STOP")}
    counts = {
        "promptTokenCount": 9,
        "candidatesTokenCount": 40 + i,
        "thoughtsTokenCount": 60,
        "totalTokenCount": 109 + i,
    }
    return {
        "request": body,
        "response": {"candidates": [candidate], "usageMetadata": counts, "modelVersion": "gemini-2.5"},
    }


def ollama(i: int) -> Record:
    return {"id": f"o{i}", "model": "llama3.2", "options": {"num_predict": 900, "temperature": 0.5}, "done": True,
            "done_reason": stop(i, "length", "stop"), "prompt_eval_count": 9, "eval_count": 100 + i}  # fmt: skip


def access_line(i: int, body: Record, response: Any) -> Record:
    """A line of a proxy's access log."""
    return {"request_id": f"h{i}", "path": "/v1", "status": 200, "request_body": json.dumps(body),
            "response_body": response}  # fmt: skip


def agent_spans(i: int) -> Record:
    """A call beside the agent that made it, whose tokens are the same again, and a tool."""
    agent = {"gen_ai.operation.name": "invoke_agent", "gen_ai.usage.output_tokens": 100 + i,
             "gen_ai.input.messages": json.dumps([user(i)])}  # fmt: skip
    tool = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "search"}
    others = [{"spanId": f"{kind}{i}", "attributes": kind_of} for kind, kind_of in (("a", agent), ("x", tool))]
    return {"spans": [*others, span(i, otlp=False)]}


def batch_output(i: int) -> Record:
    response = {"status_code": 200, "request_id": f"r{i}", "body": chat_response(i)}
    return {"id": f"b{i}", "custom_id": f"request-{i}", "response": response, "error": None}


def batch_input(i: int) -> Record:
    return {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/chat/completions", "body": chat_request(i)}


def tool_conversation(i: int) -> list[Record]:
    calls = {"role": "assistant", "content": None, "tool_calls": TOOL_CALLS}
    return [user(i), calls, {"role": "tool", "tool_call_id": "c", "content": "found"}, assistant(i)]


FLAGS = {"target_llm": "gpt-4o", "max_tokens": 900, "temperature": 0.5}
CUT = recorded(cut=every_third)
CALL_AND_ANSWER: Callable[[int], list[Row]] = lambda i: [  # noqa: E731
    Row(NUM_CALL, label_from="counted"), Row(5 + i, label_from="counted")
]  # fmt: skip

FORMS: dict[str, Form] = {
    # OpenAI
    "openai chat": Form(lambda i: {"request": chat_request(i), "response": chat_response(i)}, CUT, request=FLAGS),
    "openai chat, flat": Form(lambda i: {**chat_request(i), **chat_response(i)}, CUT, request=FLAGS),
    "openai chat without usage": Form(
        lambda i: {"id": f"c{i}", "request": chat_request(i), "response": {"choices": [{"message": assistant(i)}]}},
        counted(), counts={reasons.COUNTED: NUM}, request=FLAGS,
    ),
    "openai completions": Form(
        lambda i: {"request": {"model": "m", "prompt": ask(i)},
                   "response": {"id": f"c{i}", "usage": usage(i),
                                "choices": [{"text": say(i), "finish_reason": stop(i, "length", "stop")}]}},
        CUT,
    ),
    "openai completions, default cap": Form(
        lambda i: {"request": {"model": "m", "prompt": ask(i)},
                   "response": {"id": f"c{i}", "object": "text_completion", "choices": [{"text": say(i)}],
                                "usage": {"completion_tokens": 9 + i}}},
        lambda i: [Row(9 + i, censored=i == 7)], request={"max_tokens": 16},
    ),
    "openai responses": Form(
        lambda i: {"request": {"model": "o4-mini", "input": ask(i), "max_output_tokens": 900},
                   "response": responses(i)},
        recorded(60, every_third), request={"target_llm": "o4-mini", "max_tokens": 900},
    ),
    "openai responses, flat": Form(lambda i: {"input": ask(i), **responses(i)}, recorded(60, every_third)),
    "openai responses without usage": Form(
        lambda i: {"request": {"input": ask(i)}, "response": {**responses(i), "usage": None}},
        refused="8 x answer with hidden thoughts",
    ),
    "openai batch, joined lines": Form(lambda i: {**batch_input(i), **batch_output(i)}, CUT, request=FLAGS),
    "openai batch, both files": Form(
        lambda i: [batch_input(i), batch_output(i)], CUT, request=FLAGS, counts={reasons.JOINED: NUM}
    ),
    "openai batch, output before input": Form(
        lambda i: [batch_output(i), batch_input(i)], CUT, request=FLAGS, counts={reasons.JOINED: NUM}
    ),
    "openai batch output alone": Form(
        batch_output, refused="8 x record without its prompt .batch output has no prompts"
    ),
    "openai batch input alone": Form(batch_input, refused="8 x batch request without its output"),
    "several choices": Form(
        lambda i: {"id": f"n{i}", "request": {"model": "m", "n": 2, "messages": [user(i)]},
                   "response": {"choices": [{"finish_reason": "stop", "message": assistant(i)},
                                            {"finish_reason": "length", "message": assistant(i + 20)}],
                                "usage": usage(i)}},
        lambda i: [Row(5 + i, label_from="counted"), Row(25 + i, censored=True, label_from="counted")],
        counts={reasons.COUNTED_CHOICE: 2 * NUM},
    ),
    "several choices without texts": Form(
        lambda i: {"request": {"model": "m", "n": 2, "messages": [user(i)]},
                   "response": {"usage": usage(i), "choices": [{"finish_reason": "stop"}, {"finish_reason": "stop"}]}},
        refused="16 x answer of several to one request, of which only the sum is recorded",
    ),
    "several choices with token ids (vLLM)": Form(
        lambda i: {"id": f"n{i}", "request": {"model": "m", "n": 2, "messages": [user(i)]},
                   "response": {"choices": [{"message": assistant(i), "token_ids": [1] * (7 + i)},
                                            {"message": assistant(i + 20), "token_ids": [1] * (70 + i)}],
                                "usage": usage(i)}},
        lambda i: [Row(7 + i), Row(70 + i)],
    ),
    "reasoning beside a total (xAI)": Form(
        lambda i: {"id": f"x{i}", "request": chat_request(i), "response": {
            **chat_response(i), "usage": {"prompt_tokens": 9, "completion_tokens": 40 + i, "total_tokens": 109 + i,
                                          "completion_tokens_details": {"reasoning_tokens": 60}}}},
        recorded(60, every_third), request=FLAGS,
    ),
    # Anthropic
    "anthropic": Form(
        lambda i: {"request": anthropic_request(i), "response": anthropic(i)},
        lambda i: [Row(100 + i, 30 + i, every_third(i))], counts={reasons.COUNTED_THOUGHTS: NUM},
        request={"target_llm": "claude", "system": "Be kind.", "max_tokens": 1024},
    ),
    "anthropic batch": Form(
        lambda i: [{"custom_id": f"r{i}", "params": anthropic_request(i)},
                   {"custom_id": f"r{i}", "result": {"type": "succeeded", "message": anthropic(i)}}],
        lambda i: [Row(100 + i, 30 + i, every_third(i))],
        counts={reasons.COUNTED_THOUGHTS: NUM, reasons.JOINED: NUM}, request={"target_llm": "claude"},
    ),
    "anthropic batch results alone": Form(
        lambda i: {"custom_id": f"r{i}", "result": {"type": "succeeded", "message": anthropic(i)}},
        refused="8 x record without its prompt .batch results have no prompts",
    ),
    "anthropic conversation": Form(
        lambda i: {"id": f"a{i}", "model": "claude", "system": "Be kind.", "messages": [
            user(i), {"role": "assistant", "content": anthropic(i)["content"]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "42"}]}, assistant(i)]},
        lambda i: [Row(35 + 2 * i + NUM_CALL, 30 + i, label_from="counted"), Row(5 + i, label_from="counted")],
        read_as="messages", counts={reasons.COUNTED_CALLS: NUM}, request={"system": "Be kind."},
    ),
    # Google, Ollama, Hugging Face
    "gemini": Form(
        gemini, recorded(60, every_third), request={**FLAGS, "target_llm": "gemini-2.5", "system": "Be brief."}
    ),
    "ollama chat": Form(
        lambda i: {**ollama(i), "messages": [user(i)], "message": assistant(i)}, CUT,
        request={**FLAGS, "target_llm": "llama3.2"},
    ),
    "ollama generate": Form(
        lambda i: {**ollama(i), "prompt": ask(i), "response": say(i)}, CUT, request={**FLAGS, "target_llm": "llama3.2"}
    ),
    "text generation inference": Form(
        lambda i: {"id": f"t{i}", "inputs": ask(i), "parameters": {"max_new_tokens": 900}, "generated_text": say(i),
                   "details": {"finish_reason": stop(i, "length", "eos_token"), "generated_tokens": 100 + i}},
        CUT, request={"max_tokens": 900},
    ),
    # gateways and tracing
    "litellm": Form(litellm, CUT, request=FLAGS),
    "litellm as CSV": Form(litellm, CUT, suffix=".csv", request=FLAGS),
    "litellm without texts": Form(
        lambda i: {**litellm(i), "messages": {}, "response": {}, "proxy_server_request": {}}, suffix=".csv",
        refused="8 x record without its prompt .a spend log without texts; set store_prompts_in_spend_logs",
    ),
    "langfuse": Form(langfuse, lambda i: [Row(100 + i, 60)], suffix=".json", request=FLAGS),
    "langfuse as CSV": Form(langfuse, lambda i: [Row(100 + i, 60)], suffix=".csv", request=FLAGS),
    "langfuse with counts of one's own": Form(
        lambda i: {**langfuse(i), "usageDetails": {"input_tokens": 9, "output_tokens": 100 + i}}, recorded(),
        request=FLAGS,
    ),
    "langfuse with texts": Form(
        lambda i: {**langfuse(i), "input": ask(i), "output": say(i)}, lambda i: [Row(100 + i, 60)], request=FLAGS
    ),
    "langfuse with other observations": Form(
        lambda i: [
            langfuse(i), {**langfuse(i), "id": f"s{i}", "type": "SPAN"},
            {"id": f"a{i}", "traceId": f"t{i}", "type": "TOOL", "input": {"q": "x"}, "output": ["found"]},
        ],
        lambda i: [Row(100 + i, 60)], request=FLAGS, counts={reasons.NO_CALL: 2 * NUM},
    ),
    "helicone": Form(helicone, CUT, request=FLAGS),
    "access log with other paths": Form(
        lambda i: [access_line(i, chat_request(i), chat_response(i)), {**access_line(i, {}, ""), "request_body": ""}],
        CUT, request=FLAGS, counts={reasons.NO_CALL: NUM},
    ),
    "opentelemetry with agents and tools": Form(agent_spans, CUT, request=FLAGS, counts={reasons.NO_CALL: 2 * NUM}),
    "opentelemetry, OTLP": Form(lambda i: span(i, otlp=True), CUT, request=FLAGS),
    "opentelemetry, attributes": Form(lambda i: span(i, otlp=False), CUT, request=FLAGS),
    "opentelemetry, numbered attributes": Form(old_span, CUT, request=FLAGS),
    "openllmetry": Form(
        openllmetry, recorded(60, every_third),
        request={**FLAGS, "thinking": True, "response_format": "json_schema"},
    ),
    "opentelemetry as columns": Form(
        lambda i: {"span_id": f"s{i}", **{f"attributes.{k}": v for k, v in span(i, otlp=False)["attributes"].items()}},
        CUT, suffix=".csv", request=FLAGS,
    ),
    # data sets
    "trl": Form(
        lambda i: {"id": f"t{i}", "prompt": [user(i)], "completion": [assistant(i)]}, counted(), read_as="messages"
    ),
    "trl with a tool": Form(
        lambda i: {"id": f"t{i}", "prompt": [user(90), assistant(3), user(i)], "completion": tool_conversation(i)[1:]},
        CALL_AND_ANSWER, read_as="messages", counts={reasons.COUNTED_CALLS: NUM},
    ),
    "messages with reasoning": Form(
        lambda i: {"id": f"m{i}", "model": "r1", "messages": [user(i), assistant(i, reasoning_content=think(i))]},
        counted(thoughts=lambda i: 30 + i), read_as="messages",
    ),
    "messages with think tags": Form(
        lambda i: {"id": f"m{i}", "messages": [
            user(i), {"role": "assistant", "content": f"<think> {think(i)} </think> {say(i)}"}]},
        lambda i: [Row(37 + 2 * i, 32 + i, label_from="counted")], read_as="messages",
    ),
    "messages with tools": Form(
        lambda i: {"id": f"m{i}", "tools": [TOOL], "messages": tool_conversation(i)}, CALL_AND_ANSWER,
        read_as="messages", counts={reasons.COUNTED_CALLS: NUM}, request={"tools": True},
    ),
    "messages with tools and usage": Form(
        lambda i: {"id": f"m{i}", "messages": tool_conversation(i), "usage": usage(i)},
        lambda i: [Row(NUM_CALL, label_from="counted"), Row(100 + i)], read_as="messages",
        counts={reasons.COUNTED_CALLS: NUM},
    ),
    "tool call log": Form(
        lambda i: {"request": {**chat_request(i), "messages": tool_conversation(i)[:-1]}, "response": chat_response(i)},
        CUT, request={**FLAGS, "num_earlier_turns": 1},
    ),
    "wildchat with usage": Form(wildchat, recorded(60), read_as="lmsys", suffix=".parquet"),
    "pairs with reasoning": Form(
        lambda i: {"id": f"p{i}", "question": ask(i), "reasoning": think(i), "answer": say(i)},
        counted(thoughts=lambda i: 30 + i), read_as="pairs",
    ),
    "dolly": Form(
        lambda i: {"id": f"d{i}", "instruction": ask(i), "context": f"Context {i}.", "response": say(i)}, counted(),
        read_as="pairs", prompt=lambda i: f"{ask(i)}\n\nContext {i}.",
    ),
    "columns in Title Case": Form(
        lambda i: {"Conversation ID": f"t{i}", "Prompt": ask(i), "Response": say(i), "Model": "gpt-4o"}, counted(),
        read_as="pairs", suffix=".csv", request={"target_llm": "gpt-4o"},
    ),
    "JSON text in parquet": Form(
        lambda i: {"id": f"j{i}", "request": json.dumps(chat_request(i)), "response": json.dumps(chat_response(i))},
        CUT, suffix=".parquet", request=FLAGS,
    ),
    "Python's notation": Form(
        lambda i: {"model": "m", "messages": str([user(i), assistant(i)])}, suffix=".csv",
        refused="in Python's notation",
    ),
    # flat server logs
    "flat completion_tokens": Form(
        lambda i: {"id": f"f{i}", "model": "m", "messages": [user(i)], "completion_tokens": 100 + i}, recorded()
    ),
    "flat output_tokens": Form(lambda i: {"id": f"f{i}", "messages": [user(i)], "output_tokens": 100 + i}, recorded()),
    "flat response": Form(
        lambda i: {"id": f"f{i}", "model": "m", "messages": [user(i)], "response": say(i)}, counted()
    ),
    "flat usage": Form(
        lambda i: {"id": f"f{i}", "prompt": ask(i), "usage": {"input_tokens": 9, "output_tokens": 100 + i}}, recorded()
    ),
    "finish reasons": Form(
        lambda i: {"id": f"f{i}", "prompt": ask(i), "usage": usage(i), "finish_reason": (
            "stop", "max_tokens", "LENGTH", "FinishReason.MAX_TOKENS", {"type": "length"}, "abort", "cancelled", "eos",
        )[i]},
        lambda i: [Row(100 + i, censored=0 < i < 7)],
    ),
    "stop_reason of a pair": Form(
        lambda i: {"id": f"s{i}", "prompt": ask(i), "response": say(i), "stop_reason": "max_tokens"},
        lambda i: [Row(5 + i, censored=True, label_from="counted")], read_as="pairs",
    ),
    "failed requests": Form(
        lambda i: {"id": f"f{i}", "request": chat_request(i), "response": chat_response(i) if i % 2 else {},
                   "error": None if i % 2 else "rate limit"},
        lambda i: CUT(i) if i % 2 else [], counts={reasons.FAILED: NUM // 2},
    ),
    "prompts without text": Form(
        lambda i: {"id": f"n{i}", "messages": [{"role": "user", "content": ask(i) if i % 2 else None}, assistant(i)]},
        lambda i: counted()(i) if i % 2 else [], read_as="messages", counts={reasons.NO_TEXT: NUM // 2},
    ),
    "images alone": Form(
        lambda i: {"messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, assistant(i)]},
        refused="8 x row without any text of a prompt",
    ),
    "token ids": Form(
        lambda i: {"prompt": [1, 2, 3], "usage": usage(i)}, refused="8 x row without any text of a prompt"
    ),
    "several prompts": Form(
        lambda i: {"prompt": [ask(i), ask(i + 50)], "usage": usage(i)}, refused="8 x request with several prompts"
    ),
    # traces of lengths
    "BurstGPT": Form(
        lambda i: {"Timestamp": i, "Model": "ChatGPT", "Request tokens": 9, "Response tokens": 100 + i,
                   "Total tokens": 109, "Log Type": "Conversation log"},
        suffix=".csv", refused="8 x record without its prompt .a trace of lengths has no prompts.*mope replay",
    ),
    "Azure LLM traces": Form(
        lambda i: {"TIMESTAMP": f"2023-11-16 18:15:{i:02d}", "ContextTokens": 9, "GeneratedTokens": 100 + i},
        suffix=".csv", refused="8 x record without its prompt .a trace of lengths has no prompts.*mope replay",
    ),
}  # fmt: skip


def write(form: Form, folder: Path) -> Path:
    """The file of a form."""
    records: list[Record] = []
    for i in range(NUM):
        made = form.records(i)
        records += made if isinstance(made, list) else [made]
    path = folder / f"log{form.suffix}"
    if form.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif form.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            for record in records:
                cells = {key: json.dumps(one) if isinstance(one, list | dict) else one for key, one in record.items()}
                writer.writerow(cells)
    elif form.suffix in (".log", ".log.gz", ".lines.jsonl"):
        text = "".join(record["line"] + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(text) if form.suffix.endswith(".gz") else text)
    elif form.suffix == ".object.json":
        path.write_text(json.dumps(records[0]), "utf-8")
    elif form.suffix == ".json":
        path.write_text(json.dumps(records), "utf-8")
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
