"""Mean and variance over the channels of each pixel, with dropout: the layer's one pass over x.

Three forms of the same numbers:

`dense_moments`     plain differentiable operations: compilers fuse them, transforms and exporters
                    see through them
`masked_moments`    run one by one, on a CPU a few images at a time, with a gradient that is added
                    in place; `channel_moments` is the operator made of the two
`power_sums` and    the same by drawing the sums that a mask leaves instead of the mask,
`drawn_moments`     dense or one by one

A mask is drawn from a seed, and for the backward pass again. On a CPU random numbers cost more than
arithmetic, so one number is drawn per *dropped* element, the geometrically distributed gap to the
next, and those are subtracted from the full sums: p * N * C * H * W draws and no mask at all.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Squared mean over variance from which float32 sums of squares lose over 3e-5 of the variance.
ILL_CONDITIONED = 256.0
# With fewer channels a pixel may lose nearly all its energy: differences of sums lose their digits,
# and sums over what a mask leaves are not nearly normal.
FEW_CHANNELS = 16
# Numbers that are worked on at a time on a CPU: two megabytes, what a core's own cache holds.
PART = 2**19


def dense_moments(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) -> mean and variance (N, 1, H, W) of dropout(x, p), in float32 at least."""
    x = wide(x)
    if p > 0.0:
        x = F.dropout(x, p, True)
    first = x[:, :1]  # relative to one of the pixel's own numbers, two sums lose no digits,
    x = x - first  # and a compiler takes both in one pass
    mean = x.mean([1], keepdim=True)
    square = (x * x).mean([1], keepdim=True)
    return mean + first, (square - mean * mean).clamp_min(0.0)


def pixel_moments(x: Tensor, p: float, dropout: str) -> tuple[Tensor, Tensor]:
    """Differentiable mean and variance over the channels of each pixel, after dropout.

    `dropout`: "mask" drops elements, "gaussian" draws what is left, see `drawn_moments`; of few
    channels, whose sums are far from normal, it always drops elements.
    """
    if p > 0.0 and draws_sums(x, dropout):
        sums = dense_power_sums(x)
        return drawn_moments(sums, standard_normals(sums[0]), p, x.shape[1])
    if torch.jit.is_scripting():
        return dense_moments(x, p)
    else:
        if runs_eagerly() or (p > 0.0 and x.device.type == "cpu"):  # compiled, randoms are slow
            if p > 0.0:
                return channel_moments(x, p, torch.randint(2**62, (), device="cpu"))
            # what is deterministic leaves the random generator as it is
            return channel_moments(x, 0.0, torch.zeros((), dtype=torch.int64, device="cpu"))
        return dense_moments(x, p)


def draws_sums(x: Tensor, dropout: str, few: int = FEW_CHANNELS) -> bool:
    """TorchScript knows no constants of a module, hence the last argument."""
    return dropout == "gaussian" and x.shape[1] >= few


def drawn_moments(
    sums: tuple[Tensor, Tensor, Tensor, Tensor], normal: Tensor, p: float, channels: int
) -> tuple[Tensor, Tensor]:
    """Moments under dropout from two random numbers a pixel, (2, N, 1, H, W), instead of a mask.

    They depend only on the sums over channels of x * m and (x * m)^2, m = keep / (1 - p). Those are
    drawn from the normal distribution that has the mask's means, variances and covariance: exact in
    the first two moments, and as near to the mask beyond as a sum over channels is to normal. A
    pixel's variance may turn out negative; that of a unit is clamped. `sums`: of x, x^2, x^3, x^4.
    """
    q = 1.0 / (1.0 - p)
    scale = sums[1].clamp_min(1e-30).sqrt()
    slant = sums[2] / scale
    # Where one channel holds all, nothing is left: without a floor the root's slope is infinite.
    rest = torch.maximum(sums[3] - slant * slant, 1e-4 * sums[3]).clamp_min(1e-30).sqrt()
    noise = slant * normal[0] + rest * normal[1]
    mean = (sums[0] + math.sqrt(p * q) * scale * normal[0]) / channels
    square = (q * sums[1] + math.sqrt(p * q) * q * noise) / channels
    return computed_once(mean), computed_once(square - mean * mean)


