"""The split rule: what is joined, that no group crosses, that nothing depends on order."""

from __future__ import annotations

import hashlib
import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.training.data import splits


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("  Hello,   WORLD! ", "hello world"),
        ("a_b-c\n\td", "a b c d"),
        ("naïve café", "naïve café"),
        ("emoji 😀 gone", "emoji gone"),
        ("日本語。テスト", "日本語。テスト"),
        ("?!", ""),
    ],
)
def test_norm(text: str, normalised: str) -> None:
    assert splits.norm(text) == normalised


@given(st.text(max_size=300), st.integers(1, 40))
def test_norm_prefix_is_a_prefix_of_norm(text: str, num_chars: int) -> None:
    assert splits.norm_prefix(text, num_chars) == splits.norm(text)[:num_chars]


def test_bucket_is_the_published_rule() -> None:
    digest = hashlib.sha1(b"mope-split-v1:QWJhYvA").hexdigest()
    assert splits.bucket("QWJhYvA") == int(digest[:8], 16) % 100


@pytest.mark.parametrize(("low", "high", "split"), [(0, 69, 0), (70, 79, 1), (80, 89, 2), (90, 99, 3)])
def test_bucket_limits(low: int, high: int, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (low, high):
        monkeypatch.setattr(splits, "bucket", lambda group, number=number: number)
        assert splits.split_of("any") == split


def test_shares_of_the_splits() -> None:
    counts = np.bincount([splits.split_of(f"chat-{number}") for number in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.7, 0.1, 0.1, 0.1], atol=0.01)


def test_key_keeps_fields_apart_and_is_never_zero() -> None:
    assert splits.key("ab", "c") != splits.key("a", "bc")
    assert 0 < splits.key("") < 2**63


occurrences = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 12)), max_size=60)


@given(occurrences)
def test_groups_that_share_a_key_never_cross_splits(pairs: list[tuple[int, int]]) -> None:
    names = [f"g{number * 7919 % 20:02d}" for number in range(20)]
    groups, keys = np.array(pairs, np.int64).reshape(-1, 2).T
    heads, split = splits.assign(names, groups, keys)

    parent = list(range(20))  # joined one by one, as a check on the vectorised join

    def root(group: int) -> int:
        return group if parent[group] == group else root(parent[group])

    for (group_a, key_a), (group_b, key_b) in itertools.combinations(pairs, 2):
        if key_a == key_b != 0:
            parent[root(group_a)] = root(group_b)
    for a, b in itertools.combinations(range(20), 2):
        assert (heads[a] == heads[b]) == (root(a) == root(b))
    for group in range(20):
        members = [names[other] for other in range(20) if root(other) == root(group)]
        assert names[heads[group]] == min(members)
        assert split[group] == splits.split_of(min(members))


@given(occurrences.flatmap(lambda pairs: st.tuples(st.just(pairs), st.permutations(pairs))))
def test_order_of_occurrences_does_not_matter(both: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    names = [f"g{number:02d}" for number in range(20)]
    results = []
    for given_pairs in both:
        groups, keys = np.array(given_pairs, np.int64).reshape(-1, 2).T
        results.append(splits.assign(names, groups, keys))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_evaluation_prompts_are_committed_hashes() -> None:
    prompts = splits.evaluation_prompts()
    assert len(prompts) > 4000
    assert all(re.fullmatch(r"[0-9a-f]{12}", prompt) for prompt in prompts)


def test_is_evaluation_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    known = splits.norm("Sort these seven bridges by length, please.")
    digests = frozenset(hashlib.sha1(text.encode()).hexdigest()[:12] for text in (known, "hi"))
    monkeypatch.setattr(splits, "evaluation_prompts", lambda: digests)
    assert splits.is_evaluation_prompt(known)
    assert not splits.is_evaluation_prompt(known + " now")
    assert not splits.is_evaluation_prompt("hi")  # too short to mean anything
