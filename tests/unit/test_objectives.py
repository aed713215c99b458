"""What training minimises: proper scores, censored rows by their tail, gradients that stay finite."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mope.errors import ConfigError
from mope.training.objectives import (
    DistillationObjective,
    Labels,
    MopeObjective,
    RankingObjective,
    RegressionObjective,
    class_nll,
)

EDGES = [0.5, 2.5, 5.5, 10.5, 20.5, 40.5]  # five bins, and the tail above
NUM_BINS = len(EDGES)
BOUNDARIES = [5.5, 20.5]
SCALE = 10.0


def uncut(tokens):
    return Labels.of(tokens, torch.zeros(len(tokens), dtype=torch.bool), SCALE)


def objective(**options):
    return MopeObjective(EDGES, BOUNDARIES, **options)


def parts(gate, heads, tokens, censored=None, **options):
    tokens = torch.tensor(tokens, dtype=torch.float32)
    censored = torch.zeros(len(tokens), dtype=torch.bool) if censored is None else torch.tensor(censored)
    return objective(**options)(gate, heads, Labels.of(tokens, censored, SCALE))


def test_likelihood_is_that_of_the_bin_and_censored_likelihood_that_of_the_tail():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    bins = torch.tensor([1])
    assert class_nll(p.log(), bins, torch.tensor([False])).item() == pytest.approx(-math.log(0.2))
    assert class_nll(p.log(), bins, torch.tensor([True])).item() == pytest.approx(-math.log(0.2 + 0.3 + 0.4))


@given(st.lists(st.floats(-9, 9), min_size=6, max_size=6), st.integers(0, 5), st.booleans())
def test_censored_likelihood_is_the_probability_of_its_class_and_all_above(logits, position, censored):
    log_p = F.log_softmax(torch.tensor([logits], dtype=torch.float64), dim=-1)
    mass = log_p.exp()[0, position:].sum() if censored else log_p.exp()[0, position]
    found = class_nll(log_p, torch.tensor([position]), torch.tensor([censored]))
    assert found.item() == pytest.approx(-math.log(mass), abs=1e-9)


def test_a_length_falls_into_the_bin_whose_edges_enclose_it():
    heads = torch.randn(8, 1, NUM_BINS)
    log_p = F.log_softmax(heads[:, 0], dim=-1)
    tokens, bins = [1, 2, 3, 5, 6, 20, 40, 41], [0, 0, 1, 1, 2, 3, 4, 5]
    expected = -log_p[torch.arange(8), torch.tensor(bins)].mean()
    assert parts(None, heads, tokens).parts["mixture"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_mixture_weighs_the_experts_by_the_gate():
    gate, heads = torch.randn(4, 3), torch.randn(4, 3, NUM_BINS)
    mixed = (gate.softmax(-1).unsqueeze(-1) * heads.softmax(-1)).sum(1)
    expected = -mixed[torch.arange(4), torch.tensor([0, 1, 3, 5])].log().mean()
    found = parts(gate, heads, [1, 4, 15, 999]).parts
    assert found["mixture"].item() == pytest.approx(expected.item(), abs=1e-6)
    buckets = torch.tensor([0, 0, 1, 2])
    assert found["gate"].item() == pytest.approx(F.cross_entropy(gate, buckets).item(), abs=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_several_draws_count_as_their_mean(gated):
    """A row with three draws is worth a third of three rows with one draw each, in every part of the loss."""
    gate = torch.randn(2, 3).requires_grad_() if gated else None
    heads = torch.randn(2, 3 if gated else 1, NUM_BINS).requires_grad_()
    draws = torch.tensor([[3.0, 18.0, 45.0], [7.0, math.nan, math.nan]])
    alike = torch.tensor([0.5, 0.5])
    labels = Labels(draws, torch.zeros(2, dtype=torch.bool), alike, torch.tensor([10.0, 20.0]))
    apart = torch.tensor([0, 0, 0, 1])
    shares = Labels(
        torch.tensor([3.0, 18.0, 45.0, 7.0])[:, None],
        torch.zeros(4, dtype=torch.bool),
        torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]),
        torch.tensor([10.0, 10.0, 10.0, 20.0]),
    )
    drawn = objective()(gate, heads, labels)
    expected = objective()(None if gate is None else gate[apart], heads[apart], shares)
    for name, part in expected.parts.items():
        assert drawn.parts[name].item() == pytest.approx(part.item(), rel=1e-5), name
    drawn.total.backward()
    assert torch.isfinite(heads.grad).all()


def test_rows_count_by_their_weight():
    heads = torch.randn(2, 1, NUM_BINS)
    tokens, uncut_B = torch.tensor([3.0, 30.0]), torch.zeros(2, dtype=torch.bool)
    parts_of = [
        objective()(None, heads[[row]], Labels.of(tokens[[row]], uncut_B[[row]], SCALE)).total for row in range(2)
    ]
    weighed = Labels(tokens[:, None], uncut_B, torch.tensor([0.9, 0.1]), torch.full((2,), SCALE))
    expected = 0.9 * parts_of[0] + 0.1 * parts_of[1]
    assert objective()(None, heads, weighed).total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_crps_is_its_definition():
    heads = torch.randn(1, 1, NUM_BINS)
    cdf = heads.softmax(-1)[0, 0].cumsum(0)[:-1].tolist()
    widths = np.diff(EDGES)
    expected = sum(w * (c - (edge >= 7)) ** 2 for w, c, edge in zip(widths, cdf, EDGES[1:], strict=True)) / 10
    assert parts(None, heads, [7]).parts["crps"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("part", ["crps", "mixture"])
def test_the_true_distribution_is_the_minimum(part):
    """A proper score: optimised on samples, the head finds the distribution that they came from."""
    truth = torch.tensor([0.3, 0.1, 0.25, 0.05, 0.2, 0.1])
    middles = torch.tensor([1.0, 4.0, 8.0, 15.0, 30.0, 50.0])
    counts = (truth * 1000).long()
    tokens = middles.repeat_interleave(counts)
    logits = torch.zeros(NUM_BINS, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")
    own = objective()

    def step():
        optimizer.zero_grad()
        heads = logits.expand(len(tokens), 1, NUM_BINS)
        loss = own(None, heads, uncut(tokens)).parts[part]
        loss.backward()
        return loss

    optimizer.step(step)
    assert logits.softmax(0).detach().numpy() == pytest.approx(truth.numpy(), abs=0.01)


def test_censored_rows_find_the_true_distribution_where_dropping_their_flag_does_not():
    """Half of the answers are cut at 8 tokens."""
    truth = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.1, 0.1])
    middles = torch.tensor([1.0, 4.0, 8.0, 15.0, 30.0, 50.0])
    tokens = middles.repeat_interleave((truth * 1000).long())
    cut = (torch.arange(len(tokens)) % 2 == 0) & (tokens >= 8)
    lengths = torch.where(cut, torch.tensor(8.0), tokens)

    def fitted(censored):
        logits = torch.zeros(NUM_BINS, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            labels = Labels.of(lengths, censored, SCALE)
            objective()(None, logits.expand(len(lengths), 1, NUM_BINS), labels).parts["mixture"].backward()
            optimizer.step()
        return logits.softmax(0).detach().numpy()

    assert fitted(cut) == pytest.approx(truth.numpy(), abs=0.02)
    assert np.abs(fitted(torch.zeros_like(cut)) - truth.numpy()).max() > 0.15


def test_crps_of_a_censored_row_looks_below_its_length_alone():
    heads = torch.zeros(1, 1, NUM_BINS, requires_grad=True)
    parts(None, heads, [7], [True]).parts["crps"].backward()
    cdf = [i / NUM_BINS for i in range(1, NUM_BINS)]
    expected = sum(w * c**2 for w, c, edge in zip(np.diff(EDGES), cdf, EDGES[1:], strict=True) if edge < 7) / 10
    assert parts(None, heads, [7], [True]).parts["crps"].item() == pytest.approx(expected, rel=1e-5)
    assert heads.grad[0, 0, -1] < 0  # mass is pushed up


def test_an_expert_learns_from_its_bucket_and_a_margin():
    gate, heads = torch.zeros(4, 3), torch.randn(4, 3, NUM_BINS, requires_grad=True)
    # borders 5.5 and 20.5, margin 20 %: 6 is also the first's, 5 also the second's, 12 the second's alone
    parts(gate, heads, [6, 5, 12, 24], overlap=0.2).parts["experts"].backward()
    trained = (heads.grad.abs().sum(-1) > 0).tolist()
    assert trained == [[True, True, False], [True, True, False], [False, True, False], [False, True, True]]


def test_a_censored_row_teaches_every_expert_that_it_may_belong_to():
    gate, heads = torch.zeros(1, 3), torch.randn(1, 3, NUM_BINS, requires_grad=True)
    parts(gate, heads, [12], [True], overlap=0.0).parts["experts"].backward()
    assert (heads.grad.abs().sum(-1) > 0).tolist() == [[False, True, True]]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(1, 1e6), st.booleans()), min_size=1, max_size=8),
    st.sampled_from([1e-3, 1.0, 30.0, 200.0]),
    st.integers(0, 5),
)
def test_loss_and_gradients_are_finite(rows, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    gate = (torch.randn(len(rows), 3, generator=generator) * scale).requires_grad_()
    heads = (torch.randn(len(rows), 3, NUM_BINS, generator=generator) * scale).requires_grad_()
    loss = parts(gate, heads, [length for length, _ in rows], [censored for _, censored in rows])
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert torch.isfinite(gate.grad).all()
    assert torch.isfinite(heads.grad).all()


def test_weights_add_up_to_the_total():
    gate, heads = torch.randn(3, 3), torch.randn(3, 3, NUM_BINS)
    loss = parts(gate, heads, [1, 9, 99], crps_weight=2.0, expert_weight=3.0, gate_weight=5.0)
    found = loss.parts
    expected = found["mixture"] + 2 * found["crps"] + 3 * found["experts"] + 5 * found["gate"]
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_gate_alone_is_trained_on_its_cross_entropy():
    gate = torch.randn(2, 3)
    loss = parts(gate, None, [1, 99], gate_weight=0.5)
    assert loss.total.item() == pytest.approx(F.cross_entropy(gate, torch.tensor([0, 2])).item(), rel=1e-6)
    assert set(loss.parts) == {"gate"}


def test_many_heads_without_a_gate_are_refused():
    with pytest.raises(ConfigError, match="2 heads need a gate"):
        parts(None, torch.zeros(1, 2, NUM_BINS), [5])


def test_a_toy_task_is_learned():
    torch.manual_seed(0)
    x = torch.randn(256, 2)
    tokens = torch.where(x[:, 0] > 0, 30.0, 3.0)
    censored = torch.zeros(256, dtype=torch.bool)
    gate, heads = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3 * NUM_BINS)
    optimizer = torch.optim.Adam([*gate.parameters(), *heads.parameters()], lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = objective()(gate(x), heads(x).view(-1, 3, NUM_BINS), Labels.of(tokens, censored, SCALE))
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < 0.2 * losses[0]
    assert (gate(x).argmax(1) == torch.where(x[:, 0] > 0, 2, 0)).float().mean() > 0.95


def test_regression_is_mean_absolute_error_and_ignores_what_lies_above_a_cut():
    heads = torch.tensor([2.0, 5.0, 5.0]).view(3, 1, 1)
    tokens = torch.tensor([30.0, 30.0, 30.0])
    loss = RegressionObjective(10.0)(None, heads, Labels.of(tokens, torch.tensor([False, False, True])))
    assert loss.total.item() == pytest.approx((1 + 2 + 0) / 3)
    below = RegressionObjective(10.0)(None, heads[:1], Labels.of(tokens[:1], torch.tensor([True])))
    assert below.total.item() == pytest.approx(1.0)


def test_ranking_is_list_mle():
    scores, tokens = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([10.0, 99.0, 50.0])
    loss = RankingObjective()(None, scores.view(3, 1, 1), uncut(tokens))
    ordered = [-1.0, 2.0, 0.3]  # by length, longest first
    expected = sum(math.log(sum(math.exp(s) for s in ordered[i:])) - ordered[i] for i in range(3)) / 3
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


def test_the_right_order_ranks_better_than_the_wrong_one():
    tokens, own = torch.tensor([1.0, 2.0, 3.0]), RankingObjective()
    right, wrong = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1), torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    assert own(None, right, uncut(tokens)).total < own(None, wrong, uncut(tokens)).total


def distributions(rows, seed=0):
    """A student's gate and heads, and what a teacher says: log mixture and log gate."""
    rng = torch.Generator().manual_seed(seed)
    gate, heads = torch.randn(rows, 3, generator=rng), torch.randn(rows, 3, NUM_BINS, generator=rng)
    log_mix = torch.logsumexp(F.log_softmax(gate, -1).unsqueeze(-1) + F.log_softmax(heads, -1), dim=1)
    return gate, heads, log_mix, F.log_softmax(gate, -1)


