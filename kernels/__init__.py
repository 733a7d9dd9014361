"""The arithmetic of model.py and transforms.py, several times faster. Nothing needs this folder.

    network = kernels.accelerate(AlexNet())

Without it everything runs on torch's own layers, with the same results within rounding. The
scripts call accelerate() through utils.to_device().
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import cpu
from model import LocalResponseNorm

try:
    from kernels import nvidia
except ModuleNotFoundError as error:
    if error.name != "triton":  # torch brings it where it can drive an NVIDIA GPU
        raise
    nvidia = None


def accelerate(network: nn.Module) -> nn.Module:
    """Give LRN, the pools and conv1 of a network faster forward passes, and return it.

    Layers, parameters, hooks and state_dict stay what they are. torch.func's vmap and jvp need the
    plain network. On an NVIDIA GPU, in channels last and not in float64, so does whatever
    differentiates twice.
    """
    for layer in network.modules():
        if type(layer) is LocalResponseNorm:
            layer.__class__ = FastLocalResponseNorm
        elif type(layer) is nn.MaxPool2d and _is_plain_pool(layer):
            layer.__class__ = FastMaxPool2d
        elif type(layer) is nn.Conv2d and _is_conv1(layer):
            layer.__class__ = FastConv1
    return network


class _Fast:
    """Gives a layer the name of the one it stands for, so that print(network) stays the same."""

    def _get_name(self) -> str:
        return type(self).__bases__[-1].__name__


class FastLocalResponseNorm(_Fast, LocalResponseNorm):
    """LocalResponseNorm in Triton on an NVIDIA GPU, in cache-sized parts on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        channels, rest = divmod(x.shape[1], self.groups)
        if _has_kernel(x) and not rest and 0 < channels <= nvidia.MAX_CHANNELS:
            return nvidia.local_response_norm(
                x, self.size, self.alpha, self.beta, self.k, self.groups
            )
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)  # a compiler differentiates and fuses the formula itself
        return cpu.local_response_norm(x, self.size, self.alpha, self.beta, self.k, self.groups)


class FastMaxPool2d(_Fast, nn.MaxPool2d):
    """Max pooling at stride 2, in Triton on an NVIDIA GPU."""

    def forward(self, x: Tensor) -> Tensor:
        is_small = _has_kernel(x) and x.shape[1] <= nvidia.MAX_CHANNELS
        if is_small and min(x.shape[2:]) >= self.kernel_size:
            return nvidia.max_pool(x, self.kernel_size)[0]
        return super().forward(x)


class FastConv1(_Fast, nn.Conv2d):
    """conv1 on a GPU as a 3x3 convolution at stride 1 over squares of 4x4 pixels, 48 values each.

    The sums are the same. A GPU multiplies by 48 channels several times faster than by three.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda or x.shape[-2] % 4 != 3 or x.shape[-1] % 4 != 3:
            return super().forward(x)
        # 228 = 4 * 57 and 12 = 4 * 3: a row and a column of zeros add nothing.
        squares, filters = (
            F.pixel_unshuffle(F.pad(values, (0, 1, 0, 1)), 4).contiguous(
                memory_format=torch.channels_last
            )
            for values in (x, self.weight)
        )
        return F.conv2d(squares, filters, self.bias)


def can_resample(images: Tensor) -> bool:
    """Return whether resample() can take these images."""
    return _runs_triton(images)


def resample(images: Tensor, maps: Tensor, size: int) -> Tensor:
    """Resample float32 images [N, C, H, W] through maps [N, 2, 3] to [N, C, size, size].

    The values of affine_grid and grid_sample: bilinear, with reflection beyond the edges.
    """
    return nvidia.resample(images, maps, size)


def _is_plain_pool(layer: nn.MaxPool2d) -> bool:
    settings = layer.stride, layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices
    return settings == (2, 0, 1, False, False) and layer.kernel_size in (2, 3)


def _is_conv1(layer: nn.Conv2d) -> bool:
    settings = layer.in_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return settings == (3, (11, 11), (4, 4), (0, 0), (1, 1)) and layer.groups == 1


def _has_kernel(x: Tensor) -> bool:
    """Return whether the kernels of LRN and pooling can take these activations."""
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not _is_exported()
        and _runs_triton(x)
        and x.numel() <= nvidia.MAX_VALUES
    )


def _runs_triton(x: Tensor) -> bool:
    if nvidia is None or not x.is_cuda or torch.version.hip is not None:
        return False
    if not x.is_floating_point() or x.dtype == torch.float64:
        return False
    # On a GPU torch.compile needs what the kernels need.
    return torch.compiler.is_dynamo_compiling() or nvidia.can_run(x.device, x.dtype)


def _is_exported() -> bool:
    """Return whether torch.export (strict=False) is tracing: its programs go without kernels."""
    # torch 2.11 says that it is exporting whenever Dynamo compiles.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
