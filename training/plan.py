"""`mope-train --dry-run`: what a run would read, how long it would take and how much memory it would need.

Counts rows, steps and parameters. Where it is asked to, it takes a few real optimiser steps on real rows, extrapolates
from them, and says which number is which. Writes nothing but the cache of rows, which the run itself then takes.
"""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from mope.artifact import weight_files
from mope.backends.network import MopeNetwork
from mope.console import console
from mope.training.batches import BucketLoader, EncodedRows
from mope.training.config import FitConfig, ModelConfig, TrainConfig
from mope.training.data.build import DataSet, build_rows, resolve_label_tokenizer
from mope.training.data.table import RowTable
from mope.training.encoders import Trunk
from mope.training.experts import expert_rows, new_network
from mope.training.fit import FitModule, resolve_precision
from mope.training.objectives import MopeObjective
from mope.training.prepare import Grid, Prepared, prepare
from mope.training.progress import FORWARD_SHARE
from mope.training.recipe import load_recipe
from mope.training.rows import RunRows
from mope.training.run import SPLITS, sample
from mope.training.teacher import Teacher
from mope.training.teachers import NamedTeacher, named_teachers
from mope.training.trunks import find_trunk, with_vocabulary

SAMPLE_ROWS = {"train": 4096, "validation": 512, "test": 64}  # encoded for the estimate
MEASURE_S = 8.0
WARMUP_STEPS = 2  # on the longest batch: not timed, but they reach the peak of memory
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """What the trial steps gave.

    Attributes:
        steps: optimiser steps that were timed.
        seconds: the time they took.
        tokens_per_s: input tokens, padding included, trained on one device.
        inference_tokens_per_s: the same without gradients, on the CPU.
        peak_bytes: peak of the process's memory.
        gpu_bytes: peak of the GPU's memory, 0 without one.
        hardware: device and precision.
        world_size: processes that the run would use.
    """

    steps: int
    seconds: float
    tokens_per_s: float
    inference_tokens_per_s: float
    peak_bytes: int
    gpu_bytes: int
    hardware: str
    world_size: int


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        teachers: a line about each predictor that teaches.
        reports: lines about further data sets as they were read; `mope data` shows the main one.
        num_rows: split -> rows that would be used.
        input_tokens: median and 90 % quantile of a row's input tokens.
        padded_tokens: mean input tokens of a training row, padding included.
        num_parameters: of one network.
        num_trained: those among them that training changes.
        measured: the trial steps; None: none were taken.
        stages: what takes long, with its seconds; empty without trial steps.
        memory_bytes: estimate of the run's peak memory; 0 without trial steps.
        batch_size: rows per step.
        epochs: passes over the training rows.
        num_steps: optimiser steps of one network that sees all training rows, on one device.
    """

    teachers: tuple[str, ...]
    reports: tuple[str, ...]
    num_rows: dict[str, int]
    input_tokens: tuple[float, float]
    padded_tokens: float
    num_parameters: int
    num_trained: int
    measured: Measured | None
    stages: tuple[tuple[str, float], ...]
    memory_bytes: float
    batch_size: int
    epochs: float
    num_steps: int

    @property
    def seconds(self) -> float:
        """Estimate of the run's time."""
        return sum(seconds for _, seconds in self.stages)

    def lines(self) -> list[str]:
        """The plan for a terminal."""
        median, high = self.input_tokens
        return [
            *self.teachers,
            *self.reports,
            "",
            f"rows used: {', '.join(f'{name} {count:,}' for name, count in self.num_rows.items())}",
            f"input tokens of a row: median {median:.0f}, 90% have at most {high:.0f} (measured on a sample)",
            f"a network: {self.num_parameters / 1e6:.1f} M parameters, {self.num_trained / 1e6:.1f} M of them trained",
            f"steps of a network: {self.num_steps:,} of {self.batch_size} rows ({self.epochs:g} epochs) on one device, "
            "if it does not stop early",
            *(self._no_time() if self.measured is None else self._times(self.measured)),
        ]

    @staticmethod
    def _no_time() -> list[str]:
        return ["time and memory: not measured; add --measure-speed to try some steps (half a minute)"]

    def _times(self, measured: Measured) -> list[str]:
        speed = measured.tokens_per_s / self.padded_tokens
        gpu = f", {measured.gpu_bytes / GIB:.1f} GiB on the GPU" if measured.gpu_bytes else ""
        width = max(len(name) for name, _ in self.stages)
        return [
            f"training speed: {speed:,.0f} rows/s on one device (measured: {measured.steps} steps of "
            f"{self.batch_size} rows in {measured.seconds:.1f} s, {measured.hardware})",
            "",
            f"time on {measured.world_size} device(s), extrapolated, if no network stops early:",
            *(f"  {name:<{width}}  {_duration(seconds):>9}" for name, seconds in self.stages),
            f"  {'in all':<{width}}  {_duration(self.seconds):>9}",
            "not in it: reading the data, baselines without an encoder, plots; of a student, training its teacher and "
            "asking it about every training row",
            f"memory: {measured.peak_bytes / GIB:.1f} GiB{gpu} at the peak of these steps (measured), "
            f"{self.memory_bytes / GIB:.1f} GiB with all rows and networks (extrapolated)",
        ]


