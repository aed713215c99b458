"""The command that starts vLLM with this hook, and what is often wrong with one.

Reads words as they are typed in a shell; imports no vLLM.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from mope.errors import ConfigError
from mope.serving_hooks.checks import Finding, misspelt, unread
from mope.serving_hooks.options import HookOptions

SCHEDULER = "mope.serving_hooks.vllm.make_scheduler"
MIDDLEWARE = "mope.serving_hooks.vllm.Middleware"
PRIORITY = "mope.serving_hooks.vllm.PriorityMiddleware"
START = f"""\
vllm serve MODEL --api-key KEY \\
  --scheduler-cls {SCHEDULER} \\
  --middleware {MIDDLEWARE} \\
  --additional-config '{{"mope": {{"policy": "equinox", "metrics_port": 9477}}}}'"""
_PART = "command"
RUST = "VLLM_USE_RUST_FRONTEND"  # variable that has vLLM start another front end
_NOBODY = "no request has a client or a prediction, and all are one client"
_LOOKED_AT = (
    "--additional-config",
    "--api-key",
    "--api-server-count",
    "--data-parallel-address",
    "--data-parallel-size",
    "--enable-lora",
    "--grpc",
    "--headless",
    "--kv-transfer-config",
    "--lora-modules",
    "--max-loras",
    "--max-num-queued-reqs",
    "--middleware",
    "--runner",
    "--scheduler-cls",
    "--scheduling-policy",
)
_ALIKE = (  # vLLM has these flags, too
    "--data-parallel-rank",
    "--data-parallel-size-local",
    "--ec-transfer-config",
    "--enable-dbo",
    "--lora-target-modules",
    "--max-cpu-loras",
    "--max-logprobs",
    "--max-num-queued-tokens",
    "--tensor-parallel-size",
    "--weight-transfer-config",
)
_SHORT = {"-asc": "--api-server-count", "-dp": "--data-parallel-size"}


def flags(words: Sequence[str]) -> dict[str, list[str]]:
    """Flags with their values, as `vllm serve` reads them: `--a b`, `--a=b`, `--a_b`, `--a.b c`.

    Returns:
        All values of each flag, by its name with dashes; a flag without one has "".
    """
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--") or word in _SHORT:
            name, equals, value = _SHORT.get(word, word).partition("=")
            first, dot, rest = name.partition(".")
            name = first.replace("_", "-") + dot + rest
            values = found.setdefault(name, [])
            if equals:
                values.append(value)
                name = None
            elif not values:
                values.append("")
        elif name is not None:
            values = found[name]
            if values[-1] == "":
                values.pop()
            values.append(word)
    return found


def options(typed: dict[str, list[str]]) -> HookOptions:
    """The options in `--additional-config`.

    Raises:
        ConfigError: they cannot be used, or stand where this hook does not look for them.
    """
    text = typed.get("--additional-config", [""])[-1]
    try:
        given: Any = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(f"--additional-config is no JSON ({error}); put it in single quotes") from error
    if not isinstance(given, dict):
        raise ConfigError(f'--additional-config is {text[:80]!r}; expected {{"mope": {{...}}}}')
    for flag, values in typed.items():
        if flag.startswith("--additional-config."):
            _put(given, flag.split(".")[1:], values[-1])
    astray = sorted(set(given) & set(HookOptions.model_fields))
    if astray:
        raise ConfigError(
            f"--additional-config: got the option {astray[0]!r} at the top level; mope reads the object under the key "
            f'"mope": type {{"mope": {{"{astray[0]}": ...}}}}'
        )
    near = get_close_matches("mope", [name for name in given if name != "mope"], 1)
    if near and "mope" not in given:
        raise ConfigError(
            f'--additional-config: got the key {near[0]!r}; mope reads its options under the key "mope": type '
            f'{{"mope": {{...}}}} if you meant "mope"'
        )
    return HookOptions.read(given.get("mope"), "--additional-config, mope")


def _put(into: dict[str, Any], path: Sequence[str], text: str) -> None:
    for name in path[:-1]:
        inner = into.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--additional-config.{'.'.join(path)}: {name} has a value of its own")
        into = inner
    try:
        into[path[-1]] = json.loads(text)
    except ValueError:
        into[path[-1]] = text


def _variable(words: Sequence[str], name: str) -> str:
    """A variable of the environment, or as it is set in front of the command."""
    typed = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return typed[-1] if typed else os.environ.get(name, "")


def _is_on(value: str) -> bool:
    return value.lower() not in ("", "0", "false", "no", "off")


def _few_adapters(typed: dict[str, list[str]]) -> int | None:
    """How many LoRA adapters run at once, where that is fewer than there are; None where it is not."""
    if not {"--enable-lora", "--max-loras", "--lora-modules"} & set(typed):
        return None
    given = typed.get("--max-loras", ["1"])[-1]
    most, num_adapters = int(given) if given.isdecimal() else 1, len(typed.get("--lora-modules", []))
    return most if most < (num_adapters or 2) else None


def num_ranks(words: Sequence[str]) -> int:
    """Schedulers of a command's server that each have a metrics port."""
    many = flags(words).get("--data-parallel-size", ["1"])[-1]
    return int(many) if many.isdecimal() else 1


