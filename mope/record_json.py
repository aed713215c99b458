"""Records from JSON: one a line, arrays, objects that hold a list of records, and objects one after the other.

Which of these a file is, its first lines say. A record that can't be read is an entry that says why.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterator
from io import BufferedReader
from typing import Any

from mope.record_files import MAX_RECORD_CHARS, NOT_UTF8, Entry, Findings, lines

CHUNK_BYTES = 1 << 20
# an object that has one of these is a record, whatever lists stand in it
OF_RECORDS = frozenset({"prompt", "messages", "conversation", "conversations", "request", "response", "instruction"})
_SPACE = " \t\r\n"


def read_json(
    name: str, file: BufferedReader, findings: Findings, *, head: bytes, is_lines: bool, parts: Collection[str] = ()
) -> Iterator[Entry]:
    """Every record of a JSON file.

    Args:
        name: of the file, for messages.
        file: its text.
        findings: is told about damage.
        head: the beginning of the text.
        is_lines: whether each line is a record where the first lines don't tell.
        parts: see `mope.record_files.read_file`.
    """
    if is_one_a_line(head, is_lines):
        return _json_lines(name, file, findings)
    return _documents(_Text(name, file, findings), parts)


def is_one_a_line(head: bytes, by_name: bool) -> bool:
    """Whether each line is a record; if not, records may stretch over lines, or stand in an array.

    Args:
        head: the beginning of a file.
        by_name: what is so where the first lines don't tell.
    """
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    first, _, rest = head.partition(b"\n")
    first, rest = first.rstrip(), rest.lstrip()
    if head[:1] == b"[":  # an array, or a line that is no record
        return by_name and first[-1:] == b"]" and rest != b""
    if head[:1] != b"{":
        return True
    if first == b"{":  # indented
        return False
    return by_name or (rest.startswith(b"{") and first[-1:] not in b"[{,:")


def _json_lines(name: str, file: BufferedReader, findings: Findings) -> Iterator[Entry]:
    decoder = json.JSONDecoder(strict=False)
    for number, line in lines(name, file, findings):
        line = line.strip()
        if not line:
            continue
        try:
            record = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            yield Entry(f"line {number}", None, f"not JSON: {error}")
            continue
        yield _entry(f"line {number}", record)


def _entry(place: str, value: Any) -> Entry:
    if isinstance(value, dict):
        return Entry(place, value)
    return Entry(place, None, f"got a JSON {type(value).__name__}; expected an object")


class _Text:
    """A window on a text file: characters from `at` on, read further as a parser needs them."""

    def __init__(self, name: str, file: BufferedReader, findings: Findings) -> None:
        self.name = name
        self.findings = findings
        self.buffer = ""
        self.at = 0
        self.ended = False
        self._file = file
        self._num_bytes = 0
        self._num_chars_dropped = 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")

    def more(self, num_bytes: int = CHUNK_BYTES) -> bool:
        """Forget what lies before `at` and read on; False at the end of the file."""
        if self.ended:
            return False
        chunk = self._file.read(num_bytes)
        self.ended = not chunk
        state = self._decoder.getstate()
        try:
            text = self._decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            self.findings.add(NOT_UTF8, f"{self.name}:byte {self._num_bytes + error.start}")
            lenient = codecs.getincrementaldecoder("utf-8-sig")("replace")
            lenient.setstate(state)
            text = lenient.decode(chunk, final=self.ended)
            self._decoder.setstate(lenient.getstate())
        self._num_bytes += len(chunk)
        self._num_chars_dropped += self.at
        self.buffer, self.at = self.buffer[self.at :] + text, 0
        return not self.ended

    def skip(self, characters: str) -> str:
        """Pass over `characters`; the next one is returned and not passed, `""` at the end of the file."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in characters:
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    @property
    def position(self) -> int:
        """Characters before `at`."""
        return self._num_chars_dropped + self.at

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The JSON value at `at`.

        Raises:
            ValueError: it is not JSON, or the file ends inside it.
        """
        size = CHUNK_BYTES
        while True:
            try:
                value, self.at = decoder.raw_decode(self.buffer, self.at)
                return value
            except json.JSONDecodeError as error:
                left = len(self.buffer) - self.at
                cut_off = error.msg.startswith("Unterminated string") or len(self.buffer) - error.pos < 16
                if not cut_off or left > MAX_RECORD_CHARS or not self.more(size):
                    raise
                size *= 2


def _documents(text: _Text, parts: Collection[str]) -> Iterator[Entry]:
    """Records of the objects and arrays that follow each other in a file."""
    decoder = json.JSONDecoder(strict=False)
    number = num_read = 0
    while character := text.skip(_SPACE + ","):
        begin = text.position
        try:
            if character == "[":
                values = _array(text, decoder)
            elif character == "{":
                values = _object(text, decoder, parts)
            else:
                raise json.JSONDecodeError("Expecting an object", text.buffer, text.at)
            for value in values:
                entry = _entry(f"record {number}", value)
                num_read += entry.record is not None
                number += 1
                yield entry
        except _OpenList:
            text.findings.warn(f"{text.name} ends without closing its list: {num_read:,} records were read")
            return
        except (ValueError, RecursionError) as error:
            where = "ends inside a string" if "Unterminated string" in str(error) else "ends inside a record"
            if not text.ended or text.position == begin:
                where = f"is not JSON from character {text.position:,} on ({str(error).partition(':')[0]})"
            text.findings.warn(f"{text.name} {where}: {num_read:,} records before it were read, the rest is lost")
            yield Entry(f"record {number}", None, f"not JSON: {error}")
            return


class _OpenList(Exception):
    """The file ends between two records of a list."""


def _array(text: _Text, decoder: json.JSONDecoder) -> Iterator[Any]:
    """The values of the array at `at`."""
    text.at += 1
    while (character := text.skip(_SPACE + ",")) != "]":
        if not character:
            raise _OpenList
        yield text.value(decoder)
    text.at += 1


def _object(text: _Text, decoder: json.JSONDecoder, parts: Collection[str]) -> Iterator[Any]:
    """The object at `at`, or the records of the first list of objects in it (`{"data": [...]}`)."""
    fields: dict[str, Any] = {}
    held = ""  # name of the list that holds the records
    text.at += 1
    while (character := text.skip(_SPACE + ",")) != "}":
        if character != '"':
            raise json.JSONDecodeError("Expecting property name", text.buffer, text.at)
        key = text.value(decoder)
        if text.skip(_SPACE) != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text.buffer, text.at)
        text.at += 1
        is_list = key not in parts and OF_RECORDS.isdisjoint(fields) and _is_list_of_objects(text)
        if is_list and not held:
            held = key
            yield from _array(text, decoder)
        elif is_list:
            text.findings.warn(f"{text.name}: records are read from its list {held!r} alone, {key!r} is left out")
            for _ in _array(text, decoder):  # one by one: it may be long
                pass
        else:
            text.skip(_SPACE)
            fields[key] = text.value(decoder)
    text.at += 1
    if not held:
        yield fields


def _is_list_of_objects(text: _Text) -> bool:
    """Whether a list that begins with an object comes next. Only spaces are passed."""
    if text.skip(_SPACE) != "[":
        return False
    ahead = 1
    while True:
        if text.at + ahead == len(text.buffer):
            if not text.more():
                return False
        elif text.buffer[text.at + ahead] in _SPACE:
            ahead += 1
        else:
            return text.buffer[text.at + ahead] == "{"
