"""A summary of a data set on one screen of a terminal.

Knows rich and the words of the screen; the numbers are a `Summary`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mope.request import Request
from mope.training.data.public_labels import OWN_TOKENS
from mope.training.data.summary import LEVELS, Example, Llm, Spread, Summary

MAX_LLMS = 8
MAX_REASONS = 6
MAX_WORDS = 6
PROMPT_CHARS = 150
CONTEXT_CHARS = 60
HEADINGS = {"min": "min", "p10": "10 %", "p50": "median", "p90": "90 %", "p99": "99 %", "max": "max"}
IN_WORDS = {
    "censored": "cut off", "with_thoughts": "with thoughts", "thinking_asked": "asked to think", "tools": "with tools",
    "response_format": "with a response format", "system": "with a system prompt", "max_tokens": "with max_tokens",
}  # fmt: skip
SHOWN_APART = {
    "prompt", "system", "previous_prompt", "answer_estimates", "num_earlier_turns", "target_llm", "token_unit",
}  # fmt: skip


def show(summary: Summary, console: Console) -> None:
    """Print a summary: what was read, lengths by LLM, shares, three rows, warnings."""
    for line in _head(summary):
        _say(console, line)
    console.print(_lengths(summary))
    for line in _shares(summary):
        _say(console, line)
    if summary.examples:
        _say(console, "")
        _say(console, "rows as the predictor sees them (CONVERSATION/N answers message N of it, counted from 0):")
    for position, example in enumerate(summary.examples):
        if position:
            _say(console, "")
        for line in _example(example):
            _say(console, line)
    warnings = [*summary.report.warnings, *(doubt.text for doubt in summary.doubts)]
    if warnings:
        _say(console, "")
    for warning in warnings:
        _say(console, Text.assemble(("warning: ", "yellow"), warning))


def _say(console: Console, line: str | Text) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _head(summary: Summary) -> list[str]:
    report = summary.report
    forms = ", ".join(f"{name} {count:,}" for name, count in report.families.items())
    forms = f" ({forms})" if forms else ""
    kept = ", ".join(f"{name} {count:,}" for name, count in report.num_rows.items())
    first = summary.shares["first_turn"]
    lines = [
        f"{report.source}: {report.num_records:,} records read as {report.data_format}{forms}, "
        f"{report.num_chats:,} conversations, lengths in "
        + ("tokens as recorded" if report.label_tokenizer == "recorded" else f"{report.label_tokenizer} tokens")
        + (" (from the cache)" if report.from_cache else ""),
    ]
    if summary.sample:
        lines.append(f"a sample: {summary.sample}")
    lines.append(f"rows: {kept}; below are the {summary.num_rows:,} that are not reserved")
    labels = ", ".join(
        f"{name or 'not said'} {_percent(count / summary.num_rows)}" for name, count in summary.label_from.items()
    )
    lines.append(f"labels: {labels}; turns: first {_percent(first)}, later {_percent(1 - first)}")
    left_out = sorted(summary.left_out.items(), key=lambda item: (-item[1], item[0]))
    lines += [
        f"left out: {count:,} x {reason} ({', '.join(report.examples.get(reason, ())[:1])})"
        for reason, count in left_out[:MAX_REASONS]
    ]
    if further := left_out[MAX_REASONS:]:
        lines.append(f"left out: {sum(count for _, count in further):,} for {len(further)} further reasons (--json)")
    lines += [
        f"note: {count:,} x {reason}" for reason, count in report.counts.items() if reason not in summary.left_out
    ]
    return lines


def _lengths(summary: Summary) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("tokens", overflow="ellipsis", no_wrap=True, max_width=30)
    for heading in ("rows", *HEADINGS.values(), "cut off"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("LLM read as", overflow="fold")
    table.add_row("response", *_cells(summary.response_tokens), _percent(summary.shares["censored"]))
    for llm in summary.llms[:MAX_LLMS]:
        name = Text("  " + (llm.name or "(no LLM named)"))
        table.add_row(name, *_cells(llm.response_tokens), _percent(llm.censored), Text(_reading(llm)))
    further = summary.llms[MAX_LLMS:]
    if further:
        table.add_row(f"  {len(further):,} further LLMs", f"{sum(llm.response_tokens.num_rows for llm in further):,}")
    if summary.thought_tokens:
        table.add_row("of them thoughts", *_cells(summary.thought_tokens))
    table.add_row("prompt (estimated)", *_cells(summary.prompt_tokens))
    return table


def _cells(spread: Spread) -> list[str]:
    return [f"{spread.num_rows:,}", *(f"{getattr(spread, level):,.0f}" for level in LEVELS)]


def _reading(llm: Llm) -> str:
    """How the name of an LLM was read."""
    if not llm.canonical:
        return "type --target-llm NAME"
    said = [llm.canonical]
    said.append(f"family {llm.family}" if llm.family_known else "family not known")
    if llm.size is not None:
        said.append(f"{llm.size:g} B")
    if llm.reasoning is not None:
        said.append("reasoning" if llm.reasoning else "no reasoning")
    if llm.year is not None:
        said.append(str(llm.year))
    if llm.num_spellings > 1:
        said.append(f"{llm.num_spellings} spellings")
    return ", ".join(said)


def _shares(summary: Summary) -> list[str]:
    said = [f"{words} {_percent(summary.shares[name])}" for name, words in IN_WORDS.items() if summary.shares[name]]
    lines = [f"answers and requests: {', '.join(said) or 'none cut off, with thoughts, tools or flags'}"]
    lines.append(
        f"prompts: empty {_percent(summary.empty_prompts)}, distinct {_percent(summary.distinct_prompts)}; "
        f"duplicates left out: {summary.duplicates:,}"
        + (f" (prompts of {summary.num_texts:,} rows, evenly spaced)" if summary.num_texts < summary.num_rows else "")
    )
    if any(summary.languages):
        lines.append(f"languages: {_top(summary.languages, summary.num_rows)}")
    if summary.datasets:
        lines.append(f"data sets: {_top(summary.datasets, summary.num_rows)}")
    if summary.response_formats:
        lines.append(f"response formats: {_top(summary.response_formats, summary.num_rows)}")
    return lines


def _top(counts: Mapping[str, int], total: int) -> str:
    named = [f"{name or 'not said'} {_percent(count / total)}" for name, count in list(counts.items())[:MAX_WORDS]]
    return ", ".join(named) + (f", {len(counts) - MAX_WORDS:,} more" if len(counts) > MAX_WORDS else "")


def _percent(share: float) -> str:
    """A share as a percentage that is 0 or 100 only if the share is."""
    text = f"{share:.0%}"
    if text in ("0%", "100%") and share not in (0.0, 1.0):
        return "<1%" if share < 0.5 else ">99%"
    return text


def _example(example: Example) -> list[str]:
    request = example.request
    label = f"{example.response_tokens:,} tokens"
    if request.token_unit not in (None, OWN_TOKENS):
        label += f" of {request.token_unit}"
    if example.thought_tokens is not None:
        label += f", {example.thought_tokens:,} of them thoughts"
    label += ", cut off" if example.censored else ""
    label += f", {example.label_from}" if example.label_from else ""
    lines = [f"row {example.row_id} ({example.split}): {label}"]
    if request.system:
        lines.append(f"  system:  {_start(request.system, CONTEXT_CHARS)}")
    if request.previous_prompt:
        lines.append(f"  before:  {_start(request.previous_prompt, CONTEXT_CHARS)}")
    lines.append(f"  prompt:  {_start(request.prompt, PROMPT_CHARS) or '(empty)'}")
    if request.num_earlier_turns:
        known = ", ".join(f"{tokens:,}" for tokens in request.answer_estimates)
        lines.append(f"  earlier answers: {request.num_earlier_turns:,}, of about {known or 'unknown'} tokens")
    lines.append(f"  request: {', '.join(_flags(request))}")
    return lines


def _flags(request: Request) -> list[str]:
    """What a request says beside its texts."""
    said = [f"target_llm {request.target_llm}" if request.target_llm else "no target_llm"]
    for field in fields(Request):
        value = getattr(request, field.name)
        if field.name not in SHOWN_APART and value != field.default:
            said.append(f"{field.name} {value}")
    return said


def _start(text: str, num_chars: int) -> str:
    """The beginning of a text, on one line."""
    words = " ".join(text[: 4 * num_chars].split())
    return words if len(words) <= num_chars and len(text) <= 4 * num_chars else words[: num_chars - 3] + "..."
