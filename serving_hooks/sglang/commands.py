"""The command that starts SGLang with this hook, and what is often wrong with one.

Reads words as they are typed in a shell; imports no SGLang.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from mope.errors import ConfigError, ServerError
from mope.serving_hooks.checks import Finding, misspelt, no_predictions, unread
from mope.serving_hooks.fetch import fetch_json, readable
from mope.serving_hooks.options import NO_PREDICTOR, HookOptions
from mope.serving_hooks.sglang import compat, settings

START = """\
python -m sglang.launch_server --model-path MODEL --schedule-policy equinox \\
  --mope-config '{"api_keys": "keys.json", "metrics_port": 9477}'"""
_PART = "command"
_LOOKED_AT = (
    settings.FLAG,
    "--api-key",
    "--data-parallel-size",
    "--disaggregation-mode",
    "--dp-size",
    "--enable-priority-scheduling",
    "--grpc-mode",
    "--max-queued-requests",
    "--schedule-policy",
    "--smg-grpc-mode",
    "--tokenizer-worker-num",
    "--use-ray",
)
_ALIKE = (  # SGLang has these flags, too
    "--attention-data-parallel-size",
    "--dcp-size",
    "--detokenizer-worker-num",
    "--disaggregation-ib-device",
    "--dwdp-size",
    "--ep-size",
    "--expert-parallel-size",
    "--model-config",
    "--moe-data-parallel-size",
    "--moe-dp-size",
    "--page-size",
    "--pp-size",
    "--tensor-parallel-size",
    "--tokenizer-worker-ipc-name",
    "--tp-size",
)


def flags(words: Sequence[str]) -> dict[str, list[str]]:
    """Flags with their values, as SGLang reads them: `--a b`, `--a=b`.

    Returns:
        All values of each flag; a flag without one has "".
    """
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found.setdefault(name, []).append(value)
            name = None if equals else name
        elif name is not None:
            found[name][-1] = word
            name = None
    return found


def options(typed: dict[str, list[str]]) -> HookOptions:
    """The options in `--mope-config`, or in the environment.

    Raises:
        ConfigError: they cannot be used.
    """
    text = typed.get(settings.FLAG, [os.environ.get(settings.VARIABLE, "")])[-1]
    given = settings.parse(text, settings.FLAG if settings.FLAG in typed else settings.VARIABLE)
    policy = typed.get("--schedule-policy", [""])[-1]
    if policy not in compat.POLICIES:
        return given
    if "policy" in given.model_fields_set and given.policy != policy:
        raise ConfigError(
            f"{settings.FLAG} says policy {given.policy!r} and --schedule-policy {policy!r}: name it once"
        )
    return HookOptions.read({**given.model_dump(exclude_unset=True), "policy": policy}, settings.FLAG)


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

    policy = typed.get("--schedule-policy", ["fcfs"])[-1]
    file = unread(typed, "--schedule-policy and --mope-config", _PART)
    elsewhere = file is not None and "--schedule-policy" not in typed  # perhaps
    if file is not None:
        found.append(file)
    if policy not in compat.POLICIES and not elsewhere:
        tell(
            "failed",
            f"nothing of mope is on: --schedule-policy is {policy}, expected one of {', '.join(compat.POLICIES)}",
        )
    if "--enable-priority-scheduling" in typed:
        tell("failed", "--enable-priority-scheduling: SGLang takes it with its own fcfs and lof alone; leave it out")
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and "mope" not in [name.strip() for name in allowed.split(",")]:
        tell("failed", f"SGLANG_PLUGINS={allowed} keeps mope from being loaded: add mope to it")
    workers = typed.get("--tokenizer-worker-num", ["1"])[-1]
    if workers != "1":
        tell(
            "warning",
            f"--tokenizer-worker-num {workers}: SGLang loads no plugins there, so no request has a client or a "
            "prediction; take 1",
        )
    for name in ("--use-ray", "--grpc-mode", "--smg-grpc-mode"):
        if name in typed:
            tell("warning", f"{name}: SGLang loads no plugins in that front end, so all requests are one client")
    _queues(typed, tell)
    if "--max-queued-requests" in typed:
        tell("warning", "--max-queued-requests turns the newcomer away: a flood then locks the others out")
    if chosen is None:
        return found
    if chosen.identity == "api-key" and "--api-key" in typed:
        text = "--api-key: SGLang serves this one key alone, so all callers are one client"
        tell("warning", f"{text}, and api_keys is of no use" if chosen.api_keys is not None else text)
    elif chosen.identity == "api-key" and chosen.api_keys is None:
        tell("warning", "identity api-key, but no api_keys: all callers are one client")
    elif chosen.identity == "api-key":
        tell("note", "api_keys says who a caller is and refuses nobody: keep strangers out by a gateway")
    if (num_nodes := typed.get("--nnodes", ["1"])[-1]) != "1":
        tell(
            "note",
            f"--nnodes {num_nodes}: give each node the same --schedule-policy and --mope-config; ranks compare them at "
            "the start. No state is kept",
        )
        if chosen.secret is None:
            tell(
                "warning",
                f"--nnodes {num_nodes} without `secret`: seals are not checked, so the schedulers believe any client "
                "and prediction that reaches them; only the front end removes what callers wrote. Give each node the "
                "option `secret` with the same content",
            )
        else:
            tell(
                "note",
                "secret: seals are checked if its content is the same on all nodes; the log says so at the start",
            )
    many = typed.get("--dp-size", typed.get("--data-parallel-size", ["1"]))[-1]
    if many != "1":
        shown = f"; metrics at port {chosen.metrics_port} and the next ones" if chosen.metrics_port else ""
        tell("note", f"--dp-size {many}: each replica keeps books of its own{shown}")
    if not elsewhere and not any(finding.status == "failed" for finding in found):
        tell("ok", f"policy {chosen.policy}, clients by {chosen.identity}, predictor {chosen.predictor}")
    return found


def _queues(typed: dict[str, list[str]], tell: Callable[[Any, str], None]) -> None:
    """Where requests wait in queues that the hook does not order."""
    arguments = SimpleNamespace(
        disaggregation_mode=typed.get("--disaggregation-mode", ["null"])[-1],
        lora_drain_wait_threshold=_number(typed.get("--lora-drain-wait-threshold", ["0"])[-1]),
        enable_lora_overlap_loading="--enable-lora-overlap-loading" in typed,
    )
    for text in compat.not_ordered(arguments):
        tell("warning", text)
    if "--enable-lora" in typed or "--lora-paths" in typed:
        few = typed.get("--max-loras-per-batch", ["8"])[-1]
        tell(
            "note",
            f"--max-loras-per-batch {few}: LoRA adapters, and the LLM as it is, take turns. A client on another one "
            "waits for `lora_patience_s` and until the requests of one adapter have ended; raise it to those in use",
        )
    if typed.get("--grammar-backend", [""])[-1] not in ("", "none"):
        tell("note", "--grammar-backend: a request joins the order once its grammar is compiled, not before")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def api_key(words: Sequence[str]) -> str | None:
    """The key that a command's server will want of its callers; None if it wants none."""
    return flags(words).get("--api-key", [""])[-1] or None


