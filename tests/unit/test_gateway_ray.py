"""The request router in real Ray Serve; a fake service predicts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve")
pytest.importorskip("httpx2")

import ray
from pydantic import BaseModel
from ray import serve
from ray.serve.config import RequestRouterConfig

from mope.client import TYPICAL, Prediction
from mope.errors import ConfigError
from mope.serving_hooks.gateways import ray_serve
from mope.serving_hooks.gateways.ray_serve import Books, LeastTokensRouter, body_of

HOW_TO = (Path(__file__).resolve().parents[2] / "serving_hooks" / "gateways" / "README.md").read_text(encoding="utf-8")


class Chat(BaseModel):
    messages: list[dict[str, str]]
    max_tokens: int | None = None


MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "value",
    [
        {"messages": MESSAGES},
        Chat(messages=MESSAGES),
        SimpleNamespace(body={"messages": MESSAGES}),
        SimpleNamespace(body=b' {"messages": [{"role": "user", "content": "Hello"}]}'),
    ],
)
def test_finds_the_body(value: Any) -> None:
    assert body_of((3, None, "text", value)) == {"messages": MESSAGES}


@pytest.mark.parametrize("value", [None, 3, "{", b"\xff", "{]", {"a": 1}, SimpleNamespace(body=7)])
def test_no_body(value: Any) -> None:
    assert body_of((value,)) is None


def test_books_count_from_routing_to_end() -> None:
    books = Books(100.0)
    books.begin("one", "a")
    assert books.load("a", None) == 100.0
    assert not books.predicted
    books.correct("one", 900.0)
    books.correct("two", 7.0)  # which is not routed yet
    books.begin("two", "b")
    assert books.predicted
    assert books.load("a", 3) == 900.0 + 2 * 100.0  # two of other routers
    assert books.load("b", 1) == 7.0
    books.end("one", "b")  # an attempt that b refused
    assert len(books) == 2
    books.end("one", "a")
    books.end("two", "b")
    books.end("two", "b")
    assert (len(books), books.predicted, books.load("a", 0)) == (0, False, 0.0)


def test_books_count_down() -> None:
    books = Books(100.0, tokens_per_s=1e9)
    books.begin("one", "a")
    time.sleep(0.001)
    assert books.load("a", 1) == pytest.approx(10.0)


def test_books_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_serve, "MAX_OPEN", 50)
    books = Books(1.0)
    for number in range(1000):
        books.correct(f"never {number}", 1.0)
        books.begin(str(number), number % 3)
    assert len(books) == 50
    assert len(books._early) <= ray_serve.MAX_ASKED
    assert sum(books.load(replica, None) for replica in range(3)) == 50.0


@pytest.mark.parametrize("given", [{"choices": 1}, {"choices": 2.5}, {"deadline_ms": 0}, {"tokens_per_s": -1}])
def test_refuses_settings(given: dict[str, Any]) -> None:
    router = LeastTokensRouter.__new__(LeastTokensRouter)
    with pytest.raises(ConfigError, match=f"{next(iter(given))}: got .*expected"):
        router.initialize_state(**given)


class Fake:
    async def predict(self, body: Any) -> Prediction:
        tokens = float(body["messages"][0]["content"])
        return Prediction(tokens, tokens)


class Known(LeastTokensRouter):
    def connect(self) -> Any:
        return Fake()


class Failing(LeastTokensRouter):
    def connect(self) -> Any:
        raise RuntimeError("a fault")


class Broken(Known):
    def _by_tokens(self, pending: Any) -> list[list[Any]]:
        raise RuntimeError("a fault")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    serve.shutdown()
    ray.shutdown()


def placed(router: Any, **kwargs: Any) -> Counter[str]:
    """Where 20 short requests go while one long request runs on one of two replicas."""

    @serve.deployment(
        num_replicas=2,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(request_router_class=router, request_router_kwargs=kwargs),
    )
    class Engine:
        async def __call__(self, body: dict[str, Any]) -> str:
            tokens = float(body["messages"][0]["content"])
            await asyncio.sleep(tokens / 1000)
            return serve.get_replica_context().replica_id.unique_id

    handle = serve.run(Engine.bind(), name="mope", route_prefix=None)
    try:
        ask = [{"messages": [{"role": "user", "content": str(tokens)}]} for tokens in (4000, 200)]
        long = handle.remote(ask[0])
        time.sleep(0.5)
        short = [handle.remote(ask[1]) for _ in range(20)]
        where = Counter(one.result(timeout_s=60) for one in short)
        where["with the long one"] = where[long.result(timeout_s=60)]
        return where
    finally:
        serve.delete("mope")


def test_short_requests_avoid_the_replica_with_a_long_one(cluster: None) -> None:
    assert placed(Known)["with the long one"] <= 5  # the shortest queue sends half of them there


@pytest.mark.parametrize("router", [Failing, Broken])
def test_our_faults_fail_no_request(cluster: None, router: type[LeastTokensRouter]) -> None:
    where = placed(router)
    assert sum(where.values()) - where["with the long one"] == 20


def test_no_service(cluster: None) -> None:
    """The router as it is, by its import path, with nobody at the address."""
    where = placed("mope.serving_hooks.gateways.ray_serve.LeastTokensRouter", url="http://127.0.0.1:9", deadline_ms=50)
    assert sum(where.values()) - where["with the long one"] == 20


def test_the_how_to_names_the_settings() -> None:
    assert "mope.serving_hooks.gateways.ray_serve.LeastTokensRouter" in HOW_TO
    for name in ("url", "deadline_ms", "choices", "tokens_per_s"):
        assert f"| `{name}` |" in HOW_TO
    assert TYPICAL.mean == 350
    assert f"Ray {ray.__version__} " in HOW_TO
