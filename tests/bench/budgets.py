"""How much of a budget is used, by what a reservation holds: `max_tokens`, a constant, or a predicted quantile.

A month of a recorded trace: some minutes of each hour, from a random place of the trace, with more requests by day
than by night; each gets a real prompt whose answer was as long, from test rows that no predictor was trained on. Teams
have a limit of tokens a minute, and ask for more than that. Each way to reserve has a level; the first half of the
month chooses the one with which at most 1 % of the minutes use more than the limit, the second half is reported. With a
risk, the level follows what the minutes did.

    python tests/bench/budgets.py --trace AzureLLMInferenceTrace_conv.csv.gz --predictor chat-small \
        --data sharegpt --output model_cards/results/DATE-budgets
"""

from __future__ import annotations

import argparse
import csv
import gzip
import heapq
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mope import artifact
from mope.budgets.risk import following, log_odds
from mope.corrector import Corrector
from mope.grid import Array, quantiles_at
from mope.predictor import LengthPredictor
from mope.provenance import collect
from mope.training.data.build import build_rows
from mope.training.data.config import DataConfig
from mope.training.data.table import RowTable

WINDOW_S, TOKEN_S, FIRST_S = 60.0, 0.03, 0.5  # a minute's limit; seconds a token; seconds to the first one
OVER = 0.01  # share of the minutes that may use more than the limit
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
OBSERVED = 2000  # answers that are learned from


@dataclass(frozen=True)
class Month:
    """Requests in order of time.

    Attributes:
        time_s: seconds from the beginning, shape (R,).
        team: 0 to the number of teams, shape (R,).
        row: which pool row each request has, shape (R,).
        prompt: tokens of prompts, shape (R,).
        response: tokens of answers, shape (R,).
    """

    time_s: Array
    team: Array
    row: Array
    prompt: Array
    response: Array


@dataclass(frozen=True)
class Outcome:
    """What became of one half of the month.

    Attributes:
        admitted: requests.
        asked: requests.
        used: tokens that were used of the limits.
        over: minutes that used more than the limit, of those in which a team asked.
    """

    admitted: int
    asked: int
    used: float
    over: float


