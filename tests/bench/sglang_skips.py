"""Measures what requests that cannot run cost SGLang's scheduling, and what a light client gets beside them.

    python tests/bench/sglang_skips.py

No engine: SGLang's walk over its queue is played (`tests/unit/test_sglang_skips.py`), for SGLang as it is, for the
hook without setting aside, and for the hook. Milliseconds are of this process's CPU time, medians of steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mope.serving_hooks.sglang.skips import Skips
from tests.unit.test_sglang_skips import Walk, light_beside_flood, waiting_on


class Nothing(Skips):
    """Sets nothing aside."""

    def begin(self, *args: object) -> None:
        """Nothing."""

    def arrived(self, *args: object) -> None:
        """Nothing."""

    def admits(self, *args: object) -> bool:
        """Always."""
        return True

    def picks(self, limit: int) -> list:
        """The next ones, whether they can run or not."""
        return self._policy.simulate(limit)


def make(kind: str) -> Walk:
    """A scheduler: "stock", "without" setting aside or "ours"."""
    walk = Walk(max_loras=1, lora_patience_s=86_400)
    if kind == "stock":
        walk.ours.guard.failure = "off"
    elif kind == "without":
        walk.ours.skips.__class__ = Nothing
        walk.ours.skips.turns = None
    return walk


def step_ms(kind: str, blocked: str, number: int) -> float:
    """Of a step in which so many requests cannot run."""
    walk = make(kind)
    waiting_on(walk, blocked, number, clients=20)
    walk.send("other", 900, "a")
    walk.step(40)
    taken = []
    for _ in range(60):
        start = time.process_time()
        walk.step()
        taken.append(time.process_time() - start)
    return round(1e3 * statistics.median(taken), 3)


def served(kind: str, blocked: str, number: int, steps: int = 500) -> int:
    """Requests that a light client gets, one after the other, beside a flood and those that wait."""
    walk = make(kind)
    return light_beside_flood(walk, blocked, number, steps)


def main() -> None:
    """Prints the figures."""
    for blocked in ("adapter", "fetched"):
        for number in (0, 1000, 4000):
            told = {kind: step_ms(kind, blocked, number) for kind in ("stock", "without", "ours")}
            print(f"{blocked}, {number} cannot run: ms of a step {told}", flush=True)
        told = {kind: served(kind, blocked, 1000) for kind in ("stock", "without", "ours")}
        print(f"{blocked}, 1000 cannot run: requests that a light client gets in 500 steps {told}", flush=True)


if __name__ == "__main__":
    main()
