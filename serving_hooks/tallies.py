"""What happened to the requests of each client, in numbers that metrics, summaries and the doctor read.

Written by the scheduling thread, read by others: readers copy and never write. Knows no engine and no Prometheus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from mope.fairness.charges import NOTHING, Charge

OTHERS = "(others)"
IDLE_S = 900.0  # without a request, after which a client's tally may make room for another's
LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
ERROR = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 2.0, 4.0, 10.0)  # true by predicted tokens


@dataclass
class Histogram:
    """Counts of values up to each of some edges, those above the last included."""

    edges: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.edges) + 1)

    def add(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    @property
    def num(self) -> int:
        """Values that were counted."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Their mean; 0 without any."""
        return self.total / self.num if self.num else 0.0


@dataclass
class Tally:
    """One client's requests.

    Attributes:
        num_arrived: requests that came.
        num_finished: those that ended by themselves.
        num_aborted: those that were given up.
        num_preempted: times that one lost its place.
        prompt_tokens: tokens of prompts that were read.
        cached_tokens: those of them that the prefix cache held.
        response_tokens: tokens that were generated.
        predicted_tokens: what was predicted of requests that finished.
        num_predicted: requests that came with a prediction.
        num_within: finished requests with a prediction whose answer was no longer than its 90 % quantile.
        num_covered: finished requests of which such a quantile was known.
        charged: what requests that have ended were charged, corrections included: it never falls.
        queue_s: seconds from arrival to admission.
        ttft_s: seconds from arrival to the first token.
        e2e_s: seconds from arrival to the end.
        ratio: true by predicted tokens.
        seen_s: when the last request came.
    """

    num_arrived: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    response_tokens: int = 0
    predicted_tokens: float = 0.0
    num_predicted: int = 0
    num_within: int = 0
    num_covered: int = 0
    charged: Charge = NOTHING
    queue_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    ttft_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    e2e_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    ratio: Histogram = field(default_factory=lambda: Histogram(ERROR))
    seen_s: float = 0.0

    @property
    def num_open(self) -> int:
        """Requests that wait or run."""
        return self.num_arrived - self.num_finished - self.num_aborted


class Tallies:
    """A tally for each of `max_clients` clients; the others share that of `OTHERS`.

    A new client takes the place of one that has had no request for `IDLE_S`, if there is one. So clients that came once
    do not keep those that stay from having a tally. A client that returns later begins at 0, which Prometheus takes for
    a restart.

    Attributes:
        past: what was counted in tallies that are gone.
    """

    def __init__(self, max_clients: int) -> None:
        self._max_clients = max_clients
        self._tallies: OrderedDict[str, Tally] = OrderedDict()  # those that came last at the end
        self.past = Tally()

    def of(self, client: str, now_s: float) -> Tally:
        """The tally that a request is counted in from its arrival to its end.

        Args:
            client: who sent it.
            now_s: when it arrives, in seconds by any clock.
        """
        tally = self._tallies.get(client)
        if tally is None:
            if len(self._tallies) >= self._max_clients and not self._make_room(now_s):
                client = OTHERS
            tally = self._tallies.setdefault(client, Tally())
        self._tallies.move_to_end(client)
        tally.seen_s = now_s
        return tally

    def _make_room(self, now_s: float) -> bool:
        """Drops the tally of an idle client; looks at the few that came longest ago."""
        for name in list(islice(self._tallies, _LOOKS)):
            tally = self._tallies[name]
            if now_s - tally.seen_s < IDLE_S:
                return False
            if tally.num_open == 0 and name != OTHERS:
                del self._tallies[name]
                for count in _SUMMED:
                    setattr(self.past, count, getattr(self.past, count) + getattr(tally, count))
                return True
            self._tallies.move_to_end(name)
        return False

    def total(self, count: str) -> float:
        """The sum of one of `num_arrived`, `num_finished`, `num_predicted`, `num_covered` and `num_within`."""
        return float(sum(getattr(tally, count) for _, tally in self.items()) + getattr(self.past, count))

    def items(self) -> list[tuple[str, Tally]]:
        """All of them by client, as they are now."""
        return list(self._tallies.items())


_LOOKS = 8  # at tallies, for one to drop
_SUMMED = ("num_arrived", "num_finished", "num_predicted", "num_covered", "num_within")
