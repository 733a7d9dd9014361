import numpy as np

import figures

HISTORY = [
    {
        "epoch": epoch,
        "train_loss": 2.0 / epoch,
        "val_loss": 2.1 / epoch,
        "train_accuracy": 0.2 * epoch,
        "val_accuracy": 0.21 * epoch,
    }
    for epoch in (1, 2, 3)
]


def test_learning_curves_draw_the_history():
    loss, accuracy = figures.learning_curves(HISTORY, "a run").axes
    drawn = {line.get_label(): line.get_ydata() for line in loss.lines}
    np.testing.assert_allclose(drawn["validation"], [2.1, 1.05, 0.7])
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), [21, 42, 63])
    assert list(accuracy.lines[0].get_xdata()) == [1, 2, 3]


def test_confusion_matrix_shows_percentages():
    matrix = np.array([[30, 10], [0, 0]])  # an empty class must not divide by zero
    axes = figures.confusion_matrix(matrix, ["cat", "dog"], "a run").axes[0]
    assert [text.get_text() for text in axes.texts] == ["75", "25"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]


def test_figures_are_written_as_png(tmp_path):
    figures.save_figure(figures.learning_curves(HISTORY[:1], "a run"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


IDEAS = [
    {"idea": "this", "claim": "helps", "differences": [2.0, 4.0], "diverged": 0},
    {"idea": "that", "claim": "helps too", "differences": [], "diverged": 2},
]


def test_ablation_shows_every_seed_the_mean_and_the_claims():
    axes, notes = figures.ablation(IDEAS, "a setting").axes
    seeds, mean = axes.lines[0], axes.containers[0]
    assert list(seeds.get_xdata()) == [2, 4]
    assert list(mean.lines[0].get_xdata()) == [3]
    [[(low, _), (high, _)]] = mean.lines[2][0].get_segments()
    assert (low, high) == (3 - 2**0.5, 3 + 2**0.5)  # the deviation of 2 and 4 is sqrt(2)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["this\n+3.0 ± 1.4", "that\n2 of 2 diverged"]
    assert [text.get_text() for text in notes.texts] == ["helps", "helps too"]


def test_training_errors_draw_every_seed_and_their_mean():
    curves = {"ReLU": [[0.5, 0.2], [0.7, 0.4]], "tanh": [[0.8, 0.6, 0.5]]}
    [axes] = figures.training_errors(curves, "a setting").axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(drawn["ReLU"], [60, 30])
    np.testing.assert_allclose(drawn["tanh"], [80, 60, 50])
    assert [list(line.get_xdata()) for line in axes.lines[:3]] == [[1, 2]] * 3


def test_speed_compares_with_the_textbook():
    """Bars are ratios; the text has both rates, of the textbook and not of another side."""
    common = {"part": "step", "name": "training step", "precision": "fp32", "batch_size": 8}
    rows = [
        {**common, "side": "textbook", "images_per_second": [10, 9, 11]},
        {**common, "side": "here", "images_per_second": [30, 29, 31]},
        {**common, "side": "compiled", "images_per_second": [20, 19, 21]},
        {**common, "side": "here", "batch_size": 4, "images_per_second": [5, 4, 6]},
    ]
    for row in rows:
        row["times_the_textbook"] = [rate / 10 for rate in row["images_per_second"]]
    axes = figures.speed(rows, "a machine").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [3.0]
    assert axes.texts[0].get_text() == "3.0 times: 30, not 10 images/s"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["training step, fp32"]


def test_growth_draws_rate_and_memory_for_each_number_of_processes():
    rows = [
        {"processes": 1, "batch_size": 1, "seconds": 0.5, "peak_memory_mib": 1024},
        {"processes": 1, "batch_size": 4, "seconds": 1.0, "peak_memory_mib": 2048},
        {"processes": 2, "batch_size": 4, "seconds": 0.5, "peak_memory_mib": None},
    ]
    rate, memory = figures.growth(rows, "a machine").axes
    assert [list(line.get_ydata()) for line in rate.lines] == [[2.0, 4.0], [8.0]]
    assert list(memory.lines[0].get_ydata()) == [1.0, 2.0]
    assert [text.get_text() for text in rate.get_legend().texts] == ["1 process", "2 processes"]
