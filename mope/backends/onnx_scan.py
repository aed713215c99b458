"""What an ONNX graph may hold, looked at before ONNX Runtime sees it.

ONNX Runtime up to 1.23 at least reads what a graph names as external data, wherever it lies, and a loop in a graph may
run for ever. `mope-export` writes neither: a graph is one file of standard operators in a row. Anything else is refused
here, from the bytes alone: a walk over the fields of the protocol buffer, without its package, in a millisecond or two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from mope.errors import ArtifactError

# message -> number of a field that is looked at -> the message in it, or why a graph may not have it
_Fields: TypeAlias = dict[int, str]
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE = "model", "graph", "node", "attribute", "tensor", "sparse"
_INSIDE: dict[str, _Fields] = {
    _MODEL: {7: _GRAPH},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 10: _TENSOR, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {},
}
_REFUSED: dict[str, _Fields] = {
    _MODEL: {20: "training", 25: "functions"},
    _GRAPH: {},
    _NODE: {},
    _ATTRIBUTE: {6: "a graph inside", 11: "graphs inside"},
    _SPARSE: {},
    _TENSOR: {13: "external data"},
}
_LOCATION = 14  # of a tensor's data: 0 for the tensor itself
_OPERATOR, _DOMAIN = 4, 7  # of a node: its name, and who defines it
_STANDARD = (b"", b"ai.onnx")
_LOOPS = (b"Loop", b"Scan", b"If", b"SequenceMap")


def check_graph(content: bytes, where: str) -> None:
    """Refuse a graph that needs more than its own bytes, or that may run for ever.

    Args:
        content: of the file.
        where: what to call it.

    Raises:
        ArtifactError: external data, graphs or functions inside, operators that are not standard ones, or no graph.
    """
    try:
        problem = _problem(content)
    except (IndexError, ValueError) as error:
        raise ArtifactError(f"{where} is no ONNX graph; copy the whole folder again") from error
    if problem is not None:
        raise ArtifactError(f"{where} has {problem}, which no graph of mope-export has; export it again")


def _problem(content: bytes) -> str | None:
    if content[4:8] == b"ORTM":  # ONNX Runtime's own format, which it tells by this
        raise ValueError
    has_graph = False
    waiting = [(_MODEL, 0, len(content))]
    while waiting:
        kind, start, end = waiting.pop()
        inside, refused = _INSIDE[kind], _REFUSED[kind]
        for number, wire, low, high in _fields(content, start, end):
            if number in refused:
                return refused[number]
            if wire != 2:
                if kind == _TENSOR and number == _LOCATION and content[low:high].strip(b"\x80\0"):
                    return "external data"
                continue
            if number in inside:
                waiting.append((inside[number], low, high))
                has_graph |= inside[number] == _GRAPH
            elif kind == _NODE and number == _DOMAIN and content[low:high] not in _STANDARD:
                return "operators that are not standard ones"
            elif kind == _NODE and number == _OPERATOR and content[low:high] in _LOOPS:
                return "graphs inside"
    if not has_graph:
        raise ValueError
    return None


def _fields(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, and where its content begins and ends, of each field of a message."""
    position = start
    while position < end:
        tag, position = _varint(content, position)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError
        if wire == 2:
            size, position = _varint(content, position)
            following = position + size
        elif wire == 0:
            _, following = _varint(content, position)
        elif wire in (1, 5):
            following = position + (8 if wire == 1 else 4)
        else:  # groups, which are not used any more, and what does not exist
            raise ValueError
        if following > end:
            raise ValueError
        yield number, wire, position, following
        position = following


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """A whole number of up to ten bytes, and the position after it."""
    byte = content[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    for following in range(position + 1, position + 10):
        byte = content[following]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, following + 1
        shift += 7
    raise ValueError
