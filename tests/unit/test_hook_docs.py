"""The hooks' README says what is so, and the dashboard asks for metrics that there are.

The tables between `<!-- name -->` and `<!-- /name -->` are written by this file: `python tests/unit/test_hook_docs.py`.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from stewards import busy_steward, guard, scraped  # noqa: E402

from mope.serving_hooks.checks import option_rows  # noqa: E402
from mope.serving_hooks.front_metrics import front_collector  # noqa: E402
from mope.serving_hooks.metrics import StewardCollector  # noqa: E402
from mope.serving_hooks.options import HookOptions  # noqa: E402
from mope.serving_hooks.vllm import commands, compat  # noqa: E402

README = ROOT / "serving_hooks" / "README.md"
DASHBOARD: dict[str, Any] = json.loads(
    (ROOT / "serving_hooks" / "dashboards" / "mope.json").read_text(encoding="utf-8")
)
SNAPSHOT = {
    "predicts": True,
    "requests": {"/v1/completions": 1},
    "predictions": {"made": 1},
    "latency": {"bounds_s": (0.01,), "counts": (1, 0), "sum_s": 0.01},
}


def exposed() -> str:
    """All that Prometheus may be told, of the scheduler and of the front end."""
    a_guard = guard()
    a_guard.fail(ValueError("for its metric"), "testing")
    registry = CollectorRegistry()
    front_collector(lambda: SNAPSHOT, HookOptions(), registry)
    return scraped(StewardCollector(busy_steward(), a_guard)) + generate_latest(registry).decode()


def sample_names() -> set[str]:
    return {sample.name for family in text_string_to_metric_families(exposed()) for sample in family.samples}


def markdown(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def tables() -> dict[str, str]:
    """What stands between the marks."""
    metrics = []
    for family in text_string_to_metric_families(exposed()):
        labels = dict.fromkeys(name for sample in family.samples for name in sample.labels if name != "le")
        shown = family.name + ("_total" if family.type == "counter" else "")
        metrics.append((f"`{shown}`", family.type, ", ".join(labels), family.documentation))
    options = [
        (f"`{row['name']}`", f"`{json.dumps(row['default'])}`", row["values"], row["text"]) for row in option_rows()
    ]
    return {
        "metrics": markdown(("metric", "type", "labels", "what"), metrics),
        "options": markdown(("option", "default", "values", "what"), options),
        "releases": ", ".join(compat.TESTED),
    }


def parts(text: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", text, flags=re.DOTALL):
        yield found[1], found[2].strip("\n")


@pytest.mark.parametrize("name", ["metrics", "options", "releases"])
def test_the_tables_are_those_of_the_code(name: str) -> None:
    written = dict(parts(README.read_text(encoding="utf-8")))
    assert written[name] == tables()[name], "write them anew: python tests/unit/test_hook_docs.py"


def shell() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_readme_shows_commands_of_vllm() -> None:
    assert sum(line.startswith("vllm serve") for line in shell()) == 2


@pytest.mark.parametrize("command", [line for line in shell() if line.startswith("vllm serve")])
def test_each_command_of_vllm_is_right(command: str) -> None:
    words = shlex.split(command)
    found = commands.mistakes(words, commands.options(commands.flags(words)))
    assert [finding.status for finding in found] == ["ok"], found


def test_the_first_command_is_that_of_the_doctor() -> None:
    assert commands.START in README.read_text(encoding="utf-8")


def test_every_other_command_is_one_that_other_tests_try() -> None:
    others = {" ".join(shlex.split(line)[:2]) for line in shell() if not line.startswith("vllm serve")}
    assert others == {"pip install", "mope doctor"}


def test_options_that_the_text_names_exist() -> None:
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name, value in re.findall(r'`"(\w+)": ("\w[\w-]*"|\d+)`', prose):
        HookOptions.model_validate({name: json.loads(value)})
    assert re.findall(r'`"(\w+)": ', prose)


def test_metrics_that_the_text_names_exist() -> None:
    known = sample_names()
    named = set(re.findall(r"mope_(?:client|front|failed)\w*", README.read_text(encoding="utf-8")))
    families = {re.sub(r"_(total|info)$", "", name) for name in known} | known
    assert named - families - {re.sub(r"_(count|sum|bucket)$", "", name) for name in known} == set()


# -- the dashboard

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_every_metric_of_the_dashboard_exists(title: str, query: str) -> None:
    named = set(re.findall(r"\bmope_\w+", query))
    assert named, title
    assert named <= sample_names()


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_rates_are_of_counters_and_quantiles_of_histograms(title: str, query: str) -> None:
    for function, metric in re.findall(r"\b(rate|increase)\((mope_\w+)", query):
        assert metric.endswith(("_total", "_bucket")), f"{title}: {function} of {metric}"
    for metric in re.findall(r"histogram_quantile\([\d.]+, sum by \([^)]*\ble\) \(rate\((mope_\w+)", query):
        assert metric.endswith("_bucket")
    assert query.count("(") == query.count(")")
    assert ("histogram_quantile" in query) == ("_bucket" in query)


def test_labels_of_the_dashboard_exist() -> None:
    known = {
        label
        for family in text_string_to_metric_families(exposed())
        for sample in family.samples
        for label in sample.labels
    } | {"instance"}
    for title, query in QUERIES:
        used = re.findall(r"[{,](\w+)=~", query) + re.findall(r"by \((\w+)(?:, le)?\)", query)
        assert set(used) <= known, title
    for panel in PANELS:
        for target in panel["targets"]:
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, panel["title"]


def test_no_two_panels_share_a_number_or_a_place() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_the_dashboard_asks_which_prometheus() -> None:
    assert [one["name"] for one in DASHBOARD["templating"]["list"]] == ["datasource", "instance", "client"]
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)


def write() -> None:
    """Writes the README's tables anew."""
    text = README.read_text(encoding="utf-8")
    for name, table in tables().items():
        marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(marks, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
