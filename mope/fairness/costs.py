"""The cost estimator: what a request will take of the engine, and what its client is charged for that.

Joins the metrics mapper (tokens → latency, throughput, utilisation) with the charges (those → UFC, RFC, HF). This is
where numbers from outside come in, so it is also where they are made usable: what is impossible is replaced by
something that is possible, and counted, for no prediction may ever stop an engine. Knows no queue and no books.
"""

from __future__ import annotations

from math import inf, isfinite
from typing import NamedTuple, Protocol, SupportsFloat

from mope.errors import ConfigError
from mope.fairness.charges import MAX_TOKENS, Charge, Service, charge, rfc, ufc
from mope.fairness.config import FairnessConfig
from mope.fairness.engine_costs import IDLE, Load
from mope.fairness.mapper import MetricsMapper
from mope.fairness.profiles import Profile, load_profile

# the request that weighs UFC and RFC against each other: its prompt and response tokens, among 16 others like it
_REFERENCE, _REFERENCE_LOAD = (256, 256.0), Load(num_running=16, context_tokens=16 * 384)

_new = tuple.__new__  # makes a named tuple in half the time that its own constructor takes


class Predicted(Protocol):
    """A prediction of an answer's length: a `LengthPrediction`, for example."""

    @property
    def mean(self) -> float:
        """Expected response tokens."""


class RequestCost(NamedTuple):
    """What one request is predicted to get, to take, and to be charged.

    Attributes:
        latency_s: seconds from admission to the last token.
        tokens_per_s: response tokens by that.
        gpu_utilization: its share of the GPU's binding resource over its life, in [0, 1].
        kv_tokens: tokens of KV cache at its end.
        ufc: what it adds to its client's user counter, in (discounted) weighted tokens.
        rfc: what it adds to its client's resource counter; the unit is that of the variant.
        charge: all counters as the ledger books them.
    """

    latency_s: float
    tokens_per_s: float
    gpu_utilization: float
    kv_tokens: int
    ufc: float
    rfc: float
    charge: Charge


