"""What a fit leaves on the disk while it runs: checkpoints that are whole, logs and times of all its parts.

Knows files, and Lightning's hooks for them; does not know what is trained.
"""

from __future__ import annotations

import csv
import errno
import os
import shlex
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mope.errors import ConfigError
from mope.files import opened, replaced, room_for


class Spent(Callback):
    """How long a fit took, all its parts together; what a part did after its last checkpoint is not counted."""

    def __init__(self) -> None:
        self._before, self._started = 0.0, time.monotonic()
        self.first_step = 0

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + time.monotonic() - self._started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where this part begins."""
        self.first_step = trainer.global_step

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self._before = state_dict["seconds"]


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written beside the one before and then take its place: a full disk leaves that as it is."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            ConfigError: the disk is full or read-only.
        """
        target = Path(path)
        with room_for(f"the checkpoint {target}"):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with replaced(target) as whole, whole.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
            except RuntimeError as error:  # torch's own words for a write that failed
                if shutil.disk_usage(target.parent).free < sum(map(_bytes, checkpoint.get("state_dict", {}).values())):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
                raise


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def check_checkpoint(path: Path) -> None:
    """Refuse a damaged checkpoint before Lightning reads it.

    Raises:
        ConfigError: it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        damaged = str(error)
    if damaged is not None:
        raise ConfigError(
            f"the checkpoint {path} is damaged ({damaged}); type rm {shlex.quote(str(path))} and then --resume: this "
            "network is trained from its start again, and those that are finished stay"
        )


def read_log(log: Path) -> list[dict[str, str]]:
    """What earlier parts of a fit logged, which Lightning would delete."""
    if not log.exists():
        return []
    with log.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def join_logs(log: Path, earlier: list[dict[str, str]], first_step: int) -> None:
    """Put what earlier parts logged, up to the checkpoint that was gone on from, before what this one logged."""
    if not earlier:
        return
    rows = [row for row in earlier if int(row["step"]) < first_step] + read_log(log)
    names = sorted({name for row in rows for name in row})
    with opened(log, newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
