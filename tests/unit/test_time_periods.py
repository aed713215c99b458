"""Counts per target and period: what is kept depends on the set of observations alone, and is bounded."""

import json
from collections import Counter, defaultdict
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope import time_periods
from mope.errors import DataError
from mope.time_periods import LONG_PERIOD_S, SHORT_PERIOD_S, Target, TimePeriods

NUM_CODES = 5
TARGETS = [Target("a", family="f"), Target("a", "thinking", "f"), Target("b", "", "f", known=False), Target()]

observations = st.lists(
    st.tuples(
        st.sampled_from(TARGETS),
        st.one_of(st.integers(0, 8 * SHORT_PERIOD_S), st.integers(0, 5 * LONG_PERIOD_S)),
        st.integers(0, NUM_CODES - 1),
    ),
    max_size=60,
)
bounds = st.fixed_dictionaries(
    {
        "SHORT_PERIODS": st.integers(1, 4),
        "LONG_PERIODS": st.integers(1, 6),
        "MAX_CELLS": st.integers(1, 12),
        "MAX_POOL_CELLS": st.integers(1, 12),
    }
)


def observed(stream):
    kept = TimePeriods()
    for target, time_s, code in stream:
        kept.add(target, time_s, code, np.arange(3) + code)
    return kept


def expected_cells(stream, period_s, num_periods, max_cells):
    """By the book: the newest periods of each target, then the newest of all of these."""
    counts = defaultdict(Counter)
    for target, time_s, code in stream:
        counts[time_s // period_s, target][code] += 1
    of_target = defaultdict(list)
    for period, target in sorted(counts, reverse=True):
        of_target[target].append((period, target))
    newest = sorted((cell for cells in of_target.values() for cell in cells[:num_periods]), reverse=True)[:max_cells]
    return {cell: dict(counts[cell]) for cell in newest}


def all_codes(saved):
    kept = (cell for entry in saved for cell in entry["long_epochs"])
    counts = (pair for cell in kept for pair in zip(cell["codes"], cell["counts"], strict=True))
    return (code for code, count in counts for _ in range(count))


def cells(saved, name):
    return {
        (cell["epoch"], Target(*(entry[name] for name in Target._fields))): dict(
            zip(cell["codes"], cell["counts"], strict=True)
        )
        for entry in saved
        for cell in entry[name]
    }


@settings(max_examples=150)
@given(observations, bounds, st.randoms(use_true_random=False))
def test_what_is_kept_is_the_newest_whatever_the_order(stream, bound, random):
    with mock.patch.multiple(time_periods, **bound):
        kept = observed(stream)
        shuffled = list(stream)
        random.shuffle(shuffled)
        again = observed(shuffled)
    saved = kept.to_json()
    most = bound["MAX_CELLS"]
    assert cells(saved["targets"], "short_epochs") == expected_cells(
        stream, SHORT_PERIOD_S, bound["SHORT_PERIODS"], most
    )
    assert cells(saved["targets"], "long_epochs") == expected_cells(stream, LONG_PERIOD_S, bound["LONG_PERIODS"], most)
    assert json.dumps(saved) == json.dumps(again.to_json())
    # what made room is in the pools, as long as it is not too old there
    kept_codes = Counter(code for name in ("targets", "pools", "all") for code in all_codes(saved[name]))
    assert kept_codes <= Counter(code for _, _, code in stream)
    if bound["LONG_PERIODS"] >= len({time_s // LONG_PERIOD_S for _, time_s, _ in stream}):
        assert kept_codes == Counter(code for _, _, code in stream)


@settings(max_examples=150)
@given(st.lists(observations, min_size=3, max_size=3), bounds)
def test_merging_is_observing_in_one_place(streams, bound):
    with mock.patch.multiple(time_periods, **bound):
        in_one_place = observed([one for stream in streams for one in stream])
        left = observed(streams[0])
        left.merge(observed(streams[1]))
        left.merge(observed(streams[2]))
        right = observed(streams[2])
        right.merge(observed(streams[1]))
        outer = observed(streams[0])
        outer.merge(right)
        right.merge(observed(streams[0]))
    expected = json.dumps(in_one_place.to_json())
    assert json.dumps(left.to_json()) == expected
    assert json.dumps(outer.to_json()) == expected
    assert json.dumps(right.to_json()) == expected


@settings(max_examples=60)
@given(observations, bounds)
def test_saved_and_restored_it_is_the_same_to_the_byte(stream, bound):
    with mock.patch.multiple(time_periods, **bound):
        text = json.dumps(observed(stream).to_json())
        assert json.dumps(TimePeriods.from_json(json.loads(text), NUM_CODES, 3).to_json()) == text


@settings(max_examples=100)
@given(observations)
def test_batches_hold_each_observation_once_and_the_newest_first(stream):
    with mock.patch.object(time_periods, "LONG_PERIODS", 10):
        kept = observed(stream)
    for target in TARGETS:
        own = [(time_s, code) for one, time_s, code in stream if one == target]
        batches = list(kept.batches(target))
        seen = np.zeros(NUM_CODES)
        for batch in batches:
            np.add.at(seen, batch.codes, batch.counts)
        assert seen.tolist() == [sum(code == one for _, code in own) for one in range(NUM_CODES)]
        total = np.sum([batch.expected for batch in batches], axis=0) if batches else np.zeros(3)
        assert total.tolist() == np.sum([np.arange(3) + code for _, code in own] or [np.zeros(3)], axis=0).tolist()
        assert kept.total(target) == len(own)
        assert (target in kept.targets()) == bool(own)
        if own:
            newest = max(time_s for time_s, _ in own) // SHORT_PERIOD_S
            first = Counter(code for time_s, code in own if time_s // SHORT_PERIOD_S == newest)
            assert dict(zip(batches[0].codes.tolist(), batches[0].counts.tolist(), strict=True)) == first
            assert kept.last_s(target) == (newest + 1) * SHORT_PERIOD_S


def test_a_flood_of_names_is_bounded_and_the_newest_stay():
    with mock.patch.object(time_periods, "MAX_CELLS", 50):
        kept = TimePeriods()
        for number in range(3000):
            kept.add(Target(f"llm-{number}"), number * SHORT_PERIOD_S, 0, np.ones(3, dtype=np.int64))
        assert len(kept) == 50
        assert set(kept.targets()) == {Target(f"llm-{number}") for number in range(2950, 3000)}
        assert len(kept._short._oldest) <= 100


@pytest.mark.parametrize("time_s", [-1, float("nan"), float("inf"), 2**50, "soon", None])
def test_what_is_no_time_is_refused(time_s):
    with pytest.raises(DataError, match="time_s is in seconds since 1970; got"):
        TimePeriods().add(Target(), time_s, 0, np.ones(3, dtype=np.int64))
