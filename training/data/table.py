"""The table that training reads: one row per answer, columns in Arrow, text decoded only where it is asked for.

Knows the columns and their types; does not know files, formats, tokenizers or how splits are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mope.reader import FIELDS
from mope.request import Request

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),  # conversations that must stay in one split
        pa.field("split", pa.string(), nullable=False),  # train, validation, test (reserved rows never get here)
        pa.field("turn_index", pa.int32(), nullable=False),  # 0: the first answer of a conversation
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("system", pa.string(), nullable=False),
        pa.field("previous_prompt", pa.string(), nullable=False),
        pa.field(
            "answer_estimates", pa.list_(pa.int32()), nullable=False
        ),  # of earlier answers, oldest first: mope.token_estimate
        pa.field("answer_tokens", pa.list_(pa.int32()), nullable=False),  # the same answers, label tokens
        pa.field("num_earlier_turns", pa.int32(), nullable=False),
        pa.field("target_llm", pa.string()),
        pa.field("language", pa.string()),  # ISO 639-1 or the data set's own word, null if unknown
        pa.field("dataset", pa.string()),  # the set a row belongs to, where a source is made of several
        pa.field("task", pa.string()),  # part of that set: for weights and reports, it may tell of the answer
        pa.field("max_tokens", pa.int32()),
        pa.field("temperature", pa.float64()),
        pa.field("tools", pa.bool_(), nullable=False),
        pa.field("num_tools", pa.int32(), nullable=False),
        pa.field("tool_chars", pa.int32(), nullable=False),
        pa.field("tool_choice", pa.string(), nullable=False),
        pa.field("num_tool_results", pa.int32(), nullable=False),
        pa.field("last_is_tool_result", pa.bool_(), nullable=False),
        pa.field("other_chars", pa.int64(), nullable=False),  # of messages whose text the row does not have
        pa.field("response_format", pa.string(), nullable=False),
        pa.field("thinking", pa.bool_()),
        pa.field("thinking_budget", pa.int32()),
        pa.field("effort", pa.float64()),  # 0 (none) to 5 (xhigh)
        pa.field("llm_family", pa.string()),
        pa.field("llm_size", pa.float64()),  # billions of parameters
        pa.field("llm_reasoning", pa.bool_()),
        pa.field("llm_year", pa.int32()),
        pa.field("response_tokens", pa.int32(), nullable=False),  # the label: all that was generated
        pa.field("thought_tokens", pa.int32()),  # how many of them are thoughts, null if not known
        pa.field("label_from", pa.string()),  # recorded (by the server), counted (from the text)
        pa.field("token_unit", pa.string()),  # whose tokens: own (the LLM's), or the tokenizer; null if not known
        pa.field("samples", pa.list_(pa.int32())),  # lengths of several answers, the label their median; null for one
        pa.field("censored", pa.bool_(), nullable=False),  # the answer hit a cap: it would have been longer
    ]
)

# columns that tables of an earlier version lack, and what stands in them then
ADDED = {
    name: Request.__dataclass_fields__[name].default
    for name in (
        "num_tools", "tool_chars", "tool_choice", "num_tool_results", "last_is_tool_result", "other_chars", "effort"
    )
}  # fmt: skip

# flags of `mope.reader.FIELDS`, and what a request has that does not say them
NO_FLAGS = {name: Request.__dataclass_fields__[name].default for name in FIELDS}


class RowTable:
    """Rows of one or more splits, in a fixed order.

    Args:
        table: an Arrow table with the columns of `SCHEMA`; those of `ADDED` may be missing.
    """

    def __init__(self, table: pa.Table) -> None:
        for name in ADDED.keys() - set(table.column_names):
            values = pa.array([ADDED[name]] * table.num_rows, SCHEMA.field(name).type)
            table = table.append_column(SCHEMA.field(name), values)
        self.table = table.select(SCHEMA.names)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def take(self, rows: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> RowTable:
        """The rows at the given positions, or where a boolean mask is true, in that order."""
        positions = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return RowTable(self.table.take(pa.array(positions, pa.int64())))

    def split(self, name: str) -> RowTable:
        """The rows of one split: `"train"`, `"validation"` or `"test"`."""
        return RowTable(self.table.filter(pc.equal(self.table["split"], name)))

    def strings(self, column: str) -> list[str]:
        """A text column as Python strings; null becomes the empty string."""
        return [value or "" for value in self.table[column].to_pylist()]

    @cached_property
    def response_tokens(self) -> npt.NDArray[np.int64]:
        """Labels, shape (rows,), in label tokens."""
        return np.asarray(self.table["response_tokens"].to_numpy(), dtype=np.int64)

    @cached_property
    def censored(self) -> npt.NDArray[np.bool_]:
        """True where the answer hit a cap, shape (rows,)."""
        return np.asarray(self.table["censored"].to_numpy(), dtype=bool)

    @cached_property
    def draws(self) -> npt.NDArray[np.float32] | None:
        """All answers of a row's LLM to the same request in tokens, shape (rows, draws), NaN where there are fewer.

        None where no row has more than one.
        """
        if "samples" not in self.table.column_names:
            return None
        samples = self.table["samples"].combine_chunks()
        counts = np.asarray(pc.fill_null(pc.list_value_length(samples), 0).to_numpy(), dtype=np.int64)
        if not counts.any():
            return None
        draws = np.full((len(self), int(counts.max())), np.nan, dtype=np.float32)
        draws[counts == 0, 0] = self.response_tokens[counts == 0]
        draws[np.arange(draws.shape[1]) < counts[:, None]] = samples.flatten().to_numpy()
        return draws

    @cached_property
    def first_turn(self) -> npt.NDArray[np.bool_]:
        """True where the row is the first answer of its conversation, shape (rows,)."""
        return np.asarray(self.table["turn_index"].to_numpy() == 0)

    @cached_property
    def groups(self) -> npt.NDArray[np.int64]:
        """A number per conversation group, shape (rows,)."""
        indices = self.table["group"].combine_chunks().dictionary_encode().indices
        return np.asarray(indices.to_numpy(), dtype=np.int64)

    def earlier_answer_tokens(self) -> list[Sequence[int]]:
        """Label tokens of each row's earlier answers, oldest first."""
        return [value or () for value in self.table["answer_tokens"].to_pylist()]

    def requests(self) -> list[Request]:
        """What a server would have known of each row."""
        columns = self.table.select([field.name for field in fields(Request) if field.name in SCHEMA.names])
        return [
            Request(
                **{name: value for name, value in row.items() if value is not None},
                answer_estimates=tuple(estimates or ()),
            )
            for row in columns.to_pylist()
            for estimates in [row.pop("answer_estimates")]
        ]
