"""A small engine for tests of the fairness core: slots, one token a step, lengths that only the end reveals."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from mope.fairness import FairnessConfig, Policy
from mope.fairness.accounts import Account


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, from whom, and how long it is said to be and will be."""

    step: int
    client: str
    prompt_tokens: int
    predicted: float
    length: int


@dataclass
class Engine:
    """Runs requests under a policy and watches what it does."""

    policy: Policy
    slots: int = 4
    admitted: list[str] = field(default_factory=list)
    watch: Callable[[Engine], None] | None = None
    arrivals: dict[str, Arrival] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)

    def run(self, arrivals: list[Arrival]) -> list[str]:
        """Serves all of them; the ids in order of admission."""
        coming = sorted(enumerate(arrivals), key=lambda pair: (pair[1].step, pair[0]))
        step = 0
        while coming or self.running or len(self.policy):
            while coming and coming[0][1].step <= step:
                number, arrival = coming.pop(0)
                self.arrivals[str(number)] = arrival
                self.policy.enqueue(str(number), arrival.client, arrival.prompt_tokens, arrival.predicted)
                self._look()
            while len(self.running) < self.slots and len(self.policy):
                ticket = self.policy.admit()
                self.admitted.append(ticket.request_id)
                self.running[ticket.request_id] = 0
                self._look()
            for name in list(self.running):
                self.running[name] += 1
                if self.running[name] >= self.arrivals[name].length:
                    del self.running[name]
                    self.policy.finish(name, self.arrivals[name].length)
                else:
                    self.policy.progress(name, self.running[name])
                self._look()
            step += 1
        return self.admitted

    def _look(self) -> None:
        if self.watch is not None:
            self.watch(self)


def policy(name: str, **options: object) -> Policy:
    return Policy(FairnessConfig.model_validate({"policy": name, **options}))


def leaf(account: Account) -> str:
    return "/".join(account.path)


def workload(seed: int, clients: list[str], num_requests: int, *, error: float, span: int = 60) -> list[Arrival]:
    """Random requests; predictions are off by a factor of up to 1 + error, either way."""
    rng = random.Random(seed)
    made = []
    for _ in range(num_requests):
        length = rng.randint(1, 30)
        factor = (1 + error) ** rng.uniform(-1, 1)
        made.append(Arrival(rng.randrange(span), rng.choice(clients), rng.randint(1, 40), length * factor, length))
    return made
