"""What a replay is told: workloads, policies, predictions, seeds. One field is one flag and one help text.

Knows names, defaults and limits; loads nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mope.config import Frozen
from mope.fairness.config import PolicyName
from mope.serving_hooks.replay.predictions import PACKAGED_TAU, Prediction

ReplayPolicy = PolicyName | Literal["engine"]  # or the engine as it is, without mope
BLIND: tuple[ReplayPolicy, ...] = ("engine", "fcfs", "vtc")  # those that ask for no prediction: one run serves all
HOOK = "mope.serving_hooks.vllm.scheduler.make_scheduler"


class ReplayConfig(Frozen):
    """What is replayed, and how often."""

    engine: Literal["vllm"] = Field("vllm", description="whose scheduler it is; the release that is installed is taken")
    workload: tuple[str, ...] = Field(
        ("two-clients",), min_length=1, description="who sends what: names from the list above, or trace"
    )
    trace: Path | None = Field(
        None,
        description="file of workload trace: JSON Lines of arrival_s, client, prompt_tokens, response_tokens, adapter?",
    )
    policies: tuple[ReplayPolicy, ...] = Field(
        ("fcfs", "vtc", "equinox"),
        min_length=1,
        description="policies to compare, all through mope's class; `engine` is the engine without it",
    )
    predictions: tuple[Prediction, ...] = Field(
        ("noisy",),
        min_length=1,
        description="what policies that ask for lengths are told: none, oracle, or noisy, a predictor of quality --tau",
    )
    tau: float = Field(
        PACKAGED_TAU, ge=0, le=1, description="Kendall's tau between true and noisy lengths; chat-small has the default"
    )
    seeds: int = Field(5, ge=1, le=1000, description="times that each workload is drawn, for intervals")
    requests: int | None = Field(
        None, ge=10, le=1_000_000, description="requests of each workload, about; by default as many as it has"
    )
    load: float | None = Field(
        None,
        gt=0,
        le=100,
        description="requests offered, relative to what the engine can serve; by default the workload's own",
    )
    scheduler: str = Field(
        HOOK, description="module.attribute of what makes the scheduler of all but `engine`, as --scheduler-cls"
    )
