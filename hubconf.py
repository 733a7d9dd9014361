"""Entry points of torch.hub: torch.hub.load("OWNER/REPOSITORY", "alexnet", num_classes=10)"""

import pathlib
import sys

dependencies = ["torch"]
HERE = pathlib.Path(__file__).resolve().parent
MODULES = ["kernels", *(path.stem for path in HERE.glob("*.py"))]


def alexnet(**settings):
    """Return a model.AlexNet with initial weights; settings are its arguments."""
    _check_names("model")
    from model import AlexNet

    return AlexNet(**settings)


def classifier(checkpoint: str, device: str = "auto"):
    """Return the predict.Classifier in a checkpoint of train.py; needs requirements.txt."""
    _check_names(*MODULES)
    from predict import Classifier

    return Classifier.from_checkpoint(checkpoint, device)


def _check_names(*names: str) -> None:
    """Raise ImportError if the caller has other modules of these names."""
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and HERE not in pathlib.Path(file).resolve().parents:
            raise ImportError(f"{file} is imported as {name!r}, which this repository needs")
