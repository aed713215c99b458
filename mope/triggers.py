"""Patterns that are tried only where a text holds the words that they need.

A regular expression with many alternatives costs microseconds per hundred characters, and most prompts lack the words
that a match would contain. One pass finds the words of a text; what it says is only "cannot match here": the regular
expression stays the definition. Knows words and positions; what a match means is elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

DIGIT, FENCE = b"0", b"```"  # stand among the words for any digit, and for a fence of code

# to what `re.I` matches: letters of ASCII with their case folded, everything else a blank
_LETTERS = bytes(code | 0x20 if chr(code).isalpha() else 0x20 for code in range(128)).ljust(256)
_DIGITS = b"0123456789"
_DECIMAL, _FIRST_DECIMAL, _FENCE = re.compile(r"\d"), re.compile(r"\b\d"), re.compile("```")
# the letters beyond ASCII that `re.I` takes for ASCII ones
_LOOK_ALIKES = (("\u0130", "i"), ("\u0131", "i"), ("\u017f", "s"), ("\u212a", "k"))


class Words:
    """The words of a text: runs of ASCII letters in lower case, `DIGIT` and `FENCE` where it has any. O(len(text)).

    A match of `\\bword\\b` under `re.I` always lies on one of these runs.
    """

    __slots__ = ("_blanked", "runs", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        if text.isascii():
            plain = text.encode()
            has_digit = len(plain) != len(plain.translate(None, _DIGITS))
        else:
            has_digit = _DECIMAL.search(text) is not None
            for letter, taken_for in _LOOK_ALIKES:
                text = text.replace(letter, taken_for)
            plain = text.encode("ascii", "replace")  # still one byte for each character
        self._blanked = b" %b " % plain.translate(_LETTERS)
        self.runs = self._blanked.split()
        if has_digit:
            self.runs.append(DIGIT)
        if FENCE in plain:
            self.runs.append(FENCE)

    def positions(self, words: Iterable[bytes]) -> list[int]:
        """Where any of the words begins in the text, in order."""
        found: list[int] = []
        for word in words:
            if word == DIGIT:
                found.extend(match.start() for match in _FIRST_DECIMAL.finditer(self.text))
            elif word == FENCE:
                found.extend(match.start() for match in _FENCE.finditer(self.text))
            else:
                run, position = b" %b " % word, -1
                while (position := self._blanked.find(run, position + 1)) >= 0:
                    found.append(position)
        found.sort()
        return found


@dataclass(frozen=True, slots=True)
class Seen:
    """What of a text's words a set of patterns asks for.

    Attributes:
        words: of the text.
        found: those of them that any pattern needs.
        bits: of the groups that have one of them.
    """

    words: Words
    found: frozenset[bytes]
    bits: int


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression and what each of its matches has.

    Attributes:
        regex: the definition.
        needs: bits of the groups of words that each match has one of.
        starts: words that each match begins with one of; empty if it may begin otherwise.
    """

    regex: re.Pattern[str]
    needs: int
    starts: frozenset[bytes]

    def search(self, seen: Seen) -> re.Match[str] | None:
        """What `regex.search` finds in the text."""
        if self.needs & ~seen.bits:
            return None
        if not self.starts:
            return self.regex.search(seen.words.text)
        for position in seen.words.positions(self.starts & seen.found):
            if match := self.regex.match(seen.words.text, position):
                return match
        return None

    def count(self, seen: Seen) -> int:
        """How many matches `regex.findall` finds in the text."""
        if self.needs & ~seen.bits:
            return 0
        if not self.starts:
            return len(self.regex.findall(seen.words.text))
        count = end = 0
        for position in seen.words.positions(self.starts & seen.found):
            if position >= end and (match := self.regex.match(seen.words.text, position)):
                count, end = count + 1, match.end()
        return count


class Triggers:
    """Makes patterns, and finds the words that they need: one look-up per word of a text, for all of them."""

    def __init__(self) -> None:
        self._bits: dict[bytes, int] = {}
        self._num_groups = 0

    def pattern(self, regex: re.Pattern[str], *needs: str, starts: str = "") -> Pattern:
        """A pattern.

        Args:
            regex: the definition.
            needs: groups of words, between blanks; every match has a word of each group.
            starts: words, between blanks; every match begins with one of them. Empty if it may begin otherwise.
        """
        bits = 0
        for group in needs:
            bit = 1 << self._num_groups
            self._num_groups += 1
            for word in group.encode().split():
                self._bits[word] = self._bits.get(word, 0) | bit
            bits |= bit
        beginnings = frozenset(starts.encode().split())
        for word in beginnings:
            self._bits.setdefault(word, 0)
        return Pattern(regex, bits, beginnings)

    def seen(self, words: Words) -> Seen:
        """What of the words the patterns ask for."""
        bits = 0
        found = frozenset(self._bits.keys() & words.runs)
        for word in found:
            bits |= self._bits[word]
        return Seen(words, found, bits)
