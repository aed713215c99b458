"""What the replay asks of an engine's scheduler, and what the scheduler puts into a batch.

Knows neither vLLM nor SGLang, nor how long anything takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import Field

from mope.config import Frozen
from mope.serving_hooks.carried import Carried

IsLast = Callable[[str, int], bool]
"""Whether a request's answer ends with this token, counted from 1: the fake model's knowledge."""


class EngineSettings(Frozen):
    """The engine: as vLLM starts on one large GPU."""

    max_num_seqs: int = Field(256, ge=1, le=65_536, description="requests that run at a time, at most")
    max_num_batched_tokens: int = Field(
        2048, ge=16, le=1_000_000, description="tokens of a batch, prompts are cut to fit (chunked prefill)"
    )
    kv_tokens: int | None = Field(
        None, ge=256, le=10**9, description="tokens that the KV cache holds; by default what the profile says"
    )
    block_size: int = Field(16, ge=1, le=1024, description="tokens of a block of the KV cache")
    max_tokens: int = Field(
        2048, ge=1, le=1_000_000, description="cap of every request, the same for all: it says nothing about lengths"
    )
    batches_in_flight: int = Field(
        2, ge=1, le=2, description="2: the next batch is scheduled while one runs (async scheduling), 1: after it"
    )
    max_loras: int = Field(8, ge=1, le=4096, description="LoRA adapters in a batch, where clients ask for adapters")


class Work(NamedTuple):
    """What a batch does for one request.

    Attributes:
        request_id: whose.
        computed: tokens of its context that were there before.
        tokens: tokens that are computed for it.
        samples: whether it gets a new token of its answer.
    """

    request_id: str
    computed: int
    tokens: int
    samples: bool


class Batch(NamedTuple):
    """What the scheduler chose.

    Attributes:
        work: for each request in it.
        handle: the engine's own object, to be handed back.
    """

    work: Sequence[Work]
    handle: Any


class Delivery(NamedTuple):
    """What the engine told its front end of one request, once a batch was done.

    Attributes:
        request_id: whose.
        num_tokens: new tokens of its answer.
        finished: whether it is complete.
    """

    request_id: str
    num_tokens: int
    finished: bool


class Engine(Protocol):
    """A real scheduler with a fake model behind it."""

    version: str
    """The engine and its release, such as `vllm 0.32.0`."""

    now_s: float
    """What the virtual clock says; set before each call."""

    def add(self, request_id: str, prompt_tokens: int, carried: Carried, arrival_s: float, adapter: str | None) -> None:
        """A request arrives. Of its answer the engine knows the cap, and what its front end carries."""
        ...

    def has_requests(self) -> bool:
        """Whether any request waits or runs."""
        ...

    def schedule(self) -> Batch:
        """Chooses a batch; an empty one if nothing can run."""
        ...

    def deliver(self, batch: Batch, is_last: IsLast) -> list[Delivery]:
        """A batch is done: the fake model's tokens come back. Batches are delivered in the order they were chosen."""
        ...
