"""What replays showed, for people: a table per workload, and what must be known to read it.

Knows figures and headings; does not replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from mope.bench.report import TextTable, three_digits

WIDTH = 170  # columns where there is no terminal
MAX_CLIENTS = 4  # of which a table shows times to the first token
COLUMNS = {  # of every table: figure -> heading, with the unit
    "jain_entitled": "Jain entitled",
    "jain_slowdown": "Jain slowdown",
    "window_difference_mean": "window diff.",
    "accumulated_difference_max": "accum. diff.",
    "ttft_p50_s": "TTFT p50 s",
    "ttft_p99_s": "TTFT p99 s",
    "e2e_mean_s": "E2E mean s",
    "response_tokens_per_s": "out tok/s",
    "num_preemptions": "preempted",
    "recomputed_share": "recomputed",
}
Shown = Mapping[str, Any]


def tables(workloads: Sequence[Shown]) -> list[TextTable]:
    """One table for each workload of `replay.json`."""
    return [_table(shown) for shown in workloads]


def _table(shown: Shown) -> TextTable:
    variants: Mapping[str, Shown] = shown["variants"]
    clients = list(next(iter(variants.values()))["clients"])
    headings = ["policy", *COLUMNS.values()]
    if 1 < len(clients) <= MAX_CLIENTS:
        headings += [f"{name} TTFT" for name in clients]
    rows = []
    for variant, figures in variants.items():
        cells = [variant, *(_cell(key, figures[key]) for key in COLUMNS)]
        if 1 < len(clients) <= MAX_CLIENTS:
            cells += [_cell("ttft_mean_s", figures["clients"][name]["ttft_mean_s"]) for name in clients]
        rows.append(cells)
    first = next(iter(variants.values()))
    title = (
        f"{shown['name']}: {shown['about']}; {first['num_requests']['mean']:,.0f} requests, load {shown['load']:.2f}, "
        f"{shown['rate']:.3g} requests/s, {shown['num_seeds']} seeds, {shown['engine']}"
    )
    return TextTable(title, tuple(headings), rows)


def _cell(key: str, figure: Mapping[str, float]) -> str:
    mean, half = figure["mean"], figure["half_width"]
    if key.startswith("jain"):
        return f"{mean:.3f}" + (f" ±{half:.3f}" if half >= 0.0005 else "")
    if key == "recomputed_share":
        return f"{mean:.1%}"
    if key == "num_preemptions":
        return f"{mean:,.0f}"
    return three_digits(mean) + (f" ±{three_digits(half)}" if half >= 0.005 * abs(mean) else "")


def notes(result: Shown) -> list[str]:
    """What a reader must know beside the tables."""
    profile, engine = result["profile"], result["settings"]
    return [
        f"virtual time: steps take what profile {profile} says; the scheduler is the engine's own, model and worker "
        f"are not there. {engine['max_num_seqs']} requests and {engine['max_num_batched_tokens']:,} tokens in a batch "
        f"at most, {result['kv_tokens']:,} tokens of KV cache, {engine['batches_in_flight']} batches in flight, "
        f"max_tokens {engine['max_tokens']:,} for every request.",
        "Jain's index J(x) of x = what a client was delivered / what max-min fairness gives it (entitled), and of x = "
        "mean latency / latency on the idle engine (slowdown); J of service rates is in replay.json.",
        "window diff.: what the worst-served client missed of what it asked for, against the best-served, in weighted "
        "tokens/s, mean over windows; accum. diff.: most weighted tokens that one client had more than another, both "
        "as VTC defines them, while requests arrive. TTFT from arrival; by client, its mean in seconds.",
        f"± is half a 95 % interval of the mean over {result['num_seeds']} seeds (Student's t), left out where it is "
        "below half a percent; policies see the same requests and predictions.",
        f"noisy: a predictor with tau {result['tau']:.3f}, whose error is lognormal with sigma {result['sigma']:.2f}; "
        "see mope.serving_hooks.replay.predictions.",
    ]


def print_report(result: Shown) -> None:
    """Print tables and notes on stdout."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for table in tables(result["workloads"]):
        console.print(table.to_rich())
        console.print()
    for note in notes(result):
        console.print(Text(note))


def to_markdown(result: Shown) -> str:
    """Tables and notes as `replay.md`, with latencies by client."""
    command = " ".join(result["provenance"]["command"])
    parts = ["# mope replay", f"`{command}`, {result['provenance']['finished']}"]
    for shown, table in zip(result["workloads"], tables(result["workloads"]), strict=True):
        parts += [table.to_markdown(), _clients(shown).to_markdown()]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(result))]) + "\n"


def _clients(shown: Shown) -> TextTable:
    columns = {
        "service_per_s": "weighted tok/s", "fair_service_per_s": "of max-min", "slowdown_mean": "slowdown",
        "queue_mean_s": "queue mean s", "ttft_mean_s": "TTFT mean s", "ttft_p50_s": "p50", "ttft_p90_s": "p90",
        "ttft_p99_s": "p99", "e2e_mean_s": "E2E mean s", "e2e_p50_s": "p50", "e2e_p90_s": "p90", "e2e_p99_s": "p99",
    }  # fmt: skip
    rows = [
        [f"{variant}: {client}", f"{own['num_requests']['mean']:,.0f}", *(_cell(key, own[key]) for key in columns)]
        for variant, figures in shown["variants"].items()
        for client, own in figures["clients"].items()
    ]
    return TextTable(f"{shown['name']}, by client", ("policy: client", "requests", *columns.values()), rows)
