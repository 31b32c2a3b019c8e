"""The mathematics of kernel normalization: moments of a unit, from moments of a pixel.

A *unit* is every channel of one kh x kw window: n = C * kh * kw numbers. Its mean and variance
follow from one-channel maps, so no window is ever unfolded:

    m, v  = mean and variance over the channels of a pixel           (channel_moments, one pass)
    mu    = box(m)                                                   box: mean over a window
    var   = box(v) + variance of m over the window

The last variance is never taken as a difference of squares, which cancels where a window is dark
and even and its image is not: along columns and then along rows, the variance of the whole is the
mean of the parts' variances plus the variance of their means. Means are relative to a pivot, each
image's own mean, as |mean| may be far above the std of all its windows. Zero
padding belongs to the unit: out there m = v = 0. The variance is biased (divided by n).

Under dropout with probability p the statistics are those of x * keep / (1 - p). For inference
their expectation over the mask is `expected_variance`; the expected mean is the plain one.

Source: Nasirigerdeh et al., Kernel Normalized Convolutional Networks, TMLR 2024, arXiv 2205.10089.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Ints


def unit_statistics(
    deviation: Tensor,
    var: Tensor,
    pivot: Tensor,
    eps: float,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    channels: int,
    expected_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`unit_moments`, and 1 / sqrt(var + eps): three maps (N, 1, H', W').

    With `expected_p` above 0 the last is of the variance expected under dropout.
    """
    mu, var = unit_moments(deviation, var, pivot, kernel_size, stride, padding, dilation)
    drawn = var
    if expected_p > 0.0:
        n = channels * kernel_size[0] * kernel_size[1]
        drawn = expected_variance(mu + pivot, var, expected_p, n)
    return mu, var, (drawn + eps).rsqrt()


def unit_moments(
    deviation: Tensor,
    var: Tensor,
    pivot: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> tuple[Tensor, Tensor]:
    """Mean minus `pivot`, and variance, of every unit: two maps (N, 1, H', W').

    `deviation`, `var`: over the channels of each pixel, the mean minus `pivot`, and the variance
    (N, 1, H, W); `pivot` (N, 1, 1, 1); `padding`: left, right, top, bottom.
    """
    if max(padding) > 0:
        outside = F.pad(torch.zeros_like(deviation[:1]), padding, value=1.0)
        deviation, var = F.pad(deviation, padding) - pivot * outside, F.pad(var, padding)
    for dim in (2, 3):  # the variance of the parts' means, added to the mean of their variances
        here = taps(deviation, dim, kernel_size, stride, dilation)
        mu = mean_of(here)
        spread = mean_of([(tap - mu).square() for tap in here])
        deviation, var = mu, mean_of(taps(var, dim, kernel_size, stride, dilation)) + spread
    return deviation, var.clamp_min(0.0)


def box_mean(maps: Tensor, kernel_size: Ints, stride: Ints, dilation: Ints) -> Tensor:
    """Mean over each window of a one-channel map: (N, 1, H, W) -> (N, 1, H', W').

    First over rows, then over columns.
    """
    for dim in (2, 3):
        maps = mean_of(taps(maps, dim, kernel_size, stride, dilation))
    return maps


def taps(maps: Tensor, dim: int, kernel_size: Ints, stride: Ints, dilation: Ints) -> list[Tensor]:
    """What each window sees along rows (`dim` 2) or columns (3): its first pixel, its second ...

    Views of (N, 1, H, W), as many as the kernel is long. For a single channel arithmetic with them
    is many times faster than pooling on a CPU, and they know any stride and dilation.
    """
    size, step, apart = kernel_size[dim - 2], stride[dim - 2], dilation[dim - 2]
    last = maps.shape[dim] - apart * (size - 1)  # one past the first pixel of the last window
    found: list[Tensor] = []
    for i in range(0, apart * size, apart):
        found.append(
            maps[:, :, i : i + last : step] if dim == 2 else maps[:, :, :, i : i + last : step]
        )
    return found


def mean_of(maps: list[Tensor]) -> Tensor:
    total = maps[0]
    for other in maps[1:]:
        total = total + other
    return total / len(maps)


def box_mean_adjoint(
    grad: Tensor, size: Ints, kernel_size: Ints, stride: Ints, dilation: Ints
) -> Tensor:
    """What flows back through `box_mean` of maps of `size` (H, W): (N, M, H', W') -> (N, M, H, W).

    Every pixel gets from each window it belongs to.
    """
    for dim in (3, 2):
        spread = grad.new_zeros([*grad.shape[:dim], size[dim - 2], *grad.shape[dim + 1 :]])
        span = stride[dim - 2] * (grad.shape[dim] - 1) + 1
        for i in range(kernel_size[dim - 2]):
            first = i * dilation[dim - 2]
            places = slice(first, first + span, stride[dim - 2])
            (spread[:, :, places] if dim == 2 else spread[:, :, :, places]).add_(grad)
        grad = spread
    return grad.div_(kernel_size[0] * kernel_size[1])


def unit_statistics_backward(
    grad_mu: Tensor,
    grad_rstd: Tensor,
    deviation: Tensor,
    pivot: Tensor,
    mu: Tensor,
    var: Tensor,
    rstd: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    channels: int,
    expected_p: float,
) -> tuple[Tensor, Tensor]:
    """What flows back through `unit_statistics` to `deviation` and to its variance of pixels."""
    grad_var = grad_rstd * rstd.pow(3).mul_(-0.5)
    if expected_p > 0.0:
        n = channels * kernel_size[0] * kernel_size[1]
        slope = 2.0 * expected_p * (1.0 - 1.0 / n) / (1.0 - expected_p)
        grad_mu = grad_mu + slope * grad_var * (mu + pivot)
        grad_var = grad_var * ((1.0 - expected_p / n) / (1.0 - expected_p))
    grad_var = grad_var * (var > 0.0)  # a variance that was clamped is a constant
    grad_mu = grad_mu - 2.0 * mu * grad_var
    height, width = deviation.shape[2], deviation.shape[3]
    left, right, top, bottom = padding
    size = [height + top + bottom, width + left + right]
    inner = (..., slice(top, top + height), slice(left, left + width))
    both = torch.cat([grad_mu, grad_var], 1)  # (N, 2, H', W')
    both = box_mean_adjoint(both, size, kernel_size, stride, dilation)[inner]
    grad_mean, grad_square = both[:, :1], both[:, 1:]
    return grad_mean + 2.0 * deviation * grad_square, grad_square


def expected_variance(mu: Tensor, var: Tensor, p: float, n: int) -> Tensor:
    """Expectation over dropout masks of the variance of units of n numbers.

    `mu`, `var`: the units' plain mean and variance. Nothing cancels in this form.
    """
    square = mu * mu
    return (var + p * (square - (var + square) / n)).clamp_min(0.0) / (1.0 - p)
