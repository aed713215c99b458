"""A scheduler small enough to reckon with by hand: it stands in for an engine's in tests of the replay.

In order of arrival, or those of `first` before all others; prompts in one piece; no KV cache to run out of.
"""

from __future__ import annotations

from typing import Any

from mope.serving_hooks.carried import Carried
from mope.serving_hooks.replay.engine import Batch, Delivery, EngineSettings, IsLast, Work


class ToyEngine:
    """What `mope.serving_hooks.replay.engine.Engine` asks for, and what it was told."""

    version = "toy 1"

    def __init__(
        self,
        settings: EngineSettings,
        *,
        kv_tokens: int,
        max_model_len: int,
        adapters: tuple[str, ...] = (),
        scheduler: Any = None,
        options: Any = None,
    ) -> None:
        self.settings, self.options, self.adapters = settings, options, adapters
        self.first = "light" if scheduler else None
        self.told: list[tuple[str, int, Carried, float, str | None]] = []
        self.waiting: list[tuple[str, int, str | None]] = []
        self.running: dict[str, list[int]] = {}  # name -> prompt, tokens generated, tokens in flight

    def add(self, request_id: str, prompt_tokens: int, carried: Carried, arrival_s: float, adapter: str | None) -> None:
        self.told.append((request_id, prompt_tokens, carried, arrival_s, adapter))
        self.waiting.append((request_id, prompt_tokens, carried.client))

    def has_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Batch:
        work = []
        for name, state in self.running.items():
            work.append(Work(name, state[0] + state[1] + state[2] - 1, 1, True))
            state[2] += 1
        while self.waiting and len(self.running) < self.settings.max_num_seqs:
            place = next((place for place, one in enumerate(self.waiting) if one[2] == self.first), 0)
            name, prompt, _ = self.waiting.pop(place)
            self.running[name] = [prompt, 0, 1]
            work.append(Work(name, 0, prompt, True))
        return Batch(work, None)

    def deliver(self, batch: Batch, is_last: IsLast) -> list[Delivery]:
        found = []
        for name, *_ in batch.work:
            state = self.running.get(name)
            if state is None:
                continue
            state[1], state[2] = state[1] + 1, state[2] - 1
            finished = is_last(name, state[1]) or state[1] >= self.settings.max_tokens
            if finished:
                del self.running[name]
            found.append(Delivery(name, 1, finished))
        return found
