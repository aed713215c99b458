"""The measurements: prompts on the idle server, requests that decode together, and checks with mixed traffic.

Knows what to ask and when; not how a server is asked, nor what is fitted. Everything is measured once before anything
is measured again, each round in another order, so that whenever it stops, every setting was seen about as often.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mope.errors import ServerError
from mope.profiling.client import Server, Stream, StreamedAnswer
from mope.profiling.config import ProfilingConfig

MIN_STEPS = 4  # of a measurement of decoding; of fewer, the first and the last weigh too much
SEGMENT_STEPS = 16  # a run of decode steps is cut into pieces of about so many, whose contexts differ
PROMPTS = 3  # of a length in each round: they cost little beside decoding, and one alone says little
MARGIN_TOKENS = 16  # left of the longest context, because words are not tokens
CHECK_TOKENS = (8, 128)  # shortest and longest answer of a check
POLL_S = 0.01
BROKEN = 3  # measurements in a row that may fail before the server counts as dead


@dataclass(frozen=True)
class Prefill:
    """The first token of one prompt, on the server that does nothing else."""

    prompt_tokens: int
    seconds: float
    wanted_tokens: int

    @property
    def setting(self) -> tuple[int, ...]:
        """What was wanted alike: measurements of one setting are held out together."""
        return (self.wanted_tokens,)


@dataclass(frozen=True)
class Steps:
    """Some steps of requests that decoded together."""

    num_running: int
    context_tokens: float
    seconds: float  # of a step
    wanted_context: int  # prompt tokens of each request, as they were wanted

    @property
    def setting(self) -> tuple[int, ...]:
        """What was wanted alike: measurements of one setting are held out together."""
        return (self.num_running, self.wanted_context)


@dataclass(frozen=True)
class Check:
    """The latency of one request beside others that went on decoding."""

    prompt_tokens: int
    response_tokens: int
    num_running: int
    context_tokens: int  # of the others, when it was sent
    ttft_s: float
    latency_s: float


@dataclass
class Measurements:
    """What was measured, and what is to be said about it."""

    prefills: list[Prefill] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = True


@dataclass(frozen=True)
class SweepPlan:
    """What will be measured, once what the server can't hold is left out."""

    prompt_tokens: tuple[int, ...]
    decoding: tuple[tuple[int, int], ...]  # requests together, prompt tokens of each
    notes: tuple[str, ...]

    @property
    def num_settings(self) -> int:
        """Measurements of a round."""
        return len(self.prompt_tokens) + len(self.decoding)


def planned(config: ProfilingConfig, max_model_len: int | None, capacity_tokens: int | None) -> SweepPlan:
    """What of a config's settings fits into the server.

    Args:
        config: what is wanted.
        max_model_len: tokens of a prompt and its answer at most, None if not known.
        capacity_tokens: tokens that the KV cache holds, None if not known.

    Raises:
        ServerError: nothing fits.
    """
    longest = (max_model_len or 10**9) - MARGIN_TOKENS
    prompts = tuple(size for size in sorted(set(config.prompt_tokens)) if size + 1 <= longest)
    pairs = [(num, size) for num in sorted(set(config.concurrency)) for size in sorted(set(config.context_tokens))]
    decoding = tuple(
        (num, size)
        for num, size in pairs
        if size + num_tokens_asked(config, num, size) <= longest
        and num * (size + num_tokens_asked(config, num, size)) <= (capacity_tokens or 10**12)
    )
    notes = []
    left_out = len(set(config.prompt_tokens)) - len(prompts) + len(pairs) - len(decoding)
    if left_out:
        notes.append(
            f"{left_out} settings left out: the server holds {max_model_len or 'any number of'} tokens of a request, "
            f"{capacity_tokens or 'an unknown number'} in all"
        )
    if not prompts or not decoding:
        raise ServerError(
            f"the server takes {max_model_len} tokens per request, too few for any --prompt-tokens or "
            f"--context-tokens with --decode-tokens {config.decode_tokens}; give smaller ones"
        )
    return SweepPlan(prompts, decoding, tuple(notes))


