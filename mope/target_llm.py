"""Reads the name of a target LLM: its family, version, size and variant, whether it thinks, and its relatives.

All spellings of one LLM share one canonical name. `LlmTable` finds an LLM or its nearest relative among known names.
Reads names alone: no network, no lengths, no weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Literal

from mope import llm_names as words
from mope.effort import LEVELS, level_of_budget

MAX_NAME_CHARS = words.MAX_NAME_CHARS
MAX_SIZE = 10_000.0  # billions of parameters
MAX_CACHED = 4096

Kind = Literal["family", "version", "size", "variant", "tier", "stamp", "thinking", "effort", "word"]
Word = tuple[str, Kind]


@dataclass(frozen=True, slots=True)
class TargetLlm:
    """What the name of a target LLM says.

    Attributes:
        name: the canonical name, empty if there is no name. All that may change response lengths stays in the name.
            Organisation, quantisation, provider and path do not.
        lineage: the name, then ever coarser relatives, ending with the family.
        organisation: who made the LLM, such as `meta`. None if unknown.
        family: short lowercase word, such as `llama`. None without a name.
        version: such as `3.1`, `4o` or `r1`.
        size: billions of parameters, None if unknown. For a mixture of experts: all experts.
        active_size: billions of parameters that each token uses, if the name of a mixture says so.
        variant: such as `instruct`, `base` or `coder-instruct`.
        tier: words that tell LLMs of one version apart, such as `mini` or `sonnet`.
        date: date or release stamp, such as `2024-08-06`, `0324` or `exp-1206`.
        quantisation: such as `awq` or `q4-k-m`.
        thinking: whether the LLM thinks before it answers. None if the name does not say.
        effort: how hard the LLM thinks, such as `low`, if the name says so.
        plain: whether all words of the name are understood. False for most tuned LLMs.
    """

    name: str
    lineage: tuple[str, ...]
    organisation: str | None = None
    family: str | None = None
    version: str | None = None
    size: float | None = None
    active_size: float | None = None
    variant: str | None = None
    tier: str | None = None
    date: str | None = None
    quantisation: str | None = None
    thinking: bool | None = None
    effort: str | None = None
    plain: bool = True

    @property
    def effort_level(self) -> float | None:
        """The stated effort, or budget of thinking tokens such as `16k`, as a number; 0 where it is not to think."""
        if self.effort is None:
            return 0.0 if self.thinking is False else None
        last = self.effort.rpartition("-")[2]
        return LEVELS[last] if last in LEVELS else level_of_budget(float(last.removesuffix("k")) * 1024)

    @property
    def reasoning(self) -> bool:
        """Whether the LLM is known to write long thoughts before it answers."""
        return self.thinking is True


UNNAMED = TargetLlm("", ())


def canonical(name: str) -> str:
    """The one form that all spellings of a name share."""
    return describe(name).name


@lru_cache(maxsize=MAX_CACHED)
def describe(name: str | None) -> TargetLlm:
    """Read a name. A new name takes tens of microseconds. A repeated name costs a look-up.

    Args:
        name: as the user writes it: a Hub id, a vendor's name, a path; or None.
    """
    if not name:
        return UNNAMED
    text, organisation, effort = words.unpack(name)
    if not text:
        return UNNAMED
    return _read(text, organisation, effort)


def _read(text: str, organisation: str | None, effort: str | None) -> TargetLlm:
    if words.MISSPELT.search(text):
        for pattern, replacement in words.SPELLINGS:
            text = pattern.sub(replacement, text)
    parts, stamped, quantised = words.cut(words.TWO_DIGITS.sub(r"\1.\2", text))
    at, family = words.family_of(parts)
    known = family in words.KNOWN_FAMILIES
    kinds = _kinds(parts, stamped, at, family)
    if effort is not None:
        kinds.append((effort, "effort"))
    named = _ordered(kinds, family)
    at = _at(named)
    base = at if known and at else words.second_family(named, family) if known else 0
    lineage = list(_chain(named, with_sizes=not base))
    if base:
        lineage += _chain(named[base:], with_sizes=True)
    name = lineage[0]
    lineage = [start for start in dict.fromkeys(lineage) if start not in (name, family)]
    lineage = [start for start in lineage if len(start) > 1 and start[0].isalpha()]

    texts: dict[Kind, list[str]] = {}
    for word, kind in named:
        texts.setdefault(kind, []).append(word)
    size, active_size = _sizes(texts.get("size", [named[at][0]]))
    if words.ONE_PATH.intersection(texts.get("tier", [])):
        size, active_size = None, active_size or size
    thinking = _thinks(name, texts.get("thinking", []), "effort" in texts)
    plain = known and not at and all(words.BUDGET.fullmatch(word) for word in texts.get("word", []))
    maker = _maker(named, at, family)
    if organisation is None or (quantised and plain and maker is not None):  # others quantise what it made
        organisation = maker
    version = texts.get("version", [None])[0]
    if version is None and (found := words.VERSIONED_FAMILY.fullmatch(named[at][0])):  # o1, r1
        version = found[1] or found[2]
    tier = texts.get("tier", []) + [
        word for word in texts.get("variant", []) if word.rstrip("123456789") not in words.TUNED_TO_TALK
    ]
    return TargetLlm(
        name=name,
        lineage=(name, *lineage, family) if name != family else (name,),
        organisation=organisation,
        family=family,
        version=version.removeprefix("v") if version else None,
        size=size,
        active_size=active_size,
        variant="-".join(texts.get("variant", [])) or None,
        tier="-".join(sorted(tier)) or None,
        date="-".join(texts.get("stamp", [])) or None,
        quantisation="-".join(quantised) or None,
        thinking=thinking,
        effort="-".join(texts.get("effort", [])) or None,
        plain=plain,
    )


def _kinds(parts: Sequence[str], stamped: set[int], at: int, family: str) -> list[Word]:
    """What each word says."""
    has_billions = any(words.SIZE.fullmatch(word) and not word.endswith("m") for word in parts)
    kinds: list[Word] = []
    seen: set[str] = set()
    for row, word in enumerate(parts):
        kind = _kind(word, row, at, family, seen, has_billions)
        if row in stamped and row > 0:
            kind = "stamp"
        if row == at or (row == at + 1 and word in words.FILLERS):
            kind = "family"
        if kind == "variant":
            word = words.VARIANTS.get(word, word)
        elif kind == "version" and word[0] == "v" and row == at + 1 and family not in words.KEEPS_V:
            word = word[1:]
        elif kind == "word" and row and parts[row - 1] == "thinking" and words.BUDGET.fullmatch(word):
            kind = "effort"  # tokens that the thoughts may have
        seen.add(kind)
        kinds.append((word, kind))
    return kinds


def _kind(word: str, row: int, at: int, family: str, seen: set[str], has_billions: bool) -> Kind:
    if row == 0:
        return "word"
    if word in ("thinking", "nothink") or word in words.THINKING_WORDS:
        return "thinking"
    if word in words.EFFORTS and family in words.WITH_EFFORT:
        return "effort"
    if word in words.STAMPS:
        return "stamp"
    if word == "pt" and family != "gemma":
        return "word"
    if word in words.VARIANTS or words.INSTRUCT.fullmatch(word):
        return "variant"
    if word in words.TIERS:
        return "tier"
    if _is_size(word, has_billions) and ("size" not in seen or word[0] in "ae" or word[-1] == "e"):
        return "size"
    if row > at and words.VERSION.fullmatch(word) and not words.BUDGET.fullmatch(word):
        if "version" not in seen and _is_version(word, row, at, family, seen):
            return "version"
        if family == "claude" and word[0] == "v":  # claude-3.5-sonnet-v2
            return "stamp"
    return "word"


def _is_version(word: str, row: int, at: int, family: str, seen: set[str]) -> bool:
    """Whether a number is the version of the family, not of a data set or a training run."""
    if family == "o":
        return False
    if row == at + 1:
        return True
    if at or not (word[0] == "v" or word[0].isdigit()):
        return False
    if family in words.FAMILY_NAMES and family not in words.VERSION_LATE:
        return "word" not in seen
    return word[0] == "v" or "." in word or family in words.VERSION_LATE


def _is_size(word: str, has_billions: bool) -> bool:
    if words.EXPERTS.fullmatch(word):
        return True
    found = words.SIZE.fullmatch(word)
    if found is None:
        return False
    if found[4] == "m":
        return not has_billions and not found[2] and float(found[3]) >= 20
    return _sizes([word]) != (None, None)


def _sizes(sizes: Sequence[str]) -> tuple[float | None, float | None]:
    """Billions of parameters, and of those that each token uses."""
    size = active = None
    for word in sizes:
        found = words.SIZE.fullmatch(word)
        if found is None:  # 16e behind 17b: the first size is that of one expert's path
            size, active = None, active or size
            continue
        number = float(found[3] or f"{found[5]}.{found[6]}") * float(found[1] or 1)
        number = number / 1000 if found[4] == "m" else number * 1000 if found[4] == "t" else number
        if not 0 < number <= MAX_SIZE:
            continue
        if found[2] == "a":
            active = active or number
        else:
            size = size or number
    return size, active


def _at(named: Sequence[Word]) -> int:
    return next(row for row, (_, kind) in enumerate(named) if kind == "family")


def _ordered(kinds: list[Word], family: str) -> list[Word]:
    """Words in the one order that all spellings share."""
    named = [word for word in kinds if word[1] not in ("thinking", "effort") or word[0] in words.THINKING_WORDS]
    at = _at(named)
    if family in words.VERSION_FIRST:
        for row in range(at + 2, len(named)):
            if named[row][1] == "version" and all(kind == "tier" for _, kind in named[at + 1 : row]):
                named.insert(at + 1, named.pop(row))
    for row in range(at + 2, len(named)):
        place = row
        while named[row][1] == "size" and place > at + 1 and named[place - 1][0] in ("instruct", "chat", "base"):
            place -= 1
        named.insert(place, named.pop(row))  # llama-3-instruct-8b
    is_new = any(kind == "version" and word >= "5" for word, kind in named)
    if family in ("gpt", "o") and not is_new and len(named) > 1 and named[-1] == ("chat", "variant"):
        named.pop()  # gpt-4_chat is gpt-4
    stamps = [word for word in named if word[1] == "stamp"]
    named = [word for row, word in enumerate(named) if word[1] != "stamp" or word not in named[:row]]
    if family == "claude" and len(stamps) > 1:  # claude-3.5-sonnet-v2@20241022
        named = [word for word in named if word[1] != "stamp" or word[0][0] != "v"]
    for last in ("thinking", "effort"):
        found = [word for word in kinds if word[1] == last and word[0] not in words.THINKING_WORDS]
        named += found[-1:]
    return named


def _chain(named: Sequence[Word], with_sizes: bool) -> Iterator[str]:
    """The name and its relatives, nearest first: without effort, thinking and stamps, then ever shorter.

    With sizes, LLMs of the same version and size come before all LLMs of that version.
    """
    yield _joined(named)
    left = list(named)
    for dropped in ("effort", "thinking"):
        left = [word for word in left if word[1] != dropped]
        yield _joined(left)
    has_stamp = any(kind == "stamp" for _, kind in left)
    while has_stamp and left[-1][1] == "word":  # gpt-4-0613 of gpt-4-0613-concise
        left.pop()
        yield _joined(left)
    for row in range(len(left) - 1, 0, -1):
        if left[row][1] == "stamp":
            if len(left[row][0]) == 10 and left[row][0][4] == "-":
                yield _joined([*left[:row], (left[row][0][:4], "stamp"), *left[row + 1 :]])
            del left[row]
            yield _joined(left)
    head = 2 if len(left) > 1 and left[1][1] == "version" else 1
    for length in range(len(left) - 1, 0, -1):
        if left[length][1] == "version":
            yield from (_joined([*left[:length], (short, "version")]) for short in _shortened(left[length][0]))
        if length == head and with_sizes:  # llama-3.1-70b-instruct of llama-3.1-nemotron-70b-instruct
            sizes = [word for word in left[head:] if word[1] == "size"]
            talks = [word for word in left[head:] if word[0] in words.TUNED_TO_TALK]
            if sizes:
                yield _joined([*left[:head], *sizes, *talks])
                yield _joined([*left[:head], *sizes])
        yield _joined(left[:length])


def _joined(named: Sequence[Word]) -> str:
    return "-".join([word for word, _ in named])


def _shortened(version: str) -> Iterator[str]:
    """Coarser versions: `3` of `3.1`, `4` of `4o`."""
    while "." in version:
        version = version.rpartition(".")[0]
        yield version
    if version[-1].isalpha() and version[:-1].isdigit():
        yield version[:-1]


def _thinks(name: str, marks: Sequence[str], has_effort: bool) -> bool | None:
    if "nothink" in marks:
        return False
    if marks or has_effort or words.THINKERS.search(name):
        return True
    return None


def _maker(named: Sequence[Word], at: int, family: str) -> str | None:
    if named[0][0][:1] == "o" and words.O_SERIES.fullmatch(named[0][0]):
        return "openai"
    for row, (word, kind) in enumerate(named[: at or None]):
        if kind == "size":
            break
        if row and word in words.TUNERS:
            return words.MAKERS[word]
    return words.MAKERS.get(named[0][0]) or (None if at else words.MAKERS.get(family))


@dataclass(frozen=True, slots=True)
class Reading:
    """How a table found an LLM.

    Attributes:
        index: position in the table plus one, 0 for an unknown LLM.
        how: `exact` for the very LLM, `relative` for its nearest relative, `unknown` for an LLM without one.
        name: the name in the table, None if unknown.
    """

    index: int
    how: Literal["exact", "relative", "unknown"]
    name: str | None


UNKNOWN = Reading(0, "unknown", None)


class LlmTable:
    """Looks up the nearest known relative of a target LLM.

    Args:
        names: what has an embedding: names of LLMs, and relatives that several of them share. Position plus one is the
            index; 0 stands for an LLM without a known relative. Names of older artifacts need not be canonical.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._stored = {name: index for index, name in enumerate(names, start=1)}
        self._index: dict[str, int] = {}
        for name, index in self._stored.items():
            read = describe(name).name
            if self._stored.get(read, index) == index:  # the canonical spelling wins over others of the same LLM
                self._index.setdefault(read, index)
        below: dict[str, set[int]] = {}
        self._families: dict[str, list[tuple[TargetLlm, int]]] = {}
        for read, index in self._index.items():
            known = describe(read)
            if known.family is not None and (known.plain or known.name == known.family):
                self._families.setdefault(known.family, []).append((known, index))
            for start in known.lineage[1:]:
                if read.startswith(start):
                    if start in self._index:
                        break
                    below.setdefault(start, set()).add(index)
        # a beginning of one known name alone, such as `gpt-4o` of `gpt-4o-2024-08-06`, is another word for it
        single = {start: min(found) for start, found in below.items() if len(found) == 1}
        self._only = {start: single.pop(start) for start in list(single) if describe(start).family == start}
        self._exact = {**single, **self._stored, **self._index}
        self._read: dict[tuple[str | None, str | None], Reading] = {}

    def find(self, name: str | None, family: str | None = None) -> int:
        """Index of an LLM, or of its nearest known relative, or 0. A repeated name takes under a microsecond."""
        return self.read(name, family).index

    def read(self, name: str | None, family: str | None = None) -> Reading:
        """Find an LLM or its nearest known relative, and say which of the two.

        Args:
            name: of the LLM, as the user writes it.
            family: where the name does not say it, such as `qwen`.
        """
        found = self._read.get((name, family))
        if found is None:
            found = self._look_up(name, family)
            if len(self._read) >= MAX_CACHED:
                self._read.clear()
            self._read[name, family] = found
        return found

    def knows(self, name: str | None) -> bool:
        """Whether the very LLM is known, not only a relative of it."""
        return self.read(name).how == "exact"

    def families(self) -> tuple[str, ...]:
        """Families of the known names, in alphabetical order."""
        return tuple(sorted({found for name in self.names if (found := describe(name).family)}))

    def parents(self) -> list[int]:
        """For each index the one of its nearest known relative, 0 for none; length of `names` plus one."""
        above = [0]
        for name in self.names:
            above.append(next((self._index[start] for start in describe(name).lineage[1:] if start in self._index), 0))
        return above

    def _look_up(self, name: str | None, family: str | None) -> Reading:
        if index := self._exact_index(name):
            return Reading(index, "exact", self.names[index - 1])
        for llm in (describe(name), describe(family)):
            if index := self._relative(llm):
                return Reading(index, "relative", self.names[index - 1])
        return UNKNOWN

    def _exact_index(self, name: str | None) -> int:
        if not name:
            return 0
        return self._stored.get(_stored_spelling(name)) or self._exact.get(describe(name).name, 0)

    def _relative(self, llm: TargetLlm) -> int:
        """Index of the nearest relative: same version, else another version of the same class, else the family."""
        for start in llm.lineage:
            if index := self._exact.get(start):
                near = describe(start)
                is_near = near.family == llm.family and (llm.version in (None, near.version) or not _is_whole(near))
                return index if is_near else self._other_version(llm) or index
        return self._other_version(llm) or self._only.get(llm.family or "", 0)

    def _other_version(self, llm: TargetLlm) -> int:
        """Index of the nearest version of the same family: rather older than newer, rather of the same size."""
        best, best_rank = 0, None
        for known, index in self._families.get(llm.family or "", ()):
            rank = _distance(llm, known)
            if rank is not None and (best_rank is None or rank < best_rank):
                best, best_rank = index, rank
        return best


