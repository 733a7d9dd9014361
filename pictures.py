"""From picture files to uint8 images of one size, each file read upright, in RGB, on white.

image = read_image("photo.jpg", size=32)  # uint8 [3, 32, 32]
folder = find_pictures(Path("pets"))  # classes, and the files of each split
images, labels, paths = decode(folder.files["train"], size=256)
"""

import functools
import io
import os
import re
import shutil
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from utils import UserError, is_out_of_memory, log, summarize_error, user_file

SPLITS = ("train", "val", "test")
LIKE_SPLITS = {"training", "valid", "validation", "testing", *SPLITS}  # in lower case
STDIN = "-"
# What Pillow finds but does not read, or reads with another program.
NO_PICTURES = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR"}
MAX_PIXELS = 2**26  # of a picture; larger ones are refused before they are unpacked
LARGE_SIZE = 256  # pixels: what the paper made of ImageNet's pictures (§2)
SMALL_SIZE = 64  # pixels; a folder whose pictures all have one size up to this keeps it
MAX_UNREADABLE = 0.05  # part of the pictures that may be unreadable


# --- A picture ---


def read_image(source: str | Path, size: int) -> Tensor:
    """Read a picture file, or standard input for "-", as uint8 [3, size, size].

    The largest square in its middle, upright, in RGB, on white where it is transparent. Raises
    UserError if it is no picture that Pillow reads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that is not used
        return _read(source, size)


def _read(source: str | Path, size: int) -> Tensor:
    with user_file("read", source):
        if source != STDIN and Path(source).exists() and not Path(source).is_file():
            raise UserError(f"{source} is not a regular file")  # a pipe could be endless
        data = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return to_tensor(image, size)
    except Exception as error:  # Pillow raises many types on a damaged file
        if is_out_of_memory(error):
            raise
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if is_unknown else summarize_error(error)
        raise UserError(f"{source} is no picture that can be read ({reason:.200})") from error


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """Return the largest square in the middle of a picture as uint8 [3, size, size].

    Raises ValueError for a picture of too many pixels or of numbers that are not whole.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
    if image.mode == "F":
        raise ValueError("its pixels are not whole numbers")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of gray, of which RGB keeps 8
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    is_larger = min(image.size) > size
    method = Image.Resampling.BOX if is_larger else Image.Resampling.BILINEAR
    image = ImageOps.fit(image.convert("RGB"), (size, size), method)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@functools.cache
def _formats() -> list[str]:
    """Return the formats of pictures that Pillow reads by itself, without another program."""
    Image.init()
    return [name for name in Image.OPEN if name not in NO_PICTURES]


def is_picture(name: str) -> bool:
    """Return whether a file's name is that of a picture, and it is not hidden."""
    kind = Image.registered_extensions().get(Path(name).suffix.lower())
    return kind in _formats() and not name.startswith(".")


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures in a folder and its subfolders, in natural order; none is hidden."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if is_picture(name)]
    return sorted(found, key=lambda path: (natural_key(str(path)), str(path)))


