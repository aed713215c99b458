"""Who has had how much: a counter for each client, in a tree of tenants, users and whatever else a client's path has.

Knows clients, amounts and who has requests waiting; not requests, prices, engines or time. All amounts are integers
(`mope.fairness.charges.UNIT`), so the books are exact.

The counter of an account is what it was charged, divided by its weight, plus what it was lifted. At every node of the
tree the next in turn is the child with waiting requests and the least counter, ties going to whom has waited since
the earliest arrival: so names, hashes and the order of dictionaries decide nothing.

**Lift** (as in VTC, Sheng et al., OSDI 2024). A child that had no waiting request and gets one is lifted to the least
counter among its siblings that have some; where none has, to that of the sibling that was last to have some. Time spent
away is no credit.

**Bound.** Let f and g be children of one node, H the largest charge of one admission over the weight of whom it is
charged to, and E the most that the requests which a child has in flight at one moment are charged wrongly by, all
errors added up. Once f has been admitted while g was waiting, and for as long as g goes on waiting,

    counter(f) - counter(g) <= H + 2 E.

Proof. Let t be the last admission of f. Just before, f had the least counter, so counter(f) <= counter(g); the
admission added at most H. Since then f rose only by corrections of requests that were in flight after t, by at most E.
g fell only by corrections: of what was in flight at t by at most E, while a request admitted later first adds its
charge and is corrected to a true one that is not negative, and so leaves no fall. Hence, from when both have been
admitted once while both wait, |counter(f) - counter(g)| <= H + 2 E, and what the two were charged in any interval
after that, corrections included and over their weights, differs by at most 2 H + 4 E. With lengths known exactly, E = 0
and this is VTC's 2 U. `tests/property/test_fairness_bound.py` checks these figures on random workloads.

**No starvation.** Every admission is charged more than nothing, so a child that waits has, after finitely many
admissions of others, the least counter.

**Memory.** An account without waiting or open requests is idle. When more than `idle_clients` are, those longest idle
are looked at: one whose counter does not exceed the least of its waiting siblings is forgotten, for the lift would take
it there anyway; one with debt stays, up to `max_clients` in all, and is only then forgotten with its debt, which is
counted.

**Cost.** Finding the next in turn and charging it: O(depth log n) for n children with waiting requests, amortised, by a
heap whose entries are only mended when they come up.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from mope.errors import ConfigError
from mope.fairness.charges import NOTHING, Charge
from mope.fairness.clients import Path

VERSION = 1
_COUNTS = ("num_accounts", "num_forgotten", "num_debts_forgotten", "num_lifts")
_SPARE_ENTRIES = 64  # a heap is rebuilt when it holds twice as many entries as needed, and these


class Account:
    """A client, or a group of clients: a node of the tree.

    Attributes:
        name: the last part of its path.
        parent: the group that it belongs to; None at the root.
        counter: charges over weight, plus lifts: what the order goes by.
        charged: all charges of this account and those below it, after corrections; not kept at the root.
        num_waiting: waiting requests of this account and those below it.
        num_open: requests of this account and those below it that were charged and are not closed.
        since: arrival number since when it has had waiting requests; None if it has none.
        children: accounts below it, by name; empty for a client.
    """

    __slots__ = (
        "_divisor",
        "_factor",
        "charged",
        "children",
        "counter",
        "forgotten",
        "heap",
        "last",
        "name",
        "num_children_waiting",
        "num_open",
        "num_waiting",
        "parent",
        "since",
    )

    def __init__(self, name: str, parent: Account | None, weight: float = 1.0) -> None:
        exact = Fraction(str(weight))
        self.name, self.parent = name, parent
        self._factor, self._divisor = exact.denominator, exact.numerator
        self.counter = 0
        self.charged = NOTHING
        self.num_waiting = self.num_open = self.num_children_waiting = 0
        self.since: int | None = None
        self.children: dict[str, Account] | None = None
        self.heap: list[tuple[int, int, Account]] | None = None
        self.last: Account | None = None  # the child that was last to have waiting requests, now that none has
        self.forgotten = 0  # the highest counter of a child that was forgotten: strangers start there

    @property
    def path(self) -> Path:
        """Names from the outermost group to this account."""
        above = self.parent.path if self.parent is not None else ()
        return (*above, self.name) if self.parent is not None else ()

    @property
    def weight(self) -> Fraction:
        """Its entitlement in proportion to 1."""
        return Fraction(self._divisor, self._factor)

    def share(self, amount: int) -> int:
        """`amount` over this account's weight, rounded down."""
        return amount if self._factor == self._divisor else amount * self._factor // self._divisor

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

    def waiting_children(self) -> list[tuple[int, int, Account]]:
        """Those with waiting requests as `(counter, since, account)`, a heap of the caller's own."""
        found = {id(child): child for _, since, child in self.heap or () if child.since == since}
        entries = [(child.counter, child.since, child) for child in found.values() if child.since is not None]
        heapq.heapify(entries)
        return entries

    def __repr__(self) -> str:
        return f"Account({'/'.join(self.path)!r}, counter={self.counter}, waiting={self.num_waiting})"


