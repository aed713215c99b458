"""What is settled before training, from training rows alone."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import learnable, table

from mope.errors import ConfigError, DataError
from mope.features import NUMBER_NAMES
from mope.request import Request
from mope.training.config import ModelConfig
from mope.training.data.table import RowTable
from mope.training.encoders import find_encoder
from mope.training.prepare import choose_boundaries, number_edges, prepare


def model(**options):
    settings = {"num_bins": 16, "num_tail_bins": 3, "max_prompt_tokens": 16, "max_context_tokens": 4, "min_llm_rows": 5}
    return ModelConfig(**{**settings, **options})


def three_splits(train, *others):
    return RowTable(pa.concat_tables([train.table, *(other.table for other in others)]))


ROWS = three_splits(learnable(120), learnable(40, "validation"), learnable(40, "test"))


def test_borders_are_tertiles_between_two_counts():
    assert choose_boundaries(np.arange(1, 301), model()) == (100.5, 200.5)
    assert choose_boundaries(np.arange(1, 301), model(num_experts=1)) == ()
    assert choose_boundaries(np.arange(1, 301), model(boundary_quantiles=(0.1, 0.99))) == (30.5, 297.5)


def test_given_borders_are_taken():
    assert choose_boundaries(np.array([5]), model(boundaries=(53, 210))) == (53.5, 210.5)


@given(st.lists(st.integers(1, 3000), min_size=50, max_size=200), st.integers(1, 8))
def test_borders_increase_and_lie_on_no_length(tokens, num_experts):
    try:
        borders = choose_boundaries(np.array(tokens), model(num_experts=num_experts))
    except DataError:
        assert len(np.unique(np.floor(np.quantile(tokens, np.arange(1, num_experts) / num_experts)))) < num_experts - 1
        return
    assert len(borders) == num_experts - 1
    assert np.all(np.diff(borders) >= 1)
    assert not set(borders) & set(tokens)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"boundaries": (53,)}, ConfigError, "3 experts need 2 inner borders; --boundaries gives 1"),
        ({"boundaries": (210, 53)}, ConfigError, r"--boundaries must increase .*; got \[210.0, 53.0\]"),
        ({"boundaries": (53.1, 53.7)}, ConfigError, "--boundaries must increase by a token"),
        ({"boundaries": (0, 53)}, ConfigError, "be at least 1"),
        ({"boundary_quantiles": (0.5,)}, ConfigError, "--boundary-quantiles gives 1"),
        ({"boundary_quantiles": (33, 66)}, ConfigError, "--boundary-quantiles lie between 0 and 1"),
        ({}, DataError, r"length quantiles coincide .* use fewer experts than 3 or give --boundaries"),
    ],
)
def test_borders_that_cannot_be_used_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        choose_boundaries(np.array([7] * 90 + [8] * 10), model(**options))


def test_the_config_follows_from_the_training_rows(tiny_encoder):
    prepared = prepare(ROWS, model(), find_encoder(str(tiny_encoder)), "cl100k_base")
    config, tokens = prepared.config, ROWS.split("train").response_tokens
    assert [len(rows) for rows in (prepared.train, prepared.validation, prepared.test)] == [120, 40, 40]
    assert config.edges[config.num_body_bins] == int(np.quantile(tokens, 0.99)) + 0.5
    assert len(config.edges) == config.num_body_bins + 1 + 3
    assert config.edges[-1] >= 32_768
    assert np.all(np.diff(config.edges) > 0)
    assert sum(config.tail_shares) == pytest.approx(1.0)
    assert config.target_llms == ("llama-3-8b",)
    assert config.number_names == NUMBER_NAMES
    assert config.label_tokenizer == "cl100k_base"
    standard = (prepared.train.numbers_RF - np.array(config.number_mean)) * np.array(config.number_scale)
    varies = np.array(config.number_scale) > 0
    assert 0 < varies.sum() < len(NUMBER_NAMES)
    assert standard.mean(axis=0) == pytest.approx(np.zeros(len(NUMBER_NAMES)), abs=1e-4)
    assert standard.std(axis=0)[varies] == pytest.approx(np.ones(varies.sum()), abs=1e-3)


def test_validation_and_test_rows_change_nothing(tiny_encoder):
    source = find_encoder(str(tiny_encoder))
    other = table([Request(prompt="write " * 50, target_llm="other")] * 40, [9000] * 40, split="test")
    first = prepare(ROWS, model(), source, "t").config
    second = prepare(
        three_splits(ROWS.split("train"), learnable(40, "validation", seed=9), other), model(), source, "t"
    ).config
    assert first == second


def test_rare_llms_get_no_embedding(tiny_encoder):
    names = ["often"] * 60 + ["seldom"] * 4 + [None] * 56
    train = table([Request(prompt="a", target_llm=name) for name in names], list(range(1, 121)))
    prepared = prepare(
        three_splits(train, learnable(40, "validation"), learnable(40, "test")),
        model(),
        find_encoder(str(tiny_encoder)),
        "t",
    )
    assert prepared.config.target_llms == ("often",)
    assert np.bincount(prepared.train.llm_R).tolist() == [60, 60]


def test_an_answer_longer_than_the_grid_stretches_it(tiny_encoder):
    tokens = [*ROWS.split("train").response_tokens[:-1], 100_000]
    requests = ROWS.split("train").requests()
    rows = three_splits(table(requests, tokens), learnable(40, "validation"), learnable(40, "test"))
    assert prepare(rows, model(), find_encoder(str(tiny_encoder)), "t").config.edges[-1] >= 100_000


def test_one_expert_has_no_router(tiny_encoder):
    assert prepare(ROWS, model(num_experts=1), find_encoder(str(tiny_encoder)), "t").config.router_parts == ()


def test_edges_are_quantiles_and_numbers_of_two_values_have_none() -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(size=4000), rng.integers(0, 2, 4000), np.ones(4000)], axis=1).astype(np.float32)
    bent, binary, constant = number_edges(rows, 8)
    assert (binary, constant) == ((), ())
    assert len(bent) == 9
    shares = np.histogram(rows[:, 0], bent)[0] / len(rows)
    np.testing.assert_allclose(shares, 1 / 8, atol=0.01)
