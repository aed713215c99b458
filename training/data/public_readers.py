"""From the files of a public repository to answers: one small function per form of file.

Knows how each set writes down prompts, LLMs and answers, and what an answer that was cut off looks like; does not
know repositories, networks or tokenizers. A record without an answer is given with an empty text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mope.errors import DataError

UNFINISHED_SHARE = 0.7  # of a cap; the cap is in the LLM's tokens, the length in other, often fewer ones

_OPENAI = re.compile(r"gpt-[34]|chatgpt|o[13]-|text-davinci")  # at the beginning of a name
_PROSE_END = re.compile(r"[.!?)\]}\"'*`|\u2026\u3002\uff01\uff1f\u201d\u2019]\s*$")
_JSON_END = re.compile(r"\}\s*`*\s*$")
_END_MARK = re.compile(r"(?:<\|endoftext\|>|<\|im_end\|>|</s>)\s*$")
_STEERED = re.compile(r"length_|humor_|quality_|k50_creative|k50_serious")
_ZEROEVAL_QUESTION = re.compile(r"## Question:\s*(.*?)\s*## Instruction", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedAnswer:
    """What one LLM answered to one prompt.

    Attributes:
        text: the answer; empty where the file holds none.
        is_cut: True or False where the file shows that it was cut off or ended by itself; None if it does not say.
        temperature: 0.0 for greedy decoding; None if not recorded.
        max_tokens: the request's own cap, in tokens of the LLM; None if not recorded.
        num_tokens: of the answer as it was recorded, where its text is not; `text` is then empty.
        sizes: recorded tokens of several answers, where their texts are not known.
        thoughts: text of the thoughts, where it stands apart from the answer.
        thought_tokens: of the thoughts, as the API recorded it.
        completion_tokens: of all that was generated, as the API recorded it.
        has_difference: the thoughts are what `completion_tokens` has more than the answer.
        thinking: the LLM thought or not; None if nothing tells.
        tools: tools were offered.
        language: ISO 639-1.
        task: part of the set.
        history: texts of the conversation's earlier answers, oldest first.
        group: what decides the split, where it is not the prompt.
        castillo_split: CASTILLO's own split.
    """

    prompt_id: str
    prompt: str
    target_llm: str
    text: str
    is_cut: bool | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    num_tokens: int | None = None
    sizes: tuple[int, ...] = ()
    thoughts: str = ""
    thought_tokens: int | None = None
    completion_tokens: int | None = None
    has_difference: bool = False
    thinking: bool | None = None
    tools: bool | None = None
    language: str | None = None
    task: str | None = None
    history: tuple[str, ...] = ()
    group: str | None = None
    castillo_split: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text whose tokens are needed."""
        return (self.text, self.thoughts, *self.history)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of an answer."""
        return not self.text.strip() and self.num_tokens is None and not self.sizes


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """A file of a repository, unpacked.

    Attributes:
        name: its path in the repository.
        llm: the LLM that the path names; empty if it names none.
        content: where it lies.
    """

    name: str
    llm: str
    content: Path

    def json(self) -> Any:
        """The file as one JSON value.

        Raises:
            DataError: it is not JSON.
        """
        return self._parse(self.content.read_bytes())

    def records(self, *, lines: bool = False) -> Iterator[dict[str, Any]]:
        """The objects of a list, or one object per line where the name ends in .jsonl.

        Args:
            lines: one object per line, whatever the name.

        Raises:
            DataError: the file or a line is not JSON.
        """
        if lines or self.name.endswith(".jsonl"):
            with self.content.open("rb") as file:
                values = [self._parse(line) for line in file if line.strip()]
        else:
            values = self.json()
        yield from (value for value in values if isinstance(value, dict))

    def _parse(self, content: bytes) -> Any:
        try:
            return json.loads(content.decode("utf-8", "replace"), strict=False)
        except ValueError as error:
            raise DataError(f"{self.name} is not JSON: {error}") from error


Reader = Callable[[Sequence[RepositoryFile]], Iterator[RecordedAnswer]]


@dataclass(frozen=True, kw_only=True)
class CapRule:
    """When an answer counts as cut off by a cap of the LLM's own tokens, though its length is in other tokens.

    An LLM of OpenAI, whose tokens are nearly those that are counted, was cut off from one token before the cap on.
    Any other was if it has `sure_share` of the cap, or `unfinished_share` and does not end like a finished answer.

    Attributes:
        cap_of: the cap of an answer, None if there was none or it is not known.
        is_finished: whether a text ends like a finished answer.
    """

    cap_of: Callable[[RecordedAnswer], int | None]
    is_finished: Callable[[str], bool]
    unfinished_share: float = UNFINISHED_SHARE
    sure_share: float = 1.0

    def is_cut_off(self, answer: RecordedAnswer, num_tokens: int) -> bool:
        """Whether an answer of this many tokens would have been longer."""
        if answer.is_cut is not None:
            return answer.is_cut
        cap = self.cap_of(answer)
        if cap is None:
            return False
        if _OPENAI.match(answer.target_llm):
            return num_tokens >= cap - 1
        if num_tokens >= self.sure_share * cap:
            return True
        return num_tokens >= self.unfinished_share * cap and not self.is_finished(answer.text)


def ends_like_prose(text: str) -> bool:
    """Ends in punctuation, a closing bracket or quote, a code fence or a table."""
    return _PROSE_END.search(text) is not None


def ends_like_json(text: str) -> bool:
    """Ends with a closed JSON object, in a code fence or not."""
    return _JSON_END.search(text) is not None


def ends_with_box(text: str) -> bool:
    r"""A `\boxed` result in the last 400 characters."""
    return "\\boxed" in text[-400:]


def id_of(prompt: str) -> str:
    """The first 12 hexadecimal digits of the prompt's sha1, where a set has no ids of its own."""
    return hashlib.sha1(prompt.encode("utf-8", "replace")).hexdigest()[:12]


