"""What a prediction costs a front end: by its own predictor, and by a `mope serve` at a loopback port, in turn.

    python tests/bench/remote.py chat-small

Prints one line of JSON: milliseconds of processor time in the event loop and in all of the process, milliseconds that a
request waits (median and 99th percentile), and milliseconds of processor time that an observation takes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from ports import free_port

from mope.serving_hooks.front import Front
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.identity import Identity
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.remote import Teacher, name_of

ROUNDS, EACH = 8, 100
LOGGER = logging.getLogger("bench")
TEXT = "Explain in a few paragraphs how TCP slow start works, when it ends, and what RFC {} says of it."


def front(predictor: str) -> Front:
    options = HookOptions(predictor=predictor, deadline_ms=60_000, identity="header")
    return Front.load(options, Identity(options, secret=b"", logger=LOGGER), ("llama-3-8b",), logger=LOGGER)


async def measure(local: str, url: str) -> dict[str, Any]:
    fronts = {"local": front(local), "remote": front(url)}
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in fronts}
    answering, number = [], 0
    for turn in range(ROUNDS + 1):
        for name, made in fronts.items():
            waited, loop_s, process_s = [], time.thread_time(), time.process_time()
            for _ in range(EACH):
                number += 1  # a repeated prompt would be answered from the cache
                body = {"messages": [{"role": "user", "content": TEXT.format(number)}], "max_tokens": 512}
                started = time.perf_counter()
                told = await made.carried("chat", [(b"x-client-id", b"a")], body, Guard(LOGGER))
                waited.append(time.perf_counter() - started)
                if told.tokens is None:
                    raise SystemExit(f"{name}: no prediction")
                if name == "remote":
                    answering.append(told.answering)
            spent = (time.thread_time() - loop_s, time.process_time() - process_s)
            if turn:  # the first one warms up
                centiles = statistics.quantiles(waited, n=100)
                figures[name].append((*(one / EACH for one in spent), centiles[49], centiles[98]))
    teacher, started_s = Teacher(url), time.thread_time()
    for one in answering:
        teacher.observe(name_of(one) or "", 300, censored=False, client="a")
    observe_ms = 1000 * (time.thread_time() - started_s) / len(answering)
    columns = ("loop_cpu_ms", "process_cpu_ms", "p50_ms", "p99_ms")
    found = {
        name: dict(
            zip(columns, (round(1000 * statistics.median(one), 2) for one in zip(*rows, strict=True)), strict=True)
        )
        for name, rows in figures.items()
    }
    return {"predictor": local, **found, "observe_cpu_ms": round(observe_ms, 3)}


def main(predictor: str) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    code = "from mope.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "serve", predictor, "--port", str(port), "--no-log-requests"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOPE_API_KEY")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as service:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/ready", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            print(json.dumps(asyncio.run(measure(predictor, url))))
        finally:
            service.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