class CostEstimator:
    """From tokens to charges, for one engine and one choice of formulas.

    The same numbers give the same charges in every process, to the last bit. Costs a few microseconds a call.

    Attributes:
        config: the formulas.
        profile: hardware and LLM; None where the formulas ask for tokens alone.
        rfc_scale: weighted tokens that one unit of RFC counts as in HF.
        num_clamped: numbers from outside that were impossible and had to be replaced.
    """

    def __init__(self, profile: Profile | str | None = None, config: FairnessConfig | None = None) -> None:
        """Reads the profile, if the formulas need one.

        Args:
            profile: hardware and LLM, or the name or file of a profile; `config.profile` if None.
            config: the formulas; by default those of Equinox.

        Raises:
            ConfigError: there is no such profile, or it cannot be used.
        """
        self.config = config if config is not None else FairnessConfig()
        self.num_clamped = 0
        self._blind = self.config.beta == 0 and (self.config.ufc == "tokens" or self.config.delta == 0)
        self._mapper: MetricsMapper | None = None
        self.profile: Profile | None = None
        if not self._blind or profile is not None:
            chosen = profile if profile is not None else self.config.profile
            self.profile = load_profile(chosen) if isinstance(chosen, str) else chosen
            self._mapper = MetricsMapper(self.profile)
        self.rfc_scale = self.config.rfc_scale if self.config.rfc_scale is not None else self._reference_scale()

    def _reference_scale(self) -> float:
        if self._mapper is None:
            return 1.0
        service = self._service(*_REFERENCE, 0, _REFERENCE_LOAD)
        resources = rfc(service, self.config)
        return ufc(service, self.config) / resources if resources > 0 else 1.0

    def estimate(
        self,
        prompt_tokens: int,
        prediction: Predicted | SupportsFloat | None,
        load: Load = IDLE,
        *,
        max_tokens: int | None = None,
        cached_tokens: int = 0,
    ) -> RequestCost:
        """What a request will take, if it were admitted now.

        Args:
            prompt_tokens: tokens of its prompt.
            prediction: response tokens, as a number or a prediction whose `mean` is taken; None, NaN and infinity stand
                for `config.default_tokens`, and what is out of range is brought into it. All but None are counted.
            load: what the engine is doing.
            max_tokens: the request's cap, if it has one.
            cached_tokens: tokens of the prompt that the prefix cache held.
        """
        response_tokens = self.response_tokens(prediction, max_tokens)
        return self._cost(self._service(self.count(prompt_tokens), response_tokens, self.count(cached_tokens), load))

    def price(self, prompt_tokens: int, response_tokens: float, load: Load = IDLE, *, cached_tokens: int = 0) -> Charge:
        """What a request is charged for tokens that are in range already, see `response_tokens` and `count`."""
        return charge(self._service(prompt_tokens, response_tokens, cached_tokens, load), self.config, self.rfc_scale)

    def measured(
        self,
        prompt_tokens: int,
        response_tokens: int,
        *,
        cached_tokens: int = 0,
        latency_s: float | None = None,
        load: Load = IDLE,
    ) -> RequestCost:
        """What a request has taken.

        Args:
            prompt_tokens: tokens of the prompt that were read, those from the prefix cache included.
            response_tokens: tokens of the answer that were generated.
            cached_tokens: tokens of the prompt that the prefix cache held.
            latency_s: seconds from admission to the end, measured. None where ranks must agree to the last bit and a
                clock of their own would part them: the mapper's figure for these tokens is taken.
            load: what the engine was doing when it was admitted.
        """
        return self._cost(self._measured(prompt_tokens, response_tokens, cached_tokens, latency_s, load))

    def price_measured(
        self, prompt_tokens: int, response_tokens: int, cached_tokens: int, latency_s: float | None, load: Load
    ) -> Charge:
        """The charge of `measured`, without the rest."""
        service = self._measured(prompt_tokens, response_tokens, cached_tokens, latency_s, load)
        return charge(service, self.config, self.rfc_scale)

    def _measured(
        self, prompt_tokens: int, response_tokens: int, cached_tokens: int, latency_s: float | None, load: Load
    ) -> Service:
        prompt, response, cached = self.count(prompt_tokens), self.count(response_tokens), self.count(cached_tokens)
        if latency_s is not None and not 0 < latency_s < inf:
            self.num_clamped += not self._blind
            latency_s = None
        if latency_s is None or self._mapper is None or self._blind:
            return self._service(prompt, float(response), cached, load)
        cached = min(cached, prompt)
        # its work is the same, however long it took
        _, _, idle_s, work_s = self._mapper.request_s(prompt, float(response), load, cached)
        used = work_s / latency_s
        return _new(
            Service,
            (prompt, cached, float(response), latency_s, idle_s, response / latency_s, used if used < 1.0 else 1.0),
        )

    def response_tokens(self, prediction: Predicted | SupportsFloat | None, max_tokens: int | None = None) -> float:
        """A prediction as a number of tokens from 1 to `MAX_TOKENS`, and no more than `max_tokens`."""
        try:
            number = prediction if type(prediction) is float else float(getattr(prediction, "mean", prediction))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            self.num_clamped += prediction is not None
            number = self.config.default_tokens
        if not 1.0 <= number <= MAX_TOKENS:
            self.num_clamped += 1
            number = min(max(number, 1.0), float(MAX_TOKENS)) if isfinite(number) else self.config.default_tokens
        if max_tokens is not None and max_tokens >= 1:
            number = min(number, float(max_tokens))
        return number

    def count(self, tokens: int) -> int:
        """A number of tokens from 0 to `MAX_TOKENS`.

        Raises:
            ConfigError: it is no number.
        """
        try:
            if 0 <= tokens <= MAX_TOKENS:
                return int(tokens)
            self.num_clamped += 1
            return MAX_TOKENS if tokens > 0 else 0
        except TypeError:
            raise ConfigError(f"a number of tokens is {tokens!r}; expected a whole number") from None

    def _service(self, prompt_tokens: int, response_tokens: float, cached_tokens: int, load: Load) -> Service:
        cached = min(cached_tokens, prompt_tokens)
        if self._mapper is None:
            return Service(prompt_tokens, cached, response_tokens)
        _, latency_s, idle_s, work_s = self._mapper.request_s(prompt_tokens, response_tokens, load, cached)
        used = work_s / latency_s
        return _new(
            Service,
            (
                prompt_tokens,
                cached,
                response_tokens,
                latency_s,
                idle_s,
                response_tokens / latency_s,
                used if used < 1.0 else 1.0,
            ),
        )

    def _cost(self, service: Service) -> RequestCost:
        user, resources = ufc(service, self.config), rfc(service, self.config)
        return RequestCost(
            service.latency_s,
            service.tokens_per_s,
            service.gpu_utilization,
            service.prompt_tokens + int(-(-service.response_tokens // 1)),
            user,
            resources,
            charge(service, self.config, self.rfc_scale),
        )
