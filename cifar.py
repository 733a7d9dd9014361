"""CIFAR-10 and CIFAR-100 from their files or the network (Krizhevsky 2009).

https://www.cs.toronto.edu/~kriz/cifar.html; torchvision reads the files.
"""

import os
import socket
import tempfile
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, extract_archive

from utils import UserError, user_file

DEFAULT_DATA_DIR = "data"
NETWORK_TIMEOUT = 30.0  # seconds; without it a silent network would hang
KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def load_cifar(
    name: str, data_dir: Path
) -> tuple[list[str], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the classes, and images uint8 [N, 3, 32, 32] and labels [N] for training and test.

    Looks in data_dir for the data's folder, such as cifar-10-batches-py, then for the archive,
    such as cifar-10-python.tar.gz, then downloads. Every file's MD5 is checked before it is opened.

    Raises UserError, naming the file, if one is damaged, or if there is no way to the data.
    """
    kind = KINDS[name]
    _check_data_dir(kind, data_dir)
    if not _is_complete(kind, data_dir):
        _fetch(kind, data_dir)

    class Checked(kind):
        def _check_integrity(self) -> bool:
            return True  # torchvision's own check would hash all files for each split

    train, test = (Checked(data_dir, train=is_train) for is_train in (True, False))
    return train.classes, _to_tensors(train), _to_tensors(test)


def find_data_dir(name: str, data_dir: str) -> Path:
    """Return the folder where a run had CIFAR, if it is still there, else the default one."""
    files = [Path(data_dir) / KINDS[name].base_folder / file for file in _checksums(KINDS[name])]
    # Unlike Path.is_file(), this raises nothing for a folder that is closed to this user.
    return Path(data_dir if all(map(os.path.isfile, files)) else DEFAULT_DATA_DIR)


def _to_tensors(cifar: CIFAR10) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(cifar.targets)


def _check_data_dir(kind: type[CIFAR10], data_dir: Path) -> None:
    if data_dir == Path(DEFAULT_DATA_DIR):
        with user_file("make the folder", data_dir):
            data_dir.mkdir(exist_ok=True)
    with user_file("read", data_dir):
        if not data_dir.is_dir():
            raise UserError(f"--data-dir {data_dir} is not a folder; make it or name another")
        folder = data_dir.resolve()
        is_inner = not (folder / kind.base_folder).exists()
    if folder.name == kind.base_folder and is_inner:
        raise UserError(
            f"--data-dir {data_dir} is the data's own folder; name the one that it is in: "
            f"{folder.parent}"
        )


def _checksums(kind: type[CIFAR10]) -> dict[str, str]:
    """Return the MD5 of each file, by name."""
    return {**dict(kind.train_list + kind.test_list), kind.meta["filename"]: kind.meta["md5"]}


def _is_complete(kind: type[CIFAR10], data_dir: Path) -> bool:
    """Return whether every file is there and intact. Raises UserError for a damaged one."""
    complete = True
    for name, md5 in _checksums(kind).items():
        path = data_dir / kind.base_folder / name
        with user_file("read", path):
            exists = path.exists()
        if exists:
            _check_md5(path, md5)
        else:
            complete = False
    return complete


def _check_md5(path: Path, md5: str) -> None:
    with user_file("read", path):
        if not check_integrity(path, md5):
            raise UserError(f"{path} is damaged (its MD5 is not {md5}); delete it and run again")


def _fetch(kind: type[CIFAR10], data_dir: Path) -> None:
    """Unpack the archive in data_dir, or else a downloaded one, and put the files in place."""
    archive = data_dir / kind.filename
    if archive.exists():
        _check_md5(archive, kind.tgz_md5)
    if not os.access(data_dir, os.W_OK):
        raise UserError(
            f"{data_dir} is not writable, and not all of {kind.base_folder} is in it; unpack "
            f"{kind.filename} elsewhere, and name that folder with --data-dir"
        )
    # Unpacked aside, so that an interruption leaves nothing that looks like the data.
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpacking-") as aside:
        try:
            if archive.exists():
                extract_archive(str(archive), aside)
            else:
                _download(kind, aside)
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"{kind.__name__} is not in {data_dir}, and fetching it from {kind.url} failed "
                f"({error}). Copy {kind.filename} into {data_dir}, or name the folder that "
                "holds it with --data-dir, or try --dataset shapes, which needs no download. For "
                "pictures of your own, give --dataset folder"
            ) from error
        folder = data_dir / kind.base_folder
        with user_file("write to", folder):
            folder.mkdir(exist_ok=True)
            for file in (Path(aside) / kind.base_folder).iterdir():
                file.replace(folder / file.name)


def _download(kind: type[CIFAR10], folder: str) -> None:
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        kind(folder, download=True)
    finally:
        socket.setdefaulttimeout(None)
