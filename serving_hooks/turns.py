"""Places that are handed out to clients in turn: however much one of them asks for, the others are next.

For one event loop. Knows no predictor.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """A bounded number of places, and who waits for one."""

    def __init__(self, places: int, most_waiting: int, most_in_all: int) -> None:
        """All places are free.

        Args:
            places: that may be taken at the same time.
            most_waiting: how many may wait for one client.
            most_in_all: how many may wait for all of them.
        """
        self._free, self._most, self._most_in_all = places, most_waiting, most_in_all
        self._queues: dict[str | None, deque[asyncio.Future[None]]] = {}  # the first one is next
        self.num_waiting = 0

    def at_once(self) -> bool:
        """Takes a place if one is free and nobody waits. Whoever gets one calls `leave`."""
        if not self._free or self._queues:
            return False
        self._free -= 1
        return True

    async def take(self, client: str | None) -> bool:
        """Waits for a place; False at once if too many wait already. Whoever gets one calls `leave`."""
        if self.at_once():
            return True
        if len(self._queues.get(client, ())) >= self._most or self.num_waiting >= self._most_in_all:
            return False
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(client, deque())
        queue.append(place)
        self.num_waiting += 1
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._forget(client, place)
            else:  # it was given just now
                self.leave()
            raise
        return True

    def leave(self) -> None:
        """Gives a place back, to the client that is next."""
        while self._queues:
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            place = queue.popleft()
            self.num_waiting -= 1
            if queue:
                self._queues[client] = queue  # behind the others
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def _forget(self, client: str | None, place: asyncio.Future[None]) -> None:
        queue = self._queues.get(client)
        if queue is not None and place in queue:  # else `leave` has passed it over
            queue.remove(place)
            self.num_waiting -= 1
            if not queue:
                del self._queues[client]
