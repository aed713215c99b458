"""Releases of engines as numbers, and what is known of one by those that the tests ran. Knows no engine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version


def installed(names: Iterable[str]) -> str | None:
    """The version of the first of these packages that is installed; None if none is."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def numbers(release: str) -> tuple[int, ...]:
    """A release as numbers to compare by: `0.11.2rc1+cpu` is (0, 11, 2)."""
    found = re.match(r"\d+(?:\.\d+)*", release)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def standing(release: str | None, oldest: str, tested: Sequence[str], *, parts: int = 3) -> str:
    """What is known of a release, in words.

    Args:
        release: as installed; None if it is not.
        oldest: the oldest that can work.
        tested: releases that the tests ran, the newest last.
        parts: numbers of a release that tell apart what behaves differently.
    """
    if release is None:
        return "not installed"
    known = numbers(release)
    if known < numbers(oldest):
        return f"older than {oldest}, which is the oldest that can work"
    if known[:parts] in {numbers(one)[:parts] for one in tested}:
        return "tested"
    if known < numbers(tested[0]):
        return "before the tested ones"
    return "newer than the tested ones" if known > numbers(tested[-1]) else "between tested ones"
