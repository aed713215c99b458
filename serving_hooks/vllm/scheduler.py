"""The scheduler half of the vLLM hook: `--scheduler-cls mope.serving_hooks.vllm.make_scheduler`.

In English: every request that waits is offered in the order of the policy, and otherwise vLLM schedules as it always
does. The hook replaces the waiting queue (`queue.FairQueue`), may reorder running requests so that vLLM preempts the
one that the policy names, and watches what starts and what ends. No line of vLLM's `schedule` is copied: a mixin over
whichever class the server would have used, which calls it and looks at the outcome. If anything of ours fails, one line
says so, and vLLM goes on in its own order.
"""

from __future__ import annotations

import atexit
import logging
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from mope.errors import ConfigError, UserError
from mope.fairness import IDLE, Load, Ticket
from mope.fairness.admission import fits
from mope.serving_hooks import metrics, secret
from mope.serving_hooks.adapters import AdapterTurns, Standing
from mope.serving_hooks.carried import seals
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.steward import Steward
from mope.serving_hooks.vllm import compat
from mope.serving_hooks.vllm.holding import Annex, HoldingQueue
from mope.serving_hooks.vllm.queue import FairQueue
from mope.serving_hooks.vllm.settings import hook_options

try:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
except ImportError:  # where there is none yet, nobody asks for it
    AsyncScheduler = Scheduler

if TYPE_CHECKING:
    from vllm.v1.request import Request

    _Base: Any = object
else:
    _Base = object

_TOKENS_LATE = 64  # by which a charge may lag behind an answer that has outgrown its prediction, or by an eighth of it
_LOOK_AFTER = 256  # steps after which a running request is looked at in any case
_STEPS_LATE = 16  # by which books may lag behind what has happened: work that is done together takes less time

logger = logging.getLogger("vllm.mope")  # below vLLM's own, so that its settings print it


