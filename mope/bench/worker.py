"""The process that one subject lives in: it loads it, answers, and holds the clocks.

A process each keeps subjects out of each other's threads, processor time and memory. Started as
`python -m mope.bench.worker`, it takes pickled commands from stdin and answers on stdout until stdin ends; `Worker`
is its other end. The standard library alone at the top, so that importing mope can be timed.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mope.bench.subjects import Loaded, Peer, Subject, load_subject
from mope.bench.timing import Endless, Rate, Times, rate, timed
from mope.errors import MopeError, UserError

if TYPE_CHECKING:
    from mope.request import Request

STATUS = Path("/proc/self/status")


class Worker:
    """A subject in a process of its own. Use it in a `with` statement.

    Args:
        subject: what it loads when it is told to `start`.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        threads = {name: str(subject.num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mope.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONSAFEPATH": "1"},
        )

    def call(self, command: str, *arguments: Any) -> Any:
        """Have a method of `Session` run there, and return its result.

        Raises:
            UserError: what the method raised.
            MopeError: the process ended; what it had to say is on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((command, arguments), self._process.stdin)
            self._process.stdin.flush()
            result = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait()
            why = "killed, perhaps for want of memory" if status == -getattr(signal, "SIGKILL", 9) else "see above"
            raise MopeError(f"the process of {self.subject.name} ended with status {status}: {why}") from error
        if isinstance(result, UserError):
            raise result
        return result

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


class Session:
    """What the process does on command: load a subject, answer requests, look at clocks and memory."""

    _loaded: Loaded
    _requests: Sequence[Request]
    _singles: Endless[Sequence[Request]]
    _batches: Endless[Sequence[Request]]

    def start(self, subject: Subject, requests: Sequence[Request], batch_size: int, seed: int) -> dict[str, Any]:
        """Import, load and answer the first request.

        Args:
            subject: what to load.
            requests: that it will be asked about.
            batch_size: requests that are answered at once, where batches are measured.
            seed: of the order of the batches.

        Returns:
            Seconds and memory.
        """
        python_mb = _memory_mb("VmRSS")
        started = time.perf_counter()
        _import_for(subject)
        imported = time.perf_counter()
        self._loaded = load_subject(subject)
        loaded = time.perf_counter()
        loaded_mb = _memory_mb("VmRSS")
        self._requests = requests
        first = timed(partial(self._loaded.answer, [requests[0]]))
        by_length = sorted(requests, key=lambda request: len(request.prompt))
        batches = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
        random.Random(seed).shuffle(batches)
        self._singles, self._batches = Endless([[request] for request in requests]), Endless(batches)
        return {
            "import_s": imported - started,
            "load_s": loaded - imported,
            "first_ms": first.wall_ms,
            "python_rss_mb": python_mb,
            "loaded_rss_mb": loaded_mb,
        }

    def warm_up(self, num_requests: int) -> None:
        """Answer requests whose times nobody looks at, the longest prompt among them."""
        longest = max(self._requests, key=lambda request: len(request.prompt))
        for request in [longest, *self._requests[:num_requests]]:
            self._loaded.answer([request])

    def latencies(self, positions: Sequence[int]) -> list[Times]:
        """Answer some requests, each alone, after one that does not count: another process had the core before."""
        self._loaded.answer([self._requests[positions[0] - 1]])
        return [timed(partial(self._loaded.answer, [self._requests[at]])) for at in positions]

    def throughput(self, num_callers: int, seconds: float) -> Rate:
        """Answer requests one by one from several threads."""
        return rate(self._loaded.answer, self._singles, seconds, num_callers)

    def batch_throughput(self, seconds: float) -> Rate:
        """Answer batches from one thread."""
        return rate(self._loaded.answer, self._batches, seconds)

    def count_tokens(self) -> list[int]:
        """Tokens that the network reads of each request."""
        return self._loaded.count_tokens(self._requests)

    def memory(self) -> dict[str, float | None]:
        """Resident memory now and at its highest, in MB of 10^6 bytes; None where the system does not say."""
        return {"rss_mb": _memory_mb("VmRSS"), "peak_rss_mb": _memory_mb("VmHWM") or _peak_rss_mb()}


def _import_for(subject: Subject) -> None:
    """Import what a user of the subject imports. Its engine is imported when it is loaded."""
    if isinstance(subject, Peer):
        import mope.bench.peers
    else:
        import mope.predictor  # noqa: F401


def _memory_mb(field: str) -> float | None:
    # not getrusage alone: on Linux its peak is that of the parent, if that had more before the child was started
    if not STATUS.exists():
        return None
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    kilobytes = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024 / 1e6


def _peak_rss_mb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> None:
    """Serve commands until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the other end, which ends this process
    session = Session()
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not stand between answers
        while True:
            try:
                command, arguments = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            result: Any
            try:
                result = getattr(session, command)(*arguments)
            except UserError as error:
                result = error
            pickle.dump(result, answers)
            answers.flush()


if __name__ == "__main__":
    main()
