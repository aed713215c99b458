"""A conversation on its way to rows: its answers, the turns to predict, and what each answer's length is made of.

Finds the answers among messages. Columns of formats, files, tokenizers and splits are elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mope.errors import DataError
from mope.log_answers import LoggedAnswer, message_answer
from mope.log_records import GROUP_COLUMNS, ID_COLUMNS
from mope.reader import parsed
from mope.request import ROLES, clean, content_of, message_text, results_in, role_of
from mope.training.data import problems as reasons
from mope.training.data.problems import Problems

Record = Mapping[str, Any]

_END_OF_THOUGHTS = "</think>"


class Unusable(Exception):
    """A record that gives no rows, and the reason it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, kw_only=True)
class Turn:
    """One answer that becomes a row.

    Attributes:
        position: of the message that is answered, in the record.
        choice: number of the answer, where a request got several.
        turn_index: of the turn in the whole conversation, 0 for its first.
        num_earlier_turns: answers before this one, known or not.
        num_known: how many of `Chat.answers` came before.
        num_tool_results: results of tools before the answer, as far as they are known.
        last_is_tool_result: whether the answer follows a result of a tool.
        context_chars: characters of all messages before the answer, as far as they are known.
        answer: visible text of the answer; None: not known.
        thoughts: text of its reasoning, where it stands apart from the answer.
        calls: its tool calls as text.
        response_tokens: length as the server recorded it; None: count answer, thoughts and calls.
        thought_tokens: how many of them are thoughts, as the server recorded it.
        token_unit: whose tokens `response_tokens` are, where the source says so; else the LLM's own.
        samples: lengths of several answers to the same request, `response_tokens` their median; empty for one.
        censored: the record says that the answer was cut off.
    """

    position: int
    prompt: str
    previous_prompt: str
    turn_index: int
    num_earlier_turns: int
    num_known: int
    num_tool_results: int = 0
    last_is_tool_result: bool = False
    context_chars: int = 0
    choice: int = 0
    answer: str | None = None
    thoughts: str = ""
    calls: str = ""
    response_tokens: int | None = None
    thought_tokens: int | None = None
    token_unit: str | None = None
    samples: tuple[int, ...] = ()
    censored: bool = False

    def texts(self) -> tuple[str, ...]:
        """The texts whose tokens together are what was generated."""
        return tuple(text for text in (self.answer, self.thoughts, self.calls) if text)

    def thoughts_inside(self) -> str:
        """The part of the answer's text up to the end of its thoughts; empty if it has none."""
        if not self.answer or _END_OF_THOUGHTS not in self.answer:
            return self.answer if self.answer and self.answer.lstrip().startswith("<think>") else ""
        return self.answer[: self.answer.rindex(_END_OF_THOUGHTS) + len(_END_OF_THOUGHTS)]


