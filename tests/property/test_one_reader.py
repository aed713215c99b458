"""A request is read the same way from Python, from an HTTP body and from a log of any tool."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from word_rows import WordRows

from mope import Request
from mope.inputs import as_request
from mope.log_records import logged
from mope.serving_hooks.bodies import Kind, read
from mope.tool_use import json_chars
from mope.training.data import splits

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
Body = dict[str, Any]
OFFERED: Body = {"tools": True, "num_tools": 1, "tool_chars": json_chars([TOOL])}

# what the two readers of an earlier version read differently, and what it is
PROBES: dict[str, tuple[Body, Body]] = {
    "enable_thinking": ({"chat_template_kwargs": {"enable_thinking": False}}, {"thinking": False}),
    "nested thinking_budget": (
        {"chat_template_kwargs": {"enable_thinking": True, "thinking_budget": 1000}},
        {"thinking": True, "thinking_budget": 1000},
    ),
    "reasoning.max_tokens": ({"reasoning": {"max_tokens": 2000}}, {"thinking_budget": 2000}),
    "reasoning.effort": ({"reasoning": {"effort": "high"}}, {"thinking": True, "effort": 4.0}),
    "functions": ({"functions": [TOOL]}, OFFERED),
    "json_object as text": ({"response_format": "json_object"}, {"response_format": "json_object"}),
    "max_new_tokens": ({"max_new_tokens": 77}, {"max_tokens": 77}),
    "max_output_tokens": ({"max_output_tokens": 77}, {"max_tokens": 77}),
    "guided_json": ({"guided_json": {"type": "object"}}, {"response_format": "json_schema"}),
    "text.format": ({"text": {"format": {"type": "json_schema"}}}, {"response_format": "json_schema"}),
    "tools that may not be called": ({"tools": [TOOL], "tool_choice": "none"}, {"tool_choice": "none"}),
    "no effort said": ({"reasoning_effort": ""}, {}),
    "no effort": ({"reasoning_effort": "none"}, {"thinking": False, "effort": 0.0}),
    "xhigh": ({"reasoning_effort": "xhigh"}, {"thinking": True, "effort": 5.0}),
    "effort of a chat template": (
        {"chat_template_kwargs": {"reasoning_effort": "low"}},
        {"thinking": True, "effort": 2.0},
    ),
    "Anthropic's effort": ({"output_config": {"effort": "medium"}}, {"thinking": True, "effort": 3.0}),
    "Google's level": (
        {"generationConfig": {"thinkingConfig": {"thinkingLevel": "HIGH"}}},
        {"thinking": True, "effort": 4.0},
    ),
    "Google's budget": ({"generationConfig": {"thinkingConfig": {"thinkingBudget": 512}}}, {"thinking_budget": 512}),
    "Google's budget in OpenAI's API": (
        {"extra_body": {"google": {"thinking_config": {"thinking_budget": 512}}}},
        {"thinking_budget": 512},
    ),
    "Ollama's level": ({"think": "medium"}, {"thinking": True, "effort": 3.0}),
    "three tools": ({"tools": [TOOL] * 3}, {"tools": True, "num_tools": 3, "tool_chars": 3 * OFFERED["tool_chars"]}),
    "Google's tools": (
        {"tools": [{"functionDeclarations": [TOOL, TOOL]}]},
        {"tools": True, "num_tools": 2, "tool_chars": 2 * OFFERED["tool_chars"]},
    ),
    "a call is required": ({"tools": [TOOL], "tool_choice": "required"}, {**OFFERED, "tool_choice": "required"}),
    "Anthropic's any": ({"tools": [TOOL], "tool_choice": {"type": "any"}}, {**OFFERED, "tool_choice": "required"}),
    "a certain tool": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look_up"}}},
        {**OFFERED, "tool_choice": "named"},
    ),
    "a certain function": (
        {"functions": [TOOL], "function_call": {"name": "look_up"}},
        {**OFFERED, "tool_choice": "named"},
    ),
    "Google's mode": (
        {"tools": [TOOL], "toolConfig": {"functionCallingConfig": {"mode": "ANY"}}},
        {**OFFERED, "tool_choice": "required"},
    ),
    "Anthropic's budget": (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"thinking": True, "thinking_budget": 1024},
    ),
    "thinking: true": ({"thinking": True}, {"thinking": True}),
    "custom_params": ({"custom_params": {"thinking_budget": 64}}, {"thinking_budget": 64}),
    "a cap as text": ({"max_tokens": "4096"}, {"max_tokens": 4096}),
}

# flags that a body may have, some of which say nothing; one of each group at most
FLAGS: tuple[tuple[Body, ...], ...] = (
    ({"max_tokens": 5}, {"max_completion_tokens": 900}, {"max_output_tokens": 64}, {"max_new_tokens": 7},
     {"max_tokens": "4096"}, {"max_tokens": 512.0}, {"max_tokens": 9, "max_completion_tokens": 3},
     {"generationConfig": {"maxOutputTokens": 50}}, {"options": {"num_predict": 30}}, {"max_tokens": -1},
     {"sampling_params": {"max_new_tokens": 20, "temperature": 0.25}}, {"parameters": {"max_new_tokens": 21}}),
    ({"temperature": 0}, {"temperature": 0.7}, {"temperature": "0.3"}, {"temperature": 1.3333}),
    ({"tools": [TOOL]}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}, {"functions": [TOOL]},
     {"functions": [TOOL], "function_call": "none"}, {"tools": [TOOL], "tool_choice": {"type": "auto"}},
     {"tools": [TOOL], "tool_choice": {"type": "none"}}, {"tools": [TOOL] * 20, "tool_choice": "required"},
     {"tools": [TOOL, {**TOOL, "strict": True}], "tool_choice": {"type": "tool", "name": "look_up"}},
     {"tool_choice": "auto"}, {"tools": True}),
    ({"response_format": {"type": "json_object"}}, {"response_format": "json_object"},
     {"response_format": {"type": "text"}}, {"text": {"format": {"type": "json_schema", "schema": {}}}},
     {"guided_json": {"type": "object"}}, {"guided_regex": "a+"}, {"structured_outputs": {"choice": ["a", "b"]}},
     {"structured_outputs": {"json": {"type": "object"}}}, {"format": "json"}, {"guided_choice": []}),
    ({"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"thinking": True}},
     {"thinking": {"type": "enabled", "budget_tokens": 2048}}, {"thinking": {"type": "disabled"}},
     {"reasoning_effort": "none"}, {"reasoning_effort": "minimal"}, {"reasoning_effort": ""},
     {"reasoning_effort": "XHIGH"}, {"output_config": {"effort": "max"}}, {"effort": 2.5},
     {"reasoning": {"effort": "low"}}, {"reasoning": {"enabled": False}}, {"enable_thinking": "true"},
     {"think": "high"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": True, "thinking_budget": 99}}}),
    ({"thinking_budget": 100}, {"thinking_token_budget": "200"}, {"reasoning": {"max_tokens": 300}},
     {"thinking_budget": 0}, {"thinking_budget": -1},
     {"nvext": {"max_thinking_tokens": 400}}, {"chat_template_kwargs": '{"thinking_budget": 50}'}),
    ({"llm_size": 7}, {"model_size": "8x7B"}, {"llm_family": "qwen", "llm_reasoning": True, "llm_year": 2026}),
    ({"stream": True, "top_p": 0.9, "seed": 7, "user": "somebody"}, {"n": 1, "stop": ["x"], "metadata": {"a": 1}},
     {"keep_alive": "5m", "raw": True}, {"provider": {"order": []}, "models": ["a"]}),
)  # fmt: skip
WORDS = ("weather", "bridge", "number", "Grüße", "東京", "🙂", "a\0b", "lone\ud800", "code:", "x = {1}", "")
SYSTEMS = ("Be brief.", [{"type": "text", "text": "Answer in French."}], "")


def text(rng: random.Random, number: int) -> str:
    return f"question {number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def content(rng: random.Random, words: str) -> Any:
    parts = [{"type": "text", "text": words}, {"type": "image_url", "image_url": {"url": "x"}}]
    return parts if rng.random() < 0.2 else words


def conversation(rng: random.Random, number: int) -> list[Body]:
    messages: list[Body] = []
    if rng.random() < 0.3:
        messages.append({"role": rng.choice(["system", "developer"]), "content": content(rng, "Be kind.")})
    for turn in range(rng.choice([0, 0, 0, 1, 2, 11])):
        messages.append({"role": "user", "content": content(rng, f"{text(rng, number)} {turn}")})
        messages.append({"role": "assistant", "content": content(rng, text(rng, number) * rng.randint(1, 40))})
        if rng.random() < 0.2:
            messages.append({"role": "tool", "tool_call_id": "1", "content": "42"})
    messages.append({"role": "user", "content": content(rng, text(rng, number))})
    if rng.random() < 0.1:
        messages.append({"role": "assistant", "content": "Sure,"})  # the beginning of the answer
    elif rng.random() < 0.1:
        calls = [{"id": "1", "function": {"name": "look_up", "arguments": "{}"}}]
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        messages.append({"role": "tool", "tool_call_id": "1", "content": "42"})
        if rng.random() < 0.5:
            results = [{"type": "tool_result", "tool_use_id": str(row), "content": "42"} for row in range(3)]
            messages.append({"role": "user", "content": results})
    return messages


def generated(rng: random.Random, number: int) -> tuple[Kind, Body]:
    """A body as clients of OpenAI, Anthropic, vLLM, SGLang, Ollama and others send it."""
    kind: Kind = rng.choice(("chat", "chat", "messages", "responses", "completions"))
    body: Body = {"model": rng.choice(["Qwen/Qwen3-8B", "gpt-4o", "meta-llama/Llama-3.1-8B-Instruct"])}
    if kind == "completions":
        body |= {"prompt": rng.choice([text(rng, number), [text(rng, number)]]), "max_tokens": rng.randint(1, 900)}
    elif kind == "responses":
        body["input"] = rng.choice([text(rng, number), conversation(rng, number)])
        if isinstance(body["input"], list) and rng.random() < 0.3:
            body["input"].append({"type": "function_call", "call_id": "1", "name": "look_up", "arguments": "{}"})
            body["input"].append({"type": "function_call_output", "call_id": "1", "output": "42 degrees"})
        if rng.random() < 0.5:
            body["instructions"] = "Be brief."
    else:
        body["messages"] = conversation(rng, number)
        if kind == "messages":
            body["system"] = rng.choice(SYSTEMS)
    for group in FLAGS[1:] if kind == "completions" else FLAGS:
        if rng.random() < 0.4:
            body |= {name: value for name, value in rng.choice(group).items() if name not in body}
    return kind, body


def by_http(kind: Kind, body: Body) -> Request:
    (request,) = read(kind, body, body.get("model")).requests
    return request


Wrap = Callable[[str, Body, int], list[Body]]


def _chat(tokens: int) -> Body:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "text"}}
    return {"object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": tokens}}


def _anthropic(tokens: int) -> Body:
    content = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "text"}]
    message = {"type": "message", "role": "assistant", "content": content, "stop_reason": "end_turn"}
    return {**message, "usage": {"input_tokens": 9, "output_tokens": tokens}}


def _responses(tokens: int) -> Body:
    item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "text"}]}
    usage = {"input_tokens": 9, "output_tokens": tokens, "output_tokens_details": {"reasoning_tokens": 3}}
    return {"object": "response", "status": "completed", "output": [{"type": "reasoning"}, item], "usage": usage}


def _langfuse(name: str, body: Body, tokens: int) -> list[Body]:
    asked = body.get("messages", body.get("input", body.get("prompt")))
    asked = asked[0] if "prompt" in body and isinstance(asked, list) else asked
    flags = {key: value for key, value in body.items() if key not in ("messages", "input", "prompt", "model")}
    observation = {"id": name, "type": "GENERATION", "model": body["model"], "modelParameters": flags, "input": asked}
    return [{**observation, "output": {"role": "assistant", "content": "text"}, "usageDetails": {"output": tokens}}]


def _batch(name: str, body: Body, tokens: int) -> Body:
    response = {"status_code": 200, "request_id": "r", "body": _chat(tokens)}
    return {"id": name, "custom_id": name, "url": "/v1/chat/completions", "body": body, "response": response}


# what tools make of a body and its answer
ENVELOPES: dict[str, Wrap] = {
    "flat": lambda name, body, tokens: [{"id": name, **body, "usage": {"completion_tokens": tokens}}],
    "flat tokens": lambda name, body, tokens: [{"id": name, **body, "completion_tokens": str(tokens)}],
    "request and usage": lambda name, body, tokens: [
        {"id": name, "request": body, "response": {"usage": {"completion_tokens": tokens}}}
    ],
    "request and response": lambda name, body, tokens: [{"id": name, "request": body, "response": _chat(tokens)}],
    "Anthropic": lambda name, body, tokens: [{"id": name, "request": body, "response": _anthropic(tokens)}],
    "Responses": lambda name, body, tokens: [{"id": name, "request": body, "response": _responses(tokens)}],
    "cells of a CSV file": lambda name, body, tokens: [
        {"Id": name, "Request": json.dumps(body), "Response": json.dumps(_chat(tokens))}
    ],
    "batch": lambda name, body, tokens: [_batch(name, body, tokens)],
    "batch, its halves": lambda name, body, tokens: [
        {"id": name, "custom_id": name, "body": body},
        {key: value for key, value in _batch(name, body, tokens).items() if key not in ("url", "body")},
    ],
    "Helicone": lambda name, body, tokens: [
        {"request_id": name, "request_body": body, "response_body": _chat(tokens), "completion_tokens": 7}
    ],
    "LiteLLM": lambda name, body, tokens: [
        {"request_id": name, "call_type": "acompletion", "completion_tokens": tokens, "messages": {}, "spend": 0.1,
         "proxy_server_request": body, "response": _chat(tokens)}
    ],
    "Langfuse": _langfuse,
}  # fmt: skip


@pytest.fixture(scope="module")
def by_logs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Requests of the rows that training makes of logs with these bodies, without the unit of their labels.

    A row knows what its label is counted in; a body does not say it.
    """
    words = WordRows(tmp_path_factory.mktemp("logs"))

    def call(bodies: dict[str, Body], wrap: Wrap) -> dict[str, Request]:
        rows = words.of_records(
            record for name, body in bodies.items() for record in wrap(name, body, recorded(name))
        ).rows
        names = [row_id.rpartition("/")[0] for row_id in rows.strings("row_id")]
        assert rows.response_tokens.tolist() == [recorded(name) for name in names]
        requests = rows.requests()
        assert {request.token_unit for request in requests} == {"own"}  # the server counted
        return {name: replace(request, token_unit=None) for name, request in zip(names, requests, strict=True)}

    return call


