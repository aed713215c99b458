"""Both halves of the hook in a real server, asked by the OpenAI client: a flood, a light client, and who hangs up.

No predictor runs here: answers are cut by `max_tokens`, which would tell it the true length. What is known of lengths
is each client's running mean.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_vllm
from tiny_vllm import NAME, Server, serve

pytestmark = pytest.mark.skipif(tiny_vllm.MISSING is not None, reason=str(tiny_vllm.MISSING))

FLOOD, LIGHT = "sk-flood-0001", "sk-light-0002"
NUM_FLOOD, NUM_LIGHT = 480, 12  # all of the light ones come while the flood is there, on any machine


@dataclass
class Served:
    """What one server did.

    Attributes:
        ttft_s: mean seconds to the first token, of the flood to the whole answer, by client.
        let_pass: median number of the flood's answers that came while a client waited for its first token or answer.
        texts: answers in order of sending, flood first.
        seconds: until all were answered.
        steps: of the engine, by vLLM's own count.
        metrics: what the hook's port says at the end.
        log: what the server printed.
    """

    ttft_s: dict[str, float]
    let_pass: dict[str, float]
    texts: list[str]
    seconds: float
    steps: int
    metrics: str
    log: str


async def ask(client: Any, number: int, max_tokens: int, hang_up: bool = False) -> tuple[float, float, str]:
    """When it was sent, when its first token came, and the whole answer."""
    start, first, text = time.monotonic(), 0.0, ""
    stream = await client.completions.create(
        model=NAME,
        prompt=f"{number} the quick brown fox jumps over",
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": {"mope_client": "mallory"}},  # forged: must not count
    )
    async for part in stream:
        first = first or time.monotonic()
        text += part.choices[0].text
        if hang_up:
            await stream.close()
            break
    return start, first, text


async def flooded(client: Any, number: int, max_tokens: int) -> tuple[float, float, str]:
    """When it was sent, when its answer came, and the answer: not streamed.

    Hundreds of streams would keep the server's front end and this process too busy: the light client's requests would
    be sent when all is over.
    """
    start = time.monotonic()
    answer = await client.completions.create(
        model=NAME,
        prompt=f"{number} the quick brown fox jumps over",
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": {"mope_client": "mallory"}},  # forged: must not count
    )
    return start, time.monotonic(), answer.choices[0].text


async def traffic(server: Server) -> tuple[dict[str, float], dict[str, float], list[str], float]:
    import httpx
    from openai import AsyncOpenAI

    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=0)
    clients = {
        key: AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key=key,
            timeout=300,
            max_retries=0,
            http_client=httpx.AsyncClient(limits=limits),
        )
        for key in (FLOOD, LIGHT)
    }
    start = time.monotonic()
    flood = [asyncio.create_task(flooded(clients[FLOOD], number, 128)) for number in range(NUM_FLOOD)]
    gone = [asyncio.create_task(ask(clients[FLOOD], 900 + number, 300, hang_up=True)) for number in range(8)]
    light = []
    await asyncio.to_thread(arrived, server, "flood", NUM_FLOOD)  # what waits in the front end is not ordered yet
    for number in range(NUM_LIGHT):
        await asyncio.sleep(0.1)
        light.append(asyncio.create_task(ask(clients[LIGHT], 500 + number, 12)))
    answers = {"flood": await asyncio.gather(*flood), "light": await asyncio.gather(*light)}
    seconds = time.monotonic() - start
    await asyncio.gather(*gone)
    for client in clients.values():
        await client.close()
    begun = [first for _, first, _ in answers["flood"]]
    let_pass = {
        name: statistics.median(sum(start < one < first for one in begun) for start, first, _ in found)
        for name, found in answers.items()
    }
    ttft_s = {name: sum(first - start for start, first, _ in found) / len(found) for name, found in answers.items()}
    return ttft_s, let_pass, [text for found in answers.values() for *_, text in found], seconds


def run(folder: Any, policy: str) -> Served:
    keys = folder / "keys.json"
    keys.write_text(json.dumps({FLOOD: "flood", LIGHT: "light"}))
    mope = {"policy": policy, "predictor": "none", "api_keys": str(keys), "metrics_port": 0, "summary_s": 1}
    options = ["--api-key", FLOOD, LIGHT, "--middleware", "mope.serving_hooks.vllm.Middleware"]
    options += ["--scheduler-cls", "mope.serving_hooks.vllm.make_scheduler"]
    options += ["--additional-config", json.dumps({"mope": mope}), "--no-enable-prefix-caching"]
    with serve(folder, options) as server:
        asyncio.run(warm(server))
        ttft_s, let_pass, texts, seconds = asyncio.run(traffic(server))
        metrics, steps = read_metrics(server), engine_steps(server)
    return Served(ttft_s, let_pass, texts, seconds, steps, metrics, server.printed())


async def warm(server: Server) -> None:
    headers = {"authorization": f"Bearer {LIGHT}"}
    status, _ = await asyncio.to_thread(
        server.post, "/v1/completions", {"model": NAME, "prompt": "the fox", "max_tokens": 2}, headers
    )
    assert status == 200


def hook_metrics(server: Server) -> str:
    """What the hook's own port says."""
    found = re.search(r"http://127\.0\.0\.1:\d+/metrics", server.printed())
    assert found is not None, server.printed()[-3000:]
    with urllib.request.urlopen(found.group(), timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def arrived(server: Server, client: str, number: int) -> None:
    """Waits until so many of a client's requests have come to the scheduler."""
    for _ in range(600):
        found = re.search(rf'^mope_client_arrived_total{{.*client="{client}".*}} (\S+)$', hook_metrics(server), re.M)
        if found is not None and float(found.group(1)) >= number:
            return
        time.sleep(0.1)
    raise AssertionError(f"{number} requests of {client} did not come within a minute:\n{hook_metrics(server)}")


def read_metrics(server: Server) -> str:
    """The hook's metrics once nothing runs any more."""
    for _ in range(60):
        text = hook_metrics(server)
        if re.search(r"^mope_requests_running\S* 0(\.0)?$", text, re.M) or "mope_requests_running" not in text:
            return text
        time.sleep(0.5)
    return text


def engine_steps(server: Server) -> int:
    with urllib.request.urlopen(server.url + "/metrics", timeout=10) as answer:
        found = re.search(r"^vllm:iteration_tokens_total_count\S* (\S+)$", answer.read().decode(), re.M)
    assert found is not None
    return round(float(found.group(1)))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    return {policy: run(tmp_path_factory.mktemp(policy), policy) for policy in ("fcfs", "equinox")}


def test_the_light_client_lets_far_fewer_pass(served: dict[str, Served]) -> None:
    """Counted, not timed; on a busy machine a part of the wait is the front end's and the caller's, which share it.

    In steps of the engine, where nothing else counts, it is ten times sooner: `test_vllm_scheduler`.
    """
    passed = {policy: one.let_pass["light"] for policy, one in served.items()}
    assert passed["fcfs"] > 2 * passed["equinox"], passed


def test_answers_are_the_same(served: dict[str, Served]) -> None:
    assert served["equinox"].texts == served["fcfs"].texts
    assert all(served["equinox"].texts)


def test_nobody_pays_with_throughput(served: dict[str, Served]) -> None:
    """In steps of the engine for the same answers: seconds of two servers would say what else the machine does."""
    steps = {policy: one.steps for policy, one in served.items()}
    assert 0 < steps["equinox"] < 1.5 * steps["fcfs"], steps


def test_metrics_know_clients_by_their_keys_and_nobody_else(served: dict[str, Served]) -> None:
    for one in served.values():
        assert 'client="flood"' in one.metrics
        assert 'client="light"' in one.metrics
        assert "mallory" not in one.metrics
        assert FLOOD not in one.metrics


def test_the_server_says_that_it_is_on(served: dict[str, Served]) -> None:
    assert "mope is on: policy equinox" in served["equinox"].log
    assert "mope has failed" not in served["equinox"].log
    assert re.search(r"equinox: \d+ running, \d+ waiting of \d clients", served["equinox"].log)
