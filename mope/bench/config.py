"""What a benchmark is told: one frozen config, one field = one flag = one help text.

Knows names, defaults and limits; loads nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mope.config import Frozen
from mope.provenance import num_cores

PeerName = Literal["ssjf", "vllm-ltr"]


class BenchConfig(Frozen):
    """What is measured, on how many requests and how often."""

    num_requests: int = Field(500, ge=1, description="requests to sample from the prompts")
    seed: int = Field(0, ge=0, description="seed of the sample and of the order of batches")
    backends: tuple[str, ...] = Field(
        (), description="engines, for example torch,onnx; none: onnx where it is exported and installed, else torch"
    )
    precisions: tuple[str, ...] = Field((), description="for example fp32,int8; none: what each backend takes")
    num_threads: tuple[int, ...] = Field((1,), min_length=1, description="threads of each call")
    against: tuple[PeerName, ...] = Field((), description="peers in their published shape, with random weights")
    device: str = Field("cpu", description="where torch runs: cpu, cuda, cuda:1, ...")
    turn_requests: int = Field(
        100, ge=1, description="requests that a subject answers one after the other before the next subject's turn"
    )
    rounds: int = Field(5, ge=1, description="times that every request is asked, and that throughput is measured")
    warm_up: int = Field(20, ge=0, description="calls before the first that counts")
    seconds: float = Field(5.0, ge=0, description="of each measurement of throughput; 0 leaves throughput out")
    concurrency: int = Field(
        default_factory=num_cores,
        ge=1,
        description="threads that share a predictor where throughput is measured (default: the number of cores)",
    )
    batch_size: int = Field(32, ge=1, description="requests that are predicted at once where batches are measured")
    goal_ms: float | None = Field(None, gt=0, description="a line at this latency in the picture")
