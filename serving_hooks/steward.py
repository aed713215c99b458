"""What a hook does at each event of a request's life, whatever the engine: predict, queue, charge, count, learn, keep.

The engine's hook says what happens; the steward keeps the policy, the lengths and the tallies in step. Reads the clock
that it is given; knows no engine, and does not guard itself: `Guard` is the hook's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from operator import add
from typing import Any, cast

from pydantic import ValidationError

from mope.corrector import Corrector
from mope.errors import ConfigError, UserError
from mope.fairness import IDLE, Charge, Ledger, Load, Policy, Ticket
from mope.fairness.stores import Store, StoreConfig, address, has_password, open_store
from mope.serving_hooks.carried import Carried
from mope.serving_hooks.lengths import Expected, Lengths
from mope.serving_hooks.options import NO_PREDICTOR, PASSWORD_SHOWN, HookOptions
from mope.serving_hooks.remote import is_address, teacher
from mope.serving_hooks.state import Keeper, books_and_lessons, take_up
from mope.serving_hooks.tallies import Tallies, Tally

ANYBODY = "(anonymous)"  # all requests without a client

logger = logging.getLogger("mope")


class Held(Ticket):
    """What is remembered of a request: its ticket, and what the steward adds to it.

    Attributes:
        carried: what the front end said of it.
        client: who sent it.
        tally: of the client, which it counts in.
        nine_tenths: what nine of ten such answers do not exceed, in tokens; None without a prediction.
        teaches: whether its length says something about other requests.
        arrived_s: when it came, by the steward's clock.
        admitted_s: when it began to run; None before.
        first_token_s: when its first token was out; None before.
    """

    __slots__ = ("admitted_s", "arrived_s", "carried", "client", "first_token_s", "nine_tenths", "tally", "teaches")

    carried: Carried
    client: str
    tally: Tally
    nine_tenths: float | None
    teaches: bool
    arrived_s: float
    admitted_s: float | None
    first_token_s: float | None


class Steward:
    """Serves the hook of one scheduler.

    Each event may be told some steps late: with the time at which it happened, and several in a row, which takes a
    third of the time that each takes alone between other work. What a request was charged ahead stands until then.

    Attributes:
        options: what the operator chose.
        policy: who is next, and the books.
        lengths: what is expected, and learned.
        tallies: what happened, by client.
        held: requests that wait or run, by id.
        store: where replicas share counters; None where none do.
    """

    def __init__(self, options: HookOptions, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes up its work, with the books and lessons of an earlier run if there are any.

        Args:
            options: what the operator chose.
            clock: seconds, only for latencies; where ranks must agree, see `exact`.

        Raises:
            ConfigError: the options name a profile that cannot be read, or the key for a service cannot be sent.
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
        self.policy = Policy(options, ledger=ledger, ticket=Held)
        self.lengths = _lengths(options)
        self.tallies = Tallies(options.metrics_clients)
        self.held: dict[str, Held] = {}
        self.num_invalid = 0  # requests whose client or size could not be used as it came
        self.store = self._open_store()
        self._told_s = clock()
        self._keeper: Keeper | None = None
        if options.state is not None:
            if not take_up(options.state, "books", self._restore):
                self.lengths = _lengths(options)  # the same for what was taken of a damaged file
            self._keeper = Keeper(
                options.state,
                lambda: books_and_lessons(ledger, self.lengths.to_json),
                lambda: (ledger.num_bookings, self.lengths.num_observed),
                lambda: bool(self.held),
            )

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
    ) -> Held:
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
        said = carried.client or fallback_client
        client = said or ANYBODY
        if known_tokens is not None:
            carried, expected = Carried(carried.client), Expected(known_tokens)
        elif expected is None:
            expected = self.lengths.expected(carried, client, max_tokens)
        held = cast(
            Held,
            self.policy.enqueue(request_id, said, prompt_tokens, expected.tokens, max_tokens=max_tokens, load=load),
        )
        held.carried, held.client, held.nine_tenths = carried, client, expected.nine_tenths
        held.teaches = known_tokens is None
        held.arrived_s = self.clock() if arrived_s is None else arrived_s
        held.admitted_s = held.first_token_s = None
        self.held[request_id] = held
        held.tally = tally = self.tallies.of(client, held.arrived_s)
        tally.num_arrived += 1
        tally.num_predicted += carried.tokens is not None
        return held

    def admitted(self, request_id: str, at_s: float | None = None) -> None:
        """A request has begun to run, at `at_s` by the clock, or now."""
        held = self.held.get(request_id)
        if held is not None and held.admitted_s is None:
            held.admitted_s = self.clock() if at_s is None else at_s
            held.tally.queue_s.add(held.admitted_s - held.arrived_s)

    def cached(self, request_id: str, cached_tokens: int) -> None:
        """The prefix cache held so many tokens of its prompt."""
        held = self.held.get(request_id)
        if held is not None and cached_tokens > 0:
            self.policy.cached(request_id, cached_tokens)
            held.tally.cached_tokens += cached_tokens

    def first_token(self, request_id: str, at_s: float | None = None) -> None:
        """Its first token is out, at `at_s` by the clock, or now."""
        held = self.held.get(request_id)
        if held is not None and held.first_token_s is None:
            held.first_token_s = self.clock() if at_s is None else at_s
            held.tally.ttft_s.add(held.first_token_s - held.arrived_s)

    def preempted(self, request_id: str, generated: int) -> None:
        """It lost its place, and waits in front of all others."""
        held = self.held.get(request_id)
        if held is not None and held.state == "running":
            self.policy.preempt(request_id, generated)
            held.tally.num_preempted += 1

    def ended(
        self,
        request_id: str,
        generated: int,
        *,
        aborted: bool,
        capped: bool = False,
        computed: int | None = None,
        forced: bool = False,
        at_s: float | None = None,
    ) -> None:
        """It is over, waiting or running.

        Args:
            request_id: the engine's name for it; one that is not here is none of ours.
            generated: tokens that were generated.
            aborted: it was given up.
            capped: it ended because it reached its cap.
            computed: tokens of its prompt that were read, if it was aborted before all were.
            forced: its client forced the length, see `mope.reader.is_forced`.
            at_s: when, by the clock; None for now.
        """
        held = self.held.pop(request_id, None)
        if held is None:
            return
        now = self.clock() if at_s is None else at_s
        tally, begun_s = held.tally, held.admitted_s
        latency_s = None if begun_s is None or self.exact else now - begun_s
        if aborted:
            given = self.policy.abort(request_id, generated, computed_tokens=computed, latency_s=latency_s)
            tally.num_aborted += 1
        else:
            given = self.policy.finish(request_id, generated, latency_s=latency_s)
            self._count_finished(tally, held, generated, now)
        tally.charged = Charge(*map(add, tally.charged, given))
        if begun_s is not None:
            tally.prompt_tokens += held.prompt_tokens if computed is None else min(computed, held.prompt_tokens)
            tally.response_tokens += generated
            if held.teaches:
                censored = aborted or capped
                self.lengths.observe(held.carried, held.client, generated, censored=censored, forced=forced)

    @staticmethod
    def _count_finished(tally: Tally, held: Held, generated: int, now: float) -> None:
        tally.num_finished += 1
        tally.e2e_s.add(now - held.arrived_s)
        predicted = held.predicted_tokens
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
        if self._keeper is not None and self.options.state is not None:
            self._keeper.start()

    def exchange(self) -> None:
        """Tells other replicas what was charged here, and counts what they told; costs next to nothing without news."""
        if self.store is not None:
            self.store.exchange(self.policy.ledger)

    def summary(self) -> str:
        """One line on what goes on."""
        tallies = self.tallies.items()
        total = self.tallies.total
        waiting = len(self.policy)
        text = (
            f"{self.options.policy}: {len(self.held) - waiting} running, {waiting} waiting of {len(tallies)} clients, "
        )
        text += f"{total('num_finished'):.0f} finished"
        if arrived := total("num_arrived"):
            text += f", {100 * total('num_predicted') / arrived:.0f} % of requests predicted"
        if covered := total("num_covered"):
            text += f", {100 * total('num_within') / covered:.0f} % of these answers within their predicted 90 %"
        busiest = sorted(tallies, key=lambda item: -item[1].response_tokens)[:3]
        if busiest:
            told = [f"{_in_line(name)} {tally.response_tokens}" for name, tally in busiest]
            text += f"; most tokens: {', '.join(told)}"
        return text

    def snapshot(self) -> dict[str, Any]:
        """Books and lessons as plain JSON values."""
        return {"version": 1, "ledger": self.policy.ledger.snapshot(), "lengths": self.lengths.to_json()}

    def close(self) -> None:
        """Stops its threads and keeps the state."""
        self.lengths.close()
        if self.store is not None:
            self.exchange()
            self.store.close()
        if self._keeper is not None and self.options.state is not None:
            self._keeper.close()

    def _open_store(self) -> Store | None:
        if self.options.store is None:
            return None
        try:
            config = StoreConfig(url=self.options.store, namespace=self.options.namespace)
        except ValidationError as error:
            raise ConfigError(f"store or namespace: {error.errors()[0]['msg']}") from error
        address(config.url)  # a variable or a file that is not there is a mistake, a server that is not there is none
        if has_password(config.url):
            logger.warning("mope: %s", PASSWORD_SHOWN)
        store = open_store(config)
        self.policy.ledger.follow_touched = True
        store.exchange(self.policy.ledger)
        return store

    def _restore(self, kept: Any) -> None:
        if not isinstance(kept, dict):
            raise UserError("it holds no books")
        self.lengths.restore(kept.get("lengths"))
        self.policy.ledger.restore(kept.get("ledger") or {})
        for request_id in self.policy.ledger.open_requests:  # of an engine that is gone: charged as they were
            self.policy.ledger.close(request_id)


def _lengths(options: HookOptions) -> Lengths:
    return Lengths(_corrector(options), teacher(options.predictor, recalibrate=options.recalibrate))


def _corrector(options: HookOptions) -> Corrector | None:
    """What corrects predictions here; None where nothing is predicted or corrected, or the predictor cannot be read."""
    if not options.recalibrate or options.predictor == NO_PREDICTOR or is_address(options.predictor):
        return None
    try:
        return Corrector.load(options.predictor)
    except Exception as error:  # whatever a damaged folder brings about
        logger.error("mope corrects no predictions by finished requests: %s", error)
        return None


def _in_line(name: str) -> str:
    """A client's name as a line of a log may hold it: callers may have chosen it."""
    return "".join(sign if sign.isprintable() else "?" for sign in name[:40])
