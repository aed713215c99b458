"""The field map: where a user's records hold what other logs have under known names.

It turns each record into one with known names, before any format is looked for. What a path leads to is read like the
same value of any log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from mope.config import Frozen
from mope.errors import ConfigError, DataError
from mope.flags import flag_name
from mope.log_answers import CALLS, FINISH, RESPONSES, THOUGHTS, TOKEN_LISTS, USAGE, LoggedAnswer
from mope.log_records import CONVERSATIONS, GROUP_COLUMNS, ID_COLUMNS, MORE, PROMPTS, Logged, canonical, logged, named
from mope.reader import TEXTS, parsed
from mope.record_files import Findings

PlaceT = TypeVar("PlaceT")
RecordT = TypeVar("RecordT", Mapping[str, Any], "Mapping[str, Any] | None")

# field of a config -> its help text; the paths go from a record to a value
FIELD_MAP = {
    "prompt_field": "where a record holds the prompt: a path such as request.question or turns.0.text, through lists "
    "and JSON text; for records that no known format fits",
    "messages_field": "path to the messages, in place of --prompt-field",
    "response_field": "path to the answer: its text, a message or a response",
    "length_field": "path to the tokens of the answer, for example usage.output_tokens",
    "thought_length_field": "path to the tokens of thoughts, which are part of --length-field",
    "llm_field": "path to the name of the LLM that answered",
    "finish_field": "path to why the answer ended (length: it was cut off)",
    "group_field": "path to the conversation or user whose records stay in one split",
    "id_field": "path to the id of a record",
    "language_field": "path to the language of a record, for --languages",
}

SEARCH_RECORDS = 1000  # among which each path has to be found
MAX_DEPTH = 8  # of paths that are proposed
MAX_PATHS = 5000
# field of the config -> the name that its value gets in a record
NAMES = {
    "prompt_field": "prompt",
    "messages_field": "messages",
    "response_field": "response",
    "length_field": "response_tokens",
    "thought_length_field": "reasoning_tokens",
    "llm_field": "target_llm",
    "finish_field": "finish_reason",
    "group_field": "conversation_id",
    "id_field": "id",
    "language_field": "language",
}
_TEXT = frozenset((*TEXTS, *CONVERSATIONS, *PROMPTS, *MORE, "contents"))
_LENGTHS = frozenset(path.partition(".")[0] for count in USAGE for path in (count.tokens, *count.thoughts))
# field -> names that would speak of the same thing
_INSTEAD = {
    "prompt_field": _TEXT,
    "messages_field": _TEXT,
    "response_field": frozenset((*RESPONSES, *THOUGHTS, *CALLS)),
    "length_field": _LENGTHS.union(TOKEN_LISTS),
    "finish_field": frozenset(path.partition(".")[0] for path in FINISH),
}
_ALL_OF_THEM = frozenset(FIELD_MAP) - {"thought_length_field", "finish_field", "language_field"}  # records have these
_FLAT = frozenset({"flat", "conversation", "trl", "openai batch", "anthropic batch"})
_KEPT = (*ID_COLUMNS, *GROUP_COLUMNS, "language", "dataset", "redacted", "censored", "openai_moderation")
_GROUPS = ("sessionId", "traceId", "trace_id")


class RequestFields(Frozen):
    """Where records that no known format fits hold a request: dotted paths."""

    prompt_field: str | None = Field(None, description=FIELD_MAP["prompt_field"])
    messages_field: str | None = Field(None, description=FIELD_MAP["messages_field"])
    llm_field: str | None = Field(None, description="path to the name of the LLM that will answer")
    id_field: str | None = Field(None, description=FIELD_MAP["id_field"])


@dataclass(frozen=True)
class FieldMap:
    """Paths into records.

    A path is `usage.output_tokens`, or with positions in lists `choices.0.message.content` (-1 is the last). JSON text
    on the way is read. A name that has dots in it is found, too.

    Attributes:
        paths: field of the config and its path, in the order of the config.
    """

    paths: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, config: BaseModel) -> FieldMap:
        """The field map of a config that has fields of `FIELD_MAP`.

        Raises:
            ConfigError: fields that contradict each other, or a path that is none.
        """
        given = {name: path for name in FIELD_MAP if (path := getattr(config, name, None)) is not None}
        for name, path in given.items():
            if not all(path.split(".")):
                raise ConfigError(
                    f"{flag_name(name)} {path!r}: a path is names and positions with dots between, such as "
                    "choices.0.message.content"
                )
        for one, other in (("prompt_field", "messages_field"),):
            if one in given and other in given:
                raise ConfigError(
                    f"{flag_name(one)} and {flag_name(other)} both say where the prompt stands; give one of them"
                )
        if "thought_length_field" in given and "length_field" not in given:
            raise ConfigError("--thought-length-field says how many tokens of --length-field are thoughts; give both")
        first: dict[str, str] = {}
        for name, path in given.items():
            if path in first:
                raise ConfigError(f"{flag_name(first[path])} and {flag_name(name)} are both {path}; give each its own")
            first[path] = name
        return cls(tuple(given.items()))

    def needs(self, column: str) -> bool:
        """Whether a column of a table begins one of the paths."""
        return any(path == column or path.startswith(f"{column}.") for _, path in self.paths)

    def apply(
        self, records: Iterable[tuple[PlaceT, RecordT]], findings: Findings, source: str
    ) -> Iterator[tuple[PlaceT, RecordT]]:
        """Records under known names, each with its place; what could not be read (None) stays as it is.

        Args:
            records: as they are in the files.
            findings: is told about paths that the first records don't have.
            source: what to call the data in messages.

        Raises:
            DataError: a path that no record has.
        """
        records = iter(records)
        if not self.paths:
            yield from records
            return
        head: list[tuple[PlaceT, RecordT]] = []
        missing = dict(self.paths)
        while missing and len(head) < SEARCH_RECORDS and (located := next(records, None)) is not None:
            head.append(located)
            missing = {name: path for name, path in missing.items() if next(found(located[1], path), None) is None}
        readable = [record for _, record in head if record is not None]
        if readable and missing:
            self._tell(missing, readable, len(head) < SEARCH_RECORDS, findings, source)
        for place, record in chain(head, records):
            yield place, record if record is None else self.mapped(record)

    def _tell(
        self, missing: Mapping[str, str], head: list[Mapping[str, Any]], whole: bool, findings: Findings, source: str
    ) -> None:
        known = sorted(set(chain.from_iterable(map(paths_of, head[:50]))))
        top = sorted({str(name) for record in head[:50] for name in record})
        for name, path in missing.items():
            among = "no record" if whole else f"none of the first {SEARCH_RECORDS:,} records"
            said = f"{flag_name(name)} {path}: {among} of {source} has a value there; {nearest_paths(path, known, top)}"
            if whole or name in _ALL_OF_THEM:
                raise DataError(said)
            findings.warn(said)

    @property
    def columns(self) -> dict[str, str]:
        """Known name -> the path that leads to its value."""
        return {NAMES[name]: path for name, path in self.paths}

    def mapped(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """One record under known names."""
        values = {name: next(found(record, path), None) for name, path in self.paths}
        known = {name: value for name, value in values.items() if value is not None}
        return rewritten(record, known, set(values), {path for _, path in self.paths})


NO_FIELDS = FieldMap()


def found(record: Any, path: str) -> Iterator[Any]:
    """Every value that a path can lead to in a record: names with dots in them are tried after those without."""
    return _found(record, path.split("."))


def _found(value: Any, steps: list[str]) -> Iterator[Any]:
    if not steps:
        if value is not None:
            yield value
        return
    value = parsed(value)
    if isinstance(value, Mapping):
        for length in range(1, len(steps) + 1):
            name = ".".join(steps[:length])
            if name in value:
                yield from _found(value[name], steps[length:])
    elif isinstance(value, list | tuple):
        step = steps[0].removeprefix("-")
        if step.isascii() and step.isdigit() and len(step) < 10:
            position = int(steps[0])
            if -len(value) <= position < len(value):
                yield from _found(value[position], steps[1:])


def paths_of(record: Any) -> list[str]:
    """Paths to what a record holds, of lists the first item's alone; `MAX_PATHS` at most."""
    paths: list[str] = []
    _gather(record, "", paths, MAX_DEPTH)
    return paths


