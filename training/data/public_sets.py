"""The public sets of recorded answer lengths: where each comes from, under which licence, and how it is read.

Only sets whose licence (MIT, Apache-2.0) allows training on them. Knows repositories and commits; does not know
networks, caches or tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mope.training.data.public_labels import LABEL_TOKENIZER
from mope.training.data.public_readers import (
    CapRule,
    Reader,
    RecordedAnswer,
    ends_like_json,
    ends_like_prose,
    ends_with_box,
    read_arena_hard,
    read_gpteacher,
    read_just_eval,
    read_oasst,
    read_skythought,
    read_zeroeval,
    zeroeval_question,
)

SKYTHOUGHT_SHORT = re.compile(r"Qwen/Qwen2\.5-Math-7B|google/gemma-2-27b-it|Sky-T1-.*-27B")  # context of 4096 tokens


def _whole(prompt: str) -> str:
    return prompt


def _unknown(answer: RecordedAnswer) -> int | None:
    return None


NO_CAP = CapRule(cap_of=_unknown, is_finished=ends_like_prose)


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """Answers of many LLMs, or of one, to the prompts of a public repository.

    Attributes:
        name: of the set, of its file in the cache, and of its rows' `dataset`.
        repository: owner and name on GitHub.
        commit: the one that is read.
        licence: as the repository states it, an SPDX identifier.
        about: what it holds, for a model card.
        files: matches the whole path of each file to read; a group `llm` is the LLM's name.
        read: turns these files into answers.
        cap_rule: when an answer counts as cut off.
        question: the part of a prompt that decides its split: what is left without a template.
        has_repeats: whether an LLM answered a prompt several times; else the first answer to each prompt id is kept.
        has_own_split: whether the split of a row is that of its file's `split` or `group`, whatever other sets hold.
        group_of_id: the group of a prompt id, where neither prompt nor a column `group` decides the split.
        token_unit: of the column `response_tokens`: a tokenizer, or `own` for tokens of the LLM that answered.
        tells_thoughts: whether the set says which LLMs thought before they answered.
        has_history: whether its rows are turns of conversations, whose earlier answers are known.
        original: the set whose prompt of the same id decides the split, for translations of it.
        is_fair: whether a predictor could know what the lengths depend on; else the set is for evaluation alone.
    """

    name: str
    repository: str
    commit: str
    licence: str
    about: str
    files: re.Pattern[str]
    read: Reader
    cap_rule: CapRule = NO_CAP
    question: Callable[[str], str] = _whole
    has_repeats: bool = False
    has_own_split: bool = False
    group_of_id: Callable[[str], str] | None = None
    token_unit: str = LABEL_TOKENIZER
    tells_thoughts: bool = False
    has_history: bool = False
    original: str | None = None
    is_fair: bool = True


def public_sets(sets: Sequence[PublicSet] | None = None) -> list[dict[str, str]]:
    """What sources such as `public-lengths` are made of, for a model card.

    Args:
        sets: those of the source; `PUBLIC_SETS` if not given.

    Returns:
        For each set its `name`, `repository` (an address), `commit`, `licence` and `about`.
    """
    return [
        {
            "name": each.name,
            "repository": f"https://github.com/{each.repository}",
            "commit": each.commit,
            "licence": each.licence,
            "about": each.about,
        }
        for each in (PUBLIC_SETS if sets is None else sets)
    ]


def _just_eval_cap(answer: RecordedAnswer) -> int | None:
    if answer.target_llm.startswith("gpt-"):
        return 1024
    if answer.target_llm.startswith("Yi-"):
        return 4096
    return 2048 if answer.target_llm == "tulu-2-dpo-7b" else None


def _zeroeval_cap(answer: RecordedAnswer) -> int | None:
    return 2048 if answer.target_llm.endswith("@sambanova") else 4096


def _skythought_cap(answer: RecordedAnswer) -> int | None:
    return 4096 if SKYTHOUGHT_SHORT.match(answer.target_llm) else 32_768


def _zeroeval(task: str, about: str) -> PublicSet:
    return PublicSet(
        name=f"zeroeval_{task}",
        repository="WildEval/ZeroEval",
        commit="8c1485edf12c6efb5f69135a562927c5ad484059",
        licence="Apache-2.0",
        about=f"{about}, with a template that asks for JSON, answered by some 45 LLMs",
        files=re.compile(rf"result_dirs/{task}/(?P<llm>[^/]+)\.json"),
        read=read_zeroeval,
        cap_rule=CapRule(cap_of=_zeroeval_cap, is_finished=ends_like_json),
        question=zeroeval_question,
    )


def _gpteacher(name: str, file: str, about: str) -> PublicSet:
    return PublicSet(
        name=f"gpteacher_{name}",
        repository="teknium1/GPTeacher",
        commit="481075123c29854bddb82655badeef6a438f2436",
        licence="MIT",
        about=about,
        files=re.compile(re.escape(file)),
        read=read_gpteacher,
    )


# in the order of their rows; skythought_math is the state of the one commit, not of the history before it
PUBLIC_SETS = (
    PublicSet(
        name="just_eval",
        repository="Re-Align/just-eval",
        commit="3e1a1265e210be1d6ad71624c91da3efc36493ca",
        licence="MIT",
        about="1,000 mixed instructions, answered by 13 LLMs",
        files=re.compile(r"leaderboard/outputs/(?P<llm>[^/]+?)(?:\.to_eval)?\.json"),
        read=read_just_eval,
        cap_rule=CapRule(cap_of=_just_eval_cap, is_finished=ends_like_prose),
    ),
    PublicSet(
        name="arena-hard-v0.1",
        repository="lmarena/arena-hard-auto",
        commit="196f6b826783b3da7310e361a805fa36f0be83f3",
        licence="Apache-2.0",
        about="500 hard questions of chat users, answered by 3 LLMs",
        files=re.compile(r"data/arena-hard-v0\.1/(?:question|model_answer/(?P<llm>[^/]+))\.jsonl"),
        read=read_arena_hard,
        cap_rule=CapRule(cap_of=lambda answer: 4096, is_finished=ends_like_prose),
    ),
    _zeroeval("gsm", "GSM8K, grade-school mathematics"),
    _zeroeval("math-l5", "MATH of the hardest level"),
    _zeroeval("crux", "CRUXEval, what a Python function returns"),
    PublicSet(
        name="skythought_math",
        repository="NovaSky-AI/SkyThought",
        commit="0d190f11fd8e885bbe113aeccacba5ccde5b1102",
        licence="Apache-2.0",
        about="competition mathematics, answered by LLMs of which some reason at length",
        files=re.compile(
            r"(?:.*/)?evaluation/outputs/(?:icml_models/|home/ubuntu/[^/]+/)?(?P<llm>.+)/[^/]+_eval/[^/]+/[^/.][^/]*\.jsonl"
        ),
        read=read_skythought,
        cap_rule=CapRule(cap_of=_skythought_cap, is_finished=ends_with_box, unfinished_share=0.65),
        has_repeats=True,
    ),
    PublicSet(
        name="oasst_sampling",
        repository="Open-Assistant/oasst-model-eval",
        commit="ce935dee6922ec75d5a4006dd1c3595b39a01fdf",
        licence="Apache-2.0",
        about="Open Assistant's prompts, answered by some 100 early open LLMs under several sampling settings",
        files=re.compile(r"sampling_reports/.+\.jsonl?"),
        read=read_oasst,
        cap_rule=CapRule(cap_of=lambda answer: answer.max_tokens, is_finished=ends_like_prose, sure_share=0.95),
        has_repeats=True,
    ),
    _gpteacher("codegen", "Codegen/codegen-instruct.json", "programming tasks, answered by GPT-4"),
    _gpteacher("roleplay", "Roleplay/roleplay-simple-deduped-roleplay-instruct.json", "role play, answered by GPT-4"),
    _gpteacher("toolformer", "Toolformer/toolformer-dedupe-only-dataset.json", "calls of tools, answered by GPT-4"),
)
