"""Random traffic on vLLM's real scheduler under the hook: every request ends once, books are exact, nobody is stuck.

No model and no GPU; runs on many releases, see `releases.py`. Each case draws its engine and its traffic from a seed:

    MOPE_FUZZ_REQUESTS=50000 python -m pytest tests/engines/test_vllm_fuzz.py -s  # in all; else 150 a case
    MOPE_FUZZ_SEED=7 python -m pytest tests/engines/test_vllm_fuzz.py               # other draws

`python tests/engines/test_vllm_fuzz.py POLICY BASE SEED` repeats a case; with `stock` as policy, without the hook.
"""

from __future__ import annotations

import inspect
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest

from mope.fairness.clients import client_path
from mope.serving_hooks.carried import Carried, pack
from mope.serving_hooks.replay.engine import Batch, EngineSettings
from mope.serving_hooks.replay.engine_vllm import END, WORD, VllmEngine
from mope.serving_hooks.steward import ANYBODY
from tests.raw_predictions import KNOWN, lognormal

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed; tests/engines/releases.py fetches it and runs this file"
)
HOOK = "mope.serving_hooks.vllm.scheduler.make_scheduler"
POLICIES = ("fcfs", "vtc", "vtc-predicted", "equinox", "shortest-predicted", "deficit-round-robin")
REQUESTS = int(os.environ.get("MOPE_FUZZ_REQUESTS", 0))  # in all; by default one short case of each kind
SEED = int(os.environ.get("MOPE_FUZZ_SEED", 0))
A_CASE = 1500 if REQUESTS else 150  # requests
KINDS = len(POLICIES) * 2 * 2  # policies, bases, and with LoRA adapters or without
STEP_S = 0.02
MAX_LEN = 640

NESTED = ("acme", "acme/alice", "acme/bob", "acme/bob/x", "acme/", "/", "x", "x/y", "lora/a", ANYBODY, "a" * 300, None)
MANY = tuple(f"client-{number}" for number in range(220))
RAW = (pack(lognormal(20.0)), pack(lognormal(300.0)), "AAAA")
PREDICTIONS = (None, 1.0, 20.0, 60.0, 1e9, 0.0, -5.0, float("nan"), float("inf"), -float("inf"))


@dataclass
class Life:
    """A request from its arrival to its end, as vLLM's outputs tell it; `name` may be used again."""

    name: str
    client: str
    prompt: int
    length: int
    session: bool = False
    request: Any = None  # vLLM's
    delivered: int = 0  # tokens of the answer
    extended: int = 0  # tokens by which a session's prompt has grown
    cached: int | None = None  # prompt tokens that had been computed when it began; None before
    computed: int | None = None  # prompt tokens that were computed when it was aborted before its first token
    turns_left: int = 0
    ends: list[str] = field(default_factory=list)

    def service(self) -> int:
        """Weighted tokens that it must be charged."""
        if self.cached is None:
            return 0
        prompt = self.prompt + self.extended
        if self.computed is not None and not self.delivered:
            prompt = min(self.computed, prompt)
        return max(0, prompt - self.cached) + 2 * self.delivered


