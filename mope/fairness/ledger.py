"""Who has had how much: a counter for each client, in a tree of tenants, users and whatever else a client's path has.

Knows clients, amounts and who has requests waiting; not requests, prices, engines or time. All amounts are integers
(`mope.fairness.charges.UNIT`), so the books are exact.

The counter of an account is what it was charged, divided by its weight, plus what it was lifted. At every node of the
tree the next in turn is the child with waiting requests and the least counter, ties going to whom has waited since
the earliest arrival: so names, hashes and the order of dictionaries decide nothing.

**Lift** (as in VTC, Sheng et al., OSDI 2024). A child that had no waiting request and gets one is lifted to the least
counter among its siblings that have some; where none has, to that of the sibling that was last to have some. Time spent
away is no credit. That counter is taken without what its requests in flight are charged ahead (`lift_settled`): a
prediction that turns out too high is refunded to whom it was charged, but not to whom was lifted to it, who would wait
until the other has had as much again. VTC's artifact lifts to the whole counter, and so does `lift_settled=False`.

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
are looked at: one whose counter does not exceed where a lift would take it is forgotten, for it would come back there
anyway; one with debt stays, up to `max_clients` in all, and is only then forgotten with its debt, which is
counted.

**Cost.** Finding the next in turn and charging it: O(depth log n) for n children with waiting requests, amortised, by a
heap whose entries are only mended when they come up.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from mope.errors import ConfigError
from mope.fairness.accounts import Account, Group
from mope.fairness.charges import NOTHING, Charge
from mope.fairness.clients import Path
from mope.fairness.kept_books import OpenCharge, pieces, read_amount, read_charge, read_name, read_place

VERSION = 1
_COUNTS = ("num_accounts", "num_forgotten", "num_debts_forgotten", "num_lifts")
_MAX_DEPTH = 64  # of accounts that are restored
_SPARE_ENTRIES = 64  # the list of the idle is rebuilt when it holds twice as many entries as needed, and these

A = TypeVar("A", bound=Account)
_new = tuple.__new__  # makes a named tuple in half the time that its own constructor takes


class Ledger:
    """The books.

    A request is charged by its id: `open` when it is admitted, `adjust` to another amount as more becomes known,
    `close` with what it was worth. Each names the whole amount, never a difference, so nothing is charged twice. An
    `Account` is to be held on to only while it has waiting or open requests: once idle, it may be forgotten.
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        idle_clients: int = 100_000,
        max_clients: int = 1_000_000,
        lift_settled: bool = True,
    ) -> None:
        """Empty books.

        Args:
            weights: entitlement by path, its parts joined by `/`; 1 where none is given.
            idle_clients: accounts without requests that are kept though they have no debt.
            max_clients: accounts in all.
            lift_settled: whether a lift leaves out what requests in flight are charged ahead.
        """
        self._lift_settled = lift_settled
        self.weights = dict(weights or {})
        self._idle_clients, self._max_clients = idle_clients, max_clients
        self.root = Group("", None)
        self._open: dict[str, OpenCharge] = {}
        self._idle: deque[Account] = deque()  # those idle longest first; with some that no longer are, or twice
        self._num_idle = 0
        self._touched: dict[Account, int] = {}
        self.follow_touched = False  # whether a store asks for them
        self.num_accounts = 0
        self.num_forgotten = 0  # idle accounts that were dropped
        self.num_debts_forgotten = 0  # those among them whose counter was above what the lift would have given
        self.num_lifts = 0
        self.num_bookings = 0  # times that a counter was moved: as long as it stays, so do the books
        self.forgotten = NOTHING  # what was charged to accounts that were forgotten

    # -- accounts

    def account(self, path: Path) -> Account:
        """The account of a client, opened if it is new."""
        group = self.root
        for depth, name in enumerate(path, 1):
            child = group.children.get(name)
            if depth == len(path):
                break
            if child is None:
                child = self._opened(Group, name, group, path[:depth])
            elif not isinstance(child, Group):
                child = self._made_group(child)
            group = child
        if child is None:
            child = self._opened(Account, name, group, path)
        return self.account((*path, "")) if isinstance(child, Group) else child

    def _opened(self, kind: type[A], name: str, parent: Group, path: Path) -> A:
        account = kind(name, parent, self.weights.get("/".join(path), 1.0) if self.weights else 1.0)
        account.counter = parent.forgotten
        parent.children[name] = account
        self.num_accounts += 1
        self._list_idle(account)
        return account

    def _made_group(self, client: Account) -> Group:
        """A client that turns out to be a group of others: it becomes the one of its users who gives no name."""
        parent = client.parent
        if parent is None:
            raise ConfigError("the root is a group already")
        group = self._opened(Group, client.name, parent, client.path)
        group.counter, group.charged, group.since = client.counter, client.charged, client.since
        group.num_waiting, group.num_open, group.ahead = client.num_waiting, client.num_open, client.ahead
        if parent.last is client:
            parent.last = group
        if group.num_waiting or group.num_open:
            self._wake(group)
        parent.heap = [entry for entry in parent.heap if entry[2] is not client]
        heapq.heapify(parent.heap)
        parent.list_waiting(group)
        client.become_child(group)
        client.ahead = sum(found.charge.hf for found in self._open.values() if found.account is client)
        if client.since is not None:
            group.num_children_waiting = 1
            group.list_waiting(client)
        return group

    def find(self, path: Path) -> Account | None:
        """The account of a client; None if it has none."""
        node: Account | None = self.root
        for name in path:
            node = node.children.get(name) if isinstance(node, Group) else None
        return node

    def clients(self) -> Iterator[Account]:
        """Accounts without others below them, in the order in which they were opened."""
        return (account for account in self._all_accounts() if not isinstance(account, Group))

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
                    self._wake(node)
                node.since = arrival
                parent.num_children_waiting += 1
                parent.list_waiting(node)
            node = parent
        node.num_waiting += 1

    def leave(self, account: Account) -> None:
        """One of its waiting requests waits no longer."""
        node = account
        while node.parent is not None:
            self._one_less(node, node.parent)
            if not node.num_waiting and not node.num_open:
                self._rest(node)
            node = node.parent
        node.num_waiting -= 1

    @staticmethod
    def _one_less(node: Account, parent: Group) -> None:
        node.num_waiting -= 1
        if node.num_waiting == 0:
            node.since = None
            parent.num_children_waiting -= 1
            parent.last = node

    def set_aside(self, account: Account) -> None:
        """One of its waiting requests cannot run now: it takes no turns, and its account is not forgotten."""
        node = account
        while node.parent is not None:
            node.num_open += 1
            node = node.parent
        self.leave(account)

    def bring_back(self, account: Account, arrival: int) -> None:
        """One of its requests that were set aside takes turns again, without a lift."""
        self.join(account, arrival, lift=False)
        self.forget_aside(account)

    def forget_aside(self, account: Account) -> None:
        """One of its requests that were set aside is gone."""
        node = account
        while node.parent is not None:
            node.num_open -= 1
            if not node.num_open and not node.num_waiting:
                self._rest(node)
            node = node.parent

    def next_client(self, passed_over: Collection[Account] = ()) -> Account | None:
        """Whose turn it is, of those who are not passed over; None if nobody else waits."""
        if passed_over:
            return self._next_but(self.root, passed_over)
        node: Account | None = self.root
        while isinstance(node, Group):
            node = node.next_child()
        return node

    def _next_but(self, node: Account, passed_over: Collection[Account]) -> Account | None:
        if not isinstance(node, Group):
            return None if node in passed_over else node
        heap, aside, found = node.heap, [], None
        while found is None and (child := node.next_child()) is not None:
            found = self._next_but(child, passed_over)
            if found is None:
                aside.append(heapq.heappop(heap))
        for entry in aside:
            heapq.heappush(heap, entry)
        return found

    def _level(self, parent: Group) -> int:
        """Where a child of a group would be lifted to now."""
        least = parent.next_child() or parent.last
        if least is None:
            return 0
        return least.counter - least.ahead if self._lift_settled else least.counter

    def _lift(self, node: Account, parent: Group) -> None:
        level = self._level(parent)
        if level > node.counter:
            node.counter = level
            self.num_lifts += 1

    # -- what is charged

    def open(self, request_id: str, account: Account, charge: Charge, *, waited: bool = False) -> None:
        """A request is admitted and charged.

        Args:
            request_id: its name, unique while it is open.
            account: its client.
            charge: what it is charged.
            waited: it is one of those that `join` counted; it waits no longer.

        Raises:
            ConfigError: it is open already.
        """
        if request_id in self._open:
            raise ConfigError(f"request {request_id[:80]!r} is already charged; adjust or close it")
        self._open[request_id] = _new(OpenCharge, (account, charge))
        self.num_bookings += 1
        service, ufc, rfc, hf = charge
        node, parent = account, account.parent
        while parent is not None:
            node.num_open += 1
            if waited:
                self._one_less(node, parent)
            elif node.num_open == 1 and not node.num_waiting:
                self._wake(node)
            was = node.charged
            node.charged = _new(Charge, (was[0] + service, was[1] + ufc, was[2] + rfc, was[3] + hf))
            moved = node.share(hf)
            node.ahead += moved
            node.counter += moved
            node, parent = parent, parent.parent
        if waited:
            node.num_waiting -= 1
        if self.follow_touched:
            self._touched[account] = self._touched.get(account, 0) + hf

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
        node, hf = found.account, (charge if charge is not None else found.charge).hf
        while node.parent is not None:
            node.ahead -= node.share(hf)
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
        kept = (child.charged for child in self.root.children.values())
        return Charge(*map(sum, zip(self.forgotten, *kept, strict=True)))

    @property
    def open_requests(self) -> tuple[str, ...]:
        """Ids of the requests that are charged and not closed."""
        return tuple(self._open)

    def add_elsewhere(self, path: Path, hf: int) -> None:
        """Counts what other replicas charged a client, in millionths of HF, without booking it as this one's."""
        self.num_bookings += 1
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
        self.num_bookings += 1
        service, ufc, rfc, hf = new[0] - old[0], new[1] - old[1], new[2] - old[2], new[3] - old[3]
        node, parent = account, account.parent
        while parent is not None:
            was = node.charged
            node.charged = _new(Charge, (was[0] + service, was[1] + ufc, was[2] + rfc, was[3] + hf))
            # the difference of two shares, not the share of the difference: rounding cancels when all is closed
            moved = hf if node.is_plain else node.share(new[3]) - node.share(old[3])
            node.ahead += moved
            self._move(node, parent, moved)
            node, parent = parent, parent.parent
        if self.follow_touched:
            self._touched[account] = self._touched.get(account, 0) + hf

    @staticmethod
    def _move(node: Account, parent: Group, amount: int) -> None:
        node.counter += amount
        if amount < 0:
            parent.list_waiting(node)

    # -- keeping and restoring

    def snapshot(self) -> dict[str, Any]:
        """The books as plain JSON values; waiting requests, which are the engine's, are not in them.

        A ledger that is restored from it and told again who waits (`join` with `lift=False`, in order of arrival) has
        the same books to the last digit. Whoever had waited longest without a break among equals is not remembered.
        """
        found: dict[str, Any] = {"version": VERSION}
        for name, rows in self.pieces():
            found.setdefault(name, []).extend(rows)
        return {**found, **self.sums()}

    def pieces(self) -> Iterator[tuple[str, list[Any]]]:
        """Accounts, the idle among them and open requests, as in `snapshot`, some hundred at a time.

        Another thread may change the books between two pieces, and may even take the interpreter away within one. What
        is found then can still be restored; each account's figures are of some moment between the first piece and the
        last.
        """
        return pieces(self.root, lambda: self._idle, self._open)

    def sums(self) -> dict[str, Any]:
        """What `snapshot` holds besides `pieces`."""
        return {
            "version": VERSION,
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
        fresh = Ledger(
            weights=self.weights,
            idle_clients=self._idle_clients,
            max_clients=self._max_clients,
            lift_settled=self._lift_settled,
        )
        try:
            fresh._take_over(snapshot)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"a ledger's snapshot is damaged ({error!r}): start without it") from error
        follow, touched = self.follow_touched, self._touched
        self.__dict__.update(fresh.__dict__)
        self.follow_touched, self._touched = follow, touched

    def _take_over(self, snapshot: Mapping[str, Any]) -> None:
        accounts: list[Account] = []
        depths: list[int] = []
        for kept in snapshot["accounts"]:
            if not accounts:
                account: Account = self.root
                depths.append(0)
            else:
                above = read_place(kept["parent"], accounts)
                parent, name = accounts[above], read_name(kept["name"])
                depths.append(depths[above] + 1)
                if not isinstance(parent, Group) or depths[-1] > _MAX_DEPTH:
                    raise ValueError(f"{name[:80]!r} lies below a client, or too deep")
                if name in parent.children:
                    raise ValueError(f"{name[:80]!r} is there twice")
                account = self._opened(Group if "forgotten" in kept else Account, name, parent, (*parent.path, name))
            account.counter = read_amount(kept["counter"])
            account.charged = read_charge(kept["charged"])
            accounts.append(account)
        for account, kept in zip(accounts, snapshot["accounts"], strict=True):
            if isinstance(account, Group):
                account.forgotten = read_amount(kept["forgotten"])
                account.last = accounts[read_place(kept["last"], accounts)] if kept["last"] is not None else None
                if account.last is not None and account.last.parent is not account:
                    raise ValueError(f"the last of {account.name[:80]!r} is none of its own")
        for account in accounts:
            account.idle = False
        self._idle.clear()
        self._num_idle = 0
        for position in snapshot["idle"]:
            self._list_idle(accounts[read_place(position, accounts)])
        for name, position, charge in snapshot["open"]:
            if read_name(name) in self._open:
                raise ValueError(f"request {name[:80]!r} is there twice")
            opened = self._open[name] = OpenCharge(accounts[read_place(position, accounts)], read_charge(charge))
            node = opened.account
            while node.parent is not None:
                node.num_open += 1
                node.ahead += node.share(opened.charge.hf)
                self._wake(node)
                node = node.parent
        for account in accounts[1:]:  # whoever only waited is idle until it is told again who waits
            if not account.num_open:
                self._list_idle(account)
        self.forgotten = read_charge(snapshot["forgotten"])
        for name in _COUNTS:
            if name != "num_accounts":  # as many as there are
                setattr(self, name, read_amount(snapshot["counts"][name]))

    def _all_accounts(self) -> Iterator[Account]:
        stack: list[Account] = [self.root]
        while stack:
            account = stack.pop()
            yield account
            if isinstance(account, Group):
                stack.extend(reversed(account.children.values()))

    # -- who is forgotten

    def _rest(self, account: Account) -> None:
        self._list_idle(account)
        self._tidy()

    def _tidy(self) -> None:
        idle = self._idle
        for _ in range(2):
            if not idle or (self._num_idle <= self._idle_clients and self.num_accounts <= self._max_clients):
                return
            oldest = idle.popleft()
            if oldest.idle and not self._forget(oldest):
                idle.append(oldest)

    def _list_idle(self, account: Account) -> None:
        if account.idle:
            return
        account.idle = True
        self._num_idle += 1
        self._idle.append(account)
        if len(self._idle) > 2 * self._num_idle + _SPARE_ENTRIES:
            self._idle = deque(dict.fromkeys(account for account in self._idle if account.idle))

    def _wake(self, account: Account) -> None:
        if account.idle:
            account.idle = False
            self._num_idle -= 1

    def _forget(self, account: Account) -> bool:
        parent = account.parent
        if parent is None or parent.last is account or (isinstance(account, Group) and account.children):
            return False
        in_debt = account.counter > max(parent.forgotten, self._level(parent))
        if in_debt and self.num_accounts <= self._max_clients:
            return False
        if in_debt:
            self.num_debts_forgotten += 1
        else:
            parent.forgotten = max(parent.forgotten, account.counter)
        del parent.children[account.name]
        self._wake(account)
        self.num_accounts -= 1
        self.num_forgotten += 1
        if parent is self.root:  # what a group's users were charged is in the group's own account
            self.forgotten = Charge(*map(sum, zip(self.forgotten, account.charged, strict=True)))
        return True
