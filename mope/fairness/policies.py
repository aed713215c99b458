"""Who is admitted next, by name: one interface for seven policies.

    fcfs                  in order of arrival
    vtc                   the client that has had the fewest weighted tokens, counted as they are delivered (Sheng et
                          al., OSDI 2024, as published)
    vtc-predicted         the same, charged with the predicted length at admission and corrected at the end (ibid.)
    equinox               the client with the least HF, charged with the prediction, corrected at the end
                          (arXiv 2508.16646; what is reconstructed is said in `mope.fairness.charges`)
    holistic              as vtc-predicted across clients; within a client the shortest predicted first, with bounded
                          overtaking (`mope.fairness.overtaking`)
    shortest-predicted    shortest predicted answer first, held back by `ageing` tokens for each earlier arrival
    deficit-round-robin   clients in turn, each for a quantum of HF; users of a group within the group's turn

A policy is an order (`mope.fairness.orders`), the books (`mope.fairness.ledger`) and prices (`mope.fairness.costs`).
It follows a request from arrival to end; the engine's hook tells it what happens. Knows no engine, no clock and no
randomness: the same calls give the same answers in every process, so tensor-parallel ranks agree.

A request that was preempted goes to a lane in front of all others, with `holistic` to the front of its client's queue,
and is not charged a second time. One that does not fit may be passed by others, no more than `bypass` times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsFloat

from mope.errors import ConfigError
from mope.fairness.charges import NOTHING, Charge
from mope.fairness.clients import client_path
from mope.fairness.config import FairnessConfig
from mope.fairness.costs import CostEstimator, Predicted
from mope.fairness.engine_costs import IDLE, Load
from mope.fairness.ledger import Ledger
from mope.fairness.orders import CounterOrder, KeyedOrder, Order, RoundRobinOrder, counters
from mope.fairness.overtaking import BoundedShortestOrder
from mope.fairness.tickets import Ticket

_TOKENS_ALONE: Mapping[str, Any] = {"alpha": 1.0, "beta": 0.0, "delta": 0.0, "ufc": "tokens"}


class Policy:
    """Waiting and running requests of one engine, and who is next.

    Attributes:
        config: its options.
        ledger: its books.
        estimator: its prices.
        num_front: requests in the lane of those that were preempted.
    """

    def __init__(
        self, config: FairnessConfig | None = None, *, ledger: Ledger | None = None, ticket: type[Ticket] = Ticket
    ) -> None:
        """An engine without requests.

        Args:
            config: the policy's name and its options.
            ledger: books that go on, such as those restored from a snapshot; empty ones if None. Requests that are open
                there are of an engine that is gone: they are closed, charged as they were.
            ticket: class of what is remembered of a request, for callers that remember more than the policy does.

        Raises:
            ConfigError: the config names a profile that cannot be read, or other weights than the ledger has.
        """
        self.config = config = config if config is not None else FairnessConfig()
        if config.policy in ("vtc", "vtc-predicted", "holistic"):
            config = config.model_copy(update=dict(_TOKENS_ALONE))
        self.estimator = CostEstimator(config=config)
        self.ledger = (
            ledger
            if ledger is not None
            else Ledger(
                weights=config.weights,
                lift_settled=config.lift == "settled",
                idle_clients=config.idle_clients,
                max_clients=config.max_clients,
            )
        )
        if self.ledger.weights != dict(config.weights):
            raise ConfigError(
                "the ledger was made with other weights than the config has: give Ledger(weights=...) them"
            )
        for request_id in self.ledger.open_requests:
            self.ledger.close(request_id)
        self._ahead = config.policy != "vtc"  # whether an admission is charged what it is predicted to need
        self._order = _order(config, self.ledger)
        self._corrects = isinstance(self._order, RoundRobinOrder)  # whether it keeps accounts of its own
        self._ticket = ticket
        self._tickets: dict[str, Ticket] = {}
        self._front: list[Ticket] = []
        self._passed_over: list[Ticket] = []
        self._aside: dict[str, Ticket] = {}
        self._num_arrivals = 0

    # -- waiting

    def enqueue(
        self,
        request_id: str,
        client: str | Sequence[str] | None,
        prompt_tokens: int,
        prediction: Predicted | SupportsFloat | None = None,
        *,
        max_tokens: int | None = None,
        load: Load = IDLE,
    ) -> Ticket:
        """A request arrives.

        Args:
            request_id: the engine's name for it.
            client: who sent it, see `mope.fairness.clients.client_path`.
            prompt_tokens: tokens of its prompt.
            prediction: of its response tokens; `config.default_tokens` stand in for None and for what is not a number.
            max_tokens: its cap, if it has one.
            load: what the engine is doing, for the estimate of its latency.

        Raises:
            ConfigError: a request of this name is here already, or the client is no name, or `prompt_tokens` no number.
        """
        if request_id in self._tickets:
            raise ConfigError(f"request {request_id[:80]!r} is here already")
        path, prompt = client_path(client), self.estimator.count(prompt_tokens)
        tokens = self.estimator.response_tokens(prediction, max_tokens)
        self.ledger.close(request_id)  # one of that name that a snapshot brought is of an engine that is gone
        account = self.ledger.account(path)
        ticket = self._ticket(request_id, account, self._num_arrivals, prompt, tokens, load, NOTHING)
        ticket.charge = self._price(ticket, 0)
        self._num_arrivals += 1
        self._tickets[request_id] = ticket
        self._order.arrive(ticket)
        self.ledger.join(account, ticket.arrival)
        return ticket

    def peek(self) -> Ticket | None:
        """Who is next: the same until something changes. None if nobody waits or all who wait were blocked."""
        if self._front:
            return self._front[0]
        if not self._passed_over:
            return self._order.next()
        patient = self._passed_over[0]
        if patient.num_bypassed >= self.config.bypass:
            return None
        return self._order.next(self._passed_over)

    def admit(self, ticket: Ticket | None = None) -> Ticket:
        """Who is next, or the waiting request that is given, begins to run and is charged.

        Raises:
            ConfigError: nobody waits, or it does not wait.
        """
        if ticket is None:
            ticket = self.peek()
        if ticket is None:
            raise ConfigError("no request waits that could be admitted")
        if ticket.state == "preempted":
            self._leave_preempted(ticket)
            ticket.charge = self._price(ticket, ticket.generated)
            self._adjust(ticket, ticket.charge)
        elif ticket.state == "waiting":
            self._order.take(ticket)
            self.ledger.open(ticket.request_id, ticket.account, ticket.charge, waited=True)
            for passed in self._passed_over:
                passed.num_bypassed += passed is not ticket
        else:
            raise ConfigError(f"request {ticket.request_id[:80]!r} does not wait: it is {ticket.state}")
        ticket.charged_tokens = max(ticket.predicted_tokens, ticket.generated) if self._ahead else ticket.generated
        ticket.state = "running"
        return ticket

    def give_back(self, request_id: str) -> None:
        """A request that was admitted did not run: it is refunded and waits where it waited."""
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.state != "running":
            return
        if ticket.generated or ticket.cached_tokens:
            self.preempt(request_id, ticket.generated)
            return
        ticket.state = "waiting"
        self._order.restore(ticket)
        self.ledger.join(ticket.account, ticket.arrival, lift=False)
        self.ledger.close(request_id, NOTHING)

    def set_aside(self, ticket: Ticket) -> None:
        """A waiting request cannot run now, whatever its turn: it is not offered until `bring_back`, and not charged.

        Unlike `block`, this lasts, and the client's other requests go on. Its place among them is kept.
        """
        if ticket.state == "waiting":
            self._order.drop(ticket)
            self.ledger.set_aside(ticket.account)
            self._unblock(ticket)
        elif ticket.state == "preempted":
            self._leave_preempted(ticket)
        else:
            return
        ticket.state = "aside"
        self._aside[ticket.request_id] = ticket

    def bring_back(self, ticket: Ticket) -> None:
        """A request that was set aside is offered again."""
        if self._aside.pop(ticket.request_id, None) is None:
            return
        if self.ledger.charged(ticket.request_id) is not None:
            ticket.state = "preempted"
            self._return_preempted(ticket)
            return
        ticket.state = "waiting"
        self._order.add(ticket)
        self.ledger.bring_back(ticket.account, ticket.arrival)

    def block(self, ticket: Ticket) -> None:
        """A waiting request does not fit into memory now: `peek` offers others, until `unblock`.

        Of its client, no other is offered where clients take turns. Once it let `config.bypass` others pass, nobody is.
        """
        if ticket.state == "waiting" and ticket not in self._passed_over:
            self._passed_over.append(ticket)
            self._passed_over.sort(key=lambda passed: -passed.num_bypassed)

    def _unblock(self, ticket: Ticket) -> None:
        if ticket in self._passed_over:
            self._passed_over.remove(ticket)

    def unblock(self) -> None:
        """Memory may have become free: all who were blocked are offered again."""
        self._passed_over.clear()

    def simulate(self, limit: int | None = None) -> list[Ticket]:
        """The first `limit` requests in the order of successive admissions, all of them if None; changes nothing."""
        if not self._front:
            return self._order.simulate(limit)
        front = self._front[:limit]
        charged = {ticket: self.ledger.charged(ticket.request_id) for ticket in front}
        for ticket in front:
            self._adjust(ticket, self._price(ticket, ticket.generated))
        rest = self._order.simulate(None if limit is None else limit - len(front))
        for ticket, charge in charged.items():
            self._adjust(ticket, charge if charge is not None else NOTHING)
        return front + rest

    def __iter__(self) -> Iterator[Ticket]:
        """Waiting requests: those in front first, then in order of arrival, then those that were set aside."""
        yield from self._front
        yield from self._order
        yield from self._aside.values()

    def __len__(self) -> int:
        return len(self._front) + len(self._order) + len(self._aside)

    @property
    def num_blocked(self) -> int:
        """Waiting requests that stand aside until `unblock`."""
        return len(self._passed_over)

    @property
    def num_aside(self) -> int:
        """Waiting requests that were set aside."""
        return len(self._aside)

    @property
    def num_front(self) -> int:
        """Requests in the lane of those that were preempted."""
        return len(self._front)

    def find(self, request_id: str) -> Ticket | None:
        """The ticket of a request that waits or runs."""
        return self._tickets.get(request_id)

    # -- running

    def progress(self, request_id: str, generated: int) -> None:
        """Tokens that a running request has generated in all; needed where they exceed `Ticket.charged_tokens`."""
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.state != "running":
            return
        ticket.generated = generated
        if generated > ticket.charged_tokens:
            ticket.charged_tokens = generated
            charge, before = self._price(ticket, generated), self.ledger.charged(request_id)
            if before is None or charge.hf > before.hf:  # whoever runs longer never pays less before the end
                self._adjust(ticket, charge)

    def cached(self, request_id: str, cached_tokens: int) -> None:
        """The prefix cache held so many tokens of a running request's prompt: the difference is refunded."""
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.state != "running" or cached_tokens == ticket.cached_tokens:
            return
        ticket.cached_tokens = self.estimator.count(cached_tokens)
        self._adjust(ticket, self._price(ticket, ticket.generated))

    def extend(self, request_id: str, prompt_tokens: int) -> None:
        """The prompt of a request that has begun grows by so many tokens, as in a session whose input is streamed."""
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.state == "waiting":
            return
        ticket.prompt_tokens = self.estimator.count(ticket.prompt_tokens + prompt_tokens)
        self._adjust(ticket, self._price(ticket, ticket.generated))

    def preempt(self, request_id: str, generated: int) -> None:
        """A running request loses its place: it is charged what it was given, and waits before those that never ran.

        It waits before all of them, or before those of its client where the order keeps preempted requests.
        """
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.state != "running":
            return
        ticket.generated = generated
        ticket.state = "preempted"
        self._adjust(ticket, self._given(ticket, generated))
        self._return_preempted(ticket)

    def _return_preempted(self, ticket: Ticket) -> None:
        if self._order.keeps_preempted:
            charged = self.ledger.charged(ticket.request_id) or NOTHING
            price = self._price(ticket, ticket.generated)
            ticket.charge = Charge(*(now - before for now, before in zip(price, charged, strict=True)))  # still to come
            self._order.preempted(ticket)
            self.ledger.join(ticket.account, ticket.arrival, lift=False)
        else:
            self._front.append(ticket)
            self._front.sort(key=lambda other: other.arrival)

    def _leave_preempted(self, ticket: Ticket) -> None:
        if self._order.keeps_preempted:
            self._order.drop(ticket)
            self.ledger.leave(ticket.account)
            self._unblock(ticket)
        else:
            self._front.remove(ticket)

    def finish(self, request_id: str, response_tokens: int, *, latency_s: float | None = None) -> Charge:
        """A request is complete: what it was charged becomes what it was given, which is returned.

        Args:
            request_id: the engine's name for it; one that is not here is none of ours, and nothing happens.
            response_tokens: tokens of the answer.
            latency_s: seconds from admission to the end; None takes the mapper's figure, see `CostEstimator.measured`.
        """
        return self._end(request_id, response_tokens, None, latency_s)

    def abort(
        self,
        request_id: str,
        generated: int = 0,
        *,
        computed_tokens: int | None = None,
        latency_s: float | None = None,
    ) -> Charge:
        """A request is given up, waiting or running: it is charged what it was given until then, which is returned.

        Args:
            request_id: the engine's name for it; one that is not here is none of ours, and nothing happens.
            generated: tokens that were generated.
            computed_tokens: tokens of its prompt that were read; all of them if None and it has begun to run.
            latency_s: as in `finish`.
        """
        return self._end(request_id, generated, computed_tokens, latency_s)

    def standing(self, ticket: Ticket) -> list[float]:
        """By what a request is ordered among those of other clients, such as its client's counter: the least first."""
        return self._order.standing(ticket)

    def victims(self, request_ids: Iterable[str]) -> list[str]:
        """Running requests by who should be preempted first; those that are not here stay at the end.

        By `config.victims`: most predicted remaining tokens first, or the client with the highest counter; then the
        latest arrival. As given, from the last on, where the engine's own choice is asked for.
        """
        ids = list(request_ids)
        if self.config.victims == "engine":
            return ids[::-1]
        known = [ticket for name in ids if (ticket := self._tickets.get(name)) is not None]
        if self.config.victims == "remaining":
            known.sort(key=lambda ticket: (-ticket.predicted_remaining, -ticket.arrival))
        else:
            known.sort(key=lambda ticket: (*(-counter for counter in counters(ticket)), -ticket.arrival))
        return [ticket.request_id for ticket in known] + [name for name in ids if name not in self._tickets]

    # -- prices

    def _price(self, ticket: Ticket, generated: int) -> Charge:
        """What a running request is charged: ahead, as if it answered as predicted, or longer if it has."""
        tokens = max(ticket.predicted_tokens, float(generated)) if self._ahead else float(generated)
        return self._charge(ticket, tokens)

    def _charge(self, ticket: Ticket, tokens: float) -> Charge:
        return self.estimator.price(ticket.prompt_tokens, tokens, ticket.load, cached_tokens=ticket.cached_tokens)

    def _given(
        self, ticket: Ticket, generated: int, computed: int | None = None, latency_s: float | None = None
    ) -> Charge:
        prompt = ticket.prompt_tokens if computed is None else min(computed, ticket.prompt_tokens)
        return self.estimator.price_measured(prompt, generated, ticket.cached_tokens, latency_s, ticket.load)

    def _adjust(self, ticket: Ticket, charge: Charge) -> None:
        before = self.ledger.charged(ticket.request_id) if self._corrects else None
        self.ledger.adjust(ticket.request_id, charge)
        if before is not None:
            self._order.correct(ticket.account, charge.hf - before.hf)

    def _end(self, request_id: str, generated: int, computed: int | None, latency_s: float | None) -> Charge:
        ticket = self._tickets.pop(request_id, None)
        if ticket is None:
            return NOTHING
        given = NOTHING
        if ticket.state == "waiting":
            self._order.drop(ticket)
            self.ledger.leave(ticket.account)
            self._unblock(ticket)
        elif self._aside.pop(request_id, None) is not None and self.ledger.charged(request_id) is None:
            self.ledger.forget_aside(ticket.account)
        else:
            if ticket.state == "preempted":
                self._leave_preempted(ticket)
            given = self._given(ticket, generated, computed, latency_s)
            if self._corrects:
                self._adjust(ticket, given)
            self.ledger.close(request_id, given)
        ticket.generated, ticket.state = generated, "gone"
        return given


def _order(config: FairnessConfig, ledger: Ledger) -> Order:
    match config.policy:
        case "fcfs":
            return KeyedOrder(lambda ticket: ticket.arrival)
        case "shortest-predicted":
            return KeyedOrder(lambda ticket: ticket.predicted_tokens + config.ageing * ticket.arrival)
        case "deficit-round-robin":
            return RoundRobinOrder(ledger, config.quantum)
        case "holistic":
            return BoundedShortestOrder(ledger, config.phi)
        case "vtc" | "vtc-predicted" | "equinox":
            return CounterOrder(ledger)
