"""Mean and variance over the channels of each pixel, with dropout: the layer's one pass over x.

Two forms of the same numbers. `dense_moments` is plain differentiable operations: compilers fuse
it, transforms and exporters see through it. `channel_moments` is an operator that keeps only x,
the means and a seed for the backward pass, which draws the mask again from its seed.

On a CPU random numbers cost more than arithmetic, so the operator draws one number per *dropped*
element, the geometrically distributed gap to the next, and subtracts those from the full sums:
p * N * C * H * W draws and no mask at all.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Squared mean over variance from which float32 sums of squares lose over 3e-5 of the variance.
ILL_CONDITIONED = 256.0
# With fewer channels a pixel may lose nearly all its energy, and differences of sums their digits.
SPARSE_MASK_CHANNELS = 16


def dense_moments(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) -> mean and variance (N, 1, H, W) of dropout(x, p), in float32 at least."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        x = x.float()
    if p > 0.0:
        x = F.dropout(x, p, True)
    first = x[:, :1]  # relative to one of the pixel's own numbers, two sums lose no digits,
    x = x - first  # and a compiler takes both in one pass
    mean = x.mean([1], keepdim=True)
    square = (x * x).mean([1], keepdim=True)
    return mean + first, (square - mean * mean).clamp_min(0.0)


def pixel_moments(x: Tensor, p: float, eager: bool) -> tuple[Tensor, Tensor]:
    """`dense_moments` in the form that suits where it runs."""
    if torch.jit.is_scripting():
        return dense_moments(x, p)
    else:
        if p > 0.0 and (eager or x.device.type == "cpu"):  # compiled random numbers are slow there
            return channel_moments(x, p, torch.randint(2**62, (), device="cpu"))
        if eager:
            return channel_moments(x, 0.0, torch.zeros((), dtype=torch.int64, device="cpu"))
        return dense_moments(x, p)


def runs_eagerly() -> bool:
    """Whether operations run now, one by one: not compiled, exported, traced or transformed."""
    if torch.jit.is_scripting():
        return False
    else:
        return not (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
        )


def computed_once(maps: Tensor) -> Tensor:
    """The same; compiled, a buffer of its own instead of an expression anew for each channel."""
    if torch.jit.is_scripting():
        return maps
    else:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return maps.as_strided(maps.shape, maps.stride())  # Inductor computes what it views
        return maps


@torch.library.custom_op(
    "kn_zoo::channel_moments",
    mutates_args=(),
    schema="(Tensor x, float p, Tensor seed) -> (Tensor, Tensor)",
)
def channel_moments(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """As `dense_moments`, with the mask drawn from `seed`, an integer tensor on the CPU."""
    x = _dense(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)
    if p == 0.0:
        return _moments(x)
    if not _visits_dropped_only(x):
        return _moments(x * _keep(x, p, seed))
    flat, position, pixel = _dropped(x, p, seed)
    value = flat[position]
    first, second = _channel_sums(x)
    dropped = torch.zeros(2, first.numel(), dtype=x.dtype)
    dropped[0].index_add_(0, pixel, value)
    dropped[1].index_add_(0, pixel, value * value)
    first = (first - dropped[0].view_as(first)) / (1.0 - p)
    second = (second - dropped[1].view_as(second)) / (1.0 - p) ** 2
    mean = first / x.shape[1]
    return mean, (second / x.shape[1] - mean * mean).clamp_min_(0.0)


@torch.library.custom_op(
    "kn_zoo::channel_moments_backward",
    mutates_args=(),
    schema="(Tensor constant, Tensor slope, Tensor x, float p, Tensor seed) -> Tensor",
)
def channel_moments_backward(
    constant: Tensor, slope: Tensor, x: Tensor, p: float, seed: Tensor
) -> Tensor:
    """keep / (1 - p) * (constant + slope * keep / (1 - p) * x), with the mask of the forward pass.

    `constant`, `slope`: one-channel maps (N, 1, H, W); the result has the shape and type of x.
    """
    x = _dense(x)
    if not _visits_dropped_only(x):
        keep = _keep(x, p, seed)
        return (keep * (constant + slope * keep * x)).to(x.dtype)
    constant, slope = constant / (1.0 - p), slope / (1.0 - p) ** 2
    grad = torch.mul(x, slope, out=torch.empty_like(x)).add_(constant)
    flat, position, _ = _dropped(grad, p, seed)
    flat[position] = 0.0
    return grad


@channel_moments.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    maps = x.new_empty((x.shape[0], 1, x.shape[2], x.shape[3]), dtype=dtype)
    return maps, torch.empty_like(maps)


@channel_moments_backward.register_fake
def _(constant: Tensor, slope: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.p, seed = inputs
    ctx.save_for_backward(x, output[0], seed)


def _backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None, None]:
    x, mean, seed = ctx.saved_tensors
    slope = 2.0 / x.shape[1] * grad_var
    constant = grad_mean / x.shape[1] - slope * mean
    if ctx.p > 0.0:
        return channel_moments_backward(constant, slope, x, ctx.p, seed), None, None
    constant, slope = layout_of(x, constant), layout_of(x, slope)
    return (slope * x).add(constant).to(x.dtype), None, None


channel_moments.register_autograd(_backward, setup_context=_setup_context)


def layout_of(x: Tensor, maps: Tensor) -> Tensor:
    """One-channel maps with strides that let x * maps keep the memory format of x."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return maps.to(memory_format=torch.channels_last)
    return maps


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.device.type != "cpu":  # one fused pass there, and no wait for a look at the numbers
        return torch.var_mean(x, 1, correction=0, keepdim=True)[::-1]
    first, second = _channel_sums(x)
    mean = first / x.shape[1]
    var = (second / x.shape[1] - mean * mean).clamp_min_(0.0)
    if x.dtype == torch.float32 and bool((mean * mean > ILL_CONDITIONED * var).any()):
        # Pixel by pixel, so that an image's result does not depend on its neighbours in the batch.
        exact = (x - mean).square_().mean(1, keepdim=True)  # many times faster than torch.var
        var = torch.where(mean * mean > ILL_CONDITIONED * var, exact, var)
    return mean, var


