"""Records from CSV: comma, tab, semicolon and pipe, and the ways of quoting that programs have.

A file is read as RFC 4180 has it unless its head does not fit that and fits another dialect throughout, so that a plain
file is never split otherwise.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from io import BufferedReader, StringIO
from itertools import chain
from typing import Any, NamedTuple

from mope.record_files import HEAD_BYTES, NUL_REMOVED, Entry, Findings, lines, location

DELIMITERS = (",", "\t", ";", "|")
MAX_FIELD_CHARS = 1 << 27
SEPARATOR_LINE = "sep="  # Excel's: the first line names the delimiter
# ways of quoting, the usual one first
QUOTINGS: tuple[Mapping[str, Any], ...] = (
    {},
    {"escapechar": "\\"},
    {"skipinitialspace": True},
    {"quotechar": "'"},
    {"quoting": csv.QUOTE_NONE},
)


def read_csv(name: str, file: BufferedReader, findings: Findings, *, head: bytes, default: str) -> Iterator[Entry]:
    """Every row as a record, by the names in the first line; an empty cell is None.

    Args:
        name: of the file, for messages.
        file: its text.
        findings: is told about damage.
        head: the beginning of the text.
        default: the delimiter that the file's name stands for.
    """

    def cleaned() -> Iterator[str]:
        for number, line in lines(name, file, findings):
            if "\0" in line:
                findings.add(NUL_REMOVED, location(name, f"line {number}"))
                line = line.replace("\0", "")
            yield line

    csv.field_size_limit(MAX_FIELD_CHARS)
    text = cleaned()
    first = next(text, "")
    is_separator = _names_separator(first)
    dialect = dialect_of(head.decode("utf-8", "replace"), default, is_whole=len(head) < HEAD_BYTES)
    reader = csv.reader(text if is_separator else chain([first], text), **dialect)
    try:
        header = [title.strip() for title in next(reader, [])]
        for fields in reader:
            place = f"line {is_separator + reader.line_num}"
            if len(fields) == len(header):
                yield Entry(place, {title: value or None for title, value in zip(header, fields, strict=True)})
            elif fields:
                yield Entry(place, None, f"{len(fields)} fields; the first line names {len(header)}")
    except csv.Error as error:
        place = f"line {is_separator + reader.line_num}"
        findings.warn(f"{name} is not CSV after {place} ({error}); what comes before was read")
        yield Entry(place, None, f"not CSV: {error}")


def dialect_of(head: str, default: str = ",", *, is_whole: bool = True) -> dict[str, Any]:
    """What `csv.reader` is to be told about a file.

    Args:
        head: its beginning.
        default: the delimiter that is kept if it splits the first line.
        is_whole: whether that is all of it; if not, its last row may be cut off.
    """
    head = head.removeprefix("\ufeff").replace("\0", "")
    if not is_whole:
        head = head[: head.rfind("\n") + 1]
    first, _, rest = head.partition("\n")
    if _names_separator(first):
        return _dialect(rest, first.strip("\r")[-1], is_whole)[0]
    dialect, _ = _dialect(head, default, is_whole)
    if len(_parsed(first, {"delimiter": default}).titles) > 1:
        return dialect
    others = [_dialect(head, delimiter, is_whole) for delimiter in DELIMITERS]
    others = [(other, fits) for other, fits in others if len(_parsed(first, other).titles) > 1]
    fitting = [other for other, fits in others if fits]
    fitting += [other for other, _ in others if _is_usual_length(_parsed(head, other))]
    return next(iter(fitting), dialect)


def _is_usual_length(found: _Parsed) -> bool:
    """Whether most rows are as long as the first."""
    return 2 * sum(len(row) == len(found.titles) for row in found.rows[1:]) > len(found.rows) - 1


def _names_separator(line: str) -> bool:
    line = line.strip("\r\n\ufeff")
    return line.lower().startswith(SEPARATOR_LINE) and len(line) == len(SEPARATOR_LINE) + 1


def _dialect(head: str, delimiter: str, is_whole: bool) -> tuple[dict[str, Any], bool]:
    """A delimiter with the first way of quoting that fits the head, or the usual one, and whether it fits."""
    usual = {"delimiter": delimiter}
    titles = _parsed(head.partition("\n")[0], usual).titles
    is_single = bool(titles) and all(len(title) > 1 and title[0] == title[-1] == "'" for title in titles)
    for quoting in QUOTINGS:
        if is_single != (quoting.get("quotechar") == "'"):
            continue
        found = _parsed(head, {**usual, **quoting, "strict": True})
        if found.is_wrong or (found.is_open and is_whole) or any(len(row) != len(found.titles) for row in found.rows):
            continue
        if quoting.get("quoting") == csv.QUOTE_NONE and any(_is_quoted(field) for row in found.rows for field in row):
            continue  # it quotes, and is damaged
        return {**usual, **quoting}, True
    return usual, False


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


class _Parsed(NamedTuple):
    """Rows of a text in some dialect.

    Attributes:
        titles: the first row.
        rows: those that are not blank, the first one, too.
        is_wrong: whether the text breaks the dialect's rules.
        is_open: whether it ends inside a quoted field.
    """

    titles: list[str]
    rows: list[list[str]]
    is_wrong: bool = False
    is_open: bool = False


def _parsed(text: str, dialect: Mapping[str, Any]) -> _Parsed:
    rows: list[list[str]] = []
    is_wrong = is_open = False
    try:
        rows.extend(row for row in csv.reader(StringIO(text, newline=""), **dialect) if row)
    except csv.Error as error:
        is_open = "unexpected end of data" in str(error)
        is_wrong = not is_open
    return _Parsed([title.strip() for title in rows[0]] if rows else [], rows, is_wrong, is_open)
