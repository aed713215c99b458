"""Rules: what a prompt asks for in so many words, and the answer length that this suggests.

A rule is a pattern with a count of tokens it implies ("in 50 words" -> about 68), or only a kind ("yes or no").
How far answers really follow is learned from data (`RuleTable`). Knows text and nothing of networks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import erf, log, sqrt

import numpy as np

from mope.grid import Array
from mope.triggers import Pattern, Triggers, Words

NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        (
            "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
            "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
        ),
        start=1,
    )
} | {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}  # fmt: skip
_WORD = "(?:" + "|".join((*NUMBER_WORDS, "hundred", "thousand")) + r")\b"
_NUMBER = rf"\b(\d[\d,]{{0,6}}(?:k\b)?|{_WORD}(?:[\s-]{_WORD}){{0,3}})"  # 500, 2,000, 2k, twenty-five, five hundred
_TOKENS_PER = {
    "word": 1.35, "character": 0.25, "letter": 0.25, "sentence": 24.0, "line": 12.0, "paragraph": 95.0, "page": 600.0,
    "token": 1.0, "tweet": 45.0, "bullet": 24.0, "item": 20.0, "step": 35.0,
}  # fmt: skip
_UNITS = re.compile(
    rf"{_NUMBER}(?:\s*(?:-|to|or)\s*{_NUMBER})?[\s-]*(?:\w{{1,30}}[\s-]+)?"
    r"(words?|characters?|letters?|sentences?|lines?|paragraphs?"
    r"|pages?|tokens?|tweets?|bullets?|bullet points?|items?|steps?)\b",
    re.I,
)
_LIST = re.compile(
    r"\b(?:list|give|name|suggest|generate|write|provide|create|top|best"
    rf"|recommend|brainstorm|make|tell|show|need|want)\b[^.?!\n]{{0,40}}?{_NUMBER}"
    r"\s+(?!words?\b|characters?\b|sentences?\b|years?\b|days?\b|hours?\b|minutes?\b|percent\b|%)\w+",
    re.I,
)
_ONE_WORD = re.compile(
    r"\b(?:one|a single|1)[\s-]word\b|\bjust the (?:answer|number|letter|name)\b"
    r"|\bonly (?:the )?(?:answer|number|letter)\b",
    re.I,
)
_YES_NO = re.compile(r"\byes\s*(?:/|or)\s*no\b|\btrue\s*(?:/|or)\s*false\b", re.I)
_POLAR = re.compile(
    r"^\W*(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have|had|am)\b[^\n]*\?\s*$", re.I
)
_TRANSLATE = re.compile(r"\btranslat(?:e|ion)\b", re.I)
_REWRITE = re.compile(
    r"\b(?:rewrite|rephrase|paraphrase|proofread|reword|correct (?:the|this|my)|fix the grammar"
    r"|edit (?:the|this|my))\b",
    re.I,
)
_SUMMARISE = re.compile(r"\b(?:summar(?:y|ise|ize)|tl;?dr)\b", re.I)
_JSON = re.compile(r"\b(?:json|yaml|xml|csv)\b", re.I)
_CODE = re.compile(
    r"```|\b(?:write|implement|create|generate|give me|show me|make)\b[^.?!\n]{0,60}"
    r"\b(?:code|function|script|program|class|query|regex|component|html|sql|python|javascript)\b",
    re.I,
)
_ESSAY = re.compile(
    r"\b(?:essay|article|blog post|story|report|chapter|novel|screenplay|speech|cover letter|thesis|business plan)\b",
    re.I,
)
_CONTINUE = re.compile(r"^\W*(?:please\s+)?(?:continue|go on|keep going|proceed|more|next|finish)\b[^\n]{0,40}$", re.I)
_THANKS = re.compile(
    r"^\W*(?:thanks?|thank you|ok(?:ay)?|great|perfect|cool|nice|hi|hello|hey|good|yes|no|sure)\b[^\n]{0,30}$", re.I
)


def _count(text: str) -> float:
    if text[0].isdecimal():
        thousands = text[-1].lower() == "k"  # the Kelvin sign, too, which re.I takes for a k
        return float("".join(filter(str.isdecimal, text))) * (1000 if thousands else 1)
    count = part = 0.0
    for word in re.split(r"[\s-]", text.lower()):
        if word == "thousand":
            count, part = count + 1000 * max(part, 1.0), 0.0
        elif word == "hundred":
            part = 100 * max(part, 1.0)
        else:  # 0: re.I takes look-alikes such as a dotless i for a letter
            part += NUMBER_WORDS.get(word, 0)
    return count + part


def _units(match: re.Match[str], prompt: str) -> float:
    first, second, unit = match.groups()
    number = _count(first) if second is None else (_count(first) + _count(second)) / 2
    return number * _TOKENS_PER.get(unit.lower().split()[0].rstrip("s"), 0.0)


def _list(match: re.Match[str], prompt: str) -> float:
    return 20.0 * _count(match.group(1))


def _same_length(match: re.Match[str], prompt: str) -> float:
    return max(len(prompt.encode("utf-8", "replace")) / 4, 1.0)


def _nothing(match: re.Match[str], prompt: str) -> float:
    return 0.0


_triggers = Triggers()


@dataclass(frozen=True, slots=True)
class Rule:
    """What makes a rule match, and the tokens that a match asks for.

    Attributes:
        pattern: of the prompt.
        tokens_of: (match, prompt) -> tokens, 0 for a rule without a count.
    """

    pattern: Pattern
    tokens_of: Callable[[re.Match[str], str], float] = _nothing


_NUMBERS = " ".join(("0", "hundred", "thousand", *NUMBER_WORDS))  # 0 stands for any digit
_LIST_VERBS = (
    "list give name suggest generate write provide create top best recommend brainstorm make tell show need want"
)
_CODE_STARTS = "``` write implement create generate give show make"
_REWRITES = "rewrite rephrase paraphrase proofread reword correct fix edit"
_TEXTS = "essay article blog story report chapter novel screenplay speech cover thesis business"

# in order of authority: the first rule that matches gives the suggestion
RULES: Mapping[str, Rule] = {
    "one_word": Rule(
        _triggers.pattern(_ONE_WORD, "word answer number letter name", "0 one single just only"),
    ),
    "yes_no": Rule(_triggers.pattern(_YES_NO, "yes true yesor trueor yesorno trueorfalse")),
    "units": Rule(
        _triggers.pattern(_UNITS, _NUMBERS, " ".join(f"{unit} {unit}s" for unit in _TOKENS_PER), starts=_NUMBERS),
        _units,
    ),
    "continue": Rule(_triggers.pattern(_CONTINUE, "continue go keep proceed more next finish")),
    "small_talk": Rule(_triggers.pattern(_THANKS)),
    "translate": Rule(_triggers.pattern(_TRANSLATE, "translate translation"), _same_length),
    "rewrite": Rule(_triggers.pattern(_REWRITE, _REWRITES, starts=_REWRITES), _same_length),
    "list": Rule(_triggers.pattern(_LIST, _LIST_VERBS, _NUMBERS, starts=_LIST_VERBS), _list),
    "code": Rule(
        _triggers.pattern(
            _CODE,
            _CODE_STARTS,
            "``` code function script program class query regex component html sql python javascript",
            starts=_CODE_STARTS,
        )
    ),
    "json": Rule(_triggers.pattern(_JSON, "json yaml xml csv")),
    "essay": Rule(_triggers.pattern(_ESSAY, _TEXTS, starts=_TEXTS)),
    "summarise": Rule(_triggers.pattern(_SUMMARISE, "summary summarise summarize tl tldr")),
    "polar_question": Rule(_triggers.pattern(_POLAR)),
}
RULE_NAMES = tuple(RULES)


@dataclass(frozen=True, slots=True)
class RuleHits:
    """The rules that a prompt matches.

    Attributes:
        names: matching rules in order of authority.
        tokens: tokens that the first rule with a count asks for, 0 if none has one.
        first: the rule that gives the suggestion, None if none matches.
        first_tokens: what `first` itself asks for in tokens, 0 if it has no count.
    """

    names: tuple[str, ...] = ()
    tokens: float = 0.0
    first: str | None = None
    first_tokens: float = 0.0


NO_HITS = RuleHits()


def match_rules(prompt: str | Words) -> RuleHits:
    """The rules that `prompt` (already cut to a window) matches. Five microseconds where it has none of their words."""
    words = Words(prompt) if isinstance(prompt, str) else prompt
    seen = _triggers.seen(words)
    names: list[str] = []
    counts: list[float] = []
    for name, rule in RULES.items():
        match = rule.pattern.search(seen)
        if match is not None:
            names.append(name)
            counts.append(min(rule.tokens_of(match, words.text), 100_000.0))
    if not names:
        return NO_HITS
    return RuleHits(tuple(names), next((count for count in counts if count > 0), 0.0), names[0], counts[0])


@dataclass(frozen=True, slots=True)
class RuleTable:
    """How answers follow each rule, learned from rows.

    Attributes:
        parameters: rule -> (mean, standard deviation) of log(response tokens / implied tokens), or of
            log(response tokens) for rules without a count.
    """

    parameters: Mapping[str, tuple[float, float]]

    @classmethod
    def fit(cls, hits: list[RuleHits], response_tokens: Array, *, min_rows: int = 20) -> RuleTable:
        """Learn from rows; a rule seen in fewer than `min_rows` of them gives no suggestion."""
        residuals: dict[str, list[float]] = {}
        for hit, tokens in zip(hits, response_tokens, strict=True):
            if hit.first is not None:
                implied = np.log(hit.first_tokens) if hit.first_tokens > 0 else 0.0
                residuals.setdefault(hit.first, []).append(float(np.log(tokens)) - implied)
        return cls(
            {
                name: (float(np.mean(values)), max(float(np.std(values)), 0.1))
                for name, values in sorted(residuals.items())
                if len(values) >= min_rows
            }
        )

    def votes(self, hits: list[RuleHits], boundaries: Array, prior: Array) -> Array:
        """Probability of each bucket by the rules alone, shape (B, K); `prior` where no rule speaks.

        Args:
            hits: one per row.
            boundaries: the K - 1 inner borders of the buckets, in tokens.
            prior: share of each bucket in the training rows, shape (K,).
        """
        votes = np.empty((len(hits), len(prior)))
        votes[:] = prior
        for row, hit in enumerate(hits):
            if hit.first is None or hit.first not in self.parameters:
                continue
            mean, deviation = self.parameters[hit.first]
            if hit.first_tokens > 0:
                mean += log(hit.first_tokens)
            below = [0.5 * (1 + erf((log(border) - mean) / (deviation * sqrt(2)))) for border in boundaries]
            votes[row] = [high - low for low, high in pairwise((0.0, *below, 1.0))]
        votes = np.maximum(votes, 1e-4)
        return np.asarray(votes / votes.sum(1, keepdims=True))
