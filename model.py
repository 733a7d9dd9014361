"""AlexNet, the network of "ImageNet Classification with Deep Convolutional Neural Networks".

Krizhevsky, Sutskever and Hinton, NIPS 2012: "the paper". Its program,
github.com/computerhistory/AlexNet-Source-Code, is "the 2012 source".

    from model import AlexNet
    logits = AlexNet()(torch.randn(8, 3, 227, 227))  # [8, 10]
"""

import copy
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 55 positions of an 11x11 filter at stride 4. The paper says 224 pixels: the 2012 source lets the
# last filter reach over the edge (layer.py, modulesX). In PyTorch they have 54 positions.
IMAGE_SIZE = 227


class AlexNet(nn.Module):
    """Five convolutions and three fully connected layers (paper §3.5, Fig. 2).

    Args:
        num_classes: number of outputs of the last layer.
        groups: 1 connects every channel with every channel. 2 splits conv2, conv4, conv5 and LRN
            into the two towers that ran on two GPUs in 2012 (§3.2).
        dropout: probability that an output of fc6 or fc7 is set to zero in training (§4.2).

    Shape: float [N, 3, 227, 227] to logits [N, num_classes]; another size is a ValueError.

    Weights start as `init_weights(network, "he")` draws them. Layers can be replaced by assignment:
    `network.classifier.fc8 = nn.Linear(4096, 5)`, `network.features.norm1 = nn.BatchNorm2d(96)`.
    """

    def __init__(self, num_classes: int = 10, groups: int = 1, dropout: float = 0.5):
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 96, kernel_size=11, stride=4),  # 96 x 55 x 55
                relu1=nn.ReLU(),
                norm1=LocalResponseNorm(groups=groups),
                pool1=nn.MaxPool2d(kernel_size=3, stride=2),  # 96 x 27 x 27
                conv2=nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=groups),  # 256 x 27 x 27
                relu2=nn.ReLU(),
                norm2=LocalResponseNorm(groups=groups),
                pool2=nn.MaxPool2d(kernel_size=3, stride=2),  # 256 x 13 x 13
                conv3=nn.Conv2d(256, 384, kernel_size=3, padding=1),  # over both towers
                relu3=nn.ReLU(),  # 384 x 13 x 13
                conv4=nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=groups),
                relu4=nn.ReLU(),
                conv5=nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=groups),
                relu5=nn.ReLU(),  # 256 x 13 x 13
                pool5=nn.MaxPool2d(kernel_size=3, stride=2),  # 256 x 6 x 6
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                fc6=nn.Linear(256 * 6 * 6, 4096),
                relu6=nn.ReLU(),
                drop6=PaperDropout(dropout),
                fc7=nn.Linear(4096, 4096),
                relu7=nn.ReLU(),
                drop7=PaperDropout(dropout),
                fc8=nn.Linear(4096, num_classes),
            )
        )
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 227, 227]
        check_size(x)
        x = self.features(x)  # [N, 256, 6, 6]
        x = torch.flatten(x, 1)  # [N, 9216]
        return self.classifier(x)  # [N, num_classes]

    def embed(self, x: Tensor) -> Tensor:
        """Return the activations of fc7, [N, 4096], of images [N, 3, 227, 227].

        Similar images have similar activations (§6.1, Fig. 4 right). Call eval() first, or fc6 is
        under dropout.
        """
        check_size(x)
        x = torch.flatten(self.features(x), 1)
        return self.classifier[:-2](x)  # without drop7 and fc8

    def summary(self) -> str:
        """Return a table of each layer's output for one image, its parameters and multiply-adds."""
        network = copy.deepcopy(self).to("meta").eval()  # shapes without values
        x = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta")
        lines = [f"{'layer':<8}{'output':<16}{'parameters':>12}{'multiply-adds':>16}"]
        totals = [0, 0]
        for part in (network.features, network.classifier):
            for name, layer in part.named_children():
                x = layer.forward(x)  # not layer(x), which would call the user's hooks
                if isinstance(layer, (nn.ReLU, nn.Dropout)):
                    continue
                parameters = sum(parameter.numel() for parameter in layer.parameters())
                products = 0
                if isinstance(layer, (nn.Conv2d, nn.Linear)):  # a weight is used at each position
                    products = layer.weight.numel() * math.prod(x.shape[2:])
                totals[0] += parameters
                totals[1] += products
                size = " x ".join(map(str, x.shape[1:]))
                counts = [f"{count:,}" if count else "" for count in (parameters, products)]
                lines.append(f"{name:<8}{size:<16}{counts[0]:>12}{counts[1]:>16}".rstrip())
            x = torch.flatten(x, 1)
        lines.append(f"{'total':<24}{totals[0]:>12,}{totals[1]:>16,}")
        return "\n".join(lines)


