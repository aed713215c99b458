"""Leak-safe splits: what counts as the same prompt or answer, which conversations belong together, which split.

Conversations that share a first prompt, or an answer of some length to the same prompt, are joined; the whole
component goes where the hash of its smallest id says: 70 % train, 10 % validation, 10 % test, 10 % reserved.
Knows hashes and numbers only; does not know files, rows or tokenizers.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SPLITS = ("train", "validation", "test", "reserved")
BUCKET_LIMITS = (70, 80, 90, 100)  # bucket below the limit -> split at the same place of SPLITS
MIN_PROMPT_CHARS = 20  # shorter prompts ("hi") say nothing about a common origin
MIN_ANSWER_TOKENS = 50  # nor do shorter answers
PROMPT_KEY_CHARS = 400
JOIN_ANSWER_CHARS = 2000
DUPLICATE_ANSWER_CHARS = 500

_NOT_A_WORD = re.compile(r"[^a-z0-9\u0080-\uffff]+")


def norm(text: str) -> str:
    """Lower case; every run outside `[a-z0-9 U+0080-U+FFFF]` becomes one space; stripped."""
    return _NOT_A_WORD.sub(" ", text.lower()).strip()


def norm_prefix(text: str, num_chars: int) -> str:
    """`norm(text)[:num_chars]` without normalising all of a long text."""
    if len(text) > 4 * num_chars:
        short = norm(text[: 4 * num_chars])
        if len(short) > num_chars:
            return short[:num_chars]
    return norm(text)[:num_chars]


def key(*texts: str) -> int:
    """A 63-bit hash of normalised texts, never 0 (0 stands for "no key")."""
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1 or 1


def bucket(group: str) -> int:
    """0 to 99, from the group's id alone."""
    return int(hashlib.sha1(f"mope-split-v1:{group}".encode()).hexdigest()[:8], 16) % 100


def split_of(group: str) -> int:
    """Position in `SPLITS` for a component's smallest id."""
    return int(np.searchsorted(BUCKET_LIMITS, bucket(group), side="right"))


@cache
def evaluation_prompts() -> frozenset[str]:
    """Hashes of the prompts of public evaluation sets (see `is_evaluation_prompt`)."""
    return _hashes("evaluation_prompts")


@cache
def test_prompts() -> frozenset[str]:
    """Hashes of the prompts of CASTILLO's own test split, and of ShareGPT's test rows as far as CASTILLO has them."""
    return _hashes("test_prompts")


def _hashes(name: str) -> frozenset[str]:
    packed = resources.files("mope.training").joinpath(f"data/{name}.txt.gz").read_bytes()
    return frozenset(gzip.decompress(packed).decode("ascii").split())


def is_evaluation_prompt(normalised_prompt: str) -> bool:
    """Whether a prompt of 20 characters or more occurs in a public evaluation set."""
    if len(normalised_prompt) < MIN_PROMPT_CHARS:
        return False
    return _short_hash(normalised_prompt) in evaluation_prompts()


def is_test_prompt(normalised_prompt: str) -> bool:
    """Whether a prompt of any length is one of `test_prompts`: no row of any set is learned from with such a prompt."""
    return _short_hash(normalised_prompt) in test_prompts()


def _short_hash(normalised_prompt: str) -> str:
    start = normalised_prompt[:PROMPT_KEY_CHARS]
    return hashlib.sha1(start.encode("utf-8", "replace")).hexdigest()[:12]


def assign(
    group_names: Sequence[str],
    groups_M: npt.NDArray[np.int64],
    keys_M: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    """Join groups that share a key and give each component its split.

    Args:
        group_names: ids of the G groups.
        groups_M: group of each of M occurrences of a key.
        keys_M: the keys; occurrences of the same key join their groups; 0 joins nothing.

    Returns:
        For each group the group with the smallest name in its component, shape (G,), and the component's
        position in `SPLITS`, shape (G,). Cost O((M + G) log(M + G)).
    """
    num_groups = len(group_names)
    groups_M, keys_M = groups_M[keys_M != 0], keys_M[keys_M != 0]
    order = np.argsort(keys_M, kind="stable")
    groups_M, keys_M = groups_M[order], keys_M[order]
    same = keys_M[1:] == keys_M[:-1]
    left, right = groups_M[:-1][same], groups_M[1:][same]
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(num_groups, num_groups))
    _, component_G = connected_components(graph.tocsr(), directed=False)

    by_name = np.array(sorted(range(num_groups), key=group_names.__getitem__), dtype=np.int64)
    _, first = np.unique(component_G[by_name], return_index=True)  # the smallest name of each component
    head_G = by_name[first][component_G]
    split_of_head = {int(head): split_of(group_names[head]) for head in by_name[first]}
    split_G = np.array([split_of_head[head] for head in head_G.tolist()], dtype=np.int8)
    return head_G, split_G
