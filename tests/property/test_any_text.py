"""No text whatever makes reading a request fail otherwise than by `DataError`: one such prompt would fail its batch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers

from mope import LengthPredictor, Request, ServingPredictor
from mope.errors import DataError
from mope.features import ends, request_numbers
from mope.inputs import as_request
from mope.reader import FIELDS, read_flags, read_messages
from mope.record_files import Entry
from mope.request_files import read_request
from mope.rules import NUMBER_WORDS, match_rules
from mope.target_llm import describe
from mope.token_estimate import estimate_tokens
from mope.triggers import Words

LOOK_ALIKES = {"k": "kK\u212a", "s": "sS\u017f", "i": "iI\u0130\u0131"}  # to `re.I`
DIGITS = "0\u0660\u0967\uff11\U0001d7d8\u00b2\u2460\u4e94"  # decimal digits of other scripts, and others
WORDS = (
    "list", "write", "in", "to", "or", "five", "twenty-five", "hundred", "thousand", "k", "words", "sentences", "ideas",
    "items", "bullet", "points", "yes/no", "is", "continue", "thanks", "json", "one", "word", "tokens", *NUMBER_WORDS,
)  # fmt: skip

any_sign = st.characters()  # surrogates, too
digits = st.text(st.sampled_from("0123456789,.k\u212aK" + DIGITS), min_size=1, max_size=12)


@st.composite
def alike(draw: st.DrawFn) -> str:
    """Words that rules know, with letters and digits in place of which a regular expression takes others."""
    parts = draw(st.lists(st.one_of(st.sampled_from(WORDS), digits, st.text(any_sign, max_size=3)), max_size=8))
    text = draw(st.sampled_from([" ", " ", "-", "", "\n"])).join(parts)
    return "".join(draw(st.sampled_from(LOOK_ALIKES[sign])) if sign in LOOK_ALIKES else sign for sign in text)


texts = st.one_of(st.text(any_sign, max_size=200), alike())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), texts, digits),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
names = sorted({name.partition(".")[0] for fields in FIELDS.values() for field in fields for name in field.names})
bodies = st.dictionaries(st.one_of(st.sampled_from([*names, "messages", "prompt", "input", "history"]), texts), values)


@pytest.fixture(scope="module")
def packaged() -> LengthPredictor:
    return LengthPredictor.from_pretrained("chat-micro")


@settings(max_examples=1500)
@given(texts)
@example("List 5\u212a ideas")  # a Kelvin sign, which `re.I` takes for a k
@example("write 2,0\u0660\u212a words")
def test_rules_and_numbers_take_any_text(text: str) -> None:
    words = Words(text)
    hits = match_rules(words)
    assert 0 <= hits.tokens <= 100_000
    assert all(map(math.isfinite, request_numbers(Request(prompt=text), words, hits)))
    assert estimate_tokens(text) >= 0
    assert len(ends(text, 20)) <= 21
    describe(text)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, texts, texts)
@example("List 5\u212a ideas", "", "")
@example("\ud800", "\udfff\ud800", "\x00")
def test_a_predictor_predicts_any_text(packaged: LengthPredictor, prompt: str, previous: str, system: str) -> None:
    whole = Request(prompt=prompt, previous_prompt=previous, system=system, answer_estimates=(5,), num_earlier_turns=1)
    for prediction in packaged.predict_batch([prompt, whole, {"prompt": prompt, "system": system}]):
        assert 0 < prediction.quantile(0.5) <= prediction.quantile(0.9) < math.inf


@settings(max_examples=600)
@given(bodies)
def test_reading_a_body_raises_nothing_but_data_errors(body: dict[str, Any]) -> None:
    read_flags(body)
    read_messages(body)
    with contextlib.suppress(DataError):
        as_request(body)
    with contextlib.suppress(DataError):
        as_request({"prompt": "hello", **body})
    read_request(Entry("line 1", json.loads(json.dumps(body))), {})


@pytest.fixture
def panicking(packaged: LengthPredictor, monkeypatch: pytest.MonkeyPatch) -> LengthPredictor:
    """A predictor whose tokenizer has a regular expression that gives up on a text made for that, with a panic."""
    tokenizer = Tokenizer.from_str(packaged.encoder.tokenizer_json())
    climbs = normalizers.Replace(Regex("(E+)+!"), "x")
    tokenizer.normalizer = normalizers.Sequence([climbs, normalizers.BertNormalizer()])  # type: ignore[assignment]
    monkeypatch.setattr(packaged.encoder, "_tokenizer", tokenizer)
    packaged._cache.clear()
    return packaged


BAD = "E" * 30


def test_a_panic_of_the_tokenizer_is_a_data_error(panicking: LengthPredictor) -> None:
    with pytest.raises(DataError, match=r"the tokenizer can't read a text: .*retry-limit") as caught:
        panicking.predict(BAD)
    assert not isinstance(caught.value.__cause__, Exception)  # a panic
    assert panicking.predict("hello there, once more").source == "model"


@pytest.mark.parametrize("max_batch", [1, 32])
def test_a_prompt_that_breaks_the_tokenizer_fails_alone(panicking: LengthPredictor, max_batch: int) -> None:
    async def ask() -> list[str]:
        async with ServingPredictor(panicking, max_batch=max_batch, window_s=0.05) as serving:
            prompts = [f"What is TCP, part {number}?" for number in range(31)]
            asked = (serving.predict(prompt) for prompt in [*prompts[:9], BAD, *prompts[9:]])
            found = [one.source for one in await asyncio.wait_for(asyncio.gather(*asked), 60)]
            assert (await asyncio.wait_for(serving.predict("and now?"), 10)).source == "model"
            return found

    found = asyncio.run(ask())
    assert [place for place, source in enumerate(found) if source != "model"] == [9]
    assert found[9] == "fallback:error"
