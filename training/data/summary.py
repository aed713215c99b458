"""What a data set holds, in numbers: lengths, LLMs, flags, turns and three example rows.

Reads finished rows with numpy and Arrow. Imports no torch. What looks wrong is decided in `doubts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from mope.errors import DataError
from mope.llm_names import KNOWN_FAMILIES
from mope.request import Request
from mope.target_llm import describe
from mope.token_estimate import estimate_tokens
from mope.training.data.build import DataSet
from mope.training.data.problems import DUPLICATE, NOTES, REPEATED_ID, DataReport
from mope.training.data.table import RowTable

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

LEVELS = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
MAX_TEXTS = 50_000  # prompts that are looked at, evenly spaced
MAX_WORDS = 20  # languages, data sets and response formats that are named
EXAMPLE_LEVELS = (0.1, 0.5, 0.9)  # of response tokens: a short, a usual and a long answer


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Quantiles of a length in tokens, interpolated linearly as numpy does."""

    num_rows: int
    min: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, tokens: npt.NDArray[Any]) -> Spread | None:
        """The quantiles of some lengths; None if there are none."""
        if not len(tokens):
            return None
        found = np.quantile(tokens, list(LEVELS.values())).tolist()
        return cls(num_rows=len(tokens), **dict(zip(LEVELS, found, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Llm:
    """One target LLM of the data.

    Attributes:
        name: the most frequent spelling; None for rows without a name.
        canonical: the name that all spellings share; empty without a name.
        num_spellings: spellings in the data.
        family: as the name or the column `llm_family` says.
        family_known: whether mope knows the family, and so its relatives.
        size: billions of parameters; None if unknown.
        reasoning: whether it writes long thoughts; None if unknown.
        year: of its release, as the column `llm_year` says.
        response_tokens: of its rows.
        censored: share of its answers that were cut off.
        with_thoughts: share of its rows that have counted or recorded thoughts.
        counted: share of its labels that were counted from text, not recorded.
    """

    name: str | None
    canonical: str
    num_spellings: int
    family: str | None
    family_known: bool
    size: float | None
    reasoning: bool | None
    year: int | None
    response_tokens: Spread
    censored: float
    with_thoughts: float
    counted: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row as the predictor sees it, and its label."""

    row_id: str
    split: str
    request: Request
    response_tokens: int
    censored: bool
    thought_tokens: int | None
    label_from: str | None


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """Something that looks wrong: a word for programs and a sentence for people."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A data set in numbers. Shares are of `num_rows`, or of `num_texts` for prompts; all between 0 and 1.

    Attributes:
        report: what was read and left out.
        sample: what part of the data was read, in words; None: all of it.
        num_rows: train, validation and test rows.
        num_texts: rows whose prompts were looked at, evenly spaced.
        response_tokens: labels.
        prompt_tokens: tokens of the prompts, estimated without a tokenizer (`mope.token_estimate`).
        thought_tokens: of rows with thoughts.
        shares: censored, with_thoughts, thinking_asked, tools, response_format, system, max_tokens, first_turn.
        empty_prompts: share without text in the last user message.
        distinct_prompts: share of prompts that differ from all before them.
        top_prompt: share of the most frequent prompt that is not empty.
        top_group: share of the largest group of conversations, which shares a split.
        duplicates: rows that were dropped because they came before.
        label_from: where labels are from -> rows.
        languages: language -> rows; the empty word stands for rows without one.
        datasets: data set -> rows, where a source is made of several.
        response_formats: format -> rows that ask for one.
        num_llms: names of LLMs, spellings of one name taken together.
        llms: LLMs by number of rows, most first.
        examples: up to three rows.
        doubts: what looks wrong.
    """

    report: DataReport
    sample: str | None
    num_rows: int
    num_texts: int
    response_tokens: Spread
    prompt_tokens: Spread
    thought_tokens: Spread | None
    shares: Mapping[str, float]
    empty_prompts: float
    distinct_prompts: float
    top_prompt: float
    top_group: float
    duplicates: int
    label_from: Mapping[str, int]
    languages: Mapping[str, int]
    datasets: Mapping[str, int]
    response_formats: Mapping[str, int]
    num_llms: int
    llms: tuple[Llm, ...]
    examples: tuple[Example, ...]
    doubts: tuple[Doubt, ...] = ()

    @property
    def left_out(self) -> dict[str, int]:
        """Reason -> records, answers or rows that are in no row."""
        return {reason: count for reason, count in self.report.counts.items() if reason not in NOTES}

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON types."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "report"}
        nested = {name: [asdict(item) for item in plain[name]] for name in ("llms", "examples", "doubts")}
        spreads = {
            name: asdict(plain[name]) if plain[name] else None
            for name in ("response_tokens", "prompt_tokens", "thought_tokens")
        }
        words = {
            name: dict(plain[name]) for name in ("shares", "label_from", "languages", "datasets", "response_formats")
        }
        return {
            "report": self.report.to_json(), **plain, **words, **spreads, **nested, "left_out": self.left_out,
            "warnings": [*self.report.warnings, *(doubt.text for doubt in self.doubts)],
        }  # fmt: skip


class Columns:
    """The columns of a table that several parts of a summary read.

    Attributes:
        rows: the table.
        llm_names: LLMs by number of rows, most first: canonical names, empty for rows without one.
        llm_R: position of each row's LLM in `llm_names`.
        spellings: canonical name -> spelling -> rows.
    """

    def __init__(self, rows: RowTable) -> None:
        self.rows = rows
        encoded = rows.table["target_llm"].combine_chunks().dictionary_encode()
        written: list[str] = encoded.dictionary.to_pylist()
        code_R = encoded.indices.fill_null(len(written)).to_numpy(zero_copy_only=False)
        counts = np.bincount(code_R, minlength=len(written) + 1)
        self.spellings: dict[str, Counter[str]] = {}
        names = [describe(name).name for name in written] + [""]
        for canonical, name, count in zip(names, [*written, ""], counts.tolist(), strict=True):
            if count:
                self.spellings.setdefault(canonical, Counter())[name] += count
        totals = {canonical: sum(found.values()) for canonical, found in self.spellings.items()}
        self.llm_names = sorted(totals, key=lambda name: (-totals[name], name))
        place = {name: number for number, name in enumerate(self.llm_names)}
        self.llm_R: Ints = np.array([place.get(name, -1) for name in names], np.int64)[code_R]

    @cached_property
    def counted_R(self) -> Bools:
        """True where the label was counted from text."""
        equal = pc.fill_null(pc.equal(self.rows.table["label_from"], "counted"), False)
        return np.asarray(equal.to_numpy(), dtype=bool)

    @cached_property
    def thoughts_R(self) -> Ints:
        """Tokens of thoughts; 0 where none are known."""
        return np.asarray(self.rows.table["thought_tokens"].fill_null(0).to_numpy(), dtype=np.int64)

    def rows_by_llm(self) -> list[Ints]:
        """Positions of each LLM's rows, in the order of `llm_names`."""
        order = np.argsort(self.llm_R, kind="stable")
        ends = np.cumsum(np.bincount(self.llm_R, minlength=len(self.llm_names)))
        return np.split(order, ends[:-1])

    def said(self, column: str, positions: Ints) -> Any:
        """The most frequent value of a column among some rows, null left out; None if there is none."""
        values = self.rows.table[column].take(positions).drop_null()
        if not len(values):
            return None
        counted = Counter({item["values"]: item["counts"] for item in pc.value_counts(values).to_pylist()})
        return counted.most_common(1)[0][0]


def summarise(data: DataSet, columns: Columns, *, sample: str | None = None) -> Summary:
    """Sum up the rows of a data set, without doubts. About a second for 100,000 rows.

    Args:
        data: as `build_rows` gives it.
        columns: of the same rows.
        sample: what part of the data was read, in words; None: all of it.

    Raises:
        DataError: all rows are reserved, so that none can be shown.
    """
    rows, report = data.rows, data.report
    if not len(rows):
        raise DataError(
            f"{report.source}: {report.num_rows.get('reserved', 0):,} rows, all of them in reserve, which is not "
            "shown: give more data"
        )
    num_rows = len(rows)
    texts = rows.take(np.linspace(0, num_rows - 1, min(num_rows, MAX_TEXTS)).astype(np.int64))
    prompts = texts.strings("prompt")
    filled = Counter(prompt for prompt in prompts if prompt.strip())
    empty = len(prompts) - filled.total()
    has_thoughts = columns.thoughts_R > 0
    response, prompt_tokens = Spread.of(rows.response_tokens), Spread.of(np.array(list(map(estimate_tokens, prompts))))
    if response is None or prompt_tokens is None:
        raise RuntimeError("a table with rows has quantiles")
    return Summary(
        report=report,
        sample=sample,
        num_rows=num_rows,
        num_texts=len(prompts),
        response_tokens=response,
        prompt_tokens=prompt_tokens,
        thought_tokens=Spread.of(columns.thoughts_R[has_thoughts]),
        shares={
            "censored": float(rows.censored.mean()),
            "with_thoughts": float(has_thoughts.mean()),
            "thinking_asked": _share(pc.equal(rows.table["thinking"], True)),
            "tools": _share(rows.table["tools"]),
            "response_format": _share(pc.not_equal(rows.table["response_format"], "")),
            "system": sum(bool(text.strip()) for text in texts.strings("system")) / len(prompts),
            "max_tokens": _share(pc.is_valid(rows.table["max_tokens"])),
            "first_turn": float(rows.first_turn.mean()),
        },
        empty_prompts=empty / len(prompts),
        distinct_prompts=(len(filled) + (empty > 0)) / len(prompts),
        top_prompt=max(filled.values(), default=0) / len(prompts),
        top_group=float(np.bincount(rows.groups).max() / num_rows),
        duplicates=_duplicates(report),
        label_from=_words(rows, "label_from"),
        languages=_words(rows, "language"),
        datasets=_words(rows, "dataset", named_only=True),
        response_formats=_words(rows, "response_format", named_only=True),
        num_llms=len([name for name in columns.llm_names if name]),
        llms=_llms(columns),
        examples=_examples(rows),
    )


def _share(mask: Any) -> float:
    """The share of rows where an Arrow mask is true; null is false."""
    return float(np.asarray(pc.fill_null(mask, False).to_numpy(), dtype=bool).mean())


def _duplicates(report: DataReport) -> int:
    return report.counts.get(DUPLICATE, 0) + report.counts.get(REPEATED_ID, 0)


def _words(rows: RowTable, column: str, *, named_only: bool = False) -> dict[str, int]:
    """Value -> rows, most first; null and the empty text are one value, the empty text."""
    found: Counter[str] = Counter()
    for item in pc.value_counts(rows.table[column]).to_pylist():
        found[item["values"] or ""] += item["counts"]
    if named_only:
        del found[""]
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _llms(columns: Columns) -> tuple[Llm, ...]:
    rows, found = columns.rows, []
    for canonical, positions in zip(columns.llm_names, columns.rows_by_llm(), strict=True):
        name = columns.spellings[canonical].most_common(1)[0][0]
        read = describe(name)
        said_family = columns.said("llm_family", positions)
        known = read.family in KNOWN_FAMILIES
        family = read.family if known or not said_family else str(said_family).lower()
        said_size, said_reasoning = (columns.said(column, positions) for column in ("llm_size", "llm_reasoning"))
        spread = Spread.of(rows.response_tokens[positions])
        if spread is None:
            raise RuntimeError("an LLM that was counted has rows")
        found.append(
            Llm(
                name=name or None,
                canonical=canonical,
                num_spellings=len(columns.spellings[canonical]),
                family=family,
                family_known=family in KNOWN_FAMILIES,
                size=read.size if read.size is not None else said_size,
                reasoning=read.thinking if read.thinking is not None else said_reasoning,
                year=columns.said("llm_year", positions),
                response_tokens=spread,
                censored=float(rows.censored[positions].mean()),
                with_thoughts=float((columns.thoughts_R[positions] > 0).mean()),
                counted=float(columns.counted_R[positions].mean()),
            )
        )
    return tuple(found)


def _examples(rows: RowTable) -> tuple[Example, ...]:
    """A row with a short, one with a usual and one with a long answer."""
    order = np.argsort(rows.response_tokens, kind="stable")
    places = dict.fromkeys(int(order[round(level * (len(order) - 1))]) for level in EXAMPLE_LEVELS)
    chosen = rows.take(np.array(list(places), np.int64))
    names = ("row_id", "split", "response_tokens", "censored", "thought_tokens", "label_from")
    said = chosen.table.select(names).to_pylist()
    return tuple(Example(request=request, **row) for request, row in zip(chosen.requests(), said, strict=True))
