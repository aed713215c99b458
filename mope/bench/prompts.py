"""The prompts that a benchmark asks about: a seeded sample of requests, and how long they are.

Knows files of requests and tokenizers; does not know who answers the requests.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.markup import escape

from mope.console import console
from mope.errors import DataError
from mope.request import Request
from mope.request_files import read_request, reading

LENGTH_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
ItemT = TypeVar("ItemT")


def sample(items: Sequence[ItemT], num_items: int, seed: int) -> list[ItemT]:
    """That many items (all, if there are fewer) in a random order."""
    return random.Random(seed).sample(items, min(num_items, len(items)))


def read_sample(name: str, num_requests: int, seed: int) -> list[Request]:
    """A seeded sample of the requests in a file, as `mope predict` reads them; other records are counted on stderr.

    Args:
        name: path of the file, or `-` for stdin.
        num_requests: how many at most.
        seed: of the sample.

    Raises:
        ConfigError: the file can't be read.
        DataError: none of its records is a request.
    """
    with reading(name, "--prompts") as (entries, _, told):
        known = list(entries)
    requests: list[Request] = []
    mistakes: list[str] = []
    for entry in sample(known, len(known), seed):
        _, request = read_request(entry, {})
        if isinstance(request, str):
            mistakes.append(request)
        else:
            requests.append(request)
        if len(requests) == num_requests:
            break
    if not requests:
        reason = f"for example {mistakes[0]}" if mistakes else "; ".join(told.lines()) or "it is empty"
        raise DataError(
            f"--prompts {name}: none of {len(known):,} records is a request; {reason}; expected for example JSON Lines "
            'with {"prompt": "...", "history"?: [...]} or {"messages": [...]}'
        )
    warnings = told.lines()
    if mistakes:
        warnings.append(
            f"{len(mistakes):,} of {len(mistakes) + len(requests):,} records that were read are no requests; for "
            f"example {mistakes[0]}"
        )
    for warning in warnings:
        console().print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    return requests


def describe_lengths(requests: Sequence[Request], artifact: Path) -> dict[str, Any]:
    """How long the prompts are, before any cut: in characters, and in tokens of an artifact's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch_fast([as_utf8(request.prompt) for request in requests], add_special_tokens=False)
    return {
        "with_history": sum(request.num_earlier_turns > 0 for request in requests),
        "prompt_chars": length_summary([len(request.prompt) for request in requests]),
        "prompt_tokens": length_summary([len(encoding.ids) for encoding in encoded]),
    }


def length_summary(lengths: Sequence[int]) -> dict[str, float]:
    """Mean, largest and quantiles of lengths."""
    quantiles = {f"p{100 * level:.0f}": round(float(np.quantile(lengths, level)), 1) for level in LENGTH_LEVELS}
    return {"mean": round(float(np.mean(lengths)), 1), **quantiles, "max": max(lengths)}


def as_utf8(text: str) -> str:
    """The text with halves of surrogate pairs replaced: tokenizers take UTF-8 alone."""
    return text.encode("utf-8", "replace").decode("utf-8")
