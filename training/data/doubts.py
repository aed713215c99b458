"""What looks wrong in a data set: one rule and one sentence each, with what to type against it.

Knows numbers of a `Summary` and labels by LLM. A rule that fires does not stop training.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mope.training.data.problems import NO_TEXT
from mope.training.data.summary import Columns, Doubt, Ints, Summary

SHORT_MEDIAN = 20  # tokens: most chats are far above
CUT_SHARE = 0.2
SAME_LABEL_SHARE = 0.5
EMPTY_SHARE = 0.1
TOP_PROMPT_SHARE = 0.2
TOP_GROUP_SHARE = 0.2
TOP_LLM_SHARE = 0.95  # of several LLMs
DISTINCT_SHARE = 0.2
LEFT_OUT_SHARE = 0.5
TWO_TOKENIZERS_RATIO = 1.5  # between the medians of recorded and counted labels of one LLM
TWO_TOKENIZERS_ROWS = 20  # of each kind
THOUGHTS_ROWS = 20
MIN_ROWS = 20  # for shares to mean anything

# a cap: this many times the rows per token that lie around it, and at least so many of all rows
SPIKE_RATIO = 10.0
SPIKE_SHARE = 0.01
SPIKE_ROWS = 10
SPIKE_MIN_TOKENS = 64
SPIKE_AROUND = 0.1


def find_doubts(summary: Summary, columns: Columns, min_rows: int) -> list[Doubt]:
    """Everything that looks wrong, the most serious first.

    Args:
        summary: of the rows, without doubts.
        columns: of the same rows.
        min_rows: training rows that are expected.
    """
    rules = (_few_rows(summary, min_rows), _left_out(summary), _labels(summary, columns), _prompts(summary))
    return [Doubt(kind=kind, text=text) for rule in (*rules, _parts(summary)) for kind, text in rule]


def spikes(lengths_R: Ints) -> list[tuple[int, int]]:
    """(length, rows) of labels far more frequent than those around them, as a cap leaves them; longest first.

    A length of at least 64 tokens that has 10 rows and 1 % of all rows, and ten times the rows per token of the range
    10 % below and above it.

    Args:
        lengths_R: labels, without those that are known to be cut off.
    """
    if not len(lengths_R):
        return []
    values, counts = np.unique(lengths_R, return_counts=True)
    total_up_to = np.concatenate([[0], np.cumsum(counts)])
    found = []
    for at in np.flatnonzero((counts >= max(SPIKE_ROWS, SPIKE_SHARE * len(lengths_R))) & (values >= SPIKE_MIN_TOKENS)):
        value, count = int(values[at]), int(counts[at])
        low, high = np.ceil(value * (1 - SPIKE_AROUND)), np.floor(value * (1 + SPIKE_AROUND))
        high = min(high, float(values[-1]))  # beyond the longest answer there is nothing to compare with
        first, last = np.searchsorted(values, low), np.searchsorted(values, high, side="right")
        around = (total_up_to[last] - total_up_to[first] - count) / max(high - low, 1.0)
        if count >= SPIKE_RATIO * around:
            found.append((value, count))
    return found[::-1]


Found = Iterator[tuple[str, str]]


def _few_rows(summary: Summary, min_rows: int) -> Found:
    num_train = summary.report.num_rows.get("train", 0)
    if num_train < min_rows and summary.sample is None:
        yield (
            "few_rows",
            f"{num_train:,} training rows; expected at least {min_rows:,} (--min-rows): give more data",
        )


def _left_out(summary: Summary) -> Found:
    asked = sum(count for reason, count in summary.left_out.items() if "as asked" in reason)
    lost = sum(summary.left_out.values()) - asked
    kept = sum(summary.report.num_rows.values())
    if lost > LEFT_OUT_SHARE * (lost + kept):
        worst = max(summary.left_out, key=lambda reason: summary.left_out[reason] * ("as asked" not in reason))
        yield "left_out", f"{lost:,} cases were left out for {kept:,} rows that were kept, most as: {worst}"


def _labels(summary: Summary, columns: Columns) -> Found:
    rows, median = columns.rows, summary.response_tokens.p50
    if median < SHORT_MEDIAN:
        yield (
            "short_labels",
            f"half of the answers have at most {median:.0f} tokens, which is very short: is the length of the answer "
            "where it was looked for?",
        )
    values, counts = np.unique(rows.response_tokens, return_counts=True)
    same = counts.max() / len(rows)
    if len(rows) > 1 and same >= SAME_LABEL_SHARE:
        yield (
            "equal_labels",
            f"{same:.0%} of the answers have {values[counts.argmax()]:,} tokens: there is little to learn",
        )
    for value, count in spikes(rows.response_tokens[~rows.censored])[:3]:
        yield (
            "spike",
            f"{count:,} answers have exactly {value:,} tokens and are not marked as cut off: if that is a cap, type "
            f"--response-cap {value}"
            + ("" if value >= summary.response_tokens.max else " (then longer answers count as cut off, too)"),
        )
    if (cut := summary.shares["censored"]) > CUT_SHARE:
        yield (
            "cut_off",
            f"{cut:.0%} of the answers were cut off: how long they would have been is not in the data, so predictions "
            "beyond the caps are guesses",
        )
    for name, positions in zip(columns.llm_names, columns.rows_by_llm(), strict=True):
        counted = columns.counted_R[positions]
        lengths = rows.response_tokens[positions]
        if min(int(counted.sum()), int((~counted).sum())) >= TWO_TOKENIZERS_ROWS:
            low, high = sorted((float(np.median(lengths[counted])), float(np.median(lengths[~counted]))))
            if high > TWO_TOKENIZERS_RATIO * low:
                yield (
                    "two_tokenizers",
                    f"{name or 'rows without an LLM'}: {(~counted).sum():,} recorded lengths have the median "
                    f"{np.median(lengths[~counted]):,.0f}, {counted.sum():,} counted ones "
                    f"{np.median(lengths[counted]):,.0f}: they may differ in tokenizer, or text may be missing",
                )
    for llm in summary.llms:
        rows_counted = llm.counted * llm.response_tokens.num_rows
        if llm.reasoning and not llm.with_thoughts and rows_counted >= THOUGHTS_ROWS:
            yield (
                "no_thoughts",
                f"{llm.name} is a reasoning LLM, and {rows_counted:,.0f} of its lengths were counted from text without "
                "any thoughts: a server generates those, too",
            )


def _prompts(summary: Summary) -> Found:
    dropped = summary.report.counts.get(NO_TEXT, 0)
    empty = (summary.empty_prompts * summary.num_rows + dropped) / (summary.num_rows + dropped)
    if empty > EMPTY_SHARE:
        yield (
            "empty_prompts",
            f"{empty:.0%} of the prompts have no text ({dropped:,} rows were dropped for it): is the prompt where it "
            "was looked for?",
        )
    if summary.num_texts < MIN_ROWS:
        return
    if summary.top_prompt > TOP_PROMPT_SHARE:
        yield "one_prompt", f"one prompt makes {summary.top_prompt:.0%} of the rows"
    elif summary.distinct_prompts < DISTINCT_SHARE:
        yield "few_prompts", f"only {summary.distinct_prompts:.0%} of the prompts are distinct"


def _parts(summary: Summary) -> Found:
    if summary.num_rows < MIN_ROWS:
        return
    if summary.top_group > TOP_GROUP_SHARE:
        yield (
            "one_group",
            f"{summary.top_group:.0%} of the rows belong together (one conversation, or shared prompts and answers) "
            "and lie in one split: is the conversation id the client's?",
        )
    first = summary.llms[0]
    share = first.response_tokens.num_rows / summary.num_rows
    if len(summary.llms) > 1 and share > TOP_LLM_SHARE:
        yield (
            "one_llm",
            f"{first.name or 'no LLM name'} makes {share:.1%} of the rows: little is learned of the other "
            f"{len(summary.llms) - 1:,}",
        )