def distill(weight, gate, heads, *taught, tokens=(4.0, 15.0, 30.0)):
    return DistillationObjective(objective(), weight)(gate, heads, uncut(torch.tensor(tokens)), *taught)


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn_from_it():
    gate, heads, log_mix, log_gate = distributions(3)
    found = distill(1.0, gate, heads, log_mix, log_gate)
    assert found.total.item() == pytest.approx(0.0, abs=1e-6)
    other = distributions(3, seed=1)
    assert distill(1.0, gate, heads, *other[2:]).total.item() > 0.1


def test_the_teacher_s_part_is_a_divergence_of_mixtures_and_gates_and_a_distance_in_tokens():
    gate, heads, log_mix, log_gate = distributions(3)
    _, _, taught_mix, taught_gate = distributions(3, seed=1)
    parts = distill(1.0, gate, heads, taught_mix, taught_gate).parts
    expected = (taught_mix.exp() * (taught_mix - log_mix)).sum(-1).mean()
    assert parts["teacher_mixture"].item() == pytest.approx(expected.item(), rel=1e-5)
    expected = (taught_gate.exp() * (taught_gate - log_gate)).sum(-1).mean()
    assert parts["teacher_gate"].item() == pytest.approx(expected.item(), rel=1e-5)
    p, q = (log.exp().numpy().cumsum(-1)[:, :-1] for log in (log_mix, taught_mix))
    expected = ((p - q) ** 2 * np.diff(EDGES)).sum(-1).mean() / 10.0
    assert parts["teacher_crps"].item() == pytest.approx(expected, rel=1e-5)


