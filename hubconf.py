"""Entry points of torch.hub: torch.hub.load("OWNER/REPOSITORY", "alexnet", num_classes=10)"""

import sys
from pathlib import Path

dependencies = ["torch"]
HERE = Path(__file__).resolve().parent


def alexnet(**settings):
    """Return a model.AlexNet with initial weights; settings are its arguments."""
    _check_name("model")
    from model import AlexNet

    return AlexNet(**settings)


def classifier(checkpoint: str, device: str = "auto"):
    """Return the predict.Classifier in a checkpoint of train.py; needs requirements.txt."""
    _check_name("model", "predict", "utils")
    from predict import Classifier

    return Classifier.from_checkpoint(checkpoint, device)


def _check_name(*names: str) -> None:
    """Raise ImportError if the caller has other modules of these names."""
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file).resolve().parent != HERE:
            raise ImportError(f"{file} is imported as {name!r}, which this repository needs")
