"""dataset.py: the same images every time, and a clear line where there are none.

CIFAR-10 is a made-up miniature here, and the real one where it is there (conftest.py).
"""

import functools
import hashlib
import pickle
import shutil
import socket
import tarfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5

import cifar
from cifar import find_data_dir
from dataset import Split, draw_shapes, held_out_mask, load_dataset, stratified_subset
from utils import UserError


def content(*splits):
    """Return the splits as one set of (image's bytes, label)."""
    pairs = (zip(*split, strict=True) for split in splits)
    return {(bytes(image.numpy()), int(label)) for pair in pairs for image, label in pair}


def digest(*splits):
    tensors = [tensor.numpy().tobytes() for split in splits for tensor in split]
    return hashlib.sha256(b"".join(tensors)).hexdigest()[:16]


# --- Splits -------------------------------------------------------------------------------------


@pytest.fixture
def numbered():
    """120 images of one pixel, which tells their number; three classes."""
    return Split(torch.arange(120, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(120) % 3)


def test_stratified_split_is_fixed_disjoint_and_complete(numbered):
    mask = held_out_mask(numbered.labels)
    rest, held_out = numbered.select(~mask), numbered.select(mask)
    assert held_out.labels.bincount().tolist() == [4] * 3
    assert rest.labels.bincount().tolist() == [36] * 3
    assert content(rest, held_out) == content(numbered)
    assert torch.equal(held_out_mask(numbered.labels), mask)


def test_stratified_subset_is_fixed_and_has_as_many_images_of_each_class(numbered):
    subset = stratified_subset(numbered, 30)
    assert subset.labels.bincount().tolist() == [10] * 3
    assert len(content(subset) & content(numbered)) == 30
    assert digest(stratified_subset(numbered, 30)) == digest(subset)
    for size in (0, 2, 31, 123):
        message = f"--train-images {size} is not a multiple of 3 from 3 to 120"
        with pytest.raises(UserError, match=message):
            stratified_subset(numbered, size)


def test_shapes_are_fixed_distinct_and_balanced():
    data = draw_shapes()
    for split, per_class in ((data.train, 150), (data.val, 50), (data.test, 100)):
        assert (split.images.shape[1:], split.images.dtype) == ((3, 32, 32), torch.uint8)
        assert split.labels.bincount().tolist() == [per_class] * 10
    assert len(content(data.train, data.val, data.test)) == 3000
    assert digest(data.train, data.val, data.test) == "3e07a3989bd54afb"


def test_real_cifar10_has_its_images_and_the_same_5000_for_validation(cifar10_dir):
    data = load_dataset("cifar10", cifar10_dir)
    assert data.classes[:3] == ["airplane", "automobile", "bird"]
    for split, per_class in ((data.train, 4500), (data.val, 500), (data.test, 1000)):
        assert (split.images.shape[1:], split.images.dtype) == ((3, 32, 32), torch.uint8)
        assert split.labels.bincount().tolist() == [per_class] * 10
    for train, splits in ((True, [data.train, data.val]), (False, [data.test])):
        official = CIFAR10(cifar10_dir, train=train)
        images = torch.from_numpy(official.data.transpose(0, 3, 1, 2).copy())
        assert content(*splits) == content(Split(images, torch.tensor(official.targets)))
    assert digest(data.val) == "fe1ecdd9ff329230"  # published numbers were chosen on these images


# --- CIFAR-10's files ---------------------------------------------------------------------------


@pytest.fixture(params=[CIFAR10])
def archive(tmp_path, monkeypatch, request):
    """An archive laid out as CIFAR's, 20 images a file, with checksums that are expected."""
    kind, keys = request.param, {CIFAR10: "labels", CIFAR100: "fine_labels"}
    source = tmp_path / "source" / kind.base_folder
    source.mkdir(parents=True)
    files = [name for name, _ in kind.train_list + kind.test_list]
    for i, name in enumerate(files):
        pixels = np.arange(20, dtype=np.uint8)[:, None].repeat(3072, axis=1) + 20 * i
        content = {"data": pixels, keys[kind]: [*range(10)] * 2, "coarse_labels": [0] * 20}
        (source / name).write_bytes(pickle.dumps(content))
    meta = source / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: list("abcdefghij")}))
    checksums = [[name, calculate_md5(source / name)] for name in files]
    path = tmp_path / kind.filename
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source, kind.base_folder)
    monkeypatch.setattr(kind, "train_list", checksums[:-1])
    monkeypatch.setattr(kind, "test_list", checksums[-1:])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": calculate_md5(meta)})
    monkeypatch.setattr(kind, "tgz_md5", calculate_md5(path))
    monkeypatch.setattr(kind, "url", f"file://{tmp_path}/nowhere.tar.gz")
    return path


@pytest.fixture
def folder(tmp_path):
    """An empty folder for the data."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def unpacked(archive, folder):
    """The data's own folder, with its files."""
    shutil.unpack_archive(archive, folder)
    return folder / CIFAR10.base_folder


