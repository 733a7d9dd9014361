import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TinyAlexNet
from torch import nn

import evaluate
import utils
from checkpoint import load_network, save_checkpoint
from dataset import Dataset, Split, draw_shapes, fingerprints
from evaluate import calibration, draw_figures, summarize
from predict import Classifier
from transforms import Preprocessing


@pytest.fixture
def network(content):
    network = TinyAlexNet()
    network.load_state_dict(content["weights"])
    return network


def plain_input(images, preprocessing, size):
    """Return what a network is to see of uint8 images, in float64."""
    mean, std = (
        torch.tensor(each, dtype=torch.float64).view(3, 1, 1)
        for each in (preprocessing.mean, preprocessing.std)
    )
    return F.interpolate((images - mean) / std, size, mode="bilinear")


def test_predictions_are_the_plain_networks_for_each_image_in_order(network, content):
    preprocessing = Preprocessing(**content["preprocessing"])
    images = draw_shapes().val.images[:7]
    network.train()  # whose dropout is to end
    classifier = Classifier(network, list("0123456789"), preprocessing, "fp32", batch_size=3)
    logits, embeddings = classifier.logits(images), classifier.embed(images)
    assert min(logits.std(0).max(), embeddings.std(0).max()) > 0.1  # images differ
    plain = network.double()
    for i in range(len(images)):
        x = plain.features(plain_input(images[i : i + 1], preprocessing, 67)).flatten(1)
        fc7 = F.relu(plain.classifier.fc7(0.5 * F.relu(plain.classifier.fc6(x))))
        expected = plain.classifier.fc8(0.5 * fc7)
        torch.testing.assert_close(logits[i].double(), expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(embeddings[i].double(), fc7[0], rtol=1e-4, atol=1e-4)


def test_ten_crops_are_the_mean_of_ten_softmaxes():
    """With a network whose probabilities differ from crop to crop (paper §4.1)."""
    layers = nn.Conv2d(3, 10, 11, 4), nn.ReLU(), nn.Flatten(), nn.Linear(10 * 55 * 55, 10)
    network = nn.Sequential(*layers)
    nn.init.normal_(network[3].weight, std=0.05)
    preprocessing = Preprocessing([120.0, 110.0, 100.0], [60.0, 50.0, 40.0])
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    ours = Classifier(network, [], preprocessing, "fp32").ten_view_logits(images)
    enlarged, network = plain_input(images, preprocessing, 256), network.double()
    probabilities = []
    for top, left in ((0, 0), (0, 29), (29, 0), (29, 29), (14, 14)):
        crop = enlarged[:, :, top : top + 227, left : left + 227]
        probabilities += [network(view).softmax(1) for view in (crop, crop.flip(3))]
    assert torch.stack(probabilities).std(0).max() > 0.05
    expected = torch.stack(probabilities).mean(0)
    torch.testing.assert_close(ours.double().exp(), expected, rtol=1e-3, atol=1e-5)


# Newcombe, Statistics in Medicine 17 (1998), Table I, method 3.
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]


@pytest.mark.parametrize(("correct", "total", "low", "high"), [*NEWCOMBE, (1, 29, 0.0061, 0.1718)])
def test_wilson_interval_has_the_published_values(correct, total, low, high):
    assert evaluate.wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    mirrored = evaluate.wilson_interval(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert 0 <= mirrored[0] <= mirrored[1] <= 1


def test_calibration_error_is_the_formula_over_fifteen_bins():
    """Guo et al. 2017, eq. 3, in float64."""
    logits, labels = 2 * torch.randn(200, 4), torch.randint(0, 4, (200,))
    error, bins = calibration(logits, labels)
    exponentials = np.exp(logits.numpy().astype(np.float64))
    confidence = exponentials.max(1) / exponentials.sum(1)
    correct = exponentials.argmax(1) == labels.numpy()
    expected = 0.0
    for i, row in enumerate(bins):
        chosen = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        assert row["images"] == chosen.sum()
        if chosen.any():
            pair = correct[chosen].mean(), confidence[chosen].mean()
            assert (row["accuracy"], row["confidence"]) == pytest.approx(pair)
            expected += chosen.sum() / 200 * abs(pair[0] - pair[1])
    assert (len(bins), bins[0]["accuracy"]) == (15, None)
    assert error == pytest.approx(expected)


def test_summary_of_a_case_counted_by_hand():
    """Class d has no images."""
    predicted = torch.tensor([0, 1, 1, 2, 0, 1, 1, 2])
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2])
    summary = summarize(9 * torch.eye(4)[predicted], labels, list("abcd"))
    assert summary["confusion_matrix"] == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 2, 2, 0], [0, 0, 0, 0]]
    assert (summary["images"], summary["accuracy"]) == (8, 0.5)
    rows = [(row["class"], row["images"], row["accuracy"]) for row in summary["per_class"]]
    assert rows == [("a", 2, 1 / 2), ("b", 1, 1), ("c", 5, 2 / 5)]
    # Where a proportion p of correct answers would be 1.96 deviations from 4 / 8.
    assert summary["interval_95"] == pytest.approx((0.2152, 0.7848), abs=1e-4)
    first, *others = [tuple(pair.values()) for pair in summary["most_confused"]]
    assert (first, set(others)) == (("c", "b", 2), {("a", "b", 1), ("c", "a", 1)})
    # Correct predictions cost log(1 + 3 e^-9), wrong ones 9 more.
    assert summary["loss"] == pytest.approx(np.log(1 + 3 * np.exp(-9)) + 4.5, rel=1e-5)


