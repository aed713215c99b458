"""How far a run is: lines for logs and pipes, and how long the whole command will still take.

Knows steps and seconds; does not know what is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from mope.console import LOG_INTERVAL_S, console

EVALUATION, FROZEN = "evaluation", "baselines without fine-tuning"
FORWARD_SHARE = 1 / 3  # of the work of a training step, for a prediction


class WholeRun:
    """What a command has still to do, in optimiser steps that would take as long.

    Args:
        work: what it does, in this order, and the steps that each would be.
    """

    def __init__(self, work: Mapping[str, float]) -> None:
        self._left = dict(work)

    def done(self, name: str) -> None:
        """Take away what is done."""
        self._left.pop(name, None)

    def left_s(self, name: str, share: float, step_s: float) -> float:
        """Seconds that are left.

        Args:
            name: what is being done.
            share: of it that is done.
            step_s: seconds that a step takes.
        """
        return step_s * (sum(self._left.values()) - share * self._left.get(name, 0.0))


class ProgressLines(Callback):
    """One line every half minute, for logs and pipes; a terminal gets Lightning's bar, and a line for the whole run.

    Args:
        description: what is trained.
        total_steps: of it.
        whole: what else the command does, with this network under its description; None if nothing.
        every_s: seconds between two lines.
    """

    def __init__(
        self, description: str, total_steps: int, whole: WholeRun | None = None, every_s: float = LOG_INTERVAL_S
    ) -> None:
        self._description, self._total, self._whole, self._every_s = description, total_steps, whole, every_s
        self._rows = self._first_step = 0
        self._start = self._last = self._validated = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if one is due."""
        self._rows += len(batch["censored_B"])
        now = time.monotonic()
        if now - self._last < self._every_s or trainer.global_rank != 0:
            return
        self._last = now
        if console().is_terminal:
            return
        speed = self._rows / (now - self._start)
        loss = float(trainer.callback_metrics.get("loss", math.nan))
        console().print(
            f"{self._description}: step {trainer.global_step}/{self._total}, loss {loss:.3f}, "
            f"{speed:.0f} rows/s, {self._left(trainer.global_step)}",
            highlight=False,
            soft_wrap=True,
        )

    def _left(self, step: int) -> str:
        """How long this network and the whole command will still take, at the speed so far."""
        step_s = (time.monotonic() - self._start) / max(1, step - self._first_step)
        own = (self._total - step) * step_s
        if self._whole is None:
            return f"{minutes(own)} left"
        whole = max(own, self._whole.left_s(self._description, step / self._total, step_s))
        return f"{minutes(own)} of this network and {minutes(whole)} of the whole command left"

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that the clock stands still for a reason."""
        self._validated = self._last = time.monotonic()
        if trainer.global_rank == 0 and not trainer.sanity_checking and not console().is_terminal:
            console().print(f"{self._description}: step {trainer.global_step}, validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what validation gave."""
        if trainer.global_rank == 0 and "validation/loss" in trainer.callback_metrics:
            value = float(trainer.callback_metrics["validation/loss"])
            console().print(
                f"{self._description}: step {trainer.global_step}, validation loss {value:.4f}, "
                f"{self._left(trainer.global_step)}",
                highlight=False,
                soft_wrap=True,
            )

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Print a line if one is due."""
        now = time.monotonic()
        if now - self._last >= self._every_s and trainer.global_rank == 0 and not console().is_terminal:
            self._last = now
            console().print(
                f"{self._description}: step {trainer.global_step}, validating for {now - self._validated:.0f} s",
                highlight=False,
            )


def minutes(seconds: float) -> str:
    """A time that is left, in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 60 else "less than 1 min"
