"""What a Python caller types, and what comes back: keywords, whole requests, readings of names, JSON, pickles."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mope
from mope import LengthPredictor, Request
from mope.errors import DataError
from mope.inputs import RequestFlags

BODY = {
    "model": "Llama-3.1-8B",
    "messages": [{"role": "user", "content": "hello there"}],
    "max_completion_tokens": 700,
    "stream": True,
    "top_p": 0.9,
}


def test_a_whole_request_is_read_everywhere_the_same(predictor: LengthPredictor) -> None:
    expected = predictor.predict("hello there", target_llm="Llama-3.1-8B", max_tokens=700)
    request = Request(prompt="hello there", target_llm="Llama-3.1-8B", max_tokens=700)
    for found in (predictor.predict(BODY), predictor.predict(request), *predictor.predict_batch([BODY, request])):
        assert np.array_equal(found.cumulative, expected.cumulative)
        assert (found.max_tokens, found.target_llm) == (700, "Llama-3.1-8B")


@pytest.mark.parametrize("extra", [{"max_tokens": 5}, {"messages": BODY["messages"]}, {"history": BODY["messages"]}])
def test_a_whole_request_stands_alone(predictor: LengthPredictor, extra: dict[str, object]) -> None:
    with pytest.raises(DataError, match=f"a whole request was given, and {next(iter(extra))} as well"):
        predictor.predict(BODY, **extra)  # type: ignore[arg-type]


def test_a_name_of_a_server_is_translated(predictor: LengthPredictor) -> None:
    with pytest.raises(DataError, match=r"'max_output_tokens' \(did you mean max_tokens\?\)"):
        predictor.predict("hello", max_output_tokens=5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hi", "keep_alive": "5m", "raw": True, "options": {"num_predict": -1, "num_ctx": 4096}},
        {"messages": BODY["messages"], "max_tokens": -1, "provider": {"order": ["x"]}, "foo_bar": 1},
        {"text": "hi", "sampling_params": {"max_new_tokens": 9, "ignore_eos": True}, "rid": "7"},
        {"inputs": "hi", "parameters": {"max_new_tokens": 9}},
        {"messages": BODY["messages"], "thinking_budget": 0},
    ],
)
def test_bodies_of_many_servers_are_read(predictor: LengthPredictor, body: dict[str, object]) -> None:
    assert predictor.predict(body).source == "model"


def test_a_field_of_a_server_is_no_keyword(predictor: LengthPredictor) -> None:
    with pytest.raises(DataError, match=r"'top_p'; known are prompt, .*; other fields of a server's request go into"):
        predictor.predict("hello", top_p=0.9)  # type: ignore[call-arg]


def test_only_what_this_predictor_predicted_teaches_it(predictor: LengthPredictor) -> None:
    other = LengthPredictor.from_pretrained("chat-micro").predict("hello")
    with pytest.raises(DataError, match="got one of another"):
        predictor.observe(other, 50)
    with pytest.raises(DataError, match="censored is true, false or None; got 'yes'"):
        predictor.observe(predictor.predict("hello"), 50, censored="yes")  # type: ignore[arg-type]


def test_mypy_knows_the_keywords(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    head = 'from mope import LengthPredictor\np = LengthPredictor.from_pretrained("chat-small")\n'
    good.write_text(head + 'p.predict("a", max_tokens=5, tools=[{}], system=None).median\np.predict({"prompt": "a"})\n')
    bad.write_text(head + 'p.predict("a", max_token=5)\np.predict("a", max_tokens="5")\n')
    environment = {**os.environ, "MYPYPATH": str(Path(mope.__file__).parents[1])}
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    assert subprocess.run([*command, str(good)], env=environment, capture_output=True, text=True).returncode == 0
    found = subprocess.run([*command, str(bad)], env=environment, capture_output=True, text=True)
    assert 'Unexpected keyword argument "max_token" for "predict" of "LengthPredictor"; did you mean' in found.stdout
    assert 'Argument "max_tokens" to "predict" of "LengthPredictor" has incompatible type' in found.stdout


def test_every_keyword_is_documented_and_has_a_place_in_a_request() -> None:
    names = set(RequestFlags.__annotations__)
    assert names - {"system"} <= set(Request.__dataclass_fields__)
    assert all(f"{name}: " in (RequestFlags.__doc__ or "") for name in names)
    assert all(f"`{name}`" in (LengthPredictor.predict.__doc__ or "") for name in names)


def test_a_prediction_says_how_the_name_was_read(predictor: LengthPredictor) -> None:
    exact = predictor.predict("hello", target_llm="meta-llama/Meta-Llama-3-8B-AWQ")
    assert (exact.llm, exact.llm_known, exact.predicted_like) == ("llama-3-8b", True, "llama-3-8b")
    relative = predictor.predict("hello", target_llm="Llama-3.3-70B-Instruct")
    assert (relative.llm, relative.llm_known) == ("llama-3.3-70b-instruct", False)
    assert relative.predicted_like is not None
    assert relative.predicted_like.startswith("llama")
    unknown = predictor.predict("hello", target_llm="acme/own-7b")
    assert (unknown.llm, unknown.llm_known, unknown.predicted_like) == ("own-7b", False, None)
    unnamed = predictor.predict("hello")
    assert (unnamed.llm, unnamed.llm_known, unnamed.predicted_like) == ("", predictor.config.unnamed_llm, None)


def test_known_llms_are_listed(predictor: LengthPredictor) -> None:
    known = predictor.known_llms()
    assert len(known) == len(predictor.config.target_llms)
    assert all(predictor.predict("hello", target_llm=name).llm_known for name in known)


def test_to_dict_is_json(predictor: LengthPredictor) -> None:
    prediction = predictor.predict("hello there", target_llm="Llama-3-8B", max_tokens=700)
    found = json.loads(json.dumps(prediction.to_dict()))
    assert found["median"] == prediction.median
    assert found["quantiles"]["0.9"] == prediction.quantile(0.9)
    assert (found["llm"], found["llm_known"], found["max_tokens"]) == ("llama-3-8b", True, 700)
    assert prediction.to_dict([0.25])["quantiles"] == {"0.25": prediction.quantile(0.25)}
    assert prediction.remaining(5).to_dict()["generated"] == 5


def test_a_flag_that_was_not_trained_on_is_told_once(
    predictor: LengthPredictor, caplog: pytest.LogCaptureFixture
) -> None:
    unread = predictor._unread
    assert "llm_year" in unread  # no number of the network stands for it yet
    with caplog.at_level(logging.WARNING, logger="mope"):
        for _ in range(3):
            predictor.predict("hello", llm_year=2026)
            predictor.predict("hello", llm_year=2026, max_tokens=5)
    assert [record.getMessage() for record in caplog.records] == [
        "this predictor was not trained on llm_year: ignored, here and from now on (said once)"
    ]
    plain, flagged = predictor.predict("hello"), predictor.predict("hello", llm_year=2026)
    assert np.array_equal(plain.cumulative, flagged.cumulative)


def test_a_packaged_predictor_says_what_it_ignores(caplog: pytest.LogCaptureFixture) -> None:
    predictor = LengthPredictor.from_pretrained("chat-micro")
    with caplog.at_level(logging.WARNING, logger="mope"):
        predictor.predict("hello", temperature=0.5, tools=True, thinking=True, response_format="json_object")
        assert not caplog.records  # trained on, or believed of
        predictor.predict("hello", llm_year=2026)
    assert len(caplog.records) == 1


def test_a_predictor_pickles_by_its_artifact(tiny: Path) -> None:
    predictor = LengthPredictor.from_pretrained(tiny, backend="torch", cache_size=7)
    for tokens in (300, 400, 500):
        predictor.observe(predictor.predict("hello", target_llm="gpt-4"), tokens)
    text = pickle.dumps(predictor)
    assert len(text) < 100_000  # no weights
    again = pickle.loads(text)
    assert again.cache_stats.capacity == 7
    predictor.recalibrator.to_json()  # works all corrections out anew, as loading does
    for llm in ("gpt-4", None):
        one, other = (each.predict("hello", target_llm=llm) for each in (predictor, again))
        assert np.array_equal(one.cumulative, other.cumulative)


def test_a_predictor_without_a_folder_says_why_it_does_not_pickle(predictor: LengthPredictor) -> None:
    made = LengthPredictor(
        predictor.config, predictor.backend, predictor.encoder, predictor.router, predictor.calibration,
        predictor._fallback,
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"save_pretrained\(\) it"):
        pickle.dumps(made)
