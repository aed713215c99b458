"""Learning while serving: it converges, never breaks order, forgets, merges and is restored exactly."""

import json
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import least_ratio

from mope import recalibration, time_periods
from mope.errors import ArtifactError, ConfigError, DataError
from mope.grid import body_edges, cdf_at, quantiles_at, tail_edges
from mope.recalibration import Recalibrator
from mope.time_periods import Target

EDGES = np.concatenate([body_edges(4000, 60), tail_edges(4000.5, 131_072, 12)])
MIDDLE = np.log(np.sqrt(EDGES[:-1] * EDGES[1:]))
LEVELS = np.array([0.01, 0.1, 0.5, 0.9, 0.99])
A, B, UNNAMED, NEW = Target("a", known=False), Target("b", known=False), Target(), Target("new", known=False)
HOUR, DAY = 3600, 86_400
NOW = 20_000 * DAY


def lognormal(median, deviation=0.5):
    """Cumulative probabilities at the edges."""
    mass = np.exp(-0.5 * ((MIDDLE - np.log(median)) / deviation) ** 2) * np.diff(np.log(EDGES))
    cumulative = np.concatenate([[0.0], mass.cumsum()])
    return cumulative / cumulative[-1]


def quantile(recalibrator, target, stated=100, level=0.5):
    edges, cumulative = recalibrator.correct(EDGES, lognormal(stated), target)
    return float(quantiles_at(edges, cumulative[None], np.array([level]))[0, 0])


def serve(recalibrator, target, factor, num_requests, seed=0, *, deviation=0.5, start=NOW, step=20.0, slope=0.0, cut=0):
    """Teach an LLM whose answers are `factor` times longer than predicted; a share `cut` is aborted on the way."""
    rng = np.random.default_rng(seed)
    for position, stated in enumerate(np.exp(rng.normal(np.log(80), 0.7, num_requests))):
        actual = max(1, round(factor * stated * (stated / 80) ** slope * np.exp(rng.normal(0, deviation))))
        limit = rng.exponential(200) + 1 if rng.random() < cut else np.inf
        recalibrator.observe(
            EDGES, lognormal(stated), target, min(actual, limit), actual > limit, start + step * position
        )


targets = st.sampled_from([UNNAMED, A, Target("a", "thinking", known=False), Target("c", family="f"), B])
observations = st.lists(
    st.tuples(
        targets,
        st.one_of(st.integers(1, 6000), st.sampled_from([1, 225, 100_000, 10**12])),
        st.booleans(),
        st.floats(1, 4000),
        st.one_of(st.integers(0, 3 * HOUR), st.integers(0, 20 * DAY)),
    ),
    max_size=40,
)


def observed(stream, recalibrator=None):
    recalibrator = Recalibrator() if recalibrator is None else recalibrator
    for target, actual, censored, stated, time_s in stream:
        recalibrator.observe(EDGES, lognormal(stated), target, actual, censored, time_s)
    return recalibrator


def dumped(recalibrator):
    return json.dumps(recalibrator.to_json(), allow_nan=False)


@settings(max_examples=80, deadline=None)
@given(observations, targets, st.floats(2, 3000), st.sampled_from([0.1, 0.5, 2.0]))
def test_any_stream_leaves_a_distribution(stream, target, stated, deviation):
    with np.errstate(all="raise", under="ignore"):
        recalibrator = observed(stream, Recalibrator({"": [(1.0, 1.0), (20.0, 0.5)]}))
        edges, corrected = recalibrator.correct(EDGES, lognormal(stated, deviation), target)
        quantiles = quantiles_at(edges, corrected[None], LEVELS)[0]
        recalibrator.summary()
    assert edges[: len(EDGES)].tolist() == EDGES.tolist()
    assert np.all(np.diff(edges) > 0)
    assert corrected.shape == edges.shape
    assert np.all(np.diff(corrected) >= 0)
    assert corrected[0] == 0.0
    assert corrected[-1] == 1.0
    assert np.all(np.diff(quantiles) >= 0)
    assert quantiles[0] > 0
    assert np.isfinite(quantiles).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(observations, min_size=3, max_size=3), st.booleans())
