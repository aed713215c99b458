"""Request ids and the log: one line for each request, as JSON or as text, never with what was asked."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from datetime import datetime, timezone
from typing import Any

from mope.serving_hooks.asgi import App, Message, Receive, Scope, Send
from mope.serving_hooks.metrics import printable
from mope.serving_hooks.service.metrics import ServiceMetrics

REQUEST_ID = b"x-request-id"
_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)

logger = logging.getLogger("mope.serve")


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record: time, level, logger, message, what `extra={"fields": ...}` adds, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_config(form: str) -> dict[str, Any]:
    """What uvicorn gives to `logging.config`: everything to stderr in one form.

    Args:
        form: `json` or `text`.
    """
    formatter = (
        {"()": "mope.serving_hooks.service.logs.JsonFormatter"}
        if form == "json"
        else {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    )
    quiet = {"handlers": ["stderr"], "level": "INFO", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"form": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "form", "stream": "ext://sys.stderr"}},
        "loggers": {"uvicorn": quiet, "mope": quiet},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
    }


class Door:
    """ASGI middleware that gives each request an id, counts it and logs it.

    Args:
        app: what lies behind.
        metrics: counts responses.
        log_requests: whether each request has a line.
    """

    def __init__(self, app: App, metrics: ServiceMetrics, *, log_requests: bool) -> None:
        self.app, self._metrics, self._logs = app, metrics, log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls an application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
        name = given if _ID.fullmatch(given) else secrets.token_hex(8).encode()
        state = scope.setdefault("state", {})
        started, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (REQUEST_ID, name)]}
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            self._metrics.responses.labels(str(status)).inc()
            if self._logs:
                fields = {
                    "request_id": name.decode(),
                    "method": printable(scope["method"]),
                    "path": printable(scope["path"][:200]),
                    "status": status,
                    "ms": round(1000 * (time.perf_counter() - started), 2),
                    "client": state.get("client"),
                }
                said = " ".join(str(fields[key]) for key in ("method", "path", "status", "ms"))
                logger.info(said, extra={"fields": fields})
