import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from PIL import Image

import figures
import predict
import utils
from checkpoint import load_network
from dataset import draw_shapes
from predict import Classifier, read_picture
from utils import UserError, run_script

CHECKPOINT = ROOT / "tests" / "first-version" / "last.pt"
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict.py", str(CHECKPOINT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run_script(predict.main)
    return stopped.value.code


def colour(picture):
    """The mean colour of uint8 [3, H, W]."""
    return picture.float().mean((1, 2)).tolist()


# --- Pictures of any kind -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_the_same_grey(tmp_path, kind):
    """Of 255 levels 128, at 16 bits 128 * 257; in black and white the nearer one."""
    picture = Image.new("L", (40, 40), 128)
    if kind == "I;16":
        picture = Image.fromarray(np.full((40, 40), 128 * 257, np.uint16))
    elif kind == "CMYK":
        picture = Image.new("CMYK", (40, 40), (0, 0, 0, 127))
    elif kind != "L":
        picture = picture.convert(kind, dither=Image.Dither.NONE)
    path = tmp_path / ("x.jpg" if kind == "CMYK" else "x.png")
    picture.save(path)
    assert Image.open(path).mode in (kind, "I")  # older versions of Pillow say I for 16 bits
    expected = 255 if kind == "1" else 128
    result = read_picture(path)
    assert (result.dtype, result.shape) == (torch.uint8, (3, 32, 32))
    assert colour(result) == pytest.approx([expected] * 3, abs=2)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    picture = Image.new("RGBA", (64, 64), (*RED, 0))
    if mode == "P":
        picture = picture.convert("P")
        picture.info["transparency"] = picture.getpixel((0, 0))
    picture.save(tmp_path / "x.png")
    assert colour(read_picture(tmp_path / "x.png")) == pytest.approx(WHITE)


def test_picture_is_turned_as_its_camera_was_held(tmp_path):
    """Orientation 6: to be turned by 90 degrees clockwise, so that the left edge comes to top."""
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[:, :30] = RED
    pixels[:, 30:] = BLUE
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    result = read_picture(tmp_path / "x.jpg")
    assert colour(result[:, :14]) == pytest.approx(RED, abs=8)
    assert colour(result[:, 18:]) == pytest.approx(BLUE, abs=8)


def test_middle_of_a_wide_picture_is_taken(tmp_path):
    pixels = np.full((50, 150, 3), WHITE, np.uint8)
    pixels[:, 50:100] = BLUE
    Image.fromarray(pixels).save(tmp_path / "x.webp", lossless=True)
    assert colour(read_picture(tmp_path / "x.webp")) == pytest.approx(BLUE)


def test_picture_of_the_networks_size_is_not_changed(tmp_path):
    picture = draw_shapes().test.images[0]
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    assert torch.equal(read_picture(tmp_path / "x.png"), picture)


def bomb(path):
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        crc = struct.pack(">I", zlib.crc32(name + content))
        data += struct.pack(">I", len(content)) + name + content + crc
    path.write_bytes(data)


def truncated(path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue()[:2000])


BAD_PICTURES = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("a cat"),
    "postscript": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "gif": lambda path: Image.new("L", (9, 9)).save(path, "GIF"),
    "truncated": truncated,
    "bomb": bomb,
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_picture_is_named(tmp_path, kind):
    BAD_PICTURES[kind](tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png (does not exist|is no JPEG, PNG or WebP picture)"):
        read_picture(tmp_path / "x.png")


# --- The classifier -----------------------------------------------------------------------------


def test_probabilities_are_the_softmax_of_the_network():
    images = draw_shapes().test.images[:3]
    classifier = Classifier.from_checkpoint(CHECKPOINT, "cpu")
    probabilities = classifier.probabilities(images)
    assert not classifier.network.training
    assert classifier.classes[0] == "disc"
    network, preprocessing, _ = load_network(CHECKPOINT)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    resized = torch.nn.functional.interpolate((images - mean) / std, 227, mode="bilinear")
    with torch.no_grad():
        expected = network(resized).double().exp()
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 48, 64, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32),
        Image.new("RGB", (32, 32)),
    ],
)
def test_images_that_no_training_had_are_refused(images):
    classifier = Classifier.from_checkpoint(CHECKPOINT, "cpu")
    with pytest.raises(ValueError, match=r"expects uint8 images .*read_picture"):
        classifier.probabilities(images)


