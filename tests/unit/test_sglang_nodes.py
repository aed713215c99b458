"""SGLang over several nodes, and queues that the hook does not order: what stops a start, and what is said of it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from mope.errors import ConfigError
from mope.serving_hooks import secret
from mope.serving_hooks.carried import Carried, seals
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang import commands, hooks, nodes, policy
from mope.serving_hooks.sglang.policy import ATTRIBUTE, FairScheduling
from tests.sglang_stand_ins import Req, scheduler

PLAIN = {"predictor": "none", "summary_s": 0}


def told(**options: Any) -> dict[str, str]:
    return nodes.deciding(HookOptions.model_validate({**PLAIN, **options}), None)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5},
        {"weights": {"a": 2.0}},
        {"policy": "vtc"},
        {"victims": "remaining"},
        {"predicted_admission": True},
        {"lora_patience_s": 2.0},
        {"profile": "h100/llama-3.1-70b-tp4"},
        {"client_header": "x-other"},
    ],
)
def test_options_that_decide_must_be_the_same_on_all_nodes(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"rank 1 has {next(iter(options))} .*--mope-config") as raised:
        nodes.expect_same([told(), told(**options)])
    assert "\n" not in str(raised.value)


def test_the_content_of_a_profile_counts_and_not_where_it_lies(tmp_path: Any) -> None:
    from mope.fairness.profiles import load_profile

    content = load_profile("h100/llama-3.1-70b-tp4").model_dump_json()
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    here.write_text(content, encoding="utf-8")
    there.write_text(content, encoding="utf-8")
    assert told(profile=str(here)) == told(profile=str(there)) != told()
    nodes.expect_same([told(profile=str(here)), told(profile=str(there))])


def test_what_decides_nothing_may_differ() -> None:
    other = told(metrics_port=9477, secret="env:ANOTHER", summary_s=60, api_keys="keys.json")
    assert told() == other == told(state="books.json")
    nodes.expect_same([told(), other, told(state="books.json")])


def test_a_front_end_that_one_node_alone_believes_is_a_difference() -> None:
    options = HookOptions.model_validate(PLAIN)
    with pytest.raises(ConfigError, match="front end"):
        nodes.expect_same([told(), nodes.deciding(options, "SGLang loads no plugins there")])


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_ranks_compare_at_the_start_where_there_are_several_nodes(num_nodes: int, monkeypatch, caplog) -> None:
    """No rank of two nodes starts if they differ; on one node all ranks have one environment."""
    monkeypatch.setenv("MOPE_OPTIONS", json.dumps({**PLAIN, "secret": "env:NOT_THERE"} if num_nodes > 1 else PLAIN))
    asked = []

    def gather(mine: dict[str, str], first: bool) -> list[dict[str, str]]:
        asked.append(first)
        return [mine, {**mine, "alpha": "0.1"}]

    monkeypatch.setattr(nodes, "gather", gather)
    monkeypatch.setattr(hooks, "applied", lambda: list(hooks.HOOKS))
    built = scheduler("equinox", tp_size=2, nnodes=num_nodes)
    if num_nodes == 1:
        policy.begin(None, built)
        assert getattr(built, ATTRIBUTE).guard.ok
        getattr(built, ATTRIBUTE).steward.close()
        assert not asked
    else:  # nor is a secret read, which other nodes may not have
        with pytest.raises(ConfigError, match=r"rank 1 has alpha '0\.1'"):
            policy.begin(None, built)
        assert asked == [True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"disaggregation_mode": "decode"}, "nothing is ordered or charged"),
        ({"disaggregation_mode": "prefill"}, "once the decode server has answered"),
        ({"lora_drain_wait_threshold": 2.0}, "--lora-drain-wait-threshold"),
        ({"enable_lora_overlap_loading": True}, "--enable-lora-overlap-loading"),
        ({"nnodes": 2}, "checks no seals"),
        ({}, None),
    ],
)
def test_the_log_says_where_there_is_no_order(arguments: dict[str, Any], said: str | None, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="mope")
    fair = FairScheduling(scheduler("equinox", **arguments), HookOptions.model_validate(PLAIN))
    fair.announce(14, 14)
    lines = [one.getMessage() for one in caplog.records if "is untested" not in one.getMessage()]
    lines = [line for line in lines if not line.startswith("mope: SGLang ")]
    assert len(lines) == (said is not None), lines
    assert said is None or said in lines[0]


@pytest.mark.parametrize(
    ("flag", "status", "said"),
    [
        ("--disaggregation-mode decode", "warning", "in order of arrival"),
        ("--disaggregation-mode=prefill", "warning", "once the decode server has answered"),
        ("--lora-drain-wait-threshold 2", "warning", "leave it out"),
        ("--enable-lora --max-loras-per-batch 2", "note", "lora_patience_s"),
        ("--lora-paths a=b", "note", "--max-loras-per-batch 8"),
        ("--nnodes 2", "note", "ranks compare them"),
        ("--nnodes 2", "warning", "seals are not checked"),
        ("--grammar-backend xgrammar", "note", "once its grammar is compiled"),
        ("--grammar-backend none", None, "grammar"),
        ("--nnodes 1", None, "nnodes"),
        ("--lora-drain-wait-threshold 0", None, "drain"),
    ],
)
def test_the_doctor_says_so_before(flag: str, status: str | None, said: str) -> None:
    words = f"python -m sglang.launch_server --schedule-policy equinox {flag}".split()
    found = [one for one in commands.mistakes(words, HookOptions.model_validate(PLAIN)) if said in one.text]
    assert [one.status for one in found] == ([status] if status is not None else [])


def test_the_doctor_asks_for_a_secret_on_several_nodes() -> None:
    words = ["python", "-m", "sglang.launch_server", "--schedule-policy", "equinox", "--nnodes", "2"]
    found = commands.mistakes(words, HookOptions.model_validate({**PLAIN, "secret": "env:A_SECRET"}))
    assert not [one for one in found if "not checked" in one.text]
    assert [one.status for one in found if "the same on all nodes" in one.text] == ["note"]


@pytest.mark.parametrize(
    ("theirs", "checked"),
    [("a secret of all nodes", True), ("a secret of their own", False), (None, False)],
)
def test_seals_are_checked_where_all_nodes_have_the_same_secret(
    theirs: str | None, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**PLAIN, "secret": "env:A_SECRET"}
    monkeypatch.setenv("MOPE_OPTIONS", json.dumps(options))

    def gather(mine: dict[str, str], first: bool) -> list[dict[str, str]]:
        with monkeypatch.context() as other:
            other.setenv("A_SECRET", theirs) if theirs else other.delenv("A_SECRET")
            return [mine, told(**options)]

    monkeypatch.setattr(nodes, "gather", gather)
    monkeypatch.setattr(hooks, "applied", lambda: list(hooks.HOOKS))
    monkeypatch.setenv("A_SECRET", "a secret of all nodes")
    built = scheduler("equinox", tp_size=2, nnodes=2)
    policy.begin(None, built)
    fair = getattr(built, ATTRIBUTE)
    seals.use(secret.load(fair.steward.options))  # as the front end does
    sealed = Carried("bob", 5.0).write()
    for params, believed in ((sealed, True), ({**sealed, "mope_client": "eve"}, not checked)):
        fair.arrived(Req(None, custom_params=params))
        assert (params["mope_client"] in fair.state()["tallies"]) == believed
    fair.steward.close()


def test_a_prefill_servers_requests_end_once_their_cache_was_sent() -> None:
    """SGLang notes the end outside of a step; the next step's books see it."""
    from tests.sglang_stand_ins import FINISH_LENGTH
    from tests.unit.test_sglang_policy import step

    built = scheduler("equinox", disaggregation_mode="prefill")
    fair = FairScheduling(built, HookOptions.model_validate(PLAIN))
    setattr(built, ATTRIBUTE, fair)
    one, other = Req("a"), Req("b")
    for req in (one, other):
        fair.arrived(req)
        fair.admitted(req)
    one.output_ids.append(1)
    one.finished_reason = FINISH_LENGTH()
    step(fair, other)
    assert [*fair.running.values()] == [other]
