"""Calls methods around `os.fork`, so that a child gets locks and threads that work.

A child of a fork has one thread, and a copy of every lock as it was. A lock that another thread held is never released
there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from types import MethodType
from weakref import WeakKeyDictionary

_Owners = WeakKeyDictionary[object, str]  # object -> name of its method
_before_fork: _Owners = WeakKeyDictionary()
_after_fork: _Owners = WeakKeyDictionary()


def before_fork(method: Callable[[], None]) -> None:
    """Call a method in the parent before each fork, as long as its object lives.

    Args:
        method: a bound method, one for each object. The object is not kept alive. The fork waits until it returns.
    """
    _add(_before_fork, method)


def after_fork(method: Callable[[], None]) -> None:
    """Call a method in the child after each fork, as long as its object lives.

    Args:
        method: a bound method, one for each object, that replaces locks, queues and threads of the object. The object
            is not kept alive. It must not take a lock that another thread may have held.
    """
    _add(_after_fork, method)


def _add(owners: _Owners, method: Callable[[], None]) -> None:
    _register()
    if not isinstance(method, MethodType):
        raise TypeError(f"{method!r} is not a bound method")
    owners[method.__self__] = method.__name__


@cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(before=lambda: _call(_before_fork), after_in_child=lambda: _call(_after_fork))


def _call(owners: _Owners) -> None:
    for owner, name in list(owners.items()):
        getattr(owner, name)()