def test_merging_is_observing_in_one_place(streams, is_bounded):
    tight = {"SHORT_PERIODS": 2, "LONG_PERIODS": 2, "MAX_CELLS": 5, "MAX_POOL_CELLS": 3}
    bound = tight if is_bounded else {"MAX_CELLS": 10_000}
    with mock.patch.multiple(time_periods, **bound):
        in_one_place = observed([one for stream in streams for one in stream])
        merged = observed(streams[2])
        merged.correct(EDGES, lognormal(70), A)  # what was worked out before must not linger
        merged.merge(observed(streams[0]))
        merged.merge(observed(streams[1]))
    assert dumped(merged) == dumped(in_one_place)
    for target in (A, B, UNNAMED, NEW):
        one, other = (each.correct(EDGES, lognormal(70), target) for each in (merged, in_one_place))
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


@settings(max_examples=40, deadline=None)
@given(observations, observations)
def test_saved_and_restored_it_goes_on_exactly(before, after):
    first = observed(before, Recalibrator({"": [(2.5, 1.0)]}))
    first.correct(EDGES, lognormal(70), A)
    text = dumped(first)
    second = Recalibrator({"": [(2.5, 1.0)]})
    second.restore(json.loads(text))
    assert dumped(second) == text
    for each in (first, second):
        each.correct(EDGES, lognormal(70), A)
        observed(after, each)
    one, other = (each.correct(EDGES, lognormal(70), A) for each in (first, second))
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])
    assert dumped(second) == dumped(first)


