"""Learning while serving: correcting shift, slope, spread and shape of predictions per target LLM.

Turns finished requests into counts (`mope.time_periods`) and counts into corrections (`mope.shift_fit`).
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log
from threading import Lock
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from mope.errors import ArtifactError, ConfigError, DataError
from mope.forking import after_fork
from mope.grid import Array
from mope.lessons import Lessons, Verdict
from mope.shift_fit import (
    BIN,
    CENTRES_R,
    EDGES_R,
    LOW,
    NUM_BINS,
    NUM_X,
    SPREAD_PRIOR,
    X_BIN,
    X_LOW,
    Correction,
    Counts,
    Prior,
    bump,
    distribution,
    fit,
    num_alike,
    pooled_shape,
)
from mope.time_periods import MAX_NEWEST, PeriodCounts, Target, TimePeriods, checked_time

VERSION = 4
READABLE = (2, 3, 4)  # version 2 lacks the kinds of LLMs and the pools, 3 lacks lessons by client
MAX_DERIVED = 2048  # targets whose corrections are kept ready
LONGEST = 131_072.0  # tokens of an answer: what claims to be longer counts as that
WINDOW = 400.0  # the newest observations of a target that count
PATIENCE = 4.0  # evidence in log units above which older observations are taken for those of another LLM
UNIT = 2**20  # predicted probabilities are summed as multiples of 1 / UNIT

# scale of the shift's prior: for LLMs that the predictor was trained on, others, and around each factor that is given
KNOWN_WIDTH, UNKNOWN_WIDTH, GIVEN_WIDTH = 0.15, 0.35, 0.15
TRAINED_COUNT = 4.0  # what the training rows of a known LLM count beside what its relatives were seen to do
MAX_RELATIVES = 12
POOL_WEIGHT = 4.0  # relatives that a pool of LLMs stands for
MAX_SAME_LLM = 12  # modes of asking the same LLM that are looked at
RELATIVE_COUNT = 10.0  # observations at which a relative counts half
HIGH = 0.99  # level of the quantile above which a length is far longer than predicted
NUM_CODES = 2 * NUM_X * NUM_BINS
NUM_SLOTS = 32  # kinds of clients' names, by their hash, whose lessons are told apart
NUM_SUMS = NUM_BINS + NUM_SLOTS  # numbers that are summed: expected residuals, and lessons by slot
_TYPICAL = np.exp(-0.5 * (CENTRES_R / 0.8) ** 2)  # expected residuals before any prediction is seen

_logger = logging.getLogger("mope")

# for LLMs that the predictor does not know: mode -> pairs of a factor on the length and its weight
UnknownPrior = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class TargetSummary:
    """What was learned about one target.

    Attributes:
        target: which one.
        observations: how many are kept.
        window: how many of them count at present.
        last_s: end of the period of the newest one, in seconds since 1970.
        factor: corrected over predicted median, at the usual predicted median.
        slope: how many times as strongly answers depend on the prompt as predicted.
        spread: factor by which they scatter more than predicted.
        coverage_raw: share of them that lay below the predicted 90 % quantile.
        coverage: share of them that lay below the 90 % quantile as it is corrected now.
    """

    target: Target
    observations: int
    window: float
    last_s: int
    factor: float
    slope: float
    spread: float
    coverage_raw: float
    coverage: float


@dataclass(frozen=True, slots=True, eq=False)
class _Derived:
    """What is applied to a target's predictions, None for nothing, and when it has to be worked out anew."""

    correction: Correction | None
    own: int  # observations of the target that were made before
    expires: int  # observations of all targets after which relatives may have changed


class _Profile(NamedTuple):
    """What relatives of a target learn from it, worked out without relatives of its own."""

    own: int  # observations of it that were made before
    total: float
    shift: float
    log_spread: float
    shape: Array


