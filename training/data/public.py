"""The sources `public-lengths`, `modern-lengths` and every public set by its name, from the cache or fetched once.

Turns the rows of each set's parquet file into chats of one answer, with the group or the split that keeps them apart.
Knows files, groups and splits; the sets are listed in `public_sets` and `modern_sets`, fetched by `public_fetch`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mope.errors import DataError
from mope.reader import read_flags
from mope.record_files import location
from mope.record_tables import open_parquet, read_table
from mope.request import MAX_EARLIER_ANSWERS
from mope.training.data import problems as reasons
from mope.training.data import splits
from mope.training.data.chats import Chat, Turn, text_or_none, tidy
from mope.training.data.formats import Normaliser
from mope.training.data.modern_sets import MODERN_SETS
from mope.training.data.problems import Problems
from mope.training.data.public_fetch import OPTIONAL, REQUIRED, fetch, path_of
from mope.training.data.public_labels import LABEL_TOKENIZER, label_of
from mope.training.data.public_sets import PUBLIC_SETS, PublicSet
from mope.training.data.sources import MODERN_LENGTHS, PUBLIC_LENGTHS, Files, Located
from mope.training.data.tokens import load_counter

CHARS_PER_TOKEN = 4  # of English in cl100k_base, about
_FLAGS = ("target_llm", "temperature", "max_tokens", "thinking", "tools")


def sets_of(source: str) -> tuple[PublicSet, ...]:
    """The public sets that a source is made of; empty for any other, and for a file or folder of such a name."""
    if Path(source).exists():
        return ()
    if source == PUBLIC_LENGTHS:
        return PUBLIC_SETS
    if source == MODERN_LENGTHS:
        return tuple(public for public in MODERN_SETS if public.is_fair)
    return tuple(public for public in (*PUBLIC_SETS, *MODERN_SETS) if public.name == source)


def is_modern(source: str) -> bool:
    """Whether a source is made of sets of LLMs of 2024 to 2026."""
    return any(public in MODERN_SETS for public in sets_of(source))


@dataclass(frozen=True)
class PublicLengths:
    """Public sets, each a parquet file in `folder`.

    Attributes:
        folder: where the files lie; what is missing is fetched into it by `identity`.
        cache_dir: where the tokenizer's vocabulary is kept.
        num_workers: threads that count tokens.
        sets: in the order of their rows.
    """

    folder: Path
    cache_dir: Path
    num_workers: int = 1
    sets: tuple[PublicSet, ...] = PUBLIC_SETS

    keeps_evaluation_prompts: ClassVar[bool] = True  # its rows are such prompts; the split of each keeps it apart

    @property
    def recorded_in(self) -> str | None:
        """The tokenizer of the lengths; None where all of them are in the LLMs' own tokens."""
        return LABEL_TOKENIZER if any(public.token_unit == LABEL_TOKENIZER for public in self.sets) else None

    def identity(self) -> str:
        """A hash of the sets' names and rows. Sets that are not there are fetched first.

        Raises:
            DataError: a set can't be fetched, or its file lacks columns.
        """
        counter = load_counter(LABEL_TOKENIZER, num_workers=self.num_workers, cache_dir=self.cache_dir)
        fetch(self.sets, self.folder, counter)
        for public in self.sets:
            _check_columns(path_of(public, self.folder))
        fetch(originals := self._originals(), self.folder, counter)
        paths = [path_of(public, self.folder) for public in (*self.sets, *originals)]
        return Files(tuple(dict.fromkeys(paths))).identity()

    def num_records(self) -> int | None:
        """Rows of all files."""
        return self._files().num_records()

    @property
    def reader(self) -> Normaliser | None:
        """Turns what `records` gives into chats of one answer."""
        return _chat

    def records(self, problems: Problems, *, moderation: bool = False) -> Iterator[Located]:
        """Every row of every set that has a place in a split, with its id, set, group and label."""
        for public in self.sets:
            path = path_of(public, self.folder)
            prompts = _prompts_by_turn(path) if public.has_history else {}
            originals = self._groups_of_originals(public)
            groups: dict[str, str] = {}
            number = 0
            for entry in read_table(path, None):
                row, place = entry.record or {}, location(path.name, entry.place)
                group = row.get("group") or originals.get(row["prompt_id"])
                group = group or (public.group_of_id and public.group_of_id(row["prompt_id"]))
                if not group and row["prompt"] not in groups:
                    groups[row["prompt"]] = group_of(public, row["prompt"])
                group = group or groups[row["prompt"]]
                split = _split(row, group) if public.has_own_split else ""
                if originals and row["prompt_id"] not in originals:
                    split = "reserved"  # nobody can say which split its original is in
                number += 1
                if split is None:
                    problems.add(reasons.LEFT_OUT, place)
                    continue
                yield place, {
                    **row, "id": f"{public.name}/{number - 1}", "dataset": public.name, "group": group, "split": split,
                    "task": row.get("dataset") or row.get("task"), "history": _history(row),
                    "previous_prompt": prompts.get(_turn_of(row, -1), ""),
                    "context_chars": _context_chars(row, prompts), "tells_thoughts": public.tells_thoughts,
                    "token_unit": public.token_unit,
                }  # fmt: skip
            if not number:
                problems.warn(
                    f"{path.name} has no rows: no file of the set was in the archive of {public.repository} at "
                    f"{public.commit[:12]}"
                )

    def _originals(self) -> list[PublicSet]:
        """Sets whose prompts decide the split of translations; not asked for where a file says the splits itself."""
        names = {
            public.original
            for public in self.sets
            if public.original and "split" not in _columns_of(path_of(public, self.folder))
        }
        return [public for public in PUBLIC_SETS if public.name in names]

    def _groups_of_originals(self, public: PublicSet) -> dict[str, str]:
        """The group of each prompt id, where another set's prompts decide it."""
        original = next((each for each in self._originals() if each.name == public.original), None)
        if original is None:
            return {}
        with open_parquet(path_of(original, self.folder)) as file:
            rows = file.read(["prompt_id", "prompt"]).to_pylist()
        return {row["prompt_id"]: group_of(original, row["prompt"]) for row in rows}

    def _files(self) -> Files:
        return Files(tuple(path_of(public, self.folder) for public in self.sets))


