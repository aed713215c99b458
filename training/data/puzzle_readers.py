"""From files of public repositories to answers: puzzles, mathematics, exams and the calls of an agent.

One function per form of file. The forms of `read_medagents` and `read_livecodebench` were not at hand: both are read
by the names that the repositories' own descriptions use.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mope.training.data.chat_readers import apart, count_of, of_response, text_of, thinks
from mope.training.data.public_readers import RecordedAnswer, RepositoryFile, id_of

LINEAGE_COLUMNS = (
    "problem_size", "relation_name", "correct_answer", "quiz", "model_name", "provider_name", "reasoning_effort",
    "system_prompt", "model_response",
)  # fmt: skip
_HIDES_THOUGHTS = ("o1", "o3", "deepseek-r1", "claude-3.7-sonnet-thinking")  # LLMs of the quizzes' early runs
_PLANS = ("[STATEMENT]", "[QUERY PROBLEM]")


def read_lineage_reasoning(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """A folder per LLM and size of quiz, with pairs of files `..._request.json` and `..._response.json`."""
    requests: dict[str, Mapping[str, Any]] = {}
    for file in files:
        if file.name.endswith("_request.json"):
            content = file.json()
            requests[file.name.removesuffix("_request.json")] = content if isinstance(content, Mapping) else {}
    for file in files:
        if not file.name.endswith("_response.json"):
            continue
        request = requests.get(file.name.removesuffix("_response.json"), {})
        messages = request.get("messages") or [{}]
        prompt = text_of(messages[-1].get("content"))
        temperature, cap = request.get("temperature"), request.get("max_tokens")
        size = file.name.split("/")[-2].rpartition("_")[2]
        yield of_response(
            file.json(),
            RecordedAnswer(
                prompt_id=id_of(prompt),
                prompt=prompt,
                target_llm=file.llm,
                text="",
                temperature=None if temperature is None else float(temperature),
                max_tokens=None if cap is None else int(cap),
                thinking=True,
                task=f"size={size}",
            ),
        )


def read_lineage_cot(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Tables without a header, see `LINEAGE_COLUMNS`; LLMs whose thoughts are hidden are left out."""
    later = {file.llm for file in files if file.name.endswith(("_128.csv", "_192.csv"))}  # of `read_lineage_reasoning`
    for file in files:
        if file.llm in later or file.llm.startswith(_HIDES_THOUGHTS):
            continue
        rows = csv.reader(io.StringIO(file.content.read_bytes().decode("utf-8", "replace"), newline=""))
        for cells in rows:
            if len(cells) != len(LINEAGE_COLUMNS):
                continue
            row = dict(zip(LINEAGE_COLUMNS, cells, strict=True))
            thoughts, text = apart(row["model_response"])
            yield RecordedAnswer(
                prompt_id=id_of(row["quiz"]),
                prompt=row["quiz"],
                target_llm=file.llm,
                text=text,
                thoughts=thoughts,
                thinking=True if thoughts else None,
                task=f"size={row['problem_size']}",
            )


