"""What torch.hub finds here: torch.hub.load("OWNER/REPOSITORY", "alexnet", num_classes=10)"""

from model import AlexNet

dependencies = ["torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL"]


def alexnet(**settings) -> AlexNet:
    """The network with first weights; settings are those of model.AlexNet."""
    return AlexNet(**settings)


def classifier(checkpoint: str, device: str = "auto"):
    """The predict.Classifier in a checkpoint of train.py: network, classes and preprocessing."""
    from predict import Classifier  # not above: it imports names that the caller may have too

    return Classifier.from_checkpoint(checkpoint, device)
