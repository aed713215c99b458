"""What a request asks for, read from JSON as people have it: the Python API, HTTP bodies and logs alike.

One table says under which names OpenAI, Anthropic, Google, Ollama, vLLM, SGLang and Hugging Face's servers take what a
`Request` holds. To read a further name, add it there: training, serving and Python then read it the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from mope.effort import HIGHEST, LEVELS
from mope.errors import DataError
from mope.request import ROLES, content_of, role_of
from mope.target_llm import MAX_SIZE, describe
from mope.tool_use import choice_of, json_chars, listed_tools

MAX_TOKENS, MAX_TEMPERATURE, MAX_YEAR = 2**31 - 1, 100, 9999
MAX_NAME_CHARS = 64  # of the name of a response format

# objects inside a body that take flags of the request, in the order in which they are looked through
HOLDERS = (
    "chat_template_kwargs", "extra_body", "sampling_params", "parameters", "options", "generationConfig",
    "generation_config", "custom_params", "nvext",
)  # fmt: skip


class Field(NamedTuple):
    """Where a flag stands, and what is made of it.

    Attributes:
        names: under which it is known, the first that says something counts; `a.b` is `b` inside of `a`.
        read: from the value to what `Request` has. None: it says nothing. Raises ValueError for what cannot be read.
        expected: what can be read, to complete "... is".
    """

    names: tuple[str, ...]
    read: Callable[[Any], Any]
    expected: str


def parsed(value: Any) -> Any:
    """Nested values that a CSV file or a parquet column holds as JSON text."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def number(value: Any) -> float | None:
    """A finite number, also one that is written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def true_or_false(value: Any) -> bool | None:
    """A truth value, also one that is written as a number or a word; None for anything else."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, int | float | str):
        return None
    word = str(value).lower()
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return known.get(word)


def _name(value: Any) -> str | None:
    """A text that can be written down as UTF-8, as the names of LLMs are when what was learned is saved."""
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError
    return value.replace("\0", "") or None


def _tokens(value: Any) -> int | None:
    found = number(value)
    if found is None or not found.is_integer() or not (found < 0 or 1 <= found <= MAX_TOKENS):
        raise ValueError
    return int(found) if found > 0 else None  # -1 means no cap to many servers


def _budget(value: Any) -> int | None:
    """As a cap; 0 says that the LLM is not to think, see `_off_at_zero`."""
    return None if number(value) == 0 else _tokens(value)


def _off_at_zero(value: Any) -> bool | None:
    return False if number(value) == 0 else None


def _temperature(value: Any) -> float:
    found = number(value)
    if found is None or not 0 <= found <= MAX_TEMPERATURE:
        raise ValueError
    return found


def _size(value: Any) -> float | None:
    """Billions of parameters, also as text such as `70B` or `8x7b`."""
    if value == "":
        return None
    found = number(value)
    if found is None and isinstance(value, str):
        found = describe(value).size
    if found is None or not 0 < found <= MAX_SIZE:
        raise ValueError
    return found


def _year(value: Any) -> int:
    found = number(value)
    if found is None or not found.is_integer() or not 1 <= found <= MAX_YEAR:
        raise ValueError
    return int(found)


def _truth(value: Any) -> bool:
    found = true_or_false(value)
    if found is None:
        raise ValueError
    return found


def _tools(value: Any) -> bool | None:
    value = parsed(value)
    if isinstance(value, list | tuple | Mapping):
        return len(value) > 0 or None
    if value == "":
        return None
    return _truth(value)


def _num_listed(value: Any) -> int | None:
    value = parsed(value)
    return len(listed_tools(value)) or None if isinstance(value, list | tuple | Mapping) else None


def _listed_chars(value: Any) -> int | None:
    value = parsed(value)
    return json_chars(listed_tools(value)) or None if isinstance(value, list | tuple | Mapping) else None


def _count(value: Any) -> int:
    found = number(value)
    if found is None or not found.is_integer() or not 0 <= found <= MAX_TOKENS:
        raise ValueError
    return int(found)


