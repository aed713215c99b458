"""From request to model input: windows, cost, hostile text, and the same numbers in training and serving."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tiny_artifact import make_tokenizer
from rows import table
from timing import least_ratio

from mope.effort import level_of_budget
from mope.errors import ArtifactError
from mope.features import NUM_FIRST, NUMBER_NAMES, RequestEncoder, effort_of, ends, pad
from mope.inputs import as_request
from mope.request import Request
from mope.token_estimate import estimate_tokens
from mope.training.batches import encode_rows
from mope.training.data.formats import normaliser
from mope.training.data.problems import Problems

CLS, SEP, PAD = 2, 3, 0


def encoder(max_prompt_tokens=24, max_context_tokens=8, number_names=NUMBER_NAMES):
    return RequestEncoder(
        make_tokenizer(),
        special_ids=(CLS, SEP, PAD),
        max_prompt_tokens=max_prompt_tokens,
        max_context_tokens=max_context_tokens,
        chars_per_token=10,
        lexical_chars=2000,
        target_llms=("llama-3-8b", "gpt-4"),
        number_names=number_names,
    )


ENCODER = encoder()


def words(ids):
    tokenizer = make_tokenizer()
    return [tokenizer.id_to_token(token) for token in ids]


def numbers(request):
    return dict(zip(NUMBER_NAMES, ENCODER.encode([request]).numbers_BF[0].tolist(), strict=True))


@given(st.text(max_size=60), st.integers(5, 30))
def test_ends_keeps_head_and_tail(text, num_chars):
    window = ends(text, num_chars)
    if len(text) <= num_chars:
        assert window == text
    else:
        head, tail = int(num_chars * 0.6), num_chars - int(num_chars * 0.6)
        assert window == text[:head] + "\n" + text[-tail:]


def test_a_long_prompt_keeps_its_first_and_last_tokens():
    prompt = "write " * 9 + "sky " * 500 + "list " * 9
    tokens = words(ENCODER.encode([Request(prompt=prompt)]).token_ids[0])
    assert len(tokens) == 24 + 2
    assert tokens[:3] == ["[CLS]", "write", "write"]
    assert tokens[-3:] == ["list", "list", "[SEP]"]
    assert tokens.count("write") == 9
    assert tokens.count("list") == 9


def test_context_is_the_previous_prompt_or_else_the_system_prompt():
    both = Request(prompt="hello", previous_prompt="why", system="list")
    assert words(ENCODER.encode([both]).token_ids[0]) == ["[CLS]", "hello", "[SEP]", "why", "[SEP]"]
    first = Request(prompt="hello", system="list")
    assert words(ENCODER.encode([first]).token_ids[0]) == ["[CLS]", "hello", "[SEP]", "list", "[SEP]"]
    assert words(encoder(max_context_tokens=0).encode([both]).token_ids[0]) == ["[CLS]", "hello", "[SEP]"]


def test_special_tokens_that_a_user_writes_are_text():
    ids = ENCODER.encode([Request(prompt="[SEP] hello [CLS] [PAD] [MASK]")]).token_ids[0]
    assert ids.count(CLS) == 1
    assert ids.count(SEP) == 1
    assert PAD not in ids


def test_cost_does_not_grow_with_the_prompt():
    long, short = (
        [Request(prompt=("write a story. " * (num_chars // 15 + 1))[:num_chars])] * 40 for num_chars in (90_000, 2_000)
    )
    ratio = least_ratio(lambda: ENCODER.encode(long), lambda: ENCODER.encode(short), 4)
    assert ratio < 4  # without the cut it is some 45 times as much


@pytest.mark.parametrize(
    "text", ["", " ", "\0", "a\0b", "\ud800", "half \udfff pair", "🙂" * 50, "שלום", "\u202e\u200b", "\x1b[0m"]
)
def test_any_text_can_be_encoded(text):
    encoded = ENCODER.encode([Request(prompt=text, previous_prompt=text, system=text)])
    assert encoded.token_ids[0][0] == CLS
    assert np.isfinite(encoded.numbers_BF).all()


@given(st.text(max_size=200), st.text(max_size=50), st.lists(st.integers(0, 10**9), max_size=8))
def test_numbers_are_finite_and_windows_bounded(prompt, context, answer_estimates):
    request = Request(
        prompt=prompt,
        previous_prompt=context,
        answer_estimates=tuple(answer_estimates),
        num_earlier_turns=len(answer_estimates),
    )
    encoded = ENCODER.encode([request])
    assert encoded.numbers_BF.shape == (1, len(NUMBER_NAMES))
    assert np.isfinite(encoded.numbers_BF).all()
    assert len(encoded.token_ids[0]) <= 24 + 8 + 3


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0, 1e300])
def test_absurd_temperatures_leave_the_numbers_finite(temperature):
    assert 0 <= numbers(Request(prompt="hello", temperature=temperature))["temperature"] <= 100


def test_a_prompt_is_compared_with_the_one_before():
    found = numbers(Request(prompt="List ten birds", previous_prompt="List six birds", answer_estimates=(4,)))
    assert found["same_words"] == pytest.approx(2 / 4)
    assert found["log_same_beginning"] == pytest.approx(np.log1p(len("List ")))
    again = numbers(Request(prompt="Why?", previous_prompt="Why?", answer_estimates=(4,)))
    assert (again["same_words"], again["log_same_beginning"]) == pytest.approx((1.0, np.log1p(4)))


def test_numbers_say_what_they_are_named():
    request = Request(
        prompt="Why? Explain in 50 words:\nBRIEFLY",
        previous_prompt="abc",
        answer_estimates=(10, 100),
        num_earlier_turns=2,
        max_tokens=99,
        temperature=0.5,
        tools=True,
        num_tools=4,
        tool_chars=2500,
        tool_choice="named",
        num_tool_results=3,
        last_is_tool_result=True,
        other_chars=64,
        thinking=False,
        token_unit="own",
    )
    found = numbers(request)
    expected = {
        "log_prompt_chars": np.log1p(33), "log_previous_prompt_chars": np.log1p(3), "log_earlier_turns": np.log1p(2),
        "has_history": 1, "log_last_answer": np.log1p(100), "log_min_answer": np.log1p(10),
        "log_max_answer": np.log1p(100), "log_mean_answer": (np.log1p(100) + np.log1p(10)) / 2,
        "log_answer_before_last": np.log1p(10), "log_median_answer": (np.log1p(100) + np.log1p(10)) / 2,
        "log_recent_answers": (2 * np.log1p(100) + np.log1p(10)) / 3, "log_all_answers": np.log1p(110),
        "recent_spread": (np.log1p(100) - np.log1p(10)) / 2, "same_words": 0, "log_same_beginning": 0,
        "log_newlines": np.log1p(1), "question_marks": 1,
        "log_digits": np.log1p(2), "wh_question": 1, "asks_long": 1, "asks_short": 1, "ends_with_question": 0,
        "log_asked_tokens": np.log1p(67.5), "rule_units": 1, "rule_code": 0, "log_max_tokens": np.log1p(99),
        "has_max_tokens": 1, "temperature": 0.5, "has_temperature": 1, "tools": 1, "response_format": 0, "thinking": 0,
        "not_thinking": 1, "upper_share": 9 / 33, "has_effort": 1, "effort": 0, "log_num_tools": np.log1p(4),
        "log_tool_chars": np.log1p(2500), "tool_choice_required": 1, "last_is_tool_result": 1,
        "log_tool_results": np.log1p(3), "log_context_chars": np.log1p(100), "share_hangul": 0, "counts_own": 1,
        "counts_cl100k": 0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "effort"),
    [
        ({}, None),
        ({"effort": 3.0}, 3),
        ({"effort": 0.0, "target_llm": "o3-high"}, 0),
        ({"thinking_budget": 8192, "target_llm": "gpt-5 (low)"}, 3),
        ({"thinking": False, "target_llm": "gpt-5-high"}, 0),
        ({"thinking": True}, None),
        ({"target_llm": "o4-mini-high"}, 4),
        ({"target_llm": "claude-opus-4.5_medium"}, 3),
        ({"target_llm": "x-ai/grok-4.20-beta@reasoning=xhigh"}, 5),
        ({"target_llm": "gpt-5-minimal"}, 1),
        ({"target_llm": "claude-3-7-sonnet-20250219-thinking-64k"}, 5),
        ({"target_llm": "Qwen__Qwen3-8B-nothink"}, 0),
        ({"target_llm": "Qwen__Qwen3-8B-nothink", "thinking": True}, None),
        ({"target_llm": "anthropic/claude-3.7-sonnet:thinking"}, None),
        ({"target_llm": "mistral-medium-3"}, None),
        ({"target_llm": "gpt-4-32k"}, None),
    ],
)
def test_effort_is_what_is_asked_or_else_what_the_name_says(flags, effort):
    request = Request(prompt="a", **flags)
    assert effort_of(request) == effort
    found = numbers(request)
    assert (found["has_effort"], found["effort"]) == (effort is not None, effort or 0)


@given(st.integers(1, 10**7), st.integers(1, 10**7))
def test_a_larger_budget_is_no_less_effort(one, other):
    low, high = (level_of_budget(tokens) for tokens in sorted((one, other)))
    assert 1 <= low <= high <= 5


def test_an_artifact_gets_the_numbers_that_it_names_and_no_others():
    requests = [
        Request(prompt="Why? 안녕", effort=2.0, tools=True, num_tools=2, target_llm="gpt-4"),
        Request(prompt="hello", max_tokens=5),
    ]
    everything = ENCODER.encode(requests).numbers_BF
    first = encoder(number_names=NUMBER_NAMES[:NUM_FIRST])
    assert np.array_equal(first.encode(requests).numbers_BF, everything[:, :NUM_FIRST])
    some = ("effort", "log_prompt_chars", "share_hangul", "temperature")
    chosen = encoder(number_names=some).encode(requests).numbers_BF
    assert np.array_equal(chosen, everything[:, [NUMBER_NAMES.index(name) for name in some]])
    with pytest.raises(ArtifactError, match="does not compute: phase_of_the_moon"):
        encoder(number_names=(*some, "phase_of_the_moon"))


def test_requests_that_are_encoded_alike_have_one_digest():
    plain, more = Request(prompt="hello"), Request(prompt="hello", tools=True, num_tools=3, effort=3.0, other_chars=9)
    fewer = Request(prompt="hello", tools=True, num_tools=2, effort=3.0, other_chars=9)
    assert len({ENCODER.digest(request) for request in (plain, more, fewer)}) == 3
    first = encoder(number_names=NUMBER_NAMES[:NUM_FIRST])
    assert first.digest(more) == first.digest(fewer) != first.digest(plain)


def test_unknown_llms_share_index_zero():
    requests = [Request(prompt="a", target_llm=name) for name in (None, "", "nobody", "llama-3-8b", "gpt-4")]
    assert ENCODER.encode(requests).llm_B.tolist() == [0, 0, 0, 1, 2]


def test_an_empty_batch_is_no_error():
    encoded = ENCODER.encode([])
    assert encoded.token_ids == []
    assert encoded.numbers_BF.shape == (0, len(NUMBER_NAMES))


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=6))
def test_padding_adds_pads_on_the_right_alone(token_ids):
    ids, mask = pad(token_ids, 0)
    assert [row[keep].tolist() for row, keep in zip(ids, mask.astype(bool), strict=True)] == token_ids
    assert not ids[mask == 0].any()
    assert np.all(np.diff(mask, axis=1) <= 0)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(texts, st.integers(1, 300)), min_size=1, max_size=11),
    st.sampled_from(["", "Be brief."]),
    st.sampled_from([None, 1, 500]),
    st.sampled_from([None, 0.7]),
    st.sampled_from([None, True, False]),
)
def test_a_training_row_and_a_served_request_give_the_same_input(turns, system, max_tokens, temperature, thinking):
    """A conversation is read once by the data reader, as a row, and once as messages that a server gets."""
    messages = [{"role": "system", "content": system}] if system else []
    for prompt, length in turns:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": "é" * length}]
    record = {
        "messages": messages, "model": "gpt-4", "max_tokens": max_tokens, "temperature": temperature,
        "enable_thinking": thinking,
    }  # fmt: skip
    chat = normaliser("messages", Problems(), drop_redacted=False, drop_flagged=False)(record, "here")
    flags = {"target_llm": "gpt-4", "max_tokens": max_tokens, "temperature": temperature, "thinking": thinking}
    served = as_request({"messages": messages[:-1], **flags})
    last = chat.turns[-1]
    read = Request(
        prompt=last.prompt,
        system=chat.system,
        previous_prompt=last.previous_prompt,
        answer_estimates=tuple(map(estimate_tokens, chat.answers[: last.num_known][-8:])),
        num_earlier_turns=last.num_earlier_turns,
        other_chars=last.context_chars - len(last.prompt) - len(last.previous_prompt) - len(chat.system),
        **chat.flags,
    )
    assert read == served


def test_a_row_of_a_table_is_encoded_as_its_request_is():
    requests = [
        Request(prompt="Explain TCP slow start.", target_llm="gpt-4", max_tokens=100, temperature=0.7),
        Request(
            prompt="and now?", previous_prompt="why", answer_estimates=(7, 900), num_earlier_turns=2, thinking=True
        ),
        Request(prompt="", system="list", tools=True, num_tools=3, tool_chars=900, response_format="json_object"),
        Request(
            prompt="Γειά", effort=2.0, tool_choice="required", tools=True, num_tool_results=2, last_is_tool_result=True,
            other_chars=5000,
        ),
    ]  # fmt: skip
    own = ENCODER
    served = own.encode(requests)
    rows = encode_rows(table(requests, [1, 2, 3, 4]), own, "encoding").requests(np.arange(4))
    assert rows.token_ids == served.token_ids
    assert np.array_equal(rows.numbers_BF, served.numbers_BF)
    assert np.array_equal(rows.llm_B, served.llm_B)
    assert rows.rule_hits == served.rule_hits
