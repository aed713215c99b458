"""Repeated requests: the network is asked once, different ones stay apart, and what is learned applies to all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope import LengthPredictor, Request
from mope.cache import LruCache

FULL = Request(
    prompt="Why is the sky blue?", system="Be brief.", previous_prompt="What is the sky?", answer_estimates=(40, 7),
    num_earlier_turns=2, target_llm="gpt-4", max_tokens=99, temperature=0.5, tools=True, response_format="json_object",
    thinking=True,
)  # fmt: skip
OTHER: dict[str, Any] = {
    "prompt": "Why is the sky grey?", "system": "Be short.", "previous_prompt": "What is a sky? ",
    "answer_estimates": (40, 8), "num_earlier_turns": 3, "target_llm": "llama-3-8b", "max_tokens": None,
    "temperature": 0.6, "tools": False, "response_format": "", "thinking": None,
}  # fmt: skip


@pytest.fixture
def asked(predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the network was asked."""
    sizes: list[int] = []
    run = predictor.backend.run

    def counted(encoded: Any, choose: Any) -> Any:
        sizes.append(len(encoded.token_ids))
        return run(encoded, choose)

    monkeypatch.setattr(predictor.backend, "run", counted)
    return sizes


def test_a_repeated_request_is_answered_from_the_cache(predictor: LengthPredictor, asked: list[int]) -> None:
    first, again = predictor.predict("hello", max_tokens=9), predictor.predict("hello", max_tokens=9)
    assert asked == [1]
    assert np.array_equal(first.cumulative, again.cumulative)
    assert (first.route_probabilities, first.expert, first.source) == (
        again.route_probabilities,
        again.expert,
        again.source,
    )
    assert (predictor.cache_stats.hits, predictor.cache_stats.misses, predictor.cache_stats.size) == (1, 1, 1)
    mixed = predictor.predict_batch([{"prompt": "hello", "max_tokens": 9}, "new", "", {"prompt": "new"}])
    assert asked == [1, 2]
    assert [prediction.source for prediction in mixed] == ["model", "model", "fallback:no text", "model"]
    assert np.array_equal(mixed[0].cumulative, first.cumulative)


def test_what_is_learned_applies_to_repeated_requests(predictor: LengthPredictor, asked: list[int]) -> None:
    before = predictor.predict("hello", target_llm="gpt-4")
    for _ in range(40):
        predictor.observe(predictor.predict("hello", target_llm="gpt-4"), round(4 * before.median))
    after = predictor.predict("hello", target_llm="gpt-4")
    assert asked == [1]
    assert after.median > 2 * before.median
    assert after.raw_cumulative is before.raw_cumulative


def test_llms_without_an_embedding_share_an_entry_but_not_their_name(
    predictor: LengthPredictor, asked: list[int]
) -> None:
    first, second = predictor.predict("hello", target_llm="one"), predictor.predict("hello", target_llm="two")
    assert asked == [1]
    assert (first.target_llm, second.target_llm) == ("one", "two")


def test_size_zero_keeps_nothing(tiny: Path) -> None:
    predictor = LengthPredictor.from_pretrained(tiny, cache_size=0)
    predictor.predict("hello")
    predictor.predict("hello")
    assert (predictor.cache_stats.hits, predictor.cache_stats.size, predictor.cache_stats.capacity) == (0, 0, 0)


def test_a_kept_prediction_cannot_be_changed(predictor: LengthPredictor) -> None:
    prediction = predictor.predict("hello")
    with pytest.raises(ValueError, match="read-only"):
        prediction.cumulative[3] = 0.0
    with pytest.raises(ValueError, match="read-only"):
        predictor.predict("").cumulative[3] = 0.0


@pytest.mark.parametrize("name", OTHER)
def test_every_field_of_a_request_counts(predictor: LengthPredictor, name: str) -> None:
    digest = predictor.encoder.digest
    assert digest(replace(FULL, **{name: OTHER[name]})) != digest(FULL) == digest(replace(FULL))


def test_text_cannot_move_from_one_field_to_the_next(predictor: LengthPredictor) -> None:
    texts = (("ab", "c", ""), ("a", "bc", ""), ("a", "b", "c"), ("", "", "abc"), ("abc", "", ""))
    digests = {
        predictor.encoder.digest(Request(prompt=prompt, previous_prompt=previous, system=system))
        for prompt, previous, system in texts
    }
    assert len(digests) == 5


@given(st.integers(0, 6000), st.integers(0, 6000), st.sampled_from(["prompt", "previous_prompt", "system"]))
def test_the_same_digest_means_the_same_input(encoder: Any, position: int, num_chars: int, name: str) -> None:
    text = "write a story about cats? " * (num_chars // 26 + 1)
    changed = text[:position] + "7" + text[position + 1 :]
    answers = {"answer_estimates": (9,), "num_earlier_turns": 1}
    one, other = (Request(**{"prompt": "x", **answers, name: value}) for value in (text, changed))
    if encoder.digest(one) == encoder.digest(other):
        first, second = encoder.encode([one]), encoder.encode([other])
        assert first.token_ids == second.token_ids
        assert np.array_equal(first.numbers_BF, second.numbers_BF)
        assert first.rule_hits == second.rule_hits
    else:
        assert one != other


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> Any:
    return LengthPredictor.from_pretrained(tiny).encoder


def test_a_change_deep_inside_a_long_text_is_the_same_request(encoder: Any) -> None:
    """Else the test above would compare nothing."""
    text = "a" * 50_000
    assert encoder.digest(Request(prompt=text)) == encoder.digest(Request(prompt=text[:25_000] + "b" + text[25_001:]))
    assert encoder.digest(Request(prompt=text)) != encoder.digest(Request(prompt=text + "a"))


def test_the_least_recently_used_entry_goes_first() -> None:
    cache: LruCache[int] = LruCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]
    assert (cache.stats.hits, cache.stats.misses, cache.stats.size, cache.stats.capacity) == (3, 1, 2, 2)
    cache.clear()
    assert cache.get("c") is None
