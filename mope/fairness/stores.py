"""Counters that several replicas share: what each of them charged its clients reaches the ledgers of all others.

One interface, and the store for replicas within one process; `mope.fairness.redis_store` is the one for replicas
anywhere. Knows ledgers; not requests, prices or engines.

The scheduler of a replica calls `exchange` with its ledger once per step. What its clients were charged since the last
step is handed over, and what other replicas charged is counted in the ledger, each charge exactly once, so that a
client has one standing wherever its requests are sent. Amounts are whole numbers of millionths of HF, corrections and
refunds are negative ones: whatever the order in which they arrive, the sums are the same.

Who may use a store. What arrives from others depends on time, and it changes who is next. So a store belongs to the
one scheduler that decides: vLLM's EngineCore, or rank 0 where each tensor-parallel rank schedules for itself, which
then has to broadcast what it received (`Ledger.add_elsewhere`) with the step's other inputs. Ranks with a store of
their own would order requests differently, and corrupt outputs silently.

What is not shared. Lifts (`mope.fairness.ledger`) are each ledger's own, since they follow from who waits there; so a
replica that starts counts what is charged from then on, not the history of the others, in which their lifts are
missing: with it, a client of many years would wait behind all newer ones. For the same reason sharing suits replicas
among which requests are spread. Where clients stick to replicas for days, one that was served elsewhere alone comes
with a counter above all that are lifted here, and waits while others have requests, until they have had as much.
Weights are each ledger's own, too. With a weight other than 1 a ledger rounds each amount that it receives, by less
than a millionth. Orders that ask no counter (`fcfs`, `shortest-predicted`, `deficit-round-robin`) share totals alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import Self, override

from mope.errors import ConfigError, StoreError
from mope.fairness.accounts import Account
from mope.fairness.clients import Path
from mope.fairness.ledger import Ledger

MEMORY = "memory"
SCHEMES = ("redis://", "rediss://", "unix://")
ENVIRONMENT, FILE = "env:", "file:"  # where an address may stand instead, so that no command or log shows a password
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_MAX_ADDRESS = 4096  # characters of an address in a file
_WANTED = "redis://USER:PASSWORD@HOST:PORT/DB, rediss://... or unix://PATH"
MAX_PATH = 64  # names in a path
FORGOTTEN: Path = ()  # no client: among totals, what those were charged that are not listed any more

_logger = logging.getLogger("mope")


class StoreConfig(BaseModel):
    """Where counters are shared, and how patiently. Frozen; unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: str = Field(
        MEMORY,
        repr=False,  # it may hold a password
        description="where counters are shared: `memory`, within this process, or a Redis server as "
        "redis://USER:PASSWORD@HOST:PORT/DB, rediss://... with TLS, or unix://PATH. `env:NAME` takes that address from "
        "an environment variable, `file:PATH` from a file",
    )
    namespace: str = Field(
        "default",
        pattern=r"^[^{}\s]{1,64}$",
        description="replicas that share counters have the same; others on that server are not disturbed",
    )
    replica: str | None = Field(
        None,
        pattern=r"^[^\s]{1,128}$",
        description="name of this replica, for whoever looks into the server; by default host and process. Each start "
        "adds a mark of its own, so it need not be unique",
    )
    interval_s: float = Field(0.1, ge=0.001, le=60, description="seconds from one exchange with the server to the next")
    timeout_s: float = Field(1.0, gt=0, le=60, description="seconds after which an unanswered command has failed")
    max_backoff_s: float = Field(2.0, gt=0, le=600, description="seconds between attempts at most while it is gone")
    max_clients: int = Field(
        100_000,
        ge=1,
        description="clients whose totals the server lists; beyond, the one that was charged least recently is added "
        "to (forgotten)",
    )
    required: bool = Field(
        False, description="whether a server that can't be reached at the start is an error; if not, it is tried again"
    )

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if url.startswith(ENVIRONMENT):
            if not _VARIABLE.fullmatch(url.removeprefix(ENVIRONMENT)):
                raise ValueError(f"{ENVIRONMENT} is followed by the name of an environment variable: env:MOPE_STORE")
        elif url.startswith(FILE):
            if not url.removeprefix(FILE):
                raise ValueError(f"{FILE} is followed by the path of a file that holds the address: file:/run/store")
        elif url != MEMORY and not url.startswith(SCHEMES):
            scheme = re.match(r"[a-z][a-z0-9+.-]{0,19}(?=://)", url)  # anything else may be a part of a password
            begins = f"begins with {scheme[0]!r}" if scheme else "has no scheme that is known"
            raise ValueError(
                f"a store's URL {begins}; expected {MEMORY}, redis://HOST:PORT/DB, rediss://, unix://, env:NAME or "
                "file:PATH"
            )
        return url


