"""What a predictor is worth on test rows: metrics, breakdowns, plots; both ways of counting, side by side.

`mope` is end-to-end routed, what a server gets. `mope_oracle_routed` sends each row to the expert of its true
bucket: the number that the literature sometimes reports, and that no server can reach. Knows predictors and
rows; trains nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mope import metrics
from mope.backends import RawOutputs
from mope.config import PredictorConfig
from mope.errors import DataError
from mope.grid import Array, quantiles_at
from mope.mixture import Assembled, assemble, expert_probabilities
from mope.predictor import LengthPredictor
from mope.router import PARTS, parts_key
from mope.training import plots
from mope.training.batches import EncodedRows
from mope.training.data.table import RowTable
from mope.training.routing import COMBINATIONS, buckets, collect, medians

LEVELS = metrics.QUANTILES
CURVE_LEVELS = tuple(np.round(np.arange(0.05, 1.0, 0.05), 2))
MIN_LABEL_ROWS = 20  # rows that a language or an LLM needs for a line of its own
NUM_FAILURES = 5


@dataclass(frozen=True)
class EvaluationRows:
    """Test rows with their truth.

    Attributes:
        table: the rows.
        encoded: the same rows, encoded.
        has_history: False on first turns of a conversation.
        known: rows whose answer was not cut; the others have no truth to compare with.
    """

    table: RowTable
    encoded: EncodedRows
    has_history: Array
    known: Array

    @classmethod
    def of(cls, table: RowTable, encoded: EncodedRows) -> EvaluationRows:
        """Test rows of a table and its encoding."""
        return cls(table, encoded, has_history(table), ~table.censored)

    def parts(self) -> dict[str, Array]:
        """Positions of the rows of each part that is reported; a part without rows is left out."""
        masks = {"first_turn": self.known & self.table.first_turn, "all_turns": self.known}
        return {name: np.flatnonzero(mask) for name, mask in masks.items() if mask.sum() > 1}


def has_history(table: RowTable) -> Array:
    """True where the conversation already has an answer, shape (rows,)."""
    return np.asarray(table.table["num_earlier_turns"].to_numpy() > 0)


def evaluate_points(
    rows: EvaluationRows, predicted: Array, *, samples: int, quantiles_NQ: Array | None = None
) -> dict[str, Any]:
    """Metrics of one predictor on each part of the test rows."""
    return {
        part: metrics.evaluate(
            rows.table.response_tokens[where],
            predicted[where],
            rows.table.groups[where],
            quantiles_NQ=None if quantiles_NQ is None else quantiles_NQ[where],
            num_samples=samples,
        )
        for part, where in rows.parts().items()
    }


@dataclass(frozen=True)
class Evaluation:
    """Metrics and the arrays that plots are drawn from.

    Attributes:
        metrics: what `metrics.json` holds.
        predictions: predictor -> predicted tokens of all test rows.
        quantiles_NQ: MoPE's quantiles at `LEVELS`.
        curve_NQ: MoPE's quantiles at `CURVE_LEVELS`.
    """

    metrics: dict[str, Any]
    predictions: dict[str, Array]
    quantiles_NQ: Array
    curve_NQ: Array

    def add(
        self, name: str, rows: EvaluationRows, predicted: Array, *, samples: int, seconds: float | None = None
    ) -> None:
        """Add another predictor, its paired difference to MoPE, and the seconds that fitting it took."""
        self.predictions[name] = predicted
        if seconds is not None:
            self.metrics.setdefault("baseline_seconds", {})[name] = round(seconds, 1)
        for part, values in evaluate_points(rows, predicted, samples=samples).items():
            self.metrics["test"][part][name] = values
            where = rows.parts()[part]
            self.metrics["mope_minus"].setdefault(part, {})[name] = metrics.paired_difference(
                rows.table.response_tokens[where],
                self.predictions["mope"][where],
                predicted[where],
                rows.table.groups[where],
            )


def evaluate_mope(predictor: LengthPredictor, rows: EvaluationRows, raw: RawOutputs, *, samples: int) -> Evaluation:
    """Everything about MoPE itself: end-to-end and oracle-routed errors, router, calibration, breakdowns."""
    config, edges = predictor.config, np.asarray(predictor.config.edges)
    result = _assemble(predictor, rows, raw)
    quantiles_NQ = quantiles_at(edges, result.cdf_BE, np.array(LEVELS))
    predicted = quantiles_NQ[:, LEVELS.index(0.5)]
    tokens, known = rows.table.response_tokens, rows.known
    bucket = buckets(tokens, np.asarray(config.boundaries))
    own_BM = expert_probabilities(raw.heads_BKN, np.asarray(config.tail_shares))[np.arange(len(tokens)), bucket]
    own_BE = np.concatenate([np.zeros((len(own_BM), 1)), np.cumsum(own_BM, axis=1)], axis=1)
    oracle = medians(config, own_BE / own_BE[:, -1:])
    mope = evaluate_points(rows, predicted, samples=samples, quantiles_NQ=quantiles_NQ)
    oracle_routed = evaluate_points(rows, oracle, samples=samples)
    if not mope:
        raise DataError("no test rows with a complete answer; give more data")
    found: dict[str, Any] = {
        "test": {part: {"mope": mope[part], "mope_oracle_routed": oracle_routed[part]} for part in mope},
        "mope_minus": {},
        "router": _router_metrics(predictor, rows, raw, result, bucket),
        "combination": {
            "used": config.combination,
            "test_mae": {
                name: _mean_error(rows, medians(config, _assemble(predictor, rows, raw, combination=name).cdf_BE))
                for name in COMBINATIONS
            },
        },
        "by_length": metrics.by_bucket(
            tokens[known], predicted[known], [*config.boundaries, edges[config.num_body_bins]]
        ),
        "by_expert": dict(
            sorted(metrics.by_label(tokens[known], predicted[known], _expert_labels(config, result, known)).items())
        ),
        "failures": _failures(rows, predicted, quantiles_NQ[:, LEVELS.index(0.9)]),
    }
    for name, labels in (
        ("by_dataset", rows.table.strings("dataset")),
        ("by_language", _languages(rows.table)),
        ("by_target_llm", rows.table.strings("target_llm")),
    ):
        named = [label or "unknown" for label, is_known in zip(labels, known, strict=True) if is_known]
        counts = Counter(named)
        named = [label if counts[label] >= MIN_LABEL_ROWS else "others" for label in named]
        if len(set(named)) > 1:
            found[name] = metrics.by_label(tokens[known], predicted[known], named)
    curve_NQ = quantiles_at(edges, result.cdf_BE, np.array(CURVE_LEVELS))
    return Evaluation(found, {"mope": predicted, "mope_oracle_routed": oracle}, quantiles_NQ, curve_NQ)


def predicted_medians(predictor: LengthPredictor, rows: EvaluationRows, description: str) -> Array:
    """Median of each row in tokens by a predictor whose encoding the rows have, shape (rows,)."""
    raw = collect(predictor.backend, rows.encoded, predictor.config.num_experts, description)
    return medians(predictor.config, _assemble(predictor, rows, raw).cdf_BE)


def _assemble(predictor: LengthPredictor, rows: EvaluationRows, raw: RawOutputs, **options: Any) -> Assembled:
    return assemble(
        predictor.config,
        predictor.router,
        predictor.calibration,
        raw,
        rows.encoded.rule_hits,
        rows.has_history,
        **options,
    )


def _expert_labels(config: PredictorConfig, result: Assembled, known: Array) -> list[str]:
    return [config.expert_names[expert] for expert in result.route_BK.argmax(axis=1)[known]]


def _mean_error(rows: EvaluationRows, predicted: Array) -> float:
    return float(np.abs(predicted - rows.table.response_tokens)[rows.known].mean())


def _router_metrics(
    predictor: LengthPredictor, rows: EvaluationRows, raw: RawOutputs, result: Assembled, bucket: Array
) -> dict[str, Any]:
    """Accuracy, confusion, and what each set of parts would have given with the same experts."""
    num_experts, known = predictor.config.num_experts, rows.known
    chosen = result.route_BK.argmax(axis=1)
    confusion = np.zeros((num_experts, num_experts), dtype=int)
    np.add.at(confusion, (bucket[known], chosen[known]), 1)
    router: dict[str, Any] = {
        "accuracy": float((chosen == bucket)[known].mean()),
        "confusion": confusion.tolist(),
        "expert_names": list(predictor.config.expert_names),
        "ablation": {},
    }
    if num_experts == 1:
        return router
    for key in ["prior", *predictor.router.combiners]:
        parts = [part for part in PARTS if part in key.split("+")]
        changed = _assemble(predictor, rows, raw, parts=parts)
        probability = changed.route_BK[np.arange(len(bucket)), bucket]
        router["ablation"][parts_key(parts)] = {
            "accuracy": float((changed.route_BK.argmax(axis=1) == bucket)[known].mean()),
            "log_loss": float(-np.log(np.maximum(probability, 1e-12))[known].mean()),
            "mae_end_to_end": _mean_error(rows, medians(predictor.config, changed.cdf_BE)),
        }
    return router


def _failures(rows: EvaluationRows, predicted: Array, high: Array) -> list[dict[str, Any]]:
    """The largest errors to either side; lengths alone, since prompts may not be quoted."""
    tokens = rows.table.response_tokens
    error = np.where(rows.known, predicted - tokens, 0.0)
    order = np.argsort(error, kind="stable")
    worst = [*order[:NUM_FAILURES], *order[::-1][:NUM_FAILURES]]
    chars = [len(text) for text in rows.table.take(np.array(worst)).strings("prompt")]
    return [
        {
            "actual": int(tokens[row]),
            "predicted": float(predicted[row]),
            "quantile_90": float(high[row]),
            "prompt_chars": num_chars,
        }
        for row, num_chars in zip(worst, chars, strict=True)
    ]


def _languages(table: RowTable) -> list[str]:
    """The data's own word for each row's language, else what py3langid reads off the prompt."""
    import py3langid

    known = table.strings("language")
    prompts = table.strings("prompt")
    return [word or py3langid.classify(prompt[:400])[0] for word, prompt in zip(known, prompts, strict=True)]


def draw(
    evaluation: Evaluation, rows: EvaluationRows, folder: Path, logs: Mapping[str, Path] | None = None
) -> list[str]:
    """Draw all plots into a folder; their file names in the order of the card."""
    folder.mkdir(parents=True, exist_ok=True)
    known, tokens = rows.known, rows.table.response_tokens
    low, high = LEVELS.index(0.1), LEVELS.index(0.9)
    quantiles = evaluation.quantiles_NQ[known]
    plots.predicted_vs_true(
        tokens[known],
        evaluation.predictions["mope"][known],
        folder / "predicted_vs_true.png",
        low_N=quantiles[:, low],
        high_N=quantiles[:, high],
    )
    coverage = (tokens[known][:, None] <= evaluation.curve_NQ[known]).mean(axis=0)
    plots.calibration_curve(CURVE_LEVELS, coverage, int(known.sum()), folder / "calibration.png")
    shown = {name: values[known] for name, values in evaluation.predictions.items() if name != "mope_oracle_routed"}
    plots.error_by_length(tokens[known], shown, folder / "error_by_length.png")
    names = ["predicted_vs_true.png", "calibration.png", "error_by_length.png"]
    router = evaluation.metrics["router"]
    if len(router["confusion"]) > 1:
        plots.router_confusion(router["confusion"], router["expert_names"], folder / "router_confusion.png")
        names.append("router_confusion.png")
    for part, results in evaluation.metrics["test"].items():
        if len(results) > 2:
            title = f"{part.replace('_', ' ')}s" if part == "first_turn" else part.replace("_", " ")
            plots.baselines_bar(results, folder / f"predictors_{part}.png", title=title)
            names.append(f"predictors_{part}.png")
    for name, log in (logs or {}).items():
        if log.exists():
            plots.training_curves(log, folder / f"training_{name}.png", title=f"Training of {name}: loss against steps")
            names.append(f"training_{name}.png")
    return names