@pytest.mark.parametrize("before", [True, False])
def test_hub_serves_a_program_that_has_modules_of_the_same_names(tmp_path, before):
    """Whether it imports them before the hub's or only later."""
    names = ("model", "utils", "dataset", "evaluate", "figures")
    for name in names:
        (tmp_path / f"{name}.py").write_text("hers = True\n")
    arguments = f"torch.hub.load({str(ROOT)!r}, source='local', trust_repo=True, "
    (tmp_path / "program.py").write_text(
        f"import torch{', ' * before}{', '.join(names) * before}\n"
        f"print({arguments}model='alexnet', num_classes=7).config['num_classes'])\n"
        f"classifier = {arguments}model='classifier', checkpoint={str(CHECKPOINT)!r})\n"
        "print(len(classifier.classes))\n"
        f"import {', '.join(names)}\n"
        f"print({' and '.join(f'{name}.hers' for name in names)})\n"
    )
    done = run_python(tmp_path / "program.py", cwd=tmp_path)
    assert done.stdout == "7\n10\nTrue\n", done.stderr


def test_hub_finds_the_network_and_the_classifier():
    network = torch.hub.load(str(ROOT), "alexnet", source="local", num_classes=7, groups=2)
    assert network.config["num_classes"] == 7
    trained = torch.hub.load(str(ROOT), "classifier", str(CHECKPOINT), "cpu", source="local")
    assert len(trained.classes) == 10


# --- The script ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "some").mkdir()
    for number, picture in enumerate(draw_shapes().test.images[:3]):
        picture = Image.fromarray(picture.permute(1, 2, 0).numpy())
        picture.save(tmp_path / "some" / f"{number}.png")
    (tmp_path / "some" / "notes.txt").write_text("not a picture")
    return tmp_path / "some"


def test_folder_gives_a_line_for_each_picture(folder, monkeypatch, capsys):
    outputs = folder.parent / "a.json", folder.parent / "a.png"
    assert run(monkeypatch, folder, "--json", outputs[0], "--figure", outputs[1]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{folder}/{i}.png" for i in range(3)]
    assert all(line.count("%") == 3 for line in lines)
    results = json.loads(outputs[0].read_text())
    for line, result in zip(lines, results, strict=True):
        shares = [item["probability"] for item in result["likeliest"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
        assert f": {result['likeliest'][0]['class']} {shares[0]:.1%}, " in line
    assert outputs[1].read_bytes().startswith(b"\x89PNG")


def test_bad_picture_is_skipped_and_the_code_says_so(folder, monkeypatch, capsys):
    arguments = folder / "0.png", folder / "notes.txt", folder / "1.png"
    assert run(monkeypatch, *arguments, "--top", 1) == 1
    output = capsys.readouterr()
    assert [line.count("%") for line in output.out.splitlines()] == [1, 1]
    assert output.err.count("\n") == 1
    assert output.err.startswith(f"predict.py: skipped: {folder}/notes.txt is no JPEG")


def test_figure_has_five_classes_and_any_name(folder, monkeypatch, capsys):
    """One that matplotlib would read as a formula, and one that is no text in UTF-8."""
    figure = []
    draw = figures.likeliest
    monkeypatch.setattr(figures, "likeliest", lambda *a: figure.append(draw(*a)) or figure[0])
    names = "$5_or_$6.png", os.fsdecode(b"caf\xe9.png")
    for name in names:
        shutil.copy(folder / "0.png", folder / name)
    pictures = [folder / name for name in names]
    assert run(monkeypatch, *pictures, "--top", 1, "--figure", folder / "f.png") == 0
    assert r"caf\udce9.png: " in capsys.readouterr().out
    bars = [axes for axes in figure[0].axes if axes.patches]
    assert [len(axes.patches) for axes in bars] == [5, 5]


def test_files_are_written_though_nobody_reads_the_output(folder, monkeypatch):
    """As with | head: a print then fails."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    files = folder / "x.json", folder / "x.svg"
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(utils, "_drop_output", lambda: None)
    assert run(monkeypatch, folder / "0.png", "--json", files[0], "--figure", files[1]) == 128 + 13
    assert len(json.loads(files[0].read_text())) == 1
    assert files[1].read_text().startswith("<?xml")


def test_picture_from_a_pipe(folder, monkeypatch, capsys):
    data = io.BytesIO((folder / "0.png").read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=data))
    assert run(monkeypatch, "-") == 0
    piped = capsys.readouterr().out
    assert run(monkeypatch, folder / "0.png") == 0
    assert piped.removeprefix("-") == capsys.readouterr().out.removeprefix(f"{folder}/0.png")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "picture"),
        (["empty"], "the folder empty has no file"),
        (["x.png", "--top", "0"], "0 is not a"),
        (["x.png", "--json", "no/x"], "the folder no does not exist"),
        (["x.png", "--device", "tpu"], "--device tpu"),
    ],
)
def test_bad_command_is_one_line(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("predict.py: error: ")
    assert error.count("\n") == 1
    assert named in error
