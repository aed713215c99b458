"""LoRA adapters take turns where fewer fit into a batch than are asked for.

An engine admits requests of an adapter as long as that adapter runs, so a flood on one adapter keeps it running, and
clients of others wait for the whole flood. Here an adapter whose clients wait longer than the patience, and have had
less than those who run, gets a turn: another adapter is drained, that is, no request of it is admitted until the first
has begun. Knows adapters by number, and clients by how much they have had; not requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

Standing = list[float]  # what a client and its groups have had, the outermost first: the less, the sooner its turn


class AdapterTurns:
    """Which adapters may be admitted.

    Attributes:
        running: adapters of requests that run, those admitted in this step included.
        draining: the adapter of which no request is admitted; None where none is.
    """

    def __init__(self, max_adapters: int, patience_s: float) -> None:
        """No adapter runs.

        Args:
            max_adapters: adapters that fit into a batch.
            patience_s: seconds that an adapter waits before another is drained for it.
        """
        self._max, self._patience_s = max_adapters, patience_s
        self.running: set[int] = set()
        self.draining: int | None = None
        self._next: int | None = None  # for which it is drained
        self._asked_s: dict[int, float] = {}  # adapters that wait, since when

    def begin(
        self,
        running: Collection[int],
        now_s: float,
        waiting: Callable[[int], Standing | None],
        ahead: Callable[[int], Standing],
    ) -> None:
        """Before a step.

        Args:
            running: adapters of requests that run.
            now_s: seconds by any clock.
            waiting: what the client has had that waits for an adapter and has had least; None where nobody waits.
            ahead: the same of the clients whose requests run on an adapter.
        """
        self.running = set(running)
        for adapter in self.running & self._asked_s.keys():
            del self._asked_s[adapter]
        if self._next is not None and (self._next in self.running or waiting(self._next) is None):
            self._next = self.draining = None
        if self._next is None and len(self.running) >= self._max:
            self._choose(now_s, waiting, ahead)

    def _choose(
        self, now_s: float, waiting: Callable[[int], Standing | None], ahead: Callable[[int], Standing]
    ) -> None:
        for adapter, since_s in list(self._asked_s.items()):
            if now_s - since_s < self._patience_s:
                continue
            least = waiting(adapter)
            if least is None:
                del self._asked_s[adapter]
                continue
            furthest = max(self.running, key=ahead)
            if ahead(furthest) > least:
                self._next, self.draining = adapter, furthest
                return

    def admits(self, adapter: int) -> bool:
        """Whether a request of an adapter may be admitted now."""
        if adapter in self.running:
            return adapter != self.draining
        return len(self.running) < self._max and self._next in (None, adapter)

    def fits(self, adapter: int) -> bool:
        """Whether a batch has room for an adapter, whosever turn it is."""
        return adapter in self.running or len(self.running) < self._max

    def admitted(self, adapter: int) -> None:
        """A request of an adapter begins to run."""
        self.running.add(adapter)

    def ask(self, adapter: int, now_s: float) -> None:
        """A request would be next, but its adapter may not be admitted."""
        self._asked_s.setdefault(adapter, now_s)
