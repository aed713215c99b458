"""A predictor that was made before gunicorn forked its workers (`--preload`) predicts in each of them."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest
from ports import free_port

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gunicorn") is None, reason="gunicorn is not installed: pip install gunicorn"
)
START_S, STOP_S = 60.0, 15.0  # gunicorn kills a worker that hangs after 30 s
_web = build_opener(ProxyHandler({}))


def ask(port: int, path: str) -> list[str]:
    with _web.open(f"http://127.0.0.1:{port}/{path}", timeout=20) as response:
        text: str = response.read().decode()
        return text.split(" ")


@contextmanager
def gunicorn(artifact: Path, log: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port, folder = free_port(), Path(__file__).parent
    # `CI` switches ONNX Runtime's telemetry off, whose thread makes workers hang when they end
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment["MOPE_TEST_ARTIFACT"] = str(artifact)
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--bind", f"127.0.0.1:{port}", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--chdir", str(folder), "gunicorn_app:application"],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                ask(port, "start")
                break
            except (URLError, ConnectionError):
                time.sleep(0.05)
        yield port, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("options", [("--worker-class", "sync"), ("--threads", "2")], ids=["sync", "threaded"])
def test_workers_predict_and_end(exported: dict[str, Path], tmp_path: Path, options: tuple[str, ...]) -> None:
    log = tmp_path / "log"
    with gunicorn(exported["shared"], log, *options) as (port, process):
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: ask(port, f"request-{number}"), range(20)))
        assert [answer[1:] for answer in answers] == [["model", "model"]] * 20, log.read_text()
        assert str(process.pid) not in {answer[0] for answer in answers}
        process.terminate()
        assert process.wait(STOP_S) == 0, log.read_text()