def num_tokens_asked(config: ProfilingConfig, num_running: int, context_tokens: int) -> int:
    """Response tokens to ask of each request, so that all decode together for `decode_tokens` steps.

    The first to be admitted decode while the prompts of the others are taken up.
    """
    chunks = math.ceil((context_tokens + MARGIN_TOKENS) / config.chunk_tokens)
    return config.decode_tokens + (num_running - 1) * chunks + MIN_STEPS


async def measure(
    server: Server,
    config: ProfilingConfig,
    plan: SweepPlan,
    found: Measurements,
    advance: Callable[[int], None],
) -> None:
    """Measure as planned, until the time is up or the server dies; what was measured stays in `found`.

    Args:
        server: to ask.
        config: how often and for how long.
        plan: what.
        found: gets the measurements.
        advance: called with 1 after each planned measurement.
    """
    sweep = _Sweep(server, config, found, time.monotonic() + config.max_seconds)
    order = random.Random(config.seed)
    await sweep.attempt(sweep.warm_up(plan))
    for _ in range(config.rounds):
        settings: list[tuple[int, int]] = [(0, size) for size in plan.prompt_tokens] + list(plan.decoding)
        order.shuffle(settings)
        for num_running, size in settings:
            if not sweep.goes_on():
                return
            await sweep.attempt(sweep.decode(num_running, size) if num_running else sweep.prefill(size))
            advance(1)
    for _ in range(config.num_checks):
        if not sweep.goes_on():
            return
        num_running, context = order.choice(plan.decoding)
        size, num_tokens = order.choice(plan.prompt_tokens), order.randint(*CHECK_TOKENS)
        longest = server.facts.max_model_len
        if longest:
            size = min(size, longest - num_tokens - MARGIN_TOKENS)
        await sweep.attempt(sweep.check(num_running - 1, context, size, num_tokens))
        advance(1)


class _Sweep:
    """The measurements one by one, and when to stop."""

    def __init__(self, server: Server, config: ProfilingConfig, found: Measurements, deadline_s: float) -> None:
        self._server = server
        self._config = config
        self._found = found
        self._deadline_s = deadline_s
        self._num_broken = 0
        self._too_many: int | None = None  # the least number of requests that did not decode together

    def goes_on(self) -> bool:
        """Whether there is time left and the server lives; says so once if not."""
        if not self._found.complete:
            return False
        if time.monotonic() >= self._deadline_s:
            self._stop(f"stopped after --max-seconds {self._config.max_seconds:g}")
        return self._found.complete

    async def attempt(self, measurement: Coroutine[Any, Any, None]) -> None:
        """One measurement; what goes wrong is noted, and stops everything if it goes on going wrong."""
        left_s = max(self._deadline_s - time.monotonic(), 0.1)
        try:
            await asyncio.wait_for(measurement, left_s)
            self._num_broken = 0
        except asyncio.TimeoutError:
            self._stop(f"stopped after --max-seconds {self._config.max_seconds:g}, within a measurement")
        except ServerError as error:
            self._num_broken += 1
            if self._num_broken >= BROKEN:
                self._stop(f"the server failed {BROKEN} times in a row: {error}")

    def _stop(self, reason: str) -> None:
        self._found.notes.append(reason)
        self._found.complete = False

    async def warm_up(self, plan: SweepPlan) -> None:
        """Ask what will be asked, so that nothing is compiled or allocated while time is taken."""
        for size in (plan.prompt_tokens[0], plan.prompt_tokens[-1]):
            await self._server.answer(self._server.prompt(size), 2)
        most, size = plan.decoding[-1]
        await asyncio.gather(*(self._server.answer(self._server.prompt(size), MIN_STEPS) for _ in range(most)))

    async def prefill(self, size: int) -> None:
        """First tokens of prompts that nobody asked before, one after the other."""
        for _ in range(PROMPTS):
            answer = await self._server.answer(self._server.prompt(size), 1)
            self._found.prefills.append(Prefill(answer.prompt_tokens, answer.ttft_s, size))

    async def decode(self, num_running: int, size: int) -> None:
        """Requests of one length that decode together."""
        if self._too_many and num_running >= self._too_many:
            return
        num_tokens = num_tokens_asked(self._config, num_running, size)
        prompts = [self._server.prompt(size) for _ in range(num_running)]
        answers = await _all([self._server.answer(prompt, num_tokens) for prompt in prompts])
        steps = steps_together(answers, size)
        self._found.steps.extend(steps)
        if not steps and not self._server.ends_early:
            self._too_many = num_running
            self._found.notes.append(
                f"{num_running} requests with prompts of {size} tokens did not decode together: the server runs fewer "
                "at once, or --chunk-tokens is more than it takes; more were not tried"
            )

    async def check(self, num_others: int, context: int, size: int, num_tokens: int) -> None:
        """A request's latency while others decode, which are then broken off."""
        longest = self._server.facts.max_model_len or 10**9
        unending = max(min(longest - context - MARGIN_TOKENS, 4 * CHECK_TOKENS[1]), 1)
        prompts = [self._server.prompt(context) for _ in range(num_others)]
        streams = [Stream() for _ in prompts]
        tasks = [
            asyncio.ensure_future(self._server.stream(prompt, unending, stream))
            for prompt, stream in zip(prompts, streams, strict=True)
        ]
        try:
            while not (all(stream.pieces for stream in streams) or any(task.done() for task in tasks)):
                await asyncio.sleep(POLL_S)
            prompt = self._server.prompt(size)
            answer = await self._server.answer(prompt, num_tokens)
            still_running = not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not still_running or answer.response_tokens < 2:
            return  # the others ended before it did, so that the load is not known
        held = 0
        for stream in streams:
            held += context + sum(arrived <= answer.sent_s for arrived in stream.events()[0])
        self._found.checks.append(
            Check(answer.prompt_tokens, answer.response_tokens, num_others, held, answer.ttft_s, answer.latency_s)
        )