def main_rows(config: TrainConfig) -> DataSet:
    """The rows of a run's main data set, few or unlearnable ones, too, their answers counted as the run counts them.

    Raises:
        UserError: data, encoder or tokenizer that can't be used.
    """
    encoder, _ = _trunk(config.model, named_teachers(config.model), config.data.label_tokenizer)
    with tempfile.TemporaryDirectory(prefix="mope-plan-") as folder:
        data = resolve_label_tokenizer(config.data, encoder.tokenizer_json, Path(folder))
        return build_rows(data, learnable=False)


def make_plan(config: TrainConfig, *, measure_s: float | None = None) -> Plan:
    """Read the data, count, and estimate the run's time if asked to.

    Args:
        config: of the run.
        measure_s: seconds to take optimiser steps for; None: take none, and estimate no time.

    Raises:
        UserError: data or config that the run could not use either.
    """
    model = config.model
    teachers = named_teachers(model)
    encoder, grid = _trunk(model, teachers, config.data.label_tokenizer)
    with tempfile.TemporaryDirectory(prefix="mope-plan-") as folder:
        read = RunRows.read(config, encoder.tokenizer_json, Path(folder))
        tested = [*read.also]
        if config.test_data is not None:
            foreign = config.test_data.model_copy(update={"min_rows": 0})
            tested.append(build_rows(resolve_label_tokenizer(foreign, encoder.tokenizer_json, Path(folder))))
    rows = sample(read.table, config)
    num_rows = {name: len(rows.split(name)) for name in SPLITS}
    if tested:
        num_rows["other test"] = sum(len(data.rows.split("test")) for data in tested)
    encoder = with_vocabulary(encoder, model, rows.split("train").strings("prompt"))
    few, power = _few(rows, config.fit.seed), config.fit.set_power
    prepared = prepare(few, model, encoder, config.data.label_tokenizer, grid, power)
    network = _network(prepared, encoder, config.fit)
    num_parameters = sum(p.numel() for p in network.parameters())
    measured = None if measure_s is None else _measure(network, prepared, config.fit, measure_s)
    num_trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    lengths = prepared.train.lengths
    row_bytes = lengths.mean() * 4 + prepared.train.numbers_RF[0].nbytes + 300
    further = 4 * num_parameters * (len(weight_files(prepared.config)) - 1)
    padded = _padded_tokens(prepared.train, config.fit)
    return Plan(
        teachers=tuple(teacher.line() for teacher in teachers),
        reports=tuple(line for found in tested for line in found.report.lines()),
        num_rows=num_rows,
        input_tokens=(float(np.median(lengths)), float(np.quantile(lengths, 0.9))),
        padded_tokens=padded,
        num_parameters=num_parameters,
        num_trained=num_trained,
        measured=measured,
        stages=tuple(_stages(config, prepared, num_rows, measured, padded)) if measured else (),
        memory_bytes=measured.peak_bytes + further + row_bytes * sum(num_rows.values()) if measured else 0.0,
        batch_size=config.fit.batch_size,
        epochs=config.fit.epochs,
        num_steps=math.ceil(config.fit.epochs * math.ceil(num_rows["train"] / config.fit.batch_size)),
    )


