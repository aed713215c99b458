"""Turning a ranker's scores and a frozen encoder's output into what baselines need."""

from __future__ import annotations

import numpy as np

from mope.training.compare import tokens_of_scores


def test_scores_become_tokens_and_keep_their_order() -> None:
    rng = np.random.default_rng(0)
    tokens = np.exp(rng.normal(5, 1, 2000))
    scores = 0.7 * np.log(tokens) + rng.normal(0, 0.5, 2000)
    wanted = rng.normal(scores.mean(), scores.std(), 500)
    found = tokens_of_scores(scores, tokens, wanted)
    assert np.array_equal(np.argsort(found), np.argsort(wanted))


def test_tokens_of_scores_are_close_to_the_truth_where_scores_say_it_all() -> None:
    tokens = np.geomspace(5, 2000, 400)
    found = tokens_of_scores(np.log(tokens), tokens, np.log(tokens))
    assert np.abs(found / tokens - 1).max() < 0.05


def test_scores_beyond_what_was_seen_stay_within_the_seen_lengths() -> None:
    tokens = np.geomspace(5, 2000, 400)
    low, high = tokens_of_scores(np.log(tokens), tokens, np.array([-50.0, 50.0]))
    assert 0 < low <= 5
    assert high <= 2001
