"""Checkpoints: a trained network or a run in a file, saved atomically and loaded safely.

    network, preprocessing, checkpoint = load_network("runs/cifar10-sgd/best.pt")

A checkpoint is a dictionary of tensors and plain values: format, format_version, model (settings of
AlexNet), layers (their types), weights, classes, preprocessing, training (settings of the run),
epoch; after a training on pictures of the user also seen, their fingerprints; in last.pt also
optimizer, scaler and progress, which resuming needs. compact.py writes smaller ones.
"""

import math
import pickletools
import warnings
import zipfile
from collections.abc import Collection
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import DATASETS
from model import IMAGE_SIZE, AlexNet, LocalResponseNorm
from pictures import LARGE_SIZE
from transforms import ENLARGED_SIZE, Preprocessing
from utils import (
    DAMAGE_ERRORS,
    PRECISIONS,
    UserError,
    atomic_write,
    is_out_of_memory,
    summarize_error,
    user_file,
)

FORMAT = "alexnet-cifar10"
FORMAT_VERSION = 3
# All that a checkpoint calls when it is loaded. torch allows more, such as bytearray, which makes
# any amount of memory out of a few bytes.
PICKLED = {
    "collections OrderedDict",
    "torch BoolStorage",
    "torch CharStorage",
    "torch FloatStorage",
    "torch IntStorage",
    "torch LongStorage",
    "torch._utils _rebuild_tensor_v2",
}


def save_checkpoint(path: Path, content: dict) -> None:
    """Write content (tensors and plain types) such that path is always a complete checkpoint."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **content}, temporary)


# --- Loading the file: nothing in it is executed ---


def load_checkpoint(path: str | Path) -> dict:
    """Load a checkpoint of train.py onto the CPU; loading cannot run code.

    Raises UserError, naming the file, if it is missing, damaged, of another program or version.
    """
    path = Path(path)
    try:
        with user_file("read", path):
            if path.is_dir():
                raise UserError(f"{path} is a folder; name a checkpoint in it, such as best.pt")
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is not a regular file; use another")  # a pipe is endless
            _check_archive(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the errors below say all there is to say
                content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch's reader raises many types on a damaged file
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is truncated or damaged; use another file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program: train.py writes those")
    version = content.get("format_version")
    if type(version) is not int:
        raise UserError(f"{path} is not a complete checkpoint: it has no format version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}; this program reads version {FORMAT_VERSION}: "
            "use the version of the program that wrote it, or train again"
        )
    return content


def _check_archive(path: Path) -> None:
    """Raise UserError for a file that train.py cannot have written, before anything is loaded.

    torch.save writes zip archives without compression. torch.load also reads compressed ones and an
    older format, which can claim any amount of memory.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise UserError(f"{path} is not a checkpoint; use another file")
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise UserError(
                f"{path} would unpack to {unpacked:,} bytes, more than it has, so it was not "
                "loaded; train.py writes none like that"
            )
        names = archive.namelist()
        if len({name.lower() for name in names}) < len(names):  # torch may see another than we
            raise UserError(f"{path} has two parts of one name; use another file")
        for name in names:
            if name.lower().endswith("data.pkl") and not _calls(archive.read(name)) <= PICKLED:
                raise UserError(
                    f"{path} holds more than tensors and plain values, so it was not loaded: "
                    "it could run code. Only checkpoints written by train.py can be used"
                )


def _calls(data: bytes) -> set[str]:
    """Return what a pickle would call when loaded, and "?" for what it does not name outright."""
    found = set()
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "GLOBAL":
            found.add(argument)
        elif operation.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            found.add("?")
    return found


# --- Validation: the parts fit together ---


def load_network(path: str | Path) -> tuple[AlexNet, Preprocessing, dict]:
    """Load a network in eval mode on the CPU, its preprocessing, and the checkpoint's content.

    Raises UserError, naming the file, if it is not a checkpoint or its parts do not fit together.
    """
    checkpoint = load_checkpoint(path)
    try:
        preprocessing = _check_content(checkpoint)
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            network = AlexNet(**checkpoint["model"])
        weights = multiply_out(checkpoint["weights"], network)
        _check_weights(weights)
        if checkpoint["layers"] != layer_types(network):
            raise UserError(
                f"{path} holds a network with other layers than AlexNet in model.py; "
                "change model.py as it was in training"
            )
        network.load_state_dict(weights, assign=True)
    except DAMAGE_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise UserError(f"{path} is not a complete checkpoint ({reason}); use another") from error
    return network.eval(), preprocessing, checkpoint


def multiply_out(weights: dict, network: nn.Module) -> dict:
    """Return a checkpoint's weights with those of compact.py as the float32 tensors they stand for.

    Those are lists of factors: matrices of int8 numbers, each with a scale for every row.
    """
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    expanded = {}
    for name, value in weights.items():
        if isinstance(value, list):
            factors = [numbers.float() * scales for numbers, scales in value]
            rows, columns = factors[0].shape[0], factors[-1].shape[1]
            if rows * columns != shapes[name].numel():  # before it takes memory
                raise ValueError(f"{name!a:.40} has another size")
            value = reduce(torch.matmul, factors).view(shapes[name])
        expanded[name] = value
    return expanded


def layer_types(network: nn.Module) -> list[str]:
    """Return name and type of each layer, and the settings of those without weights.

    Another activation, dropout or pool leaves no trace in the weights.
    """
    lines = []
    for name, layer in network.named_modules():
        if not list(layer.children()):
            has_settings = isinstance(layer, (LocalResponseNorm, nn.MaxPool2d))
            settings = f"({layer.extra_repr()})" if has_settings else ""
            lines.append(f"{name}: {layer._get_name()}{settings}")
    return lines


