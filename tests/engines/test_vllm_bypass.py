"""Nothing passes the hook's order unseen: grammars, LoRA adapters, KV cache from elsewhere; on vLLM's real scheduler.

The first part has no model and runs on many releases, see `releases.py`. Costs are counted in calls, not in seconds.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from mope.serving_hooks.carried import Carried
from mope.serving_hooks.replay.engine import EngineSettings
from mope.serving_hooks.replay.engine_vllm import VllmEngine
from tests.engines import tiny_vllm
from tests.engines.vllm_engine import Asked, EngineInProcess, mean_ttft

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed; tests/engines/releases.py fetches it and runs this file"
)
HOOK = "mope.serving_hooks.vllm.scheduler.make_scheduler"
STEP_S = 0.02


class Served:
    """The real scheduler without a model, stepped by hand; answers end at the length in their name's middle."""

    def __init__(self, *, ours: bool = True, slots: int = 16, max_loras: int = 1, **options: object) -> None:
        self.engine = VllmEngine(
            EngineSettings(max_num_seqs=slots, max_tokens=1024, max_loras=max_loras),
            kv_tokens=1_000_000,
            max_model_len=8192,
            adapters=("a", "b", "c"),
            scheduler=HOOK if ours else None,
            options={"mope": {"summary_s": 0, "recalibrate": False, "predictor": "none", **options}} if ours else None,
        )
        self.scheduler = self.engine.scheduler
        self.first: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        self.num_steps = self.num_popped = 0

    def send(self, name: str, client: str, adapter: str | None = None, *, blocked: bool = False) -> None:
        """`name` is NAME-TOKENS."""
        carried = Carried(client, float(name.split("-")[1]))
        self.engine.add(name, 20, carried, float(self.num_steps), adapter)
        if blocked:
            self.block(name, True)

    def block(self, name: str, blocked: bool) -> None:
        """As if its grammar were compiled, or were ready."""
        from vllm.v1.request import RequestStatus

        waits = getattr(RequestStatus, "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", None) or RequestStatus.WAITING_FOR_FSM
        self.scheduler.requests[name].status = waits if blocked else RequestStatus.WAITING

    def step(self, number: int = 1) -> None:
        for _ in range(number):
            self.engine.now_s += STEP_S
            for one in self.engine.deliver(self.engine.schedule(), lambda name, n: n >= int(name.split("-")[1])):
                self.first.setdefault(one.request_id, self.num_steps)
                if one.finished:
                    self.ended[one.request_id] = self.num_steps
            self.num_steps += 1

    def count_pops(self) -> None:
        queue, original = self.scheduler.waiting, self.scheduler.waiting.pop_request

        def pop() -> object:
            self.num_popped += 1
            return original()

        queue.pop_request = pop

    def finish(self, within: int) -> None:
        """All that was sent ends, and nothing is left in the books."""
        for _ in range(within):
            if not self.engine.has_requests():
                break
            self.step()
        assert not self.engine.has_requests()
        assert self.scheduler.mope_guard.failure is None
        assert self.scheduler.mope.policy.ledger.open_requests == ()
        assert not self.scheduler.mope.held
        assert len(self.scheduler.waiting.aside) == 0


def waiting_on(served: Served, kind: str, number: int) -> None:
    """Sixteen run on adapter a; so many wait for something, of 20 clients."""
    for n in range(8):
        served.send(f"run{n}-900", f"run{n % 4}", "a")
    served.step(3)
    for n in range(number):
        served.send(f"w{n}-3", f"wait{n % 20}", "b" if kind == "adapter" else "a", blocked=kind == "grammar")


@pytest.mark.parametrize("kind", ["grammar", "adapter"])
def test_requests_that_cannot_run_cost_a_step_the_same_however_many_they_are(kind: str) -> None:
    popped = {}
    for number in (100, 2000):
        served = Served()
        served.count_pops()
        waiting_on(served, kind, number)
        served.step(40)  # until each client was met
        served.num_popped = 0
        served.step(40)
        popped[number] = served.num_popped / 40
        policy = served.scheduler.mope.policy
        assert len(policy.ledger.open_requests) == 8  # nobody is charged who does not run
        assert len(policy) == number
        assert len(served.scheduler.waiting) == number
    assert popped[2000] <= popped[100] + 1 <= 20, popped
    stock = Served(ours=False)
    stock.count_pops()
    waiting_on(stock, kind, 300)
    stock.step(4)
    if not hasattr(stock.scheduler, "skipped_waiting"):  # another queue, whose pops are not counted here
        assert stock.num_popped / 4 >= 300


