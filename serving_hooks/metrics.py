"""Prometheus metrics of a scheduler's hook, by client, on a port of its own.

All numbers are read when somebody scrapes, in the thread that answers; the scheduling thread only ever writes its own
tallies and books, and takes no lock. It goes on writing meanwhile, so what is iterated is copied first, again if it
changed under the copy, and one scrape may be a request ahead in one figure of what it is in another. Opt-in by
`metrics_port`. Knows no engine; nothing here stops one from starting or serving.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mope.errors import UserError
from mope.fairness.accounts import Account, Group
from mope.fairness.charges import UNIT
from mope.fairness.clients import client_path
from mope.serving_hooks.carried import seals
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.metrics_port import Exporter as Exporter
from mope.serving_hooks.steward import Steward
from mope.serving_hooks.tallies import OTHERS, Histogram, Tally

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.samples import Sample

T = TypeVar("T")

MAX_FAILURE = 300  # characters of what went wrong
_ATTEMPTS = 20  # to copy what changes meanwhile
_PAUSE_S = 0.001  # now and then, in which the scheduling thread has the interpreter for itself
_CLIENTS, _SAMPLES = 20, 100  # that are read, and written, between two pauses

logger = logging.getLogger("mope")


class Figure(NamedTuple):
    """One figure of a client.

    Attributes:
        name: of the metric, less the `_total` of counters.
        text: its help.
        read: where it is found.
    """

    name: str
    text: str
    read: Callable[[Tally], Any]


COUNTERS = (
    Figure("mope_client_arrived", "Requests that came.", lambda tally: tally.num_arrived),
    Figure("mope_client_finished", "Requests that ended by themselves.", lambda tally: tally.num_finished),
    Figure("mope_client_aborted", "Requests that were given up.", lambda tally: tally.num_aborted),
    Figure("mope_client_preempted", "Times that a request lost its place.", lambda tally: tally.num_preempted),
    Figure("mope_client_predicted", "Requests that came with a prediction.", lambda tally: tally.num_predicted),
    Figure(
        "mope_client_unpredicted",
        "Requests that came without a prediction: a running mean or default_tokens stood in.",
        lambda tally: max(0, tally.num_arrived - tally.num_predicted),
    ),
    Figure("mope_client_prompt_tokens", "Tokens of prompts that were read.", lambda tally: tally.prompt_tokens),
    Figure(
        "mope_client_cached_tokens",
        "Tokens of prompts that the prefix cache held.",
        lambda tally: tally.cached_tokens,
    ),
    Figure("mope_client_response_tokens", "Tokens that were generated.", lambda tally: tally.response_tokens),
    Figure(
        "mope_client_expected_tokens",
        "Response tokens that finished requests were taken to need when they came.",
        lambda tally: tally.predicted_tokens,
    ),
    Figure(
        "mope_client_covered",
        "Finished requests whose predicted 90 % quantile is known.",
        lambda tally: tally.num_covered,
    ),
    Figure(
        "mope_client_within",
        "Those of mope_client_covered_total whose answer was no longer than that quantile.",
        lambda tally: tally.num_within,
    ),
    Figure(
        "mope_client_service_weighted_tokens",
        "Weighted tokens of requests that have ended.",
        lambda tally: tally.charged.service / UNIT,
    ),
    Figure(
        "mope_client_ufc_weighted_tokens",
        "The user's counter (UFC) of requests that have ended.",
        lambda tally: tally.charged.ufc / UNIT,
    ),
    Figure(
        "mope_client_rfc",
        "The resources' counter (RFC) of requests that have ended; its unit is that of the option rfc.",
        lambda tally: tally.charged.rfc / UNIT,
    ),
    Figure(
        "mope_client_hf_weighted_tokens",
        "The score HF of requests that have ended.",
        lambda tally: tally.charged.hf / UNIT,
    ),
)
HISTOGRAMS = (
    Figure("mope_client_queue_seconds", "From arrival to admission.", lambda tally: tally.queue_s),
    Figure("mope_client_ttft_seconds", "From arrival to the first token.", lambda tally: tally.ttft_s),
    Figure("mope_client_e2e_seconds", "From arrival to the end.", lambda tally: tally.e2e_s),
    Figure(
        "mope_client_answer_ratio",
        "True by predicted response tokens, of finished requests that came with a prediction.",
        lambda tally: tally.ratio,
    ),
)


class StewardCollector:
    """What `prometheus_client` asks when somebody scrapes: the figures of one steward and its guard.

    Attributes:
        num_errors: groups of figures that could not be read, and are missing in the scrape.
    """

    def __init__(self, steward: Steward, guard: Guard, *, rank: int = 0, engine: str = "") -> None:
        """Reads nothing yet.

        Args:
            steward: whose figures.
            guard: that says whether the hook has failed.
            rank: of the engine, under data parallelism.
            engine: its name and version, for `mope_info`.
        """
        self._steward, self._guard, self._rank, self._engine = steward, guard, rank, engine
        self.num_errors = 0

    def collect(self) -> Iterator[Metric]:
        """All metrics. Raises nothing: what cannot be read is left out, and counted."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        started = time.perf_counter()
        for group in (self._state, self._books, self._clients, self._now):
            try:
                for metric in group():
                    metric.samples = _Unhurried(metric.samples)
                    yield metric
                    time.sleep(_PAUSE_S)
            except Exception:
                self.num_errors += 1
                logger.debug("mope could not read some of its metrics", exc_info=True)
        yield CounterMetricFamily(
            "mope_scrape_errors", "Groups of figures that could not be read.", value=self.num_errors
        )
        yield GaugeMetricFamily(
            "mope_scrape_seconds", "How long this scrape took to read.", value=time.perf_counter() - started
        )

    def _state(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        options, failure = self._steward.options, self._guard.failure
        yield InfoMetricFamily(
            "mope",
            "What runs here.",
            {
                "version": own_version(),
                "engine": self._engine,
                "rank": str(self._rank),
                "policy": options.policy,
                "identity": options.identity,
                "predictor": printable(options.predictor),
            },
        )
        yield GaugeMetricFamily(
            "mope_failed",
            "1 once the hook has failed and the engine serves in its own order.",
            value=float(failure is not None),
        )
        if failure is not None:
            yield InfoMetricFamily("mope_failure", "What went wrong.", {"failure": printable(failure[:MAX_FAILURE])})
        yield CounterMetricFamily("mope_exceptions", "Exceptions of the hook.", value=self._guard.num_failures)

    def _books(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        policy, lengths = self._steward.policy, self._steward.lengths
        ledger = policy.ledger
        yield GaugeMetricFamily(
            "mope_accounts", "Clients, and groups of them, in the books.", value=ledger.num_accounts
        )
        yield CounterMetricFamily(
            "mope_lifts", "Times that a client who came back was lifted to the others.", value=ledger.num_lifts
        )
        yield CounterMetricFamily(
            "mope_accounts_forgotten", "Idle clients that were forgotten.", value=ledger.num_forgotten
        )
        yield CounterMetricFamily(
            "mope_debts_forgotten",
            "Those of mope_accounts_forgotten_total that were forgotten with a debt, because of max_clients.",
            value=ledger.num_debts_forgotten,
        )
        yield CounterMetricFamily(
            "mope_clamped",
            "Numbers from outside that were impossible and were replaced.",
            value=policy.estimator.num_clamped,
        )
        yield CounterMetricFamily(
            "mope_unsealed",
            "Requests whose client and prediction were dropped, because the front end had not sealed them.",
            value=seals.num_refused,
        )
        yield CounterMetricFamily(
            "mope_learned", "Finished requests that were learned from.", value=lengths.num_observed
        )
        skipped = CounterMetricFamily(
            "mope_not_learned",
            "Finished requests that were not learned from: learning was `behind`, the client has taught its `share`, "
            "it `forced` the length, or they were `lost`, because a service that predicts did not take them.",
            labels=["reason"],
        )
        skipped.add_metric(["behind"], lengths.num_dropped)
        skipped.add_metric(["share"], lengths.num_refused)
        skipped.add_metric(["forced"], lengths.num_forced)
        skipped.add_metric(["lost"], lengths.num_lost)
        yield skipped
        yield GaugeMetricFamily("mope_learning", "1 while predictions are recalibrated.", value=float(lengths.learns))

    def _clients(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        tallies = self._tallies()
        for figure in COUNTERS:
            counter = CounterMetricFamily(figure.name, figure.text, labels=["client"])
            for client, found in unhurried(tallies.items(), _CLIENTS):
                counter.add_metric([client], sum(map(figure.read, found)))
            yield counter
        for figure in HISTOGRAMS:
            histogram = HistogramMetricFamily(figure.name, figure.text, labels=["client"])
            for client, found in unhurried(tallies.items(), _CLIENTS):
                histogram.add_metric([client], *buckets([figure.read(tally) for tally in found]))
            yield histogram

    def _now(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        steward = self._steward
        held = patiently(lambda: list(steward.held.values()))
        shown = self._tallies()
        labelled = [(client_label(one.client), one.state == "running") for one in held]
        counts = Counter((client if client in shown else OTHERS, runs) for client, runs in labelled)
        for name, text, runs in (
            ("mope_client_waiting", "Requests that wait now.", False),
            ("mope_client_running", "Requests that run now.", True),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["client"])
            for client in shown:
                gauge.add_metric([client], counts[client, runs])
            yield gauge
        counter = GaugeMetricFamily(
            "mope_client_order_weighted_tokens",
            "What the order goes by: HF by weight, with what is predicted of running requests, and lifts. Compares a "
            "client with others of its group.",
            labels=["client"],
        )
        weight = GaugeMetricFamily("mope_client_weight", "Entitlement in proportion to 1.", labels=["client"])
        for client in shown:
            account = self._account(client)
            if account is not None:
                counter.add_metric([client], account.counter / UNIT)
                weight.add_metric([client], float(account.weight))
        yield counter
        yield weight

    def _tallies(self) -> dict[str, list[Tally]]:
        """Tallies by label: names that only differ in what a label cannot show are one client here."""
        found: dict[str, list[Tally]] = {}
        for client, tally in patiently(self._steward.tallies.items):
            found.setdefault(client_label(client), []).append(tally)
        return found

    def _account(self, client: str) -> Account | None:
        account = self._steward.policy.ledger.find(client_path(client))
        return account.children.get("") if isinstance(account, Group) else account


class _Unhurried(list["Sample"]):
    """Samples that `prometheus_client` writes down with pauses."""

    def __iter__(self) -> Iterator[Sample]:
        return unhurried(super().__iter__(), _SAMPLES)


def unhurried(values: Iterable[T], every: int) -> Iterator[T]:
    """The same values, with a pause after each `every` of them."""
    for number, value in enumerate(values, 1):
        yield value
        if number % every == 0:
            time.sleep(_PAUSE_S)


def buckets(histograms: Iterable[Histogram]) -> tuple[list[tuple[str, float]], float]:
    """The sum of histograms of the same edges, as Prometheus counts it.

    Returns:
        `(edge, values up to it)` for each edge and `+Inf`, and the sum of all values.
    """
    parts = [(histogram.edges, histogram.counts.copy(), histogram.total) for histogram in histograms]
    counts = accumulate(map(sum, zip(*(counts for _, counts, _ in parts), strict=True)))
    edges = [*map(str, parts[0][0]), "+Inf"]
    return list(zip(edges, map(float, counts), strict=True)), sum(total for _, _, total in parts)


def patiently(copy: Callable[[], T]) -> T:
    """What `copy` returns; tried again where another thread changed what it iterates.

    Raises:
        RuntimeError: it changed each time.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return copy()
        except RuntimeError:
            time.sleep(0)
    return copy()


def own_version() -> str:
    """The release of mope; `unknown` where it runs from a folder that was never installed."""
    try:
        return version("mope-llm")
    except PackageNotFoundError:
        return "unknown"


@lru_cache(10_000)
def client_label(client: str) -> str:
    """A client as the value of a label: its path, long names shortened, what cannot be printed escaped."""
    return printable("/".join(client_path(client)))


def printable(text: str) -> str:
    """`text` with escapes for control characters and for what UTF-8 cannot encode."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


# -- the port


def start(steward: Steward, guard: Guard, *, rank: int = 0, engine: str = "") -> Exporter | None:
    """Begins to serve metrics if `metrics_port` asks for it. Raises nothing, and returns at once.

    Args:
        steward: whose metrics.
        guard: of the same hook.
        rank: of the engine under data parallelism: each listens at `metrics_port` plus its rank.
        engine: its name and version.

    Returns:
        What serves them; None if nobody asked, or if it cannot be: then a warning says why.
    """
    options = steward.options
    if options.metrics_port is None:
        return None
    wanted = options.metrics_port + rank if options.metrics_port else 0
    collector = StewardCollector(steward, guard, rank=rank, engine=engine)
    try:
        exporter = _listen(collector, options.metrics_host, wanted)
    except UserError as error:
        logger.warning("mope serves no metrics: %s", error)
        return None
    except Exception as error:
        logger.warning("mope serves no metrics: %s:%d cannot be had (%s)", options.metrics_host, wanted, error)
        return None
    logger.info("mope: metrics at %s", exporter.url)
    return exporter


def _listen(collector: StewardCollector, host: str, port: int) -> Exporter:
    try:
        return Exporter(collector, host, port)
    except (OSError, OverflowError) as error:  # in use, not allowed, or above 65535
        if not port:
            raise
        exporter = Exporter(collector, host, 0)
        logger.warning("mope: metrics_port %d cannot be had (%s); took %d instead", port, error, exporter.port)
        return exporter