def read_reasoning_gym(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """A file per LLM, difficulty and generator: `results` with a question and `completions`, or the best of them."""
    for file in files:
        parts = file.name.split("/")
        difficulty, generator = parts[-4], parts[-1].removesuffix(".json")
        llm = file.llm.rpartition("_20")[0].replace("_", "/", 1)
        if thinks(llm):  # hidden thoughts
            continue
        content = file.json()
        for record in (content.get("results") if isinstance(content, Mapping) else None) or ():
            yield from _completions(record, llm, f"{difficulty}/{generator}")


def read_math_samples(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """`categories` of `datasets` of `results`, each with a question and fifty `completions`."""
    for file in files:
        parts = file.name.split("/")
        for category in file.json().get("categories") or ():
            for dataset in category.get("datasets") or ():
                for record in dataset.get("results") or ():
                    for answer in _completions(record, f"llama-3b-instruct-rg-{file.llm}", parts[-3]):
                        yield replace(answer, temperature=0.6)


def _completions(record: Mapping[str, Any], llm: str, task: str) -> Iterator[RecordedAnswer]:
    question = text_of(record.get("question"))
    texts = [text_of(one.get("full_model_response")) for one in record.get("completions") or (record,)]
    for text in [text for text in texts if text] or [text_of(record.get("best_full_model_response"))]:
        yield RecordedAnswer(
            prompt_id=id_of(question), prompt=question, target_llm=llm, text=text, language="en", task=task
        )


def read_planbench(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """`instances` with a `query` and `llm_raw_response`; for some LLMs the whole OpenAI response is there, too."""
    for file in files:
        content = file.json()
        domain, _, rest = file.name.partition("results/")[2].partition("/")
        task = f"{domain}/{rest.rpartition('/')[2].removesuffix('.json')}"
        for record in (content.get("instances") if isinstance(content, Mapping) else None) or ():
            prompt = text_of(record.get("query"))
            plain = RecordedAnswer(
                prompt_id=id_of(prompt), prompt=prompt, target_llm=file.llm, text="", language="en", task=task
            )
            whole = next((one for one in record.values() if isinstance(one, Mapping) and "choices" in one), None)
            answer = of_response(whole, plain) if whole else plain
            thoughts, text = apart(text_of(record.get("llm_raw_response")) or answer.text)
            yield replace(answer, text=text, thoughts=thoughts or answer.thoughts)


def planbench_problem(prompt: str) -> str:
    """The problem of a prompt of PlanBench, without the domain and examples before it."""
    return prompt[max(0, *(prompt.rfind(mark) for mark in _PLANS)) :]


def read_tau(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Trajectories with `traj`, a list of messages: every call of the agent, in reply to the message before it."""
    for file in files:
        for record in file.records():
            task_id, trial = record.get("task_id"), record.get("trial", 0)
            messages = record.get("traj") or ()
            for number, message in enumerate(messages):
                if not number or message.get("role") != "assistant":
                    continue
                before = messages[number - 1]
                calls = [call["function"] for call in message.get("tool_calls") or () if "function" in call]
                called = [json.dumps({name: call.get(name) for name in ("name", "arguments")}) for call in calls]
                text = "\n".join(part for part in (text_of(message.get("content")), *called) if part)
                yield RecordedAnswer(
                    prompt_id=f"{task_id}:{trial}:{number}",
                    prompt=text_of(before.get("content")),
                    target_llm=file.llm,
                    text=text,
                    tools=True,
                    language="en",
                    task=f"{before.get('role')}->{'tool_call' if calls else 'text'}",
                    group=f"tau_airline/{task_id}",
                )


def read_aiw(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """A list of trials with `prompt` and `model_response`, whose lines were joined by spaces."""
    for file in files:
        for record in file.records():
            prompt = text_of(record.get("prompt"))
            yield RecordedAnswer(
                prompt_id=id_of(prompt),
                prompt=prompt,
                target_llm=text_of(record.get("model")),
                text=text_of(record.get("model_response")),
                language="en",
            )


def read_medagents(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Lists of questions with `options` and the recorded completion tokens; the template around them is not there."""
    for file in files:
        dataset, name = file.name.split("/")[-2:]
        llm, _, method = name.removesuffix(".json").rpartition("-")
        for record in file.records():
            options = record.get("options") or {}
            choices = "\n".join(f"{letter}. {option}" for letter, option in options.items())
            prompt = f"{text_of(record.get('question'))}\n\n{choices}".strip()
            usage = record.get("token_usage") or record.get("usage") or {}
            completion = count_of(usage.get("completion_tokens"))
            yield RecordedAnswer(
                prompt_id=id_of(prompt),
                prompt=prompt,
                target_llm=llm,
                text="",
                num_tokens=completion or None,
                completion_tokens=completion,
                thinking=thinks(llm),
                language="en",
                task=f"{dataset}/{method}",
                is_cut=False,
            )


def read_livecodebench(files: Sequence[RepositoryFile]) -> Iterator[RecordedAnswer]:
    """Lists of tasks with `question_content` and `code_list`; the thoughts of these LLMs are hidden."""
    for file in files:
        for record in file.records():
            task = "/".join(text_of(record.get(name)) for name in ("platform", "difficulty"))
            for text in (record.get("code_list") or record.get("output_list") or [""])[:1]:
                yield RecordedAnswer(
                    prompt_id=str(record.get("question_id")),
                    prompt=text_of(record.get("question_content")),
                    target_llm=file.llm,
                    text=text_of(text),
                    thinking=True,
                    language="en",
                    task=task,
                )
