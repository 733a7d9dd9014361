import importlib.util
import io
import logging

import numpy as np
import pytest
import torch
from conftest import ROOT

import figures
from utils import UserError

HISTORY = [
    {"epoch": epoch, "train_loss": 2 / epoch, "val_loss": 2.1 / epoch}
    | {"train_accuracy": 0.2 * epoch, "val_accuracy": 0.21 * epoch}
    for epoch in (1, 2, 3)
]


@pytest.fixture(autouse=True)
def every_figure_draws(monkeypatch):
    """Draw each Figure that a test makes, once it has looked at it."""
    made = []

    class Watched(figures.Figure):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(figures, "Figure", Watched)
    yield
    for figure in made:
        figure.savefig(io.BytesIO(), dpi=20)


def image(value):
    """Return uint8 [3, 4, 4] of one value."""
    return torch.full((3, 4, 4), value, dtype=torch.uint8)


def first_values(figure):
    """Return the first value of each image in a figure."""
    return [np.asarray(axes.images[0].get_array()).flat[0] for axes in figure.axes if axes.images]


def texts(artists):
    return [artist.get_text() for artist in artists]


def test_learning_curves_are_the_history():
    figure = figures.learning_curves(HISTORY, "a run")
    loss, accuracy = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in loss.lines}
    np.testing.assert_allclose(drawn["validation"], [2.1, 1.05, 0.7])
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [20, 40, 60])
    np.testing.assert_allclose(accuracy.lines[1].get_xydata(), [[1, 21], [2, 42], [3, 63]])
    assert figure.get_suptitle() == "a run: best validation accuracy 63.0%"


@pytest.mark.parametrize(("is_mixed", "words"), [(True, "mixed images"), (False, "augmented")])
def test_learning_curves_without_validation_say_what_was_measured(is_mixed, words):
    rows = [row | {"val_loss": None, "val_accuracy": None} for row in HISTORY]
    figure = figures.learning_curves(rows, "a run", is_mixed)
    assert texts(figure.axes[0].get_legend().texts) == [f"training (during the epoch, {words})"]
    assert figure.get_suptitle() == "a run"


