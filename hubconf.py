"""What torch.hub finds here: torch.hub.load("OWNER/REPOSITORY", "alexnet", num_classes=10)"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Not gpu_kernels: it registers operations with torch, which a process can do only once.
NAMES = {path.stem for path in HERE.glob("*.py")} - {"gpu_kernels", "hubconf"}

dependencies = ["torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL"]


@contextlib.contextmanager
def _own_modules() -> Iterator[None]:
    """In it `import model` finds this folder's, even if the caller has another module model."""
    named_so = {name: sys.modules[name] for name in NAMES if name in sys.modules}
    others = {name: it for name, it in named_so.items() if not _is_ours(it)}
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        sys.path.remove(str(HERE))
        for name in NAMES - named_so.keys():  # the caller may import another of that name later
            sys.modules.pop(name, None)
        sys.modules.update(others)


def _is_ours(module) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().parent == HERE


def alexnet(**settings):
    """The network, a model.AlexNet, with initial weights; settings are its."""
    with _own_modules():
        from model import AlexNet
    return AlexNet(**settings)


def classifier(checkpoint: str, device: str = "auto"):
    """The predict.Classifier in a checkpoint of train.py: network, classes and preprocessing."""
    with _own_modules():
        from predict import Classifier
    return Classifier.from_checkpoint(checkpoint, device)
