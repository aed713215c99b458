"""Requests from files and pipes, as `mope predict` and `mope bench` take them: whatever `mope-train` reads.

Knows which records are requests; does not know what is done with them. Records are read by `mope.record_files`, logs by
`mope.log_records`.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mope.errors import ConfigError, DataError, UserError
from mope.field_map import NO_FIELDS, FieldMap
from mope.log_answers import Usage
from mope.log_records import NAMES, PYTHON_REPR, Logged, canonical, logged, named, python_repr, unpacked
from mope.reader import TEXTS, TOP_NAMES, parsed, read_flags, read_messages
from mope.record_files import (
    ARROW_SUFFIXES,
    HEAD_BYTES,
    JSON_SUFFIXES,
    Entry,
    location,
    read_file,
    read_stream,
    suffix_of,
)  # fmt: skip
from mope.record_folders import TRAIN, left_out_warning, local_files
from mope.record_json import is_one_a_line

if TYPE_CHECKING:
    from mope.request import Request

NO_CALL = "it is no LLM call"  # but an agent, a tool, or a request to another path
STDIN = "-"  # how standard input is typed
IDS = ("custom_id", "id", "request_id")  # the first that a record has is its id
_BARE = frozenset({"flat", "conversation"})  # of records that may be the body of a request and nothing else
_MESSAGES = ("messages", "history")  # may be JSON text in a table


class Told:
    """What was wrong with a file: damage by its reason, and warnings."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._warnings: list[str] = []

    def add(self, reason: str, location: str) -> None:
        """Count one case of `reason`."""
        self._counts[reason] += 1
        self._first.setdefault(reason, location)

    def warn(self, message: str) -> None:
        """Keep a warning, once."""
        if message not in self._warnings:
            self._warnings.append(message)

    def lines(self) -> list[str]:
        """One line for each finding."""
        counted = [f"{count:,} x {reason}; the first: {self._first[reason]}" for reason, count in self._counts.items()]
        return self._warnings + counted


class Reading(NamedTuple):
    """A file that is being read.

    Attributes:
        entries: its records, in order.
        total: how many there are, if that can be known.
        told: what is wrong with it, complete once all entries were read.
    """

    entries: Iterator[Entry]
    total: int | None
    told: Told


def read_request(entry: Entry, defaults: Mapping[str, Any]) -> tuple[Any, Request | str]:
    """Id and request of a record, or its id and what is wrong with it.

    Args:
        entry: of a file; the id of a record that has none is its place, such as `"line 7"`.
        defaults: flags of requests that don't say them.
    """
    request_id: Any = entry.place
    try:
        if entry.record is None:
            raise DataError(entry.mistake)
        record = {name: value for name, value in named(entry.record).items() if value is not None}
        names = {str(name).lower(): name for name in reversed(record)}
        for name in (names[known] for known in IDS if known in names):
            if not _is_id(record[name]):
                raise DataError(f"{name} is {type(record[name]).__name__}; expected a text or a number")
            request_id = record[name]
            break
        return request_id, request_of(record, defaults)
    except UserError as error:
        return request_id, f"{entry.place}: {error}"


def request_of(record: Mapping[str, Any], defaults: Mapping[str, Any]) -> Request:
    """The request in a record: the body of an HTTP request, our own names of the same things, or a log of any form.

    What a log holds beside the request is passed over. In a body alone, a name that is nearly one of ours is an error.

    Args:
        record: without values that are None.
        defaults: flags of requests that don't say them.

    Raises:
        DataError: no request, or one that can't be read.
    """
    from mope.inputs import FLAGS, as_request
    from mope.request import Request

    if python_repr(record):
        raise DataError(PYTHON_REPR)
    call = logged(record)
    if call is not None and (call.lacking or _is_log(call) or not any(name in record for name in TEXTS)):
        messages = read_messages(call.request)
        if not any(message["role"] in ("user", "human") for message in messages):
            raise DataError(call.lacking or ("it holds no text of a user" if call.is_call else NO_CALL))
        return Request.from_messages(messages, **{**defaults, **read_flags(call.request)})
    passed_over = NAMES - TOP_NAMES - FLAGS - {*TEXTS, "history", "id"}
    body = {
        name: parsed(value) if name in _MESSAGES else value for name, value in record.items() if name not in passed_over
    }
    said = read_flags(body)
    return as_request({**{name: value for name, value in defaults.items() if name not in said}, **body})


def _is_log(call: Logged) -> bool:
    """Whether there is more than a request."""
    return bool(call.answers) or call.usage != Usage() or call.finish is not None or call.family not in _BARE


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (type(value) in (int, float) and isfinite(value))


class Ids:
    """Tells ids that came before. Keeps about 150 bytes of each, however long it is."""

    def __init__(self) -> None:
        self.num_repeated = 0
        self.first_repeated = ""
        self._place_of: dict[bytes, str] = {}

    def add(self, place: str, request_id: str | float) -> None:
        """Count an id that a record before has, too.

        Args:
            place: of the record.
            request_id: its id.
        """
        written = json.dumps(request_id)
        before = self._place_of.setdefault(blake2b(written.encode(), digest_size=16).digest(), place)
        if before == place:
            return
        if not self.num_repeated:
            self.first_repeated = f"{place} has the id {written[:80]}, as {before} does"
        self.num_repeated += 1