async def _all(awaited: Sequence[Coroutine[Any, Any, StreamedAnswer]]) -> list[StreamedAnswer]:
    """All answers; if one fails, the others are given up before the error is passed on."""
    tasks = [asyncio.ensure_future(one) for one in awaited]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def steps_together(answers: Sequence[StreamedAnswer], wanted_context: int) -> list[Steps]:
    """Times of the steps in which all requests decoded, in pieces of some steps each.

    The window goes from the last request's first token to the first request's last. Within it, each request's pieces
    are cut at the same numbers, the gaps of a piece are averaged over requests, and the contexts are added.

    Args:
        answers: of requests that were sent at the same time.
        wanted_context: prompt tokens of each, as wanted.

    Returns:
        One entry per piece; none if they did not decode together for `MIN_STEPS`.
    """
    begin_s = max(answer.arrivals_s[0] for answer in answers)
    end_s = min(answer.arrivals_s[-1] for answer in answers)
    within = [[i for i, s in enumerate(answer.arrivals_s) if begin_s <= s <= end_s] for answer in answers]
    num_gaps = min(len(indices) for indices in within) - 1
    if num_gaps < MIN_STEPS:
        return []
    num_pieces = max(1, round(num_gaps / SEGMENT_STEPS))
    cuts = [round(piece * num_gaps / num_pieces) for piece in range(num_pieces + 1)]
    found = []
    for low, high in pairwise(cuts):
        seconds = context = 0.0
        for answer, indices in zip(answers, within, strict=True):
            tokens_per_piece = answer.response_tokens / len(answer.arrivals_s)
            first, last = indices[low], indices[high]
            gap_s = (answer.arrivals_s[last] - answer.arrivals_s[first]) / (high - low) / tokens_per_piece
            seconds += gap_s / len(answers)
            context += answer.prompt_tokens + (first + last + 1) / 2 * tokens_per_piece
        if seconds > 0:
            found.append(Steps(len(answers), context, seconds, wanted_context))
    return found
