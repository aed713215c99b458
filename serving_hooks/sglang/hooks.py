"""Where this hook takes hold of SGLang, as data: each target with the parameters that it relies on.

SGLang's plugin door is official; the functions behind it are not. So nothing is hooked before every target was looked
at, and nothing at all if one that is needed is not as expected.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from mope.serving_hooks.sglang import admission, front, policy, settings


class Hook(NamedTuple):
    """One hook.

    Attributes:
        target: dotted name of SGLang's function.
        kind: when ours is called: around, before or after it.
        call: ours.
        parameters: the first ones of the target after `self`, by name and in this order.
        required: whether nothing can be done without it.
        purpose: what is lost without it.
        formerly: the target's name in older releases, with the same parameters.
    """

    target: str
    kind: Literal["AROUND", "BEFORE", "AFTER"]
    call: Callable[..., Any]
    parameters: tuple[str, ...]
    required: bool
    purpose: str
    formerly: str = ""


_NOT_FOUND = " cannot be found "
_SRT = "sglang.srt."
_SCHEDULER, _POLICY = f"{_SRT}managers.scheduler.Scheduler.", f"{_SRT}managers.schedule_policy."
_FRONT = f"{_SRT}managers.tokenizer_manager.TokenizerManager."
_BATCH, _SERVER_ARGS = f"{_SRT}managers.schedule_batch.ScheduleBatch.", f"{_SRT}server_args.ServerArgs."

HOOKS = (
    Hook(f"{_SERVER_ARGS}add_cli_args", "AFTER", settings.add_arguments, ("parser",), True, "names of policies"),
    Hook(
        f"{_POLICY}SchedulePolicy._validate_and_adjust_policy",
        "AROUND",
        policy.validate_policy,
        ("policy", "tree_cache"),
        True,
        "names of policies",
    ),
    Hook(f"{_SCHEDULER}init_schedule_policy", "AFTER", policy.begin, (), True, "the start"),
    Hook(
        f"{_POLICY}SchedulePolicy.calc_priority", "AROUND", policy.calc_priority, ("waiting_queue",), True, "the order"
    ),
    Hook(f"{_SCHEDULER}_add_request_to_queue", "AFTER", policy.request_queued, ("req",), True, "arrivals"),
    Hook(f"{_POLICY}PrefillAdder.add_one_req", "AROUND", admission.add_one_req, ("req",), True, "admissions"),
    Hook(f"{_SCHEDULER}process_batch_result", "AFTER", policy.results_processed, ("batch", "result"), True, "charges"),
    Hook(f"{_BATCH}retract_decode", "AFTER", policy.decode_retracted, (), True, "requests that retraction gives up"),
    Hook(
        f"{_POLICY}PrefillAdder._get_running_request_total_token_offset",
        "AROUND",
        admission.running_offset,
        ("req",),
        True,
        "predicted_admission",
    ),
    Hook(
        f"{_SCHEDULER}can_schedule_lora_req",
        "AROUND",
        policy.can_schedule_lora_req,
        ("req", "running_loras"),
        False,
        "turns of LoRA adapters",
        f"{_SCHEDULER}_can_schedule_lora_req",
    ),
    Hook(f"{_BATCH}_get_decode_retraction_order", "AROUND", admission.retraction_order, ("reqs",), False, "victims"),
    Hook(f"{_FRONT}__init__", "AFTER", front.begin, ("server_args",), True, "clients and predictions"),
    Hook(f"{_FRONT}generate_request", "AROUND", front.generate_request, ("obj", "request"), True, "clients"),
    Hook(f"{_SCHEDULER}get_internal_state", "AFTER", policy.internal_state, ("recv_req",), False, "/server_info"),
    Hook(f"{_FRONT}get_internal_state", "AROUND", front.internal_states, (), False, "predictions in /server_info"),
)


def as_here(hook: Hook) -> Hook:
    """The same hook, with the former name of its target where only that is here. Imports the target's module."""
    if not hook.formerly or mismatch(hook) is None:
        return hook
    former = hook._replace(target=hook.formerly)
    return former if mismatch(former) is None else hook


def mismatch(hook: Hook) -> str | None:
    """What is not as a hook expects; None if all is. Imports the target's module."""
    try:
        function = pkgutil.resolve_name(hook.target)
        found = [name for name in inspect.signature(inspect.unwrap(function)).parameters if name != "self"]
    except Exception as error:  # whatever importing an engine may raise
        return f"{hook.target}{_NOT_FOUND}({type(error).__name__}: {error})"
    if tuple(found[: len(hook.parameters)]) != hook.parameters:
        return f"{hook.target} takes ({', '.join(found)}), expected ({', '.join((*hook.parameters, '...'))})"
    return None


def in_words(wrong: Iterable[str]) -> list[str]:
    """What `mismatch` said of several hooks, what many have in common said once: an SGLang that cannot be imported."""
    told = list(wrong)
    reasons = [found.partition(_NOT_FOUND)[2] for found in told]
    many = {reason: reasons.count(reason) for reason in reasons if reason and reasons.count(reason) > 2}
    rest = [found for found, reason in zip(told, reasons, strict=True) if reason not in many]
    return [f"{number} functions cannot be found {reason}" for reason, number in many.items()] + rest


def applied() -> list[Hook]:
    """Hooks that SGLang has really applied in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    done: set[str] = HookRegistry._patched
    return [hook for hook in HOOKS if hook.target in done or hook.formerly in done]
