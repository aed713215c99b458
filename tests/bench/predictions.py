"""Scores predictions that were kept in a CSV, side by side with paired intervals.

    python tests/bench/predictions.py model_cards/results/2026-11-26-base/predictions.csv

For predictors whose weights are too large to keep: the file, `.csv` or `.csv.gz`, has one row for each test row, with
the true `tokens`, the `conversation`, whether it is a `first_turn`, and a column of predicted medians for each
predictor. Knows columns and metrics; loads no predictor.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mope import metrics
from mope.console import run
from mope.errors import DataError

KNOWN = ("tokens", "conversation", "first_turn")


def score(path: Path) -> dict[str, Any]:
    """Error and order of each predictor, and the differences of every two, on first turns and on all.

    Raises:
        DataError: the file lacks a column of `KNOWN`, or has no predictor.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else {}) if name not in KNOWN]
    if not rows or not names or not set(KNOWN) <= rows[0].keys():
        raise DataError(f"{path}: expected rows with the columns {', '.join(KNOWN)} and one for each predictor")
    columns = {name: np.array([float(row[name]) for row in rows]) for name in (*KNOWN, *names)}
    parts = {"first_turn": columns["first_turn"] > 0, "all_turns": np.ones(len(rows), dtype=bool)}
    found: dict[str, Any] = {}
    for part, chosen in parts.items():
        tokens, groups = columns["tokens"][chosen], columns["conversation"][chosen]
        medians = {name: columns[name][chosen] for name in names}
        found[part] = {name: metrics.evaluate(tokens, medians[name], groups) for name in names}
        found[part]["differences"] = {
            f"{one} - {other}": metrics.paired_difference(tokens, medians[one], medians[other], groups)
            for one, other in combinations(names, 2)
        }
    return found


def main(arguments: list[str]) -> int:
    """Print the scores of a file as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="CSV of predictions, compressed (.gz) or not")
    print(json.dumps(score(parser.parse_args(arguments).path), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
