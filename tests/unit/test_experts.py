"""Which rows and which loss each network gets, in both designs."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import learnable

from mope import artifact
from mope.backends.network import OrdinalHead
from mope.backends.torch_backend import TorchBackend, empty_networks
from mope.errors import DataError
from mope.training import experts
from mope.training.config import FitConfig, ModelConfig
from mope.training.data.table import RowTable
from mope.training.encoders import find_encoder
from mope.training.experts import expert_rows, train_baseline, train_mope
from mope.training.fit import FitResult
from mope.training.objectives import MopeObjective, RankingObjective, RegressionObjective
from mope.training.prepare import prepare

SETTINGS = FitConfig(accelerator="cpu", epochs=1)


class Rows:
    def __init__(self, tokens, censored):
        self.tokens_R, self.censored_R = np.array(tokens), np.array(censored, dtype=bool)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.booleans()), min_size=1, max_size=60),
    st.floats(0, 0.5),
)
def test_every_row_has_an_expert_and_margins_only_add(rows, overlap):
    own = Rows([length for length, _ in rows], [censored for _, censored in rows])
    borders = (50.5, 200.5)
    plain = [set(expert_rows(own, borders, k, 0.0).tolist()) for k in range(3)]
    wide = [set(expert_rows(own, borders, k, overlap).tolist()) for k in range(3)]
    for k in range(3):
        assert plain[k] <= wide[k]
    bucket = np.searchsorted(borders, own.tokens_R)
    for row, k in enumerate(bucket):
        assert [row in rows_of for rows_of in plain] == [e == k or (own.censored_R[row] and e > k) for e in range(3)]


def test_the_margin_is_a_share_of_each_border():
    own = Rows([42, 43, 50, 57, 58, 169, 171, 229, 231], [False] * 9)
    taken = [own.tokens_R[expert_rows(own, (50.0, 200.0), k, 0.15)].tolist() for k in range(3)]
    assert taken == [[42, 43, 50, 57], [43, 50, 57, 58, 169, 171, 229], [171, 229, 231]]


@pytest.fixture
def fits(monkeypatch):
    """What `fit` was asked to do, without doing it."""
    asked = []

    def fake_fit(network, objective, train, validation, settings, folder, **options):
        asked.append((network, objective, train, folder.name, options))
        return FitResult(0.0, 1, 0.0, folder / "metrics.csv")

    monkeypatch.setattr(experts, "fit", fake_fit)
    return asked


def prepared(tiny_encoder, **options):
    rows = RowTable(
        pa.concat_tables([learnable(n, split).table for split, n in (("train", 150), ("validation", 90), ("test", 40))])
    )
    source = find_encoder(str(tiny_encoder))
    settings = ModelConfig(**{"num_bins": 12, "num_tail_bins": 2, "max_prompt_tokens": 16, "num_experts": 2, **options})
    return prepare(rows, settings, source, "t"), source


@pytest.mark.parametrize(("asked", "found"), [(None, {0.1}), (0.0, {0.0}), (0.3, {0.3})])
def test_dropout_inside_the_encoder(tiny_encoder, tmp_path, fits, asked, found):
    rows, source = prepared(tiny_encoder)
    settings = SETTINGS.model_copy(update={"encoder_dropout": asked, "dropout": 0.25})
    (network,), _ = train_mope(rows, source, settings, tmp_path, resume=False)
    dropouts = {name: module.p for name, module in network.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {p for name, p in dropouts.items() if name.startswith("encoder.")} == found
    assert {p for name, p in dropouts.items() if name.startswith(("gate.", "heads."))} == {0.25}


@pytest.mark.parametrize(("design", "num_experts"), [("shared", 1), ("shared", 2), ("separate", 1), ("separate", 2)])
def test_trained_networks_fit_into_the_artifact(tiny_encoder, tmp_path, fits, design, num_experts):
    rows, source = prepared(tiny_encoder, design=design, num_experts=num_experts)
    networks, results = train_mope(rows, source, SETTINGS, tmp_path, resume=False)
    assert len(networks) == len(results) == len(fits)
    saved = tmp_path / "saved"
    with artifact.writing(saved) as folder:
        TorchBackend(networks, rows.config).save(folder)
        artifact.write_json(folder / "config.json", {})
    loaded = TorchBackend.load(saved, rows.config)
    for trained, again in zip(networks, loaded.networks, strict=True):
        for name, tensor in trained.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name])
    assert len(empty_networks(rows.config)) == len(networks)


def test_the_shared_design_trains_one_network_on_all_rows(tiny_encoder, tmp_path, fits):
    rows, source = prepared(tiny_encoder)
    train_mope(rows, source, SETTINGS, tmp_path, resume=True)
    [(network, objective, train, name, options)] = fits
    assert train is rows.train
    assert isinstance(objective, MopeObjective)
    assert name == "model"
    assert options["resume"] is True
    assert len(network.heads) == 2


def test_the_separate_design_trains_each_expert_on_its_bucket(tiny_encoder, tmp_path, fits):
    rows, source = prepared(tiny_encoder, design="separate", boundaries=(100,))
    train_mope(rows, source, SETTINGS, tmp_path, resume=False)
    assert [name for _, _, _, name, _ in fits] == ["gate", "expert-0", "expert-1"]
    assert fits[0][2] is rows.train
    assert fits[0][0].heads.__len__() == 0
    assert fits[1][2].tokens_R.max() < 100
    assert fits[2][2].tokens_R.min() > 100
    assert len(fits[1][2]) + len(fits[2][2]) == 150
    assert all(network.gate is None and len(network.heads) == 1 for network, *_ in fits[1:])


def test_an_expert_with_few_rows_is_refused_before_it_is_trained(tiny_encoder, tmp_path, fits):
    rows, source = prepared(tiny_encoder, design="separate", boundaries=(480,))
    with pytest.raises(DataError, match=r"expert 1 has \d+ training and \d+ validation rows in its bucket, needs 32"):
        train_mope(rows, source, SETTINGS.model_copy(update={"overlap": 0.1}), tmp_path, resume=False)
    assert fits == []


def test_baselines_have_the_same_encoder_and_one_output(tiny_encoder, tmp_path, fits):
    rows, source = prepared(tiny_encoder)
    for name, objective, pool in (("single_expert", RegressionObjective, 50), ("ranker", RankingObjective, 1)):
        network, _, scale = train_baseline(name, rows, source, SETTINGS, tmp_path, resume=False)
        assert isinstance(fits[-1][1], objective)
        assert fits[-1][4]["pool_batches"] == pool
        assert scale == pytest.approx(rows.train.tokens_R.mean())
        gate, heads, _ = network(
            *(
                rows.train.batch(np.arange(3))[key]
                for key in ("input_ids_BS", "attention_mask_BS", "numbers_BF", "llm_B")
            )
        )
        assert gate is None
        assert heads.shape == (3, 1, 1)


def test_the_single_head_is_mope_s_kind_of_head_with_as_many_weights(tiny_encoder, tmp_path, fits):
    rows, source = prepared(tiny_encoder)
    networks, _ = train_mope(rows, source, SETTINGS, tmp_path, resume=False)
    alone, _, _ = train_baseline("single_head", rows, source, SETTINGS, tmp_path, resume=False)
    assert isinstance(fits[-1][1], MopeObjective)
    assert alone.gate is None
    (head,) = alone.heads
    assert isinstance(head, OrdinalHead)

    def size(*modules):
        return sum(weights.numel() for module in modules for weights in module.parameters())

    several = size(networks[0].gate, *networks[0].heads)
    assert size(head) == pytest.approx(several, rel=0.25)  # the gate's last layer is narrower than a head's


def test_networks_start_from_the_pretrained_weights(tiny_encoder, tmp_path, fits):
    rows, source = prepared(tiny_encoder)
    networks, _ = train_mope(rows, source, SETTINGS, tmp_path, resume=False)
    for name, tensor in source.load().state_dict().items():
        assert torch.equal(networks[0].encoder.state_dict()[name], tensor)
