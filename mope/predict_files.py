"""`mope predict --input`: a line for each record of files, in their order. What was predicted outlives a Ctrl-C.

Knows records, lines and where they are kept; the predictor is loaded by who asks for the lines.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mope import console as terminal
from mope.errors import ConfigError, DataError, MopeError
from mope.field_map import FieldMap
from mope.files import opened, writable
from mope.request_files import STDIN, Ids, Reading, json_line, read_request, reading

if TYPE_CHECKING:
    from mope.prediction import LengthPrediction
    from mope.predictor import LengthPredictor
    from mope.request import Request

LEVELS = (0.1, 0.5, 0.9, 0.99)
WINDOW_BATCHES = 32  # batches that are read at once, so that requests of like length are predicted together
PARTIAL = ".partial"  # behind the name of an output that is not whole


class InterruptedPredictionsError(MopeError):
    """Ctrl-C; says what is kept."""


@dataclass(kw_only=True)
class PredictedFiles:
    """Predictions for the records of files.

    Attributes:
        source: file, folder, glob or `STDIN`.
        output: file of the lines; None or `STDIN` for stdout.
        fields: where records of other forms hold what.
        split: of a folder whose files are named by splits.
        defaults: flags of requests that say none.
        batch_size: requests that are predicted at once.
        resume: go on with what an interrupted command kept of `output`.
    """

    source: str
    output: str | None
    fields: FieldMap
    split: str
    defaults: Mapping[str, Any]
    batch_size: int
    resume: bool = False
    _num_records: int = 0
    _num_bad: int = 0
    _first_error: str = ""
    _ids: Ids = field(default_factory=Ids)

    def write(self, load: Callable[[], LengthPredictor]) -> list[str]:
        """Predict and write a line for each record.

        Args:
            load: gives the predictor; called once the first record was read.

        Returns:
            What a user should know, in sentences.

        Raises:
            DataError: none of the records is a request, or what was kept is of other records.
            ConfigError: a file that can't be read or written, or nothing to go on with.
            InterruptedPredictionsError: Ctrl-C.
        """
        with reading(self.source, "--input", self.fields, self.split) as found:
            predictor = load()
            with self._writing(found.entries) as output, terminal.progress("predicting", found.total) as advance:
                advance(self._num_records)
                try:
                    self._predict(predictor, found, output, advance)
                except KeyboardInterrupt as error:
                    raise self._interrupted(output) from error
            return self._warnings(found)

    def _predict(
        self, predictor: LengthPredictor, found: Reading, output: IO[str], advance: Callable[[int], None]
    ) -> None:
        while window := list(islice(found.entries, WINDOW_BATCHES * self.batch_size)):
            known = [read_request(entry, self.defaults) for entry in window]
            for entry, (request_id, _) in zip(window, known, strict=True):
                self._ids.add(entry.place, request_id)
            for answer in _answers(predictor, known, self.batch_size):
                output.write(json_line(answer))
                self._count(answer)
            advance(len(window))
        if self._num_bad == self._num_records:
            reason = f"the first: {self._first_error}" if self._num_records else "; ".join(found.told.lines())
            raise DataError(
                f"{self.source}: none of {self._num_records:,} records is a request; {reason or 'it is empty'}"
            )

    def _count(self, answer: Mapping[str, Any]) -> None:
        self._num_records += 1
        if "error" in answer:
            self._num_bad += 1
            self._first_error = self._first_error or str(answer["error"])

    @property
    def _partial(self) -> Path | None:
        """Where an interrupted command keeps its lines; None if they went to stdout."""
        return None if self.output in (None, STDIN) else Path(f"{self.output}{PARTIAL}")

    @contextmanager
    def _writing(self, entries: Iterator[Any]) -> Iterator[IO[str]]:
        """Stdout, or a file that appears under its name when it is whole; a resumed one begins with what was kept."""
        partial = self._partial
        if partial is None:
            yield sys.stdout
            return
        with writable(f"--output {self.output}"), opened(Path(str(self.output))) as file:
            if self.resume:
                self._go_on(partial, entries, file)
            yield file
        partial.unlink(missing_ok=True)

    def _go_on(self, partial: Path, entries: Iterator[Any], file: IO[str]) -> None:
        """Take over what was kept, and pass over the records that it is about."""
        if not partial.exists():
            raise ConfigError(f"--resume: there is no {partial} of an interrupted command to go on with; leave it out")
        with partial.open(encoding="utf-8") as kept:
            for line in kept:
                answer, entry = json.loads(line), next(entries, None)
                request_id = None if entry is None else read_request(entry, self.defaults)[0]
                if entry is None or answer["id"] != request_id:
                    raise DataError(
                        f"--resume: {partial} holds a prediction for {answer['id']!r} where {self.source} has "
                        f"{'no record' if entry is None else repr(request_id)}; leave out --resume to begin anew"
                    )
                self._ids.add(entry.place, request_id)
                file.write(line)
                self._count(answer)

    def _interrupted(self, output: IO[str]) -> InterruptedPredictionsError:
        said = f"interrupted after {self._num_records:,} records"
        partial = self._partial
        if partial is None:
            return InterruptedPredictionsError(said)
        if not self._num_records:
            return InterruptedPredictionsError(f"{said}; nothing was written")
        output.flush()
        shutil.copyfile(output.name, partial)
        return InterruptedPredictionsError(f"{said}, kept in {partial}; add --resume to go on")

    def _warnings(self, found: Reading) -> list[str]:
        warnings = found.told.lines()
        if self._num_bad:
            warnings.append(
                f"{self._num_bad:,} of {self._num_records:,} records are no requests and have an error instead of a "
                f"prediction; the first: {self._first_error}"
            )
        if self._ids.num_repeated:
            warnings.append(
                f"{self._ids.num_repeated:,} of {self._num_records:,} records have an id that a record before them "
                f"has; the first: {self._ids.first_repeated}; predictions are written in the order of the records"
            )
        return warnings


def answer_of(request_id: Any, prediction: LengthPrediction) -> dict[str, Any]:
    """What is written about one request."""
    quantiles = dict(zip(map(str, LEVELS), prediction.quantiles(LEVELS).round(2).tolist(), strict=True))
    thoughts = prediction.thoughts
    return {
        "id": request_id,
        "median": quantiles["0.5"],
        "mean": round(prediction.mean, 2),
        "quantiles": quantiles,
        "expert": prediction.expert,
        "source": prediction.source,
        **({} if thoughts is None else {"thoughts": {name: round(own, 4) for name, own in thoughts._asdict().items()}}),
    }


def _answers(
    predictor: LengthPredictor, known: Sequence[tuple[Any, Request | str]], batch_size: int
) -> Iterator[dict[str, Any]]:
    """What is written about each record, in order; requests of like length are predicted together."""
    requests = {row: request for row, (_, request) in enumerate(known) if not isinstance(request, str)}
    order = sorted(requests, key=lambda row: len(requests[row].prompt))
    predictions: dict[int, LengthPrediction] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        predictions.update(zip(rows, predictor.predict_batch([requests[row] for row in rows]), strict=True))
    for row, (request_id, request) in enumerate(known):
        if isinstance(request, str):
            yield {"id": request_id, "error": request}
        else:
            yield answer_of(request_id, predictions[row])
