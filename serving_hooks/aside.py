"""Waiting requests that cannot run now, whatever their turn: set aside uncharged, and tried again within bounds.

An engine skips a request that it cannot run in this step: its grammar is still compiled, its KV cache still loaded, or
its LoRA adapter would be one too many. Offered again in each step, n such requests cost O(n) a step. Here each is set
aside. Those that the engine skipped are tried again, a few in each step, clients in turn. Those that wait for an
adapter come back when the adapter may be admitted. So a step costs the same however many are aside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from mope.fairness import Policy, Ticket
from mope.fairness.accounts import Account

RETRIES = 8  # skipped requests that are tried again in a step, or as many as there are free slots
RETURNS = 64  # requests of an adapter that come back in a step


class Aside:
    """Requests of one policy that were set aside, and why."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._skipped = _Turns()
        self._of_adapter: dict[int, _Turns] = {}
        self._where: dict[str, _Turns] = {}

    def skip(self, ticket: Ticket) -> None:
        """vLLM could not run a request; it does not say why."""
        self._put(ticket, self._skipped)

    def wait_for(self, adapter: int, ticket: Ticket) -> None:
        """A request waits until its adapter may be admitted."""
        self._put(ticket, self._of_adapter.setdefault(adapter, _Turns()))

    def _put(self, ticket: Ticket, turns: _Turns) -> None:
        self._policy.set_aside(ticket)
        turns.add(ticket)
        self._where[ticket.request_id] = turns

    def discard(self, ticket: Ticket) -> None:
        """A request is given up; nothing happens if it is not aside."""
        turns = self._where.pop(ticket.request_id, None)
        if turns is not None:
            turns.remove(ticket)

    def bring_back_one(self, ticket: Ticket) -> None:
        """Offers a request again; nothing happens if it is not aside."""
        self.discard(ticket)
        self._policy.bring_back(ticket)

    def bring_back(self, num_free: int, admits: Callable[[int], bool]) -> None:
        """Before a step: offers some of them again.

        Args:
            num_free: requests that the step has room for.
            admits: whether requests of an adapter may be admitted.
        """
        self._offer(self._skipped, max(RETRIES, num_free))
        for adapter in list(self._of_adapter):
            if admits(adapter):
                self._offer(self._of_adapter[adapter], max(RETURNS, num_free))
            if not self._of_adapter[adapter]:
                del self._of_adapter[adapter]

    def _offer(self, turns: _Turns, number: int) -> None:
        for ticket in turns.take(number):
            del self._where[ticket.request_id]
            self._policy.bring_back(ticket)

    def waiting_for(self, adapter: int) -> list[Ticket]:
        """The first request of each client that waits for an adapter."""
        turns = self._of_adapter.get(adapter)
        return turns.firsts() if turns is not None else []

    def __len__(self) -> int:
        return len(self._where)


class _Turns:
    """Requests by client, clients in turn."""

    def __init__(self) -> None:
        self._queues: OrderedDict[Account, OrderedDict[str, Ticket]] = OrderedDict()

    def add(self, ticket: Ticket) -> None:
        self._queues.setdefault(ticket.account, OrderedDict())[ticket.request_id] = ticket

    def remove(self, ticket: Ticket) -> None:
        queue = self._queues[ticket.account]
        del queue[ticket.request_id]
        if not queue:
            del self._queues[ticket.account]

    def take(self, number: int) -> list[Ticket]:
        """Up to so many requests; of each client, those that were set aside first."""
        found: list[Ticket] = []
        while len(found) < number and self._queues:
            account, queue = self._queues.popitem(last=False)
            found.append(queue.popitem(last=False)[1])
            if queue:
                self._queues[account] = queue
        return found

    def firsts(self) -> list[Ticket]:
        return [next(iter(queue.values())) for queue in self._queues.values()]

    def __bool__(self) -> bool:
        return bool(self._queues)