def dense_power_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over channels of x, x^2, x^3 and x^4: (N, C, H, W) -> four (N, 1, H, W)."""
    x = wide(x)
    square = x * x
    return (
        x.sum([1], keepdim=True),
        square.sum([1], keepdim=True),
        (square * x).sum([1], keepdim=True),
        (square * square).sum([1], keepdim=True),
    )


def standard_normals(maps: Tensor) -> Tensor:
    """Two standard normal numbers for each of `maps`, stacked."""
    if torch.jit.is_scripting():
        return torch.stack([torch.randn_like(maps), torch.randn_like(maps)])
    else:
        if torch.compiler.is_compiling() and maps.device.type == "cpu":
            # what Inductor makes of randn takes thirteen times as long there
            return seeded_normals(maps.detach(), torch.randint(2**62, (), device="cpu"))
        return torch.stack([torch.randn_like(maps), torch.randn_like(maps)])


@torch.library.custom_op(
    "kn_zoo::seeded_normals", mutates_args=(), schema="(Tensor maps, Tensor seed) -> Tensor"
)
def seeded_normals(maps: Tensor, seed: Tensor) -> Tensor:
    """`standard_normals` drawn from `seed`, an integer tensor on the CPU."""
    generator = torch.Generator(maps.device).manual_seed(int(seed))
    return maps.new_empty((2, *maps.shape)).normal_(generator=generator)


@seeded_normals.register_fake
def _(maps: Tensor, seed: Tensor) -> Tensor:
    return maps.new_empty((2, *maps.shape))


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


def wide(x: Tensor) -> Tensor:
    """x in float32, or wider."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


@torch.library.custom_op(
    "kn_zoo::channel_moments",
    mutates_args=(),
    schema="(Tensor x, float p, Tensor seed) -> (Tensor, Tensor)",
)
def channel_moments(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """As `dense_moments`, with the mask drawn from `seed`, an integer tensor on the CPU."""
    return masked_moments(x, p, int(seed))


@torch.library.custom_op(
    "kn_zoo::channel_moments_backward",
    mutates_args=(),
    schema="(Tensor grad_mean, Tensor grad_var, Tensor mean, Tensor x, float p, Tensor seed)"
    " -> Tensor",
)
def channel_moments_backward(
    grad_mean: Tensor, grad_var: Tensor, mean: Tensor, x: Tensor, p: float, seed: Tensor
) -> Tensor:
    """The gradient for x, in its shape and type."""
    grad = torch.zeros_like(x)
    add_moments_gradient_(grad, x, grad_mean, grad_var, mean, p, int(seed))
    return grad


@channel_moments.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    maps = x.new_empty((x.shape[0], 1, x.shape[2], x.shape[3]), dtype=dtype)
    return maps, torch.empty_like(maps)


@channel_moments_backward.register_fake
def _(grad_mean, grad_var, mean, x, p, seed) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.p, seed = inputs
    ctx.save_for_backward(x, output[0], seed)


def _backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None, None]:
    x, mean, seed = ctx.saved_tensors
    return channel_moments_backward(grad_mean, grad_var, mean, x, ctx.p, seed), None, None


channel_moments.register_autograd(_backward, setup_context=_setup_context)


