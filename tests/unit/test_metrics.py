import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mope import metrics
from mope.errors import DataError

LENGTHS = st.integers(0, 5000).map(float)


def pairs(min_rows=2):
    return st.integers(min_rows, 40).flatmap(lambda n: arrays(float, (2, n), elements=LENGTHS))


def tau_b(x, y):
    """Kendall's tau-b by counting pairs, as defined."""
    upper = np.triu_indices(len(x), 1)
    dx, dy = (np.sign(np.subtract.outer(v, v))[upper] for v in (x, y))
    ties = np.sqrt(float(np.sum(dx != 0)) * float(np.sum(dy != 0)))
    return float(np.sum(dx * dy)) / ties if ties else 0.0


def test_point_metrics_by_hand():
    result = metrics.point_metrics([10, 20, 30, 100], [12, 20, 20, 60])
    assert result["mae"] == 13.0
    assert result["median_ae"] == 6.0
    assert result["rmse"] == pytest.approx(np.sqrt((4 + 0 + 100 + 1600) / 4))
    assert result["kendall_tau"] == pytest.approx(5 / np.sqrt(6 * 5))
    assert result["r2"] == pytest.approx(1 - 1704 / 5000)


@given(pairs())
def test_tau_agrees_with_the_definition(data):
    assert metrics.ranking(data[0], data[1]) == pytest.approx(tau_b(data[0], data[1]), abs=1e-9)


@given(pairs())
def test_tau_ignores_monotone_transforms_and_changes_sign_with_order(data):
    tau = metrics.ranking(data[0], data[1])
    assert metrics.ranking(data[0], np.log1p(data[1])) == pytest.approx(tau, abs=1e-9)
    assert metrics.ranking(data[0], -data[1]) == pytest.approx(-tau, abs=1e-9)


@given(pairs())
def test_error_inequalities(data):
    result = metrics.point_metrics(data[0], data[1])
    assert 0.0 <= result["mae"] <= result["rmse"] + 1e-6
    assert result["median_ae"] <= 2 * result["mae"] + 1e-9
    assert result["r2"] <= 1.0


def test_constant_predictions_stay_strict_json():
    result = metrics.evaluate([5, 6, 7], [6, 6, 6], [0, 1, 2], quantiles_NQ=[[6] * 4] * 3)
    json.dumps(result, allow_nan=False)
    assert result["kendall_tau"] == 0.0
    assert result["kendall_tau_ci"] == [0.0, 0.0]
    assert metrics.point_metrics([5, 5], [5, 5])["r2"] == 1.0
    assert metrics.point_metrics([5, 5], [4, 5])["r2"] == 0.0


def test_pinball_and_coverage_by_hand():
    result = metrics.quantile_metrics([10, 20], [[8, 12], [30, 40]], [0.1, 0.9])
    assert result["pinball_by_level"] == pytest.approx(
        {"0.1": (0.1 * 2 + 0.9 * 10) / 2, "0.9": (0.1 * 2 + 0.1 * 20) / 2}
    )
    assert result["pinball"] == pytest.approx((4.6 + 1.1) / 2)
    assert result["coverage"] == {"0.1": 0.5, "0.9": 1.0}


@given(pairs())
def test_median_pinball_is_half_the_absolute_error(data):
    pinball = metrics.quantile_metrics(data[0], data[1][:, None], [0.5])["pinball"]
    assert pinball == pytest.approx(metrics.point_metrics(data[0], data[1])["mae"] / 2)


@given(arrays(float, 30, elements=LENGTHS), st.sampled_from([0.1, 0.5, 0.9, 0.99]), st.floats(0, 5000))
def test_no_constant_beats_the_empirical_quantile(actual, level, other):
    best = np.quantile(actual, level, method="inverted_cdf")

    def loss(constant):
        return metrics.quantile_metrics(actual, np.full((30, 1), constant), [level])["pinball"]

    assert loss(best) <= loss(other) + 1e-9


def test_coverage_of_true_quantiles_is_nominal():
    actual = np.random.default_rng(0).exponential(200, 20_000)
    quantiles = np.tile(-200 * np.log1p(-np.array(metrics.QUANTILES)), (len(actual), 1))
    coverage = metrics.quantile_metrics(actual, quantiles, metrics.QUANTILES)["coverage"]
    assert coverage == pytest.approx({"0.1": 0.1, "0.5": 0.5, "0.9": 0.9, "0.99": 0.99}, abs=0.012)


@settings(max_examples=20)
@given(pairs(min_rows=3), st.integers(1, 5), st.integers(0, 3))
def test_fast_means_equal_the_general_bootstrap(data, num_groups, seed):
    groups = np.arange(data.shape[1]) % num_groups
    (fast,) = metrics.bootstrap_means(data[0][:, None], groups, num_samples=30, seed=seed)
    slow = metrics.bootstrap(lambda rows: {"m": data[0][rows].mean()}, groups, num_samples=30, seed=seed)
    assert fast == pytest.approx(slow["m"])


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        shared = rng.normal(0, 1, 60)
        values = (shared[:, None] + rng.normal(0, 0.3, (60, 4))).ravel()
        ((low, high),) = metrics.bootstrap_means(
            values[:, None], np.repeat(np.arange(60), 4), num_samples=300, seed=trial
        )
        hits += low <= 0.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_whole_conversations_are_resampled():
    """Ten equal rows per conversation carry no more evidence than one."""
    values = np.random.default_rng(2).normal(size=(50, 1))
    (one,) = metrics.bootstrap_means(values, np.arange(50), seed=3)
    (ten,) = metrics.bootstrap_means(np.repeat(values, 10, axis=0), np.repeat(np.arange(50), 10), seed=3)
    assert ten == pytest.approx(one)


