"""Formulas of charges by hand, and what the cost estimator makes of numbers from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope import LengthPredictor
from mope.errors import UserError
from mope.fairness import IDLE, Charge, CostEstimator, FairnessConfig, Load, MetricsMapper, load_profile
from mope.fairness.charges import MAX_TOKENS, UNIT, Service, charge, rfc, ufc, weighted_tokens
from mope.fairness.profiles import list_profiles

SERVED = Service(
    prompt_tokens=100,
    cached_tokens=40,
    response_tokens=50.0,
    latency_s=10.0,
    idle_latency_s=2.0,
    tokens_per_s=5.0,
    gpu_utilization=0.25,
)
W = 60 + 2 * 50  # the cached tokens are free


@pytest.mark.parametrize(
    ("variant", "amount"),
    [("discount", W / (1 + 0.1 * 10)), ("subtract", W - 1.0), ("slowdown", W / (1 + 0.1 * 4)), ("tokens", W)],
)
def test_user_counter(variant, amount):
    assert ufc(SERVED, FairnessConfig(ufc=variant)) == pytest.approx(amount, rel=1e-15)


@pytest.mark.parametrize(
    ("variant", "amount"), [("product", 1.25), ("sum", 5 / 50 + 0.25), ("share", 0.25), ("gpu-seconds", 2.5)]
)
def test_resource_counter(variant, amount):
    assert rfc(SERVED, FairnessConfig(rfc=variant)) == pytest.approx(amount, rel=1e-15)


def test_subtracting_never_pays_out():
    assert ufc(SERVED, FairnessConfig(ufc="subtract", delta=100)) == 0


def test_score_is_the_weighted_sum():
    config = FairnessConfig(alpha=0.6, beta=0.4, ufc="discount", rfc="product")
    booked = charge(SERVED, config, 30.0)
    assert booked == Charge(W * UNIT, 80 * UNIT, int(1.25 * UNIT), int((0.6 * 80 + 0.4 * 30 * 1.25) * UNIT + 0.5))


def test_nothing_is_free():
    config = FairnessConfig(ufc="subtract", delta=1000, beta=0, alpha=1)
    assert charge(SERVED, config, 1.0).hf == W * UNIT // 1000


@given(st.floats(0, 1e7), st.floats(0, 1e7), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_score_rises_with_both_counters(tokens, more_tokens, share, more_share, alpha):
    config = FairnessConfig(alpha=alpha, beta=1 - alpha, ufc="tokens", rfc="share")
    low = charge(Service(0, 0, tokens, gpu_utilization=share), config, 7.0).hf
    high = charge(Service(0, 0, tokens + more_tokens, gpu_utilization=share + more_share), config, 7.0).hf
    assert high >= low
    if alpha * more_tokens > 1:
        assert high > low


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1e6))
def test_cached_tokens_lower_the_price_and_never_below_nothing(prompt, cached, response):
    config = FairnessConfig(cached_weight=0.1)
    price = weighted_tokens(Service(prompt, cached, response), config)
    assert 2 * response <= price <= prompt + 2 * response


def test_amounts_are_whole_millionths():
    config = FairnessConfig(alpha=1, beta=0, response_weight=1)
    booked = [charge(Service(0, 0, amount), config, 1.0).service for amount in (0, 1, 0.1, 1e-7, 6e-7, 2e13)]
    assert booked == [0, UNIT, 100_000, 0, 1, 2 * 10**19]


# -- the estimator


def test_estimate_is_what_the_mapper_says():
    estimator = CostEstimator("a100-80gb/llama-2-7b")
    load = Load(num_running=8, context_tokens=4000)
    cost = estimator.estimate(300, 200, load)
    found = MetricsMapper(load_profile("a100-80gb/llama-2-7b")).estimate(300, 200.0, load)
    assert (cost.latency_s, cost.tokens_per_s, cost.gpu_utilization, cost.kv_tokens) == (
        found.latency_s,
        found.tokens_per_s,
        found.gpu_utilization,
        found.kv_tokens,
    )
    idle_s = MetricsMapper(load_profile("a100-80gb/llama-2-7b")).estimate(300, 200.0).latency_s
    assert cost.ufc == pytest.approx((300 + 400) / (1 + 0.1 * (found.latency_s / idle_s - 1)))
    assert cost.rfc == pytest.approx(found.latency_s * found.gpu_utilization)
    assert cost.charge.hf == pytest.approx(UNIT * (0.7 * cost.ufc + 0.3 * estimator.rfc_scale * cost.rfc), abs=1)


PROFILES = list_profiles()
LOADS = st.builds(
    lambda num, context: Load(num_running=num, context_tokens=num * context), st.integers(0, 512), st.integers(1, 8000)
)


@given(st.sampled_from(PROFILES), LOADS, st.integers(1, 1000))
def test_a_long_answer_costs_many_times_a_short_one(profile, load, prompt):
    estimator = CostEstimator(profile)
    assert estimator.price(prompt, 2000.0, load).hf > 3 * estimator.price(prompt, 50.0, load).hf


@pytest.mark.parametrize("num_running", [0, 16, 64, 256])
def test_by_the_abstracts_words_forty_times_the_tokens_cost_less_than_four_times_as_much(num_running):
    """Why `discount` and `product` are not the default: an A100 with a Llama 2 7B, prompts of 100 tokens."""
    estimator = CostEstimator("a100-80gb/llama-2-7b", FairnessConfig(ufc="discount", rfc="product"))
    load = Load(num_running=num_running, context_tokens=500 * num_running)
    assert estimator.price(100, 2000.0, load).hf < 4 * estimator.price(100, 50.0, load).hf


@given(st.sampled_from(PROFILES), LOADS, st.integers(0, 100_000), st.floats(1, 1e5), st.floats(1, 10))
def test_no_answer_gets_much_cheaper_by_being_longer(profile, load, prompt, tokens, times):
    """A prompt that was read at once counts in full; the first tokens beside many others take some off for waiting."""
    estimator = CostEstimator(profile)
    assert estimator.price(prompt, times * tokens, load).hf >= 0.85 * estimator.price(prompt, tokens, load).hf


@given(st.floats(1e-9, 1e9), LOADS, st.integers(0, 10_000), st.integers(1, 10_000))
def test_no_clock_makes_a_request_dear_or_free(latency_s, load, prompt, tokens):
    estimator = CostEstimator()
    idle = estimator.price(prompt, float(tokens), IDLE).hf
    booked = estimator.price_measured(prompt, tokens, 0, latency_s, load).hf
    assert 0 < booked <= 1.01 * idle + estimator.price(prompt, float(tokens), load).hf


@pytest.mark.parametrize("variant", ["product", "sum", "share", "gpu-seconds"])
def test_scale_gives_both_counters_equal_weight_on_the_reference(variant):
    estimator = CostEstimator(config=FairnessConfig(rfc=variant))
    cost = estimator.estimate(256, 256, Load(num_running=16, context_tokens=16 * 384))
    assert cost.rfc * estimator.rfc_scale == pytest.approx(cost.ufc, rel=1e-12)
    assert CostEstimator(config=FairnessConfig(rfc=variant, rfc_scale=3.0)).rfc_scale == 3.0


def test_a_length_prediction_counts_by_its_mean():
    predictor = LengthPredictor.from_pretrained("chat-micro")
    prediction = predictor.predict("Explain TCP slow start.")
    estimator = CostEstimator()
    assert estimator.estimate(10, prediction) == estimator.estimate(10, prediction.mean)
    assert estimator.estimate(10, prediction) != estimator.estimate(10, prediction.median)
    assert estimator.estimate(10, SimpleNamespace(mean=7)) == estimator.estimate(10, 7)
    assert estimator.num_clamped == 0


def test_the_cap_counts():
    estimator = CostEstimator()
    assert estimator.estimate(10, 500, max_tokens=20) == estimator.estimate(10, 20)
    assert estimator.estimate(10, 500, max_tokens=0) == estimator.estimate(10, 500)


def test_measured_latency_spreads_the_same_work():
    estimator = CostEstimator()
    usual = estimator.measured(100, 200)
    slow = estimator.measured(100, 200, latency_s=4 * usual.latency_s)
    assert slow.latency_s == 4 * usual.latency_s
    assert slow.tokens_per_s == pytest.approx(usual.tokens_per_s / 4)
    assert slow.gpu_utilization == pytest.approx(usual.gpu_utilization / 4)
    assert slow.ufc < usual.ufc
    assert slow.charge.service == usual.charge.service


@pytest.mark.parametrize("latency_s", [0, -1, float("nan"), float("inf")])
def test_an_impossible_latency_is_not_used_and_counted(latency_s):
    estimator = CostEstimator()
    assert estimator.measured(100, 200, latency_s=latency_s) == CostEstimator().measured(100, 200)
    assert estimator.num_clamped == 1


def test_tokens_alone_need_no_profile():
    config = FairnessConfig(alpha=1, beta=0, delta=0, profile="no-such-engine")
    assert CostEstimator(config=config).estimate(10, 20).charge == Charge(50 * UNIT, 50 * UNIT, 0, 50 * UNIT)
    with pytest.raises(UserError, match="no-such-engine"):
        CostEstimator(config=FairnessConfig(profile="no-such-engine"))


@settings(max_examples=200)
@given(
    prompt=st.integers(0, MAX_TOKENS),
    response=st.floats(1, MAX_TOKENS),
    cached=st.integers(0, MAX_TOKENS),
    running=st.integers(0, 4096),
    context=st.integers(0, 10**8),
    user=st.sampled_from(["discount", "subtract", "slowdown", "tokens"]),
    resources=st.sampled_from(["product", "sum", "share", "gpu-seconds"]),
)
def test_charges_are_always_positive_and_finite(prompt, response, cached, running, context, user, resources):
    estimator = CostEstimator(config=FairnessConfig(ufc=user, rfc=resources))
    load = Load(num_running=running, context_tokens=context)
    cost = estimator.estimate(prompt, response, load, cached_tokens=cached)
    assert all(isinstance(amount, int) and amount >= 0 for amount in cost.charge)
    assert cost.charge.hf > 0
    assert cost.charge.hf < 10**25


def test_the_same_to_the_last_bit_in_every_process():
    """Hash seeds differ between processes; charges must not."""
    code = (
        "from mope.fairness import *\n"
        "e = CostEstimator()\n"
        "print([e.estimate(7 * n, n * 1.37, Load(n, 50 * n)).charge for n in range(1, 400)])\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_the_core_needs_neither_numpy_nor_torch():
    code = (
        "import sys\n"
        "from mope.fairness import FairnessConfig, Policy\n"
        "p = Policy(FairnessConfig()); p.enqueue('r', 'a', 5, 5); p.admit(); p.finish('r', 5)\n"
        "print(sorted({'numpy', 'torch', 'onnxruntime', 'vllm'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert found == "[]\n"


def test_idle_is_no_load():
    assert Load() == IDLE


@pytest.mark.parametrize("tokens", [None, "12", [1]])
def test_a_number_of_tokens_that_is_none_is_a_typed_error(tokens):
    with pytest.raises(UserError, match="expected a whole number"):
        CostEstimator().estimate(tokens, 10)
