"""The HTTP side of `mope serve`: routes, keys, limits and errors. What is predicted is the desk's business."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from mope.errors import DataError, StoreError, UserError
from mope.reader import shown
from mope.serving_hooks.bodies import MAX_PARSED, readable
from mope.serving_hooks.metrics import own_version
from mope.serving_hooks.service.config import MAX_DEADLINE_MS
from mope.serving_hooks.service.desk import Desk, UnknownId
from mope.serving_hooks.service.keys import Keys
from mope.serving_hooks.service.limiter import UsedId
from mope.serving_hooks.service.logs import Door
from mope.serving_hooks.service.schemas import (
    OBSERVE_BODY,
    PREDICT_BODY,
    RESERVE_BODY,
    SETTLE_BODY,
    Account,
    Failure,
    Health,
    Observed,
    Prediction,
    Reservation,
    Settled,
)

_bearer = HTTPBearer(auto_error=False, description="an API key, where the service was given any")
_x_api_key = APIKeyHeader(
    name="x-api-key", auto_error=False, description="the same key, as Anthropic's clients send it"
)
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
_FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "the request cannot be read; the message says what was expected"},
    401: {"model": Failure, "description": "no accepted API key"},
    408: {"model": Failure, "description": "the body did not arrive in time"},
    413: {"model": Failure, "description": "the body is too large"},
}
DESCRIPTION = """\
Predicts how many tokens an LLM will answer, before the first one. Send the body of a request as it is to
`/v1/predict`, and what was generated to `/v1/observe`: later predictions are corrected by it.

