"""LiteLLM's real proxy with our hook, a real `mope serve`, and two back ends that answer as long as they are asked.

Run by `make gateways`, in an environment that has LiteLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("litellm")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "integration")]

import uvicorn  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402
from ports import free_port  # noqa: E402
from test_serve import httpx, service  # noqa: E402

TOKEN_S = 0.001  # that a back end takes for a token
START_S = 180.0
AUTH = """
from litellm.proxy._types import UserAPIKeyAuth

async def user_api_key_auth(request, api_key):
    return UserAPIKeyAuth(api_key=api_key, team_id=api_key.removeprefix("sk-"))
"""


class BackEnd:
    """Answers as many tokens as the last message ends with, in as much time."""

    def __init__(self) -> None:
        self.port, self.generated, self.calls = free_port(), 0, Counter[str]()
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def answer(request: Request) -> Any:
            import asyncio

            body = await request.json()
            tokens = int(body["messages"][-1]["content"].split()[-1])
            self.calls["failed" if tokens == 666 else "streamed" if body.get("stream") else "whole"] += 1
            if tokens == 666:
                return JSONResponse({"error": {"message": "no such day", "type": "bad"}}, 400)
            await asyncio.sleep(tokens * TOKEN_S)
            self.generated += tokens
            usage = {"prompt_tokens": 20, "completion_tokens": tokens, "total_tokens": 20 + tokens}
            about = {"id": "x", "created": 1, "model": body["model"]}
            if not body.get("stream"):
                message = {"role": "assistant", "content": "word " * 3}
                choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
                return {**about, "object": "chat.completion", "choices": choices, "usage": usage}

            def parts() -> Iterator[str]:
                about["object"] = "chat.completion.chunk"
                for word in ("one ", "two"):
                    delta = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
                    yield f"data: {json.dumps({**about, 'choices': [delta]})}\n\n"
                end = {"index": 0, "delta": {}, "finish_reason": "stop"}
                yield f"data: {json.dumps({**about, 'choices': [end]})}\n\n"
                yield f"data: {json.dumps({**about, 'choices': [], 'usage': usage})}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(parts(), media_type="text/event-stream")

        self._server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@contextmanager
def proxy(folder: Path, back_ends: list[BackEnd], url: str) -> Iterator[Any]:
    """LiteLLM's proxy before some back ends, as a client of it."""
    port = free_port()
    (folder / "auth.py").write_text(AUTH, encoding="utf-8")
    config = {
        "model_list": [
            {
                "model_name": "llama",
                "litellm_params": {
                    "model": "openai/llama", "api_base": f"http://127.0.0.1:{one.port}/v1", "api_key": "none",
                    "max_retries": 0,
                },
            }
            for one in back_ends
        ],
        "litellm_settings": {"callbacks": "mope.serving_hooks.gateways.litellm.hook", "num_retries": 0},
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
        "general_settings": {"custom_auth": "auth.user_api_key_auth"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    environment = {
        **os.environ, "MOPE_URL": url, "MOPE_DEADLINE_MS": "5000", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONPATH": str(folder), "LITELLM_MASTER_KEY": f"sk-{'0123456789abcdef' * 4}",
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("litellm")), "--config", str(folder / "config.yaml")]
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--host", "127.0.0.1"], env=environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as http:
            until = time.monotonic() + START_S
            while True:
                try:
                    if http.get("/health/liveliness").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if process.poll() is not None or time.monotonic() > until:
                    raise AssertionError((folder / "proxy.log").read_text()[-4000:])
                time.sleep(0.2)
            yield http
    finally:
        process.terminate()
        process.wait(30)


def ask(http: Any, team: str, tokens: int, **more: Any) -> Any:
    body = {"model": "llama", "messages": [{"role": "user", "content": f"Write some words, say {tokens}"}], **more}
    return http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer sk-{team}"})


@pytest.fixture
def back_ends() -> Iterator[list[BackEnd]]:
    both = [BackEnd(), BackEnd()]
    yield both
    for one in both:
        one.close()


def accounts(http: Any, **settled: int) -> dict[str, Any]:
    """The books, once so many calls of each team were settled: LiteLLM tells of ends a little later."""
    until = time.monotonic() + 30
    while True:
        found = http.get("/v1/budgets").json()
        if all(found.get(team, {}).get("num_settled", 0) >= number for team, number in settled.items()):
            return dict(found)
        assert time.monotonic() < until, found
        time.sleep(0.1)


def test_a_team_over_its_budget_gets_429_and_another_one_is_not_touched(
    tmp_path: Path, back_ends: list[BackEnd]
) -> None:
    window_s = 20
    flood_budget = {"limit": 8000, "window_s": window_s, "quantile": 0.99}  # the back ends answer what nobody can know
    budgets = {"clients": {"flood": flood_budget, "light": {"limit": 100000}}}
    (tmp_path / "budgets.json").write_text(json.dumps(budgets), encoding="utf-8")
    options = ("--budgets", str(tmp_path / "budgets.json"), "--no-log-requests", "--deadline-ms", "4000")
    with service(*options) as (books, _), proxy(tmp_path, back_ends, str(books.base_url)) as http:
        time.sleep(window_s - time.time() % window_s + 0.2)  # a whole window
        with ThreadPoolExecutor(16) as pool:
            flood = [pool.submit(ask, http, "flood", 300) for _ in range(60)]
            light = [ask(http, "light", 20).status_code for _ in range(10)]
            answers = [one.result() for one in flood]
        assert light == [200] * 10
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}, statuses
        refused = [answer for answer in answers if answer.status_code == 429]
        for answer in refused:
            assert 1 <= int(answer.headers["retry-after"]) <= window_s
            assert "that flood has in its budget" in answer.text
        found = accounts(books, flood=statuses[200], light=10)
        assert found["flood"]["used"] == statuses[200] * 320 <= 8000
        assert found["flood"]["held"] == 0
        assert found["light"]["used"] == 10 * 40
        assert sum(one.generated for one in back_ends) == statuses[200] * 300 + 10 * 20
        # truthful: after the last of the waits that were named, there is room again
        time.sleep(max(int(answer.headers["retry-after"]) for answer in refused))
        assert ask(http, "flood", 30).status_code == 200


