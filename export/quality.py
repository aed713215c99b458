"""What an exported predictor is worth on real test rows, beside PyTorch, and how fast it answers.

Through the whole predictor: router, experts, mixture, calibration. Knows predictors and rows; not how graphs are made
or where they are kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from mope.artifact import read_json
from mope.console import console
from mope.errors import ConfigError, ExportError, MissingExtraError, UserError
from mope.export.precisions import Inputs
from mope.flags import NONE
from mope.grid import Array, quantiles_at
from mope.metrics import point_metrics, quantile_metrics
from mope.mixture import assemble
from mope.predictor import LengthPredictor
from mope.provenance import cpu_model, shortened
from mope.request import Request
from mope.training.batches import encode_rows
from mope.training.data.build import build_rows, resolve_label_tokenizer
from mope.training.data.config import DataConfig
from mope.training.data.table import RowTable
from mope.training.evaluate import EvaluationRows
from mope.training.routing import collect

MAX_COST = 0.01  # of the mean absolute error, that a precision may add
LEVELS = (0.5, 0.9)
NUM_CALIBRATION_ROWS, CALIBRATION_BATCH_ROWS = 256, 16
NUM_LATENCY_REQUESTS, NUM_WARM_UP = 200, 5
# settings that say where rows are, and nothing of which are used: --data names another place
PLACE = {"source", "data_format", "hub_config", "hub_split", "hub_revision"}
OF_TRAINING_MACHINE = {"num_workers", "cache_dir", "min_rows"}


@dataclass(frozen=True)
class RealRows:
    """Rows that an export is calibrated and judged on.

    Attributes:
        source: where they are from.
        fingerprint: of the data set.
        train: a sample of training rows, for the ranges of activations.
        test: a sample of test rows whose answers were not cut.
    """

    source: str
    fingerprint: str
    train: RowTable
    test: RowTable

    def calibration_batches(self, predictor: LengthPredictor) -> list[Inputs]:
        """Training rows as the network reads them, rows of like length together."""
        encoded = encode_rows(self.train, predictor.encoder, "encoding training rows")
        batches = [encoded.requests(rows) for rows in encoded.by_length(CALIBRATION_BATCH_ROWS)]
        return [(*batch.padded(encoded.pad_id), batch.numbers_BF, batch.llm_B) for batch in batches]

    def latency_requests(self) -> list[Request]:
        """Test requests to time."""
        return self.test.take(np.arange(min(len(self.test), NUM_LATENCY_REQUESTS))).requests()


def find_rows(folder: Path, predictor: LengthPredictor, source: str | None, max_test_rows: int) -> RealRows:
    """Rows to judge an export by: the predictor's own data set, or another one read in the same way.

    Args:
        folder: of the artifact; its provenance says what it was trained on.
        predictor: of the artifact.
        source: of other rows, as `mope-train --data` takes it; None for the predictor's own.
        max_test_rows: rows of the test split to draw at most.

    Raises:
        ConfigError: the rows can't be had.
        MissingExtraError: reading the source needs a package that is not installed.
    """
    config, trained = _data_config(folder, predictor, source)
    instead = f"type --data FILE for other rows, or --data {NONE} to export without this check"
    try:
        cache = config.cache_dir / "tokenizers" / predictor.config.tokenizer_sha256[:16]
        data = build_rows(resolve_label_tokenizer(config, predictor.encoder.tokenizer_json(), cache))
    except MissingExtraError:
        raise
    except UserError as error:
        raise ConfigError(f"no rows to check the quality on: {error}; {instead}") from error
    if trained not in (None, data.fingerprint):
        console().print(
            f"[yellow]warning:[/] {config.source} gives other rows than the predictor was trained on", highlight=False
        )
    train, test = data.rows.split("train"), data.rows.split("test")
    rng = np.random.default_rng(0)
    chosen = [
        np.sort(rng.permutation(np.flatnonzero(~table.censored))[:limit])
        for table, limit in ((train, NUM_CALIBRATION_ROWS), (test, max_test_rows))
    ]
    if len(chosen[1]) < 2:
        raise ConfigError(
            f"{config.source} has {len(chosen[1])} test rows with a whole answer; at least 2 are needed: {instead}"
        )
    return RealRows(shortened(config.source), data.fingerprint, train.take(chosen[0]), test.take(chosen[1]))


def _data_config(folder: Path, predictor: LengthPredictor, source: str | None) -> tuple[DataConfig, str | None]:
    """Settings to read rows with; for the predictor's own data also the fingerprint that it was trained on, if known.

    Without `source` they are those of training; with it they say no more of where the rows are.
    """
    path = folder / "provenance.json"
    provenance = read_json(path) if path.exists() else {}
    settings: dict[str, Any] = dict(provenance.get("config", {}).get("data", {}))
    if source is None and not settings:
        raise ConfigError(
            f"{folder} does not say what it was trained on (provenance.json); type --data FILE with rows to check the "
            f"quality on, or --data {NONE} to export without this check"
        )
    trained = provenance.get("data", {}).get(settings.get("source")) if source is None else None
    left_out = OF_TRAINING_MACHINE | (PLACE if source is not None else set())
    settings = {name: value for name, value in settings.items() if name not in left_out}
    settings |= {"label_tokenizer": predictor.config.label_tokenizer, "min_rows": 0}
    if source is not None:
        settings["source"] = source
    try:
        return DataConfig.model_validate(settings), trained
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{path}: config.data.{'.'.join(map(str, first['loc']))}: {first['msg']}; it was written by another mope: "
            f"train anew, or type --data {NONE} to export without a check of the quality"
        ) from error


@dataclass(frozen=True)
class Outcome:
    """What a predictor says of test rows.

    Attributes:
        quantiles_NQ: predicted tokens at `LEVELS`.
        expert_N: the expert that each row is routed to.
    """

    quantiles_NQ: Array
    expert_N: Array


def outcome(predictor: LengthPredictor, rows: EvaluationRows) -> Outcome:
    """What a predictor says of test rows, with its backend."""
    description = f"predicting test rows with {predictor.backend.name}"
    raw = collect(predictor.backend, rows.encoded, predictor.config.num_experts, description)
    result = assemble(
        predictor.config, predictor.router, predictor.calibration, raw, rows.encoded.rule_hits, rows.has_history
    )
    edges = np.asarray(predictor.config.edges)
    return Outcome(quantiles_at(edges, result.cdf_BE, np.array(LEVELS)), result.route_BK.argmax(axis=1))


def measure_quality(reference: LengthPredictor, exported: LengthPredictor, rows: RealRows) -> dict[str, Any]:
    """Errors, ranking and coverage of an exported predictor beside those of PyTorch in float32, on the same rows.

    Returns:
        `num_rows`; of the exported predictor `mae` (of the median, in tokens), `tau` (Kendall's) and `coverage_90`
        (share of answers up to the 90 % quantile); the same of PyTorch with `_fp32`; `same_expert`, the share of rows
        that both route to the same expert; and which `data` it was.
    """
    test = EvaluationRows.of(rows.test, encode_rows(rows.test, reference.encoder, "encoding test rows"))
    tokens_N = rows.test.response_tokens
    before, after = outcome(reference, test), outcome(exported, test)
    return {
        "num_rows": len(tokens_N),
        **_numbers(tokens_N, after.quantiles_NQ, ""),
        **_numbers(tokens_N, before.quantiles_NQ, "_fp32"),
        "same_expert": float((before.expert_N == after.expert_N).mean()),
        "data": rows.source,
        "data_sha256": rows.fingerprint,
    }


def _numbers(tokens_N: Array, quantiles_NQ: Array, suffix: str) -> dict[str, float]:
    points = point_metrics(tokens_N, quantiles_NQ[:, LEVELS.index(0.5)])
    coverage = quantile_metrics(tokens_N, quantiles_NQ, LEVELS)["coverage"]
    return {
        f"mae{suffix}": points["mae"],
        f"tau{suffix}": points["kendall_tau"],
        f"coverage_90{suffix}": coverage["0.9"],
    }


def check_quality(precision: str, quality: dict[str, Any]) -> None:
    """Refuse a precision that costs too much.

    Args:
        precision: its name.
        quality: what `measure_quality` found.

    Raises:
        ExportError: the mean absolute error is more than `MAX_COST` above that of PyTorch in float32.
    """
    mae, before = quality["mae"], quality["mae_fp32"]
    if not mae <= before * (1.0 + MAX_COST):
        raise ExportError(
            f"{precision} raises the mean absolute error on {quality['num_rows']:,} test rows from {before:.2f} to "
            f"{mae:.2f} tokens ({mae / before - 1 if before else np.inf:+.1%}); at most {MAX_COST:+.0%} is allowed. "
            "Nothing was changed; take a higher precision"
        )


def measure_latency(predictor: LengthPredictor, requests: Sequence[Request], num_threads: int) -> dict[str, Any]:
    """Time single requests, one after the other, from text to distribution.

    Args:
        predictor: with the backend to measure.
        requests: real ones.
        num_threads: threads of each call, for the record.

    Returns:
        Percentiles of wall-clock time in milliseconds: `p50_ms`, `p90_ms`, `p99_ms`; and what they were taken on.
    """
    for request in requests[:NUM_WARM_UP]:
        predictor.predict_batch([request])
    seconds = []
    for request in requests:
        started = time.perf_counter()
        predictor.predict_batch([request])
        seconds.append(time.perf_counter() - started)
    p50, p90, p99 = (round(float(value), 3) for value in 1000 * np.percentile(seconds, [50, 90, 99]))
    return {
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "num_requests": len(requests),
        "num_threads": num_threads,
        "cpu": cpu_model(),
    }
