"""Measures a saved predictor on LLMs that it has never seen, on prompts that it has never seen, while it learns them.

    python tests/bench/unseen_llm.py chat-small LENGTHS.parquet [--llms 40] [--output unseen.json]

The file has the columns prompt, target_llm, response_tokens, censored and split. LLMs that the predictor knows by name
are left out. For each of the others, answers to prompts of the train split are observed one by one through the public
interface, and answers to prompts of the test split are predicted after some numbers of them. Beside it: the constant of
the predictor's training set, no correction, and two predictors that are trained on all train answers of that very LLM:
a line on this predictor's log median with the residuals' quantiles, and a ridge regression on that log median and the
prompt's words (TF-IDF). Intervals are over LLMs, by bootstrap. Knows no networks.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.table import Table
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV

from mope import LengthPrediction, LengthPredictor, Request
from mope.console import console, progress
from mope.grid import Array
from mope.recalibration import Recalibrator

COUNTS = (0, 5, 20, 50, 200)
NOT_LLMS = ("gpt4_gamed", "NullModel")  # attacks on AlpacaEval
START_S, STEP_S = 1.7e9, 60.0
LEVELS = (0.1, 0.5, 0.9)


def score(medians: Array, q90: Array | None, tokens: Array) -> dict[str, float]:
    """Mean absolute error in tokens, and the share of answers that the 90 % quantile covers."""
    found = {"mae": float(np.abs(medians - tokens).mean())}
    return found if q90 is None else {**found, "coverage": float((tokens <= q90).mean())}


def log_medians(predictions: Sequence[LengthPrediction]) -> Array:
    """Log of each median before any correction."""
    return np.array([np.interp(0.5, raw := one.raw_cumulative, np.log(one.edges[: len(raw)])) for one in predictions])


def line(x: Array, y: Array, wanted: Array) -> tuple[Array, Array]:
    """Median and 90 % quantile of a line of least absolute deviations in log tokens, and its residuals."""
    slope, intercept = np.polyfit(x, y, 1)
    for _ in range(30):
        weights = 1 / np.maximum(np.abs(y - intercept - slope * x), 0.02)
        slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(weights))
    median, top = np.quantile(y - intercept - slope * x, [0.5, 0.9])
    return np.exp(intercept + slope * wanted + median), np.exp(intercept + slope * wanted + top)


def ridge(x: Array, words: Any, y: Array, wanted_x: Array, wanted_words: Any) -> Array:
    """Medians of a ridge regression on the log median and the prompt's words."""
    stacked, wanted = (
        hstack([csr_matrix(3 * (a - x.mean())[:, None]), b]) for a, b in ((x, words), (wanted_x, wanted_words))
    )
    fitted = RidgeCV(np.geomspace(0.1, 100, 10)).fit(stacked, y)
    return np.asarray(np.exp(fitted.predict(wanted) + np.median(y - fitted.predict(stacked))))


def measure(predictor: LengthPredictor, path: Path, num_llms: int, seed: int) -> dict[str, list[dict[str, float]]]:
    """Scores of each arm, one per LLM."""
    columns = ("prompt", "target_llm", "response_tokens", "censored", "split")
    table = pq.read_table(path, columns=list(columns)).to_pandas()
    table = table[~table.target_llm.isin(NOT_LLMS)]
    new = [name for name in sorted(set(table.target_llm)) if not predictor.encoder.llms.knows(name)]
    rng = np.random.default_rng(seed)
    chosen = [new[i] for i in sorted(rng.permutation(len(new))[:num_llms])]
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2)).fit(
        sorted(set(table[table.split == "train"].prompt))
    )
    constant = predictor.fallback("none", Request(prompt="")).median
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    priors = predictor.recalibrator.unknown_llms
    with progress("LLMs", len(chosen)) as advance:
        for name in chosen:
            own = table[table.target_llm == name]
            train, test = (own[own.split == split] for split in ("train", "test"))
            train, test = train.iloc[rng.permutation(len(train))], test[~test.censored]
            tokens = test.response_tokens.to_numpy(dtype=float)
            asked, wanted = (
                [{"prompt": prompt, "target_llm": name} for prompt in rows.prompt] for rows in (train, test)
            )
            predictor.corrector.recalibrator = Recalibrator(priors)
            observed = predictor.predict_batch(asked)
            raw = [log_medians(predictor.predict_batch(rows)) for rows in (asked, wanted)]
            found["no correction"].append(score(np.exp(raw[1]), None, tokens))
            found["constant"].append(score(np.full(len(tokens), constant), None, tokens))
            y, known = np.log(train.response_tokens.to_numpy(dtype=float)), ~train.censored.to_numpy()
            found["line, trained on it"].append(score(*line(raw[0][known], y[known], raw[1]), tokens))
            words = [vectorizer.transform(rows.prompt) for rows in (train[known], test)]
            found["ridge, trained on it"].append(
                score(ridge(raw[0][known], words[0], y[known], raw[1], words[1]), None, tokens)
            )
            for start, count in zip((0, *COUNTS), COUNTS, strict=False):
                for row in range(start, min(count, len(observed))):
                    actual, cut = int(train.response_tokens.iloc[row]), bool(train.censored.iloc[row])
                    predictor.observe(observed[row], actual, censored=cut, time_s=START_S + STEP_S * row)
                quantiles = np.array([p.quantiles(LEVELS) for p in predictor.predict_batch(wanted)])
                found[f"after {count}"].append(score(quantiles[:, 1], quantiles[:, 2], tokens))
            advance(1)
    return found


