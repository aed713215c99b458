"""What `mope doctor serve` finds: packages, options of a command, predictors, and a service that runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from mope import packaged
from mope.budgets.books import open_books
from mope.budgets.config import read_budgets
from mope.errors import ServerError, UserError
from mope.fairness.stores import MEMORY, shown
from mope.serving_hooks import checks
from mope.serving_hooks.checks import Finding
from mope.serving_hooks.fetch import fetch, fetch_json, readable
from mope.serving_hooks.metrics import own_version
from mope.serving_hooks.service import cli
from mope.serving_hooks.service.config import ServeConfig
from mope.serving_hooks.service.keys import Keys

PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus-client", "onnxruntime")
START = "mope serve chat-small"


def packages() -> list[Finding]:
    """Which packages of the extra `serve` are installed."""
    found = []
    for name in PACKAGES:
        try:
            found.append(Finding("installed", "ok", f"{name} {version(name)}"))
        except PackageNotFoundError:
            needed = name not in ("httptools", "onnxruntime")
            text = f"no {name}: pip install 'mope-llm[serve]'"
            found.append(Finding("installed", "failed" if needed else "warning", text))
    return found


async def _looked_into(config: ServeConfig) -> None:
    books = open_books(config.books, config.books_namespace)
    try:
        await books.totals()
    finally:
        await books.close()


def command(words: Sequence[str]) -> tuple[list[Finding], str | None, ServeConfig]:
    """What is wrong with a command.

    Args:
        words: `mope serve ...`.

    Returns:
        Findings, the predictor that it names, and its options.
    """
    at = next((place for place in range(1, len(words)) if words[place] == "serve"), None)
    if at is None:
        return [Finding("command", "failed", f"expected a command such as {START}")], None, ServeConfig()
    try:
        artifact, config = cli.parse(words[at + 1 :])
        keys = Keys(config)
        budgets = None if config.budgets is None else read_budgets(config.budgets)
        with cli.listen(config.host, config.port):
            pass
    except UserError as error:
        return [Finding("command", "failed", str(error))], None, ServeConfig()
    found = [Finding("command", "ok", f"{config.host}:{config.port} is free; {len(keys)} API keys")]
    if config.gateways and not keys.required:
        found.append(Finding("command", "warning", "--gateways names clients of API keys, and there are no keys"))
    if config.books != MEMORY:
        try:
            asyncio.run(_looked_into(config))
            found.append(Finding("command", "ok", f"the books at {shown(config.books)} can be read"))
        except UserError as error:
            found.append(Finding("command", "failed", str(error)))
    if budgets is not None:
        limited = sum(budget is not None for budget in budgets.clients.values())
        others = (
            "have no limit" if budgets.default is None else f"may use {budgets.default.limit:g} {budgets.default.unit}"
        )
        found.append(Finding("command", "ok", f"budgets of {limited} clients; all others {others}"))
        if config.books == MEMORY:
            text = "--books memory: a restart forgets what clients used; name a file, or a Redis server for replicas"
            found.append(Finding("command", "warning", text))
    if not keys.required and config.host not in ("127.0.0.1", "::1", "localhost"):
        text = f"no API keys: everybody who reaches {config.host} may ask and teach; give --api-keys"
        found.append(Finding("command", "warning", text))
    return found, artifact, config


def running(url: str, api_key: str | None) -> list[Finding]:
    """What a service that runs says.

    Args:
        url: of it.
        api_key: sent as a bearer token.
    """
    part, url = "active", url.rstrip("/").removesuffix("/v1")
    try:
        status = fetch_json(f"{url}/ready")
    except ServerError as error:
        text = f"{url}/ready: {error}"
        if error.status == 503:
            text += "; it starts or ends, ask again"
        return [Finding(part, "failed", text)]
    if status != {"status": "ready"}:
        return [Finding(part, "failed", f"{url} is no mope serve: /ready answered {readable(status)}")]
    try:
        shown = fetch(f"{url}/metrics", api_key)
    except ServerError as error:
        if error.status == 401:
            return [Finding(part, "failed", f"{url}: it is ready, and needs another API key; give --api-key")]
        return [Finding(part, "failed", f"{url}/metrics: {error}")]
    try:
        samples = [sample for one in text_string_to_metric_families(shown) for sample in one.samples]
    except ValueError:
        return [Finding(part, "failed", f"{url}/metrics holds no metrics")]
    outcomes = {one.labels.get("outcome"): one.value for one in samples if one.name == "mope_front_predictions_total"}
    predictor = next((one.labels.get("predictor") for one in samples if one.name == "mope_info"), "no predictor")
    learned = sum(one.value for one in samples if one.name == "mope_learned_total")
    made, all_of_them = outcomes.get("made", 0.0), sum(outcomes.values())
    text = f"{url}: ready, predictor {readable(predictor)}; {made:.0f} predictions made, {learned:.0f} lessons"
    found = [Finding(part, "ok", text)]
    late = outcomes.get("late", 0.0) + outcomes.get("overload", 0.0)
    if late > 0.01 * all_of_them:
        text = f"{late:.0f} of {all_of_them:.0f} predictions came too late: raise --deadline-ms, or serve chat-micro"
        found.append(Finding(part, "warning", text))
    try:
        accounts = fetch_json(f"{url}/v1/budgets", api_key)
    except ServerError as error:
        if error.status == 404:
            found.append(Finding(part, "warning", f"{url} is an older release that does not show its books; update it"))
        else:
            unbooked = "it cannot reach its books: reservations are allowed unbooked"
            meaning = unbooked if error.status == 503 else str(error)
            found.append(Finding(part, "failed", f"{url}/v1/budgets: {meaning}"))
    else:
        if accounts:
            found.append(Finding(part, "ok", f"its books can be read: {len(accounts)} accounts"))
    return found


def examine(words: Sequence[str], url: str | None, api_key: str | None) -> dict[str, Any]:
    """What is found, in the form of `mope.serving_hooks.doctor.examine`.

    Args:
        words: a command; none for an example.
        url: of a service that runs; None for no service.
        api_key: of that service.
    """
    found, config = packages(), ServeConfig()
    names: Sequence[str] = packaged.names()
    if words:
        about, artifact, config = command(words)
        found += about
        names = [artifact] if artifact is not None else []
    if url is None or words:
        found += [checks.predictor(name, config.deadline_ms) for name in names]
    if url is not None:
        found += running(url, api_key)
    return {
        "mope": own_version(),
        "engine": None,
        "release": None,
        "findings": [finding._asdict() for finding in found],
        "command": None if words or url is not None else START,
        "ok": not any(finding.status == "failed" for finding in found),
    }
