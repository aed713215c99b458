"""One client moves the predictions of the others no further than stated, and the bound never ends learning."""

import random
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_predictions import CONFIG, KNOWN, corrector, lognormal

from mope import lessons
from mope.lessons import FREE, MAX_AGE_S, NEWEST, SHARE, SLACK, Lessons, Verdict
from mope.time_periods import Target

NOW, TARGET = 1.8e9, Target("a")
MEDIANS = np.geomspace(30, 1000, 12)
FACTOR = 2.5  # the promise: one client of ten or more, with a quarter of at least 200 requests, moves means by less


def admit(known, client, num=1, start=NOW, is_long=False, target=TARGET):
    return [known.admit(target, client, start + number, is_long=is_long) for number in range(num)]


# -- the stated factor

multiples = st.sampled_from([0.001, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 11.0, 15.0, 30.0, 1e5])
arms = st.lists(st.tuples(multiples, st.booleans(), st.integers(1, 5)), min_size=1, max_size=3)


def serve(num_requests, share, arms, *, only_above=0.0, in_a_row=False, num_honest=9, seed=0):
    """The mean at `MEDIANS` after requests, of which one client sends a share, with lengths of its choice.

    It chooses multiples of the predicted median, and whether the answer is cut there; or one multiple alone for
    requests whose predicted median is above some length.
    """
    rng, taught = np.random.default_rng(seed), corrector()
    order = np.arange(num_requests) >= (1 - share) * num_requests if in_a_row else rng.random(num_requests) < share
    weights = np.array([weight for *_, weight in arms], dtype=float)
    for number, hostile in enumerate(order):
        median = float(np.exp(rng.uniform(np.log(30), np.log(1000))))
        length, chosen = median * np.exp(rng.normal(0, 0.75)), rng.choice(len(arms), p=weights / weights.sum())
        client, cut = f"honest-{rng.integers(num_honest)}", False
        if hostile:
            multiple, cut, _ = arms[chosen] if median > only_above else (1.0, False, 1)
            client, length = "hostile", multiple * median
        tokens = min(max(1, round(length)), 131_072)
        taught.observe(lognormal(median), KNOWN, tokens, censored=cut, time_s=NOW + 5 * number, client=client)
    taught.recalibrator.to_json()
    return np.array([taught.expected(lognormal(median), KNOWN).mean for median in MEDIANS])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(200, 500),
    st.floats(0.02, 0.25),
    arms,
    st.sampled_from([0.0, 100.0, 300.0, 600.0]),
    st.booleans(),
    st.integers(9, 30),
    st.integers(0, 3),
)
def test_one_client_moves_the_mean_by_a_bounded_factor(
    num_requests, share, arms, only_above, in_a_row, num_honest, seed
):
    options = {"num_honest": num_honest, "seed": seed}
    as_it_is = serve(num_requests, 0.0, arms, **options)
    moved = serve(num_requests, share, arms, only_above=only_above, in_a_row=in_a_row, **options) / as_it_is
    assert moved.max() < FACTOR
    assert moved.min() > 1 / FACTOR


@pytest.mark.parametrize("cut", [False, True])
def test_a_quarter_of_very_long_answers_moves_little(cut):
    """They moved it 20 times before."""
    arms = [(300.0, cut, 1)]
    moved = serve(1500, 0.25, arms) / serve(1500, 0.0, arms)
    assert moved.max() < 1.6


def test_answers_of_one_client_in_a_row_are_no_change_of_the_llm():
    arms = [(300.0, False, 1)]
    moved = serve(400, 0.25, arms, num_honest=30, in_a_row=True) / serve(400, 0.0, arms, num_honest=30)
    assert moved.max() < FACTOR


def test_a_flood_teaches_no_more_where_others_taught_before():
    taught, rng = corrector(), np.random.default_rng(0)
    means = []
    for number in range(2400):
        if number == 400:
            means.append(taught.expected(lognormal(200), KNOWN).mean)
        hostile = number >= 400 and rng.random() < 0.9
        tokens, client = (60_000, "hostile") if hostile else (round(200 * np.exp(rng.normal(0, 0.75))), rng.integers(9))
        taught.observe(lognormal(200), KNOWN, max(tokens, 1), censored=False, time_s=NOW + number, client=f"{client}")
    assert taught.expected(lognormal(200), KNOWN).mean < 1.6 * means[0]


# -- what is still learned


@pytest.mark.parametrize("num_clients", [1, 2, 10, 40])
@pytest.mark.parametrize("factor", [0.25, 4.0, 20.0])
def test_an_llm_that_answers_longer_is_learned_as_without_clients(num_clients, factor):
    means = {}
    for clients in (None, num_clients):
        rng, taught = np.random.default_rng(0), corrector()
        for number in range(200):
            median = float(np.exp(rng.uniform(np.log(30), np.log(1000))))
            tokens = max(1, round(factor * median * np.exp(rng.normal(0, 0.75))))
            client = f"c{rng.integers(num_clients)}"
            taught.observe(
                lognormal(median), KNOWN, tokens, censored=False, time_s=NOW + number, client=clients and client
            )
        taught.recalibrator.to_json()
        means[clients] = taught.expected(lognormal(200), KNOWN).mean
    assert means[num_clients] == pytest.approx(means[None], rel=0.0 if num_clients == 1 else 0.06)
    assert means[num_clients] == pytest.approx(factor * 200 * np.exp(0.75**2 / 2), rel=0.12)


