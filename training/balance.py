"""How much each data set, prompt and answer counts in training, so that no large one drowns the others.

A set counts as a power of the number of its texts, its texts alike, and the answers to one text share its weight: forty
LLMs that answered one prompt count as one LLM does. Where that gives the texts of a set less weight than one, fewer of
them are drawn in an epoch instead, other ones each time, which costs less. Knows sets and texts; no network.

Shape suffixes: R rows, T texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mope.grid import Array

WHOLE_TEXTS = 1000  # a set of so many texts comes once an epoch, with weight 1


@dataclass(frozen=True)
class Balance:
    """How often texts come and how much rows count.

    Attributes:
        keep_T: share of the epochs in which each text comes.
        weight_R: weight of each row; those of one text sum to 1 or more.
        scale_R: tokens that each row's CRPS is divided by: the median answer of its set.
    """

    keep_T: Array
    weight_R: Array
    scale_R: Array


def balance(sets: Array, text_R: Array, tokens_R: Array, medians: dict[str, float], power: float) -> Balance:
    """Balance rows of several sets.

    Args:
        sets: the name of each row's set, shape (R,).
        text_R: which text each row has, from 0 on without gaps.
        tokens_R: labels.
        medians: the median answer of each set, of the training rows, see `set_medians`.
        power: a set of n texts counts as n to this power; 1: as many as it has, 0: all sets the same.
    """
    num_texts = int(text_R.max(initial=-1)) + 1
    names, set_R = np.unique(sets, return_inverse=True)
    set_T = np.empty(num_texts, dtype=np.int64)
    set_T[text_R] = set_R
    wanted = (np.maximum(np.bincount(set_T, minlength=len(names)), 1) / WHOLE_TEXTS) ** (power - 1)
    rows_T = np.bincount(text_R, minlength=num_texts)
    weight_T = np.maximum(wanted, 1.0)[set_T]
    overall = float(np.median(tokens_R)) if len(tokens_R) else 1.0
    scales = np.array([max(medians.get(str(name), overall), 1.0) for name in names])
    return Balance(np.minimum(wanted, 1.0)[set_T], (weight_T / rows_T)[text_R], scales[set_R])


def set_medians(sets: Array, tokens_R: Array) -> dict[str, float]:
    """The median answer of each set in tokens; cut answers count as they are."""
    return {str(name): float(np.median(tokens_R[sets == name])) for name in np.unique(sets)}
