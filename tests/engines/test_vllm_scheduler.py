"""The scheduler hook on vLLM's real engine: order, outputs, charges, faults. Time is counted in engine steps."""

from __future__ import annotations

import json
import logging
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mope.serving_hooks.carried import Carried
from tests.engines import tiny_vllm
from tests.engines.vllm_engine import LENGTH, Asked, EngineInProcess, flood_and_light, mean_ttft, services

pytestmark = pytest.mark.skipif(tiny_vllm.MISSING is not None, reason=str(tiny_vllm.MISSING))

POLICIES = ("fcfs", "vtc", "vtc-predicted", "equinox", "shortest-predicted", "deficit-round-robin")
TIGHT = {"num_gpu_blocks_override": 36, "block_size": 32}  # KV cache for about a quarter of what 16 requests want


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vllm.make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def stock(model):
    """vLLM without the hook on the same requests, with and without room; and on many more of them."""
    found = {}
    for name, engine, requests in (
        ("", {}, flood_and_light()),
        ("tight", TIGHT, flood_and_light()),
        ("many", {}, flood_and_light(num_flood=300)),
        ("many tight", TIGHT, flood_and_light(num_flood=300)),
    ):
        found[name] = EngineInProcess(model, None, **engine).run(requests)
    return found


def served(requests: list[Asked]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for one in requests:
        total[one.client] += one.prompt_tokens + 2 * one.length
    return dict(total)


def settled(engine: EngineInProcess) -> None:
    """Nothing is left over."""
    scheduler = engine.scheduler
    assert scheduler.mope_guard.failure is None
    assert scheduler.mope.policy.ledger.open_requests == ()
    assert len(scheduler.mope.policy) == 0
    assert not scheduler.mope.held
    assert not scheduler._begun
    assert not scheduler.waiting.requests
    assert len(scheduler.requests) == 0


@pytest.mark.parametrize("room", ["many", "many tight"])
def test_light_client_is_served_at_once_and_nobody_pays(model, stock, room):
    requests = flood_and_light(num_flood=300)
    engine = TIGHT if "tight" in room else {}
    ours = {}
    for policy in ("fcfs", "equinox", "vtc", "vtc-predicted"):
        running = EngineInProcess(model, {"policy": policy}, **engine)
        outcome = ours[policy] = running.run(requests)
        assert outcome.tokens == stock[room].tokens  # token by token
        assert [len(outcome.tokens[n]) for n in range(len(requests))] == [one.length for one in requests]
        assert services(running.scheduler) == served(requests)
        settled(running)
    waits = {policy: mean_ttft(outcome, requests, "light") for policy, outcome in ours.items()}
    for policy in ("equinox", "vtc", "vtc-predicted"):
        assert waits["fcfs"] >= 10 * waits[policy], waits
    steps = {"stock": stock[room].num_steps, **{policy: outcome.num_steps for policy, outcome in ours.items()}}
    assert max(steps.values()) <= 1.03 * min(steps.values()), steps  # the same tokens in as many steps: throughput
    if room == "many":
        assert ours["fcfs"].first_token == stock[room].first_token  # to the step


@pytest.mark.parametrize("policy", POLICIES)
def test_all_policies_serve_the_same_answers_without_room(model, stock, policy):
    requests = flood_and_light()
    running = EngineInProcess(model, {"policy": policy}, **TIGHT)
    assert running.run(requests).tokens == stock["tight"].tokens
    assert services(running.scheduler) == served(requests)
    settled(running)


@pytest.mark.parametrize("victims", ["remaining", "counter"])
def test_victims_are_chosen_and_charges_stay_exact(model, stock, victims):
    requests = flood_and_light()
    running = EngineInProcess(model, {"policy": "equinox", "victims": victims}, **TIGHT)
    assert running.run(requests).tokens == stock["tight"].tokens
    tallies = dict(running.scheduler.mope.tallies.items())
    assert sum(tally.num_preempted for tally in tallies.values()) > 10
    assert services(running.scheduler) == served(requests)
    settled(running)


def test_predicted_admission_preempts_less(model, stock):
    requests = flood_and_light()
    preempted = {}
    for predicted in (False, True):
        options = {"policy": "equinox", "predicted_admission": predicted, "kv_margin": 1.2}
        running = EngineInProcess(model, options, **TIGHT)
        assert running.run(requests).tokens == stock["tight"].tokens
        preempted[predicted] = sum(tally.num_preempted for _, tally in running.scheduler.mope.tallies.items())
        settled(running)
    assert preempted[True] < preempted[False] / 3


def test_27_adapters_are_clients_where_nobody_says_who_asks(model, tmp_path):
    """S-LoRA's case: one adapter's users flood, four adapters fit into a batch, and 26 others ask now and then."""
    adapters = tiny_vllm.make_adapters(tmp_path, 27)
    engine = {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 27, "max_lora_rank": 8}
    requests = [Asked(0, "", 40, 40 + n % 9, 44.0, seed=n, adapter=adapters[0]) for n in range(120)]
    requests += [Asked(4 * n, "", 30, 8 + n % 5, 10.0, seed=900 + n, adapter=adapters[1 + n % 26]) for n in range(52)]
    vllm = EngineInProcess(model, None, **engine)
    same_prompt = vllm.run([Asked(0, "", 30, 20, seed=1, adapter=adapter) for adapter in adapters])
    assert len(set(same_prompt.tokens.values())) > 10  # each adapter answers in its own way
    stock = vllm.run(requests)
    expected, waits = Counter(), {}
    for one in requests:
        expected[f"lora/{one.adapter.name}"] += one.prompt_tokens + 2 * one.length
    for policy in ("fcfs", "equinox"):
        running = EngineInProcess(model, {"policy": policy}, **engine)
        outcome = running.run(requests)
        assert outcome.tokens == stock.tokens
        assert services(running.scheduler) == dict(expected)
        settled(running)
        late = [outcome.first_token[n] - one.step + 1 for n, one in enumerate(requests) if one.adapter != adapters[0]]
        waits[policy] = sum(late) / len(late)
    assert waits["fcfs"] >= 10 * waits["equinox"], waits


@pytest.mark.parametrize("engine", [{}, TIGHT], ids=["room", "tight"])
def test_thousands_of_requests_with_random_aborts(model, engine):
    """Nothing is lost, the engine lives, and the books hold exactly what was delivered."""
    rng = random.Random(5)
    num = 10_000 if not engine else 2_000
    clients = [f"c{number}" for number in range(20)] + ["team/a", "team/b"]
    requests = [
        Asked(n // 12, rng.choice(clients), rng.randint(3, 24), rng.randint(1, 12), rng.uniform(1, 20), seed=n)
        for n in range(num)
    ]
    running = EngineInProcess(model, {"policy": "equinox"}, **engine)
    aborted: set[int] = set()
    delivered: dict[int, int] = {}
    begun: set[int] = set()

    def interfere(step: int, one: EngineInProcess) -> None:
        live = list(one.scheduler.requests.values())
        for request in live:
            number = int(request.request_id.split("-")[0])
            delivered[number] = request.num_output_tokens
            if request.num_computed_tokens or request.num_preemptions:
                begun.add(number)
        if live and rng.random() < 0.5:
            victims = rng.sample(live, min(len(live), 2))
            numbers = [int(victim.request_id.split("-")[0]) for victim in victims]
            aborted.update(numbers)
            one.engine.abort_request([str(number) for number in numbers])

    outcome = running.run(requests, interfere)
    assert len(aborted) > num / 20
    assert set(outcome.finished) | aborted == set(range(num))
    assert set(outcome.finished) & aborted == set()
    for number, tokens in outcome.tokens.items():
        assert len(tokens) == requests[number].length
    settled(running)
    tallies = dict(running.scheduler.mope.tallies.items())
    assert sum(tally.num_finished for tally in tallies.values()) == num - len(aborted)
    assert sum(tally.num_aborted for tally in tallies.values()) == len(aborted)
    expected: Counter[str] = Counter()
    for number, one in enumerate(requests):
        if number in outcome.finished:
            expected[one.client] += one.prompt_tokens + 2 * one.length
        elif number in begun:
            expected[one.client] += one.prompt_tokens + 2 * delivered[number]
    assert services(running.scheduler) == {name: expected[name] for name in services(running.scheduler)}


def test_a_session_whose_input_is_streamed_is_one_request(model):
    """Three inputs of 20 tokens, three answers of 6: each is charged once, and a flood beside it changes nothing."""
    running = EngineInProcess(model, {"policy": "equinox"})
    core, turns = running.engine.engine_core.engine_core, []

    def say(resumable: bool) -> None:
        from vllm import SamplingParams

        given = {LENGTH: 6, **Carried("session").write()}
        request = running.engine.input_processor.process_inputs(
            "session",
            {"prompt_token_ids": Asked(0, "", 20, 0, seed=len(turns)).prompt()},
            SamplingParams(max_tokens=50, temperature=0.0, extra_args=given),
            supported_tasks=("generate",),
            resumable=resumable,
        )
        core.add_request(*core.preprocess_add_request(request))

    def speak(step: int, one: EngineInProcess) -> None:
        session = one.scheduler.requests.get("session")
        waits = session is None or session.status.name == "WAITING_FOR_STREAMING_REQ"
        if len(turns) <= 3 and waits and step < 400:
            say(resumable=len(turns) < 3)  # the fourth input only says that it was the last
            turns.append(step)

    flood = flood_and_light(num_light=0)
    running.run(flood, speak)
    assert len(turns) == 4
    settled(running)
    assert services(running.scheduler) == {**served(flood), "session": 3 * (20 + 2 * 6)}


def test_several_answers_to_one_prompt(model):
    requests = [Asked(0, "many", 20, 9, 10.0, seed=n, options={"n": 3, "temperature": 1.0}) for n in range(6)]
    running = EngineInProcess(model, {"policy": "vtc-predicted"})
    running.run(requests)
    assert services(running.scheduler) == {"many": 6 * 3 * (20 + 2 * 9)}
    settled(running)


def test_what_the_prefix_cache_held_is_refunded(model):
    same = [Asked(0, "first", 200, 5, 5.0, seed=1), Asked(30, "second", 200, 5, 5.0, seed=1)]
    running = EngineInProcess(model, {"policy": "vtc-predicted"}, enable_prefix_caching=True, block_size=32)
    running.run(same)
    found = services(running.scheduler)
    assert found["first"] == 200 + 10
    assert found["second"] == 200 - 192 + 10  # six whole blocks of 32 were there
    assert dict(running.scheduler.mope.tallies.items())["second"].cached_tokens == 192
    settled(running)


def test_structured_output(model):
    from vllm.sampling_params import StructuredOutputsParams

    requests = flood_and_light(num_flood=30, num_light=0)
    grammar = {"structured_outputs": StructuredOutputsParams(choice=["the fox", "a dog"]), "max_tokens": 20}
    requests += [Asked(2 * n, "shaped", 20, 900, 8.0, seed=n, options=dict(grammar)) for n in range(8)]
    running = EngineInProcess(model, {"policy": "equinox"}, logits_processors=None)
    outcome = running.run([one if one.client == "shaped" else _capped(one) for one in requests])
    assert len(outcome.finished) == len(requests)
    settled(running)
    tally = dict(running.scheduler.mope.tallies.items())["shaped"]
    assert (tally.num_finished, tally.num_aborted) == (8, 0)


def _capped(one: Asked) -> Asked:
    return Asked(
        one.step, one.client, one.prompt_tokens, 900, one.predicted, one.seed, {"max_tokens": 20, "ignore_eos": True}
    )


def test_requests_that_name_no_client_are_one(model):
    running = EngineInProcess(model, {"policy": "equinox"})
    running.engine.add_request("x", {"prompt_token_ids": [5, 6, 7]}, _plain(4))
    running.engine.add_request("y", {"prompt_token_ids": [5, 6, 8]}, _plain(4))
    while running.engine.has_unfinished_requests():
        running.engine.step()
    assert services(running.scheduler) == {"(anonymous)": 2 * (3 + 8)}
    settled(running)


def _plain(tokens: int):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)


# -- what may go wrong


@pytest.mark.parametrize(
    "where",
    [
        "policy.enqueue",
        "policy.admit",
        "policy.peek",
        "policy.preempt",
        "policy.progress",
        "ended",
        "between_steps",
        "lengths.expected",
        "cached",
        "first_token",
    ],
)
@pytest.mark.parametrize("after", [0, 40])
def test_when_ours_fails_vllm_goes_on(model, stock, where, after, caplog):
    """Whatever raises, whenever: one line in the log, every answer as without us, in order of arrival from then on."""
    requests = flood_and_light()
    running = EngineInProcess(model, {"policy": "equinox"}, **TIGHT)
    holder = running.scheduler.mope
    *path, name = where.split(".")
    for part in path:
        holder = getattr(holder, part)
    original, calls = getattr(holder, name), [0]

    def broken(*args, **kwargs):
        calls[0] += 1
        if calls[0] > after:
            raise RuntimeError("boom")
        return original(*args, **kwargs)

    setattr(holder, name, broken)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.ERROR):
        outcome = running.run(requests)
    assert outcome.tokens == stock["tight"].tokens
    assert len(running.scheduler.requests) == 0
    told = {record.created for record in caplog.records if "mope has failed" in record.getMessage()}
    if calls[0] > after:
        assert "boom" in running.scheduler.mope_guard.failure
        assert len(told) == 1
    else:  # it was never asked that often
        assert running.scheduler.mope_guard.failure is None
        assert not told


