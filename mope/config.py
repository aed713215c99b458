"""`config.json` of a saved predictor: everything that turns weights back into the same predictor.

Frozen; unknown fields are an error; defaults that an artifact was saved with are written out, so they never
change under it. Knows no paths and opens no files.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 5

Design = Literal["shared", "separate"]
Combination = Literal["top1", "mixture"]
RouterPart = Literal["gate", "rules", "lookup"]
UnknownLlms = dict[str, tuple[tuple[float, float], ...]]  # mode of asking -> factors on the length, with weights


class Frozen(BaseModel):
    """A config that cannot be changed and takes no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PredictorConfig(Frozen):
    """What a saved predictor is."""

    format_version: int = Field(description="version of the artifact folder's layout")
    preset: str = Field(description="micro, small or base: where the predictor is meant to run")
    design: Design = Field(description="shared: one trunk, K heads; separate: a gate network and K expert networks")
    num_experts: int = Field(ge=1, le=8, description="experts, shortest answers first")
    boundaries: tuple[float, ...] = Field(description="inner borders of the experts' buckets in response tokens")
    edges: tuple[float, ...] = Field(description="edges of the bins in response tokens, the tail included")
    num_body_bins: int = Field(description="bins the network resolves; it gives the tail as one more")
    tail_shares: tuple[float, ...] = Field(description="share of the tail's mass in each tail bin")
    tail_index: float = Field(description="Pareto index of the tail in the training rows")
    label_tokenizer: str = Field(description="tokenizer that response tokens are counted with")
    encoder: str = Field(description="encoder the trunk was started from")
    encoder_config: dict[str, Any] = Field(description="the encoder's architecture, as transformers writes it")
    tokenizer_sha256: str = Field(description="hash of tokenizer.json")
    special_ids: tuple[int, int, int] = Field(description="token ids of [CLS], [SEP] and padding")
    max_prompt_tokens: int = Field(description="window of the prompt in input tokens")
    max_context_tokens: int = Field(description="window of the previous or system prompt in input tokens")
    chars_per_token: int = Field(ge=1, description="characters of the text that are tokenised per input token")
    lexical_chars: int = Field(ge=2, description="characters of the prompt, from both ends, that rules and numbers see")
    target_llms: tuple[str, ...] = Field(description="target LLMs with an embedding of their own")
    unnamed_llm: bool = Field(description="whether rows that name no LLM taught it, so that None is one it knows")
    unknown_llms: UnknownLlms = Field(
        description="by mode of asking, how many times longer than predicted an LLM that is not known may answer, "
        "as pairs of a factor and its weight"
    )
    llm_dim: int = Field(description="size of a target LLM's embedding")
    head_hidden: int = Field(description="hidden units of the gate and of each head")
    number_names: tuple[str, ...] = Field(description="numbers beside the text, in order")
    number_mean: tuple[float, ...] = Field(description="their means in the training rows")
    number_scale: tuple[float, ...] = Field(description="one over their standard deviations, 0 for constants")
    number_edges: tuple[tuple[float, ...], ...] = Field(
        description="of each number, the quantiles in the training rows between which it enters piece by piece, too"
    )
    router_parts: tuple[RouterPart, ...] = Field(description="parts of the router that are switched on")
    combination: Combination = Field(description="top1: the routed expert alone; mixture: all, weighted by the router")

    @property
    def max_input_tokens(self) -> int:
        """Tokens of the longest input: both windows, [CLS] and two [SEP]."""
        return self.max_prompt_tokens + self.max_context_tokens + 3

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Each expert with the lengths that it is for, such as `"0: up to 183"`."""
        borders = [int(border) for border in self.boundaries]
        if not borders:
            return ("0: all",)
        middle = [f"{k}: {borders[k - 1] + 1} to {borders[k]}" for k in range(1, len(borders))]
        return (f"0: up to {borders[0]}", *middle, f"{len(borders)}: above {borders[-1]}")


def network_names(config: PredictorConfig) -> list[str]:
    """Names of an artifact's networks: one, or a gate and one per expert."""
    if config.design == "shared":
        return ["model"]
    return ["gate", *(f"expert-{k}" for k in range(config.num_experts))]
