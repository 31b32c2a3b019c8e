"""The mathematics of kernel normalization, dense and differentiable, in any number of dimensions.

A *unit* is every channel of one window, zero padding included: n = C * kh * kw numbers. Its mean
and biased variance follow from one-channel maps, so no window is ever unfolded:

    m, v = mean and variance over the channels of a pixel        channel_moments
    mu   = box(m)                                                box_mean: the mean over a window
    var  = box(v + m^2) - mu^2                                   unit_statistics

The last difference is taken in float64, which one-channel maps get for nothing. From these,

    KNConv       (conv(x, W) - mu * sum(W)) / sqrt(var + eps) + b        Algorithm 1 of the paper
    KernelNorm   (x - mu) / sqrt(var + eps), window by window

Under dropout with probability p the statistics are those of x * keep / (1 - p); the numerators are
not dropped out. The expectation over masks leaves mu alone and makes E[x^2] of a unit

    (1 - p / n) / (1 - p) * E[x^2]

With one group and no dropout mu is the mean of the very window that is convolved, and
conv(x, W) - mu * sum(W) = conv(x, W - mean(W)): `zero_mean_weight`. In float32 both forms lose
digits where |mean| >> std, since products of size |mean| * |w| are summed: with |mean| = 1000 std,
2e-4 to 1e-3 of the largest output. `shift_input` convolves x minus a number of each image instead.

These are plain operations that compilers, exporters, TorchScript and transforms see through.
`kn_zoo.layers.eager` computes the same faster where operations run one by one.

Source: Nasirigerdeh et al., Kernel Normalized Convolutional Networks, TMLR 2024, arXiv 2205.10089.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    Ints = list[int] | tuple[int, ...]
else:  # TorchScript's name for both
    Ints = list[int]

# Sums over fewer channels are not nearly normal: Gaussian dropout draws a mask instead.
MIN_GAUSSIAN_CHANNELS = 16

# |mean| over std of a row from which its image is shifted before a float32 convolution.
MIN_SHIFT = 4.0


class Window(NamedTuple):
    """Geometry of the windows, a number for each spatial dimension."""

    kernel_size: Ints
    stride: Ints
    padding: Ints  # as in F.pad: two numbers a dimension, from the last: left, right, top, bottom
    dilation: Ints


class ConvSettings(NamedTuple):
    """Settings of one call of `kn_conv`."""

    window: Window
    groups: int
    dropout_p: float  # of the dropout that acts on this call's statistics
    dropout: str  # "mask" or "gaussian"
    expected_p: float  # of the dropout whose expectation the statistics are; 0 for none
    eps: float
    zero_mean_weight: bool  # every filter sums to 0, so that mu * sum(W) is left out
    shift_input: bool
    relu: bool


def kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: ConvSettings,
    moments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized convolution (N, O, *S'), and the units' mu and 1 / sqrt(var + eps).

    `x` is (N, C, *S), `weight` (O, C / groups, *kernel_size); both maps are (N, 1, *S'). `moments`
    are the `channel_moments` to use, if they are known already.
    """
    window = settings.window
    if moments is None:
        moments = channel_moments(x, settings.dropout_p, settings.dropout)
    mean, var = moments
    mu, _, rstd = unit_statistics(mean, var, window, x.shape[1], settings.expected_p, settings.eps)
    offset = mu
    if settings.shift_input:
        shift = image_shift(x)
        offset = mu - shift
        numerator = convolve_shifted(x, shift, weight, window, settings.groups)
    else:
        numerator = convolve(x, weight, window, settings.groups)
    dtype = numerator.dtype
    if not settings.zero_mean_weight:
        weight_sum = _per_channel(weight.flatten(1).sum(1), x)
        numerator = numerator - materialize(offset.to(weight_sum.dtype)) * weight_sum
    out = numerator * materialize(rstd.to(upcast(numerator).dtype))
    if bias is not None:
        out = out + _per_channel(bias, x)
    out = out.to(dtype)
    return F.relu(out) if settings.relu else out, mu, rstd