@pytest.mark.parametrize("predicted", [float("nan"), float("inf"), -3.0, 1e300])
def test_impossible_predictions_do_no_harm(model, stock, predicted):
    requests = [
        Asked(one.step, one.client, one.prompt_tokens, one.length, predicted, one.seed) for one in flood_and_light()
    ]
    running = EngineInProcess(model, {"policy": "equinox"})
    assert running.run(requests).tokens == stock[""].tokens
    assert services(running.scheduler) == served(requests)
    assert running.scheduler.mope.policy.estimator.num_clamped == len(requests)
    settled(running)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fair"}, "policy is 'fair'"),
        ({"polcy": "vtc"}, "did you mean 'policy'"),
        ({"weights": {"a": -1}}, "weight of 'a'"),
        ({"profile": "a100-80gb/llama-9-7b"}, "llama"),
    ],
)
def test_options_that_cannot_be_used_stop_the_start(model, options, message):
    with pytest.raises(ValueError, match=message):
        EngineInProcess(model, options)


def test_what_does_not_fit_is_told_and_vllm_serves_as_ever(model, stock, monkeypatch, caplog):
    from mope.serving_hooks.vllm import compat

    monkeypatch.setattr(compat, "mismatches", lambda scheduler: ["Scheduler.waiting is list, expected a RequestQueue"])
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.ERROR):
        running = EngineInProcess(model, {"policy": "equinox"})
    assert "does not fit this vLLM" in caplog.text
    assert running.run(flood_and_light()).tokens == stock[""].tokens
    with pytest.raises(ValueError, match="does not fit this vLLM"):
        EngineInProcess(model, {"policy": "equinox", "on_mismatch": "refuse"})


