"""Start-time fair queueing: numbers that make a queue ordered by priority a fair one.

Goyal, Vin and Cheng, "Start-time Fair Queueing" (SIGCOMM 1996). Of a request that arrives from client c,

    start tag   S = max(V, F[c])
    finish tag  F[c] = S + cost / weight[c]

and the request with the smallest start tag is served first. The virtual time V is the largest start tag among requests
whose service has begun. Tags never change once given, so all that is asked of an engine is a queue by priority. Costs
are predictions and are not corrected by what an answer turns out to be. Knows no engine, no clock, no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping

UNIT = 1000  # tags are whole thousandths of a weighted token: 2**63 of them last for ever
MAX_TAG = 2**62  # nothing goes above; far beyond what a server lives to see
_FEW = 1024  # clients that are remembered without a second thought


class StartTimeTags:
    """Gives each request its start tag.

    Clients whose last finish tag has been passed by the virtual time are forgotten: they start where a new one does, so
    nothing is lost by that.

    Attributes:
        virtual_time: V, in thousandths of a weighted token.
    """

    def __init__(self, weights: Mapping[str, float], max_clients: int) -> None:
        """Nobody has asked yet.

        Args:
            weights: of clients, in proportion to 1. A client `group/user` has the product of the weights of `group` and
                `group/user`: groups have no share of their own here, each client stands for itself.
            max_clients: clients that are remembered at once; beyond, those with the earliest finish tags are forgotten.
        """
        self._weights, self._max_clients = dict(weights), max(1, max_clients)
        self._finish: dict[str, int] = {}
        self._sweep_at = min(_FEW, self._max_clients)
        self.virtual_time = 0

    def __len__(self) -> int:
        return len(self._finish)

    def arrive(self, client: str, cost: float) -> tuple[int, int]:
        """The start tag of a request, and what its finish tag is beyond that.

        Args:
            client: its path.
            cost: in weighted tokens, not negative.
        """
        start = min(max(self.virtual_time, self._finish.get(client, 0)), MAX_TAG)
        length = int(min(cost * UNIT / self._weight(client), float(MAX_TAG))) + 1
        self._finish[client] = min(start + length, MAX_TAG)
        if len(self._finish) > self._sweep_at:
            self._sweep()
        return start, length

    def began(self, start: int) -> None:
        """The service of a request with this start tag has begun."""
        self.virtual_time = max(self.virtual_time, start)

    def refused(self, client: str, length: int) -> None:
        """A request that arrived was refused: its client gets back what it was charged."""
        if client in self._finish:
            self._finish[client] = max(self.virtual_time, self._finish[client] - length)

    def _weight(self, client: str) -> float:
        weight, path = 1.0, ""
        for part in client.split("/"):
            path = f"{path}/{part}" if path else part
            weight *= self._weights.get(path, 1.0)
        return weight

    def _sweep(self) -> None:
        """Forgets who would start at the virtual time anyway, then who is nearest to that. Amortised, O(1)."""
        kept = {client: finish for client, finish in self._finish.items() if finish > self.virtual_time}
        if len(kept) > self._max_clients:
            latest = sorted(kept.items(), key=lambda pair: -pair[1])
            kept = dict(latest[: max(1, self._max_clients // 2)])
        self._finish = kept
        self._sweep_at = max(min(_FEW, self._max_clients), min(2 * len(kept), self._max_clients))