def write_run(folder, *rows):
    folder.mkdir()
    header = "epoch,step,lr,train_loss,train_accuracy,val_loss,val_accuracy"
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    times = [f"{number},90.0" for number in range(1, len(rows) + 2)]  # the run is between the two
    (folder / "timing.csv").write_text("\n".join(["epoch,seconds", *times]) + "\n")


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Run figures.py on these runs; return the Figure that it writes."""
    monkeypatch.chdir(tmp_path)
    drawn, draw = [], figures.compared_curves
    monkeypatch.setattr(figures, "compared_curves", lambda *a: drawn.append(draw(*a)) or drawn[-1])

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["figures.py", *arguments])
        figures.main()
        return drawn[-1]

    return call


@pytest.mark.parametrize(("unit", "x"), [("epoch", [[1, 2], [1]]), ("minutes", [[1.5, 3], [1.5]])])
def test_script_lays_runs_over_each_other(tmp_path, compare, capsys, unit, x):
    write_run(tmp_path / "a", "1,5,0.1,2,0.1,1.5,0.2", "2,10,0.1,2,0.1,1.0,0.5")
    write_run(tmp_path / "b", "1,5,0.1,2,0.1,0.5,0.75")
    loss, accuracy = compare("a", "b", "--against", unit).axes
    assert [list(line.get_xdata()) for line in accuracy.lines] == x
    assert accuracy.get_xlabel().startswith(unit)
    assert [list(line.get_ydata()) for line in loss.lines] == [[1.5, 1.0], [0.5]]
    assert [line.get_label() for line in accuracy.lines] == ["a: best 50.0%", "b: best 75.0%"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "wrote curves.png\n"


def test_legend_has_the_names_of_runs_as_they_are(tmp_path, compare):
    """Some that matplotlib would read as a formula, and one that it would leave out."""
    for name in ("$a_$", "$b_$", "_c"):
        write_run(tmp_path / name, "1,5,0.1,2,0.1,1.5,0.25")
    [legend] = compare("$a_$", "$b_$", "_c").legends
    names = [text.removesuffix(": best 25.0%") for text in texts(legend.get_texts())]
    assert names == [r"\$a_\$", r"\$b_\$", "./_c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no validated epochs"),
        (b"epoch,val_loss,val_accuracy\n1,x,0.2\n", "has no validated epochs"),
        (b"epoch,val_loss,val_accuracy\n1,,\n", "has no validated epochs"),
        (b"epoch,val_loss\n\xff", r"metrics\.csv is damaged"),
        (b"epoch,val_loss\n" + b"x" * 200_000, r"metrics\.csv is damaged"),
    ],
)
def test_folder_without_a_history_is_named(tmp_path, compare, content, message):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        compare("run")
    with pytest.raises(UserError, match="missing has no validated epochs"):
        compare("missing")


def test_confusion_matrix_has_percentages():
    matrix = np.array([[30, 10], [0, 0]])  # a class without images
    axes = figures.confusion_matrix(matrix, ["cat", "dog"], "a run").axes[0]
    assert (texts(axes.texts), axes.get_title()) == (["75", "25"], "a run")
    assert texts(axes.get_yticklabels()) == ["cat", "dog"]


def test_reliability_has_the_filled_bins():
    bins = [
        {"low": 0.0, "high": 0.5, "images": 0, "confidence": None, "accuracy": None},
        {"low": 0.5, "high": 1.0, "images": 8, "confidence": 0.9, "accuracy": 0.75},
    ]
    axes, counts = figures.reliability(bins, "title").axes
    [bar] = axes.patches
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (50, 50, 75)
    assert [bar.get_height() for bar in counts.patches] == [8]
    assert axes.lines[0].get_xydata().tolist() == [[90, 75]]


def test_predictions_mark_the_correct_class():
    result = [
        {"class": "cat", "probability": 0.75, "correct": False},
        {"class": "dog", "probability": 0.25, "correct": True},
        {"class": "cow", "probability": 0.004, "correct": False},  # would read 0%
    ]
    figure = figures.predictions(list(map(image, (1, 2, 3, 4, 5))), list("abcde"), [result] * 5)
    assert first_values(figure) == [1, 2, 3, 4, 5]
    assert [axes.get_title() for axes in figure.axes if axes.images] == list("abcde")
    bars = next(axes for axes in figure.axes if axes.patches)
    assert [bar.get_width() for bar in bars.patches] == [0.75, 0.25]
    assert texts(bars.texts) == ["cat 75%", "dog 25%"]
    [legend] = figure.legends
    assert texts(legend.get_texts()) == ["the labeled class", "another class"]
    wrong, correct = (bar.get_facecolor() for bar in bars.patches)
    assert [patch.get_facecolor() for patch in legend.get_patches()] == [correct, wrong]
    unknown = figures.predictions([image(0)], ["a"], [[{"class": "cat", "probability": 1}]])
    assert not unknown.legends


def test_filters_are_stretched_and_side_by_side():
    weights = torch.randn(96, 3, 11, 11, dtype=torch.float64)
    [axes] = figures.filters(weights, "title").axes
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn.shape == (6 * 12 + 1, 16 * 12 + 1, 3)  # a line of a pixel between them
    tile = drawn[12 + 1 : 2 * 12, 2 * 12 + 1 : 3 * 12].transpose(2, 0, 1)
    low, high = weights[16 + 2].min(), weights[16 + 2].max()
    np.testing.assert_allclose(tile, (weights[16 + 2] - low) / (high - low), atol=1e-4)


def test_neighbors_are_beside_their_query():
    images = list(map(image, range(6)))
    theirs = [["cat", "dog"], ["dog", "dog"]]
    figure = figures.neighbors(images[:2], [images[2:4], images[4:]], ["cat", "dog"], theirs)
    assert first_values(figure) == [0, 2, 3, 1, 4, 5]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["cat", "dog"]
    labels = [axes.xaxis.label for axes in figure.axes]
    assert texts(labels) == ["", "cat", "dog", "", "dog", "dog"]
    orange = [labels[i].get_color() == figures.ORANGE for i in (1, 2, 4, 5)]
    assert orange == [False, True, False, False]


def test_feature_maps_are_the_strongest_channels():
    maps = {"relu1": np.arange(10)[:, None, None] * np.ones((10, 2, 2))}
    figure = figures.feature_maps(image(77), maps)
    assert first_values(figure) == [77, 9, 8, 7, 6, 5, 4, 3, 2]
    assert "relu1\n10 x 2 x 2" in [axes.get_ylabel() for axes in figure.axes]


def test_normalization_shows_how_many_are_held_back():
    """A quarter of the activations multiplied by 0.3, the others as without any activity near."""
    factors = np.array([0.3] * 25 + [2**-0.75] * 75)
    axes = figures.normalization({"norm1": factors, "norm2": factors[:0]}, "title").axes[0]
    heights, edges, _ = axes.patches[0].get_data()
    assert heights[(edges[:-1] <= 0.3) & (edges[1:] > 0.3)].tolist() == [25]
    assert heights[-1] == 75
    assert axes.get_title() == "norm1: median 0.595, 98% from 0.300 to 0.595"


@pytest.mark.filterwarnings("ignore:Glyph")  # from every_figure_draws
def test_names_are_drawn_as_they_are(recwarn, tmp_path):
    """No formula between two $, and no warning of letters that the font lacks."""
    names = [r"$\foo$", "猫"]
    images, results = [image(0)] * 2, [[{"class": name, "probability": 1.0}] for name in names]
    for figure in (
        figures.confusion_matrix(np.eye(2), names, "title"),
        figures.predictions(images, names, results),
        figures.neighbors(images, [images] * 2, names, [names] * 2),
    ):
        figures.save_figure(figure, tmp_path / "figure.png")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "start"),
    [("x.pdf", b"%PDF"), ("x.SVG", b"<?xml"), ("x", b"\x89PNG"), ("x.y", b"\x89PNG")],
)
def test_suffix_chooses_the_type(tmp_path, name, start):
    figures.save_figure(figures.Figure(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_figure_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch):
    def fail_half_way(self, file, **settings):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(figures.Figure, "savefig", fail_half_way)
        with pytest.raises(UserError, match=r"cannot write .*x\.png: .*No space left"):
            figures.save_figure(figures.Figure(), path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.png", b"old")]


def test_importing_figures_leaves_matplotlibs_loggers_alone():
    loggers = [logging.getLogger(name) for name in ("matplotlib", "matplotlib.font_manager")]
    before = [(logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers]
    spec = importlib.util.spec_from_file_location("figures_again", ROOT / "figures.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    after = [(logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers]
    assert after == before
