"""`mope.client`: a gateway gets a prediction whatever the service does: dead, slow, lying, or well."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import free_port

pytest.importorskip("httpx2")

from mope.client import FAILURES_IN_A_ROW, Prediction, Predictions
from mope.errors import ConfigError

GOOD = {
    "id": "abc",
    "median": 100.0,
    "mean": 120.0,
    "quantiles": {"0.1": 20.0, "0.5": 100.0, "0.9": 300.0},
    "expert": 1,
    "source": "model",
    "llm": "",
    "cost": {"prompt_tokens": 9, "ttft_s": 0.1, "latency_s": 2.0, "gpu_s": 0.5},
    "thoughts": {"share": 0.75, "tokens": 90.0, "visible_tokens": 30.0},
}
MINE = Prediction(median=1.0, mean=2.0, quantiles={0.9: 3.0})
SLACK_S = 1.0  # of a machine that is busy

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


def answering(body: Any, status: int = 200, seen: list[bytes] | None = None) -> Handler:
    async def handle(request: bytes, writer: asyncio.StreamWriter) -> None:
        if seen is not None:
            seen.append(request)
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)

    return handle


def with_server(handle: Handler, use: Callable[[str], Awaitable[Any]]) -> Any:
    """What `use` returns, given the address of a server that handles each request so."""

    async def run() -> Any:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while head := await reader.readuntil(b"\r\n\r\n"):
                    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
                    body = await reader.readexactly(int(fields[b"content-length"]))
                    await handle(head + body, writer)
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        try:
            return await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        finally:
            server.close()

    return asyncio.run(run())


def asked(handle: Handler, request: Any = "Hi", **options: Any) -> Prediction:
    async def use(url: str) -> Prediction:
        async with Predictions(url, fallback=MINE, **{"deadline_s": 20.0, **options}) as predictions:
            return await predictions.predict(request)

    found = with_server(handle, use)
    assert isinstance(found, Prediction)
    return found


def test_a_good_answer_is_read_whole() -> None:
    seen: list[bytes] = []
    found = asked(answering(GOOD, seen=seen), {"model": "gpt-4o", "messages": []}, api_key="sk-1", deadline_s=10.0)
    assert (found.median, found.mean, found.id, found.source, found.expert) == (100.0, 120.0, "abc", "model", 1)
    assert found.made
    assert found.quantile(0.5) == 100.0
    assert found.quantile(0.6) == found.quantile(0.99) == 300.0
    assert found.cost is not None
    assert found.cost.latency_s == 2.0
    assert found.visible == 30.0
    assert seen[0].startswith(b"POST /v1/predict?deadline_ms=8000 HTTP/1.1")
    assert b"authorization: bearer sk-1" in seen[0].lower()
    assert seen[0].endswith(b'{"model": "gpt-4o", "messages": []}')


def test_a_prompt_and_a_batch() -> None:
    seen: list[bytes] = []

    async def use(url: str) -> list[Prediction]:
        async with Predictions(f"{url}/v1/", deadline_s=20.0) as predictions:
            assert await predictions.predict_batch([]) == []
            return await predictions.predict_batch(["a", {"prompt": "b"}])

    found = with_server(answering([GOOD, {**GOOD, "id": "d"}], seen=seen), use)
    assert [one.id for one in found] == ["abc", "d"]
    assert seen[0].endswith(b'[{"prompt": "a"}, {"prompt": "b"}]')


def test_a_dead_server_gives_the_fallback_and_then_costs_nothing() -> None:
    async def run() -> None:
        async with Predictions(f"http://127.0.0.1:{free_port()}", fallback=MINE, rest_s=60.0) as predictions:
            for _ in range(FAILURES_IN_A_ROW):
                assert await predictions.predict("Hi") == Prediction(1.0, 2.0, {0.9: 3.0}, "fallback:unreachable")
            started = time.monotonic()
            for _ in range(200):
                assert (await predictions.predict("Hi")).source == "fallback:unreachable"
            assert time.monotonic() - started < SLACK_S
            assert not await predictions.observe("abc", completion_tokens=3)
            assert not await predictions.observe(await predictions.predict("Hi"), completion_tokens=3)

    asyncio.run(run())


def test_after_a_rest_the_server_is_asked_again() -> None:
    answers = [b"nonsense"] * FAILURES_IN_A_ROW
    seen: list[bytes] = []

    async def handle(request: bytes, writer: asyncio.StreamWriter) -> None:
        await answering(answers.pop() if answers else GOOD, seen=seen)(request, writer)

    async def use(url: str) -> None:
        async with Predictions(url, rest_s=0.2, deadline_s=20.0) as predictions:
            for _ in range(FAILURES_IN_A_ROW):
                assert (await predictions.predict("Hi")).source == "fallback:nonsense"
            assert (await predictions.predict("Hi")).source == "fallback:unreachable"
            assert len(seen) == FAILURES_IN_A_ROW
            await asyncio.sleep(0.25)
            assert (await predictions.predict("Hi")).made

    with_server(handle, use)


def test_after_a_rest_one_request_asks_and_the_others_do_not_wait() -> None:
    seen: list[bytes] = []

    async def handle(request: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(request)
        await asyncio.sleep(60)

    async def use(url: str) -> None:
        async with Predictions(url, rest_s=0.2, deadline_s=0.1) as predictions:
            await asyncio.gather(*(predictions.predict("Hi") for _ in range(FAILURES_IN_A_ROW)))
            await asyncio.sleep(0.3)
            seen.clear()
            found = await asyncio.gather(*(predictions.predict("Hi") for _ in range(50)))
            assert sorted(one.source for one in found) == ["fallback:timeout"] + 49 * ["fallback:unreachable"]
            assert len(seen) <= 1  # none on a machine that is busy

    with_server(handle, use)


async def never(request: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def byte_by_byte(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(600):
        writer.write(b"[")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("handle", [never, byte_by_byte])
def test_a_slow_server_costs_the_deadline_and_no_more(handle: Handler) -> None:
    async def use(url: str) -> float:
        async with Predictions(url, deadline_s=0.2, fallback=MINE) as predictions:
            started = time.monotonic()
            assert (await predictions.predict("Hi")).source == "fallback:timeout"
            return time.monotonic() - started

    assert with_server(handle, use) < 0.2 + SLACK_S


async def endless(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(1000):
        writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        await writer.drain()


async def cut(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()


async def no_http(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    await writer.drain()
    writer.close()


async def elsewhere(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize(
    ("handle", "source"),
    [
        (endless, "nonsense"),
        (cut, "unreachable"),
        (no_http, "unreachable"),
        (elsewhere, "unreachable"),
        (answering(b"{}", 500), "unreachable"),
        (answering(b"{}", 503), "unreachable"),
        (answering(b"{}", 401), "refused"),
        (answering(b"{}", 400), "refused"),
        (answering(b"<html>"), "nonsense"),
        (answering(b"[" * 100_000), "nonsense"),
        (answering(b"\xff"), "nonsense"),
        (answering([GOOD]), "nonsense"),
        (answering(None), "nonsense"),
        *(
            (answering({**GOOD, **lie}), "nonsense")
            for lie in (
                {"mean": -1}, {"mean": float("nan")}, {"mean": float("inf")}, {"mean": "5"}, {"mean": True},
                {"mean": 1e300}, {"median": None}, {"quantiles": {"0.1": 9, "0.9": 3}}, {"quantiles": {"x": 3}},
                {"quantiles": {"1.5": 3}}, {"quantiles": {"nan": 3}}, {"quantiles": []}, {"source": None},
                {"source": "x" * 1000}, {"source": "evil"}, {"id": 3}, {"id": "x" * 1000}, {"expert": "1"},
                {"cost": []}, {"cost": {}}, {"cost": {**GOOD["cost"], "gpu_s": -1}},  # type: ignore[dict-item]
            )
        ),
    ],
)  # fmt: skip
def test_a_lying_server_gives_the_fallback(handle: Handler, source: str) -> None:
    assert asked(handle) == Prediction(1.0, 2.0, {0.9: 3.0}, f"fallback:{source}")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "x"]), inner, max_size=9),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.dictionaries(st.sampled_from(sorted(GOOD)), JSON, max_size=2))
def test_whatever_json_comes_is_read_or_refused(answer: Any, lies: dict[str, Any]) -> None:
    from mope.client import _Nonsense, _read

    for one in (answer, {**GOOD, **lies}):
        try:
            found = _read(json.loads(json.dumps(one)))
        except _Nonsense:
            continue
        lengths = list(found.quantiles.values())
        assert lengths == sorted(lengths)
        assert all(0 <= number <= 1e9 for number in (found.mean, found.median, *lengths))


def test_a_body_that_is_no_json_is_refused_here() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for request in ({"a": object()}, {"a": {1, 2}}, {"a": loop}):
        assert asked(answering(GOOD), request).source == "fallback:refused"


def test_observing_sends_what_was_said() -> None:
    seen: list[bytes] = []

    async def use(url: str) -> bool:
        async with Predictions(url, observe_timeout_s=20.0) as predictions:
            prediction = Prediction(1.0, 1.0, id="abc")
            return await predictions.observe(prediction, usage={"completion_tokens": 7}, finish_reason="stop")

    assert with_server(answering({"id": "abc", "learned": True, "reason": ""}, seen=seen), use)
    assert seen[0].startswith(b"POST /v1/observe HTTP/1.1")
    assert seen[0].endswith(b'{"id": "abc", "usage": {"completion_tokens": 7}, "finish_reason": "stop"}')


def test_a_closed_client_gives_the_fallback() -> None:
    async def run() -> str:
        predictions = Predictions("http://127.0.0.1:9")
        await predictions.close()
        await predictions.close()
        return (await predictions.predict("Hi")).source

    assert asyncio.run(run()) == "fallback:unreachable"


@pytest.mark.parametrize(
    "options",
    [
        {"url": "127.0.0.1:8400"}, {"url": ""}, {"url": "http://"}, {"url": "http://[::1"}, {"deadline_s": 0},
        {"deadline_s": float("nan")}, {"rest_s": "1"}, {"api_key": "a\nb"},
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Predictions(**{"url": "http://127.0.0.1:8400", **options})
    assert "\n" not in str(caught.value)


def test_the_client_loads_no_predictor() -> None:
    code = "import sys, mope.client; mope.client.Predictions('http://a'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"onnxruntime", "torch", "tokenizers", "numpy", "mope.predictor"} & set(loaded)