class Recalibrator:
    """Corrections learned from pairs of a prediction and a true length. Safe to use from many threads.

    Its memory and the time that it takes are bounded, however many LLMs are named: see `mope.time_periods.TimePeriods`.

    Merging replicas is exactly observing in one place: what is kept is a function of the set of observations, whatever
    their order and wherever they were made. The same holds once the bounds are passed. Where observations name their
    clients, it is a function of those that were learned: each replica decides by itself what one client may teach it.

    A correction rests on the newest `WINDOW` observations of its target, fewer if older ones tell of another LLM. Its
    prior comes from relatives: other modes of the same LLM, its family, then all others. `observe` works it out anew
    after every observation of its target at first, then whenever there are an eighth more, and at least after 50; for
    news of relatives, less often. `to_json` and `merge` make all of them be worked out anew, so that what is restored
    goes on exactly like what was saved.

    Args:
        unknown_llms: how many times longer than predicted LLMs may answer that the predictor does not know: pairs of a
            factor and its weight per mode, `""` for any other mode. None if predictions are believed for them too.

    Attributes:
        num_clamped: observations since the start that were longer than `LONGEST` and count as that long.
        num_refused: observations that were not learned, because their client has more than its share of the newest.
        num_clipped: observations that count as shorter, because other clients have far fewer of this length.

    Raises:
        ConfigError: a factor or weight that is not positive.
    """

    def __init__(self, unknown_llms: UnknownPrior | None = None) -> None:
        self.unknown_llms = {
            mode: tuple((float(f), float(w)) for f, w in pairs) for mode, pairs in (unknown_llms or {}).items()
        }
        for mode, pairs in self.unknown_llms.items():
            if not pairs or not all(0 < number < inf for pair in pairs for number in pair):
                raise ConfigError(f"prior of mode {mode!r}: got {list(pairs)}; expected pairs (factor > 0, weight > 0)")
        self.num_clamped = self.num_refused = self.num_clipped = 0
        self._lessons = Lessons()
        self._lock = Lock()
        self._periods = TimePeriods()
        self._forget_derived()
        after_fork(self._renew_lock)

    def _renew_lock(self) -> None:
        """In the child of a fork: what was observed stays, what another thread may have been at work on goes."""
        self._lock = Lock()
        self._forget_derived()

    def _forget_derived(self) -> None:
        self._derived: dict[Target, _Derived] = {}
        self._profiles: dict[Target, _Profile] = {}
        self._expired: dict[Target, None] = {}
        self._own_seen: dict[Target, int] = {}
        self._newest: dict[str | None, tuple[int, list[Target]]] = {}
        self._seen = 0

    def __len__(self) -> int:
        """How many observations are kept."""
        with self._lock:
            return self._periods.num_observations()

    def observe(
        self,
        edges: Array,
        raw_cumulative: Array,
        target: Target,
        actual_tokens: float,
        censored: bool,
        time_s: float | None = None,
        *,
        client: str | None = None,
        log_edges: Array | None = None,
    ) -> bool:
        """Learn from one finished request. O(1): about 20 µs, and a millisecond where a correction is worked out anew.

        Args:
            edges: edges of the prediction's grid in tokens.
            raw_cumulative: the predicted distribution before any correction from here.
            target: who answered.
            actual_tokens: tokens that were generated. More than `LONGEST`, or the last edge, count as that many.
            censored: the answer was cut (aborted, or its cap was hit): its true length is at least that.
            time_s: when, in seconds since 1970; now if None.
            client: name of the client; `mope.lessons` then bounds how far this client moves the others' predictions.
                None learns everything.
            log_edges: logarithms of the edges, where they are at hand.

        Returns:
            False if it was not learned, because the client has more than its share of the newest observations.

        Raises:
            DataError: fewer than 1 token, a time that is not one, or no distribution.
        """
        if not 1 <= actual_tokens < inf:
            raise DataError(f"an observed answer has at least 1 token; got {actual_tokens!r}")
        time_s = checked_time(time.time() if time_s is None else time_s)
        if log_edges is None:
            log_edges = np.log(edges)
        log_median = _log_quantile(log_edges, raw_cumulative)
        reached = np.interp(log_median + EDGES_R, log_edges, raw_cumulative)
        reached[0], reached[-1] = 0.0, 1.0
        sums = np.zeros(NUM_SUMS, np.int64)
        sums[:NUM_BINS] = expected = np.rint(UNIT * np.diff(reached))
        if not (expected.min() >= 0 and abs(int(expected.sum()) - UNIT) <= NUM_BINS):
            raise DataError("observe needs cumulative probabilities that rise from 0 to 1; got others")
        told, actual_tokens = actual_tokens, min(actual_tokens, max(float(edges[-1]), LONGEST))
        row = min(max(int((log_median - X_LOW) / X_BIN), 0), NUM_X - 1)
        residual = log(actual_tokens) - log_median
        with self._lock:
            if client is not None:
                high = self._high(target, log_edges, raw_cumulative, log_median)
                # a cut answer says that its length is above `residual`, by how much is not known
                is_long = residual > (high - log(2.0) if censored else high)
                verdict = self._lessons.admit(target, client, time_s, is_long=is_long)
                if verdict is Verdict.REFUSE:
                    self.num_refused += 1
                    return False
                if verdict is Verdict.CLIP:
                    self.num_clipped += 1
                    residual, censored = min(residual, high), False
                sums[NUM_BINS + crc32(client.encode("utf-8", "surrogatepass")) % NUM_SLOTS] = 1
            column = min(max(int((residual - LOW) / BIN), 0), NUM_BINS - 1)
            self._periods.add(target, time_s, (int(censored) * NUM_X + row) * NUM_BINS + column, sums)
            if told > actual_tokens:
                self._count_clamped(told, actual_tokens)
            self._seen += 1
            own = self._own_seen[target] = self._own_seen.get(target, 0) + 1
            derived = self._derived.get(target)
            if derived is not None and own - derived.own >= min(max(own // 8, 1), 50):
                self._derive(target)
            elif self._expired:
                self._derive(self._expired.popitem()[0])
        return True

    def correct(
        self, edges: Array, raw_cumulative: Array, target: Target, log_edges: Array | None = None
    ) -> tuple[Array, Array]:
        """The corrected distribution; unchanged before any observation, unless the target has a prior.

        Takes about 10 µs and no lock; a millisecond or a few when a target is asked for first.

        Args:
            edges: edges of the prediction's grid in tokens, shape (E,).
            raw_cumulative: predicted cumulative probabilities at the edges, shape (E,).
            target: who will answer.
            log_edges: logarithms of the edges, where they are at hand.

        Returns:
            Edges and cumulative probabilities. The edges are those given; where the target's answers may be longer than
            the last of them, more follow.
        """
        derived = self._derived.get(target)
        if derived is None:
            with self._lock:
                derived = self._derive(target)
        elif self._seen >= derived.expires:
            self._expired[target] = None  # for the next `observe`, which nobody waits for
        if derived.correction is None:
            return edges, raw_cumulative
        if log_edges is None:
            log_edges = np.log(edges)
        return derived.correction(edges, log_edges, raw_cumulative, _log_quantile(log_edges, raw_cumulative))

    def merge(self, other: Recalibrator) -> None:
        """Add what another one observed, exactly as if it had been observed here.

        Each observation must have been made in one of the two: what already went from one to the other counts twice.

        Raises:
            ConfigError: the two have different priors.
        """
        if self.unknown_llms != other.unknown_llms:
            raise ConfigError("recalibrators with different priors can't be merged; they are of different predictors")
        with other._lock:
            added = other._periods.copy()
        with self._lock:
            self._periods.merge(added)
            self._forget_derived()

    def summary(self) -> list[TargetSummary]:
        """What was learned about each target, for a dashboard; in the order of their names."""
        with self._lock:
            return [self._summary(target) for target in self._periods.targets()]

    def _summary(self, target: Target) -> TargetSummary:
        counts = self._read(self._periods.batches(target))
        learned = fit(counts, self._prior(target, self._relatives(target)))
        raw = distribution(counts.ended.sum(axis=0), counts.cut.sum(axis=0), np.diff(learned.expected) + 1e-9, 1e-6)
        predicted_90, corrected_90 = (np.interp(0.9, of, EDGES_R) for of in (learned.expected, learned.learned))
        return TargetSummary(
            target=target,
            observations=self._periods.total(target),
            window=counts.total,
            last_s=self._periods.last_s(target),
            factor=exp(learned.shift),
            slope=1.0 + learned.slope,
            spread=exp(learned.log_spread),
            coverage_raw=float(np.interp(predicted_90, EDGES_R, raw)),
            coverage=float(np.interp(corrected_90, EDGES_R, learned.observed)),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything needed to go on later, as whole numbers; the same for the same observations."""
        with self._lock:
            self._forget_derived()
            return {
                "version": VERSION,
                **self._periods.to_json(),
            }

    def restore(self, saved: Any) -> None:
        """Go on with what `to_json` wrote, exactly, in place of what was learned here.

        Raises:
            ArtifactError: it was not written by `to_json`, or by that of another version.
        """
        version = saved.get("version") if isinstance(saved, dict) else None
        if version not in READABLE:
            raise ArtifactError(
                f"recalibration.json has version {version!r}; this mope reads versions {READABLE[0]} to {VERSION}: "
                + (
                    "update mope (pip install -U mope-llm)"
                    if isinstance(version, int) and version > VERSION
                    else "save the predictor without what it had learned, by the mope that saved it"
                )
            )
        try:
            restored = TimePeriods.from_json(saved, NUM_CODES, NUM_SUMS if version == VERSION else NUM_BINS, NUM_SUMS)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = error.args[0] if isinstance(error, ValueError) else repr(error)
            raise ArtifactError(f"recalibration.json can't be read: {reason}; copy the whole folder again") from error
        with self._lock:
            self._periods = restored
            self._forget_derived()

    # what follows is called with the lock held

    def _high(self, target: Target, log_edges: Array, raw_cumulative: Array, log_median: float) -> float:
        """Log of the predicted 99 % quantile over the predicted median, moved as far as the target's median is.

        A tenth of the answers hardly moves it. They would move the corrected 99 % quantile to any length.
        """
        derived = self._derived.get(target) or self._derive(target)
        moved = derived.correction.log_factor(log_median) if derived.correction is not None else 0.0
        return _log_quantile(log_edges, raw_cumulative, HIGH) - log_median + moved

    def _count_clamped(self, told: float, longest: float) -> None:
        self.num_clamped += 1
        if self.num_clamped == 1:
            _logger.warning(
                "an answer of %g tokens was observed: it counts as one of %.0f tokens (said once, see num_clamped)",
                told,
                longest,
            )

    def _factors(self, target: Target) -> Sequence[tuple[float, float]]:
        """How many times longer than predicted an unknown LLM may answer, asked like this: factors and weights."""
        modes = target.mode.removeprefix("fallback").lstrip().split("+")
        if "reasoning" in target.kind and "no thinking" not in modes:
            modes = ["thinking", *modes]  # it thinks unless it is asked not to
        asked = next((part for part in modes if part in self.unknown_llms), "")
        return self.unknown_llms.get(asked, ())

    def _derive(self, target: Target) -> _Derived:
        while len(self._derived) >= MAX_DERIVED and target not in self._derived:
            self._forget(next(iter(self._derived)))
        counts = self._read(self._periods.batches(target))
        correction = None
        relatives = self._relatives(target)
        if counts.total or relatives or (self.unknown_llms and not target.known):
            correction = Correction(fit(counts, self._prior(target, relatives)))
        patience = min(max(self._seen // 4, 1), 64 + 16 * len(self._periods) + 4 * int(counts.total))
        derived = _Derived(correction, self._own_seen.get(target, 0), self._seen + patience)
        self._derived[target] = derived
        return derived

    def _forget(self, target: Target) -> None:
        """Make room: what was worked out for a target, not what was observed."""
        for kept in (self._derived, self._profiles, self._own_seen, self._expired):
            kept.pop(target, None)

    @staticmethod
    def _read(newest_first: Iterable[PeriodCounts]) -> Counts:
        """The observations that count at present; the last batch in part, so as to fill the window."""
        batches: list[PeriodCounts] = []
        shares: list[float] = []
        missing = WINDOW
        for batch in newest_first:
            held = float(batch.counts.sum())
            batches.append(batch)
            shares.append(min(missing / held, 1.0))
            missing -= held
            if missing <= 0:
                break
        if not batches:
            return Counts(np.zeros((NUM_X, NUM_BINS)), np.zeros((NUM_X, NUM_BINS)), _TYPICAL)
        sums = np.stack([share * batch.expected for share, batch in zip(shares, batches, strict=True)])
        expected_KR, clients_KC = sums[:, :NUM_BINS], sums[:, NUM_BINS:]
        codes = np.concatenate([batch.codes for batch in batches])
        counts = np.concatenate([share * batch.counts for share, batch in zip(shares, batches, strict=True)])
        if len(batches) > 1:
            which = np.repeat(np.arange(len(batches)), [len(batch.codes) for batch in batches])
            code = (2 * which + codes // (NUM_X * NUM_BINS)) * NUM_BINS + codes % NUM_BINS
            per_bin = np.bincount(code, counts, len(batches) * 2 * NUM_BINS).reshape(-1, 2, NUM_BINS)
            per_bin = np.maximum(per_bin, 0.0)  # the counts of what is in short periods too are taken off
            alike = num_alike(per_bin[:, 0], per_bin[:, 1], expected_KR.sum(axis=0), PATIENCE, clients_KC)
            newer = which < alike
            codes, counts, expected_KR = codes[newer], counts[newer], expected_KR[:alike]
        table = np.maximum(np.bincount(codes, counts, NUM_CODES), 0.0).reshape(2, NUM_X, NUM_BINS)
        return Counts(table[0], table[1], expected_KR.sum(axis=0))

    def _relatives(self, target: Target) -> list[tuple[float, float, _Profile]]:
        """Other targets to learn from: their weights, by how much they may differ in shift, what they are like."""
        periods = self._periods
        near = (*periods.of_llm(target.llm)[:MAX_SAME_LLM], *self._newest_of(target.family), *self._newest_of(None))
        others = [
            (*_kinship(target, other), periods.last_period(other), other)
            for other in dict.fromkeys(near)
            if other != target and _tells_of(other, target)
        ]
        # of equally near ones those that make room last, so that their profiles are worked out once
        nearest = heapq.nlargest(MAX_RELATIVES, others, key=lambda one: (one[0], one[2], one[3]))
        found = [(weight, width, self._profile(other)) for weight, width, _, other in nearest]
        for pool in periods.pools(target.family):
            if _tells_of(pool, target) and pool.mode == target.mode:
                weight, width = _kinship(target, pool)
                found.append((POOL_WEIGHT * weight, width, self._profile(pool, pooled=True)))
        return [
            (weight * profile.total / (profile.total + RELATIVE_COUNT), width, profile)
            for weight, width, profile in found
        ]

    def _newest_of(self, family: str | None) -> list[Target]:
        """Those of a family, or of all, that were observed last, as they were some observations ago at most."""
        until, found = self._newest.get(family, (-1, []))
        if self._seen > until:
            found = self._periods.newest(family)
            if len(self._newest) > MAX_DERIVED:
                self._newest.clear()
            # few are looked at anew each time, so that no answer of theirs is missed; of many the order hardly changes
            self._newest[family] = self._seen + (0 if len(found) < MAX_NEWEST else len(self._periods)), found
        return found

    def _profile(self, target: Target, *, pooled: bool = False) -> _Profile:
        own = self._seen if pooled else self._own_seen.get(target, 0)
        known = self._profiles.get(target)
        if known is not None and own - known.own < min(max(known.own // 4, 1), 100):
            return known
        batches = self._periods.pooled(target) if pooled else self._periods.batches(target)
        found = fit(self._read(batches), self._prior(target, []))
        profile = _Profile(own, found.total, found.shift, found.log_spread, found.shape())
        if len(self._profiles) > MAX_DERIVED:
            del self._profiles[next(iter(self._profiles))]
        self._profiles[target] = profile
        return profile

    def _prior(self, target: Target, relatives: Sequence[tuple[float, float, _Profile]]) -> Prior:
        pairs = () if target.known else self._factors(target)
        width = GIVEN_WIDTH if pairs else KNOWN_WIDTH if target.known else UNKNOWN_WIDTH
        pairs = pairs or [(1.0, 1.0)]
        total = sum(weight for _, weight in pairs)
        root = np.sum([weight / total * bump(log(factor), width) for factor, weight in pairs], axis=0)
        root = root * (TRAINED_COUNT if target.known and target.llm else 1.0)
        weights = [weight for weight, _, _ in relatives]
        shifts = [weight * bump(profile.shift, width) for weight, width, profile in relatives]
        spread = sum(weight * profile.log_spread for weight, _, profile in relatives)
        return Prior(
            np.sum([root, *shifts], axis=0) / (root.sum() + sum(weights)),
            (2.0 * SPREAD_PRIOR + spread) / (2.0 + sum(weights)),
            pooled_shape([profile.shape for _, _, profile in relatives], weights) if relatives else None,
        )


def _tells_of(other: Target, target: Target) -> bool:
    """Whether what another target does says anything of this one.

    Observations of an unknown LLM never change predictions for an LLM seen in training, even of the same family. They
    do change predictions for requests that name no LLM.
    """
    return other.known or not target.known or not target.llm


def _kinship(target: Target, other: Target) -> tuple[float, float]:
    """How much another target counts, and by how much in log units it may differ in shift.

    As measured between the LLMs on AlpacaEval, except for modes and kinds.
    """
    asked_alike = 1.0 if target.mode == other.mode else 0.5
    if target.llm and target.llm == other.llm:
        return 8.0, 0.5
    if target.family and target.family == other.family:
        return 8.0 * asked_alike, 0.15
    return asked_alike * (1.0 if target.kind == other.kind else 0.5), 0.2


def _log_quantile(log_edges: Array, cumulative: Array, level: float = 0.5) -> float:
    right = min(max(int(cumulative.searchsorted(level)), 1), len(cumulative) - 1)  # twice as quick as np.interp
    low, high = float(cumulative[right - 1]), float(cumulative[right])
    left = float(log_edges[right - 1])
    share = (level - low) / (high - low) if high > low else 1.0
    return left + min(max(share, 0.0), 1.0) * (float(log_edges[right]) - left)
