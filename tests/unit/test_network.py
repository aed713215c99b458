"""The network and its PyTorch engine: shapes, masks, standardised numbers, weight files."""

import numpy as np
import pytest
import torch

from mope import LengthPredictor, Request
from mope.backends.network import MopeNetwork, build_encoder, load_encoder
from mope.backends.torch_backend import TorchBackend, empty_networks, weight_files
from mope.training.encoders import find_encoder


def network(tiny_encoder, num_gate=3, num_heads=3, num_outputs=5):
    return MopeNetwork(
        load_encoder(str(tiny_encoder)),
        number_mean=[1.0, 10.0],
        number_scale=[0.5, 0.0],
        num_llms=2,
        llm_dim=4,
        num_gate=num_gate,
        num_heads=num_heads,
        num_outputs=num_outputs,
        head_hidden=8,
    ).eval()


def inputs(lengths=(4, 7), seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=rng)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask, torch.zeros(len(lengths), 2), torch.zeros(len(lengths), dtype=torch.long)


def test_shapes(tiny_encoder):
    gate, heads, embedding = network(tiny_encoder)(*inputs())
    assert gate.shape == (2, 3)
    assert heads.shape == (2, 3, 5)
    assert embedding.shape == (2, 16)
    assert {tensor.dtype for tensor in (gate, heads, embedding)} == {torch.float32}


def test_a_network_without_gate_or_heads(tiny_encoder):
    assert network(tiny_encoder, num_gate=0, num_heads=1)(*inputs())[0] is None
    assert network(tiny_encoder, num_heads=0)(*inputs())[1] is None


def test_what_is_masked_does_not_count(tiny_encoder):
    ids, mask, numbers, llm = inputs((4, 7))
    changed = torch.where(mask.bool(), ids, torch.tensor(50))
    own = network(tiny_encoder)
    first, second = own(ids, mask, numbers, llm), own(changed, mask, numbers, llm)
    alone = own(ids[:1, :4], mask[:1, :4], numbers[:1], llm[:1])
    for one, two, three in zip(first, second, alone, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one[:1], three, atol=1e-5, rtol=1e-5)


def test_numbers_are_standardised_clamped_and_constants_ignored(tiny_encoder):
    own = network(tiny_encoder)
    ids, mask, _, llm = inputs((4,))

    def gate(first, second):
        return own(ids, mask, torch.tensor([[first, second]]), llm)[0]

    assert torch.equal(gate(1.0, 10.0), gate(1.0, 99.0))  # scale 0: constant in training
    assert not torch.allclose(gate(1.0, 0.0), gate(3.0, 0.0))
    assert torch.equal(gate(1e9, 0.0), gate(17.0, 0.0))  # (17 - 1) / 2 = 8 standard deviations


def test_an_unknown_llm_starts_like_any_other_and_learns_apart(tiny_encoder):
    own = network(tiny_encoder)
    ids, mask, numbers, _ = inputs((4, 4))
    ids = ids[:1].repeat(2, 1)
    gate = own(ids, mask, numbers, torch.tensor([0, 2]))[0]
    torch.testing.assert_close(gate[0], gate[1])
    torch.nn.init.ones_(own.llm.weight[2:])
    gate = own(ids, mask, numbers, torch.tensor([0, 2]))[0]
    assert not torch.allclose(gate[0], gate[1])


def test_an_encoder_is_loaded_without_its_pooling_layer(tiny_encoder):
    loaded = load_encoder(str(tiny_encoder))
    built = build_encoder(find_encoder(str(tiny_encoder)).config)
    assert loaded.state_dict().keys() == built.state_dict().keys()
    assert not any("pooler" in name for name in loaded.state_dict())
    torch.testing.assert_close(
        loaded.get_input_embeddings().weight, load_encoder(str(tiny_encoder)).get_input_embeddings().weight
    )


@pytest.mark.parametrize("design", ["tiny", "tiny_separate"])
def test_weight_files_hold_the_networks_in_order(design, request):
    predictor = LengthPredictor.from_pretrained(request.getfixturevalue(design))
    networks = empty_networks(predictor.config)
    assert len(networks) == len(weight_files(predictor.config))
    for fresh, loaded in zip(networks, predictor.backend.networks, strict=True):
        assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == {
            name: tensor.shape for name, tensor in loaded.state_dict().items()
        }


def test_the_shared_design_gives_the_networks_own_outputs(predictor):
    encoded = predictor.encoder.encode([Request(prompt="hello"), Request(prompt="Write an essay about Rome")])
    raw = predictor.backend.run(encoded, lambda gate, _: pytest.fail("a shared trunk runs all heads anyway"))
    ids, mask = encoded.padded(predictor.config.special_ids[2])
    arrays = (ids, mask, encoded.numbers_BF, encoded.llm_B)
    with torch.inference_mode():
        gate, heads, embedding = predictor.backend.networks[0](*(torch.from_numpy(array) for array in arrays))
    assert np.array_equal(raw.gate_BK, gate.numpy())
    assert np.array_equal(raw.heads_BKN, heads.numpy())
    assert np.array_equal(raw.embedding_BH, embedding.numpy())


def test_the_separate_design_runs_the_experts_that_are_asked_for(tiny_separate):
    backend = LengthPredictor.from_pretrained(tiny_separate).backend
    encoder = LengthPredictor.from_pretrained(tiny_separate).encoder
    encoded = encoder.encode([Request(prompt="hello"), Request(prompt="why"), Request(prompt="list ten ideas")])
    everyone = backend.run(encoded, lambda gate, _: np.ones(gate.shape, bool))
    chosen = np.array([[True, False], [False, True], [False, True]])
    some = backend.run(encoded, lambda gate, embedding: chosen)
    assert np.abs(some.heads_BKN - everyone.heads_BKN)[chosen].max() < 1e-5
    assert not some.heads_BKN[~chosen].any()


def test_dropout_is_off_when_serving(predictor):
    encoded = predictor.encoder.encode([Request(prompt="hello")])
    first, second = (predictor.backend.run(encoded, lambda gate, _: gate > 0) for _ in range(2))
    assert np.array_equal(first.heads_BKN, second.heads_BKN)
    predictor.backend.networks[0].train()
    assert not TorchBackend(predictor.backend.networks, predictor.config).networks[0].training