def kernel_norm(
    x: Tensor, window: Window, dropout_p: float, statistics: str, eps: float, dropout: str = "mask"
) -> Tensor:
    """Normalize every window, laid side by side: (N, C, *S) -> (N, C, *(S' * kernel_size)).

    `statistics` is "expected", "plain" or "sampled"; each window has a dropout mask of its own.
    """
    x = _windows_side_by_side(x, window)
    p, expected_p = split_dropout(dropout_p, statistics)
    mean, var = channel_moments(x, p, dropout)
    ones = [1] * len(window.kernel_size)
    disjoint = Window(window.kernel_size, window.kernel_size, [0, 0] * len(ones), ones)
    mu, _, rstd = unit_statistics(mean, var, disjoint, x.shape[1], expected_p, eps)
    dtype = upcast(x).dtype
    coarse = mu.to(dtype)  # mu in two parts of x's format, so that x - mu keeps its digits
    centered = x - _repeat_window(coarse, window)
    if mu.dtype != dtype:
        centered = centered - _repeat_window((mu - coarse).to(dtype), window)
    return (centered * _repeat_window(rstd.to(dtype), window)).to(x.dtype)


def split_dropout(dropout_p: float, statistics: str) -> tuple[float, float]:
    """Return the probability of dropout that acts, and of dropout whose expectation is taken."""
    return (
        dropout_p if statistics == "sampled" else 0.0,
        dropout_p if statistics == "expected" else 0.0,
    )


def standardized_weight(weight: Tensor, gain: Tensor) -> Tensor:
    """Return every filter minus its mean, scaled to the norm `gain` (O,): (O, C, *kernel_size)."""
    centered = zero_mean_weight(upcast(weight)).flatten(1)
    norm = centered.norm(2, dim=1).clamp_min(1e-6)  # a filter of zeros stays 0
    return (centered * (gain / norm)[:, None]).view_as(weight).to(weight.dtype)


def zero_mean_weight(weight: Tensor) -> Tensor:
    """Return every filter minus its mean over its own inputs, (O, C, *kernel_size)."""
    full = upcast(weight)
    dims = list(range(1, weight.dim()))
    return (full - full.mean(dims, keepdim=True)).to(weight.dtype)


def channel_moments(x: Tensor, p: float, dropout: str = "mask") -> tuple[Tensor, Tensor]:
    """Mean and variance over the channels of each pixel after dropout: (N, C, *S) -> (N, 1, *S).

    `dropout` is "mask" or "gaussian"; see `gaussian_moments`. In float64 where that exists, as the
    squares of large numbers do not fit float32.
    """
    if p > 0.0 and uses_gaussian(x, dropout):
        sums = power_sums(x)
        normal = torch.stack([torch.randn_like(sums[0]), torch.randn_like(sums[0])])
        return gaussian_moments(sums, normal, p, x.shape[1])
    x = upcast(x)
    if p > 0.0:
        x = F.dropout(x, p, True)
    first = x[:, :1]  # relative to one of the pixel's own numbers two sums lose no digits,
    x = x - first  # and a compiler takes both in one pass
    mean = to_float64(x.mean([1], keepdim=True))
    square = to_float64((x * x).mean([1], keepdim=True))
    return mean + first, (square - mean * mean).clamp_min(0.0)


def uses_gaussian(x: Tensor, dropout: str, least: int = MIN_GAUSSIAN_CHANNELS) -> bool:
    """Return whether sums over channels of x are drawn (TorchScript knows no global constants)."""
    return dropout == "gaussian" and x.shape[1] >= least


