"""In which order waiting requests are admitted: by counters of clients, by a key of their own, or by turns.

Each order holds the waiting requests and answers who is next; the policy around it charges and tells the ledger who
waits. Knows no prices. All ties go to the earlier arrival. `simulate` says whom successive admissions would take
without admitting anyone: a client's later requests stand behind what its earlier ones would have cost it.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import attrgetter

from typing_extensions import override

from mope.fairness.accounts import Account, Group
from mope.fairness.charges import UNIT
from mope.fairness.ledger import Ledger
from mope.fairness.tickets import Ticket

_SPARE_ENTRIES = 64
_arrival, _place = attrgetter("arrival"), attrgetter("place")


class Order(ABC):
    """Waiting requests, and who of them is next.

    Attributes:
        keeps_preempted: whether preempted requests wait here, and not in a lane in front of all.
    """

    keeps_preempted = False

    def arrive(self, ticket: Ticket) -> None:
        """A request waits for the first time."""
        self.add(ticket)

    def preempted(self, ticket: Ticket) -> None:
        """A request that ran waits again; only where `keeps_preempted`."""
        raise NotImplementedError

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
    def standing(self, ticket: Ticket) -> list[float]:
        """By what a request is ordered among those of other clients: the least goes first."""

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


def counters(ticket: Ticket) -> list[int]:
    """The counters of a request's client and of the groups that it is in, the outermost first."""
    found, node = [], ticket.account
    while node.parent is not None:
        found.append(node.counter)
        node = node.parent
    return found[::-1]


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
    def standing(self, ticket: Ticket) -> list[float]:
        return [self._key(ticket), ticket.arrival]

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
    """Requests of each client by their place, which is that of arrival unless an order says otherwise.

    A client's requests are a sorted list: a request that returns finds its place by bisection.
    """

    def __init__(self) -> None:
        self._queues: dict[Account, list[Ticket]] = {}
        self._num_waiting = 0

    @override
    def add(self, ticket: Ticket) -> None:
        queue = self._queues.get(ticket.account)
        if queue is None:
            self._queues[ticket.account] = [ticket]
        elif queue[-1].place < ticket.place:
            queue.append(ticket)
        else:
            insort(queue, ticket, key=_place)
        self._num_waiting += 1

    @override
    def take(self, ticket: Ticket) -> None:
        queue = self._queues[ticket.account]
        del queue[0 if queue[0] is ticket else bisect_left(queue, ticket.place, key=_place)]
        if not queue:
            del self._queues[ticket.account]
        self._num_waiting -= 1

    @override
    def drop(self, ticket: Ticket) -> None:
        self.take(ticket)

    @override
    def standing(self, ticket: Ticket) -> list[float]:
        return [*counters(ticket), ticket.arrival]

    def _first(self, account: Account) -> Ticket:
        return self._queues[account][0]

    @override
    def __iter__(self) -> Iterator[Ticket]:
        return iter(sorted((ticket for queue in self._queues.values() for ticket in queue), key=_arrival))

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
                    left[node], num_left[node] = iter(queue), len(queue)
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


class _Ring:
    """Those of a group who have waiting requests, in turn.

    Attributes:
        turns: whose turn it is, and who comes after.
        served: whose turn has begun: its quantum is granted.
    """

    __slots__ = ("served", "turns")

    def __init__(self) -> None:
        self.turns: deque[Account] = deque()
        self.served: Account | None = None