def test_one_view_and_ten_are_printed_side_by_side(capsys):
    views = [
        {"accuracy": 0.5, "interval_95": (0.4, 0.61), "loss": 1.25, "calibration_error": 0.02},
        {"accuracy": 0.75, "interval_95": (0.7, 0.8), "loss": 1.0, "calibration_error": 0.1},
    ]
    evaluate.print_summary(*views)
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [
        ["", "one view", "ten views"],
        ["top-1 accuracy", "50.00% (40.00% to 61.00%)", "75.00% (70.00% to 80.00%)"],
        ["cross-entropy", "1.2500", "1.0000"],
        ["calibration error", "2.00 points", "10.00 points"],
    ]
    evaluate.print_summary(views[0])
    again = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert again[:3] == [line[:2] for line in lines[1:4]]


def first_values(figure):
    """Return the first value of each image in a figure."""
    return [np.asarray(axes.images[0].get_array()).flat[0] for axes in figure.axes if axes.images]


def test_figures_show_first_images_worst_errors_and_nearest_neighbors(network, monkeypatch):
    """Every pixel of image i has the value i, and so has its embedding."""
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 32, 32)
    split = Split(images, torch.tensor([1, 1, 0, 2, 0, 2, 1, 0]))
    probabilities = torch.full((8, 3), 0.01)
    predicted, confidence = [1, 0, 0, 0, 1, 2, 1, 2], [0.9, 0.6, 0.9, 0.8, 0.7, 0.9, 0.9, 0.5]
    probabilities[range(8), predicted] = torch.tensor(confidence)
    preprocessing = Preprocessing([4.0] * 3, [2.0] * 3, 67, 67)
    monkeypatch.setattr(network, "embed", lambda x: x.mean((2, 3)))
    order = [7, 0, 4, 1, 5, 2, 6]
    dataset = Dataset(list("abc"), Split(3 * images[order], split.labels[order]), split, split)
    summary = summarize(probabilities.log(), split.labels, dataset.classes)
    classifier = Classifier(network, dataset.classes, preprocessing, "fp32")
    drawn = draw_figures(classifier, dataset, split, probabilities.log(), summary)
    assert first_values(drawn["predictions"]) == [2, 0, 3]  # the first of each class
    titles = [axes.get_title() for axes in drawn["predictions"].axes if axes.images]
    assert titles == ["labeled a", "labeled b", "labeled c"]
    assert first_values(drawn["errors"]) == [3, 4, 1, 7]  # the most confident first
    assert first_values(drawn["neighbors"])[:7] == [2, 3, 0, 6, 12, 15, 18]


def test_network_with_replaced_layers_is_evaluated_and_drawn(network, content):
    """What was replaced has no figure."""
    network.features.conv1 = nn.Sequential(network.features.conv1)
    network.features.norm1 = nn.BatchNorm2d(12)
    network.features.norm2 = nn.Identity()
    network.classifier.fc8 = nn.Linear(64, 5)
    preprocessing, shapes = Preprocessing(**content["preprocessing"]), draw_shapes()
    few = [part.select(part.labels < 5) for part in (shapes.train, shapes.val, shapes.test)]
    dataset = Dataset(shapes.classes[:5], *few)
    classifier = Classifier(network, dataset.classes, preprocessing, "fp32")
    logits = classifier.logits(dataset.test.images)
    summary = summarize(logits, dataset.test.labels, dataset.classes)
    drawn = draw_figures(classifier, dataset, dataset.test, logits, summary)
    names = {"predictions", "errors", "neighbors", "reliability", "feature-maps"}
    assert drawn.keys() == names  # neither filters nor normalization
    assert "relu1\n12 x 15 x 15" in [axes.get_ylabel() for axes in drawn["feature-maps"].axes]


