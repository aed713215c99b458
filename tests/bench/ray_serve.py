"""Ray Serve's power of two choices, the shortest queue, and predicted tokens, on requests of skewed lengths.

    python tests/bench/ray_serve.py 300 2

Replicas sleep 1 ms per token with 4 requests at a time; others wait there, as in an engine. Load is 85 %. All routers
get the same arrivals and lengths, in turn. The shortest queue is our router with equal predictions. `predicted` has a
lognormal error (sigma 0.8), `predicted_decay` counts down with the known speed, `known` has no error. Prints one line
of JSON for each router: seconds from arrival to end, mean and quantiles, and the mean slowdown.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from mope.client import TYPICAL, Prediction
from mope.serving_hooks.gateways.ray_serve import LeastTokensRouter

REPLICAS, SLOTS, LOAD, TOKEN_S = 4, 4, 0.85, 0.001
SIGMA = 1.2  # of lengths; the mean is about twice the median
ERROR = 0.8


class Fake:
    """Predicts with an error, or the same for all requests if `error` is None."""

    def __init__(self, error: float | None) -> None:
        self._error = error

    async def predict(self, body: Mapping[str, Any]) -> Prediction:
        tokens = float(body["prompt"])
        if self._error is None:
            return Prediction(TYPICAL.mean, TYPICAL.mean)
        tokens *= random.Random(body["prompt"]).lognormvariate(0, self._error)
        return Prediction(tokens, tokens)


class Shortest(LeastTokensRouter):
    def connect(self) -> Any:
        return Fake(None)


class Predicted(LeastTokensRouter):
    def connect(self) -> Any:
        return Fake(ERROR)


class Known(LeastTokensRouter):
    def connect(self) -> Any:
        return Fake(0.0)


async def measure(handle: Any, arrivals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    async def one(at_s: float, tokens: float) -> tuple[float, float]:
        await asyncio.sleep(max(started + at_s - time.perf_counter(), 0))
        await handle.remote({"prompt": str(tokens)})
        return time.perf_counter() - started - at_s, tokens

    started = time.perf_counter()
    return await asyncio.gather(*(one(*arrival) for arrival in arrivals))


def main(number: int, rounds: int) -> None:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    class Engine:
        def __init__(self) -> None:
            self._slots = asyncio.Semaphore(SLOTS)

        async def __call__(self, body: dict[str, str]) -> None:
            async with self._slots:
                await asyncio.sleep(float(body["prompt"]) * TOKEN_S)

    routers: dict[str, dict[str, Any]] = {
        "power_of_two": {},
        "shortest_queue": {"request_router_class": "ray_serve.Shortest"},
        "predicted": {"request_router_class": "ray_serve.Predicted"},
        "predicted_decay": {
            "request_router_class": "ray_serve.Predicted",
            "request_router_kwargs": {"tokens_per_s": 1 / TOKEN_S},
        },
        "known": {"request_router_class": "ray_serve.Known"},
    }
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    found = defaultdict(list)
    deployment = serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})(
        Engine
    )
    for turn in range(rounds):
        source = random.Random(turn)
        tokens = [min(source.lognormvariate(5.3, SIGMA), 4000.0) for _ in range(number)]
        rate = LOAD * REPLICAS * SLOTS / (TOKEN_S * statistics.mean(tokens))
        at_s, arrivals = 0.0, []
        for length in tokens:
            at_s += source.expovariate(rate)
            arrivals.append((at_s, length))
        for name, router in routers.items():
            bound = deployment.options(request_router_config=RequestRouterConfig(**router)).bind()
            handle = serve.run(bound, name="bench", route_prefix=None)
            asyncio.run(measure(handle, [(0.0, 10.0)] * REPLICAS))
            found[name] += asyncio.run(measure(handle, arrivals))
            serve.delete("bench")
    for name, rows in found.items():
        waited = [took for took, _ in rows]
        centiles = statistics.quantiles(waited, n=100)
        figures = {"mean_s": statistics.mean(waited), "p50_s": centiles[49], "p90_s": centiles[89]}
        figures |= {"p99_s": centiles[98], "slowdown": statistics.mean(took / (TOKEN_S * t) for took, t in rows)}
        print(json.dumps({"router": name, **{key: round(value, 3) for key, value in figures.items()}}), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