def _gather(value: Any, path: str, paths: list[str], depth: int) -> None:
    if len(paths) >= MAX_PATHS or value is None:
        return
    if path:
        paths.append(path)
    value = parsed(value)
    if depth == 0:
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if isinstance(name, str):
                _gather(inner, f"{path}.{name}" if path else name, paths, depth - 1)
    elif isinstance(value, list | tuple) and value:
        _gather(value[0], f"{path}.0", paths, depth - 1)


def nearest_paths(path: str, known: list[str], top: list[str]) -> str:
    """A hint at known paths that are like another, or at the names on top."""
    near = get_close_matches(path, known, n=3, cutoff=0.6)
    last = path.rpartition(".")[2]
    near += [other for other in known if other.rpartition(".")[2] == last and other not in near]
    if near:
        return f"did you mean {' or '.join(near[:3])}?"
    return f"on top there are {', '.join(top[:20])}{', ...' if len(top) > 20 else ''}"


def rewritten(
    record: Mapping[str, Any], values: Mapping[str, Any], mapped: set[str], paths: Iterable[str] = ()
) -> dict[str, Any]:
    """A record with values under known names, in place of what else would speak of the same.

    Args:
        record: as it was logged, in any form.
        values: field of the config and what its path led to.
        mapped: fields that have a path, also those whose path leads nowhere in this record.
        paths: of these fields. A column that is one of them says nothing else, whatever its name means to us.
    """
    record = named(record)
    call = logged(record)
    if call is None or call.family in _FLAT:
        columns = set(map(canonical, paths))
        base = {name: value for name, value in record.items() if name not in columns}
    else:
        base = opened(record, call)
    dropped = frozenset().union(*(_INSTEAD.get(name, ()) for name in mapped), (NAMES[name] for name in mapped))
    kept = {name: value for name, value in base.items() if name not in dropped}
    return {**kept, **{NAMES[name]: value for name, value in values.items()}}