def json_line(content: Mapping[str, Any]) -> str:
    """One line of JSON that can be written as UTF-8: halves of surrogate pairs, which an id may hold, are escaped."""
    line = json.dumps(content, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(content)
    return line + "\n"


@contextmanager
def reading(name: str, flag: str, fields: FieldMap = NO_FIELDS, split: str = TRAIN) -> Iterator[Reading]:
    """The records of files or of stdin. The first is read at once, so that most mistakes show before any work.

    Args:
        name: path of a file or folder, a glob, or `STDIN`.
        flag: what the user typed it after, for the message of an error.
        fields: where the records hold what, if no form is known that fits them.
        split: of a folder whose files are named by splits.

    Raises:
        ConfigError: a file can't be read.
        DataError: it is no file of records, or one without the fields.
        MissingExtraError: it needs pyarrow, which is not installed.
    """
    told = Told()
    with ExitStack() as stack:
        paths, left_out = ((Path(name),), ()) if name == STDIN else local_files(name, split) or ((Path(name),), ())
        if left_out:
            told.warn(left_out_warning(left_out))
        if len(paths) == 1:
            entries, total = _opened(name if name == STDIN else str(paths[0]), flag, told, stack)
        else:
            entries, total = _of_all(paths, flag, told), None
        guarded = _guarded(entries, f"{flag} {name}")
        first = next(guarded, None)
        if first is not None and first.place.endswith(".0"):
            total = None  # a line holds several records
        read = guarded if first is None else chain([first], guarded)
        if fields.paths:
            read = _mapped(read, fields, told, name)
            read = chain([] if (begin := next(read, None)) is None else [begin], read)
        yield Reading(read, total, told)


def _mapped(entries: Iterator[Entry], fields: FieldMap, told: Told, source: str) -> Iterator[Entry]:
    """Entries under known names. Names that are nobody's are left out: no typing mistake of ours can be among them."""
    known = ((entry, entry.record) for entry in entries)
    others = {"custom_id", "request_id"} if "id_field" in dict(fields.paths) else set()
    for entry, record in fields.apply(known, told, source):
        names = () if record is None else [name for name in record if canonical(name) in NAMES and name not in others]
        yield entry if record is None else entry._replace(record={name: record[name] for name in names})


def _of_all(paths: Sequence[Path], flag: str, told: Told) -> Iterator[Entry]:
    """The records of several files, one file after the other; places begin with the file's name."""
    top = Path(os.path.commonpath([path.parent for path in paths]))
    for path in paths:
        with ExitStack() as stack:
            entries, _ = _opened(str(path), flag, told, stack)
            inside = path.relative_to(top).as_posix()
            yield from (entry._replace(place=location(inside, entry.place)) for entry in entries)


def _opened(name: str, flag: str, told: Told, stack: ExitStack) -> tuple[Iterator[Entry], int | None]:
    """The entries of one file, and how many there are, if that can be known."""
    if name == STDIN:
        return read_stream("stdin", _stdin(), told, parts=NAMES), None
    try:
        if suffix_of(name) in ARROW_SUFFIXES:
            Path(name).open("rb").close()
            return read_file(Path(name), told), _num_rows(name)
        file = stack.enter_context(Path(name).open("rb"))  # noqa: SIM115
        total = _num_lines(file, suffix_of(name)) if file.seekable() else None
    except OSError as error:
        raise ConfigError(f"{flag} {name} can't be read: {error.strerror}") from error
    return read_stream(Path(name).name, file, told, parts=NAMES), total


def _stdin() -> io.BufferedIOBase:
    raw = getattr(sys.stdin, "buffer", None)
    return raw if raw is not None else io.BytesIO(sys.stdin.read().encode())


def _num_rows(name: str) -> int | None:
    from mope.record_tables import num_rows

    return num_rows(Path(name))


def _num_lines(file: io.BufferedReader, suffix: str) -> int | None:
    """Lines that are not blank, where each is a record; the file is at its beginning again."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if suffix not in ("", *JSON_SUFFIXES) or head[:1] != b"{" or not is_one_a_line(head, suffix != ".json"):
        return None
    total = sum(not line.isspace() for line in file)
    file.seek(0)
    return total


def _guarded(entries: Iterator[Entry], what: str) -> Iterator[Entry]:
    """Entries, those apart that one record holds, with what goes wrong on the way as one line."""
    try:
        for entry in entries:
            if entry.record is None:
                yield entry
                continue
            for number, record in enumerate(unpacked(entry.record)):
                is_whole = record is entry.record
                yield Entry(entry.place if is_whole else f"{entry.place}.{number}", dict(record))
    except OSError as error:
        raise ConfigError(f"{what} can't be read: {error.strerror or error}") from error