def test_streams_and_failures_are_settled_and_a_dead_service_allows(tmp_path: Path, back_ends: list[BackEnd]) -> None:
    (tmp_path / "budgets.json").write_text(json.dumps({"default": {"limit": 90000}}), encoding="utf-8")
    with service("--budgets", str(tmp_path / "budgets.json"), "--no-log-requests") as (books, serving):  # noqa: SIM117
        with proxy(tmp_path, back_ends, str(books.base_url)) as http:
            for more in ({}, {"stream_options": {"include_usage": True}}):
                with http.stream(
                    "POST",
                    "/v1/chat/completions",
                    json={
                        "model": "llama", "stream": True, "messages": [{"role": "user", "content": "say 70"}], **more,
                    },
                    headers={"Authorization": "Bearer sk-stream"},
                ) as answer:  # fmt: skip
                    assert answer.status_code == 200
                    assert "two" in "".join(answer.iter_text())
            assert ask(http, "broken", 666).status_code == 400
            found = accounts(books, stream=2, broken=1)
            assert found["stream"]["held"] == found["broken"]["held"] == 0
            assert found["broken"]["used"] == 0
            assert found["stream"]["used"] >= 90
            serving.kill()
            serving.wait()
            assert [ask(http, "stream", 5).status_code for _ in range(8)] == [200] * 8


def test_calls_go_to_the_deployment_with_the_least_predicted_work(tmp_path: Path, back_ends: list[BackEnd]) -> None:
    """Long and short calls in turn: by number of calls, one back end would get all the long ones."""
    with service("--no-log-requests", "--deadline-ms", "4000") as (books, _):
        with proxy(tmp_path, back_ends, str(books.base_url)) as http, ThreadPoolExecutor(24) as pool:
            calls = []
            for turn in range(24):
                capped = 900 if turn % 2 == 0 else 4
                calls.append(pool.submit(ask, http, "any", capped, max_tokens=capped))
                time.sleep(0.05)
            assert {call.result().status_code for call in calls} == {200}
        shares = sorted(one.generated for one in back_ends)
        assert shares[0] > 0.6 * shares[1], shares
