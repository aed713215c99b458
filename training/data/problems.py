"""What was wrong with the data: counted by reason, with examples, and what is reported in the end.

Knows reasons and how to print them; does not know files or formats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mope.record_files import NOT_UTF8 as NOT_UTF8
from mope.record_files import NUL_REMOVED as NUL_REMOVED
from mope.record_files import UNREADABLE as UNREADABLE

MAX_EXAMPLES = 3
_MAPPINGS = ("num_rows", "counts", "families", "labels")  # of a report

# reasons: what is written on the terminal and in the report
WRONG_COLUMNS = "record without the format's columns, skipped"
NO_MESSAGES = "conversation without messages, skipped"
NO_ANSWER = "conversation without an answer to a prompt, skipped"
BAD_LENGTH = "length that is not a whole number, skipped"
FORCED = "length that the request forced (ignore_eos, min_tokens), skipped"
REDACTED = "redacted conversation, dropped as asked"
FLAGGED = "conversation flagged by moderation, dropped as asked"
OTHER_LANGUAGE = "conversation in another language, dropped as asked"
REPEATED_ID = "conversation with an id and content seen before, dropped"
SHARED_ID = "record with an id seen before and other content, kept under a new id in the same split"
BROKEN_TEXT = "text with lone surrogates, kept with U+FFFD in their place"
EMPTY_ANSWER = "row with an empty answer, dropped"
TOO_SHORT = "row with fewer than min_response_tokens, dropped"
TOO_LONG = "row with more than max_response_tokens, dropped"
DUPLICATE = "row with prompt and answer seen before, dropped"
EVALUATION_PROMPT = "row with a prompt of a public evaluation set, dropped"
TEST_PROMPT = "training or validation row with a prompt of a test row of CASTILLO or ShareGPT, dropped"
LEFT_OUT = "row of a set with its own test split that the split rule calls a test row, dropped"
MANY_ANSWERS = "row beyond max_rows_per_prompt answers to its prompt, dropped as asked"
LATER_TURN = "row of a later turn, dropped as asked"
NO_TEXT = "row without any text of a prompt, dropped"
HIDDEN_THOUGHTS = "answer with hidden thoughts and no recorded usage, dropped"
LOST_ANSWER = "answer that the logger cut or redacted, without recorded usage, dropped"
STRAY_ANSWER = "answer that follows neither a prompt nor a tool's result, no row"
OTHER_SPEAKER = "message of an unknown role, passed over"
FAILED = "failed request, skipped"
NO_CALL = "record that is no LLM call (agent, tool, other path), skipped"
NO_RESPONSE = "request without an answer or usage, skipped"
MANY_PROMPTS = "request with several prompts and one usage, skipped"
SUM_OF_CHOICES = "answer of several to one request, of which only the sum is recorded, dropped"
PYTHON_REPR = "record with a cell in Python's notation (write cells with json.dumps), skipped"
UNJOINED = "batch request without its output, skipped"
AMBIGUOUS = "batch output whose custom_id belongs to several requests, skipped"
# labels that are not what a server recorded: the rows are kept
COUNTED = "answer of a log without recorded usage, counted from its text"
COUNTED_CHOICE = "answer of several to one request, counted from its text"
COUNTED_CALLS = "tool call without recorded usage, counted from its name and arguments"
COUNTED_THOUGHTS = "thoughts without a recorded count, counted from their text"
BAD_LENGTH_COUNTED = "recorded length that is not a whole number, answer counted from its text"
JOINED = "batch request joined with its output by custom_id"
# reasons that drop neither a record nor an answer
NOTES = frozenset(
    {SHARED_ID, NOT_UTF8, NUL_REMOVED, BROKEN_TEXT, COUNTED, COUNTED_CHOICE, COUNTED_CALLS, COUNTED_THOUGHTS}
    | {BAD_LENGTH_COUNTED, JOINED, OTHER_SPEAKER}
)


def no_prompt(why: str) -> str:
    """The reason of a record without a prompt."""
    return f"record without its prompt ({why}), skipped"


class Problems:
    """Counts by reason, with up to three places each, and warnings in words."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.warnings: list[str] = []

    def add(self, reason: str, location: str) -> None:
        """Count one case of `reason`, seen at `location` (`"file:line"`)."""
        self.counts[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < MAX_EXAMPLES:
            places.append(location)

    def warn(self, message: str) -> None:
        """Keep a warning for the report, once."""
        if message not in self.warnings:
            self.warnings.append(message)


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was read, what was kept and why the rest was not.

    Attributes:
        source: the source as it was asked for.
        data_format: the format the records were read as.
        label_tokenizer: what counted the response tokens.
        num_records: records read.
        num_chats: conversations among them that gave at least one row.
        num_rows: rows kept in each split; `"reserved"` ones are counted, never returned.
        counts: reason -> cases.
        examples: reason -> up to three places.
        warnings: what a user should know before trusting the rows.
        families: forms of logs among the records (see `mope.log_records`), with their numbers.
        labels: where the labels of staged rows are from, with their numbers; see the column `label_from`.
        from_cache: whether the rows come from an earlier run.
    """

    source: str
    data_format: str
    label_tokenizer: str
    num_records: int
    num_chats: int
    num_rows: Mapping[str, int]
    counts: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]
    families: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    from_cache: bool = False

    def __post_init__(self) -> None:
        """Freeze the mappings."""
        examples = {reason: tuple(places) for reason, places in self.examples.items()}
        for name in _MAPPINGS:
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "examples", MappingProxyType(examples))
        object.__setattr__(self, "warnings", tuple(self.warnings))

    def lines(self) -> list[str]:
        """The report for a terminal, one finding per line."""
        kept = ", ".join(f"{name} {count:,}" for name, count in self.num_rows.items())
        forms = ", ".join(f"{name} {count:,}" for name, count in self.families.items())
        lines = [
            f"{self.source}: {self.num_records:,} records read as {self.data_format}{f' ({forms})' if forms else ''}, "
            f"{self.num_chats:,} conversations, lengths in {self.label_tokenizer} tokens"
            + (" (from the cache)" if self.from_cache else ""),
            f"rows: {kept}",
        ]
        if self.labels:
            lines.append("labels: " + ", ".join(f"{name} {count:,}" for name, count in self.labels.items()))
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"{count:,} x {reason} ({', '.join(self.examples[reason])})")
        return lines + [f"warning: {warning}" for warning in self.warnings]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON types."""
        mappings = {name: dict(getattr(self, name)) for name in _MAPPINGS}
        examples = {reason: list(places) for reason, places in self.examples.items()}
        plain = {
            name: getattr(self, name)
            for name in ("source", "data_format", "label_tokenizer", "num_records", "num_chats", "from_cache")
        }
        return {**plain, **mappings, "examples": examples, "warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DataReport:
        """The inverse of `to_json`."""
        return cls(**fields)
