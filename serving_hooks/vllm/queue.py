"""vLLM's waiting queue, ordered by a policy of ours.

Stands where `Scheduler.waiting` stood. vLLM peeks, then pops what it admits; or pops what it cannot run now and
prepends it after the step; or stops at the head if there is no memory. So a charge is made at `pop_request` and given
back when the same request is prepended without having run. A request that stands behind another of its client's
changes nobody's turn, so the policy is told of it a few steps later, of several at once, which takes half the time.
Whatever goes wrong, the guard turns this into a plain queue in order of arrival. Knows `RequestQueue`; not the rest of
the scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import RequestStatus

from mope.fairness import Load, Ticket
from mope.fairness.accounts import Group
from mope.fairness.clients import client_path
from mope.serving_hooks.carried import CLIENT, Carried
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.lengths import Expected
from mope.serving_hooks.steward import ANYBODY, Steward

if TYPE_CHECKING:
    from vllm.v1.request import Request


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
    ) -> None:
        """An empty queue.

        Args:
            steward: keeps the policy and its books.
            guard: of the scheduler.
            load: what the engine is doing now.
            room: whether there is room for a request by what is predicted of all.
            generated: tokens that a request was given.
        """
        self._steward, self._guard, self._load, self._room, self._generated = steward, guard, load, room, generated
        self.requests: dict[str, Request] = {}
        self._plain: deque[Request] | None = None  # once something went wrong: all requests, in order
        self.head: Ticket | None = None
        self._later: list[tuple[Request, Load, float]] = []  # requests that the policy has yet to be told of
        self._in_turns = steward.options.policy != "shortest-predicted"
        self._by_room = steward.options.predicted_admission

    def give_up(self) -> None:
        """From now on a plain queue: those preempted first, then by arrival."""
        if self._plain is None:
            preempted = [one for one in self.requests.values() if one.status == RequestStatus.PREEMPTED]
            others = [one for one in self.requests.values() if one.status != RequestStatus.PREEMPTED]
            self._plain = deque(sorted(preempted, key=_arrival) + sorted(others, key=_arrival))

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
            ticket = self._guard.run(self._peek, None, "choosing a request")
            if ticket is not None:
                return self.requests[ticket.request_id]
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
        """Whether somebody may be admitted: not where all who wait were found not to fit."""
        if self._plain is not None:
            return bool(self._plain)
        if not self.requests:
            return False
        policy = self._steward.policy
        if not self._by_room and not policy.num_blocked:
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
            load: what the engine was doing when it came; None for now.
            arrived_s: when that was; None for now.
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

    def catch_up(self) -> None:
        """Tells the policy of the requests that it was not told of yet.

        What is expected of all of them is worked out first: in a row that takes a third of the time.
        """
        if self._later:
            later, self._later = self._later, []
            foreseen = [self._foresee(request) for request, _, _ in later]
            for (request, load, arrived_s), one in zip(later, foreseen, strict=True):
                self.announce(request, load, arrived_s, one)

    def _foresee(self, request: Request) -> tuple[Carried, Expected]:
        """What was carried with a request, and how long its answer is expected to be."""
        parameters = request.sampling_params
        carried = Carried.read(getattr(parameters, "extra_args", None))
        if parameters is None:  # pooling answers nothing
            carried = Carried(tokens=1.0)
        client = carried.client or _of_adapter(request) or ANYBODY
        return carried, self._steward.lengths.expected(carried, client, getattr(request, "max_tokens", None))

    def _add(self, request: Request) -> None:
        if self._in_turns and self._stands_behind(request):
            self._later.append((request, self._load(), self._steward.clock()))
            return
        self.catch_up()
        self.head = None
        if request.request_id in self._steward.held:  # a session goes on, before all who have not begun
            self._steward.policy.preempt(request.request_id, self._generated(request))
        else:
            self.announce(request)

    def _stands_behind(self, request: Request) -> bool:
        """Whether its client has others here that the policy knows of and that go first in any case."""
        said = (getattr(request.sampling_params, "extra_args", None) or {}).get(CLIENT)
        if not isinstance(said, str):
            said = _of_adapter(request)
        account = self._steward.policy.ledger.find(client_path(said))
        if account is None or not account.num_waiting or isinstance(account, Group):
            return False
        return request.request_id not in self._steward.held

    def _peek(self) -> Ticket:
        if self.head is None or self.head.state not in ("waiting", "preempted"):
            self.head = self._steward.policy.peek()
        if self.head is None:
            raise IndexError("peek from an empty queue")
        return self.head

    def _pop(self) -> Request:
        ticket = self._peek()
        if self._later and ticket.account.num_waiting < 2:  # nobody may stand behind one who has left
            self.catch_up()
        self.head = None
        self._steward.policy.admit(ticket)
        return self.requests.pop(ticket.request_id)

    def _return(self, request: Request) -> None:
        self.catch_up()
        self.head = None
        request_id = request.request_id
        ticket = self._steward.policy.find(request_id)
        if ticket is None:
            self._add(request)
        elif request.status == RequestStatus.PREEMPTED or request.num_output_tokens:
            self._steward.preempted(request_id, self._generated(request))
        else:
            self._steward.policy.give_back(request_id)

    def _drop(self, request: Request) -> None:
        self.catch_up()
        self.head = None
        self._steward.ended(
            request.request_id,
            self._generated(request),
            aborted=not request.is_finished() or request.status == RequestStatus.FINISHED_ABORTED,
            capped=request.status == RequestStatus.FINISHED_LENGTH_CAPPED,
        )

    def _anyone(self) -> bool:
        ticket = self._steward.policy.peek() if self.head is None else self.head
        if ticket is not None and not self._room(ticket):
            self.head = ticket
            return False
        return ticket is not None


def _of_adapter(request: Request) -> str | None:
    """Who a request is from where nobody said: its LoRA adapter."""
    adapter = getattr(request, "lora_request", None)
    return f"lora/{adapter.lora_name}" if adapter is not None else None


def _arrival(request: Request) -> float:
    return float(request.arrival_time)