@pytest.fixture
def server(tmp_path, archive, monkeypatch):
    """Let the archive be downloaded from this machine."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/{archive.name}"
        monkeypatch.setattr(CIFAR10, "url", url)
        yield
        http.shutdown()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def test_archive_in_the_folder_is_unpacked(archive, folder):
    shutil.copy(archive, folder)
    data = load_dataset("cifar10", folder)
    assert data.classes == list("abcdefghij")
    train, val, test = (s.images[:, 0, 0, 0].tolist() for s in (data.train, data.val, data.test))
    assert (sorted(train + val), test) == (list(range(100)), list(range(100, 120)))
    assert data.test.labels.tolist() == [*range(10)] * 2
    assert names(folder) == [CIFAR10.base_folder, CIFAR10.filename]
    (folder / CIFAR10.base_folder / "data_batch_2").unlink()  # is unpacked again
    assert digest(load_dataset("cifar10", folder).train) == digest(data.train)


@pytest.mark.parametrize("archive", [CIFAR100], indirect=True)
def test_cifar100_is_read_with_its_fine_labels(archive, folder):
    shutil.copy(archive, folder)
    data = load_dataset("cifar100", folder, classes=["j", "b"])
    assert data.classes == ["j", "b"]
    assert data.test.labels.tolist() == [1, 0] * 2
    assert data.test.images[:, 0, 0, 0].tolist() == [21, 29, 31, 39]
    assert sorted(data.train.labels.tolist()) == sorted(data.val.labels.tolist()) == [0, 1]
    assert names(folder) == [CIFAR100.base_folder, CIFAR100.filename]


@pytest.mark.parametrize("classes", [["cross", "disc"], ["ramp", "disc", "rays"]])
def test_chosen_classes_are_numbered_in_their_order(classes):
    whole, part = draw_shapes(), load_dataset("shapes", classes=classes)
    assert part.classes == classes
    for old, new in ((whole.train, part.train), (whole.val, part.val), (whole.test, part.test)):
        named = {(bytes(i.numpy()), whole.classes[k]) for i, k in zip(*old, strict=True)}
        found = {(bytes(i.numpy()), classes[k]) for i, k in zip(*new, strict=True)}
        assert found == {pair for pair in named if pair[1] in classes}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["disc", "dog"], "has no class dog; it has disc, ring"),
        (["disc"], "two classes or more, not disc alone"),
        (["disc", "disc"], "two classes or more, not disc alone"),
    ],
)
def test_classes_that_cannot_be_chosen_are_one_line(classes, message):
    with pytest.raises(UserError, match=message):
        load_dataset("shapes", classes=classes)


def test_archive_is_downloaded_to_the_default_folder(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "source")
    assert len(load_dataset("cifar10").test.labels) == 20
    assert names(Path("data")) == [CIFAR10.base_folder]


def test_each_data_file_is_hashed_once_a_start(unpacked, folder, monkeypatch):
    hashed = []

    def count(path, *arguments):
        hashed.append(Path(path).name)
        return calculate_md5(path, *arguments)

    monkeypatch.setattr(torchvision.datasets.utils, "calculate_md5", count)
    load_dataset("cifar10", folder)
    files = [name for name in names(unpacked) if name != "batches.meta"]  # which has 158 bytes
    assert sorted(name for name in hashed if name != "batches.meta") == files


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_file_is_named_and_not_opened(unpacked, folder, tmp_path, name):
    class Attack:
        def __reduce__(self):
            return (tmp_path.joinpath("attacked").touch, ())

    (unpacked / name).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match=rf"{name} is damaged .*; delete it and run again$"):
        load_dataset("cifar10", folder)
    assert not (tmp_path / "attacked").exists()


def test_damaged_archive_is_named_and_kept(archive, folder):
    shutil.copy(archive, folder)
    damage(folder / archive.name)
    with pytest.raises(UserError, match=f"{archive.name} is damaged"):
        load_dataset("cifar10", folder)
    assert names(folder) == [archive.name]


def test_damaged_download_leaves_nothing(server, archive, folder):
    damage(archive)
    with pytest.raises(UserError, match="corrupted"):
        load_dataset("cifar10", folder)
    assert names(folder) == []


def test_failed_download_is_one_line_that_offers_three_ways(archive, folder):
    with pytest.raises(UserError) as error:
        load_dataset("cifar10", folder)
    for words in (str(folder), CIFAR10.url, CIFAR10.filename, "--data-dir", "--dataset shapes"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert names(folder) == []


def test_silent_server_is_given_up(archive, folder, monkeypatch):
    monkeypatch.setattr(cifar, "NETWORK_TIMEOUT", 0.2)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/")
        with pytest.raises(UserError, match="timed out"):
            load_dataset("cifar10", folder)
    assert time.monotonic() - started < 30


def test_interruption_leaves_nothing_that_looks_like_the_data(archive, folder, monkeypatch):
    shutil.copy(archive, folder)

    def interrupted(_, target):
        (Path(target) / CIFAR10.base_folder).mkdir()
        (Path(target) / CIFAR10.base_folder / "data_batch_1").write_bytes(b"a half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar, "extract_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("cifar10", folder)
    assert names(folder) == [archive.name]


def test_folder_that_cannot_be_used_is_a_clear_error(archive, folder, unpacked, monkeypatch):
    with pytest.raises(UserError, match=r"--data-dir .*nowhere is not a folder"):
        load_dataset("cifar10", folder / "nowhere")
    with pytest.raises(UserError, match=f"name the one that it is in: {folder}$"):
        load_dataset("cifar10", unpacked)
    (unpacked / "test_batch").unlink()
    monkeypatch.setattr(cifar.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=f"{folder} is not writable"):
        load_dataset("cifar10", folder)


def test_data_set_of_another_name_is_an_error():
    with pytest.raises(ValueError, match="there are cifar10, cifar100, folder, shapes"):
        load_dataset("imagenet")


def test_folder_of_a_run_is_found_while_all_files_are_in_it(unpacked, folder):
    assert find_data_dir("cifar10", str(folder)) == folder
    (unpacked / "test_batch").unlink()  # what is missing would be fetched into it
    assert find_data_dir("cifar10", str(folder)) == Path("data")