def test_books_and_lessons_survive_a_restart(model, tmp_path):
    state = tmp_path / "state" / "mope.json"
    requests = flood_and_light(num_flood=20, num_light=5)
    running = EngineInProcess(model, {"policy": "equinox", "state": str(state)})
    running.run(requests)
    running.scheduler._close()
    kept = json.loads(state.read_text())
    assert kept["ledger"]["open"] == []
    again = EngineInProcess(model, {"policy": "equinox", "state": str(state)})
    assert services(again.scheduler) == served(requests)
    assert again.scheduler.mope.lengths.to_json()["means"].keys() == {"flood", "light"}
    again.run(requests)
    assert services(again.scheduler) == {client: 2 * amount for client, amount in served(requests).items()}


def test_one_short_answer_is_kept_though_the_server_is_killed(model, tmp_path):
    state = tmp_path / "mope.json"
    running = EngineInProcess(model, {"policy": "equinox", "state": str(state)})
    requests = flood_and_light(num_flood=1, num_light=0)
    short = [replace(requests[0], length=3)]
    running.run(short)
    end = time.monotonic() + 60
    while not state.exists() and time.monotonic() < end:  # nothing calls the hook any more
        time.sleep(0.1)
    ledger = json.loads(state.read_text())["ledger"]
    assert ledger["open"] == []
    assert [account["name"] for account in ledger["accounts"]] == ["", "flood"]


def test_a_damaged_state_is_told_and_left(model, tmp_path, caplog):
    state = tmp_path / "mope.json"
    state.write_text('{"ledger": 5}')
    with caplog.at_level(logging.WARNING, logger="mope"):
        running = EngineInProcess(model, {"policy": "equinox", "state": str(state)})
    assert "cannot be read" in caplog.text
    running.run(flood_and_light(num_flood=5, num_light=1))
    settled(running)