class Driven(VllmEngine):
    """The replay's engine, whose requests differ in more, and which may load KV cache from elsewhere."""

    def __init__(self, settings: EngineSettings, *, loads: bool, hook: dict[str, Any] | None, **more: Any) -> None:
        self.carried: dict[str, Any] = {}
        self.sampled: dict[str, Any] = {}
        self.arrived: Any = None  # done loading since the last step
        super().__init__(
            settings,
            scheduler=self._make(hook is not None, loads),
            options={"mope": hook} if hook is not None else None,
            **more,
        )

    @staticmethod
    def _make(ours: bool, loads: bool) -> Any:
        def make(**arguments: Any) -> Any:
            from vllm.v1.core.sched.async_scheduler import AsyncScheduler
            from vllm.v1.core.sched.scheduler import Scheduler

            from mope.serving_hooks.vllm.scheduler import make_scheduler

            config = arguments["vllm_config"]
            if loads:
                from vllm.config import KVTransferConfig

                config.scheduler_config.disable_hybrid_kv_cache_manager = True  # the connector knows one kind of cache
                config.kv_transfer_config = KVTransferConfig(
                    kv_connector="SlowConnector",
                    kv_role="kv_both",
                    kv_connector_module_path="tests.engines.slow_connector",
                )
            if ours:
                return make_scheduler(**arguments)
            return (AsyncScheduler if config.scheduler_config.async_scheduling else Scheduler)(**arguments)

        return make

    def request(self, life: Life, sampling: dict[str, Any], **more: Any) -> Any:
        """vLLM's request, not added yet."""
        keys = self._request_keys
        arguments = {
            "request_id": life.name,
            "prompt_token_ids": [WORD] * life.prompt,
            "sampling_params": self._sampling(stop_token_ids=[END], **sampling),
            "pooling_params": None,
            "arrival_time": self.now_s,
            "eos_token_id": END,
            "multi_modal_inputs": None,
            "multi_modal_kwargs": None,
            "multi_modal_hashes": None,
            "multi_modal_placeholders": None,
            "structured_output_request": None,
            **more,
        }
        return self._request(**{key: value for key, value in arguments.items() if key in keys})

    def adapter(self, name: str | None) -> Any:
        """A LoRA adapter as vLLM knows it."""
        return self._adapters[name] if name is not None else None

    def load(self, names: set[str]) -> None:
        """The KV cache of these requests has arrived; told with the next step's outputs."""
        from vllm.v1.outputs import KVConnectorOutput

        made, told = type(self)._output_class(), KVConnectorOutput(finished_recving=names)
        self._output = lambda **given: made(**given, kv_connector_output=told) if names else made(**given)

    @staticmethod
    def _output_class() -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        return ModelRunnerOutput