@pytest.mark.parametrize("policy", ["equinox", "vtc", "fcfs", "shortest-predicted", "deficit-round-robin"])
def test_requests_run_once_their_grammars_are_there(policy: str) -> None:
    served = Served(policy=policy)
    waiting_on(served, "grammar", 300)
    served.send("free-5", "free")
    served.step(60)
    assert "free-5" in served.ended  # it does not wait for the others' grammars
    for n in range(300):
        served.block(f"w{n}-3", False)
    served.step(60)
    assert sum(name.startswith("w") for name in served.ended) > 100  # two steps for each eight
    served.finish(1200)


def test_what_waits_for_a_grammar_can_be_given_up() -> None:
    from vllm.v1.request import RequestStatus

    served = Served()
    waiting_on(served, "grammar", 50)
    served.step(10)
    served.scheduler.finish_requests([f"w{n}-3" for n in range(50)], RequestStatus.FINISHED_ABORTED)
    assert len(served.scheduler.waiting) == 0
    served.finish(1000)


@pytest.mark.parametrize("policy", ["equinox", "vtc-predicted"])
def test_a_light_client_gets_its_adapters_turn_within_a_bound(policy: str) -> None:
    """Flood on one adapter, one place: without turns the light client waits for the whole flood."""
    for patience_s in (0.5, 2.0):
        served, sent = flood_and_light(policy=policy, lora_patience_s=patience_s)
        assert served.first["light-5"] - sent <= patience_s / STEP_S + 49 + 3  # those that ran end first
        assert max(served.ended.values()) < 300 / 16 * 41 + 100  # one batch is drained, and one is of a single request
    served, sent = flood_and_light(policy=policy, lora_patience_s=86_400)
    assert served.first["light-5"] - sent > 650


def flood_and_light(**options: object) -> tuple[Served, int]:
    """The engine at the end, and the step at which the light client came."""
    served = Served(**options)
    for n in range(300):
        served.send(f"f{n}-{30 + n % 20}", "flood", "a")
    served.step(10)
    served.send("light-5", "light", "b")
    sent = served.num_steps
    served.finish(2000)
    return served, sent


def test_adapters_of_one_client_are_not_drained_for_each_other() -> None:
    """Nobody is behind: vLLM's own way keeps batches full."""
    steps = {}
    for patience_s in (0.1, 86_400):
        served = Served(lora_patience_s=patience_s)
        for n in range(160):
            served.send(f"r{n}-20", "one", "ab"[n % 2])
        served.finish(2000)
        steps[patience_s] = served.num_steps
    assert steps[0.1] == steps[86_400]


@pytest.mark.parametrize("max_loras", [1, 2])
def test_clients_on_three_adapters_share(max_loras: int) -> None:
    served = Served(max_loras=max_loras, lora_patience_s=0.5)
    for n in range(450):
        served.send(f"r{n}-20", f"client-{n % 3}", "abc"[n % 3])
    served.step(420)
    ended = Counter(int(name[1:].split("-")[0]) % 3 for name in served.ended)
    assert min(ended.values()) > 0.4 * max(ended.values()), ended
    served.finish(2000)


def test_a_request_without_an_adapter_does_not_wait_for_one() -> None:
    served = Served()
    waiting_on(served, "adapter", 500)
    served.step(5)
    served.send("plain-5", "wait0")  # even of a client whose others wait
    sent = served.num_steps
    served.step(3)
    assert served.first["plain-5"] - sent <= 1
    served.finish(3000)


def test_a_name_that_is_used_again_at_once_is_another_request() -> None:
    """vLLM lists what was given up until its next step, and the books must not end the newcomer with it."""
    from vllm.v1.request import RequestStatus

    served = Served()
    served.send("x-30", "a")
    served.step(2)
    served.scheduler.finish_requests("x-30", RequestStatus.FINISHED_ABORTED)
    served.send("x-30", "a")
    served.send("y-5", "b")
    served.scheduler.finish_requests("y-5", RequestStatus.FINISHED_ABORTED)
    served.finish(100)
    assert "x-30" in served.ended


