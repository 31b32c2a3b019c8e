"""KNConv2d: a convolution that normalizes every window by the window's own statistics.

    out = (conv(x, W) - mu * sum(W)) / sqrt(var + eps) + b            Algorithm 1 of the paper

Equivalent forms, and which is used where:
(1) as above, when mu is not the mean of the very window that is convolved: under dropout, or with
    groups (statistics run over all channels, each filter only over its own);
(2) conv(x, W - mean(W)) / sqrt(var + eps) + b, at p = 0 and inference with one group: the mean of
    every filter is taken off the filter, once, instead of the mean of every window off the output.
In float32 both lose digits when |mean| >> std, since products of size |mean| * |w| are summed; x
is then convolved relative to a pivot close to its mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import Ints, check_settings, check_window, padding_sides
from .moments import ILL_CONDITIONED, computed_once, layout_of, pixel_moments, runs_eagerly
from .statistics import expected_variance, unit_moments


@torch.fx.wrap
def kn_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    dropout_p: float,
    statistics: str,
    eps: float,
    frozen: bool = False,
) -> Tensor:
    """Functional form of `KNConv2d`; see there.

    `padding`: left, right, top, bottom. `statistics`: "expected", "plain" or "sampled".
    `frozen`: with one group, the mean of every filter has been taken off `weight` already, and no
    image is shifted.
    """
    unbatched = x.dim() == 3
    if unbatched:
        x = x.unsqueeze(0)
    kernel_size = [weight.shape[2], weight.shape[3]]
    check_window(x, kernel_size, padding, dilation)
    image = x
    if padding[0] != padding[1] or padding[2] != padding[3]:  # convolutions pad symmetrically
        x, padding = F.pad(x, padding), [0, 0, 0, 0]
    p = dropout_p if statistics == "sampled" else 0.0
    eager = runs_eagerly()
    # Under dropout the noise of the mask is larger by far than the digits that are lost.
    careful = p == 0.0 and x.dtype == torch.float32 and not frozen
    shift: Tensor | None = None
    if careful and not eager:
        shift = _middle_row(image)
        x = x - shift
    mean, var = pixel_moments(x, p, eager)
    if shift is None:
        pivot = mean.sum([2, 3], keepdim=True) / (image.shape[2] * image.shape[3])
        mean = mean - pivot
    else:  # x, and so its mean, is relative to the shift already
        pivot = shift
    mu, var = unit_moments(mean, var, pivot, kernel_size, stride, padding, dilation)  # (N,1,H',W')
    if careful and eager:
        shift = _shift_if_needed(x, pivot, mu, var)
        if shift is not None:
            x = x - shift
    if statistics == "expected":
        n = x.shape[1] * kernel_size[0] * kernel_size[1]
        var = expected_variance(mu + pivot, var, dropout_p, n)
    rstd = computed_once((var + eps).rsqrt())

    offset: Tensor | None = None
    if p > 0.0 or groups > 1:
        offset = computed_once(mu + (pivot if shift is None else pivot - shift))
    elif not frozen:
        weight = centred_filters(weight)
    out = _normalized_conv(
        x, weight, bias, rstd, offset, shift, stride, padding, dilation, groups, eager
    )
    return out.squeeze(0) if unbatched else out


def centred_filters(weight: Tensor) -> Tensor:
    """Every filter minus its mean over its own inputs: (O, C, kh, kw) -> same."""
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    return (wide - wide.mean([1, 2, 3], keepdim=True)).to(weight.dtype)


def _middle_row(x: Tensor) -> Tensor:
    """What to take off every image before a float32 convolution: the mean of its middle row.

    A compiler writes x - shift instead of x at no cost: this is known before its pass over x.
    """
    return x[:, :, x.shape[2] // 2].mean([1, 2]).view(-1, 1, 1, 1)


@torch.jit.unused
def _shift_if_needed(x: Tensor, pivot: Tensor, mu: Tensor, var: Tensor) -> Tensor | None:
    """`pivot` for images with a window of |mean| > 16 std, else 0; None when no image has one.

    Run operation by operation, x - shift is a copy of x, too dear to be made without need.
    """
    if x.device.type != "cpu" or type(x) not in (Tensor, nn.Parameter):  # no look at the numbers
        return pivot
    ill = ((mu + pivot).square() > ILL_CONDITIONED * var).flatten(1).any(1)
    return torch.where(ill.view(-1, 1, 1, 1), pivot, 0.0) if bool(ill.any()) else None


def _normalized_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    offset: Tensor | None,
    shift: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    eager: bool,
) -> Tensor:
    """(conv(x, weight) - offset * sum(weight)) * rstd + bias, in the form that suits."""
    settings = (stride, padding, dilation, groups)
    if torch.jit.is_scripting():
        return _dense_normalized_conv(x, weight, bias, rstd, offset, shift, *settings)
    else:
        if eager and shift is None:
            return _lean_normalized_conv(x, weight, bias, rstd, offset, *settings)
        return _dense_normalized_conv(x, weight, bias, rstd, offset, shift, *settings)


def _dense_normalized_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    offset: Tensor | None,
    shift: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """As `_normalized_conv`, in plain operations.

    With `shift`, x and `offset` are relative to it; zero padding, which then should be -shift, is
    put right by the sum of the weights that lie outside the image.
    """
    pads = [padding[2], padding[0]]
    numerator = F.conv2d(x, weight, None, stride, pads, dilation, groups)
    if shift is not None and max(padding) > 0:
        outside = F.pad(torch.zeros_like(x[:1, :1]), padding, value=1.0)
        summed = weight.sum(1, keepdim=True)  # (O, 1, kh, kw)
        numerator = numerator - shift * F.conv2d(outside, summed, None, stride, 0, dilation)
    dtype = numerator.dtype
    if offset is not None:
        numerator = numerator - offset * weight.sum([1, 2, 3]).view(1, -1, 1, 1)
    out = numerator * rstd
    if bias is not None:
        out = out + bias.view(1, -1, 1, 1)
    return out.to(dtype)


class _NormalizedConv(torch.autograd.Function):
    """(conv(x, weight) - offset * gain) * rstd + bias, with gain = sum(weight) of each filter.

    Keeps x, the convolution's result and one-channel maps: what convolution + BatchNorm keep.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, rstd, offset, gain, stride, padding, dilation, groups):
        pads = [padding[2], padding[0]]
        numerator = F.conv2d(x, weight, None, stride, pads, dilation, groups)
        rstd = layout_of(numerator, rstd)
        if offset is not None:
            numerator.addcmul_(_per_channel(gain), layout_of(numerator, offset), value=-1.0)
        kept = any(ctx.needs_input_grad)
        out = torch.empty_like(numerator) if kept else numerator
        if bias is None:
            torch.mul(numerator, rstd, out=out)
        else:
            torch.addcmul(_per_channel(bias), numerator, rstd, out=out)
        ctx.save_for_backward(x, weight, numerator, rstd, offset, gain)
        ctx.conv = (stride, pads, dilation, False, [0, 0], groups)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, numerator, rstd, offset, gain = ctx.saved_tensors
        need_x, need_weight, need_bias, need_rstd, need_offset, need_gain = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():  # to be differentiated again: tie it to x and weight
            stride, pads, dilation, _, _, groups = ctx.conv
            numerator = F.conv2d(x, weight, None, stride, pads, dilation, groups)
            if offset is not None:
                numerator = numerator - offset * _per_channel(gain)
        grad_rstd = _channel_dot(grad, numerator, rstd.dtype) if need_rstd else None
        grad_bias = grad_offset = grad_gain = None
        if need_gain:  # both sums over pixels in one pass: (N, 2, H'*W') @ (N, H'*W', O)
            rows = torch.cat([torch.ones_like(rstd), -rstd * offset], 1).flatten(2).to(grad.dtype)
            sums = torch.matmul(rows, grad.flatten(2).transpose(1, 2)).sum(0)
            grad_bias, grad_gain = sums[0] if need_bias else None, sums[1].to(gain.dtype)
        elif need_bias:
            grad_bias = grad.sum((0, 2, 3))
        grad = (grad * rstd).to(numerator.dtype)  # with respect to the numerator
        if need_offset:  # (O,) @ (N, O, H'*W') -> (N, H'*W')
            grad_offset = -torch.matmul(gain.to(grad.dtype), grad.flatten(2)).view_as(offset)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *ctx.conv, [need_x, need_weight, False]
        )
        return grad_x, grad_weight, grad_bias, grad_rstd, grad_offset, grad_gain, *[None] * 4


