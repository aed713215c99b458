"""What `mope serve` does with budgets: how much a reservation holds, for how long, and what a settlement counts.

A reservation holds what the prompt takes and what the answer takes at a level that begins at the budget's quantile and
follows what the client's windows did. Knows budgets, books and
the engine's profile; nothing of HTTP, and no predictor.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from math import isinf
from pathlib import Path
from typing import Any, NamedTuple

from mope.budgets.books import Books, Hold, Settlement, open_books
from mope.budgets.config import MICRO, MOST, Budget, Budgets, parts_of, read_budgets
from mope.budgets.risk import level_of
from mope.errors import ConfigError, DataError, StoreError, UserError
from mope.fairness.mapper import MetricsMapper
from mope.reader import shown
from mope.serving_hooks.service.config import ServeConfig

UNLIMITED = Budget(limit=MOST)
CHECK_S = 1.0  # between two looks at whether the file has changed
TOKEN_S = 0.03  # what a token takes, where no profile says it: only for how long to wait
MOST_CLIENTS = 100_000  # whose level is remembered here; of others, the first reservation has the budget's
SLOWER, LEAST_HOLD_S = 4.0, 30.0  # a request may take so many times its latency on an idle engine, and at least that

logger = logging.getLogger("mope")


class Asked(NamedTuple):
    """What is reserved for.

    Attributes:
        id: of the reservation.
        key: client of the API key that asks, which alone may settle; None without keys.
        client: whose budget it takes from.
        prompt_tokens: tokens of the prompt.
        mean: expected response tokens.
        quantile: the response tokens of a level, with the request's cap applied.
    """

    id: str
    key: str | None
    client: str
    prompt_tokens: int
    mean: float
    quantile: Callable[[float], float]


class UsedId(DataError):
    """The id of a reservation belongs to another one."""


class Limiter:
    """Reserves and settles.

    Args:
        config: of the service.
        mapper: of its profile; None without one.

    Raises:
        ConfigError: budgets that cannot be read, or that need a profile.
        StoreError: books that cannot be opened.
        MissingExtraError: the package `redis` is not installed.
    """

    def __init__(self, config: ServeConfig, mapper: MetricsMapper | None) -> None:
        self._path, self._mapper, self._allows = config.budgets, mapper, config.books_down == "allow"
        self._changed: tuple[int, int] | None = None
        self._next_check_s, self._warned = 0.0, False
        self._budgets = Budgets()
        if self._path is not None:
            self._changed = _state_of(self._path)
            self._budgets = self._read(self._path)
        self._odds: OrderedDict[str, float] = OrderedDict()  # log odds of each client's level, as the books had it last
        self.books: Books = open_books(config.books, config.books_namespace)

    def budget(self, client: str) -> Budget | None:
        """The budget of a client; None without a limit. The file is read again when it has changed."""
        if self._path is None and not self._warned:
            self._warned = True
            logger.warning("a reservation without --budgets: it is counted, and nothing is limited")
        if self._path is not None and time.monotonic() >= self._next_check_s:
            self._next_check_s = time.monotonic() + CHECK_S
            changed = _state_of(self._path)
            if changed != self._changed:
                self._changed = changed
                try:
                    self._budgets = self._read(self._path)
                    logger.info("read budgets from %s", self._path)
                except UserError as error:
                    logger.error("%s; the budgets stay as they were", error)
        return self._budgets.of(client)

    def _read(self, path: Path) -> Budgets:
        found = read_budgets(path)
        named = {"default": found.default, **found.clients}
        timed = [name for name, budget in named.items() if budget is not None and budget.unit == "gpu_seconds"]
        if timed and self._mapper is None:
            raise ConfigError(f"{path}: {timed[0]} is counted in gpu_seconds, which needs --profile")
        return found

    async def reserve(self, asked: Asked) -> dict[str, Any]:
        """Make a reservation, if there is room for it.

        Returns:
            What the service answers, see `mope.serving_hooks.service.schemas.Reservation`.
        """
        limited = self.budget(asked.client)
        budget = limited or UNLIMITED
        odds = self._odds.get(asked.client)
        high = asked.quantile(budget.quantile if odds is None else level_of(odds))
        amount = self._amount(budget, asked.prompt_tokens, high)
        expected = self._amount(budget, asked.prompt_tokens, asked.mean)
        parts = parts_of(amount)
        likely = self._amount(budget, asked.prompt_tokens, asked.quantile(0.5))
        if likely <= budget.limit < amount:  # nothing is refused for ever that will probably fit: it gets all there is
            parts = budget.limit_parts
        note = {
            "unit": budget.unit,
            "weights": [budget.prompt_weight, budget.response_weight],
            "prompt": asked.prompt_tokens,
        }
        hold = Hold(
            _booked_as(asked.id, asked.key),
            asked.client,
            parts,
            max(parts - parts_of(expected), 0),
            self._latency_s(asked.prompt_tokens, asked.mean),
            self._hold_s(budget, asked.prompt_tokens, high),
            budget.limit_parts,
            budget.window_s,
            json.dumps(note),
            1.0 - budget.quantile,
        )
        answer = {
            "id": asked.id,
            "client": asked.client,
            "unit": budget.unit,
            "amount": parts / MICRO,
            "limit": None if limited is None else limited.limit,
            "books": True,
        }
        try:
            decision = await self.books.reserve(hold)
        except StoreError as error:
            logger.error("%s; %s is %s", error, asked.id, "allowed" if self._allows else "denied")
            retry_after_s = None if self._allows else 1.0
            return {
                **answer,
                "decision": "allow" if self._allows else "wait",
                "again": False,
                "used": None, "held": None, "retry_after_s": retry_after_s, "window_s": None, "books": False,
            }  # fmt: skip
        if decision.odds is not None:
            self._odds[asked.client] = decision.odds
            if len(self._odds) > MOST_CLIENTS:
                self._odds.popitem(last=False)
        if decision.state == "used":
            raise UsedId(
                f"the id {shown(asked.id)} was used for another reservation; send one that no other request has"
            )
        full = decision.state == "full"
        never = full and isinf(decision.wait_s)
        return {
            **answer,
            "decision": "deny" if never else "wait" if full else "allow",
            "again": decision.state == "known",
            "used": decision.used / MICRO,
            "held": decision.held / MICRO,
            "retry_after_s": round(decision.wait_s, 3) if full and not never else None,
            "window_s": round(decision.window_s, 3),
        }

    async def settle(
        self, name: str, key: str | None, prompt_tokens: int | None, response_tokens: int
    ) -> dict[str, Any] | None:
        """Close a reservation with what it took.

        Args:
            name: its id.
            key: client of the API key that asks; None without keys.
            prompt_tokens: tokens of the prompt as the server counted them; None: as they were reserved.
            response_tokens: tokens that were generated.

        Returns:
            What the service answers; None if there is no such reservation, or no longer.

        Raises:
            StoreError: the books cannot be reached. It may be settled again.
        """
        booked_as = _booked_as(name, key)
        said = await self.books.note(booked_as)
        if said is None:
            return None
        note = json.loads(said)
        prompt_weight, response_weight = note["weights"]
        counted = note["prompt"] if prompt_tokens is None else prompt_tokens
        budget = Budget(limit=1, unit=note["unit"], prompt_weight=prompt_weight, response_weight=response_weight)
        parts = parts_of(self._amount(budget, counted, response_tokens))
        found: Settlement = await self.books.settle(booked_as, parts)
        if found.state == "unknown":
            return None
        return {
            "id": name,
            "client": found.client,
            "state": found.state,
            "unit": note["unit"],
            "reserved": found.reserved / MICRO,
            "used": found.used / MICRO,
            "refunded": (found.reserved - found.used) / MICRO,
        }

    async def close(self) -> None:
        """Ends the books."""
        await self.books.close()

    def _amount(self, budget: Budget, prompt_tokens: float, response_tokens: float) -> float:
        if budget.unit == "tokens":
            return budget.tokens(prompt_tokens, response_tokens)
        if self._mapper is None:
            raise DataError("it is counted in GPU seconds, for which this service has no profile")
        cost = self._mapper.estimate(int(prompt_tokens), response_tokens)
        return cost.latency_s * cost.gpu_utilization

    def _latency_s(self, prompt_tokens: int, response_tokens: float) -> float:
        if self._mapper is None:
            return TOKEN_S * response_tokens
        return self._mapper.estimate(prompt_tokens, response_tokens).latency_s

    def _hold_s(self, budget: Budget, prompt_tokens: int, response_tokens: float) -> float:
        if self._mapper is None:
            return budget.hold_s
        slow_s = SLOWER * self._mapper.estimate(prompt_tokens, response_tokens).latency_s
        return min(budget.hold_s, max(LEAST_HOLD_S, slow_s))


def _booked_as(name: str, key: str | None) -> str:
    """An id in the books: no key can close what another one reserved, whatever ids it makes up."""
    return json.dumps([key, name])


def _state_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
