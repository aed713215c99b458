"""Every choice of the fairness core: the policy, the formulas of its charges, weights and limits.

One field is one option of the hooks and one flag of the simulator. Knows no engine. Of the Equinox paper
(arXiv 2508.16646) only the abstract and second-hand summaries could be read: what is taken from the abstract, what is
reconstructed and what is ours is said with each variant in `mope.fairness.charges`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from mope.fairness.clients import client_path

PolicyName = Literal["fcfs", "vtc", "vtc-predicted", "equinox", "holistic", "shortest-predicted", "deficit-round-robin"]
UfcVariant = Literal["discount", "subtract", "slowdown", "tokens"]
RfcVariant = Literal["product", "sum", "share", "gpu-seconds"]
VictimOrder = Literal["engine", "remaining", "counter"]


class FairnessConfig(BaseModel):
    """How clients share an engine. Frozen; unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: PolicyName = Field("equinox", description="who is admitted next; `fcfs` keeps the order of arrival")
    alpha: float = Field(0.7, ge=0, le=1, description="share of the user's counter (UFC) in the score HF")
    beta: float = Field(0.3, ge=0, le=1, description="share of the resources' counter (RFC) in the score HF")
    delta: float = Field(
        0.1, ge=0, le=1e6, description="how much a second of latency lowers the UFC; 0 makes it blind to latency"
    )
    prompt_weight: float = Field(1.0, ge=0, le=1e3, description="price of a prompt token")
    response_weight: float = Field(2.0, gt=0, le=1e3, description="price of a response token")
    cached_weight: float = Field(
        0.0, ge=0, le=1e3, description="price of a prompt token that the prefix cache held, never above prompt_weight"
    )
    ufc: UfcVariant = Field("slowdown", description="formula of the UFC")
    rfc: RfcVariant = Field("gpu-seconds", description="formula of the RFC")
    rfc_scale: float | None = Field(
        None,
        gt=0,
        le=1e12,
        description="weighted tokens that one unit of RFC counts as in HF; by default such that a request of 256 "
        "prompt and 256 response tokens, among 16 others like it, has as much RFC as UFC",
    )
    profile: str = Field(
        "a100-80gb/llama-2-7b", description="hardware and LLM that costs are estimated for: a name or a file"
    )
    weights: Mapping[str, float] = Field(
        default_factory=dict,
        description="entitlement of a client, or of a group, in proportion to 1; users of a group as `group/user`",
    )
    default_tokens: float = Field(
        256, ge=1, le=1e6, description="response tokens assumed of a request that carries no usable prediction"
    )
    lift: Literal["settled", "charged"] = Field(
        "settled",
        description="where a client that comes back is lifted to: the least counter of those who wait, without what "
        "their requests in flight are charged ahead, or with it as in VTC's artifact",
    )
    ageing: float = Field(
        2.0,
        ge=0,
        le=1e6,
        description="of shortest-predicted: tokens by which each later arrival is held back; 0 lets long ones starve",
    )
    phi: float = Field(
        0.03,
        ge=1e-3,
        le=1,
        description="of holistic: a request of cost c is passed by later requests of its client that cost c / phi at "
        "most; 1 keeps the order of arrival",
    )
    quantum: float = Field(
        1024, gt=0, le=1e9, description="of deficit-round-robin: HF that a client of weight 1 may spend in a round"
    )
    bypass: int = Field(
        8, ge=0, le=10_000, description="requests that may pass one that does not fit into memory; 0 lets none pass"
    )
    victims: VictimOrder = Field(
        "engine", description="whom to preempt first: the engine's choice, most predicted remaining, highest counter"
    )
    predicted_admission: bool = Field(
        False, description="whether a request waits until the KV cache that all are predicted to need has room for it"
    )
    kv_margin: float = Field(
        1.0, ge=0.1, le=10, description="of predicted_admission: factor on predicted tokens, above 1 is cautious"
    )
    idle_clients: int = Field(
        100_000, ge=0, description="clients without requests that are remembered though they have no debt"
    )
    max_clients: int = Field(1_000_000, ge=1, description="clients in all; beyond, those idle longest are forgotten")

    @field_validator("weights")
    @classmethod
    def _usable_weights(cls, weights: Mapping[str, float]) -> Mapping[str, float]:
        named: dict[str, float] = {}
        for name, weight in weights.items():
            if not isfinite(weight) or not 1e-3 <= weight <= 1e3:
                raise ValueError(f"the weight of {name[:80]!r} is {weight}, expected 0.001 to 1000")
            path = "/".join(client_path(name)) if name.strip("/") else ""  # as clients themselves are named
            if not path or path in named:
                raise ValueError(f"the weight of {name[:80]!r}: {'given twice' if path else 'nobody is called so'}")
            named[path] = weight
        return MappingProxyType(named)

    @model_validator(mode="after")
    def _consistent(self) -> FairnessConfig:
        if self.alpha + self.beta <= 0:
            raise ValueError("alpha and beta are both 0: HF would be 0 for everybody")
        if self.cached_weight > self.prompt_weight:
            raise ValueError(
                f"cached_weight {self.cached_weight} is above prompt_weight {self.prompt_weight}: "
                "a cached token cannot cost more than a computed one"
            )
        return self

    @field_serializer("weights")
    def _plain_weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        return dict(weights)
