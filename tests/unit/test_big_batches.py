"""A batch of any size: the same predictions as one by one, in flat memory, in no more time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from timing import least_ratio

from mope import LengthPredictor
from mope.predictor import CHUNK_REQUESTS, CHUNK_TOKENS, chunks

WORDS = ("explain", "bridge", "weather", "story", "list", "compare", "kings", "code", "please", "write", "why", "12")


def prompts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Prompts of very different lengths, all different."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(0, np.log(longest), count)).astype(int) + 1
    return [f"{' '.join(rng.choice(WORDS, size))} {number}" for number, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 3 * CHUNK_TOKENS // CHUNK_REQUESTS), max_size=300))
def test_chunks_hold_each_request_once_and_are_bounded(lengths: list[int]) -> None:
    parts = list(chunks(lengths))
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        longest = max(lengths[row] for row in part)
        assert len(part) <= CHUNK_REQUESTS
        assert len(part) == 1 or len(part) * longest <= CHUNK_TOKENS
    ordered = [lengths[row] for part in parts for row in part]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("name", ["chat-small", "chat-micro"])
def test_a_request_is_predicted_the_same_alone_and_in_a_batch(name: str) -> None:
    predictor = LengthPredictor.from_pretrained(name, cache_size=0)
    texts = prompts(150, 120)
    batch = np.array([one.median for one in predictor.predict_batch(texts)])
    alone = np.array([predictor.predict(text).median for text in texts])
    assert np.abs(batch / alone - 1).max() < 1e-5


def test_the_order_of_a_batch_is_kept(tiny: Path) -> None:
    predictor = LengthPredictor.from_pretrained(tiny, backend="torch", cache_size=0)
    texts = prompts(2500, 60)  # more than are encoded at once
    found = predictor.predict_batch([*texts[:1000], "", *texts[1000:]])
    assert found.pop(1000).source == "fallback:no text"
    for row in (0, 1, 999, 1000, 1024, 2048, 2499):
        assert found[row].median == pytest.approx(predictor.predict(texts[row]).median, rel=1e-5)


SCRIPT = """
import resource, sys
from mope import LengthPredictor
predictor = LengthPredictor.from_pretrained(sys.argv[1])
predictor.predict("warm up")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)
before = peak()
texts = [f"{number} " + "explain the bridge in fifty words " * 40 for number in range(int(sys.argv[2]))]
assert len(predictor.predict_batch(texts)) == len(texts)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is not there")
@pytest.mark.parametrize(("name", "count"), [("chat-micro", 10_000), ("chat-small", 800)])
def test_memory_is_flat(name: str, count: int) -> None:
    command = [sys.executable, "-c", SCRIPT, name, str(count)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert float(found.stdout) < 400  # MB; of 10,000 prompts of chat-small it is about 20


def test_a_big_batch_takes_no_longer_than_batches_of_64() -> None:
    predictor = LengthPredictor.from_pretrained("chat-micro", cache_size=0)
    texts = prompts(1280, 120)

    def in_parts() -> None:
        for start in range(0, len(texts), 64):
            predictor.predict_batch(texts[start : start + 64])

    assert least_ratio(lambda: predictor.predict_batch(texts), in_parts, 1.2) < 1.2  # about 0.9
