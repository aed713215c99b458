"""Callers of a real SGLang server write what only the front end may say, in many forms.

The server has a secret from the environment and `api_keys`, and one replica or two: nobody speaks for another client,
and nothing that a request holds turns the hook off on any replica.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engines.tiny_sglang import ROOT, Server, environment, missing, serve

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

FORGED = {"mope_client": "acme/alice", "mope_tokens": 1.0, "mope_high": 2.0, "mope_seal": "0" * 32, "theirs": 7}
PAIRS = [["mope_client", "acme/alice"], ["mope_tokens", 1]]
NOTHING = (0, "", [], False, {}, None)  # SGLang takes these for no custom_params
NO_OBJECT = ("x", True, 7, 1.5, ["mope_client"], PAIRS)
DEEP = 400  # levels of nesting


def states(server: Server) -> list[dict[str, Any]]:
    """What each replica says of mope, once nobody waits or runs any more."""
    for _ in range(100):
        found = [state.get("mope", {}) for state in server.send("/server_info")[1]["internal_states"]]
        if not any(state["waiting"] or state["running"] for state in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"requests are still there: {found}")


def tallied(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Arrivals, predictions and response tokens of each client, of all replicas together."""
    total: dict[str, dict[str, float]] = {}
    for state in found:
        for client, tally in state["tallies"].items():
            into = total.setdefault(client, {"arrived": 0, "predicted": 0, "response_tokens": 0})
            for name in into:
                into[name] += tally[name]
    return total


def nested(levels: int) -> Any:
    value: Any = "mope_client"
    for level in range(levels):
        value = {"mope_client": value} if level % 2 else [value]
    return value


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_nothing_in_custom_params_names_a_client_or_turns_the_hook_off(tmp_path: Path, num_replicas: int) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"a-key": "acme/alice", "b-key": "acme/bob"}), encoding="utf-8")
    options = {"api_keys": str(keys), "predictor": "none", "secret": "env:A_SECRET"}
    variables = {"A_SECRET": "a secret of the operator's"}
    arguments: tuple[str, ...] = ()
    if num_replicas > 1:
        arguments = ("--dp-size", str(num_replicas), "--max-total-tokens", "4096")
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    with serve(tmp_path, "vtc", options, arguments, variables) as server:
        alice, bob = {"authorization": "Bearer a-key"}, {"authorization": "Bearer b-key"}
        num_bobs = 0

        def generate(custom: Any, **more: Any) -> int:
            parameters = {"max_new_tokens": 2, "ignore_eos": True, "custom_params": custom}
            return server.send("/generate", {"input_ids": [5, 6], "sampling_params": parameters, **more}, bob)[0]

        def chat(custom: Any, **more: Any) -> int:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 2}
            body |= {"ignore_eos": True, "custom_params": custom}
            return server.send("/v1/chat/completions", {**body, **more}, bob)[0]

        for custom in (FORGED, nested(2) | FORGED, {"theirs": nested(DEEP)}, *NOTHING):
            assert generate(custom) == 200, custom
            status, is_object = chat(custom), custom is None or isinstance(custom, dict)
            assert status == (200 if is_object else 400), custom  # here SGLang looks for an object
            num_bobs += 1 + (status == 200)
        for custom in NO_OBJECT:
            assert generate(custom) == 400, custom
            assert chat(custom) in (400, 422), custom
        parameters = [{"max_new_tokens": 2, "ignore_eos": True, "custom_params": one} for one in (FORGED, 0, {})]
        batch = {"input_ids": [[5, 6], [7], [8, 9]], "sampling_params": parameters}
        assert server.send("/generate", batch, bob)[0] == 200
        num_bobs += 3
        parameters[1]["custom_params"] = PAIRS
        assert server.send("/generate", batch, bob)[0] == 400
        assert server.send("/generate", {"text": "w5", "sampling_params": {"max_new_tokens": 2}}, alice)[0] == 200
        found, printed = states(server), server.printed()

    assert len(found) == num_replicas
    for state in found:
        assert state["on"], state["failure"]
        assert state["front_end"] == "hooked"
        assert (state["predictor"], state["predicts"], state["predictions"]["made"]) == ("none", False, 0)
        assert state["unsealed"] == 0  # the front end removed all of it, and sealed what it wrote
        assert sum(tally["arrived"] for tally in state["tallies"].values()) > 0  # both replicas were asked
    clients = tallied(found)
    assert clients["acme/alice"]["arrived"] == 1
    assert clients["acme/bob"] == {"arrived": num_bobs, "predicted": 0, "response_tokens": 2 * num_bobs}
    assert set(clients) <= {"acme/alice", "acme/bob", "(server)"}
    assert printed.count("mope is on: policy vtc") == num_replicas  # once for each
    assert "mope has failed" not in printed
    assert "mope could not read" not in printed


def test_an_engine_without_a_server_believes_no_custom_params_either(tmp_path: Path) -> None:
    """Requests of `sgl.Engine` have no headers: all are one client's, whatever they say."""
    variables = environment({"MOPE_OPTIONS": json.dumps({"predictor": "none", "summary_s": 0})})
    for module in ("tiny_sglang", "sglang_in_process"):
        command = [sys.executable, "-m", f"tests.engines.{module}", str(tmp_path / "model")]
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"states"')))
    (state,) = found["states"]
    assert state["on"], state["failure"]
    assert state["unsealed"] == 0
    assert set(state["tallies"]) == {"(anonymous)"}
    assert state["tallies"]["(anonymous)"]["arrived"] == 6 + 2
    assert state["tallies"]["(anonymous)"]["predicted"] == 0
    assert len(found["errors"]) == 3
    assert all("custom_params: expected an object" in error for error in found["errors"])