def recorded(path: Path) -> tuple[Array, Array, Array]:
    """Seconds, prompt tokens and response tokens of a trace of Azure."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    stamps = np.array([row["TIMESTAMP"] for row in rows], dtype="datetime64[ns]")
    time_s = (stamps - stamps.min()) / np.timedelta64(1, "s")
    lengths = ([float(row[name]) for row in rows] for name in ("ContextTokens", "GeneratedTokens"))
    return (time_s, *(np.array(one) for one in lengths))


def month_of(trace: tuple[Array, Array, Array], lengths: Array, teams: int, minutes: int, seed: int) -> Month:
    """So many minutes of each hour of 30 days."""
    rng = np.random.default_rng(seed)
    time_s, prompt, response = trace
    hours = np.arange(720)
    busy = 1.0 + 0.7 * np.sin(2 * np.pi * (hours % 24 - 8) / 24) - 0.3 * (hours // 24 % 7 >= 5)
    rows, times = [], []
    for hour, share in zip(hours, busy / busy.max(), strict=True):
        begins = rng.uniform(0, time_s.max() - WINDOW_S * minutes)
        inside = np.flatnonzero((time_s >= begins) & (time_s < begins + WINDOW_S * minutes))
        own = inside[rng.random(len(inside)) < share]
        rows.append(own)
        times.append(3600.0 * hour + time_s[own] - begins)
    index, times_R = np.concatenate(rows), np.concatenate(times)
    # one of the rows with the nearest lengths, by chance
    order = np.argsort(lengths, kind="stable")
    place = np.searchsorted(lengths[order], response[index]) + rng.integers(-4, 5, len(index))
    row = order[np.clip(place, 0, len(order) - 1)]
    weights = 1.0 / np.arange(1, teams + 1)
    team = rng.choice(teams, len(index), p=weights / weights.sum())
    back = np.argsort(times_R, kind="stable")
    return Month(times_R[back], team[back], row[back], prompt[index][back], lengths[row][back])


def simulate(month: Month, held: Array, limits: Array, half: int, risk: float | None = None) -> Outcome:
    """One half of the month.

    Args:
        month: of all requests.
        held: tokens that each request reserves for its answer; with a risk, those of each of `LEVELS`.
        limits: tokens a minute by team.
        half: 0 or 1.
        risk: the level of each team follows its minutes, see `mope.budgets.risk`; None for what `held` says.
    """
    odds = np.full(len(limits), log_odds(1.0 - risk) if risk is not None else 0.0)
    of_levels = np.array([log_odds(level) for level in LEVELS])
    middle = 15 * 86_400.0
    rows = np.flatnonzero((month.time_s < middle) if half == 0 else (month.time_s >= middle))
    window = np.full(len(limits), -1.0)
    used, holds = np.zeros(len(limits)), np.zeros(len(limits))
    ends: list[tuple[float, int, float, float, float]] = []  # when, team, window, held, used
    truth: dict[tuple[int, float], float] = {}
    admitted = 0
    for row in rows.tolist():
        now, team = month.time_s[row], int(month.team[row])
        while ends and ends[0][0] <= now:
            _, other, its, amount, took = heapq.heappop(ends)
            if its == window[other]:
                holds[other] -= amount
                used[other] += took
        if (at := now // WINDOW_S) != window[team]:
            if risk is not None and window[team] >= 0:  # of which all is known a minute later
                over = truth[team, window[team]] > limits[team]
                odds[team] = following(float(odds[team]), risk, over=over)
            window[team], used[team], holds[team] = at, 0.0, 0.0
        truth.setdefault((team, at), 0.0)
        holding = held[row] if risk is None else float(np.interp(odds[team], of_levels, held[month.row[row]]))
        amount, took = month.prompt[row] + holding, month.prompt[row] + month.response[row]
        if used[team] + holds[team] + amount > limits[team]:
            continue
        admitted += 1
        holds[team] += amount
        truth[team, at] += took
        heapq.heappush(ends, (now + FIRST_S + TOKEN_S * month.response[row], team, at, amount, took))
    over = sum(took > limits[team] for (team, _), took in truth.items()) / max(len(truth), 1)
    allowed = sum(limits[team] for team, _ in truth)
    return Outcome(admitted, len(rows), sum(truth.values()) / allowed, over)


def quantiles(predictions: Sequence[Any], corrector: Corrector, levels: Sequence[float]) -> Array:
    """Corrected quantiles of some predictions, shape (rows, levels)."""
    found = []
    for prediction in predictions:
        edges, cumulative = corrector.correct(prediction.raw_cumulative, prediction.answering)
        found.append(quantiles_at(edges, cumulative[None], np.asarray(levels))[0])
    return np.array(found)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--predictor", default="chat-small")
    parser.add_argument("--data", default="sharegpt", help="a source whose test rows give prompts and lengths")
    parser.add_argument("--target-llm", default="chatgpt")
    parser.add_argument("--teams", type=int, default=3)
    parser.add_argument("--minutes", type=int, default=3, help="of each hour")
    parser.add_argument("--prompt-weight", type=float, default=1.0, help="what a token of a prompt counts")
    parser.add_argument("--share", type=float, default=0.6, help="of the mean demand that the limits allow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    predictor = LengthPredictor.from_pretrained(arguments.predictor)
    own = {"target_llm": arguments.target_llm} if arguments.target_llm else {}
    config = DataConfig(source=arguments.data, label_tokenizer=predictor.config.label_tokenizer, min_rows=0, **own)
    table: RowTable = build_rows(config).rows.split("test")
    table = table.take(~table.censored)
    lengths = table.response_tokens.astype(np.float64)
    month = month_of(recorded(arguments.trace), lengths, arguments.teams, arguments.minutes, arguments.seed)
    month = replace(month, prompt=arguments.prompt_weight * month.prompt)
    predictions = predictor.predict_batch(table.requests())
    cold, learned = Corrector(predictor.config), Corrector(predictor.config)
    for turn, row in enumerate(month.row[:OBSERVED].tolist()):
        one = predictions[row]
        learned.observe(one.raw_cumulative, one.answering, lengths[row], censored=False, time_s=1.7e9 + turn)
    minutes = 720 * arguments.minutes
    demand = np.bincount(month.team, month.prompt + month.response, arguments.teams) / minutes
    limits = arguments.share * demand
    of_cold, of_learned = (quantiles(predictions, one, LEVELS) for one in (cold, learned))
    asked_LR: dict[str, Callable[[int], Array]] = {
        "constant": lambda place: np.full(len(month.row), np.quantile(lengths, LEVELS[place])),
        "predicted": lambda place: of_cold[month.row, place],
        "predicted, after learning": lambda place: of_learned[month.row, place],
    }
    found: dict[str, Any] = {}
    for cap in (1024, 2048, 4096):
        outcome = simulate(month, np.full(len(month.row), float(cap)), limits, 1)
        found[f"max_tokens {cap}"] = {**outcome.__dict__, "level": None}
    at_90 = LEVELS.index(0.9)
    for name, held in asked_LR.items():
        chosen = len(LEVELS) - 1
        for place in range(len(LEVELS)):
            if simulate(month, held(place), limits, 0).over <= OVER:
                chosen = place
                break
        found[name] = {**simulate(month, held(chosen), limits, 1).__dict__, "level": LEVELS[chosen]}
        found[f"{name}, 90 % quantile"] = {**simulate(month, held(at_90), limits, 1).__dict__, "level": 0.9}
    for risk in (0.01, 0.1):
        for name, of_rows in (("cold", of_cold), ("after learning", of_learned)):
            outcome = simulate(month, of_rows, limits, 1, risk)
            found[f"predicted, {name}, risk {risk:g}"] = {**outcome.__dict__, "level": None}
    base = found["max_tokens 4096"]["admitted"]
    for name, outcome in found.items():
        outcome["times_max_tokens_4096"] = outcome["admitted"] / base
        level, times = outcome["level"] or "-", outcome["times_max_tokens_4096"]
        print(f"{name:40s} level {level!s:6s} admitted {outcome['admitted']:8,} of {outcome['asked']:,}")
        print(f"{'':40s} {times:.2f} times, used {outcome['used']:.1%}, over {outcome['over']:.2%}")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        about = {
            "teams": arguments.teams,
            "requests": len(month.row),
            "share": arguments.share,
            "window_s": WINDOW_S,
            "prompt_weight": arguments.prompt_weight,
        }
        fingerprints = {"trace": artifact_hash(arguments.trace)}
        provenance = collect(["python", "tests/bench/budgets.py", *sys.argv[1:]], arguments.seed, fingerprints)
        artifact.write_json(arguments.output / "budgets.json", {"about": about, "outcomes": found})
        artifact.write_json(arguments.output / "provenance.json", provenance)


def artifact_hash(path: Path) -> str:
    """SHA-256 of a file."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