def test_what_is_given_up_right_after_a_preemption_is_charged_once_and_its_name_is_free() -> None:
    """It began some steps ago, which the books do not know yet; then its name is another request's."""
    from vllm.v1.request import RequestStatus

    for again in (False, True):
        served = Served(slots=1)
        served.send("x-30", "a")
        served.step(2)
        served.scheduler.reset_prefix_cache(reset_running_requests=True)
        assert served.scheduler.requests["x-30"].status == RequestStatus.PREEMPTED
        generated = served.scheduler.requests["x-30"].num_output_tokens
        served.scheduler.finish_requests("x-30", RequestStatus.FINISHED_ABORTED)
        if again:
            served.send("x-30", "a")
        served.step()
        served.send("y-40", "b")
        served.finish(120)
        tally = dict(served.scheduler.mope.tallies.items())["a"]
        assert (tally.num_arrived, tally.num_finished, tally.num_aborted) == (1 + again, again, 1)
        assert tally.charged.service == (20 + 2 * generated + again * (20 + 2 * 30)) * 1_000_000


def test_what_was_computed_before_is_refunded_though_a_preemption_follows_at_once() -> None:
    served = Served()
    served.send("x-30", "a")
    batch = served.engine.schedule()
    request = served.scheduler.requests["x-30"]
    served.scheduler._started = [(request, 16, 0.0)]  # as if KV cache for 16 of its tokens had been there
    served.engine.deliver(batch, lambda *_: False)
    served.scheduler.reset_prefix_cache(reset_running_requests=True)
    served.scheduler._catch_up()  # while it waits
    served.finish(60)
    tally = dict(served.scheduler.mope.tallies.items())["a"]
    assert tally.charged.service == (20 - 16 + 2 * 30) * 1_000_000


def test_a_loaded_request_waits_while_its_adapter_would_be_one_too_many() -> None:
    """vLLM counts the adapters of what a step schedules: without KV cache to free that is less than what runs."""
    from types import SimpleNamespace

    from vllm.v1.request import RequestStatus

    from mope.serving_hooks.adapters import AdapterTurns
    from mope.serving_hooks.guard import Guard
    from mope.serving_hooks.vllm.holding import HoldingQueue

    turns = AdapterTurns(1, 1.0)
    turns.begin([1], 0.0, lambda _: None, lambda _: [0.0])
    nobody = SimpleNamespace(offer=lambda: None)
    queue = HoldingQueue(Guard(logging.getLogger("test")), nobody, lambda _: [0.0], lambda: True, 8, turns)
    for number in (2, 1, 0):
        adapter = SimpleNamespace(lora_int_id=number) if number else None
        queue.add_request(SimpleNamespace(request_id=f"r{number}", lora_request=adapter, status=RequestStatus.WAITING))
    assert [queue.pop_request().request_id for _ in range(2)] == ["r1", "r0"]
    assert not queue  # r2 is here, and is not offered
    assert len(queue) == 1
    turns.begin([], 0.0, lambda _: None, lambda _: [0.0])
    queue.refresh()
    assert queue
    assert queue.pop_request().request_id == "r2"


# -- with the model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if tiny_vllm.MISSING is not None or "MOPE_EXPECT_VLLM" in os.environ:
        pytest.skip(str(tiny_vllm.MISSING or "releases are run without their compiled part"))
    return tiny_vllm.make_model(tmp_path_factory.mktemp("tiny"))


def test_kv_cache_from_elsewhere_does_not_pass_the_order(model: Path) -> None:
    """Requests whose KV cache is loaded, as on a decode node: vLLM serves them in the order of their loads."""
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(
        kv_connector="SlowConnector", kv_role="kv_both", kv_connector_module_path="tests.engines.slow_connector"
    )
    requests = [Asked(0, "flood", 40, 48 + 8 * (n % 5), 64.0, seed=n) for n in range(150)]
    requests += [Asked(20 * n, "light", 30, 12, 16.0, seed=1000 + n) for n in range(12)]
    waits = {}
    for name, options in (("stock", None), ("ours", {"policy": "equinox"})):
        running = EngineInProcess(model, options, kv_transfer_config=connector)
        outcome = running.run(requests)
        assert len(outcome.finished) == len(requests)
        waits[name] = mean_ttft(outcome, requests, "light")
        if options is not None:
            assert running.scheduler.mope_guard.failure is None
            assert running.scheduler.mope.policy.ledger.open_requests == ()
            assert not running.scheduler.mope.held
    assert waits["stock"] > 4 * waits["ours"], waits