def _lean_normalized_conv(x, weight, bias, rstd, offset, stride, padding, dilation, groups):
    """As `_normalized_conv` without a shift, by the operation that keeps little for backward."""
    gain = None if offset is None else weight.sum((1, 2, 3))
    device = x.device.type  # autocast knows some devices only; "meta", for one, it does not
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # after the sums: what autocast does to conv2d
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return _NormalizedConv.apply(
        x, weight, bias, rstd, offset, gain, stride, padding, dilation, groups
    )


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _channel_dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Scalar product over channels, (N, O, H, W) twice -> (N, 1, H, W)."""
    if a.device.type != "cpu" or torch.is_grad_enabled():
        return (a * b).sum(1, keepdim=True, dtype=dtype)
    products = torch.empty_like(b[:1])  # image by image the products stay within the cache
    found = [
        torch.mul(a[i : i + 1], b[i : i + 1], out=products).sum(1, keepdim=True, dtype=dtype)
        for i in range(len(a))
    ]
    return torch.cat(found) if found else (a * b).sum(1, keepdim=True, dtype=dtype)


class KNConv2d(nn.Conv2d):
    """Convolution over windows normalized by their own mean and variance; drop-in for `nn.Conv2d`.

    A unit is all channels of one window, zero padding included; with groups > 1 too, statistics
    run over all channels. In training they are taken after dropout with probability `dropout_p`
    (the numerator never is). At inference `inference_statistics` decides: "expected" (the
    statistics' expectation over dropout masks), "plain" (no dropout), "sampled" (random, as in
    training and in the authors' code).

    Arguments are those of `nn.Conv2d`, with `padding` an int, (height, width) or
    (left, right, top, bottom). Input (N, C, H, W) or (C, H, W); output as `nn.Conv2d`'s, in the
    memory format of the input. Unsupported settings raise ValueError.

    Source: Algorithm 1 of arXiv 2205.10089.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        dropout_p: float = 0.05,
        eps: float = 1e-5,
        inference_statistics: str = "expected",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(
                f"padding_mode={padding_mode!r}: zero padding is part of a window's statistics; "
                "use padding_mode='zeros', or pad the input with F.pad and use padding=0"
            )
        sides = padding_sides(padding)
        check_settings(dropout_p, eps, inference_statistics)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            (sides[2], sides[0]),  # nn.Conv2d's attribute when symmetric, (height, width)
            dilation,
            groups,
            bias,
            "zeros",
            device,
            dtype,
        )
        self.padding_sides = sides
        self.dropout_p = float(dropout_p)
        self.eps = float(eps)
        self.inference_statistics = inference_statistics

    def forward(self, x: Tensor) -> Tensor:
        statistics = "sampled" if self.training else self.inference_statistics
        return kn_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding_sides,
            self.dilation,
            self.groups,
            self.dropout_p,
            statistics,
            self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding_sides}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, dropout_p={self.dropout_p}, "
            f"eps={self.eps}, inference_statistics={self.inference_statistics!r}"
        )