def mistakes(words: Sequence[str], chosen: HookOptions | None) -> list[Finding]:
    """What is wrong with a command, or not as one may think.

    Args:
        words: of the command.
        chosen: its options; None if they cannot be used.
    """
    typed = flags(words)
    found = misspelt(typed, _LOOKED_AT, _ALIKE, _PART)

    def tell(status: Any, text: str) -> None:
        found.append(Finding(_PART, status, text))

    scheduler = typed.get("--scheduler-cls", [""])[-1]
    middlewares = typed.get("--middleware", [])
    ours, tells, tags = scheduler == SCHEDULER, MIDDLEWARE in middlewares, PRIORITY in middlewares
    policy = typed.get("--scheduling-policy", ["fcfs"])[-1]
    many = typed.get("--api-server-count", ["1"])[-1]
    if scheduler and not ours:
        tell("failed", f"--scheduler-cls {scheduler}: not this hook, expected {SCHEDULER}")
    for name in middlewares:
        if name.startswith("mope") and name not in (MIDDLEWARE, PRIORITY):
            tell("failed", f"--middleware {name}: expected {MIDDLEWARE} or {PRIORITY}")
    file = unread(typed, "--scheduler-cls, --middleware and --additional-config", _PART)
    elsewhere = file is not None and not (scheduler or tags)  # perhaps
    if file is not None:
        found.append(file)
    if not (scheduler or tags or elsewhere):
        tell("failed", f"nothing of mope is on: add --scheduler-cls {SCHEDULER}")
    if ours and policy != "fcfs":
        tell("failed", f"--scheduling-policy {policy}: leave it out, mope's scheduler brings its own order")
    if ours and tags:
        tell("failed", "PriorityMiddleware is for vLLM's own scheduler: with mope's take Middleware")
    if tags and not ours and policy != "priority":
        tell("failed", "PriorityMiddleware does nothing without --scheduling-policy priority")
    if tags and many != "1":
        tell("failed", f"--api-server-count {many}: PriorityMiddleware must see all requests, so it takes 1")
    if ours and not tells:
        tell(
            "warning",
            f"without --middleware {MIDDLEWARE} no request has a client or a prediction: all share one client. Only a "
            "request to a LoRA adapter counts as another client, lora/NAME, where NAME is the adapter's",
        )
    if (ours or tags) and _is_on(_variable(words, RUST)):
        tell("failed", f"{RUST}: vLLM's Rust front end runs no middleware, so {_NOBODY}: leave it out")
    if (ours or tags) and "--grpc" in typed:
        tell("failed", f"--grpc: vLLM's gRPC server runs no middleware, so {_NOBODY}: leave it out")
    if typed.get("--runner", ["auto"])[-1] == "pooling":
        tell(
            "warning",
            "--runner pooling: embeddings and scores have no answer to predict, so clients take turns by the tokens of "
            "their prompts; requests on paths that the middleware does not read are one client",
        )
    if ours and "--kv-transfer-config" in typed:
        tell(
            "note",
            "--kv-transfer-config: requests whose KV cache is loaded in the background (the decode side of "
            "disaggregated prefill) are ordered by client, too; no more loads begin than fill a batch",
        )
    if ours and (few := _few_adapters(typed)) is not None:
        tell(
            "note",
            f"--max-loras {few}: LoRA adapters take turns. A client on another adapter waits for `lora_patience_s` and "
            "until the requests of one adapter have ended; raise --max-loras to the adapters in use to avoid that",
        )
    if "--max-num-queued-reqs" in typed:
        tell("warning", "--max-num-queued-reqs turns the newcomer away: a flood then locks the others out")
    if chosen is None:
        return found
    keys_are_checked = "--api-key" in typed or bool(os.environ.get("VLLM_API_KEY"))
    if (tells or tags) and chosen.identity == "api-key" and chosen.api_keys is None and not keys_are_checked:
        tell("warning", "identity api-key, but neither --api-key nor api_keys: all callers are one client")
    if (tells or tags) and chosen.identity == "api-key" and chosen.api_keys is not None and not keys_are_checked:
        tell("note", "api_keys says who a caller is and refuses nobody: --api-key or a gateway keeps strangers out")
    ranks = typed.get("--data-parallel-size", ["1"])[-1]
    if ours and ranks != "1":
        port = chosen.metrics_port
        shown = f"; metrics at port {port} and the next ones" if port else ""
        shared = "" if chosen.store else "; a store lets them count together"
        tell("note", f"--data-parallel-size {ranks}: each engine keeps books of its own{shared}{shown}")
    if (ours and tells) and chosen.secret is None and ("--headless" in typed or "--data-parallel-address" in typed):
        tell("warning", "engines on other machines take all requests for one client's: give all of them one `secret`")
    if not elsewhere and not any(finding.status == "failed" for finding in found):
        tell("ok", f"policy {chosen.policy}, clients by {chosen.identity}, predictor {chosen.predictor}")
    return found
