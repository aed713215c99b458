"""Measures the hook in vLLM's real engine and server on the CPU: a flood beside a light client, and short memory.

    python tests/bench/vllm_hook.py --output model_cards/results/DATE-vllm-hook/figures.json

Needs what `make engines` installs. In process, time is counted in engine steps, so whatever else the machine does is
not in these figures; answers end by a logits processor, so no true length is told. Over HTTP it is seconds, and no
predictor runs, because answers there are cut by `max_tokens`. Takes some 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "engines"))
sys.path.append(str(Path(__file__).resolve().parents[2]))

from mope.serving_hooks.vllm import compat
from tests.engines import test_vllm_end_to_end as over_http
from tests.engines import tiny_vllm
from tests.engines.test_vllm_scheduler import TIGHT
from tests.engines.vllm_engine import EngineInProcess, flood_and_light, mean_ttft, services

POLICIES = ("fcfs", "vtc", "vtc-predicted", "equinox")


def in_process(model: Path, seed: int, num_flood: int) -> dict[str, Any]:
    """What each policy does with the same requests, with and without room for them."""
    requests = flood_and_light(num_flood=num_flood, seed=seed)
    delivered = {
        client: sum(one.prompt_tokens + 2 * one.length for one in requests if one.client == client)
        for client in ("flood", "light")
    }
    found: dict[str, Any] = {}
    for room, engine in (("room", {}), ("memory for a quarter", TIGHT)):
        stock = EngineInProcess(model, None, **engine).run(requests)
        rows: dict[str, dict[str, Any]] = {"vLLM": {"steps": stock.num_steps}}
        for client in delivered:
            rows["vLLM"][f"{client}_ttft_steps"] = round(mean_ttft(stock, requests, client), 1)
        chosen: dict[str, dict[str, Any]] = {policy: {"policy": policy} for policy in POLICIES}
        if engine:
            chosen["equinox, predicted admission"] = {
                "policy": "equinox",
                "predicted_admission": True,
                "kv_margin": 1.2,
            }
        for name, options in chosen.items():
            running = EngineInProcess(model, options, **engine)
            outcome = running.run(requests)
            tallies = running.scheduler.mope.tallies.items()
            rows[name] = {
                "steps": outcome.num_steps,
                **{f"{client}_ttft_steps": round(mean_ttft(outcome, requests, client), 1) for client in delivered},
                "preemptions": sum(tally.num_preempted for _, tally in tallies),
                "tokens_equal": outcome.tokens == stock.tokens,
                "books_exact": services(running.scheduler) == delivered,
            }
            print(seed, room, name, rows[name], flush=True)
        found[room] = rows
    return found


def http() -> dict[str, Any]:
    """The same flood and light client through the OpenAI client, once for each policy."""
    served = {}
    for policy in ("fcfs", "equinox"):
        with tempfile.TemporaryDirectory() as folder:
            served[policy] = over_http.run(Path(folder), policy)
    return {
        **{
            policy: {
                "seconds": round(one.seconds, 2),
                **{f"{client}_ttft_s": round(seconds, 3) for client, seconds in one.ttft_s.items()},
            }
            for policy, one in served.items()
        },
        "texts_equal": served["fcfs"].texts == served["equinox"].texts,
    }


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3, help="draws of requests in process")
    parser.add_argument("--flood", type=int, default=300, help="requests of the flood in process")
    chosen = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {"vllm": compat.installed(), "torch": version("torch")},
    }
    report["over HTTP"] = http()  # first: settings for the engine in this process would be the servers', too
    print(report["over HTTP"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_vllm.make_model(Path(folder))
        report["in process"] = [in_process(model, 10_001 * seed, chosen.flood) for seed in range(chosen.rounds)]
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
