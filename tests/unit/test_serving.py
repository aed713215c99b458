"""Predictions in a server: awaited, in time, never an exception of the network, and the same from many threads."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_tiny_artifact import PROMPTS

from mope import LengthPredictor, ServingPredictor, serving
from mope.cache import LruCache
from mope.errors import ConfigError, DataError

REQUESTS: list[Any] = [*PROMPTS, *({"prompt": prompt, "max_tokens": 40, "target_llm": "gpt-4"} for prompt in PROMPTS)]


class Panic(BaseException):
    """Like `pyo3_runtime.PanicException` of a tokenizer, this is no `Exception`."""


class Gate:
    """Stands before a predictor's network: counts what is asked, and holds it back until it is opened."""

    def __init__(self, predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []
        self.error: BaseException | None = None
        run = predictor.backend.run

        def gated(encoded: Any, choose: Any) -> Any:
            self.batches.append([len(ids) for ids in encoded.token_ids])
            self.entered.set()
            self.opened.wait(10)
            if self.error is not None:
                raise self.error
            return run(encoded, choose)

        monkeypatch.setattr(predictor.backend, "run", gated)


@pytest.fixture
def predictor(tiny: Path) -> Iterator[LengthPredictor]:
    loaded = LengthPredictor.from_pretrained(tiny, backend="torch", cache_size=0)
    loaded.predict("warm up")
    yield loaded
    loaded.close()


@pytest.fixture
def gate(predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(predictor, monkeypatch)
    yield made
    made.opened.set()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def in_child(work: Callable[[], object], seconds: float = 10.0) -> str:
    """What `work` returns in a child of a fork, as text; `"hangs"` if it takes too long."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            found = str(work())
        except BaseException as error:
            found = repr(error)
        os.write(writing, found.encode()[:4000])
        os._exit(0)
    try:
        os.close(writing)
        is_done = bool(select.select([reading], [], [], seconds)[0])
        return os.read(reading, 4000).decode() if is_done else "hangs"
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def source(asked: ServingPredictor, prompt: str = "hello", deadline_s: float | None = 5.0) -> str:
    return asyncio.run(asked.predict(prompt, deadline_s=deadline_s)).source


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


def test_awaited_it_predicts_the_same(predictor: LengthPredictor) -> None:
    async def ask() -> list[Any]:
        async with ServingPredictor(predictor, num_workers=3) as serving:
            found = await asyncio.gather(*(serving.predict(request) for request in REQUESTS))
            assert (serving.stats.predicted, serving.stats.batches) == (len(REQUESTS), len(REQUESTS))
            return found

    for one, other in zip(asyncio.run(ask()), predictor.predict_batch(REQUESTS), strict=True):
        np.testing.assert_allclose(one.cumulative, other.cumulative, atol=1e-4)
        assert (one.source, one.max_tokens, one.target_llm) == ("model", other.max_tokens, other.target_llm)


def test_predict_async_needs_no_more_than_a_predictor(predictor: LengthPredictor) -> None:
    async def ask() -> tuple[str, float]:
        first = await predictor.predict_async({"prompt": "hello", "max_tokens": 7}, deadline_s=10)
        return first.source, first.quantile(1.0)

    assert asyncio.run(ask()) == ("model", 7.0)
    assert asyncio.run(ask()) == ("model", 7.0)  # in another event loop
    predictor.close()
    predictor.close()
    assert asyncio.run(ask()) == ("model", 7.0)  # starts anew


def test_the_event_loop_goes_on(predictor: LengthPredictor, gate: Gate) -> None:
    async def ask() -> str:
        async with ServingPredictor(predictor) as serving:
            waiting = asyncio.create_task(serving.predict("hello"))
            await until(gate.entered.is_set)
            for _ in range(20):
                await asyncio.sleep(0)  # would never come back if the loop were blocked
            gate.opened.set()
            return (await waiting).source

    assert asyncio.run(ask()) == "model"


@pytest.mark.parametrize("deadline_s", [0.02, 0, -1])
def test_past_its_deadline_it_falls_back(predictor: LengthPredictor, gate: Gate, deadline_s: float) -> None:
    async def ask() -> None:
        async with ServingPredictor(predictor) as serving:
            started = time.monotonic()
            prediction = await serving.predict({"prompt": "hello", "max_tokens": 7}, deadline_s=deadline_s)
            assert time.monotonic() - started < 2
            assert prediction.source == "fallback:deadline"
            assert prediction.quantile(1.0) == 7.0
            assert serving.stats.deadline == 1
            gate.opened.set()
            assert (await serving.predict("hello", deadline_s=10)).source == "model"

    asyncio.run(ask())


def test_a_full_queue_falls_back_at_once(predictor: LengthPredictor, gate: Gate) -> None:
    async def ask() -> None:
        async with ServingPredictor(predictor, num_workers=1, max_waiting=3) as serving:
            await until(gate.entered.is_set)  # the warm-up holds the worker
            waiting = [asyncio.create_task(serving.predict("hello")) for _ in range(5)]
            await until(lambda: serving.stats.queue_full == 2)
            assert serving.stats.waiting == 3
            gate.opened.set()
            sources = [prediction.source for prediction in await asyncio.gather(*waiting)]
            assert sources == ["model"] * 3 + ["fallback:queue full"] * 2

    asyncio.run(ask())


def test_a_failing_network_falls_back_and_is_logged_once(
    predictor: LengthPredictor, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.error = RuntimeError("the engine is gone")
    gate.opened.set()

    async def ask() -> None:
        async with ServingPredictor(predictor) as serving:
            found = await asyncio.gather(*(serving.predict(prompt) for prompt in ("hello", "why", "list")))
            assert [prediction.source for prediction in found] == ["fallback:error"] * 3
            assert serving.stats.errors == 3
            gate.error = None
            assert (await serving.predict("hello")).source == "model"

    with caplog.at_level(logging.ERROR, logger="mope"):
        asyncio.run(ask())
    assert len(caplog.records) == 1
    assert "the engine is gone" in caplog.text


def test_no_request_waits_for_ever_after_a_panic(
    predictor: LengthPredictor, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.error = Panic("in a tokenizer")
    gate.opened.set()

    async def ask() -> None:
        async with ServingPredictor(predictor) as serving:
            for _ in range(5):  # more than there are threads
                assert (await asyncio.wait_for(serving.predict("hello"), 10)).source == "fallback:error"
            gate.error = None
            assert (await asyncio.wait_for(serving.predict("hello"), 10)).source == "model"
            assert (serving.stats.errors, serving.stats.predicted) == (5, 1)

    with caplog.at_level(logging.ERROR, logger="mope"):
        asyncio.run(ask())
    assert len(caplog.records) == 1
    assert "in a tokenizer" in caplog.text


@pytest.mark.parametrize("error", [ValueError("bad"), Panic("bad"), None], ids=["error", "panic", "no answer"])
def test_a_bad_request_fails_alone(
    predictor: LengthPredictor, gate: Gate, monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    predict_batch = predictor.predict_batch

    def fail_if_bad(requests: Any) -> Any:
        found = predict_batch(requests)
        if any(request.prompt == "bad" for request in requests):
            if error is None:
                return found[1:]
            raise error
        return found

    monkeypatch.setattr(predictor, "predict_batch", fail_if_bad)

    async def ask() -> list[str]:
        async with ServingPredictor(predictor, max_batch=4, window_s=0.2) as serving:
            await until(gate.entered.is_set)
            tasks = [asyncio.create_task(serving.predict(prompt)) for prompt in ("why", "bad", "list", "hello")]
            await until(lambda: serving.stats.waiting == 4)
            gate.opened.set()
            found = await asyncio.wait_for(asyncio.gather(*tasks), 10)
            assert (serving.stats.errors, serving.stats.predicted, serving.stats.batches) == (1, 3, 3)
            return [prediction.source for prediction in found]

    assert asyncio.run(ask()) == ["model", "fallback:error", "model", "model"]


def test_a_cancelled_request_is_passed_over(predictor: LengthPredictor, gate: Gate) -> None:
    async def ask() -> None:
        async with ServingPredictor(predictor, num_workers=1) as serving:
            await until(gate.entered.is_set)
            given_up, kept = (asyncio.create_task(serving.predict(prompt)) for prompt in ("hello", "why"))
            await until(lambda: serving.stats.waiting == 2)
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            gate.opened.set()
            assert (await kept).source == "model"
            assert serving.stats.predicted == 1

    asyncio.run(ask())
    assert len(gate.batches) == 2  # the warm-up and the one that was kept


def test_cancelled_while_it_runs_the_others_of_its_batch_are_answered(predictor: LengthPredictor, gate: Gate) -> None:
    async def ask() -> None:
        async with ServingPredictor(predictor, max_batch=4, window_s=0.2) as serving:
            await until(gate.entered.is_set)
            tasks = [asyncio.create_task(serving.predict(prompt)) for prompt in ("hello", "why", "list")]
            await until(lambda: serving.stats.waiting == 3)
            gate.entered.clear()
            gate.opened.set()
            await until(gate.entered.is_set)
            tasks[1].cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [getattr(one, "source", "cancelled") for one in found] in (
                ["model", "cancelled", "model"],
                ["model"] * 3,  # it was answered before it was cancelled
            )

    asyncio.run(ask())


def test_on_a_gpu_requests_are_collected_in_batches_of_like_length(predictor: LengthPredictor, gate: Gate) -> None:
    predictor.device = "cuda"
    prompts = ["why " * count for count in (9, 1, 5, 3, 7, 2)]

    async def ask() -> None:
        async with ServingPredictor(predictor, window_s=0.2) as serving:
            await until(gate.entered.is_set)
            tasks = [asyncio.create_task(serving.predict(prompt)) for prompt in prompts]
            await until(lambda: serving.stats.waiting == len(prompts))
            gate.opened.set()
            found = await asyncio.gather(*tasks)
            assert (serving.stats.predicted, serving.stats.batches) == (6, 1)
            for prompt, prediction in zip(prompts, found, strict=True):
                np.testing.assert_allclose(prediction.cumulative, predictor.predict(prompt).cumulative, atol=1e-4)

    asyncio.run(ask())
    assert gate.batches[1] == sorted(gate.batches[1])
    assert len(gate.batches[1]) == 6


def test_a_batch_is_no_larger_than_allowed(predictor: LengthPredictor, gate: Gate) -> None:
    async def ask() -> None:
        async with ServingPredictor(predictor, max_batch=4, window_s=0.2) as serving:
            await until(gate.entered.is_set)
            tasks = [asyncio.create_task(serving.predict("hello")) for _ in range(10)]
            await until(lambda: serving.stats.waiting == 10)
            gate.opened.set()
            await asyncio.gather(*tasks)

    asyncio.run(ask())
    assert [len(batch) for batch in gate.batches[1:]] == [4, 4, 2]


def test_closing_answers_what_waits(predictor: LengthPredictor, gate: Gate) -> None:
    async def ask() -> list[str]:
        serving = ServingPredictor(predictor, num_workers=2)
        tasks = [asyncio.create_task(serving.predict("hello")) for _ in range(5)]
        await until(lambda: serving.stats.waiting == 5)
        threading.Timer(0.05, gate.opened.set).start()
        await asyncio.get_running_loop().run_in_executor(None, serving.close)
        serving.close()
        with pytest.raises(ConfigError, match="was closed"):
            await serving.predict("hello")
        return [prediction.source for prediction in await asyncio.gather(*tasks)]

    before = threading.active_count()
    assert asyncio.run(ask()) == ["model"] * 5
    assert threading.active_count() <= before


def test_what_cannot_be_asked_is_refused(predictor: LengthPredictor) -> None:
    async def ask(request: Any, **options: Any) -> Any:
        return await predictor.predict_async(request, **options)

    with pytest.raises(DataError, match="got int"):
        asyncio.run(ask(3))
    for deadline_s in (float("nan"), "soon"):
        with pytest.raises(ConfigError, match=r"deadline_s: got .+; expected seconds"):
            asyncio.run(ask("hello", deadline_s=deadline_s))
    for options in ({"num_workers": 0}, {"max_waiting": 0}, {"max_batch": 0}, {"window_s": -1}, {"window_s": 60}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: got"):
            ServingPredictor(predictor, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("cache_size", [0, 8])
def test_many_threads_predict_and_teach_at_once(tiny: Path, cache_size: int) -> None:
    shared = LengthPredictor.from_pretrained(tiny, backend="torch", cache_size=cache_size)
    alone = LengthPredictor.from_pretrained(tiny, backend="torch", cache_size=0)
    serial = [alone.predict_batch([request])[0] for request in REQUESTS]
    tokenizer = shared.encoder.tokenizer_json()

    def work(number: int) -> float:
        worst = 0.0
        for step in range(len(REQUESTS)):
            position = (step * 7 + number) % len(REQUESTS)
            prediction = shared.predict_batch([REQUESTS[position]])[0]
            assert prediction.raw_cumulative is not None
            difference = np.abs(prediction.raw_cumulative - serial[position].cumulative).max()
            worst = max(worst, float(difference))
            assert np.all(np.diff(prediction.cumulative) >= 0)
            shared.observe(prediction, 10 + step, censored=False)
        return worst

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(8))) <= 1e-6
    assert len(shared.recalibrator) == 8 * len(REQUESTS)
    assert shared.encoder.tokenizer_json() == tokenizer


@pytest.mark.parametrize(("seconds", "ended"), [(0.3, ["ended"] * 2), (600, [])], ids=["soon", "never"])
def test_an_interpreter_that_ends_waits_for_predictions_under_way(tiny: Path, seconds: float, ended: list[str]) -> None:
    """Threads inside ONNX Runtime when it ended aborted the process; one that hangs does not hold it for long."""
    code = f"""
import threading, time
from mope import LengthPredictor
from mope.serving import ServingPredictor
predictor, begun = LengthPredictor.from_pretrained({str(tiny)!r}), threading.Barrier(3)
def predict_batch(requests):
    begun.wait()
    time.sleep({seconds})
    print("ended", flush=True)
    return [predictor.fallback("slow", request) for request in requests]
predictor.predict_batch = predict_batch
serving = ServingPredictor(predictor, max_waiting=1, max_batch=1)
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ended, "")


@needs_fork
def test_a_child_of_a_fork_has_threads_and_counters_of_its_own(predictor: LengthPredictor) -> None:
    shared = ServingPredictor(predictor)
    assert source(shared) == "model"

    def work() -> object:
        before = shared.stats
        found = [source(shared) for _ in range(3)]
        after, names = shared.stats, sorted(thread.name for thread in threading.enumerate() if "mope" in thread.name)
        shared.close()
        shared.close()
        try:
            source(shared)
        except ConfigError:
            found.append("closed")
        return found, before.predicted, after.predicted, names

    assert in_child(work) == str((["model"] * 3 + ["closed"], 0, 3, ["mope-0", "mope-1"]))
    assert in_child(lambda: in_child(lambda: source(shared))) == "model"  # in a child of a child
    assert (source(shared), shared.stats.predicted) == ("model", 2)
    assert in_child(shared.close) == "None"  # without any thread
    assert source(shared) == "model"
    shared.close()
    assert in_child(lambda: source(shared)).startswith("ConfigError")


@needs_fork
@pytest.mark.parametrize("lock", ["submitting", "counting", "queue", "cache"])
def test_a_lock_that_another_thread_held_at_a_fork_is_free_in_the_child(tiny: Path, lock: str) -> None:
    predictor = LengthPredictor.from_pretrained(tiny, backend="torch", cache_size=8)
    shared = ServingPredictor(predictor)
    assert source(shared) == "model"
    held: Any = {
        "submitting": shared._submitting,
        "counting": shared._counting,
        "queue": shared._jobs.mutex,
        "cache": predictor._cache._lock,
    }[lock]
    is_held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with held:
            is_held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait(10)
    try:
        assert in_child(lambda: source(shared)) == "model"
    finally:
        release.set()
        holder.join()
    assert source(shared) == "model"
    shared.close()


@needs_fork
def test_requests_that_wait_at_a_fork_belong_to_the_parent(predictor: LengthPredictor, gate: Gate) -> None:
    gate.opened.set()

    async def ask() -> list[str]:
        async with ServingPredictor(predictor) as shared:
            await shared.predict("hello")
            await until(lambda: len(gate.batches) == 3)  # two warm-ups and the request
            gate.opened.clear()
            tasks = [asyncio.create_task(shared.predict("why")) for _ in range(5)]
            await until(lambda: shared.stats.waiting == 3)

            def work() -> object:
                gate.opened.set()
                return shared.stats.waiting, source(shared), shared.stats.predicted

            found = await asyncio.get_running_loop().run_in_executor(None, in_child, work)
            assert found == str((0, "model", 1))
            assert shared.stats.waiting == 3
            gate.opened.set()
            return [prediction.source for prediction in await asyncio.gather(*tasks)]

    assert asyncio.run(ask()) == ["model"] * 5


@needs_fork
def test_a_fork_waits_for_first_predictions_but_not_for_ever(
    predictor: LengthPredictor, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They import modules; one that another thread imports at the fork can't be imported in the child."""
    with_patience = ServingPredictor(predictor)
    threading.Timer(0.3, gate.opened.set).start()
    assert in_child(gate.opened.is_set) == "True"
    with_patience.close()
    gate.opened.clear()
    monkeypatch.setattr(serving, "WARM_UP_S", 0.1)
    without = ServingPredictor(predictor)
    assert in_child(gate.opened.is_set) == "False"
    gate.opened.set()
    without.close()


@needs_fork
@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_children_of_a_busy_parent_predict(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    threads = 2 if engine == "onnx" else 1
    predictor = LengthPredictor.from_pretrained(exported["shared"], backend=engine, num_threads=threads, cache_size=2)
    shared, is_over = ServingPredictor(predictor), threading.Event()
    assert source(shared) == "model"

    def keep_asking(number: int) -> int:
        count = 0
        while not is_over.is_set():
            assert source(shared, f"{number} {count}", None) == "model"
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(3)]
        try:
            found = []
            for number in range(30):
                found.append(in_child(lambda number=number: source(shared, f"child {number}")))  # type: ignore[misc]
                if found[-1] != "model":
                    break
        finally:
            is_over.set()
        assert found == ["model"] * 30
        assert min(done.result() for done in asking) > 0
    shared.close()


@needs_fork
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_child_opens_the_graphs_anew_and_ends(exported: dict[str, Path], num_threads: int) -> None:
    """With threads of ONNX Runtime that are not there, a child hung when it ended."""
    code = f"""
import os, sys
from mope import LengthPredictor
predictor = LengthPredictor.from_pretrained({str(exported["shared"])!r}, backend="onnx", num_threads={num_threads})
print(predictor.predict("hello").quantile(0.5), flush=True)
for _ in range(2):
    if child := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(predictor.predict("hello").quantile(0.5), flush=True)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    assert len(printed.split()) == 3
    assert len(set(printed.split())) == 1


@needs_fork
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (os.unlink, "changed after they were loaded"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "changed after they were loaded"),
        (os.utime, "source='model'"),  # the same bytes
    ],
    ids=["removed", "replaced", "touched"],
)
def test_a_child_never_opens_other_graphs_than_the_parent(
    exported: dict[str, Path], tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    folder = shutil.copytree(exported["shared"], tmp_path / "copy")
    predictor = LengthPredictor.from_pretrained(folder, backend="onnx", cache_size=0)
    for graph in (folder / "onnx").glob("*.onnx"):
        change(graph)
    assert said in in_child(lambda: predictor.predict("hello"))
    assert predictor.predict("hello").source == "model"


def test_hooks_for_forks_keep_nothing_alive(predictor: LengthPredictor) -> None:
    cache: LruCache[int] = LruCache(3)
    shared = ServingPredictor(predictor)
    shared.close()
    kept = [weakref.ref(cache), weakref.ref(shared)]
    del cache, shared
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