def test_script_reports_records_and_draws_all_of_it(tiny, tiny_run, capsys):
    capsys.readouterr()
    options = ("--views", 10, "--figures", "--json", "out.json", "--precision", "fp32")
    assert tiny(tiny_run / "best.pt", *options, script=evaluate) == 0
    out = capsys.readouterr().out
    record = json.loads(Path("out.json").read_text())
    network, preprocessing, checkpoint = load_network(tiny_run / "best.pt")
    test = draw_shapes().test
    logits = network.double()(plain_input(test.images, preprocessing, 67))
    correct = int((logits.argmax(1) == test.labels).sum())
    assert record["loss"] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-4)
    matrix = np.array(record["confusion_matrix"])
    assert (matrix.sum(1).tolist(), np.trace(matrix)) == ([2] * 10, correct)
    known = {"dataset": "shapes", "split": "test", "images": 20, "precision": "fp32"}
    known |= {"checkpoint": str(tiny_run / "best.pt"), "epoch": checkpoint["epoch"]}
    known |= {"training": json.loads((tiny_run / "config.json").read_text())["settings"]}
    assert {**known, "accuracy": correct / 20}.items() <= record.items()
    assert record["ten_views"].keys() < record.keys()
    assert "evaluate.py" in record["environment"]["command"]
    assert {"torch", "git_commit", "device"} <= record["environment"].keys()
    for text in ("one view", f"{correct / 20:.2%}", "checkerboard", " of 2\n", "20 images"):
        assert text in out
    names = "confusion predictions errors neighbors reliability filters feature-maps normalization"
    written = {path.name for path in tiny_run.glob("best-*.png")}
    assert written == {f"best-{name}-test.png" for name in names.split()}
    assert all(f"wrote {tiny_run / name}" in out for name in written)


def test_folder_that_cannot_be_written_to_costs_only_the_picture(tiny, content, capsys):
    save_checkpoint(Path("best.pt"), content)
    Path("best-confusion-test.png").mkdir()  # also stops root, whom permissions do not
    assert tiny("best.pt", script=evaluate) == 0
    out = capsys.readouterr().out
    assert "top-1 accuracy" in out
    assert "no picture: cannot write best-confusion-test.png: " in out


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"training": {"train_split": "full"}},
            "best.pt --split val",
            "was trained on the validation images",
        ),
        ({"classes": list("abcdefghij")}, "best.pt", "has no class a; it has disc, ring"),
        ({}, "best.pt --split train", "train"),
        ({}, "best.pt --views 5", "--views"),
        ({}, "best.pt --json nowhere/out.json", "the folder nowhere does not exist"),
        ({}, "best.pt --json .", "is not a file"),
        ({}, "other.pt", "cannot read other.pt"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(tiny, content, capsys, changes, options, message):
    training = content["training"] | changes.get("training", {})
    save_checkpoint(Path("best.pt"), content | changes | {"training": training})
    assert tiny(*options.split(), script=evaluate) == 2
    error = capsys.readouterr().err
    assert (error[:20], error.count("\n")) == ("evaluate.py: error: ", 1)
    assert message in error


@pytest.mark.parametrize(
    ("trained_in", "capabilities", "expected"),
    [("bf16", {}, "fp32"), ("fp16", {}, "fp32"), ("fp32", {"amx_bf16": True}, "bf16")],
)
def test_precision_is_the_hardwares_and_not_the_checkpoints(
    tiny, content, monkeypatch, capsys, trained_in, capabilities, expected
):
    content["training"]["precision"] = trained_in
    save_checkpoint(Path("best.pt"), content)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(utils, "_cpu_name", lambda: "a CPU")
    assert tiny("best.pt", script=evaluate) == 0
    assert f"{expected} on a CPU" in capsys.readouterr().out
    assert Classifier.from_checkpoint("best.pt", "cpu").precision == expected


def test_images_without_names_are_numbered_when_some_are_left_out():
    test = draw_shapes().test
    split, names = evaluate.leave_out(fingerprints(test.images[[0, 2]]), test, None)
    assert names == [1, *range(3, 1000)]
    assert torch.equal(split.images, test.images[names])