def group_of(public: PublicSet, prompt: str) -> str:
    """The group that decides a prompt's split: the sha1 of its question's first 400 normalised characters."""
    key = splits.norm(public.question(prompt))[: splits.PROMPT_KEY_CHARS]
    return hashlib.sha1(key.encode("utf-8", "replace")).hexdigest()


def _chat(row: Mapping[str, Any], place: str) -> Chat:
    """The chat of one row."""
    uncounted = Problems()
    history = row["history"]
    label = label_of(row, unit=row["token_unit"], tells_thoughts=row["tells_thoughts"])
    prompt = tidy(row["prompt"], place, uncounted)
    earlier = history[-MAX_EARLIER_ANSWERS:]
    after_tool = bool(row.get("tools")) and (row.get("task") or "").startswith("tool->")
    turn = Turn(
        position=0, prompt=prompt, previous_prompt=tidy(row["previous_prompt"], place, uncounted),
        turn_index=len(history), num_earlier_turns=len(history), num_known=len(earlier),
        num_tool_results=int(after_tool), last_is_tool_result=after_tool, context_chars=row["context_chars"],
        response_tokens=label.tokens, thought_tokens=label.thoughts, token_unit=label.unit,
        samples=tuple(row.get("output_sizes") or ()), censored=label.censored,
    )  # fmt: skip
    return Chat(
        chat_id=row["id"], group=row["group"], location=place, answers=[], answer_tokens=tuple(earlier), turns=[turn],
        first_prompt="" if history else prompt, language=text_or_none(row, "language"), dataset=row["dataset"],
        task=text_or_none(row, "task"), split=row["split"],
        flags=read_flags({name: row[name] for name in _FLAGS if row.get(name) is not None}),
    )  # fmt: skip


def _split(row: Mapping[str, Any], group: str) -> str | None:
    """The split that a row has by itself, or by the set's own test split; None if it has no place in any."""
    by_rule = row.get("split") or splits.SPLITS[splits.split_of(group)]
    if row.get("castillo_split") is None or by_rule == "reserved":
        return by_rule
    if row["castillo_split"] == "test":
        return "test"
    return None if by_rule == "test" else by_rule


def _history(row: Mapping[str, Any]) -> list[int]:
    """Lengths of the earlier answers of the conversation, oldest first."""
    history = row.get("history") or []
    return json.loads(history) if isinstance(history, str) else history


def _context_chars(row: Mapping[str, Any], prompts: Mapping[tuple[str, str, int], str]) -> int:
    """About how many characters all messages before an answer have; those of earlier answers are not recorded."""
    history = _history(row)
    earlier = sum(len(prompts.get(_turn_of(row, -step), "")) for step in range(1, len(history) + 1))
    return len(row["prompt"]) + earlier + CHARS_PER_TOKEN * sum(history)


def _turn_of(row: Mapping[str, Any], step: int) -> tuple[str, str, int]:
    """Which turn of a conversation a row is, or one some steps from it: chat, LLM, number."""
    return row["prompt_id"].rpartition(":")[0], row["target_llm"], len(_history(row)) + step


def _prompts_by_turn(path: Path) -> dict[tuple[str, str, int], str]:
    """The prompts of the turns of all conversations in a file."""
    with open_parquet(path) as file:
        rows = file.read(["prompt_id", "target_llm", "prompt", "history"]).to_pylist()
    return {_turn_of(row, 0): row["prompt"] for row in rows}


def _columns_of(path: Path) -> set[str]:
    with open_parquet(path) as file:
        return set(file.schema_arrow.names)


def _check_columns(path: Path) -> None:
    names = _columns_of(path)
    if "output_sizes" in names:  # several samples to a row: none was cut off
        names.add("censored")
    lacking = [name for name in REQUIRED if name not in names]
    if lacking:
        raise DataError(
            f"{path} lacks the columns {', '.join(lacking)}; expected {', '.join(REQUIRED)} and, where known, "
            f"{', '.join(OPTIONAL)}: mend the file, or delete it to have the set fetched"
        )
