"""All replays of one command: each workload, policy and kind of prediction, over seeds.

Knows configs and which replays they ask for; does not know flags, tables or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mope.console import progress
from mope.errors import ConfigError
from mope.fairness import load_profile
from mope.serving_hooks.replay.clock import StepClock
from mope.serving_hooks.replay.config import BLIND, ReplayConfig
from mope.serving_hooks.replay.engine import Engine, EngineSettings
from mope.serving_hooks.replay.metrics import measure, summarize
from mope.serving_hooks.replay.predictions import Prediction, predict
from mope.serving_hooks.replay.run import Outcome, replay
from mope.serving_hooks.replay.workloads import Arrival, Workload, find

VTC_ENGINE, VTC_KV_TOKENS = "a10g/llama-2-7b", 10_000  # that the rates of its artifact are for
OWN_KEY = "mope"  # of the hook's options in the engine's additional config
QUIET = {"predictor": "none", "recalibrate": False, "summary_s": 0}  # of the hook: no model, nothing learned or told

MakeEngine = Callable[..., Engine]


class Variant(NamedTuple):
    """A row of a table.

    Attributes:
        policy: its name.
        prediction: what it is told of lengths.
    """

    policy: str
    prediction: Prediction

    @property
    def name(self) -> str:
        """For tables."""
        return self.policy if self.policy in BLIND else f"{self.policy}, {self.prediction}"


@dataclass
class Compared:
    """What one workload showed.

    Attributes:
        workload: who sent.
        load: requests offered, relative to the engine's capacity.
        rate: requests per second.
        duration_s: in which they came, with the first seed.
        runs: figures by variant and seed.
        outcomes: of the first seed, by variant.
        version: of the engine.
    """

    workload: Workload
    load: float
    rate: float
    duration_s: float
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    version: str = ""

    def summary(self) -> dict[str, dict[str, Any]]:
        """Means and intervals over seeds, by variant."""
        return {name: summarize(runs) for name, runs in self.runs.items()}

    def differences(self) -> dict[str, dict[str, Any]]:
        """The same of each variant less the first, seed by seed; clients left out."""
        first, *others = self.runs
        return {
            name: summarize(
                [
                    {key: run[key] - base[key] for key in run if key != "clients"}
                    for run, base in zip(self.runs[name], self.runs[first], strict=True)
                ]
            )
            for name in others
        }


def variants(config: ReplayConfig) -> list[Variant]:
    """Rows of each table: policies that ask for no prediction once, others for each kind of it."""
    found = [
        Variant(policy, prediction)
        for policy in config.policies
        for prediction in (("none",) if policy in BLIND else config.predictions)
    ]
    return list(dict.fromkeys(found))


def compare(
    config: ReplayConfig, settings: EngineSettings, fairness: Mapping[str, Any], make_engine: MakeEngine
) -> list[Compared]:
    """Every replay that a config asks for.

    Args:
        config: what is replayed.
        settings: of the engine.
        fairness: options of the hook that were given; the profile among them is that of the clock, too.
        make_engine: builds an engine, as `VllmEngine` does.

    Raises:
        ConfigError: a workload, profile or scheduler can't be used.
        DataError: a trace can't be used.
    """
    clock = StepClock(load_profile(fairness["profile"]))
    workloads = [find(name, config.trace) for name in dict.fromkeys(config.workload)]
    kv_tokens = settings.kv_tokens or clock.profile.capacity_tokens
    if kv_tokens is None:
        raise ConfigError(
            f"profile {clock.profile.name} does not say how many tokens the KV cache holds: --kv-tokens N"
        )
    rows = variants(config)
    found = []
    for workload in workloads:
        rate, load = offered(workload, config, settings, clock, kv_tokens)
        duration_s = workload.duration_s(num_requests=config.requests, rate=rate)
        compared = Compared(workload, load, rate, duration_s, {row.name: [] for row in rows})
        drawn = [workload.requests(seed, num_requests=config.requests, rate=rate) for seed in range(config.seeds)]
        total = len(rows) * sum(map(len, drawn))
        with progress(workload.name, total) as advance:
            for seed, arrivals in enumerate(drawn):
                if not arrivals:
                    raise ConfigError(f"workload {workload.name} has no request with seed {seed}; type more --requests")
                for row in rows:
                    engine = make_engine(
                        settings,
                        kv_tokens=kv_tokens,
                        max_model_len=max(arrival.prompt_tokens for arrival in arrivals) + settings.max_tokens,
                        adapters=tuple(sorted({arrival.adapter for arrival in arrivals if arrival.adapter})),
                        scheduler=None if row.policy == "engine" else config.scheduler,
                        options=_options(row, fairness, workload),
                    )
                    outcome = replay(
                        engine,
                        arrivals,
                        predict(arrivals, row.prediction, seed=seed, cap=settings.max_tokens, tau=config.tau),
                        clock,
                        batches_in_flight=settings.batches_in_flight,
                        advance=advance,
                    )
                    compared.version = engine.version
                    compared.runs[row.name].append(
                        measure(outcome, workload.names, workload.weights, duration_s, clock)
                    )
                    if not seed:
                        compared.outcomes[row.name] = outcome
        found.append(compared)
    return found


def offered(
    workload: Workload, config: ReplayConfig, settings: EngineSettings, clock: StepClock, kv_tokens: int
) -> tuple[float, float]:
    """Requests per second that a workload sends, and what that is relative to the engine's capacity.

    Rates of made-up workloads are relative: they are stretched until the load is as it should be. That of VTC's suites
    is what their rates were on VTC's engine, whose capacity is estimated by the same formula, as S-LoRA admits.
    """
    sample = workload.requests(0, num_requests=config.requests)
    prompt, response = _mean_lengths(sample, settings.max_tokens)
    capacity = clock.capacity(prompt, response, max_num_seqs=settings.max_num_seqs, kv_tokens=kv_tokens)
    load = config.load or workload.load
    if load is None and workload.published:
        theirs = StepClock(load_profile(VTC_ENGINE))
        load = workload.rate / theirs.capacity(
            prompt, response, max_num_seqs=settings.max_num_seqs, kv_tokens=VTC_KV_TOKENS, reserves=True
        )
    if load is None:
        return workload.rate, workload.rate / capacity
    return load * capacity, load


def _mean_lengths(arrivals: Sequence[Arrival], cap: int) -> tuple[float, float]:
    number = max(1, len(arrivals))
    return (
        sum(arrival.prompt_tokens for arrival in arrivals) / number,
        sum(min(arrival.response_tokens, cap) for arrival in arrivals) / number,
    )


def _options(row: Variant, fairness: Mapping[str, Any], workload: Workload) -> dict[str, Any]:
    if row.policy == "engine":
        return {}
    return {OWN_KEY: {**QUIET, **fairness, "policy": row.policy, "weights": workload.weights}}
