"""In which order waiting requests are admitted: by counters of clients, by a key of their own, or by turns.

Each order holds the waiting requests and answers who is next; the policy around it charges and tells the ledger who
waits. Knows no prices. All ties go to the earlier arrival. `simulate` says whom successive admissions would take
without admitting anyone: a client's later requests stand behind what its earlier ones would have cost it.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from operator import attrgetter

from typing_extensions import override

from mope.fairness.accounts import Account, Group
from mope.fairness.charges import UNIT
from mope.fairness.ledger import Ledger
from mope.fairness.tickets import Ticket

_SPARE_ENTRIES = 64
_arrival = attrgetter("arrival")


class Order(ABC):
    """Waiting requests, and who of them is next."""

    @abstractmethod
    def add(self, ticket: Ticket) -> None:
        """A request waits from now on."""

    def restore(self, ticket: Ticket) -> None:
        """A request that was taken waits again, at its old place."""
        self.add(ticket)

    @abstractmethod
    def take(self, ticket: Ticket) -> None:
        """A waiting request is admitted."""

    @abstractmethod
    def drop(self, ticket: Ticket) -> None:
        """A waiting request goes away without having been admitted."""

    @abstractmethod
    def next(self, passed_over: Collection[Ticket] = ()) -> Ticket | None:
        """Who is next; those that are passed over, who do not fit, stand aside."""

    @abstractmethod
    def simulate(self, limit: int | None = None) -> list[Ticket]:
        """The first `limit` requests in the order in which they would be admitted, all of them if None."""

    @abstractmethod
    def __iter__(self) -> Iterator[Ticket]:
        """Waiting requests in order of arrival."""

    @abstractmethod
    def __len__(self) -> int: ...

    def correct(self, account: Account, amount: int) -> None:  # noqa: B027, most orders keep no accounts
        """A client's admission turned out to cost `amount` millionths of HF more than it was charged."""


class KeyedOrder(Order):
    """By a number that each request has from its arrival on, smallest first.

    Finding the next costs O(log n).
    """

    def __init__(self, key: Callable[[Ticket], float]) -> None:
        self._key = key
        self._waiting: dict[str, Ticket] = {}
        self._heap: list[tuple[float, int, Ticket]] = []

    @override
    def add(self, ticket: Ticket) -> None:
        self._waiting[ticket.request_id] = ticket
        heapq.heappush(self._heap, (self._key(ticket), ticket.arrival, ticket))
        if len(self._heap) > 2 * len(self._waiting) + _SPARE_ENTRIES:
            self._heap = [(self._key(kept), kept.arrival, kept) for kept in self._waiting.values()]
            heapq.heapify(self._heap)

    @override
    def take(self, ticket: Ticket) -> None:
        del self._waiting[ticket.request_id]

    drop = take

    @override
    def next(self, passed_over: Collection[Ticket] = ()) -> Ticket | None:
        heap, aside, found = self._heap, [], None
        while heap:
            ticket = heap[0][2]
            if self._waiting.get(ticket.request_id) is not ticket:
                heapq.heappop(heap)
            elif ticket in passed_over:
                aside.append(heapq.heappop(heap))
            else:
                found = ticket
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        return found

    @override
    def simulate(self, limit: int | None = None) -> list[Ticket]:
        heap, limit = self._heap, len(self._waiting) if limit is None else min(limit, len(self._waiting))
        found: dict[Ticket, tuple[float, int, Ticket]] = {}  # none of them twice, though a restored one is listed so
        while len(found) < limit:
            entry = heapq.heappop(heap)
            if self._waiting.get(entry[2].request_id) is entry[2]:
                found[entry[2]] = entry
        for entry in found.values():
            heapq.heappush(heap, entry)
        return list(found)

    @override
    def __iter__(self) -> Iterator[Ticket]:
        return iter(sorted(self._waiting.values(), key=_arrival))

    @override
    def __len__(self) -> int:
        return len(self._waiting)