def check_dicts(content: dict, *names: str) -> None:
    """Raise TypeError unless these parts of a checkpoint are dictionaries."""
    for name in names:
        if not isinstance(content[name], dict):
            raise TypeError(f"{name} is not a dictionary")


def _check_plain(*values) -> None:
    """Raise TypeError for anything whose comparison or printing could take for ever."""
    for value in values:
        if isinstance(value, list):  # of classes
            _check_plain(*value)
        elif not isinstance(value, str | int | float | None):
            raise TypeError("a setting is not a plain value")


def _check_weights(weights: dict) -> None:
    """Raise ValueError or AttributeError unless these are tensors of numbers, float32 if real."""
    for value in weights.values():
        if value.layout != torch.strided or value.is_meta or value.is_complex():
            raise ValueError("a weight is not made of numbers")
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ValueError("a weight is not made of float32 numbers")


def _check_content(checkpoint: dict) -> Preprocessing:
    """Return the preprocessing. Raises one of DAMAGE_ERRORS for what no run could have written."""
    check_dicts(checkpoint, "model", "weights", "preprocessing", "training")
    model, training, classes = (checkpoint[name] for name in ("model", "training", "classes"))
    _check_plain(*model.values(), *training, *training.values())
    seen = checkpoint.get("seen", torch.empty(0, dtype=torch.int64))
    if not isinstance(seen, Tensor) or (seen.dtype, seen.dim()) != (torch.int64, 1):
        raise TypeError("the pictures that it has seen are not a list of numbers")
    if not isinstance(classes, list):
        raise TypeError("the classes are not a list")
    if len(classes) != model["num_classes"] or not all(map(str.isprintable, classes)):
        raise ValueError("the classes do not fit the network")
    preprocessing = Preprocessing(**checkpoint["preprocessing"])
    for numbers in (preprocessing.mean, preprocessing.std):
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
            raise ValueError("preprocessing needs 3 means and 3 standard deviations")
    sizes = preprocessing.size, preprocessing.enlarged_size
    allowed = (IMAGE_SIZE, IMAGE_SIZE), (IMAGE_SIZE, ENLARGED_SIZE)
    is_fitting = sizes in allowed and 0 < preprocessing.image_size <= LARGE_SIZE
    if min(preprocessing.std) <= 0 or not is_fitting:
        raise ValueError("the preprocessing does not fit the network")
    if training["dataset"] not in DATASETS or training["precision"] not in PRECISIONS:
        raise ValueError("the data set or the precision is unknown")
    # last.pt of a run's first epoch has epoch 0.
    for count, lowest in (
        (checkpoint["epoch"], 0),
        (training["epochs"], 1),
        (training["batch_size"], 1),
    ):
        if not isinstance(count, int) or count < lowest:
            raise TypeError("the epochs or the batch size are not whole numbers")
    return preprocessing


# --- What resuming needs in addition ---


def check_progress(
    content: dict, steps_per_epoch: int, columns: Collection[str], validated: bool
) -> None:
    """Raise ValueError, KeyError or TypeError for a last.pt that a run could not go on with.

    columns are what the history has of each epoch; those of a run without validation may be None.
    """
    check_dicts(content, "progress", "optimizer", "scaler")
    check_dicts(content["optimizer"], "state")
    progress, history = content["progress"], content["progress"]["history"]
    if type(progress["step"]) is not int or not 0 <= progress["step"] <= steps_per_epoch:
        raise ValueError("it has no such step")
    if not isinstance(history, list) or len(history) != content["epoch"]:
        raise ValueError("its history is not that of its epochs")
    # The peak memory is unknown on some systems.
    optional = {"peak_memory_mib"} if validated else {"peak_memory_mib", "val_loss", "val_accuracy"}
    numbers = [progress["seconds"], *content["scaler"].values()]
    for row in history:
        numbers += [row[name] for name in columns if name not in optional or row[name] is not None]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("its history is not made of numbers")


def copy_into(target: dict | Tensor, source: dict | Tensor) -> None:
    """Copy tensors of a file into a run's own, which keep their device and memory layout.

    Raises one of DAMAGE_ERRORS if they are not of the same names, shapes and types.
    """
    if isinstance(target, dict):
        if target.keys() != source.keys():
            raise ValueError("its parts are not those of this run")
        for name in target:
            copy_into(target[name], source[name])
    elif target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError("a part of it does not fit the network")
    else:
        target.copy_(source)


# --- The run's folder ---


def load_run(path: Path, network: nn.Module, settings: dict, changeable: set[str]) -> dict:
    """Return the content of a last.pt. Raises UserError if it is damaged or another run's.

    network and settings are the run's; settings that are changeable may differ.
    """
    content = load_checkpoint(path)
    try:
        _check_content(content)
        if content["layers"] != layer_types(network):
            raise ValueError("the network has other layers now")
    except DAMAGE_ERRORS as error:
        raise damaged_run(path, error) from error
    recorded = content["training"]
    for name in settings | recorded:
        if name not in changeable and recorded.get(name) != settings.get(name):
            raise UserError(
                f"{path} is not of this run: its {name!a:.40} is not {settings.get(name)}; "
                "put back the run's own, or start a new run"
            )
    return content


def damaged_run(path: Path, error: Exception) -> UserError:
    """Return the error for a last.pt that does not fit its run."""
    return UserError(f"{path} cannot be resumed from ({summarize_error(error)}); start a new run")
