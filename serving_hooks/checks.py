"""What the doctor finds: a finding, and those about options, whatever the engine.

Looks at files, ports and packages; starts nothing that stays. Knows no engine.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import ValidationError

from mope.errors import ServerError, UserError
from mope.fairness.stores import MEMORY, StoreConfig, address, has_password
from mope.request import Request
from mope.serving_hooks import remote, secret
from mope.serving_hooks.fetch import DEADLINE_S, fetch, readable
from mope.serving_hooks.identity import ApiKeys
from mope.serving_hooks.metrics import own_version
from mope.serving_hooks.options import PASSWORD_SHOWN, HookOptions

Status = Literal["ok", "note", "warning", "failed"]

_PROMPT = "Explain in a few paragraphs how TCP slow start works, when it ends, and what RFC {} says of it."
_NUM_TIMED = 30
_LIKE = 0.8  # how much a flag is like another, of 1, to be taken for it
_FASTEST = "chat-micro"
FASTER = f'raise deadline_ms, or take "predictor": "{_FASTEST}", which is faster'
_LOCAL = ("127.0.0.1", "::1", "localhost")
_PREDICTOR = re.compile(r'^mope_info\{[^}\n]*\bpredictor="((?:[^"\\]|\\.)*)"', re.MULTILINE)  # of a service's metrics


class Finding(NamedTuple):
    """One line of the doctor's.

    Attributes:
        part: where it belongs.
        status: `ok`; `note`, to know; `warning`, works but not as one may think; `failed`, does not work.
        text: what was found, and what to do about it.
    """

    part: str
    status: Status
    text: str


def misspelt(typed: Iterable[str], known: Collection[str], others: Collection[str], part: str) -> list[Finding]:
    """Flags of a command that look like one that matters here, but are not.

    Args:
        typed: flags of the command.
        known: flags that matter here.
        others: flags that the engine has, too, and that look like one of `known`.
        part: where the findings belong.
    """
    found = []
    for flag in dict.fromkeys(flag.partition(".")[0] for flag in typed):
        if flag in known or flag in others or flag.startswith("--no-"):
            continue
        if near := get_close_matches(flag, known, 1, _LIKE):
            found.append(Finding(part, "warning", f"{flag}: did you mean {near[0]}? {flag} was not looked at"))
    return found


def unread(typed: Mapping[str, Sequence[str]], wanted: str, part: str) -> Finding | None:
    """A file of flags that a command names: the engine reads it, the doctor does not.

    Args:
        typed: flags of the command with their values.
        wanted: flags to repeat in the command, for the message.
        part: where the finding belongs.
    """
    if "--config" not in typed:
        return None
    text = f"--config {typed['--config'][-1]}: the doctor does not read this file; to check {wanted}, type them here"
    return Finding(part, "warning", text)


def predictor(name: str, deadline_ms: float, part: str = "predictors") -> Finding:
    """Whether a predictor loads here, and whether one prediction meets the deadline.

    Args:
        name: packaged predictor, folder, Hub id, or address of a service.
        deadline_ms: how long a request waits for its prediction, in milliseconds.
        part: where the finding belongs.
    """
    from mope.predictor import LengthPredictor

    if remote.is_address(name):
        return _service(name, deadline_ms, part)
    if name == "none":
        return Finding(part, "note", "predictor none: clients take turns by a running mean of their answers")
    try:
        started = time.perf_counter()
        loaded = LengthPredictor.from_pretrained(name)
        load_s = time.perf_counter() - started
        loaded.predict(_PROMPT)
        taken = []
        for number in range(_NUM_TIMED):  # a repeated prompt would be answered from the cache
            prompt = _PROMPT.format(number)
            started = time.perf_counter()
            loaded.predict(prompt)
            taken.append(time.perf_counter() - started)
    except UserError as error:
        return Finding(part, "failed", f"{name}: {error}")
    except Exception as error:  # of the engine that runs it: whatever it is, it is what was asked for
        return Finding(part, "failed", f"{name}: {type(error).__name__}: {error}")
    taken_ms = 1000 * statistics.median(taken)
    text = f"{name}: loads in {load_s:.2f} s, a prediction takes {taken_ms:.2f} ms ({loaded.backend_reason})"
    if taken_ms <= deadline_ms:
        return Finding(part, "ok", text)
    advice = "raise deadline_ms" if name == _FASTEST else FASTER
    text += f". That is longer than deadline_ms, {deadline_ms:g}, so most requests go without a prediction: {advice}"
    return Finding(part, "warning", text)


def _service(url: str, deadline_ms: float, part: str) -> Finding:
    """Whether a service answers, accepts the key, and predicts within the deadline."""
    try:
        fetch(f"{remote.base_of(url)}/ready")
    except ServerError as error:
        text = (
            f"{url}: {error}. Requests go on without predictions until it answers; to start it: mope serve chat-small"
        )
        return Finding(part, "failed", text)
    try:
        shown = fetch(f"{remote.base_of(url)}/metrics", remote.api_key())
    except ServerError as error:
        if error.status == 401:
            text = f"{url} does not accept the API key: put one that it knows into the variable {remote.API_KEY}"
            return Finding(part, "failed", text)
        shown = ""
    try:
        sources, taken = asyncio.run(_asked(url))
    except UserError as error:
        return Finding(part, "failed", f"{url}: {error}")
    if (wrong := next((source for source in sources if source != "model"), None)) is not None:
        text = f"{url} makes no predictions ({wrong}): is it a mope serve of release {own_version()} or newer?"
        return Finding(part, "failed", text)
    named = _PREDICTOR.search(shown)
    by = readable(named[1]) if named else "a predictor that it does not name"
    taken_ms = 1000 * statistics.median(taken)
    text = f"{url}: predictions by {by}, {taken_ms:.2f} ms each"
    if taken_ms <= deadline_ms:
        return Finding(part, "ok", text)
    text += f". That is longer than deadline_ms, {deadline_ms:g}, so most requests go without a prediction: raise "
    return Finding(part, "warning", f"{text}deadline_ms, run the service nearer, or have it serve {_FASTEST}")


async def _asked(url: str) -> tuple[list[str], list[float]]:
    """What a service predicts from, and seconds that each prediction took."""
    service = remote.RemotePredictor(url, deadline_s=DEADLINE_S, places=1)
    sources, taken = [], []
    for number in range(_NUM_TIMED):
        started = time.perf_counter()
        found = await service.predict(Request(prompt=_PROMPT.format(number)), deadline_s=DEADLINE_S)
        taken.append(time.perf_counter() - started)
        sources.append(found.source)
        if found.source != "model":
            break
    await service.aclose()
    return sources, taken[1:] or taken  # the first one connects


def no_predictions(predicts: bool, outcomes: Mapping[str, float], engine: str) -> str | None:
    """Why the front end of a server makes no predictions; None if it makes some, or was not asked yet.

    Args:
        predicts: whether its predictor runs.
        outcomes: predictions by what became of them, see `Front.snapshot`.
        engine: what the doctor calls it.
    """
    if not predicts:
        return (
            "no predictor runs, so nothing is predicted. The server's log says why at the start; "
            f"mope doctor {engine} -- COMMAND tries the predictor"
        )
    others = {outcome: num for outcome, num in outcomes.items() if num and outcome != "made"}
    if outcomes.get("made") or not others:
        return None
    if list(others) == ["late"]:
        return f"all came after the deadline: {FASTER}"
    return "what became of them: " + ", ".join(f"{num:.0f} {outcome}" for outcome, num in others.items())


def options(chosen: HookOptions) -> list[Finding]:
    """What is wrong with options that can be read."""
    part, found = "command", []
    if chosen.identity in ("header", "user"):
        source = f"the header {chosen.client_header}" if chosen.identity == "header" else "the body's user"
        found.append(
            Finding(
                part, "note", f"identity {chosen.identity}: right only if a gateway sets {source} and callers cannot"
            )
        )
    if chosen.api_keys is not None:
        try:
            if not len(ApiKeys(chosen.api_keys)):
                text = f"api_keys {chosen.api_keys}: no key stands in it, so it tells nobody apart"
                found.append(Finding(part, "warning", text))
        except UserError as error:
            found.append(Finding(part, "failed", str(error)))
    if chosen.secret is not None:
        try:
            secret.load(chosen)
        except UserError as error:
            found.append(Finding(part, "failed", str(error)))
    if chosen.state is not None:
        folder = chosen.state.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            found.append(Finding(part, "warning", f"state: {folder} cannot be written by this user; nothing is kept"))
    if chosen.store is not None:
        found += _store(chosen.store, part)
    if chosen.store is not None and chosen.state is not None:
        found.append(Finding(part, "note", "store and state: the file keeps this replica's books, Redis those of all"))
    if chosen.metrics_port is not None:
        found += _metrics(chosen, part)
    if remote.is_address(chosen.predictor):
        parts = urlsplit(chosen.predictor)
        if parts.scheme == "http" and parts.hostname not in _LOCAL:
            text = f"predictor: texts of requests and the API key travel to {parts.hostname} without TLS"
            found.append(Finding(part, "warning", text))
    if chosen.predicted_admission and chosen.kv_margin < 1:
        found.append(
            Finding(part, "note", f"kv_margin {chosen.kv_margin:g}: admits more than is predicted to fit, and preempts")
        )
    return found


def _store(url: str, part: str) -> list[Finding]:
    found = []
    if url != MEMORY and find_spec("redis") is None:
        found.append(Finding(part, "failed", "store: the package redis is missing: pip install 'mope-llm[redis]'"))
    if has_password(url):
        found.append(Finding(part, "warning", PASSWORD_SHOWN))
    try:
        StoreConfig(url=url)
    except ValidationError as error:
        found.append(Finding(part, "failed", f"store: {error.errors()[0]['msg'].removeprefix('Value error, ')}"))
    else:
        try:
            address(url)
        except UserError as error:
            found.append(Finding(part, "warning", f"{error}; the server will not start without it"))
    return found


def _metrics(chosen: HookOptions, part: str) -> list[Finding]:
    found = []
    if chosen.metrics_host not in _LOCAL:
        text = f"metrics_host {chosen.metrics_host}: names of clients are shown to whoever reaches that port"
        found.append(Finding(part, "warning", text))
    if chosen.metrics_port and not _is_free(chosen.metrics_host, chosen.metrics_port):
        text = f"metrics_port {chosen.metrics_port} is in use now; the server would take a free one and say which"
        found.append(Finding(part, "warning", text))
    return found


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, OverflowError):
        return False
    return True


def option_rows() -> list[dict[str, Any]]:
    """All options: `name`, `values` that it takes, `default` (None where there is none) and `text`."""
    schema = HookOptions.model_json_schema()["properties"]
    rows = []
    for name, field in HookOptions.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = dict(default) if hasattr(default, "keys") else default
        rows.append({"name": name, "values": _values(schema[name]), "default": shown, "text": field.description})
    return rows


def _values(schema: dict[str, Any]) -> str:
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    schema = kinds[0]
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if schema.get("format") == "path":
        return "file"
    kind = {"boolean": "true | false", "string": "text", "object": "{name: number}"}.get(schema["type"], "number")
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum")
    if low is None:
        return kind
    low_text = f"above {low:g}" if "exclusiveMinimum" in schema else f"{low:g}"
    return f"{low_text} to {high:g}" if high is not None else f"{low_text} or more"
