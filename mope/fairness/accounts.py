"""Accounts: clients, and groups of clients, as the nodes of a tree.

Knows counters, and who among the children of a group is next; not requests or prices. The ledger keeps them.
"""

from __future__ import annotations

import heapq
from fractions import Fraction

from mope.fairness.charges import NOTHING
from mope.fairness.clients import Path

_SPARE_ENTRIES = 64  # a heap is rebuilt when it holds twice as many entries as needed, and these


class Account:
    """A client.

    Attributes:
        name: the last part of its path.
        parent: the group that it belongs to; None at the root.
        counter: charges over weight, plus lifts: what the order goes by.
        asked: `phi` times what the admissions of all its requests cost, see `mope.fairness.overtaking`.
        ahead: what its open requests are charged, over its weight: a part of the counter that is not settled yet.
        charged: all charges of this account and those below it, after corrections; not kept at the root.
        num_waiting: waiting requests of this account and those below it.
        num_open: requests of this account and those below it that were charged and are not closed, or are set aside.
        since: arrival number since when it has had waiting requests; None if it has none.
        idle: whether it is listed among those that may be forgotten.
    """

    __slots__ = (
        "_divisor",
        "_factor",
        "ahead",
        "asked",
        "charged",
        "counter",
        "idle",
        "name",
        "num_open",
        "num_waiting",
        "parent",
        "since",
    )

    def __init__(self, name: str, parent: Group | None, weight: float = 1.0) -> None:
        exact = Fraction(str(weight)) if weight != 1 else _ONE
        self.name, self.parent = name, parent
        self._factor, self._divisor = exact.denominator, exact.numerator
        self.counter = self.ahead = self.asked = 0
        self.charged = NOTHING
        self.num_waiting = self.num_open = 0
        self.since: int | None = None
        self.idle = False

    @property
    def path(self) -> Path:
        """Names from the outermost group to this account."""
        return (*self.parent.path, self.name) if self.parent is not None else ()

    @property
    def weight(self) -> Fraction:
        """Its entitlement in proportion to 1."""
        return Fraction(self._divisor, self._factor)

    @property
    def is_plain(self) -> bool:
        """Whether its weight is 1."""
        return self._factor == self._divisor

    def share(self, amount: int) -> int:
        """`amount` over this account's weight, rounded down."""
        return amount if self._factor == self._divisor else amount * self._factor // self._divisor

    def share_of(self, amount: int) -> int:
        """`amount` times this account's weight, rounded down."""
        return amount if self._factor == self._divisor else amount * self._divisor // self._factor

    def become_child(self, group: Group) -> None:
        """Moves below the group that takes its place, whose weight was its own, as the one without a name."""
        self.name, self.parent, self.counter = "", group, 0
        self._factor = self._divisor = 1
        group.children[""] = self

    def __repr__(self) -> str:
        kind, path = type(self).__name__, "/".join(self.path)
        return f"{kind}({path!r}, counter={self.counter}, waiting={self.num_waiting})"


class Group(Account):
    """Accounts that share what their group is entitled to.

    Attributes:
        children: accounts below it, by name.
        heap: `(counter, since, child)` for each child with waiting requests, and entries that are out of date: they are
            mended when they come up. What an entry says is never above the child's counter unless another says less.
        num_children_waiting: children with waiting requests.
        last: the child that was last to have waiting requests, for when none has.
        forgotten: the highest counter of a child that was forgotten; strangers start there.
    """

    __slots__ = ("children", "forgotten", "heap", "last", "num_children_waiting")

    def __init__(self, name: str, parent: Group | None, weight: float = 1.0) -> None:
        super().__init__(name, parent, weight)
        self.children: dict[str, Account] = {}
        self.heap: list[tuple[int, int, Account]] = []
        self.num_children_waiting = 0
        self.last: Account | None = None
        self.forgotten = 0

    def next_child(self) -> Account | None:
        """The child whose turn it is, None where no child has waiting requests."""
        heap = self.heap
        while heap:
            counter, since, child = heap[0]
            if child.since != since or child.counter < counter:
                heapq.heappop(heap)  # gone, or listed again further up
            elif child.counter > counter:
                heapq.heapreplace(heap, (child.counter, since, child))
            else:
                return child
        return None

    def list_waiting(self, child: Account) -> None:
        """Notes that a child has begun to wait, or that its counter fell while it does."""
        if child.since is None:
            return
        heapq.heappush(self.heap, (child.counter, child.since, child))
        if len(self.heap) > 2 * self.num_children_waiting + _SPARE_ENTRIES:
            self.heap = self.waiting_children()

    def waiting_children(self) -> list[tuple[int, int, Account]]:
        """Those with waiting requests as `(counter, since, account)`, a heap of the caller's own."""
        found = {id(child): child for _, since, child in self.heap if child.since == since}
        entries = [(child.counter, child.since, child) for child in found.values() if child.since is not None]
        heapq.heapify(entries)
        return entries


_ONE = Fraction(1)
