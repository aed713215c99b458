"""Conversations to chats: LMSYS and WildChat, ShareGPT with its pieces, OpenAI messages, TRL.

Every answer of a conversation is a row. Logs of single requests are read by `exchanges`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mope.log_answers import CUT, finish_of, usage_of
from mope.log_records import ID_COLUMNS
from mope.reader import SYSTEM, parsed, read_flags
from mope.request import MAX_EARLIER_ANSWERS, message_text
from mope.training.data import problems as reasons
from mope.training.data.chats import (
    Chat,
    History,
    Message,
    Record,
    Unusable,
    fill,
    first_text,
    next_turn,
    pair_up,
    read_messages_of,
    text_or_none,
    tidy,
    with_turns,
)
from mope.training.data.problems import Problems

_MAX_DIGITS = 9  # of the number of a piece of a conversation


class ShareGPT:
    """ShareGPT records; long conversations come as pieces `base_N`, N the position of their first message.

    A piece that follows the one before it directly, or repeats its last message, carries its history on. A piece
    whose predecessor is missing keeps a turn index from N, so that none of its rows passes for a first turn.
    """

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._base = ""
        self._end = 0  # position after the last message of the piece before
        self._last_message: tuple[str, str] | None = None
        self._history = History()

    def __call__(self, record: Record, location: str) -> Chat:
        """Read one piece."""
        messages = read_messages_of(record.get("conversations"), location, self._problems)
        chat_id = first_text(record, ID_COLUMNS)
        base, start = _base_and_start(chat_id)
        follows = start > 0 and base == self._base
        repeats = follows and start == self._end - 1 and messages[0][:2] == self._last_message
        if follows and (start == self._end or repeats):
            before = self._history
            if repeats and messages[0].role == "assistant":  # said again as the first message of this piece
                before = replace(before, answers=before.answers[:-1], num_answers=before.num_answers - 1)
            if repeats:
                before = replace(before, num_chars=before.num_chars - len(messages[0].text))
        else:
            before = History(num_answers=start // 2, num_prompts=(start + 1) // 2)  # who speaks alternates
        before.system = before.system or text_or_none(record, "system") or ""
        chat = pair_up(messages, location, before, self._problems, repeated=repeats)
        fill(chat, record)
        chat.flags = read_flags(record)
        chat.group = base
        self._base, self._end, self._last_message = base, start + len(messages), messages[-1][:2]
        num_new_answers = len(chat.answers) - len(before.answers)
        prompts = [message.text for message in messages if message.role == "user"]
        self._history = History(
            chat.answers[-MAX_EARLIER_ANSWERS - 1 :],  # one more: the next piece may repeat the last
            before.num_answers + num_new_answers,
            before.num_prompts + len(prompts),
            before.num_chars + sum(len(message.text) for message in messages if message.role != "system"),
            prompts[-1] if prompts else before.last_prompt,
            chat.system,
        )
        return with_turns(chat)


def _base_and_start(chat_id: str) -> tuple[str, int]:
    base, _, suffix = chat_id.rpartition("_")
    number = suffix.isascii() and suffix.isdigit() and len(suffix) <= _MAX_DIGITS
    return (base, int(suffix)) if base and number else (chat_id, 0)


def messages(record: Record, column: str, location: str, problems: Problems) -> Chat:
    """A conversation in one column; TRL's `prompt` and `completion` are one, too, whose prompt holds no answers.

    Usage and finish reason at the top of the record belong to the last answer, and those of a message to it.
    """
    given, num_asked = listed(record, column)
    said = read_messages_of(given, location, problems)
    chat = pair_up(said, location, History(system=_system(record, location, problems)), problems)
    fill(chat, record)
    chat.flags = read_flags(record)
    if num_asked:  # answers in a prompt are its history
        chat.turns = [turn for turn in chat.turns if turn.position >= num_asked - 1]
    _measure_last(chat, said, record, location, problems)
    return with_turns(chat)


def listed(record: Record, column: str) -> tuple[Any, int]:
    """The messages of a conversation, and how many of them are a prompt whose answers are no rows."""
    given = parsed(record.get(column))
    if given is None and column == "messages":
        prompt, completion = parsed(record.get("prompt")), parsed(record.get("completion"))
        if isinstance(prompt, list) and isinstance(completion, list):
            return [*prompt, *completion], len(prompt)
    return given, 0


def _system(record: Record, location: str, problems: Problems) -> str:
    said = next((found for name in SYSTEM if (found := parsed(record.get(name)))), None)
    if not isinstance(said, str | list):
        return ""
    return tidy(message_text(said), location, problems)


def _measure_last(chat: Chat, said: list[Message], record: Record, location: str, problems: Problems) -> None:
    """Give the last answer the usage of the record; a new turn if the messages end before that answer."""
    usage, cut = usage_of(record), finish_of(record) in CUT
    if usage.unreadable:
        raise Unusable(reasons.BAD_LENGTH)
    if said[-1].role == "assistant":
        ends_with_turn = bool(chat.turns) and chat.turns[-1].position == len(said) - 2
        if not ends_with_turn:
            return
    elif usage.tokens is not None:
        prompts = [message.text for message in said if message.role == "user"]
        if not prompts:
            raise Unusable(reasons.NO_ANSWER)
        before = prompts[-2] if len(prompts) > 1 else ""
        turn = next_turn(len(said) - 1, prompts[-1], before, len(prompts), History(), chat.answers)
        turn.num_tool_results = sum(message.num_results for message in said)
        turn.last_is_tool_result = said[-1].num_results > 0
        turn.context_chars = sum(len(message.text) for message in said) + len(_system(record, location, problems))
        chat.turns.append(turn)
    else:
        return
    last = chat.turns[-1]
    if usage.tokens is not None and (usage.tokens or last.answer is None):
        last.response_tokens, last.thought_tokens = usage.tokens, usage.thoughts
    last.censored = last.censored or cut
