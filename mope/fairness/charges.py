"""What a request is charged: the counters UFC and RFC, and the score HF that orders clients.

Pure arithmetic. Knows neither clients nor queues. Amounts are whole numbers of millionths (`UNIT`): sums of integers
are exact in any order, so that charges and refunds cancel to the last digit, replicas agree, and a snapshot is equal
to what it was taken of.

Where the formulas come from. [A]: the abstract of Equinox (arXiv 2508.16646): UFC "measures quality of service via
weighted tokens and latency", RFC "measures operational efficiency through throughput and GPU utilization", and a
holistic score balances both "through tunable parameters". [S]: second-hand, alpha = 0.7, beta = 0.3, delta = 0.1.
[R]: our reconstruction, since the formulas themselves could not be read. [O]: ours.

    W    = w_p (n_in - n_cached) + w_c n_cached + w_q n_out                     weighted tokens, as in VTC (OSDI'24)
    UFC  = W / (1 + delta (L/L0 - 1)+)    "slowdown"     [O] only what the idle engine's L0 would not have taken counts
         = W / (1 + delta L)              "discount"     [R] the longer one waits, the less one has enjoyed
         = max(0, W - delta L)            "subtract"     [R] clamped, [O]: a negative charge would break the bound
         = W                              "tokens"       VTC with prediction
    RFC  = U L                            "gpu-seconds"  [O] what a request takes of the GPU, in seconds of all of it
         = T U                            "product"      [R] throughput times share of the GPU
         = T / 50 + U                     "sum"          [O] T against 50 tokens/s, a fluent reading speed
         = U                              "share"        [O]
    HF   = alpha UFC + beta s RFC                        weights: [A], [S]; the scale s is fixed, [R];
                                                         at least W / 1000, [O]: what costs nothing starves others

The first of each is the default. The abstract's words are nearest to "discount" and "product", but by these a long
answer costs little more than a short one: latency grows with length, so the discount undoes W, and neither T nor U
grows. On an A100, answers of 2,000 tokens cost less than four times as much as answers of 50, so that who asks for
them is given more than nine tenths of all tokens. By the default HF grows with every token, and slow work is
no cheaper.

L is the latency in seconds from admission to the last token, T throughput in tokens/s, U the share of the GPU's
binding resource in [0, 1]. The scale s (`FairnessConfig.rfc_scale`) never changes while serving: a running maximum in
its place would let HF fall while service grows, and no bound would hold.
"""

from __future__ import annotations

from typing import NamedTuple

from mope.fairness.config import FairnessConfig

UNIT = 1_000_000  # of every amount: millionths of a weighted token, of a unit of RFC, of a unit of HF
MAX_TOKENS = 10_000_000  # in one request; more is taken for this many, and counted
LEAST_SCORE = 1e-3  # HF of a weighted token, at least
_FLUENT_TOKENS_PER_S = 50.0

_new = tuple.__new__  # makes a named tuple in half the time that its own constructor takes


class Charge(NamedTuple):
    """What one request has cost so far, in millionths.

    Attributes:
        service: weighted tokens W, before any discount.
        ufc: the user's counter.
        rfc: the resources' counter.
        hf: the score that orders clients, in weighted tokens.
    """

    service: int
    ufc: int
    rfc: int
    hf: int


NOTHING = Charge(0, 0, 0, 0)


class Service(NamedTuple):
    """What one request gets and takes, predicted or measured.

    Attributes:
        prompt_tokens: tokens of the prompt, those from the prefix cache included.
        cached_tokens: tokens of the prompt that the prefix cache held.
        response_tokens: tokens of the answer.
        latency_s: seconds from admission to the last token.
        idle_latency_s: the same on the engine without other requests.
        tokens_per_s: throughput of this request.
        gpu_utilization: its share of the GPU's binding resource, in [0, 1].
    """

    prompt_tokens: int
    cached_tokens: int
    response_tokens: float
    latency_s: float = 0.0
    idle_latency_s: float = 0.0
    tokens_per_s: float = 0.0
    gpu_utilization: float = 0.0


def weighted_tokens(service: Service, config: FairnessConfig) -> float:
    """W, the service of VTC (Sheng et al., OSDI 2024), cached tokens at their own price."""
    cached = min(service.cached_tokens, service.prompt_tokens)
    computed = service.prompt_tokens - cached
    return (
        config.prompt_weight * computed
        + config.cached_weight * cached
        + config.response_weight * service.response_tokens
    )


def ufc(service: Service, config: FairnessConfig) -> float:
    """The user's counter, see the head of this module; never negative."""
    return discounted(weighted_tokens(service, config), service, config)


def discounted(tokens: float, service: Service, config: FairnessConfig) -> float:
    """UFC of `tokens` weighted tokens."""
    match config.ufc:
        case "slowdown":
            idle = service.idle_latency_s
            late = service.latency_s / idle - 1.0 if idle > 0 else 0.0
            return tokens / (1.0 + config.delta * max(0.0, late))
        case "discount":
            return tokens / (1.0 + config.delta * service.latency_s)
        case "subtract":
            return max(0.0, tokens - config.delta * service.latency_s)
        case "tokens":
            return tokens


def rfc(service: Service, config: FairnessConfig) -> float:
    """The resources' counter, see the head of this module; never negative."""
    match config.rfc:
        case "gpu-seconds":
            return service.gpu_utilization * service.latency_s
        case "product":
            return service.tokens_per_s * service.gpu_utilization
        case "sum":
            return service.tokens_per_s / _FLUENT_TOKENS_PER_S + service.gpu_utilization
        case "share":
            return service.gpu_utilization


def charge(service: Service, config: FairnessConfig, rfc_scale: float) -> Charge:
    """All counters of one request, as they are booked.

    Args:
        service: what it gets and takes.
        config: the formulas.
        rfc_scale: weighted tokens that one unit of RFC counts as in HF.
    """
    tokens = weighted_tokens(service, config)
    user, resources = discounted(tokens, service, config), rfc(service, config)
    score = max(config.alpha * user + config.beta * rfc_scale * resources, LEAST_SCORE * tokens)
    return _new(
        Charge, (int(tokens * UNIT + 0.5), int(user * UNIT + 0.5), int(resources * UNIT + 0.5), int(score * UNIT + 0.5))
    )