def opened(record: Mapping[str, Any], call: Logged) -> dict[str, Any]:
    """A logged call in the form of OpenAI's API, request and response beside each other."""
    flat: dict[str, Any] = {name: record[name] for name in _KEPT if record.get(name) is not None}
    group = next((record[name] for name in _GROUPS if record.get(name)), None)
    if group is not None:
        flat.setdefault("conversation_id", group)
    flat |= {"id": record["custom_id"]} if record.get("custom_id") and "id" not in flat else {}
    flat |= call.request
    if call.answers:
        flat["choices"] = [_choice(answer) for answer in call.answers]
    if call.usage.tokens is not None:
        details = {} if call.usage.thoughts is None else {"reasoning_tokens": call.usage.thoughts}
        flat["usage"] = {"completion_tokens": call.usage.tokens, "completion_tokens_details": details}
    elif call.usage.unreadable:
        flat["usage"] = {"completion_tokens": call.usage.unreadable}
    if call.finish:
        flat["finish_reason"] = call.finish
    if call.failed:
        flat["error"] = "failed"
    return flat


def _choice(answer: LoggedAnswer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.thoughts:
        message["reasoning_content"] = answer.thoughts
    elif answer.hidden:
        message["reasoning_details"] = [{"type": "reasoning.encrypted"}]
    if answer.calls:
        message["tool_calls"] = [json.loads(line) for line in answer.calls.split("\n")]
    choice: dict[str, Any] = {"message": message}
    if answer.finish:
        choice["finish_reason"] = answer.finish
    if answer.usage.tokens is not None:
        choice["usage"] = {"completion_tokens": answer.usage.tokens}
    return choice
