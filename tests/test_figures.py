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