def num_ranks(words: Sequence[str]) -> int:
    """Schedulers of a command's server that each have a metrics port."""
    typed = flags(words)
    many = typed.get("--dp-size", typed.get("--data-parallel-size", ["1"]))[-1]
    return int(many) if many.isdecimal() else 1


def running(url: str, key: str | None = None) -> list[Finding]:
    """Whether a server has the hook on, by its `/server_info`.

    Args:
        url: of its API.
        key: what it wants as a bearer token, if anything.
    """
    part = "active"
    try:
        told = fetch_json(f"{url.rstrip('/')}/server_info", key)
    except ServerError as error:
        if error.status in (401, 403):
            wanted = "another key" if key else "a key"
            return [Finding(part, "failed", f"{url} wants {wanted} (HTTP {error.status}): give it with --api-key")]
        return [Finding(part, "failed", f"{url}/server_info does not answer as SGLang's does: {error}")]
    states = told.get("internal_states") if isinstance(told, dict) else None
    if not isinstance(states, list | dict):
        return [Finding(part, "failed", f"{url}/server_info does not answer as SGLang's does: no internal_states")]
    found = []
    for number, state in enumerate(states):
        ours = state.get("mope") if isinstance(state, dict) else None
        where = url if len(states) == 1 else f"{url}, replica {number}"
        if not isinstance(ours, dict):
            found.append(Finding(part, "failed", f"{where}: no policy of mope's is on"))
        elif not ours.get("on"):
            found.append(
                Finding(part, "failed", f"{where}: the hook has failed and is off: {readable(ours.get('failure'))}")
            )
        else:
            front, policy = readable(ours.get("front_end")), readable(ours.get("policy"))
            running, waiting = readable(ours.get("running")), readable(ours.get("waiting"))
            text = f"{where}: policy {policy}, {running} running, {waiting} waiting; front end: {front}"
            if front == "hooked":
                told, wrong = _predictions(ours)
                found.append(Finding(part, "warning" if wrong else "ok", f"{text}; {wrong or told}"))
            else:
                found.append(Finding(part, "warning", text))
    return found


def _predictions(ours: dict[str, Any]) -> tuple[str, str | None]:
    """What a front end says of its predictions, and why it makes none where it should."""
    name, told = ours.get("predictor"), ours.get("predictions")
    if name is None or not isinstance(told, dict):
        return "it does not say whether its predictor runs", None
    numbers = {
        readable(outcome, 40): float(num)
        for outcome, num in list(told.items())[:20]
        if type(num) in (int, float) and 0 <= num < 1e18
    }
    made = numbers.get("made", 0.0)
    text = f"predictor {readable(name)}, {made:.0f} predictions made, {sum(numbers.values()) - made:.0f} not"
    if name == NO_PREDICTOR:
        return text, None
    wrong = no_predictions(ours.get("predicts") is not False, numbers, "sglang")
    return text, f"{text}; {wrong}" if wrong else None
