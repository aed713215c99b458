"""Whether a request fits into the KV cache, by what is predicted to be needed at the same time.

An engine that admits whenever the prompt fits preempts later, and one that reserves `max_tokens` for everybody leaves
memory empty. With predictions the peak of all requests together is known ahead. Knows numbers of tokens only; not
blocks, engines or clients.
"""

from __future__ import annotations

from collections.abc import Iterable


def peak_kv_tokens(running: Iterable[tuple[int, float]]) -> float:
    """The most KV cache that requests will hold at once, if each generates a token a step and leaves when it ends.

    The peak is reached just before one of them ends: for each, the context of all that are still there by then. Costs
    O(n log n).

    Args:
        running: of each request, the tokens that it holds now and those that it is predicted to add.
    """
    peak = held = 0.0
    longest_first = sorted(running, key=lambda request: -request[1])
    for num_left, (context, remaining) in enumerate(longest_first, 1):
        held += context
        peak = max(peak, held + num_left * remaining)
    return peak


def fits(
    candidate: tuple[int, float], running: Iterable[tuple[int, float]], capacity_tokens: int, *, margin: float = 1.0
) -> bool:
    """Whether a request can be admitted without anyone having to be preempted, as far as predictions go.

    A request that would be alone always fits: an engine that refuses it would wait forever.

    Args:
        candidate: tokens of its prompt, and those that it is predicted to answer.
        running: of each running request, the tokens that it holds and those that it is predicted to add.
        capacity_tokens: tokens of KV cache in all.
        margin: factor on predicted tokens; above 1 is cautious.
    """
    others = list(running)
    if not others:
        return True
    return peak_kv_tokens((context, margin * more) for context, more in [candidate, *others]) <= capacity_tokens
