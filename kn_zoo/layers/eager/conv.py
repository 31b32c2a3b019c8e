"""The normalized convolution as one autograd operation.

The forward pass keeps x, maps of one channel and, unless a ReLU is part of it, the convolution's
result; the backward pass adds the statistics' gradient to the convolution's in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kn_zoo.layers import functional
from kn_zoo.layers.functional import (
    ConvSettings,
    Ints,
    Window,
    box_mean,
    expected_factor,
    symmetric_padding,
    unit_size,
    unit_statistics,
    upcast,
)

from .chunks import dense_layout, iter_chunks, match_memory_format
from .dropout import dropout_mask
from .moments import add_moments_gradient_, masked_moments


def kn_conv_operation(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: ConvSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """As `functional.kn_conv`, for images; mu and 1 / sqrt(var + eps) carry no gradient."""
    tensors = [t for t in (x, weight, bias) if t is not None]
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return _KNConv2d.apply(x, weight, bias, settings, keeps)


class _KNConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        s: ConvSettings,
        keeps: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.settings, ctx.shift, ctx.autocast_dtype = s, None, _autocast_dtype(x)
        ctx.seed = int(torch.randint(2**62, (), device="cpu")) if s.dropout_p > 0.0 else 0
        x = dense_layout(x)
        mean, var = masked_moments(x, s.dropout_p, ctx.seed)
        mu, _, rstd = unit_statistics(mean, var, s.window, x.shape[1], s.expected_p, s.eps)
        if s.shift_input:
            ctx.shift = _shift_if_needed(x)
        image, filters, (stride, padding, dilation, *_, groups) = _conv_arguments(ctx, x, weight)
        numerator = F.conv2d(image, filters, None, stride, padding, dilation, groups)
        offset = weight_sum = None
        if not s.zero_mean_weight:
            offset = mu if ctx.shift is None else mu - ctx.shift
            weight_sum = weight.sum((1, 2, 3))
        # After a ReLU the result tells the numerator wherever a gradient flows, and the next layer
        # keeps it anyway. Else the numerator is kept, as the result may be written over.
        out = torch.empty_like(numerator) if keeps and not s.relu else numerator
        _normalize(numerator, rstd, offset, weight_sum, bias, out, s.relu)
        if keeps:
            ctx.save_for_backward(x, weight, bias, weight_sum, numerator, mean, mu, rstd)
        ctx.mark_non_differentiable(mu, rstd)
        ctx.set_materialize_grads(False)
        return out, mu, rstd

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, weight, bias, weight_sum, numerator, mean, mu, rstd = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            return *_differentiable_gradients(ctx, grad, x, weight, bias), None, None
        scaled, grad_mu, grad_rstd, totals = _normalize_backward(
            grad, numerator, weight_sum, bias, mu, rstd, ctx.settings.relu
        )
        image, filters, arguments = _conv_arguments(ctx, x, weight)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            scaled, image, filters, None, *arguments, [need_x, need_weight, False]
        )
        if need_x:
            grad_x = _like_input(ctx, grad_x, x)
            s = ctx.settings
            grads = _unit_statistics_backward(
                grad_mu, grad_rstd, mu, rstd, x.shape[2:], s.window, x.shape[1], s.expected_p
            )
            add_moments_gradient_(grad_x, x, *grads, mean, s.dropout_p, ctx.seed)
        if need_weight:
            grad_weight = grad_weight.to(weight.dtype)
            if weight_sum is not None:
                grad_weight += totals[1].to(weight.dtype).view(-1, 1, 1, 1)
        grad_bias = totals[0].to(bias.dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _shift_if_needed(x: Tensor) -> Tensor | None:
    """Return `functional.image_shift(x)`, or None if that is 0 for every image.

    x - shift is a copy of x, too expensive to make without need; on a GPU looking costs more.
    """
    shift = functional.image_shift(x)
    return shift if x.device.type != "cpu" or bool(shift.any()) else None


def _conv_arguments(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Return the image, the filters, and the further arguments of `convolution_backward`."""
    window = ctx.settings.window
    padding: Ints = [0, 0]
    if ctx.shift is not None:
        x = F.pad(x, window.padding) - ctx.shift
    else:
        x, padding = symmetric_padding(x, window.padding)
    if ctx.autocast_dtype is not None:  # after the statistics, as autocast does it to conv2d
        x, weight = x.to(ctx.autocast_dtype), weight.to(ctx.autocast_dtype)
    stride, dilation = window.stride, window.dilation
    return x, weight, (stride, padding, dilation, False, [0, 0], ctx.settings.groups)


def _normalize(
    numerator: Tensor,
    rstd: Tensor,
    offset: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    relu: bool,
) -> None:
    """numerator -= offset * weight_sum; out = numerator * rstd + bias, its ReLU if `relu`.

    `out` may be `numerator`.
    """
    maps = [rstd] if offset is None else [rstd, offset]
    dtype = upcast(numerator).dtype
    maps = [match_memory_format(m.to(dtype), numerator) for m in maps]
    for kept, target, scale, *offsets in iter_chunks(numerator, out, *maps):
        chunk = _cpu_upcast(kept)
        if offsets and weight_sum is not None:
            chunk.addcmul_(_per_channel(weight_sum), offsets[0], value=-1.0)
            if chunk is not kept and out is not numerator:
                kept.copy_(chunk)
        if bias is None:
            torch.mul(chunk, scale, out=target)
        else:
            torch.addcmul(_per_channel(bias), chunk, scale, out=target)
        if relu:
            target.clamp_min_(0.0)


