"""Many predictions at once: row by row the numbers of single ones, far quicker, immutable, and strict."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions import EDGES, predictions, progress
from timing import least_ratio

import mope
from mope.errors import ConfigError, DataError
from mope.grid import body_edges, tail_edges
from mope.prediction import LengthPrediction
from mope.prediction_batch import PredictionBatch

LEVELS = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
rows = st.lists(st.tuples(predictions(generated=st.sampled_from([0, 0, 7, 5000])), progress), min_size=1, max_size=6)


def uniform(**fields):
    return LengthPrediction(EDGES, np.linspace(0, 1, len(EDGES)), **fields)


def many(num_rows, seed=0):
    """Predictions on a grid as large as that of a trained predictor."""
    edges = np.concatenate([body_edges(800, 64), tail_edges(800.5, 32_768, 16)])
    masses = np.random.default_rng(seed).dirichlet(np.ones(len(edges) - 1), num_rows)
    return [LengthPrediction(edges, np.concatenate([[0.0], row.cumsum() / row.sum()])) for row in masses]


@given(rows, st.floats(0, 10_000))
def test_each_row_has_the_numbers_of_the_single_prediction(pairs, further):
    alone = [prediction.remaining(generated) for prediction, generated in pairs]
    batch = PredictionBatch.of([prediction for prediction, _ in pairs]).remaining([generated for _, generated in pairs])
    assert batch.quantiles(LEVELS) == pytest.approx(np.array([one.quantiles(LEVELS) for one in alone]), rel=1e-12)
    assert batch.median == pytest.approx(np.array([one.median for one in alone]), rel=1e-12)
    assert batch.mean == pytest.approx(np.array([one.mean for one in alone]), rel=1e-9)
    assert batch.cdf(further) == pytest.approx(np.array([one.cdf(further) for one in alone]), rel=1e-12)
    assert batch.generated.tolist() == [one.generated for one in alone]


@given(rows)
def test_stacking_what_remains_is_what_remains_of_the_stack(pairs):
    stacked = PredictionBatch.of([prediction.remaining(generated) for prediction, generated in pairs])
    batch = PredictionBatch.of([prediction for prediction, _ in pairs]).remaining([generated for _, generated in pairs])
    assert stacked.quantiles(LEVELS).tolist() == batch.quantiles(LEVELS).tolist()
    assert stacked.mean.tolist() == batch.mean.tolist()


@given(rows, st.data())
def test_taking_rows_and_asking_can_be_swapped(pairs, data):
    batch = PredictionBatch.of([prediction for prediction, _ in pairs]).remaining([generated for _, generated in pairs])
    positions = data.draw(st.lists(st.integers(-len(pairs), len(pairs) - 1), max_size=8))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs))))
    for chosen in (positions, mask):
        taken, index = batch.take(chosen), np.asarray(chosen, dtype=bool if chosen is mask else int)
        assert len(taken) == len(batch.median[index])
        assert taken.quantiles(LEVELS) == pytest.approx(batch.quantiles(LEVELS)[index], rel=1e-12)
        assert taken.mean == pytest.approx(batch.mean[index], rel=1e-9)
        assert taken.remaining(5).median == pytest.approx(batch.remaining(5).median[index], rel=1e-12)


def test_a_batch_may_run_empty():
    empty = PredictionBatch.of([uniform()]).take([])
    assert len(empty) == 0
    assert empty.remaining([]).quantiles((0.5, 0.9)).shape == (0, 2)
    assert empty.mean.shape == empty.median.shape == empty.cdf(3).shape == (0,)


def test_one_number_of_generated_tokens_counts_for_every_row():
    batch = PredictionBatch.of([uniform(), uniform(max_tokens=50)])
    assert batch.remaining(30).median.tolist() == batch.remaining([30, 30]).median.tolist()
    assert batch.remaining(60).median[1] == 0.0
    assert batch.remaining(60).median[0] > 0.0


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.float32, np.float64, list])
def test_generated_tokens_may_be_of_any_type_of_number(dtype):
    generated = [3, 400] if dtype is list else np.array([3, 400], dtype)
    batch = PredictionBatch.of([uniform(), uniform()])
    assert batch.remaining(generated).median.tolist() == batch.remaining([3.0, 400.0]).median.tolist()


@pytest.mark.parametrize(
    ("generated", "message"),
    [
        ([1, -1], r"got -1 in row 1; expected a finite number"),
        ([float("nan"), 0], "got nan in row 0; expected a finite number"),
        ([0, float("inf")], "got inf in row 1; expected a finite number"),
        ([1, 2, 3], r"got the shape \(3,\); expected one number, or one per row, \(2,\)"),
        ([[1, 2]], r"got the shape \(1, 2\); expected one number, or one per row"),
        ([1, "many"], "expected numbers of tokens; could not convert"),
    ],
)
def test_generated_tokens_that_are_none_are_refused_in_one_line(generated, message):
    with pytest.raises(ConfigError, match=f"^generated: {message}") as refusal:
        PredictionBatch.of([uniform(), uniform()]).remaining(generated)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("levels", [[0.5, 1.5], [-0.1], [float("nan")], [[0.5]]])
def test_levels_that_are_none_are_refused(levels):
    with pytest.raises(ConfigError, match="quantile levels lie between 0 and 1"):
        PredictionBatch.of([uniform()]).quantiles(levels)


def test_predictions_on_different_grids_are_no_batch():
    other = LengthPrediction(EDGES[1:], np.linspace(0, 1, len(EDGES) - 1))
    with pytest.raises(DataError, match="one grid; row 1 has another: batch"):
        PredictionBatch.of([uniform(), other])
    equal = LengthPrediction(EDGES.copy(), np.linspace(0, 1, len(EDGES)))
    assert len(PredictionBatch.of([uniform(), equal])) == 2


def test_grids_that_go_further_are_the_same_grid():
    """Corrected predictions of LLMs that answer longer have further edges."""
    longer = LengthPrediction(np.append(EDGES, [2 * EDGES[-1], 4 * EDGES[-1]]), np.linspace(0, 1, len(EDGES) + 2))
    both = PredictionBatch.of([uniform(), longer, uniform()])
    for row, alone in enumerate([uniform(), longer, uniform()]):
        assert both.quantiles([0.1, 0.5, 0.9, 0.99])[row] == pytest.approx(alone.quantiles([0.1, 0.5, 0.9, 0.99]))
        rest = alone.remaining(EDGES[-2])
        assert both.remaining(EDGES[-2]).median[row] == pytest.approx(rest.median)


def test_no_predictions_are_no_batch():
    with pytest.raises(DataError, match="at least one prediction; got none"):
        PredictionBatch.of([])


@pytest.mark.parametrize("chosen", [[2], [-3], [True], [0.5], np.zeros((1, 2), int)])
def test_rows_that_do_not_exist_are_refused(chosen):
    with pytest.raises(DataError, match="rows are positions below 2 or a mask of 2 booleans"):
        PredictionBatch.of([uniform(), uniform()]).take(chosen)


def test_nothing_of_a_batch_can_be_changed():
    prediction = uniform()
    batch = PredictionBatch.of([prediction])
    with pytest.raises(FrozenInstanceError):
        batch.generated = np.ones(1)
    with pytest.raises(ValueError, match="read-only"):
        batch.cumulative[0, 1] = 0.5
    with pytest.raises(ValueError, match="read-only"):
        batch.remaining(5).survival[0] = 0.5
    prediction.cumulative[1] = 0.01  # the prediction itself stays as it was
    assert batch.cumulative[0, 1] != 0.01


def test_a_batch_comes_with_mope_and_says_what_it_is():
    assert mope.PredictionBatch is PredictionBatch
    assert (
        repr(mope.PredictionBatch.of([uniform()]))
        == f"PredictionBatch(1 rows, grid of {len(EDGES)} edges up to 4000 tokens)"
    )


def test_a_predictor_hands_its_tail_on(predictor):
    (prediction,) = predictor.predict_batch(["Write an essay."])
    assert prediction.tail_index == predictor.config.tail_index
    assert PredictionBatch.of([prediction]).remaining(20_000).median[0] == prediction.remaining(20_000).median > 0


def test_a_batch_is_far_quicker_than_its_predictions_one_by_one():
    predictions = many(256)
    batch = PredictionBatch.of(predictions)
    generated = np.random.default_rng(1).integers(0, 800, len(predictions))

    def one_by_one():
        return [one.remaining(out).quantiles((0.5, 0.9)) for one, out in zip(predictions, generated, strict=True)]

    ratio = least_ratio(lambda: batch.remaining(generated).quantiles((0.5, 0.9)), one_by_one, 1 / 15)
    assert ratio < 1 / 15  # measured: about 1 / 140