def test_groups_may_be_strings_and_seeds_repeat():
    rng = np.random.default_rng(4)
    actual, predicted = rng.exponential(200, (2, 60))
    groups = np.array([f"chat-{row // 2:02}" for row in range(60)])
    result = metrics.evaluate(actual, predicted, groups, seed=5)
    assert result == metrics.evaluate(actual, predicted, np.arange(60) // 2, seed=5)
    assert result["mae_ci"][0] < result["mae"] < result["mae_ci"][1]
    assert result["kendall_tau_ci"][0] < result["kendall_tau"] < result["kendall_tau_ci"][1]
    assert result["num_rows"] == 60
    assert result["mae_ci"] != metrics.evaluate(actual, predicted, groups, seed=6)["mae_ci"]


def test_evaluate_with_quantiles_has_every_documented_key():
    actual = np.arange(1.0, 101.0)
    quantiles = actual[:, None] + np.array([-5.0, 0.0, 5.0, 9.0])
    result = metrics.evaluate(actual, actual, np.arange(100), quantiles_NQ=quantiles)
    assert set(result) == {
        "num_rows", "mae", "mae_ci", "median_ae", "rmse", "kendall_tau", "kendall_tau_ci", "r2",
        "pinball", "coverage", "coverage_ci",
    }  # fmt: skip
    assert result["mae"] == 0.0
    assert result["kendall_tau"] == pytest.approx(1.0)
    assert result["coverage"] == {"0.1": 0.0, "0.5": 1.0, "0.9": 1.0, "0.99": 1.0}
    assert result["coverage_ci"]["0.9"] == [1.0, 1.0]


def test_paired_difference_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(7)
    actual = rng.exponential(300, 200)
    noise = rng.normal(0, 100, 200)
    groups = np.arange(200)
    better = metrics.paired_difference(actual, actual + noise, actual + 1.1 * noise, groups)
    assert better["mae_difference"] == pytest.approx(-0.1 * np.abs(noise).mean())
    assert better["ci"][0] < better["ci"][1] < 0.0
    own = metrics.evaluate(actual, actual + noise, groups)["mae_ci"]
    assert better["ci"][1] - better["ci"][0] < (own[1] - own[0]) / 5
    assert metrics.paired_difference(actual, noise, noise, groups) == {"mae_difference": 0.0, "ci": [0.0, 0.0]}


def test_by_bucket_puts_a_border_into_the_bucket_above():
    result = metrics.by_bucket([99, 100, 299, 300, 900], [100, 100, 300, 200, 500], [100, 300])
    assert list(result) == ["<100", "100-300", ">=300"]
    assert result["<100"] == {"num_rows": 1, "mae": 1.0, "median_ae": 1.0, "bias": 1.0}
    assert result["100-300"]["num_rows"] == 2
    assert result[">=300"] == {"num_rows": 2, "mae": 250.0, "median_ae": 250.0, "bias": -250.0}
    assert list(metrics.by_bucket([5], [5], [100, 300])) == ["<100"]


@given(pairs(), st.lists(st.integers(1, 4999), min_size=1, max_size=5, unique=True))
def test_buckets_partition_the_rows(data, edges):
    result = metrics.by_bucket(data[0], data[1], sorted(edges)).values()
    total = sum(part["num_rows"] for part in result)
    assert total == data.shape[1]
    mae = sum(part["mae"] * part["num_rows"] for part in result) / total
    assert mae == pytest.approx(metrics.point_metrics(data[0], data[1])["mae"])


def test_by_label_orders_by_frequency_and_names_the_unknown():
    result = metrics.by_label([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 0], ["de", "en", "en", "en", None, ""])
    assert [(name, part["num_rows"]) for name, part in result.items()] == [("en", 3), ("unknown", 2), ("de", 1)]
    assert result["unknown"]["bias"] == -3.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.point_metrics([1, 2], [1]), r"shape \(2,\) and \(1,\)"),
        (lambda: metrics.point_metrics([], []), "no rows"),
        (lambda: metrics.point_metrics([1, 2], [1, np.nan]), "not finite"),
        (lambda: metrics.evaluate([1, 2], [1, 2], [0]), "groups of shape"),
        (lambda: metrics.quantile_metrics([1, 2], [[1], [2]], [0.1, 0.9]), r"quantiles of shape \(2, 1\)"),
        (lambda: metrics.quantile_metrics([1], [[np.inf]], [0.9]), "quantiles that are not finite"),
        (lambda: metrics.quantile_metrics([1], [[2]], [90]), "between 0 and 1"),
        (lambda: metrics.bootstrap_means([1.0, 2.0], [0, 1]), "values of shape"),
        (lambda: metrics.bootstrap(lambda rows: {}, []), "no rows"),
        (lambda: metrics.by_bucket([1], [1], [300, 100]), "borders"),
        (lambda: metrics.by_label([1], [1], []), "0 labels"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(DataError, match=message):
        call()
