import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, run_python
from torch import nn

import dataset
import evaluate
from checkpoint import load_network, save_checkpoint
from dataset import Preprocessing, Split, draw_shapes
from evaluate import (
    first_network,
    predict,
    predict_ten_views,
    summarise,
    wilson_interval,
)
from model import AlexNet, LocalResponseNorm
from utils import run_script

# --- Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), Table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_values(correct, total, low, high):
    np.testing.assert_allclose(wilson_interval(correct, total), (low, high), atol=5e-5)


def test_wilson_interval_stays_in_range():
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(0, 10)[0] == 0.0


def test_calibration_error_counted_by_hand():
    """Of 4 images 2 are given with 95%, both right, and 2 with 55%, one of them right."""
    odds = torch.tensor([0.95, 0.95, 0.55, 0.55])
    logits = torch.stack([odds, 1 - odds], 1).log()
    error, bins = evaluate.calibration(logits, torch.tensor([0, 0, 0, 1]))
    assert error == pytest.approx(0.5 * (1 - 0.95) + 0.5 * (0.55 - 0.5))
    filled = {round(row["low"] * 15): row for row in bins if row["images"]}
    assert filled.keys() == {8, 14}  # fifteenths: 0.533 to 0.6, 0.933 to 1
    assert (filled[8]["images"], filled[8]["accuracy"]) == (2, 0.5)
    assert filled[14]["confidence"] == pytest.approx(0.95)


def test_mistakes_are_the_most_confident_first():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    places = evaluate.most_confident_mistakes(probabilities, torch.tensor([0, 1, 0, 1]), 5)
    assert places.tolist() == [2, 1]


def test_neighbours_have_the_nearest_features(monkeypatch):
    """By features that are an image's mean, which can be told by eye."""
    images = torch.tensor([0, 90, 50, 10, 54, 56, 200, 47]).to(torch.uint8)
    train = Split(images.view(-1, 1, 1, 1).expand(-1, 3, 32, 32), torch.zeros(8).long())
    query = Split(torch.full((1, 3, 32, 32), 51, dtype=torch.uint8), torch.zeros(1).long())
    monkeypatch.setattr(
        evaluate, "predict_features", lambda network, images, *_: images.float().mean((2, 3))
    )
    data = dataset.Dataset(["cat"], train, train, train)
    figure = evaluate.draw_neighbours(None, None, "fp32", data, query)
    drawn = [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes]
    assert drawn == [51, 50, 54, 47, 56, 90, 10]


def test_normalisation_factors_are_those_of_the_formula():
    """With a window of one channel each activation a is multiplied by (2 + a^2)^-0.75."""
    network, images = AlexNet().eval(), draw_shapes().test.images[:2]
    network.norm1 = LocalResponseNorm(size=1, alpha=1.0)
    preprocessing = Preprocessing.of(images)
    factors = evaluate.normalisation_factors(network, preprocessing, images)
    with torch.no_grad():
        a = network.conv1(next(dataset.plain_batches(images, preprocessing, 2))).relu().double()
    expected = (2 + a[a > 0] ** 2) ** -0.75
    found = factors["norm1"].double()
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=1e-5, atol=0)
    # norm2 is the network's own, which small activations leave at rest.
    assert factors["norm2"].mean().item() == pytest.approx(2**-0.75, rel=1e-3)


@pytest.mark.parametrize("init", ["he", "2012"])
def test_first_network_is_the_one_that_training_began_with(tiny, init):
    """The learning rate is so low that nothing but biases of 0 moves."""
    options = ("--init", init, "--seed", 7, "--groups", 2, "--lr", 1e-30, "--epochs", 1)
    assert tiny(*options, "--output-dir", "run") == 0
    network, _, checkpoint = load_network(Path("run/best.pt"))
    first = first_network(checkpoint)
    for name, weight in network.named_parameters():
        torch.testing.assert_close(first.get_parameter(name), weight, rtol=0, atol=1e-25)
    checkpoint["training"]["seed"] = 8
    assert not torch.equal(first_network(checkpoint).conv1.weight, network.conv1.weight)


