"""Measures training rows per second: mope-train's pipeline against a plain loop, same encoder, same rows, on the CPU.

    python tests/bench/train_throughput.py --rows 256 --rounds 5

The plain loop is the usual recipe, as in SSJF: every prompt padded to 512 tokens, batches of 16 in random order,
float32, all parameters trained with AdamW, L1 loss of one output. mope-train runs with the defaults of its recipes:
what stands in the window alone, batches of like length, bfloat16 where the hardware has it, fused AdamW, frozen token
embeddings, and the whole loss of gate and experts, driven by Lightning. Both tokenise before the clock starts. They
take turns in one process, the order reversed every other round. Measures speed, not how well either learns.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mope.console import console
from mope.grid import Array
from mope.provenance import collect
from mope.training.batches import BucketLoader
from mope.training.config import FitConfig, ModelConfig
from mope.training.data.build import DataSet, build_rows
from mope.training.data.config import DataConfig
from mope.training.data.table import RowTable
from mope.training.encoders import EncoderSource, find_encoder
from mope.training.experts import new_network
from mope.training.fit import FitModule, resolve_precision
from mope.training.objectives import MopeObjective
from mope.training.prepare import Prepared, prepare

RESULTS = Path(__file__).parents[2] / "model_cards" / "results"
PLAIN_TOKENS, PLAIN_BATCH, PLAIN_RATE = 512, 16, 5e-5
FEW_ROWS = 8  # of validation and test, which `prepare` wants and nothing here uses
WARM_UP_ROWS = 32

# an arm trains on rows at some positions and returns the seconds that took
Run = Callable[[Array], float]


@dataclass
class Arm:
    """One way to train, and what was measured of it."""

    description: str
    padded_tokens_per_row: float
    run: Run
    seconds: list[float] = field(default_factory=list)

    def rows_per_s(self, num_rows: int) -> list[float]:
        """Speed in each round."""
        return [num_rows / seconds for seconds in self.seconds]


class PlainRegressor(nn.Module):
    """An encoder with one linear output on the first token."""

    def __init__(self, source: EncoderSource) -> None:
        super().__init__()
        self.encoder = source.load()
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)

    def forward(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Predicted length in units of the mean length, shape (B,)."""
        hidden_BSH = self.encoder(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        output_B: Tensor = self.head(hidden_BSH[:, 0])[:, 0]
        return output_B


def plain_loop(rows: RowTable, source: EncoderSource) -> Arm:
    """The usual recipe, without anything that makes it fast."""
    tokenizer = source.tokenizer()
    tokenizer.enable_truncation(PLAIN_TOKENS)
    tokenizer.enable_padding(length=PLAIN_TOKENS, pad_id=source.special_ids[2])
    encoded = tokenizer.encode_batch(rows.strings("prompt"))
    ids_RS, mask_RS = (torch.tensor([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    target_R = torch.tensor(rows.response_tokens / rows.response_tokens.mean(), dtype=torch.float32)
    model = PlainRegressor(source).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PLAIN_RATE)

    def run(positions: Array) -> float:
        chosen = torch.from_numpy(positions)
        loader = DataLoader(TensorDataset(ids_RS[chosen], mask_RS[chosen], target_R[chosen]), PLAIN_BATCH, shuffle=True)
        started = time.perf_counter()
        for ids_BS, mask_BS, target_B in loader:
            loss = F.l1_loss(model(ids_BS, mask_BS), target_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - started

    description = f"padded to {PLAIN_TOKENS}, batch {PLAIN_BATCH}, float32, all parameters, AdamW"
    return Arm(description, float(PLAIN_TOKENS), run)


class _Clock(Callback):
    """Seconds from the first step to the last, without Lightning's set-up."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._started


def mope_train(
    prepared: Prepared, source: EncoderSource, folder: Path, settings: FitConfig, *, pool_batches: int = 50
) -> Arm:
    """What `mope-train` does between two validation runs."""
    config = prepared.config
    network = new_network(source, config, settings, gate=True, num_heads=config.num_experts)
    edges = list(config.edges[: config.num_body_bins + 1])
    objective = MopeObjective(edges, list(config.boundaries))
    precision = resolve_precision(settings)
    rounds = 0

    def run(positions: Array) -> float:
        nonlocal rounds
        rounds += 1
        clock = _Clock()
        loader = BucketLoader(
            prepared.train.take(positions), settings.batch_size, seed=rounds, pool_batches=pool_batches
        )
        trainer = L.Trainer(
            accelerator="cpu",
            precision=precision,
            max_epochs=1,
            logger=CSVLogger(folder, name=None),
            log_every_n_steps=10,
            callbacks=[clock],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(FitModule(network.train(), objective, settings, len(loader)), train_dataloaders=loader)
        return clock.seconds

    lengths = prepared.train.lengths
    plan = BucketLoader(prepared.train, settings.batch_size, pool_batches=pool_batches).batches(epoch=0)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in plan) / len(lengths)
    window = f"window {config.max_prompt_tokens}+{config.max_context_tokens}"
    order = "batches of like length" if pool_batches > 1 else "random batches"
    embeddings = "frozen" if settings.freeze_embeddings else "trained"
    description = f"{window}, {order} of {settings.batch_size}, {precision}, embeddings {embeddings}, fused AdamW"
    return Arm(description, round(padded, 1), run)


def sample(data: DataSet, num_rows: int) -> RowTable:
    """Random training rows, and a few of the other splits."""
    splits = np.array(data.rows.strings("split"), dtype=object)
    rng = np.random.default_rng(0)
    wanted = {"train": num_rows, "validation": FEW_ROWS, "test": FEW_ROWS}
    return data.rows.take(
        np.concatenate([rng.permutation(np.flatnonzero(splits == name))[:size] for name, size in wanted.items()])
    )


def measure(arms: dict[str, Arm], num_rows: int, num_rounds: int) -> None:
    """Train with each arm in turn, after a warm-up that is not counted."""
    for arm in arms.values():
        arm.run(np.arange(min(WARM_UP_ROWS, num_rows)))
    for number in range(num_rounds):
        names = list(arms) if number % 2 == 0 else list(reversed(arms))
        for name in names:
            arms[name].seconds.append(arms[name].run(np.arange(num_rows)))
            speed = arms[name].rows_per_s(num_rows)[-1]
            console().print(f"round {number + 1}/{num_rounds}, {name}: {speed:.1f} rows/s", highlight=False)


def summary(arms: dict[str, Arm], num_rows: int) -> dict[str, Any]:
    """Median speeds, and by how much each arm is faster than the plain loop: median, lowest and highest round."""
    plain = arms["plain loop"].rows_per_s(num_rows)
    found = {}
    for name, arm in arms.items():
        speeds = arm.rows_per_s(num_rows)
        ratios = [speed / base for speed, base in zip(speeds, plain, strict=True)]
        found[name] = {
            "description": arm.description,
            "padded_tokens_per_row": arm.padded_tokens_per_row,
            "rows_per_s": [round(speed, 2) for speed in speeds],
            "median_rows_per_s": round(statistics.median(speeds), 2),
            "times_plain": {
                "median": round(statistics.median(ratios), 2),
                "low": round(min(ratios), 2),
                "high": round(max(ratios), 2),
            },
        }
    return found


def table(found: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    drawn = Table("arm", "padded tokens/row", "rows/s", "times plain loop", "lowest-highest")
    for name, values in found.items():
        times = values["times_plain"]
        drawn.add_row(
            name,
            f"{values['padded_tokens_per_row']:.0f}",
            f"{values['median_rows_per_s']:.1f}",
            f"{times['median']:.1f}",
            f"{times['low']:.1f}-{times['high']:.1f}",
        )
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the dated result; status 1 where mope-train is not `--min-ratio` times as fast."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="training rows of each round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with every arm")
    parser.add_argument("--source", default="sharegpt", help="data set that the rows are drawn from")
    parser.add_argument("--encoder", default="minilm", help="encoder of all arms")
    parser.add_argument("--ablate", action="store_true", help="also leave out mope-train's means one at a time")
    parser.add_argument("--min-ratio", type=float, default=2.0, help="fail below this ratio of medians")
    parser.add_argument(
        "--output", type=Path, help="result (default: model_cards/results/<date>-train-throughput.json)"
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = build_rows(DataConfig(source=options.source))
    rows = sample(data, options.rows)
    num_rows = len(rows.split("train"))
    source = find_encoder(options.encoder)
    prepared = prepare(rows, ModelConfig(encoder=options.encoder), source, "cl100k_base")
    settings = FitConfig()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        arms = {
            "plain loop": plain_loop(rows.split("train"), source),
            "mope-train": mope_train(prepared, source, folder, settings),
        }
        if options.ablate:
            full = settings.model_copy(update={"precision": "32-true"})
            unfrozen = settings.model_copy(update={"freeze_embeddings": False})
            arms["mope-train in float32"] = mope_train(prepared, source, folder, full)
            arms["mope-train, unsorted"] = mope_train(prepared, source, folder, settings, pool_batches=1)
            arms["mope-train, embeddings trained"] = mope_train(prepared, source, folder, unfrozen)
        measure(arms, num_rows, options.rounds)
    found = summary(arms, num_rows)
    Console(width=120).print(table(found))
    today = date.today().isoformat()
    result = {
        "date": today,
        "encoder": options.encoder,
        "num_rows": num_rows,
        "num_rounds": options.rounds,
        "num_threads": torch.get_num_threads(),
        "arms": found,
        "provenance": collect(["python", *sys.argv], 0, {options.source: data.fingerprint}),
    }
    target = options.output or RESULTS / f"{today}-train-throughput.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")
    return int(found["mope-train"]["median_rows_per_s"] < options.min_ratio * found["plain loop"]["median_rows_per_s"])


if __name__ == "__main__":
    sys.exit(main())
