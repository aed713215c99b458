"""The public sets of LLMs of 2024 to 2026: where each comes from, under which licence, and how it is read.

Only sets whose licence (MIT, Apache-2.0, CC0-1.0) allows training on them. Some repositories deleted files later: what
is read is the state of the one commit. Knows repositories and commits; does not know networks, caches or tokenizers.
"""

from __future__ import annotations

import re

from mope.training.data import chat_readers as chats
from mope.training.data import puzzle_readers as puzzles
from mope.training.data.public_labels import OWN_TOKENS
from mope.training.data.public_readers import CapRule, Reader, RecordedAnswer, ends_like_prose, ends_with_box
from mope.training.data.public_sets import NO_CAP, PublicSet

_LINEAGE = ("fairydreaming/lineage-bench-results", "f1fdd924")
_REASONING_GYM = ("open-thought/reasoning-gym-eval", "5f09fecc342a25d693895b7304a9dec43b47f436")
_VIKHR = ("VikhrModels/ru_llm_arena", "501ab65d")
_APACHE, _MIT = "Apache-2.0", "MIT"
_CAP_4096 = CapRule(cap_of=lambda answer: 4096, is_finished=ends_like_prose)
_CAP_2048 = CapRule(cap_of=lambda answer: 2048, is_finished=ends_with_box)
_GYM = "reasoninggym-paper-experiments"
_ANSWERS = r"(?:question|model_answer/(?P<llm>[^/]+))\.jsonl"


