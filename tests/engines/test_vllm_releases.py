"""The scheduler hook on vLLM's real scheduler, of whichever release is installed; `releases.py` runs this on many.

The same file on every release: it fits, is fair, keeps exact books, and leaves everything else to vLLM.
"""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import pytest

from mope.fairness import load_profile
from mope.serving_hooks.carried import Carried
from mope.serving_hooks.replay.clock import StepClock
from mope.serving_hooks.replay.engine import EngineSettings
from mope.serving_hooks.replay.engine_vllm import VllmEngine
from mope.serving_hooks.replay.run import Outcome, replay
from mope.serving_hooks.replay.workloads import WORKLOADS, Arrival
from tests.engines.test_vllm_fuzz import Driven, Life

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed; tests/engines/releases.py fetches it and runs this file"
)
HOOK = "mope.serving_hooks.vllm.scheduler.make_scheduler"
CLOCK = StepClock(load_profile("a100-80gb/llama-2-7b"))
DEPTHS = pytest.mark.parametrize("batches_in_flight", [1, 2])


def serve(
    arrivals: list[Arrival], batches_in_flight: int, *, kv_tokens: int = 100_000, adapters: int = 0, **options: object
) -> tuple[VllmEngine, Outcome]:
    """All requests through our class; predictions are a third too long or too short."""
    engine = VllmEngine(
        EngineSettings(max_num_seqs=16, batches_in_flight=batches_in_flight, max_tokens=1024, max_loras=4),
        kv_tokens=kv_tokens,
        max_model_len=4096,
        adapters=tuple(f"adapter-{number}" for number in range(adapters)),
        scheduler=HOOK,
        options={"mope": {"summary_s": 0, "recalibrate": False, "predictor": "none", **options}},
    )
    predictions = [one.response_tokens * (1.33 if number % 2 else 0.75) for number, one in enumerate(arrivals)]
    outcome = replay(engine, arrivals, predictions, CLOCK, batches_in_flight=batches_in_flight)
    assert engine.scheduler.mope_guard.failure is None
    assert engine.scheduler.mope.policy.ledger.open_requests == ()
    assert not engine.scheduler.mope.held
    assert not engine.scheduler._begun
    return engine, outcome


def light_ttft(outcome: Outcome) -> float:
    waits = [one.first_token_s - one.arrival.arrival_s for one in outcome.records if one.arrival.client == "light"]
    return sum(waits) / len(waits)


def chats(number: int) -> list[Arrival]:
    """None of whose answers reaches the cap."""
    drawn = WORKLOADS["two-clients"].requests(3, num_requests=number, rate=60.0)
    return [one._replace(response_tokens=min(one.response_tokens, 1000)) for one in drawn]


def services(engine: VllmEngine) -> dict[str, float]:
    ledger = engine.scheduler.mope.policy.ledger
    return {"/".join(account.path): account.charged.service / 1e6 for account in ledger.clients()}


