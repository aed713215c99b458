"""Measures the data step on a generated parquet file with the form and size of LMSYS-Chat-1M.

    python tests/bench/lmsys_million.py --conversations 1000000

Texts are slices of random words, lengths are drawn like the real ones (2 turns in the mean, median answer 140
tokens). `build_rows` runs in a process of its own; its peak memory is what that process reports of itself. Knows
nothing of training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RESULTS = Path(__file__).parents[2] / "model_cards" / "results"
BATCH = 5_000
SOUP_CHARS = 20_000_000
LLMS = ("vicuna-13b", "koala-13b", "alpaca-13b", "chatglm-6b", "llama-2-13b-chat", "gpt-4", "claude-1")
LANGUAGES = ("English", "Portuguese", "Russian", "Chinese", "German", "unknown")
CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "self-harm", "self-harm/instructions",
    "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
VERDICT = pa.struct(
    [
        ("categories", pa.struct([(name, pa.bool_()) for name in CATEGORIES])),
        ("category_scores", pa.struct([(name, pa.float64()) for name in CATEGORIES])),
        ("flagged", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        ("conversation_id", pa.string()),
        ("model", pa.string()),
        ("conversation", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("turn", pa.int64()),
        ("language", pa.string()),
        ("openai_moderation", pa.list_(VERDICT)),
        ("redacted", pa.bool_()),
    ]
)


def word_soup(generator: np.random.Generator) -> str:
    """Random words of two to four syllables, with some punctuation."""
    syllables = np.array(
        ["ta", "re", "in", "con", "ment", "ly", "ser", "ver", "al", "ing", "pro", "est", "or", "u", "qui"]
    )
    parts = syllables[generator.integers(len(syllables), size=(20_000, 4))]
    sizes = generator.integers(2, 5, size=len(parts))
    words = ["".join(part[:size]) for part, size in zip(parts, sizes, strict=True)]
    words += ["the", "of", "and", "to", "a", "in", "is", "that", "for", "it"] * 2000
    chosen = generator.integers(len(words), size=SOUP_CHARS // 6)
    ends = np.array([" ", " ", " ", " ", " ", " ", ", ", ". ", ".\n", " "])[generator.integers(10, size=len(chosen))]
    return "".join(words[word] + end for word, end in zip(chosen.tolist(), ends.tolist(), strict=True))


def generate(path: Path, num_conversations: int) -> None:
    """Write the file, a few thousand conversations at a time."""
    generator = np.random.default_rng(0)
    soup = word_soup(generator)
    verdict = {"categories": dict.fromkeys(CATEGORIES, False), "category_scores": dict.fromkeys(CATEGORIES, 1e-6)}

    def texts(sizes: Any) -> list[str]:
        starts = generator.integers(len(soup) - 40_000, size=len(sizes)).tolist()
        return [soup[start : start + size] for start, size in zip(starts, sizes.tolist(), strict=True)]

    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for first in range(0, num_conversations, BATCH):
            size = min(BATCH, num_conversations - first)
            num_turns = np.minimum(generator.geometric(0.5, size=size), 40)
            total = int(num_turns.sum())
            prompts = texts(np.clip(generator.lognormal(4.4, 1.3, total), 2, 30_000).astype(int))
            answers = texts(np.clip(generator.lognormal(6.0, 1.1, total), 2, 4_500).astype(int))
            rows, at = [], 0
            for position, turns in enumerate(num_turns.tolist()):
                messages = []
                for turn in range(at, at + turns):
                    messages.append({"role": "user", "content": prompts[turn]})
                    messages.append({"role": "assistant", "content": answers[turn]})
                at += turns
                number = first + position
                rows.append(
                    {
                        "conversation_id": f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}",
                        "model": LLMS[number % len(LLMS)],
                        "conversation": messages,
                        "turn": turns,
                        "language": LANGUAGES[0 if number % 4 else number // 4 % len(LANGUAGES)],
                        "openai_moderation": [{**verdict, "flagged": number % 20 == 0}] * len(messages),
                        "redacted": number % 5 == 0,
                    }
                )
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


def measure(path: Path, cache_dir: Path) -> dict[str, Any]:
    """Run `build_rows` in this process and report its time and peak memory."""
    from mope.training.data.build import build_rows
    from mope.training.data.config import DataConfig

    started = time.monotonic()
    data = build_rows(DataConfig(source=str(path), cache_dir=cache_dir))
    elapsed_s = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lengths = data.rows.response_tokens
    return {
        "elapsed_s": round(elapsed_s, 1),
        "peak_rss_gb": round(peak / 1e9, 3),
        "num_conversations": data.report.num_records,
        "num_rows": dict(data.report.num_rows),
        "rows_per_s": round(sum(data.report.num_rows.values()) / elapsed_s),
        "median_response_tokens": float(np.median(lengths)),
        "mean_response_tokens": round(float(np.mean(lengths)), 1),
    }


def main() -> None:
    """Generate, measure in a child process, write the dated result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--conversations", type=int, default=1_000_000, help="conversations to generate")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the dated result")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lmsys.parquet")
        generate(path, options.conversations)
        child = [sys.executable, __file__, "--child", str(path), str(Path(folder, "cache"))]
        measured = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
        size_gb = round(path.stat().st_size / 1e9, 3)
    packages = ("pyarrow", "tiktoken", "numpy", "scipy")
    today = datetime.date.today().isoformat()
    result = {
        "date": today,
        "command": f"python tests/bench/lmsys_million.py --conversations {options.conversations}",
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "file_gb": size_gb,
        **measured,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    target = options.results / f"{today}-data-lmsys-{options.conversations}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{target.name}: {json.dumps(measured)}")


if __name__ == "__main__":
    main()