A prediction is never missing: where the predictor cannot answer before the deadline, the length distribution of its
training data is the answer, and `source` says so."""

router = APIRouter()


def _client(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    x_api_key: Annotated[str | None, Security(_x_api_key)],
) -> str | None:
    """Who asks, before anything of the body is read."""
    keys: Keys = request.app.state.keys
    if not keys.required:
        return None
    keys.refresh()
    client = keys.client(bearer.credentials if bearer is not None else None) or keys.client(x_api_key)
    if client is None:
        raise HTTPException(
            401,
            "this service needs an API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
            {"WWW-Authenticate": "Bearer"},
        )
    request.state.client = client
    return client


# as a coroutine, which runs in the event loop; a plain function would take a thread each time
async def _known_client(client: Annotated[str | None, Security(_client)]) -> str | None:
    return client


Client = Annotated["str | None", Security(_known_client)]


@router.post(
    "/v1/predict",
    response_model=Prediction | list[Prediction],
    responses=_FAILURES,
    openapi_extra=PREDICT_BODY,
    summary="Predict the length of an answer",
)
async def predict(
    request: Request,
    client: Client,
    deadline_ms: Annotated[
        float | None,
        Query(gt=0, le=MAX_DEADLINE_MS, description="milliseconds from now, after which the fallback is the answer"),
    ] = None,
) -> Response:
    """One prediction for an object, a list of predictions for a list.

    The deadline counts from when the body is here.
    """
    desk: Desk = request.app.state.desk
    body = await _json(request, desk)
    came_s = time.monotonic()
    desk.metrics.requests.labels("/v1/predict").inc()
    deadline_s = (desk.config.deadline_ms if deadline_ms is None else deadline_ms) / 1000
    if not isinstance(body, list):
        return JSONResponse((await desk.predict([body], client, deadline_s, came_s))[0])
    if not 1 <= len(body) <= desk.config.max_batch:
        raise DataError(f"a list holds 1 to {desk.config.max_batch} requests (--max-batch); got {len(body)}")
    return JSONResponse(await desk.predict(body, client, deadline_s, came_s))


@router.post(
    "/v1/observe",
    response_model=Observed,
    responses={**_FAILURES, 404: {"model": Failure, "description": "no prediction waits under this id"}},
    openapi_extra=OBSERVE_BODY,
    summary="Say how long an answer was",
)
async def observe(request: Request, client: Client) -> Response:
    """Later predictions for this LLM are corrected by it. Each prediction is observed once."""
    desk: Desk = request.app.state.desk
    body = await _json(request, desk)
    desk.metrics.requests.labels("/v1/observe").inc()
    return JSONResponse(desk.observe(body, client))


@router.post(
    "/v1/reserve",
    response_model=Reservation,
    responses={
        **_FAILURES,
        409: {"model": Failure, "description": "the id is another reservation's"},
        429: {"model": Reservation, "description": "no room in the budget"},
    },
    openapi_extra=RESERVE_BODY,
    summary="Reserve what a request may need",
)
async def reserve(
    request: Request,
    client: Client,
    deadline_ms: Annotated[
        float | None,
        Query(gt=0, le=MAX_DEADLINE_MS, description="milliseconds for the prediction, as for /v1/predict"),
    ] = None,
) -> Response:
    """Predicts the answer and takes the prompt and a quantile of it from the client's budget.

    Status 200 allows the request. Status 429 does not: `Retry-After` says when there is room, as far as is known; where
    it is missing, the request is larger than the whole budget. A reservation that was made under an `id` is not made
    twice.
    """
    desk: Desk = request.app.state.desk
    body = await _json(request, desk)
    came_s = time.monotonic()
    desk.metrics.requests.labels("/v1/reserve").inc()
    deadline_s = (desk.config.deadline_ms if deadline_ms is None else deadline_ms) / 1000
    found = await desk.reserve(body, client, deadline_s, came_s)
    if found["decision"] == "allow":
        return JSONResponse(found)
    wait_s = found["retry_after_s"]
    return JSONResponse(found, 429, None if wait_s is None else {"Retry-After": str(max(math.ceil(wait_s), 1))})


@router.post(
    "/v1/settle",
    response_model=Settled,
    responses={
        **_FAILURES,
        404: {"model": Failure, "description": "no reservation has this id"},
        503: {"model": Failure, "description": "the books cannot be reached; send it again"},
    },
    openapi_extra=SETTLE_BODY,
    summary="Say what a reserved request took",
)
async def settle(request: Request, client: Client) -> Response:
    """Counts what was used and gives back the rest of the reservation. Sent again, it changes nothing."""
    desk: Desk = request.app.state.desk
    body = await _json(request, desk)
    desk.metrics.requests.labels("/v1/settle").inc()
    return JSONResponse(await desk.settle(body, client))


@router.get(
    "/v1/budgets",
    response_model=dict[str, Account],
    responses={**_FAILURES, 503: {"model": Failure, "description": "the books cannot be reached"}},
    summary="What each client used",
)
async def budgets(request: Request, client: Client) -> Response:
    """All that each client ever reserved and used, as the books have it; `reserved = held + settled + expired`.

    With --gateways, other keys see their own account alone.
    """
    desk: Desk = request.app.state.desk
    accounts = await desk.accounts()
    if desk.config.gateways and client not in desk.config.gateways:
        accounts = {name: account for name, account in accounts.items() if name == client}
    return JSONResponse(accounts)


@router.get("/health", response_model=Health, summary="Whether the process lives")
async def health() -> Response:
    """Always status 200."""
    return JSONResponse({"status": "ok"})


@router.get(
    "/ready",
    response_model=Health,
    responses={503: {"model": Health, "description": "it is starting or ending"}},
    summary="Whether the service takes requests",
)
async def ready(request: Request) -> Response:
    """Status 200 once the predictor is loaded."""
    is_ready = request.app.state.ready
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={401: _FAILURES[401]},
    summary="Metrics for Prometheus",
)
async def metrics(request: Request, client: Client) -> Response:
    """With the hooks' names, by client. Needs a key where the service has keys: it names clients."""
    desk: Desk = request.app.state.desk
    return Response(desk.metrics.exposed(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _json(request: Request, desk: Desk) -> Any:
    """The JSON of a body, within its limits.

    Raises:
        HTTPException: too large, or too slow.
        DataError: no JSON.
    """
    limit, timeout_s = desk.config.max_body_bytes, desk.config.body_timeout_s
    too_large = HTTPException(413, f"the body is larger than {limit:,} bytes (--max-body-bytes)")
    said = request.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and len(said) < 20 and int(said) > limit:
        raise too_large
    parts, size = [], 0

    async def read() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)

    try:
        await asyncio.wait_for(read(), timeout_s)
    except (asyncio.TimeoutError, TimeoutError):  # one class only since Python 3.11
        raise HTTPException(408, f"the body did not arrive within {timeout_s:g} s (--body-timeout-s)") from None
    body = readable(b"".join(parts))
    if body is None:
        raise HTTPException(413, f"the body holds more than {MAX_PARSED:,} bytes of text, or too many parts")
    try:
        return json.loads(body)
    except RecursionError:
        raise DataError("the JSON is nested too deeply") from None
    except ValueError as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8, or a number is too long"
        raise DataError(f"the body is no JSON: {said}") from None


def _failure(status: int, message: str, headers: Any = None) -> Response:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


async def _on_user_error(request: Request, error: Exception) -> Response:
    status = 404 if isinstance(error, UnknownId) else 409 if isinstance(error, UsedId) else 400
    return _failure(status, str(error))


async def _on_store_error(request: Request, error: Exception) -> Response:
    return _failure(503, str(error), {"Retry-After": "1"})


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, StarletteHTTPException):
        raise error
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {shown(request.url.path)}; /docs shows what there is"
    return _failure(error.status_code, message, error.headers)


async def _on_query_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    return _failure(400, f"{first['loc'][-1]}: got {shown(first.get('input'))}; expected: {first['msg']}")


async def _on_gone(request: Request, error: Exception) -> Response:
    return _failure(400, "the client went away before its body was here")


async def _on_bug(request: Request, error: Exception) -> Response:
    return _failure(500, "a fault of the service; its log has the traceback under this response's X-Request-Id")


def create_app(desk: Desk, keys: Keys) -> Door:
    """The ASGI application.

    Args:
        desk: predicts and learns. It is closed with the application.
        keys: that are accepted.
    """

    @contextlib.asynccontextmanager
    async def live(app: FastAPI) -> AsyncIterator[None]:
        saving = asyncio.create_task(desk.keep_saving())
        app.state.ready = True
        try:
            yield
        finally:
            app.state.ready = False
            saving.cancel()
            await desk.limiter.close()
            await asyncio.get_running_loop().run_in_executor(None, desk.close)

    app = FastAPI(title="mope serve", version=own_version(), description=DESCRIPTION, lifespan=live, redoc_url=None)
    app.state.desk, app.state.keys, app.state.ready = desk, keys, False
    app.include_router(router)
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(StoreError, _on_store_error)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_query_error)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_exception_handler(Exception, _on_bug)
    return Door(app, desk.metrics, log_requests=desk.config.log_requests)
