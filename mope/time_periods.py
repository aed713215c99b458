"""Counts per target and stretch of time, the newest of them: what learning while serving keeps.

The content is a function of the set of observations alone, so that replicas can be merged exactly: whole numbers are
added, and what makes room is what is oldest, not what came first. What makes room stays in the counts of its family.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mope.errors import DataError
from mope.grid import Array

SHORT_PERIOD_S, SHORT_PERIODS = 600, 6  # seconds of a period; how many of the newest non-empty ones a target keeps
LONG_PERIOD_S, LONG_PERIODS = 86_400, 8
MAX_CELLS = 2048  # periods of all targets together, of either length
MAX_POOL_CELLS = 512  # long periods of all families together
MAX_NEWEST = 48  # targets of a family, and of all, that `newest` gives
POOL = "pool"  # the kind of what holds the observations of LLMs that made room
MAX_TIME_S = 2**40
MAX_COUNT, MAX_EXPECTED = 2**40, 2**60  # beyond any server's life; what is saved may not claim more


class Target(NamedTuple):
    """Who answers: what has the same target is corrected alike.

    Attributes:
        llm: name of the LLM, empty if unknown.
        mode: a short word for how it is asked, such as `"thinking"`, `"tools"` or `"json"`.
        family: LLMs of the same family are believed to be alike; empty if unknown.
        known: the predictor was trained on this LLM's answers.
        kind: its size class and whether it reasons; LLMs of the same kind are believed to be more alike than others.
    """

    llm: str = ""
    mode: str = ""
    family: str = ""
    known: bool = True
    kind: str = ""


class Cell(NamedTuple):
    """Observations of one target in one period.

    Attributes:
        counts: how often each code was observed.
        expected: whole numbers that are summed beside them, shape (R,).
    """

    counts: dict[int, int]
    expected: Array

    @property
    def total(self) -> int:
        """Observations."""
        return sum(self.counts.values())

    def arrays(self) -> tuple[Array, Array]:
        """Codes, and how often each was observed."""
        size = len(self.counts)
        return np.fromiter(self.counts.keys(), np.intp, size), np.fromiter(self.counts.values(), np.float64, size)


@dataclass(frozen=True, slots=True, eq=False)
class PeriodCounts:
    """Observations of one stretch of time. A code may occur several times, its counts are then to be added."""

    codes: Array
    counts: Array
    expected: Array


def checked_time(time_s: float) -> float:
    """The time as it was given.

    Raises:
        DataError: it is not in seconds since 1970.
    """
    if not (isinstance(time_s, int | float | np.integer | np.floating) and 0 <= time_s < MAX_TIME_S):
        raise DataError(f"time_s is in seconds since 1970; got {time_s!r}")
    return time_s


class _Ring:
    """The newest periods of each target, and of all targets together.

    A period that is not among the newest is so for good, since what comes later only makes it older: what is kept was
    never dropped before, in whatever order observations and other replicas' cells came. So what was dropped is a
    function of the set of observations, too.

    Args:
        period_s: seconds of a period.
        num_periods: non-empty periods that a target keeps.
        max_cells: periods of all targets together.
        dropped: gets what is dropped, cell by cell; None to forget it.
    """

    def __init__(
        self,
        period_s: int,
        num_periods: int,
        max_cells: int,
        dropped: Callable[[Target, int, Cell], None] | None = None,
    ) -> None:
        self.period_s, self.num_periods = period_s, num_periods
        self.cells: dict[Target, dict[int, Cell]] = {}
        self._max_cells, self._dropped = max_cells, dropped
        self._num_cells = 0
        self._oldest: list[tuple[int, Target]] = []  # a heap; it may name cells that are gone

    def add(self, target: Target, period: int, counts: Mapping[int, int], expected: Array) -> None:
        """Add to a cell, then drop what is too old."""
        periods = self.cells.setdefault(target, {})
        cell = periods.get(period)
        if cell is None:
            cell = periods[period] = Cell({}, np.zeros(len(expected), dtype=np.int64))
            self._num_cells += 1
            heapq.heappush(self._oldest, (period, target))
        for code, count in counts.items():
            cell.counts[code] = cell.counts.get(code, 0) + count
        np.add(cell.expected, expected, out=cell.expected)
        if len(periods) > self.num_periods:
            self._drop(target, min(periods))
        while self._num_cells > self._max_cells:
            oldest, owner = heapq.heappop(self._oldest)
            if oldest in self.cells.get(owner, ()):
                self._drop(owner, oldest)
        if len(self._oldest) > 2 * self._max_cells:
            self._oldest = [(kept, owner) for owner, known in self.cells.items() for kept in known]
            heapq.heapify(self._oldest)

    def _drop(self, target: Target, period: int) -> None:
        cell = self.cells[target].pop(period)
        self._num_cells -= 1
        if not self.cells[target]:
            del self.cells[target]
        if self._dropped is not None:
            self._dropped(target, period, cell)


class TimePeriods:
    """Counts of observations per target, in short periods for what is new and in long ones for what is rare.

    Holds the newest `SHORT_PERIODS` and `LONG_PERIODS` non-empty periods of each target, and of those of all targets
    the newest `MAX_CELLS`; of equally old ones, those whose targets' names come first are dropped first. Every
    observation is in a short and in a long period. A long period that is dropped is added to the pool of its family,
    and one that finds no room there to the pool of all families: an LLM that nobody asks any more is forgotten by its
    name, and what it told of its family stays. Not safe to use from many threads.
    """

    def __init__(self) -> None:
        self._all = _Ring(LONG_PERIOD_S, LONG_PERIODS, MAX_POOL_CELLS)
        self._pools = _Ring(LONG_PERIOD_S, LONG_PERIODS, MAX_POOL_CELLS, self._pool_all)
        self._short = _Ring(SHORT_PERIOD_S, SHORT_PERIODS, MAX_CELLS)
        self._long = _Ring(LONG_PERIOD_S, LONG_PERIODS, MAX_CELLS, self._pool)
        self._by_llm: dict[str, dict[Target, None]] = {}
        self._by_family: dict[str, dict[Target, None]] = {}

    def add(self, target: Target, time_s: float, code: int, expected: Array) -> None:
        """Add one observation. O(log of the number of cells) where it begins a period, else O(1).

        Raises:
            DataError: a time that is not one.
        """
        time_s = checked_time(time_s)
        self._add(self._short, target, int(time_s // SHORT_PERIOD_S), {code: 1}, expected)
        self._add(self._long, target, int(time_s // LONG_PERIOD_S), {code: 1}, expected)

    def _add(self, ring: _Ring, target: Target, period: int, counts: Mapping[int, int], expected: Array) -> None:
        if ring is self._long:
            self._by_llm.setdefault(target.llm, {})[target] = None
            self._by_family.setdefault(target.family, {})[target] = None
        ring.add(target, period, counts, expected)

    def _pool(self, target: Target, period: int, cell: Cell) -> None:
        if target not in self._long.cells:
            for index, name in ((self._by_llm, target.llm), (self._by_family, target.family)):
                del index[name][target]
                if not index[name]:
                    del index[name]
        pool = Target("", target.mode, target.family, target.known, POOL)
        self._pools.add(pool, period, cell.counts, cell.expected)

    def _pool_all(self, pool: Target, period: int, cell: Cell) -> None:
        self._all.add(pool._replace(family=""), period, cell.counts, cell.expected)

    def __len__(self) -> int:
        """How many targets there are."""
        return len(self._long.cells)

    def targets(self) -> list[Target]:
        """Every target that has a name of its own here, in the order of their names."""
        return sorted(self._long.cells)

    def pools(self, family: str) -> list[Target]:
        """The pools of a family and of all other families: what LLMs told that are forgotten by their names."""
        own = [pool for pool in self._pools.cells if pool.family == family]
        return sorted(own) + sorted(self._all.cells)

    def of_llm(self, llm: str) -> list[Target]:
        """Targets of one LLM, in the order of their names."""
        return sorted(self._by_llm.get(llm, ()))

    def newest(self, family: str | None = None) -> list[Target]:
        """The `MAX_NEWEST` targets that make room last, of one family or of all: the newest, then by name."""
        among = self._long.cells if family is None else self._by_family.get(family, ())
        return heapq.nlargest(MAX_NEWEST, among, key=lambda target: (self.last_period(target), target))

    def last_period(self, target: Target) -> int:
        """The newest long period of a target."""
        return max(self._long.cells.get(target, ()), default=0)

    def last_s(self, target: Target) -> int:
        """End of the period of a target's newest observation, in seconds since 1970."""
        ring = self._short if target in self._short.cells else self._long
        return (max(ring.cells[target]) + 1) * ring.period_s

    def total(self, target: Target) -> int:
        """Observations of a target."""
        return sum(cell.total for cell in self._long.cells.get(target, {}).values())

    def num_observations(self) -> int:
        """Observations of all targets, those in pools left out."""
        return sum(cell.total for periods in self._long.cells.values() for cell in periods.values())

    def batches(self, target: Target) -> Iterator[PeriodCounts]:
        """A target's observations, newest first: its short periods, then what else its long periods hold."""
        short = self._short.cells.get(target, {})
        for period in sorted(short, reverse=True):
            yield PeriodCounts(*short[period].arrays(), short[period].expected)
        per_long = LONG_PERIOD_S // SHORT_PERIOD_S
        for period, cell in sorted(self._long.cells.get(target, {}).items(), reverse=True):
            inside = [part for at, part in short.items() if at // per_long == period]
            if sum(part.total for part in inside) >= cell.total:
                continue
            arrays = [cell.arrays(), *(part.arrays() for part in inside)]
            yield PeriodCounts(
                np.concatenate([codes for codes, _ in arrays]),
                np.concatenate([arrays[0][1], *(-counts for _, counts in arrays[1:])]),
                np.maximum(cell.expected - sum(part.expected for part in inside), 0),
            )

    def pooled(self, pool: Target) -> Iterator[PeriodCounts]:
        """What one of `pools` holds, newest first."""
        ring = self._pools if pool in self._pools.cells else self._all
        for _, cell in sorted(ring.cells.get(pool, {}).items(), reverse=True):
            yield PeriodCounts(*cell.arrays(), cell.expected)

    def copy(self) -> TimePeriods:
        """The same, on its own."""
        copied = TimePeriods()
        copied.merge(self)
        return copied

    def merge(self, other: TimePeriods) -> None:
        """Add what another one holds, exactly as if it had been observed here. O(cells)."""
        for ring, added in zip(self._rings(), other._rings(), strict=True):
            for target, periods in added.cells.items():
                for period, cell in periods.items():
                    self._add(ring, target, period, cell.counts, cell.expected)

    def _rings(self) -> tuple[_Ring, ...]:
        return self._all, self._pools, self._short, self._long

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Targets and pools in the order of their names; whole numbers, the same for the same observations."""
        return {
            "targets": [
                {
                    **target._asdict(),
                    "short_epochs": _saved(self._short.cells.get(target, {})),
                    "long_epochs": _saved(self._long.cells.get(target, {})),
                }
                for target in sorted(self._short.cells.keys() | self._long.cells.keys())
            ],
            **{
                name: [{**pool._asdict(), "long_epochs": _saved(ring.cells[pool])} for pool in sorted(ring.cells)]
                for name, ring in (("pools", self._pools), ("all", self._all))
            },
        }

    @classmethod
    def from_json(
        cls, saved: Mapping[str, Any], num_codes: int, num_expected: int, padded_to: int | None = None
    ) -> TimePeriods:
        """Restore what `to_json` wrote, exactly.

        Args:
            saved: what was written.
            num_codes: codes are below this.
            num_expected: numbers that are summed beside them.
            padded_to: how many there are to be, if more: zeros are added.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: it was not written by `to_json`.
        """
        restored = cls()
        for entries, rings in (
            (saved.get("all", ()), ((restored._all, "long_epochs"),)),
            (saved.get("pools", ()), ((restored._pools, "long_epochs"),)),
            (saved["targets"], ((restored._short, "short_epochs"), (restored._long, "long_epochs"))),
        ):
            for entry in entries:
                target = Target(entry["llm"], entry["mode"], entry["family"], entry["known"], entry.get("kind", ""))
                texts = (target.llm, target.mode, target.family, target.kind)
                if not (all(isinstance(text, str) for text in texts) and isinstance(target.known, bool)):
                    raise ValueError(f"{target} is not a target")
                for ring, name in rings:
                    for cell in entry[name]:
                        period, counts, expected = _restored(cell, num_codes, num_expected)
                        if padded_to is not None:
                            expected = np.pad(expected, (0, padded_to - num_expected))
                        restored._add(ring, target, period, counts, expected)
        return restored


def _saved(periods: Mapping[int, Cell]) -> list[dict[str, Any]]:
    return [
        {
            "epoch": period,  # as saved files have always called it
            "codes": sorted(cell.counts),
            "counts": [count for _, count in sorted(cell.counts.items())],
            "expected": cell.expected.tolist(),
        }
        for period, cell in sorted(periods.items())
    ]


def _restored(cell: Mapping[str, Any], num_codes: int, num_expected: int) -> tuple[int, dict[int, int], Array]:
    period, codes, counts, expected = cell["epoch"], cell["codes"], cell["counts"], cell["expected"]
    for name, numbers, least, below in (
        ("epoch", [period], 0, MAX_TIME_S),
        ("codes", codes, 0, num_codes),
        ("counts", counts, 1, MAX_COUNT),
        ("expected", expected, 0, MAX_EXPECTED),
    ):
        if not all(type(number) is int and least <= number < below for number in numbers):
            raise ValueError(f"{name} of a period: expected whole numbers from {least} to {below - 1}")
    if not 0 < len(set(codes)) == len(codes) == len(counts) or len(expected) != num_expected or not any(expected):
        raise ValueError(f"period {period} is incomplete")
    return period, dict(zip(codes, counts, strict=True)), np.array(expected, dtype=np.int64)
