"""Requests and outputs of batch services that come as records of their own, joined by `custom_id`.

Works on the stream of records, before their format is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mope.log_records import named, unpacked
from mope.reader import parsed
from mope.training.data import problems as reasons
from mope.training.data.problems import Problems

Located = tuple[str, Mapping[str, Any]]

MAX_HELD = 250_000  # records that wait for their other half; more than a batch has


def opened(records: Iterator[Located], problems: Problems) -> Iterator[Located]:
    """Records under the names of known forms, opened where they hold several, and joined where they are halves."""
    requests: dict[str, Located] = {}
    outputs: dict[str, Located] = {}
    ambiguous: set[str] = set()
    for place, packed in records:
        for number, inner in enumerate(unpacked(named(packed))):
            record = named(inner)
            location = place if inner is packed or record is packed else f"{place}.{number}"
            half = _half(record)
            if half is None:
                yield location, record
                continue
            name = str(record["custom_id"])
            mine, others = (requests, outputs) if half == "request" else (outputs, requests)
            if name in mine:
                ambiguous.add(name)
            if name in ambiguous:
                problems.add(reasons.AMBIGUOUS if half == "output" else reasons.UNJOINED, location)
            elif name in others:
                other_place, other = others.pop(name)
                problems.add(reasons.JOINED, other_place if half == "output" else location)
                request, output = (other, record) if half == "output" else (record, other)
                yield location, {**request, **output}
            elif len(mine) < MAX_HELD:
                mine[name] = location, record
            else:
                yield location, record
    for name, (location, record) in outputs.items():
        if name in ambiguous:
            problems.add(reasons.AMBIGUOUS, location)
        else:
            yield location, record
    for location, _ in requests.values():
        problems.add(reasons.UNJOINED, location)


def _half(record: Mapping[str, Any]) -> str | None:
    """`"request"` or `"output"` of a batch without the other; None for any other record."""
    if record.get("custom_id") in (None, ""):
        return None
    has_request = any(isinstance(parsed(record.get(name)), Mapping) for name in ("body", "params", "request"))
    has_output = any(parsed(record.get(name)) not in (None, "", {}) for name in ("response", "result", "error"))
    if has_request == has_output:
        return None
    return "request" if has_request else "output"
