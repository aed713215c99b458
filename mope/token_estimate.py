"""About how many tokens a text has, without a tokenizer: for the lengths of a conversation's earlier answers.

Half of the estimates are within 4 % of cl100k_base's count; bytes alone, at the best ratio, within 10 %. Training and
every server count with it alike. Knows bytes; no tokenizer.
"""

from __future__ import annotations

import string

READ_CHARS = 1500  # of a longer text the rest is taken to be like its beginning

_PUNCTUATION, _DIGITS, _BEYOND_ASCII = string.punctuation.encode(), b"0123456789", bytes(range(128, 256))


def estimate_tokens(text: str) -> int:
    """Tokens of a text, at least 1 unless it is empty. Some ten microseconds, for a text of any length.

    A linear function of bytes, words, punctuation, digits, bytes beyond ASCII and lines, fitted by least squares of the
    relative error to the answers of ShareGPT's training split.
    """
    if not text:
        return 0
    seen = text[:READ_CHARS].encode("utf-8", "replace")
    size = len(seen)
    count = (
        0.062 * size
        + 0.703 * len(seen.split())
        + 0.480 * (size - len(seen.translate(None, _PUNCTUATION)))
        + 0.659 * (size - len(seen.translate(None, _DIGITS)))
        + 0.317 * (size - len(seen.translate(None, _BEYOND_ASCII)))
        + 0.934 * seen.count(b"\n")
        + 1.3
    )
    return max(1, round(count * len(text) / min(len(text), READ_CHARS)))
