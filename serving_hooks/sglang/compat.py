"""What is known of SGLang: its releases, the names of our policies, and where a release keeps what we read.

Looks at the objects at hand rather than at versions. Imports nothing of SGLang by itself.
"""

from __future__ import annotations

import os
from functools import partial
from importlib.metadata import entry_points
from typing import Any, NamedTuple, get_args

from mope.fairness.config import PolicyName
from mope.serving_hooks import releases

POLICIES: tuple[str, ...] = tuple(name for name in get_args(PolicyName) if name != "fcfs")  # SGLang has its own
OLDEST = "0.5.11"
# releases that the tests ran whole engines of, the newest last
TESTED = ("0.5.14", "0.5.17", "0.5.20", "0.5.23")
GROUP, PLUGIN = "sglang.srt.plugins", "mope.serving_hooks.sglang.plugin:register"  # how SGLang finds us
ROUTING_HEADER = "x-smg-routing-key"  # carried to the scheduler by every front end of SGLang's

installed = partial(releases.installed, ("sglang",))


def standing(release: str | None) -> str:
    """What is known of a release, in words."""
    return releases.standing(release, OLDEST, TESTED)


class Rank(NamedTuple):
    """One scheduler among those that serve the same model.

    Attributes:
        first: whether it is the one that speaks for all that must agree with it.
        size: schedulers that must agree: tensor-parallel and pipeline ranks.
        nodes: machines that they run on.
        replica: its number among data-parallel ranks, each with requests of its own; None without such.
    """

    first: bool
    size: int
    nodes: int
    replica: int | None


def ranks(scheduler: Any) -> Rank:
    """Which of the schedulers this is."""
    server_args = scheduler.server_args
    place = getattr(scheduler, "ps", None)
    if place is None:
        from sglang.srt.runtime_context import get_parallel

        place = get_parallel()
    leads = place.pp_rank == 0 and place.attn_tp_rank == 0 and getattr(place, "attn_cp_rank", 0) == 0
    many = int(server_args.dp_size) > 1
    replica = place.dp_rank if place.dp_rank is not None else getattr(place, "attn_dp_rank", None)
    return Rank(
        first=bool(leads),
        size=int(server_args.tp_size) * int(server_args.pp_size),
        nodes=int(server_args.nnodes),
        replica=int(replica or 0) if many else None,
    )


def chosen_policy(scheduler: Any) -> str | None:
    """The policy of ours that `--schedule-policy` names; None if it names one of SGLang's."""
    name = getattr(scheduler, "schedule_policy", None) or scheduler.server_args.schedule_policy
    return name if name in POLICIES else None


def bypassed_front(server_args: Any) -> str | None:
    """Why no hook of ours runs in the front end, so that callers could write what only it may say; None if one does.

    The same on all ranks: it is read from the server's arguments.
    """
    workers = int(getattr(server_args, "tokenizer_worker_num", 1) or 1)
    if workers > 1:
        return f"SGLang loads no plugins in the front ends of --tokenizer-worker-num {workers}"
    if getattr(server_args, "use_ray", False):
        return "SGLang loads no plugins in the workers of --use-ray"
    for name in ("smg_grpc_mode", "grpc_mode"):
        if getattr(server_args, name, False):
            return f"the front end of --{name.replace('_', '-')} is not SGLang's Python server"
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes"):
        return "the front end of SGLANG_RUST_SERVER is not SGLang's Python server"
    return None


def not_ordered(server_args: Any) -> list[str]:
    """What waits in queues of SGLang's own, where no order of ours is, by the server's arguments; a line each."""
    found = []
    mode = getattr(server_args, "disaggregation_mode", "null")
    if mode == "decode":
        found.append(
            "--disaggregation-mode decode: SGLang admits here by itself, in order of arrival; nothing is ordered or "
            "charged. Turn mope on where prefill is done"
        )
    if mode == "prefill":
        found.append(
            "--disaggregation-mode prefill: requests are ordered and charged once the decode server has answered; "
            "until then they wait in order of arrival, and where they are decoded again"
        )
    if float(getattr(server_args, "lora_drain_wait_threshold", 0) or 0) > 0:
        found.append(
            "--lora-drain-wait-threshold: SGLang drains adapters for whoever waits longest, beside the turns of "
            "`lora_patience_s`; leave it out"
        )
    if getattr(server_args, "enable_lora_overlap_loading", False):
        found.append("--enable-lora-overlap-loading: an adapter is admitted when it is loaded, whoever's turn it is")
    return found


def read_tokens(req: Any) -> int:
    """Tokens of a request's prompt that are in the KV cache, computed or found there."""
    holder = getattr(req, "kv", None)
    return int(getattr(req if holder is None else holder, "kv_committed_len", 0) or 0)


def probe() -> list[str]:
    """What is not as this hook expects, as far as that can be seen without an engine; empty if all is.

    Imports SGLang, which takes some 10 s and may crash: not for a process that has other things to do.
    """
    from mope.serving_hooks.sglang.hooks import HOOKS, as_here, in_words, mismatch

    known = {found.value for found in entry_points(group=GROUP)}
    lost = [] if PLUGIN in known else [f"no plugin {PLUGIN} is installed in {GROUP}; install mope-llm anew"]
    return lost + in_words(found for hook in HOOKS if (found := mismatch(as_here(hook))) is not None)
