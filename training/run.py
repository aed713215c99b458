"""`mope-train`: rows to networks to router to calibration to metrics to a saved predictor, in this order.

Knows the order of the work and what is written where. Checkpoints and logs lie in the work folder; the
predictor is written whole at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mope import artifact
from mope.artifact import weight_files
from mope.backends.torch_backend import TorchBackend
from mope.card import PROMPT, render_card, write_card
from mope.config import PredictorConfig
from mope.console import console, working
from mope.errors import ConfigError
from mope.mixture import assemble
from mope.predictor import LengthPredictor
from mope.provenance import collect as collect_provenance
from mope.provenance import shortened
from mope.training.batches import encode_rows
from mope.training.compare import compare
from mope.training.config import FitConfig, TrainConfig
from mope.training.data.build import build_rows, resolve_label_tokenizer
from mope.training.data.sources import Hub, open_source
from mope.training.data.table import RowTable
from mope.training.evaluate import EvaluationRows, draw, evaluate_mope, predicted_medians
from mope.training.evaluate_saved import evaluate_on
from mope.training.experts import train_mope
from mope.training.fit import FitResult, resolve_precision, world_size
from mope.training.licences import data_licences
from mope.training.prepare import Grid, Prepared, check_borders, prepare
from mope.training.progress import EVALUATION, FORWARD_SHARE, FROZEN, WholeRun
from mope.training.recipe import load_recipe
from mope.training.report import distinct_parts, metrics_markdown, print_metrics
from mope.training.routing import (
    choose_combination,
    collect,
    fit_calibration,
    fit_router,
    lookup_sample,
    marginal,
    medians,
)
from mope.training.rows import RunRows
from mope.training.teacher import Teacher, lessons
from mope.training.teachers import named_teachers
from mope.training.trunks import find_trunk, with_vocabulary
from mope.training.unknown_llms import llm_factors, unknown_llms, without_llms
from mope.training.work import begin, check_output, end, is_helper, locked

SPLITS = ("train", "validation", "test")
# settings that may differ when a run is resumed: they do not change what is trained
FREE_IN_MODEL = {"combination", "router_parts", "lookup_rows", "lookup_neighbours"}
FREE_IN_FIT = {"checkpoint_minutes", "accelerator", "devices", "num_nodes", "strategy", "precision"}


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        folder: the saved predictor.
        metrics: what its `metrics.json` holds.
    """

    folder: Path
    metrics: dict[str, Any]