def test_rows_of_which_the_teacher_says_nothing_are_learned_from_their_labels_alone():
    gate, heads, *_ = distributions(3)
    mix, taught_gate = distributions(3, seed=1)[2:]
    nothing = [torch.full_like(said, torch.nan) for said in (mix, taught_gate)]
    alone, silent = distill(0.7, gate, heads), distill(0.7, gate, heads, *nothing)
    assert silent.total.item() == pytest.approx(alone.total.item())
    assert silent.parts["mixture"].item() == pytest.approx(alone.parts["mixture"].item())
    partly = [said.clone() for said in (mix, taught_gate)]
    for said in partly:
        said[1] = torch.nan
    totals = {
        tokens: distill(1.0, gate, heads.requires_grad_(), *partly, tokens=tokens).total
        for tokens in [(4.0, 15.0, 30.0), (4.0, 2.0, 30.0), (9.0, 15.0, 2.0)]
    }
    asked, other_second, other_rest = totals.values()
    assert other_second.item() != pytest.approx(asked.item())
    assert other_rest.item() == pytest.approx(asked.item())
    asked.backward()
    assert heads.grad.isfinite().all()
    assert (heads.grad.abs().sum((1, 2)) > 0).all()


def test_labels_and_teacher_share_the_loss_by_weight_and_without_a_teacher_labels_are_all():
    gate, heads, *_ = distributions(3)
    taught = distributions(3, seed=1)[2:]
    labels, teacher = distill(0.0, gate, heads, *taught).total, distill(1.0, gate, heads, *taught).total
    assert distill(0.3, gate, heads, *taught).total.item() == pytest.approx((0.7 * labels + 0.3 * teacher).item())
    assert distill(0.3, gate, heads).total.item() == pytest.approx(labels.item())
    with pytest.raises(ConfigError, match="has heads"):
        distill(0.3, gate, None, *taught)


def test_following_the_teacher_leads_to_its_distribution():
    gate, heads, *_ = distributions(3)
    taught_mix, taught_gate = distributions(3, seed=1)[2:]
    gate.requires_grad_(), heads.requires_grad_()
    optimiser = torch.optim.Adam([gate, heads], lr=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        distill(1.0, gate, heads, taught_mix, taught_gate).total.backward()
        optimiser.step()
    mixed = torch.logsumexp(F.log_softmax(gate, -1).unsqueeze(-1) + F.log_softmax(heads, -1), dim=1)
    np.testing.assert_allclose(mixed.detach().exp(), taught_mix.exp(), atol=0.01)
