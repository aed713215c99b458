"""The front-end half of the SGLang hook: what it takes away from requests, puts into them, and learns from answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_predictions import carried

from mope.serving_hooks.carried import Carried
from mope.serving_hooks.front import FrontPrediction
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang import front
from mope.serving_hooks.sglang.policy import ATTRIBUTE


def server_args(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "schedule_policy": "equinox",
            "api_key": None,
            "served_model_name": "tiny",
            "model_path": "models/tiny",
            "enable_metrics": False,
            "tokenizer_worker_num": 1,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("loaded", "served", "taken"),
    [
        ("Qwen/Qwen3-8B", "gpt-4", "Qwen/Qwen3-8B"),  # an alias does not hide what was loaded
        ("/models/snapshot", "qwen3-8b", "qwen3-8b"),
        ("/models/tiny", "tiny", "tiny"),
        ("Qwen/Qwen3-8B", None, "Qwen/Qwen3-8B"),
    ],
)
def test_the_llm_is_what_was_loaded(loaded: str, served: str | None, taken: str) -> None:
    arguments = server_args(model_path=loaded, served_model_name=served)
    found = front.FrontEnd(arguments, HookOptions(predictor="chat-micro"))
    assert found.front.target_llm == taken


def http(path: str, body: Mapping[str, Any], **headers: str) -> Any:
    async def read() -> Mapping[str, Any]:
        return body

    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return SimpleNamespace(scope={"type": "http", "path": path, "headers": lines}, _json=body, json=read)


def obj(**changes: Any) -> Any:
    """As SGLang's `GenerateReqInput`."""
    return SimpleNamespace(**{"text": None, "input_ids": None, "sampling_params": None, "stream": False, **changes})


class Manager:
    """As SGLang's `TokenizerManager`: remembers what reached it, answers what it is told to."""

    def __init__(self, *answers: Any, options: Mapping[str, Any] | None = None, predicts: bool = True) -> None:
        self.answers = answers
        self.reached: list[Any] = []
        self.closed = False
        end = front.FrontEnd(server_args(), HookOptions.model_validate({"predictor": "none", **(options or {})}))
        if predicts:
            end.front.predict = self.predict  # type: ignore[method-assign]
        self.asked: list[Any] = []
        setattr(self, ATTRIBUTE, end)
        self.end = end

    async def predict(self, asked: Any, client: str | None = None) -> FrontPrediction | None:
        self.asked.extend(asked.requests)
        length = len(asked.requests[0].prompt) if asked.requests else 0
        said = carried(None, float(length))
        return FrontPrediction(float(length), 2.0 * length, said.raw or "", said.answering or "") if length else None

    async def generate_request(self, obj: Any, request: Any = None) -> Any:
        self.reached.append(obj)
        try:
            for answer in self.answers:
                yield answer
        finally:
            self.closed = True

    def ask(self, obj: Any, request: Any = None) -> list[Any]:
        async def run() -> list[Any]:
            hooked = front.generate_request(Manager.generate_request, self, obj, request)
            return [answer async for answer in hooked]

        return asyncio.run(run())


def told(obj: Any, place: int | None = None) -> dict[str, Any]:
    parameters = obj.sampling_params if place is None else obj.sampling_params[place]
    found: dict[str, Any] = parameters["custom_params"]
    return found


def test_callers_cannot_say_what_only_we_may() -> None:
    manager = Manager("answer", options={"identity": "none"}, predicts=False)
    forged = obj(text="hi", sampling_params={"custom_params": {"mope_client": "acme", "mope_tokens": 1, "theirs": 2}})
    assert manager.ask(forged) == ["answer"]
    assert told(forged) == {"theirs": 2}
    batch = obj(text=["a", "b"], sampling_params=[{"custom_params": {"mope_client": "acme"}}, {}])
    manager.ask(batch)
    assert batch.sampling_params == [{"custom_params": None}, {}]
    assert manager.end.num_stripped == 2


def test_chat_is_predicted_from_its_messages_and_not_from_the_template() -> None:
    manager = Manager(options={"identity": "header"})
    asked = obj(text="<|user|>w1<|assistant|>", sampling_params={"max_new_tokens": 9})
    messages = [{"role": "user", "content": "five"}]
    manager.ask(asked, http("/v1/chat/completions", {"messages": messages}, x_client_id="acme/alice"))
    assert [request.prompt for request in manager.asked] == ["five"]
    assert Carried.read(told(asked)) == Carried(
        "acme/alice", 4.0, 8.0
    )  # the scheduler corrects nothing, so it is not told of what
    assert asked.sampling_params["max_new_tokens"] == 9


