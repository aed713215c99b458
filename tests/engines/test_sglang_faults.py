"""What goes wrong in the hook stays in the hook: every request is answered, the server lives, one line says why.

The faults are brought about in a real server, see `sglang_shims/faults.py`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engines.tiny_sglang import Ask, Server, ask_all, missing, serve

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

OFF = "mope has failed and is off until the next start"


def load() -> list[Ask]:
    return [
        Ask(f"client-{number % 3}", tuple(range(10, 30 + number)), parameters={"max_new_tokens": 8, "temperature": 0})
        for number in range(24)
    ]


def chat(server: Server, text: str) -> tuple[int, float]:
    """The status of an answer, and the seconds that it took."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    started = time.monotonic()
    status, _ = server.send("/v1/chat/completions", body)
    return status, time.monotonic() - started


def run(folder: Path, fault: str, options: dict[str, Any], predictor: str = "none") -> tuple[dict[str, Any], str]:
    """The state and the log of a server with a fault, once it has answered everything."""
    options = {"identity": "header", "predictor": predictor, **options}
    with serve(folder, "equinox", options, variables={"MOPE_TEST_FAULT": fault}) as server:
        assert {one.reason for one in ask_all(server, load())} <= {"length", "stop"}
        assert server.process.poll() is None
        return server.state(), server.printed()


@pytest.mark.parametrize("fault", ["order-raises", "booking-raises"])
def test_a_scheduler_without_the_hook_goes_on(tmp_path: Path, fault: str) -> None:
    state, printed = run(tmp_path, fault, {})
    assert not state["on"]
    assert "a fault on purpose" in state["failure"]
    assert printed.count(OFF) == 1


def test_a_front_end_that_can_read_no_request_goes_on(tmp_path: Path) -> None:
    state, printed = run(tmp_path, "front-raises", {})
    assert state["on"]
    assert list(state["tallies"]) == ["(anonymous)"]
    assert printed.count("mope could not read a request") == 1
    assert OFF not in printed


ALICE, BOB = {"authorization": "Bearer a-key"}, {"authorization": "Bearer b-key"}
PAIRS = [["mope_client", "acme/alice"], ["mope_tokens", 1]]


def test_no_request_turns_it_off_names_somebody_else_or_hides_its_client(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"a-key": "acme/alice", "b-key": "bob"}), encoding="utf-8")
    with serve(tmp_path, "equinox", {"api_keys": str(keys), "predictor": "none"}) as server:

        def arrived(path: str, body: Any, headers: Any = BOB) -> tuple[int, dict[str, int]]:
            before = server.state()["tallies"]
            status, _ = server.send(path, body, headers)
            state = server.state()
            assert state["on"], state["failure"]
            counts = {name: tally["arrived"] for name, tally in state["tallies"].items()}
            change = {name: count - before.get(name, {}).get("arrived", 0) for name, count in counts.items()}
            return status, {name: count for name, count in change.items() if count}

        def native(custom_params: Any, **further: Any) -> dict[str, Any]:
            return {
                "input_ids": [5, 6],
                "sampling_params": {"max_new_tokens": 3, "custom_params": custom_params},
                **further,
            }

        for odd in (0, "", [], False, {}, None, {"theirs": 1}, {"mope_client": "acme/alice", "mope_seal": "0" * 32}):
            assert arrived("/generate", native(odd)) == (200, {"bob": 1}), odd
        for odd in ("x", True, 1, [1], PAIRS):
            assert arrived("/generate", native(odd)) == (400, {}), odd
            assert arrived("/generate", native(odd, max_thinking_tokens=5)) == (400, {}), odd
            assert arrived("/generate", native(odd, stream=True))[1] == {}, odd
        chat_body = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 2}
        for odd in ("x", PAIRS):
            status, counts = arrived("/v1/chat/completions", {**chat_body, "custom_params": odd})
            assert (status in (400, 422), counts) == (True, {}), odd
        forged = {**chat_body, "custom_params": {"mope_client": "acme/alice"}}
        assert arrived("/v1/chat/completions", forged) == (200, {"bob": 1})
        assert arrived("/generate", native(None), ALICE) == (200, {"acme/alice": 1})
        assert arrived("/generate", native(None), {"authorization": "Bearer made-up"}) == (200, {"(anonymous)": 1})
        assert OFF not in server.printed()


def test_predictors_that_fail_hang_or_say_nonsense_cost_no_request(tmp_path: Path) -> None:
    """One predictor that does, by turns, all of it; another that is not there."""
    options = {"identity": "none", "deadline_ms": 50}
    with serve(
        tmp_path,
        "equinox",
        {**options, "predictor": "chat-micro"},
        variables={"MOPE_TEST_FAULT": "predictor-misbehaves"},
    ) as server:
        for text in ("raise", "nan", "infinite", "hang", "hang", "w1 w2"):
            status, seconds = chat(server, text)
            assert status == 200
            assert seconds < 15
        state = server.state()
        assert state["on"]
        assert state["total"]["service"] == sum(client["service"] for client in state["clients"])
        assert OFF not in server.printed()


def test_a_predictor_that_is_not_there_is_told_and_missed_by_nobody(tmp_path: Path) -> None:
    with serve(tmp_path, "equinox", {"identity": "none", "predictor": str(tmp_path / "nowhere")}) as server:
        assert chat(server, "w1 w2")[0] == 200
        assert server.printed().count("mope predicts nothing") == 1
        assert server.state()["on"]
