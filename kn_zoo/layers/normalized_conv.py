"""(conv(x, W) - mu * gain) / sqrt(var + eps) + b, with the moments of every window: two forms.

`dense_normalized_conv` is plain differentiable operations, for compilers, transforms and exporters.
`normalized_conv` is one autograd operation, for when operations run one by one. Then every pass
over a tensor counts, and every tensor kept: forward keeps x, a few maps of one channel and, unless
a ReLU is part of it, the convolution's result; backward adds the statistics' gradient to the
convolution's in place. On a CPU the passes go through a few images at a time, which stay in its
cache from one pass to the next.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import moments
from .checks import Ints
from .moments import (
    ILL_CONDITIONED,
    computed_once,
    in_parts,
    layout_of,
    pixel_moments,
    runs_eagerly,
    walkable,
    wide,
)
from .statistics import unit_statistics, unit_statistics_backward


class Settings(NamedTuple):
    """What both forms are told besides their tensors."""

    stride: Ints
    padding: Ints  # left, right, top, bottom
    dilation: Ints
    groups: int
    p: float  # of the dropout that acts now
    dropout: str
    expected_p: float  # of the dropout whose expectation is taken
    eps: float
    careful: bool  # about images whose |mean| is far above their std
    centred: bool  # the filters are, so that mu * gain is 0
    relu: bool  # follows, as part of the operation


def dense_normalized_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings
) -> Tensor:
    """(conv(x, weight) - mu * gain) / sqrt(var + eps) + bias: (N, C, H, W) -> (N, O, H', W')."""
    shift: Tensor | None = None
    if settings.careful:
        shift = _middle_row(x)
        x = x - shift  # x, its mean and mu are relative to it from here on
    mean, var = pixel_moments(x, settings.p, settings.dropout)
    pivot = shift
    if pivot is None:
        pivot = mean.mean([2, 3], keepdim=True)
        mean = mean - pivot
    mu, _, rstd = unit_statistics(
        mean,
        var,
        pivot,
        settings.eps,
        [weight.shape[2], weight.shape[3]],
        settings.stride,
        settings.padding,
        settings.dilation,
        x.shape[1],
        settings.expected_p,
    )
    image, pads = _padded(x, settings.padding)
    stride, dilation = settings.stride, settings.dilation
    numerator = F.conv2d(image, weight, None, stride, pads, dilation, settings.groups)
    if shift is not None and max(settings.padding) > 0:  # padding should have been -shift
        outside = F.pad(torch.zeros_like(x[:1, :1]), settings.padding, value=1.0)
        summed = weight.sum(1, keepdim=True)  # (O, 1, kh, kw)
        numerator = numerator - shift * F.conv2d(outside, summed, None, stride, 0, dilation)
    dtype = numerator.dtype
    if not settings.centred:
        offset = mu if shift is not None else mu + pivot
        numerator = numerator - computed_once(offset) * _per_channel(_gain(weight))
    out = numerator * computed_once(rstd)
    if bias is not None:
        out = out + _per_channel(bias)
    return F.relu(out.to(dtype)) if settings.relu else out.to(dtype)


def runs_one_by_one(x: Tensor) -> bool:
    """Whether x holds numbers to work on now, one operation after the other."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type != "meta" and runs_eagerly()


