"""Checkpoints: written so that each is whole, and read as if a stranger had made it.

A checkpoint is a dictionary of tensors and plain values: format, format_version, model (settings of
AlexNet), weights, classes, preprocessing, training (settings of the run), epoch; in last.pt also
what resuming needs.
"""

import math
import pickletools
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from dataset import DATASETS, ENLARGED_SIZE, Preprocessing
from model import CHOICES, IMAGE_SIZE, AlexNet
from utils import DAMAGE_ERRORS, UserError, atomic_write, is_out_of_memory

FORMAT = "alexnet-cifar10"
FORMAT_VERSION = 1
# All that a checkpoint calls when it is loaded. torch allows more, such as bytearray, which makes
# any amount of memory out of a few bytes.
PICKLED = {
    "collections OrderedDict",
    "torch FloatStorage",
    "torch LongStorage",
    "torch._utils _rebuild_tensor_v2",
}
VALIDATION = {"val_loss", "val_accuracy"}
STATE_NAMES = {  # what an optimizer keeps for each parameter
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes content (tensors and plain types) so that path is always a whole checkpoint."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **content}, temporary)


# ---------------------------------------------------------------------------------------------
# The file: nothing in it is executed
# ---------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint of train.py onto the CPU. Nothing in the file is executed.

    Raises UserError, naming the file, if it is missing, damaged, of another program, or newer.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a checkpoint in it, such as {path / 'best.pt'}")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; use another")  # a pipe could be endless
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the errors below say all there is to say
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # torch's reader raises many types on a damaged file
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is truncated or damaged; use another file") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program: train.py writes those")
    version = content.get("format_version")
    if type(version) is not int:
        raise UserError(
            f"{path} is not a complete checkpoint: it has no format version; use another"
        )
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}; this program reads "
            f"version {FORMAT_VERSION}: use the program's version that wrote it"
        )
    return content


def _calls(data: bytes) -> set[str]:
    """What a pickle would have called when loaded, and "?" for what it does not name outright."""
    found = set()
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "GLOBAL":
            found.add(argument)
        elif operation.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            found.add("?")
    return found


def _check_archive(path: Path) -> None:
    """Raises UserError for a file that train.py cannot have written, before anything is loaded.

    torch.save writes zip archives without compression. torch.load also reads compressed ones and an
    older format, which can claim any amount of memory.
    """
    with open(path, "rb") as file:
        if not file.read(4) == b"PK\x03\x04":
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
                    "it could execute code. Only checkpoints written by train.py can be used"
                )


# ---------------------------------------------------------------------------------------------
# What is in it fits together
# ---------------------------------------------------------------------------------------------


def load_network(path: str | Path) -> tuple[AlexNet, Preprocessing, dict]:
    """The network of a checkpoint in eval mode, its preprocessing, and the checkpoint's content.

    Raises UserError, naming the file, if it is not a checkpoint or its parts do not fit together.
    """
    checkpoint = load_checkpoint(path)
    try:
        check_dicts(checkpoint, "model", "weights", "preprocessing", "training")
        _check_known(path, checkpoint["model"])
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            network = AlexNet(**checkpoint["model"])
        network.load_state_dict(checkpoint["weights"], assign=True)
        preprocessing = Preprocessing(**checkpoint["preprocessing"])
        _check_fits(checkpoint, network, preprocessing)
    except DAMAGE_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise UserError(f"{path} is not a complete checkpoint ({reason}); use another") from None
    return network.eval().to(memory_format=torch.channels_last), preprocessing, checkpoint


def check_dicts(content: dict, *names: str) -> None:
    """Raises TypeError unless these parts of a checkpoint are dictionaries."""
    for name in names:
        if not isinstance(content[name], dict):
            raise TypeError(f"{name} is not a dictionary")


def _check_known(path: str | Path, settings: dict) -> None:
    """Raises UserError for a setting of the network, or its value, that model.py does not have."""
    for name, value in settings.items():
        _check_plain(value)
        if name in ("num_classes", "dropout"):
            continue  # numbers, whose range AlexNet checks
        if value not in CHOICES.get(name, ()):
            raise UserError(
                f"{path} holds a network with {name!a:.40} = {value!a:.40}, which this version "
                "does not know; use the program's version that wrote it"
            )


