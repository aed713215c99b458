"""Waiting requests that SGLang skips: they are set aside uncharged, so that the order of the others stays ours.

SGLang walks its queue and passes over requests that cannot run now: their LoRA adapter would be one too many, or the
KV cache that they need is still fetched (HiCache). The hook foresees only the next admissions. If all of these were
requests that cannot run, those behind would be served in order of arrival. So what was passed over is set aside and
tried again, a few in each step, clients in turn; and what waits for an adapter comes back when the adapter may be
admitted. Adapters take turns (`mope.serving_hooks.adapters`).

Every rank decides the same: with several ranks, patience is counted in steps and not in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mope.fairness import Policy, Ticket
from mope.serving_hooks.adapters import AdapterTurns, Standing
from mope.serving_hooks.aside import Aside

if TYPE_CHECKING:
    from collections.abc import Iterable

STEP_S = 0.02  # what a step counts for where ranks must agree and no clock may decide


class Skips:
    """Requests of one scheduler that cannot run now.

    Attributes:
        turns: which LoRA adapters may be admitted; None where there is no cap on them.
        aside: requests that were set aside.
    """

    def __init__(
        self, policy: Policy, adapter_of: Callable[[Ticket], str | None], max_adapters: int | None, patience_s: float
    ) -> None:
        """Nothing waits.

        Args:
            policy: whose requests they are.
            adapter_of: the LoRA adapter of a waiting request; None for the LLM as it is.
            max_adapters: adapters that fit into a batch, the LLM as it is counted as one; None where there is no LoRA.
            patience_s: seconds that an adapter waits before another is drained for it.
        """
        self._policy, self._adapter_of = policy, adapter_of
        self.turns = AdapterTurns(max_adapters, patience_s) if max_adapters else None
        self.aside = Aside(policy)
        self._numbers: dict[str | None, int] = {}  # of adapters, in order of appearance
        self._picked: list[Ticket] = []  # what stood in front in the last step
        self._tried: set[str] = set()  # requests that SGLang has looked at since, by our id
        self._now_s = 0.0
        self.found = False  # whether SGLang passed over any in the last step

    def number(self, adapter: str | None) -> int:
        """An adapter's number, the same on all ranks."""
        return self._numbers.setdefault(adapter, len(self._numbers))

    # -- a step

    def begin(self, running: Iterable[tuple[str | None, Ticket]], now_s: float, num_free: int) -> None:
        """Before a step: takes note of what the last one passed over, and offers some of it again.

        Args:
            running: adapter and ticket of each request that runs.
            now_s: seconds by any clock that ranks agree on.
            num_free: requests that the step has room for.
        """
        self._now_s = now_s
        if self.turns is not None:
            self._turn(self.turns, running)
        passed_over = self._passed_over()
        self.found = bool(passed_over)
        for ticket in passed_over:
            if self.turns is None or self.turns.admits(self.number(self._adapter_of(ticket))):
                self.aside.skip(ticket)
        if len(self.aside):
            self.aside.bring_back(num_free, self.turns.admits if self.turns is not None else _always)
        self._tried.clear()

    def _turn(self, turns: AdapterTurns, running: Iterable[tuple[str | None, Ticket]]) -> None:
        on: dict[int, list[Ticket]] = {}
        for adapter, ticket in running:
            on.setdefault(self.number(adapter), []).append(ticket)

        def waiting(adapter: int) -> Standing | None:
            tickets = self.aside.waiting_for(adapter)
            tickets += [ticket for ticket in self._picked if self._waits_for(ticket, adapter)]
            return min(map(self._policy.standing, tickets)) if tickets else None

        def ahead(adapter: int) -> Standing:
            return min(map(self._policy.standing, on[adapter]))

        turns.begin(on, self._now_s, waiting, ahead)

    def _waits_for(self, ticket: Ticket, adapter: int) -> bool:
        return ticket.state in ("waiting", "preempted") and self.number(self._adapter_of(ticket)) == adapter

    def _passed_over(self) -> list[Ticket]:
        """Those that stood before one that SGLang has looked at, and that it has not looked at themselves."""
        if not self._tried:
            return []
        places = [place for place, ticket in enumerate(self._picked) if ticket.request_id in self._tried]
        reached = len(self._picked) if len(places) < len(self._tried) else places[-1]
        return [
            ticket
            for ticket in self._picked[:reached]
            if ticket.state in ("waiting", "preempted") and ticket.request_id not in self._tried
        ]

    def picks(self, limit: int) -> list[Ticket]:
        """The next admissions, requests whose adapter may be admitted alone; the others are set aside on the way."""
        while True:
            self._picked = self._policy.simulate(limit)
            if self.turns is None:
                return self._picked
            blocked = []
            for ticket in self._picked:
                number = self.number(self._adapter_of(ticket))
                if not self.turns.admits(number):
                    blocked.append((number, ticket))
            if not blocked:
                return self._picked
            for number, ticket in blocked:
                self._wait_for(self.turns, number, ticket, self._now_s)

    def _wait_for(self, turns: AdapterTurns, number: int, ticket: Ticket, now_s: float) -> None:
        turns.ask(number, now_s)
        self.aside.wait_for(number, ticket)

    # -- a request's life

    def arrived(self, ticket: Ticket, now_s: float) -> None:
        """A request begins to wait, and so does its adapter: SGLang does not sort its queue while its batch is full."""
        if self.turns is not None:
            number = self.number(self._adapter_of(ticket))
            if not self.turns.admits(number):
                self._wait_for(self.turns, number, ticket, now_s)

    def admits(self, adapter: str | None) -> bool:
        """Whether it is an adapter's turn; what fits into memory is left to SGLang."""
        return self.turns is None or self.turns.admits(self.number(adapter))

    def tried(self, ticket: Ticket) -> None:
        """SGLang looks whether a request can run."""
        self._tried.add(ticket.request_id)

    def admitted(self, ticket: Ticket, adapter: str | None) -> None:
        """A request begins to run, though it may have been set aside."""
        if ticket.state == "aside":
            self.aside.discard(ticket)
            self._policy.bring_back(ticket)
        if self.turns is not None:
            self.turns.admitted(self.number(adapter))

    def ended(self, ticket: Ticket) -> None:
        """A request is over."""
        self.aside.discard(ticket)


def _always(adapter: int) -> bool:
    return True


def max_adapters(scheduler: Any) -> int | None:
    """LoRA adapters that fit into a batch of SGLang's; None where it serves none."""
    arguments = scheduler.server_args
    enabled = getattr(scheduler, "enable_lora", getattr(arguments, "enable_lora", False))
    most: Any = getattr(scheduler, "max_loras_per_batch", getattr(arguments, "max_loras_per_batch", 8))
    return int(most) if enabled else None
