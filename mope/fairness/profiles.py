"""Profiles: an engine's hardware and LLM as data, from which `mope.fairness.engine_costs` gets its numbers.

Two kinds. A roofline is derived from published peak rates, the LLM's shape and stated assumptions; those of usual GPUs
and LLMs come with mope, by name. A fitted profile is what `mope profile` writes after measuring a running server. Knows
JSON files and their meaning; not how a request goes through an engine. Read at start, never while scheduling.
"""

from __future__ import annotations

import difflib
import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from mope.config import Frozen
from mope.errors import ConfigError, ProfileError
from mope.fairness.engine_costs import EngineCosts, FittedCosts, RooflineCosts, touched_shares
from mope.files import writable, write_text

FORMAT_VERSION: Literal[1] = 1
FOLDER = Path(__file__).parent / "profiles"  # hardware.json, llms.json
PARALLEL = (1, 2, 4, 8)  # GPUs that named rooflines are made for
MIN_CAPACITY_TOKENS = 4096  # a named roofline whose KV cache holds less is left out
MAX_COEFFICIENT_S = 1e3
MIN_TIME_S = 1e-9  # no engine answers sooner; what would be faster is a unit mistaken

Seconds = Annotated[float, Field(ge=0, le=MAX_COEFFICIENT_S, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e18, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**13)]


class Hardware(Frozen):
    """One GPU by its published peak rates."""

    name: str = Field(description="what it is called in a profile's name")
    flops: Rate = Field(description="dense bf16 FLOP/s of the tensor cores, without sparsity")
    bandwidth: Rate = Field(description="bytes/s of its memory")
    memory_bytes: Count = Field(description="bytes of its memory, the published GB as 10^9 bytes")
    link_bandwidth: Rate = Field(description="bytes/s to other GPUs, in one direction")
    source: str = Field(description="where these figures were published")