class FairMixin(_Base):
    """Fair, length-aware scheduling over a vLLM scheduler."""

    waiting: Any
    running: list[Request]
    requests: dict[str, Request]
    finished_req_ids: set[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mope: Steward | None = None
        self.mope_metrics: metrics.Exporter | None = None
        self.mope_guard = Guard(logger, self._give_up)
        compat.log_as_vllm()
        options = hook_options(self.vllm_config)
        seals.use(secret.load(options))
        wrong = compat.mismatches(self)
        if wrong:
            told = f"mope does not fit this vLLM ({compat.installed()}): {'; '.join(wrong)}"
            if options.on_mismatch == "refuse":
                raise ConfigError(told)
            logger.error("%s. Requests are served in vLLM's own order.", told)
            return
        try:
            self.mope = Steward(options)
        except UserError:
            raise
        except Exception as error:
            self.mope_guard.fail(error, "starting")
            return
        lora = getattr(self, "lora_config", None)
        adapters = AdapterTurns(lora.max_loras, options.lora_patience_s) if lora else None
        self._queue = self.waiting = FairQueue(
            self.mope,
            self.mope_guard,
            self._load,
            self._has_room,
            self.generated,
            self._settle,
            adapters,
        )
        self._holding: HoldingQueue | None = None
        if hasattr(self, "kv_holding_waiting"):
            self._holding = self.kv_holding_waiting = HoldingQueue(
                self.mope_guard,
                self._queue,
                self._standing,
                self._is_open,
                self.scheduler_config.max_num_seqs,
                adapters,
            )
            if getattr(self, "connector", None) is not None:
                self._queue.hold_with(self._holding)
        elif hasattr(self, "skipped_waiting"):
            self.skipped_waiting = Annex(self._queue)
        self._step = self._looked = self._caught_up = 0
        # what has happened and is not booked yet, each with its time
        self._started: list[tuple[Request, int, float]] = []  # requests, and tokens that the prefix cache held
        self._first_out: list[tuple[Request, float]] = []
        self._over: list[tuple[str, float]] = []
        self._fresh: list[Request] = []  # requests that run, and had no token when they were last looked at
        self._due: dict[int, list[str]] = {}  # step of the engine -> requests to look at then
        self._begun: dict[str, Request] = {}  # requests that have run, until they end
        self._earlier: dict[str, int] = {}  # tokens of a session's earlier answers
        self._tokens_a_step = 1 + int(getattr(self, "num_spec_tokens", 0) or 0)
        self._block_size = int(getattr(self, "block_size", None) or self.cache_config.block_size)
        self._capacity = int(self.cache_config.num_gpu_blocks or 0) * self._block_size  # tokens of KV cache
        self._scheduling = False
        atexit.register(self._close)
        release = compat.installed()
        if compat.standing(release) != "tested":
            logger.warning("mope: vLLM %s is %s (%s)", release, compat.standing(release), ", ".join(compat.TESTED))
        logger.info(
            "mope is on: policy %s over %s, clients by %s, predictor %s, recalibration %s, predicted admission %s, "
            "victims by %s",
            options.policy,
            type(self).__mro__[2].__name__,
            options.identity,
            options.predictor,
            "on" if options.recalibrate else "off",
            "on" if options.predicted_admission else "off",
            options.victims,
        )
        rank = compat.data_parallel_rank(self.vllm_config)
        self.mope_metrics = metrics.start(self.mope, self.mope_guard, rank=rank, engine=f"vLLM {release}")

    # -- what vLLM calls

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does, with our queue in place of its own."""
        if self.mope is None or not self.mope_guard.ok:
            return super().schedule(*args, **kwargs)
        self.mope_guard.run(self._before_step, None, "preparing a step")
        self._scheduling = True
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self._scheduling = False
        self.mope_guard.run(lambda: self._after_schedule(output), None, "looking at a step")
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does; then what began and what ended is booked."""
        outputs = super().update_from_output(*args, **kwargs)
        if self.mope is not None:
            self.mope_guard.run(self._after_output, None, "booking a step")
        return outputs

    def finish_requests(self, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does; then what was given up is booked."""
        if request_ids is not None and not isinstance(request_ids, str):
            request_ids = list(request_ids)
        result = super().finish_requests(request_ids, *args, **kwargs)
        if self.mope is not None:
            self.mope_guard.run(self._after_aborts, None, "booking requests that were given up")
        return result

    def _update_request_as_session(self, session: Request, *args: Any, **kwargs: Any) -> Any:
        """A session with streamed input goes on: vLLM makes a prompt of what it has, and adds the next input to it."""
        generated = session.num_output_tokens
        result = super()._update_request_as_session(session, *args, **kwargs)
        if self.mope is not None:
            more = session.num_tokens - session.num_computed_tokens
            self.mope_guard.run(lambda: self._next_input(session, generated, more), None, "booking a session's input")
        return result

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        """Keeps the state, then as vLLM does."""
        self._close()
        if self.mope_metrics is not None:
            self.mope_metrics.close()
        parent = getattr(super(), "shutdown", None)
        return parent(*args, **kwargs) if parent is not None else None

    # -- around a step

    def _before_step(self) -> None:
        steward = self.mope
        if steward is None:
            return
        self._step += 1
        if self._step % _STEPS_LATE == 1:  # from the first on: a server may be killed after one short answer
            steward.between_steps()
        if steward.options.victims != "engine" and len(self.running) > 1:
            self._order_victims(steward)
        queue = self._queue
        if queue.adapters is not None:
            self._turn_adapters(queue.adapters)
        queue.begin(max(0, self.scheduler_config.max_num_seqs - len(self.running)))
        if self._holding is not None:
            self._holding.refresh()

    def _turn_adapters(self, turns: AdapterTurns) -> None:
        """Tells who runs and who waits on which adapter."""
        running: dict[int, list[Request]] = {}
        for request in self.running:
            if request.lora_request is not None:
                running.setdefault(request.lora_request.lora_int_id, []).append(request)

        def waiting(adapter: int) -> Standing | None:
            tickets = self._queue.aside.waiting_for(adapter)
            return min(map(self._queue.standing, tickets)) if tickets else None

        def ahead(adapter: int) -> Standing:
            return min(map(self._standing, running[adapter]))

        turns.begin(running, self.mope.clock() if self.mope is not None else 0.0, waiting, ahead)

    def _standing(self, request: Request) -> Standing:
        """What a request's client has had: the less, the sooner its turn."""
        ticket = self.mope.policy.find(request.request_id) if self.mope is not None else None
        return self._queue.standing(ticket) if ticket is not None else []

    def _order_victims(self, steward: Steward) -> None:
        """vLLM preempts whoever runs last in its list."""
        for request in self.running:
            ticket = steward.policy.find(request.request_id)
            if ticket is not None:
                ticket.generated = self.generated(request)
        first_to_go = steward.policy.victims(request.request_id for request in self.running)
        place = {request_id: -position for position, request_id in enumerate(first_to_go)}
        self.running.sort(key=lambda request: place[request.request_id])

    def _after_schedule(self, output: Any) -> None:
        steward, queue = self.mope, self._queue
        if steward is None:
            return
        if output.scheduled_new_reqs:
            now = steward.clock()
            for started in output.scheduled_new_reqs:
                request_id = started.req_id
                request = self.requests.get(request_id)
                if request is not None and request_id not in self._begun:
                    self._begun[request_id] = request
                    self._fresh.append(request)
                    self._started.append((request, started.num_computed_tokens, now))
        elif queue.head is None and not steward.policy.num_blocked:
            return
        self._mind_the_head(output)

    def _mind_the_head(self, output: Any) -> None:
        """A head that found no memory lets another client's head try in the next step, then comes first again."""
        queue, policy = self._queue, self.mope.policy if self.mope is not None else None
        if policy is None:
            return
        policy.unblock()
        head = queue.take_head()
        if head is not None and self._holding is not None:
            self._holding.found_no_room()
        if head is not None and not self.running and self._holding is None:
            queue.let_holders_go_first()
        if head is None or head.state != "waiting" or not self.running:
            return
        config = self.scheduler_config
        has_slot = len(self.running) < config.max_num_seqs
        has_budget = output.total_num_scheduled_tokens < config.max_num_batched_tokens
        may_be_passed = not policy.num_front and head.num_bypassed < policy.config.bypass
        if has_slot and has_budget and may_be_passed and self._step % 2:
            policy.block(head)

    def _after_output(self) -> None:
        steward = self.mope
        if steward is None:
            return
        if self._fresh or self.finished_req_ids:
            now = steward.clock()
            if self._fresh:
                self._look_at_fresh(now)
            self._over.extend((request_id, now) for request_id in self.finished_req_ids)
        # tokens are charged as they are delivered, or late; the engine may be idle from here on
        late = 1 if steward.options.policy == "vtc" else _STEPS_LATE
        if self._step - self._caught_up >= late or not self.running:
            self._catch_up(leave=bool(self.running))
        if steward.store is not None:
            steward.exchange()

    def _after_aborts(self) -> None:
        if self.mope is not None:
            now = self.mope.clock()
            self._over.extend((request_id, now) for request_id in self.finished_req_ids)
            if not self.running:
                self._catch_up()

    def _catch_up(self, *, leave: bool = False) -> None:
        """Books what has happened since the last time; `leave` is that of `FairQueue.catch_up`."""
        steward = self.mope
        if steward is None:
            return
        self._caught_up = self._step
        self._queue.catch_up(leave=leave)
        if self._started:
            started, self._started = self._started, []
            for request, cached_tokens, at_s in started:
                self._book_start(steward, request, cached_tokens, at_s)
        if self._first_out:
            first, self._first_out = self._first_out, []
            for request, at_s in first:
                steward.first_token(request.request_id, at_s)
                ticket = steward.policy.find(request.request_id)
                if ticket is not None:
                    ticket.generated = self.generated(request)
                    self._look_later(ticket)
        for step in range(self._looked + 1, self._step + 1):
            for request_id in self._due.pop(step, ()):
                self._look_at(request_id)
        self._looked = self._step
        if self._over:
            over, self._over = self._over, []
            for request_id, at_s in over:
                self._book_end(steward, request_id, at_s)

    def _settle(self, request_id: str) -> None:
        """Before a name is used: an earlier request of that name may be over and not booked."""
        if self.mope is not None and (request_id in self.mope.held or request_id in self._begun):
            self._catch_up()

    def _book_start(self, steward: Steward, request: Request, cached_tokens: int, at_s: float) -> None:
        request_id = request.request_id
        if request_id not in steward.held:  # it came by another of vLLM's queues
            self._queue.announce(request)
            steward.policy.admit(steward.policy.find(request_id))
        steward.admitted(request_id, at_s)
        if cached_tokens:
            steward.cached(request_id, cached_tokens)

    def _next_input(self, session: Request, generated: int, prompt_tokens: int) -> None:
        """A session stays one request whose prompt grows; earlier answers are no longer among its output tokens."""
        if self.mope is not None and session.request_id in self.mope.held:
            self._earlier[session.request_id] = self._earlier.get(session.request_id, 0) + generated
            self.mope.policy.extend(session.request_id, prompt_tokens)

    def generated(self, request: Request) -> int:
        """Tokens that a request was given, in all of its session."""
        return request.num_output_tokens + (self._earlier.get(request.request_id, 0) if self._earlier else 0)

    def _look_at_fresh(self, now: float) -> None:
        """Whether their first tokens are out."""
        still = []
        for request in self._fresh:
            if request.num_output_tokens:
                self._first_out.append((request, now))
            elif request.request_id in self._begun and not request.is_finished():
                still.append(request)
        self._fresh = still

    def _look_at(self, request_id: str) -> None:
        """Whether it has outgrown what it was charged."""
        steward, request = self.mope, self._begun.get(request_id)
        if steward is None or request is None:
            return
        ticket = steward.policy.find(request_id)
        if ticket is None:
            return
        ticket.generated = generated = self.generated(request)
        if generated > ticket.charged_tokens and ticket.state == "running":
            steward.policy.progress(request_id, generated)
        self._look_later(ticket)

    def _look_later(self, ticket: Ticket) -> None:
        """Notes when it may have outgrown what it was charged by as much as a charge may lag behind."""
        steward, generated = self.mope, ticket.generated
        if steward is None:
            return
        step = self._step + 1
        if steward.options.policy != "vtc":
            left = max(int(ticket.charged_tokens) - generated, 0) + max(_TOKENS_LATE, generated // 8)
            step += min(_LOOK_AFTER, left // self._tokens_a_step)
            step -= step % -_STEPS_LATE  # several of them in the same step
        self._due.setdefault(step, []).append(ticket.request_id)

    def _book_end(self, steward: Steward, request_id: str, at_s: float) -> None:
        """A request ended by itself, or was given up."""
        request = self._begun.get(request_id)
        named_so = request if request is not None else self.requests.get(request_id)
        if named_so is not None and not named_so.is_finished():
            return  # vLLM lists what ended until its next step; the name may be another request's by now
        self._begun.pop(request_id, None)
        if request_id in steward.held:
            if request is None:  # it never ran
                steward.ended(request_id, 0, aborted=True, computed=0, at_s=at_s)
            else:
                computed = min(request.num_computed_tokens, request.num_prompt_tokens)
                generated = self.generated(request)
                steward.ended(
                    request_id,
                    generated,
                    aborted=request.status == RequestStatus.FINISHED_ABORTED,
                    capped=request.status == RequestStatus.FINISHED_LENGTH_CAPPED,
                    computed=computed if not generated else None,
                    forced=_is_forced(request, generated),
                    at_s=at_s,
                )
        self._earlier.pop(request_id, None)

    # -- what the engine is doing

    def _load(self) -> Load:
        usage = getattr(self.kv_cache_manager, "usage", 0.0)
        num_running = len(self.running)
        if not num_running:
            return IDLE
        return Load(num_running=num_running, context_tokens=int(usage * self._capacity))

    def _has_room(self, candidate: Ticket) -> bool:
        """Whether all who run and this one will fit, as far as predictions go."""
        steward = self.mope
        if steward is None or not self._scheduling or not steward.options.predicted_admission:
            return True
        running = []
        for request in self.running:
            ticket = steward.policy.find(request.request_id)
            if ticket is not None:
                ticket.generated = self.generated(request)
                running.append(self._in_blocks(request.num_tokens, ticket.predicted_remaining))
        need = self._in_blocks(candidate.prompt_tokens + candidate.generated, candidate.predicted_remaining)
        return fits(need, running, self._capacity, margin=steward.options.kv_margin)

    def _in_blocks(self, context: int, remaining: float) -> tuple[int, float]:
        """What a request holds and adds, the part of its last block that stays empty counted as held."""
        more = int(remaining)
        return context - (context + more) % -self._block_size, remaining

    def _is_open(self) -> bool:
        return getattr(getattr(self, "_pause_state", None), "name", "UNPAUSED") == "UNPAUSED"

    # -- the end

    def _give_up(self) -> None:
        queue = getattr(self, "_queue", None)
        if queue is not None:
            queue.give_up()

    def _close(self) -> None:
        if self.mope is not None and self.mope_guard.ok:
            atexit.unregister(self._close)
            self.mope_guard.run(self.mope.close, None, "keeping the state")


def _is_forced(request: Request, generated: int) -> bool:
    """Whether a client forced the length of an answer."""
    given = request.sampling_params
    return given is not None and (given.ignore_eos or 2 * given.min_tokens > generated)


class FairScheduler(FairMixin, Scheduler):
    """Over vLLM's scheduler for one batch at a time."""


class FairAsyncScheduler(FairMixin, AsyncScheduler):
    """Over vLLM's scheduler for batches in flight."""


def _over(base: type) -> type:
    """The fair scheduler over a class of vLLM's."""
    for known in (FairScheduler, FairAsyncScheduler):
        if base is known.__bases__[1]:
            return known
    return type(f"Fair{base.__name__}", (FairMixin, base), {"__doc__": f"Over vLLM's {base.__name__}."})


def _stock(vllm_config: Any) -> type:
    """The class that vLLM would use if nobody named one."""
    config = vllm_config.scheduler_config
    overlapped = bool(getattr(config, "async_scheduling", False))
    if getattr(vllm_config, "diffusion_config", None) is not None:  # vLLM names these where it makes its configuration
        from vllm.v1.core.sched import diffusion_scheduler

        return diffusion_scheduler.DiffusionAsyncScheduler if overlapped else diffusion_scheduler.DiffusionScheduler
    if callable(getattr(config, "get_scheduler_cls", None)):
        unnamed = copy(config)
        unnamed.scheduler_cls = None
        found = unnamed.get_scheduler_cls()
        if isinstance(found, type):
            return found
    return AsyncScheduler if overlapped else Scheduler


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """The fair scheduler over the class that this server would use: what `--scheduler-cls` names.

    Raises:
        ConfigError: an option that cannot be used, or a mismatch where `on_mismatch` is `refuse`.
    """
    vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    return _over(_stock(vllm_config))(*args, **kwargs)