def _normalize_backward(
    grad: Tensor,
    numerator: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    mu: Tensor,
    rstd: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients for numerator, mu and rstd, and for bias and weight_sum as (2, O), else (1, O).

    All from one walk over `grad` and `numerator`. With `relu`, `numerator` is the result instead:
    where that is above 0, it is numerator * rstd + bias.
    """
    rstd = rstd.to(upcast(numerator).dtype)
    rows = torch.ones_like(rstd)
    if weight_sum is not None:
        rows = torch.cat([rows, -rstd * mu.to(rstd.dtype)], 1)  # (N, 2, H', W')
    totals = rstd.new_zeros(rows.shape[1], grad.shape[1])
    scaled, grad_rstd = torch.empty_like(numerator), torch.empty_like(rstd)
    grad_mu = None if weight_sum is None else torch.empty_like(rstd)
    maps = [match_memory_format(rstd, numerator), rows, grad_rstd]
    maps += [] if grad_mu is None else [grad_mu]
    chunks = iter_chunks(numerator, grad, scaled, *maps)
    for kept, flowing, target, scale, row, to_rstd, *to_mu in chunks:
        chunk, kept = _cpu_upcast(flowing), _cpu_upcast(kept)
        if relu:
            chunk = torch.ops.aten.threshold_backward(chunk, kept, 0.0)
        pixels = chunk.flatten(2)  # (n, O, H'*W')
        room = target if target.dtype == chunk.dtype else None  # it is written only below
        torch.sum(torch.mul(chunk, kept, out=room), 1, keepdim=True, out=to_rstd)
        if relu:
            if bias is not None:
                to_rstd -= torch.matmul(bias.to(chunk.dtype), pixels).view_as(scale)
            to_rstd /= scale
        totals += torch.matmul(row.flatten(2).to(chunk.dtype), pixels.mT).sum(0)
        torch.mul(chunk, scale, out=target)
        if weight_sum is not None:
            lost = torch.matmul(weight_sum.to(chunk.dtype), pixels).view_as(scale)
            torch.mul(lost, scale, out=to_mu[0]).neg_()
    return scaled, grad_mu, grad_rstd, totals


def _unit_statistics_backward(
    grad_mu: Tensor | None,
    grad_rstd: Tensor,
    mu: Tensor,
    rstd: Tensor,
    size: torch.Size,
    window: Window,
    channels: int,
    expected_p: float,
) -> tuple[Tensor, Tensor]:
    """Gradients that pass through `unit_statistics`, in float64, two maps (N, 1, *size).

    They are those of the means of x and x^2 over the channels of each pixel.
    """
    grad_spread = grad_rstd * rstd.pow(3).mul_(-0.5)  # spread = factor * E[x^2] - mu^2
    to_mu = torch.mul(mu, grad_spread).mul_(-2.0)
    if grad_mu is not None:
        to_mu += grad_mu
    if expected_p > 0.0:
        grad_spread *= expected_factor(unit_size(channels, window), expected_p)
    boxes = torch.cat([to_mu, grad_spread], 1)  # (N, 2, H', W')
    pixels = _box_mean_adjoint(boxes, size, window)
    return pixels[:, :1], pixels[:, 1:]


def _box_mean_adjoint(grad: Tensor, size: torch.Size, window: Window) -> Tensor:
    """Gradient that padding and `box_mean` pass on: (N, M, H', W') -> (N, M, *size).

    It is a box mean itself, of `grad` with zeros around it and, for a stride, in between.
    """
    if max(window.stride) > 1:
        spans = [step * (n - 1) + 1 for n, step in zip(grad.shape[2:], window.stride, strict=True)]
        spread = grad.new_zeros((*grad.shape[:2], *spans))
        spread[:, :, :: window.stride[0], :: window.stride[1]] = grad
        grad = spread
    padding: list[int] = []  # from the last dimension on
    for i in (1, 0):
        reach = window.dilation[i] * (window.kernel_size[i] - 1)
        before = reach - window.padding[2 * (1 - i)]
        padding += [before, size[i] + reach - grad.shape[i + 2] - before]
    around = F.pad(grad, padding) if any(padding) else grad
    return box_mean(around, window._replace(stride=[1, 1]))


def _like_input(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the convolved image as one of x: without padding, its type, layout."""
    if grad.shape != x.shape:
        left, _, top, _ = ctx.settings.window.padding
        grad = grad[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return grad.to(x.dtype).contiguous(memory_format=memory_format)


def _differentiable_gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor | None]:
    """Return gradients for x, weight and bias that can be differentiated, by the dense form."""
    s, moments = ctx.settings, None
    if s.dropout_p > 0.0:
        moments = functional.channel_moments(x * dropout_mask(x, s.dropout_p, ctx.seed), 0.0)
    autocast = ctx.autocast_dtype is not None
    with torch.autocast(x.device.type, ctx.autocast_dtype, enabled=autocast):
        out, _, _ = functional.kn_conv(x, weight, bias, s, moments)
    needs = ctx.needs_input_grad[:3]
    pairs = zip((x, weight, bias), needs, strict=True)
    wanted = [t for t, need in pairs if need and t is not None]
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needs]


def _cpu_upcast(x: Tensor) -> Tensor:
    """Return x in a type that a CPU computes with at full speed together with float32 maps."""
    return upcast(x) if x.device.type == "cpu" else x


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
