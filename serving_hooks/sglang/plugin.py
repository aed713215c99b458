"""What SGLang calls in each of its processes, through the entry point `sglang.srt.plugins`.

Registers our hooks, which do nothing until `--schedule-policy` names a policy of ours.
"""

from __future__ import annotations

import logging

from mope.serving_hooks.sglang import compat

_IDLE_PROCESSES = ("sglang::detokenizer", "sglang::data_parallel_controller")  # where no target of ours runs

logger = logging.getLogger("mope")


def register() -> None:
    """Registers the hooks if every one that is needed fits this SGLang, and none if not.

    Then `--schedule-policy equinox` is a name that SGLang does not know, and it refuses to start.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if _process_title().startswith(_IDLE_PROCESSES):
        return
    from mope.serving_hooks.sglang.hooks import HOOKS, as_here, in_words, mismatch

    here = [as_here(hook) for hook in HOOKS]
    wrong = {hook.target: found for hook in here if (found := mismatch(hook)) is not None}
    missing = [wrong[hook.target] for hook in here if hook.required and hook.target in wrong]
    release = compat.installed()
    if missing:
        logger.error(
            "mope does not fit this SGLang (%s, %s) and registers nothing, so its policies cannot be chosen: %s",
            release,
            compat.standing(release),
            "; ".join(in_words(missing)),
        )
        return
    for hook in here:
        if hook.target in wrong:
            logger.info("mope goes without %s: %s", hook.purpose, wrong[hook.target])  # told where it is turned on
        else:
            HookRegistry.register(hook.target, hook.call, HookType[hook.kind])


def _process_title() -> str:
    try:
        import setproctitle
    except ImportError:
        return ""
    return str(setproctitle.getproctitle())
