"""Measures how far one client moves the predictions of all others, and what that protection costs in learning.

    python tests/bench/poisoning.py --output model_cards/results/DATE-poisoning.json

The packaged chat-small predicts answers of ShareGPT's validation rows: 2,000 rows teach, 400 others are predicted. Nine
clients have true lengths, the tenth client has lengths of its choice. "before" names no client: everything is learned,
as it was before clients were told apart. A factor is the sum of predicted means over that without an attack; the
largest factor is that of the row that moves most. Reserved rows are never read.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mope import LengthPredictor
from mope.corrector import Answering, Corrector
from mope.grid import Array
from mope.training.data.build import build_rows
from mope.training.data.config import DataConfig

ATTACKS: dict[str, tuple[int, bool]] = {
    "answers of 1 token": (1, False),
    "4,096 tokens, finished": (4096, False),
    "ignore_eos at 4,096, not told": (4096, True),
    "32,000 tokens, finished": (32_000, False),
}
SHARES, NUM_REQUESTS, NUM_HONEST, STEP_S, START_S = (0.10, 0.25, 0.50), 1500, 9, 3.0, 1.8e9
COUNTS, DRAWS = (50, 200, 400), 6

Row = tuple[Array, int]  # raw prediction and true length


def rows(num_rows: int) -> tuple[list[Row], Answering]:
    """Raw predictions for rows of the validation split."""
    found = build_rows(DataConfig(source="sharegpt")).rows.split("validation")
    chosen = found.take(np.random.default_rng(0).permutation(len(found))[:num_rows])
    predictor = LengthPredictor.from_pretrained("chat-small", cache_size=0)
    prompts, tokens = chosen.strings("prompt"), chosen.response_tokens.tolist()
    requests = [{"prompt": prompt, "target_llm": "gpt-3.5-turbo"} for prompt in prompts]
    pairs = zip(predictor.predict_batch(requests), tokens, strict=True)
    kept = [(one, length) for one, length in pairs if one.source == "model"]
    return [(one.raw_cumulative, length) for one, length in kept], kept[0][0].answering


class Server:
    """What a server has learned after some requests."""

    def __init__(self, taught: Sequence[Row], answering: Answering, seed: int = 0) -> None:
        self.corrector = Corrector.load("chat-small")
        self._taught, self._answering, self._rng = taught, answering, random.Random(seed)
        self._now_s = START_S

    def serve(
        self,
        num_requests: int,
        told: bool,
        *,
        factor: float = 1.0,
        num_clients: int = NUM_HONEST,
        share: float = 0.0,
        attack: tuple[int, bool] = (1, False),
    ) -> Server:
        """Learn from requests of clients with true lengths times a factor, and of one with those of the attack."""
        for _ in range(num_requests):
            raw, tokens = self._rng.choice(self._taught)
            client, cut = f"client-{self._rng.randrange(num_clients)}", False
            tokens = max(1, round(factor * tokens))
            if self._rng.random() < share:
                client, (tokens, cut) = "attacker", attack
            self._now_s += STEP_S
            self.corrector.observe(
                raw, self._answering, tokens, censored=cut, time_s=self._now_s, client=client if told else None
            )
        self.corrector.recalibrator.to_json()
        return self

    def expected(self, asked: Sequence[Row]) -> tuple[Array, Array]:
        """Means and 90 % quantiles of rows."""
        found = [self.corrector.expected(raw, self._answering) for raw, _ in asked]
        return np.array([one.mean for one in found]), np.array([one.high for one in found])


def attacks(fresh: Callable[[], Server], asked: Sequence[Row], told: bool) -> dict[str, dict[str, float]]:
    """What each attack does at each share of the requests."""
    lengths = np.array([length for _, length in asked])
    usual, high = fresh().serve(NUM_REQUESTS, told).expected(asked)
    found = {"none": _figures(usual, high, usual, lengths)}
    for name, attack in ATTACKS.items():
        for share in SHARES:
            mean, high = fresh().serve(NUM_REQUESTS, told, share=share, attack=attack).expected(asked)
            found[f"{name}, {100 * share:.0f} % of requests"] = _figures(mean, high, usual, lengths)
    return found


def _figures(mean: Array, high: Array, usual: Array, lengths: Array) -> dict[str, float]:
    return {
        "factor": round(float(mean.sum() / usual.sum()), 2),
        "largest_factor": round(float((mean / usual).max()), 2),
        "mean_absolute_error": round(float(np.abs(mean - lengths).mean()), 1),
        "coverage_of_90": round(float((lengths <= high).mean()), 3),
    }


def learned(make: Callable[[int], Server], asked: Sequence[Row], factor: float, clients: int | None) -> dict[str, Any]:
    """Predicted over true total length after some answers, of an LLM whose answers are `factor` times as long."""
    truth, found = factor * sum(length for _, length in asked), {}
    for count in COUNTS:
        ratios = [
            make(seed)
            .serve(count, clients is not None, factor=factor, num_clients=clients or 1)
            .expected(asked)[0]
            .sum()
            / truth
            for seed in range(DRAWS)
        ]
        found[str(count)] = round(float(np.median(ratios)), 3)
    return found


def cost(taught: Sequence[Row], answering: Answering) -> dict[str, float]:
    """Microseconds to correct a prediction and observe, without and with a client, interleaved; CPU time, medians."""
    pair: list[tuple[Corrector, bool]] = [(Corrector.load("chat-small"), told) for told in (False, True)]
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(40):
        for corrector, told in pair:
            start = time.process_time()
            for step in range(500):
                raw, tokens = taught[(500 * number + step) % len(taught)]
                client = f"client-{step % 10}" if told else None
                now_s = START_S + 500 * number + step
                corrector.expected(raw, answering)
                corrector.observe(raw, answering, tokens, censored=False, time_s=now_s, client=client)
            times[told].append((time.process_time() - start) / 500)
    return {
        ("with a client" if told else "without"): round(1e6 * float(np.median(found)), 1)
        for told, found in times.items()
    }


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    chosen = parser.parse_args()
    found, answering = rows(3000)
    taught, asked = found[:2000], found[2000:2400]

    def make(seed: int = 0) -> Server:
        return Server(taught, answering, seed)

    report = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, 2 shared cores",
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "rows": {"source": "sharegpt, validation", "taught": len(taught), "predicted": len(asked)},
        "attacks": {name: attacks(make, asked, told) for name, told in (("before", False), ("after", True))},
        "predicted_over_true_total": {
            f"{factor:g} times as long, {name}": learned(make, asked, factor, clients)
            for factor in (1.0, 4.0, 20.0)
            for name, clients in (("no client told", None), ("1 client", 1), ("10 clients", 10), ("40 clients", 40))
        },
        "microseconds_to_correct_and_observe": cost(taught, answering),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if chosen.output is not None:
        chosen.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
