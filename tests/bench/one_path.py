"""Measures the way from a request to its corrected prediction: convergence, memory and time of big batches, many names.

    python tests/bench/one_path.py --output model_cards/results/DATE-one-path.json

Convergence: what the hooks expect of an answer after 0 to 200 answers of an LLM, over the true mean. Raw predictions
are lognormal around medians of 60 to 800 tokens. True lengths are drawn from them, times a factor that the predictor
does not know. Medians and worst cases are over draws. Batches: prompts of ShareGPT, with a number each.
Names: predict and observe of an LLM named for the first time, beside so many others.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mope import LengthPredictor
from mope.artifact import find, read_config
from mope.corrector import Answering, Corrector, as_carried
from mope.serving_hooks.carried import Carried, pack
from mope.serving_hooks.lengths import Lengths
from mope.training.data.build import build_rows
from mope.training.data.config import DataConfig

COUNTS, FACTORS, DRAWS, DEVIATION = (0, 20, 50, 200), (0.4, 1.0, 2.5, 8.0, 25.0), 12, 0.75
ANSWERING = {
    "known": Answering("gpt-4o", "gpt", "", "", True),
    "unknown": Answering("mine", "mine", "", "", False),
    "unknown, asked to think": Answering("mine", "mine", "", "thinking", False),
}
CONFIG = read_config(find("chat-small"))


def lognormal(median: float) -> Any:
    """A raw prediction on the packaged predictors' grid."""
    from scipy.special import ndtr

    cumulative = ndtr((np.log(CONFIG.edges) - np.log(median)) / DEVIATION)
    cumulative[0], cumulative[-1] = 0.0, 1.0
    return as_carried(cumulative)


def converges(answering: Answering, factor: float, seed: int) -> list[float]:
    """Expected over true mean after each of `COUNTS` answers, as a scheduler has it."""
    rng, lengths, found = np.random.default_rng(seed), Lengths(Corrector(CONFIG)), []
    true = factor * 200 * float(np.exp(DEVIATION**2 / 2))
    for number in range(max(COUNTS) + 1):
        if number in COUNTS:
            raw = lognormal(200.0)
            expected = lengths.corrector.expected(raw, answering)
            carried = Carried("a", expected.mean, expected.high, pack(raw), answering.write())
            found.append((lengths.expected(carried, "a").tokens or 0.0) / true)
        median = float(np.exp(rng.uniform(np.log(60), np.log(800))))
        tokens = max(1, round(median * factor * np.exp(rng.normal(0, DEVIATION))))
        lengths.corrector.observe(lognormal(median), answering, tokens, censored=False, time_s=1.8e9 + 3 * number)
        lengths.num_observed += 1
    return found


def batch(name: str, num_prompts: int) -> dict[str, float]:
    """Memory above that of one prompt, and time per prompt, of one big batch; in a fresh process."""
    rows = build_rows(DataConfig(source="sharegpt")).rows
    prompts = rows.split("validation").strings("prompt")
    texts = [f"{prompts[number % len(prompts)]} {number}" for number in range(num_prompts)]
    del rows
    predictor = LengthPredictor.from_pretrained(name, cache_size=0)
    predictor.predict(texts[0])
    before = _peak_mb()
    start = time.perf_counter()
    found = predictor.predict_batch(texts)
    seconds, peak = time.perf_counter() - start, _peak_mb()
    start = time.perf_counter()
    for first in range(0, 1280, 64):
        predictor.predict_batch(texts[first : first + 64])
    parts = time.perf_counter() - start
    start = time.perf_counter()
    predictor.predict_batch(texts[:1280])
    whole = time.perf_counter() - start
    alone = np.array([predictor.predict(text).median for text in texts[:640]])
    together = np.array([one.median for one in found[:640]])
    return {
        "prompts": num_prompts,
        "memory_mb": round(peak - before, 1),
        "ms_per_prompt": round(1e3 * seconds / num_prompts, 3),
        "time_of_1280_over_batches_of_64": round(whole / parts, 3),
        "alone_or_in_batch_p99_difference": float(np.quantile(np.abs(alone / together - 1), 0.99)),
    }


def names(counts: tuple[int, ...] = (10, 100, 1000, 4000)) -> dict[str, float]:
    """Milliseconds of predict and observe for a new name, beside so many that were observed."""
    predictor, found, number = LengthPredictor.from_pretrained("chat-micro"), {}, 0
    for count in counts:
        while number < count:
            _use(predictor, number)
            number += 1
        times = []
        for extra in range(100):
            start = time.perf_counter()
            _use(predictor, 10**6 + 1000 * count + extra)
            times.append(time.perf_counter() - start)
        found[str(count)] = round(1e3 * float(np.median(times)), 3)
    return found


def _use(predictor: LengthPredictor, number: int) -> None:
    prediction = predictor.predict("Tell me a story about a king.", target_llm=f"family{number % 7}-{number}b-tune")
    predictor.observe(prediction, 50 + number % 900)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--batch", help="measure the batch of this predictor alone, and print JSON")
    chosen = parser.parse_args()
    if chosen.batch:
        print(json.dumps(batch(chosen.batch, 10_000)))
        return
    convergence = {}
    for name, answering in ANSWERING.items():
        for factor in FACTORS:
            ratios = np.array([converges(answering, factor, seed) for seed in range(DRAWS)])
            convergence[f"{name}, {factor:g} times as long"] = {
                str(count): {"median": round(float(np.median(own)), 3), "worst": round(float(np.abs(own - 1).max()), 3)}
                for count, own in zip(COUNTS, ratios.T, strict=True)
            }
    batches = {
        name: json.loads(
            subprocess.check_output([sys.executable, __file__, "--batch", name], text=True).splitlines()[-1]
        )
        for name in ("chat-small", "chat-micro")
    }
    report = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, 2 cores",
        "expected_over_true_mean": convergence,
        "batches": batches,
        "new_name_ms": names(),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if chosen.output is not None:
        chosen.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
