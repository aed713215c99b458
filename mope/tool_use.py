"""The tools that a request offers: how many, how large their definitions are, and whether one has to be called.

Reads the JSON of OpenAI, Anthropic and Google. The work is bounded, however large the definitions are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

MAX_MEASURED = 5  # tools whose definitions are measured; the others are taken to be like them
MAX_PARTS = 500  # objects, lists, names and values of them that are looked at
_CHOICES = {
    "auto": "auto", "validated": "auto", "none": "none", "required": "required", "any": "required",
    "tool": "named", "function": "named",
}  # fmt: skip


def listed_tools(tools: Any) -> list[Any]:
    """Definitions of tools, one each; Google's lists of functions are taken apart."""
    if isinstance(tools, Mapping):
        is_one = any(isinstance(tools.get(name), str) for name in ("name", "type"))
        tools = [tools] if is_one else list(tools.values())
    found: list[Any] = []
    for tool in tools:
        inner: Any = None
        if isinstance(tool, dict):
            inner = tool.get("functionDeclarations") or tool.get("function_declarations")
        if isinstance(inner, list):
            found += inner
        else:
            found.append(tool)
    return found


def json_chars(tools: Sequence[Any]) -> int:
    """Characters of tools as compact JSON, estimated from at most `MAX_MEASURED` of them. Some ten microseconds."""
    measured = tools[:: max(1, -(-len(tools) // MAX_MEASURED))]
    num_chars, left = 0, MAX_PARTS
    inside: list[Any] = list(measured)
    while inside and left:
        part = inside.pop()
        left -= 1
        kind = type(part)
        if kind is str:
            num_chars += len(part) + 3  # quotes, and a comma or a colon
        elif kind is dict:
            num_chars += 3 + 3 * len(part)
            inside.extend(islice(part.values(), left))
            num_chars += sum([len(name) for name in islice(part, left) if type(name) is str])
        elif kind is list:
            num_chars += 3
            inside.extend(islice(part, left))
        else:
            num_chars += 5  # a number, true, false or null
    return num_chars * len(tools) // max(len(measured), 1)


def choice_of(value: Any) -> str:
    """`"auto"`, `"required"`, `"named"` or `"none"`; empty for what is not known.

    Args:
        value: `tool_choice` of OpenAI or Anthropic, `function_call`, or the mode of Google's `functionCallingConfig`.
    """
    if isinstance(value, str):
        return _CHOICES.get(value.lower(), "")
    if not isinstance(value, Mapping):
        return ""
    kind = value.get("type")
    if kind == "allowed_tools":
        return choice_of(value.get("mode", "auto"))
    if isinstance(kind, str):
        return _CHOICES.get(kind.lower(), "named")  # hosted tools, such as web_search
    return "named" if isinstance(value.get("name"), str) else ""
