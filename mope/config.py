"""`config.json` of a saved predictor: everything that turns weights back into the same predictor.

Frozen; unknown fields are an error; defaults that an artifact was saved with are written out, so they never
change under it. Knows no paths and opens no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

FORMAT_VERSION = 5

Design = Literal["shared", "separate"]
Combination = Literal["top1", "mixture"]
RouterPart = Literal["gate", "rules", "lookup"]
UnknownLlms = dict[str, tuple[tuple[float, float], ...]]  # mode of asking -> factors on the length, with weights


class Frozen(BaseModel):
    """A config that cannot be changed and takes no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _without_controls(text: str) -> str:
    if any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in text):
        raise ValueError("a name has no control characters")
    return text


Name = Annotated[str, Field(max_length=500), AfterValidator(_without_controls)]  # it may be written to a terminal
LARGEST = 1e9  # number that a predictor has for tokens, or for what is known of a request


class PredictorConfig(Frozen):
    """What a saved predictor is. All that a folder says is checked here: somebody else may have written it."""

    model_config = ConfigDict(allow_inf_nan=False)

    format_version: int = Field(description="version of the artifact folder's layout")
    preset: Name = Field(description="micro, small or base: where the predictor is meant to run")
    design: Design = Field(description="shared: one trunk, K heads; separate: a gate network and K expert networks")
    num_experts: int = Field(ge=1, le=8, description="experts, shortest answers first")
    boundaries: tuple[float, ...] = Field(description="inner borders of the experts' buckets in response tokens")
    edges: tuple[float, ...] = Field(description="edges of the bins in response tokens, the tail included")
    num_body_bins: int = Field(ge=1, le=10_000, description="bins the network resolves; it gives the tail as one more")
    tail_shares: tuple[float, ...] = Field(description="share of the tail's mass in each tail bin")
    tail_index: float = Field(gt=0, le=LARGEST, description="Pareto index of the tail in the training rows")
    label_tokenizer: Name = Field(description="tokenizer that response tokens are counted with")
    encoder: Name = Field(description="encoder the trunk was started from")
    encoder_config: dict[str, Any] = Field(description="the encoder's architecture, as transformers writes it")
    tokenizer_sha256: str = Field(description="hash of tokenizer.json")
    special_ids: tuple[int, int, int] = Field(description="token ids of [CLS], [SEP] and padding")
    max_prompt_tokens: int = Field(ge=1, le=100_000, description="window of the prompt in input tokens")
    max_context_tokens: int = Field(
        ge=0, le=100_000, description="window of the previous or system prompt in input tokens"
    )
    chars_per_token: int = Field(ge=1, le=1000, description="characters of the text that are tokenised per input token")
    lexical_chars: int = Field(
        ge=2, le=10_000_000, description="characters of the prompt, from both ends, that rules and numbers see"
    )
    target_llms: tuple[Name, ...] = Field(max_length=100_000, description="target LLMs with an embedding of their own")
    unnamed_llm: bool = Field(description="whether rows that name no LLM taught it, so that None is one it knows")
    unknown_llms: UnknownLlms = Field(
        description="by mode of asking, how many times longer than predicted an LLM that is not known may answer, "
        "as pairs of a factor and its weight"
    )
    llm_dim: int = Field(ge=0, le=10_000, description="size of a target LLM's embedding")
    head_hidden: int = Field(ge=1, le=100_000, description="hidden units of the gate and of each head")
    number_names: tuple[str, ...] = Field(description="numbers beside the text, in order")
    number_mean: tuple[float, ...] = Field(description="their means in the training rows")
    number_scale: tuple[float, ...] = Field(description="one over their standard deviations, 0 for constants")
    number_edges: tuple[tuple[float, ...], ...] = Field(
        description="of each number, the quantiles in the training rows between which it enters piece by piece, too"
    )
    router_parts: tuple[RouterPart, ...] = Field(description="parts of the router that are switched on")
    combination: Combination = Field(description="top1: the routed expert alone; mixture: all, weighted by the router")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        num_numbers = len(self.number_names)
        vocab_size = self.encoder_config.get("vocab_size")
        if type(vocab_size) is not int or not 0 < vocab_size <= 10_000_000:
            raise ValueError("encoder_config: expected a vocab_size from 1 to 10,000,000")
        pairs = [pair for pairs in self.unknown_llms.values() for pair in pairs or [(0.0, 0.0)]]
        for name, is_right in {
            "boundaries": len(self.boundaries) == self.num_experts - 1 and _rises(self.boundaries),
            "edges": len(self.edges) == self.num_body_bins + len(self.tail_shares) + 1 and _rises(self.edges),
            "tail_shares": bool(self.tail_shares)
            and min(self.tail_shares) >= 0
            and abs(sum(self.tail_shares) - 1) < 1e-6,
            "special_ids": all(0 <= token < vocab_size for token in self.special_ids),
            "number_mean": len(self.number_mean) == num_numbers and _is_small(self.number_mean),
            "number_scale": len(self.number_scale) == num_numbers and _is_small(self.number_scale),
            "number_edges": len(self.number_edges) in (0, num_numbers)
            and all(_is_small(own) and all(a < b for a, b in pairwise(own)) for own in self.number_edges),
            "unknown_llms": all(0 < number <= LARGEST for pair in pairs for number in pair),
        }.items():
            if not is_right:
                raise ValueError(f"{name}: no predictor has such numbers")
        return self

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


def _rises(numbers: Sequence[float]) -> bool:
    """Whether numbers of tokens rise from above 0."""
    return all(0 < number <= LARGEST for number in numbers) and all(a < b for a, b in pairwise(numbers))


def _is_small(numbers: Sequence[float]) -> bool:
    return all(abs(number) <= LARGEST for number in numbers)


def network_names(config: PredictorConfig) -> list[str]:
    """Names of an artifact's networks: one, or a gate and one per expert."""
    if config.design == "shared":
        return ["model"]
    return ["gate", *(f"expert-{k}" for k in range(config.num_experts))]
