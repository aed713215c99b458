"""Clients by counter, and within a client the shortest predicted request first, with bounded overtaking.

The order within a client needs no clock and no state but a sum per client, so tensor-parallel ranks agree.
"""

from __future__ import annotations

from math import ceil

from typing_extensions import override

from mope.fairness.ledger import Ledger
from mope.fairness.orders import CounterOrder
from mope.fairness.tickets import Ticket


class BoundedShortestOrder(CounterOrder):
    """Clients as in `CounterOrder`; a client's requests by `cost + phi * asked`, the least first.

    `cost` is what the admission of a request is charged: weighted tokens with the predicted length. `asked` is the sum
    of the costs of the same client's earlier requests. Both are fixed at arrival, so a request never changes places.

    A later request j therefore passes an earlier request i only while it is cheaper by `phi` times what the requests
    from i to j cost: `cost_j + phi * (asked_j - asked_i) < cost_i`.

    **Bound.** The later requests that pass i cost less than `cost_i / phi` in all. Proof: let j be the last arrival
    that passes i. All later requests that pass i arrived between i and j, or are j. Those between them cost at most
    `asked_j - asked_i - cost_i`, which is below `(cost_i - cost_j) / phi - cost_i`. With j itself the sum is below
    `cost_i / phi - cost_i - cost_j * (1 / phi - 1)`, which is below `cost_i / phi` since `phi` is at most 1. Costs are
    positive, so finitely many requests pass i and nobody starves. With `phi` 1, requests keep the order of arrival.

    The bound counts costs as they were predicted at arrival. It excludes requests that return after a preemption: they
    come first in their client's queue, by arrival. It does not hold while i is set aside or does not fit into memory.

    Arrival and pick take O(log n) comparisons for n waiting requests of a client, and O(depth log m) for m waiting
    clients.
    """

    keeps_preempted = True

    def __init__(self, ledger: Ledger, phi: float) -> None:
        """An empty order.

        Args:
            ledger: whose accounts they are.
            phi: share of the cost of the requests in between by which a later request must be cheaper, above 0 to 1.
        """
        super().__init__(ledger)
        self._phi = phi

    @override
    def arrive(self, ticket: Ticket) -> None:
        account, cost = ticket.account, ticket.charge.hf
        ticket.place = (cost + account.asked, ticket.arrival)
        account.asked += ceil(self._phi * cost)  # rounded up, so that the bound holds to the last digit
        self.add(ticket)

    @override
    def preempted(self, ticket: Ticket) -> None:
        ticket.place = (-1, ticket.arrival)
        self.add(ticket)
