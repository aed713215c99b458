"""Logged requests to chats: the last answer of each is a row, earlier ones were requests of their own.

What a record holds is read by `mope.log_records`, what a request asks for by `mope.reader`, as servers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mope.errors import DataError
from mope.log_answers import LoggedAnswer, Usage, at
from mope.log_losses import lost
from mope.log_records import GROUP_COLUMNS, PROMPTS, Logged, logged
from mope.reader import is_forced, number, parsed, read_flags, read_messages
from mope.request import MAX_EARLIER_ANSWERS, ROLES, message_text, results_in
from mope.token_estimate import estimate_tokens
from mope.training.data import problems as reasons
from mope.training.data.chats import (
    Chat,
    History,
    Record,
    Turn,
    Unusable,
    fill,
    first_text,
    next_turn,
    tidied,
    tidy,
)
from mope.training.data.problems import Problems

# of the response or the tool; of a trace, which holds several calls of one conversation
_INNER_IDS = ("response.id", "response.body.id", "response_body.id", "custom_id", "rid", "spanId", "span_id")
_GROUPS = ("sessionId", "traceId", "trace_id", "attributes.gen_ai.conversation.id")


def exchange(record: Record, location: str, problems: Problems) -> Chat:
    """The chat of one logged request: its answer, or one for each choice.

    Raises:
        Unusable: see `mope.training.data.problems`.
    """
    found = logged(record)
    if found is None:
        raise Unusable(reasons.WRONG_COLUMNS)
    _check(found)
    flags = read_flags(found.request)
    said, results = _asked(found.request, location, problems)
    if said[-1][0] == "assistant" and len(said) > 1:
        said, results = said[:-1], results[:-1]  # the beginning of the answer, or the answer as it was logged
    prompts = [text for role, text in said if role == "user"]
    answers = [text for role, text in said if role == "assistant"]
    is_prompt = not any(isinstance(parsed(found.request.get(name)), list) for name in ("messages", "input"))
    turn = next_turn(
        0 if is_prompt else len(said) - 1,
        prompts[-1],
        prompts[-2] if len(prompts) > 1 else "",
        len(prompts),
        History(),
        answers,
    )
    turn.num_tool_results, turn.last_is_tool_result = sum(results), results[-1] > 0
    turn.context_chars = sum(len(text) for _, text in said)
    chat = Chat(
        chat_id="", group="", location=location, answers=answers, turns=[], system=_joined(said, "system"),
        first_prompt=prompts[0] if not any(role == "assistant" for role, _ in said[: _first_user(said)]) else "",
        flags=flags, family="" if found.family == "flat" else found.family,
    )  # fmt: skip
    fill(chat, record)
    chat.chat_id = chat.chat_id or next((str(said) for path in _INNER_IDS if (said := at(record, path))), "")
    chat.group = _group(record, found.request) or chat.chat_id
    first = max(0, turn.num_known - MAX_EARLIER_ANSWERS)
    chat.answers, turn.num_known = answers[first:], turn.num_known - first
    chat.turns = _turns(found, turn, location, problems)
    return chat


def _check(found: Logged) -> None:
    """Refuse what gives no row whatever its request is."""
    is_flat = found.family == "flat"
    if found.family == "conversation":  # whose earlier answers would be lost
        raise Unusable(reasons.WRONG_COLUMNS)
    if not found.is_call:
        raise Unusable(reasons.NO_CALL)
    if found.failed:
        raise Unusable(reasons.FAILED)
    if found.lacking:
        raise Unusable(reasons.no_prompt(found.lacking))
    if not found.request:
        raise Unusable(reasons.WRONG_COLUMNS if is_flat else reasons.NO_TEXT)
    if found.usage.unreadable:
        raise Unusable(reasons.BAD_LENGTH)
    if not found.answers and found.usage.tokens is None:
        raise Unusable(reasons.WRONG_COLUMNS if is_flat else reasons.NO_RESPONSE)


def _asked(request: Record, location: str, problems: Problems) -> tuple[list[tuple[str, str]], list[int]]:
    """(role, text) of what was sent, as servers read it, and the results of tools in each message."""
    try:
        messages = read_messages(request)
        said = [(message["role"], message_text(message["content"])) for message in messages]
    except DataError as error:
        raise Unusable(reasons.WRONG_COLUMNS) from error
    if not any(ROLES[role] == "user" for role, _ in said):
        prompt = parsed(request.get("prompt"))
        several = isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list)
        raise Unusable(reasons.MANY_PROMPTS if several else reasons.NO_TEXT)
    results = [results_in(message, ROLES[message["role"]]) for message in messages]
    return [(ROLES[role], tidy(text, location, problems)) for role, text in said], results


def _joined(said: list[tuple[str, str]], wanted: str) -> str:
    return "\n".join(text for role, text in said if role == wanted)


def _first_user(said: list[tuple[str, str]]) -> int:
    return next(position for position, (role, _) in enumerate(said) if role == "user")


def _group(record: Record, request: Mapping[str, Any]) -> str:
    found = first_text(record, GROUP_COLUMNS) or first_text(request, GROUP_COLUMNS)
    return found or next((str(said) for path in _GROUPS if (said := at(record, path))), "")


def _turns(found: Logged, turn: Turn, location: str, problems: Problems) -> list[Turn]:
    """A turn for each answer whose length can be told; the others are counted.

    Raises:
        Unusable: there is none.
    """
    answers = found.answers or (LoggedAnswer(finish=found.finish),)
    asked_for = max(number(found.request.get(name)) or 1 for name in ("n", "best_of"))
    several = len(answers) > 1 or asked_for > 1
    turns: list[Turn] = []
    why: list[str] = []
    for choice, answer in enumerate(answers):
        usage = answer.usage if several and len(answers) > 1 else found.usage if not several else Usage()
        try:
            made = _turn(turn, choice, answer, usage, found, several)
        except Unusable as unusable:
            why.append(unusable.reason)
            continue
        text = made.answer
        said = tidied(answer, None, "", location, problems) if made.texts() else answer
        made.answer, made.thoughts, made.calls = (said.text if text is not None else None), said.thoughts, said.calls
        length = made.response_tokens
        if length is None:
            length = sum(map(estimate_tokens, made.texts()))
        if is_forced(found.request, length):
            why.append(reasons.FORCED)
            continue
        if made.response_tokens is None and found.family != "flat":
            problems.add(reasons.COUNTED_CHOICE if several else reasons.COUNTED, location)
        elif made.response_tokens is None and several:
            problems.add(reasons.COUNTED_CHOICE, location)
        turns.append(made)
    if not turns:
        for reason in why[1:]:
            problems.add(reason, location)
        raise Unusable(why[0])
    for reason in why:
        problems.add(reason, location)
    return turns


def _turn(turn: Turn, choice: int, answer: LoggedAnswer, usage: Usage, found: Logged, several: bool) -> Turn:
    """The turn of one answer, with the length that is recorded for it, or the texts to count.

    Raises:
        Unusable: its length cannot be told.
    """
    made = replace(
        turn, choice=choice, answer=answer.text,
        thoughts=answer.thoughts, calls=answer.calls, censored=answer.cut or LoggedAnswer(finish=found.finish).cut,
    )  # fmt: skip
    known = bool(made.texts())
    if usage.tokens or (usage.tokens == 0 and not known):
        made.response_tokens, made.thought_tokens = usage.tokens, usage.thoughts
        return made
    if any(map(lost, made.texts())):
        raise Unusable(reasons.LOST_ANSWER)
    hidden = answer.hidden or bool(found.usage.thoughts and not answer.thoughts and not made.thoughts_inside())
    if several and (not known or hidden):
        raise Unusable(reasons.SUM_OF_CHOICES)
    if hidden:
        raise Unusable(reasons.HIDDEN_THOUGHTS)
    if answer.text is None and not known:
        raise Unusable(reasons.NO_RESPONSE)
    return made


def has_prompt_column(record: Record) -> bool:
    """Whether a record has its prompt as text under a column of its own."""
    return any(isinstance(record.get(name), str) for name in PROMPTS)
