"""How an operator's options reach the hook: SGLang has no field for them, so they travel in the environment.

`--mope-config` takes JSON or the name of a JSON file and puts it into `MOPE_OPTIONS`, which every process that the
server starts inherits.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mope.errors import ConfigError
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang import compat

VARIABLE = "MOPE_OPTIONS"
FLAG = "--mope-config"


def read_options(policy: str) -> HookOptions:
    """Options from the environment, for the policy that `--schedule-policy` names.

    Raises:
        ConfigError: no JSON, an unknown option, a value that cannot be used, or another policy.
    """
    options = parse(os.environ.get(VARIABLE, ""), VARIABLE)
    if "policy" in options.model_fields_set and options.policy != policy:
        raise ConfigError(
            f"{FLAG} (or {VARIABLE}) says policy {options.policy!r} and --schedule-policy {policy!r}: "
            "leave `policy` out of the options"
        )
    return HookOptions.read({**options.model_dump(exclude_unset=True), "policy": policy}, VARIABLE)


def parse(text: str, where: str) -> HookOptions:
    """Options from JSON, or from the file that it names; all defaults of an empty text.

    Raises:
        ConfigError: it cannot be read, or holds what cannot be used.
    """
    if not text.strip():
        return HookOptions()
    source = where
    if not text.lstrip().startswith("{"):
        name = text.strip()
        source = f"{where}, file {name[:80]}"
        try:
            text = Path(name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: no JSON in UTF-8 ({error.reason} at byte {error.start})") from error
        except (OSError, ValueError) as error:  # a ValueError: a name with a null byte
            raise ConfigError(
                f'{where}: {name[:80]!r} is neither JSON, such as \'{{"identity": "header"}}\', nor a file '
                f"that can be read ({getattr(error, 'strerror', None) or error})"
            ) from error
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f'{source}: no JSON ({error}); expected an object of options, such as {{"identity": "header"}}'
        ) from error
    if not isinstance(given, dict):
        raise ConfigError(f"{source}: a JSON {type(given).__name__}; expected an object of options")
    if set(given) == {"mope"}:
        raise ConfigError(
            f'{source}: got the key "mope", which vLLM\'s --additional-config needs; expected the object inside it'
        )
    return HookOptions.read(given, where)


class _Keep(argparse.Action):
    """Looks at the options at once, and hands them to all processes that the server starts."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            options = parse(str(values), FLAG)
        except ConfigError as error:
            parser.error(str(error))
        os.environ[VARIABLE] = options.model_dump_json(exclude_unset=True)


def add_arguments(result: Any, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
    """After `ServerArgs.add_cli_args`: our policies' names, and the flag for options."""
    for action in parser._actions:
        if "--schedule-policy" in action.option_strings and action.choices is not None:
            action.choices = [*action.choices, *(name for name in compat.POLICIES if name not in action.choices)]
    if FLAG not in parser._option_string_actions:
        parser.add_argument(
            FLAG,
            action=_Keep,
            default=argparse.SUPPRESS,
            metavar="JSON",
            help=f"options of mope, which --schedule-policy {'|'.join(compat.POLICIES)} turns on: JSON or a JSON file",
        )
