"""Requests in JSON Lines, as `mope predict` and `mope bench` read them.

Knows files, lines and what makes a request of one; does not know what is done with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mope.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from mope.request import Request

STDIN = "-"  # how standard input is typed


def read_request(number: int, line: str | bytes, defaults: Mapping[str, Any]) -> tuple[Any, Request | str]:
    """Id and request of a line, or its id and what is wrong with it.

    Args:
        number: of the line; the id of a request that has none.
        line: a JSON object with `prompt` or `messages`.
        defaults: fields of requests that don't name them.
    """
    from mope.inputs import as_request

    request_id: Any = number
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise DataError(f"got a JSON {type(fields).__name__}; expected an object with prompt")
        request_id = fields.get("id", number)
        return request_id, as_request(
            {**defaults, **{name: value for name, value in fields.items() if value is not None}}
        )
    except UserError as error:
        return request_id, f"line {number}: {error}"
    except (ValueError, RecursionError) as error:
        return request_id, f"line {number}: not JSON: {error}"


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
