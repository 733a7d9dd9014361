"""AlexNet, the network of "ImageNet Classification with Deep Convolutional Neural Networks".

Krizhevsky, Sutskever and Hinton, NIPS 2012, called "the paper" here. The 2012 program is
github.com/computerhistory/AlexNet-Source-Code, called "the 2012 source" here.

    from model import AlexNet
    logits = AlexNet()(torch.randn(8, 3, 227, 227))  # [8, 10]
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 227  # the paper prints 224, but 55 positions of an 11x11 filter at stride 4 need 227


# ---------------------------------------------------------------------------------------------
# Local response normalisation
# ---------------------------------------------------------------------------------------------


class LocalResponseNorm(nn.Module):
    """Divides each activation by a power of the energy in `size` channels around it (paper §3.3).

        b[i] = a[i] / (k + alpha / size * sum_j a[j]^2) ^ beta

    where j runs over the `size` channels centred on i, cut off at the first and last channel.
    alpha is divided by `size`, as the 2012 source does (layer.py, NormLayerParser) and as
    torch.nn.LocalResponseNorm does; the paper prints the formula without it.

    Shape: [N, C, ...] to the same. The same values as torch.nn.LocalResponseNorm, several times
    faster on a CPU, with nothing but the input kept for the backward pass. In bf16 the bracket is
    rounded to bf16 too: the result is within 2^-6 of the exact one, but a bracket that exceeds k by
    less than 0.4 % is k.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0):
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, a: Tensor) -> Tensor:
        # A compiler differentiates and fuses the plain formula itself.
        apply = _normalise if torch.compiler.is_compiling() else _LocalResponseNorm.apply
        with _without_autocast(a.device.type):
            return apply(a, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class _LocalResponseNorm(torch.autograd.Function):
    """The formula with its closed-form gradient, worked through a few images at a time on a CPU.

    A few images' intermediate results stay in the processor's cache; a whole batch's do not.
    """

    @staticmethod
    def forward(ctx, a, size, alpha, beta, k):
        ctx.save_for_backward(a)
        ctx.constants = size, alpha, beta, k
        out = torch.empty_like(a)
        images = _images_at_once(a)
        for a_part, out_part in zip(a.split(images), out.split(images), strict=True):
            out_part.copy_(_normalise(a_part, *ctx.constants))
        return out

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            return _normalise_gradient(grad, a, *ctx.constants), None, None, None, None
        out = torch.empty_like(a)
        images = _images_at_once(a)
        parts = zip(grad.split(images), a.split(images), out.split(images), strict=True)
        with _without_autocast(a.device.type):
            for grad_part, a_part, out_part in parts:
                out_part.copy_(_normalise_gradient(grad_part, a_part, *ctx.constants))
        return out, None, None, None, None


def _without_autocast(device_type: str):
    """Autocast would compute sums in bf16 and powers in fp32; here both follow the input."""
    if device_type == "meta":  # which has no autocast to switch off
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _images_at_once(a: Tensor) -> int:
    """How many of a's images to work on at a time: about 1 MiB of them on a CPU, else all."""
    if a.device.type != "cpu" or a.numel() == 0:
        return max(1, len(a))
    bytes_per_image = a[0].numel() * a.element_size()
    return max(1, 2**20 // bytes_per_image)


def _normalise(a: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    energy = _sum_of_neighbours(a * a, _neighbours(a, size))
    return a * _power(energy * (alpha / size) + k, -beta)


def _normalise_gradient(grad, a, size, alpha, beta, k):
    """dL/da[i] = g[i] d[i]^-beta - 2 alpha beta / size * a[i] * sum_j g[j] a[j] d[j]^(-1 - beta).

    g is the gradient at the output, d = k + alpha / size * energy.
    """
    neighbours = _neighbours(a, size)
    d = _sum_of_neighbours(a * a, neighbours) * (alpha / size) + k
    scaled_grad = grad * _power(d, -beta)
    # Transposed: here j runs over the channels whose window holds i.
    total = _sum_of_neighbours(scaled_grad * a / d, neighbours.T)
    return scaled_grad - (2 * alpha * beta / size) * a * total


def _neighbours(a: Tensor, size: int) -> Tensor:
    """[C, C] matrix with a one where channel j (row) lies in the window of channel i (column)."""
    channel = torch.arange(a.shape[1], device=a.device)
    offset = channel[:, None] - channel[None, :]
    return ((offset >= -(size // 2)) & (offset <= (size - 1) // 2)).to(a.dtype)


def _sum_of_neighbours(x: Tensor, neighbours: Tensor) -> Tensor:
    return (x.movedim(1, -1) @ neighbours).movedim(-1, 1)


def _power(d: Tensor, exponent: float) -> Tensor:
    if exponent == -0.75:  # several times faster than pow
        root = d.rsqrt()
        return root * root.sqrt()
    return d**exponent


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------


class AlexNet(nn.Module):
    """Five convolutions and three fully connected layers (paper §3.5, Fig. 2).

    Args:
        num_classes: number of outputs of the last layer.
        groups: 1 connects every channel with every channel. 2 splits conv2, conv4 and conv5 into
            the two towers that ran on two GPUs in 2012.
        dropout: probability that an output of fc6 or fc7 is set to zero in training (§4.2).

    Shape: float [N, 3, 227, 227] to logits [N, num_classes].

    Weights start He-normal (those of fc8 smaller, so that the first predictions are even) and
    biases at zero. That trains on standardised input; it is not the paper's initialisation.

    Raises:
        ValueError: num_classes, groups or dropout is out of range, or (forward) the input's shape
            is another.
    """

    def __init__(self, num_classes: int = 10, groups: int = 1, dropout: float = 0.5):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if groups not in (1, 2):
            raise ValueError(f"groups must be 1 or 2, got {groups}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.config = {"num_classes": num_classes, "groups": groups, "dropout": dropout}

        #                                                                    output for one image
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)  # 96 x 55 x 55
        self.norm1 = LocalResponseNorm()
        self.pool1 = nn.MaxPool2d(3, stride=2)  # 96 x 27 x 27
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=groups)  # 256 x 27 x 27
        self.norm2 = LocalResponseNorm()
        self.pool2 = nn.MaxPool2d(3, stride=2)  # 256 x 13 x 13
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)  # 384 x 13 x 13
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=groups)  # 384 x 13 x 13
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=groups)  # 256 x 13 x 13
        self.pool5 = nn.MaxPool2d(3, stride=2)  # 256 x 6 x 6
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.drop6 = nn.Dropout(dropout)
        self.fc7 = nn.Linear(4096, 4096)
        self.drop7 = nn.Dropout(dropout)
        self.fc8 = nn.Linear(4096, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew: He-normal for ReLU layers (He et al. 2015), zero biases."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        # Nearly equal first probabilities: the loss starts at ln(num_classes), not above it.
        nn.init.normal_(self.fc8.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"AlexNet expects images of shape [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], "
                f"got {list(x.shape)}"
            )
        x = self.pool1(self.norm1(F.relu(self.conv1(x))))
        x = self.pool2(self.norm2(F.relu(self.conv2(x))))
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = self.pool5(F.relu(self.conv5(x)))
        x = torch.flatten(x, 1)
        x = self.drop6(F.relu(self.fc6(x)))
        x = self.drop7(F.relu(self.fc7(x)))
        return self.fc8(x)