def _channel_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares over channels, (N, C, H, W) -> two (N, 1, H, W)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.sum(1, keepdim=True), norm * norm


def _dense(x: Tensor) -> Tensor:
    """x laid out as channels_last or contiguous, so that it can be walked in memory order."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _visits_dropped_only(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[1] >= SPARSE_MASK_CHANNELS


def _keep(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout's factors for x: 1 / (1 - p) with probability 1 - p, else 0."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    dtype = torch.promote_types(x.dtype, torch.float32)
    keep = torch.empty_like(x, dtype=dtype).bernoulli_(1.0 - p, generator=generator)
    return keep.div_(1.0 - p)


def _dropped(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x in memory order (a view where it can be), the dropped positions in it, and their pixels."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    position = _bernoulli_positions(x.numel(), p, int(seed))
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1), position, position // channels
    pixel = position // (channels * area) * area + position % area
    return x.reshape(-1), position, pixel


def _bernoulli_positions(count: int, p: float, seed: int) -> Tensor:
    """Sorted positions of the successes among `count` independent trials of probability p."""
    generator = torch.Generator().manual_seed(seed)
    draws = int(count * p + 6.0 * math.sqrt(count * p) + 16.0)
    found, last = [], -1
    while last < count:
        gap = torch.rand(draws, generator=generator).neg_().log1p_().div_(math.log1p(-p))
        found.append(gap.to(torch.int64).add_(1).cumsum_(0).add_(last))
        last = int(found[-1][-1])
    position = torch.cat(found) if len(found) > 1 else found[0]
    return position[: int(torch.searchsorted(position, count))]