def test_what_one_client_alone_teaches_is_what_nobody_in_particular_teaches():
    known, named = corrector(), corrector()
    rng = np.random.default_rng(3)
    for number in range(1000):
        tokens, cut = int(np.exp(rng.normal(5, 2))) + 1, bool(rng.random() < 0.2)
        known.observe(lognormal(200), KNOWN, tokens, censored=cut, time_s=NOW + number)
        assert named.observe(lognormal(200), KNOWN, tokens, censored=cut, time_s=NOW + number, client="one")
    for one in (known, named):
        one.recalibrator.to_json()
    assert np.array_equal(*(one.correct(lognormal(150), KNOWN) for one in (known, named)))
    assert (named.recalibrator.num_refused, named.recalibrator.num_clipped) == (0, 0)


def test_long_answers_that_all_clients_have_count_in_full():
    taught, rng = corrector(), random.Random(0)
    for number in range(1200):
        tokens = 6000 if rng.random() < 0.1 else 200
        taught.observe(
            lognormal(200), KNOWN, tokens, censored=False, time_s=NOW + number, client=f"c{rng.randrange(12)}"
        )
    assert taught.recalibrator.num_clipped < 0.3 * 120


# -- shares

offers = st.lists(
    st.tuples(st.integers(0, 14), st.integers(1, 60), st.booleans(), st.sampled_from([0.0, 1.0, 3600.0, 86_400.0])),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(offers)
def test_no_client_has_more_than_its_share_and_someone_can_always_teach(offers):
    known, time_s = Lessons(), NOW
    learned: list[tuple[float, int]] = []
    for client, number, is_long, wait_s in offers:
        for _ in range(number):
            time_s += wait_s
            newest = [one for one in learned[-NEWEST:] if one[0] >= time_s - MAX_AGE_S]
            own = sum(who == client for _, who in newest)
            clients = {who for _, who in newest} | {client}
            if known.admit(TARGET, str(client), time_s, is_long=is_long) is not Verdict.REFUSE:
                learned.append((time_s, client))
                assert own < max(FREE, SLACK + max(SHARE, 1 / len(clients)) * len(newest))
            else:
                assert own >= FREE
                assert len(clients) > 1
    present = {who for _, who in learned[-NEWEST:]}
    if present:  # of those that taught, one at least may go on
        assert any(
            known.admit(TARGET, str(client), time_s, is_long=False) is not Verdict.REFUSE for client in sorted(present)
        )


@pytest.mark.parametrize("num_clients", [2, 3, 9, 10, 11, 50])
def test_clients_that_send_alike_lose_little(num_clients):
    known, rng = Lessons(), random.Random(1)
    verdicts = [admit(known, str(rng.randrange(num_clients)), start=NOW + 3 * n)[0] for n in range(4000)]
    assert verdicts.count(Verdict.REFUSE) < 0.15 * len(verdicts)


def test_who_is_left_alone_waits_for_a_day_at_most():
    known = Lessons()
    for number, client in zip(range(500), cycle("abcdefghij"), strict=False):
        admit(known, client, start=NOW + number)
    refused = admit(known, "a", 300, start=NOW + 500)
    assert refused.count(Verdict.REFUSE) > 290
    after = admit(known, "a", 1000, start=NOW + 500 + MAX_AGE_S)
    assert Verdict.REFUSE not in after


def test_a_heavy_client_among_light_ones_teaches_some_each_day():
    known = Lessons()
    for day in range(3):
        start = NOW + day * 1.1 * MAX_AGE_S
        for client in "abcde":
            admit(known, client, start=start)
        assert admit(known, "heavy", 2 * FREE, start=start).count(Verdict.LEARN) == FREE


def test_targets_are_bounded_and_apart(monkeypatch):
    monkeypatch.setattr(lessons, "MAX_TARGETS", 3)
    known = Lessons()
    for number in range(10):
        for client, count in (("a", 60), ("b", 1), ("a", 60)):
            admit(known, client, count, target=Target(str(number)))
    assert len(known._targets) == 3
    assert admit(known, "a", target=Target("9")) == [Verdict.REFUSE]
    assert admit(known, "a", target=Target("0")) == [Verdict.LEARN]


def test_no_name_of_a_client_is_kept():
    taught = corrector()
    taught.observe(lognormal(200), KNOWN, 100, censored=False, client="acme/alice")
    assert "alice" not in str(taught.recalibrator.to_json())
    assert not any(
        isinstance(who, str) for newest in taught.recalibrator._lessons._targets.values() for who in newest.held
    )


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9000), st.sampled_from("abc"), st.booleans()), max_size=60), st.integers(0, 60)
)
def test_replicas_that_learned_from_clients_merge_exactly_in_any_order(stream, cut):
    def merged(parts):
        replicas = []
        for part in parts:
            replicas.append(corrector().recalibrator)
            for number, (tokens, client, censored) in part:
                replicas[-1].observe(
                    np.asarray(CONFIG.edges), lognormal(200), TARGET, tokens, censored, NOW + 30 * number, client=client
                )
        replicas[0].merge(replicas[1])
        return replicas[0].to_json()

    numbered = list(enumerate(stream))
    parts = [numbered[:cut], numbered[cut:]]
    assert merged(parts) == merged(parts[::-1])
