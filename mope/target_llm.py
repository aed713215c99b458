"""What the name of a target LLM tells: its relatives, its size, whether it reasons.

`Meta-Llama-3.1-8B-Instruct`, `llama-3.1-8b-instruct` and `llama-3.1-8b-instruct-awq@provider` are one LLM; where it is
not known, `llama-3.1` or `llama` may be. Knows names alone: no network, no lengths.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

MAX_NAME_CHARS = 200  # of a name that are read; a longer one is no name
MAX_SIZE = 10_000.0  # billions of parameters

_QUANTISED = re.compile(
    r"[-_.](?:gptq|awq|gguf|exl2|fp8|fp16|bf16|int[48]|w[48]a(?:8|16)|[48]bit|q\d(?:_\w+)?|bnb)(?![a-z0-9])"
)
_VENDOR = re.compile(r"^(?:meta|openai|anthropic|google|mistralai|nvidia|microsoft|cohere|hf|us|eu)[-.](?=[a-z])")
_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d{1,3})x)?(\d{1,5}(?:\.\d{1,3})?)(b|m)(?![a-z0-9])")
_REASONS = re.compile(
    r"(?<![a-z0-9])(?:o[1-9]|r[1-9]|qwq|qvq|deepseek-r1|reasoner|reasoning|thinking|think|magistral|sky-t1|s1|gpt-oss)"
    r"(?![a-z0-9])"
)
_SEPARATORS = re.compile(r"[-.:_]|(?<=[a-z])(?=\d)")


@dataclass(frozen=True, slots=True)
class TargetLlm:
    """What is known of a target LLM.

    Attributes:
        name: in the one form that all spellings share, empty if there is no name.
        lineage: the name and its ever shorter beginnings, for looking up the nearest known relative.
        size: billions of parameters, None if unknown; of a mixture of experts, of all of them.
        reasoning: whether it is said to write long thoughts before it answers.
    """

    name: str
    lineage: tuple[str, ...]
    size: float | None
    reasoning: bool

    @property
    def family(self) -> str | None:
        """The shortest beginning of its name, such as `llama`; None without a name."""
        return self.lineage[-1] if self.lineage else None


UNNAMED = TargetLlm("", (), None, False)


def canonical(name: str) -> str:
    """The form that all spellings of a name share: lower case, without vendor, provider and quantisation."""
    path = name[:MAX_NAME_CHARS].strip().lower().partition("@")[0].strip("/").split("/")
    if len(path) > 1 and path[-1].startswith(("checkpoint", "step", "epoch")):  # of the LLM that the folder names
        path.pop()
    return _VENDOR.sub("", _QUANTISED.sub("", path[-1].replace("_", "-").replace(" ", "-")))


@lru_cache(maxsize=4096)
def describe(name: str | None) -> TargetLlm:
    """What a name tells. A repeated name costs a look-up.

    Args:
        name: as the user writes it: a Hub id, a vendor's name, a path; or None.
    """
    if not name:
        return UNNAMED
    short = canonical(name)
    if not short:
        return UNNAMED
    beginnings = [short[: found.start()] for found in _SEPARATORS.finditer(short)]
    lineage = (
        short,
        *(start for start in dict.fromkeys(reversed(beginnings)) if len(start) > 1 and start[0].isalpha()),
    )
    return TargetLlm(short, lineage, _size(short), _REASONS.search(short) is not None)


def _size(short: str) -> float | None:
    """Billions of parameters that a name states."""
    found = _SIZE.search(short)
    if found is None:
        return None
    size = float(found[1] or 1) * float(found[2]) * (1.0 if found[3] == "b" else 1e-3)
    return size if 0 < size <= MAX_SIZE else None


class LlmTable:
    """Looks up the nearest known relative of a target LLM.

    Args:
        names: what has an embedding: canonical names of LLMs, and beginnings that several of them share. Position plus
            one is the index; 0 stands for an LLM without a known relative.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._index = {name: index for index, name in enumerate(names, start=1)}
        below: dict[str, set[int]] = {}
        for name, index in self._index.items():
            for start in describe(name).lineage[1:]:
                if start in self._index:
                    break
                below.setdefault(start, set()).add(index)
        # a beginning of one known name alone, such as `gpt-4o` of `gpt-4o-2024-08-06`, is another word for it
        self._exact = {**self._index, **{start: min(found) for start, found in below.items() if len(found) == 1}}

    def find(self, name: str | None, family: str | None = None) -> int:
        """Index of an LLM, or of its nearest known relative, or 0. Microseconds."""
        for start in (*describe(name).lineage, *describe(family).lineage):
            if index := self._exact.get(start):
                return index
        return 0

    def knows(self, name: str | None) -> bool:
        """Whether the very LLM is known, not only a relative of it."""
        return describe(name).name in self._exact

    def families(self) -> tuple[str, ...]:
        """The shortest beginning of each known name that finds an LLM; in alphabetical order."""
        shortest = (
            next(start for start in reversed(describe(name).lineage) if start in self._exact) for name in self.names
        )
        return tuple(sorted(set(shortest)))

    def parents(self) -> list[int]:
        """For each index the one of its nearest known relative, 0 for none; length of `names` plus one."""
        above = [0]
        for name in self.names:
            above.append(next((self._index[start] for start in describe(name).lineage[1:] if start in self._index), 0))
        return above


def known_names(counts: Mapping[str, int], min_rows: int) -> tuple[str, ...]:
    """What gets an embedding: LLMs with enough rows, and beginnings of names that tell several of them apart.

    Args:
        counts: rows of each LLM, by its name as the data has it.
        min_rows: rows that an LLM, or all LLMs of one beginning, must have.
    """
    rows: Counter[str] = Counter()
    children: dict[str, set[str]] = {}
    for name, count in counts.items():
        lineage = describe(name).lineage
        for position, start in enumerate(lineage):
            rows[start] += count
            if position:
                children.setdefault(start, set()).add(lineage[position - 1])
    exact = {describe(name).name for name in counts} - {""}
    shared = {start for start, below in children.items() if len(below) > 1}
    return tuple(sorted(name for name in exact | shared if rows[name] >= min_rows))
