"""The scheduler half of the SGLang hook: who waits, in which order, and what is charged.

In English: SGLang sorts its waiting queue in place before it admits from the front; we put the requests that the policy
would pick first to the front, in that order, and leave the rest as they stand. We see requests come
(`_add_request_to_queue`), be admitted (`PrefillAdder.add_one_req`), grow and end (`process_batch_result`); what left
the queue by other ways is noticed when the queue is sorted next. SGLang's own code does all the rest.

Every tensor-parallel rank runs this by itself on the same requests, and ranks that disagree corrupt outputs without
any error. So no clock, no measured latency, no thread and no learned figure has a say in order or charges here: what
is learned is learned in the front end and carried with each request. What may fail on one rank alone (log, file,
metrics) is kept apart from what decides.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from mope.fairness import IDLE, Load
from mope.serving_hooks import metrics, secret
from mope.serving_hooks.carried import Carried, seals
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang import compat
from mope.serving_hooks.sglang.settings import read_options
from mope.serving_hooks.sglang.skips import STEP_S, Skips, max_adapters
from mope.serving_hooks.steward import Steward

if TYPE_CHECKING:
    from mope.fairness.tickets import Ticket

LEAST_PICKS, MOST_PICKS = 64, 512  # successive admissions that are foreseen; of those behind, none is admitted now
_SWEEP_EVERY = 64  # results between two looks for requests that ended unseen
ATTRIBUTE = "mope"  # of SGLang's scheduler, its policy and its requests: what we remember of them

logger = logging.getLogger("mope")


class Mark:
    """What we remember of a request of SGLang's, on the request itself.

    Attributes:
        fair: the scheduler's half that it belongs to.
        number: in order of arrival.
        name: the same as the steward's id: a caller may send two requests with one `rid`.
        ticket: of the policy.
        read_tokens: tokens of its prompt that have been read, as far as we saw.
    """

    __slots__ = ("fair", "name", "number", "read_tokens", "ticket")

    def __init__(self, fair: FairScheduling, number: int, ticket: Ticket) -> None:
        self.fair, self.number, self.name, self.ticket = fair, number, str(number), ticket
        self.read_tokens = 0


class FairScheduling:
    """Fair, length-aware scheduling for one scheduler of SGLang's.

    Attributes:
        steward: keeps the policy and its books.
        guard: of all that decides.
        queued: requests that wait, by our id.
        running: requests that were admitted and have not ended, by our id.
        rank: which of the schedulers this is.
        skips: requests that cannot run now, whatever their turn.
        bypassed: why no front end of ours writes what is carried with requests; None if one does.
        metrics: what serves them; None if nobody asked.
    """

    def __init__(self, scheduler: Any, options: HookOptions) -> None:
        """Takes up its work.

        Args:
            scheduler: SGLang's.
            options: `policy` is the one that `--schedule-policy` names.

        Raises:
            ConfigError: options that cannot be used.
        """
        server_args = scheduler.server_args
        self.scheduler = scheduler
        self.rank = compat.ranks(scheduler)
        self.bypassed = compat.bypassed_front(server_args)
        self._sealed = False
        if self.rank.nodes == 1:
            self.check_seals(options)
        self.guard = Guard(logger, self._give_up)
        self.steward = Steward(self._own(options))
        if not self.rank.first:  # the first rank keeps the state and speaks for all
            self.steward.options = self.steward.options.model_copy(update={"state": None, "summary_s": 0})
        self.steward.exact = self.rank.size > 1
        self.queued: dict[str, Any] = {}
        self.running: dict[str, Any] = {}
        self._fresh: list[Any] = []  # admitted, and not yet seen with what the prefix cache held
        self.skips = Skips(self.steward.policy, self._adapter_of, max_adapters(scheduler), options.lora_patience_s)
        self._number = 0
        self._results = 0
        # a prefill server's requests end after their KV cache was sent, which is no step
        reads_only = getattr(server_args, "disaggregation_mode", "null") == "prefill"
        self._sweep_every = 1 if reads_only else _SWEEP_EVERY
        self._load: Load | None = None
        self._told_aside = False
        self.metrics: metrics.Exporter | None = None

    def _own(self, options: HookOptions) -> HookOptions:
        """Options of this rank: without what would part it from others, with a file of its own for each replica."""
        changes: dict[str, Any] = {"recalibrate": False}  # predictions come corrected from the front end
        if options.state is not None and self.rank.nodes > 1:
            logger.warning("mope keeps no state: ranks on other machines could not read %s", options.state)
            changes["state"] = None
        elif options.state is not None and self.rank.replica is not None:
            changes["state"] = options.state.with_name(
                f"{options.state.stem}-dp{self.rank.replica}{options.state.suffix}"
            )
        if options.store is not None and self.rank.size > 1:
            logger.warning("mope shares no counters: %d ranks would hear of them at different times", self.rank.size)
            changes["store"] = None
        return options.model_copy(update=changes)

    def check_seals(self, options: HookOptions) -> None:
        """Believes only what the front end has sealed, from now on.

        Ranks on other machines have no common secret unless all were given the same, and ranks that disagree on a seal
        corrupt answers. There the front end's removing of what callers wrote has to do.
        """
        seals.use(secret.load(options))
        self._sealed = True

    def announce(self, applied: int, known: int, without: Sequence[str] = ()) -> None:
        """Says what is on, and what is not.

        Args:
            applied: hooks that SGLang has applied.
            known: all that there are.
            without: what is lost without the others.
        """
        if not self.rank.first:
            return
        options, release = self.steward.options, compat.installed()
        if compat.standing(release) != "tested":
            logger.warning("mope: SGLang %s is %s (%s)", release, compat.standing(release), ", ".join(compat.TESTED))
        if without:
            logger.warning("mope goes without %s: this SGLang has no place for it", ", ".join(without))
        if self.bypassed:
            logger.warning("mope: %s; all requests count as one client without predictions", self.bypassed)
        for blind in compat.not_ordered(self.scheduler.server_args):
            logger.warning("mope: %s", blind)
        if self.rank.nodes > 1:
            self._tell_of_seals()
        logger.info(
            "mope is on: policy %s, %d of %d hooks, clients by %s, predictor %s, predicted admission %s, victims by %s",
            options.policy,
            applied,
            known,
            options.identity,
            options.predictor,
            "on" if options.predicted_admission else "off",
            options.victims,
        )
        atexit.register(self.aside, self.steward.close, "keeping its state")
        self.metrics = metrics.start(
            self.steward, self.guard, rank=self.rank.replica or 0, engine=f"SGLang {compat.installed()}"
        )

    def _tell_of_seals(self) -> None:
        if self._sealed:
            logger.info("mope checks seals: all %d nodes were given the same secret", self.rank.nodes)
            return
        logger.warning(
            "mope checks no seals, because not all of the %d nodes were given the same secret: the schedulers believe "
            "any client and prediction that reaches them. This server's front end removes what callers wrote; nothing "
            "else may reach the schedulers. Give each node the option `secret` with the same content",
            self.rank.nodes,
        )

    # -- a request's life

    def arrived(self, req: Any, *, retracted: bool = False) -> None:
        """A request stands in the queue: a new one, or one that lost its place."""
        mark: Mark | None = getattr(req, ATTRIBUTE, None)
        if mark is not None and mark.name in self.running:
            del self.running[mark.name]
            self.queued[mark.name] = req
            self.steward.preempted(mark.name, len(req.output_ids))
        elif mark is None or mark.name not in self.queued:
            self._welcome(req)

    def _welcome(self, req: Any) -> None:
        self._number += 1
        nothing: tuple[Carried, int | None, float | None] = (Carried(), None, None)
        carried, cap, known = self.guard.attempt(lambda: self._read(req), nothing, "reading a request")
        ticket = self.steward.arrive(
            str(self._number),
            carried,
            len(req.origin_input_ids),
            max_tokens=cap,
            known_tokens=known,
            fallback_client=self._fallback_client(req),
            load=self._engine_load(),
        )
        mark = Mark(self, self._number, ticket)
        setattr(req, ATTRIBUTE, mark)
        self.queued[mark.name] = req
        self.skips.arrived(ticket, self._now_s())

    def _read(self, req: Any) -> tuple[Carried, int | None, float | None]:
        """What is carried with a request, its cap, and its response tokens where that is no question."""
        parameters = req.sampling_params
        cap = getattr(parameters, "max_new_tokens", None)
        carried = Carried()
        if not self.bypassed:
            carried = Carried.read(getattr(parameters, "custom_params", None), sealed=self._sealed)
        known: float | None = None
        if cap is not None and getattr(parameters, "ignore_eos", False):
            known = float(max(cap, 1))
        elif cap == 0 or not self.scheduler.is_generation:  # only to be read
            known = 1.0
        return carried, cap, known

    def _fallback_client(self, req: Any) -> str | None:
        options = self.steward.options
        by_routing_key = options.identity == "header" and options.client_header.lower() == compat.ROUTING_HEADER
        if self.bypassed and by_routing_key and getattr(req, "routing_key", None):
            return str(req.routing_key)  # which a gateway sets, and every front end of SGLang's carries
        adapter = getattr(req, "lora_id", None)
        return f"lora/{adapter}" if adapter else None

    def admitted(self, req: Any) -> None:
        """A request begins to run, or goes on."""
        mark: Mark | None = getattr(req, ATTRIBUTE, None)
        if mark is None or mark.name not in self.queued:
            return
        del self.queued[mark.name]
        self.skips.admitted(mark.ticket, getattr(req, "lora_id", None))
        first = mark.ticket.state == "waiting"
        self.steward.policy.admit(mark.ticket)
        self.running[mark.name] = req
        if first:
            self.steward.admitted(mark.name)
            self._fresh.append(req)

    def _look_at_fresh(self) -> None:
        """Books what the prefix cache held for those who were admitted since."""
        for req in self._fresh:
            if (cached := int(req.cached_tokens)) > 0:
                mark: Mark = getattr(req, ATTRIBUTE)
                self.steward.cached(mark.name, min(cached, mark.ticket.prompt_tokens))
        self._fresh.clear()

    def booked(self, batch: Any) -> None:
        """A step's results are in."""
        self._load = None
        self._look_at_fresh()
        steward = self.steward
        for req in batch.reqs:
            mark: Mark | None = getattr(req, ATTRIBUTE, None)
            if mark is None or mark.name not in self.running:
                continue  # a request that ended or was retracted since, or is none of ours
            if req.finished():
                self.ended(req)
                continue
            generated = len(req.output_ids)
            if not generated:
                mark.read_tokens = max(mark.read_tokens, compat.read_tokens(req))
                continue
            ticket = mark.ticket
            if not ticket.generated:
                steward.first_token(mark.name)
            ticket.generated = generated
            if generated > ticket.charged_tokens:
                steward.policy.progress(mark.name, generated)
        self._results += 1
        if self.queued and not self.scheduler.waiting_queue:  # an empty queue is not sorted
            self.reconcile(self.scheduler.waiting_queue)
        if self._results % self._sweep_every == 0:
            for req in [req for req in self.running.values() if req.finished()]:
                self.ended(req)

    def ended(self, req: Any, *, aborted: bool = False) -> None:
        """A request is over.

        Args:
            req: it.
            aborted: it was given up without SGLang's noting a reason on it.
        """
        mark: Mark | None = getattr(req, ATTRIBUTE, None)
        if mark is None or (self.running.pop(mark.name, None) is None and self.queued.pop(mark.name, None) is None):
            return
        self.skips.ended(mark.ticket)
        reason = type(req.finished_reason).__name__
        generated = len(req.output_ids_through_stop) if req.finished() else len(req.output_ids)
        aborted = aborted or reason == "FINISH_ABORT"
        begun = mark.ticket.state != "waiting"
        if generated and begun:
            self.steward.first_token(mark.name)  # nothing happens if it was out already
        self.steward.ended(
            mark.name,
            generated,
            aborted=aborted,
            capped=reason == "FINISH_LENGTH",
            computed=(mark.read_tokens if begun else 0) if aborted and not generated else None,
        )

    # -- the order

    def order(self, waiting_queue: list[Any], running_batch: Any = None) -> None:
        """Puts who is next to the front of SGLang's list, in place; the others stay as they stand."""
        self._load = None
        self._look_at_fresh()
        free = int(getattr(self.scheduler, "max_running_requests", MOST_PICKS) or MOST_PICKS) - len(self.running)
        self.skips.begin(self._on_adapters(), self._now_s(), free)
        # those that can be admitted now, and some more; SGLang may pass over some
        num_picks = MOST_PICKS if self.skips.found else min(MOST_PICKS, max(LEAST_PICKS, free))
        for attempt in (1, 2):
            first = [self.queued[ticket.request_id] for ticket in self.skips.picks(num_picks)]
            chosen = set(first)
            rest = [req for req in waiting_queue if req not in chosen]
            if len(first) + len(rest) == len(waiting_queue) == len(self.queued):
                break
            if attempt == 1:
                self.reconcile(waiting_queue)
            else:  # the same request twice, or whatever else: SGLang's list stays as it is
                return
        waiting_queue[:] = first + rest

    def _on_adapters(self) -> list[tuple[str | None, Ticket]]:
        """Adapter and ticket of each request that runs; needed where adapters take turns."""
        if self.skips.turns is None:
            return []
        return [(getattr(req, "lora_id", None), getattr(req, ATTRIBUTE).ticket) for req in self.running.values()]

    def _adapter_of(self, ticket: Ticket) -> str | None:
        adapter: str | None = getattr(self.queued[ticket.request_id], "lora_id", None)
        return adapter

    def _now_s(self) -> float:
        """Seconds; of steps where ranks must agree, for their clocks do not."""
        return self._results * STEP_S if self.rank.size > 1 else self.steward.clock()

    def reconcile(self, waiting_queue: list[Any]) -> None:
        """Takes note of requests that came to the queue or left it by ways that no hook of ours sees."""
        here = set(waiting_queue)
        for req in [req for req in self.queued.values() if req not in here]:
            self.ended(req, aborted=True)
        for req in waiting_queue:
            mark: Mark | None = getattr(req, ATTRIBUTE, None)
            if mark is None or mark.name not in self.queued:
                self.arrived(req)

    # -- what the engine is doing

    def _engine_load(self) -> Load:
        """The same on all ranks: it is counted in requests and tokens of theirs. Once a step."""
        if self._load is None:
            running = self.running.values()
            context = sum(len(req.origin_input_ids) + len(req.output_ids) for req in running)
            self._load = Load(num_running=len(running), context_tokens=context) if running else IDLE
        return self._load

    # -- beside the order

    def aside(self, action: Callable[[], None], doing: str) -> None:
        """Does what may fail on one rank alone; a failure is told once and changes no order."""
        try:
            action()
        except Exception:
            if not self._told_aside:
                self._told_aside = True
                logger.exception("mope failed while %s; requests are scheduled as before", doing)

    def state(self) -> dict[str, Any]:
        """What goes on, as plain JSON values."""
        steward, policy = self.steward, self.steward.policy
        clients: list[Any] = []
        for account in policy.ledger.clients():
            if len(clients) == steward.options.metrics_clients:
                break
            clients.append(
                {
                    "client": "/".join(account.path),
                    "counter": account.counter,
                    "service": account.charged.service,
                    "ufc": account.charged.ufc,
                    "rfc": account.charged.rfc,
                    "hf": account.charged.hf,
                    "waiting": account.num_waiting,
                    "open": account.num_open,
                }
            )
        return {
            "policy": steward.options.policy,
            "on": self.guard.ok,
            "failure": self.guard.failure,
            "unsealed": seals.num_refused,
            "waiting": len(self.queued),
            "running": len(self.running),
            "front_end": self.bypassed or "hooked",
            "total": dict(zip(("service", "ufc", "rfc", "hf"), policy.ledger.total, strict=True)),
            "clients": clients,
            "tallies": {
                name: {
                    "arrived": tally.num_arrived,
                    "finished": tally.num_finished,
                    "aborted": tally.num_aborted,
                    "preempted": tally.num_preempted,
                    "prompt_tokens": tally.prompt_tokens,
                    "cached_tokens": tally.cached_tokens,
                    "response_tokens": tally.response_tokens,
                    "predicted": tally.num_predicted,
                    "ttft_mean_s": round(tally.ttft_s.mean, 4),
                    "queue_mean_s": round(tally.queue_s.mean, 4),
                }
                for name, tally in steward.tallies.items()
            },
        }

    def _give_up(self) -> None:
        """SGLang goes on in its own order: that of arrival, the same on all ranks."""
        queue = self.scheduler.waiting_queue
        known = [req for req in queue if getattr(req, ATTRIBUTE, None) is not None]
        others = [req for req in queue if getattr(req, ATTRIBUTE, None) is None]
        queue[:] = sorted(known, key=_number) + others