def train(
    config: TrainConfig,
    output: Path,
    *,
    work: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> RunResult | None:
    """Train, calibrate, evaluate and save a predictor.

    Args:
        config: everything about it.
        output: folder of the saved predictor.
        work: folder of checkpoints and logs; `<output>.work` if None.
        resume: go on from the work folder's checkpoints.
        overwrite: replace a saved predictor in `output`, and unless `resume` throw away what the work folder holds.
        command: the command line, for the provenance.

    Returns:
        What was made; None in the helper processes of a distributed run.

    Raises:
        UserError: data, config or output that cannot be used, a predictor or an unfinished run that would be lost, or
            another run that uses the same folders.
        TrainingInterruptedError: Ctrl-C; `resume` goes on.
    """
    output = output.absolute() if output.name in ("", "..") else output
    work = work or output.with_name(output.name + ".work")
    check_borders(config.model)
    with locked(output, work):
        check_output(output, work, overwrite=overwrite, resume=resume)
        try:
            return _train(config, output, work, resume=resume, overwrite=overwrite, command=command)
        finally:
            with contextlib.suppress(OSError):  # the disk may be full: what ended the run is told
                end(work)


def _train(
    config: TrainConfig, output: Path, work: Path, *, resume: bool, overwrite: bool, command: Sequence[str]
) -> RunResult | None:
    """See `train`; both folders are locked."""
    if output.exists():
        console().print(f"the predictor in {output} will be replaced at the end", highlight=False)
    teachers = _teachers(config, output, resume=resume, overwrite=overwrite, command=command)
    teacher = teachers[0] if config.model.teacher is not None else None
    source = find_trunk(config.model, teacher)
    data = RunRows.read(config, source.tokenizer_json, work)
    for line in data.lines():
        console().print(line, highlight=False, soft_wrap=True)
    rows = sample(data.table, config)
    source = with_vocabulary(source, config.model, rows.split("train").strings("prompt"))
    grid = None if teacher is None else Grid.of(teacher.settings)
    prepared = prepare(rows, config.model, source, config.data.label_tokenizer, grid, config.fit.set_power)
    _say_plan(prepared, config)
    settings = config.model_dump(mode="json", exclude={"model": FREE_IN_MODEL, "fit": FREE_IN_FIT})
    shaping = {"rows": data.fingerprint, "model": settings["model"], "fit": settings["fit"]}
    goes_on = begin(work, shaping, command, resume=resume)
    if resume and not goes_on:
        console().print(f"nothing to resume in {work}: starting anew", highlight=False)
    if teachers:
        table = rows.split("train")
        of_each, own = data.sources_of(table), Grid.of(prepared.config)
        targets = lessons(teachers, teacher, table, of_each, data.fingerprints, own, config.data.cache_dir)
        prepared = replace(prepared, train=replace(prepared.train, targets=targets))
    whole = whole_run(prepared, config)
    networks, fits = train_mope(prepared, source, config.fit, work, resume=resume, teacher=teacher, whole=whole)
    if is_helper():
        return None
    predictor = finish(prepared, TorchBackend(networks, prepared.config, inference_device(config.fit)), config)
    tables = {name: rows.split(name) for name in SPLITS}
    test = EvaluationRows.of(tables["test"], prepared.test)
    samples = config.evaluation.bootstrap_samples
    raw = collect(predictor.backend, test.encoded, prepared.config.num_experts, "predicting test rows")
    with working("intervals of the errors, by bootstrap"):
        evaluation = evaluate_mope(predictor, test, raw, samples=samples)
    whole.done(EVALUATION)
    logs = dict(zip(_names(prepared.config), [fit.csv for fit in fits], strict=True))
    if teacher is not None:
        encoded = encode_rows(tables["test"], teacher.predictor.encoder, "encoding test rows for the teacher")
        seen = EvaluationRows.of(tables["test"], encoded)
        medians = predicted_medians(teacher.predictor, seen, "predicting test rows with the teacher")
        evaluation.add("teacher", test, medians, samples=samples)
    logs |= compare(evaluation, test, tables, prepared, source, config, work, resume=resume, whole=whole)
    metrics = evaluation.metrics
    metrics["data"] = shortened(data.main.report.to_json())
    apart = list(data.also)
    metrics["training"] = _training_metrics(prepared, fits)
    if config.test_data is not None:
        foreign = config.test_data.model_copy(update={"label_tokenizer": config.data.label_tokenizer, "min_rows": 0})
        apart.append(build_rows(resolve_label_tokenizer(foreign, source.tokenizer_json, work)))
    if apart:
        metrics["other_data"] = {
            shortened(other.report.source): evaluate_on(predictor, other, samples=samples)[0].metrics for other in apart
        }
    with artifact.writing(output, overwrite=overwrite) as folder:
        predictor.write(folder)
        parts = end(work)
        started = datetime.fromisoformat(parts[0]["started"])
        provenance = collect_provenance(parts[0]["command"], config.fit.seed, data.fingerprints, started=started)
        provenance["config"] = _settings(config)
        if len(parts) > 1:
            provenance["parts"] = parts
        artifact.write_json(folder / "metrics.json", metrics)
        artifact.write_json(folder / "provenance.json", provenance)
        with working("drawing plots"):
            drawn = draw(evaluation, test, folder / "plots", logs)
        sources = [one.source for one in (config.data, *config.also)]
        card = render_card(
            predictor.config.model_dump(mode="json"),
            metrics,
            provenance,
            [f"plots/{name}" for name in drawn],
            name=str(output),
            tables=metrics_markdown(metrics),
            report=[line for line in data.lines() if not line.startswith("warning: ")],
            warnings=[warning for one in (data.main, *data.also) for warning in one.report.warnings],
            licences=data_licences(sources),
            is_public=all(data_licences([source]) for source in sources),
            datasets=[one.source for one in (config.data, *config.also) if isinstance(open_source(one), Hub)],
        )
        write_card(folder, card)
    end(work, finished=True)
    LengthPredictor.from_pretrained(output).predict(PROMPT)  # what the card shows must run
    print_metrics(metrics, console(), short=True)
    for line in verdict(metrics):
        console().print(line, highlight=False, soft_wrap=True)
    console().print(
        f"predictor, card, metrics and plots are in [bold]{output}[/] (router, errors by length, language and LLM: its "
        f"README.md); checkpoints and logs in {work}",
        soft_wrap=True,
    )
    return RunResult(output, metrics)


def _teachers(
    config: TrainConfig, output: Path, *, resume: bool, overwrite: bool, command: Sequence[str]
) -> list[Teacher]:
    """The predictors that teach, if any are to: saved ones, or recipes', trained first beside `output`."""
    model, found = config.model, list[Teacher]()
    for position, named in enumerate(named_teachers(model)):
        console().print(named.line(), highlight=False, markup=False, soft_wrap=True)
        ending = "teacher" if position == 0 else f"teacher-{position + 1}"
        folder = named.folder
        if named.config is None:
            options = {"resume": resume, "overwrite": overwrite}
            folder = _trained_teacher(named.name, output, ending, config, command=command, **options)
        if folder.resolve() == output.resolve():
            raise ConfigError(f"--output {output} is the teacher itself, which would be replaced; choose another")
        teacher = Teacher(folder, model.num_layers, inference_device(config.fit))
        if named.gives_trunk:
            teacher.check(model, config.data.label_tokenizer)
        else:
            teacher.check_tokens(config.data.label_tokenizer)
        found.append(teacher)
    return found


def _trained_teacher(
    name: str, output: Path, ending: str, config: TrainConfig, *, resume: bool, overwrite: bool, command: Sequence[str]
) -> Path:
    """Where a teacher that is a recipe lies, after it was trained, unless it was before."""
    folder = output.with_name(f"{output.name}.{ending}")
    recipe = load_recipe(name, {"evaluation": {"fine_tuned": (), "baselines": ("constant",)}})
    if world_size(config.fit) > 1:
        raise ConfigError(
            f"on several devices a teacher is trained by itself: mope-train --recipe {name} --output {folder}, "
            f"then --teacher {folder}"
        )
    if not (folder / "files.json").exists():
        console().print(f"first the teacher: recipe {name}, into {folder}", highlight=False)
        train(recipe, folder, resume=resume, overwrite=overwrite, command=command)
    elif artifact.read_json(folder / "provenance.json").get("config") != _settings(recipe):
        raise ConfigError(f"{folder} was not trained as recipe {name} says; remove it, or type --teacher {folder}")
    else:
        console().print(f"the teacher, recipe {name}, is already trained: {folder}", highlight=False)
    return folder


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The config as the provenance keeps it: without folders of this machine."""
    local: Any = {"data": {"cache_dir"}, "also": {"__all__": {"cache_dir"}}, "test_data": {"cache_dir"}}
    kept: dict[str, Any] = shortened(config.model_dump(mode="json", exclude=local))
    return kept


def finish(prepared: Prepared, backend: TorchBackend, config: TrainConfig) -> LengthPredictor:
    """Fit router and calibration behind trained networks and choose the combination."""
    settings, num_experts = prepared.config, prepared.config.num_experts
    validation = prepared.validation
    outputs = collect(backend, validation, num_experts, "predicting validation rows")
    wants_lookup = "lookup" in settings.router_parts
    neighbours = lookup_sample(prepared.train, config.model.lookup_rows if wants_lookup else 1, config.fit.seed)
    neighbour_outputs = collect(backend, neighbours, num_experts, "embedding look-up rows")
    with working("fitting the router"):
        router = fit_router(settings, config.model, prepared.train, neighbours, neighbour_outputs, validation, outputs)
    history = prepared.validation_history
    if config.model.combination == "auto":
        errors = choose_combination(settings, router, validation, outputs, history)
        best = min(errors, key=errors.__getitem__)
        console().print(f"validation MAE: {', '.join(f'{n} {e:.2f}' for n, e in errors.items())}; using {best}")
    else:
        best = config.model.combination
    settings = settings.model_copy(update={"combination": best})
    calibration = fit_calibration(settings, router, validation, outputs, history)
    named = np.flatnonzero(validation.llm_R > 0)
    factors: list[float] = []
    if len(named):
        nameless, later = without_llms(validation.take(named)), history[named]
        blind = collect(backend, nameless, num_experts, "predicting without the LLM")
        result = assemble(settings, router, calibration, blind, nameless.rule_hits, later)
        factors = llm_factors(validation.take(named), medians(settings, result.cdf_BE))
    settings = settings.model_copy(update={"unknown_llms": unknown_llms(settings, factors)})
    return LengthPredictor(
        settings,
        TorchBackend(backend.networks, settings, inference_device(config.fit)),
        prepared.encoder,
        router,
        calibration,
        marginal(settings, prepared.train),
        thoughts=prepared.thoughts,
    )


def verdict(metrics: Mapping[str, Any]) -> list[str]:
    """How MoPE did against the best other predictor of each part, in a sentence each; what was left out."""
    lines: list[str] = []
    for part, found in distinct_parts(metrics["test"]).items():
        mope = found["mope"]["mae"]
        if "teacher" in found:
            taught = found["teacher"]["mae"]
            lines.append(
                f"{part.replace('_', ' ')}: MoPE's mean absolute error is {mope:.1f} tokens ({mope / taught - 1:+.1%} "
                f"beside its teacher's {taught:.1f})"
            )
        others = {name: found[name]["mae"] for name in found if name not in ("mope", "mope_oracle_routed", "teacher")}
        if not others:
            continue
        best = min(others, key=others.__getitem__)
        low, high = metrics["mope_minus"][part][best]["ci"]
        word = "better than" if high < 0 else "worse than" if low > 0 else "not told apart from"
        lines.append(
            f"{part.replace('_', ' ')}: MoPE's mean absolute error is {mope:.1f} tokens, {word} the best other, "
            f"{best.replace('_', ' ')} at {others[best]:.1f} (difference {mope - others[best]:+.1f}, 95 % interval "
            f"{low:+.1f} to {high:+.1f})"
        )
    rows = metrics["training"]["rows"]["test"]
    counted = max(found["mope"]["num_rows"] for found in metrics["test"].values())
    if counted < rows:
        lines.append(f"{rows - counted:,} of {rows:,} test rows have answers that were cut: their length is not known")
    return lines


def inference_device(fit: FitConfig) -> str:
    """Where a run's own predictions are made: on the GPU that it trains on, if any."""
    return "cuda" if fit.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


def sample(rows: RowTable, config: TrainConfig) -> RowTable:
    """The rows to use: all, or seeded samples of the sizes that the config names."""
    limits = {
        "train": config.fit.max_train_rows,
        "validation": config.evaluation.max_test_rows,
        "test": config.evaluation.max_test_rows,
    }
    if not any(limits.values()):
        return rows
    splits = np.array(rows.strings("split"), dtype=object)
    rng = np.random.default_rng(config.fit.seed)
    kept = [rng.permutation(np.flatnonzero(splits == name))[: limits[name]] for name in SPLITS]
    return rows.take(np.sort(np.concatenate(kept)))


def whole_run(prepared: Prepared, config: TrainConfig) -> WholeRun:
    """What a run does, in optimiser steps that take as long; see `mope.training.plan`, which measures instead."""
    fit, settings, size = config.fit, prepared.config, config.fit.batch_size * world_size(config.fit)
    # training multiplies in bf16 where the CPU can, predictions are made in 32 bits
    forward = 1.0 if inference_device(fit) == "cpu" and resolve_precision(fit) == "bf16-mixed" else FORWARD_SHARE
    validation = max(1.0, fit.epochs * fit.checks_per_epoch) * len(prepared.validation) * FORWARD_SHARE
    network = (fit.epochs * prepared.train.num_texts + validation) / size
    num_held_out = len(prepared.validation) + len(prepared.test)
    lookup = config.model.lookup_rows if "lookup" in settings.router_parts else 0
    names = _names(settings)
    work = {f"training {name}": network for name in names}
    work[EVALUATION] = len(names) * (num_held_out + lookup) * forward / fit.batch_size
    if "embedding_gbm" in config.evaluation.baselines:
        work[FROZEN] = (len(prepared.train) + num_held_out) * forward / fit.batch_size
    held_out = num_held_out * forward / fit.batch_size
    return WholeRun(work | {f"training {name}": network + held_out for name in config.evaluation.fine_tuned})


def _say_plan(prepared: Prepared, config: TrainConfig) -> None:
    settings = prepared.config
    console().print(
        f"{settings.num_experts} experts ({'; '.join(settings.expert_names)} tokens), {settings.design} design, "
        f"{settings.num_body_bins} bins up to {settings.edges[settings.num_body_bins]:.0f} tokens, then a Pareto tail "
        f"of index {settings.tail_index:.2f}",
        highlight=False,
        soft_wrap=True,
    )
    sizes = ", ".join(f"{name} {len(getattr(prepared, name)):,}" for name in SPLITS)
    console().print(
        f"rows used: {sizes}; {prepared.train.lengths.mean():.0f} input tokens on average",
        highlight=False,
        soft_wrap=True,
    )
    if config.fit.max_train_rows is not None:
        console().print(
            f"this is a sample of {config.fit.max_train_rows:,} training rows (--max-train-rows none trains on all)",
            highlight=False,
            soft_wrap=True,
        )


def _names(config: PredictorConfig) -> list[str]:
    return [name.removesuffix(".safetensors") for name in weight_files(config)]


def _training_metrics(prepared: Prepared, fits: Sequence[FitResult]) -> dict[str, Any]:
    named = zip(_names(prepared.config), fits, strict=True)
    return {
        "rows": {name: len(getattr(prepared, name)) for name in SPLITS},
        "networks": {
            name: {"validation_loss": fit.validation_loss, "num_steps": fit.num_steps, "seconds": fit.seconds}
            for name, fit in named
        },
    }