def _trunk(model: ModelConfig, teachers: Sequence[NamedTeacher], label_tokenizer: str) -> tuple[Trunk, Grid | None]:
    """The trunk and its teacher's grid; a teacher that is still to be trained lends its encoder alone."""
    for other in teachers:
        if other.config is not None and not other.gives_trunk:
            Teacher(other.folder).check_tokens(label_tokenizer)
    first = next((teacher for teacher in teachers if teacher.gives_trunk), None)
    if first is None or first.config is None:
        lender = None if first is None or model.encoder is not None else load_recipe(first.name).model
        origin = lender or model
        settled = model.model_dump(include={"preset", "num_layers", "static_size", "static_filters"})
        return find_trunk(origin.model_copy(update=settled)), None
    teacher = Teacher(first.folder, model.num_layers)
    teacher.check(model, label_tokenizer)
    return find_trunk(model, teacher), Grid.of(teacher.settings)


def _few(rows: RowTable, seed: int) -> RowTable:
    """At most `SAMPLE_ROWS` of each split."""
    splits, rng = np.array(rows.strings("split"), dtype=object), np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(splits == name))[:limit] for name, limit in SAMPLE_ROWS.items()]
    return rows.take(np.sort(np.concatenate(kept)))


def _network(prepared: Prepared, encoder: Trunk, fit: FitConfig) -> MopeNetwork:
    """The shared network, or one of the separate experts."""
    config = prepared.config
    shared = config.design == "shared"
    return new_network(
        encoder,
        config,
        fit,
        gate=shared and config.num_experts > 1,
        num_heads=config.num_experts if shared else 1,
    )


def _padded_tokens(rows: EncodedRows, fit: FitConfig) -> float:
    """Mean input tokens that a row costs, padding included; rows that share a text share its tokens."""
    lengths, text_R = rows.lengths, rows.text_R
    batches = BucketLoader(rows, fit.batch_size, seed=fit.seed).batches(0)
    return float(sum(len(np.unique(text_R[batch])) * lengths[batch].max() for batch in batches) / len(rows))


