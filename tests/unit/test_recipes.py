"""Recipes: the built-in ones load and train, flags change them, mistakes are named, and what is dumped loads again."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mope.errors import ConfigError
from mope.training.cli import main
from mope.training.config import RECIPES
from mope.training.recipe import OF_ONE_SOURCE, SECTIONS, dump, load_recipe, recipe_names, recipe_summary

NUM_CHATS = 1000


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_recipes_that_are_promised_are_there() -> None:
    assert recipe_names() == [
        "chat-base", "chat-e5", "chat-micro", "chat-minilm", "chat-small", "demo", "lmsys-base", "lmsys-small",
        "sharegpt-base", "sharegpt-micro", "sharegpt-minilm", "sharegpt-small",
    ]  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_opens_with_what_it_is_and_what_it_needs(name: str) -> None:
    summary = recipe_summary(name)
    assert len(summary.split()) > 20
    assert "#" not in summary
    assert "CPU" in summary or "GPU" in summary


@pytest.mark.parametrize("name", recipe_names())
def test_a_dumped_recipe_loads_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    text = dump(config)
    again = load_recipe(write(tmp_path / "again.yaml", text))
    assert again == config
    assert dump(again) == text


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_spells_out_only_known_values_and_no_path_of_one_machine(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert "cache_dir" not in text
    assert "num_workers" not in text


def test_the_paper_s_set_up() -> None:
    config = load_recipe("lmsys-base")
    assert config.data.source == "lmsys/lmsys-chat-1m"
    assert config.data.turns == "first"
    assert config.model.encoder == "bert-base-uncased"
    assert (config.model.design, config.model.num_experts, config.model.combination) == ("separate", 3, "top1")
    assert (*config.model.boundary_quantiles, config.model.tail_quantile) == (0.33, 0.66, 0.99)
    assert config.test_data is not None
    assert config.test_data.source == "sharegpt"


def test_flags_go_over_the_recipe_and_leave_the_rest() -> None:
    recipe = load_recipe("demo")
    changed = load_recipe("demo", {"fit": {"epochs": "2.5"}, "model": {"boundaries": ("53", "210")}})
    assert changed.fit.epochs == 2.5
    assert changed.model.boundaries == (53.0, 210.0)
    assert changed.fit.max_train_rows == recipe.fit.max_train_rows
    assert changed.data == recipe.data


def test_without_a_recipe_the_defaults_hold() -> None:
    config = load_recipe(None, {"data": {"source": "chats.jsonl"}})
    assert config.data.source == "chats.jsonl"
    assert config.test_data is None
    assert config.model == type(config.model)()


def test_test_data_takes_over_what_is_not_bound_to_a_source() -> None:
    shared = {"turns": "first", "label_tokenizer": "o200k_base", "min_response_tokens": 3}
    of_source = {
        "data_format": "lmsys",
        "hub_split": "train",
        "target_llm": "x",
        "max_rows": 70,
        "languages": ("English",),
    }
    config = load_recipe(
        None, {"data": {"source": "a.jsonl", **shared, **of_source}, "test_data": {"source": "b.jsonl"}}
    )
    assert config.test_data is not None
    for name, value in shared.items():
        assert getattr(config.test_data, name) == value
    fresh = load_recipe(None, {"data": {"source": "b.jsonl"}}).data
    for name in OF_ONE_SOURCE:
        assert getattr(config.test_data, name) == getattr(fresh, name)


def test_the_tokenizer_of_a_flag_reaches_a_recipe_s_test_data() -> None:
    config = load_recipe("lmsys-base", {"data": {"label_tokenizer": "o200k_base"}})
    assert config.test_data is not None
    assert config.test_data.label_tokenizer == "o200k_base"


def test_further_data_take_over_what_is_not_bound_to_a_source(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.yaml",
        "data: {source: a.jsonl, turns: first, target_llm: x}\n"
        "also:\n- {source: b.jsonl, max_rows: 7}\n- source: c.jsonl\n",
    )
    config = load_recipe(path, {"data": {"redacted": "drop"}})
    assert [data.source for data in config.also] == ["b.jsonl", "c.jsonl"]
    assert [data.max_rows for data in config.also] == [7, None]
    assert {(data.turns, data.redacted, data.target_llm) for data in config.also} == {("first", "drop", None)}
    assert [data.source for data in load_recipe(path, {"also": [{"source": "d.jsonl"}]}).also] == ["d.jsonl"]
    assert load_recipe(path, {"also": []}).also == ()
    assert load_recipe(write(tmp_path / "again.yaml", dump(config))) == config


def test_a_recipe_s_test_data_can_be_replaced_and_taken_away() -> None:
    replaced = load_recipe("lmsys-base", {"test_data": {"source": "mine.jsonl"}}).test_data
    assert replaced is not None
    assert replaced.source == "mine.jsonl"
    assert load_recipe("lmsys-base", {"test_data": {"source": None}}).test_data is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds nothing; expected sections: data, test_data, model, fit, evaluation"),
        ("- a\n", "holds a list; expected sections"),
        ("data: [\n", "is not YAML: "),
        ("data: sharegpt\n", "data holds a str; expected lines such as 'name: value'"),
        ("fitt: {}\n", "has an unknown section 'fitt' (did you mean 'fit'?)"),
        ("fit:\n  lerning_rate: 1\n", "fit has an unknown key 'lerning_rate' (did you mean 'learning_rate'?)"),
        ("fit:\n  zzz: 1\n", "fit has an unknown key 'zzz'; known are max_train_rows, epochs"),
        ("fit:\n  epochs: 1\n", "data.source is missing"),
        ("data:\n  source: x\nfit:\n  epochs: many\n", "fit.epochs: got 'many'; expected a valid number"),
        ("data:\n  source: x\n  languages: [no]\n", "data.languages: got False; expected a valid string"),
        (
            "data:\n  source: x\nmodel:\n  num_experts: 9\n",
            "model.num_experts: got 9; expected less than or equal to 8",
        ),
        ("data: {source: x}\nalso: y\n", "also holds a str; expected a list of sections such as '- source: name'"),
        ("data: {source: x}\nalso:\n- sauce: y\n", "also has an unknown key 'sauce' (did you mean 'source'?)"),
        ("data: {source: x}\nalso:\n- max_rows: 3\n", "also.source is missing"),
        (
            "data: {source: x}\nalso:\n- {source: y, label_tokenizer: o200k_base}\n",
            "data counts tokens with 'cl100k_base', also with 'o200k_base'",
        ),
        (
            "data:\n  source: x\ntest_data:\n  source: y\n  label_tokenizer: o200k_base\n",
            "data counts tokens with 'cl100k_base', test_data with 'o200k_base'",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_that_names_it(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(write(tmp_path / "mine.yaml", text))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_flag_names_the_flag_not_the_recipe() -> None:
    with pytest.raises(ConfigError, match=r"^--epochs: got '-1'; expected greater than 0$"):
        load_recipe("demo", {"fit": {"epochs": "-1"}})


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "data: {source: x}\nfit: {learning_rate: 5e-5}\n")
    assert load_recipe(path).fit.learning_rate == 5e-5


def test_an_unknown_recipe_lists_those_that_are_known() -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe("sharegpt-smal")
    assert "did you mean 'sharegpt-small'?" in str(error.value)
    assert ", ".join(recipe_names()) in str(error.value)


def test_an_empty_section_is_the_defaults(tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path / "mine.yaml", "data: {source: x}\nfit:\n"))
    assert config.fit == SECTIONS["fit"]()


def lmsys_chat(number: int, prompt: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {
        "conversation_id": f"{number:032x}",
        "model": ("vicuna-13b", "gpt-4")[number % 2],
        "conversation": turns,
        "turn": 1,
        "language": "English",
        "openai_moderation": [{"categories": {"hate": False}, "category_scores": {"hate": 0.0}, "flagged": False}] * 2,
        "redacted": number % 7 == 0,
    }


def sharegpt_chat(number: int, prompt: str, answer: str) -> dict[str, Any]:
    return {
        "id": f"{number:07x}_0",
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}],
    }


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Generated conversations in the form of the recipes' data: the first word says how long the answer is."""
    folder = tmp_path_factory.mktemp("chats")
    draw = random.Random(0)
    rows = []
    for number in range(NUM_CHATS):
        kind = draw.choice(["name", "explain", "write"])
        words = draw.randint(1, 9) * {"name": 1, "explain": 10, "write": 60}[kind]
        subject = "".join(draw.choices("abcdefghij", k=8))
        rows.append((number, f"{kind} {subject} {number}", f"{subject} " * words))
    return {
        "lmsys": write(folder / "lmsys.jsonl", "".join(json.dumps(lmsys_chat(*row)) + "\n" for row in rows)),
        "sharegpt": write(folder / "sharegpt.json", json.dumps([sharegpt_chat(*row) for row in rows])),
    }


Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(chats: dict[str, str], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trains a recipe, once, after those that teach it; gives its folder."""

    @functools.cache
    def train(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        assert main(flags(name, chats, tiny_encoder, folder, train)) == 0
        return folder / "out"

    return train


def flags(name: str, chats: dict[str, str], encoder: Path, folder: Path, trained: Trained) -> list[str]:
    """Arguments that make a recipe small enough for a test."""
    model = load_recipe(name).model
    taught = ["--teacher", str(trained(model.teacher))] if model.teacher else []
    if model.co_teachers:
        taught += ["--co-teachers", ",".join(str(trained(other)) for other in model.co_teachers)]
    return [
        chats["lmsys" if name.startswith("lmsys") else "sharegpt"], "--recipe", name, "--output", str(folder / "out"),
        *(["--encoder", str(encoder)] if model.encoder or not taught else []),
        *(["--vocab-size", "none"] if model.vocab_size else []),
        "--label-tokenizer", "encoder", "--cache-dir", str(folder / "cache"), "--epochs", "1",
        "--max-prompt-tokens", "24", "--max-context-tokens", "8", "--lookup-rows", "64", "--baselines", "constant",
        "--fine-tuned", "none", "--bootstrap-samples", "10", "--checks-per-epoch", "1", "--accelerator", "cpu",
        "--devices", "1", "--static-size", "8",
        *taught,
        *(["--test-source", chats["sharegpt"]] if name == "lmsys-base" else []),
        *(["--also", chats["lmsys"]] if name.startswith("chat") else []),
    ]  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains_on_rows_of_its_data_s_form(name: str, trained: Trained) -> None:
    recipe = load_recipe(name)
    folder = trained(name)
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["design"], saved["num_experts"]) == (recipe.model.design, recipe.model.num_experts)
    assert saved["preset"] == recipe.model.preset
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"mope", "mope_oracle_routed", "constant"} <= set(metrics["test"]["all_turns"])
    assert ("other_data" in metrics) == (name == "lmsys-base" or name.startswith("chat"))
