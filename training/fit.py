"""Training of one network with Lightning: steps, schedule, checkpoints, early stopping, an orderly Ctrl-C.

Knows networks, objectives and batches; does not know what a network is for. Several GPUs and nodes work by
Lightning's own strategies.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_model as load_file
from safetensors.torch import save_model as save_file
from torch import Tensor

from mope.backends.network import MopeNetwork
from mope.backends.static_encoder import StaticEncoder
from mope.console import console
from mope.errors import MopeError
from mope.features import LLM_NUMBERS, OPTIONAL_NUMBERS
from mope.files import replaced, write_text
from mope.target_llm import LlmTable
from mope.training.batches import BucketLoader, EncodedRows, padded_width
from mope.training.checkpoints import Spent, WholeCheckpoints, check_checkpoint, join_logs, read_log
from mope.training.config import FitConfig
from mope.training.objectives import Labels, Loss
from mope.training.progress import ProgressLines, WholeRun
from mope.training.work import is_helper

# gate logits, head logits, labels, and if there is a teacher its mixture and gate -> loss
Objective = Callable[..., Loss]
TEACHER = ("teacher_mix_BN", "teacher_gate_BK")


class TrainingInterruptedError(MopeError):
    """Ctrl-C ended a fit; its checkpoint is saved and the run can be resumed."""


class FitModule(L.LightningModule):
    """A network, its objective and its optimiser.

    Args:
        network: what is trained.
        objective: its loss.
        config: learning rates and schedule.
        total_steps: optimiser steps of the whole fit, for the schedule.
        length_chunks: forward passes that a batch of mixed lengths is cut into, for less padding.
        target_llms: names of the LLMs with an embedding, see `mope.target_llm.LlmTable`; None to forget none of them.
    """

    def __init__(
        self,
        network: MopeNetwork,
        objective: Objective,
        config: FitConfig,
        total_steps: int,
        length_chunks: int = 1,
        target_llms: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.network, self._objective, self._config, self._total_steps = network, objective, config, total_steps
        self._length_chunks = length_chunks
        self._llm_parents = None if target_llms is None else torch.tensor(LlmTable(target_llms).parents())
        eager = getattr(network.encoder, "set_attn_implementation", None)
        if eager is not None and resolve_precision(config) == "bf16-mixed" and not torch.cuda.is_available():
            eager("eager")  # of which the backward pass takes half as long on a CPU
        if config.freeze_embeddings and not isinstance(network.encoder, StaticEncoder):  # which is nothing else
            network.encoder.get_input_embeddings().weight.requires_grad_(False)

    def _loss(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        gate_BK, heads_BKN = self._outputs(batch)
        taught = [batch[name] for name in TEACHER if name in batch]
        labels = Labels(*(batch[field.name] for field in fields(Labels)))
        loss = self._objective(gate_BK, heads_BKN, labels, *taught)
        training = stage == "train"
        logs = {f"{stage}/loss": loss.total, **{f"{stage}/{name}": part for name, part in loss.parts.items()}}
        self.log_dict(
            logs, on_step=training, on_epoch=not training, batch_size=int(batch["num_weighed"]), sync_dist=not training
        )
        if training:
            self.log("loss", loss.total, prog_bar=True, logger=False)
        return loss.total

    def _outputs(self, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Gate and heads of a batch; texts of like length go through the network together, each text once."""
        text_B = batch["text_B"]
        lengths_T = batch["attention_mask_BS"].new_zeros(int(text_B.max()) + 1)
        first_T = lengths_T.scatter_reduce(
            0, text_B, torch.arange(len(text_B), device=text_B.device), "amin", include_self=False
        )
        lengths_T = batch["attention_mask_BS"][first_T].sum(dim=1)
        order: list[Tensor] = []
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for texts in torch.argsort(lengths_T).chunk(self._length_chunks):
            place_T = torch.full_like(first_T, -1)
            place_T[texts] = torch.arange(len(texts), device=texts.device)
            rows = torch.nonzero(place_T[text_B] >= 0).squeeze(-1)
            width = padded_width(int(lengths_T[texts].max()))
            gate_BK, heads_BKN, _ = self.network(
                batch["input_ids_BS"][first_T[texts], :width],
                batch["attention_mask_BS"][first_T[texts], :width],
                batch["numbers_BF"][rows],
                batch["llm_B"][rows],
                place_T[text_B[rows]],
            )
            order.append(rows)
            found.append((gate_BK, heads_BKN))
        order_B = torch.cat(order)
        back_B = torch.argsort(order_B)
        gate, heads = (
            None if parts[0] is None else torch.cat([part for part in parts if part is not None])[back_B]
            for parts in zip(*found, strict=True)
        )
        return gate, heads

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """One optimiser step."""
        if self._llm_parents is not None:
            batch = without_some_llms(batch, self._llm_parents, self._config.llm_dropout)
            batch = without_some_flags(batch, self._config.flag_dropout)
        return self._loss(batch, "train")

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Loss on a batch of validation rows."""
        self._loss(batch, "validation")

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the norm to 1. Lightning refuses to beside a fused optimiser, though bf16 and fp32 scale nothing."""
        if self.trainer.strategy.root_device.type == "cpu":
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        else:
            self.clip_gradients(optimizer, 1.0, "norm")

    def configure_optimizers(self) -> Any:
        """AdamW, the heads at their own rate, linear warm-up and cosine decay."""
        config = self._config
        encoder = [p for p in self.network.encoder.parameters() if p.requires_grad]
        known = {id(p) for p in self.network.encoder.parameters()}
        rest = [p for p in self.network.parameters() if id(p) not in known]
        groups = [{"params": encoder, "lr": config.learning_rate}, {"params": rest, "lr": config.head_learning_rate}]
        fused = self.trainer.strategy.root_device.type == "cpu"  # much faster there; elsewhere Lightning clips
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)
        warmup = max(1, round(config.warmup_share * self._total_steps))

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = min((step - warmup) / max(1, self._total_steps - warmup), 1.0)
            return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def without_some_llms(batch: dict[str, Tensor], parents: Tensor, share: float) -> dict[str, Tensor]:
    """A batch where some rows don't say which LLM answers, so that one never seen before finds a trained place.

    A share of the rows become those of an unknown LLM, half of them without its size and kind, too; as many
    become those of the LLM's nearest known relative.

    Args:
        batch: see `EncodedRows.batch`.
        parents: index of the nearest relative of each LLM, see `mope.target_llm.LlmTable.parents`.
        share: see above.
    """
    if not share:
        return batch
    llm_B, numbers_BF = batch["llm_B"], batch["numbers_BF"]
    draw_B = torch.rand(len(llm_B), device=llm_B.device)
    relative_B = torch.where(draw_B < 2 * share, parents.to(llm_B.device)[llm_B], llm_B)
    is_llm_F = torch.zeros(numbers_BF.shape[1], dtype=torch.bool, device=llm_B.device)
    is_llm_F[list(LLM_NUMBERS)] = True
    hidden_BF = (draw_B < share / 2).unsqueeze(-1) & is_llm_F
    return {
        **batch,
        "llm_B": torch.where(draw_B < share, torch.zeros_like(llm_B), relative_B),
        "numbers_BF": numbers_BF.masked_fill(hidden_BF, 0.0),
    }


