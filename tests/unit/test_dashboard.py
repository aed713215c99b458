"""The dashboard's queries in Prometheus' own hands: `promtool` parses all of them and works out Jain's index.

Skipped where there is no promtool (`apt-get install prometheus`); what needs none is in `test_hook_docs`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

DASHBOARD = Path(__file__).resolve().parents[2] / "serving_hooks" / "dashboards" / "mope.json"
PANELS = [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
(JAIN,) = [panel["targets"][0]["expr"] for panel in PANELS if "Jain" in panel["title"]]
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")


def filled(query: str) -> str:
    """A query as Grafana sends it, for all clients and instances."""
    return re.sub(r"\$\{?(instance|client)\}?", ".*", query).replace("$__rate_interval", "1m").replace("$__range", "1h")


def checked(kind: str, name: str, content: Any, folder: Path) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    done = subprocess.run(["promtool", kind, "rules", name], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": filled(query)} for number, query in enumerate(QUERIES)]
    checked("check", "rules.json", {"groups": [{"name": "dashboard", "rules": rules}]}, tmp_path)


ALWAYS = "5x40"
NOW_AND_THEN = "0 3 2 0 1 4 2 1 0 2 " * 4  # seven of ten scrapes
SELDOM = "0 0 0 0 1 0 0 0 0 0 " * 4


@needs_promtool
@pytest.mark.parametrize(
    ("clients", "index"),
    [
        # waiting, tokens in 15 s, weight; the index is (sum x)^2 / (n sum x^2) of tokens over weight
        ({"a": (ALWAYS, 150, 1), "b": (ALWAYS, 150, 1)}, 1.0),
        ({"a": (NOW_AND_THEN, 150, 1), "b": (NOW_AND_THEN, 150, 1)}, 1.0),
        ({"a": (NOW_AND_THEN, 150, 1), "b": (ALWAYS, 450, 1)}, 0.8),
        ({"a": (NOW_AND_THEN, 150, 1), "b": (ALWAYS, 450, 3)}, 1.0),
        ({"a": (ALWAYS, 150, 1), "b": (NOW_AND_THEN, 450, 1), "light": (SELDOM, 5, 1)}, 0.8),
        ({"a": (ALWAYS, 150, 1), "b": (ALWAYS, 450, 1), "(others)": (ALWAYS, 9000, 1)}, 0.8),
        ({"a": (ALWAYS, 150, 1), "light": (SELDOM, 5, 1)}, None),
        ({"a": (SELDOM, 150, 1), "b": (SELDOM, 150, 1)}, None),
    ],
)
def test_jains_index_of_those_who_mostly_wait(
    clients: dict[str, tuple[str, int, int]], index: float | None, tmp_path: Path
) -> None:
    series = []
    for client, (waiting, tokens, weight) in clients.items():
        labels = f'{{client="{client}",instance="x"}}'
        series += [
            {"series": f"mope_client_waiting{labels}", "values": waiting.strip()},
            {"series": f"mope_client_service_weighted_tokens_total{labels}", "values": f"0+{tokens}x40"},
            {"series": f"mope_client_weight{labels}", "values": f"{weight}x40"},
        ]
    found = [] if index is None else [{"labels": "{}", "value": index}]
    # promtool compares to the last digit, which rates and roots leave open
    asked = f"round({filled(JAIN)}, 0.001)"
    case = {
        "interval": "15s",
        "input_series": series,
        "promql_expr_test": [{"expr": asked, "eval_time": "9m", "exp_samples": found}],
    }
    checked("test", "test.json", {"evaluation_interval": "15s", "tests": [case]}, tmp_path)


def test_the_index_asks_for_no_wait_without_a_break() -> None:
    assert "min_over_time" not in JAIN
    parts = re.findall(r"avg\((.*)\)\^2 / avg\((.*)\^2\) and count\((.*)\) > 1$", JAIN)
    assert len(parts) == 1
    assert len(set(parts[0])) == 1  # the same clients in all three places
    assert re.search(r"avg_over_time\(\(.* > bool 0\)\[5m:15s\]\) >= 0\.5", parts[0][0])


(PREDICTOR,) = [panel["targets"][0]["expr"] for panel in PANELS if panel["title"] == "Predictor"]


@needs_promtool
@pytest.mark.parametrize(
    ("front_ends", "shown"),
    [
        ([("chat-small", 1), ("chat-small", 1)], 1),
        ([("chat-small", 1), ("/models/broken", 0)], 0),
        ([("chat-small", 1), ("none", 0)], 1),  # nobody asked that one to predict
        ([("none", 0)], None),
    ],
)
def test_the_predictor_is_broken_where_one_that_was_asked_for_does_not_run(
    front_ends: list[tuple[str, int]], shown: int | None, tmp_path: Path
) -> None:
    series = []
    for number, (predictor, predicts) in enumerate(front_ends):
        series += [
            {"series": f'mope_front_on{{instance="{number}",predictor="{predictor}"}}', "values": "1x40"},
            {"series": f'mope_front_predicts{{instance="{number}"}}', "values": f"{predicts}x40"},
        ]
    found = [] if shown is None else [{"labels": "{}", "value": shown}]
    case = {
        "interval": "15s",
        "input_series": series,
        "promql_expr_test": [{"expr": filled(PREDICTOR), "eval_time": "5m", "exp_samples": found}],
    }
    checked("test", "test.json", {"evaluation_interval": "15s", "tests": [case]}, tmp_path)