def _tool_choice(value: Any) -> str | None:
    return choice_of(parsed(value)) or None


def _format(value: Any) -> str | None:
    """The name of a format: what OpenAI writes as `{"type": name}`, or the name itself; None for free text."""
    value = parsed(value)
    name = value.get("type", "") if isinstance(value, Mapping) else value
    if not isinstance(name, str):
        raise ValueError
    return None if name in ("", "text") else name[:MAX_NAME_CHARS]


def _named(name: str) -> Callable[[Any], str | None]:
    """For a field that is there only if the answer is constrained in one way."""
    return lambda value: name if value not in (None, "", False) and parsed(value) not in ([], {}) else None


def _schema(value: Any) -> str | None:
    """Ollama's `format`: `"json"`, or a schema; other servers mean other things by it."""
    value = parsed(value)
    return "json_object" if value == "json" else "json_schema" if isinstance(value, Mapping) and value else None


def _mime(value: Any) -> str | None:
    return "json_object" if value == "application/json" else None


_MODES = {"enabled": True, "adaptive": True, "disabled": False}


def _thinking(value: Any) -> bool | None:
    value = parsed(value)
    if isinstance(value, Mapping):  # Anthropic's {"type": "enabled", "budget_tokens": 1024}
        value = value.get("type", value.get("enabled"))
    if isinstance(value, str) and value.lower() in _MODES:
        return _MODES[value.lower()]
    return None if value is None else _truth(value)


def _effort(value: Any) -> float | None:
    """A level by its name, or as a number from 0 to `HIGHEST`."""
    if isinstance(value, str) and value.lower() in LEVELS:
        return LEVELS[value.lower()]
    found = number(value)
    if found is None or not 0 <= found <= HIGHEST:
        raise ValueError
    return found


def _has_effort(value: Any) -> bool | None:
    """Whether the LLM is to think at all; also for levels that are not known here."""
    try:
        found = _effort(value)
    except ValueError:
        if not isinstance(value, str):
            raise
        return True
    return None if found is None else found > 0


def _think(value: Any) -> bool | None:
    """Ollama's `think`: true or false, or a level."""
    return True if value in ("low", "medium", "high") else _thinking(value)


def _think_level(value: Any) -> float | None:
    return LEVELS[value] if value in ("low", "medium", "high") else None


_COUNT = f"a whole number from 1 to {MAX_TOKENS}"
_BUDGET_NAMES = (
    "thinking_budget", "thinking_token_budget", "max_thinking_tokens", "thinking.budget_tokens", "reasoning.max_tokens",
    "thinkingConfig.thinkingBudget", "thinking_config.thinking_budget", "google.thinking_config.thinking_budget",
)  # fmt: skip
_EFFORT_NAMES = (
    "effort", "reasoning_effort", "reasoning.effort", "output_config.effort", "thinking.effort",
    "thinkingConfig.thinkingLevel", "thinking_config.thinking_level", "google.thinking_config.thinking_level",
)  # fmt: skip
_TOOL_NAMES = ("tools", "functions")
_LEVEL = f'a level such as "high", or a number from 0 to {HIGHEST:g}'

CHOICES = (
    "tool_choice", "function_call", "toolConfig.functionCallingConfig.mode",
    "tool_config.function_calling_config.mode",
)  # fmt: skip

