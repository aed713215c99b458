"""`mope serve` as a process of its own: what it answers, refuses, forgets and survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from mope import LengthPredictor

httpx = pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

START_S = 120.0  # on a machine that is busy with other tests
KEY = "sk-test-0123456789"
PROMPT = "Explain TCP slow start."
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
BODIES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": PROMPT, "target_llm": "llama-3-8b", "max_tokens": 512},
    "chat": {
        "model": "gpt-4o",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is a hash table?"}]},
            {"role": "assistant", "content": "A table of keys."},
            {"role": "user", "content": "And a trie? Use the tool."},
        ],
        "max_completion_tokens": 300,
        "tools": [TOOL],
        "temperature": 0.2,
        "stream": True,
    },
    "completions": {"model": "llama-3-8b", "prompt": "Once upon a time", "max_tokens": 64},
    "responses": {
        "model": "gpt-5",
        "instructions": "Answer in French.",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Who are you?"}]}],
        "reasoning": {"effort": "low"},
        "max_output_tokens": 900,
    },
    "responses with a text": {"model": "gpt-5", "input": "Who are you?"},
    "anthropic": {
        "model": "claude-sonnet-4-5",
        "max_tokens": 2048,
        "system": [{"type": "text", "text": "Be kind."}],
        "messages": [{"role": "user", "content": "Write a poem about the sea."}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    },
    "capped": {"prompt": "Count to a million.", "max_tokens": 3},
    "blank": {"prompt": "   "},
}


@contextmanager
def service(
    *options: str, environment: dict[str, str] | None = None, artifact: str = "chat-micro"
) -> Iterator[tuple[Any, subprocess.Popen[bytes]]]:
    """A service that is ready, as a client of it and its process."""
    port = free_port()
    command = [sys.executable, "-c", "from mope.cli import main; raise SystemExit(main())", "serve", artifact]
    process = subprocess.Popen(
        [*command, "--port", str(port), *options],
        stderr=subprocess.PIPE,
        env={**{name: value for name, value in os.environ.items() if name != "MOPE_API_KEYS"}, **(environment or {})},
    )
    limits = httpx.Limits(max_connections=500)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits, trust_env=False) as http:
            until = time.monotonic() + START_S
            while True:
                try:
                    if http.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    if process.poll() is not None or time.monotonic() > until:
                        said = process.communicate()[1] if process.poll() is not None else b"not in time"
                        raise AssertionError(said.decode()) from None
                time.sleep(0.02)
            yield http, process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def http() -> Iterator[Any]:
    with service("--no-log-requests", "--deadline-ms", "30000", "--profile", "h100/llama-3.1-8b") as (client, _):
        yield client


@pytest.fixture(scope="module")
def predictor() -> LengthPredictor:
    return LengthPredictor.from_pretrained("chat-micro")


def figures(predictor: LengthPredictor, body: dict[str, Any]) -> dict[str, Any]:
    unit = {"token_unit": "own"} if predictor.encoder.knows("counts_own") else {}
    found = predictor.predict_batch([{**body, **unit}])[0]
    levels = (0.1, 0.5, 0.9, 0.99)
    return {
        "median": round(found.median, 2),
        "mean": round(found.mean, 2),
        "quantiles": {f"{level:g}": round(found.quantile(level), 2) for level in levels},
        "expert": found.expert,
        "source": found.source,
    }


@pytest.mark.parametrize("name", BODIES)
def test_every_dialect_gives_the_prediction_that_python_gives(name: str, http: Any, predictor: LengthPredictor) -> None:
    answered = http.post("/v1/predict", json=BODIES[name]).json()
    expected = figures(predictor, BODIES[name])
    assert {key: answered[key] for key in expected} == expected
    assert answered["id"]
    assert answered["cost"]["latency_s"] >= answered["cost"]["ttft_s"] > 0


def test_a_list_is_a_batch_in_order(http: Any, predictor: LengthPredictor) -> None:
    answered = http.post("/v1/predict", json=list(BODIES.values())).json()
    assert [one["mean"] for one in answered] == [figures(predictor, body)["mean"] for body in BODIES.values()]
    assert len({one["id"] for one in answered}) == len(BODIES)


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe\x00", 400, "no JSON"),
        (b"9" * 5000, 400, "no JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"{}", 400, "prompt or messages"),
        (b"null", 400, "a request is an object"),
        (b"[]", 400, "1 to 64 requests"),
        (b'[{"prompt": "a"}, 3]', 400, "request 1 of the list"),
        (b'{"promt": "a"}', 400, "did you mean prompt"),
        (b'{"prompt": "a", "max_tokens": "many"}', 400, "whole number"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        (b'{"messages": [{"role": "user"}, 3]}', 400, "message 1"),
        (json.dumps([{"prompt": "a"}] * 65).encode(), 400, "got 65"),
        (b'{"prompt": "' + b"a" * 9_000_000 + b'"}', 413, "larger than 8,388,608 bytes"),
        (b"[" + b"0," * 300_000 + b"0]", 413, "too many parts"),
    ],
)
def test_a_wrong_body_is_told_what_was_expected(http: Any, body: bytes, status: int, expected: str) -> None:
    answered = http.post("/v1/predict", content=body)
    assert answered.status_code == status
    assert expected in answered.json()["error"]["message"]


@pytest.mark.parametrize("deadline", ["0", "-1", "soon", "nan", "1e9"])
def test_a_deadline_that_is_none_is_refused(http: Any, deadline: str) -> None:
    answered = http.post("/v1/predict", params={"deadline_ms": deadline}, json={"prompt": "a"})
    assert answered.status_code == 400
    assert answered.json()["error"]["message"].startswith("deadline_ms: got")


def test_a_deadline_that_nothing_can_meet_gives_the_fallback(http: Any) -> None:
    answered = http.post("/v1/predict", params={"deadline_ms": "0.001"}, json={"prompt": "never seen before"}).json()
    assert answered["source"] == "fallback:deadline"
    assert answered["mean"] > 0


@pytest.mark.parametrize(
    "observation",
    [
        {"completion_tokens": 700},
        {"usage": {"prompt_tokens": 9, "completion_tokens": 700, "total_tokens": 709}, "finish_reason": "stop"},
        {"usage": {"input_tokens": 9, "output_tokens": 700}, "stop_reason": "end_turn"},
        {
            "response": {
                "choices": [{"message": {"content": "a"}, "finish_reason": "stop"}],
                "usage": {"completion_tokens": 700},
            }
        },
    ],
)
@pytest.mark.parametrize("by_prediction", [False, True])
def test_an_observation_is_learned_once(http: Any, observation: dict[str, Any], by_prediction: bool) -> None:
    prediction = http.post("/v1/predict", json={"prompt": "Tell me a story.", "model": "some-llm"}).json()
    about = {"prediction": prediction} if by_prediction else {"id": prediction["id"]}
    answered = http.post("/v1/observe", json={**about, **observation})
    assert answered.json() == {"id": prediction["id"], "learned": True, "reason": ""}
    again = http.post("/v1/observe", json={**about, **observation})
    assert again.status_code == 404
    assert "no prediction waits" in again.json()["error"]["message"]


@pytest.mark.parametrize(
    ("observation", "expected"),
    [
        ({}, "completion_tokens"),
        ({"completion_tokens": -1}, "completion_tokens"),
        ({"completion_tokens": 1.5}, "completion_tokens"),
        ({"usage": {"completion_tokens": "many"}}, "many"),
        ({"response": {"choices": [{"message": {"content": "a"}}] * 2}}, "2 answers"),
    ],
)
def test_a_wrong_observation_is_told_what_was_expected_and_leaves_the_prediction(
    http: Any, observation: dict[str, Any], expected: str
) -> None:
    name = http.post("/v1/predict", json={"prompt": "a"}).json()["id"]
    answered = http.post("/v1/observe", json={"id": name, **observation})
    assert answered.status_code == 400
    assert expected in answered.json()["error"]["message"]
    assert http.post("/v1/observe", json={"id": name, "completion_tokens": 5}).json()["learned"]


def test_lengths_that_a_request_forced_teach_nothing(http: Any) -> None:
    body = {"prompt": "a", "model": "forced-llm", "min_tokens": 100}
    for tokens, learned in ((101, False), (2000, True)):
        name = http.post("/v1/predict", json=body).json()["id"]
        answered = http.post("/v1/observe", json={"id": name, "completion_tokens": tokens}).json()
        assert answered["learned"] is learned, answered


def test_observations_change_later_predictions(http: Any) -> None:
    body = {"prompt": "How do I sort a list in Python?", "model": "an-llm-of-long-answers"}
    before = http.post("/v1/predict", json=body).json()["mean"]
    for _ in range(60):
        name = http.post("/v1/predict", json=body).json()["id"]
        http.post("/v1/observe", json={"id": name, "completion_tokens": 4000, "finish_reason": "stop"})
    assert http.post("/v1/predict", json=body).json()["mean"] > 2 * before


def test_request_ids_are_kept_or_made(http: Any) -> None:
    assert http.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = http.get("/health", headers={"X-Request-Id": "a b\t{}"}).headers["x-request-id"]
    assert len(made) == 16


def test_openapi_has_examples_that_work(http: Any) -> None:
    page = http.get("/openapi.json").json()
    assert http.get("/docs").status_code == 200
    content = page["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert len(content["examples"]) >= 6
    for example in content["examples"].values():
        assert http.post("/v1/predict", json=example["value"]).status_code == 200
    assert page["paths"]["/v1/predict"]["post"]["security"]


def test_metrics_have_the_names_of_the_hooks(http: Any) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    found = {sample.name for one in text_string_to_metric_families(http.get("/metrics").text) for sample in one.samples}
    assert found >= {
        "mope_info", "mope_front_predictions_total", "mope_front_prediction_seconds_bucket", "mope_learned_total",
        "mope_not_learned_total", "mope_client_arrived_total", "mope_client_within_total",
        "mope_client_answer_ratio_bucket", "mope_front_unobserved",
    }  # fmt: skip


def test_overload_is_shed_within_the_deadline_and_counted() -> None:
    with service("--max-waiting", "8", "--no-log-requests", "--num-workers", "1") as (http, _):
        text = "A long prompt that takes a while. " * 400

        def ask(number: int) -> tuple[int, str, float]:
            started = time.monotonic()
            body = [{"prompt": f"{number} {part} {text}"} for part in range(32)]
            answered = http.post("/v1/predict", params={"deadline_ms": "2000"}, json=body)
            sources = {one["source"] for one in answered.json()} if answered.status_code == 200 else set()
            return answered.status_code, ",".join(sorted(sources)), time.monotonic() - started

        with ThreadPoolExecutor(40) as pool:
            found = list(pool.map(ask, range(80)))
        assert {status for status, _, _ in found} == {200}
        assert any("fallback:queue full" in sources for _, sources, _ in found)
        assert 'outcome="overload"' in http.get("/metrics").text
        assert (
            http.post("/v1/predict", json={"prompt": "after"}, params={"deadline_ms": "9000"}).json()["source"]
            == "model"
        )


def test_predictions_are_forgotten_by_age_and_by_number() -> None:
    with service("--remember", "3", "--remember-s", "3", "--no-log-requests") as (http, _):
        names = [http.post("/v1/predict", json={"prompt": f"{number}"}).json()["id"] for number in range(5)]
        for name, status in ((names[1], 404), (names[4], 200)):
            assert http.post("/v1/observe", json={"id": name, "completion_tokens": 5}).status_code == status
        name = http.post("/v1/predict", json={"prompt": "old"}).json()["id"]
        time.sleep(3.2)
        assert http.post("/v1/observe", json={"id": name, "completion_tokens": 5}).status_code == 404
        text = http.get("/metrics").text
        assert 'mope_front_forgotten_total{reason="room"} 2.0' in text
        assert "mope_front_unobserved 0.0" in text


def test_keys_are_needed_before_anything_else_and_separate_clients(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"sk-alice": "acme/alice", "sk-bob": "acme/bob"}), encoding="utf-8")
    with service("--api-keys", str(file), environment={"MOPE_API_KEYS": KEY}) as (http, process):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"x-api-key": ""}):
            for path in ("/v1/predict", "/v1/observe"):
                refused = http.post(path, content=b"not even JSON", headers=headers)
                assert refused.status_code == 401
                assert "Authorization: Bearer KEY" in refused.json()["error"]["message"]
        assert http.get("/metrics").status_code == 401
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        by = {name: {"Authorization": f"Bearer sk-{name}"} for name in ("alice", "bob")}
        assert http.post("/v1/predict", json={"prompt": "a"}, headers={"x-api-key": KEY}).status_code == 200
        name = http.post("/v1/predict", json={"prompt": "a"}, headers=by["alice"]).json()["id"]
        said = {"id": name, "completion_tokens": 9}
        assert http.post("/v1/observe", json=said, headers=by["bob"]).status_code == 404
        assert http.post("/v1/observe", json=said, headers=by["alice"]).status_code == 200
        assert 'mope_client_finished_total{client="acme/alice"} 1.0' in http.get("/metrics", headers=by["bob"]).text
        file.write_text(json.dumps({"sk-carol": "acme/carol"}), encoding="utf-8")
        until = time.monotonic() + 20
        while http.post("/v1/predict", json={"prompt": "a"}, headers={"x-api-key": "sk-carol"}).status_code == 401:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert http.post("/v1/predict", json={"prompt": "a"}, headers=by["alice"]).status_code == 401
        process.terminate()
        log = process.communicate(timeout=30)[1].decode()
    for line in log.splitlines():
        json.loads(line)
    assert '"client": "acme/alice"' in log
    for secret in (KEY, "sk-alice", "sk-carol"):
        assert secret not in log


def test_sigterm_answers_what_is_under_way_and_keeps_what_was_learned(tmp_path: Path) -> None:
    learned = tmp_path / "learned.json"
    body = {"prompt": "How are you?", "model": "kept-llm"}
    with service("--learned", str(learned), "--log-format", "text") as (http, process):
        before = http.post("/v1/predict", json=body).json()["mean"]
        for _ in range(60):
            name = http.post("/v1/predict", json=body).json()["id"]
            http.post("/v1/observe", json={"id": name, "completion_tokens": 5000, "finish_reason": "stop"})
        with ThreadPoolExecutor(1) as pool:
            batch = [{"prompt": f"{number} " + "words and more words " * 500} for number in range(64)]
            waiting = pool.submit(http.post, "/v1/predict", params={"deadline_ms": "20000"}, json=batch)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert len(waiting.result().json()) == 64
        assert process.wait(30) == 0
        log = process.communicate()[1].decode()
        assert "Traceback" not in log
    assert learned.stat().st_size > 100
    with service("--learned", str(learned)) as (http, _):
        assert http.post("/v1/predict", json=body).json()["mean"] > 2 * before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["chat-micro", "--levels", "0.5,2"], "--levels"),
        (["chat-micro", "--deadline-ms", "0"], "--deadline-ms: got '0'"),
        (["chat-micro", "--profile", "no-such"], "no-such"),
        (["chat-micro", "--api-keys", "no-such.json"], "no-such.json"),
        (["chat-micro", "--host", "no such host"], "--host no such host"),
        (["chat-mikro"], "did you mean chat-micro"),
        ([], "ARTIFACT"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(options: list[str], expected: str) -> None:
    command = [sys.executable, "-c", "from mope.cli import main; raise SystemExit(main())", "serve", "--port", "0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_schemathesis_finds_no_fault(http: Any) -> None:
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(http.base_url.join("/openapi.json"))]
    done = subprocess.run(
        [*command, "--checks", checks, "--max-examples", "30", "--seed", "7", "--no-color"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