@pytest.mark.parametrize(
    ("name", "value"), [("seed", -1), ("seed", 2**64), ("seed", "0"), ("init", "x")]
)
def test_first_network_that_is_not_told(name, value):
    checkpoint = {"training": {"seed": 0, name: value}, "model": {"num_classes": 10}}
    assert first_network(checkpoint) is None


def test_summary_of_a_case_counted_by_hand():
    predicted = torch.tensor([0, 1, 1, 2, 0, 1, 1, 2])
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2])
    logits = 9 * torch.eye(3)[predicted]
    summary = summarise(logits, Split(torch.empty(8), labels), CLASSES)
    assert summary["confusion_matrix"] == [[1, 1, 0], [0, 1, 0], [1, 2, 2]]
    assert summary["accuracy"] == 0.5
    assert [row["accuracy"] for row in summary["per_class"]] == [1 / 2, 1, 2 / 5]
    assert [row["images"] for row in summary["per_class"]] == [2, 1, 5]
    # Where a share p of right answers would be 1.96 deviations from 1/2, 1/1 and 4/8.
    assert summary["per_class"][0]["interval_95"] == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert summary["per_class"][1]["interval_95"] == pytest.approx((0.2065, 1), abs=1e-4)
    assert summary["interval_95"] == pytest.approx((0.2152, 0.7848), abs=1e-4)
    first, *others = ((p["class"], p["taken_for"], p["images"]) for p in summary["most_confused"])
    assert first == ("c", "b", 2)
    assert set(others) == {("a", "b", 1), ("c", "a", 1)}
    # Right answers cost log(1 + 2 e^-9), wrong ones 9 more.
    assert summary["loss"] == pytest.approx(np.log(1 + 2 * np.exp(-9)) + 4.5, rel=1e-5)


def test_pictures_stand_over_their_own_captions(monkeypatch):
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    split = Split(images, torch.tensor([0, 1, 2]))
    monkeypatch.setattr(evaluate.figures, "likeliest", lambda *drawn: drawn)
    pictures, captions, results = evaluate.draw_predictions(
        split, torch.eye(3), CLASSES, torch.tensor([2, 0])
    )
    assert [picture[0, 0, 0].item() for picture in pictures] == [2, 0]
    assert captions == ["labelled c", "labelled a"]
    assert [result[0]["class"] for result in results] == ["c", "a"]
    assert all(result[0]["right"] for result in results)


def test_prediction_does_not_depend_on_the_batches(content, monkeypatch):
    network = AlexNet(num_classes=3)
    network.load_state_dict(content["weights"])
    preprocessing = Preprocessing(**content["preprocessing"])
    images = draw_shapes().val.images[:7]
    at_once = predict(network, images, preprocessing, "fp32")
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 3)
    in_parts = predict(network, images, preprocessing, "fp32")
    torch.testing.assert_close(in_parts, at_once, rtol=1e-4, atol=1e-5)
    plain = nn.functional.interpolate((images.float() - 120) / 60, 227, mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(at_once, network.eval()(plain), rtol=1e-3, atol=1e-4)


def test_ten_views_are_averaged_after_the_softmax(content):
    """§4.1; crops cut from the enlarged images, probabilities averaged in float64."""
    network = AlexNet(num_classes=3)
    network.load_state_dict(content["weights"])
    nn.init.normal_(network.fc8.weight, std=0.1)  # probabilities that differ from view to view
    preprocessing = Preprocessing(**content["preprocessing"])
    images = draw_shapes().val.images[:3]
    ours = predict_ten_views(network, images, preprocessing, "fp32")
    enlarged = nn.functional.interpolate((images.float() - 120) / 60, 256, mode="bilinear")
    probabilities = []
    for top, left in ((0, 0), (0, 29), (29, 0), (29, 29), (14, 14)):
        crop = enlarged[:, :, top : top + 227, left : left + 227]
        with torch.no_grad():
            both = network.eval()(crop), network(crop.flip(3))
        probabilities += [logits.double().softmax(1) for logits in both]
    assert torch.stack(probabilities).std(0).max() > 0.01
    expected = torch.stack(probabilities).mean(0)
    torch.testing.assert_close(ours.double().exp(), expected, rtol=1e-3, atol=1e-5)


def test_ten_views_beside_one(tmp_path, monkeypatch, capsys, content):
    """The network is replaced by one that is right on the left views and undecided elsewhere."""
    split = Split(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 2]))
    data = dataset.Dataset(CLASSES, split, split, split)

    def predict(network, images, preprocessing, precision, view=None):
        sees = view is not None and view[0, 2] < 0
        return torch.eye(3) * (9.0 if sees else 0.0)

    monkeypatch.setattr(evaluate, "load_dataset", lambda *_: data)
    monkeypatch.setattr(evaluate, "predict", predict)
    save_checkpoint(tmp_path / "best.pt", content)
    options = ["--views", "10", "--json", str(tmp_path / "out.json"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "best.pt"), *options])
    evaluate.main()
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["loss"] == pytest.approx(np.log(3), rel=1e-6)
    assert record["ten_views"]["accuracy"] == 1.0
    # The centre begins at 14 of 29 pixels, on the left; so do two of four corners, and mirrors.
    right = 6 * np.exp(9) / (np.exp(9) + 2) + 4 / 3
    assert record["ten_views"]["loss"] == pytest.approx(-np.log(right / 10), rel=1e-6)
    out = capsys.readouterr().out
    assert re.search(r"one view +ten views", out)
    assert re.search(rf"cross-entropy +{np.log(3):.4f} +{-np.log(right / 10):.4f}", out)


