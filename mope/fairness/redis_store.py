"""Counters shared through a Redis server: a thread of its own speaks with it, the scheduler never does.

`exchange`, which the scheduler calls, moves lists between two queues and takes no lock, no socket and no clock. The
thread tells and reads every `interval_s`; so what one replica charges is counted by another after `interval_s` of each
and two round trips. When the server is slow or gone, replicas go on with what they know, and what they charge meanwhile
is told later; the thread tries again after a pause that doubles up to `max_backoff_s`, spread by chance so that not all
replicas return at once. What was charged in the last `interval_s` before a process is killed is lost.

Knows threads, sockets and clocks; the protocol is in `mope.fairness.sharing`.

The server: Redis 5 or newer, or Valkey, one primary; keys must not be evicted under memory pressure (`noeviction` is
best; `volatile-*` may take what is kept for telling again after a loss; under `allkeys-*`, of which a warning tells,
totals are lost). Whoever may write to the database is trusted: they can give any client any counter. But nothing that
they write ends the thread or raises in the scheduler.

How much is lost when the server is killed depends on nothing but the living replicas: they tell again what it has lost.
Persistence is needed for the share of replicas that are gone.

After a fork, the child is a replica of its own, which tells nothing of what its parent charged.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, cast

from typing_extensions import override

from mope.errors import ConfigError, StoreError
from mope.extras import require
from mope.fairness.clients import Path
from mope.fairness.ledger import Ledger
from mope.fairness.redis_scripts import Script
from mope.fairness.sharing import FORGOTTEN_FIELD, Sharing
from mope.fairness.stores import (
    FORGOTTEN,
    Store,
    StoreConfig,
    StoreStats,
    address,
    charges_of,
    count_elsewhere,
    field_of,
    path_of,
    shown,
)

CHUNK = 500  # clients whose charges elsewhere are counted in one step at most
_MAX_CHUNKS = 8  # that are laid out for the scheduler; more is added up until it has taken these
_YIELD = 100  # clients that the thread looks at between two offers of Python's lock to the scheduler
_FIRST_BACKOFF_S = 0.05
_logger = logging.getLogger("mope")
_stores: weakref.WeakSet[RedisStore] = weakref.WeakSet()


class RedisServer:
    """One connection. It is never mended: after any error the next one begins a new session."""

    def __init__(self, config: StoreConfig) -> None:
        """Connects.

        Raises:
            MissingExtraError: the package `redis` is not installed.
            StoreError: the URL can't be used.
            redis.RedisError, OSError: the server can't be reached, or does not let us in.
        """
        redis = require("redis", "sharing counters through a Redis server")
        retry = require("redis.retry", "sharing counters through a Redis server")
        backoff = require("redis.backoff", "sharing counters through a Redis server")
        self._unknown_script = redis.exceptions.NoScriptError
        self._refused = redis.exceptions.ResponseError
        try:
            self._client = redis.Redis.from_url(
                address(config.url),
                socket_timeout=config.timeout_s,
                socket_connect_timeout=config.timeout_s,
                retry=retry.Retry(backoff.NoBackoff(), 0),
                single_connection_client=True,
                protocol=2,
                client_name="mope",
            )
        except (ValueError, TypeError):  # whose text may hold a part of the password
            raise StoreError(
                f"store {shown(config.url)}: its URL can't be read; expected redis://USER:PASSWORD@HOST:PORT/DB, with "
                "/ as %2F, # as %23 and @ as %40 in a password"
            ) from None

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        """The reply to a script, its texts as bytes."""
        try:
            return self._client.evalsha(script.digest, len(keys), *keys, *arguments)
        except self._unknown_script:
            return self._client.eval(script.text, len(keys), *keys, *arguments)

    def fields(self, key: str) -> Iterator[tuple[bytes, bytes]]:
        """Fields and values of a hash."""
        return cast("Iterator[tuple[bytes, bytes]]", self._client.hscan_iter(key, count=1000))

    def eviction_policy(self) -> str:
        """What the server does once its memory is full, such as `noeviction`; empty if it does not say."""
        try:
            return str(self._client.info("memory").get("maxmemory_policy", ""))
        except self._refused:  # not every user may ask
            return ""

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()


class RedisStore(Store):
    """Shares counters with all replicas that use the same server and namespace.

    `exchange` takes less than a microsecond when there is nothing to do, otherwise O(touched + received), where at most
    `CHUNK` received clients are counted in one step.
    """

    def __init__(self, config: StoreConfig) -> None:
        """One more replica; its thread starts at once.

        Raises:
            MissingExtraError: the package `redis` is not installed.
            StoreError: the server is `required` and can't be reached or can't be used.
        """
        self.config = config
        started_s = time.monotonic()
        self._check()
        self._ledger: Ledger | None = None
        self._closed = False
        self._begin(started_s)
        _stores.add(self)

    def _check(self) -> None:
        """Looks whether the server is there, if it has to be."""
        errors = require("redis.exceptions", "sharing counters through a Redis server")
        if not self.config.required:
            return
        where = shown(self.config.url)
        try:
            server = RedisServer(self.config)
            try:
                self._new_sharing().check(server)
            finally:
                server.close()
        except StoreError:
            raise
        except (errors.AuthenticationError, errors.AuthorizationError, errors.NoPermissionError) as error:
            raise StoreError(
                f"store {where} does not let us in ({error}); expected redis://USER:PASSWORD@HOST:PORT/DB of a user "
                "who may run scripts"
            ) from error
        except (errors.RedisError, OSError) as error:
            raise StoreError(
                f"store {where} can't be used ({error}); start it, correct its URL, or go on without it by "
                "required=False"
            ) from error

    def _new_sharing(self) -> Sharing:
        config = self.config
        return Sharing(
            config.namespace,
            config.replica or f"{socket.gethostname()}-{os.getpid()}",
            max_clients=config.max_clients,
            settle_s=2 * (config.max_backoff_s + config.timeout_s) + config.interval_s,
        )

    def _begin(self, started_s: float) -> None:
        self._charged: deque[dict[Path, int]] = deque()  # from the scheduler to the thread, one at most
        self._elsewhere: deque[list[tuple[Path, int]]] = deque()  # from the thread to the scheduler
        self._sharing = self._new_sharing()
        self._server: RedisServer | None = None
        self._started_s, self._succeeded_s = started_s, started_s
        self._round_trip_s = self._deadline_s = 0.0
        self._num_exchanges = self._num_failures = self._num_failures_in_row = self._num_uncounted = 0
        self._has_warned = self._has_told_uncounted = False
        self._last_error = ""
        self._num_begun = self._last_done = 0  # exchanges with the server, for those who wait for one
        self._progress = threading.Condition()
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = threading.Thread(target=self._work, name="mope-store", daemon=True)
        self._thread.start()

    def _forked(self) -> None:
        """This process is a copy: thread and connection are the original's, and so is what it charged."""
        self._thread = None
        if self._ledger is not None:
            self._ledger.take_touched()

    # -- the scheduler's side

    @override
    def exchange(self, ledger: Ledger) -> None:
        if ledger is not self._ledger:
            self._ledger, ledger.follow_touched = ledger, True
        if self._thread is None and not self._closed:
            self._begin(time.monotonic())
        touched = ledger.take_touched()
        if touched and not self._closed:
            self._charged.append(charges_of(touched, self._take_back()))
        if self._elsewhere:
            self._num_uncounted += count_elsewhere(ledger, self._elsewhere.popleft())

    def _take_back(self) -> dict[Path, int] | None:
        """What was handed over and the thread has not taken: so little is handed over however long it is busy."""
        try:
            return self._charged.pop()
        except IndexError:
            return None

    @override
    def flush(self, deadline_s: float = 2.0) -> bool:
        if self._closed or self._thread is None:
            return False
        with self._progress:
            wanted = self._num_begun + 1
            self._wake.set()
            self._progress.wait_for(lambda: self._last_done >= wanted or self._closed, deadline_s)
            return self._last_done >= wanted

    @override
    def totals(self) -> dict[Path, int]:
        server = RedisServer(self.config)
        try:
            found = self._sharing.totals(server)
        finally:
            server.close()
        totals = {FORGOTTEN: found.pop(FORGOTTEN_FIELD)} if FORGOTTEN_FIELD in found else {}
        for field, total in found.items():
            with suppress(ConfigError):  # somebody else wrote it
                totals[path_of(field)] = total
        return totals

    @override
    def stats(self) -> StoreStats:
        sharing = self._sharing
        return StoreStats(
            "redis",
            staleness_s=time.monotonic() - self._succeeded_s,
            round_trip_s=self._round_trip_s,
            num_exchanges=self._num_exchanges,
            num_failures=self._num_failures,
            num_failures_in_row=self._num_failures_in_row,
            last_error=self._last_error,
            num_restored=sharing.num_restored,
            num_refused=sharing.num_refused + self._num_uncounted,
            num_clients=sharing.num_clients,
            num_untold=sharing.num_untold,
            num_unapplied=len(sharing.received) + sum(map(len, tuple(self._elsewhere))),
        )

    @override
    def close(self, deadline_s: float = 2.0) -> bool:
        thread = self._thread
        if thread is not None and not self._closed:
            self._deadline_s = time.monotonic() + deadline_s
            self._closing = True
            self._wake.set()
            thread.join(deadline_s)
        self._closed = True
        ended = thread is None or not thread.is_alive()
        return ended and not self._charged and not self._sharing.num_untold

    # -- the thread's side

    def _work(self) -> None:
        backoff_s, pause_s = _FIRST_BACKOFF_S, 0.0
        while True:
            self._wake.wait(pause_s)
            self._wake.clear()
            closing = self._closing  # as of before the exchange: then all that was handed over before is in it
            started_s = time.monotonic()
            done = self._attempt(started_s)
            if done:
                backoff_s, pause_s = _FIRST_BACKOFF_S, self.config.interval_s - (time.monotonic() - started_s)
            else:
                pause_s = backoff_s * random.uniform(0.5, 1.0)
                backoff_s = min(2 * backoff_s, self.config.max_backoff_s)
            if closing and (done or time.monotonic() + pause_s >= self._deadline_s):
                break
        self._end(done)

    def _attempt(self, started_s: float) -> bool:
        """One exchange with the server; says whether it succeeded."""
        with self._progress:
            self._num_begun += 1
        try:
            try:
                self._take_charges()
                if self._server is None:
                    self._server = RedisServer(self.config)
                    self._warn_of_eviction(self._server)
                self._sharing.exchange(self._server, started_s, started_s - self._started_s)
            finally:
                self._lay_out()
        except Exception as error:  # whatever it is: nobody else would ever mend it, and the engine goes on without
            self._failed(error)
            return False
        self._succeeded_s = started_s
        self._round_trip_s = time.monotonic() - started_s
        self._num_exchanges += 1
        if self._num_failures_in_row:
            _logger.info("store %s is back; what was charged meanwhile is told", shown(self.config.url))
        self._num_failures_in_row = 0
        with self._progress:
            self._last_done = self._num_begun
            self._progress.notify_all()
        return True

    def _warn_of_eviction(self, server: RedisServer) -> None:
        policy = server.eviction_policy()
        if policy.startswith("allkeys") and not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "store %s has maxmemory-policy %s: once its memory is full it drops counters; type "
                "CONFIG SET maxmemory-policy noeviction there",
                shown(self.config.url),
                policy,
            )

    def _take_charges(self) -> None:
        for number, (path, amount) in enumerate((self._take_back() or {}).items()):
            if number % _YIELD == 0:
                time.sleep(0)  # lets the scheduler have Python's lock
            self._sharing.charge(field_of(path), amount)

    def _lay_out(self) -> None:
        received = self._sharing.received
        while received and len(self._elsewhere) < _MAX_CHUNKS:
            chunk = []
            for field in list(islice(received, CHUNK)):
                amount = received.pop(field)
                try:
                    path = path_of(field)
                except ConfigError as error:
                    self._num_uncounted += 1
                    if not self._has_told_uncounted:
                        self._has_told_uncounted = True
                        _logger.warning("store %s: %s (told once)", shown(self.config.url), error)
                    continue
                if amount:
                    chunk.append((path, amount))
            self._elsewhere.append(chunk)
            time.sleep(0)

    def _failed(self, error: Exception) -> None:
        self._disconnect()
        self._num_failures += 1
        self._last_error = f"{type(error).__name__}: {error}"
        if not self._num_failures_in_row:
            _logger.warning(
                "store %s can't be used (%s): counting goes on here, and is told later",
                shown(self.config.url),
                self._last_error,
            )
        self._num_failures_in_row += 1

    def _disconnect(self) -> None:
        server, self._server = self._server, None
        self._sharing.disconnected()
        if server is not None:
            try:
                server.close()
            except Exception as error:  # it was broken before
                _logger.debug("a connection that is given up: %r", error)

    def _end(self, done: bool) -> None:
        if done and self._server is not None and not self._charged:
            try:
                self._sharing.farewell(self._server)
            except Exception as error:  # all is told; what the server keeps needlessly expires
                _logger.debug("store %s: %r", shown(self.config.url), error)
        self._disconnect()
        with self._progress:
            self._progress.notify_all()


def _after_fork() -> None:
    for store in list(_stores):
        store._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