@dataclass(slots=True, kw_only=True)
class Chat:
    """A conversation, or a piece of one: all answers whose text is known, and the turns to predict.

    `chat_id` and `group` (the conversation it is a piece of) are empty where the record has none; `first_prompt` is
    empty if the piece does not begin the conversation. `answer_tokens` are the lengths of earlier answers whose text
    is not known, in place of `answers`. `split` is the chat's own, empty where the split rule decides.
    """

    chat_id: str
    group: str
    location: str
    answers: list[str]
    turns: list[Turn]
    first_prompt: str = ""
    system: str = ""
    language: str | None = None
    dataset: str | None = None
    task: str | None = None
    split: str = ""
    answer_tokens: tuple[int, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)  # of `Request`, as `mope.reader` read them
    family: str = ""  # of the log that it is from, as `mope.log_records` has it

    def content_hash(self) -> int:
        """What makes two chats the same: prompts, answers, lengths and the LLM."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.flags.get("target_llm", ""), self.system, *self.answers):
            digest.update(part.encode() + b"\0")
        for turn in self.turns:
            digest.update(f"{turn.position} {turn.response_tokens} {turn.prompt}\0".encode())
            known = self.answers[turn.num_known] if turn.num_known < len(self.answers) else None
            for text in turn.texts():
                if text != known:
                    digest.update(text.encode() + b"\1")
        return int.from_bytes(digest.digest(), "big")

    def texts(self) -> Iterator[str]:
        """Every text whose tokens are needed."""
        yield from self.answers
        for turn in self.turns:
            if turn.response_tokens is None:
                yield from turn.texts()
            elif turn.thoughts and turn.thought_tokens is None:
                yield turn.thoughts
            if turn.thought_tokens is None and (inside := turn.thoughts_inside()):
                yield inside


@dataclass(slots=True)
class History:
    """What was said before a piece of a conversation begins."""

    answers: list[str] = field(default_factory=list)  # the newest ones that are known, oldest first
    num_answers: int = 0
    num_prompts: int = 0
    num_chars: int = 0  # of all messages but the system prompt, as far as they are known
    last_prompt: str = ""
    system: str = ""


class Message(NamedTuple):
    """One message: who speaks in OpenAI's words, its text as a later request carries it, and what was generated.

    `num_results` are the results of tools in it.
    """

    role: str
    text: str
    answer: LoggedAnswer | None = None
    num_results: int = 0


def read_messages_of(value: Any, location: str, problems: Problems) -> list[Message]:
    """The messages of a conversation; ShareGPT's `from` and `value` are read, too.

    Raises:
        Unusable: it is no list of messages, or an empty one.
    """
    value = parsed(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise Unusable(reasons.WRONG_COLUMNS)
    if not value:
        raise Unusable(reasons.NO_MESSAGES)
    messages = []
    for message in value:
        if not isinstance(message, Mapping):
            raise Unusable(reasons.WRONG_COLUMNS)
        said = role_of(message)
        try:
            raw = message_text(content_of(message))
        except DataError as error:
            raise Unusable(reasons.WRONG_COLUMNS) from error
        if not isinstance(said, str):
            raise Unusable(reasons.WRONG_COLUMNS)
        role, text = ROLES.get(said, said), tidy(raw, location, problems)
        answer = None
        if role == "assistant":
            answer = LoggedAnswer(text) if len(message) == 2 and isinstance(content_of(message), str) else None
            answer = answer or tidied(message_answer(message), raw, text, location, problems)
        elif said not in ROLES:
            problems.add(reasons.OTHER_SPEAKER, location)
        messages.append(Message(role, text, answer, results_in(message, role)))
    return messages


def tidied(answer: LoggedAnswer, raw: str | None, text: str, location: str, problems: Problems) -> LoggedAnswer:
    """An answer with clean texts; `text` is its clean text where that was `raw`."""
    visible = answer.text
    if visible is not None:
        visible = text if visible == raw else tidy(visible, location, problems)
    thoughts, calls = (tidy(said, location, problems) if said else "" for said in (answer.thoughts, answer.calls))
    return answer._replace(text=visible, thoughts=thoughts, calls=calls)


def pair_up(
    messages: Sequence[Message], location: str, before: History, problems: Problems, *, repeated: bool = False
) -> Chat:
    """Find the turns: an assistant's message right after one of a user or of a tool.

    Other messages of the assistant are no rows: they are counted, except a first one that was `repeated`.
    """
    answers = list(before.answers)
    turns: list[Turn] = []
    first_prompt = ""
    systems = [before.system] if before.system else []
    num_prompts, prompt, previous_prompt = before.num_prompts, before.last_prompt, ""
    last_role, num_results, last_results = None, 0, 0
    num_chars = before.num_chars + len(before.system)
    for position, (role, text, answer, results) in enumerate(messages):
        if role == "system":
            systems.append(text)
        elif role == "assistant":
            if num_prompts and last_role in ("user", "tool"):
                turn = next_turn(position - 1, prompt, previous_prompt, num_prompts, before, answers)
                turn.num_tool_results, turn.last_is_tool_result = num_results, last_results > 0
                turn.context_chars = num_chars
                turns.append(_with_answer(turn, answer or LoggedAnswer(text), location, problems))
            elif position or not repeated:
                problems.add(reasons.STRAY_ANSWER, location)
            answers.append(text)
        elif role == "user":
            if num_prompts == 0 and not answers:
                first_prompt = text
            num_prompts, previous_prompt, prompt = num_prompts + 1, prompt, text
        last_role, last_results = role, results
        num_results, num_chars = num_results + results, num_chars + len(text)
    return Chat(
        chat_id="", group="", location=location, answers=answers, turns=turns, first_prompt=first_prompt,
        system="\n".join(systems),
    )  # fmt: skip


def next_turn(
    position: int, prompt: str, previous_prompt: str, num_prompts: int, before: History, answers: Sequence[str]
) -> Turn:
    """The turn whose answer comes after `answers`, in reply to the message at `position`."""
    num_earlier = before.num_answers + len(answers) - len(before.answers)
    return Turn(
        position=position,
        prompt=prompt,
        previous_prompt=previous_prompt,
        turn_index=max(num_prompts - 1, num_earlier),
        num_earlier_turns=num_earlier,
        num_known=len(answers),
    )


def _with_answer(turn: Turn, answer: LoggedAnswer, location: str, problems: Problems) -> Turn:
    """A turn with an answer of a conversation; recorded usage of the message goes before its text."""
    turn.answer, turn.thoughts, turn.calls = answer.text, answer.thoughts, answer.calls
    turn.censored = answer.cut
    if answer.usage.unreadable:
        problems.add(reasons.BAD_LENGTH_COUNTED, location)
    if answer.usage.tokens:
        turn.response_tokens, turn.thought_tokens = answer.usage.tokens, answer.usage.thoughts
    elif answer.hidden:
        turn.answer = None  # its length cannot be told
    return turn


def with_turns(chat: Chat) -> Chat:
    """The chat itself.

    Raises:
        Unusable: it has no turns.
    """
    if not chat.turns:
        raise Unusable(reasons.NO_ANSWER)
    return chat


def fill(chat: Chat, record: Record) -> None:
    """What a record says about the conversation as a whole, apart from flags of the request."""
    chat.chat_id = first_text(record, ID_COLUMNS)
    chat.group = first_text(record, GROUP_COLUMNS) or chat.chat_id
    chat.language = text_or_none(record, "language")
    chat.dataset = text_or_none(record, "dataset")


def tidy(text: str, location: str, problems: Problems) -> str:
    """The text without NULs and lone surrogates, which neither Arrow nor tokenizers take; both are counted."""
    cleaned = clean(text)
    if cleaned is not text:
        if "\0" in text:
            problems.add(reasons.NUL_REMOVED, location)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            problems.add(reasons.BROKEN_TEXT, location)
    return cleaned


def text_or_none(record: Record, column: str) -> str | None:
    """A short text of a record, clean; None if there is none."""
    value = record.get(column)
    return _plain(value) if isinstance(value, str) and value else None


def first_text(record: Record, columns: Sequence[str]) -> str:
    """The first of some columns that says something, as text; empty if none does."""
    value = next((record[name] for name in columns if record.get(name) not in (None, "")), "")
    return _plain(str(value))


def _plain(text: str) -> str:
    """A name without NULs and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()
