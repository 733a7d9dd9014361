"""The script that benchmark.py compares with: AlexNet on CIFAR-10 as a tutorial would write it.

Torch's own layers, float32, NCHW, a DataLoader that resizes image by image with Pillow, and a loss
read at every step.
"""

import multiprocessing
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from dataset import Split
from model import IMAGE_SIZE

MEAN, STD = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]  # of CIFAR-10, in 0..255


def local_response_norm() -> nn.Module:
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)


def alexnet() -> nn.Sequential:
    """Return the network: the function of model.AlexNet, with PyTorch's dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 96, 11, stride=4),
        nn.ReLU(),
        local_response_norm(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(96, 256, 5, padding=2),
        nn.ReLU(),
        local_response_norm(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(256, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Flatten(),
        nn.Linear(9216, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 10),
    )


class ResizedImages(torch.utils.data.Dataset):
    """Images that are resized one by one, as torchvision.datasets.CIFAR10 gives them."""

    def __init__(self, split: Split):
        self.images = split.images.permute(0, 2, 3, 1).numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.Resize(IMAGE_SIZE),
                transforms.ToTensor(),
                transforms.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def data_loader(split: Split, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Return the loader of shuffled batches."""
    return DataLoader(
        ResizedImages(split),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        # The system's usual way, although benchmark.py starts its own processes in another.
        multiprocessing_context=multiprocessing.get_all_start_methods()[0],
        pin_memory=device.type == "cuda",
    )


def training_step(device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """Return a training step: a function of images and labels."""
    network = alexnet().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        logits = network(images)
        loss = criterion(logits, labels)
        loss.backward()
        optimizer.step()
        loss.item()
        (logits.argmax(1) == labels).sum().item()

    return step
