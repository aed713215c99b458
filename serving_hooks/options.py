"""Options of the hooks: those of the fairness core, and how clients are told apart, lengths predicted, things shown.

One field is one key of the engine's JSON, `--additional-config '{"mope": {...}}'` for vLLM. Knows no engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from mope import packaged
from mope.errors import ConfigError, UserError
from mope.fairness import FairnessConfig, load_profile
from mope.serving_hooks import remote
from mope.target_llm import MAX_SIZE

_BARE = re.compile(r"[\w.-]+")  # a name without a folder or an organisation

Identity = Literal["api-key", "header", "user", "none"]
NO_PREDICTOR = "none"
PASSWORD_SHOWN = (
    "`store` holds a password, which engines write into their logs: put the address into a variable or a file of its "
    'own and type "store": "env:MOPE_STORE" or "store": "file:/run/secrets/mope-store"'
)


class HookOptions(FairnessConfig):
    """What an operator may choose. Frozen; unknown keys are an error that names the nearest known one."""

    model_config = ConfigDict(hide_input_in_errors=True)  # a traceback of the engine's is no place for a password

    identity: Identity = Field(
        "api-key",
        description="what says who a client is: the key that it authenticates with; a header or the body's `user`, if "
        "a gateway in front sets it and callers cannot; `none` for one client",
    )
    client_header: str = Field(
        "x-client-id",
        pattern=r"^[A-Za-z0-9-]+$",
        description="of identity `header`: its name, lower or upper case; "
        "if the name says that its value is secret, such as `x-api-key` or `cookie`, clients are named by a hash",
    )
    api_keys: Path | None = Field(
        None,
        description="JSON file that maps an API key, or the `sha256:` of one, to a client such as `acme/alice`; a key "
        "of the server that is not in it gets a name such as `key-0123456789abcdef`; all other keys count as none",
    )
    secret: str | None = Field(
        None,
        pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$",
        description="where the server's processes find the secret that they share, `env:NAME` or `file:/path`; for "
        "servers on several machines; by default one is drawn and kept next to `state` or in a private folder",
    )
    predictor: str = Field(
        "chat-small",
        description="packaged predictor, folder or Hub id that predicts lengths; `http://HOST:PORT` of a `mope serve` "
        "that several servers share; `none` for no prediction",
    )
    target_llm: str | None = Field(
        None, description="name of the LLM for the predictor; by default what the server says"
    )
    llm_family: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="family of the LLM, such as `qwen`, if its name does not tell",
    )
    llm_size: float | None = Field(
        None, gt=0, le=MAX_SIZE, description="billions of parameters of the LLM, where its name does not tell"
    )
    llm_reasoning: bool | None = Field(
        None, description="whether the LLM writes long thoughts before it answers, where its name does not tell"
    )
    llm_year: int | None = Field(
        None, ge=1, le=9999, description="year in which the LLM was released, where its name does not tell"
    )
    deadline_ms: float = Field(
        30, gt=0, le=60_000, description="how long a request waits for its prediction before it goes on without"
    )
    recalibrate: bool = Field(True, description="whether predictions are corrected by finished requests")
    state: Path | None = Field(
        None,
        description="file that keeps counters and what was learned over restarts; written within five seconds of a "
        "change, and a second after the engine turns idle",
    )
    lora_patience_s: float = Field(
        1.0,
        ge=0,
        le=86_400,
        description="seconds that a LoRA adapter waits for a place among `--max-loras` (SGLang: "
        "`--max-loras-per-batch`); then the adapter whose clients have had most admits no more requests until the "
        "waiting one runs",
    )
    on_mismatch: Literal["arrival-order", "refuse"] = Field(
        "arrival-order",
        description="what to do when the engine is not as this hook expects: serve in its own order, or do not start",
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65_535, description="port for Prometheus metrics by client; none by default, 0 takes a free one"
    )
    metrics_host: str = Field("127.0.0.1", description="address that the metrics are served at")
    metrics_clients: int = Field(
        200, ge=1, le=100_000, description="clients with metrics of their own; all others are counted as `(others)`"
    )
    summary_s: float = Field(60, ge=0, le=86_400, description="seconds between lines in the log; 0 for none")
    store: str | None = Field(
        None,
        repr=False,
        description="address of a Redis where replicas share counters, such as redis://127.0.0.1:6379/0; `env:NAME` or "
        "`file:PATH` if it has a password: the variable or the file then holds the address",
    )
    namespace: str = Field("mope", description="of `store`: replicas that share counters use the same")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, options: Any) -> Any:
        if isinstance(options, Mapping):
            from difflib import get_close_matches

            for name in options:
                if name not in cls.model_fields:
                    near = get_close_matches(str(name), list(cls.model_fields), 1)
                    raise ValueError(f"no option {str(name)[:80]!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        return options

    @classmethod
    def read(cls, options: Any, where: str) -> HookOptions:
        """Options from an engine's JSON.

        Args:
            options: what was given; None for all defaults.
            where: where it was given, for the message.

        Raises:
            ConfigError: an unknown option, or a value that cannot be used.
        """
        try:
            chosen = cls.model_validate(options if options is not None else {})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            said = first["msg"].removeprefix("Value error, ")
            got = "" if not name else f": {name}" if name == "store" else f": {name} is {first['input']!r:.80}"
            if name == "secret":  # perhaps the secret itself
                got, said = ": secret", "expected `env:NAME` or `file:/path`, not the secret itself"
            raise ConfigError(f"{where}{got}: {said}; `mope doctor options` lists all options") from error
        wrong = chosen._mistake()
        if wrong is not None:
            raise ConfigError(f"{where}: {wrong}")
        return chosen

    def _mistake(self) -> str | None:
        """What names nothing that is there, and would be noticed late or never: a profile, a predictor, a folder."""
        try:
            load_profile(self.profile)
        except UserError as error:
            return f"profile: {error}"
        name = self.predictor
        if (wrong := remote.mistake(name)) is not None:
            return f"predictor: {wrong}"
        here = Path(name).exists() or (packaged.PREDICTORS / name).exists()
        if name != NO_PREDICTOR and _BARE.fullmatch(name) and not here:
            return f"predictor: {packaged.not_found(name)}"
        if self.state is not None and not self.state.expanduser().absolute().parent.parent.is_dir():  # one is made
            return f"state: there is no folder {self.state.parent.parent} for it; make it, or name another file"
        if self.state is not None and self.state.expanduser().is_dir():
            return f"state: {self.state} is a folder; name a file in it, such as {self.state / 'mope.json'}"
        return None
