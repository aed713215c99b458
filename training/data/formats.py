"""From a record of any known format to a chat: answers, and the turns that become rows.

Knows the columns and nesting of each format; does not know files, tokenizers or splits. A record that cannot be
used raises `Unusable` with the reason under which it is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mope.errors import DataError
from mope.reader import TOP_NAMES, is_forced, number, parsed, read_flags, read_messages
from mope.request import MAX_EARLIER_ANSWERS, ROLES, clean, content_of, message_text, role_of
from mope.token_estimate import estimate_tokens
from mope.training.data import problems as reasons
from mope.training.data.problems import Problems

Record = Mapping[str, Any]

PROMPT_COLUMNS = ("prompt", "instruction", "question", "query", "input")
ANSWER_COLUMNS = ("response", "output", "answer", "completion", "reply")
LENGTH_COLUMNS = ("response_tokens", "output_tokens", "completion_tokens")
GROUP_COLUMNS = ("conversation_id", "conversation_hash", "conv_id", "session_id")
ID_COLUMNS = ("id", "request_id", *GROUP_COLUMNS)
OF_LLM = ("target_llm", "llm_family", "llm_size", "llm_reasoning", "llm_year")

# what a reader of columns may load; everything else is left on disk
COLUMNS = TOP_NAMES.union(
    (*PROMPT_COLUMNS, *ANSWER_COLUMNS, *LENGTH_COLUMNS, *ID_COLUMNS, *GROUP_COLUMNS),
    ("conversation", "conversations", "messages", "request", "response", "usage", "choices", "finish_reason"),
    ("language", "dataset", "redacted", "censored"),
)
MODERATION_COLUMN = "openai_moderation"

_MAX_DIGITS = 9  # of the number of a piece of a conversation

KNOWN_FORMATS = {
    "lmsys": "conversation [{role, content}]",
    "sharegpt": "conversations [{from, value}]",
    "messages": "messages [{role, content}]",
    "pairs": "prompt and response (or instruction, question, query, input and output, answer, completion, reply)",
    "lengths": "prompt and response_tokens (or output_tokens, completion_tokens)",
    "logs": "prompt or messages and usage.completion_tokens, flat or under request and response",
}


class Unusable(Exception):
    """A record that gives no rows, and the reason it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, kw_only=True)
class Turn:
    """One answer that becomes a row.

    Attributes:
        position: of the user's message in the record.
        turn_index: of the turn in the whole conversation, 0 for its first.
        num_earlier_turns: answers before this one, known or not.
        num_known: how many of `Chat.answers` came before.
        response_tokens: length as the server recorded it; None: count `Chat.answers[num_known]`.
        censored: the record says that the answer was cut off.
    """

    position: int
    prompt: str
    previous_prompt: str
    turn_index: int
    num_earlier_turns: int
    num_known: int
    response_tokens: int | None = None
    censored: bool = False


@dataclass(slots=True, kw_only=True)
class Chat:
    """A conversation, or a piece of one: all answers whose text is known, and the turns to predict.

    `chat_id` and `group` (the conversation it is a piece of) are empty where the record has none; `first_prompt` is
    empty if the piece does not begin the conversation.
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
    flags: dict[str, Any] = field(default_factory=dict)  # of `Request`, as `mope.reader` read them

    def content_hash(self) -> int:
        """What makes two chats the same: prompts, answers, lengths and the LLM."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.flags.get("target_llm", ""), self.system, *self.answers):
            digest.update(part.encode() + b"\0")
        for turn in self.turns:
            digest.update(f"{turn.position} {turn.response_tokens} {turn.prompt}\0".encode())
        return int.from_bytes(digest.digest(), "big")


@dataclass(slots=True)
class History:
    """What was said before a piece of a conversation begins."""

    answers: list[str] = field(default_factory=list)  # the newest ones that are known, oldest first
    num_answers: int = 0
    num_prompts: int = 0
    last_prompt: str = ""
    system: str = ""


Normaliser = Callable[[Record, str], Chat]


def detect_format(records: Iterable[Record]) -> str | None:
    """The format of the first record that looks like any; None if none does."""
    return next((name for name in map(_looks_like, records) if name), None)


def unknown_format(source: str, records: Sequence[Record], asked: str) -> DataError:
    """The error that names the columns found and the formats known; `asked` is the format asked for, or auto."""
    columns = sorted({str(name) for record in records for name in record})
    found = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    known = "; ".join(f"{name}: {columns}" for name, columns in KNOWN_FORMATS.items())
    misfit = "fit no known format" if asked == "auto" else f"do not hold what the format {asked!r} needs"
    return DataError(f"{source}: columns {found or '(none)'} {misfit}; expected one of {known}")


