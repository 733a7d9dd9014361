"""AlexNet, the network of "ImageNet Classification with Deep Convolutional Neural Networks".

Krizhevsky, Sutskever and Hinton, NIPS 2012, called "the paper" here. The 2012 program is
github.com/computerhistory/AlexNet-Source-Code, called "the 2012 source" here.

    from model import AlexNet
    logits = AlexNet()(torch.randn(8, 3, 227, 227))  # [8, 10]
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import gpu_kernels
except ImportError:  # torch brings Triton where it can drive an NVIDIA GPU
    gpu_kernels = None

# 55 positions of an 11x11 filter at stride 4. The paper and the 2012 source have 224, of which the
# source makes 55 by rounding up (layer.py, modulesX); PyTorch rounds down.
IMAGE_SIZE = 227
UNITS = 4096  # in fc6 and in fc7
PIXEL_DEVIATION = 64  # roughly, of CIFAR-10's values from 0 to 255: what standardising divides by
INITS = ("he", "2012", "as-printed")
# The settings of AlexNet that have a fixed set of values.
CHOICES = {
    "groups": (1, 2),
    "activation": ("relu", "tanh"),
    "norm": ("lrn", "lrn-as-printed", "lrn-at-work", "none"),
    "pooling": ("overlapping", "non-overlapping"),
    "dropout_scaling": ("test", "training"),
}


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------


class AlexNet(nn.Module):
    """Five convolutions and three fully connected layers (paper §3.5, Fig. 2).

    Args:
        num_classes: number of outputs of the last layer.
        groups: 1 connects every channel with every channel. 2 splits conv2, conv4 and conv5 into
            the two towers that ran on two GPUs in 2012 (§3.2), and LRN keeps to each of them.
        dropout: probability that an output of fc6 or fc7 is set to zero in training (§4.2).
        activation: "relu", or "tanh" for the saturating units it is compared with (§3.1).
        norm: after conv1 and conv2 (§3.3): "lrn" divides alpha by the window, as the 2012 source
            does; "lrn-as-printed" takes alpha undivided, as in the paper's formula;
            "lrn-at-work" multiplies alpha by 64^2, which does to standardised input what "lrn"
            does to input from 0 to 255, 64 times as large, and its activations; or "none".
        pooling: "overlapping" is 3x3 at stride 2; "non-overlapping" is 2x2 at stride 2 (§3.4),
            which gives feature maps of the same sizes, 27, 13 and 6.
        dropout_scaling: "training" divides what dropout leaves by 1 - dropout, as torch does;
            "test" leaves it and multiplies all outputs by 1 - dropout at test time (§4.2).

    Shape: float [N, 3, 227, 227] to logits [N, num_classes]. On an NVIDIA GPU, in channels last and
    not in float64, it can be differentiated once only, and not by torch.func.

    Attributes:
        config: all of these settings; AlexNet(**config) is the same network with new weights.

    Weights start as reset_parameters() draws them.

    Raises:
        ValueError: a setting is out of range, or (forward) the input's shape is another.
    """

    def __init__(
        self,
        num_classes: int = 10,
        groups: int = 1,
        dropout: float = 0.5,
        activation: str = "relu",
        norm: str = "lrn",
        pooling: str = "overlapping",
        dropout_scaling: str = "training",
    ):
        super().__init__()
        switches = {
            "groups": groups,
            "activation": activation,
            "norm": norm,
            "pooling": pooling,
            "dropout_scaling": dropout_scaling,
        }
        for name, value in switches.items():
            if value not in CHOICES[name]:
                allowed = " or ".join(map(str, CHOICES[name]))
                raise ValueError(f"{name} must be {allowed}, got {value}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.config = {"num_classes": num_classes, "dropout": dropout, **switches}

        self.activation = nn.ReLU() if activation == "relu" else nn.Tanh()
        window = 3 if pooling == "overlapping" else 2
        drop = nn.Dropout if dropout_scaling == "training" else _DropoutScaledInTest
        #                                                                    output for one image
        self.conv1 = _Conv1(3, 96, 11, stride=4)  # 96 x 55 x 55
        self.norm1 = _norm(norm, groups)
        self.pool1 = _MaxPool2d(window)  # 96 x 27 x 27
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=groups)  # 256 x 27 x 27
        self.norm2 = _norm(norm, groups)
        self.pool2 = _MaxPool2d(window)  # 256 x 13 x 13
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)  # 384 x 13 x 13; sees both towers (§3.2)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=groups)  # 384 x 13 x 13
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=groups)  # 256 x 13 x 13
        self.pool5 = _MaxPool2d(window)  # 256 x 6 x 6
        self.fc6 = nn.Linear(256 * 6 * 6, UNITS)
        self.drop6 = drop(dropout)
        self.fc7 = nn.Linear(UNITS, UNITS)
        self.drop7 = drop(dropout)
        self.fc8 = nn.Linear(UNITS, num_classes)
        self.reset_parameters()

    @classmethod
    def from_seed(cls, seed: int, init: str = "he", **settings) -> "AlexNet":
        """The network with the initial weights that this seed draws, the same at every call.

        init is that of reset_parameters(), settings are those of AlexNet(). Seeds torch's own
        generator, so that what is drawn next is the same too. Raises ValueError as they do.
        """
        torch.manual_seed(seed)
        network = cls(**settings)
        if init != "he":  # those are drawn already; drawn again they would be others
            network.reset_parameters(init)
        return network

    def reset_parameters(self, init: str = "he") -> None:
        """Draws all weights anew from normal distributions of mean 0, and sets the biases.

        Args:
            init: "he": He-normal for ReLU layers (He et al. 2015) except fc8, whose standard
                deviation is 0.001, biases 0; trains on standardised input.
                "2012": standard deviation 0.03 in conv3 to conv5 and 0.01 elsewhere (2012 source,
                layers/layers-145.cfg and layers-166.cfg), biases 1 in conv2, conv4, conv5, fc6 and
                fc7 and 0 elsewhere; trains on centred input.
                "as-printed": standard deviation 0.01 everywhere, the same biases (paper §5).

        Raises:
            ValueError: init is none of these.
        """
        if init not in INITS:
            raise ValueError(f"init must be {' or '.join(INITS)}, got {init}")
        for name, layer in self.named_children():
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            if init == "he":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
            else:
                wide = init == "2012" and name in ("conv3", "conv4", "conv5")
                nn.init.normal_(layer.weight, std=0.03 if wide else 0.01)
                # 1 gives a ReLU positive input at first, so that it learns from the start (§5).
                one = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
                nn.init.constant_(layer.bias, 1.0 if one else 0.0)
        if init == "he":
            # Nearly equal first probabilities: the loss starts at ln(num_classes), not above it.
            nn.init.normal_(self.fc8.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float [N, num_classes], of images, float [N, 3, 227, 227].

        Raises ValueError for images of another shape.
        """
        return self.fc8(self.drop7(self.features(x)))

    def features(self, x: Tensor) -> Tensor:
        """The 4096 activations of fc7, which are fc8's input before dropout.

        Images are alike to the network if these are near each other (paper §6.1, Fig. 4 right).
        In training mode fc6's dropout is on: call eval() first.

        Shape: float [N, 3, 227, 227] to [N, 4096]. Raises ValueError for images of another shape.
        """
        if x.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"AlexNet expects images of shape [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], "
                f"got {list(x.shape)}"
            )
        x = self.pool1(self.norm1(self.activation(self.conv1(x))))
        x = self.pool2(self.norm2(self.activation(self.conv2(x))))
        x = self.activation(self.conv3(x))
        x = self.activation(self.conv4(x))
        x = self.pool5(self.activation(self.conv5(x)))
        x = torch.flatten(x, 1)
        x = self.drop6(self.activation(self.fc6(x)))
        return self.activation(self.fc7(x))

    def summary(self) -> str:
        """A table to print: each layer's output for one image, parameters and multiply-adds."""
        with torch.device("meta"):  # sizes without the work
            network, image = AlexNet(**self.config), torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        names = {layer: name for name, layer in network.named_children()}
        rows = []

        def note(layer: nn.Module, _, output: Tensor) -> None:
            parameters = sum(parameter.numel() for parameter in layer.parameters())
            # A filter's or a row's weights are used once at each place of the output.
            multiply_adds = math.prod(output.shape[2:]) * layer.weight.numel() if parameters else 0
            size = " x ".join(map(str, output.shape[1:]))
            rows.append((names[layer], size, parameters, multiply_adds))

        for layer in names:
            if not isinstance(layer, nn.Dropout) and layer is not network.activation:
                layer.register_forward_hook(note)
        network(image)
        rows.append(("total", "", *(sum(row[i] for row in rows) for i in (2, 3))))
        lines = [f"{'layer':<8}{'output':<16}{'parameters':>12}{'multiply-adds':>16}"]
        for name, size, *counts in rows:
            weights, products = (f"{count:,}" if count else "" for count in counts)
            lines.append(f"{name:<8}{size:<16}{weights:>12}{products:>16}".rstrip())
        return "\n".join(lines)