def recorded(name: str) -> int:
    """Tokens that the server counted."""
    return 50 + int(name[1:]) % 97


def not_reserved(count: int, start: int = 0) -> list[int]:
    """Numbers whose group trains, validates or tests."""
    numbers = (number for number in range(start, start + 10 * count) if splits.split_of(f"r{number}") != 3)
    return [number for number, _ in zip(numbers, range(count), strict=False)]


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_each_probe_is_read_as_it_is_meant(by_logs: Any, envelope: str) -> None:
    numbers = not_reserved(len(PROBES))
    bodies = {
        f"r{number}": {"model": "gpt-4o", "messages": [{"role": "user", "content": f"question {number}"}], **flags}
        for number, (flags, _) in zip(numbers, PROBES.values(), strict=True)
    }
    read_from = by_logs(bodies, ENVELOPES[envelope])
    for (name, body), (_, expected) in zip(bodies.items(), PROBES.values(), strict=True):
        prompt = body["messages"][0]["content"]
        request = Request(prompt=prompt, target_llm="gpt-4o", **expected)
        assert as_request(body) == request
        assert by_http("chat", body) == request
        assert read_from[name] == request


def test_two_thousand_generated_bodies(by_logs: Any) -> None:
    rng = random.Random(16)
    made = {f"r{number}": generated(rng, number) for number in not_reserved(2000)}
    read_from = by_logs({name: body for name, (_, body) in made.items()}, ENVELOPES["request and usage"])
    assert len(read_from) == len(made)
    for name, (kind, body) in made.items():
        in_python, in_http = as_request(body), by_http(kind, body)
        assert in_python == in_http == read_from[name], (kind, body)
    assert len({request.mode for request in map(_Shape, read_from.values())}) > 300  # they are not all alike


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_any_body_in_any_envelope_is_the_servers_request_with_the_recorded_tokens(by_logs: Any, envelope: str) -> None:
    rng = random.Random(envelope)
    made = {f"r{number}": generated(rng, number) for number in not_reserved(300, start=10**6)}
    read_from = by_logs({name: body for name, (_, body) in made.items()}, ENVELOPES[envelope])
    assert len(read_from) == len(made)
    for name, (kind, body) in made.items():
        expected = by_http(kind, body)
        assert read_from[name] == expected, (kind, body)
        if envelope != "batch, its halves":
            (record,) = ENVELOPES[envelope](name, body, recorded(name))
            found = logged(record)
            assert found is not None
            assert as_request(found.request) == expected, (kind, body)


class _Shape:
    """What flags a request has."""

    def __init__(self, request: Request) -> None:
        names = (
            "max_tokens", "temperature", "tools", "num_tools", "tool_choice", "num_tool_results", "response_format",
            "thinking", "thinking_budget", "effort", "system",
        )  # fmt: skip
        self.mode = tuple(getattr(request, name) for name in names)
