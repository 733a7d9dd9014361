import io
import json
import os
import struct
import sys
import zlib
from functools import partial
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
from predict import Classifier, read_image
from utils import UserError

RED, BLUE, WHITE, GRAY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def gray(mode, path):
    image = Image.new("L", (40, 40), 128)
    image.convert(mode, dither=Image.Dither.NONE).save(path)


def transparent(mode, path):
    image = Image.new("RGBA", (64, 64), (*RED, 0)).convert(mode)
    image.save(path, transparency=image.getpixel((0, 0)) if mode == "P" else None)


def photo_held_upright(path):
    """Write an image with red on the left, to be rotated by 90 degrees clockwise (6)."""
    pixels = np.full((60, 60, 3), BLUE, np.uint8)
    pixels[:, :30] = RED
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


def wide(path):
    pixels = np.full((50, 150, 3), WHITE, np.uint8)
    pixels[:, 50:100] = BLUE
    Image.fromarray(pixels).save(path, lossless=True)


def deep_gray(path):
    Image.fromarray(np.full((9, 9), 128 * 257, np.uint16)).save(path)


IMAGES = {  # what writes a file, and the colors of the upper and lower half
    "RGB.png": (partial(gray, "RGB"), GRAY, GRAY),
    "gray.png": (partial(gray, "L"), GRAY, GRAY),
    "palette.png": (partial(gray, "P"), GRAY, GRAY),
    "RGBA.png": (partial(gray, "RGBA"), GRAY, GRAY),
    "LA.png": (partial(gray, "LA"), GRAY, GRAY),
    "black and white.png": (partial(gray, "1"), WHITE, WHITE),
    "CMYK.jpg": (lambda path: Image.new("CMYK", (9, 9), (0, 0, 0, 127)).save(path), GRAY, GRAY),
    "16 bit.png": (deep_gray, GRAY, GRAY),
    "transparent.png": (partial(transparent, "RGBA"), WHITE, WHITE),
    "transparent palette.png": (partial(transparent, "P"), WHITE, WHITE),
    "photo.JPEG": (photo_held_upright, RED, BLUE),
    "wide.webp": (wide, BLUE, BLUE),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_is_read_upright_in_rgb_on_white(tmp_path, name):
    write, upper, lower = IMAGES[name]
    write(tmp_path / name)
    result = read_image(tmp_path / name)
    assert (result.dtype, result.shape) == (torch.uint8, (3, 32, 32))
    for half, color in ((result[:, :14], upper), (result[:, 18:], lower)):
        assert half.float().mean((1, 2)).tolist() == pytest.approx(color, abs=8)


def save_png(image, path):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, "PNG")


def test_image_of_the_networks_size_is_not_changed(tmp_path):
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    save_png(image, tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png"), image)


def huge(path):
    """Write a PNG of a few bytes that says it has 9,000 x 9,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data)


def truncated(path):
    Image.effect_noise((64, 64), 50).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:2000])


NO_IMAGES = {
    "missing": (lambda path: None, "cannot read .*x.jpg: No such file"),
    "empty": (lambda path: path.write_bytes(b""), "no JPEG, PNG or WebP"),
    "text": (lambda path: path.write_text("a cat"), "no JPEG, PNG or WebP"),
    "postscript": (
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n"),
        "no JPEG, PNG or WebP",
    ),
    "gif": (lambda path: Image.new("L", (9, 9)).save(path, "GIF"), "no JPEG, PNG or WebP"),
    "truncated": (truncated, "no JPEG, PNG or WebP"),
    "huge": (huge, r"more than 67,108,864 pixels"),
    "pipe": (os.mkfifo, "not a regular file"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_file_that_is_no_image_is_named(tmp_path, kind):
    write, message = NO_IMAGES[kind]
    write(tmp_path / "x.jpg")
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / "x.jpg")
    assert str(tmp_path / "x.jpg") in str(caught.value)
    assert "\n" not in str(caught.value)


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
    with pytest.raises(ValueError, match=r"expects uint8 images of shape .*" + found):
        Classifier.from_checkpoint(checkpoint, "cpu").probabilities(images)


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
        ("images/notes.txt is no JPEG", "the folder empty has no file", "cannot read missing.png"),
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
