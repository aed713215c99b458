"""Prometheus metrics of the front end, where predictions are made: added to those that the engine's API server shows.

With one API server its registry is asked at each scrape. With several, `prometheus_client` sums what each of them
writes into files, and asks nobody: there a thread passes on what was counted since it last looked. Knows the counters
of a front end, as its `snapshot` gives them; no engine.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mope.extras import require
from mope.serving_hooks.metrics import printable
from mope.serving_hooks.options import HookOptions

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

SEVERAL = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")  # set where several processes are scraped as one
_EVERY_S = 2.0  # between two looks at the counters, with several API servers

Snapshot = Callable[[], Mapping[str, Any]]

REQUESTS = ("mope_front_requests", "HTTP requests, by path or by what was done with them.")
PREDICTIONS = ("mope_front_predictions", "Predictions by what became of them: made, late, overload, failed, no_text.")
LATENCY = ("mope_front_prediction_seconds", "How long requests waited for their prediction.")
ON = ("mope_front_on", "1 where the middleware runs, and how.")
PREDICTS = ("mope_front_predicts", "1 where the predictor runs; 0 if it could not be loaded, or if there is none.")

logger = logging.getLogger("mope")


def front_collector(
    snapshot: Snapshot, options: HookOptions, registry: CollectorRegistry | None = None
) -> FrontCollector | FrontWriter | None:
    """Adds a front end's counters to what its API server shows at `/metrics`. Raises nothing.

    Args:
        snapshot: its counters: `requests` and `predictions` as numbers by name, and `latency` with `bounds_s`,
            `counts` (up to each bound, and above all of them) and `sum_s`. Numbers never fall. `predicts` says whether
            a predictor runs.
        options: what is on.
        registry: that the API server shows; prometheus_client's own if None. Not used with several API servers.

    Returns:
        What shows them; None if it cannot be, and then a warning says why.
    """
    try:
        prometheus = require("prometheus_client", "metrics of the front end", "vllm")
        if any(name in os.environ for name in SEVERAL):
            return FrontWriter(snapshot, options)
        return FrontCollector(snapshot, options, registry or prometheus.REGISTRY)
    except Exception as error:
        logger.warning("mope's front end is not in the metrics of this server: %s", error)
        return None


def _labels(options: HookOptions) -> dict[str, str]:
    port = options.metrics_port
    return {
        "identity": options.identity,
        "predictor": printable(options.predictor),
        "policy": options.policy,
        "metrics_port": str(port) if port else "",
    }


class FrontCollector:
    """Asked at each scrape, and then raises nothing: without a snapshot there are no figures."""

    def __init__(self, snapshot: Snapshot, options: HookOptions, registry: CollectorRegistry) -> None:
        """Registers itself.

        Args:
            snapshot: the counters.
            options: what is on.
            registry: where.

        Raises:
            ValueError: another front end is registered there.
        """
        self._snapshot, self._options, self._registry = snapshot, options, registry
        registry.register(self)

    def close(self) -> None:
        """Is shown no more."""
        self._registry.unregister(self)

    def collect(self) -> Iterator[Metric]:
        """The front end's metrics."""
        try:
            found = self._found()
        except Exception:
            logger.debug("mope could not read the metrics of its front end", exc_info=True)
            return
        yield from found

    def _found(self) -> list[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        kept = self._snapshot()
        labels = _labels(self._options)
        on = GaugeMetricFamily(*ON, labels=list(labels))
        on.add_metric(list(labels.values()), 1)
        predicts = GaugeMetricFamily(*PREDICTS, value=float(kept["predicts"]))
        requests = CounterMetricFamily(*REQUESTS, labels=["kind"])
        for kind, num in kept["requests"].items():
            requests.add_metric([printable(kind)], num)
        predictions = CounterMetricFamily(*PREDICTIONS, labels=["outcome"])
        for outcome, num in kept["predictions"].items():
            predictions.add_metric([printable(outcome)], num)
        latency = kept["latency"]
        edges = [*map(str, latency["bounds_s"]), "+Inf"]
        counted = map(float, accumulate(latency["counts"]))
        seconds = HistogramMetricFamily(
            *LATENCY, buckets=list(zip(edges, counted, strict=True)), sum_value=latency["sum_s"]
        )
        return [on, predicts, requests, predictions, seconds]


class FrontWriter:
    """Passes on what was counted, for `prometheus_client` to sum over processes."""

    def __init__(self, snapshot: Snapshot, options: HookOptions, every_s: float = _EVERY_S) -> None:
        """Starts its thread.

        Args:
            snapshot: the counters.
            options: what is on.
            every_s: seconds between two looks.
        """
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._snapshot, self._every_s = snapshot, every_s
        registry = CollectorRegistry()  # of nobody: the files are what is read
        self._requests = Counter(*REQUESTS, ["kind"], registry=registry)
        self._predictions = Counter(*PREDICTIONS, ["outcome"], registry=registry)
        first = snapshot()
        bounds = first["latency"]["bounds_s"]
        self._latency = Histogram(*LATENCY, buckets=bounds, registry=registry)
        labels = _labels(options)
        Gauge(*ON, list(labels), registry=registry, multiprocess_mode="max").labels(**labels).set(1)
        # 0 if any of the servers predicts nothing
        Gauge(*PREDICTS, registry=registry, multiprocess_mode="min").set(float(first["predicts"]))
        self._told: dict[tuple[str, str], float] = {}
        self._counts = [0] * (len(bounds) + 1)
        self._sum_s = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mope-front-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Passes on what is left, and ends."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(self._every_s)
            try:
                self._pass_on(self._snapshot())
            except Exception:
                logger.debug("mope could not pass on the metrics of its front end", exc_info=True)

    def _pass_on(self, kept: Mapping[str, Any]) -> None:
        for group, counter, label in (
            ("requests", self._requests, "kind"),
            ("predictions", self._predictions, "outcome"),
        ):
            for name, num in kept[group].items():
                more = num - self._told.get((group, name), 0)
                if more > 0:
                    self._told[group, name] = num
                    counter.labels(**{label: printable(name)}).inc(more)
        latency = kept["latency"]
        counts = list(latency["counts"])
        more = [now - before for now, before in zip(counts, self._counts, strict=True)]
        for seconds, num in spread(latency["bounds_s"], more, latency["sum_s"] - self._sum_s):
            for _ in range(num):
                self._latency.observe(seconds)
        self._counts, self._sum_s = counts, latency["sum_s"]


def spread(bounds: Sequence[float], counts: Sequence[int], total: float) -> list[tuple[float, int]]:
    """Values that have the counts and the sum of a histogram, for an interface that only takes values.

    All lie at the same share of the way through their bucket, the one at which the sum is right.

    Args:
        bounds: upper edges of the buckets, rising from above 0.
        counts: values in each bucket, and above all of them.
        total: their sum.

    Returns:
        `(value, how often)` for each bucket that has any.
    """
    low = [0.0, *bounds]
    width = [high - below for below, high in zip(low, bounds, strict=False)]
    least = sum(num * edge for num, edge in zip(counts, low, strict=True))
    width.append(max(total - least, low[-1]) / max(counts[-1], 1))
    most = sum(num * wide for num, wide in zip(counts, width, strict=True))
    share = min(max((total - least) / most, 1e-6), 1.0) if most else 0.0
    return [(edge + share * wide, num) for edge, wide, num in zip(low, width, counts, strict=True) if num > 0]
