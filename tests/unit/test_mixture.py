"""From network outputs and a route to one distribution."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.backends import RawOutputs
from mope.calibration import Calibration
from mope.mixture import assemble, cumulative, expert_probabilities, experts_needed
from mope.request import Request

routes = st.integers(1, 5).flatmap(lambda k: st.lists(st.floats(1e-6, 1.0), min_size=k, max_size=k))


def mixed(experts, route, combination):
    """Experts given by their probabilities, the tail one bin."""
    with np.errstate(divide="ignore"):
        return cumulative(np.log(experts), route, (1.0,), combination)


@given(routes, st.integers(0, 9))
def test_the_mixture_is_a_distribution_between_its_experts(weights, seed):
    route = np.array([weights]) / sum(weights)
    experts = np.random.default_rng(seed).dirichlet(np.ones(6), (1, len(weights)))
    for combination in ("top1", "mixture"):
        cdf = mixed(experts, route, combination)[0]
        own = np.concatenate([np.zeros((len(weights), 1)), experts[0].cumsum(axis=1)], axis=1)
        assert cdf[0] == 0.0
        assert cdf[-1] == 1.0
        assert np.all(np.diff(cdf) >= 0)
        assert np.all(cdf >= own.min(axis=0) - 1e-9)
        assert np.all(cdf <= own.max(axis=0) + 1e-9)


def test_top1_is_the_routed_expert_and_mixture_the_weighted_sum():
    experts = np.array([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    route = np.array([[0.2, 0.5, 0.3]])
    assert mixed(experts, route, "top1")[0].tolist() == [0.0, 0.0, 1.0]
    assert mixed(experts, route, "mixture")[0] == pytest.approx([0.0, 0.2 + 0.15, 1.0])


def test_an_expert_below_the_threshold_neither_runs_nor_counts():
    route = np.array([[0.005, 0.995]])
    assert experts_needed(route, "mixture").tolist() == [[False, True]]
    assert mixed(np.array([[[1.0, 0.0], [0.0, 1.0]]]), route, "mixture")[0].tolist() == [0.0, 0.0, 1.0]


@given(routes)
def test_the_routed_expert_always_runs_and_top1_runs_no_other(weights):
    route = np.array([weights]) / sum(weights)
    assert experts_needed(route, "mixture")[0, route.argmax()]
    assert experts_needed(route, "top1").sum() == 1


def test_a_tie_goes_to_the_expert_of_shorter_answers():
    assert experts_needed(np.array([[0.5, 0.5]]), "top1").tolist() == [[True, False]]


def test_the_tail_bin_is_spread_by_its_shares():
    found = expert_probabilities(np.log([[[0.5, 0.3, 0.2]]]), np.array([0.7, 0.3]))
    assert found[0, 0] == pytest.approx([0.5, 0.3, 0.14, 0.06])


@given(routes, st.integers(0, 9), st.sampled_from(["top1", "mixture"]))
def test_few_steps_give_what_mixing_the_experts_over_the_grid_gives(weights, seed, combination):
    rng = np.random.default_rng(seed)
    route, heads = np.array([weights]) / sum(weights), rng.normal(0, 4, (1, len(weights), 7))
    shares = tuple(rng.dirichlet(np.ones(4)).tolist())
    needed = experts_needed(route, combination)
    kept = needed * (1.0 if combination == "top1" else route)
    body = np.einsum("bk,bkm->bm", kept / kept.sum(), expert_probabilities(heads, np.array(shares)))
    expected = np.concatenate([[0.0], body[0].cumsum()])
    np.testing.assert_allclose(cumulative(heads, route, shares, combination)[0], expected, atol=1e-12)


def test_assemble_routes_mixes_and_calibrates(predictor):
    config, router = predictor.config, predictor.router
    encoded = predictor.encoder.encode([Request(prompt="Write an essay."), Request(prompt="yes or no?")])
    raw = predictor.backend.run(encoded, lambda gate, _: np.ones(gate.shape, bool))
    history = np.array([False, True])
    plain = assemble(config, router, Calibration.identity(), raw, encoded.rule_hits, history)
    result = assemble(config, router, predictor.calibration, raw, encoded.rule_hits, history)
    assert plain.cdf_BE == pytest.approx(cumulative(raw.heads_BKN, result.route_BK, config.tail_shares, "mixture"))
    assert result.cdf_BE == pytest.approx(predictor.calibration(plain.cdf_BE, history))
    assert not np.allclose(result.cdf_BE, plain.cdf_BE)


def test_assemble_takes_parts_and_combination_for_ablations(predictor):
    encoded = predictor.encoder.encode([Request(prompt="in one word: why?")])
    run = predictor.backend.run(encoded, lambda gate, _: np.ones(gate.shape, bool))
    raw = RawOutputs(np.array([[0.0, 0.0, 9.0]], np.float32), run.heads_BKN, run.embedding_BH)
    identity, history = Calibration.identity(), np.array([False])

    def expert(parts):
        result = assemble(
            predictor.config,
            predictor.router,
            identity,
            raw,
            encoded.rule_hits,
            history,
            parts=parts,
            combination="top1",
        )
        experts = expert_probabilities(raw.heads_BKN, np.asarray(predictor.config.tail_shares))
        own = np.concatenate([[0.0], experts[0, result.route_BK.argmax()].cumsum()])
        assert result.cdf_BE[0] == pytest.approx(own)
        return int(result.route_BK.argmax())

    assert expert(["gate"]) == 2
    assert expert(["rules"]) == 0
