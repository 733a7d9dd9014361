"""Local response normalization, max pooling and resampling for NVIDIA GPUs, in Triton.

Activations are [N, C, H, W], channels last. Their kernels work on blocks of positions with all of
their channels, so that LRN reads and writes every value once. torch.compile calls these operations
as they are. Each makes its input channels last first, even if torch.compile has said that it is:
after pixel_unshuffle that can be wrong.
"""

import functools
import math
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CHANNELS = 2048  # of a position, which is not split
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # 128 threads; a product and a sum as one
BLOCK_VALUES = {"norm": 2048, "pool": 1024}
MAX_VALUES = 2**31 - 2**16  # places are 32-bit numbers, and a block may reach beyond the last

# --- Blocks ---


@triton.jit
def _block(positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return the block's positions [HEIGHT, 1], its channels [1, WIDTH], and which are inside."""
    position = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    return position, channel, (position < positions) & (channel < CHANNELS)


def _launch(kernel, positions: int, channels: int, block_values: int, *arguments) -> None:
    """Run the kernel over so many positions, in blocks of so many values for 128 threads."""
    width = triton.next_power_of_2(channels)
    height = max(1, block_values // width)
    blocks = triton.cdiv(positions, height)
    if blocks:
        # Triton takes the current GPU, whatever the tensors' is.
        with torch.cuda.device_of(arguments[0]):
            kernel[(blocks,)](*arguments, positions, channels, height, width, **OPTIONS)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@functools.cache
def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether Triton can run kernels there: it needs a C compiler, and not too old a GPU.

    Warns once if not.
    """
    try:
        a = torch.ones(1, 8, 1, 1, device=device, dtype=dtype)
        _local_response_norm_gradient(a, a, 5, 1.0, 1.0, 1.0, 1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's are of many kinds
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"no Triton here ({reason}): LRN, pooling and resampling are slower", stacklevel=2
        )
        return False
    return True


# --- Local response normalization ---


@triton.jit
def _powers(d, BETA: tl.constexpr):
    """d^-beta and d^-1."""
    if BETA == 0.75:  # without logarithm and division, which take longer
        root = tl.rsqrt(d)
        return root * tl.sqrt(root), root * root
    return tl.exp2(-BETA * tl.log2(d)), 1 / d


@triton.jit
def _window_sum(x, channel, BEFORE: tl.constexpr, AFTER: tl.constexpr, CHANNELS: tl.constexpr):
    """At each channel the sum of x over those from BEFORE it to AFTER it."""
    total = x
    for offset in tl.static_range(-BEFORE, AFTER + 1):
        if offset != 0:
            other = channel + offset
            inside = (other >= 0) & (other < CHANNELS)
            # Threads exchange values that they have in registers; memory would be slower.
            index = tl.broadcast_to(tl.where(inside, other, 0), x.shape)
            total += tl.where(inside, tl.gather(x, index, 1), 0.0)
    return total


@triton.jit
def _normalize(
    a_start, out_start, factor, k,
    BETA: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = a d^-beta with the divisor d = k + factor * (sum of the window's squares)."""
    position, channel, valid = _block(positions, CHANNELS, HEIGHT, WIDTH)
    place = position * CHANNELS + channel
    a = tl.load(a_start + place, mask=valid, other=0.0).to(tl.float32)
    d = k + factor * _window_sum(a * a, channel, BEFORE, AFTER, CHANNELS)
    power, _ = _powers(d, BETA)
    out = a * power
    tl.store(out_start + place, out.to(out_start.dtype.element_ty), mask=valid)


@triton.jit
def _differentiate(
    a_start, grad_start, out_start, factor, k,
    BETA: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient at a; its formula is at _gradient() in cpu.py."""
    position, channel, valid = _block(positions, CHANNELS, HEIGHT, WIDTH)
    place = position * CHANNELS + channel
    a = tl.load(a_start + place, mask=valid, other=0.0).to(tl.float32)
    grad = tl.load(grad_start + place, mask=valid, other=0.0).to(tl.float32)
    d = k + factor * _window_sum(a * a, channel, BEFORE, AFTER, CHANNELS)
    power, inverse = _powers(d, BETA)
    out = grad * power
    # The window is mirrored: summed are the channels that have this one in theirs.
    out -= 2 * BETA * factor * a * _window_sum(out * a * inverse, channel, AFTER, BEFORE, CHANNELS)
    tl.store(out_start + place, out.to(out_start.dtype.element_ty), mask=valid)


@torch.library.custom_op("alexnet::local_response_norm", mutates_args=())
def local_response_norm(
    a: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> Tensor:
    """What model.LocalResponseNorm does, computed in float32; differentiable once."""
    a = _channels_last(a)
    out = torch.empty_like(a)
    _launch_over_groups(_normalize, groups, a, out, alpha / size, k, beta, *_window(size))
    return out


@torch.library.custom_op("alexnet::local_response_norm_gradient", mutates_args=())
def _local_response_norm_gradient(
    a: Tensor, grad: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> Tensor:
    a, grad = _channels_last(a), _channels_last(grad)
    out = torch.empty_like(a)
    _launch_over_groups(_differentiate, groups, a, grad, out, alpha / size, k, beta, *_window(size))
    return out


def _launch_over_groups(kernel, groups: int, a: Tensor, *arguments) -> None:
    channels = a.shape[1] // groups  # in memory another group is another position
    _launch(kernel, a.numel() // channels, channels, BLOCK_VALUES["norm"], a, *arguments)


def _window(size: int) -> tuple[int, int]:
    """How many channels before and after its own a window of an odd or even size has."""
    return size // 2, (size - 1) // 2


@local_response_norm.register_fake
@_local_response_norm_gradient.register_fake
def _(a, *_):
    return torch.empty_like(a, memory_format=torch.channels_last)


def _keep_input(ctx, inputs, output) -> None:
    a, *ctx.constants = inputs
    ctx.save_for_backward(a)


def _backward(ctx, grad: Tensor):
    (a,) = ctx.saved_tensors
    return _local_response_norm_gradient(a, grad, *ctx.constants), None, None, None, None, None


local_response_norm.register_autograd(_backward, setup_context=_keep_input)

# --- Max pooling at stride 2 ---


@triton.jit
def _pool(
    x_start, out_start, winner_start, IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr, SIZE: tl.constexpr,
    positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The largest of SIZE x SIZE values, and which of them it is: the first, if some are equal."""
    position, channel, valid = _block(positions, CHANNELS, HEIGHT, WIDTH)
    image, y, x = _coordinates(position, OUT_HEIGHT, OUT_WIDTH)
    corner = ((image * IN_HEIGHT + 2 * y) * IN_WIDTH + 2 * x) * CHANNELS + channel
    largest = tl.load(x_start + corner, mask=valid, other=0.0).to(tl.float32)
    winner = tl.zeros([HEIGHT, WIDTH], tl.int32)
    for i in tl.static_range(1, SIZE * SIZE):
        place = corner + (i // SIZE * IN_WIDTH + i % SIZE) * CHANNELS
        value = tl.load(x_start + place, mask=valid, other=0.0).to(tl.float32)
        wins = (value > largest) | (value != value)  # NaN wins, as in torch
        largest = tl.where(wins, value, largest)
        winner = tl.where(wins, i, winner)
    place = position * CHANNELS + channel
    tl.store(out_start + place, largest.to(out_start.dtype.element_ty), mask=valid)
    tl.store(winner_start + place, winner.to(tl.int8), mask=valid)


@triton.jit
def _unpool(
    grad_start, winner_start, out_start, IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr, SIZE: tl.constexpr,
    positions, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """At each value the sum of the gradients of the windows that it wins.

    A position is a square of 2x2 values, so that the place of each in its windows is known.
    """
    position, channel, valid = _block(positions, CHANNELS, HEIGHT, WIDTH)
    image, y, x = _coordinates(position, (IN_HEIGHT + 1) // 2, (IN_WIDTH + 1) // 2)
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            total = tl.zeros([HEIGHT, WIDTH], tl.float32)
            for i in tl.static_range(down, SIZE, 2):  # the value's row and column in a window
                for j in tl.static_range(right, SIZE, 2):
                    out_y, out_x = y - i // 2, x - j // 2
                    inside = (
                        (out_y >= 0) & (out_y < OUT_HEIGHT) & (out_x >= 0) & (out_x < OUT_WIDTH)
                    )
                    inside &= valid
                    place = ((image * OUT_HEIGHT + out_y) * OUT_WIDTH + out_x) * CHANNELS + channel
                    winner = tl.load(winner_start + place, mask=inside, other=-1)
                    grad = tl.load(grad_start + place, mask=inside, other=0.0).to(tl.float32)
                    total += tl.where(winner == i * SIZE + j, grad, 0.0)
            in_y, in_x = 2 * y + down, 2 * x + right
            inside = valid & (in_y < IN_HEIGHT) & (in_x < IN_WIDTH)
            place = ((image * IN_HEIGHT + in_y) * IN_WIDTH + in_x) * CHANNELS + channel
            tl.store(out_start + place, total.to(out_start.dtype.element_ty), mask=inside)


@triton.jit
def _coordinates(position, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Image, row and column of a position in images of this height and width."""
    return position // (HEIGHT * WIDTH), position // WIDTH % HEIGHT, position % WIDTH


@torch.library.custom_op("alexnet::max_pool", mutates_args=())
def max_pool(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What torch.nn.MaxPool2d(size, stride=2) does, and for each output its place in the window.

    The place counts from 0 row by row, as int8. Differentiable once.
    """
    x = _channels_last(x)
    out, winner = _empty_pooled(x, size)
    n, channels, *out_size = out.shape
    arguments = x, out, winner, *x.shape[2:], *out_size, size
    _launch(_pool, n * math.prod(out_size), channels, BLOCK_VALUES["pool"], *arguments)
    return out, winner


@torch.library.custom_op("alexnet::max_pool_gradient", mutates_args=())
def _max_pool_gradient(grad: Tensor, winner: Tensor, height: int, width: int, size: int) -> Tensor:
    grad, winner = _channels_last(grad), _channels_last(winner)
    n, channels, *out_size = grad.shape
    out = _empty(grad, height, width)
    arguments = grad, winner, out, height, width, *out_size, size
    _launch(
        _unpool,
        n * ((height + 1) // 2) * ((width + 1) // 2),
        channels,
        BLOCK_VALUES["pool"],
        *arguments,
    )
    return out


@max_pool.register_fake
def _empty_pooled(x, size):
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


# --- Resampling ---


@triton.jit
def _reflected(place, SIZE: tl.constexpr):
    """A place in pixels, reflected at the edges -1/2 and SIZE - 1/2 until it is between them."""
    distance = tl.abs(place + 0.5)
    times = tl.floor(distance / SIZE)
    rest = distance - times * SIZE
    inside = tl.where(times.to(tl.int32) % 2 == 0, rest, SIZE - rest) - 0.5
    return tl.minimum(tl.maximum(inside, 0.0), SIZE - 1.0)


@triton.jit
def _resample(
    images_start, maps_start, out_start, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, OUT_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pixels of an output image from four pixels of its input image, by their distances."""
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < OUT_SIZE * OUT_SIZE
    x = (2.0 * (pixel % OUT_SIZE) + 1.0) / OUT_SIZE - 1.0
    y = (2.0 * (pixel // OUT_SIZE) + 1.0) / OUT_SIZE - 1.0
    numbers = maps_start + image * 6
    from_x = x * tl.load(numbers) + y * tl.load(numbers + 1) + tl.load(numbers + 2)
    from_y = x * tl.load(numbers + 3) + y * tl.load(numbers + 4) + tl.load(numbers + 5)
    from_x = _reflected((from_x + 1.0) * (WIDTH / 2) - 0.5, WIDTH)
    from_y = _reflected((from_y + 1.0) * (HEIGHT / 2) - 0.5, HEIGHT)
    left, top = from_x.to(tl.int32), from_y.to(tl.int32)
    right, bottom = tl.minimum(left + 1, WIDTH - 1), tl.minimum(top + 1, HEIGHT - 1)
    to_right, down = from_x - left, from_y - top
    for channel in tl.static_range(CHANNELS):
        plane = images_start + (image * CHANNELS + channel) * (HEIGHT * WIDTH)
        upper_left = tl.load(plane + top * WIDTH + left)
        upper_right = tl.load(plane + top * WIDTH + right)
        lower_left = tl.load(plane + bottom * WIDTH + left)
        lower_right = tl.load(plane + bottom * WIDTH + right)
        upper = upper_left + to_right * (upper_right - upper_left)
        lower = lower_left + to_right * (lower_right - lower_left)
        out_plane = out_start + (image * CHANNELS + channel) * (OUT_SIZE * OUT_SIZE)
        tl.store(out_plane + pixel, upper + down * (lower - upper), mask=valid)


def resample(images: Tensor, maps: Tensor, size: int) -> Tensor:
    """What affine_grid and grid_sample make of float32 images [N, C, H, W] and maps [N, 2, 3].

    Bilinear, with reflection beyond the edges; float32 [N, C, size, size], not channels last.
    """
    images, maps = images.contiguous(), maps.contiguous()
    out = images.new_empty(*images.shape[:2], size, size)
    blocks = len(images), triton.cdiv(size * size, 1024)
    with torch.cuda.device_of(images):
        _resample[blocks](images, maps, out, *images.shape[1:], size, 1024, **OPTIONS)
    return out
