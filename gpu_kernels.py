"""Local response normalisation and max pooling for NVIDIA GPUs, in Triton.

All tensors are [N, C, H, W], channels last. A kernel works on blocks of positions with all of their
channels, reads its input from memory once and writes its output once, as the CUDA kernels of 2012
did (cuda-convnet, src/cudaconv2). torch.compile takes these operations as they are.
"""

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHANNELS = 2048  # of a position, which is not split
VALUES_AT_ONCE = 2048  # of a block: 16 for each of its 128 threads; measured

# ---------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------


@triton.jit
def _block(positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """This block's positions [HEIGHT, 1] and channels [1, WIDTH], and which of them there are."""
    position = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    return position, channel, (position < positions) & (channel < CHANNELS)


def _launch(kernel, over: Tensor, *arguments, groups: int = 1) -> None:
    """Runs the kernel over all positions of a tensor; groups of channels count as positions."""
    channels = over.shape[1] // groups
    positions = over.numel() // channels
    width = triton.next_power_of_2(channels)
    height = max(1, VALUES_AT_ONCE // width)
    blocks = triton.cdiv(positions, height)
    if blocks:
        with torch.cuda.device_of(over):  # Triton takes the current GPU, whatever the tensors' is
            kernel[(blocks,)](*arguments, positions, channels, height, width, num_warps=4)


@functools.cache
def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton can run kernels there: it needs a C compiler, and not too old a GPU.

    Warns once if not.
    """
    try:
        a = torch.ones(1, 8, 1, 1, device=device, dtype=dtype)
        _local_response_norm_gradient(a, a, 5, 1.0, 1.0, 1.0, 1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's are of many kinds
        reason = str(error).partition("\n")[0]
        warnings.warn(f"no Triton here ({reason}): LRN and pooling will be slower", stacklevel=2)
        return False
    return True


# ---------------------------------------------------------------------------------------------
# Local response normalisation
# ---------------------------------------------------------------------------------------------


@triton.jit
def _divisor(
    a_start, place, channel, there, factor, k,
    BEFORE: tl.constexpr, AFTER: tl.constexpr,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """k + factor * (sum of the squares of the window's channels)."""
    energy = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for offset in tl.static_range(-BEFORE, AFTER + 1):
        inside = there & (channel + offset >= 0) & (channel + offset < CHANNELS)
        a = tl.load(a_start + place + offset, mask=inside, other=0.0).to(tl.float32)
        energy += a * a
    return k + factor * energy


@triton.jit
def _normalise(
    a_start, out_start, factor, beta, k, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = a d^-beta with the divisor d."""
    position, channel, there = _block(positions, CHANNELS, HEIGHT, WIDTH)
    place = position * CHANNELS + channel
    a = tl.load(a_start + place, mask=there, other=0.0).to(tl.float32)
    d = _divisor(a_start, place, channel, there, factor, k, BEFORE, AFTER, CHANNELS, HEIGHT, WIDTH)
    out = a * tl.exp2(-beta * tl.log2(d))
    tl.store(out_start + place, out.to(out_start.dtype.element_ty), mask=there)


@triton.jit
def _differentiate(
    a_start, grad_start, out_start, factor, beta, k, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient at a; its formula is at _gradient() in model.py."""
    position, channel, there = _block(positions, CHANNELS, HEIGHT, WIDTH)
    place = position * CHANNELS + channel
    a = tl.load(a_start + place, mask=there, other=0.0).to(tl.float32)
    grad = tl.load(grad_start + place, mask=there, other=0.0).to(tl.float32)
    d = _divisor(a_start, place, channel, there, factor, k, BEFORE, AFTER, CHANNELS, HEIGHT, WIDTH)
    out = grad * tl.exp2(-beta * tl.log2(d))
    each = tl.where(there, out * a / d, 0.0)
    total = tl.zeros_like(each)
    for offset in tl.static_range(-AFTER, BEFORE + 1):  # the channels whose window holds this one
        other = channel + offset
        inside = (other >= 0) & (other < CHANNELS)
        index = tl.broadcast_to(tl.where(inside, other, 0), each.shape)
        total += tl.where(inside, tl.gather(each, index, 1), 0.0)
    out -= 2 * beta * factor * a * total
    tl.store(out_start + place, out.to(out_start.dtype.element_ty), mask=there)


@torch.library.custom_op("alexnet::local_response_norm", mutates_args=())
def local_response_norm(
    a: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> Tensor:
    """What model.LocalResponseNorm does, computed in float32; differentiable once."""
    out = torch.empty_like(a)
    window = size // 2, (size - 1) // 2
    _launch(_normalise, a, a, out, alpha / size, beta, k, *window, groups=groups)
    return out


@torch.library.custom_op("alexnet::local_response_norm_gradient", mutates_args=())
def _local_response_norm_gradient(
    a: Tensor, grad: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(a)
    window = size // 2, (size - 1) // 2
    _launch(_differentiate, a, a, grad, out, alpha / size, beta, k, *window, groups=groups)
    return out


@local_response_norm.register_fake
@_local_response_norm_gradient.register_fake
def _(a, *_):
    return torch.empty_like(a)


def _keep_input(ctx, inputs, output) -> None:
    a, *ctx.constants = inputs
    ctx.save_for_backward(a)


def _backward(ctx, grad: Tensor):
    (a,) = ctx.saved_tensors
    return _local_response_norm_gradient(a, grad, *ctx.constants), None, None, None, None, None


local_response_norm.register_autograd(_backward, setup_context=_keep_input)

# ---------------------------------------------------------------------------------------------
# Max pooling at stride 2
# ---------------------------------------------------------------------------------------------


@triton.jit
def _pool(
    x_start, out_start, winner_start, height, width, out_height, out_width, SIZE: tl.constexpr,
    positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The largest of SIZE x SIZE values, and which of them it is: the first, if some are equal."""
    position, channel, there = _block(positions, CHANNELS, HEIGHT, WIDTH)
    image, rest = position // (out_height * out_width), position % (out_height * out_width)
    y, x = 2 * (rest // out_width), 2 * (rest % out_width)
    corner = ((image * height + y) * width + x) * CHANNELS + channel
    largest = tl.load(x_start + corner, mask=there, other=0.0)
    winner = tl.zeros([HEIGHT, WIDTH], tl.int8)
    for i in tl.static_range(1, SIZE * SIZE):
        place = corner + (i // SIZE * width + i % SIZE) * CHANNELS
        value = tl.load(x_start + place, mask=there, other=0.0)
        wins = (value > largest) | (value != value)  # NaN wins, as in torch
        largest = tl.where(wins, value, largest)
        winner = tl.where(wins, i, winner).to(tl.int8)
    tl.store(out_start + position * CHANNELS + channel, largest, mask=there)
    tl.store(winner_start + position * CHANNELS + channel, winner, mask=there)


@triton.jit
def _unpool(
    grad_start, winner_start, out_start, height, width, out_height, out_width, SIZE: tl.constexpr,
    positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """At each value the sum of the gradients of the windows that it wins."""
    position, channel, there = _block(positions, CHANNELS, HEIGHT, WIDTH)
    image, rest = position // (height * width), position % (height * width)
    y, x = rest // width, rest % width
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for i_before in tl.static_range(0, SIZE, 2):
        for j_before in tl.static_range(0, SIZE, 2):
            # The value is in row i and column j of a window, which begins at even ones.
            i, j = y % 2 + i_before, x % 2 + j_before
            out_y, out_x = (y - i) // 2, (x - j) // 2
            inside = (i < SIZE) & (j < SIZE) & (y >= i) & (x >= j)
            inside &= (out_y < out_height) & (out_x < out_width)
            place = ((image * out_height + out_y) * out_width + out_x) * CHANNELS + channel
            winner = tl.load(winner_start + place, mask=there & inside, other=-1)
            grad = tl.load(grad_start + place, mask=there & inside, other=0.0)
            total += tl.where(winner == i * SIZE + j, grad.to(tl.float32), 0.0)
    out_place = position * CHANNELS + channel
    tl.store(out_start + out_place, total.to(out_start.dtype.element_ty), mask=there)


@torch.library.custom_op("alexnet::max_pool", mutates_args=())
def max_pool(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What torch.nn.MaxPool2d(size, stride=2) does, and for each output its place in the window.

    The place counts from 0 row by row, as int8. Differentiable once.
    """
    out, winner = _pooled(x, size)
    _launch(_pool, out, x, out, winner, *x.shape[2:], *out.shape[2:], size)
    return out, winner


@torch.library.custom_op("alexnet::max_pool_gradient", mutates_args=())
def _max_pool_gradient(grad: Tensor, winner: Tensor, height: int, width: int, size: int) -> Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = _empty(grad, height, width)
    _launch(_unpool, out, grad, winner, out, height, width, *grad.shape[2:], size)
    return out


@max_pool.register_fake
def _pooled(x, size):
    height, width = ((pixels - size) // 2 + 1 for pixels in x.shape[2:])
    return _empty(x, height, width), _empty(x, height, width, torch.int8)


@_max_pool_gradient.register_fake
def _(grad, winner, height, width, size):
    return _empty(grad, height, width)


def _empty(x: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = *x.shape[:2], height, width
    dtype = dtype or x.dtype
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _keep_winner(ctx, inputs, output) -> None:
    x, ctx.size = inputs
    ctx.shape = x.shape[2:]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pool_backward(ctx, grad: Tensor, _):
    (winner,) = ctx.saved_tensors
    return _max_pool_gradient(grad, winner, *ctx.shape, ctx.size), None


max_pool.register_autograd(_pool_backward, setup_context=_keep_winner)