_number = attrgetter(f"{ATTRIBUTE}.number")


# -- hooks


def validate_policy(original: Any, schedule_policy: Any, policy: str, *args: Any, **kwargs: Any) -> Any:
    """Around `SchedulePolicy._validate_and_adjust_policy`: below ours, SGLang's own order is that of arrival."""
    return original(schedule_policy, "fcfs" if policy in compat.POLICIES else policy, *args, **kwargs)


def begin(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """After `Scheduler.init_schedule_policy`: takes up its work if the operator chose a policy of ours.

    Raises:
        ConfigError: options that cannot be used; the server does not start.
    """
    name = compat.chosen_policy(scheduler)
    if name is None:
        return
    from mope.serving_hooks.sglang import hooks, nodes

    options = read_options(name)
    fair = FairScheduling(scheduler, options)
    if fair.rank.nodes > 1:
        told = nodes.gather(nodes.deciding(options, fair.bypassed), fair.rank.first)
        nodes.expect_same(told)
        if nodes.same_secret(told):
            fair.check_seals(options)
    setattr(scheduler, ATTRIBUTE, fair)
    setattr(scheduler.policy, ATTRIBUTE, fair)
    applied = hooks.applied()
    fair.announce(len(applied), len(hooks.HOOKS), [hook.purpose for hook in hooks.HOOKS if hook not in applied])


def can_schedule_lora_req(original: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `Scheduler.can_schedule_lora_req`: no request of an adapter that is drained for another."""
    fair: FairScheduling | None = getattr(scheduler, ATTRIBUTE, None)
    if fair is not None and not fair.guard.run(lambda: fair.skips.admits(req.lora_id), True, "choosing adapters"):
        return False
    return original(scheduler, req, *args, **kwargs)


def calc_priority(original: Any, schedule_policy: Any, waiting_queue: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Around `SchedulePolicy.calc_priority`: SGLang's own order first, then ours over it."""
    result = original(schedule_policy, waiting_queue, *args, **kwargs)
    fair: FairScheduling | None = getattr(schedule_policy, ATTRIBUTE, None)
    if fair is not None:
        fair.guard.run(lambda: fair.order(waiting_queue), None, "ordering the queue")
    return result


def request_queued(result: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """After `Scheduler._add_request_to_queue`: it may stand in the queue now, or have been refused."""
    fair: FairScheduling | None = getattr(scheduler, ATTRIBUTE, None)
    if fair is None:
        return
    queue = scheduler.waiting_queue
    if queue and queue[-1] is req:
        fair.guard.run(lambda: fair.arrived(req), None, "adding a request")


def results_processed(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """After `Scheduler.process_batch_result`: charges what was generated, settles what ended."""
    fair: FairScheduling | None = getattr(scheduler, ATTRIBUTE, None)
    if fair is None:
        return
    fair.guard.run(lambda: fair.booked(batch), None, "booking a step")
    fair.aside(fair.steward.between_steps, "keeping its state")


def decode_retracted(result: Any, *args: Any, **kwargs: Any) -> None:
    """After `ScheduleBatch.retract_decode`: those that SGLang gives up for want of memory end nowhere else."""
    for req in result[2]:
        mark: Mark | None = getattr(req, ATTRIBUTE, None)
        if mark is not None:
            mark.fair.guard.run(partial(mark.fair.ended, req, aborted=True), None, "giving up a request")


def internal_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """After `Scheduler.get_internal_state`: what `/server_info` shows under `mope`."""
    fair: FairScheduling | None = getattr(scheduler, ATTRIBUTE, None)
    if fair is not None:
        fair.aside(lambda: result.internal_state.update({ATTRIBUTE: fair.state()}), "showing its state")
