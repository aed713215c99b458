"""Counts per target and stretch of time, the newest of them: what learning while serving keeps.

The content is a function of the set of observations alone, so that replicas can be merged exactly: whole numbers are
added, and what is dropped is what is oldest, not what came first. Knows codes, numbers and times; not what they mean.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mope.errors import DataError
from mope.grid import Array

SHORT_EPOCH_S, SHORT_EPOCHS = 600, 6  # seconds of an epoch; how many of the newest non-empty ones a target keeps
LONG_EPOCH_S, LONG_EPOCHS = 86_400, 8
MAX_CELLS = 8192  # epochs of all targets together, of either length: about a thousand targets
MAX_TIME_S = 2**40
MAX_COUNT, MAX_EXPECTED = 2**40, 2**60  # beyond any server's life; what is saved may not claim more


class Target(NamedTuple):
    """Who answers: what has the same target is corrected alike.

    Attributes:
        llm: name of the LLM, empty if unknown.
        mode: a short word for how it is asked, such as `"thinking"`, `"tools"` or `"json"`.
        family: LLMs of the same family are believed to be alike; empty if unknown.
        known: the predictor was trained on this LLM's answers.
    """

    llm: str = ""
    mode: str = ""
    family: str = ""
    known: bool = True


class Cell(NamedTuple):
    """Observations of one target in one epoch.

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
class Batch:
    """Observations of one stretch of time. A code may occur several times, its counts are then to be added."""

    codes: Array
    counts: Array
    expected: Array


class _Ring:
    """The newest epochs of each target, and of all targets together.

    An epoch that is not among the newest is so for good, since what comes later only makes it older: what is kept was
    never dropped before, in whatever order observations and other replicas' cells came.
    """

    def __init__(self, epoch_s: int, num_epochs: int) -> None:
        self.epoch_s, self.num_epochs = epoch_s, num_epochs
        self.cells: dict[Target, dict[int, Cell]] = {}
        self._num_cells = 0
        self._oldest: list[tuple[int, Target]] = []  # a heap; it may name cells that are gone

    def add(self, target: Target, epoch: int, counts: Mapping[int, int], expected: Array) -> None:
        """Add to a cell, then drop what is too old."""
        epochs = self.cells.setdefault(target, {})
        cell = epochs.get(epoch)
        if cell is None:
            cell = epochs[epoch] = Cell({}, np.zeros(len(expected), dtype=np.int64))
            self._num_cells += 1
            heapq.heappush(self._oldest, (epoch, target))
        for code, count in counts.items():
            cell.counts[code] = cell.counts.get(code, 0) + count
        np.add(cell.expected, expected, out=cell.expected)
        if len(epochs) > self.num_epochs:
            self._drop(target, min(epochs))
        while self._num_cells > MAX_CELLS:
            oldest, owner = heapq.heappop(self._oldest)
            if oldest in self.cells.get(owner, ()):
                self._drop(owner, oldest)
        if len(self._oldest) > 2 * MAX_CELLS:
            self._oldest = [(kept, owner) for owner, known in self.cells.items() for kept in known]
            heapq.heapify(self._oldest)

    def _drop(self, target: Target, epoch: int) -> None:
        del self.cells[target][epoch]
        self._num_cells -= 1
        if not self.cells[target]:
            del self.cells[target]


