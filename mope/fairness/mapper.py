"""MoPE's metrics mapper: from predicted tokens to user-perceived latency, throughput and GPU utilisation.

Knows how a request goes through an engine with continuous batching and chunked prefill; how long its steps take is
what a profile says. Pure arithmetic: no clock, no randomness, the same bits in every process, some microseconds each.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from mope.errors import ConfigError
from mope.fairness.charges import MAX_TOKENS
from mope.fairness.engine_costs import IDLE, Load, Times
from mope.fairness.profiles import Profile, load_profile

_MAX_LOAD = 1e15  # far above any engine's


class ServiceEstimate(NamedTuple):
    """What one request gets and takes.

    Attributes:
        latency_s: seconds from its admission to its last token, above 0. What it waited in the queue is not in it.
        ttft_s: seconds from its admission to its first token.
        tokens_per_s: response tokens by `latency_s`, what the user sees. Equinox's own formula was not available; with
            prompt tokens counted too, a long prompt with an answer of one token would have a hundred times the
            throughput of any long answer, and a counter made of it would punish short answers.
        gpu_utilization: share, from 0 to 1, of the GPU's binding resource that this request takes over its life. By a
            roofline, the resource is memory bandwidth or arithmetic as far as they can be had, and the batch shares
            the reading of weights. By a fitted profile, it is the engine at its measured saturation. In a step, the
            shares of all that run add up to at most 1.
        kv_tokens: tokens of KV cache that it holds at its end.
    """

    latency_s: float
    ttft_s: float
    tokens_per_s: float
    gpu_utilization: float
    kv_tokens: int


class MetricsMapper:
    """Maps a request's tokens to the service that it would get and take, on an engine that a profile describes.

    The load is taken to last: others that finish make room for others like them. The request's own context is taken at
    its middle, which is exact where a step's time is linear in it. With n prompt and m response tokens, R running
    requests of C tokens and w waiting prompt tokens:

        ttft    = prefill(n) + w·prompt_token + chunks·beside(R, C)      chunks = max(1, 1/2 + (w + n)/chunk)
        latency = ttft + (m - 1)·(step(R + 1, C + n + m/2) + prompt_tokens_per_step·prompt_token)

    Of the prompt, only what the prefix cache does not hold is prefilled. The first token comes from the prefill; chunks
    are the steps that it takes on average, wherever it begins in the first. Times of steps as in
    `mope.fairness.engine_costs`. This reconstructs what Equinox (arXiv 2508.16646) names without a formula that was
    available.

    Args:
        profile: of the engine, or the name or file of one, see `mope.fairness.profiles.load_profile`.
    """

    def __init__(self, profile: Profile | str) -> None:
        self.profile = profile = load_profile(profile) if isinstance(profile, str) else profile
        self._costs = profile.costs()
        self._possible = IDLE

    def estimate(
        self, prompt_tokens: int, response_tokens: float, load: Load = IDLE, *, cached_tokens: int = 0
    ) -> ServiceEstimate:
        """What a request would get and take, if it were admitted now. Costs a few microseconds.

        Args:
            prompt_tokens: tokens of its prompt, from 0 to 10 million.
            response_tokens: tokens that it is predicted to answer, from 0 to 10 million. Below 1 counts as 1 in time.
            load: what the engine is doing.
            cached_tokens: tokens of the prompt that the prefix cache holds; they need no prefill. At most the prompt.

        Raises:
            ConfigError: tokens out of these ranges, which `CostEstimator.estimate` brings them into, or no such load.
        """
        try:
            in_range = 0 <= cached_tokens <= prompt_tokens <= MAX_TOKENS and 0 <= response_tokens <= MAX_TOKENS
        except TypeError:
            in_range = False
        if not in_range:
            raise ConfigError(
                f"got {prompt_tokens!r} prompt tokens, {cached_tokens!r} of them cached, and {response_tokens!r} "
                f"response tokens; expected numbers from 0 to {MAX_TOKENS:,}, and no more cached ones than there are"
            )
        ttft_s, latency_s, _, work_s = self.request_s(prompt_tokens, response_tokens, load, cached_tokens)
        return ServiceEstimate(
            latency_s,
            ttft_s,
            response_tokens / latency_s,
            min(work_s / latency_s, 1.0),
            prompt_tokens + ceil(response_tokens),
        )

    def request_s(self, prompt_tokens: int, response_tokens: float, load: Load, cached_tokens: int) -> Times:
        """Seconds that a request takes: arguments as in `estimate`, but tokens are in range already.

        Raises:
            ConfigError: no such load.
        """
        if load is not self._possible:  # requests come in groups under the same load
            _check(load)
            self._possible = load
        return self._costs.request_s(prompt_tokens - cached_tokens, prompt_tokens, response_tokens, load)


def _check(load: Load) -> None:
    try:
        possible = (
            0 <= load.num_running <= _MAX_LOAD
            and 0 <= load.context_tokens <= _MAX_LOAD
            and 0 <= load.waiting_prompt_tokens <= _MAX_LOAD
            and 0 <= load.prompt_tokens_per_step <= _MAX_LOAD
        )
    except (AttributeError, TypeError):
        possible = False
    if not possible:
        raise ConfigError(f"the load is {load!r}; expected a Load of numbers from 0 to {_MAX_LOAD:.0e}")
