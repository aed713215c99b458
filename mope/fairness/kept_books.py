"""The books as plain JSON values: how they are written in pieces, and what may be read again.

Knows accounts and open charges; the ledger puts them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from mope.fairness.accounts import Account, Group
from mope.fairness.charges import Charge

_PIECE, _PASSED = 200, 1000  # accounts in a piece of the books, and those that are only passed by
_MOST = 10**30  # of any amount that is restored


class OpenCharge(NamedTuple):
    """What a request in flight has been charged, and to whom."""

    account: Account
    charge: Charge


def pieces(
    root: Group, idle: Callable[[], Iterable[Account]], open_charges: Mapping[str, OpenCharge]
) -> Iterator[tuple[str, list[Any]]]:
    """Accounts, the idle among them and open requests, some hundred at a time, see `Ledger.pieces`.

    Args:
        root: of all accounts.
        idle: gives the accounts that are listed as idle by then, longest first.
        open_charges: of requests in flight, by id.
    """
    number: dict[Account, int] = {}
    found: list[tuple[str, int | None]] = []
    levels: list[tuple[int | None, Iterator[tuple[str, Account]]]] = [(None, iter([("", root)]))]
    while levels:
        parent, siblings = levels[-1]
        for name, account in siblings:
            if account in number:  # it has moved since its siblings were copied
                continue
            number[account] = len(found)
            found.append((name, parent))
            if len(found) % _PASSED == 0:
                yield "accounts", []
            if isinstance(account, Group):
                levels.append((number[account], iter(account.children.copy().items())))
                break
        else:
            levels.pop()
    accounts = iter(number)
    for low in range(0, len(found), _PIECE):
        places = found[low : low + _PIECE]
        yield (
            "accounts",
            [
                {
                    "name": name,
                    "parent": parent,
                    "counter": account.counter,
                    "charged": list(account.charged),
                    **(
                        {
                            "forgotten": account.forgotten,
                            "last": number.get(account.last) if account.last is not None else None,
                        }
                        if isinstance(account, Group)
                        else {}
                    ),
                }
                for (name, parent), account in zip(places, accounts, strict=False)
            ],
        )
    listed, idle_now = set(), list(idle())
    for low in range(0, max(len(idle_now), 1), _PASSED):
        rows = []
        for account in idle_now[low : low + _PASSED]:
            if account.idle and account in number and account not in listed:
                listed.add(account)
                rows.append(number[account])
        yield "idle", rows
    still_open = list(open_charges.items())
    for low in range(0, max(len(still_open), 1), _PIECE):
        rows_open = [
            [name, number[one.account], list(one.charge)]
            for name, one in still_open[low : low + _PIECE]
            if one.account in number
        ]
        yield "open", rows_open


def read_amount(value: Any) -> int:
    """An amount.

    Raises:
        ValueError: it is none, or too large.
    """
    if type(value) is not int or abs(value) > _MOST:
        raise ValueError(f"{str(value)[:40]!r} is no amount")
    return value


def read_charge(values: Any) -> Charge:
    """A charge, of four amounts.

    Raises:
        ValueError: one is no amount.
        TypeError: they are not four.
    """
    return Charge(*map(read_amount, values))


def read_name(value: Any) -> str:
    """A name.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no name")
    return value


def read_place(value: Any, accounts: list[Account]) -> int:
    """Where an account stands in a list.

    Raises:
        ValueError: it is no place there.
    """
    if type(value) is not int or not 0 <= value < len(accounts):
        raise ValueError(f"{str(value)[:40]!r} is no account's place")
    return value
