"""The books of budgets: what each client holds and has used in the present window, and in all.

Two kinds keep them: a file or the memory of one process (`mope.budgets.sqlite_books`), or a Redis server that replicas
share (`mope.budgets.redis_books`). Each call is done as a whole or not at all, and may be repeated: a reservation has
an id, is made once and settled once, whatever was lost on the way of the reply.

All amounts are whole parts (`mope.budgets.config.MICRO`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf
from typing import Literal, NamedTuple

from mope.fairness.stores import MEMORY, SCHEMES, StoreConfig, address

KEPT_S = 600.0  # seconds that a closed reservation is remembered, so that a repeated settlement changes nothing
DUE_LOOKED_AT = 256  # open reservations whose refunds are counted for how long to wait


class Hold(NamedTuple):
    """A reservation to be made.

    Attributes:
        id: of the reservation, chosen by whoever makes it.
        client: whose budget it takes from.
        amount: parts that are held, at least 0.
        refund: parts of them that are expected back.
        due_s: seconds from now to its expected end.
        hold_s: seconds from now after which it expires.
        limit: parts that the client may use in a window.
        window_s: length of the windows in seconds. They begin at whole multiples of it since 1970.
        note: a short text that is kept with it, for whoever settles it.
        risk: share of the client's windows that may go over its limit, see `mope.budgets.risk`.
    """

    id: str
    client: str
    amount: int
    refund: int
    due_s: float
    hold_s: float
    limit: int
    window_s: float
    note: str = ""
    risk: float = 0.1


class Decision(NamedTuple):
    """What became of a reservation.

    Attributes:
        state: `held`; `known`: it was made before and is open, and nothing was changed; `used`: the id is that of a
            closed reservation or of another client's; `full`: the window has no room for it.
        used: parts that were settled in the window.
        held: parts that are held in the window, with this reservation if it was made.
        wait_s: seconds after which there is room, as far as is known: as expected refunds come, or in the next window;
            0.0 if it was made, endless if it is larger than the whole limit.
        window_s: seconds to the end of the window.
        odds: log odds of the level that the client's reservations should have from now on; None before any of its
            windows has ended.
    """

    state: Literal["held", "known", "used", "full"]
    used: int
    held: int
    wait_s: float
    window_s: float
    odds: float | None = None


class Settlement(NamedTuple):
    """What became of a settlement.

    Attributes:
        state: `settled`; `already`: it was settled before, and nothing was changed; `late`: it had expired, and is
            counted none the less; `unknown`: there is no such reservation.
        reserved: parts that were held.
        used: parts that it took. Of one that was settled before: what was said then.
        client: whose it is; empty if unknown.
    """

    state: Literal["settled", "already", "late", "unknown"]
    reserved: int
    used: int
    client: str


class Totals(NamedTuple):
    """All that a client ever reserved and used: `reserved = held + settled + expired`, to the part.

    Attributes:
        reserved: parts of all reservations.
        held: of those that are open.
        settled: of those that were settled.
        expired: of those that expired and were not settled since.
        used: parts that the settled ones took.
        num_reserved: reservations.
        num_settled: of them, settled.
        num_expired: of them, expired and not settled since.
        num_full: reservations that found no room.
        windows: windows in which the client reserved, once they have ended and nothing of them is open. What is settled
            later than that no longer changes `windows_over`.
        windows_over: of them, those in which it used more than its limit.
    """

    reserved: int = 0
    held: int = 0
    settled: int = 0
    expired: int = 0
    used: int = 0
    num_reserved: int = 0
    num_settled: int = 0
    num_expired: int = 0
    num_full: int = 0
    windows: int = 0
    windows_over: int = 0


class Books(ABC):
    """See the module. For one event loop."""

    @abstractmethod
    async def reserve(self, hold: Hold) -> Decision:
        """Make a reservation, if there is room for it.

        Raises:
            StoreError: the books cannot be reached or written. Nothing is known of the reservation then.
        """

    @abstractmethod
    async def note(self, name: str) -> str | None:
        """The note of a reservation, also of a closed one that is remembered; None if there is none of that id.

        Raises:
            StoreError: see `reserve`.
        """

    @abstractmethod
    async def settle(self, name: str, used: int) -> Settlement:
        """Close a reservation with what it took, in the window that it was made in.

        Args:
            name: its id.
            used: parts.

        Raises:
            StoreError: see `reserve`.
        """

    @abstractmethod
    async def totals(self) -> dict[str, Totals]:
        """By client.

        Raises:
            StoreError: see `reserve`.
        """

    @abstractmethod
    async def close(self) -> None:
        """Ends what was opened."""


def open_books(url: str, namespace: str = "default") -> Books:
    """Books at an address.

    Args:
        url: `memory`, the path of a file, or a Redis server as in `mope.fairness.StoreConfig`.
        namespace: books on one Redis server that share it are the same.

    Raises:
        MissingExtraError: the package `redis` is not installed.
        StoreError: an address that cannot be used, or a file that holds no books.
    """
    if url.startswith((*SCHEMES, "env:", "file:")):
        from mope.budgets.redis_books import RedisBooks

        config = StoreConfig(url=url, namespace=namespace)
        return RedisBooks(address(config.url), config)
    from mope.budgets.sqlite_books import SqliteBooks

    return SqliteBooks(None if url == MEMORY else url)


def wait_of(lack: int, refunds: Sequence[tuple[float, int]], window_s: float, *, fits: bool) -> float:
    """Seconds to wait for room.

    Args:
        lack: parts that are missing.
        refunds: seconds from now and parts that are expected back then, the earliest first.
        window_s: seconds to the next window.
        fits: whether an empty window has room.
    """
    if not fits:
        return inf
    for due_s, refund in refunds:
        if due_s >= window_s:
            break
        lack -= refund
        if lack <= 0:
            return max(due_s, 0.0)
    return window_s
