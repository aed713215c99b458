"""Measures how well a saved predictor says what is still to come of answers that are being generated.

    python tests/bench/remaining.py runs/demo --data sharegpt

Each test row is predicted once, as a server would. Then its answer is stopped at some numbers of generated tokens (rows
that have ended by then are left out) and at some shares of its length. The median of `remaining` is compared with what
is left of the median from before generation, floored at 0 or at a constant that validation rows choose, and with the
median of what was left in training rows that ran as long. Numbers of generated tokens are what a scheduler sees; shares
know the true length, hence say where errors lie, while coverage and ranks at them mean little. Rows that were cut are
left out: what they had left is not known. Intervals resample conversations. Knows saved predictors and data sets;
trains nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mope import metrics
from mope.console import console, progress, run
from mope.errors import DataError
from mope.figures import MOPE_BLUE, OTHERS, figure_to
from mope.grid import Array
from mope.prediction_batch import TAIL_SHARE, PredictionBatch
from mope.predictor import LengthPredictor
from mope.provenance import collect
from mope.training.data.build import build_rows, resolve_label_tokenizer
from mope.training.data.config import DataConfig
from mope.training.data.table import RowTable

RESULTS = Path(__file__).parents[2] / "model_cards" / "results"
GENERATED = (0, 50, 100, 200, 400, 800)
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
LEVELS = (0.5, 0.9)
FLOORS = tuple(range(0, 405, 5))  # constants that are tried, in tokens
BATCH_ROWS = 64
TIMED_ROWS = 256
MIN_CONVERSATIONS = 5  # with rows that still run, below which a point says nothing
MOPE, NAIVE, FLOORED, TRAINING = "remaining", "median - generated", "at least a constant", "training rows"


@dataclass(frozen=True)
class Predicted:
    """Rows whose true length is known, with what was predicted before generation.

    Attributes:
        batch: the predictions.
        median: their medians in tokens, shape (rows,).
        tokens: true response tokens, shape (rows,).
        groups: the conversation of each row, shape (rows,).
    """

    batch: PredictionBatch
    median: Array
    tokens: Array
    groups: Array

    @classmethod
    def of(cls, predictor: LengthPredictor, table: RowTable, num_rows: int, description: str) -> Predicted:
        """Predict the rows of a table whose answers were not cut, or `num_rows` of them drawn at random (0: all)."""
        known = np.flatnonzero(~table.censored)
        if num_rows:
            known = np.sort(np.random.default_rng(0).permutation(known)[:num_rows])
        if len(known) < 2:
            raise DataError(f"{description}: {len(known)} rows with a complete answer; expected at least 2")
        rows = table.take(known)
        requests = rows.requests()
        order = np.argsort([len(request.prompt) for request in requests], kind="stable")
        found = []
        with progress(description, len(order)) as advance:
            for start in range(0, len(order), BATCH_ROWS):
                batch = order[start : start + BATCH_ROWS]
                found += predictor.predict_batch([requests[row] for row in batch])
                advance(len(batch))
        stacked = PredictionBatch.of(found).take(np.argsort(order))
        return cls(stacked, stacked.median, rows.response_tokens.astype(np.float64), rows.groups)

    def still_running(self, generated_N: Array) -> Predicted:
        """The rows that are longer than what is generated, their batch conditioned on it."""
        where = np.flatnonzero(self.tokens > generated_N)
        batch = self.batch.take(where).remaining(generated_N[where])
        return Predicted(batch, self.median[where], self.tokens[where], self.groups[where])


def points(rows: Predicted) -> dict[str, Array]:
    """What is generated of each row, by the name of the point."""
    fixed = {f"{generated} tokens": np.full(len(rows.tokens), float(generated)) for generated in GENERATED}
    return fixed | {f"{100 * share:.0f} %": np.floor(share * rows.tokens) for share in SHARES}


def rest_of_training(sorted_tokens: Array, generated_N: Array) -> Array:
    """Median of what was left in training rows longer than what is generated, 0 where there is none; shape (rows,)."""
    first = np.searchsorted(sorted_tokens, generated_N, side="right")
    middle = np.minimum((first + len(sorted_tokens)) // 2, len(sorted_tokens) - 1)
    return np.asarray(np.maximum(sorted_tokens[middle] - generated_N, 0.0))


def best_floor(rows: Predicted) -> int:
    """The constant under which `median - generated` should not fall: least MAE, averaged over numbers of tokens."""
    errors = np.zeros(len(FLOORS))
    for generated in GENERATED:
        running = rows.still_running(np.full(len(rows.tokens), float(generated)))
        if len(running.tokens):
            naive, truth = running.median - generated, running.tokens - generated
            errors += [np.abs(np.maximum(naive, floor) - truth).mean() for floor in FLOORS]
    return FLOORS[int(errors.argmin())]


def measure_point(running: Predicted, guesses: dict[str, Array], samples: int) -> dict[str, Any]:
    """Errors, ranks, coverage and paired differences of all guesses at one point."""
    truth = running.tokens - running.batch.generated
    quantiles_NQ = running.batch.quantiles(LEVELS)
    found: dict[str, Any] = {
        MOPE: metrics.evaluate(
            truth, quantiles_NQ[:, 0], running.groups, quantiles_NQ=quantiles_NQ, levels=LEVELS, num_samples=samples
        )
    }
    for name, guess in guesses.items():
        found[name] = metrics.evaluate(truth, guess, running.groups, num_samples=samples)
        found[f"{MOPE} minus {name}"] = metrics.paired_difference(truth, quantiles_NQ[:, 0], guess, running.groups)
    return {
        "num_rows": len(truth),
        "num_conversations": len(np.unique(running.groups)),
        "median_left": float(np.median(truth)),
        "in_pareto_tail": int((running.batch.survival <= TAIL_SHARE).sum()),
        "predictors": found,
    }


def measure(test: Predicted, floor: int, training_tokens: Array, samples: int) -> dict[str, Any]:
    """All points but those at which rows of too few conversations still run."""
    found = {}
    for name, generated_N in points(test).items():
        running = test.still_running(generated_N)
        num_conversations = len(np.unique(running.groups))
        if num_conversations < MIN_CONVERSATIONS:
            console().print(f"{name}: rows of {num_conversations} conversations still run; left out")
            continue
        out_N = running.batch.generated
        naive = running.median - out_N
        guesses = {
            NAIVE: np.maximum(naive, 0.0),
            FLOORED: np.maximum(naive, floor),
            TRAINING: rest_of_training(training_tokens, out_N),
        }
        found[name] = measure_point(running, guesses, samples)
    return found


def timings(batch: PredictionBatch) -> dict[str, float]:
    """Microseconds of each call for `TIMED_ROWS` rows, the least of several rounds."""
    rows = batch.take(np.arange(TIMED_ROWS) % len(batch))
    generated_B = np.random.default_rng(0).integers(0, 800, TIMED_ROWS)
    rest = rows.remaining(generated_B)
    calls = {
        "remaining": lambda: rows.remaining(generated_B),
        "remaining, median and 90 % quantile": lambda: rows.remaining(generated_B).quantiles(LEVELS),
        "mean": lambda: rest.mean,
        "cdf": lambda: rest.cdf(100),
        "take": lambda: rows.take(generated_B > 100),
    }
    return {name: round(min(timeit.repeat(call, number=20, repeat=10)) / 20 * 1e6, 1) for name, call in calls.items()}


def table(found: dict[str, Any], floor: int) -> Table:
    """The result for a terminal: MAE in tokens with 95 % intervals, coverage, and ranks of what is left."""
    names = (MOPE, NAIVE, FLOORED, TRAINING)
    drawn = Table(title=f"MAE of what is left in tokens (95 % interval); the constant is {floor} tokens")
    heads = ("generated", "rows", *names, "≤ q90", f"tau {MOPE}", f"tau {NAIVE}")
    for head in heads:
        drawn.add_column(head, justify="left" if head == "generated" else "right")
    for point, values in found.items():
        by_name = values["predictors"]
        errors = [
            f"{by_name[n]['mae']:.1f} ({by_name[n]['mae_ci'][0]:.1f}-{by_name[n]['mae_ci'][1]:.1f})" for n in names
        ]
        ranks = [f"{by_name[n]['kendall_tau']:.3f}" for n in (MOPE, NAIVE)]
        covered = f"{by_name[MOPE]['coverage']['0.9']:.1%}"
        drawn.add_row(point, f"{values['num_rows']:,}", *errors, covered, *ranks)
    return drawn


def draw(found: dict[str, Any], path: Path) -> None:
    """MAE and tau against generated tokens, with 95 % intervals."""
    fixed = [(generated, found[f"{generated} tokens"]) for generated in GENERATED if f"{generated} tokens" in found]
    place = [generated for generated, _ in fixed]
    with figure_to(path, 9.0, 3.6) as figure:
        for axes, key, label in zip(
            figure.subplots(1, 2), ("mae", "kendall_tau"), ("MAE in tokens", "Kendall's tau"), strict=True
        ):
            for name, colour in zip((MOPE, NAIVE, FLOORED, TRAINING), (MOPE_BLUE, *OTHERS), strict=False):
                if key == "kendall_tau" and name == TRAINING:
                    continue  # orders nothing
                values = [point["predictors"][name] for _, point in fixed]
                low, high = zip(*(one[f"{key}_ci"] for one in values), strict=True)
                axes.plot(place, [one[key] for one in values], color=colour, marker="o", markersize=4, label=name)
                axes.fill_between(place, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set(xlabel="tokens generated so far", ylabel=f"{label} of what is left")
        figure.axes[0].set_title("What is left of answers that still run")
        figure.axes[0].legend()


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict, measure, print, write the dated result and its picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path, help="folder of a saved predictor")
    parser.add_argument("--data", default="sharegpt", help="data set whose test rows are predicted (default: sharegpt)")
    parser.add_argument("--target-llm", help="LLM that answered, where the data does not say")
    parser.add_argument("--rows", type=int, default=0, help="test rows, and validation rows, drawn at random (0: all)")
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap samples")
    parser.add_argument("--device", default="cpu", help="where the predictor runs")
    parser.add_argument("--output", type=Path, help="result (default: model_cards/results/DATE-remaining-NAME.json)")
    options = parser.parse_args(arguments)
    predictor = LengthPredictor.from_pretrained(options.artifact, device=options.device, cache_size=0)
    config = DataConfig(
        source=options.data,
        target_llm=options.target_llm,
        label_tokenizer=predictor.config.label_tokenizer,
        min_rows=0,
    )
    cache = config.cache_dir / "tokenizers" / predictor.config.tokenizer_sha256[:16]
    data = build_rows(resolve_label_tokenizer(config, predictor.encoder.tokenizer_json(), cache))
    training = data.rows.split("train")
    training_tokens = np.sort(training.response_tokens[~training.censored]).astype(np.float64)
    validation = Predicted.of(predictor, data.rows.split("validation"), options.rows, "predicting validation rows")
    test = Predicted.of(predictor, data.rows.split("test"), options.rows, "predicting test rows")
    floor = best_floor(validation)
    found = measure(test, floor, training_tokens, options.samples)
    microseconds = timings(test.batch)
    Console(width=180).print(table(found, floor))
    print(f"{TIMED_ROWS} rows, microseconds: {json.dumps(microseconds)}")
    today = datetime.date.today().isoformat()
    target = options.output or RESULTS / f"{today}-remaining-{options.artifact.resolve().name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "date": today,
        "predictor": options.artifact.resolve().name,
        "num_test_rows": len(test.tokens),
        "floor": floor,
        "tail_index": predictor.config.tail_index,
        "points": found,
        "microseconds": {"rows": TIMED_ROWS, "edges": len(test.batch.edges), **microseconds},
        "provenance": collect(["python", *sys.argv], 0, {options.data: data.fingerprint}),
    }
    target.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw(found, target.with_suffix(".png"))
    print(f"wrote {target} and {target.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