# flag of `Request` -> where it stands; of several fields, the first that says something counts
FIELDS: Mapping[str, tuple[Field, ...]] = {
    "target_llm": (Field(("target_llm", "model", "modelId"), _name, "the name of an LLM"),),
    "max_tokens": (
        Field(
            ("max_completion_tokens", "max_output_tokens", "max_tokens", "max_new_tokens", "maxOutputTokens",
             "max_tokens_to_sample", "num_predict", "n_predict"),
            _tokens,
            _COUNT,
        ),
    ),
    "temperature": (Field(("temperature",), _temperature, f"a number from 0 to {MAX_TEMPERATURE}"),),
    "tools": (Field(_TOOL_NAMES, _tools, "a list of tools, or true or false"),),
    "num_tools": (
        Field(("num_tools",), _count, f"a whole number from 0 to {MAX_TOKENS}"),
        Field(_TOOL_NAMES, _num_listed, "a list of tools"),
    ),
    "tool_chars": (
        Field(("tool_chars",), _count, f"a whole number from 0 to {MAX_TOKENS}"),
        Field(_TOOL_NAMES, _listed_chars, "a list of tools"),
    ),
    "tool_choice": (Field(CHOICES, _tool_choice, "auto, required, none or the name of a tool"),),
    "response_format": (
        Field(("response_format", "text.format"), _format, 'a name such as "json_object"'),
        *(
            Field(names, _named(name), "a constraint on the answer")
            for name, names in {
                "json_schema": ("structured_outputs.json", "guided_json", "json_schema"),
                "json_object": ("structured_outputs.json_object",),
                "regex": ("structured_outputs.regex", "guided_regex", "regex"),
                "choice": ("structured_outputs.choice", "guided_choice"),
                "grammar": ("structured_outputs.grammar", "guided_grammar", "ebnf"),
            }.items()
        ),
        Field(("format",), _schema, '"json" or a schema'),
        Field(("responseMimeType", "response_mime_type"), _mime, "a MIME type"),
    ),
    "thinking": (
        Field(("enable_thinking", "thinking", "reasoning.enabled"), _thinking, "true or false"),
        Field(_EFFORT_NAMES, _has_effort, _LEVEL),
        Field(("think",), _think, "true, false or a level"),
        Field(_BUDGET_NAMES, _off_at_zero, _COUNT),
    ),
    "thinking_budget": (Field(_BUDGET_NAMES, _budget, _COUNT),),
    "effort": (Field(_EFFORT_NAMES, _effort, _LEVEL), Field(("think",), _think_level, "true, false or a level")),
    "llm_family": (Field(("llm_family", "model_family"), _name, "the family of an LLM"),),
    "llm_size": (Field(("llm_size", "model_size"), _size, f"billions of parameters, up to {MAX_SIZE:g}"),),
    "llm_year": (Field(("llm_year", "model_year"), _year, "the year of its release"),),
    "llm_reasoning": (Field(("llm_reasoning", "model_reasoning"), _truth, "true or false"),),
}  # fmt: skip
SYSTEM = ("system", "instructions", "system_prompt")  # beside the messages
TEXTS = ("prompt", "messages", "input", "text", "inputs")
LEAST = ("min_tokens", "min_new_tokens")  # fewest tokens of an answer, as vLLM and SGLang have it
FORCING = ("ignore_eos", *LEAST)  # see `is_forced`
# names that a body may have at its top
_HOLDERS = frozenset(HOLDERS)
TOP_NAMES = frozenset(
    name.partition(".")[0] for fields in FIELDS.values() for field in fields for name in field.names
).union(HOLDERS, SYSTEM, FORCING)

# first part of a name -> what may stand there: the order of precedence, the flag, its field, the whole path
_AT: dict[str, list[tuple[int, str, Field, list[str]]]] = {}
for _flag, _field, _path in (
    (flag, field, name.split(".")) for flag, fields in FIELDS.items() for field in fields for name in field.names
):
    _AT.setdefault(_path[0], []).append((sum(map(len, _AT.values())), _flag, _field, _path))


