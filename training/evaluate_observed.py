"""What a predictor is worth on each public set before and after it has observed answers: `mope evaluate --observe`.

A server starts without having seen its LLMs' answers, and learns from those that finish. Both are measured here, next
to constants per LLM. No training row is observed. Rows with several sampled answers count once per sample. Trains
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mope import metrics
from mope.console import progress
from mope.corrector import Corrector
from mope.errors import DataError
from mope.grid import Array, quantiles_at
from mope.prediction import LengthPrediction
from mope.predictor import LengthPredictor
from mope.training.data.table import RowTable

LEVELS = np.array([0.5, 0.9])
MIN_TAU_ROWS = 5  # test rows that an LLM needs for a rank correlation of its own
MIN_TASK_ROWS = 20
BATCH_ROWS = 512
START_S = 1_700_000_000.0  # time of the first observation: any, as long as it is the same in every run
NUM_SAMPLES = 1000

Positions = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Part:
    """Rows of one set: those to test on, with the single answers that are the truth, and those to observe.

    What is observed was not trained on: a predictor knows its training rows too well, and would take itself for surer
    than it is. So the test rows fall into two halves by prompt, and each is predicted after answers of the other half
    and of the validation rows.

    Attributes:
        test: rows whose answer was not cut off.
        train: rows of the constants.
        fresh: rows to draw observed answers from: test and validation rows.
        half_T: the half of each row of `test`, shape (rows,): 0 or 1.
        half_F: the half of each row of `fresh`, shape (rows,): 0 or 1, or -1 for validation rows.
        row_S: row of each answer of `test`, shape (answers,).
        tokens_S: their lengths, shape (answers,).
    """

    test: RowTable
    train: RowTable
    fresh: RowTable
    half_T: Positions
    half_F: Positions
    row_S: Positions
    tokens_S: Array

    @classmethod
    def of(cls, test: RowTable, train: RowTable, validation: RowTable, seed: int = 0) -> Part:
        """From the rows of a set, cut answers left out of the test."""
        groups, group_R = np.unique(test.groups, return_inverse=True)
        half_R = (np.random.default_rng([seed, 2]).permutation(len(groups)) % 2)[group_R]
        known = test.take(~test.censored)
        answers = answers_of(known)
        lengths = [len(each) for each in answers]
        tokens = [np.asarray(each, dtype=np.float64) for each in answers]
        return cls(
            test=known,
            train=train,
            fresh=RowTable(pa.concat_tables([test.table, validation.table])),
            half_T=half_R[~test.censored],
            half_F=np.concatenate([half_R, np.full(len(validation), -1)]),
            row_S=np.repeat(np.arange(len(answers)), lengths),
            tokens_S=np.concatenate([np.empty(0), *tokens]),
        )

    @property
    def has_samples(self) -> bool:
        """Whether rows have several answers."""
        return len(self.tokens_S) > len(self.test)


class Lesson(NamedTuple):
    """An answer to observe.

    Attributes:
        prediction: what was predicted for it.
        tokens: its length.
        censored: it was cut off.
    """

    prediction: LengthPrediction
    tokens: int
    censored: bool


def answers_of(table: RowTable) -> list[Sequence[int]]:
    """Lengths of the answers of each row: its samples, or the one that it has."""
    samples = table.table["samples"].to_pylist()
    return [each or (int(label),) for each, label in zip(samples, table.response_tokens, strict=True)]


def evaluate_observed(
    predictor: LengthPredictor, rows: RowTable, observe: Sequence[int], *, samples: int = NUM_SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Evaluate a predictor on each set of some rows, cold and after observed answers.

    Args:
        predictor: what it learned while serving is left out.
        rows: of all splits, see `Part`.
        observe: numbers of answers per LLM, of some LLMs there are fewer; 0, without any, is always measured.
        samples: bootstrap samples.
        seed: of the draw of observed answers.

    Returns:
        A dictionary per set, by its name (`"all"` for rows that name none), see `evaluate_part`; sets with fewer than
        two test rows are left out.
    """
    names = [name or "all" for name in rows.strings("dataset")]
    tables = {split: rows.split(split) for split in ("test", "train", "validation")}
    named = {split: np.array([name or "all" for name in table.strings("dataset")]) for split, table in tables.items()}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        own = {split: table.take(named[split] == name) for split, table in tables.items()}
        part = Part.of(own["test"], own["train"], own["validation"], seed)
        if len(part.test) > 1:
            found[name] = evaluate_part(predictor, part, observe, name=name, samples=samples, seed=seed)
    if not found:
        raise DataError("no set has two test rows with a complete answer; give more data")
    return found