def natural_key(name: str) -> list:
    """Return a key that sorts 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


# --- A folder of pictures ---


class PictureFolder(NamedTuple):
    """Classes, and for each split that the folder has its files with their labels, 0 and up.

    A folder without train, val and test has the split "all".
    """

    classes: list[str]
    files: dict[str, list[tuple[Path, int]]]


def find_pictures(folder: Path) -> PictureFolder:
    """Return what is in FOLDER/train/CLASS, FOLDER/val/CLASS, FOLDER/test/CLASS or FOLDER/CLASS.

    Files are in the order of their names, whatever their class.

    Raises UserError, naming what it is, for a split without train, a class without pictures or
    that another split does not have, and for less than two classes.
    """
    with user_file("read", folder):
        if not folder.is_dir():
            raise UserError(f"--data-dir {folder} is not a folder; name one of pictures")
        for path in folder.iterdir():
            if path.name not in SPLITS and path.name.lower() in LIKE_SPLITS and path.is_dir():
                raise UserError(f"{path}: name the folders of the splits train, val and test")
        splits = {name: folder / name for name in SPLITS if (folder / name).is_dir()}
        found = {name: _pictures_by_class(path) for name, path in splits.items()}
        found = found or {"all": _pictures_by_class(folder)}
    if splits and "train" not in splits:
        raise UserError(
            f"{folder} has {' and '.join(splits)}, but no folder train; to test a network, name "
            f"{folder / next(iter(splits))}"
        )
    names = sorted(next(iter(found.values())), key=lambda name: (natural_key(name), name))
    if len(names) < 2:
        where = folder / "train" if splits else folder
        found_names = ", ".join(names) or "none"
        raise UserError(
            f"{where} needs two folders of pictures or more, one for each class, such as "
            f"{where / 'cat' / '1.jpg'}; found {found_names}"
        )
    for split, pictures in found.items():
        if different := set(names) ^ set(pictures):
            raise UserError(
                f"{folder}: train and {split} differ in the class {sorted(different)[0]}; every "
                "split needs the same folders"
            )
        if empty := [name for name in names if not pictures[name]]:
            raise UserError(f"{folder}: the class {empty[0]} has no pictures; delete its folder")
    files = {
        split: sorted(
            ((path, label) for label, name in enumerate(names) for path in pictures[name]),
            key=lambda pair: (natural_key(pair[0].name), pair[1]),
        )
        for split, pictures in found.items()
    }
    return PictureFolder(names, files)


def choose_classes(chosen: list[str] | None, classes: list[str], where: str) -> list[str]:
    """Return the chosen classes, by default all. Raises UserError for unknown or too few ones.

    where: the name of what has the classes.
    """
    chosen = classes if chosen is None else list(dict.fromkeys(chosen))
    if unknown := [name for name in chosen if name not in classes]:
        names = ", ".join(classes)
        raise UserError(f"{where} has no class {unknown[0]}; it has {names:.500}")
    if len(chosen) < 2:
        raise UserError(f"a network needs two classes or more, not {', '.join(chosen)} alone")
    return chosen


def _pictures_by_class(folder: Path) -> dict[str, list[Path]]:
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    return {path.name: list_pictures(path) for path in folders}


def common_size(files: list[Path]) -> int:
    """Return the side of the squares that pictures are to become.

    Theirs, if all are squares of one size of at most 64 pixels, else 256. A file that cannot be
    read does not count.
    """
    sizes = set()
    for path in files:
        try:
            with Image.open(path, formats=_formats()) as image:
                sizes.add(image.size)
        except Exception:  # decode() will name it
            continue
        width, height = image.size
        if len(sizes) > 1 or width != height or width > SMALL_SIZE:
            return LARGE_SIZE
    return next(iter(sizes))[0] if sizes else LARGE_SIZE


def decode(
    files: list[tuple[Path, int]], size: int, quiet: bool = False
) -> tuple[Tensor, Tensor, list[str]]:
    """Read pictures, in parallel. Return uint8 [N, 3, size, size], labels [N] and the files' names.

    What cannot be read is named and left out. The images are in a file in the system's folder for
    temporary files (TMPDIR), which is gone when the program ends: memory holds what is in use.

    Raises UserError if more than a few per cent cannot be read, or the disk has too little room.
    """
    needed, free = len(files) * 3 * size**2, shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise UserError(
            f"{len(files):,} pictures of {size}x{size} pixels need {needed / 1e9:.1f} GB in "
            f"{tempfile.gettempdir()}, which has {free / 1e9:.1f} GB left; set TMPDIR to another "
            "folder"
        )

    def read(path: Path) -> Tensor | UserError:
        try:
            return _read(path, size)
        except UserError as error:
            return error

    labels, names, errors = [], [], []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with tempfile.TemporaryFile() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = pool.map(read, [path for path, _ in files])
            disable = True if quiet else None  # None: shown on a terminal
            bar = tqdm(results, "reading", len(files), leave=False, unit="picture", disable=disable)
            for result, (path, label) in zip(bar, files, strict=True):
                if isinstance(result, UserError):
                    errors.append(result)
                    continue
                file.write(result.contiguous().numpy())
                labels.append(label)
                names.append(str(path))
            file.flush()
            images = torch.empty(0, 3, size, size, dtype=torch.uint8)
            if labels:  # an empty file cannot be mapped
                shape = len(labels), 3, size, size
                images = torch.from_numpy(np.memmap(file, np.uint8, "c", shape=shape))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the rest is not read
    if len(errors) > max(1, MAX_UNREADABLE * len(files)):
        raise UserError(
            f"{len(errors)} of {len(files)} pictures cannot be read, such as: {errors[0]}"
        )
    if not quiet:
        for error in errors:
            log(f"left out: {error}")
    return images, torch.tensor(labels, dtype=torch.int64), names