def test_each_prompt_of_a_batch_has_its_own_prediction() -> None:
    manager = Manager(options={"identity": "none", "recalibrate": False})
    batch = obj(text=["a", "bbb"], sampling_params={"temperature": 0.5, "max_new_tokens": 7})
    manager.ask(batch)
    assert [told(batch, place)["mope_tokens"] for place in (0, 1)] == [1.0, 3.0]
    assert [one["max_new_tokens"] for one in batch.sampling_params] == [7, 7]
    assert [request.max_tokens for request in manager.asked] == [7, 7]


def test_token_ids_have_a_client_and_no_prediction() -> None:
    manager = Manager(options={"identity": "header"})
    asked = obj(input_ids=[[1], [2]])
    manager.ask(asked, http("/generate", {}, x_client_id="acme"))
    assert told(asked) == Carried("acme").write()


def test_the_servers_own_requests_are_the_servers() -> None:
    manager = Manager(options={"identity": "header"})
    asked = obj(input_ids=[0], sampling_params={"max_new_tokens": 1})
    manager.ask(asked, http("/health_generate", {}, x_client_id="somebody"))
    assert told(asked) == Carried(front.SERVER).write()


def test_finished_answers_teach_and_correct_later_predictions(tiny: Path) -> None:
    meta = {"finish_reason": {"type": "stop"}, "completion_tokens": 4000}
    options = {"identity": "none", "predictor": str(tiny), "deadline_ms": 60_000}
    manager = Manager({"meta_info": {"finish_reason": None}}, {"meta_info": meta}, options=options, predicts=False)
    free = {"max_new_tokens": 100_000}
    before = obj(text="x" * 50, sampling_params=free)
    manager.ask(before)
    for _ in range(60):
        manager.ask(obj(text="x" * 50, sampling_params=free))
    manager.end.lengths.close(60)
    after = obj(text="x" * 50, sampling_params=free)
    manager.ask(after)
    assert manager.end.lengths.num_observed == 61
    assert told(after)["mope_tokens"] > 2 * told(before)["mope_tokens"]


@pytest.mark.parametrize(
    ("parameters", "is_forced"),
    [({"ignore_eos": True}, True), ({"min_new_tokens": 4000}, True), ({"min_new_tokens": 10}, False), ({}, False)],
)
def test_a_length_that_the_caller_forced_teaches_nothing(
    tiny: Path, parameters: dict[str, Any], is_forced: bool
) -> None:
    meta = {"finish_reason": {"type": "length"}, "completion_tokens": 4000}
    options = {"identity": "none", "predictor": str(tiny), "deadline_ms": 60_000}
    manager = Manager({"meta_info": meta}, options=options, predicts=False)
    for _ in range(5):
        manager.ask(obj(text="x" * 50, sampling_params={"max_new_tokens": 4000, **parameters}))
    manager.end.lengths.close(60)
    assert (manager.end.lengths.num_forced, manager.end.lengths.num_observed) == ((5, 0) if is_forced else (0, 5))


def test_a_request_that_is_given_up_closes_what_is_behind_it() -> None:
    manager = Manager("first", "second", options={"identity": "none"})

    async def run() -> None:
        hooked = front.generate_request(Manager.generate_request, manager, obj(text="x"))
        assert await hooked.__anext__() == "first"
        await hooked.aclose()

    asyncio.run(run())
    assert manager.closed


def test_a_fault_costs_one_request_its_prediction_and_not_its_client(caplog: pytest.LogCaptureFixture) -> None:
    manager = Manager("answer", options={"identity": "header"})
    predict = manager.predict

    async def failing(asked: Any, client: str | None = None) -> FrontPrediction | None:
        if asked.requests[0].prompt == "bad":
            raise RuntimeError("a fault on purpose")
        return await predict(asked, client)

    manager.end.front.predict = failing  # type: ignore[method-assign]
    for text, tokens in (("bad", None), ("good", 4.0)) * 20:
        forged = obj(text=text, sampling_params={"custom_params": {"mope_client": "eve"}})
        assert manager.ask(forged, http("/generate", {}, x_client_id="acme")) == ["answer"]
        said = Carried.read(told(forged))
        assert (said.client, said.tokens) == ("acme", tokens)
    assert manager.end.guard.ok
    assert caplog.text.count("could not read a request") == 1


@pytest.mark.parametrize("odd", [0, "", [], False, {}])
def test_empty_custom_params_are_none(odd: Any) -> None:
    manager = Manager("answer", options={"identity": "header"})
    asked = obj(input_ids=[1], sampling_params={"custom_params": odd})
    assert manager.ask(asked, http("/generate", {}, x_client_id="acme")) == ["answer"]
    assert told(asked) == Carried("acme").write()