# --- The script ---------------------------------------------------------------------------------


def test_evaluation_of_a_trained_checkpoint(trained_run):
    folder, _ = trained_run
    run_dir = folder / "runs" / "shapes-adam"
    done = run_python("evaluate.py", run_dir / "best.pt", "--json", "out.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "out.json").read_text())
    assert record["split"] == "test"
    assert record["images"] == 1000
    matrix = np.array(record["confusion_matrix"])
    assert matrix.sum(axis=1).tolist() == [100] * 10
    assert record["accuracy"] == pytest.approx(np.trace(matrix) / 1000)
    # Wilson's interval holds the shares that lie 1.96 of their own deviations from what was seen.
    for share in record["interval_95"]:
        distance = abs(share - record["accuracy"]) / (share * (1 - share) / 1000) ** 0.5
        assert distance == pytest.approx(1.96, abs=0.001)
    for word in ("top-1 accuracy", "cross-entropy", "checkerboard", "most confused"):
        assert word in done.stdout
    assert (run_dir / "best-confusion-test.png").read_bytes().startswith(b"\x89PNG")


def test_last_checkpoint_can_be_evaluated_too(trained_run):
    folder, _ = trained_run
    load_network(folder / "runs" / "shapes-adam" / "last.pt")


def test_classes_of_another_data_set(tmp_path, monkeypatch, capsys, content):
    save_checkpoint(tmp_path / "three.pt", content)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "three.pt")])
    with pytest.raises(SystemExit) as stopped:
        run_script(evaluate.main)
    assert stopped.value.code == 2
    assert "three.pt has other classes than shapes" in capsys.readouterr().err


def test_checkpoint_in_a_folder_of_others_is_told_at_once(tmp_path, monkeypatch, capsys, content):
    """The pictures have no place there; the tests may run as root, who can write anywhere."""
    save_checkpoint(tmp_path / "best.pt", content)
    monkeypatch.setattr(evaluate.os, "access", lambda *_: False)
    monkeypatch.setattr(evaluate, "load_dataset", None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "best.pt")])
    with pytest.raises(SystemExit) as stopped:
        run_script(evaluate.main)
    assert stopped.value.code == 2
    assert "is not writable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--split train", "train"),
        ("--views 5", "--views"),
        ("--json nowhere/out.json", "nowhere"),
        ("--json .", "is not a file"),
        ("--device cuda:99", "--device cuda:99"),
        ("--precision fp64", "fp64"),
        ("", "checkpoint"),
    ],
)
def test_bad_option_is_one_line(monkeypatch, capsys, options, named):
    checkpoint = ["best.pt"] if options else []
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *checkpoint, *options.split()])
    with pytest.raises(SystemExit) as stopped:
        run_script(evaluate.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert named in error
