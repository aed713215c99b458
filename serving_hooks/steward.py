"""What a hook does at each event of a request's life, whatever the engine: predict, queue, charge, count, learn, keep.

The engine's hook says what happens; the steward keeps the policy, the lengths and the tallies in step. Reads the clock
that it is given; knows no engine, and does not guard itself: `Guard` is the hook's.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from mope.corrector import Corrector
from mope.errors import ConfigError, UserError
from mope.fairness import IDLE, Charge, Ledger, Load, Policy, Ticket
from mope.fairness.stores import Store, StoreConfig, open_store
from mope.serving_hooks.carried import Carried
from mope.serving_hooks.lengths import Expected, Lengths
from mope.serving_hooks.options import NO_PREDICTOR, HookOptions
from mope.serving_hooks.tallies import Tallies, Tally

_SAVE_EVERY_S = 60.0
ANYBODY = "(anonymous)"  # all requests without a client
_SMALL = 20_000  # accounts up to which a snapshot is taken between two steps of the engine

logger = logging.getLogger("mope")


class Held:
    """What the steward remembers of a request beside its ticket."""

    __slots__ = ("admitted_s", "arrived_s", "carried", "client", "first_token_s", "nine_tenths", "teaches", "ticket")

    def __init__(
        self,
        ticket: Ticket,
        carried: Carried,
        client: str,
        nine_tenths: float | None,
        arrived_s: float,
        teaches: bool = True,
    ) -> None:
        self.ticket, self.carried, self.client, self.arrived_s = ticket, carried, client, arrived_s
        self.nine_tenths = nine_tenths
        self.teaches = teaches  # whether its length says something of others
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None


class _Ended(NamedTuple):
    """A request that is over and not booked yet."""

    request_id: str
    held: Held
    generated: int
    aborted: bool
    capped: bool
    computed: int | None
    at_s: float


class Steward:
    """Serves the hook of one scheduler.

    Attributes:
        options: what the operator chose.
        policy: who is next, and the books.
        lengths: what is expected, and learned.
        tallies: what happened, by client.
        held: requests that wait or run, by id.
        store: where replicas share counters; None where none do.
        patience: requests that may be over and not booked yet. What they were charged ahead stands until then, as if
            they still ran; several booked in a row take a third of the time that each takes alone, between other work.
    """

    def __init__(self, options: HookOptions, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes up its work, with the books and lessons of an earlier run if there are any.

        Args:
            options: what the operator chose.
            clock: seconds, only for latencies; where ranks must agree, see `exact`.

        Raises:
            ConfigError: the options name a profile that cannot be read.
        """
        self.options = options
        self.clock = clock
        self.exact = False  # whether measured latencies may not change what is charged, because ranks must agree
        ledger = Ledger(
            weights=options.weights,
            lift_settled=options.lift == "settled",
            idle_clients=options.idle_clients,
            max_clients=options.max_clients,
        )
        self.policy = Policy(options, ledger=ledger)
        self.lengths = Lengths(_corrector(options))
        self.tallies = Tallies(options.metrics_clients)
        self.held: dict[str, Held] = {}
        self.patience = 0
        self._new: list[Held] = []  # requests that arrived, began and had a first token since the last settlement
        self._begun: list[Held] = []
        self._first: list[Held] = []
        self._over: list[_Ended] = []
        self.num_invalid = 0  # requests whose client or size could not be used as it came
        self.store = self._open_store()
        self._saved_s = self._told_s = clock()
        self._saving: threading.Thread | None = None
        if options.state is not None:
            self._restore(options.state)

    # -- a request's life

    def arrive(
        self,
        request_id: str,
        carried: Carried,
        prompt_tokens: int,
        *,
        max_tokens: int | None = None,
        known_tokens: float | None = None,
        fallback_client: str | None = None,
        load: Load = IDLE,
        arrived_s: float | None = None,
        expected: Expected | None = None,
    ) -> Ticket:
        """A request begins to wait.

        Args:
            request_id: the engine's name for it.
            carried: what the front end said of it.
            prompt_tokens: tokens of its prompt.
            max_tokens: its cap.
            known_tokens: response tokens where that is no question; what is predicted is passed over.
            fallback_client: who it is from where the front end did not say, such as a LoRA adapter.
            load: what the engine is doing.
            arrived_s: when it came, by `clock`; None for now.
            expected: what `lengths` expects of it, where that is known already.
        """
        if self._over and self.policy.find(request_id) is not None:  # one of that name is over, but not booked
            self.settle()
        said = carried.client or fallback_client
        client = said or ANYBODY
        if known_tokens is not None:
            carried, expected = Carried(carried.client), Expected(known_tokens)
        elif expected is None:
            expected = self.lengths.expected(carried, client, max_tokens)
        ticket = self.policy.enqueue(request_id, said, prompt_tokens, expected.tokens, max_tokens=max_tokens, load=load)
        if arrived_s is None:
            arrived_s = self.clock()
        held = Held(ticket, carried, client, expected.nine_tenths, arrived_s, known_tokens is None)
        self.held[request_id] = held
        self._new.append(held)
        if len(self._new) > self.patience:
            self.settle()
        return ticket

    def admitted(self, request_id: str) -> None:
        """A request has begun to run."""
        held = self.held.get(request_id)
        if held is not None and held.admitted_s is None:
            held.admitted_s = self.clock()
            self._begun.append(held)
            if not self.patience:
                self.settle()

    def cached(self, request_id: str, cached_tokens: int) -> None:
        """The prefix cache held so many tokens of its prompt."""
        held = self.held.get(request_id)
        if held is not None and cached_tokens > 0:
            self.policy.cached(request_id, cached_tokens)
            self.tallies.of(held.client).cached_tokens += cached_tokens

    def first_token(self, request_id: str) -> None:
        """Its first token is out."""
        held = self.held.get(request_id)
        if held is not None and held.first_token_s is None:
            held.first_token_s = self.clock()
            self._first.append(held)
            if not self.patience:
                self.settle()

    def preempted(self, request_id: str, generated: int) -> None:
        """It lost its place, and waits in front of all others."""
        held = self.held.get(request_id)
        if held is not None and held.ticket.state == "running":
            self.policy.preempt(request_id, generated)
            self.tallies.of(held.client).num_preempted += 1

    def ended(
        self, request_id: str, generated: int, *, aborted: bool, capped: bool = False, computed: int | None = None
    ) -> None:
        """It is over, waiting or running.

        Args:
            request_id: the engine's name for it; one that is not here is none of ours.
            generated: tokens that were generated.
            aborted: it was given up.
            capped: it ended because it reached its cap.
            computed: tokens of its prompt that were read, if it was aborted before all were.
        """
        held = self.held.pop(request_id, None)
        if held is None:
            return
        self._over.append(_Ended(request_id, held, generated, aborted, capped, computed, self.clock()))
        if len(self._over) > self.patience or held.ticket.state != "running":  # who waits leaves the queue at once
            self.settle()

    def settle(self) -> None:
        """Books what has happened: to be called now and then, and when nothing runs, where `patience` is not 0."""
        of = self.tallies.of
        if self._new:
            for held in self._new:
                tally = of(held.client)
                tally.num_arrived += 1
                tally.num_predicted += held.carried.tokens is not None
            self._new.clear()
        if self._begun:
            for held in self._begun:
                of(held.client).queue_s.add((held.admitted_s or held.arrived_s) - held.arrived_s)
            self._begun.clear()
        if self._first:
            for held in self._first:
                of(held.client).ttft_s.add((held.first_token_s or held.arrived_s) - held.arrived_s)
            self._first.clear()
        if self._over:
            over, self._over = self._over, []
            for one in over:
                self._book(one)

    def _book(self, over: _Ended) -> None:
        request_id, held, generated, aborted, capped, computed, now = over
        ticket, tally = held.ticket, self.tallies.of(held.client)
        begun = held.admitted_s is not None
        latency_s = now - held.admitted_s if held.admitted_s is not None and not self.exact else None
        if aborted:
            given = self.policy.abort(request_id, generated, computed_tokens=computed, latency_s=latency_s)
            tally.num_aborted += 1
        else:
            given = self.policy.finish(request_id, generated, latency_s=latency_s)
            self._count_finished(tally, held, generated, now)
        tally.charged = Charge(*map(add, tally.charged, given))
        if begun:
            tally.prompt_tokens += ticket.prompt_tokens if computed is None else min(computed, ticket.prompt_tokens)
            tally.response_tokens += generated
            if held.teaches:
                self.lengths.observe(held.carried, held.client, generated, censored=aborted or capped)

    @staticmethod
    def _count_finished(tally: Tally, held: Held, generated: int, now: float) -> None:
        tally.num_finished += 1
        tally.e2e_s.add(now - held.arrived_s)
        predicted = held.ticket.predicted_tokens
        tally.predicted_tokens += predicted
        if held.carried.tokens is not None:
            tally.ratio.add(generated / predicted)
        if held.nine_tenths is not None:
            tally.num_covered += 1
            tally.num_within += generated <= held.nine_tenths

    # -- now and then

    def between_steps(self) -> None:
        """Cheap work that is due now and then: other replicas' charges, the line in the log, keeping the state."""
        self.exchange()
        now = self.clock()
        if self.options.summary_s and now - self._told_s >= self.options.summary_s:
            self._told_s = now
            logger.info("mope: %s", self.summary())
        if self.options.state is not None and now - self._saved_s >= _SAVE_EVERY_S:
            self._saved_s = now
            if self.policy.ledger.num_accounts <= _SMALL and not (self._saving and self._saving.is_alive()):
                kept = self.snapshot()
                path = self.options.state
                self._saving = threading.Thread(target=write_state, args=(path, kept), name="mope-saving", daemon=True)
                self._saving.start()

    def exchange(self) -> None:
        """Tells other replicas what was charged here, and counts what they told; costs next to nothing without news."""
        if self.store is not None:
            self.store.exchange(self.policy.ledger)

    def summary(self) -> str:
        """One line on what goes on."""
        tallies = self.tallies.items()
        finished = sum(tally.num_finished for _, tally in tallies)
        waiting = len(self.policy)
        text = (
            f"{self.options.policy}: {len(self.held) - waiting} running, {waiting} waiting of {len(tallies)} clients, "
        )
        text += f"{finished} finished"
        arrived = sum(tally.num_arrived for _, tally in tallies)
        if arrived:
            predicted = sum(tally.num_predicted for _, tally in tallies)
            text += f", {100 * predicted / arrived:.0f} % of requests predicted"
        covered = sum(tally.num_covered for _, tally in tallies)
        if covered:
            within = sum(tally.num_within for _, tally in tallies)
            text += f", {100 * within / covered:.0f} % of these answers within their predicted 90 %"
        busiest = sorted(tallies, key=lambda item: -item[1].response_tokens)[:3]
        if busiest:
            told = [f"{_in_line(name)} {tally.response_tokens}" for name, tally in busiest]
            text += f"; most tokens: {', '.join(told)}"
        return text

    def snapshot(self) -> dict[str, Any]:
        """Books and lessons as plain JSON values."""
        self.settle()
        return {"version": 1, "ledger": self.policy.ledger.snapshot(), "lengths": self.lengths.to_json()}

    def close(self) -> None:
        """Stops its threads and keeps the state."""
        self.settle()
        self.lengths.close()
        if self.store is not None:
            self.exchange()
            self.store.close()
        if self.options.state is not None:
            if self._saving is not None:
                self._saving.join(5.0)
            write_state(self.options.state, self.snapshot())

    def _open_store(self) -> Store | None:
        if self.options.store is None:
            return None
        try:
            config = StoreConfig(url=self.options.store, namespace=self.options.namespace)
        except ValidationError as error:
            raise ConfigError(f"store or namespace: {error.errors()[0]['msg']}") from error
        store = open_store(config)
        self.policy.ledger.follow_touched = True
        store.exchange(self.policy.ledger)
        return store

    def _restore(self, path: Path) -> None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.policy.ledger.restore(kept["ledger"])
            for request_id in self.policy.ledger.open_requests:  # of an engine that is gone: charged as they were
                self.policy.ledger.close(request_id)
            self.lengths.restore(kept["lengths"])
        except FileNotFoundError:
            logger.info("mope: no state in %s yet", path)
        except (OSError, ValueError, KeyError, TypeError, UserError) as error:
            logger.warning("mope starts with empty books: %s cannot be read (%s)", path, error)
        else:
            logger.info("mope: went on with the state in %s", path)


def _corrector(options: HookOptions) -> Corrector | None:
    """What corrects predictions here; None where nothing is predicted or corrected, or the predictor cannot be read."""
    if not options.recalibrate or options.predictor == NO_PREDICTOR:
        return None
    try:
        return Corrector.load(options.predictor)
    except UserError as error:
        logger.error("mope corrects no predictions by finished requests: %s", error)
        return None


def write_state(path: Path, kept: dict[str, Any]) -> None:
    """Writes beside the file and renames, so that there is always a whole one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(kept), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        logger.warning("mope cannot keep its state in %s: %s", path, error)


def _in_line(name: str) -> str:
    """A client's name as a line of a log may hold it: callers may have chosen it."""
    return "".join(sign if sign.isprintable() else "?" for sign in name[:40])
