"""The mathematics of kernel normalization: moments of a unit, from moments of a pixel.

A *unit* is every channel of one kh x kw window: n = C * kh * kw numbers. Its mean and variance
follow from one-channel maps, so no window is ever unfolded:

    m, v  = mean and variance over the channels of a pixel           (channel_moments, one pass)
    mu    = box(m)                                                   box: mean over a window
    var   = box(v) + variance of m over the window

Both follow, along columns and then along rows, from merging two runs of pixels, of which the second
has the share s of the numbers:

    mean = (1 - s) * mean1 + s * mean2
    var  = (1 - s) * var1 + s * var2 + s * (1 - s) * (mean2 - mean1)^2

That is no difference of squares, which would cancel where a window is dark and even and its image
is not. Means are relative to a pivot, each image's own mean, as |mean| may be far above the std of
all its windows. Zero padding belongs to the unit: out there m = v = 0. The variance is biased
(divided by n).

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
    for dim in (2, 3):
        size, step, apart = kernel_size[dim - 2], stride[dim - 2], dilation[dim - 2]
        deviation, var = _run_moments(deviation, var, dim, size, step, apart)
    return deviation, var.clamp_min(0.0)  # drawn sums may leave less than nothing


def _run_moments(
    mean: Tensor, var: Tensor, dim: int, size: int, step: int, apart: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of `size` pixels, `apart` from each other, from every `step`-th on.

    `mean`, `var`: of the pixels. Runs of 1, 2, 4 ... pixels are made by merging two of half their
    length, and those that `size` is the sum of are merged: at most 2 log2(size) times.
    """
    count = (mean.shape[dim] - apart * (size - 1) - 1) // step + 1
    done, length = 0, 1
    found_mean, found_var = mean, var
    while done < size:
        if length > 1:
            half = length // 2 * apart
            rest = mean.shape[dim] - half
            mean, var = _merged(
                mean.narrow(dim, 0, rest),
                var.narrow(dim, 0, rest),
                mean.narrow(dim, half, rest),
                var.narrow(dim, half, rest),
                0.5,
            )
        if size & length:
            next_mean = _each(mean, dim, done * apart, count, step)
            next_var = _each(var, dim, done * apart, count, step)
            if done > 0:
                share = length / (done + length)
                next_mean, next_var = _merged(found_mean, found_var, next_mean, next_var, share)
            found_mean, found_var = next_mean, next_var
            done += length
        length *= 2
    return found_mean, found_var


def _each(maps: Tensor, dim: int, first: int, count: int, step: int) -> Tensor:
    """`count` rows (`dim` 2) or columns (3), from `first` on, `step` apart."""
    last = first + step * (count - 1) + 1
    return maps[:, :, first:last:step] if dim == 2 else maps[:, :, :, first:last:step]


def _merged(
    mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of two sets together, `share` of whose numbers are the other's."""
    apart = other_mean - mean
    between = share * (1.0 - share)
    return (
        torch.add(mean, apart, alpha=share),
        torch.lerp(var, other_var, share).addcmul(apart, apart, value=between),
    )


def box_mean_adjoint(
    grad: Tensor, size: Ints, kernel_size: Ints, stride: Ints, dilation: Ints
) -> Tensor:
    """What flows back through the mean over each window of maps of `size` (H, W).

    (N, M, H', W') -> (N, M, H, W): every pixel gets from each window it belongs to.
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
    grad_mu = torch.addcmul(grad_mu, mu, grad_var, value=-2.0)
    height, width = deviation.shape[2], deviation.shape[3]
    left, right, top, bottom = padding
    size = [height + top + bottom, width + left + right]
    inner = (..., slice(top, top + height), slice(left, left + width))
    both = torch.cat([grad_mu, grad_var], 1)  # (N, 2, H', W')
    both = box_mean_adjoint(both, size, kernel_size, stride, dilation)[inner]
    grad_mean, grad_square = both[:, :1], both[:, 1:]
    return torch.addcmul(grad_mean, deviation, grad_square, value=2.0), grad_square


def expected_variance(mu: Tensor, var: Tensor, p: float, n: int) -> Tensor:
    """Expectation over dropout masks of the variance of units of n numbers.

    `mu`, `var`: the units' plain mean and variance. Nothing cancels in this form.
    """
    kept = 1.0 - p
    return torch.add(var * ((1.0 - p / n) / kept), mu * mu, alpha=p * (1.0 - 1.0 / n) / kept)
