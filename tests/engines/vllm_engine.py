"""vLLM's engine in this process, stepped by hand: time is counted in steps, so figures do not depend on the machine.

Answers end by the end-of-sequence token, which a logits processor forces at a length that only the test knows: no cap
and no flag tells the scheduler how long an answer will be.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

END = 1  # the tiny model's end-of-sequence token
LENGTH = "test_length"  # in extra_args: after how many tokens the answer ends


def prepare() -> None:
    """Settings that vLLM reads when it is imported; and one thread: the model is tiny, other tests run beside it."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        OMP_NUM_THREADS="1",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    import torch

    torch.set_num_threads(1)


def ending_processor() -> type:
    """A logits processor that ends each answer at its `LENGTH`."""
    import torch
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Ending(AdapterLogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
            length = (params.extra_args or {}).get(LENGTH)
            if length is None:
                return None

            def force(generated: list[int], logits: torch.Tensor) -> torch.Tensor:
                if len(generated) >= int(length) - 1:
                    logits[:] = -float("inf")
                    logits[END] = 0.0
                else:
                    logits[END] = -float("inf")
                return logits

            return force

    return Ending


@dataclass(frozen=True)
class Asked:
    """A request: at which step it comes, from whom, how long its prompt and its answer are, what is predicted.

    A LoRA adapter's folder stands for a client that nobody named where `client` is empty.
    """

    step: int
    client: str
    prompt_tokens: int
    length: int
    predicted: float | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    adapter: Path | None = None

    def prompt(self) -> list[int]:
        """Token ids that no other request has."""
        return [3 + (self.seed * 7919 + 31 * position) % 500 for position in range(self.prompt_tokens)]


def freeze_once() -> None:
    """Takes all that lives now, which is what was imported, out of the garbage collector's sight for good.

    In each engine's life vLLM looks through all objects six times, and freezes and unfreezes them in between.
    """
    if gc.freeze is not _left_alone:
        gc.freeze()
        gc.freeze = gc.unfreeze = _left_alone  # type: ignore[assignment]


def _left_alone() -> None:
    """In place of `gc.freeze` and `gc.unfreeze`."""


@dataclass
class Outcome:
    """What happened to requests, by number; steps count from 0."""

    first_token: dict[int, int] = field(default_factory=dict)
    finished: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)
    num_steps: int = 0


class EngineInProcess:
    """vLLM's engine with the tiny model; one at a time, for vLLM keeps process-wide state."""

    _alive: EngineInProcess | None = None

    def __init__(self, model: Path, options: dict[str, Any] | None, **engine: Any) -> None:
        """Starts it.

        Args:
            model: folder of the tiny model.
            options: of the hook; None for vLLM without it.
            engine: further arguments of the engine.
        """
        prepare()
        if EngineInProcess._alive is not None:
            EngineInProcess._alive.close()
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments: dict[str, Any] = {
            "model": str(model),
            "load_format": "dummy",
            "dtype": "float32",
            "max_model_len": 1024,
            "enforce_eager": True,
            "max_num_seqs": 16,
            "kv_cache_memory_bytes": 2**28,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "logits_processors": [ending_processor()],
            **engine,
        }
        if options is not None:
            arguments["scheduler_cls"] = "mope.serving_hooks.vllm.make_scheduler"
            arguments["additional_config"] = {"mope": options}
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        EngineInProcess._alive = self

    def close(self) -> None:
        """Stops the engine; its scheduler can still be looked at."""
        if EngineInProcess._alive is self:
            EngineInProcess._alive = None
            self.engine.engine_core.shutdown()
            del self.engine
            gc.collect()
            freeze_once()

    def add(self, number: int, asked: Asked) -> None:
        """Sends a request."""
        from vllm import SamplingParams

        from mope.serving_hooks.carried import Carried

        extra = {LENGTH: asked.length, **Carried(asked.client or None, asked.predicted).write()}
        settings = {"max_tokens": 900, "temperature": 0.0, "extra_args": extra, **asked.options}
        prompt, parameters = {"prompt_token_ids": asked.prompt()}, SamplingParams(**settings)
        self.engine.add_request(str(number), prompt, parameters, lora_request=_lora(asked.adapter))

    def run(self, requests: Iterable[Asked], at_step: Callable[[int, EngineInProcess], None] | None = None) -> Outcome:
        """Serves all requests to their end; `at_step` may interfere before each step."""
        coming = sorted(enumerate(requests), key=lambda pair: (pair[1].step, pair[0]))
        outcome, step = Outcome(), 0
        while coming or self.engine.has_unfinished_requests():
            while coming and coming[0][1].step <= step:
                self.add(*coming.pop(0))
            if at_step is not None:
                at_step(step, self)
            for output in self.engine.step():
                number = int(output.request_id.split("_")[0])
                if output.outputs[0].token_ids:
                    outcome.first_token.setdefault(number, step)
                if output.finished:
                    outcome.finished[number] = step
                    outcome.tokens[number] = tuple(output.outputs[0].token_ids)
            step += 1
        outcome.num_steps = step
        return outcome


def _lora(adapter: Path | None) -> Any:
    """How vLLM names a LoRA adapter."""
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.name, 1 + int(adapter.name.split("-")[-1]), str(adapter))


def flood_and_light(*, num_flood: int = 100, num_light: int = 20, every: int = 12, seed: int = 0) -> list[Asked]:
    """One client sends all at once; another sends short requests now and then."""
    flood = [Asked(0, "flood", 40, 48 + 8 * ((n + seed) % 5), 64.0, seed=seed + n) for n in range(num_flood)]
    light = [Asked(every * n, "light", 30, 12 + 2 * (n % 5), 16.0, seed=seed + 1000 + n) for n in range(num_light)]
    return flood + light


def mean_ttft(outcome: Outcome, requests: list[Asked], client: str) -> float:
    """Steps from arrival to the first token, that included."""
    waits = [outcome.first_token[n] - one.step + 1 for n, one in enumerate(requests) if one.client == client]
    return sum(waits) / len(waits)


def services(scheduler: Any) -> dict[str, float]:
    """Weighted tokens that the ledger holds, by client."""
    ledger = scheduler.mope.policy.ledger
    return {"/".join(account.path): account.charged.service / 1e6 for account in ledger.clients()}
