"""The static trunk: averages over prompt and context, filters over neighbours, padding without effect, ONNX."""

import dataclasses

import numpy as np
import pytest
import torch

from mope.backends.network import MopeNetwork, build_encoder, embed
from mope.backends.static_encoder import StaticConfig, StaticEncoder

CLS, SEP, PAD = 2, 3, 0
CONFIG = StaticConfig(vocab_size=40, vector_size=4, sep_token_id=SEP)
WITH_FILTERS = dataclasses.replace(CONFIG, num_filters=6)


def encoder(config=CONFIG):
    torch.manual_seed(0)
    return build_encoder(dataclasses.asdict(config)).eval()


def text(*ids, width=None):
    ids = [*ids, *[PAD] * ((width or len(ids)) - len(ids))]
    return torch.tensor([ids]), torch.tensor([[int(i != PAD) for i in ids]])


def test_it_is_the_means_of_prompt_and_context():
    static = encoder()
    assert isinstance(static, StaticEncoder)
    vectors = static.vectors.weight.detach()
    found = static(*text(CLS, 10, 11, SEP, 20, 21, 22, SEP))[0]
    prompt, context = vectors[[CLS, 10, 11, SEP]], vectors[[20, 21, 22, SEP]]
    expected = torch.cat([prompt.mean(0), context.mean(0)])
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-5)


def test_without_a_context_its_mean_is_zero():
    found = embed(encoder(), *text(CLS, 10, SEP))[0]
    assert found.shape == (8,)
    assert found[4:].abs().max() == 0


@pytest.mark.parametrize("config", [CONFIG, WITH_FILTERS], ids=["means", "filters"])
@pytest.mark.parametrize("ids", [(CLS, 10, 11, SEP, 20, SEP), (CLS, 10, 11, SEP)], ids=["context", "prompt"])
@pytest.mark.parametrize("width", [9, 30])
def test_padding_changes_nothing(config, ids, width):
    np.testing.assert_allclose(
        embed(encoder(config), *text(*ids)).detach(),
        embed(encoder(config), *text(*ids, width=width)).detach(),
        rtol=1e-6,
    )


def test_a_filter_gives_its_strongest_response_to_three_neighbours_in_the_prompt():
    static = encoder(WITH_FILTERS)
    ids = (CLS, 10, 11, 12, SEP, 20, SEP)
    found = static(*text(*ids))[0]
    assert found.shape == (WITH_FILTERS.hidden_size,) == (14,)
    around = torch.cat([torch.zeros(1, 4), static.vectors.weight[list(ids)], torch.zeros(1, 4)])
    responses = torch.stack([static.filters(around[at : at + 3].flatten()) for at in range(5)])  # of the prompt alone
    np.testing.assert_allclose(found[8:].detach(), responses.relu().amax(dim=0).detach(), rtol=1e-5)


def test_filters_see_the_order_of_words_and_averages_do_not():
    one, other = text(CLS, 10, 11, 12, 13, SEP), text(CLS, 12, 10, 13, 11, SEP)
    static = encoder(WITH_FILTERS)
    apart = (static(*one) - static(*other))[0].detach().abs()
    assert apart[:8].max() < 1e-6
    assert apart[8:].max() > 1e-3


def network(config=CONFIG):
    return MopeNetwork(
        encoder(config), number_mean=[1.0], number_scale=[0.5], num_llms=2, llm_dim=4, gate_borders=[50.5], num_heads=2,
        head_borders=[10.5, 50.5, 200.5], start=100.0, head_hidden=8,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, WITH_FILTERS], ids=["means", "filters"])
def test_its_onnx_graph_says_the_same(config, tmp_path):
    from mope.export.graphs import check_form, check_values, write_graph

    path = tmp_path / "model.onnx"
    write_graph(network(config), path, 64)
    check_form(path, network(config))
    assert check_values(path, network(config), 64, 1e-5) < 1e-5
