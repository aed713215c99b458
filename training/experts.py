"""Training of MoPE's networks in either design, and of the fine-tuned baselines of equal size.

Knows which rows and which loss each network gets; `fit` knows how to train one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
from torch import nn

from mope.artifact import weight_files
from mope.backends.network import MopeNetwork
from mope.config import PredictorConfig
from mope.errors import DataError
from mope.grid import Array
from mope.training.batches import EncodedRows
from mope.training.config import FitConfig
from mope.training.encoders import Trunk
from mope.training.fit import FitResult, Objective, fit
from mope.training.objectives import DistillationObjective, MopeObjective, RankingObjective, RegressionObjective
from mope.training.prepare import Prepared
from mope.training.progress import WholeRun
from mope.training.teacher import Teacher

MIN_EXPERT_ROWS = 32


def new_network(
    source: Trunk,
    config: PredictorConfig,
    settings: FitConfig,
    *,
    gate: bool,
    num_heads: int,
    plain: bool = False,
) -> MopeNetwork:
    """A network on the pre-trained encoder, gate and heads fresh from the seed; see `MopeNetwork.of`."""
    L.seed_everything(settings.seed, verbose=False)
    encoder = source.load()
    if settings.encoder_dropout is not None:
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings.encoder_dropout
    return MopeNetwork.of(
        config,
        encoder,
        gate=gate,
        num_heads=num_heads,
        plain=plain,
        dropout=settings.dropout,
        text_dropout=settings.text_dropout,
    )


def expert_rows(rows: EncodedRows, boundaries: tuple[float, ...], expert: int, overlap: float) -> Array:
    """Positions of the rows that a separate expert trains on: its bucket with the overlap margin.

    A censored answer may have become longer than it is, so every expert above it sees it, too.
    """
    low = boundaries[expert - 1] * (1 - overlap) if expert > 0 else 0.0
    high = boundaries[expert] * (1 + overlap) if expert < len(boundaries) else np.inf
    inside = (rows.tokens_R <= high) & ((rows.tokens_R >= low) | rows.censored_R)
    return np.flatnonzero(inside)


def train_mope(
    prepared: Prepared,
    source: Trunk,
    settings: FitConfig,
    folder: Path,
    *,
    resume: bool,
    teacher: Teacher | None = None,
    whole: WholeRun | None = None,
) -> tuple[list[MopeNetwork], list[FitResult]]:
    """Train the networks of a MoPE, in the order of `weight_files`; rows that hold targets are learned from them, too.

    A student on its teacher's trunk begins with its gate and heads.

    Raises:
        DataError: an expert of the separate design has too few rows.
    """
    config = prepared.config
    own = _label_loss(prepared, settings, config.boundaries)
    objective = own if prepared.train.targets is None else DistillationObjective(own, settings.teacher_weight)
    names = [name.removesuffix(".safetensors") for name in weight_files(config)]
    separate = range(config.num_experts) if config.design == "separate" else ()
    own_rows = [_own_rows(prepared, settings, expert) for expert in separate]  # before anything is trained
    networks: list[MopeNetwork] = []
    results: list[FitResult] = []
    for position, name in enumerate(names):
        train, validation = prepared.train, prepared.validation
        if config.design == "shared":
            network = new_network(source, config, settings, gate=config.num_experts > 1, num_heads=config.num_experts)
            if teacher is source:
                teacher.begin(network)
        elif position == 0:
            # one expert needs no gate, but its embedding serves the look-up
            network = new_network(source, config, settings, gate=True, num_heads=0)
        else:
            network = new_network(source, config, settings, gate=False, num_heads=1)
            train, validation = (
                rows.take(own) for rows, own in zip((train, validation), own_rows[position - 1], strict=True)
            )
        results.append(
            fit(
                network,
                objective,
                train,
                validation,
                settings,
                folder / name,
                description=f"training {name}",
                resume=resume,
                target_llms=config.target_llms,
                whole=whole,
            )
        )
        networks.append(network)
    return networks, results


def _own_rows(prepared: Prepared, settings: FitConfig, expert: int) -> list[Array]:
    """Training and validation rows of a separate expert; an error if they are too few."""
    boundaries = prepared.config.boundaries
    own = [expert_rows(rows, boundaries, expert, settings.overlap) for rows in (prepared.train, prepared.validation)]
    if min(map(len, own)) < MIN_EXPERT_ROWS:
        raise DataError(
            f"expert {expert} has {len(own[0])} training and {len(own[1])} validation rows in its bucket, "
            f"needs {MIN_EXPERT_ROWS} of each; use fewer experts, other --boundaries, or more rows"
        )
    return own


def _label_loss(prepared: Prepared, settings: FitConfig, boundaries: Sequence[float]) -> MopeObjective:
    config = prepared.config
    return MopeObjective(
        list(config.edges[: config.num_body_bins + 1]),
        list(boundaries),
        overlap=settings.overlap,
        crps_weight=settings.crps_weight,
        expert_weight=settings.expert_weight,
        gate_weight=settings.gate_weight,
    )


def train_baseline(
    name: str,
    prepared: Prepared,
    source: Trunk,
    settings: FitConfig,
    folder: Path,
    *,
    resume: bool,
    whole: WholeRun | None = None,
) -> tuple[MopeNetwork, FitResult, float]:
    """Train `single_head`, `single_expert` (L1 regression, SSJF's recipe) or `ranker` (ListMLE, vLLM-LTR's idea).

    Same encoder, inputs, rows, steps and schedule as MoPE. The single head is what MoPE would be without experts: one
    ordinal head with as many hidden units as gate and heads together, and MoPE's own loss. The ranker's batches are not
    sorted by length: it must learn to order any two requests.

    Returns:
        The network, its fit, and the tokens that one unit of its output stands for, where it has one output.
    """
    config = prepared.config
    scale = float(prepared.train.tokens_R.mean())
    objective: Objective
    if name == "single_head":
        hidden = config.head_hidden * (config.num_experts + (config.num_experts > 1))
        config = config.model_copy(update={"num_experts": 1, "boundaries": (), "head_hidden": hidden})
        objective = _label_loss(prepared, settings, ())
    else:
        objective = RegressionObjective(scale) if name == "single_expert" else RankingObjective()
    network = new_network(source, config, settings, gate=False, num_heads=1, plain=name != "single_head")
    result = fit(
        network,
        objective,
        prepared.train,
        prepared.validation,
        settings,
        folder / name,
        description=f"training {name}",
        resume=resume,
        pool_batches=1 if name == "ranker" else 50,
        length_chunks=4 if name == "ranker" else 1,
        target_llms=config.target_llms,
        whole=whole,
    )
    return network, result, scale
