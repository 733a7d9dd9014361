"""What torch.hub finds here: torch.hub.load("OWNER/REPOSITORY", "alexnet", num_classes=10)"""

from model import AlexNet
from predict import Classifier

dependencies = ["torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL"]


def alexnet(**settings) -> AlexNet:
    """The network with first weights; settings are those of model.AlexNet."""
    return AlexNet(**settings)


def classifier(checkpoint: str, device: str = "auto") -> Classifier:
    """The trained network of a checkpoint of train.py, with its classes and preprocessing."""
    return Classifier.from_checkpoint(checkpoint, device)
