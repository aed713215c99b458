"""vLLM's other waiting queues, so that nothing passes the order unseen.

`HoldingQueue` stands in for `kv_holding_waiting` (vLLM 0.31 and later): requests that hold KV cache, most of them
because it is loaded from elsewhere. vLLM drains it before all others. `Annex` stands in for `skipped_waiting` (0.18 to
0.30), where vLLM puts what it skipped, to serve it first, in order of arrival. It hands everything to the fair queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import RequestStatus

from mope.serving_hooks.adapters import AdapterTurns, Standing
from mope.serving_hooks.guard import Guard

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from mope.fairness import Ticket
    from mope.serving_hooks.vllm.queue import FairQueue

_STEPS_CLOSED = 8  # in which no load begins after one found no room


class HoldingQueue(RequestQueue):
    """Requests that hold KV cache, those of the clients that have had least in front. They are charged already.

    vLLM looks at the fair queue only while this one is empty. So it says that it is empty while the fair queue's head
    comes before all that are here: its load begins then. And it lets no more loads begin than fill a batch, so that a
    flood does not fill the KV cache with requests that only wait.

    Attributes:
        num_begun: loads that began in this step; vLLM puts them here at its end.
    """

    def __init__(
        self,
        guard: Guard,
        queue: FairQueue,
        standing: Callable[[Request], Standing],
        is_open: Callable[[], bool],
        max_loads: int,
        adapters: AdapterTurns | None = None,
    ) -> None:
        """An empty queue.

        Args:
            guard: of the scheduler; once something went wrong, requests keep the order in which they came.
            queue: the fair queue, whose loads may begin.
            standing: what a request's client has had: the less, the sooner its turn.
            is_open: whether new requests are admitted: a paused engine only drains this queue.
            max_loads: requests here at which no further load begins, but for a client that comes before all of them.
            adapters: LoRA adapters that run; None where there is no cap.
        """
        self._guard, self._queue, self._standing, self._is_open = guard, queue, standing, is_open
        self._max_loads, self._adapters = max_loads, adapters
        self._requests: dict[str, Request] = {}
        self._order: deque[Request] | None = None  # None while it has to be worked out
        self._least: Standing | None = None  # standing of the first that was here in this step
        self._steps_closed = self.num_begun = self._num_held = 0

    def refresh(self) -> None:
        """Before a step: clients have had more by now."""
        self._order, self._least = None, None
        self.num_begun, self._num_held = 0, len(self._requests)
        self._steps_closed = max(0, self._steps_closed - 1)

    def found_no_room(self) -> None:
        """The fair queue's head found no room for its load: those that are here go on, and make some."""
        if self._requests:
            self._steps_closed = _STEPS_CLOSED

    def lets_in(self, ticket: Ticket) -> bool:
        """Whether the fair queue's head may be offered, though it may begin to load."""
        return self._num_held + self.num_begun < self._max_loads or self._gives_way(ticket)

    def _gives_way(self, ticket: Ticket | None) -> bool:
        if ticket is None or self._steps_closed or not self._is_open():
            return False
        self._ordered()
        return self._least is not None and self._queue.standing(ticket) < self._least

    def _ordered(self) -> deque[Request]:
        if self._order is None:
            requests = list(self._requests.values())
            if len(requests) > 1:
                requests = self._guard.run(
                    lambda: sorted(requests, key=self._standing), requests, "ordering requests that hold KV cache"
                )
                requests.sort(key=lambda request: not self._fits(request))
            self._order = deque(requests)
            if requests and self._least is None:
                self._least = self._standing(requests[0])
        return self._order

    def add_request(self, request: Request) -> None:
        """A request begins to hold KV cache."""
        self._requests[request.request_id] = request
        self._order = None

    def pop_request(self) -> Request:
        """Takes the request that `peek_request` shows."""
        request = self._ordered().popleft()
        del self._requests[request.request_id]
        adapter = adapter_of(request)
        if self._adapters is not None and adapter and request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
            self._adapters.admitted(adapter)
            self._order = None  # there may be no room for others' adapters now
        return request

    def _fits(self, request: Request) -> bool:
        """Whether its LoRA adapter fits into the batch.

        vLLM counts adapters of requests that it scheduled in this step. Where KV cache is full and cannot be freed yet
        it schedules only some of those that run, and one adapter too many fails an assertion in the next step.
        """
        adapter = adapter_of(request)
        return self._adapters is None or not adapter or self._adapters.fits(adapter)

    def peek_request(self) -> Request:
        """Who is next."""
        return self._ordered()[0]

    def prepend_request(self, request: Request) -> None:
        """A request could not run yet."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Several requests could not run yet."""
        for request in list(requests):
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """A request is given up."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Requests are given up; those that are not here are in another queue of vLLM's."""
        for request in requests:
            if self._requests.pop(request.request_id, None) is not None:
                self._order = None

    def __bool__(self) -> bool:
        """Whether vLLM should look here before it looks at the fair queue."""
        if not self._requests:
            return False
        return not self._guard.run(self._is_passed, False, "choosing between queues")

    def _is_passed(self) -> bool:
        return not self._fits(self._ordered()[0]) or self._gives_way(self._queue.offer())

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    def __reversed__(self) -> Iterator[Request]:
        return iter(list(self._requests.values())[::-1])


class Annex(RequestQueue):
    """Always empty: what it is given goes to the fair queue, which sets aside what cannot run."""

    def __init__(self, queue: RequestQueue) -> None:
        """An annex.

        Args:
            queue: the fair queue.
        """
        self._queue = queue

    def add_request(self, request: Request) -> None:
        """A request arrives that cannot run yet."""
        self._queue.add_request(request)

    def pop_request(self) -> Request:
        """Nobody is here."""
        raise IndexError("pop from an empty queue")

    def peek_request(self) -> Request:
        """Nobody is here."""
        raise IndexError("peek from an empty queue")

    def prepend_request(self, request: Request) -> None:
        """A request was skipped."""
        self._queue.prepend_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Several requests were skipped."""
        self._queue.prepend_requests(requests)

    def remove_request(self, request: Request) -> None:
        """It is in the fair queue, which vLLM tells as well."""

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """They are in the fair queue, which vLLM tells as well."""

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Request]:
        """Requests that cannot run: vLLM looks here for KV cache that could not be loaded."""
        ready = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        return iter([request for request in self._queue if request.status not in ready])

    def __reversed__(self) -> Iterator[Request]:
        return iter(list(self)[::-1])


def adapter_of(request: Request) -> int:
    """The number of a request's LoRA adapter; 0 without one."""
    adapter = getattr(request, "lora_request", None)
    return int(adapter.lora_int_id) if adapter is not None else 0
