"""Prometheus metrics of the service, under the names that the hooks have, so that one dashboard shows both."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mope.serving_hooks.front import BOUNDS_S, OUTCOMES
from mope.serving_hooks.front_metrics import LATENCY, PREDICTIONS, PREDICTS, REQUESTS
from mope.serving_hooks.metrics import client_label, own_version, printable
from mope.serving_hooks.service.memory import Memory
from mope.serving_hooks.tallies import ERROR, OTHERS

ANYBODY = "(anonymous)"
NOT_LEARNED = ("share", "forced", "unknown")
_COUNTERS = {
    "arrived": "Requests that came.",
    "finished": "Requests that were observed.",
    "predicted": "Requests that came with a prediction.",
    "unpredicted": "Requests that got the fallback.",
    "prompt_tokens": "Tokens of prompts of observed requests, as their usage says.",
    "cached_tokens": "Those of them that a cache held.",
    "response_tokens": "Tokens that were generated.",
    "thought_tokens": "Those of mope_client_response_tokens_total that are thoughts, as their usage says.",
    "gpu_seconds": "GPU seconds of observed requests, by the profile.",
    "expected_tokens": "Response tokens that observed requests were predicted to need.",
    "covered": "Observed requests whose predicted 90 % quantile is known.",
    "within": "Those of mope_client_covered_total whose answer was no longer than that quantile.",
}


_BOOKED = {
    "reserved": "Tokens or GPU seconds that reservations held.",
    "settled_reserved": "What settled reservations had held.",
    "used": "What settled reservations took.",
}


class ServiceMetrics:
    """What is counted, in a registry of its own.

    Args:
        predictor: what the predictor is called.
        memory: whose size is shown.
        max_clients: clients with metrics of their own.
    """

    def __init__(self, predictor: str, memory: Memory, max_clients: int) -> None:
        self.registry = registry = CollectorRegistry()
        self._max_clients = max_clients
        self._labels: dict[str | None, str] = {}
        labels = {"version": own_version(), "engine": "mope serve", "rank": "0", "policy": "", "identity": "api-key"}
        Info("mope", "What runs here.", registry=registry).info({**labels, "predictor": printable(predictor)})
        Gauge(*PREDICTS, registry=registry).set(1)
        self.requests = Counter(*REQUESTS, ["kind"], registry=registry)
        self.responses = Counter("mope_front_responses", "HTTP responses by status.", ["status"], registry=registry)
        self._outcomes = Counter(*PREDICTIONS, ["outcome"], registry=registry)
        for outcome in dict.fromkeys(OUTCOMES.values()):
            self._outcomes.labels(outcome)
        self.seconds = Histogram(*LATENCY, buckets=BOUNDS_S, registry=registry)
        self.learned = Counter("mope_learned", "Finished requests that were learned from.", registry=registry)
        self.not_learned = Counter(
            "mope_not_learned",
            "Observations that were not learned from: the client has taught its `share`, it `forced` the length, or "
            "the id is `unknown` or expired.",
            ["reason"],
            registry=registry,
        )
        for reason in NOT_LEARNED:
            self.not_learned.labels(reason)
        self._clients = {
            name: Counter(f"mope_client_{name}", text, ["client"], registry=registry)
            for name, text in _COUNTERS.items()
        }
        self._ratio = Histogram(
            "mope_client_answer_ratio",
            "True by predicted response tokens, of finished requests that came with a prediction.",
            ["client"],
            buckets=ERROR,
            registry=registry,
        )
        self._decisions = Counter(
            "mope_budget_decisions",
            "Reservations: `allow`, `wait` for room, or `deny` what never fits.",
            ["client", "decision"],
            registry=registry,
        )
        self._booked = {
            name: Counter(f"mope_budget_{name}", text, ["client", "unit"], registry=registry)
            for name, text in _BOOKED.items()
        }
        self._unbooked = Counter(
            "mope_budget_unbooked", "Reservations decided without the books, which were gone.", registry=registry
        )
        registry.register(_Kept(memory))

    def _label(self, client: str | None) -> str:
        label = self._labels.get(client)
        if label is None:
            full = len(self._labels) >= self._max_clients
            label = OTHERS if full else ANYBODY if client is None else client_label(client)
            if not full:
                self._labels[client] = label
        return label

    def predicted(self, client: str | None, source: str) -> None:
        """Counts a prediction by what became of it."""
        outcome = OUTCOMES.get(source, "failed")
        label = self._label(client)
        self._outcomes.labels(outcome).inc()
        self._clients["arrived"].labels(label).inc()
        self._clients["predicted" if outcome == "made" else "unpredicted"].labels(label).inc()

    def observed(
        self,
        client: str | None,
        tokens: int,
        mean: float,
        high: float,
        *,
        made: bool,
        more: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Counts a finished request.

        Args:
            client: who asked.
            tokens: that were generated.
            mean: expected tokens.
            high: the predicted 90 % quantile.
            made: whether the predictor answered.
            more: `prompt_tokens`, `cached_tokens`, `thought_tokens` and `gpu_seconds`, as far as they are known.
        """
        label, counters = self._label(client), self._clients
        for name, amount in more.items():
            counters[name].labels(label).inc(amount)
        counters["finished"].labels(label).inc()
        counters["response_tokens"].labels(label).inc(tokens)
        counters["expected_tokens"].labels(label).inc(mean)
        if made:
            counters["covered"].labels(label).inc()
            counters["within"].labels(label).inc(tokens <= high)
            self._ratio.labels(label).observe(tokens / max(mean, 1.0))

    def reserved(self, client: str, found: Mapping[str, Any]) -> None:
        """Counts a reservation, see `Limiter.reserve`."""
        label = self._label(client)
        self._decisions.labels(label, found["decision"]).inc()
        if not found["books"]:
            self._unbooked.inc()
        elif found["decision"] == "allow" and not found["again"]:
            self._booked["reserved"].labels(label, found["unit"]).inc(found["amount"])

    def settled(self, found: Mapping[str, Any]) -> None:
        """Counts a settlement, see `Limiter.settle`."""
        if found["state"] == "already":
            return
        labels = self._label(found["client"]), found["unit"]
        self._booked["settled_reserved"].labels(*labels).inc(found["reserved"])
        self._booked["used"].labels(*labels).inc(found["used"])

    def exposed(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class _Kept:
    """Asked at each scrape."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def collect(self) -> list[Metric]:
        memory = self._memory
        lost = CounterMetricFamily(
            "mope_front_forgotten",
            "Predictions that were never observed: too old (`age`), or they made room for newer ones (`room`).",
            labels=["reason"],
        )
        lost.add_metric(["age"], memory.num_expired)
        lost.add_metric(["room"], memory.num_crowded)
        waiting = GaugeMetricFamily(
            "mope_front_unobserved", "Predictions that wait for their observation.", value=len(memory)
        )
        return [waiting, lost]
