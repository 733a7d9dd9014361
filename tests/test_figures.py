import numpy as np
import pytest

import figures
from utils import UserError, read_history

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
    {"idea": "this", "claim": "helps", "differences": [2.0, 4.0], "seeds": 2, "diverged": 0},
    {"idea": "that", "claim": "helps too", "differences": [], "seeds": 2, "diverged": 2},
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
    """Bars are ratios; the text has both rates, the textbook's first."""
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
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == [3.0, 2.0]  # from 1
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["3.0: 10 → 30 images/s", "2.0: 10 → 20 images/s"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["training step, fp32", "training step, fp32, compiled"]


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


def shown(axes):
    """What imshow() was given."""
    [image] = axes.images
    return np.asarray(image.get_array())


def test_filters_are_stretched_and_side_by_side():
    weights = np.random.default_rng(0).normal(size=(96, 3, 11, 11))
    [axes] = figures.filters(weights, "title").axes
    picture = shown(axes)
    assert picture.shape == (6 * 12 + 1, 16 * 12 + 1, 3)  # a line of one pixel between them
    tile = picture[12 + 1 : 2 * 12, 2 * 12 + 1 : 3 * 12].transpose(2, 0, 1)
    expected = weights[16 + 2]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(tile, expected)


def test_likeliest_marks_the_right_class():
    pictures = [np.full((3, 4, 4), value, np.uint8) for value in (10, 20, 30, 40, 50)]
    result = [
        {"class": "cat", "probability": 0.75, "right": False},
        {"class": "dog", "probability": 0.25, "right": True},
        {"class": "cow", "probability": 0.004, "right": False},
    ]
    figure = figures.likeliest(pictures, list("abcde"), [result] * 5)
    drawn = [axes for axes in figure.axes if axes.images]
    assert [shown(axes)[0, 0, 0] for axes in drawn] == [10, 20, 30, 40, 50]
    bars = next(axes for axes in figure.axes if axes.patches)
    assert [bar.get_width() for bar in bars.patches] == [0.75, 0.25]
    assert bars.patches[0].get_facecolor() != bars.patches[1].get_facecolor()
    assert [text.get_text() for text in bars.texts] == ["cat 75%", "dog 25%"]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "the labelled class",
        "another class",
    ]
    [wrong, right] = [bar.get_facecolor() for bar in bars.patches]
    assert [patch.get_facecolor() for patch in legend.get_patches()] == [right, wrong]
    unknown = figures.likeliest(pictures, list("abcde"), [[{"class": "cat", "probability": 1}]] * 5)
    assert not unknown.legends


def test_neighbours_are_beside_their_query():
    pictures = [np.full((3, 4, 4), value, np.uint8) for value in range(6)]
    theirs = [["cat", "dog"], ["dog", "dog"]]
    figure = figures.neighbours(pictures[:2], [pictures[2:4], pictures[4:]], ["cat", "dog"], theirs)
    assert [shown(axes)[0, 0, 0] for axes in figure.axes] == [0, 2, 3, 1, 4, 5]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["cat", "dog"]
    labels = [axes.xaxis.label for axes in figure.axes]
    assert [label.get_text() for label in labels] == ["", "cat", "dog", "", "dog", "dog"]
    colours = [labels[place].get_color() for place in (1, 2, 4, 5)]
    assert [colour == colours[0] for colour in colours] == [True, False, True, True]


def test_classes_are_ranked_with_their_intervals():
    rows = [
        {"class": "cat", "accuracy": 0.5, "interval_95": (0.4, 0.7)},
        {"class": "dog", "accuracy": 1.0, "interval_95": (0.9, 1 - 1e-16)},
        {"class": "frog", "accuracy": 0.7, "interval_95": (0.6, 0.8)},
    ]
    [axes] = figures.class_accuracies(rows, "title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "frog", "dog"]
    ends = axes.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert list(ends) == pytest.approx([40, 70])


def test_reliability_draws_filled_bins():
    bins = [
        {"low": 0.0, "high": 0.5, "images": 0, "confidence": None, "accuracy": None},
        {"low": 0.5, "high": 1.0, "images": 8, "confidence": 0.9, "accuracy": 0.75},
    ]
    axes, counts = figures.reliability(bins, "title").axes
    [bar] = axes.patches
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (50, 50, 75)
    assert [bar.get_height() for bar in counts.patches] == [8]


def test_feature_maps_are_the_strongest_channels():
    maps = {"conv1": np.arange(10)[:, None, None] * np.ones((10, 2, 2))}
    figure = figures.feature_maps(np.zeros((3, 4, 4), np.uint8), maps)
    drawn = [shown(axes)[0, 0] for axes in figure.axes if axes.images][1:]
    assert drawn == [9, 8, 7, 6, 5, 4, 3, 2]


def test_normalisation_shows_how_many_are_held_back():
    """A quarter of the activations multiplied by 0.3, the others as without any activity near."""
    at_rest = 2**-0.75
    factors = np.array([0.3] * 25 + [at_rest] * 75)
    figure = figures.normalisation({"norm1": factors, "norm2": factors[:0]}, at_rest, "title")
    axes = figure.axes[0]
    heights, edges, _ = axes.patches[0].get_data()
    assert heights[(edges[:-1] <= 0.3) & (edges[1:] > 0.3)].tolist() == [25]
    assert heights[-1] == 75
    assert axes.get_title() == "norm1: median 0.595, 98% from 0.300 to 0.595"


def write_run(folder, *rows):
    folder.mkdir(parents=True)
    lines = ["epoch,step,lr,train_loss,train_accuracy,val_loss,val_accuracy", *rows]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    times = [f"{number},90.0,500.0," for number in range(1, len(rows) + 1)]
    header = "epoch,seconds,images_per_second,peak_memory_mib"
    (folder / "timing.csv").write_text("\n".join([header, *times]) + "\n")


def test_curves_of_several_runs_are_laid_over_each_other(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "1,5,0.1,2,0.1,1.5,0.2", "2,10,0.1,2,0.1,1.0,0.5")
    write_run(tmp_path / "b", "1,5,0.1,2,0.1,0.5,0.75")
    histories = {name: read_history(tmp_path / name) for name in "ab"}
    loss, accuracy = figures.compared_curves(histories).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[1.5, 1.0], [0.5]]
    assert [line.get_label() for line in accuracy.lines] == ["a: best 50.0%", "b: best 75.0%"]
    assert [list(line.get_xdata()) for line in accuracy.lines] == [[1, 2], [1]]
    _, accuracy = figures.compared_curves(histories, "minutes").axes
    assert [list(line.get_xdata()) for line in accuracy.lines] == [[1.5, 3], [1.5]]
    assert accuracy.get_xlabel() == "minutes of training"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["figures.py", "a", "b"])
    figures.main()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "wrote curves.png\n"


