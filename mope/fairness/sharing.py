"""What one replica has told a Redis server, and what others told it: each charge counts once, whatever gets lost.

Knows the protocol of `mope.fairness.redis_scripts`; not sockets, threads, ledgers or clocks.

**Telling.** A replica keeps what it charged each client in all. It sends the differences from what the server is known
to have, in numbered batches. The server takes batch n + 1 after batch n and no other, and remembers beside the totals
what of them is this replica's. So a batch whose reply was lost can be sent again, and after a pause the number says
whether it had come through. A session that begins voids commands of the last one that are still on their way.

**Loss.** When the server lost something (killed with an older state on disk, failed over to a copy that lagged behind,
emptied), the number of the last batch went back, or is gone. The replica then reads what the server still has of it,
and tells the difference from what it charged in all. Once every living replica has, totals are exact again. Charges of
replicas that are gone by then are lost as far as the server lost them.

**Reading.** Each client's total comes with the version at which it last changed; a replica reads those beyond the
version that it has read up to, and from the beginning whenever a session begins. What others charged is the change of
the total less the change of its own part, so reading twice counts once. Right after a session began, totals that fell
are not believed for a while: others may not yet have told again what the server lost.

**Beginning.** A replica counts what others charge after its first reading, see `mope.fairness.stores`. A namespace that
is younger than the replica is counted from its beginning.

**Memory.** The server lists `max_clients` clients. Beyond, it adds the total of the one that was charged least recently
to `(forgotten)`; replicas notice and do the same with their own part, keeping only its sum for telling again. While the
server is gone, a replica remembers up to twice as many clients and counts what new ones are charged under
`(forgotten)`. So sums over all clients stay exact, always; but what was added to `(forgotten)` before a replica has
read it is not counted there. A client that is listed again after it was evicted begins a total from 0; one that is
listed again after a loss is told in full. The two are told apart by the versions that were evicted, which errs only if
both happen to a client between two readings: then the totals are right, and one replica's counter is not.

**Replicas that do not come back.** Their share stays in the totals: it was delivered. What is kept beside the totals
for telling again expires a week after a replica was last heard of. With totals that are told as absolute numbers that
would be a trap: a replica that comes back after longer would find nothing, take it for a loss, and tell all once more.
Here the number of its last batch lies with the totals and does not expire. A replica that finds its number but not
its part leaves its share behind and begins anew under another name.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from mope.errors import StoreError
from mope.fairness.redis_scripts import FAREWELL, HELLO, TELL, Script

FORGOTTEN_FIELD = "(forgotten)"
BATCH = 250  # clients in one command, told or read
KEEP_S = 7 * 24 * 3600  # seconds that a replica's part is kept after it was last heard of
NO_BATCH = "0 -"
LIMIT = 2**62 - 1  # of what one replica charges a client: differences then fit into the server's 64 bits


class Server(Protocol):
    """A connection to a Redis server; what it raises ends the session."""

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        """The reply to a script, its texts as bytes."""

    def fields(self, key: str) -> Iterable[tuple[bytes, bytes]]:
        """Fields and values of a hash."""


class _Client:
    """What is known of one client.

    Attributes:
        own: what this replica charged it in all.
        acked: what of that the server is known to have.
        seen_total: the total of all replicas, when it was last read.
        seen_acked: `acked` when it was last read.
        version: of the total that was last read.
        mark: of when the server listed it.
        reading: number of the complete reading in which it was last read.
    """

    __slots__ = ("acked", "mark", "own", "reading", "seen_acked", "seen_total", "version")

    def __init__(self) -> None:
        self.own = self.acked = self.seen_total = self.seen_acked = self.version = self.reading = 0
        self.mark = ""


class _Batch(NamedTuple):
    number: int
    session: str
    amounts: dict[str, int]
    moves: list[str]


class Sharing:
    """One replica's side of a namespace.

    Attributes:
        replica: its name on the server, another one for each start.
        received: what others charged and nobody has taken yet, by field.
        num_restored: times that the server had lost something and was told again.
        num_refused: amounts that could not be counted.
    """

    def __init__(self, namespace: str, name: str, *, max_clients: int, settle_s: float = 0.0) -> None:
        """A replica that has not spoken yet.

        Args:
            namespace: of the replicas that share.
            name: of this one; a mark that no other has is added.
            max_clients: clients that the server lists.
            settle_s: seconds from the beginning of a session in which totals that fell are not believed.
        """
        self._prefix, self._name = f"mope:{{{namespace}}}", name
        self._max_clients, self._settle_s = max_clients, settle_s
        self._clients: OrderedDict[str, _Client] = OrderedDict()  # who was read longest ago comes first
        self._forgotten = _Client()
        self._untold: dict[str, None] = {}
        self._moves: dict[str, None] = {}  # clients whose part the server is to add to (forgotten)
        self._sent: _Batch | None = None
        self._session = self._epoch = ""
        self._last = NO_BATCH  # number and session of the last batch that the server is known to have
        self._cursor = self._reading = 0
        self._has_read = self._skips_history = self._is_sweeping = self._has_swept = False
        self._settled_s = self._kept_s = 0.0
        self._unbelieved = False
        self.replica = self._fresh_name()
        self.received: dict[str, int] = {}
        self.num_restored = self.num_refused = 0

    @property
    def num_clients(self) -> int:
        """Clients that are remembered."""
        return len(self._clients)

    @property
    def num_untold(self) -> int:
        """Clients with charges that the server is not known to have."""
        return len(self._untold)

    def charge(self, field: str, amount: int) -> None:
        """This replica charged a client; to be told."""
        client = self._clients.get(field)
        if client is None:
            if len(self._clients) >= 2 * self._max_clients:
                field, client = FORGOTTEN_FIELD, self._forgotten
            else:
                client = self._clients[field] = _Client()
        if abs(client.own + amount) > LIMIT:
            self.num_refused += 1
            return
        client.own += amount
        self._mark(field, client)

    def disconnected(self) -> None:
        """The session is over: whether what was sent has come through is found out in the next one."""
        self._session = ""

    def exchange(self, server: Server, now_s: float, age_s: float) -> None:
        """Tells all that is untold and reads all that is new.

        Args:
            server: a connection, the same one since `disconnected`.
            now_s: seconds of a clock that does not jump.
            age_s: seconds since this replica started.

        Raises:
            StoreError: the namespace can't be used.
            Exception: whatever the connection raises; then `disconnected` is to be called.
        """
        if now_s >= self._settled_s:
            crowded = not self._has_swept and 2 * len(self._clients) > 3 * self._max_clients
            if crowded or self._unbelieved:
                self._cursor, self._unbelieved = 0, False
                self._reading += 1
                self._is_sweeping = self._has_swept = crowded
        num_lost = 0
        while True:
            if not self._session:
                self._greet(server, now_s, age_s)
            reply = server.run(TELL, self._keys(), self._next_batch(now_s))
            if reply[0] != b"ok":
                num_lost += 1
                if num_lost > 3:
                    raise StoreError(
                        f"{self._prefix} does not keep what it is told; expected a primary server that evicts "
                        "no keys of its own accord (maxmemory-policy noeviction)"
                    )
                self.disconnected()
                continue
            if not self._took(reply, now_s) and not self._untold and not self._moves:
                return

    def check(self, server: Server) -> None:
        """Begins and ends a session: whether this server can be used."""
        self._greet(server, 0.0, 0.0)
        self.farewell(server)

    def farewell(self, server: Server) -> None:
        """Nothing will be told any more: the server need not keep this replica's part."""
        if self._session:
            server.run(FAREWELL, [self._totals_key, self._told_key], [f"@{self.replica}", self._session])
            self.disconnected()

    def totals(self, server: Server) -> dict[str, int]:
        """What all replicas charged each client, by field."""
        return {
            field.decode(): int(value)
            for field, value in server.fields(self._totals_key)
            if (field.startswith(b"[") or field == FORGOTTEN_FIELD.encode()) and _is_ours(field, value)
        }

    # -- sessions

    def _greet(self, server: Server, now_s: float, age_s: float) -> None:
        while True:
            session = secrets.token_hex(8)
            epoch, has_told, last, namespace_age_s = server.run(
                HELLO, self._keys(), [f"@{self.replica}", session, secrets.token_hex(8), KEEP_S]
            )
            epoch, last = epoch.decode(), last.decode()
            if not self._epoch:
                self._epoch = epoch
                self._skips_history = float(namespace_age_s) > age_s
            same = epoch == self._epoch
            if same and self._sent is not None and last == f"{self._sent.number} {self._sent.session}":
                self._acknowledge()
            if same and not has_told:
                old, keys = self.replica, [self._totals_key, self._told_key]
                self._begin_anew()  # first: should the reply be lost, the old name must not be found without a number
                server.run(FAREWELL, keys, [f"@{old}", session])
                continue
            if not same or last != self._last:
                self._restore(server)
            self._void()
            self._session, self._epoch, self._last, self._cursor = session, epoch, last, 0
            self._kept_s, self._is_sweeping, self._has_swept = now_s, False, False
            if self._has_read:
                self._settled_s = now_s + self._settle_s
            return

    def _restore(self, server: Server) -> None:
        """The server lost something: what it still has of this replica is what it is known to have."""
        told = {field.decode(): int(value) for field, value in server.fields(self._told_key) if field != b"epoch"}
        self._void()
        forgotten = told.pop(FORGOTTEN_FIELD, 0)
        moves = [field for field in told if field in self._moves or field not in self._clients]
        forgotten += sum(told.pop(field) for field in moves)
        self._moves = dict.fromkeys(moves)
        for field, client in self._clients.items():
            client.acked = told.get(field, 0)
            self._mark(field, client)
        self._forgotten.acked = forgotten
        self._mark(FORGOTTEN_FIELD, self._forgotten)
        self.num_restored += 1

    def _begin_anew(self) -> None:
        """Leaves behind what was told, under a name that is not used again."""
        self._void()
        self._moves.clear()
        for client in (self._forgotten, *self._clients.values()):
            client.own -= client.acked
            client.seen_acked -= client.acked
            client.acked = 0
        self.replica, self._last = self._fresh_name(), NO_BATCH

    def _fresh_name(self) -> str:
        return f"{self._name}-{secrets.token_hex(8)}"

    # -- telling

    def _next_batch(self, now_s: float) -> list[str | int]:
        moves = list(islice(self._moves, BATCH))
        fields = list(islice(self._untold, BATCH)) if len(moves) == len(self._moves) else []  # a move comes first
        amounts = {field: (client := self._client(field)).own - client.acked for field in fields}
        number = int(self._last.partition(" ")[0])
        if moves or amounts:
            number += 1
            self._sent = _Batch(number, self._session, amounts, moves)
        keep_s = 0
        if now_s - self._kept_s > KEEP_S / 10:
            keep_s, self._kept_s = KEEP_S, now_s
        head: list[str | int] = [f"@{self.replica}", self._session, number, self._cursor, BATCH, self._max_clients]
        told = [part for pair in amounts.items() for part in pair]
        return [*head, keep_s, len(moves), *moves, *told]

    def _acknowledge(self) -> None:
        batch = self._sent
        if batch is None:
            return
        self._sent, self._last = None, f"{batch.number} {batch.session}"
        for field in batch.moves:
            self._moves.pop(field, None)
        for field, amount in batch.amounts.items():
            client = self._client(field)
            client.acked += amount
            self._mark(field, client)

    def _void(self) -> None:
        """What was sent has not come through, and will not."""
        self._sent = None

    def _client(self, field: str) -> _Client:
        return self._forgotten if field == FORGOTTEN_FIELD else self._clients[field]

    def _mark(self, field: str, client: _Client) -> None:
        if client.own != client.acked:
            self._untold[field] = None
        else:
            self._untold.pop(field, None)

    # -- reading

    def _took(self, reply: list[Any], now_s: float) -> bool:
        """Takes in a reply; says whether there is more to read."""
        _, refused, evicted, found, values = reply
        evicted = int(evicted)
        self._acknowledge()
        self.num_refused += refused
        before = self._cursor
        for position in range(0, len(found), 2):
            total, mark = values[position], values[position + 1]
            try:
                changed = self._cursor = int(found[position + 1])
                if total is not None:
                    field, listed = found[position].decode(), (mark or b"").decode()
                    self._read(field, changed, _total(total), listed, evicted, now_s)
            except ValueError:  # somebody else wrote it
                self.num_refused += 1
        if len(found) == 2 * BATCH:
            if self._cursor == before:
                raise StoreError(f"{self._prefix}:changes holds versions that are no whole numbers; delete it")
            return True
        self._has_read, self._skips_history = True, False
        self._forget(evicted)
        return False

    def _read(self, field: str, version: int, total: int, mark: str, evicted: int, now_s: float) -> None:
        client = self._clients.get(field)
        if client is None:
            client = self._clients[field] = _Client()
        self._clients.move_to_end(field)
        if mark != client.mark and 0 < client.version <= evicted:  # it was evicted and listed again: a total from 0
            client.seen_total = 0  # listed again after a loss, it is told again in full
        client.mark, client.version, client.reading = mark, version, self._reading
        change = (total - client.seen_total) - (client.acked - client.seen_acked)
        if change < 0 and now_s < self._settled_s:
            self._unbelieved = True
            return
        client.seen_total, client.seen_acked = total, client.acked
        if change and not self._skips_history:
            self.received[field] = self.received.get(field, 0) + change

    def _forget(self, evicted: int) -> None:
        """Those whom the server lists no more, after all that it lists was read.

        Theirs are versions that it evicted. After a loss, clients of replicas that are gone are not listed either: they
        make room once there is little left.
        """
        for _ in range(len(self._clients)):
            field, client = next(iter(self._clients.items()))
            if client.version > evicted:
                break
            if field in self._untold:
                self._clients.move_to_end(field)
            else:
                self._drop(field, client)
        if self._is_sweeping:
            self._is_sweeping = False
            for field, client in list(self._clients.items()):
                if client.reading != self._reading and field not in self._untold:
                    self._drop(field, client)

    def _drop(self, field: str, client: _Client) -> None:
        """Adds the part of a client that is not listed any more to (forgotten), here and on the server."""
        if client.acked:
            self._forgotten.own += client.own
            self._forgotten.acked += client.acked
            self._moves[field] = None
        del self._clients[field]

    # -- keys

    @property
    def _totals_key(self) -> str:
        return f"{self._prefix}:totals"

    @property
    def _told_key(self) -> str:
        return f"{self._prefix}:told:{self.replica}"

    def _keys(self) -> list[str]:
        return [self._totals_key, f"{self._prefix}:changes", self._told_key]


def _total(value: bytes) -> int:
    """A total as the server adds them up.

    Raises:
        ValueError: it is none.
    """
    total = int(value)
    if abs(total) > 2**63:
        raise ValueError("a total of more than 64 bits")
    return total


def _is_ours(field: bytes, value: bytes) -> bool:
    """Whether a field and its amount are of the kind that replicas write."""
    try:
        return bool(field.decode()) and _total(value) is not None
    except ValueError:
        return False
