"""The OpenAPI page's words: what is sent and answered, with examples."""

from __future__ import annotations

import copy
from typing import Any, Literal

from pydantic import BaseModel, Field


class Cost(BaseModel):
    """What a request takes on an idle engine, by the profile."""

    prompt_tokens: int = Field(description="tokens of the prompt, estimated from its text")
    ttft_s: float = Field(description="seconds to the first token")
    latency_s: float = Field(description="seconds to the last token of an answer of mean length")
    gpu_s: float = Field(description="seconds of the engine's binding resource")


class Thoughts(BaseModel):
    """The expected parts of a response of a reasoning LLM; together its mean."""

    share: float = Field(description="of thoughts in the response, from 0 to 1")
    tokens: float = Field(description="expected tokens of thoughts")
    visible_tokens: float = Field(description="expected tokens of the visible answer")


class Prediction(BaseModel):
    """What is predicted for one answer. All lengths are tokens, with the request's cap applied."""

    id: str | None = Field(description="to observe with")
    median: float
    mean: float
    quantiles: dict[str, float] = Field(description="by level, such as 0.9")
    expert: int = Field(description="index of the expert, -1 for a fallback")
    source: str = Field(
        description="model, or fallback:deadline, fallback:queue full, fallback:error, fallback:no text"
    )
    llm: str = Field(description="what the LLM's name was read as")
    llm_known: bool = Field(description="whether the predictor was trained on answers of this LLM")
    max_tokens: int | None = Field(description="the request's cap")
    thoughts: Thoughts | None = Field(None, description="only where thoughts of the LLM are known")
    cost: Cost | None = Field(None, description="only with a profile")


class Observed(BaseModel):
    """What became of an observation."""

    id: str
    learned: bool
    reason: str = Field(description="why it was not learned; empty if it was")


class Reservation(BaseModel):
    """What became of a reservation. Amounts are in the budget's unit."""

    id: str = Field(description="to settle with")
    client: str = Field(description="whose budget it takes from")
    decision: Literal["allow", "wait", "deny"] = Field(
        description="allow; wait: there will be room; deny: even its median is larger than the whole budget"
    )
    again: bool = Field(description="it was made before under this id, and nothing was changed")
    amount: float = Field(
        description="what it holds: the prompt and a quantile of the answer, or the whole limit where that is less "
        "and the median fits"
    )
    unit: Literal["tokens", "gpu_seconds"]
    limit: float | None = Field(description="what the client may use in a window; null without a limit")
    used: float | None = Field(description="what was settled in the window")
    held: float | None = Field(description="what is held in the window, with this reservation if it was made")
    retry_after_s: float | None = Field(description="seconds to wait; null if it is allowed, or never fits")
    window_s: float | None = Field(description="seconds to the end of the window")
    books: bool = Field(description="false: the books could not be reached, and nothing was reserved")
    prediction: Prediction


class Settled(BaseModel):
    """What became of a settlement. Amounts are in the budget's unit."""

    id: str
    client: str
    state: Literal["settled", "already", "late"] = Field(
        description="already: it was settled before, and nothing changed; late: it had expired, and counts all the same"
    )
    unit: Literal["tokens", "gpu_seconds"]
    reserved: float = Field(description="what was held")
    used: float = Field(description="what it took")
    refunded: float = Field(description="what was given back; negative where the answer was longer than reserved")
    learned: bool = Field(description="whether later predictions are corrected by it")


class Account(BaseModel):
    """All that a client ever reserved and used, in the unit of its budget."""

    reserved: float = Field(description="of all reservations: held + settled + expired")
    held: float = Field(description="of open reservations")
    settled: float = Field(description="that settled reservations had held")
    expired: float = Field(description="of reservations that expired and were not settled since")
    used: float = Field(description="that settled reservations took")
    num_reserved: int
    num_settled: int
    num_expired: int
    num_full: int = Field(description="reservations that found no room")
    windows: int = Field(description="windows that are over and done")
    windows_over: int = Field(description="of them, those in which more than the limit was used")


class Health(BaseModel):
    """Whether the service lives, or takes requests."""

    status: str


class ErrorBody(BaseModel):
    """What was wrong."""

    message: str = Field(description="what was got, and what was expected")
    type: str
    code: int = Field(description="the HTTP status")