def power_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over channels of x, x^2, x^3 and x^4: (N, C, *S) -> four (N, 1, *S)."""
    x = upcast(x)
    square = x * x
    return (
        x.sum([1], keepdim=True),
        square.sum([1], keepdim=True),
        (square * x).sum([1], keepdim=True),
        (square * square).sum([1], keepdim=True),
    )


def gaussian_moments(
    sums: tuple[Tensor, Tensor, Tensor, Tensor], normal: Tensor, p: float, channels: int
) -> tuple[Tensor, Tensor]:
    """Moments under dropout from two normal numbers a pixel, `normal` (2, N, 1, *S), not a mask.

    Fast dropout (Wang and Manning, 2013): sums over channels of y = x * keep / (1 - p) and of y^2
    are drawn from the normal distribution that has the mask's means, variances and covariance.
    `sums` are `power_sums(x)`.

    The variance over channels is kept above a quarter of its expectation. The normal distribution
    has no lower bound, and a unit whose variance is 0 is multiplied by 1 / sqrt(eps).
    """
    q = 1.0 / (1.0 - p)
    std = sums[1].clamp_min(1e-30).sqrt()
    covariance = sums[2] / std
    # Where one channel holds all, nothing is left: without a floor the root's slope is infinite.
    residual = torch.maximum(sums[3] - covariance * covariance, 1e-4 * sums[3])
    residual_std = residual.clamp_min(1e-30).sqrt()
    mean = (sums[0] + math.sqrt(p * q) * std * normal[0]) / channels
    noise = covariance * normal[0] + residual_std * normal[1]
    square = (q * sums[1] + math.sqrt(p * q) * q * noise) / channels
    plain_mean = sums[0] / channels
    expected_square = expected_factor(channels, p) * sums[1] / channels
    least = 0.25 * (expected_square - plain_mean * plain_mean)
    return materialize(mean), materialize(torch.maximum(square - mean * mean, least))


def unit_statistics(
    mean: Tensor, var: Tensor, window: Window, channels: int, expected_p: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and 1 / sqrt(variance + eps) of every unit: three maps (N, 1, *S').

    `mean` and `var` (N, 1, *S) are over the channels of each pixel. If `expected_p` is above 0, the
    last map is of the variance expected under dropout. All in float64 where that exists.
    """
    mean, var = to_float64(mean), to_float64(var)
    padding = window.padding  # zero padding belongs to the unit
    pivot: Tensor | None = None
    if mean.dtype != torch.float64:  # squares of |mean| >> std need either digits or a pivot
        pivot = mean.flatten(1).mean(1).view([-1] + [1] * (mean.dim() - 1))
        mean, var = F.pad(mean, padding) - pivot, F.pad(var, padding)
    maps = torch.cat([mean, torch.addcmul(var, mean, mean)], 1)
    if pivot is None and max(padding) > 0:
        maps = F.pad(maps, padding)
    boxes = box_mean(maps, window)  # (N, 2, *S')
    mu, square = boxes[:, :1], boxes[:, 1:]
    var = torch.addcmul(square, mu, mu, value=-1.0)
    var = var.clamp_min(0.0)  # after rounding
    if pivot is not None:
        mu = mu + pivot
    spread = var
    if expected_p > 0.0:
        factor = expected_factor(unit_size(channels, window), expected_p)
        spread = torch.addcmul(factor * var, mu, mu, value=factor - 1.0)
    return mu, var, (spread + eps).rsqrt()


def unit_size(channels: int, window: Window) -> int:
    """Return n, how many numbers a unit has."""
    n = channels
    for size in window.kernel_size:
        n *= size
    return n


def expected_factor(n: int, p: float) -> float:
    """Return the factor of E[x^2] of n numbers in their variance expected under dropout."""
    return (1.0 - p / n) / (1.0 - p)


def box_mean(maps: Tensor, window: Window) -> Tensor:
    """Mean over each window of maps that are padded already: (N, M, *S) -> (N, M, *S')."""
    for i in range(len(window.kernel_size)):
        size, stride, delta = window.kernel_size[i], window.stride[i], window.dilation[i]
        lines = maps.transpose(i + 2, -1)
        last = lines.shape[-1] - delta * (size - 1)  # windows begin before this pixel
        total = lines[..., 0:last:stride]
        if size > 1:  # sums of slices: a mean over `unfold`, and its gradient, take longer
            total = total + lines[..., delta : last + delta : stride]
            for j in range(2, size):
                total += lines[..., j * delta : last + j * delta : stride]
            total /= size
        maps = total.transpose(i + 2, -1)
    return maps