def served(arrivals: list[Arrival]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for one in arrivals:
        total[one.client] += one.prompt_tokens + 2 * one.response_tokens
    return dict(total)


def test_this_release_is_as_the_hook_expects() -> None:
    from mope.serving_hooks.vllm import compat

    engine = VllmEngine(EngineSettings(), kv_tokens=100_000, max_model_len=4096)
    assert compat.mismatches(engine.scheduler) == []


@DEPTHS
def test_a_light_client_waits_five_times_less_and_the_books_are_exact(batches_in_flight: int) -> None:
    arrivals = chats(250)
    outcomes = {}
    for policy in ("fcfs", "vtc-predicted", "equinox"):
        engine, outcomes[policy] = serve(arrivals, batches_in_flight, policy=policy)
        assert services(engine) == served(arrivals)
        assert [one.response_tokens for one in outcomes[policy].records] == [one.response_tokens for one in arrivals]
    for policy in ("vtc-predicted", "equinox"):
        assert light_ttft(outcomes["fcfs"]) > 5 * light_ttft(outcomes[policy])
        assert outcomes[policy].end_s < 1.05 * outcomes["fcfs"].end_s


@DEPTHS
def test_arrival_order_is_vllms_own(batches_in_flight: int) -> None:
    arrivals = chats(150)
    own = VllmEngine(
        EngineSettings(max_num_seqs=16, batches_in_flight=batches_in_flight, max_tokens=1024),
        kv_tokens=100_000,
        max_model_len=4096,
    )
    stock = replay(own, arrivals, [None] * len(arrivals), CLOCK, batches_in_flight=batches_in_flight)
    _, ours = serve(arrivals, batches_in_flight, policy="fcfs")
    assert [one.first_token_s for one in ours.records] == [one.first_token_s for one in stock.records]
    assert [one.finish_s for one in ours.records] == [one.finish_s for one in stock.records]


@DEPTHS
@pytest.mark.parametrize("victims", ["engine", "counter", "remaining"])
def test_books_are_exact_through_preemptions(batches_in_flight: int, victims: str) -> None:
    arrivals = chats(150)
    engine, outcome = serve(arrivals, batches_in_flight, kv_tokens=4_608, policy="equinox", victims=victims)
    assert sum(one.num_preemptions for one in outcome.records) > 5
    assert services(engine) == served(arrivals)


def test_who_has_most_left_is_the_first_victim() -> None:
    """By the tokens that each has been given by now: the longer prediction began earlier, and has less left."""
    engine = VllmEngine(
        EngineSettings(max_num_seqs=4, max_tokens=1024), kv_tokens=100_000, max_model_len=4096, scheduler=HOOK,
        options={"mope": {"summary_s": 0, "recalibrate": False, "predictor": "none", "victims": "remaining"}},
    )  # fmt: skip

    def steps(number: int) -> None:
        for _ in range(number):
            engine.deliver(engine.schedule(), lambda name, tokens: False)

    engine.add("early", 30, Carried("a", 200.0), 0.0, None)
    steps(60)
    engine.add("late", 30, Carried("b", 160.0), 1.0, None)
    steps(3)
    assert [request.request_id for request in engine.scheduler.running] == ["early", "late"]
    steps(1)
    assert engine.scheduler.mope.policy.find("early").generated >= 60
    assert engine.scheduler.mope_guard.failure is None


@DEPTHS
def test_predicted_admission_preempts_less(batches_in_flight: int) -> None:
    arrivals = chats(150)
    preempted = []
    for predicted in (False, True):
        _, outcome = serve(
            arrivals, batches_in_flight, kv_tokens=4_608, policy="equinox", predicted_admission=predicted, kv_margin=1.3
        )
        preempted.append(sum(one.num_preemptions for one in outcome.records))
    assert preempted[1] < preempted[0] / 2


def test_a_head_without_room_lets_those_go_whose_kv_cache_was_loaded() -> None:
    """They hold the memory that it needs, and nobody runs who could make some; vLLM itself drains them first."""
    settings = EngineSettings(max_num_seqs=4, max_tokens=256)
    options = {"policy": "shortest-predicted", "summary_s": 0, "recalibrate": False, "predictor": "none"}
    engine = Driven(settings, loads=True, hook=options, kv_tokens=800, max_model_len=640)
    scheduler = engine.scheduler
    matched = scheduler.connector.get_num_new_matched_tokens
    scheduler.connector.get_num_new_matched_tokens = lambda request, computed: (
        matched(request, computed) if request.request_id == "loaded" else (0, False)
    )

    def send(name: str, client: str, prompt: int, predicted: float) -> None:
        sampling = {"max_tokens": 200, "extra_args": dict(Carried(client, predicted).write())}
        scheduler.add_request(engine.request(Life(name, client, prompt, 8), sampling))

    def steps(number: int, arrived: set[str]) -> None:
        for _ in range(number):
            batch = engine.schedule()
            engine.load(arrived)
            engine.deliver(batch, lambda _, tokens: tokens >= 8)
            arrived = set()

    send("loaded", "long", 500, 150.0)
    steps(1, set())
    send("head", "short", 400, 8.0)
    steps(3, set())
    steps(40, {"loaded"})
    assert not scheduler.requests
    assert scheduler.mope_guard.failure is None
    assert services(engine) == {"long": 1 + 16, "short": 400 + 16}


def test_adapters_are_clients_where_nobody_says_who_asks() -> None:
    """27 LoRA adapters, four in a batch: who would exceed that is popped, skipped and given back, step by step."""
    arrivals = [Arrival(0.01 * number, "", 40, 20 + number % 7, f"adapter-{number % 27}") for number in range(27 * 6)]
    engine, outcome = serve(arrivals, 1, adapters=27, policy="equinox")
    assert all(one.response_tokens == one.arrival.response_tokens for one in outcome.records)
    expected: Counter[str] = Counter()
    for one in arrivals:
        expected[f"lora/{one.adapter}"] += one.prompt_tokens + 2 * one.response_tokens
    assert services(engine) == dict(expected)