def summary(found: dict[str, list[dict[str, float]]], samples: int, seed: int) -> dict[str, Any]:
    """Means over LLMs with 95 % intervals; errors as ratios to the better of the predictors trained on the LLM, too."""
    rng = np.random.default_rng(seed)
    num = len(found["constant"])
    draws = rng.integers(0, num, (samples, num))
    mae = {arm: np.array([one["mae"] for one in scores]) for arm, scores in found.items()}
    best = min((arm for arm in mae if arm.endswith("trained on it")), key=lambda arm: mae[arm].mean())
    rows: dict[str, Any] = {}
    for arm, scores in found.items():
        ratios = mae[arm][draws].mean(axis=1) / mae[best][draws].mean(axis=1)
        rows[arm] = {
            "mae": float(mae[arm].mean()),
            "mae_ci": np.quantile(mae[arm][draws].mean(axis=1), [0.025, 0.975]).tolist(),
            "mae_vs_trained": float(mae[arm].mean() / mae[best].mean()),
            "mae_vs_trained_ci": np.quantile(ratios, [0.025, 0.975]).tolist(),
            "better_than_constant": float((mae[arm] < mae["constant"]).mean()),
        }
        if "coverage" in scores[0]:
            coverage = np.array([one["coverage"] for one in scores])
            rows[arm] |= {
                "coverage_90": float(coverage.mean()),
                "coverage_90_ci": np.quantile(coverage[draws].mean(axis=1), [0.025, 0.975]).tolist(),
                "llms_within_3_points": float((np.abs(coverage - 0.9) <= 0.03).mean()),
            }
    return {"llms": num, "trained": best, "arms": rows}


def show(result: dict[str, Any]) -> None:
    """Print the summary."""
    table = Table("arm", "MAE", "vs trained on it", "95 %", "90 % covers", "LLMs better than the constant",
                  title=f"{result['llms']} LLMs that the predictor does not know")  # fmt: skip
    for arm, row in result["arms"].items():
        low, high = row["mae_vs_trained_ci"]
        covers = f"{row['coverage_90']:.1%}" if "coverage_90" in row else "-"
        table.add_row(arm, f"{row['mae']:.1f}", f"{row['mae_vs_trained']:.3f}", f"{low:.3f} to {high:.3f}", covers,
                      f"{row['better_than_constant']:.0%}")  # fmt: skip
    console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A saved predictor on LLMs that it does not know.")
    parser.add_argument("artifact", help="a saved or packaged predictor")
    parser.add_argument("lengths", type=Path, help="parquet file of lengths")
    parser.add_argument("--llms", type=int, default=40, help="how many LLMs, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap samples")
    parser.add_argument("--output", type=Path, help="JSON file of the summary and every LLM's scores")
    arguments = parser.parse_args(argv)
    predictor = LengthPredictor.from_pretrained(arguments.artifact, cache_size=4096)
    found = measure(predictor, arguments.lengths, arguments.llms, arguments.seed)
    result = summary(found, arguments.samples, arguments.seed)
    show(result)
    if arguments.output:
        command = (
            f"python tests/bench/unseen_llm.py {arguments.artifact} {arguments.lengths.name} --llms {arguments.llms}"
        )
        arguments.output.write_text(
            json.dumps({"command": command, **result, "scores": found}, indent=1) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()
