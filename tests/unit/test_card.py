"""The whole card: what is in it, that every number comes from the run, and that nothing is there without data."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from mope.card import render_card, snippet, write_card
from mope.training.report import metrics_markdown

TINY = Path(__file__).parents[1] / "data" / "tiny"

CONFIG = {
    "format_version": 1,
    "preset": "small",
    "design": "shared",
    "num_experts": 3,
    "boundaries": [152.5, 316.5],
    "edges": [0.5, *np.geomspace(2, 1234, 24).tolist(), 9000.0],
    "num_body_bins": 24,
    "tail_index": 1.87,
    "label_tokenizer": "cl100k_base",
    "encoder": "minilm",
    "encoder_config": {"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384, "vocab_size": 30522},
    "max_prompt_tokens": 112,
    "max_context_tokens": 24,
    "chars_per_token": 10,
    "lexical_chars": 2000,
    "target_llms": ["vicuna-13b", "gpt-4"],
    "number_names": ["a"] * 51,
    "router_parts": ["gate", "rules", "lookup"],
    "combination": "mixture",
}


def result(mae, tau, **more):
    return {
        "num_rows": 911, "mae": mae, "mae_ci": [mae - 5.2, mae + 5.4], "median_ae": mae - 30, "rmse": mae + 50,
        "kendall_tau": tau, "r2": 0.213, **more,
    }  # fmt: skip


COVERAGE = {"pinball": 36.1, "coverage": {"0.5": 0.511, "0.9": 0.893}, "coverage_ci": {"0.9": [0.881, 0.905]}}
METRICS = {
    "test": {
        part: {
            "mope": result(110.2 + shift, 0.461, **COVERAGE),
            "mope_oracle_routed": result(60.1 + shift, 0.812),
            "single_expert": result(112.7 + shift, 0.452),
            "ranker": result(171.3 + shift, 0.473),
            "tfidf_ridge": result(135.8 + shift, 0.364),
            "constant": result(157.9 + shift, 0.0),
        }
        for part, shift in (("first_turn", 0.0), ("all_turns", -7.0))
    },
    "mope_minus": {
        "first_turn": {
            "tfidf_ridge": {"mae_difference": -25.6, "ci": [-30.3, -20.7]},
            "single_expert": {"mae_difference": -2.5, "ci": [-5.8, 0.9]},
        }
    },
    "router": {
        "accuracy": 0.612,
        "confusion": [[1500, 400], [300, 1200]],
        "ablation": {
            "gate": {"accuracy": 0.604, "log_loss": 0.91, "mae_end_to_end": 111.4},
            "gate+rules+lookup": {"accuracy": 0.612, "log_loss": 0.9, "mae_end_to_end": 110.9},
        },
    },
    "combination": {"used": "mixture", "test_mae": {"top1": 114.6, "mixture": 110.9}},
    "by_length": {
        "<152.5": {"num_rows": 300, "mae": 80.1, "median_ae": 60.2, "bias": 55.3},
        ">=316.5": {"num_rows": 280, "mae": 180.1, "median_ae": 160.2, "bias": -122.4},
    },
    "by_language": {
        "en": {"num_rows": 850, "mae": 111.1, "median_ae": 80.3, "bias": -3.1},
        "others": {"num_rows": 61, "mae": 121.1, "median_ae": 90.3, "bias": -13.1},
    },
    "by_target_llm": {
        "gpt-4": {"num_rows": 650, "mae": 111.6, "median_ae": 80.7, "bias": -3.2},
        "vicuna-13b": {"num_rows": 261, "mae": 99.4, "median_ae": 70.3, "bias": 4.1},
    },
    "failures": [
        {"actual": 4021, "predicted": 63.4, "quantile_90": 377.8, "prompt_chars": 5123, "first_words": "Secret prompt"},
        {"actual": 3, "predicted": 1411.7, "quantile_90": 2317.2, "prompt_chars": 640},
    ],
    "training": {
        "rows": {"train": 40123, "validation": 5678, "test": 5711},
        "networks": {"model": {"validation_loss": 5.4321, "num_steps": 3762, "seconds": 2483.4}},
    },
    "other_data": {"lmsys/lmsys-chat-1m": {"test": {"first_turn": {"mope": result(131.9, 0.402)}}}},
}  # fmt: skip
PROVENANCE = {
    "command": ["mope-train", "--recipe", "sharegpt-small", "--output", "runs/my chat"],
    "started": "2026-11-23T10:00:00+00:00",
    "finished": "2026-11-23T10:42:00+00:00",
    "seed": 17,
    "data": {"sharegpt": "ab12cd"},
    "git": {"commit": "0123abc", "dirty": True},
    "python": "3.11.9",
    "packages": {"torch": "2.13.0", "lightning": "2.6.1"},
    "machine": {"platform": "Linux x86_64", "cpu": "Some CPU @ 2.70GHz", "num_cores": 2, "gpus": []},
    "config": {"fit": {"epochs": 3.0, "batch_size": 32, "learning_rate": 8e-5, "head_learning_rate": 1e-3}},
}
REPORT = [
    "/home/someone/chats.json.gz: 17,671 records read as sharegpt, 16,002 conversations, lengths in cl100k_base tokens",
    "rows: train 40,123, validation 5,678, test 5,711, reserved 5,700",
    "12 x row with an empty answer, dropped (chats.json.gz:7)",
    "warning: the file ends inside a string",
]
PLOTS = ["plots/calibration.png", "plots/error_by_length.png"]
SECTIONS = [
    "Use",
    "Results",
    "How it was made",
    "Data",
    "Limits, and who loses when it errs",
    "Largest errors on test rows",
    "Licence and provenance",
]
STATED = {"95", "90"}  # the level of all intervals, and of the quantile among the largest errors


def card(metrics=METRICS, config=CONFIG, provenance=PROVENANCE, plots=PLOTS, report=REPORT, **more):
    options = {"name": "runs/demo", "tables": metrics_markdown(metrics), **more}
    return render_card(config, metrics, provenance, plots, report=report, **options)


def headings(text):
    return re.findall(r"^## (.*)$", text, flags=re.MULTILINE)


def leaves(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def numbers(text):
    return set(re.findall(r"\d+(?:[.,:]\d+)*", text))


def written_forms(value):
    """Every way in which a number of the run may be written, and every number inside a text of the run."""
    if isinstance(value, str):
        return numbers(value) | (written_forms(float(value)) if re.fullmatch(r"0\.\d+", value) else set())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set()
    forms = {format(number, form) for number in (value, 100 * value) for form in ("g", ",.1f", ".2f", ".3f", ",.0f")}
    return {number for form in forms for number in numbers(form)}


def test_all_sections_are_there_in_order():
    assert headings(card()) == SECTIONS


def test_every_number_comes_from_the_run():
    allowed = set(STATED)
    for value in leaves([CONFIG, METRICS, PROVENANCE, REPORT]):
        allowed |= written_forms(value)
    allowed |= {"1", "152", "153", "316", "317", "51"}  # the experts' ranges and how many numbers there are
    allowed |= {"0", "2", "42"}  # experts are counted from 0; minutes from start to end
    text = card().split("---\n", 2)[2]  # the front matter has a test of its own
    text = text.replace("Apache-2.0", "").replace("oracle-routed (1)", "").replace("(1) not", "")
    assert numbers(text) - allowed == set()


def test_a_rival_that_the_run_did_not_measure_is_not_spoken_of():
    assert not re.search(r"single head|one head", card(), re.IGNORECASE)


def test_front_matter_is_what_the_hub_reads():
    data = ModelCard(card(datasets=["lmsys/lmsys-chat-1m"], is_public=True)).data
    assert (data.license, data.library_name, data.datasets) == ("apache-2.0", "mope", ["lmsys/lmsys-chat-1m"])
    assert data.model_name == "demo"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("test split, first turns", "mae"): 110.2,
        ("test split, first turns", "kendall_tau"): 0.461,
        ("test split, all turns", "mae"): 103.2,
        ("test split, all turns", "kendall_tau"): 0.461,
    }


def test_front_matter_without_results_or_hub_data():
    data = ModelCard(card({})).data
    assert data.license is None
    assert data.eval_results is None
    assert data.datasets is None


def test_both_numbers_are_given_and_told_apart():
    text = card()
    assert (
        "**First turns**: MAE **110.2 tokens** end to end (95 % interval 105.0 to 115.6); oracle-routed 60.1." in text
    )
    assert "**All turns**: MAE **103.2 tokens** end to end" in text
    assert "no server can reach it" in text
    without = copy.deepcopy(METRICS)
    for part in without["test"].values():
        del part["mope_oracle_routed"]
    assert "oracle" not in card(without).lower()


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [([-30.0, -20.0], "is better than"), ([-3.0, 4.0], "can't be told from"), ([1.0, 9.0], "is worse than")],
)
def test_only_an_interval_on_one_side_of_zero_is_a_difference(interval, verdict):
    metrics = copy.deepcopy(METRICS)
    metrics["mope_minus"]["first_turn"]["single_expert"] = {"mae_difference": np.mean(interval).item(), "ci": interval}
    low, high = (f"{value:+.1f}" for value in interval)
    gap = f"{np.mean(interval):+.1f}"
    assert (
        f"It {verdict} the single expert of equal size (MAE 112.7; difference {gap} (95 % interval {low} to {high}))."
        in card(metrics)
    )


def test_a_loss_without_intervals_is_admitted():
    metrics = {"test": {"first_turn": {"mope": result(140.0, 0.3), "tfidf_ridge": result(135.8, 0.364)}}}
    text = card(metrics)
    assert "It has no lower MAE than TF-IDF ridge, the best without fine-tuning (MAE 135.8)." in text
    assert "The best of the others at that is TF-IDF ridge with 0.364." in text


def test_coverage_ablation_combination_and_other_data_are_in_words():
    text = card()
    assert "51.1 % under the 50 % quantile, 89.3 % under the 90 % quantile" in text
    assert "`gate` 111.4, `gate+rules+lookup` 110.9. Lowest: `gate+rules+lookup`." in text
    assert "`top1` 114.6, `mixture` 110.9. Lowest: `mixture`." in text
    assert "true bucket for 61.2 % of the test rows" in text
    assert "### On the test split of lmsys/lmsys-chat-1m\n\n- **First turns**: MAE **131.9 tokens**" in text


def test_how_it_was_made():
    text = card()
    assert "expert 0 for 1 to 152; expert 1 for 153 to 316; expert 2 for 317 and more tokens" in text
    assert "24 log-spaced bins up to 1,234 tokens" in text
    assert "`minilm` (bert, 6 layers, width 384)" in text
    assert "mope-train --recipe sharegpt-small --output 'runs/my chat'" in text
    assert "42 minutes" in text
    assert "3,762 steps, 2,483 s, validation loss 5.432" in text
    assert "python 3.11.9, torch 2.13.0" in text
    assert "with uncommitted changes" in text


def test_one_expert_has_no_router():
    alone = {**CONFIG, "num_experts": 1, "boundaries": [], "router_parts": []}
    text = card(config=alone)
    assert "expert 0 for 1 and more tokens" in text
    assert "**Router**" not in text
    assert "look-up" not in text


def test_the_data_is_reported_without_folders_and_warnings_once():
    text = card(warnings=["the file ends inside a string"])
    assert "- chats.json.gz: 17,671 records read as sharegpt" in text
    assert text.count("the file ends inside a string") == 1
    assert "- **Warning**: the file ends inside a string" in text
    assert "/home" not in text


def test_who_loses_is_said_with_the_runs_numbers():
    text = card()
    assert "Test answers of \\>=316.5 tokens are predicted too short, by 122.4 tokens on average." in text
    assert "Test answers of \\<152.5 tokens are predicted too long, by 55.3 tokens on average." in text
    assert "Test rows by language: en 850, others 61." in text
    assert "gpt-4 has the highest MAE, 111.6 tokens" in text
    assert "Errors were not measured by language." in card({**METRICS, "by_language": {}})


def test_failures_show_lengths_and_no_prompt():
    text = card()
    assert "| too short | 4,021 | 63 | 378 | 5,123 |" in text
    assert "| too long | 3 | 1,412 | 2,317 | 640 |" in text
    assert "Secret" not in text


def test_plots_are_embedded_by_relative_path():
    text = card()
    assert re.findall(r"!\[(.*?)\]\((.*?)\)", text) == [
        ("calibration", "plots/calibration.png"),
        ("error by length", "plots/error_by_length.png"),
    ]


def test_parts_without_data_are_left_out():
    text = card({}, provenance={}, plots=[], report=[], tables="")
    missing = {"Results", "Data", "Largest errors on test rows"}
    assert headings(text) == [section for section in SECTIONS if section not in missing]
    for words in ("**Command**", "**Seed**", "**Hardware**", "**Versions**", "**Time**", "commit", "]("):
        assert words not in text


@pytest.mark.parametrize("gap", [None, float("nan"), float("inf")])
def test_nothing_reads_none_or_nan(gap):
    metrics = copy.deepcopy(METRICS)
    metrics["test"]["first_turn"]["mope"]["kendall_tau"] = gap
    metrics["test"]["first_turn"]["ranker"]["kendall_tau"] = gap
    metrics["test"]["first_turn"]["mope_oracle_routed"]["mae"] = gap
    metrics["test"]["first_turn"]["mope"]["coverage"] = {"0.9": gap}
    metrics["router"]["ablation"]["gate"]["mae_end_to_end"] = gap
    metrics["training"]["networks"]["model"]["validation_loss"] = gap
    metrics["by_length"]["<152.5"]["bias"] = gap
    metrics["failures"][0]["quantile_90"] = gap
    bare = {**PROVENANCE, "git": None, "seed": None, "started": None}
    bare["machine"] = {"platform": "Linux", "cpu": None, "num_cores": None, "gpus": []}
    text = card(metrics, provenance=bare, tables="")
    assert not re.search(r"\b(?:None|nan|inf)\b", text)
    assert headings(text) == SECTIONS


def test_words_from_outside_cannot_change_the_page():
    metrics = {**METRICS, "by_target_llm": {"a|b [x](y) <script>": METRICS["by_target_llm"]["gpt-4"]}}
    text = card(metrics, config={**CONFIG, "target_llms": ["evil` name\n# heading"]}, tables="")
    assert "<script" not in text.replace("\\<script", "")
    assert "`evil' name # heading`" in text
    assert headings(text) == SECTIONS


def test_addresses_stay_whole_and_paths_do_not():
    lines = ["https://example.org/a/b/c.json and ~/chats/x.json and C:\\data\\y.json and data/z.json"]
    assert "- https://example.org/a/b/c.json and x.json and y.json and data/z.json" in card(report=lines)


def test_the_same_run_gives_the_same_card():
    assert card() == card(json.loads(json.dumps(METRICS)), json.loads(json.dumps(CONFIG)))


def test_write_card(tmp_path):
    path = write_card(tmp_path, card())
    assert path == tmp_path / "README.md"
    assert path.read_bytes() == card().encode()


def test_all_llms_that_it_knows_are_listed_and_many_of_them_by_family():
    few = card(config={**CONFIG, "target_llms": ["gpt-4", "yi-34b"]})
    assert "`target_llm` can be `gpt-4`, `yi-34b`." in few
    assert "<details>" not in few
    names = [f"{family}-{size}b" for family in ("yi", "qwen2.5", "qwen2") for size in range(1, 20)]
    many = card(config={**CONFIG, "target_llms": names})
    assert "`target_llm` can be any of 57 names, listed below by their families." in many
    folded = many.partition("<details>\n")[2].partition("\n</details>")[0].splitlines()
    assert folded[:2] == ["<summary>The 57 names of LLMs and families that it knows</summary>", ""]
    assert [line.partition(": ")[0] for line in folded[2:] if line] == ["- **qwen**", "- **yi**"]
    assert sorted(re.findall("`([^`]+)`", "".join(folded))) == sorted(names)


def test_the_snippet_in_the_card_runs(capsys):
    code = snippet(str(TINY))
    assert snippet("runs/demo") in card()
    exec(compile(code, "snippet", "exec"), {})
    median, high = map(float, capsys.readouterr().out.split())
    assert 0 < median < high


def test_the_card_needs_no_training_packages():
    code = (
        "import sys, mope.card; print(sorted({'torch', 'sklearn', 'matplotlib', 'mope.training'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_predictor_of_own_data_is_under_nobody_else_s_licence():
    assert "for the owner of the data to choose" in card(licences=["`sharegpt`: none is stated."])
    assert "Apache-2.0" not in card(licences=["`sharegpt`: none is stated."])
    assert "The predictor is under Apache-2.0." in card(is_public=True)
