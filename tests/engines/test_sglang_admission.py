"""Admission by predicted lengths where memory is short: callers ask for up to 600 tokens, and get some 50.

SGLang sets memory aside for what was asked for. The hook goes by what answers of the client have been like.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engines.tiny_sglang import Ask, Outcome, ask_all, missing, serve

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

LITTLE_MEMORY = ("--max-running-requests", "32", "--max-total-tokens", "1500")
OPTIONS = {  # without a predictor: what an operator knows of answers, then what was seen of the client
    **{"identity": "header", "predictor": "none", "default_tokens": 64},
    **{"predicted_admission": True, "kv_margin": 1.5},
}
NUM_REQUESTS = 80


def load(seed: int = 0) -> list[Ask]:
    rng = random.Random(seed)
    asks = []
    for number in range(NUM_REQUESTS):
        prompt = tuple(rng.randrange(110, 500) for _ in range(20))
        parameters = {"max_new_tokens": 600, "temperature": 1.0, "stop_token_ids": list(range(100, 110))}
        asks.append(Ask("client", prompt, 0.0 if number < 70 else 0.5, parameters))
    return asks


def mean_running(outcomes: list[Outcome]) -> float:
    """How many requests ran at once: those that had a first token and no end yet, over time."""
    begun = [one.ask.at_s + one.ttft_s for one in outcomes if one.ttft_s is not None]
    return (sum(one.end_s for one in outcomes) - sum(begun)) / _last(outcomes)


def run(folder: Path, policy: str, options: dict[str, Any] | None) -> tuple[list[Outcome], float]:
    """Outcomes, and how many requests ran at once."""
    with serve(folder, policy, options, LITTLE_MEMORY) as server:
        outcomes = ask_all(server, load())
        if options is not None:
            assert server.state()["on"]
    return outcomes, mean_running(outcomes)


def test_more_requests_run_at_once(tmp_path: Path) -> None:
    stock, stock_running = run(tmp_path, "fcfs", None)
    ours, running = run(tmp_path, "equinox", OPTIONS)
    for outcomes in (stock, ours):
        assert {one.reason for one in outcomes} <= {"stop", "length"}
    retractions = sum(one.retractions for one in ours)
    print(
        f"running {stock_running:.2f} -> {running:.2f}, seconds {_last(stock):.1f} -> {_last(ours):.1f}, {retractions=}"
    )
    assert running >= 2 * stock_running or _last(stock) >= 2 * _last(ours)
    assert retractions <= 0.05 * NUM_REQUESTS


def _last(outcomes: list[Outcome]) -> float:
    return max(one.end_s for one in outcomes)
