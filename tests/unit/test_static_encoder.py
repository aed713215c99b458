"""The static trunk: averages over prompt and context, padding without effect, ONNX that says the same."""

import dataclasses

import numpy as np
import pytest
import torch

from mope.backends.network import MopeNetwork, build_encoder, embed
from mope.backends.static_encoder import StaticConfig, StaticEncoder

CLS, SEP, PAD = 2, 3, 0
CONFIG = StaticConfig(vocab_size=40, vector_size=4, sep_token_id=SEP)


def encoder():
    torch.manual_seed(0)
    return build_encoder(dataclasses.asdict(CONFIG)).eval()


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


@pytest.mark.parametrize("width", [9, 30])
def test_padding_changes_nothing(width):
    ids = (CLS, 10, 11, SEP, 20, SEP)
    np.testing.assert_allclose(
        embed(encoder(), *text(*ids)).detach(), embed(encoder(), *text(*ids, width=width)).detach(), rtol=1e-6
    )


def network():
    return MopeNetwork(
        encoder(), number_mean=[1.0], number_scale=[0.5], num_llms=2, llm_dim=4, gate_borders=[50.5], num_heads=2,
        head_borders=[10.5, 50.5, 200.5], start=100.0, head_hidden=8,
    ).eval()  # fmt: skip


def test_its_onnx_graph_says_the_same(tmp_path):
    from mope.export.graphs import check_form, check_values, write_graph

    path = tmp_path / "model.onnx"
    write_graph(network(), path, 64)
    check_form(path, network())
    assert check_values(path, network(), 64, 1e-5) < 1e-5
