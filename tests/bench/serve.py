"""Latency of `mope serve` on loopback at a steady rate, its start, its memory, and that learning goes on meanwhile.

    python tests/bench/serve.py chat-small chat-micro --rate 20 --seconds 60 --core 1 --output serve.json

Requests come at even times, whether or not earlier ones were answered; made-up prompts never repeat.
Wall time is that of the client, which may share the server's core; `server_ms` are upper bounds of quantiles from the
server's own histogram.
On a machine with other work, `others_share` says what share of that core other processes took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from ports import free_port

WORDS = ("explain", "a", "poem", "code", "table", "of", "the", "sea", "in", "python", "short", "long", "why", "list")
TICKS = os.sysconf("SC_CLK_TCK")


def prompt(number: int) -> str:
    """Text of 5 to 400 words, by its number alone."""
    length = 5 + (number * 7919) % 396
    return " ".join(f"{WORDS[(number * 31 + place * place) % len(WORDS)]}" for place in range(length)) + f" {number}"


def process_s(process: int) -> float:
    """Seconds of processor time that a process took."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def core_s(core: int) -> float:
    """Seconds that a core was not idle."""
    line = next(one for one in Path("/proc/stat").read_text().splitlines() if one.startswith(f"cpu{core} "))
    user, nice, system, _, _, *others = map(int, line.split()[1:])
    return (user + nice + system + sum(others[:3])) / TICKS


def memory_mb(process: int) -> float:
    """Resident memory."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1000


def quantiles_ms(seconds: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the longest."""
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 3) for name, share in at.items()
    }


def bounds_ms(metrics: str) -> dict[str, float]:
    """The edges of the server's histogram below which half, and 99 of 100, of its predictions are."""
    name = "mope_front_prediction_seconds_bucket"
    lines = [line.split('"') for line in metrics.splitlines() if line.startswith(name)]
    edges = [(float(edge), float(count.removeprefix("} "))) for _, edge, count in lines]
    total = edges[-1][1]
    return {
        f"p{100 * level:g}": 1000 * next(edge for edge, count in edges if count >= level * total)
        for level in (0.5, 0.99)
    }


async def measure(artifact: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One predictor."""
    import httpx2 as httpx

    port = free_port()
    command = [sys.executable, "-c", "from mope.cli import main; raise SystemExit(main())", "serve", artifact]
    command = ["taskset", "-c", str(arguments.core), *command, "--port", str(port), "--deadline-ms", "5000"]
    started, at = time.perf_counter(), core_s(arguments.core)
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http:
        while True:
            try:
                (await http.post("/v1/predict", json={"prompt": "Hi"})).raise_for_status()
                break
            except httpx.TransportError:
                await asyncio.sleep(0.02)
        found: dict[str, Any] = {
            "artifact": artifact,
            "start_s": round(time.perf_counter() - started, 2),
            "start_cpu_s": round(process_s(server.pid), 2),
            "start_others_share": share(at, started, process_s(server.pid), arguments.core),
        }
        bodies = [json.loads(line) for line in arguments.prompts.read_text().splitlines()] if arguments.prompts else []
        waits: list[float] = []
        sources: dict[str, int] = {}

        async def ask(number: int, planned: float) -> None:
            body = bodies[number % len(bodies)] if bodies else {"prompt": prompt(number), "model": "llama-3-8b"}
            answer = (await http.post("/v1/predict", json=body)).json()
            waits.append(time.perf_counter() - planned)
            sources[answer["source"]] = sources.get(answer["source"], 0) + 1
            if number % 4 == 0:
                await http.post("/v1/observe", json={"id": answer["id"], "completion_tokens": 10 + number % 900})

        for number in range(40):
            await ask(1_000_000 + number, time.perf_counter())
        waits.clear()
        sources.clear()
        total, began = int(arguments.rate * arguments.seconds), time.perf_counter()
        at, own = core_s(arguments.core), process_s(server.pid)
        tasks = []
        for number in range(total):
            planned = began + number / arguments.rate
            await asyncio.sleep(max(planned - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(ask(number, max(planned, time.perf_counter()))))
        await asyncio.gather(*tasks)
        took = process_s(server.pid) - own
        text = (await http.get("/metrics")).text
        found |= {
            "requests": total,
            "rate": arguments.rate,
            "wall_ms": quantiles_ms(waits),
            "cpu_ms_per_request": round(1000 * took / total, 3),
            "others_share": share(at, began, took, arguments.core),
            "sources": sources,
            "rss_mb": round(memory_mb(server.pid), 1),
            "server_ms": bounds_ms(text),
        }
    server.terminate()
    found["exit_status"] = server.wait(20)
    return found


def share(before_core_s: float, began: float, own_s: float, core: int) -> float:
    """Share of the core that other processes took since."""
    return round(max(core_s(core) - before_core_s - own_s, 0.0) / (time.perf_counter() - began), 2)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", default=["chat-small", "chat-micro"])
    parser.add_argument("--rate", type=float, default=20.0, help="requests each second")
    parser.add_argument("--prompts", type=Path, help="JSON Lines of bodies; made-up prompts of 5 to 400 words if none")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--core", type=int, default=0, help="of the server")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    found = {
        "command": " ".join(["python", "tests/bench/serve.py", *sys.argv[1:]]),
        "cpu": cpu.partition(":")[2].strip(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "results": [asyncio.run(measure(artifact, arguments)) for artifact in arguments.artifacts],
    }
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
