"""Rows for tests, made of requests and the lengths of their answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from mope.artifact import write_json
from mope.request import Request
from mope.training.data.config import DataConfig
from mope.training.data.table import SCHEMA, RowTable


def table(
    requests: Sequence[Request], tokens: Sequence[int], censored: Sequence[bool] = (), split: str = "train"
) -> RowTable:
    """One row per request."""
    cut = censored or [False] * len(tokens)
    rows = [
        {
            **asdict(request), "row_id": str(row), "group": str(row), "split": split, "answer_tokens": [],
            "turn_index": request.num_earlier_turns, "response_tokens": int(length), "censored": bool(is_cut),
        }
        for row, (request, length, is_cut) in enumerate(zip(requests, tokens, cut, strict=True))
    ]  # fmt: skip
    return RowTable(pa.Table.from_pylist(rows, schema=SCHEMA))


def learnable(num_rows: int, split: str = "train", seed: int = 0) -> RowTable:
    """Rows whose prompt's first word decides between about 20 and about 400 tokens, no two prompts alike."""
    rng = np.random.default_rng([seed, len(split)])
    is_long = rng.random(num_rows) < 0.5
    counted = [np.base_repr(number, 3).translate({48: "a ", 49: "b ", 50: "c "}) for number in range(num_rows)]
    filler = [number + " ".join(["a", "b", "c"] * int(rng.integers(1, 6))) for number in counted]
    requests = [
        Request(prompt=f"{'write' if long else 'thanks'} {text}", target_llm="llama-3-8b")
        for long, text in zip(is_long, filler, strict=True)
    ]
    return table(
        requests, np.where(is_long, rng.integers(300, 500, num_rows), rng.integers(10, 30, num_rows)), split=split
    )


def write_lengths(path: Path, num_rows: int, seed: int = 0) -> Path:
    """A JSONL file of prompts and the lengths of their answers, no two prompts alike."""
    rng = np.random.default_rng(seed)
    words = ["write", "explain", "list", "name", "why", "hamlet", "sea", "python", "story", "german", "cat", "sky"]
    lines = []
    for number in range(num_rows):
        prompt = " ".join([*rng.choice(words, int(rng.integers(2, 30))), str(rng.integers(10**9)), str(number)])
        lines.append(json.dumps({"prompt": prompt, "response_tokens": int(rng.integers(2, 900))}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def say_trained_on(folder: Path, data: Path) -> None:
    """Let the provenance of a saved predictor name a file as what it was trained on."""
    settings = DataConfig(source=str(data), target_llm="gpt-4").model_dump(mode="json", exclude={"cache_dir"})
    write_json(folder / "provenance.json", {"data": {}, "config": {"data": settings}})
