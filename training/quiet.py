"""Silence for what other libraries say that helps nobody who trains a predictor.

The one place for it; nothing happens until `quiet` is called, and errors are never hidden.
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib import import_module
from typing import Any

LIGHTNING_WARNINGS = (
    ".*does not have many workers",  # rows lie in memory, there is nothing to load
    "Checkpoint directory .* exists and is not empty",  # the point of --resume
    "Experiment logs directory .* exists and is not empty",
    "You're resuming from a checkpoint that ended",
    ".*LeafSpec.* is deprecated",
    "You defined a `validation_step` but have no `val_dataloader`",  # a plan measures training alone
    "The number of training batches .* is smaller than the logging interval",
)


def quiet() -> None:
    """Hush Lightning's tips and device lines, transformers' bars and report on weights, and the Hub's retries.

    Downloads keep their bars: they are long, and a user wants to see them.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # set at all, it no longer warns about subprocesses
    for name in ("lightning.pytorch", "lightning.fabric"):
        import_module(name)  # sets its own level
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in LIGHTNING_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # each retry; the failure is told anyway
    from huggingface_hub.utils.tqdm import enable_progress_bars

    transformers_logging: Any = import_module("transformers.utils.logging")  # has no types
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    enable_progress_bars()
