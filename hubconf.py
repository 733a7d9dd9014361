"""Entry points of torch.hub: torch.hub.load("OWNER/REPOSITORY", "alexnet", pretrained=True)"""

import pathlib
import sys

dependencies = ["torch"]
HERE = pathlib.Path(__file__).resolve().parent
MODULES = ["kernels", *(path.stem for path in HERE.glob("*.py"))]
WEIGHTS = HERE / "weights" / "cifar10.pt"


def alexnet(pretrained: bool = False, **settings):
    """Return a model.AlexNet with initial weights; settings are its arguments.

    pretrained: with the weights that weights/cifar10.pt has for CIFAR-10, in eval mode; needs
    requirements.txt. Its input is normalized by the preprocessing of classifier().
    """
    if not pretrained:
        _check_names("model")
        from model import AlexNet

        return AlexNet(**settings)
    if settings:
        raise ValueError("pretrained=True takes no settings; for other classes replace fc8")
    _check_names(*MODULES)
    from checkpoint import load_network

    network, _, _ = load_network(WEIGHTS)
    return network


def classifier(checkpoint: str | pathlib.Path = WEIGHTS, device: str = "auto"):
    """Return the predict.Classifier in a checkpoint, by default that for CIFAR-10's classes.

    Needs requirements.txt.
    """
    _check_names(*MODULES)
    from predict import Classifier

    return Classifier.from_checkpoint(checkpoint, device)


def _check_names(*names: str) -> None:
    """Raise ImportError if the caller has other modules of these names."""
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and HERE not in pathlib.Path(file).resolve().parents:
            raise ImportError(f"{file} is imported as {name!r}, which this repository needs")
