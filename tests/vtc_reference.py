"""The virtual token counter as it was published (Sheng et al., OSDI 2024, algorithms 2 and 3), by plain scanning.

Written from the paper's description to compare with; shares no code with `mope.fairness`. Ties go to whom has waited
since the earliest arrival.
"""

from __future__ import annotations

from collections import deque

PROMPT, RESPONSE = 1, 2


class ReferenceVtc:
    def __init__(self, *, predicts: bool) -> None:
        self.predicts = predicts
        self.counters: dict[str, float] = {}
        self.queues: dict[str, deque[str]] = {}
        self.since: dict[str, int] = {}
        self.requests: dict[str, tuple[str, int, float]] = {}
        self.generated: dict[str, int] = {}
        self.last_to_leave: str | None = None
        self.num_arrivals = 0

    def arrive(self, name: str, client: str, prompt_tokens: int, predicted: float) -> None:
        self.requests[name] = (client, prompt_tokens, predicted)
        queue = self.queues.setdefault(client, deque())
        self.counters.setdefault(client, 0)
        if not queue:
            others = [self.counters[other] for other, waiting in self.queues.items() if waiting and other != client]
            if others:
                self.counters[client] = max(self.counters[client], min(others))
            elif self.last_to_leave is not None:
                self.counters[client] = max(self.counters[client], self.counters[self.last_to_leave])
            self.since[client] = self.num_arrivals
        queue.append(name)
        self.num_arrivals += 1

    def admit(self) -> str:
        client = min(
            (client for client, queue in self.queues.items() if queue),
            key=lambda client: (self.counters[client], self.since[client]),
        )
        name = self.queues[client].popleft()
        if not self.queues[client]:
            self.last_to_leave = client
        _, prompt_tokens, predicted = self.requests[name]
        self.counters[client] += PROMPT * prompt_tokens + (RESPONSE * predicted if self.predicts else 0)
        self.generated[name] = 0
        return name

    def token(self, name: str) -> None:
        client, _, predicted = self.requests[name]
        self.generated[name] += 1
        if self.predicts:
            beyond = self.generated[name] - max(predicted, self.generated[name] - 1)
            self.counters[client] += RESPONSE * max(0, beyond)
        else:
            self.counters[client] += RESPONSE

    def end(self, name: str) -> None:
        client, _, predicted = self.requests[name]
        if self.predicts and self.generated[name] < predicted:
            self.counters[client] -= RESPONSE * (predicted - self.generated[name])