def zeroeval_question(prompt: str) -> str:
    """The question of a ZeroEval prompt, without the template around it; the whole prompt if it has none."""
    found = _ZEROEVAL_QUESTION.search(prompt)
    return found.group(1) if found else prompt


def read_just_eval(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """A list of `instruction` and `output` per LLM; the LLM is what `generator` says, else the file's name."""
    for file in files:
        for record in file.records():
            generator, text = str(record.get("generator", "")), _text(record.get("output"))
            named, _, settings = generator.partition(".p=")  # "zephyr-7b-beta.p=1.0.t=0.0"
            yield RecordedAnswer(
                prompt_id=str(record.get("id")),
                prompt=_text(record.get("instruction")),
                target_llm=named if settings and "/" not in named else file.llm,
                text=text,
                is_cut=True if text.endswith("... (truncated)") else None,
            )


def read_arena_hard(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """`question.jsonl` with the first turn of each prompt, and a file of answers per LLM."""
    prompts: dict[str, str] = {}
    for file in files:
        if not file.llm:
            for record in file.records():
                prompts[str(record.get("question_id"))] = _content(record)
    for file in files:
        if file.llm:
            for record in file.records():
                prompt_id, choices = str(record.get("question_id")), record.get("choices")
                text = _content(choices[0]) if choices else ""
                yield RecordedAnswer(
                    prompt_id=prompt_id, prompt=prompts.get(prompt_id, ""), target_llm=file.llm, text=text
                )


def read_zeroeval(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """A list per LLM with the prompt in `chat_history` and the answer in `output`, each a list of one text."""
    for file in files:
        for record in file.records():
            yield RecordedAnswer(
                prompt_id=str(record.get("id", record.get("session_id"))),
                prompt=_first(record.get("chat_history")),
                target_llm=file.llm,
                text=_first(record.get("output")),
            )


def read_skythought(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Lines with a `question` and, in `code`, a list of answers."""
    for file in files:
        for record in file.records():
            prompt = _text(record.get("question"))
            for text in record.get("code") or [""]:
                yield RecordedAnswer(prompt_id=id_of(prompt), prompt=prompt, target_llm=file.llm, text=_text(text))


def read_oasst(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Reports with a list of prompts, each with answers under several sampling settings.

    Settings that tell the LLM something the prompt does not show (a length, humour, quality, a character) are left
    out. Caps are those of open LLMs (`max_new_tokens`); what the reports give for services is not what they kept to.
    """
    for file in files:
        report = file.json()
        if not isinstance(report, dict):
            continue
        llm = _text(report.get("model_name")) or Path(file.name).stem
        for entry in report.get("prompts") or ():
            prompt = _text(entry.get("prompt"))
            for result in entry.get("results") or ():
                if _STEERED.match(str(result.get("sampling_config"))):
                    continue
                sampling = result.get("sampling_params") or {}
                temperature = 0.0 if sampling.get("do_sample") is False else sampling.get("temperature")
                answer = RecordedAnswer(
                    prompt_id=id_of(prompt),
                    prompt=prompt,
                    target_llm=llm,
                    text="",
                    temperature=None if temperature is None else float(temperature),
                    max_tokens=sampling.get("max_new_tokens"),
                )
                for output in result.get("outputs") or ():
                    text, num_marks = _END_MARK.subn("", _text(output))
                    yield replace(answer, text=text, is_cut=False if num_marks else None)


def read_gpteacher(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """A list of `instruction`, `input` and `response`; the files say nothing of the LLM but "GPT-4"."""
    for file in files:
        for record in file.records():
            parts = (_text(record.get("instruction")), _text(record.get("input")))
            prompt = "\n\n".join(part for part in parts if part)
            yield RecordedAnswer(
                prompt_id=id_of(prompt), prompt=prompt, target_llm="gpt-4", text=_text(record.get("response"))
            )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _first(value: Any) -> str:
    if isinstance(value, list):
        value = value[0] if value else ""
    return _text(value)


def _content(record: dict[str, Any]) -> str:
    turns = record.get("turns") or [{}]
    return _text(turns[0].get("content"))
