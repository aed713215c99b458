import numpy as np
import pytest
from matplotlib.figure import Figure

from mope.errors import DataError
from mope.training import plots

RNG = np.random.default_rng(0)
ACTUAL = np.round(RNG.lognormal(5, 1, 300))
PREDICTED = ACTUAL * RNG.lognormal(0, 0.5, 300)


@pytest.fixture
def drawn(monkeypatch):
    """Keeps the figures that are saved, so that what was drawn can be read."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
    )
    return figures


def written(figure):
    """All texts of a figure."""
    return " ".join(text.get_text() for text in figure.findobj(lambda item: hasattr(item, "get_text")))


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_predicted_vs_true_counts_all_rows(tmp_path, drawn):
    path = tmp_path / "plots" / "predicted_vs_true.png"
    plots.predicted_vs_true(ACTUAL, PREDICTED, path, low_N=PREDICTED / 2, high_N=PREDICTED * 2)
    assert is_png(path)
    axes = drawn[0].axes[0]
    assert axes.collections[0].get_array().sum() == len(ACTUAL)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    low, high = axes.lines[1], axes.lines[2]
    assert np.allclose(high.get_ydata(), 4 * low.get_ydata())
    assert "300 test rows" in written(drawn[0])


def test_predicted_vs_true_of_zero_and_of_one_row(tmp_path):
    plots.predicted_vs_true([0], [0.2], tmp_path / "one.png", low_N=[0], high_N=[5])
    assert is_png(tmp_path / "one.png")
    with pytest.raises(DataError, match="no rows"):
        plots.predicted_vs_true([], [], tmp_path / "none.png")


def test_calibration_curve_names_the_worst_level(tmp_path, drawn):
    plots.calibration_curve([0.9, 0.1, 0.5], [0.86, 0.11, 0.5], 1000, tmp_path / "calibration.png")
    assert is_png(tmp_path / "calibration.png")
    assert "at most 4.0 points off" in written(drawn[0])
    assert drawn[0].axes[0].lines[1].get_xydata().tolist() == [[0.1, 0.11], [0.5, 0.5], [0.9, 0.86]]


def test_calibration_band_narrows_with_rows(tmp_path, drawn):
    for num_rows in (100, 10_000):
        plots.calibration_curve([0.5], [0.5], num_rows, tmp_path / "band.png")
    widths = [np.ptp(figure.axes[0].collections[0].get_paths()[0].vertices @ [-1, 1]) for figure in drawn]
    assert widths[0] == pytest.approx(2 * 1.96 * 0.05, rel=1e-3)
    assert widths[1] == pytest.approx(widths[0] / 10, rel=1e-3)


def test_error_by_length_draws_mae_and_bias(tmp_path, drawn):
    actual = np.array([10.0, 20.0, 200.0, 400.0])
    predictions = {"mope": actual + np.array([2, -4, 10, 10]), "constant": np.full(4, 100.0)}
    plots.error_by_length(actual, predictions, tmp_path / "length.png", edges=[100])
    assert is_png(tmp_path / "length.png")
    upper, lower = drawn[0].axes
    assert upper.lines[0].get_ydata().tolist() == [3.0, 10.0]
    assert lower.lines[0].get_ydata().tolist() == [-1.0, 10.0]
    assert upper.lines[1].get_ydata().tolist() == [85.0, 200.0]
    assert [label.get_text() for label in lower.get_xticklabels()] == ["10-99", "100-400"]


def test_error_by_length_draws_the_best_rivals_alone(tmp_path, drawn):
    actual = np.array([10.0, 20.0, 200.0, 400.0])
    rivals = {f"rival {by}": actual + by for by in (9, 3, 8, 1, 5, 7)}
    plots.error_by_length(actual, {"mope": actual + 20, **rivals}, tmp_path / "length.png", edges=[100])
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["MoPE", "rival 1", "rival 3", "rival 5", "rival 7"]


def test_error_by_length_takes_deciles_and_survives_repeated_lengths(tmp_path, drawn):
    plots.error_by_length(ACTUAL, {"mope": PREDICTED}, tmp_path / "deciles.png")
    assert len(drawn[0].axes[0].lines[0].get_ydata()) == 10
    plots.error_by_length(np.full(50, 7.0), {"mope": np.full(50, 9.0)}, tmp_path / "equal.png")
    assert drawn[1].axes[0].lines[0].get_ydata().tolist() == [2.0]


def test_router_confusion_shows_row_shares_and_counts(tmp_path, drawn):
    plots.router_confusion([[30, 10], [5, 1500]], ["1-99", "100 and more"], tmp_path / "confusion.png")
    assert is_png(tmp_path / "confusion.png")
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert texts == ["75 %\n30", "25 %\n10", "0 %\n5", "100 %\n1,500"]
    assert "99.0 % of 1,545 rows" in written(drawn[0])
    with pytest.raises(DataError, match=r"shape \(1, 2\)"):
        plots.router_confusion([[1, 2]], ["a", "b"], tmp_path / "bad.png")


def test_router_confusion_with_an_empty_bucket(tmp_path):
    plots.router_confusion([[0, 0], [0, 3]], ["a", "b"], tmp_path / "empty.png")
    assert is_png(tmp_path / "empty.png")


LOG = """epoch,step,train/loss,train/gate,validation/loss,validation/gate
0,0,4.0,1.0,,
0,10,3.5,1.0,,
0,19,,,3.4,0.9
1,20,3.0,1.0,,
1,39,,,nan,0.9
1,59,,,3.1,0.9
"""


def test_training_curves_read_the_csv_log(tmp_path, drawn):
    log = tmp_path / "metrics.csv"
    log.write_text(LOG)
    plots.training_curves(log, tmp_path / "curves.png")
    assert is_png(tmp_path / "curves.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert lines["validation/loss"].get_xydata().tolist() == [[19, 3.4], [59, 3.1]]
    assert len(lines["train/loss"].get_xdata()) == 3
    assert "3.100" in written(drawn[0])
    assert "gate" not in written(drawn[0])


def test_training_curves_of_foreign_or_empty_logs(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"\['a', 'b'\]"):
        plots.training_curves(log, tmp_path / "x.png")
    log.write_text("step,train/loss\n")
    with pytest.raises(DataError, match="no loss"):
        plots.training_curves(log, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_smoothing_keeps_constants():
    assert np.allclose(plots._smoothed(np.full(500, 3.0)), 3.0)


def test_baselines_bar_puts_the_best_on_top(tmp_path, drawn):
    results = {
        "constant": {"mae": 150.0, "mae_ci": [145.0, 156.0]},
        "mope": {"mae": 108.0, "mae_ci": [104.0, 112.0]},
        "mope_oracle_routed": {"mae": 60.0},
    }
    plots.baselines_bar(results, tmp_path / "bar.png", title="first turns")
    assert is_png(tmp_path / "bar.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["MoPE, oracle-routed", "constant", "MoPE"]
    assert [bar.get_width() for bar in axes.patches] == [60.0, 150.0, 108.0]
    assert axes.lines[2].get_xdata().tolist() == [104.0, 112.0]
    with pytest.raises(DataError, match="no predictors"):
        plots.baselines_bar({}, tmp_path / "none.png")


def test_the_same_data_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plots.error_by_length(ACTUAL, {"mope": PREDICTED}, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_lengths_by_llm_hold_all_rows_and_mark_cut_answers(tmp_path, drawn):
    tokens = np.array([10, 20, 30, 400, 500, 500, 7])
    cut = np.array([False, False, False, False, True, True, False])
    llm = np.array([0, 0, 0, 1, 1, 1, 2])
    names = ["llama$_8b", "gpt-4", "rare"]
    plots.response_tokens_by_llm(names, llm, tokens, cut, tmp_path / "lengths.png")
    assert is_png(tmp_path / "lengths.png")
    assert len(drawn[0].axes) == 4
    for axes, here in zip(drawn[0].axes, [llm >= 0, llm == 0, llm == 1, llm == 2], strict=True):
        whole, both = (patch.get_data() for patch in axes.patches)
        assert axes.get_xscale() == "log"
        assert whole.values.sum() == pytest.approx((here & ~cut).sum() / here.sum())
        assert (both.values - both.baseline).sum() == pytest.approx((here & cut).sum() / here.sum())
        assert axes.lines[0].get_xdata()[0] == np.median(tokens[here])
    assert "gpt-4: 3 rows, median 500, 67% cut off" in written(drawn[0])


def test_lengths_of_one_llm_and_of_many(tmp_path, drawn):
    plots.response_tokens_by_llm(["gpt-4"], np.zeros(3, int), [0, 1, 2], [False] * 3, tmp_path / "one.png")
    many = 3 * plots.MAX_STRIPS
    plots.response_tokens_by_llm(
        [str(n) for n in range(many)], np.arange(many), ACTUAL[:many], [True] * many, tmp_path / "many.png"
    )
    assert [len(figure.axes) for figure in drawn] == [1, 1 + plots.MAX_STRIPS]
    with pytest.raises(DataError, match="no rows"):
        plots.response_tokens_by_llm([], np.zeros(0, int), [], [], tmp_path / "none.png")
