"""Measures how soon `Recalibrator` learns an LLM that the predictor was not trained on, and what upsets it.

    python tests/bench/recalibration.py LENGTHS.parquet [--reasoning REASONING.parquet] [--seeds 4]

The files have the columns prompt_id, target_llm, response_tokens, censored and split. A third of the LLMs, drawn anew
for each seed, is held out. A stand-in predicts for them: the mean log length of the other LLMs' answers to a prompt,
with noise, so that it ranks prompts about as well as a predictor that reads text (Kendall's tau 0.45); its spread is
that of all other LLMs, lognormal. Answers of the train split are observed, the validation split is predicted; the test
split is not read. Beside it: no correction, the recalibration of mope's first version, and an oracle that is fitted on
all train answers of the LLM at once: a line in log tokens (least absolute deviations) and the residuals' quantiles.
Knows nothing of networks.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.table import Table
from scipy.special import ndtr

from mope.console import console
from mope.grid import Array, body_edges, cdf_at, quantiles_at, tail_edges
from mope.recalibration import Recalibrator
from mope.time_periods import Target

BODY = body_edges(2000, 64)
EDGES = np.concatenate([BODY, tail_edges(float(BODY[-1]), 32_768, 16)])
LOG_EDGES = np.log(EDGES)
LEVELS = np.array([0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99])
COUNTS = (0, 5, 20, 50, 200)
NOISE = 0.5  # of the stand-in's log median
RIDGE = 2.0  # answers that the mean over all prompts is worth in that of one prompt
RELATIVES, RELATIVE_ANSWERS = 12, 200  # LLMs that were observed before, in one of the arms
NOT_LLMS = ("gpt4_gamed", "NullModel")  # attacks on AlpacaEval
START_S, STEP_S = 1.7e9, 10.0  # one request in ten seconds

Distribution = tuple[Array, Array]  # edges and cumulative probabilities


class FirstVersion:
    """The recalibration that mope had first: a faded mean of log ratios, and a histogram of stated probabilities."""

    def __init__(self) -> None:
        self.count, self.log_ratio, self.levels = 0.0, 0.0, np.zeros(20)

    def observe(self, cumulative: Array, tokens: float, censored: bool) -> None:
        ratio = float(np.clip(np.log(tokens) - np.interp(0.5, cumulative, LOG_EDGES), -4, 4))
        if censored and ratio < 0:
            return
        level = cdf_at(EDGES, self._shifted(cumulative)[None], np.array([tokens]))[0]
        position = min(int(level * 20), 19)
        seen = np.zeros(20)
        seen[position : (20 if censored else position + 1)] = 1 / (20 - position) if censored else 1.0
        self.count, self.log_ratio = 0.995 * self.count + 1, 0.995 * self.log_ratio + ratio
        self.levels = 0.995 * self.levels + seen

    def correct(self, cumulative: Array) -> Distribution:
        if not self.count:
            return EDGES, cumulative
        shares = np.full(20, 1 / 20)
        for _ in range(2):  # all LLMs, then this one
            shares = (self.levels + 20 * shares) / (self.count + 20)
        level_map = np.concatenate([[0.0], np.cumsum(shares)])
        return EDGES, np.interp(self._shifted(cumulative), np.linspace(0, 1, 21), level_map)

    def _shifted(self, cumulative: Array) -> Array:
        factor = 0.0
        for _ in range(2):
            factor = (self.log_ratio + 20 * factor) / (self.count + 20)
        shifted = np.interp(LOG_EDGES - factor, LOG_EDGES, cumulative)
        shifted[0], shifted[-1] = 0.0, 1.0
        return shifted


def lognormal(log_median: float, deviation: float) -> Array:
    """Cumulative probabilities at the edges."""
    cumulative = ndtr((LOG_EDGES - log_median) / deviation)
    cumulative[0], cumulative[-1] = 0.0, 1.0
    return cumulative


@dataclass(frozen=True)
class Case:
    """One LLM that is new to the stand-in: log predicted medians, log tokens and whether these were cut."""

    llm: str
    deviation: float
    observed: tuple[Array, Array, Array]
    predicted: tuple[Array, Array, Array]


def read(path: str) -> dict[str, Array]:
    """Columns of a file of lengths, without the test split and without what is no LLM."""
    columns = ["prompt_id", "target_llm", "response_tokens", "censored", "split"]
    table = {
        name: column.to_numpy() for name, column in zip(columns, pq.read_table(path, columns=columns), strict=True)
    }
    kept = (table["split"] != "test") & ~np.isin(table["target_llm"].astype(str), NOT_LLMS)
    return {name: column[kept] for name, column in table.items()}


def held_out(path: str, seed: int) -> tuple[list[Case], list[Case]]:
    """A third of the LLMs, and those that the stand-in was made of."""
    table = read(path)
    llms, llm = np.unique(table["target_llm"].astype(str), return_inverse=True)
    prompts, prompt = np.unique(table["prompt_id"].astype(str), return_inverse=True)
    lengths = np.full((len(prompts), len(llms)), np.nan)
    lengths[prompt, llm] = np.log(table["response_tokens"])
    cut = np.zeros(lengths.shape, dtype=bool)
    cut[prompt, llm] = table["censored"]
    is_train = np.zeros(len(prompts), dtype=bool)
    is_train[prompt] = table["split"] == "train"

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(llms))
    new, old = order[: len(llms) // 3], order[len(llms) // 3 :]
    mean = np.nanmean(lengths[:, old], axis=1)
    signal = mean.mean() + (mean - mean.mean()) * len(old) / (len(old) + RIDGE) + rng.normal(0, NOISE, len(mean))
    pairs = np.repeat(signal[is_train], len(old)), lengths[np.ix_(is_train, old)].ravel()
    known = ~np.isnan(pairs[1])
    slope, intercept = np.polyfit(pairs[0][known], pairs[1][known], 1)
    medians = intercept + slope * signal
    deviation = float(np.nanstd(lengths[np.ix_(is_train, old)] - medians[is_train, None]))

    def case(column: int) -> Case:
        answered = ~np.isnan(lengths[:, column])
        train = rng.permutation(np.flatnonzero(answered & is_train))
        test = np.flatnonzero(answered & ~is_train & ~cut[:, column])
        observed, predicted = ((medians[i], lengths[i, column], cut[i, column]) for i in (train, test))
        return Case(str(llms[column]), deviation, observed, predicted)

    return [case(column) for column in new], [case(column) for column in old[:RELATIVES]]


def restored(saved: Any) -> Recalibrator:
    """A recalibrator that goes on with what was saved."""
    recalibrator = Recalibrator()
    recalibrator.restore(saved)
    return recalibrator


def teach(recalibrator: Recalibrator, target: Target, case: Case, first: int, last: int) -> None:
    """Observe some of the answers of the train split, a minute apart."""
    for row in range(first, min(last, len(case.observed[0]))):
        median, log_tokens, cut = (float(column[row]) for column in case.observed)
        recalibrator.observe(
            EDGES, lognormal(median, case.deviation), target, float(np.exp(log_tokens)), bool(cut), START_S + 60 * row
        )


def quantiles(distributions: Iterable[Distribution]) -> Array:
    """Quantiles in tokens, shape (rows, levels)."""
    return np.array([quantiles_at(edges, cumulative[None], LEVELS)[0] for edges, cumulative in distributions])


def oracle(case: Case) -> Array:
    """Quantiles by a line and residuals, fitted on all train answers."""
    x, y = case.observed[:2]
    slope, intercept = np.polyfit(x, y, 1)
    for _ in range(30):
        weights = 1 / np.maximum(np.abs(y - intercept - slope * x), 0.02)
        slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(weights))
    residuals = np.quantile(y - intercept - slope * x, LEVELS)
    return np.asarray(np.exp(intercept + slope * case.predicted[0][:, None] + residuals))


def score(quantiles_BQ: Array, tokens_B: Array) -> dict[str, float]:
    """Mean absolute error of the median, coverage of the 90 % quantile, mean pinball loss; in tokens."""
    missed = tokens_B[:, None] - quantiles_BQ
    return {
        "mae": float(np.abs(missed[:, 2]).mean()),
        "coverage": float((missed[:, 4] <= 0).mean()),
        "pinball": float(np.maximum(LEVELS * missed, (LEVELS - 1) * missed).mean()),
    }


Scores = dict[tuple[str, int], list[dict[str, float]]]


def measure_llms(path: str, seeds: int) -> Scores:
    """Scores of each arm after each number of observations, one per held-out LLM and seed."""
    found: Scores = defaultdict(list)
    for seed in range(seeds):
        cases, relatives = held_out(path, seed)
        taught = Recalibrator()
        for relative in relatives:
            teach(taught, Target(relative.llm, known=False), relative, 0, RELATIVE_ANSWERS)
        shifts = [float(np.exp(np.median(np.subtract(*relative.observed[1::-1])))) for relative in relatives]
        prior = {"": [(shift, 1.0) for shift in shifts]}
        saved = taught.to_json()
        for case in cases:
            medians, tokens = case.predicted[0], np.exp(case.predicted[1])
            raw = [lognormal(median, case.deviation) for median in medians]
            found["no correction", -1].append(score(quantiles((EDGES, one) for one in raw), tokens))
            found["oracle", -1].append(score(oracle(case), tokens))
            first = FirstVersion()
            learners = {
                "this": Recalibrator(),
                "this, prior given": Recalibrator(prior),
                "this, 12 other LLMs observed": restored(saved),
            }
            target = Target(case.llm, known=False)
            for start, count in zip((0, *COUNTS), COUNTS, strict=False):
                for row in range(start, count):
                    median, log_tokens, cut = (float(column[row]) for column in case.observed)
                    first.observe(lognormal(median, case.deviation), float(np.exp(log_tokens)), bool(cut))
                found["first version", count].append(score(quantiles(map(first.correct, raw)), tokens))
                for name, learner in learners.items():
                    teach(learner, target, case, start, count)
                    corrected = (learner.correct(EDGES, one, target) for one in raw)
                    found[name, count].append(score(quantiles(corrected), tokens))
    return found


def show_llms(found: Scores) -> None:
    """Print one line per number of observations and arm."""
    title = f"{len(found['oracle', -1])} held-out LLMs"
    table = Table("observed", "arm", "MAE", "vs oracle", "median LLM", "within 5 %", "90 % coverage", "off by",
                  "within 3 points", "pinball", title=title)  # fmt: skip
    best = np.array([one["mae"] for one in found["oracle", -1]])
    for (name, count), scores in sorted(found.items(), key=lambda item: item[0][1]):
        mae, coverage, pinball = (np.array([one[key] for one in scores]) for key in ("mae", "coverage", "pinball"))
        off = np.abs(coverage - 0.9)
        table.add_row(
            "all" if name == "oracle" else str(max(count, 0)), name, f"{mae.mean():.1f}",
            f"{mae.mean() / best.mean():.3f}", f"{np.median(mae / best):.3f}", f"{(mae <= 1.05 * best).mean():.0%}",
            f"{coverage.mean():.3f}", f"{off.mean():.3f}", f"{(off <= 0.03).mean():.0%}", f"{pinball.mean():.2f}",
        )  # fmt: skip
    console().print(table)


def reasoning_cases(path: str) -> Iterator[Case]:
    """LLMs that reason or were cut often, predicted by what two that do not reason answer to the same prompt."""
    table = read(path)
    llm, log_tokens = table["target_llm"].astype(str), np.log(table["response_tokens"])
    plain = np.isin(llm, ("google/gemma-2-27b-it", "Qwen/Qwen2.5-14B-Instruct"))
    mean = log_tokens[plain].mean()
    of_prompt: dict[str, list[float]] = defaultdict(list)
    for prompt, length in zip(table["prompt_id"][plain], log_tokens[plain], strict=True):
        of_prompt[prompt].append(length)
    rng = np.random.default_rng(0)
    medians = {p: (sum(a) + RIDGE * mean) / (len(a) + RIDGE) + rng.normal(0, 0.2) for p, a in sorted(of_prompt.items())}
    predicted = np.array([medians.get(prompt, mean) for prompt in table["prompt_id"]])
    names = np.where(np.char.find(llm, "32B-ckpts") >= 0, "Sky-T1 32B, checkpoints", llm)
    for word in ("corrupt-0.2", "corrupt-0.5", "reflection"):
        names = np.where(np.char.find(llm, word) >= 0, "Sky-T1 32B, variants", names)
    for name in (
        "Qwen/Qwen2.5-Math-7B",
        "Sky-T1-math-correct-5K-27B",
        "Sky-T1 32B, checkpoints",
        "Sky-T1 32B, variants",
    ):
        rows = {split: rng.permutation(np.flatnonzero((names == name) & (table["split"] == split)))
                for split in ("train", "validation")}  # fmt: skip
        observed, test = ((predicted[i], log_tokens[i], table["censored"][i]) for i in rows.values())
        yield Case(name, 0.6, observed, test)


def show_reasoning(path: str) -> None:
    """Print how answers compare with quantiles; one that was cut counts as longer than a quantile below its cut."""
    table = Table("LLM", "cut", "observed", "median", "predicted", "below 50 %", "below 90 %", title="reasoning")
    for case in reasoning_cases(path):
        medians, log_tokens, cut = case.predicted
        recalibrator, target = (
            Recalibrator({"": [(1.0, 0.7), (4.0, 0.15), (16.0, 0.15)]}),
            Target(case.llm, known=False),
        )
        raw = [lognormal(median, case.deviation) for median in medians]
        for start, count in zip((0, *COUNTS), COUNTS, strict=False):
            teach(recalibrator, target, case, start, count)
            found = quantiles(recalibrator.correct(EDGES, one, target) for one in raw)
            known = ~(cut & (np.exp(log_tokens)[:, None] < found).T)  # of the others it is known whether they are below
            below = (np.exp(log_tokens)[:, None] <= found).T & ~cut
            shares = [f"{below[q].sum() / max(known[q].sum(), 1):.2f} of {known[q].sum()}" for q in (2, 4)]
            table.add_row(case.llm, f"{cut.mean():.0%}", str(min(count, len(case.observed[0]))),
                          f"{np.exp(np.median(log_tokens)):.0f}", f"{np.median(found[:, 2]):.0f}", *shares)  # fmt: skip
    console().print(table)


def _usual(rng: np.random.Generator, log_median: float, factor: float = 1.5) -> float:
    return max(1.0, round(factor * float(np.exp(log_median + rng.normal(0, 0.6)))))


def _plain(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    return _usual(rng, log_median), False


def _calibrated(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    return max(1.0, round(float(np.exp(log_median + rng.normal(0, SPREAD))))), False


def _outliers(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    factor = 30 ** rng.choice([-1.0, 1.0]) if rng.random() < 0.1 else 1.0
    return max(1.0, round(factor * _usual(rng, log_median))), False


def _aborted(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    tokens, cut = _usual(rng, log_median), rng.random() < 0.3
    return (max(1.0, round(tokens * rng.random())) if cut else tokens), bool(cut)


def _capped(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    tokens = _usual(rng, log_median)
    return min(tokens, 256.0), tokens > 256


def _all_cut(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    return max(1.0, round(_usual(rng, log_median) / 2)), True


def _constant(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    return 225.0, False


def _extremes(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    return (1.0 if position % 2 else 100_000.0), False


def _reasoning(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    return _usual(rng, log_median, 30.0), False


def _changed(rng: np.random.Generator, position: int, log_median: float) -> tuple[float, bool]:
    return _usual(rng, log_median, 4.0), False


Stream = Callable[[np.random.Generator, int, float], tuple[float, bool]]  # position and log median to tokens and cut
SPREAD = 0.87  # predicted
# name, what is observed, what is predicted afterwards, the factor on the median that is right
STREAMS: tuple[tuple[str, Stream, Stream, str], ...] = (
    ("1.5 times longer", _plain, _plain, "1.5"),
    ("as predicted", _calibrated, _calibrated, "1"),
    ("10 % are 30 times longer or shorter", _outliers, _outliers, "1.5"),
    ("the same, tested without these", _outliers, _plain, "1.5"),
    ("30 % aborted at any share of their length", _aborted, _plain, "1.5"),
    ("capped at 256 tokens, more than half are longer", _capped, _plain, "1.5"),
    ("all aborted at half", _all_cut, _plain, "1.5"),
    ("always 225 tokens", _constant, _constant, "about 1"),
    ("1 and 100,000 in turn", _extremes, _extremes, "any"),
    ("30 times longer", _reasoning, _reasoning, "30"),
    ("4 times longer, after 1000 as predicted", _changed, _changed, "4"),
)


def measure_stream(observed: Stream, truth: Stream, seed: int) -> Iterator[tuple[int, str, dict[str, float]]]:
    """Scores of each arm after some numbers of observations, on the same 400 fresh predictions for all."""
    rng, target = np.random.default_rng(seed), Target("a", known=False)
    first, this, now = FirstVersion(), Recalibrator(), START_S
    changed = observed is _changed
    for position in range(-1000 if changed else 0, 400):
        log_median = rng.normal(np.log(200), 0.6)
        raw = lognormal(log_median, SPREAD)
        tokens, cut = observed(rng, position, log_median) if position >= 0 else _calibrated(rng, 0, log_median)
        first.observe(raw, tokens, cut)
        this.observe(EDGES, raw, target, tokens, cut, now)
        now += STEP_S
        if position + 1 not in ((20, 60, 120, 400) if changed else (5, 20, 100, 400)):
            continue
        fresh = np.random.default_rng(1000 + seed)
        new = fresh.normal(np.log(200), 0.6, 400)
        actual = np.array([truth(fresh, row, median)[0] for row, median in enumerate(new)])
        predictions = [lognormal(median, SPREAD) for median in new]
        arms: dict[str, list[Distribution]] = {
            "no correction": [(EDGES, one) for one in predictions],
            "first version": [first.correct(one) for one in predictions],
            "this": [this.correct(EDGES, one, target) for one in predictions],
        }
        for arm, distributions in arms.items():
            found = quantiles(distributions)
            factor = float(np.median(found[:, 2] / np.exp(new)))
            yield position + 1, arm, {**score(found, actual), "factor": factor}


def show_streams(repeats: int) -> None:
    """Print means over some repetitions of streams of made-up answers; of the factor, the geometric mean."""
    title = f"streams, {repeats} of each; coverage and pinball: no correction / first version / this"
    columns = ("stream", "observed", "factor: first version / this", "right", "off by", "90 % coverage", "pinball")
    table = Table(*columns, title=title)
    for name, observed, truth, right in STREAMS:
        found: dict[int, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
        for seed in range(repeats):
            for count, arm, result in measure_stream(observed, truth, seed):
                found[count][arm].append(result)
        for count, arms in found.items():
            factors = [np.log([one["factor"] for one in scores]) for scores in arms.values()]
            table.add_row(
                name, str(count), " / ".join(f"{np.exp(one.mean()):.2f}" for one in factors[1:]), right,
                " / ".join(f"{one.std():.2f}" for one in factors[1:]),
                *(" / ".join(f"{np.mean([one[key] for one in scores]):{form}}" for scores in arms.values())
                  for key, form in (("coverage", ".3f"), ("pinball", ".0f"))),
            )  # fmt: skip
        table.add_section()
    console().print(table)


def show_speed() -> None:
    """Print microseconds per call, for one busy LLM beside twelve others."""
    rng = np.random.default_rng(0)
    recalibrator, now = Recalibrator(), START_S
    rows: dict[str, list[float]] = defaultdict(list)
    targets = [Target(f"llm-{number}", known=False) for number in range(13)]
    for position in range(4000):
        median = rng.normal(5, 0.6)
        raw, tokens = lognormal(median, 0.87), float(np.exp(median + rng.normal(0, 0.6)) + 1)
        target = targets[0] if position % 2 else targets[position // 2 % 13]
        times = [time.thread_time()]
        recalibrator.correct(EDGES, raw, target)
        times.append(time.thread_time())
        recalibrator.observe(EDGES, raw, target, tokens, False, now)
        times.append(time.thread_time())
        for name, seconds in zip(("correct", "observe"), np.diff(times), strict=True):
            rows[name].append(1e6 * float(seconds))
        now += STEP_S
    table = Table(
        "call", "median", "mean", "90 %", "99 %", title="microseconds of CPU time, the later half of 4000 calls"
    )
    for name, seconds in rows.items():
        later = np.array(seconds[2000:])
        figures = (np.median(later), later.mean(), *np.quantile(later, [0.9, 0.99]))
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", help="parquet file of answers' lengths, many LLMs on the same prompts")
    parser.add_argument("--reasoning", help="parquet file of the same form, of LLMs that reason")
    parser.add_argument("--seeds", type=int, default=4, help="times that LLMs are held out, a third each time")
    parser.add_argument("--repeats", type=int, default=10, help="times that each made-up stream is drawn")
    options: Any = parser.parse_args(arguments)
    show_speed()
    show_streams(options.repeats)
    if options.reasoning:
        show_reasoning(options.reasoning)
    show_llms(measure_llms(options.lengths, options.seeds))


if __name__ == "__main__":
    main()