class _Conv1(nn.Conv2d):
    """The first convolution, 11x11 at stride 4 over three channels."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 227, 227] to [N, 96, 55, 55]."""
        if x.is_cuda and x.shape[-2] % 4 == x.shape[-1] % 4 == 3:  # as 227 is
            return _convolve_squares(x, self.weight, self.bias)
        return super().forward(x)


def _convolve_squares(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv1 as a 3x3 convolution at stride 1 over squares of 4x4 pixels, of 48 values each.

    The sums are the same. A GPU multiplies by 48 channels several times faster than by three.
    """
    # 228 = 4 * 57 and 12 = 4 * 3: a row and a column of zeros add nothing.
    squares, filters = (F.pixel_unshuffle(F.pad(values, (0, 1, 0, 1)), 4) for values in (x, weight))
    squares = squares.contiguous(memory_format=torch.channels_last)
    return F.conv2d(squares, filters.contiguous(memory_format=torch.channels_last), bias)


class _MaxPool2d(nn.MaxPool2d):
    """Max pooling at stride 2."""

    def __init__(self, size: int):
        super().__init__(size, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, H', W']."""
        if _has_kernels(x, groups=1) and min(x.shape[2:]) >= self.kernel_size:
            return gpu_kernels.max_pool(x, self.kernel_size)[0]
        return super().forward(x)


def _norm(name: str, groups: int) -> nn.Module:
    if name == "none":
        return nn.Identity()
    size, alpha = 5, 1e-4
    if name == "lrn-as-printed":
        alpha *= size  # LocalResponseNorm divides alpha by its window; this undoes it
    elif name == "lrn-at-work":
        alpha *= PIXEL_DEVIATION**2
    return LocalResponseNorm(size, alpha, groups=groups)


class _DropoutScaledInTest(nn.Dropout):
    """Dropout as in the paper (§4.2): what is left in training stays as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Some values set to zero in training; all values times 1 - p in eval mode."""
        # In training this undoes nn.Dropout's division by 1 - p; in eval mode that does nothing.
        return (1 - self.p) * super().forward(x)


# ---------------------------------------------------------------------------------------------
# Local response normalisation
# ---------------------------------------------------------------------------------------------

VALUES_AT_ONCE = 2**20  # 4 MiB in float32: a handful of such arrays fit a CPU's caches


class LocalResponseNorm(nn.Module):
    """Divides each activation by a power of the energy in `size` channels around it (paper §3.3).

        b[i] = a[i] / (k + alpha / size * sum_j a[j]^2) ^ beta

    where j runs over the `size` channels centred on i, cut off at the first and last channel, and
    with groups=2 at the border of the two halves: the towers of 2012 saw only their own channels
    (layers/layers-145.cfg, channels=48).
    alpha is divided by `size`, as the 2012 source does (layer.py, NormLayerParser) and as
    torch.nn.LocalResponseNorm does; the paper prints the formula without it.

    Shape: floating point [N, C, ...] to the same, channels last if the input is, else contiguous.
    The values of torch.nn.LocalResponseNorm, several times faster, with nothing but the input kept
    for the backward pass. On an NVIDIA GPU [N, C, H, W] that is channels last and not in float64 is
    for gpu_kernels.py, where a second derivative and torch.func.grad are errors. Computed in
    float32, or float64 for float64; an input or output in bf16 or fp16 is rounded once, as it is
    read or written.

    Raises:
        TypeError: the input is not of a floating point type.
        ValueError: the input has fewer than two dimensions or a number of channels that groups
            does not divide, or size or groups is below 1.
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
        if size < 1:
            raise ValueError(f"size must be at least 1 channel, got {size}")
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.size, self.alpha, self.beta, self.k, self.groups = size, alpha, beta, k, groups

    def forward(self, a: Tensor) -> Tensor:
        """Normalises activations [N, C, ...] over C; the output has their shape and type."""
        if not a.is_floating_point():
            raise TypeError(f"LocalResponseNorm expects floating point numbers, got {a.dtype}")
        if a.dim() < 2:
            raise ValueError(f"LocalResponseNorm expects shape [N, C, ...], got {list(a.shape)}")
        if a.shape[1] % self.groups:
            raise ValueError(f"{a.shape[1]} channels cannot be split into {self.groups} groups")
        constants = self.size, self.alpha, self.beta, self.k, self.groups
        if _has_kernels(a, self.groups):
            return gpu_kernels.local_response_norm(a, *constants)
        if not (a.is_contiguous() or a.movedim(1, -1).is_contiguous()):
            a = a.contiguous()  # the other two are cut into parts without a copy
        # A compiler differentiates and fuses the plain formula itself.
        apply = _normalise if torch.compiler.is_compiling() else _LocalResponseNorm.apply
        return apply(a, *constants)

    def extra_repr(self) -> str:
        text = f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
        return text if self.groups == 1 else f"{text}, groups={self.groups}"


class _LocalResponseNorm(torch.autograd.Function):
    """The formula with its closed-form gradient, worked through some MiB at a time.

    A part's intermediate results stay in the processor's cache; a whole batch's do not, and a pass
    over memory takes longer than the arithmetic.
    """

    @staticmethod
    def forward(a, size, alpha, beta, k, groups):
        out = torch.empty_like(a)
        for a_part, out_part in _parts(groups, a, out):
            x = a_part.to(_at_least_float32(a))
            torch.mul(x, _power(_divisor(x, size, alpha, k), beta), out=out_part)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, *ctx.constants, ctx.groups = inputs
        ctx.save_for_backward(a)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
            out = _normalise(a, *ctx.constants, ctx.groups)
            out = torch.autograd.grad(out, a, grad, create_graph=True)[0]
        else:
            out = torch.empty_like(a)
            for a_part, grad_part, out_part in _parts(ctx.groups, a, grad, out):
                out_part.copy_(_gradient(grad_part, a_part, *ctx.constants))
        return out, None, None, None, None, None


def _normalise(a: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    """The formula in plain operations, for a compiler and for second derivatives."""
    if groups > 1:
        towers = a.chunk(groups, dim=1)
        return torch.cat([_normalise(tower, size, alpha, beta, k, 1) for tower in towers], dim=1)
    x = a.to(_at_least_float32(a))
    before, after = size // 2, (size - 1) // 2
    squares = F.pad(x * x, (0, 0) * (x.dim() - 2) + (before, after))
    energy = sum(squares.narrow(1, i, x.shape[1]) for i in range(size))
    return (x * _power(energy * (alpha / size) + k, beta)).to(a.dtype)


def _gradient(grad, a, size, alpha, beta, k):
    """dL/da[i] = g[i] d[i]^-beta - 2 alpha beta / size * a[i] * sum_j g[j] a[j] d[j]^(-1 - beta).

    g is the gradient at the output, d the divisor, and j runs over i and the channels whose window
    holds i.
    """
    x = a.to(_at_least_float32(a))
    d = _divisor(x, size, alpha, k)
    out = _power(d, beta).mul_(grad.to(x.dtype))  # g d^-beta
    term = torch.div(out * x, d, out=d)  # g a d^(-1 - beta), in the memory of d
    factor = -2 * alpha * beta / size
    out.addcmul_(x, term, value=factor)
    for neighbour, centre in _neighbours(x.shape[1], size):
        out[:, neighbour].addcmul_(x[:, neighbour], term[:, centre], value=factor)
    return out


def _divisor(x: Tensor, size: int, alpha: float, k: float) -> Tensor:
    """d[i] = k + alpha / size * sum_j x[j]^2."""
    factor = alpha / size
    d = torch.addcmul(x.new_full((), k), x, x, value=factor)
    for neighbour, centre in _neighbours(x.shape[1], size):
        d[:, centre].addcmul_(x[:, neighbour], x[:, neighbour], value=factor)
    return d


def _neighbours(channels: int, size: int) -> Iterator[tuple[slice, slice]]:
    """For each place in the window but its centre, two slices: neighbour[i] is there for centre[i].

    For the place one above, in 96 channels: slice(1, 96), slice(0, 95).
    """
    for offset in range(-(size // 2), (size - 1) // 2 + 1):
        if 0 < abs(offset) < channels:
            neighbour = slice(max(0, offset), channels + min(0, offset))
            centre = slice(max(0, -offset), channels - max(0, offset))
            yield neighbour, centre


def _power(d: Tensor, beta: float) -> Tensor:
    """d^-beta."""
    if beta == 0.75:  # several times faster than pow
        root = d.rsqrt()
        return root * root.sqrt()
    return d**-beta


def kernels_for(x: Tensor):
    """The module gpu_kernels if it can work with values of this type where they are, else None."""
    if gpu_kernels is None or not _is_on_nvidia_gpu(x):
        return None
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    # torch.compile's usual backend needs on a GPU what the kernels need.
    if torch.compiler.is_dynamo_compiling() or gpu_kernels.can_run(x.device, x.dtype):
        return gpu_kernels
    return None


def _has_kernels(x: Tensor, groups: int) -> bool:
    """Whether gpu_kernels.py can take these activations: on an NVIDIA GPU, channels last."""
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not _is_exported()
        and kernels_for(x) is not None
        and 0 < x.shape[1] // groups <= gpu_kernels.MOST_CHANNELS
        and x.numel() <= gpu_kernels.MOST_VALUES
    )


def _is_on_nvidia_gpu(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


def _is_exported() -> bool:
    """Whether torch.export (strict=False) is tracing; its programs do without gpu_kernels.py."""
    # torch 2.11 says that it is exporting whenever Dynamo compiles.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def _at_least_float32(a: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, torch.float32)


def _parts(groups: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts tensors of one shape [N, C, ...] into matching parts [n, C / groups, m].

    Parts of tensors that have the first one's memory format are views of them.
    """
    first = tensors[0]
    pixels = math.prod(first.shape[2:])
    n, channels = first.shape[0] * groups, first.shape[1] // groups
    if first.is_contiguous():
        blocks = [t.reshape(n, channels, pixels) for t in tensors]
    else:  # channels last
        blocks = [t.movedim(1, -1).reshape(n * pixels, channels, 1) for t in tensors]
    at_once = len(blocks[0])
    if first.device.type == "cpu" and first.numel():
        at_once = max(1, VALUES_AT_ONCE // blocks[0][0].numel())
    return zip(*(block.split(max(1, at_once)) for block in blocks), strict=True)