def normaliser(data_format: str, problems: Problems, *, drop_redacted: bool, drop_flagged: bool) -> Normaliser:
    """The function that turns a record of `data_format` into a `Chat` or raises `Unusable`.

    It may keep state (ShareGPT cuts conversations into pieces that follow each other), so records must come in
    the order of the file, and each source needs its own.
    """
    normalisers: dict[str, Normaliser] = {
        "lmsys": lambda record, location: _messages(record, "conversation", location, problems),
        "sharegpt": ShareGPT(problems),
        "messages": lambda record, location: _messages(record, "messages", location, problems),
        "pairs": lambda record, location: _pair(record, location, problems),
        "lengths": lambda record, location: _lengths(record, location, problems),
        "logs": lambda record, location: _log(record, location, problems),
    }
    read = normalisers[data_format]

    def checked(record: Record, location: str) -> Chat:
        if drop_redacted and _is_true(record.get("redacted")):
            raise Unusable(reasons.REDACTED)
        if drop_flagged and _is_flagged(record.get(MODERATION_COLUMN)):
            raise Unusable(reasons.FLAGGED)
        chat = read(record, location)
        request = parsed(record.get("request"))
        said = request if isinstance(request, Mapping) else record
        if is_forced(said, 0) and is_forced(said, _measured(chat)):  # few need their length looked at
            raise Unusable(reasons.FORCED)
        return chat

    return checked