@dataclass(frozen=True, slots=True)
class StoreStats:
    """How a store does.

    Attributes:
        kind: which store.
        staleness_s: seconds since all that was charged was told and all that others told was read; since the start
            if that never happened; 0 within a process.
        round_trip_s: how long that took the last time, in seconds.
        num_exchanges: times that it succeeded.
        num_failures: times that it failed.
        num_failures_in_row: times that it failed since it last succeeded.
        last_error: what the last failure was.
        num_restored: times that the server had lost something, or all, and was told again.
        num_refused: amounts that were not counted: a total would have left 64 bits, or the ledger refused its client.
        num_clients: clients that are remembered.
        num_untold: clients with charges that are not told yet, as far as they have been looked at.
        num_unapplied: clients with charges of others that the ledger has not counted yet.
    """

    kind: Literal["memory", "redis"]
    staleness_s: float = 0.0
    round_trip_s: float = 0.0
    num_exchanges: int = 0
    num_failures: int = 0
    num_failures_in_row: int = 0
    last_error: str = ""
    num_restored: int = 0
    num_refused: int = 0
    num_clients: int = 0
    num_untold: int = 0
    num_unapplied: int = 0


class Store(ABC):
    """What one replica shares with others. Used by one thread; never raises because others can't be reached."""

    @abstractmethod
    def exchange(self, ledger: Ledger) -> None:
        """Hands over what was charged and counts what others charged; call it once before the first charge."""

    @abstractmethod
    def flush(self, deadline_s: float = 2.0) -> bool:
        """Waits until all that was handed over is told and all that others told is here; says whether it is.

        Not for a scheduler's step: it takes up to `deadline_s` seconds. What has come is counted by `exchange`.
        """

    @abstractmethod
    def totals(self) -> dict[Path, int]:
        """What all replicas together have charged each client, in millionths of HF; not for a scheduler's step."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """How it does, for metrics; cheap, and from any thread."""

    @abstractmethod
    def close(self, deadline_s: float = 2.0) -> bool:
        """Tells what is untold, waiting up to `deadline_s` seconds, and ends; says whether all was told."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MemoryHub:
    """Where the replicas of one process meet."""

    def __init__(self, max_clients: int = 100_000) -> None:
        """Without replicas.

        Args:
            max_clients: clients that `totals` lists; beyond, who was charged least recently is added to `FORGOTTEN`.
        """
        self._max_clients = max_clients
        self._lock = threading.Lock()
        self._members: list[dict[Path, int]] = []  # of each replica, what others charged and it has not counted
        self._totals: OrderedDict[Path, int] = OrderedDict()
        self._forgotten = 0

    def join(self) -> dict[Path, int]:
        """A replica comes; it is given its box of what others will charge."""
        box: dict[Path, int] = {}
        with self._lock:
            self._members.append(box)
        return box

    def leave(self, box: dict[Path, int]) -> None:
        """A replica goes."""
        with self._lock:
            self._members = [other for other in self._members if other is not box]

    def tell(self, box: dict[Path, int], charges: Mapping[Path, int]) -> None:
        """Puts what a replica charged into the boxes of all others."""
        with self._lock:
            others = [other for other in self._members if other is not box]
            for path, amount in charges.items():
                for other in others:
                    other[path] = other.get(path, 0) + amount
                self._totals[path] = self._totals.get(path, 0) + amount
                self._totals.move_to_end(path)
            while len(self._totals) > self._max_clients:
                self._forgotten += self._totals.popitem(last=False)[1]

    def take(self, box: dict[Path, int]) -> list[tuple[Path, int]]:
        """Empties a replica's box."""
        with self._lock:
            charges = list(box.items())
            box.clear()
        return charges

    def totals(self) -> dict[Path, int]:
        """What all replicas charged each client."""
        with self._lock:
            return {**self._totals, FORGOTTEN: self._forgotten} if self._forgotten else dict(self._totals)


