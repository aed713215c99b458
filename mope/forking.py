"""Calls methods around `os.fork`, so that a child gets locks and threads that work.

A child of a fork has one thread, and a copy of every lock as it was. A lock that another thread held is never released
there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from weakref import WeakMethod

_Methods = dict[int, WeakMethod[Callable[[], None]]]
_before_fork: _Methods = {}
_after_fork: _Methods = {}


def before_fork(method: Callable[[], None]) -> None:
    """Call a method in the parent before each fork, as long as its object lives.

    Args:
        method: a bound method. Its object is not kept alive. The fork waits until the method returns.
    """
    _add(_before_fork, method)


def after_fork(method: Callable[[], None]) -> None:
    """Call a method in the child after each fork, as long as its object lives.

    Args:
        method: a bound method that replaces locks, queues and threads of its object. Its object is not kept alive. It
            must not take a lock that another thread may have held.
    """
    _add(_after_fork, method)


def _add(methods: _Methods, method: Callable[[], None]) -> None:
    _register()
    forget = methods.pop  # still there when Python ends and clears this module
    kept = WeakMethod(method, lambda gone: forget(id(gone), None))
    methods[id(kept)] = kept


@cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(before=lambda: _call(_before_fork), after_in_child=lambda: _call(_after_fork))


def _call(methods: _Methods) -> None:
    for kept in list(methods.values()):
        method = kept()
        if method is not None:
            method()