def _measured(chat: Chat) -> float:
    """Tokens of the last answer, which the record's flags are about; estimated where only its text is known."""
    turn = chat.turns[-1]
    if turn.response_tokens is not None:
        return turn.response_tokens
    return estimate_tokens(chat.answers[turn.num_known])


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
        messages = _role_texts(record.get("conversations"), location, self._problems)
        chat_id = _first_text(record, ID_COLUMNS)
        base, start = _base_and_start(chat_id)
        follows = start > 0 and base == self._base
        if follows and start == self._end:
            before = self._history
        elif follows and start == self._end - 1 and messages[0] == self._last_message:
            before = self._history
            if messages[0][0] == "assistant":  # said again as the first message of this piece
                before = History(
                    before.answers[:-1], before.num_answers - 1, before.num_prompts, before.last_prompt, before.system
                )
        else:
            before = History(num_answers=start // 2, num_prompts=(start + 1) // 2)  # who speaks alternates
        before.system = before.system or _text_or_none(record, "system") or ""
        chat = _pair_up(messages, location, before)
        _fill(chat, record)
        chat.group = base
        self._base, self._end, self._last_message = base, start + len(messages), messages[-1]
        num_new_answers = len(chat.answers) - len(before.answers)
        num_new_prompts = sum(role == "user" for role, _ in messages)
        prompts = [text for role, text in messages if role == "user"]
        self._history = History(
            chat.answers[-MAX_EARLIER_ANSWERS - 1 :],  # one more: the next piece may repeat the last
            before.num_answers + num_new_answers,
            before.num_prompts + num_new_prompts,
            prompts[-1] if prompts else before.last_prompt,
            chat.system,
        )
        return _with_turns(chat)


def _base_and_start(chat_id: str) -> tuple[str, int]:
    base, _, suffix = chat_id.rpartition("_")
    number = suffix.isascii() and suffix.isdigit() and len(suffix) <= _MAX_DIGITS
    return (base, int(suffix)) if base and number else (chat_id, 0)


def _messages(record: Record, column: str, location: str, problems: Problems) -> Chat:
    messages = _role_texts(record.get(column), location, problems)
    chat = _pair_up(messages, location, History(system=_text_or_none(record, "system") or ""))
    _fill(chat, record)
    measured = _usage_tokens(record)
    if measured is not None and (messages[-1][0] != "assistant" or _ends_with_turn(chat, messages)):
        _set_last(chat, messages, measured, _is_cut_off(record))
    elif _is_cut_off(record) and _ends_with_turn(chat, messages):
        chat.turns[-1].censored = True
    return _with_turns(chat)


def _log(record: Record, location: str, problems: Problems) -> Chat:
    request, response = parsed(record.get("request")), parsed(record.get("response"))
    request = request if isinstance(request, Mapping) else record
    response = response if isinstance(response, Mapping) else record
    messages = _asked(request, location, problems)
    if messages[-1][0] == "assistant" and len(messages) > 1:
        messages = messages[:-1]  # the answer was logged with the request; its length is what the server counted
    chat = _pair_up(messages, location, History())
    _fill(chat, request)
    chat.chat_id = _first_text(record, ID_COLUMNS) or _first_text(response, ID_COLUMNS)
    chat.group = _first_text(record, GROUP_COLUMNS) or _first_text(request, GROUP_COLUMNS) or chat.chat_id
    for said in (response, record):  # of the LLM; the request's own words go first
        chat.flags = {**{name: flag for name, flag in read_flags(said).items() if name in OF_LLM}, **chat.flags}
    measured = _usage_tokens(response)
    if measured is None:
        measured = _usage_tokens(record)
    if measured is None:
        raise Unusable(reasons.WRONG_COLUMNS)
    _set_last(chat, messages, measured, _is_cut_off(response) or _is_cut_off(record))
    turn = chat.turns[-1]
    chat.turns = [turn]  # earlier answers were requests of their own
    first = max(0, turn.num_known - MAX_EARLIER_ANSWERS)
    chat.answers, turn.num_known = chat.answers[first : turn.num_known], turn.num_known - first
    return chat


def _asked(request: Record, location: str, problems: Problems) -> list[tuple[str, str]]:
    """(role, text) of what was sent: as `mope.reader.read_messages` has it, or the text of a prompt column."""
    try:
        messages = [(message["role"], message_text(message["content"])) for message in read_messages(request)]
    except DataError as error:
        raise Unusable(reasons.WRONG_COLUMNS) from error
    if not any(ROLES[role] == "user" for role, _ in messages):
        if parsed(request.get("messages")):
            raise Unusable(reasons.WRONG_COLUMNS if not messages else reasons.NO_ANSWER)
        return [*_tidied(messages, location, problems), ("user", _text(request, PROMPT_COLUMNS, location, problems))]
    return _tidied(messages, location, problems)


def _tidied(messages: Iterable[tuple[str, str]], location: str, problems: Problems) -> list[tuple[str, str]]:
    return [(ROLES[role], tidy(text, location, problems)) for role, text in messages]


def _pair(record: Record, location: str, problems: Problems) -> Chat:
    prompt = _text(record, PROMPT_COLUMNS, location, problems)
    if record.get("prompt") is None and record.get("instruction") and (extra := _text_or_none(record, "input")):
        prompt = f"{prompt}\n\n{extra}"
    answer = _text(record, ANSWER_COLUMNS, location, problems)
    chat = _pair_up([("user", prompt), ("assistant", answer)], location, History())
    _fill(chat, record)
    chat.system = _text_or_none(record, "system") or ""
    chat.turns[0].censored = _is_cut_off(record)
    return chat


def _lengths(record: Record, location: str, problems: Problems) -> Chat:
    messages = [("user", _text(record, PROMPT_COLUMNS, location, problems))]
    column = next((name for name in LENGTH_COLUMNS if record.get(name) is not None), None)
    if column is None:
        raise Unusable(reasons.WRONG_COLUMNS)
    if any(isinstance(record.get(name), str) for name in ANSWER_COLUMNS):  # known, too: it finds re-shared answers
        messages.append(("assistant", _text(record, ANSWER_COLUMNS, location, problems)))
    chat = _pair_up(messages, location, History())
    _fill(chat, record)
    chat.system = _text_or_none(record, "system") or ""
    _set_last(chat, messages, _whole_number(record[column]), _is_cut_off(record))
    return chat


def _pair_up(messages: Sequence[tuple[str, str]], location: str, before: History) -> Chat:
    """Find the turns: a user's message with the assistant's right after it."""
    answers = list(before.answers)
    turns, first_prompt = [], ""
    systems = [before.system] if before.system else []
    num_prompts, previous_prompt = before.num_prompts, before.last_prompt
    for position, (role, text) in enumerate(messages):
        if role == "system":
            systems.append(text)
        elif role == "assistant":
            answers.append(text)
        elif role == "user":
            if num_prompts == 0 and not answers:
                first_prompt = text
            if position + 1 < len(messages) and messages[position + 1][0] == "assistant":
                num_earlier = before.num_answers + len(answers) - len(before.answers)
                turns.append(
                    Turn(
                        position=position,
                        prompt=text,
                        previous_prompt=previous_prompt,
                        turn_index=max(num_prompts, num_earlier),
                        num_earlier_turns=num_earlier,
                        num_known=len(answers),
                    )
                )
            num_prompts, previous_prompt = num_prompts + 1, text
    system = "\n".join(systems)
    return Chat(
        chat_id="", group="", location=location, answers=answers, turns=turns, first_prompt=first_prompt, system=system
    )


def _ends_with_turn(chat: Chat, messages: Sequence[tuple[str, str]]) -> bool:
    return bool(chat.turns) and chat.turns[-1].position == len(messages) - 2


def _set_last(chat: Chat, messages: Sequence[tuple[str, str]], response_tokens: int, censored: bool) -> None:
    """Give the last answer its measured length; a new turn if the messages end before that answer."""
    if messages[-1][0] != "assistant":
        prompts = [text for role, text in messages if role == "user"]
        if not prompts:
            raise Unusable(reasons.NO_ANSWER)
        chat.turns.append(
            Turn(
                position=len(messages) - 1,
                prompt=prompts[-1],
                previous_prompt=prompts[-2] if len(prompts) > 1 else "",
                turn_index=max(len(prompts) - 1, len(chat.answers)),
                num_earlier_turns=len(chat.answers),
                num_known=len(chat.answers),
            )
        )
    _with_turns(chat).turns[-1].response_tokens = response_tokens
    chat.turns[-1].censored = censored


def _with_turns(chat: Chat) -> Chat:
    if not chat.turns:
        raise Unusable(reasons.NO_ANSWER)
    return chat


def _fill(chat: Chat, record: Record) -> None:
    """What a record says about the conversation as a whole."""
    chat.chat_id = _first_text(record, ID_COLUMNS)
    chat.group = _first_text(record, GROUP_COLUMNS) or chat.chat_id
    chat.language = _text_or_none(record, "language")
    chat.dataset = _text_or_none(record, "dataset")
    chat.flags = read_flags(record)


def _usage_tokens(record: Record) -> int | None:
    usage = parsed(record.get("usage"))
    tokens = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    return _whole_number(tokens) if tokens is not None else None


def _is_cut_off(record: Record) -> bool:
    choices = parsed(record.get("choices"))
    choice = choices[0] if isinstance(choices, Sequence) and choices and isinstance(choices[0], Mapping) else {}
    return _is_true(record.get("censored")) or "length" in (record.get("finish_reason"), choice.get("finish_reason"))


def _role_texts(value: Any, location: str, problems: Problems) -> list[tuple[str, str]]:
    """(role, text) of each message, roles in OpenAI's words; ShareGPT's `from`/`value` are read, too."""
    value = parsed(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise Unusable(reasons.WRONG_COLUMNS)
    if not value:
        raise Unusable(reasons.NO_MESSAGES)
    messages = []
    for message in value:
        if not isinstance(message, Mapping):
            raise Unusable(reasons.WRONG_COLUMNS)
        role = role_of(message)
        try:
            text = message_text(content_of(message))
        except DataError as error:
            raise Unusable(reasons.WRONG_COLUMNS) from error
        if not isinstance(role, str):
            raise Unusable(reasons.WRONG_COLUMNS)
        messages.append((ROLES.get(role, role), tidy(text, location, problems)))
    return messages


def tidy(text: str, location: str, problems: Problems) -> str:
    """The text without NULs and lone surrogates, which neither Arrow nor tokenizers take; both are counted."""
    cleaned = clean(text)
    if cleaned is not text:
        if "\0" in text:
            problems.add(reasons.NUL_REMOVED, location)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            problems.add(reasons.BROKEN_TEXT, location)
    return cleaned


def _text(record: Record, columns: Sequence[str], location: str, problems: Problems) -> str:
    value = next((record[name] for name in columns if record.get(name) is not None), None)
    if not isinstance(value, str):
        raise Unusable(reasons.WRONG_COLUMNS)
    return tidy(value, location, problems)


def _text_or_none(record: Record, column: str) -> str | None:
    value = record.get(column)
    return _plain(value) if isinstance(value, str) and value else None


def _first_text(record: Record, columns: Sequence[str]) -> str:
    value = next((record[name] for name in columns if record.get(name) not in (None, "")), "")
    return _plain(str(value))


def _plain(text: str) -> str:
    """A name without NULs and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _whole_number(value: Any) -> int:
    count = number(value)
    if count is None or not count.is_integer() or not 0 <= count < 2**31:
        raise Unusable(reasons.BAD_LENGTH)
    return int(count)


def _is_true(value: Any) -> bool:
    return value is True or (isinstance(value, (int, float)) and value == 1) or str(value).lower() in ("true", "1")


def _is_flagged(moderation: Any) -> bool:
    moderation = parsed(moderation)
    if not isinstance(moderation, Sequence) or isinstance(moderation, str):
        return False
    return any(isinstance(verdict, Mapping) and _is_true(verdict.get("flagged")) for verdict in moderation)


def _looks_like(record: Record) -> str | None:
    has = {name for name, value in record.items() if value is not None}
    request = parsed(record.get("request"))
    if isinstance(request, Mapping):
        return "logs" if {"prompt", "messages", "input"} & set(request) else None
    if "conversation" in has:
        return "lmsys"
    if "conversations" in has:
        return "sharegpt"
    if "messages" in has:
        messages = parsed(record["messages"])
        last = messages[-1] if isinstance(messages, Sequence) and messages else {}
        answered = isinstance(last, Mapping) and last.get("role", last.get("from")) in ("assistant", "gpt")
        return "messages" if answered or "usage" not in has else "logs"
    if not has & set(PROMPT_COLUMNS):
        return None
    if "usage" in has:
        return "logs"
    if has & set(LENGTH_COLUMNS):
        return "lengths"
    return "pairs" if has & set(ANSWER_COLUMNS) else None
