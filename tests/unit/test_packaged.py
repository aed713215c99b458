"""The predictors that come with the package: whole, small, offline, and honest about what they do not know."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mope import LengthPredictor, packaged
from mope.card import render_card
from mope.errors import ArtifactError, MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chat-micro", "chat-small")
MAX_MB = 40
PROMPTS = (
    "Thanks!", "What is the capital of France? Answer in one word.", "Translate 'good morning' to German.",
    "Explain TCP slow start.", "Write a detailed, step-by-step guide to learning German, with examples.",
)  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def predictor(request):
    return LengthPredictor.from_pretrained(request.param, backend="onnx")


def test_what_is_promised_is_there_and_small():
    assert tuple(packaged.names()) == NAMES
    files = [file for name in NAMES for file in packaged.PREDICTORS.joinpath(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_MB * 1e6
    assert {file.suffix for file in files} == {".json", ".md", ".onnx"}  # no weights for torch, no pickle, no plots


@pytest.mark.parametrize("name", NAMES)
def test_it_predicts_in_three_lines_offline_and_without_torch(name):
    code = (
        "import socket, sys\n"
        "socket.socket.connect = None\n"
        "from mope import LengthPredictor\n"
        f"predictor = LengthPredictor.from_pretrained({name!r}, backend='onnx')\n"
        "print(predictor.predict('Explain TCP slow start.', target_llm='gpt-4').median)\n"
        "assert 'torch' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert 50 < float(run.stdout) < 1500


@pytest.mark.parametrize("name", NAMES)
def test_its_card_and_record_are_kept_and_name_no_folder_of_one_machine(name):
    folder = packaged.PREDICTORS / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in (
        "## Limits, and who loses when it errs",
        "## Largest errors on test rows",
        "## Licence and provenance",
    ):
        assert part in card
    assert f'from_pretrained("{name}")' in card
    assert "Apache-2.0" in card
    assert "no licence is stated" in card  # of ShareGPT
    assert (ROOT / "model_cards" / f"{name}.md").read_text(encoding="utf-8") == card
    record = (folder / "provenance.json").read_text(encoding="utf-8")
    assert not re.search(r"\"/(home|root|tmp|work|Users)", record)
    assert json.loads(record)["config"]["model"]["preset"] == name.removeprefix("chat-")


@pytest.mark.parametrize("name", NAMES)
def test_its_card_says_how_it_is_used_and_lists_every_llm_that_it_knows(name):
    """As `mope.card` would say it now: who changes that renders the section of the committed cards anew."""
    folder = packaged.PREDICTORS / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found, expected = (
        re.search(r"^## Use$.*?(?=^## )", text, flags=re.MULTILINE | re.DOTALL).group()
        for text in (
            (folder / "README.md").read_text(encoding="utf-8"),
            render_card(config, {}, {}, [], name=name, tables=""),
        )
    )
    assert found == expected
    assert all(f"`{llm}`" in found for llm in config["target_llms"])


def test_longer_answers_are_expected_where_more_is_asked_for(predictor):
    medians = [predictor.predict(prompt, target_llm="gpt-4").median for prompt in PROMPTS]
    assert max(medians[:3]) < 0.6 * min(medians[3:])


@pytest.mark.parametrize("name", NAMES)
def test_a_request_is_predicted_the_same_alone_and_in_a_batch(name):
    predictor = LengthPredictor.from_pretrained(name, backend="onnx", cache_size=0)
    prompts = ["Hi", "Write an essay on Rome.", "write a story " * 40, "?", "In one word: is water wet?"]
    levels = (0.01, 0.1, 0.5, 0.9, 0.99)
    together = [prediction.quantiles(levels) for prediction in predictor.predict_batch(prompts)]
    alone = [predictor.predict(prompt).quantiles(levels) for prompt in prompts]
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_the_readme_counts_the_llms_that_it_knows(predictor):
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    counted = re.search(
        r"They know (\d+) names: (\d+) LLMs that have 50 training rows or more, and (\d+) families", readme
    )
    names, llms, families = map(int, counted.groups())
    assert len(predictor.config.target_llms) == names == llms + families


def test_it_knows_llms_that_say_more_than_others(predictor):
    def typical(llm):
        return np.exp(np.mean([np.log(predictor.predict(prompt, target_llm=llm).median) for prompt in PROMPTS[3:]]))

    assert typical("Yi-34B-Chat") > 1.1 * typical("gpt-4-0613")
    assert typical("Yi-34B-Chat") > 1.3 * typical("gpt-3.5-turbo-0301")
    assert predictor.encoder.llms.knows("openai/gpt-3.5-turbo-0301")
    assert not predictor.encoder.llms.knows("my-finetune")


def test_of_an_unknown_llm_it_says_that_it_does_not_know(predictor):
    for prompt in PROMPTS[3:]:
        known, unknown = (predictor.predict(prompt, target_llm=llm) for llm in ("gpt-4-0613", "my-finetune"))
        assert unknown.quantile(0.9) / unknown.quantile(0.1) > 1.5 * known.quantile(0.9) / known.quantile(0.1)
        assert unknown.quantile(0.98) > 3000


def test_a_reasoning_llm_is_learned_from_its_first_answers(predictor):
    rng = np.random.default_rng(0)
    answers = np.exp(rng.normal(np.log(9000), 0.5, 60)).astype(int)
    for number, tokens in enumerate(answers.tolist()):
        prediction = predictor.predict(PROMPTS[number % len(PROMPTS)], target_llm="brand-new-thinker")
        predictor.observe(prediction, tokens, time_s=1e9 + number)
    found = predictor.predict("Explain TCP slow start.", target_llm="brand-new-thinker")
    assert 4000 < found.median < 20_000
    assert found.quantile(0.95) < 200_000


def test_a_folder_of_the_same_name_goes_first(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    Path("chat-small").symlink_to(tiny)
    assert LengthPredictor.from_pretrained("chat-small", backend="torch").config.encoder == "tiny-random-bert"


def test_a_name_is_located_and_shown_again(tmp_path):
    folder = packaged.located("chat-small")
    assert (folder / "files.json").is_file()
    assert packaged.shown(folder) == "chat-small"
    assert packaged.located(tmp_path) == tmp_path
    assert packaged.shown(Path(os.path.relpath(folder))) == "chat-small"
    assert packaged.shown(tmp_path / "mine") == str(tmp_path / "mine")
    assert packaged.located("nothing-here") == Path("nothing-here")


PACKAGED = "packaged are chat-micro and chat-small"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chat-smal", f"{PACKAGED}; did you mean chat-small?"),
        ("Chat_Micro", f"{PACKAGED}; did you mean chat-micro?"),
        ("chat-base", f"it is a recipe: mope-train --recipe chat-base --output DIR makes it; {PACKAGED}"),
        ("chat-bse", f"{PACKAGED}; did you mean chat-base? mope-train --recipe chat-base --output DIR makes it"),
        ("elsewhere", f"mope-train DATA --output elsewhere makes one; {PACKAGED}"),
    ],
)
def test_a_name_that_is_none_says_which_there_are_and_what_it_may_have_meant(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=re.escape(f"no saved predictor at {name}; {said}") + "$"):
        LengthPredictor.from_pretrained(name)


def test_recipes_are_found_without_training():
    from mope.training.recipe import recipe_names

    assert packaged.recipes() == recipe_names()
    code = "import sys; from mope import packaged; packaged.recipes(); assert 'mope.training' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NO_WEIGHTS = (
    r"^chat-small was exported for serving and has no PyTorch weights \(model\.safetensors\); {} needs them: "
    "mope-train --recipe chat-small --output DIR makes such"
)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_that_it_has_no_weights_is_said_before_what_is_not_installed(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ArtifactError, match=NO_WEIGHTS.format("the torch backend") + ", or let the onnx backend run"):
        LengthPredictor.from_pretrained("chat-small", backend="torch")


def test_without_any_engine_the_one_that_it_needs_is_named(monkeypatch):
    for module in ("torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"'onnxruntime', .* pip install 'mope-llm\[onnx\]'"):
        LengthPredictor.from_pretrained("chat-small")


def test_it_is_no_predictor_to_export_and_that_is_one_line(tmp_path, monkeypatch, capsys):
    from mope import console
    from mope.export.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    console.console.cache_clear()
    assert main(["chat-small", "--to", "onnx-int8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(NO_WEIGHTS.format("mope-export") + "$", line.removeprefix("error: "))


def test_a_copy_of_it_says_the_same_under_its_own_name(tmp_path):
    copy = Path(shutil.copytree(packaged.PREDICTORS / "chat-micro", tmp_path / "mine"))
    said = (
        f"{re.escape(str(copy))} was exported for serving and .*: they are in the folder that it was exported from, or "
    )
    with pytest.raises(ArtifactError, match=said + "mope-train --recipe chat-micro --output DIR makes such, or let"):
        LengthPredictor.from_pretrained(copy, backend="torch")