def _measure(network: MopeNetwork, prepared: Prepared, fit: FitConfig, seconds: float) -> Measured:
    """Train for some seconds, then predict for a quarter of them."""
    rows, config = prepared.train, prepared.config
    batches = BucketLoader(rows, fit.batch_size, seed=fit.seed).batches(0)
    longest = max(batches, key=lambda batch: (rows.lengths[batch].max(), len(batch)))
    objective = MopeObjective(list(config.edges[: config.num_body_bins + 1]), list(config.boundaries))
    options: dict[str, Any] = {
        "accelerator": fit.accelerator, "precision": resolve_precision(fit), "logger": False, "barebones": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    whole = L.Trainer(**options, devices=fit.devices, num_nodes=fit.num_nodes, strategy=fit.strategy)
    clock = _Clock(seconds)
    trainer = L.Trainer(
        **options,
        devices=1,
        max_epochs=1,
        max_steps=WARMUP_STEPS + len(batches),
        limit_val_batches=0,
        callbacks=[clock],
    )
    device = trainer.strategy.root_device
    console().print(f"measuring {seconds:.0f} s of training on {device} ...", highlight=False)
    ready: Any = [rows.batch(batch) for batch in [longest] * WARMUP_STEPS + batches]
    module = FitModule(network.train(), objective, fit, total_steps=1000)
    trainer.fit(module, DataLoader(ready, batch_size=None))
    on_gpu = device.type == "cuda"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(
        steps=clock.steps,
        seconds=clock.elapsed,
        tokens_per_s=clock.tokens / clock.elapsed,
        inference_tokens_per_s=_inference_speed(network, rows, batches, seconds / 4),
        peak_bytes=peak,
        gpu_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
        hardware=f"{torch.cuda.get_device_name(device) if on_gpu else device.type}, {trainer.precision}",
        world_size=whole.world_size,
    )


@torch.inference_mode()
def _inference_speed(network: MopeNetwork, rows: EncodedRows, batches: Sequence[Any], seconds: float) -> float:
    network.to("cpu").eval()
    started, tokens = time.perf_counter(), 0
    for positions in batches:
        batch = rows.batch(positions)
        network(batch["input_ids_BS"], batch["attention_mask_BS"], batch["numbers_BF"], batch["llm_B"])
        tokens += batch["input_ids_BS"].numel()
        if time.perf_counter() - started > seconds:
            break
    return tokens / (time.perf_counter() - started)


class _Clock(Callback):
    """Times steps after the warm-up and ends the trial."""

    def __init__(self, seconds: float) -> None:
        self.steps = self.tokens = 0
        self.elapsed = 0.0
        self._seconds, self._started = seconds, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock after the warm-up; end the epoch when the time is over."""
        if batch_idx == WARMUP_STEPS:
            _finish_queued(trainer)
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step."""
        if batch_idx < WARMUP_STEPS:
            return
        _finish_queued(trainer)
        self.steps += 1
        self.tokens += (int(batch["text_B"].max()) + 1) * batch["input_ids_BS"].shape[1]
        self.elapsed = time.perf_counter() - self._started
        trainer.should_stop = self.elapsed > self._seconds


def _finish_queued(trainer: L.Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()


def _stages(
    config: TrainConfig, prepared: Prepared, num_rows: dict[str, int], measured: Measured, padded: float
) -> list[tuple[str, float]]:
    """What takes long, and how long."""
    fit, settings, evaluation = config.fit, prepared.config, config.evaluation
    train_speed = measured.world_size * measured.tokens_per_s / padded
    checks = max(1.0, fit.epochs * fit.checks_per_epoch)

    def training(share: float = 1.0) -> float:
        work = fit.epochs * num_rows["train"] + checks * num_rows["validation"] * FORWARD_SHARE * measured.world_size
        return share * work / train_speed

    shares = [1.0]
    if settings.design == "separate":
        own = [expert_rows(prepared.train, settings.boundaries, k, fit.overlap) for k in range(settings.num_experts)]
        shares += [len(rows) / len(prepared.train) for rows in own]
    names = [name.removesuffix(".safetensors") for name in weight_files(settings)]
    stages = [(f"training {name} of MoPE", training(share)) for name, share in zip(names, shares, strict=True)]
    stages += [(f"training {name}", training()) for name in evaluation.fine_tuned]

    def inference(rows: int) -> float:
        return rows * float(prepared.train.lengths.mean()) / measured.inference_tokens_per_s

    test = num_rows["test"] + num_rows.get("other test", 0)
    lookup = min(config.model.lookup_rows, num_rows["train"]) if "lookup" in settings.router_parts else 0
    stages.append(
        ("router, calibration and test of MoPE", len(names) * inference(num_rows["validation"] + lookup + test))
    )
    if evaluation.fine_tuned:
        tested = inference(num_rows["validation"] + num_rows["test"])
        stages.append(("test of the fine-tuned baselines", len(evaluation.fine_tuned) * tested))
    if "embedding_gbm" in evaluation.baselines:
        stages.append(("embeddings for embedding_gbm", inference(sum(num_rows[name] for name in SPLITS))))
    return stages


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
