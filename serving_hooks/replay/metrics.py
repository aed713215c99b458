"""How fair and how quick a replay was: VTC's service differences, Jain's index, latencies by client, what was wasted.

Knows times and tokens of finished requests; does not know schedulers. Where a definition comes from: [V] VTC's artifact
(Sheng et al., OSDI 2024), [J] Jain, Chiu and Hawe, 1984, [O] ours.

Service, in weighted tokens [V]: a request's prompt tokens and twice its response tokens, spread evenly from its first
token to its last. Fairness is measured while requests arrive, from 0 to T, since a queue that drains afterwards is
nobody's choice; latencies are those of all requests.

    accumulated difference(t) = max_i W_i(0, t) - min_i W_i(0, t)                        [V], weighted tokens
    windowed difference(t)    = max_j min(max_i s_i - s_j, d_j - s_j), at least 0        [V], weighted tokens/s
        s_i the service rate of client i in a window of T/10 around t, d_i the rate at which it asked for service
        there, at 19 evenly spaced t; of a suite of ten minutes that is a minute, as in the artifact
    J(x) = (sum x_i)^2 / (n sum x_i^2)                                                   [J], 1/n to 1

Of clients with unequal weights, service is divided by the weight. J is given of three x_i:

    service     weighted tokens delivered from 0 to T; far from 1, too, where clients ask for unequal amounts
    entitled    the same, relative to what max-min fairness would give client i of all that was delivered, by what each
                asked for [O]; 1 is the best that a schedule can do
    slowdown    mean over the client's requests of latency / latency on the idle engine [O]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mope.grid import Array
from mope.serving_hooks.replay.clock import StepClock
from mope.serving_hooks.replay.run import Outcome, Record

RESPONSE_PRICE = 2.0  # of VTC, beside 1 for a prompt token
NUM_WINDOWS, WINDOWS_PER_RUN = 19, 10
NUM_MOMENTS = 200  # at which accumulated service is compared
LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, that of the normal distribution
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL = 1.960


class Served(NamedTuple):
    """Finished requests as arrays; N requests, C clients.

    Attributes:
        client_N: number of the client.
        arrival_N: seconds.
        first_N: seconds of the first token.
        finish_N: seconds of the last token.
        service_N: weighted tokens, divided by the client's weight.
        num_clients: C.
    """

    client_N: Array
    arrival_N: Array
    first_N: Array
    finish_N: Array
    service_N: Array
    num_clients: int


def served(records: Sequence[Record], names: Sequence[str], weights: Mapping[str, float]) -> Served:
    """The arrays that fairness is measured on.

    Args:
        records: of finished requests.
        names: clients, in order.
        weights: of those clients whose weight is not 1.
    """
    numbers = {name: number for number, name in enumerate(names)}
    return Served(
        np.array([numbers[record.arrival.client] for record in records], dtype=int),
        np.array([record.arrival.arrival_s for record in records]),
        np.array([record.first_token_s for record in records]),
        np.array([record.finish_s for record in records]),
        np.array(
            [
                (record.arrival.prompt_tokens + RESPONSE_PRICE * record.response_tokens)
                / weights.get(record.arrival.client, 1.0)
                for record in records
            ]
        ),
        len(names),
    )


def delivered(given: Served, moments_T: npt.ArrayLike) -> Array:
    """Weighted tokens that each client had until each moment, of shape (C, T)."""
    moments = np.asarray(moments_T, dtype=float)
    lasts_N = np.maximum(given.finish_N - given.first_N, 1e-12)  # an answer of one token comes at once
    service_CT = np.zeros((given.num_clients, len(moments)))
    for client in range(given.num_clients):
        own = given.client_N == client
        shares_NT = np.clip((moments - given.first_N[own, None]) / lasts_N[own, None], 0.0, 1.0)
        service_CT[client] = given.service_N[own] @ shares_NT
    return service_CT


def asked(given: Served, moments_T: npt.ArrayLike) -> Array:
    """Weighted tokens that each client had asked for until each moment, that moment included, of shape (C, T)."""
    moments = np.asarray(moments_T, dtype=float)
    return np.stack(
        [
            given.service_N[given.client_N == client] @ (given.arrival_N[given.client_N == client, None] <= moments)
            for client in range(given.num_clients)
        ]
    )


def accumulated_difference(given: Served, duration_s: float) -> Array:
    """Between the client that had most and the one that had least, at `NUM_MOMENTS` moments."""
    service_CT = delivered(given, np.linspace(0, duration_s, NUM_MOMENTS + 1)[1:])
    return np.asarray(service_CT.max(axis=0) - service_CT.min(axis=0))


def windowed_difference(given: Served, duration_s: float) -> Array:
    """Of service rates, where a client is not blamed for what it did not ask for; see the head of this module."""
    window = duration_s / WINDOWS_PER_RUN
    middles = np.arange(1, NUM_WINDOWS + 1) * duration_s / (NUM_WINDOWS + 1)
    before, after = middles - window / 2, middles + window / 2
    rate_CT = (delivered(given, after) - delivered(given, before)) / window
    demand_CT = (asked(given, after) - asked(given, before)) / window
    missed_CT = np.minimum(rate_CT.max(axis=0) - rate_CT, demand_CT - rate_CT)
    return np.asarray(np.maximum(missed_CT.max(axis=0), 0.0))


def jain(amounts: npt.ArrayLike) -> float:
    """Jain's index; 1 where nobody has anything."""
    x = np.asarray(amounts, dtype=float)
    squares = float(len(x) * (x @ x))
    return float(x.sum() ** 2 / squares) if squares else 1.0


