import io
import json

import pytest
from rich.console import Console

from mope.errors import DataError
from mope.training import report


def result(mae, tau, cover=None, **more):
    values = {"num_rows": 911, "mae": mae, "mae_ci": [mae - 5, mae + 5], "median_ae": mae - 30, "rmse": mae + 50,
              "kendall_tau": tau, "r2": 0.2}  # fmt: skip
    if cover is not None:
        values |= {"pinball": mae / 3, "coverage": {"0.5": 0.51, "0.9": cover}, "coverage_ci": {"0.9": [0.88, 0.93]}}
    return {**values, **more}


METRICS = {
    "test": {
        "first_turn": {
            "constant": result(157.8, 0.0),
            "tfidf_ridge": result(132.6, 0.36),
            "ranker": result(170.0, 0.47, 0.8),
            "mope_oracle_routed": result(60.1, 0.8, 0.9),
            "mope": result(110.2, 0.46, 0.905),
        }
    },
    "router": {
        "accuracy": 0.612,
        "confusion": [[1500, 400], [300, 1200]],
        "ablation": {
            "gate": {"accuracy": 0.6, "log_loss": 0.91, "mae_end_to_end": 111.0},
            "gate+rules": {"accuracy": 0.612, "log_loss": 0.9, "mae_end_to_end": 110.2},
        },
    },
    "by_length": {"<153": {"num_rows": 300, "mae": 80.0, "median_ae": 60.0, "bias": 55.5}},
    "by_language": {"all_turns": {"en": {"num_rows": 850, "mae": 111.0, "median_ae": 80.0, "bias": -3.0}}},
    "calibration": {"first_turn": {"shift": 0.0123}, "knots": [0, 1]},
}


def cells(markdown, first):
    """The cells of the Markdown row that starts with `first`."""
    (line,) = [line for line in markdown.splitlines() if line.startswith((f"| {first} |", f"| **{first}** |"))]
    return [cell.strip() for cell in line.strip("|").split("|")]


def terminal(table, width=140):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_mope_comes_first_and_the_others_from_best_to_worst():
    lines = report.metrics_markdown(METRICS).splitlines()
    names = [line.split("|")[1].strip() for line in lines[4:9]]
    assert names == ["MoPE", "oracle-routed (1)", "TF-IDF ridge", "constant", "ranker"]


def test_the_best_of_each_column_is_bold_and_the_oracle_never_is():
    markdown = report.metrics_markdown(METRICS)
    header = cells(markdown, "predictor")
    mope = dict(zip(header, cells(markdown, "MoPE"), strict=True))
    ranker = dict(zip(header, cells(markdown, "ranker"), strict=True))
    assert mope["MAE"] == "**110.2**"
    assert mope["95 % interval"] == "105.2-115.2"
    assert mope["≤ q90"] == "**90.5%**"
    assert mope["tau"] == "0.460"
    assert ranker["tau"] == "**0.470**"
    assert ranker["MAE"] == "170.0"
    assert "**" not in "".join(cells(markdown, "oracle-routed (1)"))
    assert report.ORACLE_NOTE in markdown


def test_values_that_read_the_same_are_both_bold():
    part = {"mope": result(110.21, 0.4), "ranker": result(110.24, 0.3)}
    markdown = report.metrics_markdown({"test": {"all_turns": part}})
    assert markdown.count("**110.2**") == 2
    assert "oracle" not in markdown


def test_coverage_is_best_nearest_to_what_it_states():
    part = {"mope": result(110.0, 0.4, 0.91), "ranker": result(120.0, 0.3, 0.99)}
    markdown = report.metrics_markdown({"test": {"all_turns": part}})
    assert "**91.0%**" in markdown
    assert "**99.0%**" not in markdown


