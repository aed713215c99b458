"""Evaluating a saved predictor on any data: `mope evaluate`.

Beside the predictor stand baselines without fine-tuning, fitted on the training rows of the same data: what one
would have without it. Knows folders, data sets and baselines; what is measured is in `evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mope import artifact
from mope.console import console, working
from mope.errors import ConfigError, DataError
from mope.files import make_output_folder, room_for
from mope.flags import NONE
from mope.predictor import LengthPredictor
from mope.provenance import shortened
from mope.training.baselines import default_baselines, fit_and_predict
from mope.training.batches import encode_rows
from mope.training.config import Baseline
from mope.training.data.build import DataSet, build_rows, resolve_label_tokenizer
from mope.training.data.config import DataConfig
from mope.training.data.public import is_modern
from mope.training.evaluate import Evaluation, EvaluationRows, draw, evaluate_mope
from mope.training.evaluate_observed import evaluate_observed
from mope.training.report import print_metrics
from mope.training.routing import collect

BASELINES: tuple[Baseline, ...] = ("constant", "prompt_length", "previous_answers", "lexical_gbm", "tfidf_ridge")
MIN_TRAIN_ROWS, MIN_VALIDATION_ROWS = 100, 20  # that baselines are fitted on


def named_baselines(names: str | None) -> tuple[str, ...]:
    """Baselines as typed: names between commas, `none`, or nothing for all.

    Raises:
        ConfigError: a name that is none of `BASELINES`.
    """
    if names is None:
        return BASELINES
    chosen = tuple(name.strip() for name in names.split(",") if name.strip() not in ("", NONE))
    unknown = [name for name in chosen if name not in BASELINES]
    if unknown:
        raise ConfigError(f"--baselines: got {', '.join(unknown)}; expected {', '.join(BASELINES)} or {NONE}")
    return chosen


def evaluate_artifact(
    folder: str | Path,
    data: DataConfig,
    output: Path | None = None,
    *,
    baselines: Sequence[str] = BASELINES,
    observe: Sequence[int] = (),
    samples: int = 1000,
    device: str = "cpu",
) -> dict[str, Any]:
    """Evaluate a saved predictor on the test split of a data set: `mope evaluate`.

    Lengths are counted with the tokenizer that the predictor was trained for.

    Args:
        folder: the saved predictor.
        data: where rows come from; the split rule makes its test rows disjoint from training rows of the same source.
        output: folder for `metrics.json` and plots, None to write nothing.
        baselines: names of baselines to fit on the data's training rows, of those in `BASELINES`.
        observe: numbers of answers of each LLM to observe before test rows are predicted, see
            `evaluate_observed.evaluate_observed`; without any, this is done for sets of modern LLMs alone, cold.
        samples: bootstrap samples.
        device: where the predictor runs.

    Returns:
        What `metrics.json` holds.

    Raises:
        ArtifactError: the predictor can't be loaded.
        ConfigError: `output` can't be written, or a saved predictor or the data would be lost by it.
        DataError: no test rows.
    """
    if output is not None:
        make_output_folder(output, names=("metrics.json",), reads={"--data": data.source})
    predictor = LengthPredictor.from_pretrained(folder, device=device)
    data = data.model_copy(update={"label_tokenizer": predictor.config.label_tokenizer, "min_rows": 0})
    cache = data.cache_dir / "tokenizers" / predictor.config.tokenizer_sha256[:16]
    found = build_rows(resolve_label_tokenizer(data, predictor.encoder.tokenizer_json(), cache))
    console().print(f"{folder} is run by {predictor.backend_reason}", highlight=False, soft_wrap=True)
    evaluation, rows = evaluate_on(predictor, found, samples=samples, baselines=baselines)
    if observe or is_modern(data.source):
        evaluation.metrics["observed"] = evaluate_observed(predictor, found.rows, observe, samples=samples)
    if output is not None:
        with working("drawing plots"), room_for(f"--output {output}"):
            artifact.write_json(output / "metrics.json", evaluation.metrics)
            draw(evaluation, rows, output / "plots")
        console().print(f"metrics and plots are in {output}")
    return evaluation.metrics


def evaluate_on(
    predictor: LengthPredictor, data: DataSet, *, samples: int, baselines: Sequence[str] = ()
) -> tuple[Evaluation, EvaluationRows]:
    """Evaluate a predictor on the test rows of a data set, beside baselines fitted on its training rows."""
    tables = {name: data.rows.split(name) for name in ("train", "validation", "test")}
    if len(tables["test"]) < 2:
        raise DataError(f"{data.report.source} has {len(tables['test'])} test rows; evaluation needs at least 2")
    rows = EvaluationRows.of(tables["test"], encode_rows(tables["test"], predictor.encoder, "encoding test rows"))
    raw = collect(predictor.backend, rows.encoded, predictor.config.num_experts, "predicting test rows")
    evaluation = evaluate_mope(predictor, rows, raw, samples=samples)
    evaluation.metrics["data"] = shortened(data.report.to_json())
    if baselines:
        num_train, num_validation = len(tables["train"]), len(tables["validation"])
        if num_train < MIN_TRAIN_ROWS or num_validation < MIN_VALIDATION_ROWS:
            console().print(
                f"no baselines: {num_train:,} training and {num_validation:,} validation rows are too few to fit them "
                f"(needed: {MIN_TRAIN_ROWS} and {MIN_VALIDATION_ROWS})"
            )
            return evaluation, rows
        chosen = [one for one in default_baselines(None) if one.name in baselines]
        fitted = fit_and_predict(chosen, tables["train"], tables["validation"], tables["test"], console=console())
        for name, one in fitted.items():
            evaluation.add(name, rows, one.predicted, samples=samples, seconds=one.seconds)
    return evaluation, rows


def show(found: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print metrics: as tables on stderr's console, or as JSON on stdout."""
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print_metrics(found, console())
