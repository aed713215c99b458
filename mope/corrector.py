"""From a raw prediction to the corrected one: the one way there is, in Python, in vLLM and in SGLang.

A raw prediction is what the network made of a request, on the predictor's own grid. What is added here is what is
believed of LLMs that the predictor does not know, and what finished requests taught. The front end of a server carries
raw predictions to the process that sees requests finish, and both correct with this class.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from math import exp, inf, log
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mope import artifact
from mope.grid import Array, cdf_at
from mope.prediction_batch import LEAST_TAIL_INDEX, MOST_TAIL_INDEX, TAIL_SHARE
from mope.recalibration import Recalibrator
from mope.time_periods import Target

if TYPE_CHECKING:
    from mope.config import PredictorConfig
    from mope.request import Request

EFFORTS = ("", "minimal", "low", "medium", "high", "xhigh")  # of thinking, as parts of a mode
HIGH = 0.9  # the level of `Expected.high`
MAX_TARGETS = 4096  # ways of asking LLMs that are remembered
MOST_DIGITS = 18  # of a thinking budget that is read
SMALL, LARGE = 15.0, 60.0  # billions of parameters: borders of the size classes


class Answering(NamedTuple):
    """Which LLM answers a request, and how it is asked: all that its correction depends on.

    Attributes:
        llm: the LLM's name as it was read, empty without one.
        family: its family, empty if unknown.
        kind: its size class and whether it reasons, see `kind_of`; empty if nothing is known.
        mode: how it is asked, such as `"thinking+high"` or `"tools+json"`.
        known: the predictor was trained on answers of this LLM.
        thinking_budget: cap on the tokens of its thoughts, None without one.
        fallback: the network was not asked: the raw prediction is the distribution of the training answers.
    """

    llm: str = ""
    family: str = ""
    kind: str = ""
    mode: str = ""
    known: bool = True
    thinking_budget: int | None = None
    fallback: bool = False

    def write(self) -> str:
        """As one short text; `read` gives the same."""
        texts = (part.replace("|", "-") for part in (self.llm, self.family, self.kind, self.mode))
        return "|".join((*texts, "01"[self.known], str(self.thinking_budget or ""), "01"[self.fallback]))

    @classmethod
    def read(cls, text: str) -> Answering | None:
        """From what `write` gave; None if it is anything else."""
        parts = text.split("|")
        if len(parts) != len(cls._fields):
            return None
        llm, family, kind, mode, known, budget, fallback = parts
        if (
            known not in ("0", "1")
            or fallback not in ("0", "1")
            or not (budget == "" or (budget.isdecimal() and len(budget) <= MOST_DIGITS))
        ):
            return None
        return cls(llm, family, kind, mode, known == "1", int(budget) if budget else None, fallback == "1")


class Expected(NamedTuple):
    """What is expected of an answer, in tokens, with the request's cap applied.

    Attributes:
        mean: expected length.
        high: what nine of ten such answers do not exceed.
    """

    mean: float
    high: float


def as_carried(cumulative_E: Array) -> Array:
    """A raw prediction in the precision in which it is carried from process to process, read-only: float32 is exact."""
    carried: Array = cumulative_E.astype(np.float32).astype(np.float64)
    carried.setflags(write=False)
    return carried


def kind_of(size: float | None, reasoning: bool) -> str:
    """The class of an LLM whose family is unknown: by its size in billions of parameters, and whether it reasons."""
    by_size = "" if size is None else "small" if size < SMALL else "medium" if size < LARGE else "large"
    return f"{by_size} reasoning".lstrip() if reasoning else by_size


def mode_of(request: Request) -> str:
    """How an LLM is asked, as far as that changes what it answers."""
    thinks = request.thinking
    if thinks is None and request.effort is not None:
        thinks = request.effort > 0
    thinking = "" if thinks is None else "thinking" if thinks else "no thinking"
    effort = EFFORTS[round(request.effort)] if request.effort and thinks else ""
    output = "" if not request.response_format else "json" if "json" in request.response_format else "format"
    return "+".join(part for part in (thinking, effort, "tools" if request.tools else "", output) if part)


class Corrector:
    """Corrects raw predictions of one predictor, and learns from finished requests. Safe to use from many threads.

    Args:
        config: of the predictor.
        learned: what was learned before, see `Recalibrator.to_json`; None for nothing.

    Attributes:
        edges: the grid of raw predictions in tokens, shape (E,).
        tail_index: Pareto index of lengths beyond what was predicted.
        recalibrator: what finished requests taught.

    Raises:
        ArtifactError: `learned` cannot be read.
    """

    def __init__(self, config: PredictorConfig, learned: Mapping[str, object] | None = None) -> None:
        self.edges: Array = np.asarray(config.edges, dtype=np.float64)
        self.edges.flags.writeable = False
        self.tail_index = config.tail_index
        self.recalibrator = Recalibrator(config.unknown_llms)
        if learned is not None:
            self.recalibrator.restore(learned)
        self._unseen_modes = frozenset(config.unknown_llms) - {""}
        self._log_edges: Array = np.log(self.edges)
        self._integral = _SurvivalIntegral(self.edges)
        self._targets: dict[Answering, Target] = {}
        self._power = min(max(self.tail_index, LEAST_TAIL_INDEX), MOST_TAIL_INDEX) - 1.0

    @classmethod
    def load(cls, name_or_path: str | Path) -> Corrector:
        """For the predictor of a name, a folder or a Hub id. Reads its config alone, without any network.

        Raises:
            ArtifactError: there is none, or its config cannot be read.
        """
        return cls(artifact.read_config(artifact.find(name_or_path)))

    def correct(self, raw_E: Array, answering: Answering) -> tuple[Array, Array]:
        """The corrected distribution. Some ten microseconds; a millisecond or a few when an LLM is seen first.

        Args:
            raw_E: predicted cumulative probabilities at `edges`, shape (E,).
            answering: who answers, and how it is asked.

        Returns:
            Edges and cumulative probabilities. The edges are `edges` themselves, or more follow above them.
        """
        target = self._target(answering)
        edges, cumulative = self.recalibrator.correct(self.edges, raw_E, target, self._log_edges)
        budget = answering.thinking_budget
        if budget is None or "thinking" not in self._unseen_modes:
            return edges, cumulative
        modes = answering.mode.split("+")
        if "thinking" not in modes:
            return edges, cumulative
        # what it would answer without thoughts, and at most the budget of them; the network knows nothing of either
        modes.remove("thinking")
        plain = self._target(answering._replace(mode="+".join(modes)))
        shorter_edges, shorter = self.recalibrator.correct(self.edges, raw_E, plain, self._log_edges)
        bound = cdf_at(shorter_edges, np.broadcast_to(shorter, (len(edges), len(shorter))), edges - budget)
        return edges, np.maximum(cumulative, np.where(edges > budget, bound, 0.0))

    def expected(self, raw_E: Array, answering: Answering, max_tokens: float | None = None) -> Expected:
        """Mean and 90 % quantile of the corrected distribution: those of `LengthPrediction`, five times as quick.

        Args:
            raw_E: predicted cumulative probabilities at `edges`, shape (E,).
            answering: who answers, and how it is asked.
            max_tokens: the request's cap; None without one.
        """
        edges, cumulative = self.correct(raw_E, answering)
        integral = self._integral if edges is self.edges else _SurvivalIntegral(edges)
        cap = inf if max_tokens is None else float(max_tokens)
        tail_start = integral.quantile(cumulative, 1.0 - TAIL_SHARE)
        beyond = 1.0 - max(cap / tail_start, 1.0) ** -self._power if cap < inf else 1.0
        tail = TAIL_SHARE * tail_start / self._power * beyond
        return Expected(
            integral.up_to(cumulative, min(tail_start, cap)) + tail, min(integral.quantile(cumulative, HIGH), cap)
        )

    def observe(
        self,
        raw_E: Array,
        answering: Answering,
        tokens: float,
        *,
        censored: bool,
        time_s: float | None = None,
        client: str | None = None,
    ) -> bool:
        """Learn from a finished request, see `Recalibrator.observe`.

        Args:
            raw_E: what was predicted for it, before any correction.
            answering: who answered, and how it was asked.
            tokens: that were generated.
            censored: the answer was cut: its true length is at least that.
            time_s: when, in seconds since 1970; now if None.
            client: name of the client; None learns everything.

        Returns:
            Whether it was learned.

        Raises:
            DataError: fewer than 1 token, a time that is not one, or no distribution.
        """
        return self.recalibrator.observe(
            self.edges,
            raw_E,
            self._target(answering),
            tokens,
            censored,
            time_s,
            client=client,
            log_edges=self._log_edges,
        )

    def _target(self, answering: Answering) -> Target:
        """What corrections are kept apart by. The fallback is another distribution and has its own."""
        kept = self._targets.get(answering)
        if kept is not None:
            return kept
        mode = answering.mode
        # of a known LLM, too, the predictor never saw what it answers when asked like this
        known = answering.known and (not mode or self._unseen_modes.isdisjoint(mode.split("+")))
        if answering.fallback:
            mode = f"fallback {mode}".rstrip()
        if len(self._targets) >= MAX_TARGETS:
            self._targets.clear()
        target = self._targets[answering] = Target(answering.llm, mode, answering.family, known, answering.kind)
        return target


class _SurvivalIntegral:
    """Means and quantiles of single distributions on one grid, in a few microseconds each.

    The arithmetic is that of `mope.grid.survival_integral` and `mope.grid.quantiles_at`, for one row.

    Args:
        edges: of the grid in tokens, shape (E,).
    """

    def __init__(self, edges: Array) -> None:
        a, b = edges[:-1], edges[1:]
        self._edges = edges.tolist()
        self._width = np.log(b / a)
        # over a whole bin the integral is (b - a) - low * (b - a - high_share) - high * high_share
        self._high: Array = (b * (self._width - 1) + a) / self._width
        self._weights = b - a - self._high  # of the cumulative probability at an edge with whole bins on both sides
        self._weights[1:] += self._high[:-1]

    def quantile(self, cumulative: Array, level: float) -> float:
        """The length that a share `level` stays under."""
        right = min(max(int(cumulative.searchsorted(level)), 1), len(self._edges) - 1)
        low, high = float(cumulative[right - 1]), float(cumulative[right])
        share = min(max((level - low) / max(high - low, 1e-12), 0.0), 1.0)
        return float(self._edges[right - 1] * exp(share * float(self._width[right - 1])))

    def up_to(self, cumulative: Array, end: float) -> float:
        """E[min(length, end)]."""
        edges = self._edges
        if end <= edges[0]:
            return end
        end = min(end, edges[-1])
        n = bisect_left(edges, end) - 1
        a, low, high = edges[n], float(cumulative[n]), float(cumulative[n + 1])
        whole = a - float(cumulative[:n] @ self._weights[:n]) - (low * float(self._high[n - 1]) if n else 0.0)
        part = (end - a) * (1 - low) - (high - low) * (end * (log(end / a) - 1) + a) / float(self._width[n])
        return float(whole + part)
