"""What clients may use: one frozen config a client, from a JSON file.

Amounts are whole numbers of `MICRO` parts in the books, so that sums are exact in Python, in SQLite and in Redis.
"""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Literal

from pydantic import Field

from mope.config import Frozen
from mope.errors import ConfigError
from mope.flags import validated

MICRO = 1_000_000  # parts of a token or a second
MOST = 4.5e9  # tokens or seconds: two such amounts add up below 2^53 parts, where the numbers of Redis are exact


class Budget(Frozen):
    """What a client may use in a window of time, and how sure a reservation is."""

    limit: float = Field(gt=0, le=MOST, description="tokens or GPU seconds in a window")
    window_s: float = Field(60, ge=0.1, le=31 * 86_400, description="length of a window in seconds")
    unit: Literal["tokens", "gpu_seconds"] = Field(
        "tokens", description="tokens, each kind by its weight, or gpu_seconds, for which the service needs a profile"
    )
    prompt_weight: float = Field(1, ge=0, le=1000, description="what a token of the prompt counts")
    response_weight: float = Field(1, ge=0, le=1000, description="what a token of the response counts")
    quantile: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="share of the windows that stay within the limit; reservations begin at this quantile of the "
        "answer, and follow what windows did; lower admits more",
    )
    hold_s: float = Field(
        600,
        ge=1,
        le=86_400,
        description="seconds after which a reservation that was not settled expires; with a profile, earlier: four "
        "times the latency of an answer of that quantile",
    )

    @property
    def limit_parts(self) -> int:
        """The limit as the books count it."""
        return parts_of(self.limit)

    def tokens(self, prompt_tokens: float, response_tokens: float) -> float:
        """What so many tokens count."""
        return self.prompt_weight * prompt_tokens + self.response_weight * response_tokens


class Budgets(Frozen):
    """The budgets of all clients."""

    default: Budget | None = Field(None, description="of each client that `clients` does not name; null: no limit")
    clients: dict[str, Budget | None] = Field({}, description="by client; null: no limit")

    def of(self, client: str) -> Budget | None:
        """The budget of a client; None if it has no limit."""
        return self.clients.get(client, self.default)


def parts_of(amount: float) -> int:
    """An amount as the books count it, rounded up: at most `MOST`."""
    return ceil(min(max(amount, 0.0), MOST) * MICRO)


def read_budgets(path: Path) -> Budgets:
    """From a JSON file such as `{"default": {"limit": 100000}, "clients": {"team-a": {"limit": 1e6}}}`.

    Raises:
        ConfigError: the file cannot be read, or an entry of it cannot be used.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or "it is no JSON"
        raise ConfigError(f'{path}: {said}; expected budgets such as {{"default": {{"limit": 100000}}}}') from error
    return validated(Budgets, found, lambda place: f"{path}: {'.'.join(map(str, place)) or 'the file'}")
