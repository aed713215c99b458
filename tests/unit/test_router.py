"""The router: votes of its parts, combined to probabilities, and parts switched off."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.errors import ConfigError
from mope.router import PARTS, Lookup, Router, parts_key, softmax
from mope.rules import RuleTable, match_rules

PRIOR = np.array([0.5, 0.3, 0.2])
# one neighbour along each axis, so that an embedding near an axis gets that bucket's vote
LOOKUP = Lookup(np.eye(3, dtype=np.float16), np.array([0, 1, 2], np.uint8), neighbours=1)
RULES = RuleTable({"yes_no": (1.0, 0.5), "essay": (7.0, 0.5)})


def combiners(num_experts=3):
    keys = [("gate",), ("rules",), ("lookup",), PARTS]
    return {parts_key(key): (np.tile(np.eye(num_experts), (len(key), 1)), np.zeros(num_experts)) for key in keys}


def router(parts=PARTS, lookup=LOOKUP):
    return Router(np.array([50.5, 300.5]), PRIOR, RULES, lookup, combiners(), tuple(parts))


logits = st.lists(st.floats(-60, 60), min_size=3, max_size=3)


@given(logits, logits, st.text(max_size=30))
def test_probabilities_sum_to_one(gate, embedding, prompt):
    hits = [match_rules(prompt)]
    for parts in (*((part,) for part in PARTS), PARTS, ()):
        found = router().probabilities(np.array([gate]), np.array([embedding]), hits, parts)
        assert found.shape == (1, 3)
        assert found.sum() == pytest.approx(1.0)
        assert np.all(found >= 0)


def test_each_part_alone_says_what_it_knows():
    gate, embedding, hits = np.array([[0.0, 5.0, 0.0]]), np.array([[0.0, 0.0, 2.0]]), [match_rules("yes or no")]
    routed = {
        part: int(router([part]).probabilities(gate, embedding, hits).argmax()) for part in ("gate", "rules", "lookup")
    }
    assert routed == {"gate": 1, "rules": 0, "lookup": 2}


def test_the_gate_alone_with_unit_weights_is_its_softmax():
    gate = np.array([[1.0, 2.0, 0.5]])
    found = router(["gate"]).probabilities(gate, np.zeros((1, 3)), [match_rules("")])
    assert found == pytest.approx(softmax(gate))


def test_parts_given_overrule_the_parts_switched_on():
    gate, embedding, hits = np.array([[0.0, 9.0, 0.0]]), np.array([[0.0, 0.0, 1.0]]), [match_rules("")]
    assert router(["gate"]).probabilities(gate, embedding, hits, ["lookup"]).argmax() == 2


def test_no_parts_leave_the_prior():
    assert (
        router([]).probabilities(np.zeros((2, 3)), np.zeros((2, 3)), [match_rules("")] * 2).tolist()
        == [PRIOR.tolist()] * 2
    )


def test_a_combiner_weighs_votes_in_the_order_of_the_parts():
    only_lookup = np.concatenate([np.zeros((6, 3)), np.eye(3)])
    own = Router(
        np.array([50.5, 300.5]), PRIOR, RULES, LOOKUP, {"gate+rules+lookup": (only_lookup, np.zeros(3))}, PARTS
    )
    found = own.probabilities(np.array([[9.0, 0.0, 0.0]]), np.array([[0.0, 1.0, 0.0]]), [match_rules("essay")])
    assert found == pytest.approx(LOOKUP.votes(np.array([[0.0, 1.0, 0.0]]), 3, PRIOR))


def test_one_expert_needs_no_votes():
    alone = Router(np.zeros(0), np.ones(1), RULES, None, {}, ())
    assert alone.probabilities(np.zeros((3, 1)), np.zeros((3, 4)), [match_rules("")] * 3).tolist() == [[1.0]] * 3


def test_a_lookup_prefers_near_neighbours_and_is_smoothed_by_the_prior():
    stored = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], np.float16)
    lookup = Lookup(stored, np.array([0, 1, 1], np.uint8), neighbours=3, sharpness=10.0)
    votes = lookup.votes(np.array([[5.0, 0.0]]), 2, np.array([0.5, 0.5]))[0]
    near, far = 1.0, np.exp(10 * (stored[1:, 0].astype(float) - 1)).sum()
    assert votes == pytest.approx(np.array([0.5 + near, 0.5 + far]) / (1 + near + far), abs=1e-4)


def test_a_lookup_with_fewer_rows_than_neighbours_asks_all_of_them():
    lookup = Lookup(np.eye(2, dtype=np.float16), np.array([0, 1], np.uint8), neighbours=32)
    assert lookup.votes(np.array([[1.0, 1.0]]), 2, np.array([0.5, 0.5]))[0] == pytest.approx([0.5, 0.5])


def test_a_text_without_direction_gets_finite_votes():
    assert np.isfinite(LOOKUP.votes(np.zeros((1, 3)), 3, PRIOR)).all()


def test_keys_do_not_depend_on_order():
    assert parts_key(["lookup", "gate"]) == parts_key(["gate", "lookup"]) == "gate+lookup"
    assert parts_key([]) == "prior"


def test_an_unknown_part_is_refused():
    with pytest.raises(ConfigError, match="unknown router part 'oracle'; known are gate, rules, lookup"):
        router().probabilities(np.zeros((1, 3)), np.zeros((1, 3)), [match_rules("")], ["gate", "oracle"])


def test_parts_that_were_never_combined_are_refused():
    with pytest.raises(ConfigError, match=r"no router was fitted for the parts gate\+rules"):
        router().probabilities(np.zeros((1, 3)), np.zeros((1, 3)), [match_rules("")], ["gate", "rules"])


def test_a_lookup_that_was_not_built_is_refused():
    with pytest.raises(ConfigError, match="without the router part 'lookup'"):
        router(lookup=None).probabilities(np.zeros((1, 3)), np.zeros((1, 3)), [match_rules("")])


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6), st.floats(-1e3, 1e3))
def test_softmax_does_not_overflow_and_ignores_a_shift(values, shift):
    assert softmax(np.array(values)).sum() == pytest.approx(1.0)
    assert softmax(np.array(values) + shift) == pytest.approx(softmax(np.array(values)), abs=1e-9)