class Fuzz:
    """One engine and its random traffic."""

    def __init__(self, policy: str, is_async: bool, seed: int, *, with_adapters: bool, num_requests: int) -> None:
        self.draw = draw = random.Random(f"{policy}-{is_async}-{seed}-{with_adapters}")
        self.ours = policy != "stock"
        self.num_requests = num_requests
        self.loads = draw.random() < 0.5
        self.depth = 1 + is_async
        self.options = {
            "policy": policy,
            "summary_s": 0,
            "predictor": draw.choice(("none", "chat-micro")),
            "victims": draw.choice(("engine", "remaining", "counter")),
            "predicted_admission": draw.random() < 0.3,
            "bypass": draw.choice((0, 1, 8)),
            "lora_patience_s": draw.choice((0, 0.1, 1.0, 86_400)),
            "metrics_clients": 100_000,
            **draw.choice(({}, {"idle_clients": 3, "max_clients": 9})),
        }
        slots, kv_tokens = draw.choice((2, 8, 24)), draw.choice((800, 2000, 20_000))
        self.engine = Driven(
            EngineSettings(
                max_num_seqs=slots,
                max_num_batched_tokens=draw.choice((64, 512)),
                batches_in_flight=self.depth,
                max_tokens=MAX_LEN,
                max_loras=draw.choice((1, 2)),
            ),
            loads=self.loads,
            hook=self.options if self.ours else None,
            kv_tokens=kv_tokens,
            max_model_len=MAX_LEN,
            adapters=("a", "b", "c") if with_adapters else (),
        )
        self.adapters = (None, None, "a", "b", "c") if with_adapters else (None,)
        self.clients = draw.choice((NESTED, NESTED, MANY, ("flood",) * 9 + ("light",)))
        self.busy = draw.choice((0.4, 1.0, 3.0))  # requests that come in a step, on average
        self.scheduler = self.engine.scheduler
        self.lives: list[Life] = []
        self.now: dict[str, Life] = {}  # those that have not ended
        self.grammars: dict[str, int] = {}  # step at which each is compiled
        self.loading: dict[str, int] = {}  # step at which each is loaded
        self.in_flight: list[Batch] = []
        self.step_number = 0
        self.sessions = hasattr(self.scheduler, "_update_request_as_session") and (
            "resumable" in inspect.signature(self.engine._request.__init__).parameters
        )
        # with batches in flight vLLM to 0.30 fails on sessions, and to 0.33 it loses a session that was preempted
        if is_async and (kv_tokens < 20_000 or not hasattr(self.scheduler, "kv_holding_waiting")):
            self.sessions = False
        if self.sessions:
            self._watch_sessions()
        if self.loads:
            self._load_some()

    def _watch_sessions(self) -> None:
        original = self.scheduler._update_request_as_session

        def update(session: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
            self.now[session.request_id].extended += len(given.prompt_token_ids or ())
            return original(session, given, *args, **kwargs)

        self.scheduler._update_request_as_session = update

    def _load_some(self) -> None:
        connector, kept = self.scheduler.connector, random.Random(SEED)
        original = connector.get_num_new_matched_tokens

        def matched(request: Any, computed: int) -> tuple[int, bool]:
            # to vLLM 0.30, what is loaded after a preemption and given up meanwhile is charged nothing
            again = request.num_preemptions and not hasattr(self.scheduler, "kv_holding_waiting")
            return original(request, computed) if kept.random() < 0.4 and not again else (0, False)

        connector.get_num_new_matched_tokens = matched

    # -- traffic

    def names(self) -> Iterator[str]:
        """Names to send requests by: most of them new, some used before."""
        while True:
            used = self.draw.choice(self.lives).name if self.lives and self.draw.random() < 0.15 else None
            if used is not None and self._is_free(used):
                yield used
            else:
                yield f"r{len(self.lives)}"

    def _is_free(self, name: str) -> bool:
        """Whether vLLM has forgotten a name; a batch that is under way would be told of the newcomer."""
        in_flight = any(one.request_id == name for batch in self.in_flight for one in batch.work)
        return name not in self.scheduler.requests and not in_flight

    def send(self) -> None:
        """A request, or several answers to the same prompt, or a session."""
        draw = self.draw
        sampling: dict[str, Any] = {"max_tokens": draw.choice((1, 30, 200)), "min_tokens": 0}
        if draw.random() < 0.1:
            sampling.update(ignore_eos=True)
        if draw.random() < 0.1:
            sampling.update(min_tokens=min(sampling["max_tokens"], 10))
        client, tokens = draw.choice(self.clients), draw.choice(PREDICTIONS)
        raw = (draw.choice(RAW), KNOWN.write()) if draw.random() < 0.5 else ()  # then it is corrected, and teaches
        sampling["extra_args"] = carried = dict(Carried(client, tokens, draw.choice((None, 9.0, 1e9)), *raw).write())
        if draw.random() < 0.1 and carried:
            forged = {"mope_client": 7, "mope_seal": "f" * 32, "mope_tokens": "many", "mope_raw": b"x"}
            carried.update([draw.choice(list(forged.items()))])
            client = None
        adapter = draw.choice(self.adapters)
        said = client or (f"lora/{adapter}" if adapter else ANYBODY)
        prompt, session = draw.choice((1, 2, 15, 16, 17, 40, 200, 400)), self.sessions and draw.random() < 0.05
        session = session and sum(life.session for life in self.now.values()) < 2
        if session:
            prompt, sampling["max_tokens"] = 20, 12
        names, length = self.names(), draw.choice((1, 2, 8, 30, 100))
        for _ in range(draw.choice((1, 1, 1, 1, 3))):
            life = Life(next(names), said, prompt, length, session, turns_left=draw.randint(0, 3))
            more = {"priority": draw.randint(-3, 3), "lora_request": self.engine.adapter(adapter)}
            life.request = self.engine.request(life, sampling, **more, **({"resumable": True} if session else {}))
            if not session and draw.random() < 0.1:
                life.request.status = _waits_for_grammar()
                self.grammars[life.name] = self.step_number + draw.randint(0, 30)
            else:
                self.grammars.pop(life.name, None)
            self.lives.append(life)
            self.now[life.name] = life
            self.scheduler.add_request(life.request)
            if session:
                break

    def speak(self, end: bool = False) -> None:
        """Sessions go on, or end."""
        for life in [life for life in self.now.values() if life.session]:
            if not end and self.draw.random() < 0.8:
                continue
            go_on = life.turns_left > 0 and not end
            life.turns_left -= 1
            if life.turns_left < -1:  # it was told to end
                continue
            chunk = Life(life.name, life.client, self.draw.choice((1, 16, 30)), life.length)
            more = self.engine.request(chunk, {"max_tokens": 12}, **({"resumable": go_on}))
            self.scheduler.add_request(more)
            life.turns_left = -1 if not go_on else life.turns_left
            self._look_who_is_gone()

    def abort(self, names: list[str] | None) -> None:
        """Clients hang up; None for all of them."""
        for name in names if names is not None else list(self.now):
            life = self.now.pop(name, None)
            if life is not None:
                self._aborted(life)
        self.scheduler.finish_requests(names, _status("FINISHED_ABORTED"))

    def _aborted(self, life: Life) -> None:
        holds = life.request.num_computed_tokens and hasattr(self.scheduler, "kv_holding_waiting")
        if life.request.status == _status("RUNNING") or holds:
            life.computed = life.request.num_computed_tokens
        life.ends.append("aborted")

    def _look_who_is_gone(self) -> None:
        """Sessions whose clients said that they were over while vLLM waited for more."""
        for life in [life for life in self.now.values() if life.session]:
            if life.request.is_finished():
                life.ends.append("closed")
                del self.now[life.name]

    def interfere(self) -> None:
        """Whatever may happen between a step's beginning and its end."""
        draw = self.draw
        if draw.random() < 0.2 and self.now:
            self.abort([*draw.sample(list(self.now), min(len(self.now), draw.randint(1, 3))), "nobody"])
            if draw.random() < 0.5:
                self.send()
        if draw.random() < 0.003:
            self.abort(None)
        if draw.random() < 0.01:
            with suppress(RuntimeError, TypeError):  # KV cache is being loaded; or a release that cannot
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
        if draw.random() < 0.02 and hasattr(self.scheduler, "set_pause_state"):
            state = draw.choice(("PAUSED_NEW", "PAUSED_ALL", "UNPAUSED", "UNPAUSED"))
            self.scheduler.set_pause_state(type(self.scheduler.pause_state)[state])

    def step(self) -> int:
        """One step; how many tokens were scheduled."""
        self.engine.now_s += STEP_S
        self.step_number += 1
        for name, ready in list(self.grammars.items()):
            if ready <= self.step_number:
                life = self.now.get(name)
                if life is not None and life.request.status == _waits_for_grammar():
                    life.request.status = _status("WAITING")
                del self.grammars[name]
        batch = self.engine.schedule()
        self.in_flight.append(batch)
        for started in batch.handle.scheduled_new_reqs:
            life = self.now[started.req_id]
            if life.cached is None:
                life.cached = started.num_computed_tokens
        for name in getattr(batch.handle.kv_connector_metadata, "request_ids", ()):
            self.loading[name] = self.step_number + self.draw.randint(1, 12)
        return sum(one.tokens for one in batch.work)

    def deliver(self) -> None:
        """The oldest batch is done."""
        if self.loads:
            arrived = {name for name, ready in self.loading.items() if ready <= self.step_number}
            self.engine.load(arrived)
            for name in arrived:
                del self.loading[name]
        batch = self.in_flight.pop(0)
        for one in self.engine.deliver(batch, self._is_last):
            life = self.now[one.request_id]
            life.delivered += one.num_tokens
            if one.finished and not (life.session and not life.request.is_finished()):  # a session's turn ended
                life.ends.append("finished")
                del self.now[one.request_id]
        self._look_who_is_gone()

    def _is_last(self, name: str, tokens: int) -> bool:
        life = self.now.get(name)  # vLLM remembers what was given up while its KV cache is loaded
        return life is not None and tokens >= life.length

    def run(self) -> None:
        """All traffic, then the end of all that is left."""
        draw = self.draw
        while len(self.lives) < self.num_requests:
            for _ in range(int(draw.expovariate(1 / self.busy))):
                self.send()
            if self.sessions:
                self.speak()
            if draw.random() < 0.5:
                self.interfere()
            self.step()
            if draw.random() < 0.2:
                self.interfere()
            if len(self.in_flight) >= self.depth:
                self.deliver()
        self.drain()

    def drain(self) -> None:
        """Nobody comes or hangs up any more: at least one token in each step, or a load or a grammar under way."""
        if hasattr(self.scheduler, "set_pause_state"):
            self.scheduler.set_pause_state(type(self.scheduler.pause_state)["UNPAUSED"])
        idle = 0
        while self.now or self.loading:
            self.speak(end=True)
            idle = 0 if self.step() or self.loading or self.grammars else idle + 1
            if len(self.in_flight) >= self.depth:
                self.deliver()
            assert idle < 40, f"{len(self.now)} requests are stuck: {sorted(self.now)[:5]}"
            assert self.step_number < 400 * self.num_requests + 10_000, "requests go round and round"
        for _ in range(2):  # tells the scheduler what ended last
            self.step()
            while self.in_flight:
                self.deliver()

    # -- what must hold

    def check(self) -> None:
        """Every request ended once, books are empty, and charges are what was given."""
        assert Counter(len(life.ends) for life in self.lives) == {1: len(self.lives)}
        assert not self.scheduler.requests
        assert not self.scheduler.running
        assert self.scheduler.kv_cache_manager.usage == 0
        if self.ours:
            self._check_books()

    def _check_books(self) -> None:
        scheduler = self.scheduler
        steward, queue = scheduler.mope, scheduler.waiting
        assert scheduler.mope_guard.failure is None
        policy, ledger = steward.policy, steward.policy.ledger
        assert ledger.open_requests == ()
        assert (len(policy), policy.num_blocked, policy.num_aside, policy.num_front) == (0, 0, 0, 0)
        assert not steward.held
        assert [*queue.requests, *queue._later] == []
        assert len(queue.aside) == 0
        assert [*scheduler._begun, *scheduler._earlier, *scheduler._fresh, *scheduler._started] == []
        assert not any(account.num_waiting or account.num_open for account in ledger.clients())
        tallies = dict(steward.tallies.items())
        assert sum(tally.num_arrived for tally in tallies.values()) == len(self.lives)
        total = sum(tally.num_finished + tally.num_aborted for tally in tallies.values())
        assert total == len(self.lives)
        served = sum(life.service() for life in self.lives)
        assert sum(tally.charged.service for tally in tallies.values()) == served * 1_000_000
        if "max_clients" not in self.options:  # nobody was forgotten
            assert services_by_group(ledger) == self.served_by_group()

    def served_by_group(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for life in self.lives:
            total[client_path(life.client)[0]] += life.service()
        return {name: tokens for name, tokens in total.items() if tokens}


def services_by_group(ledger: Any) -> dict[str, float]:
    total: Counter[str] = Counter()
    for account in ledger.clients():
        total[account.path[0]] += account.charged.service / 1e6
    return {name: tokens for name, tokens in total.items() if tokens}


def _status(name: str) -> Any:
    from vllm.v1.request import RequestStatus

    return getattr(RequestStatus, name)


def _waits_for_grammar() -> Any:
    from vllm.v1.request import RequestStatus

    return getattr(RequestStatus, "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", None) or RequestStatus.WAITING_FOR_FSM


@pytest.mark.parametrize("with_adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("base", ["sync", "async"])
@pytest.mark.parametrize("policy", POLICIES)
def test_random_traffic_ends_once_and_is_charged_exactly(policy: str, base: str, with_adapters: bool) -> None:
    served = 0
    for seed in range(SEED, SEED + max(1, -(-REQUESTS // (KINDS * A_CASE)))):
        fuzz = Fuzz(policy, base == "async", seed, with_adapters=with_adapters, num_requests=A_CASE)
        try:
            fuzz.run()
            fuzz.check()
        except Exception as error:
            raise AssertionError(f"{policy} {base} seed {seed}, adapters {with_adapters}: {fuzz.options}") from error
        served += len(fuzz.lives)
    print(f"\n{policy:>20} {base:>5} {'adapters' if with_adapters else 'plain':>8}: {served} requests")


if __name__ == "__main__":
    for case in (False, True):
        one = Fuzz(sys.argv[1], sys.argv[2] == "async", int(sys.argv[3]), with_adapters=case, num_requests=1500)
        one.run()
        one.check()
        print(len(one.lives), "requests", one.step_number, "steps", Counter(life.ends[0] for life in one.lives))
