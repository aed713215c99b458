"""What `mope serve` is told: one frozen config, one field = one flag = one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mope.config import Frozen

MAX_DEADLINE_MS = 60_000

Level = Annotated[float, Field(gt=0, lt=1)]


class ServeConfig(Frozen):
    """Options of the service."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen at; 0.0.0.0 for all of this machine")
    port: int = Field(8400, ge=0, le=65_535, description="port to listen at; 0 takes a free one and prints it")
    target_llm: str | None = Field(
        None, min_length=1, max_length=500, description="the LLM that will answer, where a request names none"
    )
    token_unit: Literal["own", "cl100k_base", "trained"] = Field(
        "own",
        description="what tokens are counted in, where a request does not say and the predictor knows several units: "
        "tokens of the LLM, which `usage` counts; of cl100k_base; or as the predictor was trained",
    )
    levels: tuple[Level, ...] = Field(
        (0.1, 0.5, 0.9, 0.99), min_length=1, max_length=32, description="quantiles of an answer, between 0 and 1"
    )
    profile: str | None = Field(
        None,
        description="profile of the engine, a name or a file of `mope profile`: answers then hold seconds and GPU "
        "seconds of a request",
    )
    deadline_ms: float = Field(
        50,
        gt=0,
        le=MAX_DEADLINE_MS,
        description="milliseconds after which a request that names no deadline gets the fallback",
    )
    api_keys: Path | None = Field(
        None,
        description='JSON file of accepted API keys, {"KEY or sha256:HEX": "client"}; read again when it changes',
    )
    api_key_env: str = Field(
        "MOPE_API_KEYS",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with accepted API keys, separated by commas; without keys in file or "
        "variable, requests need none",
    )
    backend: str | None = Field(None, description="engine that runs the network; by default the quickest installed")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, ...; by default what the backend needs")
    precision: str | None = Field(None, description="of what was exported, such as int8; by default the backend's own")
    num_threads: int = Field(1, ge=1, le=1024, description="threads of each prediction on the CPU")
    num_workers: int = Field(2, ge=1, le=1024, description="predictions at the same time on the CPU")
    max_batch: int = Field(64, ge=1, le=10_000, description="requests in one list of /v1/predict")
    max_waiting: int = Field(
        256, ge=1, le=1_000_000, description="requests that wait for the predictor; further ones get the fallback"
    )
    max_body_bytes: int = Field(
        8 * 2**20, ge=1024, le=2**30, description="size of a body in bytes; a larger one gets status 413"
    )
    body_timeout_s: float = Field(10, gt=0, le=3600, description="seconds in which a body has to arrive")
    max_connections: int = Field(
        1000, ge=1, le=1_000_000, description="open connections; a request on a further one gets status 503"
    )
    remember: int = Field(
        50_000, ge=1, le=10_000_000, description="predictions that wait for their observation, about 1 kB each"
    )
    remember_s: float = Field(
        3600, gt=0, le=30 * 86_400, description="seconds after which a prediction can no longer be observed"
    )
    learned: Path | None = Field(
        None, description="file that keeps what observations taught over restarts; written every half minute"
    )
    budgets: Path | None = Field(
        None,
        description='JSON file of budgets, {"default": {"limit": 100000}, "clients": {"team-a": {"limit": 1000000, '
        '"window_s": 60}}}; read again when it changes',
    )
    books: str = Field(
        "memory",
        min_length=1,
        repr=False,  # it may hold a password
        description="where reservations are kept: memory, the path of a file, or a Redis server that replicas share "
        "(redis://HOST:PORT/DB, env:NAME)",
    )
    books_namespace: str = Field(
        "default", pattern=r"^[^{}\s]{1,64}$", description="replicas that share budgets on a Redis server have the same"
    )
    books_down: Literal["allow", "deny"] = Field(
        "allow", description="what becomes of reservations while the books cannot be reached"
    )
    gateways: tuple[str, ...] = Field(
        (),
        max_length=1000,
        description="clients of API keys that may reserve for other clients; none named: all keys may",
    )
    metrics_clients: int = Field(
        200, ge=1, le=100_000, description="clients with metrics of their own; all others count as `(others)`"
    )
    shutdown_s: float = Field(10, ge=0, le=3600, description="seconds that requests under way have after SIGTERM")
    log_requests: bool = Field(True, description="log a line for each request, without its text")
    log_format: Literal["json", "text"] = Field("json", description="form of the log's lines")