class OpenCharge(NamedTuple):
    """What a request in flight has been charged, and to whom."""

    account: Account
    charge: Charge


class Ledger:
    """The books.

    A request is charged by its id: `open` when it is admitted, `adjust` to another amount as more becomes known,
    `close` with what it was worth. Each names the whole amount, never a difference, so nothing is charged twice.
    """

    def __init__(
        self, *, weights: Mapping[str, float] | None = None, idle_clients: int = 100_000, max_clients: int = 1_000_000
    ) -> None:
        """Empty books.

        Args:
            weights: entitlement by path, its parts joined by `/`; 1 where none is given.
            idle_clients: accounts without requests that are kept though they have no debt.
            max_clients: accounts in all.
        """
        self._weights = dict(weights or {})
        self._idle_clients, self._max_clients = idle_clients, max_clients
        self.root = Account("", None)
        self._open: dict[str, OpenCharge] = {}
        self._idle: OrderedDict[Account, None] = OrderedDict()
        self._touched: dict[Account, int] = {}
        self.follow_touched = False  # whether a store asks for them
        self.num_accounts = 0
        self.num_forgotten = 0  # idle accounts that were dropped
        self.num_debts_forgotten = 0  # those among them whose counter was above what the lift would have given
        self.num_lifts = 0
        self.forgotten = NOTHING  # what was charged to accounts that were forgotten

    # -- accounts

    def account(self, path: Path) -> Account:
        """The account of a client, opened if it is new."""
        node = self.root
        for depth, name in enumerate(path, 1):
            if node.children is None:
                node.children, node.heap = {}, []
            child = node.children.get(name)
            if child is None:
                weight = self._weights.get("/".join(path[:depth]), 1.0) if self._weights else 1.0
                child = node.children[name] = self._opened(name, node, weight)
            elif depth < len(path) and child.children is None:
                child = self._made_group(child)
            node = child
        return self.account((*path, "")) if node.children is not None else node

    def _opened(self, name: str, parent: Account, weight: float = 1.0) -> Account:
        account = Account(name, parent, weight)
        account.counter = parent.forgotten
        self.num_accounts += 1
        self._idle[account] = None
        return account

    def _made_group(self, client: Account) -> Account:
        """A client that turns out to be a group of others: it becomes the one of its users who gives no name."""
        parent = client.parent
        if parent is None or parent.children is None:
            raise ConfigError("the root is a group already")
        group = parent.children[client.name] = self._opened(client.name, parent, float(client.weight))
        group.counter, group.charged, group.since = client.counter, client.charged, client.since
        group.num_waiting, group.num_open = client.num_waiting, client.num_open
        group.children, group.heap = {"": client}, []
        client.name, client.parent, client.counter = "", group, 0
        client._factor = client._divisor = 1
        if parent.last is client:
            parent.last = group
        if group.num_waiting or group.num_open:
            self._idle.pop(group, None)
        if client.since is not None:
            group.num_children_waiting = 1
            self._push(client, group)
            client_since, client.since = client.since, None  # its entries at the parent now count as gone
            self._push(group, parent)
            if parent.heap is not None:
                parent.heap[:] = [entry for entry in parent.heap if entry[2] is not client]
                heapq.heapify(parent.heap)
            client.since = client_since
        return group

    def find(self, path: Path) -> Account | None:
        """The account of a client; None if it has none."""
        node: Account | None = self.root
        for name in path:
            node = (node.children or {}).get(name) if node is not None else None
        return node

    def clients(self) -> Iterator[Account]:
        """Accounts without others below them, in the order in which they were opened."""
        return (account for account in self._all_accounts() if account.children is None and account is not self.root)

    # -- who waits

    def join(self, account: Account, arrival: int, *, lift: bool = True) -> None:
        """One more of its requests waits.

        Args:
            account: a client.
            arrival: number of the request, in order of arrival.
            lift: whether a client that had none waiting is lifted; not for a request that was taken and given back.
        """
        node = account
        while node.parent is not None:
            parent = node.parent
            node.num_waiting += 1
            if node.num_waiting == 1:
                if lift:
                    self._lift(node, parent)
                if not node.num_open:
                    self._idle.pop(node, None)
                node.since = arrival
                self._push(node, parent)
                parent.num_children_waiting += 1
            node = parent
        node.num_waiting += 1

    def leave(self, account: Account) -> None:
        """One of its waiting requests waits no longer."""
        node = account
        while node.parent is not None:
            parent = node.parent
            node.num_waiting -= 1
            if node.num_waiting == 0:
                node.since = None
                parent.num_children_waiting -= 1
                parent.last = node
                if not node.num_open:
                    self._rest(node)
            node = parent
        node.num_waiting -= 1

    def next_client(self, passed_over: Collection[Account] = ()) -> Account | None:
        """Whose turn it is, of those who are not passed over; None if nobody else waits."""
        if passed_over:
            return self._next_but(self.root, passed_over)
        node: Account | None = self.root
        while node is not None and node.children:
            node = node.next_child()
        return node if node is not self.root else None

    def _next_but(self, node: Account, passed_over: Collection[Account]) -> Account | None:
        if not node.children:
            return None if node in passed_over or node is self.root else node
        heap, aside, found = node.heap or [], [], None
        while found is None and (child := node.next_child()) is not None:
            found = self._next_but(child, passed_over)
            if found is None:
                aside.append(heapq.heappop(heap))
        for entry in aside:
            heapq.heappush(heap, entry)
        return found

    def _lift(self, node: Account, parent: Account) -> None:
        least = parent.next_child()
        if least is None:
            least = parent.last
        if least is not None and least.counter > node.counter:
            node.counter = least.counter
            self.num_lifts += 1

    @staticmethod
    def _push(node: Account, parent: Account) -> None:
        heap = parent.heap
        if heap is None or node.since is None:
            return
        heapq.heappush(heap, (node.counter, node.since, node))
        if len(heap) > 2 * parent.num_children_waiting + _SPARE_ENTRIES:
            heap[:] = parent.waiting_children()

    # -- what is charged

    def open(self, request_id: str, account: Account, charge: Charge) -> None:
        """A request is admitted and charged.

        Raises:
            ConfigError: it is open already.
        """
        if request_id in self._open:
            raise ConfigError(f"request {request_id[:80]!r} is already charged; adjust or close it")
        self._open[request_id] = OpenCharge(account, charge)
        node = account
        while node.parent is not None:
            node.num_open += 1
            if node.num_open == 1 and not node.num_waiting:
                self._idle.pop(node, None)
            node = node.parent
        self._book(account, NOTHING, charge)

    def adjust(self, request_id: str, charge: Charge) -> bool:
        """Sets what an open request is charged in all; says whether it is open."""
        found = self._open.get(request_id)
        if found is None:
            return False
        if charge != found.charge:
            self._open[request_id] = OpenCharge(found.account, charge)
            self._book(found.account, found.charge, charge)
        return True

    def close(self, request_id: str, charge: Charge | None = None) -> bool:
        """A request ends, charged `charge` in all, or what it is charged now; says whether it was open."""
        found = self._open.pop(request_id, None)
        if found is None:
            return False
        if charge is not None and charge != found.charge:
            self._book(found.account, found.charge, charge)
        node = found.account
        while node.parent is not None:
            node.num_open -= 1
            if not node.num_open and not node.num_waiting:
                self._rest(node)
            node = node.parent
        return True

    def charged(self, request_id: str) -> Charge | None:
        """What an open request is charged now; None if it is not open."""
        found = self._open.get(request_id)
        return found.charge if found is not None else None

    @property
    def total(self) -> Charge:
        """All that was ever charged, after corrections, to accounts that were forgotten, too."""
        kept = (child.charged for child in (self.root.children or {}).values())
        return Charge(*map(sum, zip(self.forgotten, *kept, strict=True)))

    @property
    def open_requests(self) -> tuple[str, ...]:
        """Ids of the requests that are charged and not closed."""
        return tuple(self._open)

    def add_elsewhere(self, path: Path, hf: int) -> None:
        """Counts what other replicas charged a client, in millionths of HF, without booking it as this one's."""
        node = self.account(path)
        while node.parent is not None:
            self._move(node, node.parent, node.share(hf))
            node = node.parent
            self._tidy()

    def take_touched(self) -> dict[Account, int]:
        """Who was charged since the last call, and how much, in millionths of HF; empty unless `follow_touched`.

        What was charged to accounts that were forgotten in between is in it, too: their `path` still names the client.
        """
        touched = self._touched
        if touched:
            self._touched = {}
        return touched

    def _book(self, account: Account, old: Charge, new: Charge) -> None:
        service, ufc, rfc, hf = new[0] - old[0], new[1] - old[1], new[2] - old[2], new[3] - old[3]
        node, parent = account, account.parent
        while parent is not None:
            was = node.charged
            node.charged = Charge(was[0] + service, was[1] + ufc, was[2] + rfc, was[3] + hf)
            # the difference of two shares, not the share of the difference: rounding cancels when all is closed
            self._move(node, parent, hf if node._factor == node._divisor else node.share(new[3]) - node.share(old[3]))
            node, parent = parent, parent.parent
        if self.follow_touched:
            self._touched[account] = self._touched.get(account, 0) + hf

    def _move(self, node: Account, parent: Account, amount: int) -> None:
        node.counter += amount
        if amount < 0 and node.since is not None:
            self._push(node, parent)

    # -- keeping and restoring

    def snapshot(self) -> dict[str, Any]:
        """The books as plain JSON values; waiting requests, which are the engine's, are not in them.

        A ledger that is restored from it and told again who waits (`join` with `lift=False`) goes on exactly as this
        one would.
        """
        accounts = list(self._all_accounts())
        number = {account: position for position, account in enumerate(accounts)}
        return {
            "version": VERSION,
            "accounts": [
                {
                    "name": account.name,
                    "parent": number[account.parent] if account.parent is not None else None,
                    "counter": account.counter,
                    "charged": list(account.charged),
                    "forgotten": account.forgotten,
                    "last": number[account.last] if account.last is not None else None,
                    "group": account.children is not None,
                }
                for account in accounts
            ],
            "idle": [number[account] for account in self._idle],
            "open": [[name, number[found.account], list(found.charge)] for name, found in self._open.items()],
            "forgotten": list(self.forgotten),
            "counts": {name: getattr(self, name) for name in _COUNTS},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Takes over the books of a snapshot, in place of its own.

        Raises:
            ConfigError: not a snapshot of a ledger, or of another version; this ledger is as it was.
        """
        if not isinstance(snapshot, Mapping) or snapshot.get("version") != VERSION:
            found = snapshot.get("version") if isinstance(snapshot, Mapping) else type(snapshot).__name__
            raise ConfigError(f"a ledger's snapshot has version {found!r}; expected {VERSION}: start without it")
        fresh = Ledger(weights=self._weights, idle_clients=self._idle_clients, max_clients=self._max_clients)
        try:
            fresh._take_over(snapshot)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"a ledger's snapshot is damaged ({error!r}): start without it") from error
        follow, touched = self.follow_touched, self._touched
        self.__dict__.update(fresh.__dict__)
        self.follow_touched, self._touched = follow, touched

    def _take_over(self, snapshot: Mapping[str, Any]) -> None:
        accounts: list[Account] = []
        for kept in snapshot["accounts"]:
            if kept["parent"] is None:
                account = self.root
            else:
                parent = accounts[kept["parent"]]
                path = (*parent.path, kept["name"])
                account = self._opened(kept["name"], parent, self._weights.get("/".join(path), 1.0))
                if parent.children is None:
                    raise ValueError(f"{kept['name'][:80]!r} lies below a client")
                parent.children[kept["name"]] = account
            if kept["group"]:
                account.children, account.heap = {}, []
            account.counter, account.forgotten = int(kept["counter"]), int(kept["forgotten"])
            account.charged = Charge(*map(int, kept["charged"]))
            accounts.append(account)
        for account, kept in zip(accounts, snapshot["accounts"], strict=True):
            account.last = accounts[kept["last"]] if kept["last"] is not None else None
        self._idle = OrderedDict.fromkeys(accounts[position] for position in snapshot["idle"])
        for name, position, charge in snapshot["open"]:
            self._open[name] = OpenCharge(accounts[position], Charge(*map(int, charge)))
            node = accounts[position]
            while node.parent is not None:
                node.num_open += 1
                node = node.parent
        for account in accounts[1:]:  # whoever only waited is idle until it is told again who waits
            if not account.num_open:
                self._idle.setdefault(account)
        self.forgotten = Charge(*map(int, snapshot["forgotten"]))
        for name in _COUNTS:
            setattr(self, name, int(snapshot["counts"][name]))

    def _all_accounts(self) -> Iterator[Account]:
        stack = [self.root]
        while stack:
            account = stack.pop()
            yield account
            stack.extend(reversed((account.children or {}).values()))

    # -- who is forgotten

    def _rest(self, account: Account) -> None:
        self._idle[account] = None
        self._tidy()

    def _tidy(self) -> None:
        for _ in range(2):
            if len(self._idle) <= self._idle_clients and self.num_accounts <= self._max_clients:
                return
            if not self._idle:
                return
            oldest = next(iter(self._idle))
            if not self._forget(oldest):
                self._idle.move_to_end(oldest)

    def _forget(self, account: Account) -> bool:
        parent = account.parent
        if parent is None or parent.children is None or account.children or parent.last is account:
            return False
        least = parent.next_child() or parent.last
        in_debt = account.counter > max(parent.forgotten, least.counter if least is not None else 0)
        if in_debt and self.num_accounts <= self._max_clients:
            return False
        if in_debt:
            self.num_debts_forgotten += 1
        else:
            parent.forgotten = max(parent.forgotten, account.counter)
        del parent.children[account.name]
        del self._idle[account]
        self.num_accounts -= 1
        self.num_forgotten += 1
        if parent is self.root:  # what a group's users were charged is in the group's own account
            self.forgotten = Charge(*map(sum, zip(self.forgotten, account.charged, strict=True)))
        return True