def evaluate_part(
    predictor: LengthPredictor, part: Part, observe: Sequence[int], *, name: str, samples: int, seed: int
) -> dict[str, Any]:
    """Evaluate a predictor on the rows of one set.

    Returns:
        `num_rows`, `num_answers`, `num_llms`; `states`: a dictionary per number of observed answers with `mae` (of the
        median against single answers), `kendall_tau` over all rows, `kendall_tau_within_llm` (mean over LLMs, weighted
        by rows), `coverage_90` (share of answers up to the 90 % quantile), and `observed_constant_mae` (of the median
        of the observed answers of each LLM) and `mean_observed` (answers of its LLM that were observed before a test
        row, mean over the rows); `constant_mae`: of the median training row of each LLM; where rows have
        samples `constant_by_task_mae`; `by_task`: rows, `mae` and `kendall_tau_within_llm` of the last state.
    """
    llms = np.array(part.test.strings("target_llm"))
    drawn = [_drawn(part, half, max(observe, default=0), seed) for half in (0, 1)]
    chosen = sorted({row for own in drawn for rows in own.values() for row in rows})
    observed = part.fresh.take(np.array(chosen, dtype=np.int64))
    predictions = list(_predictions(predictor, part.test, f"predicting {name}"))
    to_observe = list(_predictions(predictor, observed, f"predicting rows of {name} to observe"))
    lengths, cut = _one_answer(observed, seed), observed.censored
    lessons = {
        row: Lesson(prediction, length, bool(censored))
        for row, prediction, length, censored in zip(chosen, to_observe, lengths, cut, strict=True)
    }
    groups_S = part.test.groups[part.row_S]
    constant = _constants(part, [part.test.strings("target_llm")], [part.train.strings("target_llm")])
    result: dict[str, Any] = {
        "num_rows": len(part.test),
        "num_answers": len(part.tokens_S),
        "num_llms": len(set(llms)),
        "median_tokens": float(np.median(part.tokens_S)),
        "constant_mae": _mae(part, constant),
        "states": {},
    }
    if part.has_samples:
        names = ("task", "target_llm")
        by_task = _constants(part, *([table.strings(name) for name in names] for table in (part.test, part.train)))
        result["constant_by_task_mae"] = _mae(part, by_task)
    for number in sorted({0, *observe}):
        quantiles_NL = np.empty((len(part.test), len(LEVELS)))
        told, counts = np.empty(len(part.test)), np.zeros(len(part.test), dtype=np.int64)
        for half in (0, 1):
            mine = np.flatnonzero(part.half_T == half)
            corrector, seen = _taught(predictor, drawn[half], lessons, number)
            quantiles_NL[mine] = _quantiles(corrector, [predictions[row] for row in mine])
            everything = [token for tokens in seen.values() for token in tokens]
            medians = {llm: float(np.median(tokens)) for llm, tokens in seen.items() if tokens}
            told[mine] = [medians.get(llm, np.median(everything) if everything else np.nan) for llm in llms[mine]]
            counts[mine] = [len(seen.get(llm, ())) for llm in llms[mine]]
        state = _state(part, quantiles_NL, llms, groups_S, samples)
        if number:
            if not np.isnan(told).any():
                state["observed_constant_mae"] = _mae(part, told)
            state["mean_observed"] = float(counts.mean())
        state["mae_over_constant"] = state["mae"] / result["constant_mae"] if result["constant_mae"] else 0.0
        result["states"][str(number)] = state
    result["by_task"] = _by_task(part, quantiles_NL[:, 0], llms)
    return result


def _drawn(part: Part, half: int, most: int, seed: int) -> dict[str, list[int]]:
    """Fresh rows to observe of each LLM before one half is predicted, in the order in which they are.

    Where rows have samples, the tasks come as often as in the test rows: a server observes the traffic that it
    predicts, and CASTILLO's other rows are another mixture. Of other sets, a task may tell of the answer.
    """
    rng = np.random.default_rng([seed, half])
    shares = Counter(part.test.strings("task"))
    llms, tasks = np.array(part.fresh.strings("target_llm")), part.fresh.strings("task")
    found: dict[str, list[int]] = {}
    for llm in sorted(set(llms.tolist())) if most else ():
        rows = rng.permutation(np.flatnonzero((llms == llm) & (part.half_F != half))).tolist()
        if part.has_samples:
            seen: Counter[str] = Counter()
            turns: dict[int, float] = {}
            for row in rows:
                seen[tasks[row]] += 1
                turns[row] = (seen[tasks[row]] - 0.5) / max(shares[tasks[row]], 1e-9)
            rows.sort(key=turns.__getitem__)
        found[llm] = rows[:most]
    return found


def _one_answer(observed: RowTable, seed: int) -> list[int]:
    """The answer of each row that a server would have seen: one sample of several."""
    rng = np.random.default_rng([seed, 1])
    return [int(answers[int(rng.integers(len(answers)))]) for answers in answers_of(observed)]


def _predictions(predictor: LengthPredictor, table: RowTable, description: str) -> Iterator[LengthPrediction]:
    requests = table.requests()
    with progress(description, len(requests)) as advance:
        for start in range(0, len(requests), BATCH_ROWS):
            batch = requests[start : start + BATCH_ROWS]
            yield from predictor.predict_batch(batch)
            advance(len(batch))