def test_missing_numbers_are_dashes_and_empty_columns_are_left_out():
    part = {"mope": result(110.0, 0.4, 0.9), "constant": result(150.0, 0.0)}
    markdown = report.metrics_markdown({"test": {"all_turns": part}})
    assert dict(zip(cells(markdown, "predictor"), cells(markdown, "constant"), strict=True))["pinball"] == "-"
    assert "pinball" not in report.metrics_markdown({"test": {"all_turns": {"constant": result(150.0, 0.0)}}})


def test_a_lone_predictor_is_not_praised():
    assert "**" not in report.metrics_markdown({"test": {"first_turn": {"mope": result(110.0, 0.4)}}})


def test_every_section_is_rendered():
    markdown = report.metrics_markdown(METRICS)
    assert cells(markdown, "gate+rules") == ["gate+rules", "**110.2**", "**61.2%**", "**0.900**"]
    assert cells(markdown, "bucket 1") == ["bucket 1", "300", "1,200"]
    assert cells(markdown, "<153") == ["<153", "300", "80.0", "60.0", "+55.5"]
    assert "### MoPE by language, all turns" in markdown
    assert cells(markdown, "first turns, 90 % quantile") == [
        "first turns, 90 % quantile", "90.0%", "90.5%", "88.0%-93.0%",
    ]  # fmt: skip
    assert cells(markdown, "first turn shift") == ["first turn shift", "0.0123"]
    assert "Router: 61.2% of rows in their true bucket" in markdown


def test_every_markdown_table_is_rectangular():
    blocks = report.metrics_markdown(METRICS).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 7
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) <= set("|-:")


def test_names_with_bars_or_brackets_stay_in_their_cell():
    table = {"by_target_llm": {"a|b [red]": {"num_rows": 1, "mae": 1.0, "median_ae": 1.0, "bias": 0.0}}}
    assert "a\\|b [red]" in report.metrics_markdown(table)
    console = Console(file=io.StringIO(), width=120)
    report.print_metrics(table, console)
    assert "a|b [red]" in console.file.getvalue()


def test_terminal_table_holds_the_same_numbers():
    shown = terminal(report.metrics_table(METRICS, "first_turn"))
    for text in (
        "first turns, 911 test rows",
        "oracle-routed (1)",
        "105.2-115.2",
        "0.470",
        report.ORACLE_NOTE,
    ):
        assert text in shown


def test_everything_fits_a_terminal_of_eighty_columns():
    console = Console(file=io.StringIO(), width=80)
    report.print_metrics(METRICS, console)
    shown = console.file.getvalue()
    assert "…" not in shown
    assert "gate+rules" in shown
    for number in ("105.2-115.2", "oracle-routed", "88.0%-93.0%", "0.470", "80.0%"):
        assert number in shown


def test_metrics_read_back_from_json_render_alike():
    assert report.metrics_markdown(json.loads(json.dumps(METRICS))) == report.metrics_markdown(METRICS)


def test_nothing_to_show():
    assert report.metrics_markdown({}).strip() == ""


def test_an_unknown_part_is_named():
    with pytest.raises(DataError, match=r"'last_turn'.*'first_turn'"):
        report.metrics_table(METRICS, "last_turn")


def test_single_turns_alone_are_shown_once():
    one = METRICS["test"]["first_turn"]
    assert list(report.distinct_parts({"first_turn": one, "all_turns": one})) == ["all_turns"]
    more = {name: {**values, "num_rows": 950} for name, values in one.items()}
    assert list(report.distinct_parts({"first_turn": one, "all_turns": more})) == ["first_turn", "all_turns"]
    assert list(report.distinct_parts({"first_turn": one})) == ["first_turn"]
    assert report.metrics_markdown({"test": {"first_turn": one, "all_turns": one}}).count("Response tokens") == 1


def test_in_short_the_predictors_and_the_coverage():
    console = Console(file=io.StringIO(), width=140)
    report.print_metrics(METRICS, console, short=True)
    shown = console.file.getvalue()
    assert "TF-IDF ridge" in shown
    assert "90 % quantile" in shown
    assert "gate+rules" not in shown