@pytest.mark.parametrize(
    ("name", "start"),
    [("x.pdf", b"%PDF"), ("x.SVG", b"<?xml"), ("x", b"\x89PNG"), ("x.y", b"\x89PNG")],
)
def test_name_of_a_figure_says_its_format(tmp_path, name, start):
    figures.save_figure(figures.Figure(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_runs_of_one_name_in_two_folders_are_two_curves(tmp_path, monkeypatch):
    """In names that matplotlib would read as a formula, and could not."""
    write_run(tmp_path / "$a_$" / "run", "1,5,0.1,2,0.1,1.5,0.2")
    write_run(tmp_path / "$b_$" / "run", "1,5,0.1,2,0.1,0.5,0.75")
    monkeypatch.chdir(tmp_path)
    drawn = []
    draw = figures.compared_curves
    monkeypatch.setattr(figures, "compared_curves", lambda *a: drawn.append(draw(*a)) or drawn[0])
    monkeypatch.setattr("sys.argv", ["figures.py", "$a_$/run", "$b_$/run"])
    figures.main()
    labels = [line.get_label() for line in drawn[0].axes[0].lines]
    assert labels == [r"\$a_\$/run", r"\$b_\$/run"]


def test_names_are_drawn_as_they_are(tmp_path, recwarn):
    """No formula between two $, and no warning of letters that the font does not have."""
    names = [r"$\foo$", "猫"]
    rows = [{"class": name, "accuracy": 0.5, "interval_95": (0.4, 0.7)} for name in names]
    pictures = [np.zeros((3, 4, 4), np.uint8)] * 2
    likeliest = [[{"class": name, "probability": 1.0, "right": True}] for name in names]
    drawn = (
        figures.class_accuracies(rows, "title"),
        figures.confusion_matrix(np.eye(2), names, "title"),
        figures.likeliest(pictures, names, likeliest),
        figures.neighbours(pictures, [pictures] * 2, names, [names] * 2),
    )
    for figure in drawn:
        figures.save_figure(figure, tmp_path / "figure.png")
    assert not recwarn.list


def test_run_whose_name_matplotlib_would_hide_is_in_the_legend(tmp_path, monkeypatch):
    for name in ("_a", "b"):
        write_run(tmp_path / name, "1,5,0.1,2,0.1,0.5,0.75")
    monkeypatch.chdir(tmp_path)
    drawn, draw = [], figures.compared_curves
    monkeypatch.setattr(figures, "compared_curves", lambda *a: drawn.append(draw(*a)) or drawn[0])
    monkeypatch.setattr("sys.argv", ["figures.py", "_a", "b"])
    figures.main()
    [legend] = drawn[0].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["./_a: best 75.0%", "b: best 75.0%"]


def test_run_between_its_two_files_is_read(tmp_path):
    """timing.csv has the second epoch already."""
    write_run(tmp_path / "run", "1,5,0.1,2,0.1,1.5,0.2", "2,10,0.1,2,0.1,1.0,0.5")
    path = tmp_path / "run" / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [1]


@pytest.mark.parametrize("row", ["", "1,5,0.1,2,0.1,x,0.2", "1,5", "1,5,0.1,2,0.1,,"])
def test_folder_without_epochs_is_named(tmp_path, row):
    write_run(tmp_path / "run", row)
    with pytest.raises(UserError, match="has no validated epochs"):
        read_history(tmp_path / "run")


@pytest.mark.parametrize("data", [b"\xff", b"x" * 200_000], ids=["no text", "a long field"])
def test_damaged_record_is_named(tmp_path, data):
    write_run(tmp_path / "run", "1,5,0.1,2,0.1,1.5,0.2")
    (tmp_path / "run" / "metrics.csv").write_bytes(b"epoch,val_loss\n" + data)
    with pytest.raises(UserError, match=r"metrics\.csv is damaged"):
        read_history(tmp_path / "run")