class Epochs:
    """Counts of observations per target, in short epochs for what is new and in long ones for what is rare.

    Holds the newest `SHORT_EPOCHS` and `LONG_EPOCHS` non-empty epochs of each target, and of those of all targets the
    newest `MAX_CELLS`; of equally old ones, those whose targets' names come first are dropped first. Every observation
    is in a short and in a long epoch. Not safe to use from many threads.
    """

    def __init__(self) -> None:
        self._short, self._long = _Ring(SHORT_EPOCH_S, SHORT_EPOCHS), _Ring(LONG_EPOCH_S, LONG_EPOCHS)

    def add(self, target: Target, time_s: float, code: int, expected: Array) -> None:
        """Add one observation. O(log of the number of cells) where it begins an epoch, else O(1).

        Raises:
            DataError: a time that is none.
        """
        if not (isinstance(time_s, int | float | np.integer | np.floating) and 0 <= time_s < MAX_TIME_S):
            raise DataError(f"time_s is in seconds since 1970; got {time_s!r}")
        for ring in (self._short, self._long):
            ring.add(target, int(time_s // ring.epoch_s), {code: 1}, expected)

    def __contains__(self, target: Target) -> bool:
        return target in self._long.cells

    def __len__(self) -> int:
        """How many targets there are."""
        return len(self._long.cells)

    def newest(self) -> dict[Target, int]:
        """Every target, and its newest long epoch."""
        return {target: max(epochs) for target, epochs in self._long.cells.items()}

    def last_s(self, target: Target) -> int:
        """End of the epoch of a target's newest observation, in seconds since 1970."""
        ring = self._short if target in self._short.cells else self._long
        return (max(ring.cells[target]) + 1) * ring.epoch_s

    def total(self, target: Target) -> int:
        """Observations of a target."""
        return sum(cell.total for cell in self._long.cells.get(target, {}).values())

    def batches(self, target: Target) -> Iterator[Batch]:
        """A target's observations, newest first: its short epochs, then what else its long epochs hold."""
        short = self._short.cells.get(target, {})
        for epoch in sorted(short, reverse=True):
            yield Batch(*short[epoch].arrays(), short[epoch].expected)
        per_long = LONG_EPOCH_S // SHORT_EPOCH_S
        for epoch, cell in sorted(self._long.cells.get(target, {}).items(), reverse=True):
            inside = [part for at, part in short.items() if at // per_long == epoch]
            if sum(part.total for part in inside) >= cell.total:
                continue
            arrays = [cell.arrays(), *(part.arrays() for part in inside)]
            yield Batch(
                np.concatenate([codes for codes, _ in arrays]),
                np.concatenate([arrays[0][1], *(-counts for _, counts in arrays[1:])]),
                np.maximum(cell.expected - sum(part.expected for part in inside), 0),
            )

    def copy(self) -> Epochs:
        """The same, on its own."""
        copied = Epochs()
        copied.merge(self)
        return copied

    def merge(self, other: Epochs) -> None:
        """Add what another one holds, exactly as if it had been observed here. O(cells)."""
        for ring, added in ((self._short, other._short), (self._long, other._long)):
            for target, epochs in added.cells.items():
                for epoch, cell in epochs.items():
                    ring.add(target, epoch, cell.counts, cell.expected)

    def to_json(self) -> list[dict[str, Any]]:
        """One entry per target, in the order of their names; whole numbers, the same for the same observations."""
        return [
            {
                **target._asdict(),
                "short_epochs": _saved(self._short.cells.get(target, {})),
                "long_epochs": _saved(self._long.cells.get(target, {})),
            }
            for target in sorted(self._short.cells.keys() | self._long.cells.keys())
        ]

    @classmethod
    def from_json(cls, saved: Iterable[Mapping[str, Any]], num_codes: int, num_expected: int) -> Epochs:
        """Restore what `to_json` wrote, exactly.

        Args:
            saved: what was written.
            num_codes: codes are below this.
            num_expected: numbers that are summed beside the counts.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: it was not written by `to_json`.
        """
        restored = cls()
        for entry in saved:
            target = Target(entry["llm"], entry["mode"], entry["family"], entry["known"])
            if not (all(isinstance(text, str) for text in target[:3]) and isinstance(target.known, bool)):
                raise ValueError(f"{target} is no target")
            for ring, name in ((restored._short, "short_epochs"), (restored._long, "long_epochs")):
                for cell in entry[name]:
                    ring.add(target, *_restored(cell, num_codes, num_expected))
        return restored


def _saved(epochs: Mapping[int, Cell]) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "codes": sorted(cell.counts),
            "counts": [count for _, count in sorted(cell.counts.items())],
            "expected": cell.expected.tolist(),
        }
        for epoch, cell in sorted(epochs.items())
    ]


def _restored(cell: Mapping[str, Any], num_codes: int, num_expected: int) -> tuple[int, dict[int, int], Array]:
    epoch, codes, counts, expected = cell["epoch"], cell["codes"], cell["counts"], cell["expected"]
    for name, numbers, least, below in (
        ("epoch", [epoch], 0, MAX_TIME_S),
        ("codes", codes, 0, num_codes),
        ("counts", counts, 1, MAX_COUNT),
        ("expected", expected, 0, MAX_EXPECTED),
    ):
        if not all(type(number) is int and least <= number < below for number in numbers):
            raise ValueError(f"{name} of an epoch: expected whole numbers from {least} to {below - 1}")
    if not 0 < len(set(codes)) == len(codes) == len(counts) or len(expected) != num_expected or not any(expected):
        raise ValueError(f"epoch {epoch} is incomplete")
    return epoch, dict(zip(codes, counts, strict=True)), np.array(expected, dtype=np.int64)
