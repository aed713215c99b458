"""Budgets of `mope serve`: reserve, settle, wait and deny, over replicas, restarts and a dead server of books."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from real_redis import RealRedis, needs_redis
from test_serve import httpx, service

from mope.client import Predictions, Reservation
from mope.serving_hooks.service.limiter import _booked_as

REQUEST = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Write a long story about the sea."}]}
DAY_S = 86_400


def budgets(folder: Path, **clients: Any) -> str:
    path = folder / "budgets.json"
    default = clients.pop("default", None)
    path.write_text(json.dumps({"default": default, "clients": clients}), encoding="utf-8")
    return str(path)


def reserve(http: Any, client: str, name: str | None = None, **request: Any) -> Any:
    body = {"client": client, "request": {**REQUEST, **request}, **({} if name is None else {"id": name})}
    return http.post("/v1/reserve", json=body, params={"deadline_ms": "30000"})


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}, "finish_reason": "stop"}


def test_a_team_over_its_budget_waits_and_others_do_not(tmp_path: Path) -> None:
    file = budgets(
        tmp_path,
        small={"limit": 2000, "window_s": DAY_S},
        cheap={"limit": 2000, "window_s": DAY_S, "response_weight": 4},
    )
    with service("--budgets", file, "--no-log-requests") as (http, _):
        first = reserve(http, "small").json()
        assert first["decision"] == "allow"
        high = first["prediction"]["quantiles"]["0.9"]
        prompt = 10
        assert first["amount"] == pytest.approx(high + prompt, abs=10)
        assert first["held"] == first["amount"] < 2000
        names, answer = [first["id"]], None
        for _ in range(30):
            answer = reserve(http, "small")
            if answer.status_code != 200:
                break
            names.append(answer.json()["id"])
        assert answer is not None
        full = answer.json()
        assert (answer.status_code, full["decision"]) == (429, "wait")
        assert full["held"] <= 2000 < full["held"] + full["amount"]
        # expected refunds come before the day ends, and Retry-After says so
        assert 0 < full["retry_after_s"] <= float(answer.headers["retry-after"]) < full["retry_after_s"] + 1.01
        assert full["retry_after_s"] < 300
        assert reserve(http, "unlimited").json()["limit"] is None
        assert reserve(http, "cheap", max_tokens=5).json()["amount"] == pytest.approx(prompt + 4 * 5, abs=10)
        never = reserve(http, "cheap", max_tokens=None)
        if never.json()["amount"] > 2000:
            assert (never.status_code, never.json()["decision"]) == (429, "deny")
            assert "retry-after" not in never.headers
        for name in names:
            settled = http.post("/v1/settle", json={"id": name, **usage(prompt, 20)}).json()
            assert (settled["state"], settled["used"]) == ("settled", prompt + 20)
            assert settled["refunded"] == pytest.approx(settled["reserved"] - settled["used"])
            assert settled["learned"] in (True, False)
        assert http.post("/v1/settle", json={"id": names[0], **usage(prompt, 999)}).json()["state"] == "already"
        assert reserve(http, "small").status_code == 200
        account = http.get("/v1/budgets").json()["small"]
        assert account["used"] == len(names) * (prompt + 20)
        assert account["reserved"] == pytest.approx(account["held"] + account["settled"] + account["expired"])
        text = http.get("/metrics").text
        assert 'mope_budget_decisions_total{client="small",decision="wait"} 1.0' in text
        assert f'mope_budget_used_total{{client="small",unit="tokens"}} {account["used"]}' in text


def test_budgets_in_gpu_seconds_and_a_file_that_changes(tmp_path: Path) -> None:
    file = budgets(tmp_path, a={"limit": 5, "unit": "gpu_seconds"})
    with service("--budgets", file, "--profile", "h100/llama-3.1-8b", "--no-log-requests") as (http, _):
        made = reserve(http, "a").json()
        assert (made["unit"], made["decision"]) == ("gpu_seconds", "allow")
        assert 0 < made["amount"] < 5
        settled = http.post("/v1/settle", json={"id": made["id"], **usage(10, 50)}).json()
        assert 0 < settled["used"] < settled["reserved"]
        time.sleep(0.1)
        Path(file).write_text(json.dumps({"clients": {"a": {"limit": 1}}}), encoding="utf-8")
        until = time.monotonic() + 20
        while reserve(http, "a").json()["limit"] != 1:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert reserve(http, "a").json()["decision"] == "deny"
        Path(file).write_text("{broken", encoding="utf-8")
        time.sleep(1.5)
        assert reserve(http, "a").json()["limit"] == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "a reservation is an object such as"),
        ({"client": "a"}, "a reservation is an object such as"),
        ({"client": 5, "request": REQUEST}, "client is a text of at most 200 printable characters; got 5"),
        ({"client": "a\n", "request": REQUEST}, "client is a text"),
        ({"id": "", "request": REQUEST}, "id is empty"),
        ({"id": "x" * 201, "request": REQUEST}, "id is a text"),
        ({"prompt_tokens": -1, "request": REQUEST}, "prompt_tokens is a whole number"),
        ({"request": {"messages": 5}}, "messages"),
    ],
)
def test_a_wrong_reservation_is_told_what_was_expected(plain: Any, body: Any, said: str) -> None:
    answer = plain.post("/v1/reserve", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"id": "nobody", "completion_tokens": 5}, 404, "no reservation has the id 'nobody'"),
        ({"completion_tokens": 5}, 400, "id is the id of a reservation"),
        ({"id": "x"}, 400, "expected generated tokens"),
        ([], 400, "a settlement is an object"),
    ],
)
def test_a_wrong_settlement_is_told_what_was_expected(plain: Any, body: Any, status: int, said: str) -> None:
    answer = plain.post("/v1/settle", json=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def plain() -> Any:
    with service("--no-log-requests") as (http, _):
        yield http


def test_keys_spend_and_settle_only_what_they_may(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"sk-gate": "gate", "sk-bob": "bob"}), encoding="utf-8")
    by = {name: {"x-api-key": f"sk-{name}"} for name in ("gate", "bob")}
    with service("--api-keys", str(keys), "--gateways", "gate", "--no-log-requests") as (http, _):

        def ask(key: str, **body: Any) -> Any:
            return http.post("/v1/reserve", json={"request": REQUEST, **body}, headers=by[key])

        refused = ask("bob", client="alice")
        assert refused.status_code == 400
        assert "this key reserves for 'bob' alone (--gateways)" in refused.json()["error"]["message"]
        assert ask("bob").json()["client"] == "bob"
        assert ask("gate", client="alice", id="one").json()["client"] == "alice"
        assert ask("bob", id="one").json()["held"] > 0  # the same id of another key is another reservation
        said = {"id": "one", "completion_tokens": 1}
        assert http.post("/v1/settle", json=said, headers=by["bob"]).json()["client"] == "bob"
        assert http.post("/v1/settle", json=said, headers=by["gate"]).json()["client"] == "alice"
        assert http.get("/v1/budgets").status_code == 401
        assert set(http.get("/v1/budgets", headers=by["gate"]).json()) == {"alice", "bob"}
        assert set(http.get("/v1/budgets", headers=by["bob"]).json()) == {"bob"}
    assert _booked_as("b", "a/") != _booked_as("/b", "a")
    assert _booked_as("b", None) != _booked_as("b", "")


def test_books_in_a_file_outlive_a_service_that_was_killed(tmp_path: Path) -> None:
    options = ("--budgets", budgets(tmp_path, a={"limit": 1500, "window_s": DAY_S}), "--books", str(tmp_path / "b.db"))
    with service(*options, "--no-log-requests") as (http, process):
        before = reserve(http, "a", "one").json()
        process.kill()
        process.wait()
    with service(*options, "--no-log-requests") as (http, _):
        again = reserve(http, "a", "one").json()
        assert (again["decision"], again["held"]) == ("allow", before["held"])
        assert http.post("/v1/settle", json={"id": "one", **usage(8, 12)}).json()["used"] == 20
        assert http.get("/v1/budgets").json()["a"]["num_reserved"] == 1


@needs_redis
def test_replicas_share_books_and_go_on_without_them(tmp_path: Path) -> None:
    redis = RealRedis(tmp_path, "--appendonly", "yes", "--appendfsync", "always").start()
    file = budgets(tmp_path, a={"limit": 1500, "window_s": DAY_S})
    options = ("--budgets", file, "--books", redis.url, "--no-log-requests")
    try:
        with service(*options) as (one, _), service(*options, "--books-down", "deny") as (two, _):
            made = reserve(one, "a", "one", max_tokens=1000).json()
            assert made["decision"] == "allow"
            while reserve(two, "a").status_code == 200:
                pass
            assert reserve(one, "a").status_code == 429
            # settled at the other replica
            assert two.post("/v1/settle", json={"id": "one", **usage(8, 12)}).json()["state"] == "settled"
            redis.kill()
            allowed, denied = reserve(one, "a"), reserve(two, "a")
            assert (allowed.status_code, allowed.json()["books"]) == (200, False)
            assert (denied.status_code, denied.json()["books"]) == (429, False)
            gone = one.post("/v1/settle", json={"id": "one", **usage(8, 12)})
            assert (gone.status_code, gone.headers["retry-after"]) == (503, "1")
            redis.start()
            again = one.post("/v1/settle", json={"id": "one", **usage(8, 99)}).json()
            assert (again["state"], again["used"]) == ("already", 20)
            assert "mope_budget_unbooked_total 1.0" in one.get("/metrics").text
    finally:
        redis.kill()


def test_the_python_client_reserves_and_settles_and_allows_without_a_service(tmp_path: Path) -> None:
    async def run(url: str) -> tuple[list[Reservation], list[bool]]:
        async with Predictions(url, deadline_s=20.0, rest_s=0.01) as predictions:
            made = [await predictions.reserve(REQUEST, client="a") for _ in range(2)]
            made.append(await predictions.reserve("hi", client="a", id="mine", prompt_tokens=3))
            settled = [await predictions.settle(one, usage={"completion_tokens": 7}) for one in made]
            settled.append(await predictions.settle("mine", completion_tokens=7))
            settled.append(await predictions.settle("nobody", completion_tokens=7))
            return made, settled

    file = budgets(tmp_path, a={"limit": 1500, "window_s": DAY_S})
    with service("--budgets", file, "--no-log-requests") as (http, _):
        (first, second, third), settled = asyncio.run(run(str(http.base_url)))
        assert first.allowed
        assert first.prediction.made
        assert (first.limit, first.source) == (1500, "books")
        assert third.id == "mine" or not third.allowed
        if not second.allowed:
            assert second.wait_s is not None
            assert second.wait_s > 0
        assert settled[0] is True
        assert settled[1] is second.allowed
        assert settled[4] is False
    (first, *_), settled = asyncio.run(run(str(http.base_url)))
    assert (first.allowed, first.source) == (True, "fallback:unreachable")
    assert not any(settled)
    assert httpx


def test_an_id_that_was_used_is_no_free_pass(plain: Any) -> None:
    first = reserve(plain, "ids", "job-1").json()
    assert not first["again"]
    again = reserve(plain, "ids", "job-1").json()
    assert (again["decision"], again["again"], again["held"]) == ("allow", True, first["held"])
    assert reserve(plain, "other", "job-1").status_code == 409
    assert plain.post("/v1/settle", json={"id": "job-1", **usage(3, 4)}).json()["used"] == 7
    used = reserve(plain, "ids", "job-1")
    assert used.status_code == 409
    assert "the id 'job-1' was used for another reservation" in used.json()["error"]["message"]
    late = plain.post("/v1/settle", json={"id": "job-1", **usage(3, 7000)}).json()
    assert (late["state"], late["used"], late["learned"]) == ("already", 7, False)
    text = plain.get("/metrics").text
    assert f'mope_budget_reserved_total{{client="ids",unit="tokens"}} {first["amount"]}' in text
    # what a gateway's clients use is theirs, and each request is counted once
    assert 'mope_client_arrived_total{client="ids"} 1.0' in text
    assert 'mope_client_response_tokens_total{client="ids"} 4.0' in text


@pytest.mark.parametrize(
    ("said", "used", "cached"),
    [
        (usage(10, 20), 30, None),
        ({"prompt_tokens": 9, "completion_tokens": 4}, 13, None),
        (
            {"usage": {"prompt_tokens": 50, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 40}}},
            55,
            40,
        ),
        (
            {
                "usage": {
                    "input_tokens": 10, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 7,
                    "output_tokens": 20,
                }
            },
            137,
            100,
        ),
    ],
    ids=["openai", "top level", "openai cached", "anthropic cached"],
)  # fmt: skip
def test_tokens_of_a_prompt_count_in_every_dialect(
    plain: Any, said: dict[str, Any], used: int, cached: int | None, request: pytest.FixtureRequest
) -> None:
    client = f"dialect {request.node.callspec.id}"
    name = reserve(plain, client).json()["id"]
    assert plain.post("/v1/settle", json={"id": name, **said}).json()["used"] == used
    if cached is not None:
        assert f'mope_client_cached_tokens_total{{client="{client}"}} {cached}.0' in plain.get("/metrics").text


def test_a_budget_that_the_median_fits_is_lent_as_a_whole(tmp_path: Path) -> None:
    """A quantile that is too wide would refuse such requests for ever, and nothing would be learned from them."""
    with service("--no-log-requests") as (http, _):
        quantiles = reserve(http, "any").json()["prediction"]["quantiles"]
    limit = (quantiles["0.5"] + quantiles["0.9"]) / 2 + 10
    file = budgets(tmp_path, a={"limit": limit, "window_s": DAY_S}, b={"limit": 5})
    with service("--budgets", file, "--no-log-requests") as (http, _):
        whole = reserve(http, "a").json()
        assert (whole["decision"], whole["amount"]) == ("allow", pytest.approx(limit))
        assert reserve(http, "a").json()["decision"] == "wait"
        assert reserve(http, "b").json()["decision"] == "deny"


def test_a_reservation_whose_answer_came_too_late_is_settled_all_the_same(tmp_path: Path) -> None:
    async def run(url: str) -> None:
        async with Predictions(url, deadline_s=0.0005, rest_s=0.001) as hasty:
            made = [await hasty.reserve(REQUEST, client="hasty") for _ in range(30)]
            await asyncio.sleep(1.0)
            assert all(one.allowed and one.id for one in made)
            await asyncio.sleep(0.5)
            for one in made:
                await hasty.settle(one, completion_tokens=3)
        async with Predictions(url, deadline_s=0.0005, allow_unbooked=False) as strict:
            refused = await strict.reserve(REQUEST, client="strict")
            assert (refused.allowed, refused.id) == (False, None)
            assert refused.wait_s is not None

    with service("--no-log-requests") as (http, _):
        asyncio.run(run(str(http.base_url)))
        account = http.get("/v1/budgets").json().get("hasty", {"held": 0.0, "num_reserved": 0, "num_settled": 0})
        assert account["held"] == 0.0
        assert account["num_reserved"] == account["num_settled"]


def test_a_refused_key_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run(url: str) -> None:
        async with Predictions(url, api_key="wrong", deadline_s=20.0) as predictions:
            for _ in range(3):
                assert (await predictions.reserve(REQUEST)).source == "fallback:refused"

    with service("--no-log-requests", environment={"MOPE_API_KEYS": "right"}) as (http, _):
        asyncio.run(run(str(http.base_url)))
    assert [record.getMessage() for record in caplog.records if "refuses the API key" in record.getMessage()] == [
        f"{str(http.base_url).rstrip('/')}/v1/ refuses the API key: no predictions and no budgets"
    ]