def check_size(x: Tensor) -> None:
    """Raise ValueError unless these are images of the network's size."""
    if x.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"AlexNet expects images of shape [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got "
            f"{list(x.shape)}"
        )


def init_weights(network: nn.Module, scheme: str = "he") -> None:
    """Draw the weights of all convolutions and fully connected layers anew, and set the biases.

    Args:
        network: an AlexNet; normalization layers keep what they have.
        scheme: "he": He-normal weights (He et al. 2015), except fc8's with standard deviation
            0.001; biases 0. For input divided by its standard deviation.
            "2012": standard deviation 0.03 in conv3 to conv5, 0.01 elsewhere; biases 1 in conv2,
            conv4, conv5, fc6 and fc7, 0 elsewhere (2012 source, layers/layers-145.cfg). For
            input on the scale of 0..255. The paper (§5) prints 0.01 for all layers.

    Raises ValueError for another scheme.
    """
    if scheme not in ("he", "2012"):
        raise ValueError(f"scheme must be he or 2012, got {scheme}")
    for path, layer in network.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        name = path.rpartition(".")[2]
        if scheme == "he":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            bias = 0.0
        else:
            nn.init.normal_(layer.weight, std=0.03 if name in ("conv3", "conv4", "conv5") else 0.01)
            # A bias of 1 gives a ReLU positive input at first, so that it learns at once (§5).
            bias = 1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
        if layer.bias is not None:
            nn.init.constant_(layer.bias, bias)
    if scheme == "he":
        # The first predictions are nearly uniform, so that the loss starts at ln(num_classes).
        nn.init.normal_(network.classifier.fc8.weight, std=0.001)


class LocalResponseNorm(nn.Module):
    """Divide each activation by a power of the energy in `size` channels around it (paper §3.3).

        b[i] = a[i] / (k + alpha / size * sum_j a[j]^2) ^ beta

    where j runs over the `size` channels centered on i, cut off at the first and the last channel
    of its group: the towers of 2012 saw only their own channels (layers-145.cfg, channels=48).
    alpha is divided by `size`, as in the 2012 source (layer.py, NormLayerParser) and in
    torch.nn.LocalResponseNorm. The paper prints the formula without the division.

    Shape: float [N, C, ...] to the same. Computed in float32 at least.
    """

    def __init__(
        self,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        groups: int = 1,
    ):
        super().__init__()
        self.size, self.alpha, self.beta, self.k, self.groups = size, alpha, beta, k, groups

    def forward(self, x: Tensor) -> Tensor:
        a = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (self.groups, -1))
        before, after = self.size // 2, (self.size - 1) // 2
        squares = F.pad(a * a, (0, 0) * (x.dim() - 2) + (before, after))  # zeros beyond the group
        energy = sum(squares.narrow(2, i, a.shape[2]) for i in range(self.size))
        b = a * (self.k + self.alpha / self.size * energy) ** -self.beta
        return b.flatten(1, 2).to(x.dtype)

    def extra_repr(self) -> str:
        text = f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
        return text if self.groups == 1 else f"{text}, groups={self.groups}"


class PaperDropout(nn.Dropout):
    """Dropout as in the paper (§4.2): outputs are scaled at test time, not in training.

    torch.nn.Dropout divides what is left by 1 - p in training. The paper keeps it as it is and
    multiplies all outputs by 1 - p at test time.
    """

    def forward(self, x: Tensor) -> Tensor:
        # This undoes nn.Dropout's division in training. In eval mode nn.Dropout does nothing.
        return (1 - self.p) * super().forward(x)
