"""From files of public repositories to answers: chats, questions and work prompts put to LLMs of 2024 to 2026.

One function per form of file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mope.target_llm import describe
from mope.training.data import splits
from mope.training.data.public_readers import RecordedAnswer, RepositoryFile, id_of, read_arena_hard

LONGEST_SAMPLE = 14_998  # of CASTILLO: longer ones never ended
LONG_SAMPLE = 8_499  # nor did longer ones than this, where lengths scatter far more than their mean
_TRANSLATED = ("zh_", "fi_")  # of SpeechMap's categories


def text_of(value: Any) -> str:
    """The value if it is a text, else an empty one."""
    return value if isinstance(value, str) else ""


def count_of(value: Any) -> int | None:
    """The value if it is a whole number that is not negative, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def group_of_text(text: str) -> str:
    """The group of a prompt by the rule of `public.group_of`."""
    key = splits.norm(text)[: splits.PROMPT_KEY_CHARS]
    return hashlib.sha1(key.encode("utf-8", "replace")).hexdigest()


def thinks(llm: str) -> bool | None:
    """True for an LLM whose name says that it thinks; else nothing is known."""
    return True if describe(llm).thinking else None


def read_castillo(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Lists of records with `prompt_text` and `output_sizes`, up to ten samples in the LLM's own tokens.

    Samples that never ended are dropped, as CASTILLO's paper does: from 14,999 tokens on, and above 8,499 where the
    standard deviation is more than twice the mean.
    """
    for file in files:
        split = file.name.split("/")[-2]
        for record in file.records():
            sizes = [size for size in record.get("output_sizes") or () if count_of(size)]
            scattered = float(record.get("output_std") or 0) > 2 * float(record.get("output_mean") or 0)
            most = LONG_SAMPLE if scattered else LONGEST_SAMPLE
            yield RecordedAnswer(
                prompt_id=str(record.get("prompt_id")),
                prompt=text_of(record.get("prompt_text")),
                target_llm=text_of(record.get("model")).replace("--", "/", 1),
                text="",
                sizes=tuple(size for size in sizes if size <= most),
                temperature=record.get("temp"),
                task=text_of(record.get("dataset")) or None,
                castillo_split=split,
                is_cut=False,
            )


def arena_hard_in(language: str, *, hides_thoughts: bool = False) -> Callable[..., Iterator[RecordedAnswer]]:
    """A reader of files like those of arena-hard, whose questions are in a language.

    Args:
        language: ISO 639-1.
        hides_thoughts: LLMs whose names say that they think did so, and only their visible answer is there.
    """

    def read(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
        for answer in read_arena_hard(files):
            yield replace(answer, language=language, thinking=thinks(answer.target_llm) if hides_thoughts else None)

    return read


def read_benchpress(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """`evals/default.json` with the prompts, and a file per LLM with a list of runs under each prompt's id.

    The thoughts of reasoning LLMs are what the recorded usage has more than the answer. APIs that leave them out of
    the usage are told by a usage that is no longer than the answer: their thoughts are hidden.
    """
    prompts: dict[str, tuple[str, str]] = {}
    for file in files:
        if not file.llm:
            for record in file.json().get("prompts") or ():
                prompts[str(record.get("id"))] = text_of(record.get("prompt")), text_of(record.get("category"))
    for file in files:
        if not file.llm:
            continue
        for prompt_id, run in _runs(file.json()):
            prompt, category = prompts.get(prompt_id, ("", ""))
            thought = describe(file.llm).thinking
            yield RecordedAnswer(
                prompt_id=prompt_id,
                prompt=prompt,
                target_llm=file.llm,
                text=text_of(run.get("content")),
                completion_tokens=count_of(run.get("output_tokens")),
                has_difference=bool(thought),
                thinking=True if thought else None,
                language="en",
                task=category or None,
            )


def _runs(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every run in a file, with the id of its prompt: lists of runs lie under the ids, at some depth."""
    if not isinstance(content, Mapping):
        return
    for name, inner in content.items():
        if isinstance(inner, list):
            yield from ((name, run) for run in inner if isinstance(run, Mapping) and "content" in run)
        else:
            yield from _runs(inner)


def read_speechmap(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Lines with a `question` and an OpenAI `response`; a translation has the split of its English original."""
    originals: dict[str, str] = {}
    for file in files:
        for record in file.records():
            if not text_of(record.get("category")).startswith(_TRANSLATED):
                originals.setdefault(str(record.get("question_id")), text_of(record.get("question")))
    for file in files:
        for record in file.records():
            category, question_id = text_of(record.get("category")), str(record.get("question_id"))
            is_translated = category.startswith(_TRANSLATED)
            prompt = text_of(record.get("question"))
            yield of_response(
                record.get("response"),
                RecordedAnswer(
                    prompt_id=f"{category}:{question_id}",
                    prompt=prompt,
                    target_llm=text_of(record.get("model")),
                    text="",
                    language=category[:2] if is_translated else "en",
                    task=category,
                    group=group_of_text(originals.get(question_id, prompt)) if is_translated else None,
                ),
            )


def of_response(response: Any, answer: RecordedAnswer) -> RecordedAnswer:
    """The answer with what an OpenAI response says: text, thoughts, usage, and whether it was cut off."""
    choices = response.get("choices") if isinstance(response, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    message = choice.get("message") or {}
    usage = (response.get("usage") if isinstance(response, Mapping) else None) or {}
    details = usage.get("completion_tokens_details") or {}
    thoughts = text_of(message.get("reasoning")) or text_of(message.get("reasoning_content"))
    thought_tokens = count_of(details.get("reasoning_tokens")) or None  # APIs say 0 where they do not count them
    finish = choice.get("finish_reason")
    return replace(
        answer,
        text=text_of(message.get("content")),
        thoughts=thoughts,
        thought_tokens=thought_tokens,
        completion_tokens=count_of(usage.get("completion_tokens")),
        thinking=True if thoughts or thought_tokens else answer.thinking,
        is_cut=None if finish is None else finish == "length",
    )


def read_misguided(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """`results` with a prompt, an LLM, a list of outputs and, for some LLMs, a list of their thoughts."""
    for file in files:
        content = file.json()
        for record in (content.get("results") if isinstance(content, Mapping) else content) or ():
            llm, thoughts = text_of(record.get("llm")), record.get("thinking") or []
            outputs = record.get("output") or []
            for number, text in enumerate(outputs if isinstance(outputs, list) else [outputs]):
                thought = text_of(thoughts[number]) if isinstance(thoughts, list) and number < len(thoughts) else ""
                yield RecordedAnswer(
                    prompt_id=str(record.get("prompt_id")),
                    prompt=text_of(record.get("prompt")),
                    target_llm=llm,
                    text=text_of(text),
                    thoughts=thought if thought.strip() else "",
                    thinking=True if thought.strip() else False if thought else thinks(llm),
                )


def read_shaberi(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Lines with `Question` and `ModelAnswer`, the LLM in the file's name; thoughts may begin the answer."""
    for file in files:
        task = file.name.split("/")[-2]
        for record in file.records(lines=True):
            prompt = text_of(record.get("Question"))
            thoughts, text = apart(text_of(record.get("ModelAnswer")))
            yield RecordedAnswer(
                prompt_id=f"{task.partition('__')[2]}:{id_of(prompt)[:10]}",
                prompt=prompt,
                target_llm=file.llm,
                text=text,
                thoughts=thoughts,
                thinking=True if thoughts else thinks(file.llm),
                language="ja",
                task=task,
            )


def apart(text: str) -> tuple[str, str]:
    """Thoughts between `<think>` and `</think>`, and the answer after them."""
    thoughts, mark, answer = text.rpartition("</think>")
    return (thoughts.replace("<think>", "", 1).strip(), answer.strip()) if mark else ("", text)


def read_complexbench(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Lines with `instruction` and `generated`."""
    for file in files:
        for record in file.records():
            yield RecordedAnswer(
                prompt_id=str(record.get("main_id")),
                prompt=text_of(record.get("instruction")),
                target_llm=file.llm,
                text=text_of(record.get("generated")),
                language="zh",
            )


def read_bullshit(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Files of questions, and lines with a question's id, `response_text` and the usage that was recorded.

    The name of an LLM says at which effort it was asked: `vendor/llm@reasoning=low`.
    """
    prompts: dict[str, str] = {}
    for file in files:
        if not file.name.endswith(".jsonl"):
            prompts.update(_questions(file.json()))
    seen: set[tuple[str, str]] = set()
    for file in files:
        for record in file.records() if file.name.endswith(".jsonl") else ():
            llm, prompt_id = text_of(record.get("model")), str(record.get("question_id"))
            if (prompt_id, llm) in seen:  # aggregates repeat what responses hold
                continue
            seen.add((prompt_id, llm))
            thought_tokens = count_of(record.get("response_reasoning_tokens"))
            finish = record.get("response_finish_reason")
            yield RecordedAnswer(
                prompt_id=prompt_id,
                prompt=prompts.get(prompt_id, ""),
                target_llm=llm,
                text=text_of(record.get("response_text")),
                completion_tokens=count_of(record.get("response_completion_tokens")),
                thought_tokens=thought_tokens or None,
                thinking=None if thought_tokens is None else thought_tokens > 0,
                is_cut=None if finish is None else finish == "length",
                language="en",
            )


def _questions(content: Any) -> Iterator[tuple[str, str]]:
    """Ids and texts of the questions, at whatever depth they stand."""
    if isinstance(content, Mapping) and isinstance(content.get("question"), str):
        yield str(content.get("id")), content["question"]
    elif isinstance(content, Mapping | list):
        for inner in content.values() if isinstance(content, Mapping) else content:
            yield from _questions(inner)


def read_spiral(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Run -> file of prompts -> chat -> a list with one `transcript`; each answer is a turn with its history.

    All turns of a chat, of whatever LLM, have the split of its first message.
    """
    for file in files:
        for run, chat in _transcripts(file.json(), ""):
            answers: list[str] = []
            messages = [message for message in chat["transcript"] if isinstance(message, Mapping)]
            chat_id, prompt = text_of(chat.get("prompt_id")), ""
            first = next((text_of(message.get("content")) for message in messages if message.get("role") == "user"), "")
            for number, message in enumerate(messages):
                text = text_of(message.get("content"))
                if message.get("role") == "user":
                    prompt = text
                elif message.get("role") == "assistant":
                    yield RecordedAnswer(
                        prompt_id=f"{chat_id}:{run}:{number}",
                        prompt=prompt,
                        target_llm=text_of(chat.get("evaluated_model")),
                        text=text,
                        language="en",
                        task=f"turn={len(answers)}",
                        history=tuple(answers),
                        group=group_of_text(first),
                    )
                    answers.append(text)


def _transcripts(content: Any, run: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The number of the run, which is the outermost name, and every chat in it."""
    if isinstance(content, Mapping) and isinstance(content.get("transcript"), list):
        yield run, content
    elif isinstance(content, Mapping | list):
        for name, inner in content.items() if isinstance(content, Mapping) else ((run, each) for each in content):
            yield from _transcripts(inner, run or name)