class RoundRobinOrder(_ByClient):
    """Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995): clients in turn, each for a quantum of HF.

    In its turn a client may spend its quantum and what it did not spend before; what it has not spent when it has no
    more requests is gone. A group has one turn among its neighbours, whatever the number of its users, and within it
    they take turns in the same way: a newcomer waits for one turn of each neighbour at most, and inventing users gains
    nothing. Finding the next costs O(depth), amortised over quanta, and O(n) where all must save for several rounds.
    `simulate` costs O(n), and O(depth log n) for each request.
    """

    def __init__(self, ledger: Ledger, quantum: float) -> None:
        """Takes turns.

        Args:
            ledger: whose accounts they are.
            quantum: HF, in weighted tokens, that an account of weight 1 may spend in a round.
        """
        super().__init__()
        self._ledger = ledger
        self._quantum = int(quantum * UNIT)
        self._rings: dict[Account, _Ring] = {}  # of each group with waiting requests
        self._within: dict[Account, Group] = {}  # in whose ring an account is
        self._deficit: dict[Account, int] = {}  # what each of them may spend, in millionths of HF
        self._grants: dict[Account, int] = {}  # what it is granted in a round
        self._costs: dict[Account, int] = {}  # HF of each client's first request

    @override
    def add(self, ticket: Ticket) -> None:
        self._enter(ticket.account)
        super().add(ticket)
        self._costs[ticket.account] = self._first(ticket.account).charge.hf

    @override
    def restore(self, ticket: Ticket) -> None:
        for node in self._enter(ticket.account):  # it had left: back to where it was, its turn has begun
            ring = self._rings[self._within[node]]
            ring.turns.rotate(1)
            if ring.served is not None:
                self._deficit[ring.served] -= self._grants[ring.served]
            ring.served = node
        self.correct(ticket.account, -ticket.charge.hf)
        super().add(ticket)
        self._costs[ticket.account] = self._first(ticket.account).charge.hf

    @override
    def take(self, ticket: Ticket) -> None:
        self.correct(ticket.account, ticket.charge.hf)
        self.drop(ticket)

    @override
    def drop(self, ticket: Ticket) -> None:
        super().take(ticket)
        if ticket.account not in self._queues:
            del self._costs[ticket.account]
            self._exit(ticket.account)
        else:
            self._costs[ticket.account] = self._first(ticket.account).charge.hf

    @override
    def correct(self, account: Account, amount: int) -> None:
        node, within = account, self._within
        while (group := within.get(node)) is not None:
            self._deficit[node] -= amount
            node = group

    @override
    def next(self, passed_over: Collection[Ticket] = ()) -> Ticket | None:
        root = self._ledger.root
        standing = {ticket.account for ticket in passed_over} if passed_over else ()
        return self._next(root, standing) if root in self._rings else None

    def _next(self, group: Account, standing: Collection[Account]) -> Ticket | None:
        """Who of a group is next; those who stand aside are not granted anything."""
        ring, deficit, costs, grants = self._rings[group], self._deficit, self._costs, self._grants
        turns = ring.turns
        saving: list[tuple[Account, int, int]] = []  # account, grant, and rounds until it can pay
        turned = 0
        while turned < len(turns):
            account = turns[0]
            cost, first = costs.get(account), None
            if cost is None:  # a group
                first = self._next(account, standing)
                cost = first.charge.hf if first is not None else None
            elif account in standing:
                cost = None
            if cost is not None:
                grant = grants[account]
                if ring.served is not account:
                    deficit[account] += grant
                    ring.served = account
                lacks = cost - deficit[account]
                if lacks <= 0:
                    return first if first is not None else self._first(account)
                saving.append((account, grant, -(-lacks // grant)))
            turns.rotate(-1)
            ring.served = None
            turned += 1
            if turned == len(turns) and saving:  # rounds in which nobody could be served are granted all at once
                rounds = min(lacking for _, _, lacking in saving) - 1
                for account, grant, _ in saving:
                    deficit[account] += rounds * grant
                saving.clear()
                turned = 0
        return None

    def _enter(self, account: Account) -> list[Account]:
        """Gives a client turns, and the groups that it is in; those that had none until now."""
        entered: list[Account] = []
        node = account
        while node.parent is not None and node not in self._within:
            group = node.parent
            ring = self._rings.get(group)
            if ring is None:
                ring = self._rings[group] = _Ring()
                self._split(group, ring)
            self._place(node, group, 0)
            ring.turns.append(node)
            entered.append(node)
            node = group
        return entered

    def _split(self, group: Group, ring: _Ring) -> None:
        """A client may turn out to be a group: it becomes one of its users, and its turn the group's."""
        client, parent = group.children.get(""), group.parent
        if client is None or parent is None or self._within.get(client) is not parent:
            return
        outer = self._rings[parent]
        outer.turns[outer.turns.index(client)] = group
        outer.served = group if outer.served is client else outer.served
        self._place(group, parent, self._deficit[client])
        self._place(client, group, 0)
        ring.turns.append(client)

    def _place(self, account: Account, group: Group, deficit: int) -> None:
        self._within[account], self._deficit[account] = group, deficit
        self._grants[account] = account.share_of(self._quantum) or 1

    def _exit(self, account: Account) -> None:
        node = account
        while (group := self._within.get(node)) is not None:
            ring = self._rings[group]
            ring.turns.remove(node)
            ring.served = None if ring.served is node else ring.served
            del self._within[node], self._deficit[node], self._grants[node]
            if ring.turns:
                return
            del self._rings[group]
            node = group

    @override
    def simulate(self, limit: int | None = None) -> list[Ticket]:
        root = self._ledger.root
        ahead = _RingAhead(self, root) if root in self._rings else None
        order: list[Ticket] = []
        while ahead is not None and ahead.first is not None and (limit is None or len(order) < limit):
            order.append(ahead.first)
            ahead.take()
        return order


class _QueueAhead:
    """A client's requests as they would be taken.

    Attributes:
        first: whose turn it would be; None when all were taken.
    """

    __slots__ = ("_rest", "first")

    def __init__(self, queue: Iterable[Ticket]) -> None:
        self._rest = iter(queue)
        self.first: Ticket | None = next(self._rest, None)

    def take(self) -> None:
        """The first would be admitted."""
        self.first = next(self._rest, None)


class _RingAhead:
    """Turns within a group as they would come: the rounds in which nobody can pay are reckoned, not lived through.

    Attributes:
        first: whose turn it would be; None when all were taken.
    """

    __slots__ = ("_ahead", "_due", "_order", "_saved", "first")

    def __init__(self, order: RoundRobinOrder, group: Account) -> None:
        ring, deficit, costs, grants = order._rings[group], order._deficit, order._costs, order._grants
        self._order = order
        self._ahead: dict[Account, _QueueAhead | _RingAhead] = {}
        self._saved: dict[Account, tuple[int, int]] = {}  # what is not spent, and the round in which that was so
        groups = {account: self._cost(account) for account in ring.turns if account not in costs}
        costs = {**costs, **groups} if groups else costs
        due = [  # the round in which each can pay, and its place in it
            (-((deficit[account] - costs[account]) // grants[account]), place, account)
            for place, account in enumerate(ring.turns)
        ]
        self._due = [entry if entry[0] > 0 else (1, *entry[1:]) for entry in due]
        account = ring.turns[0]
        if ring.served is account:  # its turn has begun, so its next comes after all others'
            self._due[0] = (0 if costs[account] <= deficit[account] else self._due[0][0], len(due), account)
        heapq.heapify(self._due)
        self.first: Ticket | None = self._of(self._due[0][2]).first

    def _cost(self, account: Account) -> int:
        first = self._of(account).first
        return first.charge.hf if first is not None else 0

    def _of(self, account: Account) -> _QueueAhead | _RingAhead:
        found = self._ahead.get(account)
        if found is None:
            order = self._order
            found = self._ahead[account] = (
                _RingAhead(order, account) if account in order._rings else _QueueAhead(order._queues[account])
            )
        return found

    def take(self) -> None:
        """The first would be admitted."""
        now, place, account = self._due[0]
        ahead, grant = self._ahead[account], self._order._grants[account]
        have, since = self._saved.get(account, (self._order._deficit[account], 0))
        have += (now - since) * grant - self._cost(account)
        ahead.take()
        if ahead.first is None:
            heapq.heappop(self._due)
        else:
            self._saved[account] = have, now
            lacks = ahead.first.charge.hf - have
            heapq.heapreplace(self._due, (now - (-lacks // grant) if lacks > 0 else now, place, account))
        self.first = self._of(self._due[0][2]).first if self._due else None