def _taught(
    predictor: LengthPredictor, drawn: Mapping[str, Sequence[int]], lessons: Mapping[int, Lesson], number: int
) -> tuple[Corrector, dict[str, list[int]]]:
    """A corrector that has seen `number` answers of each LLM, all LLMs in turn, and their lengths."""
    corrector = Corrector(predictor.config)
    seen: dict[str, list[int]] = {llm: [] for llm in drawn}
    time_s = START_S
    for turn in range(number):
        for llm, rows in drawn.items():
            if turn >= len(rows):
                continue
            time_s += 1.0
            prediction, tokens, censored = lessons[rows[turn]]
            if prediction.raw_cumulative is None or prediction.answering is None:
                continue
            corrector.observe(prediction.raw_cumulative, prediction.answering, tokens, censored=censored, time_s=time_s)
            seen[llm].append(tokens)
    return corrector, seen


def _quantiles(corrector: Corrector, predictions: Sequence[LengthPrediction]) -> Array:
    """Corrected quantiles at `LEVELS` of each prediction, the request's cap applied, shape (rows, levels)."""
    quantiles = np.empty((len(predictions), len(LEVELS)))
    for row, prediction in enumerate(predictions):
        if prediction.raw_cumulative is None or prediction.answering is None:
            raise DataError("a prediction without its raw distribution can't be corrected")
        edges, cumulative = corrector.correct(prediction.raw_cumulative, prediction.answering)
        cap = np.inf if prediction.max_tokens is None else prediction.max_tokens
        quantiles[row] = np.minimum(quantiles_at(edges, cumulative[None], LEVELS)[0], cap)
    return quantiles


def _state(
    part: Part, quantiles_NL: Array, llms: npt.NDArray[np.str_], groups_S: npt.NDArray[np.int64], samples: int
) -> dict[str, Any]:
    labels, predicted = part.test.response_tokens, quantiles_NL[:, 0]
    error_S = np.abs(predicted[part.row_S] - part.tokens_S)
    below_S = part.tokens_S <= quantiles_NL[part.row_S, 1]
    (mae_ci, coverage_ci) = metrics.bootstrap_means(np.stack([error_S, below_S], axis=1), groups_S, num_samples=samples)
    tau_ci = metrics.bootstrap(
        lambda rows: {"tau": metrics.ranking(labels[rows], predicted[rows])},
        part.test.groups,
        num_samples=min(samples, metrics.NUM_RANK_SAMPLES),
    )["tau"]
    return {
        "mae": float(error_S.mean()),
        "mae_ci": mae_ci,
        "kendall_tau": metrics.ranking(labels, predicted),
        "kendall_tau_ci": tau_ci,
        "kendall_tau_within_llm": _tau_within(labels, predicted, llms),
        "coverage_90": float(below_S.mean()),
        "coverage_90_ci": coverage_ci,
    }


def _tau_within(labels: npt.ArrayLike, predicted: Array, llms: npt.NDArray[np.str_]) -> float:
    """Mean of Kendall's tau-b over the rows of each LLM, weighted by rows; 0.0 where no LLM has enough of them."""
    labels = np.asarray(labels)
    taus, sizes = [], []
    for llm in sorted(set(llms.tolist())):
        rows = np.flatnonzero(llms == llm)
        if len(rows) >= MIN_TAU_ROWS:
            taus.append(metrics.ranking(labels[rows], predicted[rows]))
            sizes.append(len(rows))
    return float(np.average(taus, weights=sizes)) if taus else 0.0


def _constants(part: Part, test: Sequence[Sequence[str]], train: Sequence[Sequence[str]]) -> Array:
    """The median training answer with the same labels as each test row; that of all rows where there is none."""
    lengths: dict[tuple[str, ...], list[int]] = {}
    known = ~part.train.censored
    answers = answers_of(part.train)
    for row, labels in enumerate(zip(*train, strict=True)):
        if known[row]:
            lengths.setdefault(labels, []).extend(answers[row])
    everything = [length for each in lengths.values() for length in each]
    fallback = float(np.median(everything)) if everything else 0.0
    medians = {labels: float(np.median(each)) for labels, each in lengths.items()}
    return np.array([medians.get(labels, fallback) for labels in zip(*test, strict=True)])


def _mae(part: Part, predicted: Array) -> float:
    return float(np.abs(predicted[part.row_S] - part.tokens_S).mean())


def _by_task(part: Part, predicted: Array, llms: npt.NDArray[np.str_]) -> dict[str, Any]:
    """Errors and rank correlation of each part of a set, the largest first; small parts are left out."""
    tasks = np.array(part.test.strings("task"))
    names, sizes = np.unique(tasks, return_counts=True)
    labels = part.test.response_tokens
    found = {}
    for name, size in sorted(zip(names.tolist(), sizes.tolist(), strict=True), key=lambda one: (-one[1], one[0])):
        if name and size >= MIN_TASK_ROWS:
            rows = np.flatnonzero(tasks == name)
            mine = np.isin(part.row_S, rows)
            found[name] = {
                "num_rows": size,
                "mae": float(np.abs(predicted[part.row_S] - part.tokens_S)[mine].mean()),
                "kendall_tau_within_llm": _tau_within(labels[rows], predicted[rows], llms[rows]),
            }
    return found
