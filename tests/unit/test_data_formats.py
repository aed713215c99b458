"""Every format to chats: turns, history, flags, lengths; and what cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mope.reader import is_forced
from mope.training.data import problems as reasons
from mope.training.data.formats import Chat, Unusable, detect_format, normaliser
from mope.training.data.problems import Problems

ASK = {"role": "user", "content": "What is TCP?"}
REPLY = {"role": "assistant", "content": "A protocol."}
LMSYS = {
    "conversation_id": "c1",
    "model": "vicuna-13b",
    "conversation": [ASK, REPLY, {"role": "user", "content": "And UDP?"}, {"role": "assistant", "content": "Another."}],
    "turn": 2,
    "language": "English",
    "openai_moderation": [{"flagged": False}, {"flagged": True}],
    "redacted": True,
}


def read(record: dict[str, Any], data_format: str, problems: Problems | None = None, **drop: bool) -> Chat:
    options = {"drop_redacted": False, "drop_flagged": False, **drop}
    return normaliser(data_format, problems or Problems(), **options)(record, "f:1")


def piece(chat_id: str, *texts: str, first: str = "human") -> dict[str, Any]:
    second = "gpt" if first == "human" else "human"
    roles = [first, second] * len(texts)
    return {"id": chat_id, "conversations": [{"from": r, "value": t} for r, t in zip(roles, texts, strict=False)]}


@pytest.mark.parametrize(
    ("record", "data_format"),
    [
        (LMSYS, "lmsys"),
        (piece("a_0", "q", "a"), "sharegpt"),
        ({"messages": [ASK, REPLY]}, "messages"),
        ({"messages": [ASK, REPLY], "usage": {"completion_tokens": 3}}, "messages"),
        ({"messages": [ASK], "usage": {"completion_tokens": 3}}, "logs"),
        ({"request": {"messages": [ASK]}, "response": {"usage": {"completion_tokens": 3}}}, "logs"),
        ({"prompt": "p", "usage": {"completion_tokens": 3}}, "logs"),
        ({"prompt": "p", "response_tokens": 3}, "lengths"),
        ({"question": "p", "output_tokens": "3"}, "lengths"),
        ({"instruction": "p", "input": "", "output": "o"}, "pairs"),
        ({"input": "p", "output": "o"}, "pairs"),
        ({"text": "p"}, None),
        ({"prompt": "p"}, None),
    ],
)
def test_detection(record: dict[str, Any], data_format: str | None) -> None:
    assert detect_format([{"junk": 1}, record]) == data_format


def test_lmsys() -> None:
    chat = read(LMSYS, "lmsys")
    assert (chat.chat_id, chat.group, chat.language) == ("c1", "c1", "English")
    assert chat.flags == {"target_llm": "vicuna-13b"}
    assert chat.answers == ["A protocol.", "Another."]
    first, second = chat.turns
    assert (first.turn_index, first.num_known, first.previous_prompt) == (0, 0, "")
    assert (second.turn_index, second.num_known, second.previous_prompt) == (1, 1, "What is TCP?")
    assert (second.prompt, second.position, chat.first_prompt) == ("And UDP?", 2, "What is TCP?")


@pytest.mark.parametrize(("drop", "reason"), [("drop_redacted", reasons.REDACTED), ("drop_flagged", reasons.FLAGGED)])
def test_filters_of_lmsys(drop: str, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        read(LMSYS, "lmsys", **{drop: True})
    assert caught.value.reason == reason
    clean = {**LMSYS, "redacted": False, "openai_moderation": [{"flagged": False}]}
    assert read(clean, "lmsys", **{drop: True}).turns


def test_sharegpt_piece_that_repeats_the_last_answer_carries_history() -> None:
    read_piece = normaliser("sharegpt", Problems(), drop_redacted=False, drop_flagged=False)
    read_piece(piece("a_0", "q0", "a0", "q1", "a1"), "f:0")
    chat = read_piece(piece("a_3", "a1", "q2", "a2", first="gpt"), "f:1")
    assert chat.answers == ["a0", "a1", "a2"]
    (turn,) = chat.turns
    assert (turn.turn_index, turn.num_earlier_turns, turn.num_known, turn.previous_prompt) == (2, 2, 2, "q1")
    assert (chat.chat_id, chat.group, chat.first_prompt) == ("a_3", "a", "")


def test_sharegpt_piece_that_follows_directly_carries_history() -> None:
    read_piece = normaliser("sharegpt", Problems(), drop_redacted=False, drop_flagged=False)
    read_piece(piece("a_0", "q0", "a0"), "f:0")
    (turn,) = read_piece(piece("a_2", "q1", "a1"), "f:1").turns
    assert (turn.turn_index, turn.num_earlier_turns, turn.num_known, turn.previous_prompt) == (1, 1, 1, "q0")


@pytest.mark.parametrize("before", [piece("a_0", "q0", "a0"), piece("b_0", *"qaqaqa")])
def test_sharegpt_piece_without_its_predecessor_is_never_a_first_turn(before: dict[str, Any]) -> None:
    read_piece = normaliser("sharegpt", Problems(), drop_redacted=False, drop_flagged=False)
    read_piece(before, "f:0")
    chat = read_piece(piece("a_6", "q3", "a3"), "f:1")
    assert chat.answers == ["a3"]
    assert (chat.turns[0].turn_index, chat.turns[0].num_earlier_turns, chat.first_prompt) == (3, 3, "")
    cut = read_piece(piece("c_1", "a0", "q1", "a1", first="gpt"), "f:2")
    assert (cut.turns[0].turn_index, cut.turns[0].num_earlier_turns) == (1, 1)


def test_sharegpt_number_of_thousands_of_digits_is_a_name() -> None:
    name = "a_" + "1" * 5000
    assert read(piece(name, "q", "a"), "sharegpt").chat_id == name


def test_sharegpt_answers_of_other_assistants_are_no_rows() -> None:
    messages = [{"from": "human", "value": "q"}, {"from": "bard", "value": "a"}]
    with pytest.raises(Unusable) as caught:
        read({"id": "a_0", "conversations": messages}, "sharegpt")
    assert caught.value.reason == reasons.NO_ANSWER


def test_messages_with_flags() -> None:
    record = {
        "id": "r1",
        "session_id": "s1",
        "model": "qwen3",
        "messages": [{"role": "system", "content": "Be brief."}, ASK, REPLY],
        "max_completion_tokens": 64,
        "temperature": 0.2,
        "tools": [{"type": "function"}],
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    chat = read(record, "messages")
    assert (chat.chat_id, chat.group, chat.system) == ("r1", "s1", "Be brief.")
    assert (chat.flags.get("max_tokens"), chat.flags.get("temperature"), chat.flags.get("tools")) == (64, 0.2, True)
    assert (chat.flags.get("response_format"), chat.flags.get("thinking")) == ("json_object", False)
    assert chat.turns[0].turn_index == 0
    assert chat.turns[0].response_tokens is None


@pytest.mark.parametrize(
    ("flags", "thinking"),
    [
        ({}, None),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": "false"}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 1000}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": "Let me see. First I ..."}, None),
        ({"chat_template_kwargs": '{"enable_thinking": true}'}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
    ],
)
def test_thinking_flags(flags: dict[str, Any], thinking: bool | None) -> None:
    assert read({"messages": [ASK, REPLY], **flags}, "messages").flags.get("thinking") is thinking


@pytest.mark.parametrize("cap", [-1, 0, None, "", "many", 2**40, True])
def test_a_cap_that_is_none(cap: Any) -> None:
    assert read({"messages": [ASK, REPLY], "max_tokens": cap}, "messages").flags.get("max_tokens") is None


@pytest.mark.parametrize(
    "flags",
    [
        {"thinking_budget": 1000},
        {"thinking_token_budget": "1000"},
        {"max_thinking_tokens": 1000.0},
        {"thinking": {"type": "enabled", "budget_tokens": 1000}},
        {"reasoning": {"max_tokens": 1000}},
        {"chat_template_kwargs": {"thinking_budget": 1000}},
        {"chat_template_kwargs": '{"enable_thinking": true, "thinking_budget": 1000}'},
        {"custom_params": {"thinking_budget": 1000}},
        {"nvext": {"max_thinking_tokens": 1000}},
    ],
)
def test_a_thinking_budget_in_the_words_of_many_servers(flags: dict[str, Any]) -> None:
    assert read({"messages": [ASK, REPLY], **flags}, "messages").flags.get("thinking_budget") == 1000
    request = {"messages": [ASK], **flags}
    assert read({"request": request, "usage": {"completion_tokens": 3}}, "logs").flags.get("thinking_budget") == 1000


@pytest.mark.parametrize("flags", [{}, {"thinking_budget": 0}, {"thinking_budget": -1}, {"reasoning": "Let me see."}])
def test_no_thinking_budget(flags: dict[str, Any]) -> None:
    assert read({"messages": [ASK, REPLY], **flags}, "messages").flags.get("thinking_budget") is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, (None, None, None)),
        ({"llm_family": "qwen2.5", "llm_size": 32, "llm_reasoning": True}, ("qwen2.5", 32.0, True)),
        ({"model_family": "llama", "model_size": "8x7B", "llm_reasoning": "false"}, ("llama", 56.0, False)),
        ({"llm_family": "", "llm_size": "0.5", "llm_reasoning": 1}, (None, 0.5, True)),
        ({"llm_family": None, "llm_size": 0, "llm_reasoning": "maybe"}, (None, None, None)),
        ({"llm_size": 7_000_000_000}, (None, None, None)),
        ({"llm_size": "large"}, (None, None, None)),
    ],
)
def test_what_is_said_of_the_llm(said: dict[str, Any], expected: tuple[Any, Any, Any]) -> None:
    request = {"messages": [ASK], "model": "mine"}
    measured = {"usage": {"completion_tokens": 3}}
    other = {"llm_family": "phi", "llm_size": 1, "llm_reasoning": True}
    for record, data_format in (
        ({"prompt": "p", "response_tokens": 3, **said}, "lengths"),
        ({"prompt": "p", "response": "r", **said}, "pairs"),
        ({"request": request, "response": measured, **said}, "logs"),
        ({"request": {**request, **said}, "response": measured}, "logs"),
    ):
        chat = read(record, data_format)
        assert (chat.flags.get("llm_family"), chat.flags.get("llm_size"), chat.flags.get("llm_reasoning")) == expected
    chat = read({"request": {**request, **other}, "response": measured, **said}, "logs")  # the request's goes first
    assert (chat.flags.get("llm_size"), chat.flags.get("llm_reasoning")) == (1.0, True)


def test_measured_length_goes_to_the_answer_it_belongs_to() -> None:
    long = {"role": "user", "content": "More"}
    chat = read({"messages": [ASK, REPLY, long, REPLY], "usage": {"completion_tokens": 99}}, "messages")
    assert [turn.response_tokens for turn in chat.turns] == [None, 99]
    tool = {"role": "tool", "content": "42"}
    chat = read({"messages": [ASK, REPLY, tool, REPLY], "usage": {"completion_tokens": 99}}, "messages")
    assert [turn.response_tokens for turn in chat.turns] == [None, 99]  # the second answers the tool


def test_log_under_request_and_response() -> None:
    request = {"model": "llama", "messages": [ASK, REPLY, {"role": "user", "content": "More"}], "max_tokens": 100}
    response = {"id": "x", "usage": {"completion_tokens": 100}, "choices": [{"finish_reason": "length"}]}
    chat = read({"request": request, "response": response}, "logs")
    (turn,) = chat.turns
    assert (turn.response_tokens, turn.censored, turn.turn_index, turn.num_known) == (100, True, 1, 1)
    assert (turn.prompt, turn.previous_prompt, chat.answers) == ("More", "What is TCP?", ["A protocol."])
    assert (chat.chat_id, chat.first_prompt) == ("x", "What is TCP?")
    assert chat.flags == {"target_llm": "llama", "max_tokens": 100}


def test_flat_log_as_text_columns() -> None:
    record = {"messages": json.dumps([ASK]), "usage": json.dumps({"completion_tokens": 7}), "finish_reason": "stop"}
    (turn,) = read(record, "logs").turns
    assert (turn.response_tokens, turn.censored, turn.turn_index) == (7, False, 0)


def test_log_of_a_tool_result_predicts_for_the_last_prompt() -> None:
    messages = [ASK, {"role": "assistant", "content": None}, {"role": "tool", "content": "42"}]
    (turn,) = read({"messages": messages, "usage": {"completion_tokens": 7}}, "logs").turns
    assert (turn.prompt, turn.turn_index, turn.num_known) == ("What is TCP?", 1, 1)


def test_long_logs_keep_the_newest_answers() -> None:
    messages = [message for number in range(20) for message in (ASK, {"role": "assistant", "content": f"a{number}"})]
    chat = read({"messages": [*messages, ASK], "usage": {"completion_tokens": 7}}, "logs")
    assert chat.answers == [f"a{number}" for number in range(12, 20)]
    assert (chat.turns[0].num_known, chat.turns[0].num_earlier_turns) == (8, 20)


def test_pairs_and_their_aliases() -> None:
    chat = read({"instruction": "Translate", "input": "Guten Tag", "output": "Good day"}, "pairs")
    assert (chat.turns[0].prompt, chat.answers) == ("Translate\n\nGuten Tag", ["Good day"])
    assert read({"question": "Why?", "answer": "So."}, "pairs").turns[0].prompt == "Why?"


def test_lengths() -> None:
    chat = read({"prompt": "p", "completion_tokens": "12", "target_llm": "x", "censored": "True"}, "lengths")
    assert (chat.turns[0].response_tokens, chat.turns[0].censored, chat.answers) == (12, True, [])


FORCED = [
    {"ignore_eos": True},
    {"ignore_eos": "true"},
    {"min_tokens": 900},
    {"min_tokens": 600},
    {"sampling_params": {"min_new_tokens": 900}},
    {"extra_body": '{"ignore_eos": true}'},
]
FREE = [{}, {"ignore_eos": False}, {"min_tokens": 300}, {"min_tokens": None}, {"min_tokens": "many"}]


def test_a_minimum_above_half_of_the_answer_forces_it() -> None:
    assert is_forced({"min_tokens": 451}, 900)
    assert not is_forced({"min_tokens": 450}, 900)


@pytest.mark.parametrize(("flags", "forced"), [*((one, True) for one in FORCED), *((one, False) for one in FREE)])
@pytest.mark.parametrize("data_format", ["logs", "flat logs", "lengths", "messages", "pairs"])
def test_lengths_that_the_request_forced_are_no_labels(flags: dict[str, Any], forced: bool, data_format: str) -> None:
    usage = {"completion_tokens": 900}
    answer = "word " * 900
    record = {
        "logs": {"request": {"messages": [ASK], **flags}, "response": {"usage": usage}},
        "flat logs": {"messages": [ASK], "usage": usage, **flags},
        "lengths": {"prompt": "p", "response_tokens": 900, **flags},
        "messages": {"messages": [ASK, {"role": "assistant", "content": answer}], "usage": usage, **flags},
        "pairs": {"prompt": "p", "response": answer, **flags},
    }[data_format]
    if not forced:
        assert read(record, data_format.removeprefix("flat ")).turns
        return
    with pytest.raises(Unusable) as caught:
        read(record, data_format.removeprefix("flat "))
    assert caught.value.reason == reasons.FORCED


@pytest.mark.parametrize("length", ["many", -1, 1.5, float("nan"), True, 2**31])
def test_lengths_that_are_no_lengths(length: Any) -> None:
    with pytest.raises(Unusable) as caught:
        read({"prompt": "p", "response_tokens": length}, "lengths")
    assert caught.value.reason == reasons.BAD_LENGTH


@pytest.mark.parametrize(
    ("record", "data_format", "reason"),
    [
        ({"messages": []}, "messages", reasons.NO_MESSAGES),
        ({"messages": "hello"}, "messages", reasons.WRONG_COLUMNS),
        ({"messages": [1]}, "messages", reasons.WRONG_COLUMNS),
        ({"messages": [{"content": "x"}]}, "messages", reasons.WRONG_COLUMNS),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", reasons.WRONG_COLUMNS),
        ({"messages": [REPLY]}, "messages", reasons.NO_ANSWER),
        ({"prompt": ["a", "b"], "response": "x"}, "pairs", reasons.MANY_PROMPTS),
        ({"prompt": "a"}, "pairs", reasons.WRONG_COLUMNS),
        ({"prompt": "a"}, "lengths", reasons.WRONG_COLUMNS),
        ({"prompt": "a"}, "logs", reasons.WRONG_COLUMNS),
        ({"other": 1}, "sharegpt", reasons.WRONG_COLUMNS),
    ],
)
def test_unusable_records_say_why(record: dict[str, Any], data_format: str, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        read(record, data_format)
    assert caught.value.reason == reason


def test_nuls_and_lone_surrogates_are_mended_and_counted() -> None:
    problems = Problems()
    chat = read({"prompt": "a\0b", "response": "x\ud800y"}, "pairs", problems)
    assert (chat.turns[0].prompt, chat.answers) == ("ab", ["x\ufffdy"])
    assert problems.counts == {reasons.NUL_REMOVED: 1, reasons.BROKEN_TEXT: 1}
    assert problems.examples[reasons.NUL_REMOVED] == ["f:1"]