def max_min_shares(demands: npt.ArrayLike, total: float) -> Array:
    """What max-min fairness gives each client of a total: all it asks for, or as much as anyone else.

    Args:
        demands: what each asks for; together at least `total`, or all of it is given.
        total: to be given.
    """
    wanted = np.asarray(demands, dtype=float)
    shares = np.zeros_like(wanted)
    left, open_ = total, len(wanted)
    for client in np.argsort(wanted, kind="stable"):
        shares[client] = min(wanted[client], left / open_)
        left -= shares[client]
        open_ -= 1
    return shares


def measure(
    outcome: Outcome, names: Sequence[str], weights: Mapping[str, float], duration_s: float, clock: StepClock
) -> dict[str, Any]:
    """Everything that is reported of one replay, as finite numbers; names of figures end in their unit.

    Args:
        outcome: with at least one request.
        names: clients, in order; those who sent nothing are left out.
        weights: of those clients whose weight is not 1.
        duration_s: in which requests came.
        clock: knows how long a request takes on the idle engine.
    """
    records = outcome.records
    present = {record.arrival.client for record in records}
    names = [name for name in names if name in present]
    given = served(records, names, weights)
    service_C = delivered(given, [duration_s])[:, 0]
    shares_C = max_min_shares(asked(given, [duration_s])[:, 0], float(service_C.sum()))
    slowdown_N = np.array(
        [
            (record.finish_s - record.arrival.arrival_s)
            / clock.idle_latency_s(record.arrival.prompt_tokens, record.response_tokens)
            for record in records
        ]
    )
    slowdown_C = [float(slowdown_N[given.client_N == client].mean()) for client in range(len(names))]
    window, accumulated = windowed_difference(given, duration_s), accumulated_difference(given, duration_s)
    prompts = sum(record.arrival.prompt_tokens for record in records)
    responses = sum(record.response_tokens for record in records)
    recomputed = sum(record.recomputed_tokens for record in records)
    of_all = _latencies(records)
    return {
        "num_requests": len(records),
        "jain_service": jain(service_C),
        "jain_entitled": jain(np.divide(service_C, shares_C, out=np.ones_like(service_C), where=shares_C > 0)),
        "jain_slowdown": jain(slowdown_C),
        "window_difference_max": float(window.max()),
        "window_difference_mean": float(window.mean()),
        "window_difference_variance": float(window.var()),
        "accumulated_difference_max": float(accumulated.max()),
        "accumulated_difference_mean": float(accumulated.mean()),
        "accumulated_difference_variance": float(accumulated.var()),
        "slowdown_mean": float(slowdown_N.mean()),
        **of_all,
        "requests_per_s": len(records) / outcome.end_s,
        "response_tokens_per_s": responses / outcome.end_s,
        "tokens_per_s": (prompts + responses) / outcome.end_s,
        "num_preemptions": sum(record.num_preemptions for record in records),
        "recomputed_tokens": recomputed,
        "recomputed_share": recomputed / (prompts + responses + recomputed),
        "mean_running": outcome.mean_running,
        "busy_share": outcome.busy_s / outcome.end_s,
        "end_s": outcome.end_s,
        "cpu_s": outcome.cpu_s,
        "clients": {
            name: {
                "num_requests": int((given.client_N == number).sum()),
                "service_per_s": float(service_C[number] / duration_s),
                "fair_service_per_s": float(shares_C[number] / duration_s),
                "slowdown_mean": slowdown_C[number],
                **_latencies([record for record in records if record.arrival.client == name]),
            }
            for number, name in enumerate(names)
        },
    }


def _latencies(records: Sequence[Record]) -> dict[str, float]:
    """Mean and quantiles of waiting, first token and last token, in seconds from arrival."""
    found = {}
    for figure, ends in (
        ("queue", [record.admitted_s for record in records]),
        ("ttft", [record.first_token_s for record in records]),
        ("e2e", [record.finish_s for record in records]),
    ):
        seconds = np.array(ends) - np.array([record.arrival.arrival_s for record in records])
        found[f"{figure}_mean_s"] = float(seconds.mean())
        for name, level in LEVELS.items():
            found[f"{figure}_{name}_s"] = float(np.quantile(seconds, level))
    return found


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds and half the width of its 95 % interval by Student's t; 0 for one seed, which says nothing."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": 0.0}
    spread = sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    freedom = len(values) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
    return {"mean": mean, "half_width": quantile * spread / sqrt(len(values))}


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same figures over seeds: each number becomes a mean and half the width of its interval."""
    found: dict[str, Any] = {}
    for key, first in runs[0].items():
        values = [run[key] for run in runs if key in run]
        if isinstance(first, Mapping):
            names = list(dict.fromkeys(name for value in values for name in value))
            found[key] = (
                {name: summarize([value[name] for value in values if name in value]) for name in names}
                if key == "clients"
                else summarize(values)
            )
        else:
            found[key] = over_seeds([float(value) for value in values])
    return found