def read_flags(body: Mapping[str, Any], *, strict: bool = False) -> dict[str, Any]:
    """The flags of a request, as `Request` has them. Some microseconds.

    Args:
        body: the JSON of a request, or a record of a log; nested values may be JSON text.
        strict: raise for what cannot be read instead of passing it over.

    Returns:
        Those flags of `FIELDS` that are said; what is absent is not known.

    Raises:
        DataError: strictly read, a value that cannot be used.
    """
    places = [body] if _HOLDERS.isdisjoint(body) else _places(body)
    candidates: list[tuple[int, int, str, Field, list[str]]] = []
    for number, place in enumerate(places):
        for key in place:
            if key in _AT:
                candidates += [(order, number, flag, field, path) for order, flag, field, path in _AT[key]]
    if len(candidates) > 1:
        candidates.sort(key=itemgetter(0, 1))
    found: dict[str, Any] = {}
    for _, number, flag, field, path in candidates:
        if flag in found:
            continue
        value = places[number][path[0]]
        if len(path) > 1:
            value = _below(value, path)
        if value is None:
            continue
        try:
            said = field.read(value)
        except ValueError:
            if strict:
                raise DataError(f"{'.'.join(path)} is {field.expected}; got {shown(value)}") from None
            continue
        if said is not None:
            found[flag] = said
    if "tools" in found or "num_tools" in found:
        _settle_tools(found)
    return found


def _settle_tools(found: dict[str, Any]) -> None:
    """Tools that are counted are offered; those that may not be called are not."""
    if not found.get("tools", found.get("num_tools")) or found.get("tool_choice") == "none":
        for flag in ("tools", "num_tools", "tool_chars"):
            found.pop(flag, None)
    else:
        found["tools"] = True


def _places(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The body, and the objects inside that take flags; `extra_body` is a body of its own."""
    places = [body]
    for name in HOLDERS:
        if name in body and isinstance(inner := parsed(body[name]), Mapping):
            places += _places(inner) if name == "extra_body" else [inner]
    return places


def _below(value: Any, path: Sequence[str]) -> Any:
    """What stands at a path, of whose first part the value is given."""
    for key in path[1:]:
        value = parsed(value)
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def is_forced(said: Mapping[str, Any], generated: float) -> bool:
    """Whether a client forced the length of an answer, so that the length says nothing about the LLM.

    It did with `ignore_eos`, and with a minimum above half of what was generated: an LLM that may not stop goes on.

    Args:
        said: the JSON of a request, or the sampling parameters of an engine.
        generated: tokens of the answer.
    """
    return any(
        true_or_false(place.get("ignore_eos")) or any(2 * (number(place.get(name)) or 0) > generated for name in LEAST)
        for place in ([said] if _HOLDERS.isdisjoint(said) else _places(said))
    )


def read_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a request, the system prompt first: for `Request.from_messages`.

    It is `messages`, or `input` as the Responses API has it, or one text: `prompt`, `text` of SGLang, `inputs` of
    Hugging Face's servers. What is not a message of a known role is passed over, such as a tool's call among the items
    of the Responses API.

    Args:
        body: the JSON of a request; nested values may be JSON text.
    """
    before = next((said for name in SYSTEM if (said := parsed(body.get(name)))), None)
    found = [{"role": "system", "content": before}] if before else []
    for name in ("messages", "input", "prompt"):
        written = body.get(name)
        if written is None:
            continue
        listed = parsed(written) if name != "prompt" else written
        if isinstance(listed, list) and name == "prompt":
            listed = listed[0] if len(listed) == 1 and isinstance(listed[0], str) else None
        if isinstance(listed, str):
            return [*found, {"role": "user", "content": listed}] if name != "messages" else found
        for message in listed if isinstance(listed, list | tuple) else ():
            if isinstance(message, Mapping) and role_of(message) in ROLES:
                found.append({"role": role_of(message), "content": content_of(message)})
        return found
    for name in ("text", "inputs"):
        if isinstance(body.get(name), str):
            return [*found, {"role": "user", "content": body[name]}]
    return found


def shown(value: Any) -> str:
    """A value in an error message, on one line and not longer than that."""
    try:
        text = repr(value)
    except Exception as error:  # whatever a caller's class does
        text = f"{type(value).__name__} ({type(error).__name__} in its repr)"
    return text if len(text) <= 80 else f"{text[:77]}..."