def without_some_flags(batch: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """A batch where a share of the rows doesn't say one of `OPTIONAL_NUMBERS`, drawn for each group by itself."""
    if not share:
        return batch
    numbers_BF = batch["numbers_BF"]
    hidden_BF = torch.zeros_like(numbers_BF, dtype=torch.bool)
    for group in OPTIONAL_NUMBERS:
        hidden_BF[:, list(group)] = (torch.rand(len(numbers_BF), device=numbers_BF.device) < share).unsqueeze(-1)
    return {**batch, "numbers_BF": numbers_BF.masked_fill(hidden_BF, 0.0)}


class _Rows(L.LightningDataModule):
    """Loaders of the rows, one share per rank."""

    def __init__(self, train: EncodedRows, validation: EncodedRows, config: FitConfig, pool_batches: int) -> None:
        super().__init__()
        self._train, self._validation, self._config, self._pool = train, validation, config, pool_batches

    def train_dataloader(self) -> BucketLoader:
        """Shuffled batches of like length."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return BucketLoader(
            self._train,
            self._config.batch_size,
            seed=self._config.seed,
            pool_batches=self._pool,
            rank=rank,
            world_size=world_size,
        )

    def val_dataloader(self) -> BucketLoader:
        """All validation rows on every rank, so that the loss is exact."""
        return BucketLoader(self._validation, 2 * self._config.batch_size, shuffle=False)


class _OrderlyInterrupt(Callback):
    """The first Ctrl-C (or SIGTERM) saves a checkpoint after the current batch; the second ends at once."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self.asked = False
        self._previous: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            console().print("[yellow]saving a checkpoint after this batch; again to stop at once[/]")

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, stop)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Save and leave, if asked to; after the last batch the fit ends by itself, its validation done."""
        if self.asked and trainer.global_step < trainer.max_steps:
            trainer.save_checkpoint(self._checkpoint)
            raise TrainingInterruptedError(f"stopped at step {trainer.global_step}, saved; add --resume to go on")

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _RunningAverage(WeightAveraging):
    """The mean of the weights of all steps, and from `1 / (1 - decay)` steps on their exponential moving average."""

    def __init__(self, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, num_averaged: Tensor) -> Tensor:
            kept = (num_averaged / (num_averaged + 1.0)).clamp(max=decay)
            return averaged.lerp(current, (1.0 - kept).to(averaged.dtype))

        super().__init__(use_buffers=False, avg_fn=average)


@dataclass(frozen=True)
class FitResult:
    """What a fit left behind.

    Attributes:
        validation_loss: loss on the validation rows of the weights kept.
        num_steps: optimiser steps taken.
        seconds: wall time of the training, also of earlier calls that were stopped and resumed.
        csv: Lightning's log of losses.
    """

    validation_loss: float
    num_steps: int
    seconds: float
    csv: Path


def native_bf16() -> bool:
    """Whether the hardware multiplies bfloat16 itself, so that bf16 helps."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(flag in flags.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def resolve_precision(config: FitConfig) -> Any:
    """Lightning's precision for `auto`."""
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if native_bf16() else "32-true"


