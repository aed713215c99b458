"""Patterns that are tried only where their words are: nothing that the plain patterns find is missed or made up.

The plain definition is written out here once more: every regular expression searched from the beginning of the text,
every number by NumPy.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mope import features, rules
from mope.features import NUM_FIRST, NUMBER_NAMES, more_numbers, request_numbers
from mope.request import Request
from mope.rules import RULE_NAMES, RULES, RuleHits, match_rules
from mope.triggers import Triggers, Words

ROOT = Path(__file__).resolve().parents[2]

# every literal word of the patterns, and what stands between and around words
FRAGMENTS = sorted(
    {
        word
        for pattern in (*(rule.pattern.regex for rule in RULES.values()), features._LONG_ASK, features._SHORT_ASK)
        for word in re.findall(r"[a-z]+", pattern.pattern)
    }
    | {
        "words",
        "names",
        "ideas",
        "yesor",
        "detailed",
        "briefly",
        "shorter",
        "Error:",
        "Traceback",
        "def",
        "class",
        "from",
    }
)
BETWEEN = (
    *("  - -\n,?!.;:/_\t{}<>#*'\"\0\u00a0"),
    " ",
    "```",
    "tl;dr",
    "\u2019",
    "é",
    "\u0301",
    "🙂",
    "\u0661",
    "x",
    "",
)
DIGITS = ("0", "1", "50", "2,000", "2k", "12345678", "1st", "²", "\u0663")
LOOK_ALIKES = str.maketrans({"i": "\u0131", "s": "\u017f", "k": "\u212a"})
CHANGES = (
    str,
    str.upper,
    str.title,
    lambda word: word.translate(LOOK_ALIKES),
    lambda word: word.replace("i", "\u0130"),
)

fragments = st.builds(lambda word, change: change(word), st.sampled_from(FRAGMENTS), st.sampled_from(CHANGES))
texts = st.lists(fragments | st.sampled_from(BETWEEN) | st.sampled_from(DIGITS), max_size=40).map("".join) | st.text()

# what most text of a script is written with
SCRIPTS = {
    "hangul": "\u1100-\u11ff\u3100-\u31ff\uac00-\ud7ff",
    "kana": "\u3040-\u30ff",
    "han": "\u3400-\u9fff\uf900-\ufaff",
    "cyrillic": "\u0400-\u04ff",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "arabic": "\u0600-\u06ff\ufc00-\ufdff",
}


def plain_rules(prompt: str) -> RuleHits:
    names, counts = [], []
    for name, rule in RULES.items():
        match = rule.pattern.regex.search(prompt)
        if match is not None:
            names.append(name)
            counts.append(min(rule.tokens_of(match, prompt), 100_000.0))
    if not names:
        return RuleHits()
    return RuleHits(tuple(names), next((count for count in counts if count > 0), 0.0), names[0], counts[0])


def plain_numbers(request: Request, hits: RuleHits) -> dict[str, float]:
    text = request.prompt
    num_chars = max(len(text), 1)
    numbers = {
        "log_prompt_chars": np.log1p(len(text)),
        "log_previous_prompt_chars": np.log1p(len(request.previous_prompt)),
        "log_newlines": np.log1p(text.count("\n")),
        "question_marks": min(text.count("?"), 5),
        "exclamations": min(text.count("!"), 5),
        "log_digits": np.log1p(len(re.findall("[0-9]", text))),
        "non_ascii_share": len(re.findall(r"[^\x00-\x7f]", text)) / num_chars,
        "upper_share": len(re.findall("[A-Z]", text)) / num_chars,
        "ends_with_question": text.rstrip().endswith("?"),
        **{f"share_{script}": len(re.findall(f"[{letters}]", text)) / num_chars for script, letters in SCRIPTS.items()},
        "log_context_chars": np.log1p(len(text) + len(request.previous_prompt) + len(request.system)),
        "asks_long": min(len(features._LONG_ASK.findall(text)), 3),
        "asks_short": min(len(features._SHORT_ASK.findall(text)), 3),
        "code_signs": np.log1p(len(features._CODE_SIGNS.findall(text))),
        "log_asked_tokens": np.log1p(hits.tokens),
        **{f"rule_{name}": name in hits.names for name in RULE_NAMES},
    }
    if request.answer_estimates:
        tokens = np.asarray(request.answer_estimates, dtype=np.float64)
        answers = np.log1p(tokens)
        fading = 0.5 ** np.arange(len(answers))[::-1]
        prompt, previous = text[:1000], request.previous_prompt[:1000]
        shorter = min(len(prompt), len(previous))
        words, others = (set(re.findall(r"\w+", one.lower())) for one in (prompt, previous))
        numbers |= {
            "log_last_answer": answers[-1],
            "log_mean_answer": answers.mean(),
            "log_max_answer": answers.max(),
            "log_min_answer": answers.min(),
            "answer_spread": answers.std(),
            "last_minus_mean": answers[-1] - answers.mean(),
            "log_answer_before_last": answers[-2:][0],
            "log_recent_answers": (fading @ answers) / fading.sum(),
            "recent_spread": answers[-3:].std(),
            "log_median_answer": np.median(answers),
            "log_all_answers": np.log1p(tokens.sum()),
            "same_words": len(words & others) / max(len(words | others), 1),
            "log_same_beginning": np.log1p(
                next((i for i, (a, b) in enumerate(zip(prompt, previous, strict=False)) if a != b), shorter)
            ),
        }
    return {name: float(number) for name, number in numbers.items()}


def check(request: Request) -> None:
    words = Words(request.prompt)
    hits = match_rules(words)
    assert hits == plain_rules(request.prompt)
    row = request_numbers(request, words, hits)
    assert len(row) == NUM_FIRST
    found = dict(zip(NUMBER_NAMES, [*row, *more_numbers(request, request.prompt)], strict=True))
    plain = plain_numbers(request, hits)
    assert {name: found[name] for name in plain} == pytest.approx(plain, rel=1e-12, abs=1e-12)


PATTERNS = {name: (rules._triggers, rule.pattern) for name, rule in RULES.items()} | {
    name: (features._triggers, pattern)
    for name, pattern in (
        ("long", features._LONG_ASKS),
        ("short", features._SHORT_ASKS),
        ("signs", features._CODE_WORDS),
    )
}


@pytest.mark.parametrize("name", PATTERNS)
def test_what_a_pattern_matches_is_found(name: str) -> None:
    """Texts made from the regular expression itself, so that no word of it can be forgotten."""
    triggers, pattern = PATTERNS[name]

    @settings(max_examples=150)
    @given(st.from_regex(pattern.regex), st.from_regex(pattern.regex))
    def check_matches(first: str, second: str) -> None:
        for text in (first, f"{first} {second}"):
            if name == "signs" and any(part in text for part in features._CODE_PARTS):
                continue  # those are looked for by themselves
            seen = triggers.seen(Words(text))
            found, plain = pattern.search(seen), pattern.regex.search(text)
            assert (found and found.span()) == (plain and plain.span())
            assert pattern.count(seen) == len(pattern.regex.findall(text))

    check_matches()


# what only ever stands beside a word that is needed anyway
BESIDE = """single or no false to bullet points the this my answer number letter name fix grammar me post letter plan dr
in years days hours minutes percent characters sentences words word please on keep going by nutshell"""
ENDINGS = {"ly", "er", "ion", "ise", "ize"}


@pytest.mark.parametrize("name", PATTERNS)
def test_no_word_of_a_pattern_is_forgotten(name: str) -> None:
    triggers, pattern = PATTERNS[name]
    if not pattern.needs:
        return
    needed = {word.decode() for word, bits in triggers._bits.items() if bits & pattern.needs} | {"error", "traceback"}
    written = set(re.findall("[a-z]{2,}", re.sub(r"\\.", " ", pattern.regex.pattern).lower()))
    written -= {*BESIDE.split(), *ENDINGS}
    assert [word for word in written if not any(known.startswith(word) for known in needed)] == []


@settings(max_examples=500)
@given(texts)
@example("yesorno")
@example("50words")
@example("a 2k\u212a word story")
@example("TypeError: x")
@example("안녕, 世界: こんにちは、мир Ελλάδα ἀρχή سلام 🙂 ß \ud800")
def test_any_text_has_the_rules_and_numbers_of_the_plain_patterns(text: str) -> None:
    check(Request(prompt=text))


@settings(max_examples=300)
@given(texts, texts, st.lists(st.integers(0, 10**9), max_size=8), st.booleans())
def test_any_history_has_the_numbers_of_the_plain_definition(
    text: str, previous: str, answers: list[int], same: bool
) -> None:
    check(Request(prompt=text, previous_prompt=text + previous if same else previous, answer_estimates=tuple(answers)))


@pytest.mark.parametrize("num_chars", [60, 400, 2000])
def test_prose_and_code_have_the_rules_and_numbers_of_the_plain_patterns(num_chars: int) -> None:
    """Real text and real code: what this repository holds of both, in pieces as long as prompts are."""
    files = [*ROOT.glob("*.md"), ROOT / "LICENSE", *(ROOT / "mope").glob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted(files))[:150_000]
    pieces = [text[start : start + num_chars] for start in range(0, len(text), num_chars)]
    for previous, piece in pairwise(pieces):
        check(Request(prompt=piece, previous_prompt=previous, answer_estimates=(len(piece), 7, 4 * len(previous))))


def test_every_rule_is_found_somewhere() -> None:
    """Else the comparisons above would compare nothing with nothing."""
    texts = ["only the answer", "yes/no", "5 lines", "go on", "hi", "Translate", "edit my", "top 5 cats", "```", "XML"]
    texts += ["an essay", "TL;DR", "Is it?"]
    assert [match_rules(text).names[0] for text in texts] == list(RULE_NAMES)


def test_letters_that_pass_for_ascii_are_all_known() -> None:
    everything = "".join(chr(code) for code in range(128, 0x110000))
    assert set(re.findall("[a-z]", everything, re.I)) == {"\u0130", "\u0131", "\u017f", "\u212a"}
    for letter, run in (("\u0130", b"i"), ("\u0131", b"i"), ("\u017f", b"s"), ("\u212a", b"k")):
        assert Words(f"1{letter}é").runs[0] == run


def test_a_pattern_is_tried_at_its_beginnings_alone() -> None:
    triggers = Triggers()
    pattern = triggers.pattern(re.compile(r"\b(?:ab|cd) \w+"), "ab cd", starts="ab cd")
    seen = triggers.seen(Words("AB x cd cd ef xab ab y"))
    assert seen.words.positions([b"ab", b"cd"]) == [0, 5, 8, 18]
    assert pattern.count(seen) == 2  # matches do not overlap: "cd cd", not "cd ef" too; and case counts without re.I
    match = pattern.search(seen)
    assert match is not None
    assert match.group() == "cd cd"
    assert pattern.search(triggers.seen(Words("xab y"))) is None
