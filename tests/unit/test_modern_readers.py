"""Readers of the public sets of LLMs of 2024 to 2026, on made-up files of each set's form."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mope.training.data import public_fetch, splits
from mope.training.data.build import build_rows
from mope.training.data.chat_readers import apart, group_of_text
from mope.training.data.config import DataConfig
from mope.training.data.modern_sets import MODERN_SETS
from mope.training.data.public_fetch import path_of
from mope.training.data.public_readers import RecordedAnswer, RepositoryFile
from mope.training.data.public_sets import PUBLIC_SETS, PublicSet, public_sets
from mope.training.data.puzzle_readers import planbench_problem
from mope.training.licences import data_licences

SETS = {public.name: public for public in MODERN_SETS}


class Words:
    """Counts words."""

    name = identity = "words"

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def openai(text: str, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """A response; `more` are fields of the message, `usage` of the whole."""
    usage = more.pop("usage", {"completion_tokens": 7})
    return {"choices": [{"finish_reason": finish, "message": {"content": text, **more}}], "usage": usage}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[RecordedAnswer]]:
    """The answers of a set in some files; files that the set does not read are passed over."""

    def call(name: str, files: dict[str, str]) -> list[RecordedAnswer]:
        public, found = SETS[name], []
        for number, (path, content) in enumerate(sorted(files.items())):
            match = public.files.fullmatch(path)
            if match:
                (tmp_path / str(number)).write_text(content, encoding="utf-8")
                found.append(RepositoryFile(path, match.groupdict().get("llm") or "", tmp_path / str(number)))
        return list(public.read(found))

    return call


# --- the list of sets -------------------------------------------------------------------------------------------------


def test_only_sets_whose_licence_allows_training_are_listed() -> None:
    listed = public_sets(MODERN_SETS)
    assert len(listed) == 23
    for each in listed:
        assert each["licence"] in ("MIT", "Apache-2.0", "CC0-1.0")
        assert re.fullmatch(r"[0-9a-f]{7,40}", each["commit"])
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", each["repository"])
        assert each["about"]


def test_a_card_names_every_set_of_a_source() -> None:
    said = data_licences(["sharegpt", "public-lengths", "modern-lengths", "castillo", "own.jsonl"])
    assert sum(line.startswith("`castillo` ") for line in said) == 2
    assert any(line.startswith("`misguided` ") and line.endswith("; CC0-1.0.") for line in said)
    assert not any("livecodebench" in line for line in said)
    assert said.count(said[-1]) == 1
    assert said[-1].startswith("Many of these answers")


@pytest.mark.parametrize("public", MODERN_SETS, ids=lambda public: public.name)
def test_no_set_reads_what_others_are_made_of(public: PublicSet) -> None:
    assert not public.files.fullmatch("README.md")
    assert not public.files.fullmatch("data/ko-arena-hard-v0.1/model_judgment/gpt-4/o1.jsonl")


# --- chats and questions ----------------------------------------------------------------------------------------------


def castillo(sizes: list[int], mean: float = 10.0, std: float = 1.0) -> dict[str, Any]:
    return {
        "prompt_id": "b3b4", "model": "Qwen--Qwen2.5-14B-Instruct", "dataset": "Mbpp", "prompt_text": "Write --it",
        "output_sizes": sizes, "output_mean": mean, "output_std": std, "temp": 0.7, "longest_response": "long",
    }  # fmt: skip


def test_castillo(read: Any) -> None:
    records = [castillo([5, 9, 14_999, 14_998, 9000]), castillo([5, 9000], 10.0, 21.0), castillo([15_000])]
    found = read("castillo", {"data/preprocessed/validate/preproc_Mbpp_validate_Qwen--Q.json": json.dumps(records)})
    assert [answer.sizes for answer in found] == [(5, 9, 14_998, 9000), (5,), ()]
    first = found[0]
    assert (first.target_llm, first.prompt, first.task) == ("Qwen/Qwen2.5-14B-Instruct", "Write --it", "Mbpp")
    assert (first.castillo_split, first.temperature, first.is_empty) == ("validate", 0.7, False)
    assert found[2].is_empty


@pytest.mark.parametrize(
    ("name", "folder", "language", "thinking"),
    [
        ("arena_hard_ko", "data/ko-arena-hard-v0.1", "ko", True),
        ("arena_hard_el", "data/arena-hard-v0.1", "el", True),
        ("arena_hard_ru", "data/arena-hard-v0.1", "ru", None),
        ("arena_hard_ru_orig", "data/arena-hard-orig", "ru", None),
        ("arena_hard_v0.1_more", "data/arena-hard-v0.1", "en", None),
        ("arena_logs_ru", "data/arena-hard-auto/arena-hard-logs-v3", "ru", None),
    ],
)
def test_arena_hard(read: Any, name: str, folder: str, language: str, thinking: bool | None) -> None:
    answer = {"question_id": "0122", "choices": [{"index": 0, "turns": [{"content": "그래요."}]}]}
    files = {
        f"{folder}/question.jsonl": lines({"question_id": "0122", "turns": [{"content": "왜?"}]}),
        f"{folder}/model_answer/o1-high.jsonl": lines(answer),
        f"{folder}/model_judgment/x/o1-high.jsonl": lines(answer),
    }
    (found,) = read(name, files)
    assert (found.prompt_id, found.prompt, found.text, found.target_llm) == ("0122", "왜?", "그래요.", "o1-high")
    assert (found.language, found.thinking) == (language, thinking)


def test_arena_hard_in_greek_without_upstreams_own_llms(read: Any) -> None:
    answer = lines({"question_id": "1", "choices": [{"turns": [{"content": "yes"}]}]})
    names = ("krikri-8b-instruct", "qwen3-greek-thinking-dpo", "qwen-3-sft-epoch-1", "gpt-4o", "base_neo_x")
    files = {f"data/arena-hard-v0.1/model_answer/{name}.jsonl": answer for name in names}
    assert [each.target_llm for each in read("arena_hard_el", files)] == ["gpt-4o"]


def test_benchpress(read: Any) -> None:
    evals = {"prompts": [{"id": "C01", "category": "coding", "prompt": "Fix it."}]}
    run = {"content": "Done.", "output_tokens": 900}
    files = {
        "evals/default.json": json.dumps(evals),
        "results/gpt-4.1-nano.json": json.dumps({"model": "m", "responses": {"C01": [run, {**run, "content": "So."}]}}),
        "results/o3-mini.json": json.dumps({"C01": [run]}),
        "results/experiments/thinking-adaptive.json": json.dumps({"C01": [run]}),
    }
    first, second, third = read("benchpress", files)
    assert (first.target_llm, first.prompt, first.text, first.task) == ("gpt-4.1-nano", "Fix it.", "Done.", "coding")
    assert (first.completion_tokens, first.has_difference, first.thinking) == (900, False, None)
    assert second.text == "So."
    assert (third.has_difference, third.thinking) == (True, True)


def test_speechmap(read: Any) -> None:
    def record(category: str, question: str, response: Any) -> dict[str, Any]:
        return {
            "question_id": "china_16", "question": question, "model": "deepseek/deepseek-r1", "category": category,
            "response": response,
        }  # fmt: skip

    details = {"completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 30}}
    files = {
        "responses/fi_china_x.jsonl": lines(record("fi_china", "Miksi?", openai("Näin.", reasoning="Hmm hmm"))),
        "responses/china_x.jsonl": lines(record("china", "Why?", openai("So.", "length", usage=details))),
        "responses/us_x.jsonl": lines(record("us", "Who?", {"error": "refused"})),
        "analysis/compliance_x.jsonl": lines(record("us", "Who?", openai("No."))),
    }
    english, finnish, failed = read("speechmap", files)
    assert (english.language, english.group, english.is_cut) == ("en", None, True)
    assert (english.thought_tokens, english.completion_tokens, english.thinking) == (30, 50, True)
    assert (finnish.language, finnish.prompt, finnish.thoughts) == ("fi", "Miksi?", "Hmm hmm")
    assert finnish.group == group_of_text("Why?")
    assert (finnish.prompt_id, finnish.is_cut) == ("fi_china:china_16", False)
    assert failed.is_empty


def test_misguided(read: Any) -> None:
    record = {"prompt_id": "trolley", "prompt": "Pull it?", "output": ["No.", "Yes."]}
    results = [
        {**record, "llm": "nemotron", "thinking": ["Let me see.", "\n"]},
        {**record, "llm": "o1-mini"},
        {**record, "llm": "gpt-4o", "output": "One."},
    ]
    files = {"eval/harness/output_queries_x.json": json.dumps({"results": results}), "eval/summary.json": "[]"}
    found = read("misguided", files)
    assert [(each.text, each.thoughts, each.thinking) for each in found] == [
        ("No.", "Let me see.", True), ("Yes.", "", False), ("No.", "", True), ("Yes.", "", True), ("One.", "", None),
    ]  # fmt: skip


def test_shaberi(read: Any) -> None:
    record = {"question_id": "eX", "Question": "なぜ?", "ModelAnswer": "<think>\nうーん\n</think>\n\nはい。"}
    folder = "data/model_answers/yuzuai__rakuda-questions"
    plain = {**record, "ModelAnswer": "はい。"}
    files = {
        f"{folder}/Qwen__Qwen3-8B.json": lines(record),
        f"{folder}/deepseek-r1.json": lines(plain),
        f"{folder}/gpt-4o.json": lines(plain),
        f"{folder}/009-llama3.1-8b-mbs8.json": lines(plain),
        f"{folder}/shisa-ai__shisa-v2.json": lines(plain),
        "data/model_answers/elyza__tasks/gpt-4o.json": lines(plain),
    }
    thinker, hidden, other = read("shaberi_ja", files)
    assert (thinker.text, thinker.thoughts, thinker.thinking) == ("はい。", "うーん", True)
    assert (hidden.target_llm, hidden.text, hidden.thinking) == ("deepseek-r1", "はい。", True)
    assert (other.target_llm, other.thinking, other.task) == ("gpt-4o", None, "yuzuai__rakuda-questions")
    assert other.prompt_id.startswith("rakuda-questions:")


def test_complexbench(read: Any) -> None:
    record = {"main_id": 1149, "model": "llama3_8b", "instruction": "分析以下要求", "generated": "好的。"}
    (found,) = read("complexbench_zh", {"llm_generations/llama3_8b.jsonl": lines(record)})
    assert (found.prompt_id, found.prompt, found.text) == ("1149", "分析以下要求", "好的。")
    assert (found.target_llm, found.language) == ("llama3_8b", "zh")


def test_bullshit(read: Any) -> None:
    record = {
        "question_id": "af_01", "model": "x-ai/grok@reasoning=low", "model_row": "grok", "response_text": "Not.",
        "response_completion_tokens": 90, "response_reasoning_tokens": 60, "response_finish_reason": "stop",
    }  # fmt: skip
    questions = {
        "techniques": [{"name": "x", "questions": [{"id": "af_01", "question": "How solvent?", "domain": "y"}]}]
    }
    files = {
        "data/latest/responses/sha256-1.jsonl": lines(record, {**record, "model": "b", "response_reasoning_tokens": 0}),
        "data/latest/aggregate.jsonl": lines(record),
        "questions.json": json.dumps(questions),
    }
    found = {each.target_llm: each for each in read("bullshit", files)}
    assert len(read("bullshit", files)) == 2
    low = found["x-ai/grok@reasoning=low"]
    assert (low.prompt, low.text) == ("How solvent?", "Not.")
    assert (low.thought_tokens, low.completion_tokens, low.thinking, low.is_cut) == (60, 90, True, False)
    assert (found["b"].thought_tokens, found["b"].thinking) == (None, False)


def test_spiral(read: Any) -> None:
    said = ["Hello?", "Hi.", "Are you?", "Maybe so."]
    transcript = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    chats = {
        name: [{"prompt_id": name, "evaluated_model": "moonshotai/kimi-k2", "transcript": transcript}]
        for name in ("eac01", "eac02")
    }
    content = {"1": {"eval_prompts_v0.2.json": chats}, "__meta__": {"scoring_summary": [{"model_name": "x"}]}}
    found = read("spiral", {"res_v0.2/kimi-k2.json": json.dumps(content)})
    assert [each.prompt_id for each in found] == ["eac01:1:1", "eac01:1:3", "eac02:1:1", "eac02:1:3"]
    assert [(each.prompt, each.history) for each in found[:2]] == [("Hello?", ()), ("Are you?", ("Hi.",))]
    assert [each.task for each in found[:2]] == ["turn=0", "turn=1"]
    assert {each.group for each in found} == {group_of_text("Hello?")}
    assert {each.target_llm for each in found} == {"moonshotai/kimi-k2"}


# --- puzzles, mathematics, exams, agents ------------------------------------------------------------------------------


def test_lineage_reasoning(read: Any) -> None:
    said = [{"role": "user", "content": "Q?"}]
    request = {"model": "x", "temperature": 0.01, "max_tokens": 32768.0, "messages": said}
    response = openai("<A>1</A>", "length", reasoning="Well", usage={"completion_tokens": 5996})
    files = {
        "claude-haiku-4.5_128/15ab_request.json": json.dumps(request),
        "claude-haiku-4.5_128/15ab_response.json": json.dumps(response),
        "claude-haiku-4.5_128.csv": "",
    }
    (found,) = read("lineage_reasoning", files)
    assert (found.prompt, found.text, found.thoughts) == ("Q?", "<A>1</A>", "Well")
    assert (found.target_llm, found.task, found.temperature) == ("claude-haiku-4.5", "size=128", 0.01)
    assert (found.max_tokens, found.completion_tokens, found.is_cut) == (32768, 5996, True)


def test_lineage_cot(read: Any) -> None:
    def table(*answers: str) -> str:
        text = io.StringIO()
        for answer in answers:
            csv.writer(text).writerow(["32", "ANCESTOR", "5", "Quiz,\nof lines", "a/b", "B", "", "", answer])
        return text.getvalue()

    files = {
        "claude-3.5-sonnet_32.csv": table('So,\n"it" is.\n\n5'),
        "qwq-32b_32.csv": table("<think>Hm.</think>5"),
        "deepseek-r1_32.csv": table("5"),
        "glm-4.6_64.csv": table("5"),
        "glm-4.6_128.csv": table("5"),
    }
    first, second = read("lineage_cot", files)
    assert (first.prompt, first.text, first.task) == ("Quiz,\nof lines", 'So,\n"it" is.\n\n5', "size=32")
    assert (second.target_llm, second.text, second.thoughts, second.thinking) == ("qwq-32b", "5", "Hm.", True)


def test_reasoning_gym(read: Any) -> None:
    folder = "reasoninggym-paper-experiments/zero-shot"
    each = [{"full_model_response": "a b"}, {"full_model_response": "c"}]
    several = {"results": [{"question": "Q?", "best_full_model_response": "c", "completions": each}]}
    best = {"results": [{"question": "Q?", "best_full_model_response": "c", "completions": None}]}
    files = {
        f"{folder}/easy/meta-llama_llama-4-scout_20250315_163713/games/maze.json": json.dumps(several),
        f"{folder}/hard/google_gemma-3-27b-it_20250415_163713/games/maze.json": json.dumps(best),
        f"{folder}/easy/deepseek_deepseek-r1_20250315_181530/games/maze.json": json.dumps(best),
        f"{folder}/easy/meta-llama_llama-4-scout_20250315_163713/summary.json": "{}",
    }
    found = read("reasoning_gym", files)
    assert [(each.target_llm, each.text, each.task) for each in found] == [
        ("meta-llama/llama-4-scout", "a b", "easy/maze"),
        ("meta-llama/llama-4-scout", "c", "easy/maze"),
        ("google/gemma-3-27b-it", "c", "hard/maze"),
    ]


def test_math_samples(read: Any) -> None:
    completions = [{"full_model_response": "<think>x</think>"}, {"full_model_response": "y"}]
    content = {"categories": [{"datasets": [{"results": [{"question": "Q?", "completions": completions}]}]}]}
    path = "reasoninggym-paper-experiments/math-evals/llama-3b-instruct/step_400/amc23/vllm_2025/results.json"
    found = read("math_50_samples", {path: json.dumps(content)})
    assert [each.text for each in found] == ["<think>x</think>", "y"]
    assert (found[0].target_llm, found[0].task, found[0].temperature) == (
        "llama-3b-instruct-rg-step_400", "amc23", 0.6,
    )  # fmt: skip


def test_planbench(read: Any) -> None:
    folder = "llm_planning_analysis/results/blocksworld"
    usage = {"completion_tokens": 90, "completion_tokens_details": {"reasoning_tokens": 80}}
    thinking = {"query": "Q?", "llm_raw_response": "plan a", "response": openai("plan a", usage=usage)}
    files = {
        f"{folder}/o1-mini_chat/task_1_plan_generation.json": json.dumps({"instances": [thinking]}),
        f"{folder}/gpt-4_chat/task_1_plan_generation.json": json.dumps(
            {"instances": [{"query": "Q?", "llm_raw_response": "plan b"}, {"query": "R?"}]}
        ),
        f"{folder}/gpt-4_chat/task_1_plan_generation_backprompting.json": json.dumps({"instances": [thinking]}),
        f"{folder}/task_1_plan_generation.json": "{}",
    }
    plain, empty, o1 = read("planbench", files)
    assert (plain.text, plain.thought_tokens, plain.task) == ("plan b", None, "blocksworld/task_1_plan_generation")
    assert empty.is_empty
    assert (o1.target_llm, o1.text, o1.thought_tokens, o1.thinking) == ("o1-mini_chat", "plan a", 80, True)


def test_the_problem_of_planbench() -> None:
    assert planbench_problem("Domain. [STATEMENT]\nold [PLAN] [STATEMENT]\nnew") == "[STATEMENT]\nnew"
    assert planbench_problem("(domain) [QUERY PROBLEM] p") == "[QUERY PROBLEM] p"
    assert planbench_problem("neither") == "neither"


def test_tau(read: Any) -> None:
    call = {"function": {"name": "book", "arguments": '{"id": 1}'}, "id": "x", "type": "function"}
    trajectory = [
        {"role": "system", "content": "Rules."},
        {"role": "user", "content": "Book it."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "Booked."},
    ]
    content = [{"task_id": 3, "trial": 1, "traj": trajectory}]
    first, second = read("tau_airline", {"historical_trajectories/gpt-4o-airline.json": json.dumps(content)})
    assert (first.prompt, first.text) == ("Book it.", '{"name": "book", "arguments": "{\\"id\\": 1}"}')
    assert (first.prompt_id, first.task, first.tools) == ("3:1:2", "user->tool_call", True)
    assert (second.prompt, second.text, second.task) == ("done", "Booked.", "tool->text")
    assert first.group == second.group == "tau_airline/3"


def test_aiw(read: Any) -> None:
    record = {"model": "gpt-4o-2024-05-13", "prompt": "How many?", "model_response": "### Answer: 5", "trial": 4}
    (found,) = read("aiw", {"collected_responses/o1-set/models_gpt.json": json.dumps([record])})
    assert (found.target_llm, found.prompt, found.text) == ("gpt-4o-2024-05-13", "How many?", "### Answer: 5")


def test_medagents(read: Any) -> None:
    record = {"question": "Which?", "options": {"A": "this", "B": "that"}, "token_usage": {"completion_tokens": 40}}
    files = {"output/medqa/DeepSeek-R1-zero_shot.json": json.dumps([record, {**record, "token_usage": None}])}
    first, second = read("medagents", files)
    assert (first.prompt, first.num_tokens, first.task) == ("Which?\n\nA. this\nB. that", 40, "medqa/zero_shot")
    assert (first.target_llm, first.thinking, second.is_empty) == ("DeepSeek-R1", True, True)


def test_livecodebench(read: Any) -> None:
    record = {
        "question_id": "1873_A", "question_content": "Sort.", "platform": "codeforces", "difficulty": "easy",
        "code_list": ["print(1)", "print(2)"],
    }  # fmt: skip
    (found,) = read("livecodebench_o1", {"O1-Mini-2024-09-12 (N=1)/Scenario.json": json.dumps([record])})
    assert (found.prompt, found.text, found.task) == ("Sort.", "print(1)", "codeforces/easy")
    assert (found.target_llm, found.thinking) == ("O1-Mini-2024-09-12 (N=1)", True)


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("<think>a</think>b", "a", "b"),
        ("a</think>\nb", "a", "b"),
        ("b", "", "b"),
        ("<think>never ended", "", "<think>never ended"),
    ],
)
def test_thoughts_are_told_apart(text: str, thoughts: str, answer: str) -> None:
    assert apart(text) == (thoughts, answer)


# --- from answers to rows ---------------------------------------------------------------------------------------------


def fetched(public: PublicSet, answers: list[RecordedAnswer], folder: Path) -> list[dict[str, Any]]:
    """The rows that fetching would write of some answers."""
    path = path_of(public, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    public_fetch._write(replace(public, read=lambda files: iter(answers)), [], path, Words())
    return list(pq.read_table(path).to_pylist())


def answer(prompt: str = "Why?", **more: Any) -> RecordedAnswer:
    return RecordedAnswer(**{"prompt_id": "p", "prompt": prompt, "target_llm": "gpt-4o", "text": "one two", **more})


def test_thoughts_and_usage_are_written(tmp_path: Path) -> None:
    answers = [
        answer(thoughts="three more words", completion_tokens=9, thinking=True),
        answer(thought_tokens=40, thoughts="  "),
        answer(completion_tokens=9, has_difference=True),
        answer(completion_tokens=1, has_difference=True),
        answer(text="", num_tokens=77),
        answer(text="", sizes=(9, 1, 4, 6)),
        answer(text=" "),
    ]
    rows = fetched(SETS["misguided"], answers, tmp_path)
    names = ("response_tokens", "reasoning_tokens", "reasoning_source", "completion_tokens", "output_sizes")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (2, 3, "text", 9, None),
        (2, 40, "usage", None, None),
        (2, 7, "difference", 9, None),
        (2, 0, "difference", 1, None),
        (77, None, None, None, None),
        (5, None, None, None, [9, 1, 4, 6]),
    ]
    assert {row["history"] for row in rows} == {None}


def test_history_is_counted(tmp_path: Path) -> None:
    rows = fetched(SETS["spiral"], [answer(history=("a b c", "")), answer(prompt_id="q")], tmp_path)
    assert [row["history"] for row in rows] == [[3, 0], []]


def test_a_translation_has_the_split_of_its_original(tmp_path: Path) -> None:
    public, original = SETS["arena_hard_ko"], next(each for each in PUBLIC_SETS if each.name == "arena-hard-v0.1")
    ids = [str(number) for number in range(200)]
    folder = tmp_path / "public-lengths"
    known = ids[:150]
    fetched(original, [answer(f"question {number}", prompt_id=number) for number in known], folder)
    fetched(public, [answer(f"질문 {number}", prompt_id=number) for number in ids], folder)
    data = build_rows(
        DataConfig(source="arena_hard_ko", cache_dir=tmp_path, min_rows=0, num_workers=1), learnable=False
    )
    splits_of = {row["prompt"]: row["split"] for row in data.rows.table.to_pylist()}
    for number in ids:
        expected = (
            splits.SPLITS[splits.split_of(group_of_text(f"question {number}"))] if number in known else "reserved"
        )
        assert splits_of.get(f"질문 {number}", "reserved") == expected
