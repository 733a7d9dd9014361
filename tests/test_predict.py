import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import figures
import predict
from checkpoint import load_network, save_checkpoint
from dataset import draw_shapes
from predict import Classifier


def save_png(image, path):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, "PNG")


@pytest.fixture
def checkpoint(content, tmp_path):
    save_checkpoint(tmp_path / "tiny.pt", content)
    return tmp_path / "tiny.pt"


@pytest.mark.parametrize("source", ["predict", "hub"])
def test_classifier_has_the_softmax_of_the_plain_network(checkpoint, source):
    if source == "hub":
        arguments = {"source": "local", "checkpoint": str(checkpoint), "device": "cpu"}
        classifier = torch.hub.load(str(ROOT), "classifier", **arguments)
        classifier.precision = "fp32"
    else:
        classifier = Classifier.from_checkpoint(checkpoint, "cpu", "fp32")
    images = draw_shapes().test.images[:3]
    network, preprocessing, content = load_network(checkpoint)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
    enlarged = torch.nn.functional.interpolate((images - mean) / std, 67, mode="bilinear")
    expected = network(enlarged).double().exp()
    expected /= expected.sum(1, keepdim=True)
    probabilities = classifier.probabilities(images)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-3, atol=1e-5)
    assert classifier.classes == content["classes"]


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(1, 3, 48, 64, dtype=torch.uint8), r"got torch.uint8 \[1, 3, 48, 64\]"),
        (torch.zeros(1, 3, 32, 32), r"got torch.float32 \[1, 3, 32, 32\]"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"got torch.uint8 \[3, 32, 32\]"),
        (Image.new("RGB", (32, 32)), "got Image"),
    ],
)
def test_classifier_says_which_images_it_takes(checkpoint, images, found):
    with pytest.raises(ValueError, match=r"expected uint8 images of shape .*" + found):
        Classifier.from_checkpoint(checkpoint, "cpu").probabilities(images)


def test_whatever_a_picture_is_it_has_the_same_answer(checkpoint, tmp_path):
    classifier = Classifier.from_checkpoint(checkpoint, "cpu")
    tensor = draw_shapes().test.images[3]
    array = tensor.permute(1, 2, 0).numpy()
    save_png(tensor, tmp_path / "x.png")
    path = tmp_path / "x.png"
    answer = classifier(path)
    [row] = classifier.probabilities(tensor[None]).tolist()
    expected = sorted(zip(row, classifier.classes, strict=True), reverse=True)[:3]
    assert [(item["probability"], item["class"]) for item in answer] == expected
    enlarged = array.repeat(4, axis=0).repeat(4, axis=1)
    wide = np.pad(enlarged, ((0, 0), (30, 30), (0, 0)))
    pictures = [str(path), Image.open(path), array, tensor, enlarged, wide]
    for found in classifier(pictures):
        assert [item["class"] for item in found] == [item["class"] for item in answer]
        assert found[0]["probability"] == pytest.approx(answer[0]["probability"], rel=1e-5)
    assert len(classifier(path, top=10)) == 10
    assert classifier([]) == []
    gray = np.full((40, 40), 128, np.uint8)
    assert classifier(gray) == classifier(np.stack([gray] * 3, 2))


@pytest.mark.parametrize("picture", [3, np.zeros((8, 8, 3)), torch.zeros(3, 8, 8)])
def test_what_is_no_picture_is_a_type_error(checkpoint, picture):
    with pytest.raises(TypeError, match="a picture"):
        Classifier.from_checkpoint(checkpoint, "cpu")(picture)


@pytest.fixture
def classify(tiny, checkpoint):
    """Run predict.py in a folder with images/; return its exit code."""
    Path("images/more").mkdir(parents=True)
    for name, image in zip(
        ("a.png", "b.png", "more/c.PNG"), draw_shapes().test.images, strict=False
    ):
        save_png(image, Path("images", name))
    Path("images/notes.txt").write_text("not an image")
    return lambda *arguments: tiny(checkpoint, *arguments, script=predict)


def test_folder_gives_a_line_and_a_record_for_each_image(classify, checkpoint, capsys):
    assert classify("images", "--json", "out.json") == 0
    lines, records = capsys.readouterr().out.splitlines(), json.loads(Path("out.json").read_text())
    names = [f"images/{name}" for name in ("a.png", "b.png", "more/c.PNG")]
    classifier = Classifier.from_checkpoint(checkpoint, "cpu")
    probabilities = classifier.probabilities(draw_shapes().test.images[:3]).tolist()
    for name, line, record, row in zip(names, lines, records, probabilities, strict=True):
        expected = sorted(zip(row, classifier.classes, strict=True), reverse=True)
        found = [(item["probability"], item["class"]) for item in record["predictions"]]
        assert [each[1] for each in found] == [each[1] for each in expected]
        assert [each[0] for each in found] == pytest.approx(
            [each[0] for each in expected], abs=1e-6
        )
        assert record["image"] == name
        assert line == f"{name}: " + ", ".join(f"{word} {p:.1%}" for p, word in found[:3])


def test_what_cannot_be_classified_is_skipped_and_the_code_says_so(classify, capsys):
    Path("empty").mkdir()
    files = "images/a.png", "images/notes.txt", "empty", "missing.png", "images/b.png"
    assert classify(*files, "--top", 1) == 1
    output = capsys.readouterr()
    assert [line.count("%") for line in output.out.splitlines()] == [1, 1]
    skipped = [line.removeprefix("predict.py: skipped: ") for line in output.err.splitlines()]
    for line, message in zip(
        skipped,
        (
            "images/notes.txt is no picture",
            "the folder empty has no pic",
            "cannot read missing.png",
        ),
        strict=True,
    ):
        assert line.startswith(message)
    assert classify("empty", "--json", "out.json", "--figure", "out.png") == 1
    assert json.loads(Path("out.json").read_text()) == []


def test_figure_has_the_whole_name_of_every_file(classify, monkeypatch, capsys):
    """Long ones, some that matplotlib would read as formulas, and one that is no UTF-8."""
    drawn, draw = [], figures.predictions
    monkeypatch.setattr(figures, "predictions", lambda *a: drawn.append(draw(*a)) or drawn[0])
    names = "IMG_20240131_154212_edited_version_2_final.png", "$5_or_$6.png"
    names += "x" * 23 + "$_$.png", os.fsdecode(b"caf\xe9.png")
    for name in names:
        Path("images", name).write_bytes(Path("images/a.png").read_bytes())
    assert classify(*[f"images/{name}" for name in names], "--top", 1, "--figure", "out.pdf") == 0
    assert r"caf\udce9.png: " in capsys.readouterr().out
    titles = [axes.get_title().replace("\n", "") for axes in drawn[0].axes if axes.images]
    assert [title.replace(r"\$", "$") for title in titles] == [*names[:3], r"caf\udce9.png"]
    assert len([axes for axes in drawn[0].axes if len(axes.patches) > 1]) == 4  # not --top's one
    assert Path("out.pdf").read_bytes().startswith(b"%PDF")


def test_image_from_standard_input(classify, monkeypatch, capsys):
    data = io.BytesIO(Path("images/a.png").read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=data))
    assert classify("-", "images/a.png") == 0
    piped, file = capsys.readouterr().out.splitlines()
    assert piped.removeprefix("-") == file.removeprefix("images/a.png")
