"""How long an engine's steps take, and which share of its binding resource one request has of them.

Two kinds answer the same questions: a roofline, derived from peak rates and the LLM's shape, and a fit to measurements.
Knows floats alone: no profile files, no queue. Only additions, multiplications, divisions and comparisons, which IEEE
754 rounds in one way, so that every rank of a tensor-parallel engine gets the same bits.

Shared meanings: `num_running` requests decode together, `context_tokens` is the KV cache that they hold in tokens. A
step gives each of them one token.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

NEGLIGIBLE = 1e-6  # share of an MoE's experts that a large batch may leave untouched in the table of shares


class Load(NamedTuple):
    """What the engine is doing when a request would be admitted, the request itself not counted.

    Attributes:
        num_running: requests that are decoding.
        context_tokens: tokens of KV cache that they hold.
        waiting_prompt_tokens: prompt tokens admitted before this request and not taken up yet; they go first.
        prompt_tokens_per_step: prompt tokens of later arrivals that a step takes up beside the decodes, on average,
            while this request decodes.
    """

    num_running: int = 0
    context_tokens: int = 0
    waiting_prompt_tokens: int = 0
    prompt_tokens_per_step: float = 0.0


IDLE = Load()


class Times(NamedTuple):
    """Seconds that one request takes, see `EngineCosts.request_s`."""

    ttft_s: float
    latency_s: float
    idle_latency_s: float
    work_s: float


_new = tuple.__new__  # makes a named tuple in half the time that its own constructor takes


class EngineCosts(Protocol):
    """What the mapper asks of a profile, in seconds. Everything is non-negative and grows with every argument."""

    capacity_tokens: int | None
    """Tokens that the KV cache holds; None if that is not known."""
    chunk_tokens: int
    """Prompt tokens that the engine takes up in one step at most (chunked prefill)."""
    prompt_token_s: float
    """What one more prompt token adds to a step that takes up many."""

    def step_s(self, num_running: int, context_tokens: float) -> float:
        """Time of a step that decodes for `num_running` >= 1 requests."""
        ...

    def prefill_s(self, prompt_tokens: float) -> float:
        """Time from admission to the first token of a prompt on an idle engine."""
        ...

    def beside_s(self, num_running: int, context_tokens: float) -> float:
        """What decoding for others adds to a step that also takes up prompt tokens."""
        ...

    def step_work_s(self, num_running: int, context_tokens: float, own_context_tokens: float) -> float:
        """Seconds of the binding resource that one of `num_running` requests takes of a step; at most `step_s`."""
        ...

    def prefill_work_s(self, prompt_tokens: float) -> float:
        """Seconds of the binding resource that a prompt takes; at most `prefill_s`."""
        ...

    def request_s(self, new_tokens: int, prompt_tokens: int, response_tokens: float, load: Load) -> Times:
        """What one request takes, by the formulas of `mope.fairness.mapper`: those above in one call.

        Schedulers ask this twice for each request, and between an engine's steps each further call costs microseconds.

        Args:
            new_tokens: tokens of its prompt that the prefix cache does not hold.
            prompt_tokens: all tokens of its prompt.
            response_tokens: tokens of its answer.
            load: what else the engine is doing.

        Returns:
            Seconds from admission to the first token and to the last, the latter also on an idle engine, and of the
            binding resource.
        """
        ...


class RooflineCosts:
    """Steps limited by reading weights and KV cache, or by arithmetic, whichever takes longer (Williams et al., 2009).

    With N parameters that a token passes, w(B) bytes of weights that B tokens touch, k bytes of KV cache and a
    attention FLOP per token of context, F FLOP/s, M bytes/s, h(B) seconds of all-reduces and o of overhead per step,
    all of them per GPU:

        step(B, C)  = max(w(B)/M + k·C/M,  2·N·B/F + a·C/F) + h(B) + o
        prefill(n)  = max(w(n)/M + k·n/M,  2·N·n/F + a·n²/(2·F)) + h(n) + o·max(1, 1/2 + n/chunk)

    Args:
        weights_s: seconds to read the weights that 0, 1, 2, ... tokens touch; the last entry holds for all above.
        kv_read_s: seconds to read (or write) the KV cache of one token.
        token_compute_s: seconds of arithmetic for one token, without attention.
        context_compute_s: seconds of attention arithmetic for one token of context.
        allreduce_s: seconds of all-reduces in a step, whatever its size.
        allreduce_token_s: seconds that each token adds to them.
        overhead_s: seconds of a step in which the GPU waits.
        chunk_tokens: prompt tokens per step at most.
        capacity_tokens: tokens that the KV cache holds.
    """

    __slots__ = (
        "_allreduce_token_s", "_context_compute_s", "_fixed_s", "_kv_read_s", "_largest", "_pair_compute_s",
        "_token_compute_s", "_weights_s", "capacity_tokens", "chunk_tokens", "prompt_token_s",
    )  # fmt: skip

    def __init__(
        self,
        *,
        weights_s: tuple[float, ...],
        kv_read_s: float,
        token_compute_s: float,
        context_compute_s: float,
        allreduce_s: float,
        allreduce_token_s: float,
        overhead_s: float,
        chunk_tokens: int,
        capacity_tokens: int,
    ) -> None:
        self._weights_s = weights_s
        self._largest = len(weights_s) - 1
        self._kv_read_s = kv_read_s
        self._token_compute_s = token_compute_s
        self._context_compute_s = context_compute_s
        self._pair_compute_s = context_compute_s / 2  # a causal prompt attends to half of its pairs
        self._allreduce_token_s = allreduce_token_s
        self._fixed_s = allreduce_s + overhead_s
        self.chunk_tokens = chunk_tokens
        self.capacity_tokens: int | None = capacity_tokens
        self.prompt_token_s = max(token_compute_s, kv_read_s) + allreduce_token_s + self._fixed_s / chunk_tokens

    def step_s(self, num_running: int, context_tokens: float) -> float:
        """See `EngineCosts`."""
        memory_s = self._weights_s[min(num_running, self._largest)] + self._kv_read_s * context_tokens
        compute_s = self._token_compute_s * num_running + self._context_compute_s * context_tokens
        return max(memory_s, compute_s) + self._allreduce_token_s * num_running + self._fixed_s

    def prefill_s(self, prompt_tokens: float) -> float:
        """See `EngineCosts`."""
        waits_s = self._fixed_s * max(1.0, 0.5 + prompt_tokens / self.chunk_tokens)
        return self.prefill_work_s(prompt_tokens) + self._allreduce_token_s * prompt_tokens + waits_s

    def beside_s(self, num_running: int, context_tokens: float) -> float:
        """See `EngineCosts`; the weights are read anyway."""
        memory_s = self._kv_read_s * context_tokens
        compute_s = self._token_compute_s * num_running + self._context_compute_s * context_tokens
        return max(memory_s, compute_s) + self._allreduce_token_s * num_running

    def step_work_s(self, num_running: int, context_tokens: float, own_context_tokens: float) -> float:
        """See `EngineCosts`; where memory binds, reading the weights is shared by the batch."""
        weights_s = self._weights_s[min(num_running, self._largest)]
        compute_s = self._token_compute_s * num_running + self._context_compute_s * context_tokens
        if weights_s + self._kv_read_s * context_tokens >= compute_s:
            return weights_s / num_running + self._kv_read_s * own_context_tokens
        return self._token_compute_s + self._context_compute_s * own_context_tokens

    def prefill_work_s(self, prompt_tokens: float) -> float:
        """See `EngineCosts`."""
        memory_s = self._weights_s[int(min(prompt_tokens, self._largest))] + self._kv_read_s * prompt_tokens
        compute_s = (self._token_compute_s + self._pair_compute_s * prompt_tokens) * prompt_tokens
        return max(memory_s, compute_s)

    def request_s(self, new_tokens: int, prompt_tokens: int, response_tokens: float, load: Load) -> Times:
        """See `EngineCosts`."""
        num_running, context_tokens, waiting_tokens, tokens_per_step = load
        weights_s, largest, read_s, fixed_s = self._weights_s, self._largest, self._kv_read_s, self._fixed_s
        token_s, context_s, allreduce_s = self._token_compute_s, self._context_compute_s, self._allreduce_token_s
        memory_s = weights_s[new_tokens if new_tokens < largest else largest] + read_s * new_tokens
        compute_s = (token_s + self._pair_compute_s * new_tokens) * new_tokens
        work_s = memory_s if memory_s > compute_s else compute_s
        chunks = 0.5 + new_tokens / self.chunk_tokens
        idle_s = work_s + allreduce_s * new_tokens + fixed_s * (chunks if chunks > 1.0 else 1.0)
        ttft_s = idle_s + self.prompt_token_s * waiting_tokens
        if num_running:
            chunks = 0.5 + (waiting_tokens + new_tokens) / self.chunk_tokens
            memory_s, compute_s = read_s * context_tokens, token_s * num_running + context_s * context_tokens
            beside_s = (memory_s if memory_s > compute_s else compute_s) + allreduce_s * num_running
            ttft_s += (chunks if chunks > 1.0 else 1.0) * beside_s
        latency_s, num_later = ttft_s, response_tokens - 1.0
        if num_later > 0.0:
            own = prompt_tokens + 0.5 * response_tokens
            num_together, context = num_running + 1, context_tokens + own
            shared_s = weights_s[num_together if num_together < largest else largest]
            memory_s, compute_s = shared_s + read_s * context, token_s * num_together + context_s * context
            by_memory = memory_s >= compute_s
            step_s = (memory_s if by_memory else compute_s) + allreduce_s * num_together + fixed_s
            latency_s += num_later * (step_s + self.prompt_token_s * tokens_per_step)
            work_s += num_later * (shared_s / num_together + read_s * own if by_memory else token_s + context_s * own)
            memory_s, compute_s = weights_s[1 if largest > 1 else largest] + read_s * own, token_s + context_s * own
            idle_s += num_later * ((memory_s if memory_s > compute_s else compute_s) + allreduce_s + fixed_s)
        return _new(Times, (ttft_s, latency_s, idle_s, work_s))


class FittedCosts:
    """Steps as they were measured, by six coefficients.

        step(B, C)  = step_fixed + step_request·B + step_context·C
        prefill(n)  = prefill_fixed + prefill_token·n + prefill_square·n²

    From outside it can't be seen which resource binds. So a request's work is what it would take of the engine at its
    measured saturation, where B' requests share the fixed part of a step: step_fixed/B' + step_request +
    step_context·own context. Of a prompt it is what grows with the prompt.

    Args:
        step_fixed_s: seconds of a step, whatever is in it.
        step_request_s: seconds that each running request adds.
        step_context_s: seconds that each token of context adds.
        prefill_fixed_s: seconds to a first token, whatever the prompt; the way there and back included.
        prefill_token_s: seconds that each prompt token adds.
        prefill_square_s: seconds that each pair of prompt tokens adds.
        saturated_requests: running requests at the highest throughput that was measured.
        chunk_tokens: prompt tokens per step at most.
        capacity_tokens: tokens that the KV cache holds, if the server says so.
    """

    __slots__ = (
        "_prefill_fixed_s", "_prefill_square_s", "_prefill_token_s", "_step_context_s", "_step_fixed_s",
        "_step_request_s", "_step_shared_s", "capacity_tokens", "chunk_tokens", "prompt_token_s",
    )  # fmt: skip

    def __init__(
        self,
        *,
        step_fixed_s: float,
        step_request_s: float,
        step_context_s: float,
        prefill_fixed_s: float,
        prefill_token_s: float,
        prefill_square_s: float,
        saturated_requests: int,
        chunk_tokens: int,
        capacity_tokens: int | None,
    ) -> None:
        self._step_fixed_s = step_fixed_s
        self._step_request_s = step_request_s
        self._step_context_s = step_context_s
        self._step_shared_s = step_fixed_s / saturated_requests + step_request_s
        self._prefill_fixed_s = prefill_fixed_s
        self._prefill_token_s = prefill_token_s
        self._prefill_square_s = prefill_square_s
        self.chunk_tokens = chunk_tokens
        self.capacity_tokens = capacity_tokens
        self.prompt_token_s = prefill_token_s

    def step_s(self, num_running: int, context_tokens: float) -> float:
        """See `EngineCosts`."""
        return self._step_fixed_s + self._step_request_s * num_running + self._step_context_s * context_tokens

    def prefill_s(self, prompt_tokens: float) -> float:
        """See `EngineCosts`."""
        return self._prefill_fixed_s + self.prefill_work_s(prompt_tokens)

    def beside_s(self, num_running: int, context_tokens: float) -> float:
        """See `EngineCosts`; the fixed part of the step is the prefill's."""
        return self._step_request_s * num_running + self._step_context_s * context_tokens

    def step_work_s(self, num_running: int, context_tokens: float, own_context_tokens: float) -> float:
        """See `EngineCosts`; relative to the measured saturation, whatever runs now."""
        return self._step_shared_s + self._step_context_s * own_context_tokens

    def prefill_work_s(self, prompt_tokens: float) -> float:
        """See `EngineCosts`."""
        return (self._prefill_token_s + self._prefill_square_s * prompt_tokens) * prompt_tokens

    def request_s(self, new_tokens: int, prompt_tokens: int, response_tokens: float, load: Load) -> Times:
        """See `EngineCosts`."""
        num_running, context_tokens, waiting_tokens, tokens_per_step = load
        request_s, context_s = self._step_request_s, self._step_context_s
        work_s = (self._prefill_token_s + self._prefill_square_s * new_tokens) * new_tokens
        idle_s = self._prefill_fixed_s + work_s
        ttft_s = idle_s + self.prompt_token_s * waiting_tokens
        if num_running:
            chunks = 0.5 + (waiting_tokens + new_tokens) / self.chunk_tokens
            ttft_s += (chunks if chunks > 1.0 else 1.0) * (request_s * num_running + context_s * context_tokens)
        latency_s, num_later = ttft_s, response_tokens - 1.0
        if num_later > 0.0:
            own = prompt_tokens + 0.5 * response_tokens
            fixed_s = self._step_fixed_s
            step_s = fixed_s + request_s * (num_running + 1) + context_s * (context_tokens + own)
            latency_s += num_later * (step_s + self.prompt_token_s * tokens_per_step)
            work_s += num_later * (self._step_shared_s + context_s * own)
            idle_s += num_later * (fixed_s + request_s + context_s * own)
        return _new(Times, (ttft_s, latency_s, idle_s, work_s))


def touched_shares(num_experts: int, experts_per_token: int) -> tuple[float, ...]:
    """Shares of a layer's experts that 0, 1, 2, ... tokens touch: 1 - (1 - k/E)^B, each token choosing by itself.

    Ends where less than `NEGLIGIBLE` is left, with 1. A dense LLM is one expert that each token passes: (0, 1).
    """
    left = 1.0
    shares = [0.0]
    while left > NEGLIGIBLE:
        left *= 1.0 - experts_per_token / num_experts
        shares.append(1.0 - left)
    shares[-1] = 1.0
    return tuple(shares)
