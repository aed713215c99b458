"""One field is one flag: what is typed reaches the field, what is not typed changes nothing, mistakes are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from mope.config import Frozen
from mope.errors import ConfigError
from mope.flags import Parser, add_flags, flag_name, given, validated
from mope.training.cli import parser as train_parser
from mope.training.recipe import SECTIONS


class Oven(Frozen):
    """An oven: with things to bake.

    More.
    """

    heat: float = Field(2e-4, gt=0, description="heat in % of the most")
    trays: tuple[int, ...] = Field((1, 2), description="trays")
    kinds: tuple[Literal["bread", "cake"], ...] = Field((), description="kinds")
    mode: Literal["top", "bottom"] = Field("top", description="mode")
    fan: bool = Field(True, description="fan")
    timer_s: int | None = Field(None, description="timer")
    log: Path = Field(default_factory=Path.cwd, description="log")
    name: str = Field(description="name")


def typed(*arguments: str) -> dict[str, Any]:
    parser = Parser("oven", "Bakes.", "[options]", "oven --heat 3")
    add_flags(parser, "oven", Oven)
    return given(parser.parse_args(list(arguments))).get("oven", {})


def test_what_is_not_typed_is_not_there() -> None:
    assert typed() == {}


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--heat", "3e-5"], "heat", 3e-5),
        (["--trays", "53,210"], "trays", (53, 210)),
        (["--trays", " 53, 210 "], "trays", (53, 210)),
        (["--trays", "none"], "trays", ()),
        (["--trays", ""], "trays", ()),
        (["--kinds", "cake,bread"], "kinds", ("cake", "bread")),
        (["--mode", "bottom"], "mode", "bottom"),
        (["--fan"], "fan", True),
        (["--no-fan"], "fan", False),
        (["--timer-s", "7"], "timer_s", 7),
        (["--timer-s", "none"], "timer_s", None),
        (["--log", "some/log"], "log", Path("some/log")),
        (["--name", "none"], "name", "none"),
    ],
)
def test_what_is_typed_reaches_the_field(arguments: list[str], field: str, value: object) -> None:
    values = typed(*arguments)
    assert list(values) == [field]
    assert getattr(Oven.model_validate({"name": "x", **values}), field) == value


@examples(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5), st.floats(1e-300, 1e300))
def test_numbers_survive_the_command_line(trays: list[float], heat: float) -> None:
    class Numbers(BaseModel):
        trays: tuple[float, ...]
        heat: float

    parser = Parser("numbers", "", "", "")
    add_flags(parser, "n", Numbers)
    values = given(parser.parse_args([f"--trays={','.join(map(repr, trays))}", "--heat", repr(heat)]))["n"]
    assert Numbers.model_validate(values) == Numbers(trays=tuple(trays), heat=heat)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--heat", "hot"], "--heat: got 'hot'; expected a valid number"),
        (["--heat", "0"], "--heat: got '0'; expected greater than 0"),
        (["--trays", "1,x"], "--trays: got 'x'; expected a valid integer"),
        (["--kinds", "bread,pie"], "--kinds: got 'pie'; expected 'bread' or 'cake'"),
        (["--name", "oven"], ""),
    ],
)
def test_a_bad_value_is_named_by_its_flag(arguments: list[str], expected: str) -> None:
    values = {"name": "x", **typed(*arguments)}
    if not expected:
        assert validated(Oven, values, str).name == "oven"
        return
    with pytest.raises(ConfigError) as error:
        validated(Oven, values, lambda place: flag_name(str(place[0])))
    assert str(error.value) == expected


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--name is missing$"):
        validated(Oven, {}, lambda place: flag_name(str(place[0])))


@pytest.mark.parametrize("arguments", [["--mode", "side"], ["--hea", "3"], ["--heat"], ["extra"]])
def test_argparse_complains_in_one_line_that_names_the_help(arguments: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        typed(*arguments)
    assert str(error.value).endswith("(see oven --help)")
    assert "\n" not in str(error.value)


def test_help_shows_defaults_choices_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        typed("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: oven [options] Bakes.")
    for part in (
        "An oven: with things to bake: --heat X heat in % of the most (default: 0.0002)",
        "--trays N,... trays (default: 1,2)",
        "--kinds bread,cake kinds (default: none)",
        "--mode {top,bottom} mode (default: top)",
        "--fan, --no-fan fan (default: yes)",
        "--timer-s N timer (default: none)",
        "--log PATH log --name TEXT name",
        "example: oven --heat 3",
    ):
        assert part in text


def test_every_field_of_a_training_run_has_one_flag_and_a_help_text() -> None:
    fields = [
        (section, name) for section, model in SECTIONS.items() if section != "test_data" for name in model.model_fields
    ]
    assert len({name for _, name in fields}) == len(fields), "two sections have a field of the same name"
    actions = {action.dest: action for action in train_parser("mope-train")._actions}
    for section, name in fields:
        if (section, name) == ("data", "source"):  # typed without a flag
            continue
        action = actions[f"{section}.{name}"]
        assert flag_name(name) in action.option_strings
        assert action.help