def normalized_conv(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """As `dense_normalized_conv`, as one operation."""
    given = [t for t in (x, weight, bias) if t is not None]
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return _NormalizedConv.apply(x, weight, bias, settings, keeps)


def _padded(x: Tensor, padding: Ints) -> tuple[Tensor, Ints]:
    """x, and the padding (height, width) left to the convolution, which pads symmetrically."""
    if padding[0] != padding[1] or padding[2] != padding[3]:
        return F.pad(x, padding), [0, 0]
    return x, [padding[2], padding[0]]


def _middle_row(x: Tensor) -> Tensor:
    """What to take off every image before a float32 convolution: the mean of its middle row.

    A compiler writes x - shift instead of x at no cost: this is known before its pass over x.
    """
    return x[:, :, x.shape[2] // 2].mean([1, 2]).view(-1, 1, 1, 1)


class _NormalizedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, settings, keeps):
        ctx.settings, ctx.shift, ctx.dtype = settings, None, _autocast_dtype(x)
        ctx.seed = int(torch.randint(2**62, (), device="cpu")) if settings.p > 0.0 else 0
        x = walkable(x)
        sums = _pixel_sums(ctx, x)
        maps = _, pivot, mu, var, rstd = _statistics(ctx, sums, x, weight)
        if settings.careful:
            ctx.shift = _shift_if_needed(pivot, mu, var)
        image, filters, arguments = _convolved(ctx, x, weight)
        stride, pads, dilation, _, _, groups = arguments
        numerator = F.conv2d(image, filters, None, stride, pads, dilation, groups)
        offset = gain = None
        if not settings.centred:
            offset = mu + (pivot if ctx.shift is None else pivot - ctx.shift)
            gain = _gain(weight)
        # A result after ReLU tells the numerator wherever a gradient flows, and the next layer
        # keeps it anyway. Else the numerator is kept, as the result may be written over.
        out = torch.empty_like(numerator) if keeps and not settings.relu else numerator
        _scale(numerator, rstd, offset, gain, bias, out, settings.relu)
        if keeps:
            sums = sums if len(sums) == 4 else ()
            ctx.save_for_backward(x, weight, bias, gain, numerator, *maps, *sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, gain, numerator, *maps = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            return *_differentiable_gradients(ctx, grad, x, weight, bias), None, None
        _, pivot, mu, _, rstd, *_ = maps
        scaled, grad_mu, grad_rstd, totals = _scale_backward(
            grad, numerator, gain, bias, mu + pivot, rstd, ctx.settings.relu
        )
        image, filters, arguments = _convolved(ctx, x, weight)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            scaled, image, filters, None, *arguments, [need_x, need_weight, False]
        )
        if need_x:
            grad_x = _like_input(ctx, grad_x, x)
            _add_statistics_gradient_(ctx, grad_x, grad_mu, grad_rstd, x, weight, *maps)
        if need_weight:
            grad_weight = grad_weight.to(weight.dtype)
            if gain is not None:
                grad_weight += totals[1].to(weight.dtype).view(-1, 1, 1, 1)
        grad_bias = totals[0].to(bias.dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _pixel_sums(ctx, x: Tensor) -> tuple[Tensor, ...]:
    """Maps (N, 1, H, W) that the units' statistics are made from: moments, or sums of powers."""
    if ctx.settings.p > 0.0 and moments.draws_sums(x, ctx.settings.dropout):
        return moments.power_sums(x)
    return moments.masked_moments(x, ctx.settings.p, ctx.seed)


def _statistics(ctx, sums, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Of pixels the mean, the pivot, and of units mean - pivot, plain variance and 1 / std."""
    mean, var = sums if len(sums) == 2 else _drawn_moments(ctx, sums, x)
    pivot = mean.detach().mean((2, 3), keepdim=True)
    window, eps = _window(ctx, x, weight), ctx.settings.eps
    units = unit_statistics(mean - pivot, var, pivot, eps, *window)
    return mean, pivot, *units


def _window(ctx, x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    s = ctx.settings
    return (weight.shape[2:], s.stride, s.padding, s.dilation, x.shape[1], s.expected_p)


def _drawn_moments(ctx, sums, x: Tensor) -> tuple[Tensor, Tensor]:
    normal = moments.seeded_normals(sums[0].detach(), torch.tensor(ctx.seed))
    return moments.drawn_moments(sums, normal, ctx.settings.p, x.shape[1])


def _shift_if_needed(pivot: Tensor, mu: Tensor, var: Tensor) -> Tensor | None:
    """`pivot` for images with a window of |mean| > 16 std, else 0; None when no image has one.

    x - shift is a copy of x, too dear to be made without need; on a GPU a look is dearer.
    """
    if pivot.device.type != "cpu":
        return pivot
    ill = (mu + pivot).square() > ILL_CONDITIONED * var
    if not bool(ill.any()):
        return None
    return torch.where(ill.flatten(1).any(1).view(-1, 1, 1, 1), pivot, 0.0)


def _convolved(ctx, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """What is convolved, the filters, and the further arguments of `convolution_backward`."""
    s = ctx.settings
    x, pads = _padded(x, s.padding)
    if ctx.shift is not None:
        x, pads = F.pad(x, [pads[1], pads[1], pads[0], pads[0]]) - ctx.shift, [0, 0]
    if ctx.dtype is not None:  # after the statistics: what autocast does to conv2d
        x, weight = x.to(ctx.dtype), weight.to(ctx.dtype)
    return x, weight, (s.stride, pads, s.dilation, False, [0, 0], s.groups)


def _scale(
    numerator: Tensor,
    rstd: Tensor,
    offset: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    relu: bool,
) -> None:
    """numerator -= offset * gain; out = numerator * rstd + bias, its ReLU if `relu`.

    `out` may be `numerator`.
    """
    maps = [layout_of(numerator, m) for m in (rstd, rstd if offset is None else offset)]
    for kept, target, scale, lost in in_parts(numerator, out, *maps):
        here = _computable(kept)
        if offset is not None and gain is not None:
            here.addcmul_(_per_channel(gain), lost, value=-1.0)
            if here is not kept and out is not numerator:
                kept.copy_(here)
        if bias is None:
            torch.mul(here, scale, out=target)
        else:
            torch.addcmul(_per_channel(bias), here, scale, out=target)
        if relu:
            target.clamp_min_(0.0)


def _scale_backward(
    grad: Tensor,
    numerator: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    offset: Tensor,
    rstd: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for numerator, mu and 1 / std, and for [bias, gain], (2, O) or without gain (1, O).

    All from one walk over `grad` and `numerator`, a few images at a time. With `relu`, `numerator`
    is the result instead: where that is above 0, it is numerator * rstd + bias.
    """
    ones = torch.ones_like(rstd)
    rows = ones if gain is None else torch.cat([ones, -rstd * offset], 1)  # (N, 2, H', W')
    totals = rstd.new_zeros(rows.shape[1], grad.shape[1])
    scaled = torch.empty_like(numerator)
    grad_mu, grad_rstd = torch.zeros_like(rstd), torch.empty_like(rstd)
    parts = in_parts(numerator, grad, scaled, layout_of(numerator, rstd), rows, grad_mu, grad_rstd)
    for kept, flowing, target, scale, row, to_mu, to_rstd in parts:
        here, kept = _computable(flowing), _computable(kept)
        if relu:
            here = torch.ops.aten.threshold_backward(here, kept, 0.0)
        pixels = here.flatten(2)  # (n, O, H'*W')
        room = target if target.dtype == here.dtype else None  # it is written only below
        torch.sum(torch.mul(here, kept, out=room), 1, keepdim=True, out=to_rstd)
        if relu:
            if bias is not None:
                to_rstd -= torch.matmul(bias.to(here.dtype), pixels).view_as(scale)
            to_rstd /= scale
        totals += torch.matmul(row.flatten(2).to(here.dtype), pixels.mT).sum(0)
        torch.mul(here, scale, out=target)
        if gain is not None:
            lost = torch.matmul(gain.to(here.dtype), pixels).view_as(scale)
            torch.mul(lost, scale, out=to_mu).neg_()
    return scaled, grad_mu, grad_rstd, totals


def _like_input(ctx, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient for the convolved image as one for x: without padding, of its type, layout."""
    if grad.shape != x.shape:
        left, _, top, _ = ctx.settings.padding
        grad = grad[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if nhwc else torch.contiguous_format
    return grad.to(x.dtype).contiguous(memory_format=form)


def _add_statistics_gradient_(
    ctx, grad_x, grad_mu, grad_rstd, x, weight, mean, pivot, mu, var, rstd, *sums
) -> None:
    window = _window(ctx, x, weight)
    maps = (mean - pivot, pivot, mu, var, rstd)
    grad_mean, grad_var = unit_statistics_backward(grad_mu, grad_rstd, *maps, *window)
    if not sums:
        p, seed = ctx.settings.p, ctx.seed
        moments.add_moments_gradient_(grad_x, x, grad_mean, grad_var, mean, p, seed)
        return
    with torch.enable_grad():
        leaves = [s.detach().requires_grad_() for s in sums]
        drawn = _drawn_moments(ctx, leaves, x)
    grad_sums = torch.autograd.grad(drawn, leaves, (grad_mean, grad_var))
    moments.add_power_sums_gradient_(grad_x, x, grad_sums)


def _differentiable_gradients(ctx, grad, x, weight, bias) -> list[Tensor | None]:
    """Gradients for x, weight and bias that can be differentiated themselves."""
    s = ctx.settings
    sums: tuple[Tensor, ...]
    if s.p > 0.0 and moments.draws_sums(x, s.dropout):
        sums = moments.dense_power_sums(x)
    elif s.p > 0.0:
        sums = moments.dense_moments(x * moments.factors(x, s.p, ctx.seed), 0.0)
    else:
        sums = moments.dense_moments(x, 0.0)
    _, pivot, mu, _, rstd = _statistics(ctx, sums, x, weight)
    image, filters, (stride, pads, dilation, _, _, groups) = _convolved(ctx, x, weight)
    numerator = F.conv2d(image, filters, None, stride, pads, dilation, groups)
    if not s.centred:
        offset = mu + (pivot if ctx.shift is None else pivot - ctx.shift)
        numerator = numerator - offset * _per_channel(_gain(weight))
    out = numerator * rstd
    if bias is not None:
        out = out + _per_channel(bias)
    if s.relu:
        out = F.relu(out)
    inputs = [x, weight, bias]
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(out.to(grad.dtype), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in ctx.needs_input_grad[:3]]


def _gain(weight: Tensor) -> Tensor:
    """The sum of every filter: (O, C, kh, kw) -> (O,)."""
    return weight.sum([1, 2, 3])


def _computable(x: Tensor) -> Tensor:
    """x in a type that a CPU computes with at full speed together with float32 maps."""
    return wide(x) if x.device.type == "cpu" else x


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, vector.shape[0], 1, 1)
