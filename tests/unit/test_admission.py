"""Room in the KV cache by what is predicted, against a plain simulation step by step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mope.fairness.admission import fits, peak_kv_tokens

REQUESTS = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), max_size=12)


def peak_by_simulation(running):
    """Each request gains a token a step; one that has all of its own is gone in the next."""
    left, peak, step = list(running), 0, 0
    while left:
        step += 1
        peak = max(peak, sum(context + step for context, _ in left))
        left = [(context, more) for context, more in left if more > step]
    return peak


@given(REQUESTS)
def test_peak_is_that_of_the_simulation(running):
    assert peak_kv_tokens(running) == peak_by_simulation(running)


@given(REQUESTS, st.tuples(st.integers(0, 500), st.integers(1, 60)))
def test_a_request_fits_exactly_up_to_the_peak(running, candidate):
    peak = int(peak_kv_tokens([candidate, *running]))
    assert fits(candidate, running, peak)
    assert fits(candidate, running, peak - 1) == (not running)


def test_staggered_ends_leave_room_that_caps_would_not():
    running = [(100, 10.0)] * 5 + [(100, 200.0)]
    assert peak_kv_tokens(running) < sum(context + more for context, more in running)
    assert fits((100, 50.0), running, 800)
    assert not fits((100, 50.0), running, 800, margin=3.0)