def _set(
    name: str, source: tuple[str, str], licence: str, about: str, files: str, read: Reader, cap_rule: CapRule = NO_CAP,
    **options: object,
) -> PublicSet:  # fmt: skip
    repository, commit = source
    return PublicSet(
        name=name, repository=repository, commit=commit, licence=licence, about=about, files=re.compile(files),
        read=read, cap_rule=cap_rule, has_own_split=True, tells_thoughts=True, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def _first_part(prompt_id: str) -> str:
    return prompt_id.partition(":")[0]


def _penfever_cap(answer: RecordedAnswer) -> int | None:
    return 2048 if answer.target_llm.lower().startswith(("llama-3-", "llama3-")) else 4096


# in the order of their rows
MODERN_SETS = (
    _set(
        "castillo", ("DanielFPerez/castillo_code", "d13a0d7"), _APACHE,
        "ten sampled answers of each of 13 open LLMs to prompts of Alpaca, Apps, BigCodeBench, DS1000, Dolly, MBPP and "
        "ShareGPT (CASTILLO, arXiv 2505.16881)",
        r"data/preprocessed/(?:train|validate|test)/preproc_[^/]+\.json", chats.read_castillo, token_unit=OWN_TOKENS,
    ),
    _set(
        "lineage_reasoning", _LINEAGE, _MIT, "logic quizzes of 8 to 192 people, answered by 35 reasoning LLMs of 2025",
        r"(?:results/)?(?P<llm>[^/]+)_\d+/[^/]+_(?:request|response)\.json", puzzles.read_lineage_reasoning,
        has_repeats=True,
    ),
    _set(
        "lineage_cot", _LINEAGE, _MIT, "logic quizzes of 8 to 64 people, answered step by step by 21 LLMs",
        r"(?:results/)?(?P<llm>[^/]+)_\d+\.csv", puzzles.read_lineage_cot, has_repeats=True,
    ),
    _set(
        "speechmap", ("xlr8harder/llm-compliance", "856f28a1d0c9da1390f1705616c31041f3fbdddc"), _APACHE,
        "political writing and criticism in English, Chinese and Finnish, by 46 LLMs; refusals are short and common",
        r"responses/[^/]+\.jsonl", chats.read_speechmap,
    ),
    _set(
        "misguided", ("cpldcpu/MisguidedAttention", "bbae011e"), "CC0-1.0",
        "riddles with a twist, 3 to 5 answers each of 104 LLMs and settings",
        r"eval/.+/output_queries[^/]*\.json", chats.read_misguided, has_repeats=True,
    ),
    _set(
        "shaberi_ja", ("shisa-ai/shaberi", "f8cd7a04"), _APACHE,
        "Japanese questions of tengu-bench, MT-bench and rakuda, answered by some 160 LLMs",
        r"data/model_answers/(?:lightblue__tengu_bench|lightblue__japanes-mt-bench-oneshot|shisa-ai__ja-mt-bench-1shot|"
        r"yuzuai__rakuda-questions)/(?P<llm>(?!\d{3}-|shisa)[^/]+)\.json",
        chats.read_shaberi,
    ),
    _set(
        "arena_hard_ko", ("qwopqwop200/ko-arena-hard-auto", "9d139328755a331f9d171bb806ac5b37d3598009"), _APACHE,
        "arena-hard-v0.1 in Korean, answered by 72 LLMs of 2025", rf"data/ko-arena-hard-v0\.1/{_ANSWERS}",
        chats.arena_hard_in("ko", hides_thoughts=True), _CAP_4096, original="arena-hard-v0.1",
    ),
    _set(
        "arena_hard_ru", _VIKHR, _APACHE, "500 Russian questions of chat users, answered by 51 LLMs of 2024",
        r"data/arena-hard-v0\.1/(?:question|lmsys_500_selected_questions|model_answer/(?P<llm>[^/]+))\.jsonl",
        chats.arena_hard_in("ru"), _CAP_4096,
    ),
    _set(
        "arena_hard_ru_orig", _VIKHR, _APACHE, "arena-hard-v0.1 in Russian, answered by 15 LLMs of 2024",
        rf"data/arena-hard-orig/{_ANSWERS}", chats.arena_hard_in("ru"), _CAP_4096, original="arena-hard-v0.1",
    ),
    _set(
        "arena_hard_el", ("meltemi-ai/arena-hard-auto-greek", "3941275c"), _APACHE,
        "arena-hard-v0.1 in Greek, answered by 9 LLMs of 2025",
        r"data/arena-hard-v0\.1/(?:question|model_answer/(?P<llm>(?!krikri|base_neo|qwen-?3)[^/]+))\.jsonl",
        chats.arena_hard_in("el", hides_thoughts=True), _CAP_4096, original="arena-hard-v0.1",
    ),
    _set(
        "arena_hard_v0.1_more", ("penfever/arena-hard-auto", "1e6345b0"), _APACHE,
        "arena-hard-v0.1, answered by 25 more LLMs, many of them tuned from Llama 3",
        rf"data/arena-hard-v0\.1/{_ANSWERS}", chats.arena_hard_in("en"),
        CapRule(cap_of=_penfever_cap, is_finished=ends_like_prose),
    ),
    _set(
        "arena_logs_ru", ("Pupy101/arena-hard-auto", "e84a621851cd46a6b65f13cb6f4e3b69756e64ef"), _APACHE,
        "1,000 logged questions, most of them Russian, answered by 7 LLMs of 2025",
        rf"data/arena-hard-auto/arena-hard-logs-v3/{_ANSWERS}", chats.arena_hard_in("ru"), _CAP_4096,
    ),
    _set(
        "benchpress", ("mark-allwyn/BenchPress", "4f8431e8"), _MIT,
        "80 prompts for code, writing, research and instructions, answered by 48 LLMs of 2026",
        r"evals/default\.json|results/(?P<llm>[^/]+)\.json", chats.read_benchpress, _CAP_4096, has_repeats=True,
    ),
    _set(
        "bullshit", ("petergpt/bullshit-benchmark", "d2489cf7"), _MIT,
        "155 business questions that make no sense, answered by LLMs of 2026 at several efforts",
        r"questions[^/]*\.json|data/(?:.+/)?(?:responses|aggregate)(?:/[^/]+)?\.jsonl", chats.read_bullshit,
        has_repeats=True,
    ),
    _set(
        "reasoning_gym", _REASONING_GYM, _APACHE, 
        "100 generators of puzzles, easy and hard, answered by 7 LLMs of 2025",
        rf"{_GYM}/zero-shot/(?:easy|hard)/(?P<llm>[^/]+)/[^/]+/[^/]+\.json", puzzles.read_reasoning_gym,
        has_repeats=True, group_of_id=str,
    ),
    _set(
        "planbench", ("karthikv792/LLMs-Planning", "b008bc43"), _MIT,
        "planning puzzles (Blocksworld, Logistics, Sokoban), answered by 16 LLMs",
        r"llm_planning_analysis/results/[^/]+/(?P<llm>[^/]+)/(?!.*backprompting)[^/]+\.json", puzzles.read_planbench,
        question=puzzles.planbench_problem,
    ),
    _set(
        "tau_airline", ("sierra-research/tau-bench", "59a200c6"), _MIT,
        "single calls of GPT-4o as an airline's agent with tools",
        r"historical_trajectories/(?P<llm>gpt-4o-airline)\.json", puzzles.read_tau, group_of_id=_first_part,
    ),
    _set(
        "spiral", ("sam-paech/spiral-bench", "6b990fa74e7d208d4b19d74a25be94ab8b67dcfe"), _MIT,
        "chats of 20 turns with a simulated user, by 4 LLMs",
        r"res_v0\.2/.+\.json", chats.read_spiral, group_of_id=_first_part, has_history=True,
    ),
    _set(
        "complexbench_zh", ("thu-coai/ComplexBench", "749f4575"), _MIT,
        "Chinese instructions with many constraints, answered by 15 LLMs of 2024",
        r"llm_generations/(?P<llm>[^/]+)\.jsonl", chats.read_complexbench,
    ),
    _set(
        "aiw", ("LAION-AI/AIW", "4d5d079b"), _APACHE, "13 versions of one riddle, some 57 answers each of 4 LLMs",
        r"collected_responses/o1-set/[^/]+\.json", puzzles.read_aiw, has_repeats=True,
    ),
    _set(
        "math_50_samples", _REASONING_GYM, _APACHE,
        "70 problems of competitions, 50 answers each of two checkpoints of one small LLM",
        rf"{_GYM}/math-evals/llama-3b-instruct/(?P<llm>step_\d+)/[^/]+/[^/]+/results\.json", puzzles.read_math_samples,
        _CAP_2048, has_repeats=True, is_fair=False,
    ),
    _set(
        "medagents", ("gersteinlab/medagents-benchmark", "f5e50b69"), _APACHE,
        "medical questions of choice, answered by 7 LLMs; the template around them is not known",
        r"output/[^/]+/[^/]+-(?:zero_shot|cot)\.json", puzzles.read_medagents, token_unit=OWN_TOKENS, has_repeats=True,
        is_fair=False,
    ),
    _set(
        "livecodebench_o1", ("LiveCodeBench/submissions", "4d04b02a"), _MIT,
        "programming tasks, visible code of two LLMs whose thoughts are hidden",
        r"(?P<llm>O1-[^/]+)/[^/]+\.json", puzzles.read_livecodebench, is_fair=False,
    ),
)  # fmt: skip
