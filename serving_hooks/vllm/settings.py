"""Where vLLM keeps what the operator typed: our options, the names of its LLM, its API keys.

Reads vLLM's configuration and command line by attributes that may be missing; imports no engine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from mope.errors import ConfigError
from mope.serving_hooks.options import HookOptions

KEY = "mope"  # of our options in --additional-config
VARIABLE = "MOPE_OPTIONS"  # the same as JSON, for servers that offer no --additional-config


def hook_options(vllm_config: Any, arguments: Any = None) -> HookOptions:
    """Our options: of `--additional-config '{"mope": {...}}'`, else of the environment's `MOPE_OPTIONS`, else defaults.

    Args:
        vllm_config: vLLM's configuration, or None.
        arguments: its command line, or None.

    Raises:
        ConfigError: options that cannot be used.
    """
    for holder in (vllm_config, arguments):
        additional = getattr(holder, "additional_config", None)
        if isinstance(additional, str):
            additional = _json(additional, "--additional-config")
        if isinstance(additional, Mapping) and KEY in additional:
            return HookOptions.read(additional[KEY], f"--additional-config, {KEY}")
    if text := os.environ.get(VARIABLE):
        return HookOptions.read(_json(text, VARIABLE), VARIABLE)
    return HookOptions()


def llm_names(vllm_config: Any, arguments: Any = None) -> tuple[str, ...]:
    """What the LLM is called: what was loaded, which an alias does not hide, then what it is served as."""
    config = getattr(vllm_config, "model_config", None) or arguments
    served = getattr(config, "served_model_name", None) or getattr(arguments, "served_model_name", None)
    names = (getattr(config, "model", None), served[0] if isinstance(served, list | tuple) and served else served)
    return tuple(name for name in names if isinstance(name, str) and name)


def server_keys(arguments: Any) -> tuple[str, ...]:
    """The API keys that the server accepts, found as vLLM finds them; empty where it accepts all requests."""
    keys = getattr(arguments, "api_key", None) or os.environ.get("VLLM_API_KEY") or ()
    return (keys,) if isinstance(keys, str) else tuple(key for key in keys if isinstance(key, str) and key)


def num_api_servers(vllm_config: Any, arguments: Any = None) -> int:
    """Processes that take requests for the same engine."""
    parallel = getattr(vllm_config, "parallel_config", None)
    counts = (getattr(parallel, "_api_process_count", None), getattr(arguments, "api_server_count", None), 1)
    return max(count for count in counts if isinstance(count, int))


def orders_by_priority(vllm_config: Any, arguments: Any = None) -> bool:
    """Whether it runs with `--scheduling-policy priority`."""
    policy = getattr(getattr(vllm_config, "scheduler_config", None), "policy", None)
    if policy is None:
        policy = getattr(arguments, "scheduling_policy", None)
    return str(getattr(policy, "value", policy)) == "priority"


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
