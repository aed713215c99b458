"""Estimates of tokens: near the tokenizer's count, quick for any text, one for at least one token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timing import least_ratio

from mope.token_estimate import READ_CHARS, estimate_tokens

ENGLISH = (
    "The sky looks blue because air scatters short waves of light more than long ones. At noon the sun's light takes "
    "a short way through the air; in the evening a long one, on which most of the blue is lost. What is left is red."
)
CODE = 'def area(radius: float) -> float:\n    """Area of a circle."""\n    return 3.14159 * radius ** 2\n'
LIST = "1. Wash 200 g of rice.\n2. Boil 0.5 l of water.\n3. Add the rice; cook for 12 minutes.\n"


@pytest.mark.parametrize(("text", "tokens"), [(ENGLISH, 53), (CODE, 29), (LIST, 33)], ids=["prose", "code", "list"])
def test_estimates_are_near_what_cl100k_counts(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == pytest.approx(tokens, rel=0.2)


@given(st.text())
def test_an_estimate_is_a_count(text: str) -> None:
    estimate = estimate_tokens(text)
    assert isinstance(estimate, int)
    assert (estimate >= 1) == bool(text)


@given(st.text(min_size=1, max_size=50), st.integers(1, 30))
def test_a_text_repeated_has_as_many_times_the_tokens(text: str, times: int) -> None:
    whole = estimate_tokens((text * READ_CHARS)[:READ_CHARS])
    assert estimate_tokens((text * READ_CHARS)[:READ_CHARS] * times) == pytest.approx(times * whole, abs=times)


def test_broken_surrogates_are_counted_too() -> None:
    assert estimate_tokens("\ud800 half") >= 1


def test_a_book_costs_no_more_than_a_page() -> None:
    book, page = "word " * 1_000_000, "word " * 300

    def estimate(text: str) -> None:
        for _ in range(20):
            estimate_tokens(text)

    assert least_ratio(lambda: estimate(book), lambda: estimate(page), 3) < 3
