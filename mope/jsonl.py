"""Requests in JSON Lines, as `mope predict` and `mope bench` read them.

Knows files, lines and what makes a request of one; does not know what is done with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from math import isfinite
from typing import TYPE_CHECKING, Any

from mope.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from mope.request import Request

STDIN = "-"  # how standard input is typed


def read_request(number: int, line: str | bytes, defaults: Mapping[str, Any]) -> tuple[Any, Request | str]:
    """Id and request of a line, or its id and what is wrong with it.

    Args:
        number: of the line; the id of a request that has none is `"line <number>"`, which no number is.
        line: a JSON object with `prompt` or `messages`.
        defaults: fields of requests that don't name them.
    """
    from mope.inputs import as_request

    request_id: Any = f"line {number}"
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise DataError(f"got a JSON {type(fields).__name__}; expected an object with prompt")
        given = {name: value for name, value in fields.items() if value is not None}
        if "id" in given:
            if not _is_id(given["id"]):
                raise DataError(f"id is {type(given['id']).__name__}; expected a text or a number")
            request_id = given["id"]
        return request_id, as_request({**defaults, **given})
    except UserError as error:
        return request_id, f"line {number}: {error}"
    except (ValueError, RecursionError) as error:
        return request_id, f"line {number}: not JSON: {error}"


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (type(value) in (int, float) and isfinite(value))


class Ids:
    """Tells ids that came before. Keeps about 150 bytes of each, however long it is."""

    def __init__(self) -> None:
        self.num_repeated = 0
        self.first_repeated = ""
        self._line_of: dict[bytes, int] = {}

    def add(self, number: int, request_id: str | float) -> None:
        """Count an id that a line before has, too.

        Args:
            number: of the line.
            request_id: its id.
        """
        written = json.dumps(request_id)
        before = self._line_of.setdefault(blake2b(written.encode(), digest_size=16).digest(), number)
        if before == number:
            return
        if not self.num_repeated:
            self.first_repeated = f"line {number} has the id {written[:80]}, as line {before} does"
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
def reading(name: str, flag: str) -> Iterator[tuple[Iterable[str | bytes], int | None]]:
    """Lines of a file or stdin, and how many there are if that can be known.

    Args:
        name: path of the file, or `STDIN`.
        flag: what the user typed it after, for the message of an error.

    Raises:
        ConfigError: the file can't be read.
    """
    if name == STDIN:
        yield getattr(sys.stdin, "buffer", sys.stdin), None
        return
    try:
        with open(name, "rb") as file:
            total = sum(1 for _ in file)
            file.seek(0)
            yield file, total
    except BrokenPipeError:  # whoever reads our output went away
        raise
    except OSError as error:
        raise ConfigError(f"{flag} {name} can't be read: {error.strerror}") from error