class _ByClient(Order):
    """Requests of each client in order of arrival."""

    def __init__(self) -> None:
        self._queues: dict[Account, OrderedDict[str, Ticket]] = {}
        self._num_waiting = 0

    @override
    def add(self, ticket: Ticket) -> None:
        queue = self._queues.get(ticket.account)
        if queue is None:
            queue = self._queues[ticket.account] = OrderedDict()
        last = queue[next(reversed(queue))].arrival if queue else -1
        queue[ticket.request_id] = ticket
        if ticket.arrival < last:
            for other in [other for other in queue.values() if other.arrival > ticket.arrival]:
                queue.move_to_end(other.request_id)
        self._num_waiting += 1

    @override
    def take(self, ticket: Ticket) -> None:
        queue = self._queues[ticket.account]
        del queue[ticket.request_id]
        if not queue:
            del self._queues[ticket.account]
        self._num_waiting -= 1

    @override
    def drop(self, ticket: Ticket) -> None:
        self.take(ticket)

    def _first(self, account: Account) -> Ticket:
        return next(iter(self._queues[account].values()))

    @override
    def __iter__(self) -> Iterator[Ticket]:
        return iter(sorted((ticket for queue in self._queues.values() for ticket in queue.values()), key=_arrival))

    @override
    def __len__(self) -> int:
        return self._num_waiting


class CounterOrder(_ByClient):
    """By the counters of the ledger: the group, and within it the client, that has had least.

    Finding the next costs O(depth log n) for n waiting clients; `simulate` as much for each request.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    @override
    def next(self, passed_over: Collection[Ticket] = ()) -> Ticket | None:
        if not passed_over:
            account = self._ledger.next_client()
        else:
            account = self._ledger.next_client({ticket.account for ticket in passed_over})
        return None if account is None else self._first(account)

    @override
    def simulate(self, limit: int | None = None) -> list[Ticket]:
        limit = self._num_waiting if limit is None else min(limit, self._num_waiting)
        root = self._ledger.root
        turns: dict[Group, _Turns] = {}
        left: dict[Account, Iterator[Ticket]] = {}
        num_left: dict[Account, int] = {}
        order: list[Ticket] = []
        try:
            while len(order) < limit:
                node: Account = root
                groups: list[_Turns] = []
                while isinstance(node, Group):
                    turn = turns.get(node)
                    if turn is None:
                        turn = turns[node] = _Turns(node)
                    groups.append(turn)
                    node = turn.next()
                if node not in left:
                    queue = self._queues[node]
                    left[node], num_left[node] = iter(queue.values()), len(queue)
                ticket = next(left[node])
                order.append(ticket)
                num_left[node] -= 1
                empty = not num_left[node]
                for turn in reversed(groups):
                    empty = turn.leave() if empty else turn.charge(ticket.charge.hf)
        finally:
            for turn in turns.values():
                turn.restore()
        return order


class _Turns:
    """Children of a group by what they would have had, while admissions are foreseen.

    Takes from the group's heap no more of them than are looked at, and puts them back in the end.
    """

    __slots__ = ("_foreseen", "_group", "_taken")

    def __init__(self, group: Group) -> None:
        self._group = group
        self._taken: dict[Account, tuple[int, int, Account]] = {}
        self._foreseen: list[tuple[int, int, Account]] = []

    def next(self) -> Account:
        """The child whose turn it would be."""
        self._look()
        return self._foreseen[0][2]

    def _look(self) -> None:
        """Takes the group's next child if it comes before all that were taken."""
        heap, foreseen = self._group.heap, self._foreseen
        while (child := self._group.next_child()) is not None and child in self._taken:
            heapq.heappop(heap)  # listed twice
        if child is not None and (not foreseen or heap[0] < foreseen[0]):
            entry = self._taken[child] = heapq.heappop(heap)
            heapq.heappush(foreseen, entry)

    def charge(self, hf: int) -> bool:
        """The child whose turn it was would have had `hf` more; False, for it still has requests."""
        counter, since, child = self._foreseen[0]
        heapq.heapreplace(self._foreseen, (counter + child.share(hf), since, child))
        return False

    def leave(self) -> bool:
        """The child whose turn it was would have no more requests; says whether nobody else has."""
        heapq.heappop(self._foreseen)
        self._look()
        return not self._foreseen

    def restore(self) -> None:
        """Puts back what was taken."""
        for entry in self._taken.values():
            heapq.heappush(self._group.heap, entry)


