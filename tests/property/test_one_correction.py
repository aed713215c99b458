"""The same observations give the same predictions in Python, in vLLM's scheduler and in SGLang's front end.

And what is expected converges to what is observed, for known and unknown LLMs.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_predictions import KNOWN, UNKNOWN, corrector, lognormal

from mope import LengthPrediction, LengthPredictor
from mope.corrector import Answering, Corrector
from mope.serving_hooks.carried import Carried, pack
from mope.serving_hooks.front import Front
from mope.serving_hooks.identity import Identity
from mope.serving_hooks.lengths import Lengths
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang.front import FrontEnd
from mope.serving_hooks.steward import Steward

PROMPTS = ("yes or no?", "list forty long stories about every king", "hello there", "continue")
LLMS = ("Llama-3.1-8B", "Qwen3-8B", "acme/own-tune-7b", None)
FLAGS: tuple[dict[str, Any], ...] = (
    {},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 300},
    {"tools": [{"type": "function"}]},
    {"response_format": {"type": "json_object"}, "max_tokens": 500},
)
requests = st.tuples(st.sampled_from(PROMPTS), st.sampled_from(FLAGS))
observations = st.lists(st.tuples(requests, st.integers(1, 200_000), st.booleans()), max_size=40)


class Server:
    """One LLM behind the three: what each predicts, and the same lessons for all."""

    def __init__(self, tiny: Path, llm: str | None) -> None:
        options = HookOptions(predictor=str(tiny), identity="none", deadline_ms=60_000, target_llm=llm)
        self.llm = llm
        self.python = LengthPredictor.from_pretrained(tiny, backend="torch")
        identity = Identity(options, secret=b"", logger=logging.getLogger("mope.tests"))
        self.front = Front(options, identity, LengthPredictor.from_pretrained(tiny, backend="torch"))
        self.steward = Steward(options)
        arguments = SimpleNamespace(api_key=None, served_model_name=llm, model_path=llm, enable_metrics=False)
        self.sglang = FrontEnd(arguments, options)

    def predict(self, prompt: str, flags: dict[str, Any]) -> tuple[LengthPrediction, Carried, list[Carried]]:
        body = {"messages": [{"role": "user", "content": prompt}], **flags}

        async def ask() -> tuple[Carried, list[Carried]]:
            carried = await self.front.carried("chat", [], body, self.sglang.guard)
            asked = SimpleNamespace(text="as the template has it", sampling_params={}, stream=False)
            return carried, await self.sglang.prepare(asked, _http(body))

        carried, in_sglang = asyncio.run(ask())
        return self.python.predict({**body, "target_llm": self.llm}), Carried.read(carried.write()), in_sglang

    def observe(self, said: tuple[LengthPrediction, Carried, list[Carried]], tokens: int, censored: bool) -> None:
        prediction, carried, in_sglang = said
        self.python.observe(prediction, tokens, censored=censored)
        self.steward.lengths.observe(carried, "a", tokens, censored=censored)
        reason = {"type": "length" if censored else "stop"}
        self.sglang.saw(in_sglang, {"meta_info": {"finish_reason": reason, "completion_tokens": tokens}})

    def close(self) -> None:
        """All lessons are learned, and every correction is worked out anew."""
        self.steward.lengths.close(60)
        self.sglang.lengths.close(60)
        for one in (self.python.corrector, self.steward.lengths.corrector, self.sglang.lengths.corrector):
            assert one is not None
            one.recalibrator.to_json()


def _http(body: dict[str, Any]) -> Any:
    async def read() -> dict[str, Any]:
        return body

    return SimpleNamespace(scope={"type": "http", "path": "/v1/chat/completions", "headers": []}, _json=body, json=read)


@pytest.fixture(autouse=True)
def at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lessons of the three fall into one epoch."""
    monkeypatch.setattr("mope.recalibration.time.time", lambda: 1.8e9)
    monkeypatch.setattr("mope.serving_hooks.lengths._LOOK_EVERY_S", 0.001)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(LLMS), observations, requests)
def test_python_vllm_and_sglang_say_the_same(tiny: Path, llm: str | None, lessons: Any, last: Any) -> None:
    server = Server(tiny, llm)
    for request, tokens, censored in lessons:
        server.observe(server.predict(*request), tokens, censored)
    server.close()
    prediction, carried, in_sglang = server.predict(*last)
    in_vllm = server.steward.lengths.expected(carried, "a", prediction.max_tokens)
    assert in_vllm.tokens == pytest.approx(prediction.mean, rel=1e-6)
    assert in_vllm.nine_tenths == pytest.approx(prediction.quantile(0.9), rel=1e-6)
    assert in_sglang[0].tokens == pytest.approx(prediction.mean, rel=1e-6)
    assert in_sglang[0].high == pytest.approx(prediction.quantile(0.9), rel=1e-6)
    server.front.close()
    server.sglang.front.close()


@settings(max_examples=150, deadline=None)
@given(
    st.floats(2, 20_000),
    st.floats(0.05, 1.5),
    st.sampled_from([KNOWN, UNKNOWN, UNKNOWN._replace(mode="thinking", thinking_budget=500)]),
    st.one_of(st.none(), st.integers(1, 200_000)),
    st.lists(st.integers(1, 100_000), max_size=5),
)
def test_the_quick_figures_are_those_of_a_prediction(
    median: float, deviation: float, answering: Answering, cap: int | None, seen: list[int]
) -> None:
    raw, correct = lognormal(median, deviation), corrector()
    for tokens in seen:
        correct.observe(raw, answering, tokens, censored=False, time_s=1e9)
    edges, cumulative = correct.correct(raw, answering)
    slow = LengthPrediction(edges, cumulative, max_tokens=cap, tail_index=correct.tail_index)
    quick = correct.expected(raw, answering, cap)
    assert quick.mean == pytest.approx(slow.mean, rel=1e-9)
    assert quick.high == pytest.approx(slow.quantile(0.9), rel=1e-9)


def hook_after(num_answers: int, answering: Answering, factor: float, seed: int, deviation: float = 0.75) -> float:
    """What the hook expects of an answer after some others, over what is true on average."""
    rng = np.random.default_rng(seed)
    lengths = Lengths(corrector())
    assert isinstance(lengths.corrector, Corrector)
    for median in np.exp(rng.uniform(np.log(60), np.log(800), num_answers)):
        tokens = max(1, round(median * factor * np.exp(rng.normal(0, deviation))))
        said = Carried("a", median, 3 * median, pack(lognormal(median, deviation)), answering.write())
        lengths.observe(said, "a", tokens, censored=False)
    lengths.close(timeout_s=60)
    lengths.corrector.recalibrator.to_json()
    said = Carried("a", 200.0, 600.0, pack(lognormal(200, deviation)), answering.write())
    expected = lengths.expected(said, "a").tokens
    assert expected is not None
    return expected / (factor * 200 * float(np.exp(deviation**2 / 2)))


@pytest.mark.parametrize("answering", [KNOWN, UNKNOWN, UNKNOWN._replace(mode="thinking")])
@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5, 20.0])
@pytest.mark.parametrize(("num_answers", "within"), [(50, 0.25), (200, 0.10)])
def test_the_mean_converges_to_the_truth(answering: Answering, factor: float, num_answers: int, within: float) -> None:
    found = [hook_after(num_answers, answering, factor, seed) for seed in range(7)]
    assert np.median(found) == pytest.approx(1.0, abs=within)
    assert max(abs(ratio - 1) for ratio in found) < 2.5 * within  # the answers themselves scatter by 6 % at 200