class LanguageModel(Frozen):
    """The shape of an LLM, as far as it decides how long a step takes."""

    name: str = Field(description="what it is called in a profile's name")
    parameters: Count = Field(description="all parameters")
    expert_parameters: int = Field(0, ge=0, description="those in routed experts, all layers and experts together")
    num_experts: Count = Field(1, description="routed experts of a layer; 1 for a dense LLM")
    experts_per_token: Count = Field(1, description="experts of a layer that a token passes")
    num_layers: Count = Field(description="layers")
    hidden_size: Count = Field(description="width of the residual stream")
    num_heads: Count = Field(description="query heads")
    num_kv_heads: Count = Field(description="key and value heads")
    head_dim: Count = Field(description="width of a head")
    bytes_per_parameter: Rate = Field(2.0, description="bytes of a weight: 2 for bf16, 1 for fp8")
    bytes_per_kv: Rate = Field(2.0, description="bytes of an element of the KV cache, and of an activation")
    source: str = Field(description="where its shape was published")

    @model_validator(mode="after")
    def _experts_are_some_of_it(self) -> LanguageModel:
        if self.expert_parameters > self.parameters or self.experts_per_token > self.num_experts:
            raise ValueError("an MoE's experts are a part of its parameters, and a token passes some of them")
        return self

    @property
    def active_parameters(self) -> float:
        """Parameters that one token passes."""
        idle = self.expert_parameters * (1.0 - self.experts_per_token / self.num_experts)
        return self.parameters - idle

    def kv_bytes_per_token(self, tensor_parallel: int = 1) -> float:
        """Bytes of KV cache that one token holds on each GPU; where GPUs outnumber KV heads, heads are repeated."""
        heads = -(-self.num_kv_heads // tensor_parallel)
        return 2.0 * self.num_layers * heads * self.head_dim * self.bytes_per_kv


class Assumptions(Frozen):
    """What a roofline takes for granted; none of it was measured on the hardware at hand."""

    compute_fraction: Fraction = Field(0.55, description="share of the peak FLOP/s that prefills reach")
    bandwidth_fraction: Fraction = Field(0.8, description="share of the peak bytes/s that steps reach, links included")
    memory_fraction: Fraction = Field(0.9, description="share of the memory that the engine uses, as vLLM's default")
    overhead_s: Seconds = Field(
        1.5e-3, ge=1e-6, description="seconds of each step in which the GPU waits for the scheduler and its launches"
    )
    allreduce_s: Seconds = Field(15e-6, description="seconds of one all-reduce, however small (two in each layer)")
    chunk_tokens: Count = Field(2048, description="prompt tokens per step at most")


class RooflineProfile(Frozen):
    """A profile derived from peak rates, an LLM's shape and assumptions."""

    format_version: Literal[1] = Field(FORMAT_VERSION, description="version of the profile's form")
    kind: Literal["roofline"] = Field("roofline", description="derived from published peak rates")
    name: str = Field(description="HARDWARE/LLM, with -tpN where N GPUs share the LLM")
    hardware: Hardware = Field(description="each of the GPUs")
    llm: LanguageModel = Field(description="the LLM that they serve")
    tensor_parallel: Count = Field(1, description="GPUs that share each layer")
    assumptions: Assumptions = Field(Assumptions(), description="what was taken for granted")

    @model_validator(mode="after")
    def _fits(self) -> RooflineProfile:
        if self.llm.num_heads % self.tensor_parallel:
            raise ValueError(
                f"{self.llm.name} has {self.llm.num_heads} heads, which {self.tensor_parallel} GPUs can't share evenly"
            )
        if self.capacity_tokens < 1:
            weights = self.llm.parameters * self.llm.bytes_per_parameter
            held = self.hardware.memory_bytes * self.assumptions.memory_fraction * self.tensor_parallel
            raise ValueError(
                f"{self.llm.name} has {weights / 1e9:.1f} GB of weights, and {self.tensor_parallel} x "
                f"{self.hardware.name} hold {held / 1e9:.1f} GB; take more GPUs (-tp2, -tp4, -tp8)"
            )
        return self

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the KV cache holds beside the weights."""
        held = self.hardware.memory_bytes * self.assumptions.memory_fraction
        weights = self.llm.parameters * self.llm.bytes_per_parameter / self.tensor_parallel
        return int((held - weights) // self.llm.kv_bytes_per_token(self.tensor_parallel))

    def costs(self) -> EngineCosts:
        """Its formulas, with everything that does not depend on a request worked out."""
        llm, gpu, taken, parallel = self.llm, self.hardware, self.assumptions, self.tensor_parallel
        flops = gpu.flops * taken.compute_fraction
        bandwidth = gpu.bandwidth * taken.bandwidth_fraction
        link = gpu.link_bandwidth * taken.bandwidth_fraction
        dense = (llm.parameters - llm.expert_parameters) * llm.bytes_per_parameter / parallel
        experts = llm.expert_parameters * llm.bytes_per_parameter / parallel
        shares = touched_shares(llm.num_experts, llm.experts_per_token)
        num_allreduces = 2 * llm.num_layers if parallel > 1 else 0
        ring = 2.0 * (parallel - 1) / parallel  # times that a ring sends each byte, by the size of the message
        return RooflineCosts(
            weights_s=(0.0, *((dense + share * experts) / bandwidth for share in shares[1:])),
            kv_read_s=llm.kv_bytes_per_token(parallel) / bandwidth,
            token_compute_s=2.0 * llm.active_parameters / parallel / flops,
            context_compute_s=4.0 * llm.num_layers * llm.num_heads * llm.head_dim / parallel / flops,
            allreduce_s=num_allreduces * taken.allreduce_s,
            allreduce_token_s=num_allreduces * ring * llm.hidden_size * llm.bytes_per_kv / link,
            overhead_s=taken.overhead_s,
            chunk_tokens=taken.chunk_tokens,
            capacity_tokens=self.capacity_tokens,
        )


class Errors(Frozen):
    """Relative errors of predicted times, on measurements that the fit has not seen."""

    num_measurements: Count = Field(description="measurements that were held out")
    median: float = Field(ge=0, description="half of the errors are below, as a share of the measured time")
    p90: float = Field(ge=0, description="nine of ten errors are below")


class Measured(Frozen):
    """Where a fitted profile comes from."""

    url: str = Field(description="address of the server, without what identifies a user")
    server: str = Field(description="what the server says that it is, or none")
    llm: str = Field(description="the LLM's name on that server")
    date: str = Field(description="when it was measured, ISO 8601, UTC")
    command: str = Field(description="what was typed, secrets left out")
    machine: str = Field(description="processor or GPU that served, as far as the one who measured says")
    complete: bool = Field(description="whether every planned measurement was made")
    num_prefills: Count = Field(description="measured first tokens")
    num_steps: Count = Field(description="measured pieces of runs of decode steps")
    prompt_tokens: tuple[int, int] = Field(description="shortest and longest prompt")
    num_running: tuple[int, int] = Field(description="fewest and most requests that decoded together")
    context_tokens: tuple[int, int] = Field(description="least and most tokens of context of a step, all requests'")
    prefill_errors: Errors = Field(description="of times to the first token, each length held out in turn")
    step_errors: Errors = Field(description="of times of a step, each concurrency and context held out in turn")
    latency_errors: Errors | None = Field(
        None, description="of the mapper's latency, on requests beside others that were not fitted; none if not checked"
    )


class FittedProfile(Frozen):
    """A profile measured on a running server."""

    format_version: Literal[1] = Field(FORMAT_VERSION, description="version of the profile's form")
    kind: Literal["fitted"] = Field("fitted", description="measured by mope profile")
    name: str = Field(description="the LLM's name on the server")
    step_fixed_s: Seconds = Field(description="seconds of a decode step, whatever is in it")
    step_request_s: Seconds = Field(description="seconds that each running request adds to a step")
    step_context_s: Seconds = Field(description="seconds that each token of context adds to a step")
    prefill_fixed_s: Seconds = Field(description="seconds to the first token, whatever the prompt")
    prefill_token_s: Seconds = Field(description="seconds that each prompt token adds")
    prefill_square_s: Seconds = Field(description="seconds that the square of the prompt tokens is multiplied with")
    saturated_requests: Count = Field(description="running requests at the highest measured throughput")
    saturated_tokens_per_s: Rate = Field(description="response tokens per second there")
    capacity_tokens: Count | None = Field(None, description="tokens that the KV cache holds, if the server says so")
    chunk_tokens: Count = Field(2048, description="prompt tokens per step at most, as the server was started")
    measured: Measured = Field(description="where, when and how, and how good it is")

    @model_validator(mode="after")
    def _takes_time(self) -> FittedProfile:
        if min(self.step_fixed_s + self.step_request_s, self.prefill_fixed_s) < MIN_TIME_S:
            raise ValueError("a step and a first token take time, and this profile says 0; measure anew")
        return self

    def costs(self) -> EngineCosts:
        """Its formulas, with everything that does not depend on a request worked out."""
        return FittedCosts(
            step_fixed_s=self.step_fixed_s,
            step_request_s=self.step_request_s,
            step_context_s=self.step_context_s,
            prefill_fixed_s=self.prefill_fixed_s,
            prefill_token_s=self.prefill_token_s,
            prefill_square_s=self.prefill_square_s,
            saturated_requests=self.saturated_requests,
            chunk_tokens=self.chunk_tokens,
            capacity_tokens=self.capacity_tokens,
        )


Profile = RooflineProfile | FittedProfile
_READER: TypeAdapter[Profile] = TypeAdapter(Annotated[Profile, Field(discriminator="kind")])


def roofline(
    hardware: str, llm: str, tensor_parallel: int = 1, *, assumptions: Assumptions | None = None
) -> RooflineProfile:
    """The roofline of hardware and LLM that come with mope.

    Args:
        hardware: for example `"a100-80gb"`.
        llm: for example `"llama-2-70b"`.
        tensor_parallel: GPUs that share each layer.
        assumptions: what is taken for granted, if not the defaults.

    Raises:
        ConfigError: no such name, or the LLM does not fit.
    """
    gpus, llms = _published()
    for known, name, what in ((gpus, hardware, "hardware"), (llms, llm, "LLM")):
        if name not in known:
            raise ConfigError(f"no {what} {name!r} comes with mope{_meant(name, known)}; known: {', '.join(known)}")
    parallel = f"-tp{tensor_parallel}" if tensor_parallel > 1 else ""
    try:
        return RooflineProfile(
            name=f"{hardware}/{llm}{parallel}",
            hardware=gpus[hardware],
            llm=llms[llm],
            tensor_parallel=tensor_parallel,
            assumptions=assumptions or Assumptions(),
        )
    except ValidationError as error:
        raise ConfigError(f"profile {hardware}/{llm}{parallel}: {_first(error)}") from error


def list_profiles() -> list[str]:
    """Names of the rooflines that come with mope: each hardware with each LLM that 1, 2, 4 or 8 of it can hold."""
    return list(_named())


def load_profile(name_or_path: str | Path) -> Profile:
    """A profile that comes with mope, or one from a file.

    Args:
        name_or_path: such as `"a100-80gb/llama-2-7b"`, `"h100/llama-3.1-70b-tp4"`, or what `mope profile` wrote.

    Raises:
        ConfigError: neither a file nor a name that comes with mope.
        ProfileError: the file can't be read, is of another format, or its content can't be used.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return read_profile(path)
    name = str(name_or_path)
    if name in _named():
        return roofline(*_named()[name])
    wanted = re.fullmatch(r"([^/]+)/([^/]+?)(?:-tp(\d{1,3}))?", name)
    if wanted and not name.endswith(".json"):  # says what is wrong with it, or that it does not fit
        return roofline(wanted[1], wanted[2], int(wanted[3] or 1) or 1)
    raise ConfigError(
        f"profile {name!r} is neither a file nor one that comes with mope{_meant(name, _named())}; a name is "
        "HARDWARE/LLM, such as a100-80gb/llama-2-7b, and mope profile writes files"
    )


def read_profile(path: Path) -> Profile:
    """Read a profile's file.

    Raises:
        ProfileError: it can't be read, is of another format, or its content can't be used.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProfileError(f"profile {path} can't be read: {error}") from error
    if not isinstance(content, dict) or content.get("kind") not in ("roofline", "fitted"):
        raise ProfileError(f'profile {path}: expected a JSON object with "kind" roofline or fitted, as mope writes it')
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ProfileError(
            f"profile {path} has format_version {version!r}, this mope reads {FORMAT_VERSION}; measure anew with mope "
            "profile, or install the mope that wrote it"
        )
    try:
        return _READER.validate_python(content)
    except ValidationError as error:
        raise ProfileError(f"profile {path}: {_first(error)}") from error


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile's file; the old one stays if that fails. The same bytes for the same profile.

    Raises:
        ProfileError: it can't be written.
    """
    with writable(f"profile {path}", ProfileError):
        write_text(path, profile.model_dump_json(indent=2) + "\n")


@cache
def _published() -> tuple[dict[str, Hardware], dict[str, LanguageModel]]:
    """Hardware and LLMs that come with mope, by name."""
    gpus = [Hardware.model_validate(entry) for entry in _packaged("hardware.json")]
    llms = [LanguageModel.model_validate(entry) for entry in _packaged("llms.json")]
    return {gpu.name: gpu for gpu in gpus}, {llm.name: llm for llm in llms}


@cache
def _named() -> dict[str, tuple[str, str, int]]:
    """Hardware, LLM and number of GPUs of each name."""
    gpus, llms = _published()
    found = {}
    for hardware in gpus:
        for llm in llms:
            for parallel in PARALLEL:
                try:
                    profile = roofline(hardware, llm, parallel)
                except ConfigError:
                    continue
                if profile.capacity_tokens >= MIN_CAPACITY_TOKENS:
                    found[profile.name] = (hardware, llm, parallel)
    return found


def _packaged(name: str) -> list[dict[str, Any]]:
    content = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    if content["format_version"] != FORMAT_VERSION:
        raise ProfileError(f"{name} has format_version {content['format_version']}; install mope-llm anew")
    entries: list[dict[str, Any]] = content["entries"]
    return entries


def _meant(name: str, known: dict[str, Any]) -> str:
    longer = [each for each in known if name and each.startswith(name)]  # "a100" is a100-80gb rather than h100
    near = difflib.get_close_matches(name, longer, n=1, cutoff=0.0) or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"][1:] if first["loc"][:1] in (("roofline",), ("fitted",)) else first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