def _check_plain(*values) -> None:
    """Raises TypeError for anything whose comparison or printing could take for ever."""
    if not all(isinstance(value, str | int | float | None) for value in values):
        raise TypeError("a setting is not a plain value")


def _check_fits(checkpoint: dict, network: AlexNet, preprocessing: Preprocessing) -> None:
    """Raises ValueError, TypeError or KeyError for what evaluation could not work with."""
    for weight in network.parameters():
        if weight.dtype != torch.float32 or weight.layout != torch.strided or weight.is_meta:
            raise ValueError("a weight is not made of float32 numbers")
    classes, training = checkpoint["classes"], checkpoint["training"]
    if not isinstance(classes, list):
        raise TypeError("the classes are not a list")
    if len(classes) != network.config["num_classes"] or not all(map(str.isprintable, classes)):
        raise ValueError("the classes do not fit the network")
    for numbers in (preprocessing.mean, preprocessing.std):
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
            raise ValueError(
                "preprocessing needs a mean and a standard deviation for each of 3 channels"
            )
    sizes = preprocessing.size, preprocessing.enlarged_size
    allowed = (IMAGE_SIZE, IMAGE_SIZE), (IMAGE_SIZE, ENLARGED_SIZE)
    if min(preprocessing.std) <= 0 or sizes not in allowed:
        raise ValueError("the preprocessing does not fit the network")
    if training["dataset"] not in DATASETS or training["precision"] not in ("fp32", "bf16"):
        raise ValueError("the data set or the precision is unknown")
    _check_plain(*training, *training.values())
    if not all(isinstance(count, int) for count in (checkpoint["epoch"], training["epochs"])):
        raise TypeError("the number of epochs is not a whole number")


# ---------------------------------------------------------------------------------------------
# What resuming needs in addition
# ---------------------------------------------------------------------------------------------


def check_progress(
    content: dict, steps_per_epoch: int, columns: Collection[str], validated: bool
) -> None:
    """Raises ValueError, KeyError or TypeError for a last.pt that a run could not go on with.

    columns are what the history has of each epoch; those of a run without validation may be None.
    """
    check_dicts(content, "progress", "optimizer")
    check_dicts(content["optimizer"], "state")
    progress, epoch = content["progress"], content["epoch"]
    history, step = progress["history"], progress["step"]
    if not isinstance(history, list):
        raise TypeError("its history is not a list")
    if type(step) is not int or not 0 <= step <= steps_per_epoch:
        raise ValueError("it has no such step")
    if len(history) != epoch:
        raise ValueError(f"its history is not one of {epoch!a:.40} epochs")
    absent = set() if validated else VALIDATION
    if any(row[name] is not None for row in history for name in absent):
        raise ValueError("its history has validations, and the run has none")
    numbers = [progress["seconds"]]
    for row in history:
        numbers += [row[name] for name in columns if name not in absent | {"peak_memory_mib"}]
        if row["peak_memory_mib"] is not None:  # unknown on some systems
            numbers.append(row["peak_memory_mib"])
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("its history is not made of numbers")


def fitting_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state from a file, each tensor laid out in memory as its parameter is.

    The fused optimizers read that memory without looking. Raises ValueError for a state that is not
    all that the optimizer keeps.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    keeps_nothing = optimizer.defaults.get("momentum") == 0  # SGD without momentum
    if state.keys() != set(range(0 if keeps_nothing else len(parameters))):
        raise ValueError("the optimizer's state is not that of all parameters")
    fitting = {}
    for number, tensors in state.items():
        parameter = parameters[number]
        if not isinstance(tensors, dict) or tensors.keys() != STATE_NAMES[type(optimizer)]:
            raise ValueError("the optimizer's state is that of another")
        fitting[number] = {
            name: fitting_tensor(value, parameter.new_empty(()) if name == "step" else parameter)
            for name, value in tensors.items()
        }
    return fitting


def fitting_tensor(value: Tensor, model: Tensor) -> Tensor:
    """A copy of value with the memory layout of model. Raises ValueError if it is another kind."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise ValueError("a part of the optimizer's state or a weight is not a tensor")
    if value.shape != model.shape or value.dtype != torch.float32:
        raise ValueError("a part of the optimizer's state or a weight does not fit the network")
    return torch.empty_like(model, requires_grad=False).copy_(value)
