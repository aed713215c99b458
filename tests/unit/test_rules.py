"""Rules: what prompts ask for, in tokens, at bounded cost; and what answers made of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from timing import least_seconds

from mope.rules import RULE_NAMES, RuleHits, RuleTable, match_rules

EXAMPLES = {
    "one_word": ["Answer in one word: why?", "a single word please", "Give me just the number.", "only the answer"],
    "yes_no": ["Is it blue? yes or no", "yes/no: is water wet", "True or false: 2 > 1"],
    "units": ["Explain it in 50 words", "write three paragraphs", "no more than 280 characters"],
    "continue": ["continue", "Please go on", "keep going!", "Next"],
    "small_talk": ["Thanks!", "hello", "ok great", "Thank you so much"],
    "translate": ["Translate to German: good morning", "give me the translation of 'pain'"],
    "rewrite": ["Rewrite this: he go home", "please proofread my mail", "fix the grammar"],
    "list": ["List ten ideas for dinner", "Give me 5 good names for a cat", "top 10 films of 1999"],
    "code": ["Write a Python function that sorts", "```x = 1```", "implement a class for stacks"],
    "json": ["Return it as JSON", "convert this to yaml"],
    "essay": ["Write an essay on Rome", "a cover letter for a bakery", "tell me a story"],
    "summarise": ["Summarize the text", "TL;DR", "a summary of the book"],
    "polar_question": ["Is the earth round?", "can cats swim? "],
}


def test_every_rule_has_examples():
    assert set(EXAMPLES) == set(RULE_NAMES)


@pytest.mark.parametrize(
    ("name", "prompt"), [(name, prompt) for name, prompts in EXAMPLES.items() for prompt in prompts]
)
def test_a_rule_matches_its_examples(name, prompt):
    assert name in match_rules(prompt).names


@pytest.mark.parametrize("prompt", ["", "Explain TCP slow start.", "The cat sat on the mat", "\0", "🙂"])
def test_no_rule_matches_plain_text(prompt):
    assert match_rules(prompt) == RuleHits()


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("Describe it in 50 words", 67.5),
        ("describe it in fifty words or twelve words", 67.5),
        ("describe it in fifty-two words", 70.2),
        ("in sixteen words", 21.6),  # not six
        ("keep the written words, fix the often lines", 0.0),  # neither ten
        ("a story of two thousand five hundred words", 3375.0),
        ("a hundred words at most", 135.0),
        ("a 2k word story", 2700.0),
        ("a 1,000-word essay", 1350.0),
        ("answer in 2-3 sentences", 60.0),
        ("answer in two to four sentences", 72.0),
        ("answer in 1 or 2 lines", 18.0),
        ("5 short bullet points", 120.0),
        ("a 2 page report", 1200.0),
        ("3 tweets", 135.0),
        ("list ten ideas", 200.0),
        ("give me 7 names", 140.0),
        ("translate this text", 19 / 4),
        ("write 9,999,999 words", 100_000.0),
    ],
)
def test_asked_tokens(prompt, tokens):
    assert match_rules(prompt).tokens == pytest.approx(tokens)


def test_the_first_rule_gives_the_suggestion_and_the_first_count_the_tokens():
    hits = match_rules("Yes or no: should I list ten ideas in JSON?")
    assert hits.first == hits.names[0] == "yes_no"
    assert hits.first_tokens == 0.0
    assert hits.tokens == 200.0
    assert list(hits.names) == [name for name in RULE_NAMES if name in hits.names]


@pytest.mark.parametrize("window", [2_000, 100_000])
@pytest.mark.parametrize(
    "seed",
    [
        " ",
        "\n",
        "1 ",
        "1-",
        "one",
        "? ",
        "is ",
        "list 1 ",
        "yes ",
        "{ ",
        "write ",
        "a",
        "thanks ",
        "1 to ",
        "the answer only ",
    ],
)
def test_no_text_makes_a_pattern_slow(seed, window):
    text = "is 1 " + seed * (window // len(seed)) + "x"
    assert least_seconds(lambda: match_rules(text), 1.0, tries=3) < 1.0


def test_long_numbers_do_not_make_a_window_slow():
    limit_s = 0.1  # it is 0.01 s; it was 0.2 s a window when words were unbounded
    assert least_seconds(lambda: match_rules("1" * 2000), limit_s) < limit_s


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("\u017fix words", 0.0),  # a long s and a dotless i pass for s and i where case is ignored
        ("f\u0131ve lines", 0.0),
        ("5 word\u017f", 0.0),
        ("\u0663 words", 4.05),  # an Arabic three
        ("1,, words", 1.35),
        ("List 5\u212a ideas", 100_000.0),  # a Kelvin sign passes for a k
        ("write 2\u212a words", 2700.0),
        ("write 2,0\u0660\u0660 words", 2700.0),
        ("0 words", 0.0),
    ],
)
def test_look_alikes_of_letters_and_digits_are_no_error(prompt, tokens):
    assert match_rules(prompt).tokens == pytest.approx(tokens)


@given(st.text(max_size=300))
def test_any_text_gives_finite_counts(prompt):
    hits = match_rules(prompt)
    assert 0 <= hits.tokens <= 100_000
    assert (hits.first is None) == (not hits.names)


def test_fit_recovers_how_answers_follow_rules():
    rng = np.random.default_rng(0)
    hits = [RuleHits(("units",), 100.0, "units", 100.0)] * 3000 + [RuleHits(("yes_no",), 0.0, "yes_no", 0.0)] * 3000
    tokens = np.exp(np.concatenate([np.log(100) + rng.normal(0.3, 0.4, 3000), rng.normal(1.2, 0.7, 3000)]))
    table = RuleTable.fit(hits, tokens)
    assert table.parameters["units"] == pytest.approx((0.3, 0.4), abs=0.03)
    assert table.parameters["yes_no"] == pytest.approx((1.2, 0.7), abs=0.04)


def test_a_rare_rule_gives_no_suggestion():
    hits = [RuleHits(("json",), 0.0, "json", 0.0)] * 19 + [RuleHits()] * 50
    assert RuleTable.fit(hits, np.full(69, 10)).parameters == {}
    assert set(RuleTable.fit([*hits, hits[0]], np.full(70, 10)).parameters) == {"json"}


@given(
    st.lists(st.floats(2, 5000), min_size=1, max_size=7, unique=True).map(sorted),
    st.floats(-2, 9),
    st.floats(0.1, 3),
    st.floats(0, 100_000),
)
def test_votes_are_distributions(boundaries, mean, deviation, asked):
    table = RuleTable({"units": (mean, deviation)})
    prior = np.full(len(boundaries) + 1, 1 / (len(boundaries) + 1))
    votes = table.votes([RuleHits(("units",), asked, "units", asked), RuleHits()], np.array(boundaries), prior)
    assert votes.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert np.all(votes > 0)
    assert votes[1] == pytest.approx(prior)


def test_a_clear_ask_votes_for_its_bucket():
    table = RuleTable({"units": (0.0, 0.3), "yes_no": (1.0, 0.5)})
    hits = [
        match_rules("in 10 words"),
        match_rules("in 100 words"),
        match_rules("in 1000 words"),
        match_rules("yes or no"),
    ]
    votes = table.votes(hits, np.array([50.5, 300.5]), np.full(3, 1 / 3))
    assert votes.argmax(axis=1).tolist() == [0, 1, 2, 0]
    assert votes.max(axis=1).min() > 0.9


def test_votes_are_normal_probabilities_on_the_log_scale():
    votes = RuleTable({"yes_no": (np.log(50), 0.5)}).votes(
        [match_rules("yes or no")], np.array([50.0, 50 * np.exp(0.5)]), np.full(3, 1 / 3)
    )
    assert votes[0] == pytest.approx([0.5, 0.3413, 0.1587], abs=1e-4)