class RoundRobinOrder(_ByClient):
    """Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995): clients in turn, each for a quantum of HF.

    In its turn a client may spend its quantum and what it did not spend before; what it has not spent when it has no
    more requests is gone. A group's quantum is divided among its clients that wait, by their weights within it, so
    inventing users gains nothing over many rounds. It does move waiting: users of one group save up together, and then
    each of them has its turn before a newcomer has one. Where that matters, take a policy that goes by counters.
    Finding the next costs O(1), amortised over quanta, and O(n) where all must save for several rounds. `simulate`
    costs O(n), and O(log n) for each request, where no two clients of a group wait, else as much as finding one by one.
    """

    def __init__(self, quantum: float) -> None:
        """Takes turns.

        Args:
            quantum: HF, in weighted tokens, that a client of weight 1 may spend in a round.
        """
        super().__init__()
        self._quantum = int(quantum * UNIT)
        self._turns: deque[Account] = deque()
        self._deficit: dict[Account, int] = {}
        self._served: Account | None = None  # whose turn has begun: its quantum is granted
        self._costs: dict[Account, int] = {}  # HF of each client's first request
        self._alone: dict[Account, int] = {}  # what a client is granted in a round if no other of its group waits
        self._standing: dict[Account, tuple[Account, int]] = {}  # a client's outermost group, its weight within it
        self._weights: dict[Account, int] = {}  # of each outermost group, those of its clients that wait, added up

    @override
    def add(self, ticket: Ticket) -> None:
        if ticket.account not in self._deficit:
            self._enter(ticket.account)
        super().add(ticket)
        self._costs[ticket.account] = self._first(ticket.account).charge.hf

    def _enter(self, account: Account) -> None:
        self._deficit[account] = 0
        self._turns.append(account)
        group, weight = self._standing[account] = _standing(account)
        self._weights[group] = self._weights.get(group, 0) + weight
        self._alone[account] = group.share_of(self._quantum * weight) // weight or 1

    @override
    def restore(self, ticket: Ticket) -> None:
        account = ticket.account
        if account not in self._deficit:
            self._enter(account)
            self._turns.rotate(1)
            self._served = account
        self._deficit[account] += ticket.charge.hf
        super().add(ticket)
        self._costs[account] = self._first(account).charge.hf

    @override
    def take(self, ticket: Ticket) -> None:
        self._deficit[ticket.account] -= ticket.charge.hf
        self.drop(ticket)

    @override
    def drop(self, ticket: Ticket) -> None:
        super().take(ticket)
        if ticket.account not in self._queues:
            self._exit(ticket.account)
        else:
            self._costs[ticket.account] = self._first(ticket.account).charge.hf

    def _exit(self, account: Account) -> None:
        del self._deficit[account], self._costs[account], self._alone[account]
        self._turns.remove(account)
        self._served = None if self._served is account else self._served
        group, weight = self._standing.pop(account)
        self._weights[group] -= weight
        if not self._weights[group]:
            del self._weights[group]

    @override
    def correct(self, account: Account, amount: int) -> None:
        if account in self._deficit:
            self._deficit[account] -= amount

    @override
    def next(self, passed_over: Collection[Ticket] = ()) -> Ticket | None:
        standing = {ticket.account for ticket in passed_over}
        if standing and all(account in standing for account in self._turns):
            return None
        turned = 0
        while self._turns:
            account = self._turns[0]
            if account not in standing:
                if self._served is not account:
                    self._deficit[account] += self._grant(account)
                    self._served = account
                first = self._first(account)
                if first.charge.hf <= self._deficit[account]:
                    return first
            self._turns.rotate(-1)
            self._served = None
            turned += 1
            if turned >= len(self._turns):
                self._save(standing)
                turned = 0
        return None

    def _save(self, standing: Collection[Account]) -> None:
        """Grants the rounds in which nobody could be served yet, all at once."""
        waiting = [account for account in self._turns if account not in standing]
        rounds = min(
            -((self._deficit[account] - self._first(account).charge.hf) // self._grant(account)) for account in waiting
        )
        for account in waiting:
            self._deficit[account] += max(0, rounds - 1) * self._grant(account)

    def _grant(self, account: Account) -> int:
        group, weight = self._standing[account]
        return group.share_of(self._quantum * weight) // self._weights[group] or 1

    @override
    def simulate(self, limit: int | None = None) -> list[Ticket]:
        if len(self._weights) == len(self._turns):
            return self._simulate_alone(self._num_waiting if limit is None else min(limit, self._num_waiting))
        ahead = _RoundsAhead(self)
        order: list[Ticket] = []
        while (limit is None or len(order) < limit) and (ticket := ahead.next()) is not None:
            ahead.take(ticket)
            order.append(ticket)
        return order

    def _simulate_alone(self, limit: int) -> list[Ticket]:
        """`simulate` where no two clients of a group wait: grants stay the same, so rounds can be reckoned."""
        deficit, costs, alone = self._deficit, self._costs, self._alone
        due = [  # the round in which each can pay for its first request, and its place in it
            (-((deficit[account] - costs[account]) // alone[account]), place, account)
            for place, account in enumerate(self._turns)
        ]
        due = [entry if entry[0] > 0 else (1, *entry[1:]) for entry in due]
        if due and self._served is due[0][2]:  # this one's turn has begun, so its next comes after all others'
            account = self._served
            due[0] = (0 if costs[account] <= deficit[account] else due[0][0], len(due), account)
        heapq.heapify(due)
        left: dict[Account, tuple[Ticket, Iterator[Ticket]]] = {}
        saved: dict[Account, tuple[int, int]] = {}  # what was not spent, and the round in which that was so
        order: list[Ticket] = []
        while len(order) < limit:
            now, place, account = due[0]
            if account in left:
                (ticket, rest), (have, since) = left[account], saved[account]
            else:
                rest = iter(self._queues[account].values())
                ticket, have, since = next(rest), deficit[account], 0
            order.append(ticket)
            following = next(rest, None)
            if following is None:
                heapq.heappop(due)
                continue
            have += (now - since) * alone[account] - ticket.charge.hf
            left[account], saved[account] = (following, rest), (have, now)
            lacks = -((have - following.charge.hf) // alone[account])
            heapq.heapreplace(due, (now + max(0, lacks), place, account))
        return order


class _RoundsAhead(RoundRobinOrder):
    """A round-robin order that goes on without the other's taking part. Reads the other's queues, and copies none."""

    def __init__(self, order: RoundRobinOrder) -> None:
        self._quantum, self._served = order._quantum, order._served
        self._queues, self._turns, self._deficit = order._queues, deque(order._turns), dict(order._deficit)
        self._weights, self._standing = dict(order._weights), dict(order._standing)
        self._costs, self._alone = dict(order._costs), dict(order._alone)
        self._heads: dict[Account, tuple[Ticket, Iterator[Ticket]]] = {}  # of each client: its first, and the rest

    @override
    def _first(self, account: Account) -> Ticket:
        head = self._heads.get(account)
        if head is None:
            rest = iter(self._queues[account].values())
            head = self._heads[account] = next(rest), rest
        return head[0]

    @override
    def drop(self, ticket: Ticket) -> None:
        account, rest = ticket.account, self._heads[ticket.account][1]
        following = next(rest, None)
        if following is None:
            self._exit(account)
        else:
            self._heads[account] = following, rest
            self._costs[account] = following.charge.hf


def _standing(account: Account) -> tuple[Account, int]:
    """A client's outermost group, and its weight within that in millionths."""
    weight = Fraction(UNIT)
    while account.parent is not None and account.parent.parent is not None:
        weight *= account.weight
        account = account.parent
    return account, max(1, int(weight))
