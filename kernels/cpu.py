"""Local response normalization for CPUs: a closed-form gradient, worked through in parts.

The intermediate results of a part stay in the processor's cache. Those of a whole batch do not, and
a pass over memory takes longer than the arithmetic.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from model import LocalResponseNorm

PART_VALUES = 2**20  # 4 MiB in float32: a handful of such arrays fit a CPU's caches


def local_response_norm(
    a: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> Tensor:
    """Normalize activations [N, C, ...] as model.LocalResponseNorm does."""
    if not (a.is_contiguous() or a.movedim(1, -1).is_contiguous()):
        a = a.contiguous()  # the other two are cut into parts without a copy
    return _LocalResponseNorm.apply(a, size, alpha, beta, k, groups)


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(a, size, alpha, beta, k, groups):
        out = torch.empty_like(a)
        for a_part, out_part in _parts(groups, a, out):
            x = a_part.to(_at_least_float32(a))
            torch.mul(x, _power(_divisor(x, size, alpha, k), beta), out=out_part)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, *ctx.constants = inputs
        ctx.save_for_backward(a)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        *constants, groups = ctx.constants
        if torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
            plain = LocalResponseNorm(*constants, groups=groups)
            out = torch.autograd.grad(plain(a), a, grad, create_graph=True)[0]
        else:
            out = torch.empty_like(a)
            for a_part, grad_part, out_part in _parts(groups, a, grad, out):
                out_part.copy_(_gradient(grad_part, a_part, *constants))
        return out, None, None, None, None, None


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
    for neighbor, center in _neighbors(x.shape[1], size):
        out[:, neighbor].addcmul_(x[:, neighbor], term[:, center], value=factor)
    return out


def _divisor(x: Tensor, size: int, alpha: float, k: float) -> Tensor:
    """d[i] = k + alpha / size * sum_j x[j]^2."""
    factor = alpha / size
    d = torch.addcmul(x.new_full((), k), x, x, value=factor)
    for neighbor, center in _neighbors(x.shape[1], size):
        d[:, center].addcmul_(x[:, neighbor], x[:, neighbor], value=factor)
    return d


def _neighbors(channels: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield two slices for each offset in the window but 0: neighbor[i] is there for center[i].

    For an offset of 1 in 96 channels: slice(1, 96), slice(0, 95).
    """
    for offset in range(-(size // 2), (size - 1) // 2 + 1):
        if 0 < abs(offset) < channels:
            neighbor = slice(max(0, offset), channels + min(0, offset))
            center = slice(max(0, -offset), channels - max(0, offset))
            yield neighbor, center


def _power(d: Tensor, beta: float) -> Tensor:
    """d^-beta."""
    if beta == 0.75:  # several times faster than pow
        root = d.rsqrt()
        return root * root.sqrt()
    return d**-beta


def _at_least_float32(a: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, torch.float32)


def _parts(groups: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape [N, C, ...] into matching parts [n, C / groups, m].

    Parts of tensors that have the first one's memory format are views of them.
    """
    first = tensors[0]
    pixels = math.prod(first.shape[2:])
    n, channels = first.shape[0] * groups, first.shape[1] // groups
    if first.is_contiguous():
        blocks = [t.reshape(n, channels, pixels) for t in tensors]
    else:  # channels last
        blocks = [t.movedim(1, -1).reshape(n * pixels, channels, 1) for t in tensors]
    part = max(1, PART_VALUES // max(1, blocks[0][:1].numel()))
    return zip(*(block.split(part) for block in blocks), strict=True)
