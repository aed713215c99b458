"""The front end's two halves: what a body asks for, and what is predicted and carried, in time or not at all."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope import LengthPredictor
from mope.corrector import Answering
from mope.serving_hooks import bodies
from mope.serving_hooks.bodies import COMPLETION_TOKENS, MAX_PROMPTS, Asked, read
from mope.serving_hooks.carried import Carried, unpack
from mope.serving_hooks.front import MOST_WAITING, PLACES_ON_CPU, Front
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.identity import Identity
from mope.serving_hooks.options import HookOptions

LOGGER = logging.getLogger("test.front")
USER = {"role": "user", "content": "hello there"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    *("prompt", "messages", "input", "instructions", "system", "max_tokens", "max_completion_tokens", "n", "tools"),
    *("max_output_tokens", "temperature", "response_format", "text", "chat_template_kwargs", "reasoning_effort"),
    *("reasoning", "thinking", "thinking_token_budget", "structured_outputs", "tool_choice", "model", "user"),
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": JSON})
)


def only(asked: Asked) -> Any:
    (request,) = asked.requests
    return request


def test_a_text_completion() -> None:
    asked = read("completions", {"prompt": "hello", "n": 3}, "llm")
    assert only(asked).prompt == "hello"
    assert only(asked).target_llm == "llm"
    assert (asked.num_answers, asked.max_tokens) == (3, COMPLETION_TOKENS)
    assert only(read("completions", {"prompt": "hello", "max_tokens": 7}, None)).max_tokens == 7
    assert only(read("completions", {"prompt": ["hello"]}, None)).prompt == "hello"


def test_of_token_ids_the_length_is_known() -> None:
    assert read("completions", {"prompt": [1, 2, 3]}, None)[:3] == ((), 3, 1)
    assert read("completions", {"prompt": [[1, 2, 3], [4]]}, None)[:3] == ((), 4, 2)
    for prompt in (None, "", " ", [], {}, 3, [None], [[]]):
        assert read("completions", {"prompt": prompt}, None).requests == ()


def test_a_batch_of_prompts() -> None:
    asked = read("completions", {"prompt": ["one", " ", "two"], "n": 2}, None)
    assert [request.prompt for request in asked.requests] == ["one", "two"]
    assert asked.num_answers == 6
    many = read("completions", {"prompt": [f"prompt {number}" for number in range(1000)]}, None)
    assert MAX_PROMPTS / 2 < len(many.requests) <= MAX_PROMPTS
    assert many.requests[-1].prompt > "prompt 9"  # from all of it
    assert many.num_answers == 1000
    assert many.prompt_tokens > 2000


def test_a_conversation() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "an answer", "tool_calls": []},
        {"role": "tool", "content": "42"},
        {"role": "made up", "content": "?"},
        {"role": "user", "content": [{"type": "text", "text": "second"}, {"type": "image_url", "image_url": {}}]},
    ]
    request = only(read("chat", {"messages": messages, "max_tokens": 9, "max_completion_tokens": 5}, None))
    assert (request.prompt, request.previous_prompt, request.system) == ("second", "first", "be brief")
    assert (request.num_earlier_turns, request.max_tokens) == (1, 5)
    assert read("chat", {"messages": messages[:1]}, None).requests == ()
    assert read("chat", {"messages": messages[:1]}, None).prompt_tokens > 0


def test_responses_and_messages() -> None:
    asked = read("responses", {"input": "hello", "instructions": "be brief", "max_output_tokens": 8}, None)
    assert (only(asked).prompt, only(asked).system, asked.max_tokens) == ("hello", "be brief", 8)
    both = {"input": "hello", "messages": [{"role": "user", "content": "not what the server reads"}]}
    assert only(read("responses", both, None)).prompt == "hello"
    items = [{"type": "reasoning"}, {"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    assert only(read("responses", {"input": items}, None)).prompt == "hello"
    body = {"messages": [USER], "system": [{"type": "text", "text": "be brief"}], "max_tokens": 8}
    assert only(read("messages", body, None)).system == "be brief"
    assert only(read("messages", body, None)).max_tokens == 8


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"temperature": 1}, "temperature", 1.0),
        ({"temperature": "hot"}, "temperature", None),
        ({"tools": [{"type": "function"}]}, "tools", True),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, "tools", False),
        ({"tools": []}, "tools", False),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"response_format": {"type": "text"}}, "response_format", ""),
        ({"text": {"format": {"type": "json_schema"}}}, "response_format", "json_schema"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "response_format", "json_schema"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "thinking", False),
        ({"chat_template_kwargs": {"thinking": True}}, "thinking", True),
        ({"reasoning_effort": "none"}, "thinking", False),
        ({"reasoning_effort": "low"}, "thinking", True),
        ({"reasoning": {"effort": "high"}}, "thinking", True),
        ({"thinking": {"type": "disabled"}}, "thinking", False),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking_budget", 100),
        ({"thinking_token_budget": 50}, "thinking_budget", 50),
        ({"max_tokens": -1}, "max_tokens", None),
        ({"max_tokens": True}, "max_tokens", None),
        ({}, "thinking", None),
    ],
)
def test_flags(flags: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(only(read("chat", {"messages": [USER], **flags}, None)), name) == value


@given(
    kind=st.sampled_from(["completions", "chat", "responses", "messages", "other"]),
    body=st.dictionaries(st.sampled_from(FIELDS), JSON | MESSAGES, max_size=6),
)
def test_whatever_a_caller_writes_is_read_or_passed_over(kind: Any, body: dict[str, Any]) -> None:
    asked = read(kind, body, "llm")
    assert len(asked.requests) <= MAX_PROMPTS
    assert asked.prompt_tokens >= 0
    assert 1 <= asked.num_answers <= bodies.MAX_ANSWERS
    for request in asked.requests:
        assert isinstance(request.prompt, str)
        assert request.max_tokens is None or request.max_tokens >= 1


def front(predictor: LengthPredictor | None, names: tuple[str, ...] = (), **options: Any) -> Front:
    chosen = HookOptions(**{"deadline_ms": 60_000, "identity": "header", **options})
    identity = Identity(chosen, secret=b"", logger=logging.getLogger("test.front"))
    return Front(chosen, identity, predictor, names)


def test_an_engine_counts_the_tokens_of_its_llm(predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": [USER]}
    assert only(front(predictor).read("chat", body)).token_unit is None  # a predictor that was not told of units
    monkeypatch.setattr(predictor.encoder, "number_names", (*predictor.encoder.number_names, "counts_own"))
    assert only(front(predictor).read("chat", body)).token_unit == "own"


def test_results_of_tools_in_the_responses_api() -> None:
    items = [
        {"role": "user", "content": "How warm?"},
        {"type": "function_call", "call_id": "1", "name": "look_up", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "42 degrees"},
    ]
    request = only(read("responses", {"input": items}, None))
    assert (request.num_tool_results, request.last_is_tool_result, request.other_chars) == (1, True, 10)
    assert (
        read("responses", {"input": items}, None).prompt_tokens
        > read("responses", {"input": items[:2]}, None).prompt_tokens
    )


def guard() -> Guard:
    return Guard(logging.getLogger("test.front"))


def carried(made: Front, kind: Any, body: dict[str, Any]) -> Carried:
    async def ask() -> Carried:
        return await made.carried(kind, [(b"x-client-id", b"acme/alice")], body, guard())

    try:
        return asyncio.run(ask())
    finally:
        made.close()


def test_what_is_carried_is_the_prediction_before_recalibration_and_cap(predictor: LengthPredictor) -> None:
    body = {"messages": [USER], "max_tokens": 5, "tools": [1], "response_format": {"type": "json_object"}}
    for _ in range(50):  # the process in which it was taught is not the scheduler's
        predictor.observe(predictor.predict("hello there", target_llm="Llama-3.1-8B"), 4000, censored=False)
    found = carried(front(predictor, ("org/Meta-Llama-3.1-8B",)), "chat", body)
    plain = predictor.predict(
        "hello there", target_llm="Llama-3.1-8B", max_tokens=5, tools=[1], response_format="json_object"
    )
    assert plain.raw_cumulative is not None
    assert found.client == "acme/alice"
    assert found.tokens == pytest.approx(plain.mean, rel=1e-9)
    assert found.high == pytest.approx(plain.quantile(0.9), rel=1e-9)
    read_again = Carried.read(json.loads(json.dumps(found.write())))
    assert read_again == found
    assert np.array_equal(unpack(read_again.raw or "", len(predictor.config.edges)), plain.raw_cumulative)
    assert Answering.read(read_again.answering or "") == plain.answering
    assert (plain.llm, plain.mode) == ("llama-3.1-8b", "tools+json")


def test_of_a_batch_the_mean_of_its_prompts(predictor: LengthPredictor) -> None:
    prompts = ["yes or no?", "list forty long stories about every king"]
    alone = [carried(front(predictor), "completions", {"prompt": one, "max_tokens": 900}) for one in prompts]
    both = carried(front(predictor), "completions", {"prompt": prompts, "max_tokens": 900})
    assert None not in (both.tokens, alone[0].tokens, alone[1].tokens)
    assert both.tokens == pytest.approx(np.mean([one.tokens for one in alone if one.tokens is not None]))
    raw = [unpack(one.raw or "", len(predictor.config.edges)) for one in (*alone, both)]
    np.testing.assert_allclose(raw[2], (raw[0] + raw[1]) / 2, atol=1e-7)


def test_without_text_or_predictor_the_client_alone(predictor: LengthPredictor) -> None:
    only_client = Carried("acme/alice")
    assert carried(front(predictor), "completions", {"prompt": [1, 2]}) == only_client
    assert carried(front(predictor), "chat", {"messages": "?"}) == only_client
    assert carried(front(predictor), "other", {"messages": [USER]}) == only_client
    made = front(None)
    assert carried(made, "chat", {"messages": [USER]}) == only_client
    assert made.snapshot()["predictions"]["made"] == 0
    assert sum(made.snapshot()["latency"]["counts"]) == 0


def held(predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    run = predictor.backend.run

    def slow(encoded: Any, choose: Any) -> Any:
        action()
        return run(encoded, choose)

    monkeypatch.setattr(predictor.backend, "run", slow)


def test_late_predictions_are_counted_and_left_out(predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    held(predictor, monkeypatch, lambda: bool(go.wait(10)) and None)
    made = front(predictor, deadline_ms=20)

    async def ask() -> Carried:
        try:
            return await made.carried("chat", [], {"messages": [USER]}, guard())
        finally:
            go.set()

    assert asyncio.run(ask()) == Carried(None)
    made.close()
    counted = made.snapshot()
    assert counted["predictions"] == {"made": 0, "late": 1, "overload": 0, "failed": 0, "no_text": 0}
    assert sum(counted["latency"]["counts"]) == 1
    assert 0.015 < counted["latency"]["sum_s"] < 5
    assert counted["latency"]["counts"][place(counted)] == 1


def place(counted: dict[str, Any]) -> int:
    """Where the only latency stands in the histogram."""
    bounds, seconds = counted["latency"]["bounds_s"], counted["latency"]["sum_s"]
    return next((number for number, bound in enumerate(bounds) if seconds <= bound), -1)


FLOOD, LIGHT = [(b"x-client-id", b"flood")], [(b"x-client-id", b"light")]


def test_too_many_of_one_client_go_without_and_others_are_next(
    predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    held(predictor, monkeypatch, lambda: bool(go.wait(10)) and None)
    made = front(predictor)

    def body(number: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": f"hello {number}"}]}

    async def ask() -> tuple[list[Carried], list[Carried]]:
        flood = [asyncio.create_task(made.carried("chat", FLOOD, body(number), guard())) for number in range(300)]
        await asyncio.sleep(0)
        assert sum(task.done() for task in flood) == 0
        light = [asyncio.create_task(made.carried("chat", LIGHT, body(number), guard())) for number in range(3)]
        while made.snapshot()["predictions"]["overload"] < 300 - PLACES_ON_CPU - MOST_WAITING:
            await asyncio.sleep(0.001)
        go.set()
        await asyncio.gather(*light)
        assert sum(one.done() and one.result().tokens is not None for one in flood) <= PLACES_ON_CPU + len(light) + 4
        return await asyncio.gather(*flood), await asyncio.gather(*light)

    found, light = asyncio.run(ask())
    made.close()
    counted = made.snapshot()["predictions"]
    assert counted["overload"] == sum(one.tokens is None for one in found) == 300 - PLACES_ON_CPU - MOST_WAITING
    assert all(one.tokens is not None for one in light)
    assert counted["made"] == PLACES_ON_CPU + MOST_WAITING + len(light)


def test_places_of_requests_that_are_given_up_are_free_again(
    predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    held(predictor, monkeypatch, lambda: bool(go.wait(10)) and None)
    made = front(predictor)

    async def ask() -> Carried:
        tasks = [asyncio.create_task(made.carried("chat", FLOOD, {"messages": [USER]}, guard())) for _ in range(20)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        go.set()
        return await made.carried("chat", LIGHT, {"messages": [USER]}, guard())

    assert asyncio.run(ask()).tokens is not None
    made.close()


def test_a_failing_predictor_fails_no_request(predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the network is gone")

    held(predictor, monkeypatch, fail)
    made = front(predictor)
    assert carried(made, "chat", {"messages": [USER]}) == Carried("acme/alice")
    assert made.snapshot()["predictions"]["failed"] == 1
    assert carried(made, "chat", {"messages": [USER]}) == Carried("acme/alice")  # its threads have ended
    assert made.snapshot()["predictions"]["failed"] == 2


@pytest.mark.parametrize("text", ["\ud800 lone", "\0", "a" * 3_000_000, "🤖" * 1000])
def test_strange_texts(predictor: LengthPredictor, text: str) -> None:
    found = carried(front(predictor, ("llm|x",)), "chat", {"messages": [{"role": "user", "content": text}]})
    if text == "\0":  # nothing is left of it
        assert found == Carried("acme/alice")
    else:
        answering = Answering.read(found.answering or "")
        assert answering is not None
        assert "|" not in answering.llm


def test_which_llm(predictor: LengthPredictor) -> None:
    known = predictor.encoder.llms.names[0]
    for names, target in (
        (("/models/somewhere", f"org/{known}"), f"org/{known}"),
        ((f"org/{known}", "my-alias"), f"org/{known}"),
        (("/models/somewhere", "my-alias"), "my-alias"),
        (("\ud800",), None),
        ((), None),
    ):
        made = front(predictor, names)
        made.close()
        assert made.target_llm == target
    made = front(predictor, (known,), target_llm="other")
    made.close()
    assert made.target_llm == "other"
    assert front(None, ("one", "two")).target_llm == "two"


def test_the_predictor_is_loaded_as_the_options_name_it(tiny: Path) -> None:
    options = HookOptions(predictor=str(tiny), identity="none")
    identity = Identity(options, secret=b"", logger=logging.getLogger("test.front"))
    made = Front.load(options, identity, ("llama",), logger=LOGGER)
    made.close()
    assert str(made).startswith("clients by none; lengths by ")
    assert str(made).endswith(" within 30 ms, for llama")
    none = Front.load(HookOptions(predictor="none"), identity, logger=LOGGER)
    assert str(none) == "clients by none; no predictions"


@pytest.mark.parametrize("damage", ["missing", "empty", "cut tokenizer", "no config", "no folder"])
def test_a_predictor_that_cannot_be_read_costs_predictions_alone(
    tiny: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "predictor"
    if damage != "missing":
        shutil.copytree(tiny, folder)
    if damage == "empty":
        for file in folder.rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    elif damage == "cut tokenizer":
        file = next(folder.rglob("tokenizer.json"))
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no folder":
        shutil.rmtree(folder)
        folder.write_bytes(b"a file")
    options = HookOptions(predictor=str(folder), identity="header")
    identity = Identity(options, secret=b"", logger=LOGGER)
    made = Front.load(options, identity, ("llama",), logger=LOGGER)
    assert carried(made, "chat", {"messages": [USER]}) == Carried("acme/alice")
    assert caplog.text.count("mope predicts nothing") == 1


def test_a_prediction_that_fails_costs_no_client(predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    made = front(predictor)
    monkeypatch.setattr(made, "_joined", lambda _: 1 / 0)
    assert carried(made, "chat", {"messages": [USER]}) == Carried("acme/alice")


# -- what is read, and what it costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [4096, "4096", 4096.0, " 4096 "])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_caps_are_read_as_servers_read_them(cap: Any, name: str, kind: Any) -> None:
    body = {"prompt": "hi"} if kind == "completions" else {"messages": [USER]}
    asked = read(kind, {**body, name: cap}, None)
    assert asked.max_tokens == 4096
    assert only(asked).max_tokens == 4096


@pytest.mark.parametrize("count", [100, "100", 100.0])
@pytest.mark.parametrize("name", ["n", "best_of"])
def test_counts_are_read_as_servers_read_them(count: Any, name: str) -> None:
    assert read("chat", {"messages": [USER], name: count}, None).num_answers == 100
    assert read("completions", {"prompt": ["a", "b"], name: count}, None).num_answers == 200


def test_a_batch_of_conversations() -> None:
    asked = read("batch", {"messages": [[USER], [{**USER, "content": "another"}]], "n": 3, "max_tokens": 7}, None)
    assert [request.prompt for request in asked.requests] == ["hello there", "another"]
    assert (asked.num_answers, asked.max_tokens) == (6, 7)
    many = read("batch", {"messages": [[USER]] * 1000}, None)
    assert len(many.requests) <= MAX_PROMPTS
    assert (many.num_answers, many.prompt_tokens > 2000) == (1000, True)
    for messages in (None, "x", [], [3, None, "x", [[]]]):
        assert read("batch", {"messages": messages}, None).requests == ()


def test_what_is_not_understood_has_its_price_by_size() -> None:
    word = "word " * 1000
    for part in ({"tools": [{"f": word}]}, {"documents": [{"text": word}]}, {"anything": {"x": [word]}}, [word]):
        assert bodies.size_tokens(part) >= 1000
    assert bodies.size_tokens({"prompt": [1] * 1000}) == 1000
    assert bodies.size_tokens({"url": "data:image/png;base64," + "A" * 10**6}) < 300


def test_images_do_not_count_as_something_to_read() -> None:
    image = b'{"url": "data:image/png;base64,' + b"A" * 10**7 + b'", "text": "hello"}'
    short = bodies.readable(image)
    assert short is not None
    assert json.loads(short) == {"url": "data:image/png", "text": "hello"}
    assert bodies.readable(b'"' + b"x" * (bodies.MAX_PARSED + 1) + b'"') is None
    assert bodies.readable(b"[" + b"[]," * bodies.MAX_PARTS + b"[]]") is None
    many = b",".join([b'";base64,"'] * 10**6)
    assert bodies.readable(many) is None  # at once, see MAX_URLS