class MemoryStore(Store):
    """Shares with other replicas of this process: data-parallel ranks in threads, simulations, tests.

    `exchange` takes about a microsecond when there is nothing to do, and O(touched x replicas + received) otherwise.
    """

    def __init__(self, hub: MemoryHub | None = None) -> None:
        """One more replica.

        Args:
            hub: where it meets the others; with None it is alone.
        """
        self._hub = hub if hub is not None else MemoryHub()
        self._box = self._hub.join()
        self._num_exchanges = self._num_uncounted = 0
        self._closed = False

    @override
    def exchange(self, ledger: Ledger) -> None:
        ledger.follow_touched = True
        touched = ledger.take_touched()
        if self._closed:
            return
        if touched:
            self._hub.tell(self._box, charges_of(touched))
            self._num_exchanges += 1
        if self._box:
            self._num_uncounted += count_elsewhere(ledger, self._hub.take(self._box))

    @override
    def flush(self, deadline_s: float = 2.0) -> bool:
        return not self._closed

    @override
    def totals(self) -> dict[Path, int]:
        return self._hub.totals()

    @override
    def stats(self) -> StoreStats:
        return StoreStats(
            "memory",
            num_exchanges=self._num_exchanges,
            num_refused=self._num_uncounted,
            num_unapplied=len(self._box),
        )

    @override
    def close(self, deadline_s: float = 2.0) -> bool:
        self._closed = True
        self._hub.leave(self._box)
        return True


def open_store(config: StoreConfig | None = None) -> Store:
    """The store that a config asks for.

    Raises:
        MissingExtraError: it is on a Redis server, and the package `redis` is not installed.
        StoreError: its server is `required` and can't be reached or can't be used.
    """
    config = config if config is not None else StoreConfig()
    if config.url == MEMORY:
        return MemoryStore(MemoryHub(config.max_clients))
    from mope.fairness.redis_store import RedisStore

    return RedisStore(config)


def address(url: str) -> str:
    """The address that a store's URL stands for: itself, or what a variable or a file holds.

    Raises:
        StoreError: there is no such variable or file, or it holds no address. Its text holds no part of one.
    """
    if url.startswith(ENVIRONMENT):
        found = os.environ.get(url.removeprefix(ENVIRONMENT), "").strip()
        missing = "this environment has no such variable"
    elif url.startswith(FILE):
        try:
            with open(url.removeprefix(FILE), encoding="utf-8") as file:
                found, missing = file.read(_MAX_ADDRESS).strip(), "this file is empty"
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise StoreError(f"store {url}: this file can't be read ({reason}); expected one with {_WANTED}") from None
    else:
        return url
    if not found.startswith(SCHEMES):
        raise StoreError(f"store {url}: {missing if not found else 'it holds no address'}; expected {_WANTED}")
    return found


def has_password(url: str) -> bool:
    """Whether a store's URL shows a password to whoever sees it."""
    if not url.startswith(SCHEMES):
        return False
    place = url.partition("://")[2]
    return ":" in place.rpartition("@")[0] or "password=" in place.partition("?")[2]


def shown(url: str) -> str:
    """A store's URL without user, password and options."""
    scheme, separator, place = url.partition("://")
    return f"{scheme}://{place.rpartition('@')[2].partition('?')[0]}" if separator else url


def charges_of(touched: Mapping[Account, int], before: dict[Path, int] | None = None) -> dict[Path, int]:
    """What was charged, by the paths that replicas agree on, added to what was before.

    A client that turned out to be a group is, in the ledger, the user of that group without a name; elsewhere it may
    still be a client. Both are told by the path that the client came with.
    """
    charges = before if before is not None else {}
    for account, amount in touched.items():
        if amount:
            path = account.path
            while len(path) > 1 and not path[-1]:
                path = path[:-1]
            charges[path] = charges.get(path, 0) + amount
    return charges


def count_elsewhere(ledger: Ledger, charges: list[tuple[Path, int]]) -> int:
    """Counts in a ledger what others charged; says how many of it could not be."""
    num_failed = 0
    for path, amount in charges:
        try:
            ledger.add_elsewhere(path, amount)
        except (ConfigError, TypeError, ValueError) as error:
            if not num_failed:
                _logger.warning("what others charged %s can't be counted: %r", path, error)
            num_failed += 1
    return num_failed


def field_of(path: Path) -> str:
    """A client's path as JSON in ASCII: the same text for the same path, another for any other."""
    return json.dumps(path, separators=(",", ":"))


def path_of(field: str) -> Path:
    """The path that a text of `field_of` stands for.

    Raises:
        ConfigError: it is not one.
    """
    try:
        parts = json.loads(field)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{field[:80]!r} is not a client's path in JSON") from error
    usable = isinstance(parts, list) and 0 < len(parts) <= MAX_PATH
    if not usable or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{field[:80]!r} is not a client's path: expected a JSON array of 1 to {MAX_PATH} names")
    return tuple(parts)