class Failure(BaseModel):
    """A request that was not served."""

    error: ErrorBody


_CHAT = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "Explain TCP slow start."}],
    "max_completion_tokens": 512,
}
_REQUEST: dict[str, Any] = {
    "type": "object",
    "description": "A body as OpenAI, Anthropic, vLLM or SGLang take it. It needs one of prompt, messages and input.",
    "anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}, {"required": ["input"]}],
    "properties": {
        "prompt": {"type": "string"},
        "messages": {"type": "array", "items": {"type": "object"}},
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
        "model": {"type": "string", "description": "the LLM that will answer"},
        "max_tokens": {"type": "integer", "description": "cap on response tokens, under any dialect's name"},
    },
    "additionalProperties": True,
}
PREDICT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"anyOf": [_REQUEST, {"type": "array", "items": _REQUEST, "minItems": 1}]},
                "examples": {
                    "prompt": {"value": {"prompt": "Explain TCP slow start.", "target_llm": "llama-3-8b"}},
                    "OpenAI chat": {"value": _CHAT},
                    "OpenAI completions": {"value": {"model": "llama-3-8b", "prompt": "Once upon", "max_tokens": 64}},
                    "OpenAI responses": {"value": {"model": "gpt-5", "input": "Hi", "reasoning": {"effort": "low"}}},
                    "Anthropic messages": {
                        "value": {
                            "model": "claude-sonnet-4-5",
                            "max_tokens": 1024,
                            "system": "Be brief.",
                            "messages": [{"role": "user", "content": "What is a hash table?"}],
                        }
                    },
                    "batch": {"value": [_CHAT, {"prompt": "Say hello."}]},
                },
            }
        },
    }
}
OBSERVE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "id": {"type": "string", "description": "of a prediction"},
                        "prediction": {"type": "object", "description": "the prediction itself, in place of its id"},
                        "completion_tokens": {"type": "integer", "minimum": 0},
                        "usage": {"type": "object", "description": "a usage block of OpenAI or Anthropic as it is"},
                        "response": {"type": "object", "description": "the whole response, in place of usage"},
                        "finish_reason": {"type": "string", "description": "why the answer ended, such as stop"},
                        "client": {
                            "type": "string",
                            "maxLength": 200,
                            "description": "whose request it was, from a key that may speak for others; by default the "
                            "client of the API key",
                        },
                    },
                    "additionalProperties": True,
                },
                "examples": {
                    "tokens": {"value": {"id": "9nQx2s8Yk1VbTgZw", "completion_tokens": 231}},
                    "OpenAI usage": {
                        "value": {
                            "id": "9nQx2s8Yk1VbTgZw",
                            "usage": {"prompt_tokens": 12, "completion_tokens": 231, "total_tokens": 243},
                            "finish_reason": "stop",
                        }
                    },
                    "Anthropic usage": {
                        "value": {
                            "id": "9nQx2s8Yk1VbTgZw",
                            "usage": {"input_tokens": 12, "output_tokens": 1024},
                            "stop_reason": "max_tokens",
                        }
                    },
                },
            }
        },
    }
}
RESERVE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["request"],
                    "properties": {
                        "request": _REQUEST,
                        "client": {
                            "type": "string",
                            "maxLength": 200,
                            "description": "whose budget it takes from; by default the client of the API key",
                        },
                        "id": {
                            "type": "string",
                            "minLength": 1,
                            "maxLength": 200,
                            "description": "of the reservation; one that is sent again is not made twice",
                        },
                        "prompt_tokens": {
                            "type": "integer",
                            "minimum": 0,
                            "description": "of the prompt, where they are known; by default they are estimated",
                        },
                    },
                    "additionalProperties": True,
                },
                "examples": {"OpenAI chat": {"value": {"client": "team-a", "request": _CHAT}}},
            }
        },
    }
}
SETTLE_BODY: dict[str, Any] = copy.deepcopy(OBSERVE_BODY)
for _name in ("prediction", "client"):
    del SETTLE_BODY["requestBody"]["content"]["application/json"]["schema"]["properties"][_name]
SETTLE_BODY["requestBody"]["content"]["application/json"]["schema"]["properties"]["id"]["description"] = (
    "of a reservation"
)
