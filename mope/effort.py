"""How hard a reasoning LLM is asked to think, as one number, and how people write it.

Levels are OpenAI's. A budget of thinking tokens lies between them where Google's API puts it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from math import log

# word -> level; None: the LLM's own default
LEVELS: Mapping[str, float | None] = {
    "none": 0.0, "off": 0.0, "disabled": 0.0, "minimal": 1.0, "low": 2.0, "medium": 3.0, "high": 4.0, "xhigh": 5.0,
    "max": 5.0, "": None, "auto": None, "default": None, "unspecified": None, "thinking_level_unspecified": None,
}  # fmt: skip
HIGHEST = 5.0
# (thinking tokens, level): for levels up to high as Gemini's OpenAI-compatible API has them
_BUDGETS = ((128, 1.0), (1024, 2.0), (8192, 3.0), (24576, 4.0), (65536, 5.0))
_LOGS = [log(tokens) for tokens, _ in _BUDGETS]


def level_of_budget(tokens: float) -> float:
    """The level of a budget of thinking tokens, linear in its logarithm between the levels, from 1 to 5."""
    row = bisect_left(_BUDGETS, (tokens, 0.0))
    if row in (0, len(_BUDGETS)):
        return _BUDGETS[min(row, len(_BUDGETS) - 1)][1]
    share = (log(tokens) - _LOGS[row - 1]) / (_LOGS[row] - _LOGS[row - 1])
    return _BUDGETS[row - 1][1] + share * (_BUDGETS[row][1] - _BUDGETS[row - 1][1])
