"""vLLM's waiting queue, ordered by a policy of ours.

Stands where `Scheduler.waiting` stood. vLLM peeks, then pops what it admits; or pops what it cannot run now and
prepends it after the step; or stops at the head if there is no memory. So a charge is made at `pop_request`, and what
vLLM could not run is refunded and set aside (`aside.Aside`), which keeps later steps short. A request whose adapter
would be one too many is not offered at all (`adapters.AdapterTurns`). A request that stands behind another of its
client's changes nobody's turn, so the policy is told of it some steps later, of several at once, which takes a third
of the time. Until then the learning thread has worked out how long its answer will be. Whatever goes wrong, the guard
turns this into a plain queue in order of arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import RequestStatus

from mope.fairness import Load, Ticket
from mope.fairness.accounts import Account, Group
from mope.fairness.clients import client_path
from mope.serving_hooks.adapters import AdapterTurns, Standing
from mope.serving_hooks.aside import Aside
from mope.serving_hooks.carried import CLIENT, Carried
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.lengths import Expected
from mope.serving_hooks.steward import ANYBODY, Steward
from mope.serving_hooks.vllm.holding import HoldingQueue, adapter_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

_PATIENCE = 8  # occasions at which a request that stands behind others may wait to be foreseen
_MAX_SKIPPED = 64  # requests that a step skips before it ends, beside as many as it had room for


class _Later:
    """A request that the policy has yet to be told of.

    Attributes:
        request: it.
        arrived_s: when it came, by the steward's clock.
        foreseen: what was carried with it and what is expected of it, see `FairQueue._foresee`; None until then.
        patience: occasions that it may miss because it is not foreseen.
    """

    __slots__ = ("arrived_s", "foreseen", "patience", "request")

    def __init__(self, request: Request, arrived_s: float, patience: int) -> None:
        self.request, self.arrived_s, self.patience = request, arrived_s, patience
        self.foreseen: tuple[Carried, Expected] | None = None


class FairQueue(RequestQueue):
    """Waiting requests by the policy; those that were preempted in front.

    Attributes:
        requests: every request that is in here, by id, in order of arrival; those preempted may stand anywhere.
        head: the ticket that was peeked at last and not popped since.
    """

    def __init__(
        self,
        steward: Steward,
        guard: Guard,
        load: Callable[[], Load],
        room: Callable[[Ticket], bool],
        generated: Callable[[Request], int],
        settle: Callable[[str], None],
        adapters: AdapterTurns | None = None,
    ) -> None:
        """An empty queue.

        Args:
            steward: keeps the policy and its books.
            guard: of the scheduler.
            load: what the engine is doing now.
            room: whether there is room for a request by what is predicted of all.
            generated: tokens that a request was given.
            settle: books the earlier request of a name, if it is over and not booked yet.
            adapters: which LoRA adapters may be admitted; None where there is no cap.
        """
        self._steward, self._guard, self._load, self._room, self._generated = steward, guard, load, room, generated
        self._settle, self.adapters, self.aside = settle, adapters, Aside(steward.policy)
        # in another state than these a request waits for something that vLLM looks after, and is handed back
        self._run = {RequestStatus.WAITING, RequestStatus.PREEMPTED}
        self.holding: HoldingQueue | None = None
        self._may_skip = _MAX_SKIPPED
        self.requests: dict[str, Request] = {}
        self._plain: deque[Request] | None = None  # once something went wrong: all requests, in order
        self.head: Ticket | None = None
        self._next: Ticket | None = None  # who comes next, once that was worked out
        self._first: list[Ticket] = []  # who comes before all in this step, see `let_holders_go_first`; the last first
        # requests that the policy has yet to be told of, by the account whose others they are behind
        self._later: dict[Account, list[_Later]] = {}
        self._ordering = steward.options.policy
        self._chooses = steward.options.predicted_admission or adapters is not None  # who may be admitted, by more

    def give_up(self) -> None:
        """From now on a plain queue: whom vLLM has just peeked at, those preempted, then by arrival."""
        if self._plain is None:
            peeked = self.head.request_id if self.head is not None else None
            self._plain = deque(
                sorted(
                    self.requests.values(),
                    key=lambda one: (one.request_id != peeked, one.status != RequestStatus.PREEMPTED, _arrival(one)),
                )
            )

    # -- what vLLM calls

    def add_request(self, request: Request) -> None:
        """A request arrives, or a session goes on with more input."""
        self.requests[request.request_id] = request
        if self._plain is not None:
            self._plain.append(request)
            return
        self._guard.run(lambda: self._add(request), None, "adding a request")

    def pop_request(self) -> Request:
        """Takes the request that `peek_request` shows; it is charged."""
        if self._plain is None:
            found = self._guard.run(self._pop, None, "taking a request")
            if found is not None:
                return found
        if self._plain is None:
            raise IndexError("pop from an empty queue")
        request = self._plain.popleft()
        self.requests.pop(request.request_id, None)
        return request

    def peek_request(self) -> Request:
        """Who is next; the same until it is popped or something changes."""
        if self._plain is None:
            found = self._guard.run(lambda: self.requests[self._peek().request_id], None, "choosing a request")
            if found is not None:
                return found
        if not self._plain:
            raise IndexError("peek from an empty queue")
        return self._plain[0]

    def prepend_request(self, request: Request) -> None:
        """A request was preempted, or was popped and not run."""
        self.requests[request.request_id] = request
        if self._plain is not None:
            self._plain.appendleft(request)
            return
        self._guard.run(lambda: self._return(request), None, "taking a request back")

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Several requests were popped and not run; the last of them is then the first, as in a deque."""
        for request in list(requests):
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """A waiting request is given up."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Waiting requests are given up; those that are not here are in another queue of vLLM's."""
        gone = [request for request in requests if self.requests.pop(request.request_id, None) is not None]
        if self._plain is not None:
            if gone:
                ids = {request.request_id for request in gone}
                self._plain = deque(request for request in self._plain if request.request_id not in ids)
            return
        for request in gone:
            self._guard.run(partial(self._drop, request), None, "giving up a request")

    def __bool__(self) -> bool:
        """Whether somebody may be admitted: not where all who wait were set aside or found not to fit."""
        if self._plain is not None:
            return bool(self._plain)
        if not self.requests:
            return False
        policy = self._steward.policy
        if not (self._chooses or policy.num_blocked or policy.num_aside):
            return True
        return self._guard.run(self._anyone, True, "looking who waits")

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        if self._plain is not None:
            return iter(list(self._plain))
        return iter(sorted(self.requests.values(), key=_arrival))

    def __reversed__(self) -> Iterator[Request]:
        return iter(list(self)[::-1])

    # -- what may go wrong

    def hold_with(self, holding: HoldingQueue) -> None:
        """Requests whose KV cache is loaded from elsewhere wait in another queue from now on."""
        self.holding, self._chooses = holding, True
        self._run.add(RequestStatus.WAITING_FOR_REMOTE_KVS)

    def begin(self, num_free: int) -> None:
        """Before a step: requests that were set aside are offered again, within bounds.

        Args:
            num_free: requests that may be admitted in this step.
        """
        self._may_skip = _MAX_SKIPPED + num_free
        if self._first:
            self._forget_next()
        if len(self.aside):
            self._forget_next()
            self.aside.bring_back(num_free, self.adapters.admits if self.adapters is not None else _always)

    def let_holders_go_first(self) -> None:
        """Nobody runs and the head found no memory: requests whose KV cache was loaded hold it, and go first now."""
        self._first = []
        for request in list(self.requests.values())[::-1]:
            ticket = self._steward.policy.find(request.request_id)
            holds = request.num_computed_tokens or request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            if ticket is not None and holds:
                self.aside.bring_back_one(ticket)
                self._first.append(ticket)

    def announce(
        self,
        request: Request,
        load: Load | None = None,
        arrived_s: float | None = None,
        foreseen: tuple[Carried, Expected] | None = None,
    ) -> None:
        """Tells the policy of a request that begins to wait, here or in another of vLLM's queues.

        Args:
            request: it.
            load: what the engine is doing; None to look.
            arrived_s: when it came; None for now.
            foreseen: what was carried with it and what is expected of it, see `_foresee`; None to look now.
        """
        carried, expected = self._foresee(request) if foreseen is None else foreseen
        self._steward.arrive(
            request.request_id,
            carried,
            max(0, request.num_tokens - request.num_computed_tokens),
            max_tokens=getattr(request, "max_tokens", None),
            fallback_client=_of_adapter(request),
            load=load if load is not None else self._load(),
            arrived_s=arrived_s,
            expected=expected,
        )

    def standing(self, ticket: Ticket) -> Standing:
        """By what the policy orders a request's client, or the request: the less, the sooner its turn."""
        return self._steward.policy.standing(ticket)

    def catch_up(self, *, leave: bool = False) -> None:
        """Tells the policy of the requests that it was not told of yet.

        Args:
            leave: whether those that are not foreseen yet may be left for the next time.
        """
        if not self._later:
            return
        later, self._later = self._later, {}
        told: list[_Later] = []
        for account, waiting in later.items():
            if leave and waiting[-1].foreseen is None:  # a client's requests are foreseen in order
                for place, one in enumerate(waiting):
                    if one.foreseen is None and one.patience:
                        self._later[account] = left = waiting[place:]
                        for still in left:
                            still.patience = max(still.patience - 1, 0)
                        waiting = waiting[:place]
                        break
            told += waiting
        self._tell(told)

    def _tell(self, later: list[_Later]) -> None:
        """What is expected of all is worked out first: in a row that takes a third of the time."""
        load, foreseen = self._load(), [one.foreseen or self._foresee(one.request) for one in later]
        for one, found in zip(later, foreseen, strict=True):
            self.announce(one.request, load, one.arrived_s, found)

    def _look_ahead(self, later: _Later) -> None:
        """In the learning thread."""
        later.foreseen = self._foresee(later.request)

    def _foresee(self, request: Request) -> tuple[Carried, Expected]:
        """What was carried with a request, and how long its answer is expected to be."""
        parameters = request.sampling_params
        carried = Carried.read(getattr(parameters, "extra_args", None))
        if parameters is None:  # pooling answers nothing
            carried = Carried(tokens=1.0)
        client = carried.client or _of_adapter(request) or ANYBODY
        return carried, self._steward.lengths.expected(carried, client, getattr(request, "max_tokens", None))

    def _add(self, request: Request) -> None:
        self._settle(request.request_id)
        if request.request_id in self._steward.held:  # a session goes on, before all who have not begun
            self._forget_next()
            self._steward.policy.preempt(request.request_id, self._generated(request))
        elif (account := self._stands_behind(request)) is not None:
            lengths = self._steward.lengths
            later = _Later(request, self._steward.clock(), _PATIENCE if lengths.corrects else 0)
            self._later.setdefault(account, []).append(later)
            if later.patience:
                lengths.work_ahead(self._look_ahead, later)
        else:
            self._forget_next()
            self.announce(request)

    def _stands_behind(self, request: Request) -> Account | None:
        """Whose others, of those that the policy knows of, go before this request in any case; None for nobody's."""
        ledger = self._steward.policy.ledger
        if self._ordering in ("shortest-predicted", "holistic"):
            return None
        if self._ordering == "fcfs":
            return ledger.root if ledger.root.num_waiting else None
        # the seal is looked at later: who names another client here is told of some steps later, and gains nothing
        carried = getattr(request.sampling_params, "extra_args", None)
        said = carried.get(CLIENT) if isinstance(carried, dict) else None
        account = ledger.find(client_path(said if isinstance(said, str) else _of_adapter(request)))
        if account is None or not account.num_waiting or isinstance(account, Group):
            return None
        return account

    def _peek(self) -> Ticket:
        self.head = self._find()
        if self.head is None:
            raise IndexError("peek from an empty queue")
        return self.head

    def take_head(self) -> Ticket | None:
        """The request that a step peeked at and did not pop; the next step finds anew who is next."""
        head = self.head
        self._forget_next()
        return head

    def _forget_next(self) -> None:
        self.head = self._next = None

    def _find(self) -> Ticket | None:
        """Who is next; requests whose adapter may not be admitted are set aside on the way."""
        if self._next is not None and self._next.state in ("waiting", "preempted"):
            return self._next
        self._next = None
        while self._first:
            if self._first[-1].state in ("waiting", "preempted"):
                self._next = self._first[-1]
                return self._next
            self._first.pop()
        while self._may_skip > 0:
            ticket = self._steward.policy.peek()
            if ticket is None:
                break
            adapter = adapter_of(self.requests[ticket.request_id]) if self.adapters is not None else 0
            if not adapter or self.adapters is None or self.adapters.admits(adapter):
                self._next = ticket
                break
            self.adapters.ask(adapter, self._steward.clock())
            self._make_way(ticket)
            self.aside.wait_for(adapter, ticket)
            self._may_skip -= 1
        return self._next

    def _make_way(self, ticket: Ticket) -> None:
        """Before a request leaves the order: nobody may stand behind one who has left."""
        if self._later:
            account = ticket.account if self._ordering != "fcfs" else self._steward.policy.ledger.root
            if account.num_waiting < 2 and account in self._later:
                self._tell(self._later.pop(account))

    def _pop(self) -> Request:
        ticket = self._peek()
        request = self.requests[ticket.request_id]
        self._make_way(ticket)
        if request.status not in self._run:
            self.aside.skip(ticket)
            self._may_skip -= 1
        else:
            if self.adapters is not None and (adapter := adapter_of(request)):
                self.adapters.admitted(adapter)
            if self.holding is not None and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                self.holding.num_begun += 1
            self._steward.policy.admit(ticket)
        self._forget_next()
        return self.requests.pop(ticket.request_id)  # at last: whatever fails before, it is still here

    def _return(self, request: Request) -> None:
        self.catch_up()
        self._settle(request.request_id)  # what it was given before it lost its place
        self._forget_next()
        request_id = request.request_id
        ticket = self._steward.policy.find(request_id)
        if ticket is None:
            self._add(request)
        elif request.status == RequestStatus.PREEMPTED or request.num_output_tokens:
            self._steward.preempted(request_id, self._generated(request))
        elif ticket.state == "running":  # vLLM could not run it
            self._steward.policy.give_back(request_id)
            self.aside.skip(ticket)

    def _drop(self, request: Request) -> None:
        self.catch_up()
        self._settle(request.request_id)  # it may have begun, and not be booked
        self._forget_next()
        ticket = self._steward.policy.find(request.request_id)
        if ticket is not None:
            self.aside.discard(ticket)
        self._steward.ended(
            request.request_id,
            self._generated(request),
            aborted=not request.is_finished() or request.status == RequestStatus.FINISHED_ABORTED,
            capped=request.status == RequestStatus.FINISHED_LENGTH_CAPPED,
        )

    def offer(self) -> Ticket | None:
        """Who is next, if there is room by what is predicted of all."""
        ticket = self._find()
        if ticket is not None and not self._room(ticket):
            self.head = ticket
            return None
        return ticket

    def _anyone(self) -> bool:
        ticket = self.offer()
        return ticket is not None and (self.holding is None or self.holding.lets_in(ticket))


def _always(_: int) -> bool:
    return True


def _of_adapter(request: Request) -> str | None:
    """Who a request is from where nobody said: its LoRA adapter."""
    adapter = getattr(request, "lora_request", None)
    return f"lora/{adapter.lora_name}" if adapter is not None else None


def _arrival(request: Request) -> float:
    return float(request.arrival_time)
