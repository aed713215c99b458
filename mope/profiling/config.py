"""What a measurement of a server is told: one frozen config, one field = one flag = one help text.

Knows names, defaults and limits; asks no server.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mope.config import Frozen

PositiveInt = Annotated[int, Field(ge=1, le=10_000_000)]


class ProfilingConfig(Frozen):
    """What is measured, how often and for how long."""

    prompt_tokens: tuple[PositiveInt, ...] = Field(
        (32, 128, 256, 512, 1024, 1536, 2048, 4096),
        min_length=1,
        description="lengths of prompts whose first token is awaited on the idle server; those too long for it are "
        "left out",
    )
    concurrency: tuple[PositiveInt, ...] = Field(
        (1, 2, 4, 8, 16, 32), min_length=1, description="requests that decode together"
    )
    context_tokens: tuple[PositiveInt, ...] = Field(
        (32, 512, 1536), min_length=1, description="prompt tokens of each request that decodes"
    )
    decode_tokens: int = Field(64, ge=8, le=100_000, description="steps of each measurement of decoding")
    rounds: int = Field(3, ge=1, description="times that everything is measured, each time in another order")
    num_checks: int = Field(
        12, ge=0, description="requests of random lengths beside others, whose latency tells how good the profile is"
    )
    max_seconds: float = Field(600.0, gt=0, description="when to stop measuring; what was measured till then is fitted")
    timeout_s: float = Field(60.0, gt=0, description="seconds without a byte after which the server is given up")
    chunk_tokens: PositiveInt = Field(
        2048, description="prompt tokens per step at most, as the server was started (vLLM: --max-num-batched-tokens)"
    )
    machine: str = Field("not said", description="the server's processor or GPU, in words, for the profile")
    seed: int = Field(0, ge=0, description="seed of the prompts and of the order of measurements")