@pytest.mark.parametrize("odd", ["x", True, 1, [["mope_client", "eve"], ["mope_tokens", 1]], ["x"], 0.5])
def test_custom_params_that_are_no_object_are_refused(odd: Any) -> None:
    manager = Manager("answer", options={"identity": "header"})
    for parameters in ({"custom_params": odd}, [{}, {"custom_params": odd}]):
        with pytest.raises(ValueError, match="custom_params: expected an object"):
            manager.ask(obj(input_ids=[1], sampling_params=parameters))
    assert manager.reached == []
    assert manager.end.guard.ok


@given(
    parameters=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["custom_params", "mope_client", "mope_seal", "max_new_tokens", "n"]), inner, max_size=4
            )
        ),
        max_leaves=10,
    ),
    text=st.none() | st.text() | st.lists(st.text(), max_size=3),
)
def test_whatever_a_caller_sends_nobody_else_is_named_and_it_stays_on(parameters: Any, text: Any) -> None:
    manager = Manager("answer", options={"identity": "header"})
    asked = obj(text=text, input_ids=None if text is not None else [1], sampling_params=parameters)
    try:
        manager.ask(asked, http("/generate", {}, x_client_id="acme"))
    except ValueError:  # it is refused, and reaches nobody
        assert manager.reached == []
        return
    given_ = asked.sampling_params
    for one in given_ if isinstance(given_, list) else [given_]:
        if isinstance(one, dict):
            assert Carried.read(one.get("custom_params")).client == "acme"
    assert manager.end.guard.ok


def test_predictions_that_are_no_numbers_are_none() -> None:
    manager = Manager(options={"identity": "none"})

    async def nonsense(asked: Any, client: str | None = None) -> FrontPrediction:
        return FrontPrediction(float("nan"), float("nan"), "x", "x|y")

    manager.end.front.predict = nonsense  # type: ignore[method-assign]
    asked = obj(text="x", sampling_params={})
    manager.ask(asked)
    assert asked.sampling_params == {}
    assert manager.end.guard.ok


def test_a_predictor_that_is_not_there_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    options = HookOptions(predictor=str(tmp_path / "nowhere"))
    assert str(front.FrontEnd(server_args(), options).front).endswith("no predictions")
    assert "mope predicts nothing" in caplog.text


def test_lessons_are_kept_beside_the_state(tmp_path: Path) -> None:
    options = {"identity": "none", "state": tmp_path / "state.json"}
    manager = Manager(options=options)
    manager.answers = ({"meta_info": {"finish_reason": {"type": "stop"}, "completion_tokens": 5}},)
    manager.ask(obj(text="x"))
    manager.end._close()
    kept = json.loads((tmp_path / "state-lengths.json").read_text(encoding="utf-8"))
    assert kept["lengths"]["means"]
    assert Manager(options=options).end.lengths.to_json()["means"] == kept["lengths"]["means"]


@pytest.mark.parametrize(("policy", "workers", "on"), [("equinox", 1, True), ("fcfs", 1, False), ("equinox", 2, False)])
def test_it_begins_where_a_policy_of_ours_is_chosen(
    monkeypatch: pytest.MonkeyPatch, policy: str, workers: int, on: bool
) -> None:
    monkeypatch.setenv("MOPE_OPTIONS", '{"predictor": "none"}')
    manager = SimpleNamespace()
    front.begin(None, manager, server_args(schedule_policy=policy, tokenizer_worker_num=workers))
    assert hasattr(manager, ATTRIBUTE) == on


def test_keys_of_the_server_name_clients() -> None:
    end = front.FrontEnd(server_args(api_key="sk-1", admin_api_key="sk-2"), HookOptions(predictor="none"))
    names = [end.front.client([(b"authorization", f"Bearer {key}".encode())], {}) for key in ("sk-1", "sk-2", "sk-3")]
    assert names[2] is None
    assert len({*names}) == 3


def test_server_info_says_what_became_of_predictions(tmp_path: Path) -> None:
    async def state(manager: Any) -> list[Any]:
        return [{"mope": {"on": True}}, {"mope": "off"}, {}]

    for folder, predicts in (("chat-micro", True), (str(tmp_path), False)):  # nothing is saved in the second
        manager = SimpleNamespace(**{ATTRIBUTE: front.FrontEnd(server_args(), HookOptions(predictor=folder))})
        first, *others = asyncio.run(front.internal_states(state, manager))
        ours = first["mope"]
        assert (ours["on"], ours["predictor"], ours["predicts"]) == (True, folder, predicts)
        assert ours["predictions"]["made"] == 0
        assert json.loads(json.dumps(first)) == first
        assert others == [{"mope": "off"}, {}]
        getattr(manager, ATTRIBUTE).front.close()
    assert asyncio.run(front.internal_states(state, SimpleNamespace()))[0] == {"mope": {"on": True}}
