"""Ranks on several machines: before anything is served, all must have been given the same options.

Each node is started by a command of its own, and ranks that order requests differently corrupt answers without an
error. So the ranks tell each other what decides, once, while SGLang starts. They also find out whether all of them
have the same secret: then they can check seals without disagreeing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version

from mope.errors import ConfigError
from mope.fairness.profiles import load_profile
from mope.serving_hooks import secret
from mope.serving_hooks.options import HookOptions

SECRET = "secret"  # what each rank tells of its own: a digest; empty without one

# options that decide nothing on the schedulers, and may differ from node to node
_FREE = frozenset(
    {"api_keys", "deadline_ms", "llm_family", "llm_reasoning", "llm_size", "llm_year", "metrics_clients"}
    | {"metrics_host", "metrics_port", "namespace", "predictor", "profile", "recalibrate", "secret", "state", "store"}
    | {"summary_s", "target_llm"}
)

logger = logging.getLogger("mope")


def deciding(options: HookOptions, bypassed: str | None) -> dict[str, str]:
    """What order and charges depend on, by name; and a digest of the secret that the rank was given, which may differ.

    Args:
        options: the rank's.
        bypassed: why the front end is not believed; None if it is.
    """
    told = {name: str(value) for name, value in options.model_dump(mode="json").items() if name not in _FREE}
    profile = load_profile(options.profile).model_dump_json().encode()
    try:
        told["release of mope"] = version("mope-llm")
    except PackageNotFoundError:
        told["release of mope"] = "unknown"
    told[SECRET] = _digest_of_secret(options)
    return {**told, "profile": blake2b(profile, digest_size=8).hexdigest(), "front end": bypassed or "hooked"}


def _digest_of_secret(options: HookOptions) -> str:
    if options.secret is None:
        return ""
    try:
        return blake2b(secret.load(options), digest_size=16, person=b"mope nodes").hexdigest()
    except ConfigError as error:
        logger.warning("mope: %s", error)
        return ""


def same_secret(told: Sequence[Mapping[str, str]]) -> bool:
    """Whether all ranks were given the same secret."""
    return bool(told[0][SECRET]) and len({one[SECRET] for one in told}) == 1


def expect_same(told: Sequence[Mapping[str, str]]) -> None:
    """Looks at what all ranks have told, in order of their numbers.

    Raises:
        ConfigError: two ranks differ; it is the same on all of them, and none starts.
    """
    first = told[0]
    for number, other in enumerate(told):
        names = dict.fromkeys((*first, *other))
        differing = [name for name in names if name != SECRET and first.get(name) != other.get(name)]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"rank {number} has {name} {other.get(name)!r} and rank 0 {first.get(name)!r}: ranks that disagree "
                "corrupt answers. Give each node the same --mope-config and the same release of mope"
            )


def gather(mine: Mapping[str, str], first: bool) -> list[dict[str, str]]:
    """What each rank of all nodes tells; waits for all of them."""
    import torch.distributed
    from sglang.srt.distributed.parallel_state import get_world_group

    group = get_world_group()
    if first:
        logger.info("mope compares options with %d ranks; each node needs the same --schedule-policy", group.world_size)
    found: list[dict[str, str]] = [{}] * group.world_size
    torch.distributed.all_gather_object(found, dict(mine), group=group.cpu_group)
    return found