@pytest.mark.parametrize(
    ("num_observed", "changes"), [(1, False), (15, False), (16, True), (28, True), (250, True), (630, True)]
)
def test_saving_puts_into_force_what_was_put_off_which_is_an_eighth_at_most(num_observed, changes):
    """Before it, an LLM's correction is the one after all but the newest eighth of its answers, 50 at most."""
    rng = np.random.default_rng(1)
    stream = [(A, int(tokens), False, 80.0, NOW + 20 * k) for k, tokens in enumerate(rng.lognormal(5, 1, num_observed))]

    def said(recalibrator):
        return np.stack(recalibrator.correct(EDGES, lognormal(70), A)).tolist()

    serving = Recalibrator()
    said(serving)  # corrections are worked out for those that were asked for
    before = said(observed(stream, serving))
    serving.to_json()
    assert said(serving) == said(observed(stream))
    assert (before != said(serving)) == changes
    put_off = min(max(num_observed // 8, 1), 50) - 1
    assert any(before == said(observed(stream[: num_observed - late])) for late in range(put_off + 1))


@settings(max_examples=30, deadline=None)
@given(observations)
def test_memory_is_bounded(stream):
    with mock.patch.multiple(time_periods, SHORT_PERIODS=2, LONG_PERIODS=3, MAX_CELLS=4):
        saved = observed(stream).to_json()["targets"]
    for name, most in (("short_epochs", 2), ("long_epochs", 3)):
        assert all(len(entry[name]) <= most for entry in saved)
        assert sum(len(entry[name]) for entry in saved) <= 4


def test_names_that_are_only_asked_for_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(recalibration, "MAX_DERIVED", 20)
    recalibrator = Recalibrator()
    serve(recalibrator, A, 3.0, 30)
    for number in range(200):
        recalibrator.correct(EDGES, lognormal(100), Target(f"llm-{number}"))
        recalibrator.observe(EDGES, lognormal(100), Target(f"other-{number}"), 100, False, NOW)
    assert len(recalibrator._derived) <= 21
    assert len(recalibrator._profiles) <= 21


def test_an_llm_that_made_room_is_still_told_of_by_its_family():
    with mock.patch.multiple(time_periods, MAX_CELLS=20):
        recalibrator = Recalibrator()
        for number in range(60):  # each of them idle after a while
            target = Target(f"own-{number:02}", family="own", known=False)
            serve(recalibrator, target, 4.0, 10, seed=number, start=NOW + number * DAY // 10)
        for number in range(60, 90):
            serve(recalibrator, Target(f"x-{number}", family=f"x{number}", known=False), 1.0, 5, start=NOW + 7 * DAY)
        assert len(recalibrator._periods) == 20
        assert not any(target.family == "own" for target in recalibrator._periods.targets())
        new = quantile(recalibrator, Target("own-new", family="own", known=False))
        other = quantile(recalibrator, Target("other-new", family="other", known=False))
    assert new == pytest.approx(400, rel=0.3)
    assert other < 0.6 * new


def test_a_new_name_costs_no_more_beside_thousands_of_others():
    raw = lognormal(100)

    def busy(num_names):
        recalibrator = Recalibrator()
        for number in range(num_names):
            target = Target(f"f{number % 7}-{number}", family=f"f{number % 7}", known=False)
            recalibrator.correct(EDGES, raw, target)
            recalibrator.observe(EDGES, raw, target, 150, False, NOW + number)
        fresh = iter(range(10**6))

        def some_new_names():
            for _ in range(20):
                target = Target(f"f1-new-{next(fresh)}", family="f1", known=False)
                recalibrator.correct(EDGES, raw, target)
                recalibrator.observe(EDGES, raw, target, 150, False, NOW + 10_000)

        return recalibrator, some_new_names

    few, many = busy(60), busy(3000)
    assert len(many[0]._periods) <= time_periods.MAX_CELLS
    assert least_ratio(many[1], few[1], 2.5) < 2.5  # about 1.2; it was above 10


def test_nothing_observed_changes_nothing():
    raw = lognormal(100)
    edges, cumulative = Recalibrator().correct(EDGES, raw, A)
    assert edges is EDGES
    assert cumulative is raw


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 5.0, 30.0])
def test_an_llm_of_other_verbosity_is_followed(factor):
    recalibrator = Recalibrator()
    serve(recalibrator, A, factor, 400)
    assert quantile(recalibrator, A) == pytest.approx(factor * 100, rel=0.12)


def test_a_few_answers_tell_a_reasoning_llm():
    recalibrator = Recalibrator()
    serve(recalibrator, A, 30.0, 5)
    assert quantile(recalibrator, A) > 1500
    assert quantile(recalibrator, A, stated=10_000) > EDGES[-1]  # above the grid
    assert quantile(recalibrator, A, stated=10_000, level=0.9) < 3_000_000


def test_answers_that_do_not_depend_on_the_prompt_as_predicted():
    recalibrator = Recalibrator()
    serve(recalibrator, A, 1.0, 400, slope=-0.7, deviation=0.3)
    assert quantile(recalibrator, A, stated=40) == pytest.approx(40 * 2**0.7, rel=0.12)
    assert quantile(recalibrator, A, stated=320) == pytest.approx(320 / 4**0.7, rel=0.12)


def test_what_was_predicted_right_stays():
    recalibrator = Recalibrator()
    serve(recalibrator, A, 1.0, 400, seed=3)
    for stated in (20, 100, 500):
        _, corrected = recalibrator.correct(EDGES, lognormal(stated), A)
        assert np.abs(corrected - lognormal(stated)).max() < 0.06


@pytest.mark.parametrize("deviation", [0.25, 0.75])
def test_coverage_is_mended(deviation):
    """Lengths scatter half as much, or half as much again, as stated."""
    recalibrator = Recalibrator()
    serve(recalibrator, A, 1.0, 400, deviation=deviation)
    actual = np.exp(np.random.default_rng(5).normal(np.log(100), deviation, 4000))
    stated, (_, corrected) = lognormal(100), recalibrator.correct(EDGES, lognormal(100), A)
    before, after = ((cdf_at(EDGES, np.tile(one, (4000, 1)), actual) <= 0.9).mean() for one in (stated, corrected))
    assert abs(before - 0.9) > 0.08
    assert after == pytest.approx(0.9, abs=0.03)


def test_two_llms_are_told_apart():
    recalibrator = Recalibrator()
    for seed in range(10):
        serve(recalibrator, A, 5.0, 40, seed)
        serve(recalibrator, B, 0.5, 40, 100 + seed)
    assert quantile(recalibrator, A) == pytest.approx(500, rel=0.12)
    assert quantile(recalibrator, B) == pytest.approx(50, rel=0.12)


def test_modes_are_told_apart_and_related():
    recalibrator = Recalibrator()
    thinking = A._replace(mode="thinking")
    serve(recalibrator, A, 1.0, 200)
    before = quantile(recalibrator, thinking)
    serve(recalibrator, thinking, 12.0, 40)
    assert before == pytest.approx(100, rel=0.15)
    assert quantile(recalibrator, thinking) == pytest.approx(1200, rel=0.25)
    assert quantile(recalibrator, A) == pytest.approx(100, rel=0.12)


def test_an_unseen_llm_gets_what_all_llms_show():
    recalibrator = Recalibrator()
    for number in range(8):
        serve(recalibrator, Target(f"llm-{number}", known=False), 3.0, 60, number)
    assert quantile(recalibrator, NEW) == pytest.approx(300, rel=0.15)
    assert quantile(recalibrator, UNNAMED) == pytest.approx(300, rel=0.15)


def test_an_unseen_llm_gets_above_all_what_its_family_shows():
    recalibrator = Recalibrator()
    for number in range(4):
        serve(recalibrator, Target(f"qwen-{number}", family="qwen"), 6.0, 60, number)
        serve(recalibrator, Target(f"llama-{number}", family="llama"), 1.0, 60, 10 + number)
    assert quantile(recalibrator, Target("qwen-new", family="qwen")) == pytest.approx(600, rel=0.2)
    assert quantile(recalibrator, Target("llama-new", family="llama")) == pytest.approx(100, rel=0.15)


def test_llms_of_different_lengths_do_not_make_a_muddle_for_a_new_one():
    """Twenty answers of a new LLM count more than that the others have two humps."""
    recalibrator = Recalibrator()
    for number in range(6):
        serve(recalibrator, Target(f"short-{number}", known=False), 1.0, 100, number)
        serve(recalibrator, Target(f"long-{number}", known=False), 20.0, 100, 10 + number)
    serve(recalibrator, NEW, 20.0, 20, 99)
    low, median, high = (quantile(recalibrator, NEW, level=level) for level in (0.05, 0.5, 0.95))
    assert median == pytest.approx(2000, rel=0.25)
    assert low > 2000 / 5
    assert high < 2000 * 5


def test_an_llm_without_answers_follows_those_of_others_while_it_is_asked_for():
    recalibrator = Recalibrator()
    for number in range(8):
        before = quantile(recalibrator, NEW)
        serve(recalibrator, Target(f"llm-{number}", known=False), 3.0, 20, number)
    assert quantile(recalibrator, NEW) > 1.5 * 100
    assert quantile(recalibrator, NEW) >= before > 100


@pytest.mark.parametrize("target", [UNNAMED, B])
def test_one_answer_of_another_llm_teaches_a_little(target):
    recalibrator = Recalibrator()
    recalibrator.observe(EDGES, lognormal(100), target, 500, False)
    assert len(recalibrator) == 1
    assert 100 < quantile(recalibrator, A) < 150


def test_a_stranger_s_answers_say_nothing_of_an_llm_that_the_predictor_knows():
    known, stranger = Target("known", known=True), Target("stranger", known=False)
    recalibrator = Recalibrator()
    before = [quantile(recalibrator, known, level=level) for level in LEVELS]
    serve(recalibrator, stranger, 8.0, 60)
    recalibrator.to_json()  # all is worked out anew
    assert [quantile(recalibrator, known, level=level) for level in LEVELS] == pytest.approx(before)
    assert quantile(recalibrator, Target("other", known=False)) > 1.3 * 100  # of another stranger it does
    relative = Target("known", family="k", known=True)
    for known_too, moves in ((False, False), (True, True)):  # a name in common is not enough
        serve(recalibrator, Target(f"k-{known_too}", family="k", known=known_too), 3.0, 60)
        recalibrator.to_json()
        assert (quantile(recalibrator, relative) > 1.3 * 100) == moves


def test_known_llms_move_another_when_they_agree():
    known = Target("known", known=True)
    one, many = Recalibrator(), Recalibrator()
    serve(one, Target("k0", known=True), 3.0, 60)
    for number in range(8):
        serve(many, Target(f"k{number}", known=True), 3.0, 60, seed=number)
    for recalibrator in (one, many):
        recalibrator.to_json()
    assert quantile(one, known) < 1.25 * 100
    assert quantile(one, known) < quantile(many, known) / 1.3


def test_an_llm_that_the_predictor_does_not_know_may_have_a_prior():
    recalibrator = Recalibrator({"": [(1.0, 0.7), (20.0, 0.3)], "thinking": [(20.0, 1.0)]})
    raw = lognormal(100)
    assert recalibrator.correct(EDGES, raw, A._replace(known=True))[1] is raw
    assert quantile(recalibrator, A) < 200
    assert quantile(recalibrator, A, level=0.9) > 1000
    assert quantile(recalibrator, A._replace(mode="thinking")) == pytest.approx(2000, rel=0.15)
    reasons = A._replace(kind="large reasoning")  # it thinks unless it is asked not to
    assert quantile(recalibrator, reasons) == pytest.approx(2000, rel=0.15)
    assert quantile(recalibrator, reasons._replace(mode="no thinking+tools")) < 200
    serve(recalibrator, A, 1.0, 40)
    assert quantile(recalibrator, A) == pytest.approx(100, rel=0.2)
    assert quantile(recalibrator, A, level=0.9) < 300


@pytest.mark.parametrize("pairs", [[], [(0.0, 1.0)], [(2.0, -1.0)], [(float("nan"), 1.0)]])
def test_a_prior_that_is_none_is_refused(pairs):
    with pytest.raises(ConfigError, match=r"prior of mode 'thinking': got .* expected pairs"):
        Recalibrator({"thinking": pairs})


def test_a_busy_server_forgets_within_an_hour():
    recalibrator = Recalibrator()
    serve(recalibrator, A, 1.0, 3000, step=2.0)
    serve(recalibrator, A, 5.0, 600, seed=1, start=NOW + 6000, step=2.0)
    assert quantile(recalibrator, A) == pytest.approx(500, rel=0.15)


def test_a_swapped_llm_is_noticed_within_two_periods():
    """Forty answers to the newest period say more than the four hundred before."""
    recalibrator = Recalibrator()
    serve(recalibrator, A, 1.0, 400, step=15.0)
    serve(recalibrator, A, 6.0, 40, seed=1, start=NOW + 10 * 600, step=15.0)
    assert quantile(recalibrator, A) == pytest.approx(600, rel=0.25)


def test_a_quiet_server_remembers_for_a_week():
    recalibrator = Recalibrator()
    serve(recalibrator, A, 4.0, 80, step=HOUR * 2.4)
    assert len(recalibrator) == 80
    assert recalibrator.summary()[0].window == 80
    assert quantile(recalibrator, A) == pytest.approx(400, rel=0.25)
    recalibrator.observe(EDGES, lognormal(100), A, 400, False, NOW + 30 * DAY)
    assert len(recalibrator) == 81 - 10  # the oldest day went


def test_one_odd_answer_moves_little():
    recalibrator = Recalibrator()
    recalibrator.observe(EDGES, lognormal(100), A, 10**9, False)
    assert quantile(recalibrator, A) < 200
    recalibrator = Recalibrator()
    serve(recalibrator, A, 2.0, 60)
    before = quantile(recalibrator, A)
    recalibrator.observe(EDGES, lognormal(100), A, 1, False, NOW)
    assert quantile(recalibrator, A) == pytest.approx(before, rel=0.05)


def test_outliers_do_not_move_the_median():
    recalibrator, rng = Recalibrator(), np.random.default_rng(0)
    for position in range(400):
        odd = rng.choice([50.0, 40.0]) if position % 10 == 0 else 1.0
        actual = max(1, round(100 * 2 * odd * np.exp(rng.normal(0, 0.5))))
        recalibrator.observe(EDGES, lognormal(100), A, actual, False, NOW + position)
    assert quantile(recalibrator, A) == pytest.approx(200, rel=0.15)


def test_aborted_answers_neither_pull_down_nor_push_up():
    recalibrator = Recalibrator()
    serve(recalibrator, A, 2.0, 400, cut=0.6)
    counts = recalibrator._read(recalibrator._periods.batches(A))
    assert counts.cut.sum() > 0.25 * counts.total
    assert quantile(recalibrator, A) == pytest.approx(200, rel=0.15)


def test_answers_that_are_all_cut_only_push_up():
    recalibrator = Recalibrator()
    for position in range(200):
        recalibrator.observe(EDGES, lognormal(100), A, 20, True, NOW + position)
    assert quantile(recalibrator, A) == pytest.approx(100, rel=0.1)
    for position in range(200):
        recalibrator.observe(EDGES, lognormal(100), A, 400, True, NOW + 600 * 50 + position)
    assert 400 < quantile(recalibrator, A) < 2000


def test_one_length_again_and_again():
    recalibrator = Recalibrator()
    for position, stated in enumerate(np.geomspace(20, 2000, 200)):
        recalibrator.observe(EDGES, lognormal(stated), A, 225, False, NOW + position)
    for stated in (50, 225, 1000):
        low, high = (quantile(recalibrator, A, stated, level) for level in (0.1, 0.9))
        assert low > 150
        assert high < 350


def test_unlike_the_number_of_observations_the_work_grows_slowly(monkeypatch):
    """A correction is worked out anew once per eighth more observations, then per 32."""
    fits, recalibrator, fit = [], Recalibrator(), recalibration.fit
    monkeypatch.setattr(recalibration, "fit", lambda *given: fits.append(1) or fit(*given))
    recalibrator.correct(EDGES, lognormal(100), A)
    serve(recalibrator, A, 2.0, 1000)
    assert 20 < len(fits) < 80
    done = len(fits)
    for _ in range(100):
        recalibrator.correct(EDGES, lognormal(100), A)
    assert len(fits) <= done + 1


def test_many_threads_leave_what_one_would():
    stream = [(Target(f"llm-{n % 3}"), 50 + n, n % 7 == 0, 100.0, NOW + 100 * n) for n in range(240)]
    shared = Recalibrator()

    def work(part):
        for one in stream[part::8]:
            observed([one], shared)
            edges, cumulative = shared.correct(EDGES, lognormal(100), one[0])
            assert len(edges) == len(cumulative)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert dumped(shared) == dumped(observed(stream))


def test_summary_says_what_was_learned():
    recalibrator = Recalibrator()
    serve(recalibrator, A, 4.0, 300, deviation=0.75)
    serve(recalibrator, B, 1.0, 30)
    first, second = recalibrator.summary()
    assert (first.target, second.target) == (A, B)
    assert (first.observations, second.observations) == (300, 30)
    assert first.factor == pytest.approx(4.0, rel=0.12)
    assert first.spread == pytest.approx(1.5, rel=0.2)
    assert first.slope == pytest.approx(1.0, abs=0.15)
    assert first.coverage_raw < 0.2
    assert first.coverage == pytest.approx(0.9, abs=0.02)
    assert first.last_s == pytest.approx(NOW + 300 * 20, abs=1200)
    assert second.coverage_raw == pytest.approx(0.9, abs=0.12)


def test_a_recalibrator_merged_with_itself_counts_twice():
    recalibrator = Recalibrator()
    serve(recalibrator, A, 2.0, 10)
    recalibrator.merge(recalibrator)
    assert len(recalibrator) == 20


def test_other_priors_cannot_be_merged():
    with pytest.raises(ConfigError, match="different priors can't be merged"):
        Recalibrator().merge(Recalibrator({"": [(2.0, 1.0)]}))


@pytest.mark.parametrize("actual", [0, -5, float("nan"), float("inf")])
def test_an_answer_without_tokens_is_refused(actual):
    with pytest.raises(DataError, match=f"at least 1 token; got {actual}"):
        Recalibrator().observe(EDGES, lognormal(100), A, actual, False)


@pytest.mark.parametrize("wrong", [np.full(len(EDGES), np.nan), np.linspace(0, 1, len(EDGES))[::-1]])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_distribution_is_refused_and_leaves_no_trace(wrong):
    recalibrator = Recalibrator()
    with pytest.raises(DataError, match="rise from 0 to 1"):
        recalibrator.observe(EDGES, wrong, A, 10, False)
    assert len(recalibrator) == 0


def saved_with(change):
    recalibrator = Recalibrator({"": [(2.0, 1.0)]})
    serve(recalibrator, A, 2.0, 3)
    saved = recalibrator.to_json()
    change(saved, saved["targets"][0], saved["targets"][0]["long_epochs"][0])
    return saved


@pytest.mark.parametrize(
    "change",
    [
        lambda saved, target, cell: saved.pop("targets"),
        lambda saved, target, cell: saved.update(targets=3),
        lambda saved, target, cell: saved.update(pools=3),
        lambda saved, target, cell: saved.update(all=[{}]),
        lambda saved, target, cell: target.update(kind=None),
        lambda saved, target, cell: target.update(llm=7),
        lambda saved, target, cell: target.update(known="yes"),
        lambda saved, target, cell: target.pop("mode"),
        lambda saved, target, cell: target.update(short_epochs=None),
        lambda saved, target, cell: cell.update(epoch=-1),
        lambda saved, target, cell: cell.update(epoch=2.5),
        lambda saved, target, cell: cell.update(counts=[0] * len(cell["counts"])),
        lambda saved, target, cell: cell.update(counts=[True] * len(cell["counts"])),
        lambda saved, target, cell: cell.update(counts=[1]),
        lambda saved, target, cell: cell.update(codes=[0] * len(cell["codes"])),
        lambda saved, target, cell: cell.update(codes=[10**9] * len(cell["codes"])),
        lambda saved, target, cell: cell.update(codes=[], counts=[]),
        lambda saved, target, cell: cell.update(expected=[1, 2]),
        lambda saved, target, cell: cell.update(expected=[0] * len(cell["expected"])),
        lambda saved, target, cell: cell.update(expected=[10**30] * len(cell["expected"])),
    ],
)
def test_what_was_not_saved_by_it_is_refused_in_one_line(change):
    with pytest.raises(ArtifactError, match=r"recalibration\.json can't be read: .+; copy the whole folder") as caught:
        Recalibrator().restore(saved_with(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
def test_what_an_older_version_saved_is_read(version):
    saved = dumped(observed([(A, 300, False, 80.0, 60), (B, 20, True, 80.0, 10 * DAY)]))
    older = json.loads(saved)
    for target in older["targets"]:
        for cell in (*target["short_epochs"], *target["long_epochs"]):
            cell["expected"] = cell["expected"][:96]
    recalibrator = Recalibrator()
    recalibrator.restore({**older, "version": version})
    assert dumped(recalibrator) == saved


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"version": 5}, "has version 5; this mope reads versions 2 to 4: update mope"),
        ({"": {"count": 1.0, "log_ratio": 0.0, "levels": []}}, "has version None; .* without what it had learned"),
        ([1], "has version None"),
        (None, "has version None"),
    ],
)
def test_another_version_is_refused(saved, message):
    with pytest.raises(ArtifactError, match=message):
        Recalibrator().restore(saved)
