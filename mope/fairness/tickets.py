"""What the fairness core knows of a request, from its arrival to its end."""

from __future__ import annotations

from typing import Literal

from mope.fairness.accounts import Account
from mope.fairness.charges import Charge
from mope.fairness.engine_costs import Load

State = Literal["waiting", "preempted", "aside", "running", "gone"]


class Ticket:
    """One request.

    Attributes:
        request_id: the engine's name for it, unique while it lives.
        account: its client.
        arrival: its number, in order of arrival.
        prompt_tokens: tokens of its prompt.
        predicted_tokens: response tokens that it is taken to need, at least 1.
        load: what the engine was doing when it came.
        charge: what its admission is charged.
        charged_tokens: response tokens that what it was charged is good for; beyond, `Policy.progress` charges more.
        cached_tokens: tokens of the prompt that the prefix cache held.
        generated: response tokens that were generated, as far as the policy was told.
        place: where it waits among its client's requests, the least first.
        num_bypassed: admissions of later requests that it let pass because it did not fit.
        state: where it is; `aside` while it waits and cannot run, whatever its turn.
    """

    __slots__ = (
        "account",
        "arrival",
        "cached_tokens",
        "charge",
        "charged_tokens",
        "generated",
        "load",
        "num_bypassed",
        "place",
        "predicted_tokens",
        "prompt_tokens",
        "request_id",
        "state",
    )

    def __init__(
        self,
        request_id: str,
        account: Account,
        arrival: int,
        prompt_tokens: int,
        predicted_tokens: float,
        load: Load,
        charge: Charge,
    ) -> None:
        self.request_id, self.account, self.arrival = request_id, account, arrival
        self.prompt_tokens, self.predicted_tokens, self.load, self.charge = (
            prompt_tokens,
            predicted_tokens,
            load,
            charge,
        )
        self.place = (arrival, arrival)
        self.charged_tokens = 0.0
        self.cached_tokens = self.generated = self.num_bypassed = 0
        self.state: State = "waiting"

    @property
    def predicted_remaining(self) -> float:
        """Response tokens that are predicted to come; 1 where it has outlived its prediction."""
        return max(1.0, self.predicted_tokens - self.generated)

    def __repr__(self) -> str:
        return f"Ticket({self.request_id!r}, {'/'.join(self.account.path)!r}, arrival={self.arrival}, {self.state})"
