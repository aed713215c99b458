"""Records from files as people keep them: JSON, JSON Lines, CSV, parquet and Arrow, plain or compressed.

Training, `mope predict` and `mope bench` read files with this. What a record means is read elsewhere. One record and a
buffer are in memory; a file that breaks off gives what comes before.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mope.engine_logs import refusal
from mope.errors import DataError
from mope.extras import require

# reasons under which a file's damage is counted
UNREADABLE = "unreadable record, skipped"
NOT_UTF8 = "piece with bytes that are not UTF-8, kept with U+FFFD in their place (Latin-1? iconv -f latin1 -t utf-8)"
NUL_REMOVED = "text with NUL characters, kept without them"

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv")
ARROW_SUFFIXES = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst")
SUFFIXES = (*TEXT_SUFFIXES, *(text + packed for packed in COMPRESSED for text in TEXT_SUFFIXES), *ARROW_SUFFIXES)
KNOWN_SUFFIXES = f"{', '.join((*TEXT_SUFFIXES, *ARROW_SUFFIXES))}; text also with {' or '.join(COMPRESSED)} behind it"
HEAD_BYTES = 1 << 20  # what is looked at before a file is read, and how much is read at once
MAX_RECORD_CHARS = 256 << 20  # a record that is still open after this many characters is not JSON
PIECE_BYTES = 1 << 16  # asked of a decompressor at once: so much is lost at most before the place of a damage

_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\{|\[\s*[\[{\"\]])")  # how a file of JSON begins
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


class Findings(Protocol):
    """Who is told about damage."""

    def add(self, reason: str, location: str) -> None:
        """Count one case of `reason`, seen at `location` (`"file:line"`)."""

    def warn(self, message: str) -> None:
        """Take a warning about a whole file."""


class Entry(NamedTuple):
    """One place of a file.

    Attributes:
        place: such as `"line 7"`; items of JSON arrays and rows of tables are counted from 0.
        record: what stands there; None if it can't be read.
        mistake: why not, in words.
    """

    place: str
    record: dict[str, Any] | None
    mistake: str = ""


class Selection(NamedTuple):
    """Which columns a file of columns is asked for.

    Attributes:
        wanted: whether a column is loaded, by its name. If none is, all are.
        pruned: columns of which only leaves of one name are loaded, where a file can do that.
    """

    wanted: Callable[[str], bool]
    pruned: tuple[str, str] | None = None


def location(name: str, place: str) -> str:
    """A place of a file in a report: `"file:7"` for a line or a row."""
    return f"{name}:{place.removeprefix('line ').removeprefix('row ')}"


def suffix_of(name: str) -> str:
    """The suffix that says what a file is: `.jsonl` of `data.jsonl.gz`. Empty if it is none that is known."""
    name = name.lower()
    for packed in COMPRESSED:
        name = name.removesuffix(packed)
    return next((suffix for suffix in (*TEXT_SUFFIXES, *ARROW_SUFFIXES) if name.endswith(suffix)), "")


def is_known(name: str) -> bool:
    """Whether a file of this name can be read by its suffix."""
    return name.lower().endswith(SUFFIXES)


def read_file(
    path: Path, findings: Findings, *, parts: Collection[str] = (), selection: Selection | None = None
) -> Iterator[Entry]:
    """Every place of a file, in order. The suffix says what it is; without a known one it is JSON.

    Args:
        path: of the file.
        findings: is told about damage.
        parts: names whose lists belong to a record; a list of objects under another name holds records.
        selection: columns to load, for parquet and Arrow.

    Raises:
        DataError: a file that can't be read at all.
        MissingExtraError: parquet, Arrow or `.zst` without pyarrow.
        OSError: the file can't be opened.
    """
    if suffix_of(path.name) in ARROW_SUFFIXES:
        from mope.record_tables import read_table

        yield from read_table(path, selection)
    else:
        with path.open("rb") as file:
            yield from read_stream(path.name, file, findings, parts=parts)


def read_stream(
    name: str, file: io.BufferedIOBase, findings: Findings, *, parts: Collection[str] = ()
) -> Iterator[Entry]:
    """Every place of an open text file or pipe; see `read_file`. Compression is found by its first bytes, too."""
    from mope.record_csv import read_csv
    from mope.record_json import read_json

    with _opened(name, file, findings) as text:
        head = text.peek(HEAD_BYTES)
        for mark, encoding in _ENCODINGS.items():
            if head.startswith(mark):
                raise DataError(f"{name} is {encoding}; expected UTF-8: iconv -f {encoding} -t UTF-8 {name}")
        suffix = suffix_of(name)
        is_text = suffix not in (".csv", ".tsv") and not _JSON.match(head)
        if is_text and (said := refusal(head.decode("utf-8", "replace").splitlines())):
            raise DataError(f"{name}: {said}")
        if suffix in (".csv", ".tsv"):
            yield from read_csv(name, text, findings, head=head, default="\t" if suffix == ".tsv" else ",")
        elif suffix in ARROW_SUFFIXES:
            raise DataError(f"{name} can't be read compressed or from a pipe; {suffix[1:]} is a file of its own")
        else:
            yield from read_json(name, text, findings, head=head, is_lines=suffix in (".jsonl", ".ndjson"), parts=parts)


def lines(name: str, file: io.BufferedReader, findings: Findings) -> Iterator[tuple[int, str]]:
    """(number, text) of every line, bytes that are not UTF-8 replaced and counted."""
    number, is_begin = 0, True
    while line := file.readline(MAX_RECORD_CHARS):  # a longer one comes in pieces, so that none fills the memory
        number += is_begin
        if number == 1 and is_begin:
            line = line.removeprefix(codecs.BOM_UTF8)
        is_begin = line.endswith(b"\n")
        try:
            yield number, line.decode()
        except UnicodeDecodeError:
            findings.add(NOT_UTF8, f"{name}:{number}")
            yield number, line.decode("utf-8", "replace")


@contextmanager
def _opened(name: str, file: io.BufferedIOBase, findings: Findings) -> Iterator[io.BufferedReader[Any]]:
    """The text inside of a file, through its compression. The first `peek` gives `HEAD_BYTES`, or all there is."""
    raw = io.BufferedReader(_Source(file.read1, name, findings), HEAD_BYTES)
    mark = raw.peek(4)[:4]
    read: Callable[[int], bytes] = raw.read1
    errors: tuple[type[Exception], ...] = ()
    packed = ""
    if mark.startswith(_GZIP) or (mark and name.lower().endswith(".gz")):
        packed, read = "gzip", gzip.GzipFile(fileobj=raw, mode="rb").read1
        errors = (EOFError, zlib.error, gzip.BadGzipFile)
    elif mark == _ZSTD or (mark and name.lower().endswith(".zst")):
        arrow = require("pyarrow", f"{name} (zstd)", "files")
        packed, read = "zstd", arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd").read
        errors = (OSError, arrow.ArrowException)
    with io.BufferedReader(_Source(read, name, findings, packed, errors), HEAD_BYTES) as text:
        yield text


class _Source(io.RawIOBase):
    """Bytes that come from a function, in full buffers. Damage ends them, and is told once."""

    def __init__(
        self,
        read: Callable[[int], bytes],
        name: str,
        findings: Findings,
        packed: str = "",
        errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self._read, self._name, self._findings, self._packed, self._errors = read, name, findings, packed, errors
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer) and not self._ended:
            try:
                piece = self._read(min(PIECE_BYTES, len(buffer) - filled))
            except self._errors as error:
                self._findings.warn(
                    f"{self._name} is a damaged or cut-off {self._packed} file ({error}); what comes before was read"
                )
                piece = b""
            self._ended = not piece
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled
