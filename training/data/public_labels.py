"""The label of a row of a public set: what the engine generated, thoughts included, and whose tokens it is counted in.

Files of public sets hold the visible answer in cl100k_base tokens and, where known, the thoughts and the usage that
the API recorded. Knows these columns; does not know files or chats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mope.target_llm import describe

LABEL_TOKENIZER = "cl100k_base"
OWN_TOKENS = "own"  # of the LLM that answered
HIDDEN_FACTOR, HIDDEN_TOKENS = 2.0, 16  # no two tokenizers differ by more: what is above it are hidden thoughts

# LLMs that may think without any word of it in their names
MAY_THINK = re.compile(
    r"gemini-(?:2\.5|3)|gpt-5|grok-4|qwen3(?!.*(?:instruct|coder))|glm-(?:4\.[5-9]|5)|kimi-k2\.5|deepseek-v3\.[12]|"
    r"seed-2|nemotron|cogito|minimax-m|hermes-4|magistral|horizon|olmo-?3",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Label:
    """How long an answer was.

    Attributes:
        tokens: all that was generated, as far as is known.
        thoughts: how many of them are thoughts; None if that is not known.
        unit: `own` for tokens of the LLM itself, else the name of a tokenizer.
        censored: the answer was longer than `tokens`.
    """

    tokens: int
    thoughts: int | None
    unit: str
    censored: bool


def label_of(row: Mapping[str, Any], *, unit: str, tells_thoughts: bool) -> Label:
    """The label of a row.

    Visible answer and thoughts are added where both are known. Where thoughts are hidden, the recorded completion is
    the label; without a completion the visible answer is a lower bound.

    Args:
        row: columns of a public set's file.
        unit: of its column `response_tokens`.
        tells_thoughts: whether the set says which LLMs thought. Without it nothing is said of thoughts.
    """
    visible, censored = int(row["response_tokens"]), bool(row.get("censored"))
    reasoning, completion = row.get("reasoning_tokens"), row.get("completion_tokens")
    if reasoning is not None:
        is_own = row.get("reasoning_source") == "difference"  # then the sum is the recorded completion
        return Label(visible + reasoning, reasoning, OWN_TOKENS if is_own else unit, censored)
    thinking = row.get("thinking")
    by_name = describe(row["target_llm"]).thinking
    if completion is not None and thinking is not False:
        beyond = completion > HIDDEN_FACTOR * visible + HIDDEN_TOKENS
        if completion >= visible and (thinking or by_name or beyond):
            return Label(completion, None, OWN_TOKENS, censored)
    if thinking:
        return Label(visible, None, unit, True)
    surely_none = thinking is False or not (by_name or MAY_THINK.search(row["target_llm"]))
    return Label(visible, 0 if tells_thoughts and surely_none else None, unit, censored)
