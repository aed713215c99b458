"""Which reader turns the records of a source into chats: the table of formats, and how the format is found.

What the readers do is in `conversations` and `exchanges`. A record that cannot be used raises `Unusable` with the
reason under which it is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from mope.engine_logs import refusal
from mope.errors import DataError
from mope.log_answers import ASSISTANT
from mope.log_losses import lost
from mope.log_records import GROUP_COLUMNS, ID_COLUMNS, NAMES, PROMPTS, PYTHON_REPR, logged, python_repr
from mope.reader import is_forced, parsed, true_or_false
from mope.request import role_of
from mope.token_estimate import estimate_tokens
from mope.training.data import conversations
from mope.training.data import problems as reasons
from mope.training.data.chats import Chat, Record, Turn, Unusable, tidy
from mope.training.data.exchanges import exchange, has_prompt_column
from mope.training.data.problems import Problems

__all__ = ["COLUMNS", "KNOWN_FORMATS", "MODERATION_COLUMN", "Chat", "Turn", "Unusable", "detect_format", "normaliser"]
__all__ += ["tidy", "unknown_format"]

PROMPT_COLUMNS = PROMPTS
ANSWER_COLUMNS = ("response", "output", "answer", "completion", "reply")
LENGTH_COLUMNS = ("response_tokens", "output_tokens", "completion_tokens")

# what a reader of columns may load; everything else is left on disk
COLUMNS = NAMES.union(ANSWER_COLUMNS, LENGTH_COLUMNS, ID_COLUMNS, GROUP_COLUMNS)
MODERATION_COLUMN = "openai_moderation"

Normaliser = Callable[[Record, str], Chat]


class Format(NamedTuple):
    """A form of records.

    Attributes:
        columns: what its records hold, for people.
        fits: whether a record looks like it: detection counts rows of such records alone.
        parts: what a record has to have: what it is called, the names it may stand under, the flag that names it.
    """

    columns: str
    fits: Callable[[Record], bool]
    parts: tuple[tuple[str, tuple[str, ...], str], ...]


def _has_list(column: str) -> Callable[[Record], bool]:
    return lambda record: isinstance(parsed(record.get(column)), list) and record.get("request") is None


def _ends_with_answer(record: Record) -> bool:
    """Whether a record is a conversation that ends with its answer, and not a request with a response beside it."""
    given, num_asked = conversations.listed(record, "messages")
    if not isinstance(given, Sequence) or not given or record.get("request") is not None:
        return False
    found = logged(record) if not num_asked else None
    if found is not None and found.family not in ("conversation", "flat"):
        return False
    last = given[-1]
    if not (isinstance(last, Mapping) and role_of(last) in ASSISTANT):
        return found is not None and not found.answers and found.usage.tokens is None and any(
            isinstance(one, Mapping) and role_of(one) in ASSISTANT for one in given
        )  # fmt: skip
    return not any(record.get(name) not in (None, "") for name in ("choices", "response", "candidates"))


def _is_log(record: Record) -> bool:
    found = logged(record)
    if found is None or _is_plain(record):
        return False
    known = bool(found.answers) or found.usage.tokens is not None or bool(found.usage.unreadable)
    return bool(found.lacking) or not found.is_call or (known and found.family != "conversation")


def _is_plain(record: Record) -> bool:
    """Whether a record is a prompt in one column and an answer or its length in another."""
    if not has_prompt_column(record) or any(
        parsed(record.get(name)) not in (None, "") for name in ("usage", "choices", "messages", "conversations")
    ):
        return False
    found = logged(record)
    return found is not None and found.family == "flat" and (bool(found.answers) or found.usage.tokens is not None)


def _has_length(record: Record) -> bool:
    return _is_plain(record) and any(record.get(name) is not None for name in LENGTH_COLUMNS)


_OWN_NAMES = (
    "if the columns have names of your own, type --prompt-field COLUMN with --length-field or --response-field COLUMN"
)
_CONVERSATION = ("conversation", "conversations", "messages")
_PROMPT = ("a prompt", (*PROMPT_COLUMNS, *_CONVERSATION), "--prompt-field")
_MESSAGES = ("messages", ("messages",), "--messages-field")
_ANSWER = ("an answer", ANSWER_COLUMNS, "--response-field")
_LENGTH = ("a length", LENGTH_COLUMNS, "--length-field")
_EITHER = (
    "an answer or its length",
    (*ANSWER_COLUMNS, *LENGTH_COLUMNS),
    "--response-field or --length-field",
)

# from the most to the least specific: of formats that yield as many rows, the first is taken
FORMATS: dict[str, Format] = {
    "lmsys": Format(
        "conversation [{role, content}]",
        _has_list("conversation"),
        (("a conversation", ("conversation",), "--messages-field"),),
    ),
    "sharegpt": Format(
        "conversations [{from, value}]",
        _has_list("conversations"),
        (("conversations", ("conversations",), "--messages-field"),),
    ),
    "messages": Format("messages [{role, content}] that end with an answer", _ends_with_answer, (_MESSAGES,)),
    "lengths": Format(
        "prompt and response_tokens (or output_tokens, completion_tokens)", _has_length, (_PROMPT, _LENGTH)
    ),
    "pairs": Format(
        "prompt and response (or instruction, question, query, input and output, answer, completion, reply)",
        _is_plain,
        (_PROMPT, _ANSWER),
    ),
    "logs": Format(
        "prompt or messages with usage, tokens or a response, flat or under request and response, or as LiteLLM, "
        "Langfuse, Helicone, OpenTelemetry, batches, vLLM and SGLang write them",
        _is_log,
        (_MESSAGES, _LENGTH),
    ),
}
_LISTS = {"lmsys": "conversation", "sharegpt": "conversations", "messages": "messages"}
KNOWN_FORMATS = {name: form.columns for name, form in FORMATS.items()}


def detect_format(records: Iterable[Record]) -> str | None:
    """The format that yields most rows of some records; None if none fits any of them.

    Every reader is tried on every record that looks like its own. Of equals the more specific one is taken; if no
    reader yields a row, the one that most records look like.
    """
    rows: Counter[str] = Counter()
    fitting: Counter[str] = Counter()
    for record in records:
        for name, form in FORMATS.items():
            if not form.fits(record):
                continue
            fitting[name] += 1
            try:
                chat = normaliser(name, Problems(), drop_redacted=False, drop_flagged=False)(record, "")
            except Unusable:
                continue
            rows[name] += len(chat.turns)
    order = list(FORMATS)
    for counts in (rows, fitting):
        if counts:
            return max(counts, key=lambda name: (counts[name], -order.index(name)))
    return None


def unknown_format(
    source: str, records: Sequence[Record], asked: str, mapped: Mapping[str, str] | None = None
) -> DataError:
    """The error that names the columns found, the nearest format and what it misses.

    Args:
        source: where the records are from.
        records: the first of them.
        asked: the format asked for, or auto.
        mapped: names that come from a field map, and the paths that lead to them.
    """
    if any(python_repr(record) for record in records):
        return DataError(f"{source}: {PYTHON_REPR}")
    if said := refusal(value for record in records for value in record.values() if isinstance(value, str)):
        return DataError(f"{source}: {said}")
    columns = sorted({str(name) for record in records for name in record})
    there = sorted({(mapped or {}).get(name, name) for name in columns})
    found = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
    misfit = "fit no known format" if asked == "auto" else f"do not hold what the format {asked!r} needs"
    begin = f"{source}: columns {found or '(none)'} {misfit}"
    other = detect_format(records) if asked != "auto" else None
    if other is not None and other != asked:
        return DataError(f"{begin}; they look like {other}: type --data-format {other}")
    known = "; ".join(f"{name}: {columns}" for name, columns in KNOWN_FORMATS.items())
    near = _nearest(set(columns), asked)
    return DataError(f"{begin}; {near}" if near else f"{begin}; {_OWN_NAMES}; expected one of {known}")


def _nearest(columns: set[str], asked: str) -> str:
    """What the nearest format misses and what to type; empty if no format is near."""
    name, parts = asked, FORMATS[asked].parts if asked in FORMATS else ()
    if asked == "auto":
        name, parts = "pairs", (_PROMPT, _EITHER)
        if not any(columns.intersection(names) for _, names, _ in parts):
            return ""
    misses = [
        f"{what} ({', '.join(names)}; if another column holds it, type {flag} COLUMN)"
        for what, names, flag in parts
        if not columns.intersection(names)
    ]
    return f"the nearest format is {name} (--data-format {name}), which misses {' and '.join(misses)}" if misses else ""


def normaliser(data_format: str, problems: Problems, *, drop_redacted: bool, drop_flagged: bool) -> Normaliser:
    """The function that turns a record of `data_format` into a `Chat` or raises `Unusable`.

    It may keep state (ShareGPT cuts conversations into pieces that follow each other), so records must come in
    the order of the file, and each source needs its own.
    """
    normalisers: dict[str, Normaliser] = {
        "lmsys": lambda record, location: conversations.messages(record, "conversation", location, problems),
        "sharegpt": conversations.ShareGPT(problems),
        "messages": lambda record, location: conversations.messages(record, "messages", location, problems),
        "pairs": lambda record, location: _plain(record, location, problems, ANSWER_COLUMNS),
        "lengths": lambda record, location: _plain(record, location, problems, LENGTH_COLUMNS),
        "logs": lambda record, location: exchange(record, location, problems),
    }
    read = normalisers[data_format]

    def checked(record: Record, location: str) -> Chat:
        if drop_redacted and true_or_false(record.get("redacted")):
            raise Unusable(reasons.REDACTED)
        if drop_flagged and _is_flagged(record.get(MODERATION_COLUMN)):
            raise Unusable(reasons.FLAGGED)
        if python_repr(record):
            raise Unusable(reasons.PYTHON_REPR)
        if data_format in _LISTS and (why := lost(parsed(record.get(_LISTS[data_format])))):
            raise Unusable(reasons.no_prompt(why))
        chat = read(record, location)
        if is_forced(record, 0) and is_forced(record, _measured(chat)):  # few need their length looked at
            raise Unusable(reasons.FORCED)
        return chat

    return checked


def _plain(record: Record, location: str, problems: Problems, columns: Sequence[str]) -> Chat:
    """A prompt with its answer or its length; other fields of a log are read, too."""
    if not any(record.get(name) is not None for name in columns):
        found = logged(record)
        if found is None or not found.lacking:
            raise Unusable(reasons.WRONG_COLUMNS)
    chat = exchange(record, location, problems)
    if len(chat.turns) == 1 and chat.turns[0].answer is not None:
        chat.answers = [*chat.answers, chat.turns[0].answer]  # known, too: it finds re-shared answers
    return chat


def _measured(chat: Chat) -> float:
    """Tokens of the last answer, which the record's flags are about; estimated where only its text is known."""
    turn = chat.turns[-1]
    if turn.response_tokens is not None:
        return turn.response_tokens
    return sum(map(estimate_tokens, turn.texts()))


def _is_flagged(moderation: object) -> bool:
    moderation = parsed(moderation)
    if not isinstance(moderation, Sequence) or isinstance(moderation, str):
        return False
    return any(isinstance(verdict, Mapping) and bool(true_or_false(verdict.get("flagged"))) for verdict in moderation)