def _distance(llm: TargetLlm, known: TargetLlm) -> tuple[float, ...] | None:
    """How far a known LLM of the same family is, for comparison; None if the two are too different."""
    series, version = _number(llm.version)
    other_series, other = _number(known.version)
    is_whole = _is_whole(known)
    is_any = is_whole or _is_whole(llm)
    if known.tier != llm.tier and not is_any:
        return None
    if llm.version and known.version and series != other_series:
        return None
    doublings = abs(log2(known.size / llm.size)) if known.size and llm.size else 0.0
    is_of_class = known.tier == llm.tier and (known.size is None) == (llm.size is None) and doublings <= 1
    if not is_of_class and not is_any:
        return None
    is_older = other <= version or llm.version is None
    return (
        not is_older,
        not is_of_class,
        *(-part if is_older else part for part in other),
        doublings,
        known.thinking is not llm.thinking,
        known.variant != llm.variant,
        known.date is not None,
        *(-ord(letter) for letter in (known.date or "")[:10]),
    )


def _is_whole(known: TargetLlm) -> bool:
    """Whether a name is that of a family, or of a version of a family, with all its sizes."""
    return known.plain and known.tier is None and known.size is None and known.variant is None


def _number(version: str | None) -> tuple[str, tuple[float, ...]]:
    """Letter in front of a version, and the version as numbers; `4o` lies between `4` and `4.1`."""
    found = words.VERSION.fullmatch(version or "")
    if found is None:
        return "", (0.0, 0.0, 0.0)
    parts = [float(part) for part in found[2].split(".")[:3]]
    if found[3]:
        parts = [parts[0], *(parts[1:] or [0.5])]
    return found[1].removeprefix("v"), (*parts, 0.0, 0.0, 0.0)[:3]


_QUANTISED = re.compile(
    r"[-_.](?:gptq|awq|gguf|exl2|fp8|fp16|bf16|int[48]|w[48]a(?:8|16)|[48]bit|q\d(?:_\w+)?|bnb)(?![a-z0-9])"
)
_VENDOR = re.compile(r"^(?:meta|openai|anthropic|google|mistralai|nvidia|microsoft|cohere|hf|us|eu)[-.](?=[a-z])")


def _stored_spelling(name: str) -> str:
    """The spelling that older artifacts store. A table finds their names by it, so that no index moves."""
    path = name[:MAX_NAME_CHARS].strip().lower().partition("@")[0].strip("/").split("/")
    if len(path) > 1 and path[-1].startswith(("checkpoint", "step", "epoch")):
        path.pop()
    return _VENDOR.sub("", _QUANTISED.sub("", path[-1].replace("_", "-").replace(" ", "-")))


def known_names(counts: Mapping[str, int], min_rows: int) -> tuple[str, ...]:
    """What gets an embedding: LLMs with enough rows, and relatives that several of them share.

    Args:
        counts: rows of each LLM, by its name as the data has it.
        min_rows: rows that an LLM, or all LLMs below one relative, must have.
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