def _hardware(config: FitConfig) -> dict[str, Any]:
    return {
        "accelerator": config.accelerator,
        "devices": config.devices,
        "num_nodes": config.num_nodes,
        "strategy": config.strategy,
        "precision": resolve_precision(config),
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }


def world_size(config: FitConfig) -> int:
    """Processes that share the work of a fit."""
    trainer = L.Trainer(**_hardware(config), logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return int(trainer.world_size)


def fit(
    network: MopeNetwork,
    objective: Objective,
    train: EncodedRows,
    validation: EncodedRows,
    config: FitConfig,
    folder: Path,
    *,
    description: str,
    resume: bool = False,
    pool_batches: int = 50,
    length_chunks: int = 1,
    target_llms: Sequence[str] | None = None,
    whole: WholeRun | None = None,
) -> FitResult:
    """Train `network` in place; on return it holds the weights of the best validation run.

    Args:
        network: trained in place.
        objective: the loss.
        train: rows to learn from.
        validation: rows for early stopping.
        config: epochs, rates, devices.
        folder: checkpoints and logs go here.
        description: what is trained, for the progress line.
        resume: go on from the folder's last checkpoint, or return at once if the fit had finished.
        pool_batches: see `BucketLoader`.
        length_chunks: see `FitModule`.
        target_llms: see `FitModule`.
        whole: what the command does besides, for the time that is left.

    Raises:
        TrainingInterruptedError: Ctrl-C; `folder` holds a checkpoint to resume from.
    """
    per_epoch = max(1, -(-train.num_texts // (config.batch_size * world_size(config))))
    total_steps = max(1, round(config.epochs * per_epoch))
    weights, done, last = folder / "weights.safetensors", folder / "finished.json", folder / "last.ckpt"
    if resume and done.exists():
        load_file(network, weights)
        console().print(f"{description}: already trained, taken from {folder}")
        if whole is not None:
            whole.done(description)
        saved = json.loads(done.read_text())
        return FitResult(saved["validation_loss"], saved["num_steps"], saved["seconds"], folder / "csv" / "metrics.csv")
    checkpoint = str(last) if resume and last.exists() else None
    log, earlier = folder / "csv" / "metrics.csv", list[dict[str, str]]()
    if checkpoint is not None:
        check_checkpoint(last)
        earlier = read_log(log)
    elif folder.exists() and not is_helper():
        shutil.rmtree(folder)
    L.seed_everything(config.seed, verbose=False)
    averaging = [_RunningAverage(config.average_decay)] if config.average_decay else []
    best = ModelCheckpoint(
        folder,
        filename="best",
        monitor="validation/loss",
        save_weights_only=not averaging,  # of weights alone, Lightning would not save the average
        enable_version_counter=False,
    )
    every = timedelta(minutes=config.checkpoint_minutes)
    periodic = ModelCheckpoint(folder, filename="last", train_time_interval=every, enable_version_counter=False)
    lines = ProgressLines(description, total_steps, whole)
    bar = [RichProgressBar()] if console().is_terminal else []
    interrupt, spent = _OrderlyInterrupt(last), Spent()
    trainer = L.Trainer(
        **_hardware(config),
        max_steps=total_steps,
        max_epochs=-1,
        val_check_interval=max(1, min(per_epoch // config.checks_per_epoch, total_steps)),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=[
            CSVLogger(folder, name="csv", version="", flush_logs_every_n_steps=10),
            TensorBoardLogger(folder, name="tensorboard", version=""),
        ],
        plugins=[] if "deepspeed" in config.strategy else [WholeCheckpoints()],
        callbacks=[
            *averaging,
            spent,
            best,
            periodic,
            EarlyStopping("validation/loss", patience=config.patience),
            interrupt,
            *bar,
            lines,
        ],
        enable_progress_bar=console().is_terminal,
    )
    module = FitModule(network, objective, config, total_steps, length_chunks, target_llms)
    console().print(
        f"{description}: {len(train):,} rows, {total_steps:,} steps of {config.batch_size}, "
        f"precision {trainer.precision}"
    )
    network.train()
    try:
        trainer.fit(module, datamodule=_Rows(train, validation, config, pool_batches), ckpt_path=checkpoint)
    except SystemExit as ended:  # how Lightning ends on a KeyboardInterrupt
        raise KeyboardInterrupt from ended
    finally:
        interrupt.release()
        if trainer.is_global_zero:
            join_logs(log, earlier, spent.first_step)
    if best.best_model_path:
        state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state)
        loss = float(best.best_model_score) if best.best_model_score is not None else math.nan
    else:
        loss = math.nan
    network.to("cpu").eval()
    if whole is not None:
        whole.done(description)
    result = FitResult(loss, trainer.global_step, spent.seconds, log)
    if trainer.is_global_zero:
        with replaced(weights) as beside:
            save_file(network, str(beside))
        write_text(
            done, json.dumps({"validation_loss": loss, "num_steps": result.num_steps, "seconds": result.seconds})
        )
        for checkpoint_file in folder.glob("*.ckpt"):
            checkpoint_file.unlink()
    if interrupt.asked:
        raise TrainingInterruptedError(
            f"stopped after the last step, {trainer.global_step}, saved; add --resume to go on"
        )
    return result
