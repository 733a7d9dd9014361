"""pictures.py: what is read of a picture, and of a folder of them."""

import json
import os
import shutil
import struct
import zlib
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_rows
from PIL import Image

import evaluate
import pictures
import predict
from checkpoint import load_network
from dataset import Dataset, draw_shapes, load_folder
from pictures import common_size, decode, find_pictures, list_pictures, read_image
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
    result = read_image(tmp_path / name, 32)
    assert (result.dtype, result.shape) == (torch.uint8, (3, 32, 32))
    for half, color in ((result[:, :14], upper), (result[:, 18:], lower)):
        assert half.float().mean((1, 2)).tolist() == pytest.approx(color, abs=8)


def save_png(image, path):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, "PNG")


def test_image_of_the_networks_size_is_not_changed(tmp_path):
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    save_png(image, tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png", 32), image)


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
    "empty": (lambda path: path.write_bytes(b""), "no picture that can be read"),
    "text": (lambda path: path.write_text("a cat"), "no picture that can be read"),
    "postscript": (
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n"),
        "no picture that can be read",
    ),
    "truncated": (truncated, "no picture that can be read"),
    "huge": (huge, r"more than 67,108,864 pixels"),
    "pipe": (os.mkfifo, "not a regular file"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_file_that_is_no_image_is_named(tmp_path, kind):
    write, message = NO_IMAGES[kind]
    write(tmp_path / "x.jpg")
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / "x.jpg", 32)
    assert str(tmp_path / "x.jpg") in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Folders ---


def write(path, color=(255, 0, 0), size=(40, 30)):
    """Write a picture of one color, in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def write_classes(folder, counts):
    """Write so many pictures of each class, of a color that tells class and number."""
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write(folder / name / f"{i}.png", (number, i, 0), (8, 8))


def write_dataset(folder, images: Dataset, splits):
    """Write splits of a data set as PNG files, named by their number."""
    for split in splits:
        for i, (image, label) in enumerate(zip(*getattr(images, split), strict=True)):
            path = folder / split / f"{label} {images.classes[label]}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def test_what_is_a_picture_and_in_which_order(tmp_path):
    for name in ("10.jpg", "2.PNG", "deep/er/3.webp", "4.gif", "5.bmp", "6.tiff"):
        write(tmp_path / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "._2.png", ".hidden/1.png", "x.eps"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no picture")
    found = [str(path.relative_to(tmp_path)) for path in list_pictures(tmp_path)]
    assert found == ["2.PNG", "4.gif", "5.bmp", "6.tiff", "10.jpg", "deep/er/3.webp"]


def test_classes_are_the_folders_in_natural_order(tmp_path):
    write_classes(tmp_path / "train", dict.fromkeys(["class 10", "class 2", "Ünïcödé 猫"], 2))
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    (tmp_path / "train" / ".git").mkdir()
    (tmp_path / "train" / "readme.txt").touch()
    classes, files = find_pictures(tmp_path)
    assert classes == ["class 2", "class 10", "Ünïcödé 猫"]
    assert files.keys() == {"train", "test"}
    names = [(path.name, label) for path, label in files["train"]]
    assert names == [(f"{i}.png", label) for i in range(2) for label in range(3)]


BAD_FOLDERS = {
    "nowhere": (lambda folder: None, "is not a folder"),
    "nothing": (Path.mkdir, "pets needs two folders of pictures or more, .*; found none"),
    "one class": (
        lambda f: write_classes(f / "train", {"cat": 9}),
        "pets/train needs .*; found cat",
    ),
    "other names": (lambda f: write_classes(f, {"Train": 9, "Valid": 9}), "train, val and test"),
    "empty class": (
        lambda f: write_classes(f, {"a": 9, "b": 9}) or (f / "c").mkdir(),
        "the class c has no pictures",
    ),
    "no train": (
        lambda f: write_classes(f / "test", {"a": 1, "b": 1}),
        "but no folder train; to test a network, name .*pets/test",
    ),
    "other classes": (
        lambda f: (
            write_classes(f / "train", {"a": 1, "b": 1}) or write_classes(f / "val", {"a": 1})
        ),
        "train and val differ in the class b",
    ),
    "too few": (
        lambda f: write_classes(f, {"a": 9, "b": 2}),
        "too few pictures of the class b for t",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_folder_without_a_data_set_is_one_line(tmp_path, kind):
    make, message = BAD_FOLDERS[kind]
    make(tmp_path / "pets")
    with pytest.raises(UserError, match=message) as caught:
        load_folder(tmp_path / "pets")
    assert str(tmp_path / "pets") in str(caught.value) or "classes" in str(caught.value)


def test_missing_splits_are_held_out_a_tenth_of_each_class(tmp_path, capsys):
    write_classes(tmp_path, {"a": 30, "b": 20, "c": 4})
    first, again = load_folder(tmp_path), load_folder(tmp_path)
    counts = [split.labels.bincount().tolist() for split in (first.train, first.val, first.test)]
    assert counts == [[24, 16, 2], [3, 2, 1], [3, 2, 1]]
    assert first.names == again.names
    assert len({name for names in first.names.values() for name in names}) == 54
    told = capsys.readouterr().out.splitlines()[0]
    assert told == (
        f"{tmp_path}: 3 classes, 8x8 pixels: 42 for training, 6 for validation (held out), "
        "6 for test (held out)"
    )
    for split in ("train", "val", "test"):
        images, labels = getattr(first, split)
        for name, image, label in zip(first.names[split], images, labels, strict=True):
            folder, number = Path(name).parent.name, int(Path(name).stem)
            assert (image[:2, 0, 0].tolist(), "abc"[label]) == (
                ["abc".index(folder), number],
                folder,
            )
    part = load_folder(tmp_path, size=16, wanted=("test",))
    assert (part.test.images.shape, len(part.train.labels)) == ((6, 3, 16, 16), 0)
    assert part.names["test"] == first.names["test"]
    assert len(load_folder(tmp_path, all_for_test=True).test.labels) == 54
    chosen = load_folder(tmp_path, ["c", "a"])
    assert set(chosen.names["test"]) <= set(first.names["test"])
    assert {Path(chosen.names["val"][i]).parent.name for i in chosen.val.labels.nonzero()} == {"a"}


def test_size_is_that_of_small_squares_or_256(tmp_path):
    write(tmp_path / "a.png", size=(64, 64))
    write(tmp_path / "b.png", size=(64, 64))
    (tmp_path / "broken.png").write_text("x")
    files = [tmp_path / name for name in ("a.png", "b.png", "broken.png")]
    assert common_size(files) == 64
    for size in ((64, 63), (32, 32), (65, 65)):
        write(tmp_path / "c.png", size=size)
        assert common_size([*files, tmp_path / "c.png"]) == 256
    write(tmp_path / "large.jpg", size=(65, 65))
    assert common_size([tmp_path / "large.jpg"]) == 256


def test_unreadable_pictures_are_named_and_left_out(tmp_path, capsys):
    for i in range(40):
        write(tmp_path / f"{i}.png", (i, 0, 0))
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:50])
    files = [(tmp_path / f"{i}.png", i % 2) for i in range(40)]
    images, labels, names = decode(files, 8)
    assert images[:, 0, 0, 0].tolist() == [i for i in range(40) if i != 7]
    assert labels.tolist() == [i % 2 for i in range(40) if i != 7]
    assert str(tmp_path / "7.png") not in names
    assert f"left out: {tmp_path}/7.png is no picture" in capsys.readouterr().out
    for i in range(8, 11):
        (tmp_path / f"{i}.png").write_text("x")
    with pytest.raises(UserError, match=r"4 of 40 pictures cannot be read, such as: .*7\.png"):
        decode(files, 8)


def test_too_many_pictures_for_the_disk_are_one_line(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(10**6)
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"need 0.2 GB in .*, which has 0.0 GB left; set TMPDIR"):
        decode([(tmp_path / "x.png", 0)] * 1000, 256)


# --- What a user does with them ---


@pytest.fixture
def shapes_as_files(tiny, tmp_path):
    """The few shapes of the tiny runs as PNG files."""
    write_dataset(tmp_path / "pets", draw_shapes(), ("train", "val", "test"))
    return tmp_path / "pets"


SETTINGS = "--epochs 2 --lr 0.02 --warm-up 0.1 --mix cutmix --mix-probability 0.5".split()


def test_pictures_train_to_the_bit_as_the_data_set_they_were_written_from(tiny, shapes_as_files):
    assert tiny(*SETTINGS, "--output-dir", "shapes") == 0
    assert tiny(*SETTINGS, "--dataset", "folder", "--data-dir", "pets", "--output-dir", "run") == 0
    assert Path("run/metrics.csv").read_bytes() == Path("shapes/metrics.csv").read_bytes()
    a, b = (load_network(f"{name}/best.pt") for name in ("run", "shapes"))
    assert a[1] == b[1]
    for one, other in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_own_pictures_from_training_to_prediction(tiny, shapes_as_files, capsys, faulty):
    """Every printed command works as it is printed; the network is used on another folder too."""
    faulty("SIGTERM", 0, 1)
    own = ["--dataset", "folder", "--data-dir", "pets", "--classes", "1 ring", "0 disc", "3 cross"]
    assert tiny(*SETTINGS, *own, "--output-dir", "run") == 128 + 15
    assert capsys.readouterr().out.startswith("pets: 3 classes, 32x32 pixels: 12 for training, 6 ")
    assert tiny("--resume", "run") == 0
    told = capsys.readouterr().out
    assert "evaluate it with: python evaluate.py run/best.pt --data-dir pets\n" in told
    options = "run/best.pt --data-dir pets --figures --predictions out.csv --json out.json".split()
    assert tiny(*options, script=evaluate) == 0
    rows = read_rows("out.csv")
    assert list(rows[0])[:3] == ["image", "label", "prediction"]
    assert [row["label"] for row in rows] == [Path(row["image"]).parent.name for row in rows]
    correct = np.mean([row["label"] == row["prediction"] for row in rows])
    assert json.loads(Path("out.json").read_text())["accuracy"] == pytest.approx(correct)
    for row in rows:
        values = [float(row[f"p({name})"]) for name in ("1 ring", "0 disc", "3 cross")]
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert values[["1 ring", "0 disc", "3 cross"].index(row["prediction"])] == max(values)
    capsys.readouterr()
    assert tiny("run/best.pt", rows[0]["image"], "--top", 1, script=predict) == 0
    assert f": {rows[0]['prediction']} " in capsys.readouterr().out
    write_classes(Path("others"), {"0 disc": 3, "1 ring": 2, "3 cross": 1, "unknown": 5})
    assert tiny("run/best.pt", "--data-dir", "others", script=evaluate) == 0
    assert "test split, 6 images" in capsys.readouterr().out
    (Path("others") / "1 ring").rename("others/one ring")
    assert tiny("run/best.pt", "--data-dir", "others", script=evaluate) == 2
    assert "others has no class 1 ring; it has 0 disc, 3 cross" in capsys.readouterr().err


def test_folder_needs_to_be_named(tiny, capsys):
    assert tiny("--dataset", "folder") == 2
    assert "--dataset folder needs --data-dir" in capsys.readouterr().err


def test_weights_to_start_from_are_all_that_fit(tiny, tiny_run, shapes_as_files, capsys):
    """fc8 is for other classes; its predictions begin as those of a new network."""
    donor = torch.load("run/best.pt")["weights"]
    own = ["--dataset", "folder", "--data-dir", "pets", "--weights", "run/best.pt", "--lr", 1e-30]
    assert tiny(*own, "--epochs", 1, "--mix", "none", "--output-dir", "new") == 0
    assert "weights of run/best.pt; new layers: fc8" in capsys.readouterr().out
    for name, weight in torch.load("new/best.pt")["weights"].items():
        assert torch.equal(weight, donor[name]) == ("fc8" not in name), name
    (Path("run") / "best.pt").unlink()  # a run that is resumed does not need it
    assert tiny("--resume", "new", "--epochs", 2) == 0
    assert tiny(*own, "--output-dir", "third") == 2
    assert "cannot read run/best.pt" in capsys.readouterr().err


def test_network_of_another_data_set_is_tested_on_a_folder_of_its_classes(tiny, tiny_run, capsys):
    """In whatever order the folder has the classes."""
    shapes = draw_shapes()
    for i, (image, label) in enumerate(zip(*shapes.test, strict=True)):
        path = Path("pictures", shapes.classes[label], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    assert tiny("run/best.pt", "--json", "a.json", script=evaluate) == 0
    options = "run/best.pt --dataset folder --data-dir pictures --json b.json".split()
    assert tiny(*options, script=evaluate) == 0
    a, b = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert a["confusion_matrix"] == b["confusion_matrix"]
    assert (b["dataset"], b["training"]["dataset"]) == ("folder", "shapes")


def test_weights_of_another_kind_of_input_are_refused(tiny, tiny_run, capsys):
    options = ["--weights", "run/best.pt", "--recipe", "paper", "--output-dir", "new"]
    assert tiny(*options) == 2
    assert "needs --input standardized, as it was trained" in capsys.readouterr().err


def test_pictures_of_the_training_are_no_test_images(tiny, shapes_as_files, capsys):
    """Wherever they lie now: in a copy, to which one was added and in which two were renamed."""
    for split in ("train", "val", "test"):
        for i, path in enumerate(sorted(Path("pets", split).rglob("*.png"))):
            target = Path("flat", path.parent.name, f"{split}-{i}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    assert tiny("--dataset", "folder", "--data-dir", "flat", "--output-dir", "run") == 0
    assert tiny("run/best.pt", "--predictions", "a.csv", script=evaluate) == 0
    shutil.copytree("flat", "copy")
    write(Path("copy/0 disc/new.png"), (9, 9, 9), (32, 32))
    for path in list(Path("copy/1 ring").iterdir())[:2]:
        path.rename(path.with_name(f"renamed-{path.name}"))
    capsys.readouterr()
    options = "run/best.pt --data-dir copy --predictions b.csv".split()
    assert tiny(*options, script=evaluate) == 0
    assert "left out: 70 pictures that the training has seen" in capsys.readouterr().out
    a, b = (
        {Path(row["image"]).name.removeprefix("renamed-") for row in read_rows(name)}
        for name in ("a.csv", "b.csv")
    )
    assert b - a == {"new.png"}
    assert a <= b


def test_run_goes_on_with_the_same_pictures_only(tiny, shapes_as_files, capsys):
    own = ["--dataset", "folder", "--data-dir", "pets", "--epochs", 1, "--output-dir", "run"]
    assert tiny(*own) == 0
    write(Path("pets/train/0 disc/0.png"), (1, 2, 3), (32, 32))
    assert tiny("--resume", "run", "--epochs", 2) == 2
    assert (
        "the pictures in pets are not those that run/last.pt was trained on"
        in capsys.readouterr().err
    )


def test_run_of_few_steps_says_so(tiny, shapes_as_files, capsys):
    own = ["--dataset", "folder", "--data-dir", "pets", "--epochs", 1, "--output-dir", "run"]
    assert tiny(*own) == 0
    assert "that is 5 steps, too few to learn much: give more --epochs" in capsys.readouterr().out
