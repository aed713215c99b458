"""Recipes: a config as a YAML file, built-in by name or the user's own, changed by flags.

Knows YAML and which value comes from where; does not know what the values do.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mope.errors import ConfigError
from mope.extras import require
from mope.field_map import FIELD_MAP
from mope.flags import flag_name, validated
from mope.training.config import RECIPES, EvaluationConfig, FitConfig, ModelConfig, TrainConfig
from mope.training.data.config import DataConfig

SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "test_data": DataConfig,
    "model": ModelConfig,
    "fit": FitConfig,
    "evaluation": EvaluationConfig,
}
# what belongs to one source; everything else `test_data` takes over from `data`
OF_ONE_SOURCE = {
    "source", "data_format", "hub_config", "hub_split", "hub_revision", "languages", "response_cap", "target_llm",
    "max_rows", "max_rows_per_prompt", "min_rows", *FIELD_MAP,
}  # fmt: skip
FLAGS_BY_SECTION = {"data": {"source": "DATA"}, "test_data": {"source": "--test-source"}}


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_summary(name: str) -> str:
    """The comment that a built-in recipe opens with, as one text."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = lines[: next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.lstrip("# ") for line in comment)


def load_recipe(name_or_path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A config from a recipe and what is to differ from it.

    `test_data` and each of `also` take from `data` whatever is not bound to one source, such as the tokenizer and the
    turns.

    Args:
        name_or_path: a built-in recipe, a YAML file, or None for the defaults.
        overrides: section -> field -> value, as flags give them; `{"test_data": {"source": None}}` takes a
            recipe's `test_data` away, and `{"also": [{"source": ...}, ...]}` replaces its further data sets.

    Raises:
        ConfigError: no such recipe, a key that is not known or a value that can't be used; one line that names it.
    """
    changes = {section: dict(fields) for section, fields in (overrides or {}).items() if section != "also"}
    origin, recipe, also = _read(name_or_path) if name_or_path is not None else ("recipe", {}, [])
    values: dict[str, Any] = {name: {**recipe.get(name, {}), **changes.get(name, {})} for name in SECTIONS}
    if "test_data" in changes:
        values["test_data"] = changes["test_data"]
    shared = {key: value for key, value in values["data"].items() if key not in OF_ONE_SOURCE}
    values["also"] = [{**shared, **fields} for fields in (overrides or {}).get("also", also)]
    if values["test_data"].get("source"):
        values["test_data"] = {**shared, **values["test_data"]}
    else:
        del values["test_data"]

    def name_of(place: tuple[int | str, ...]) -> str:
        if place and place[0] == "also":
            return f"{origin}: also.{'.'.join(map(str, place[2:]))}".rstrip(".")
        section, field = (*map(str, place), "")[:2]
        if field in changes.get(section, {}) or not recipe:
            return FLAGS_BY_SECTION.get(section, {}).get(field) or flag_name(field)
        return f"{origin}: {section}.{field}".rstrip(".")

    config = validated(TrainConfig, values, name_of)
    others = [("also", data) for data in config.also] + [("test_data", data) for data in [config.test_data] if data]
    for section, data in others:
        if data.label_tokenizer != config.data.label_tokenizer:
            raise ConfigError(
                f"data counts tokens with {config.data.label_tokenizer!r}, {section} with {data.label_tokenizer!r}: "
                f"lengths can't be compared; leave label_tokenizer out of {section}"
            )
    return config


def dump(config: TrainConfig) -> str:
    """A config as YAML that `load_recipe` reads back; the same bytes for the same config."""
    yaml = _yaml()
    text: str = yaml.safe_dump(config.model_dump(mode="json", exclude_none=False), sort_keys=False, allow_unicode=True)
    return text


def _read(name_or_path: str | Path) -> tuple[str, dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """What to call a recipe in messages, its sections, and its further data sets."""
    path = Path(name_or_path).expanduser()
    if str(name_or_path) in recipe_names():
        path = RECIPES / f"{name_or_path}.yaml"
    elif not path.is_file():
        raise ConfigError(
            f"no recipe {str(name_or_path)!r}{nearest(str(name_or_path), recipe_names())}; built in are "
            f"{', '.join(recipe_names())}, or give a YAML file"
        )
    origin, yaml = f"recipe {name_or_path}", _yaml()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} holds {_kind(content)}; expected sections: {', '.join(SECTIONS)}")
    also = content.pop("also", None) or []
    if not isinstance(also, list) or not all(isinstance(fields, dict) for fields in also):
        raise ConfigError(f"{origin}: also holds {_kind(also)}; expected a list of sections such as '- source: name'")
    for fields in also:
        for field in fields:
            _check_known(f"{origin}: also", field, DataConfig.model_fields, "key")
    for section, fields in content.items():
        _check_known(origin, section, SECTIONS, "section")
        if fields is not None and not isinstance(fields, dict):
            raise ConfigError(f"{origin}: {section} holds {_kind(fields)}; expected lines such as 'name: value'")
        for field in fields or ():
            _check_known(f"{origin}: {section}", field, SECTIONS[section].model_fields, "key")
    return origin, {section: fields or {} for section, fields in content.items()}, also


def _yaml() -> Any:
    return require("yaml", "a recipe")


def _check_known(where: str, key: Any, known: Collection[str], what: str) -> None:
    if key not in known:
        hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
        raise ConfigError(f"{where} has an unknown {what} {str(key)!r}{hint}")


def nearest(word: str, known: Collection[str]) -> str:
    """A hint at the known word that another one resembles, in brackets; empty if there is none."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _kind(content: Any) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"