def masked_moments(x: Tensor, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """As `dense_moments`, not differentiable, with the mask that belongs to `seed`."""
    x = walkable(x)
    if p > 0.0 and not _draws_gaps(x):
        x, p = wide(x) * factors(x, p, seed), 0.0
    if x.device.type != "cpu":  # one fused pass there, and no wait for a look at the numbers
        return torch.var_mean(wide(x), 1, correction=0, keepdim=True)[::-1]
    found = []
    for (here,), dropped in zip(in_parts(x), _dropped_in_parts(x, p, seed), strict=True):
        here = wide(here)
        found.append(_moments(here) if dropped is None else _moments_without(here, dropped, p))
    if len(found) == 1:
        return found[0]
    mean, var = zip(*found, strict=True)
    return torch.cat(mean), torch.cat(var)


def add_moments_gradient_(
    grad: Tensor, x: Tensor, grad_mean: Tensor, grad_var: Tensor, mean: Tensor, p: float, seed: int
) -> None:
    """Add what flows back through `masked_moments` to `grad`, of shape, type and strides of x."""
    factor = 1.0 / (1.0 - p)  # of what is kept
    slope = grad_var * (2.0 / x.shape[1])
    constant = torch.addcmul(grad_mean, grad_var, mean, value=-2.0) / x.shape[1]
    if p > 0.0 and not _draws_gaps(x):
        drawn = factors(x, p, seed)
        grad += drawn * (constant + slope * drawn * x)
        return
    constant, slope = layout_of(x, constant * factor), layout_of(x, slope * factor**2)
    parts = in_parts(x, grad, slope, constant)
    for tensors, dropped in zip(parts, _dropped_in_parts(x, p, seed), strict=True):
        given, target, steep, flat = tensors
        here = wide(target)
        if dropped is not None:
            before = _flat(here).index_select(0, dropped)
        here.addcmul_(wide(given), steep).add_(flat)
        if dropped is not None:
            _flat(here).scatter_(0, dropped, before)
        if here is not target:
            target.copy_(here)


def power_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `dense_power_sums`, not differentiable, a few images at a time."""
    sums = torch.cat([torch.cat(dense_power_sums(part), 1) for (part,) in in_parts(x)])
    return sums[:, :1], sums[:, 1:2], sums[:, 2:3], sums[:, 3:]


def add_power_sums_gradient_(grad: Tensor, x: Tensor, grad_sums: tuple[Tensor, ...]) -> None:
    """Add what flows back through `power_sums`: a polynomial of x with one-channel coefficients."""
    coefficients = [layout_of(x, power * g) for power, g in enumerate(grad_sums, 1)]
    for target, here, c1, c2, c3, c4 in in_parts(grad, x, *coefficients):
        here = wide(here)
        polynomial = (here * c4).add_(c3).mul_(here).add_(c2).mul_(here).add_(c1)
        target.add_(polynomial.to(target.dtype))


def in_parts(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All tensors a few images at a time: on a CPU so few that those of x stay in its cache."""
    step = _images_a_part(x)
    if step >= len(x):
        return iter([(x, *others)])
    return zip(*(tensor.split(step) for tensor in (x, *others)), strict=True)


def _images_a_part(x: Tensor) -> int:
    if x.device.type != "cpu" or x.numel() == 0:
        return max(1, len(x))
    return max(1, PART * len(x) // x.numel())


def walkable(x: Tensor) -> Tensor:
    """x laid out as channels_last or contiguous, so that it can be walked in memory order."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def layout_of(x: Tensor, maps: Tensor) -> Tensor:
    """One-channel maps with strides that let x * maps keep the memory format of x."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return maps.to(memory_format=torch.channels_last)
    return maps


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _channel_sums(x)
    mean = first / x.shape[1]
    square = mean * mean
    var = (second / x.shape[1] - square).clamp_min_(0.0)
    if x.dtype == torch.float32 and bool((ill := square > ILL_CONDITIONED * var).any()):
        # Pixel by pixel, so that an image's result does not depend on its neighbours in the batch.
        exact = (x - mean).square_().mean(1, keepdim=True)  # many times faster than torch.var
        var = torch.where(ill, exact, var)
    return mean, var


def _moments_without(x: Tensor, dropped: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Moments of x * keep / (1 - p), the dropped elements given by their places in memory."""
    first, second = _channel_sums(x)
    value, pixel = _flat(x).index_select(0, dropped), _pixel(x, dropped)
    lost = x.new_zeros(2, first.numel())
    lost[0].scatter_add_(0, pixel, value)
    lost[1].scatter_add_(0, pixel, value * value)
    mean = (first - lost[0].view_as(first)) / ((1.0 - p) * x.shape[1])
    square = (second - lost[1].view_as(second)) / ((1.0 - p) ** 2 * x.shape[1])
    return mean, (square - mean * mean).clamp_min_(0.0)


def _channel_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares over channels, (N, C, H, W) -> two (N, 1, H, W)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.sum(1, keepdim=True), norm * norm


def _draws_gaps(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[1] >= FEW_CHANNELS


def factors(x: Tensor, p: float, seed: int) -> Tensor:
    """Dropout's factors for x: 1 / (1 - p) with probability 1 - p, else 0."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if _draws_gaps(x):
        found = torch.full_like(x, 1.0 / (1.0 - p), dtype=dtype)
        _flat(found)[_bernoulli_positions(x.numel(), p, seed)] = 0.0
        return found
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty_like(x, dtype=dtype).bernoulli_(1.0 - p, generator=generator)
    return keep.div_(1.0 - p)


def _dropped_in_parts(x: Tensor, p: float, seed: int) -> list[Tensor | None]:
    """For each of `in_parts` the places in memory, within the part, of what is dropped."""
    step = _images_a_part(x)
    count = max(1, -(-len(x) // step))
    if p == 0.0:
        return [None] * count
    place = _bernoulli_positions(x.numel(), p, seed)
    if count == 1:
        return [place]
    size = step * x[:1].numel()
    first = torch.searchsorted(place, torch.arange(1, count) * size)
    return [part - i * size for i, part in enumerate(place.tensor_split(first))]


def _flat(x: Tensor) -> Tensor:
    """A view of x in memory order."""
    if x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.view(-1)


def _pixel(x: Tensor, place: Tensor) -> Tensor:
    """The pixels, counted over images, rows and columns, of places in the memory of x."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    if x.is_contiguous(memory_format=torch.channels_last):
        shift = channels.bit_length() - 1  # eight times as fast as dividing
        return place >> shift if channels == 1 << shift else place // channels
    return place // (channels * area) * area + place % area


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