def convolve(x: Tensor, weight: Tensor, window: Window, groups: int) -> Tensor:
    """Convolution without bias: (N, C, *S) -> (N, O, *S')."""
    x, padding = symmetric_padding(x, window.padding)
    stride, dilation = window.stride, window.dilation
    if x.dim() == 3:
        return F.conv1d(x, weight, None, stride, padding, dilation, groups)
    if x.dim() == 4:
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return F.conv3d(x, weight, None, stride, padding, dilation, groups)


def convolve_shifted(
    x: Tensor, shift: Tensor, weight: Tensor, window: Window, groups: int
) -> Tensor:
    """`convolve` of padded x minus `shift`, a number for each image, (N, 1, ...)."""
    unpadded = Window(window.kernel_size, window.stride, [0] * len(window.padding), window.dilation)
    return convolve(F.pad(x, window.padding) - shift, weight, unpadded, groups)


def image_shift(x: Tensor, least: float = MIN_SHIFT) -> Tensor:
    """Return what to take off each image before a float32 convolution, (N, 1, ...).

    It is the mean of the middle row, which is known before a pass over all of x, where that is
    above `least` of the row's std, else 0: in an image of high contrast, a dark even window would
    lose digits.
    """
    row = x.narrow(2, x.shape[2] // 2, 1)
    first = row[:, :1]  # relative to it, the shift of a constant image leaves exact zeros
    for i in range(3, x.dim()):
        first = first.narrow(i, 0, 1)
    dims = list(range(1, x.dim()))
    row = row - first
    mean, square = row.mean(dims, keepdim=True), (row * row).mean(dims, keepdim=True)
    var = torch.addcmul(square, mean, mean, value=-1.0)
    mean = mean + first
    return torch.where(mean * mean > least * least * var, mean, torch.zeros_like(mean))


def symmetric_padding(x: Tensor, padding: Ints) -> tuple[Tensor, Ints]:
    """Return x, padded if need be, and the padding of each dimension left to the convolution."""
    dims = len(padding) // 2
    for i in range(dims):
        if padding[2 * i] != padding[2 * i + 1]:
            return F.pad(x, padding), [0] * dims
    return x, [padding[2 * (dims - 1 - i)] for i in range(dims)]


def to_float64(maps: Tensor) -> Tensor:
    """Return one-channel maps in float64, or as they are where float64 does not exist."""
    return maps.double() if has_float64(maps) else maps


def has_float64(x: Tensor) -> bool:
    return x.device.type != "mps"


def upcast(x: Tensor) -> Tensor:
    """Return x in float32 or wider."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def materialize(maps: Tensor) -> Tensor:
    """Return the same maps; compiled, they are computed once and not again for each channel."""
    if torch.jit.is_scripting():
        return maps
    else:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return maps.as_strided(maps.shape, maps.stride())  # Inductor computes what it views
        return maps


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """(O,) -> (1, O, 1, ...), of as many dimensions as x."""
    return vector.view([1, -1] + [1] * (x.dim() - 2))


def _windows_side_by_side(x: Tensor, window: Window) -> Tensor:
    """Copy windows so that none overlaps: (N, C, *S) -> (N, C, *(S' * kernel_size))."""
    if max(window.padding) > 0:
        x = F.pad(x, window.padding)
    for i in range(len(window.kernel_size)):
        size, stride = window.kernel_size[i], window.stride[i]
        if size > 1 or stride > 1:
            x = x.unfold(i + 2, size, stride).movedim(-1, i + 3).flatten(i + 2, i + 3)
    return x


def _repeat_window(maps: Tensor, window: Window) -> Tensor:
    """Repeat each window's number for its pixels: (N, 1, *S') -> (N, 1, *(S' * kernel_size))."""
    for i in range(len(window.kernel_size)):
        if window.kernel_size[i] > 1:
            maps = maps.repeat_interleave(window.kernel_size[i], i + 2)
    return maps
