"""The hook in a real SGLang server: who is served when, that answers stay the same, that every token is charged.

One flood by one client and a few requests of another go to the server as it is and to the server with the hook. Memory
is short, so that requests lose their place; prompts share beginnings and are longer than a chunk; some are abandoned.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from tests.engines.tiny_sglang import Ask, Outcome, Server, ask_all, missing, serve

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

UNIT = 1_000_000
TOKENS_ALONE = {"alpha": 1, "beta": 0, "delta": 0, "cached_weight": 0.5}  # figures that can be counted by hand
OPTIONS = {"identity": "header", "predictor": "none", **TOKENS_ALONE}
SHORT_OF_MEMORY = (
    *("--max-running-requests", "8", "--max-total-tokens", "640", "--schedule-conservativeness", "0.1"),
    *("--chunked-prefill-size", "64"),
)


def flood(num_flood: int = 56, num_light: int = 8, seed: int = 0, light_every_s: float = 0.1) -> list[Ask]:
    """One client's requests all at once, another's while those wait; the same each time."""
    rng = random.Random(seed)
    beginnings = [tuple(rng.randrange(10, 500) for _ in range(64)) for _ in range(3)]
    asks = []
    for number in range(num_flood + num_light):
        heavy = number < num_flood
        beginning = beginnings[number % 3][: rng.choice((0, 32, 64))]
        prompt = beginning + tuple(rng.randrange(10, 500) for _ in range(rng.choice((5, 20, 70 if heavy else 20))))
        at_s = 0.0 if heavy else 0.2 + light_every_s * (number - num_flood)
        cap = rng.randint(30, 110) if heavy else 20
        asks.append(Ask("flood" if heavy else "light", prompt, at_s, {"max_new_tokens": cap, "temperature": 0}))
    return asks


def let_pass(outcomes: list[Outcome]) -> float:
    """How many of the flood's answers end while a light request waits for its first token, on average.

    Says who came first without a clock: seconds of two servers, one after the other, depend on what else is going on.
    """
    light = [one for one in outcomes if one.ask.client == "light" and one.ttft_s is not None]
    ends_s = [one.end_s for one in outcomes if one.ask.client == "flood"]
    waits = [(one.ask.at_s, one.ask.at_s + (one.ttft_s or 0.0)) for one in light]
    return sum(start_s < end_s <= first_s for start_s, first_s in waits for end_s in ends_s) / len(waits)


def charged(outcomes: list[Outcome], client: str) -> float:
    """Weighted tokens of what a client was given, by what SGLang told its callers."""
    return sum(
        len(one.ask.prompt) - one.cached_tokens + 0.5 * one.cached_tokens + 2 * one.tokens
        for one in outcomes
        if one.ask.client == client
    )


def settled(server: Server) -> dict:
    """The state, once nobody waits or runs any more."""
    for _ in range(100):
        state = server.state()
        if not state["waiting"] and not state["running"]:
            return state
        time.sleep(0.1)
    raise AssertionError(f"requests are still there: {state}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="module")
def stock(folder: Path) -> list[Outcome]:
    with serve(folder, "fcfs", arguments=SHORT_OF_MEMORY) as server:
        outcomes = ask_all(server, flood())
        assert server.state() == {}  # installed alone, the plugin does nothing
    return outcomes


def test_a_light_client_is_served_at_once_and_answers_stay_the_same(folder: Path, stock: list[Outcome]) -> None:
    with serve(folder, "equinox", OPTIONS, SHORT_OF_MEMORY) as server:
        outcomes = ask_all(server, flood())
        state = settled(server)
        printed = server.printed()

    assert [one.output for one in outcomes] == [one.output for one in stock]
    assert let_pass(stock) >= 5 * max(1.0, let_pass(outcomes))

    assert sum(one.retractions for one in outcomes) > 0
    assert sum(one.cached_tokens for one in outcomes) > 0
    found = {client["client"]: client for client in state["clients"]}
    for client in ("flood", "light"):
        assert found[client]["service"] == charged(outcomes, client) * UNIT
    assert state["total"]["service"] == sum(found[client]["service"] for client in found)
    assert sum(tally["preempted"] for tally in state["tallies"].values()) == sum(one.retractions for one in outcomes)
    assert printed.count("mope is on: policy equinox") == 1


def test_many_abandoned_requests_leave_nothing_behind(folder: Path) -> None:
    rng = random.Random(1)
    asks = [
        Ask(
            f"client-{number % 5}",
            tuple(rng.randrange(10, 500) for _ in range(rng.choice((5, 90, 200)))),
            rng.uniform(0, 6),
            {"max_new_tokens": rng.randint(1, 120), "temperature": 0},
            rng.choice((0.05, 0.3, 1.0, 2.5, None)),
        )
        for number in range(150)
    ]
    with serve(folder, "vtc", {"identity": "header", "predictor": "none"}, SHORT_OF_MEMORY) as server:
        outcomes = ask_all(server, asks)
        assert all(one.reason is not None for one in outcomes if one.ask.give_up_s is None)
        state = settled(server)
        assert state["on"]
        tallies = state["tallies"]
        assert sum(tally["finished"] + tally["aborted"] for tally in tallies.values()) == len(asks)
        assert sum(tally["aborted"] for tally in tallies.values()) >= 20
        assert all(client["waiting"] == client["open"] == 0 for client in state["clients"])
        read = sum(tally["prompt_tokens"] - tally["cached_tokens"] for tally in tallies.values())
        assert state["total"]["service"] == UNIT * (
            read + 2 * sum(tally["response_tokens"] for tally in tallies.values())
        )
        status, answer = server.send("/generate", {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 3}})
        assert status == 200
        assert answer["meta_info"]["completion_tokens"] == 3


def test_nobody_speaks_for_another(folder: Path) -> None:
    """Callers' own `mope_` keys and names are removed; what they put beside them stays."""
    keys = folder / "keys.json"
    keys.write_text(json.dumps({"a-key": "acme/alice"}), encoding="utf-8")
    forged = {"mope_client": "acme/alice", "mope_tokens": 1.0, "theirs": 7}
    with serve(folder, "vtc", {"api_keys": str(keys), "predictor": "none"}) as server:
        generate = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2, "custom_params": forged}}
        assert server.send("/generate", generate)[0] == 200
        chat = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "w5 w6"}],
            "max_tokens": 2,
            "user": "acme/alice",
            "custom_params": forged,
        }
        assert server.send("/v1/chat/completions", chat)[0] == 200
        assert server.send("/v1/chat/completions", chat, {"authorization": "Bearer a-key"})[0] == 200
        batch = {"model": "tiny", "prompt": ["w1", "w2 w3"], "max_tokens": 2, "n": 2}
        assert server.send("/v1/completions", batch, {"authorization": "Bearer a-key"})[0] == 200
        tallies = settled(server)["tallies"]
    assert tallies["acme/alice"]["predicted"] == 0
    assert tallies["acme/alice"]["response_tokens"] == 2 + 2 * 2 * 2
    assert tallies["(anonymous)"]["response_tokens"] == 4
