"""Rows on their way: written to disk as they come, joined and split when the last one is in.

Holds per row only hashes and numbers (40 to 60 bytes), per conversation its id; texts are on disk. Knows the table's
columns and which rows to drop; does not know files, formats or tokenizers.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mope.request import MAX_EARLIER_ANSWERS
from mope.token_estimate import estimate_tokens
from mope.training.data import problems as reasons
from mope.training.data import splits
from mope.training.data.chats import Chat, Turn
from mope.training.data.config import DataConfig
from mope.training.data.problems import MAX_EXAMPLES, Problems
from mope.training.data.public_labels import OWN_TOKENS
from mope.training.data.table import NO_FLAGS, SCHEMA

BATCH_ROWS = 2048
BY_RULE = -1  # in place of a row's own split

_STAGED = pa.schema([field for field in SCHEMA if field.name not in ("group", "split")])


class Staging:
    """Collects rows; `finish` joins conversations, assigns splits and writes what is kept.

    Use it as a context manager around `add`; it closes the file of staged rows.

    Args:
        config: which rows to drop.
        problems: where dropped rows are counted.
        path: of the file of staged rows.
        counted_with: name of the tokenizer that counts answers.
        keep_evaluation_prompts: keep rows with a prompt of a public evaluation set.
    """

    def __init__(
        self,
        config: DataConfig,
        problems: Problems,
        path: Path,
        *,
        counted_with: str,
        keep_evaluation_prompts: bool = False,
    ) -> None:
        self.num_rows = 0
        self.num_chats = 0
        self.labels: Counter[str] = Counter()  # rows by where their length is from
        self._config = config
        self._problems = problems
        self._path = path
        self._counted_with = counted_with
        self._keep_evaluation_prompts = keep_evaluation_prompts
        self._writer = pa.ipc.new_file(str(path), _STAGED, options=pa.ipc.IpcWriteOptions(compression="lz4"))
        self._columns: dict[str, list[Any]] = {name: [] for name in _STAGED.names}
        self._group_of: dict[str, int] = {}
        self._seen: dict[int, int] = {}  # hash of a chat's id -> hash of its content
        self._row_groups = array("q")
        self._row_hashes = array("q")  # of prompt and answer; 0 where the answer's text is not known
        self._row_prompts = array("q")  # of first turns; both are empty without max_rows_per_prompt
        self._row_order = array("q")
        self._row_is_evaluation = bytearray()
        self._row_is_later = bytearray()
        self._row_splits = array("b")  # position in `splits.SPLITS`, `BY_RULE` where the split rule decides
        self._row_is_test_prompt = bytearray()
        self._key_groups = array("q")
        self._keys = array("q")

    def __enter__(self) -> Staging:
        """Ready to `add`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left and close the file."""
        self._flush()
        self._writer.close()

    def is_new(self, chat: Chat) -> bool:
        """Give the chat an id of its own; False for one that was there before, which is counted.

        Without an id the content's hash is taken. Two chats without ids and texts (lengths only) may be the same
        by chance: both are kept.
        """
        content = chat.content_hash()
        had_id = bool(chat.chat_id)
        if not had_id:
            chat.chat_id = f"{content:016x}"
        chat.group = chat.group or chat.chat_id
        wanted, copy = chat.chat_id, 1
        while (number := splits.key(chat.chat_id)) in self._seen:
            if self._seen[number] == content and (had_id or chat.answers):
                self._problems.add(reasons.REPEATED_ID, chat.location)
                return False
            copy += 1
            chat.chat_id = f"{wanted}~{copy}"
        self._seen[number] = content
        if copy > 1 and had_id:
            self._problems.add(reasons.SHARED_ID, chat.location)
        return True

    def add(self, chat: Chat, num_tokens: Mapping[str, int]) -> None:
        """Stage the rows of a chat; `num_tokens` has the label tokens of each of its answers."""
        tokens = [num_tokens[answer] for answer in chat.answers] or [*chat.answer_tokens]
        has_system = bool(chat.system.strip())
        estimates = [estimate_tokens(answer) for answer in chat.answers] or tokens
        group = self._group_of.setdefault(chat.group, len(self._group_of))
        num_rows_before = self.num_rows
        first_prompt = splits.norm(chat.first_prompt)
        if len(first_prompt) >= splits.MIN_PROMPT_CHARS and not chat.split:
            self._join(group, splits.key("prompt", first_prompt))
        for turn in chat.turns:
            if turn.response_tokens is None and turn.answer is None:
                self._problems.add(reasons.HIDDEN_THOUGHTS, chat.location)
                continue
            if not has_system and not turn.prompt.strip() and not turn.previous_prompt.strip():  # as `inputs.has_text`
                self._problems.add(reasons.NO_TEXT, chat.location)
                continue
            texts = turn.texts()
            length = turn.response_tokens
            if length is None:
                length = sum(num_tokens[text] for text in texts)
            if not self._is_usable(chat, length, "".join(texts) if turn.response_tokens is None else None):
                continue
            earlier = slice(max(0, turn.num_known - MAX_EARLIER_ANSWERS), turn.num_known)
            row_id = f"{chat.chat_id}/{turn.position}" + (f".{turn.choice}" if turn.choice else "")
            label_from = "counted" if turn.response_tokens is None else "recorded"
            row = {
                "row_id": row_id,
                "turn_index": turn.turn_index,
                "prompt": turn.prompt,
                "system": chat.system,
                "previous_prompt": turn.previous_prompt,
                "answer_estimates": estimates[earlier],
                "answer_tokens": tokens[earlier],
                "num_earlier_turns": turn.num_earlier_turns,
                "num_tool_results": turn.num_tool_results,
                "last_is_tool_result": turn.last_is_tool_result,
                "other_chars": max(
                    0, turn.context_chars - sum(map(len, (turn.prompt, chat.system, turn.previous_prompt)))
                ),
                "language": chat.language,
                "dataset": chat.dataset,
                "task": chat.task,
                **{name: chat.flags.get(name, default) for name, default in NO_FLAGS.items()},
                "response_tokens": length,
                "thought_tokens": self._thought_tokens(chat, turn, length, num_tokens),
                "label_from": label_from,
                "token_unit": self._counted_with if label_from == "counted" else turn.token_unit or OWN_TOKENS,
                "samples": turn.samples or None,
                "censored": turn.censored or self._is_capped(chat, length),
            }
            row["target_llm"] = row["target_llm"] or self._config.target_llm
            for name, values in self._columns.items():
                values.append(row[name])
            self._add_keys(chat, turn, group, length, row_id)
            self.num_rows += 1
            self.labels[label_from] += 1
            if label_from == "counted" and turn.calls:
                self._problems.add(reasons.COUNTED_CALLS, chat.location)
            if len(self._columns["row_id"]) == BATCH_ROWS:
                self._flush()
        self.num_chats += self.num_rows > num_rows_before

    def label_tokenizer(self) -> str:
        """What the lengths are counted in: a tokenizer, or `"recorded"` where the source gives all of them."""
        num_recorded, num_counted = self.labels["recorded"], self.labels["counted"]
        if num_recorded and num_counted:
            self._problems.warn(
                f"{num_recorded:,} lengths are as the source recorded them, {num_counted:,} "
                f"were counted with {self._counted_with}: the two may not be in the same tokens"
            )
        return self._counted_with if num_counted else "recorded"

    def finish(self, path: Path) -> dict[str, int]:
        """Write the kept rows of the train, validation and test splits to `path`, in the order they came.

        Returns:
            Rows kept in each split, the reserved ones, which are not written, counted too.
        """
        names = list(self._group_of)
        head_G, split_G = splits.assign(names, _numbers(self._key_groups), _numbers(self._keys))
        head_N, split_N = (per_group[_numbers(self._row_groups)] for per_group in (head_G, split_G))
        own_N = np.frombuffer(self._row_splits, np.int8)
        split_N = np.where(own_N == BY_RULE, split_N, own_N)
        is_learned_N = np.isin(split_N, [splits.SPLITS.index(name) for name in ("train", "validation")])
        drop = {
            reasons.LATER_TURN: np.frombuffer(self._row_is_later, np.bool_),
            reasons.DUPLICATE: _repeated(_numbers(self._row_hashes)),
            reasons.EVALUATION_PROMPT: np.frombuffer(self._row_is_evaluation, np.bool_),
            reasons.TEST_PROMPT: np.frombuffer(self._row_is_test_prompt, np.bool_) & is_learned_N,
        }
        keep_N = np.ones(self.num_rows, np.bool_)
        dropped: dict[str, npt.NDArray[np.bool_]] = {}
        for reason, mask_N in drop.items():
            dropped[reason] = mask_N & keep_N
            keep_N &= ~mask_N
        if limit := self._config.max_rows_per_prompt:
            many_N = _beyond(limit, _numbers(self._row_prompts), _numbers(self._row_order), keep_N)
            dropped[reasons.MANY_ANSWERS] = many_N
            keep_N &= ~many_N
        num_kept = np.bincount(split_N[keep_N], minlength=len(splits.SPLITS))
        write_N = keep_N & (split_N != splits.SPLITS.index("reserved"))

        group_names, split_names = pa.array(names, pa.string()), pa.array(splits.SPLITS, pa.string())
        at = 0
        with pa.ipc.open_file(str(self._path)) as staged, pa.ipc.new_file(str(path), SCHEMA) as writer:
            for number in range(staged.num_record_batches):
                batch = staged.get_batch(number)
                here = slice(at, at := at + batch.num_rows)
                for reason, mask_N in dropped.items():
                    self._count(reason, batch["row_id"], mask_N[here])
                chosen = np.flatnonzero(write_N[here])
                columns = {name: batch[name].take(pa.array(chosen)) for name in _STAGED.names}
                columns["group"] = group_names.take(pa.array(head_N[here][chosen]))
                columns["split"] = split_names.take(pa.array(split_N[here][chosen]))
                writer.write_batch(pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA))
        return dict(zip(splits.SPLITS, num_kept.tolist(), strict=True))

    def _is_usable(self, chat: Chat, length: int, answer: str | None) -> bool:
        if length == 0 or (answer is not None and not answer.strip()):
            reason = reasons.EMPTY_ANSWER
        elif length < self._config.min_response_tokens:
            reason = reasons.TOO_SHORT
        elif length > self._config.max_response_tokens:
            reason = reasons.TOO_LONG
        else:
            return True
        self._problems.add(reason, chat.location)
        return False

    def _is_capped(self, chat: Chat, length: int) -> bool:
        caps = [cap for cap in (self._config.response_cap, chat.flags.get("max_tokens")) if cap is not None]
        return bool(caps) and length >= min(caps)

    def _thought_tokens(self, chat: Chat, turn: Turn, length: int, num_tokens: Mapping[str, int]) -> int | None:
        """How many tokens of an answer are thoughts; None if the record does not tell."""
        if turn.thought_tokens is not None:
            return min(turn.thought_tokens, length)
        thoughts = turn.thoughts or turn.thoughts_inside()
        if not thoughts:
            return None
        if turn.response_tokens is not None:
            self._problems.add(reasons.COUNTED_THOUGHTS, chat.location)
        return min(num_tokens[thoughts], length)

    def _add_keys(self, chat: Chat, turn: Turn, group: int, length: int, row_id: str) -> None:
        """Hashes that join this row's conversation to others, and those that may drop the row."""
        prompt = splits.norm(turn.prompt)
        row_hash = 0
        answer = "\n".join(turn.texts())
        if answer:
            start = splits.norm_prefix(answer, splits.JOIN_ANSWER_CHARS)
            if length >= splits.MIN_ANSWER_TOKENS:
                self._join(group, splits.key("answer", prompt, start))
            llm = chat.flags.get("target_llm", "")
            row_hash = splits.key("row", llm, prompt, start[: splits.DUPLICATE_ANSWER_CHARS])
        self._row_groups.append(group)
        self._row_hashes.append(row_hash)
        if self._config.max_rows_per_prompt:
            is_first = turn.turn_index == 0
            self._row_prompts.append(splits.key("asked", chat.system, prompt or turn.prompt) if is_first else 0)
            self._row_order.append(splits.key("order", row_id))
        self._row_splits.append(splits.SPLITS.index(chat.split) if chat.split else BY_RULE)
        self._row_is_test_prompt.append(splits.is_test_prompt(prompt))
        self._row_is_evaluation.append(not self._keep_evaluation_prompts and splits.is_evaluation_prompt(prompt))
        self._row_is_later.append(self._config.turns == "first" and turn.turn_index > 0)

    def _join(self, group: int, key: int) -> None:
        self._key_groups.append(group)
        self._keys.append(key)

    def _count(self, reason: str, row_ids: pa.Array, mask: npt.NDArray[np.bool_]) -> None:
        positions = np.flatnonzero(mask)
        for position in positions[:MAX_EXAMPLES]:
            self._problems.add(reason, row_ids[int(position)].as_py())
        self._problems.counts[reason] += max(0, len(positions) - MAX_EXAMPLES)

    def _flush(self) -> None:
        if self._columns["row_id"]:
            self._writer.write_batch(pa.RecordBatch.from_pydict(self._columns, schema=_STAGED))
            for values in self._columns.values():
                values.clear()


def _numbers(values: array[int]) -> npt.NDArray[np.int64]:
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)


def _beyond(
    limit: int, prompts_N: npt.NDArray[np.int64], order_N: npt.NDArray[np.int64], eligible_N: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """True for eligible rows that have `limit` others of the same prompt before them in the order; 0 is no prompt.

    Cost O(N log N); which rows they are does not depend on the order in which the rows came.
    """
    rows = np.flatnonzero(eligible_N & (prompts_N != 0))
    rows = rows[np.lexsort((order_N[rows], prompts_N[rows]))]
    _, first, num_same = np.unique(prompts_N[rows], return_index=True, return_counts=True)
    rank = np.arange(len(rows)) - np.repeat(first, num_same)
    beyond_N = np.zeros(len(prompts_N), np.bool_)
    beyond_N[rows[rank >= limit]] = True
    return beyond_N


def _repeated(hashes_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """True where the same hash came before; 0 is no hash."""
    repeated_N = np.ones(len(hashes_N), np.bool_)
    repeated_N[np.unique(hashes_N, return_index=True)[1]] = False
    repeated_N[hashes_N == 0] = False
    return repeated_N
