"""The public sets of LLMs of 2024 to 2026: where each comes from, under which licence, and how it is read.

Only sets whose licence (MIT, Apache-2.0, CC0-1.0) allows training on them. Knows repositories and commits; does not
know networks, caches or tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mope.errors import DataError
from mope.training.data.public_labels import OWN_TOKENS
from mope.training.data.public_readers import Answer, RepositoryFile
from mope.training.data.public_sets import PublicSet


def _unread(files: Sequence[RepositoryFile]) -> Iterator[Answer]:
    raise DataError("this set has no reader yet: put its parquet file into the folder public-lengths of the cache")


def _modern(name: str, repository: str, commit: str, licence: str, about: str, **options: Any) -> PublicSet:
    options = {"files": re.compile("(?!)"), "read": _unread, "has_own_split": True, "tells_thoughts": True, **options}
    return PublicSet(name=name, repository=repository, commit=commit, licence=licence, about=about, **options)


def _first_part(prompt_id: str) -> str:
    return prompt_id.partition(":")[0]


_REASONING_GYM = ("open-thought/reasoning-gym-eval", "5f09fecc", "Apache-2.0")
_LINEAGE = ("fairydreaming/lineage-bench", "f1fdd924", "MIT")
_VIKHR = ("VikhrModels/ru_llm_arena", "501ab65d", "Apache-2.0")

# in the order of their rows
MODERN_SETS = (
    _modern("castillo", "DanielFPerez/castillo_code", "d13a0d7", "Apache-2.0", "ten answers each of 13 open LLMs",
        token_unit=OWN_TOKENS),
    _modern("lineage_reasoning", *_LINEAGE, "logic quizzes, answered by 35 reasoning LLMs"),
    _modern("lineage_cot", *_LINEAGE, "logic quizzes, answered by 21 LLMs step by step"),
    _modern("speechmap", "xlr8harder/llm-compliance", "856f28a1", "Apache-2.0", "political writing, by 46 LLMs"),
    _modern("misguided", "cpldcpu/MisguidedAttention", "bbae011e", "CC0-1.0", "riddles with a twist, by 104 LLMs"),
    _modern("shaberi_ja", "shisa-ai/shaberi", "f8cd7a04", "Apache-2.0", "Japanese chat questions, by 162 LLMs"),
    _modern("arena_hard_ko", "qwopqwop200/ko-arena-hard-auto", "9d139328", "Apache-2.0", "arena-hard in Korean"),
    _modern("arena_hard_ru", *_VIKHR, "Russian user questions, by 51 LLMs"),
    _modern("arena_hard_ru_orig", *_VIKHR, "arena-hard in Russian, by 15 LLMs"),
    _modern("arena_hard_el", "meltemi-ai/arena-hard-auto-greek", "3941275c", "Apache-2.0", "arena-hard in Greek"),
    _modern("arena_hard_v0.1_more", "penfever/arena-hard-auto", "1e6345b0", "Apache-2.0", "arena-hard, by 26 LLMs"),
    _modern("arena_logs_ru", "Pupy101/arena-hard-auto", "giga", "Apache-2.0", "logged Russian questions, by 7 LLMs"),
    _modern("benchpress", "mark-allwyn/BenchPress", "4f8431e8", "MIT", "work and code prompts, by 48 LLMs of 2026"),
    _modern("bullshit", "petergpt/bullshit-benchmark", "d2489cf7", "MIT", "questions without sense, by 13 LLMs"),
    _modern("reasoning_gym", *_REASONING_GYM, "100 generators of puzzles, by 7 LLMs", group_of_id=str),
    _modern(
        "planbench", "karthikv792/LLMs-Planning", "b008bc43", "MIT", "planning puzzles, by 16 LLMs", group_of_id=str
    ),
    _modern(
        "tau_airline", "sierra-research/tau-bench", "59a200c6", "MIT", "calls of an airline agent, by GPT-4o",
        group_of_id=_first_part,
    ),
    _modern(
        "spiral", "sam-paech/spiral-bench", "6b990fa7", "MIT", "chats of 20 turns, by 4 LLMs", group_of_id=_first_part
    ),
    _modern("complexbench_zh", "thu-coai/ComplexBench", "749f4575", "MIT", "Chinese instructions, by 15 LLMs"),
    _modern("aiw", "LAION-AI/AIW", "4d5d079b", "Apache-2.0", "13 versions of one riddle, by 4 LLMs"),
    _modern("math_50_samples", *_REASONING_GYM, "70 problems, 50 answers each of two small LLMs", is_fair=False),
    _modern(
        "medagents", "gersteinlab/medagents-benchmark", "f5e50b69", "Apache-2.0", "medical questions, by 7 LLMs",
        token_unit=OWN_TOKENS,
        is_fair=False,
    ),
    _modern(
        "livecodebench_o1", "LiveCodeBench/submissions", "4d04b02a", "MIT", "visible code of two hidden reasoners",
        is_fair=False,
    ),
)  # fmt: skip
