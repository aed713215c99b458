"""The network and its PyTorch engine: shapes, masks, standardised numbers, weight files."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from mope import LengthPredictor, Request
from mope.artifact import weight_files
from mope.backends.network import MopeNetwork, OrdinalHead, PiecewiseLinear, build_encoder, load_encoder
from mope.backends.torch_backend import TorchBackend, empty_networks
from mope.training.encoders import find_encoder

BUCKETS, BINS = [50.5, 200.5], [10.5, 50.5, 200.5, 800.5]


def network(tiny_encoder, gate_borders=BUCKETS, num_heads=3, head_borders=BINS):
    return MopeNetwork(
        load_encoder(str(tiny_encoder)),
        number_mean=[1.0, 10.0],
        number_scale=[0.5, 0.0],
        num_llms=2,
        llm_dim=4,
        gate_borders=gate_borders,
        num_heads=num_heads,
        head_borders=head_borders,
        start=100.0,
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


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=6, unique=True).map(sorted),
    st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=8).map(sorted),
)
def test_pieces_rise_with_their_number_and_tell_where_it_lies(edges, numbers):
    """Each piece goes from 0 to 1 in order; all together they are the number again, between its edges."""
    edges = [edges[0], *(b for a, b in pairwise(edges) if b - a > 1e-3)]
    encode = PiecewiseLinear([[], edges, [0.0, 1.0]])
    given_BF = torch.tensor([[7.0, number, 0.5] for number in numbers])
    pieces = encode(given_BF)
    if len(edges) < 3:
        assert pieces.shape == (len(numbers), 0)
        return
    assert pieces.shape == (len(numbers), len(edges) - 1)
    assert ((pieces >= 0) & (pieces <= 1)).all()
    assert (pieces.diff(dim=0) >= 0).all()
    assert (pieces.diff(dim=1) <= 1e-6).all()  # a piece begins where the one before is full
    widths = torch.tensor(edges).diff()
    whole = edges[0] + (pieces * widths).sum(1)
    torch.testing.assert_close(whole, given_BF[:, 1].clamp(edges[0], edges[-1]), rtol=1e-3, atol=1e-2)


def test_pieces_and_dropout_of_the_text_in_a_network(tiny_encoder):
    """Gate and heads read the pieces; dropout of the text works in training alone and leaves the embedding as it is."""
    encoder = load_encoder(str(tiny_encoder))
    made = MopeNetwork(
        encoder, number_mean=[1.0, 10.0], number_scale=[0.5, 0.0], number_edges=[[0.0, 1.0, 4.0], []], num_llms=2,
        llm_dim=4, gate_borders=BUCKETS, num_heads=3, head_borders=BINS, start=100.0, head_hidden=8, dropout=0.0,
        text_dropout=0.5,
    )  # fmt: skip
    assert made.gate.layers[0].in_features == 16 + 2 + 2 + 4
    calls = [made.eval()(*inputs())[0] for _ in range(2)]
    torch.testing.assert_close(*calls)
    made.train()
    encoder.eval()
    gates, _, embeddings = zip(*(made(*inputs()) for _ in range(4)), strict=True)
    assert not torch.allclose(gates[0], gates[1])
    torch.testing.assert_close(embeddings[0], embeddings[1])


def test_a_network_without_gate_or_heads(tiny_encoder):
    assert network(tiny_encoder, gate_borders=None, num_heads=1)(*inputs())[0] is None
    assert network(tiny_encoder, num_heads=0)(*inputs())[1] is None


def test_plain_heads_have_one_output_each(tiny_encoder):
    _, heads, _ = network(tiny_encoder, head_borders=None)(*inputs())
    assert heads.shape == (2, 3, 1)


def ordinal(location, scale, borders=BINS, start=100.0):
    """A head whose logistic distribution lies where it is told, whatever it reads."""
    head = OrdinalHead(2, 4, borders=borders, start=start, dropout=0.0)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    head.bias.data[-2] = math.log(location / start)
    head.bias.data[-1] = math.log(math.expm1(scale - head.MIN_SCALE))
    return head


@given(st.floats(2.0, 5000.0), st.floats(0.06, 5.0))
def test_an_ordinal_head_gives_the_bins_of_a_logistic_distribution(location, scale):
    logits = ordinal(location, scale)(torch.zeros(1, 2))[0].detach().double()
    cdf = scipy.stats.logistic.cdf(np.log(BINS), loc=math.log(location), scale=scale)
    wanted = np.diff([0.0, *cdf, 1.0])
    np.testing.assert_allclose(torch.softmax(logits, 0).numpy(), wanted, atol=2e-5)


def test_far_out_bins_keep_a_finite_likelihood_and_a_gradient():
    head = ordinal(1e6, 0.06)
    logits = head(torch.zeros(1, 2))
    assert torch.isfinite(logits).all()
    (-torch.log_softmax(logits, -1)[0, 0]).backward()
    assert head.bias.grad[-2] > 0  # a shorter answer pulls the location down, however far it is


def test_free_logits_reshape_the_distribution():
    head = ordinal(100.0, 0.5)
    before = torch.softmax(head(torch.zeros(1, 2)), -1)[0].detach()
    head.bias.data[1] += math.log(2.0)
    after = torch.softmax(head(torch.zeros(1, 2)), -1)[0].detach()
    torch.testing.assert_close(after[1] / after[0], 2 * before[1] / before[0])


def test_one_class_needs_no_border():
    assert OrdinalHead(2, 4, borders=[], start=100.0, dropout=0.0)(torch.zeros(3, 2)).shape == (3, 1)


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


def test_llms_that_share_a_prompt_share_the_trunk_s_work(predictor, monkeypatch):
    """A batch of one prompt for many LLMs goes through the encoder once, and gives what single requests give."""
    requests = [Request(prompt="hello there", target_llm=llm) for llm in ("chatgpt", "llama-3-8b", "")]
    requests += [Request(prompt="why?"), Request(prompt="hello there", max_tokens=50), Request(prompt="why?")]
    everyone = lambda gate, _: np.ones(gate.shape, bool)  # noqa: E731
    single = [predictor.backend.run(predictor.encoder.encode([request]), everyone) for request in requests]
    network = predictor.backend.networks[0]
    seen = []
    monkeypatch.setattr(
        network, "forward", lambda *inputs: seen.append(inputs) or type(network).forward(network, *inputs)
    )
    together = predictor.backend.run(predictor.encoder.encode(requests), everyone)
    assert len(seen[0][0]) == 2  # texts
    for name in ("gate_BK", "heads_BKN", "embedding_BH"):
        expected = np.concatenate([getattr(one, name) for one in single])
        assert np.abs(getattr(together, name) - expected).max() < 1e-4


def test_dropout_is_off_when_serving(predictor):
    encoded = predictor.encoder.encode([Request(prompt="hello")])
    first, second = (predictor.backend.run(encoded, lambda gate, _: gate > 0) for _ in range(2))
    assert np.array_equal(first.heads_BKN, second.heads_BKN)
    predictor.backend.networks[0].train()
    assert not TorchBackend(predictor.backend.networks, predictor.config).networks[0].training
