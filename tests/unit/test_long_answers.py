"""Answers of tens of thousands of tokens, as reasoning LLMs write them: grid, loss and predictions hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import table

from mope import LengthPrediction
from mope.request import Request
from mope.training.config import ModelConfig
from mope.training.objectives import Labels, MopeObjective
from mope.training.prepare import Grid

LONGEST = 32_768
RNG = np.random.default_rng(0)
# two kinds of LLM: chats of some hundred tokens, thoughts of some thousand, cut at 32,768
CHATS = np.exp(RNG.normal(5.3, 0.8, 4000)).clip(1, 4000).astype(int)
THOUGHTS = np.exp(RNG.normal(8.7, 0.9, 1000)).clip(1, LONGEST).astype(int)


@pytest.fixture(scope="module")
def grid():
    tokens = np.concatenate([CHATS, THOUGHTS])
    requests = [Request(prompt=str(row)) for row in range(len(tokens))]
    rows = table(requests, tokens.tolist(), (tokens >= LONGEST).tolist())
    return Grid.fit(rows, ModelConfig(num_bins=96, tail_quantile=0.99))


def prediction(grid, tokens, **options):
    """What is predicted by someone who knows the lengths' distribution."""
    edges = np.asarray(grid.edges)
    cumulative = np.searchsorted(np.sort(tokens), edges, side="right") / len(tokens)
    cumulative[0], cumulative[-1] = 0.0, 1.0
    return LengthPrediction(edges=edges, cumulative=cumulative, **options)


def test_the_grid_resolves_long_answers_and_reaches_beyond_them(grid):
    edges = np.asarray(grid.edges)
    assert (np.diff(edges) > 0).all()
    assert edges[-1] > 4 * LONGEST - 2
    assert edges[grid.num_body_bins] > 0.7 * LONGEST
    long = edges[edges > 100]
    assert (long[1:] / long[:-1]).max() < 1.2  # no bin is wider than a fifth of the length


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("tokens", [CHATS, THOUGHTS], ids=["chats", "thoughts"])
def test_quantiles_are_right_within_a_bin(grid, tokens, level):
    assert prediction(grid, tokens).quantile(level) == pytest.approx(np.quantile(tokens, level), rel=0.2)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 4 * LONGEST), min_size=1, max_size=20),
    st.booleans(),
    st.floats(-20, 20),
)
def test_the_loss_of_any_length_is_finite_and_can_be_learned_from(grid, tokens, censored, size):
    edges = list(grid.edges[: grid.num_body_bins + 1])
    objective = MopeObjective(edges, list(grid.boundaries))
    torch.manual_seed(0)
    gate = (size * torch.randn(len(tokens), 3)).requires_grad_()
    heads = (size * torch.randn(len(tokens), 3, len(edges))).requires_grad_()
    labels = Labels.of(torch.tensor(tokens, dtype=torch.float32), torch.full((len(tokens),), censored), 1000.0)
    loss = objective(gate, heads, labels)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert torch.isfinite(gate.grad).all()
    assert torch.isfinite(heads.grad).all()


def test_what_remains_of_a_long_answer_is_long(grid):
    thoughts = prediction(grid, THOUGHTS)
    for generated in (0, 1000, 10_000, 30_000, 100_000):
        rest = thoughts.remaining(generated)
        assert 10 < rest.median <= rest.quantile(0.9) < np.inf
        assert rest.mean > 0
    assert thoughts.remaining(20_000).quantile(0.9) + 20_000 > thoughts.quantile(0.9)
    assert prediction(grid, THOUGHTS, max_tokens=LONGEST).remaining(30_000).quantile(0.999) <= LONGEST - 30_000
