"""KNConv and KernelNorm as modules: constructors, checks, choice of inference statistics."""

from typing import Any

import torch
from torch import Tensor, nn

from .eager import kn_conv_eager, use_eager_kernels
from .functional import (
    ConvSettings,
    Window,
    kernel_norm,
    kn_conv,
    split_dropout,
    standardized_weight,
    zero_mean_weight,
)

torch.fx.wrap("standardized_weight")  # its control flow depends on the type of the weight

INFERENCE_STATISTICS = ("expected", "plain", "sampled")
DROPOUTS = ("mask", "gaussian")
SIDES = ("left, right", "left, right, top, bottom", "left, right, top, bottom, front, back")
AXES = ("(length,)", "(height, width)", "(depth, height, width)")


@torch.fx.wrap
def kn_conv_with_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
    dropout_p: float,
    statistics: str,
    eps: float,
    dropout: str = "mask",
    relu: bool = False,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a KNConv layer's output, and the mu and 1 / sqrt(var + eps) that made it.

    Both maps, (N, 1, *S') or (1, *S') as `x` is batched or not, are those of this very call, with
    its dropout mask; where the eager kernels run they carry no gradient. With G the gradient of the
    output (0 where a ReLU is 0), an image's gradient of the weight is that of a convolution of x
    for G * rstd, minus the sum over pixels of G * rstd * mu, the same for all numbers of a filter.

    `statistics` is "expected", "plain" or "sampled". `frozen`: with one group, `weight` is
    `zero_mean_weight` already, and x is not shifted.
    """
    unbatched = x.dim() == weight.dim() - 1
    if unbatched:
        x = x.unsqueeze(0)
    _check_input(x, window)
    p, expected_p = split_dropout(dropout_p, statistics)
    centered = p == 0.0 and groups == 1
    if centered and not frozen:
        weight = zero_mean_weight(weight)
    # Under dropout the noise of the mask is larger by far than the digits that are lost.
    shift_input = p == 0.0 and x.dtype == torch.float32 and not frozen
    settings = ConvSettings(
        window, groups, p, dropout, expected_p, eps, centered, shift_input, relu
    )
    if torch.jit.is_scripting():
        out, mu, rstd = kn_conv(x, weight, bias, settings)
    else:
        form = kn_conv_eager if use_eager_kernels(x, settings) else kn_conv
        out, mu, rstd = form(x, weight, bias, settings)
    if unbatched:
        return out.squeeze(0), mu.squeeze(0), rstd.squeeze(0)
    return out, mu, rstd


class _KNConv(nn.modules.conv._ConvNd):
    """Constructor and forward pass of KNConv1d, KNConv2d and KNConv3d."""

    dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        dropout_p: float = 0.05,
        eps: float = 1e-5,
        inference_statistics: str = "expected",
        dropout: str = "mask",
        relu: bool = False,
        weight_standardization: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(
                f"padding_mode={padding_mode!r}: zero padding is part of a window's statistics; "
                "use padding_mode='zeros', or pad the input with F.pad and use padding=0"
            )
        window = _window(self.dims, kernel_size, stride, padding, dilation)
        _check_settings(dropout_p, eps, inference_statistics, dropout)
        init: Any = super().__init__  # of nn.Conv1d, nn.Conv2d or nn.Conv3d
        init(
            in_channels,
            out_channels,
            window.kernel_size,
            window.stride,
            window.padding[-2::-2],  # nn.Conv2d's attribute, if symmetric
            window.dilation,
            groups,
            bias,
            "zeros",
            device,
            dtype,
        )
        self.padding_sides = tuple(window.padding)
        self.dropout_p = float(dropout_p)
        self.eps = float(eps)
        self.inference_statistics = inference_statistics
        self.dropout = dropout
        self.relu = relu
        self.register_parameter("gain", None)
        if weight_standardization:  # variance 2 for uncorrelated inputs, which a ReLU halves
            self.gain = nn.Parameter(self.weight.new_full((out_channels,), 2**0.5))

    def effective_weight(self) -> Tensor:
        """Return the filters of the convolution: `weight`, or `weight` standardized."""
        gain = self.gain
        return self.weight if gain is None else standardized_weight(self.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_statistics(x)[0]

    def forward_with_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output and the maps (mu, rstd) of this call; see `kn_conv_with_statistics`."""
        return kn_conv_with_statistics(
            x,
            self.effective_weight(),
            self.bias,
            Window(self.kernel_size, self.stride, self.padding_sides, self.dilation),
            self.groups,
            self.dropout_p,
            "sampled" if self.training else self.inference_statistics,
            self.eps,
            self.dropout,
            self.relu,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding_sides}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, dropout_p={self.dropout_p}, "
            f"eps={self.eps}, inference_statistics={self.inference_statistics!r}, "
            f"dropout={self.dropout!r}, relu={self.relu}, "
            f"weight_standardization={self.gain is not None}"
        )


class KNConv2d(_KNConv, nn.Conv2d):
    """Convolution over windows normalized by their own mean and variance; drop-in for `nn.Conv2d`.

    A unit is all channels of one window, zero padding included; with groups > 1 too, statistics
    run over all channels. In training they are taken after dropout with probability `dropout_p`;
    the numerator never is.

    Arguments are those of `nn.Conv2d`, and:

    - `padding` is an int, (height, width), (left, right, top, bottom), "valid" or, with stride 1,
      "same". Zeros are the only `padding_mode`.
    - `inference_statistics` decides what `eval()` does: "expected" takes the expectation of the
      statistics over dropout masks, "plain" uses no dropout, "sampled" is random, as in training
      and in the authors' code.
    - `dropout` is "mask", or "gaussian": fast dropout (Wang and Manning, 2013) draws the sums over
      channels that a mask would leave from the normal distribution with the same first two moments,
      if there are 16 channels or more. Compilers fuse it. At inference it matters to "sampled".
    - `relu` returns the ReLU of the output. Training then keeps one tensor less than with `nn.ReLU`
      after the layer; as with that, do not write over the result before the backward pass.
    - `weight_standardization` subtracts the mean of every filter (Qiao et al., 2019, arXiv
      1903.10520) and scales the filter to a learned norm, `gain` (Brock et al., 2021, arXiv
      2101.08692), which starts at the square root of 2.

    Input (N, C, H, W) or (C, H, W); output as `nn.Conv2d`'s, in the memory format of the input.
    Unsupported settings raise ValueError, an input that is not floating-point TypeError.

    Under `torch.vmap`, dropout needs `randomness="different"` (a mask for each sample) or "same".

    Source: Algorithm 1 of arXiv 2205.10089.
    """

    dims = 2


class KNConv1d(_KNConv, nn.Conv1d):
    """`KNConv2d` for sequences, drop-in for `nn.Conv1d`: (N, C, L) or (C, L).

    `padding` is an int, (length,), (left, right), "valid" or "same".
    """

    dims = 1


class KNConv3d(_KNConv, nn.Conv3d):
    """`KNConv2d` for volumes, drop-in for `nn.Conv3d`: (N, C, D, H, W) or (C, D, H, W).

    `padding` is an int, (depth, height, width), (left, right, top, bottom, front, back), "valid" or
    "same".
    """

    dims = 3


class FrozenKNConv(nn.Module):
    """A KNConv1d, KNConv2d or KNConv3d for inference: conv(x, W - mean(W)) * rstd + b.

    The mean is taken off the filters once, in the constructor.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: _KNConv) -> None:
        super().__init__()
        weight = layer.effective_weight().detach()
        self.register_buffer("weight", zero_mean_weight(weight) if layer.groups == 1 else weight)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding_sides, self.dilation = layer.padding_sides, layer.dilation
        self.groups = layer.groups
        self.dropout_p, self.eps = layer.dropout_p, layer.eps
        self.inference_statistics, self.relu = layer.inference_statistics, layer.relu

    def forward(self, x: Tensor) -> Tensor:
        return kn_conv_with_statistics(
            x,
            self.weight,
            self.bias,
            Window(self.kernel_size, self.stride, self.padding_sides, self.dilation),
            self.groups,
            self.dropout_p,
            self.inference_statistics,
            self.eps,
            relu=self.relu,
            frozen=True,
        )[0]


FrozenKNConv2d = FrozenKNConv


class _KernelNorm(nn.Module):
    """Constructor and forward pass of KernelNorm1d, KernelNorm2d and KernelNorm3d."""

    dims: int

    def __init__(
        self,
        kernel_size: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] | str = 0,
        dropout_p: float = 0.1,
        eps: float = 1e-5,
        inference_statistics: str = "expected",
        dropout: str = "mask",
    ) -> None:
        super().__init__()
        _check_settings(dropout_p, eps, inference_statistics, dropout)
        step = kernel_size if stride is None else stride
        window = _window(self.dims, kernel_size, step, padding, 1)
        self.kernel_size, self.stride = tuple(window.kernel_size), tuple(window.stride)
        self.padding_sides, self.dilation = tuple(window.padding), tuple(window.dilation)
        self.dropout_p = float(dropout_p)
        self.eps = float(eps)
        self.inference_statistics = inference_statistics
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return _checked_kernel_norm(
            x,
            Window(self.kernel_size, self.stride, self.padding_sides, self.dilation),
            self.dropout_p,
            "sampled" if self.training else self.inference_statistics,
            self.eps,
            self.dropout,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding_sides}, "
            f"dropout_p={self.dropout_p}, eps={self.eps}, "
            f"inference_statistics={self.inference_statistics!r}, dropout={self.dropout!r}"
        )


class KernelNorm2d(_KernelNorm):
    """Normalize every window by its own mean and variance over all channels, without parameters.

    Input (N, C, H, W) or (C, H, W); output (N, C, H'*kh, W'*kw), the H' x W' windows side by side,
    so a following convolution of stride `kernel_size` sees each window once. `stride` defaults to
    `kernel_size`; `padding` as in `KNConv2d`. Dropout acts on the statistics only, with a mask of
    its own for each window; `inference_statistics` and `dropout` as in `KNConv2d`.
    """

    dims = 2


class KernelNorm1d(_KernelNorm):
    """`KernelNorm2d` over windows of a sequence: (N, C, L) or (C, L) -> (N, C, L'*k)."""

    dims = 1


class KernelNorm3d(_KernelNorm):
    """`KernelNorm2d` over windows of a volume: (N, C, D, H, W) -> (N, C, D'*kd, H'*kh, W'*kw)."""

    dims = 3


@torch.fx.wrap
def _checked_kernel_norm(
    x: Tensor, window: Window, dropout_p: float, statistics: str, eps: float, dropout: str
) -> Tensor:
    unbatched = x.dim() == len(window.kernel_size) + 1
    if unbatched:
        x = x.unsqueeze(0)
    _check_input(x, window)
    out = kernel_norm(x, window, dropout_p, statistics, eps, dropout)
    return out.squeeze(0) if unbatched else out


def set_inference_statistics(model: nn.Module, statistics: str) -> nn.Module:
    """Choose "expected", "plain" or "sampled" statistics for every layer of `model`; returns it.

    Raises ValueError on another name, and when `model` has no kernel-normalized layer or is frozen.
    """
    if statistics not in INFERENCE_STATISTICS:
        raise ValueError(f"statistics={statistics!r}: use one of {INFERENCE_STATISTICS}")
    if any(isinstance(module, FrozenKNConv) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is frozen, and so are its statistics: call "
            "set_inference_statistics on the model before kn_zoo.freeze, and freeze it again"
        )
    layers = [m for m in model.modules() if isinstance(m, _KNConv | _KernelNorm)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no kernel-normalized layer to set")
    for layer in layers:
        layer.inference_statistics = statistics
    return model


def _check_settings(dropout_p: float, eps: float, inference_statistics: str, dropout: str) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: use a probability in [0, 1); 0 turns dropout off")
    if not eps > 0.0:
        raise ValueError(f"eps={eps}: use a positive number; it keeps constant windows finite")
    if inference_statistics not in INFERENCE_STATISTICS:
        raise ValueError(
            f"inference_statistics={inference_statistics!r}: use one of {INFERENCE_STATISTICS}"
        )
    if dropout not in DROPOUTS:
        raise ValueError(f"dropout={dropout!r}: use one of {DROPOUTS}")


def _window(dims: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Window:
    """Return the window of a layer's arguments, or raise a ValueError that names the wrong one."""
    kernel = _numbers("kernel_size", kernel_size, dims)
    step = _numbers("stride", stride, dims)
    delta = _numbers("dilation", dilation, dims)
    return Window(kernel, step, _padding_sides(padding, kernel, step, delta), delta)


def _numbers(name: str, value: Any, dims: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,) * dims
    if len(numbers) != dims or not all(_is_int(n) and n > 0 for n in numbers):
        kind = "a positive int" if dims == 1 else f"a positive int or {dims} of them"
        raise ValueError(f"{name}={value!r}: use {kind}")
    return numbers


def _padding_sides(
    padding: Any, kernel: tuple[int, ...], stride: tuple[int, ...], delta: tuple[int, ...]
) -> tuple[int, ...]:
    """Return any form of padding as F.pad takes it: (left, right, top, bottom, ...)."""
    dims = len(kernel)
    if padding == "valid":
        return (0, 0) * dims
    if padding == "same":
        if max(stride) > 1:
            raise ValueError(f"padding='same' needs stride 1, not {stride}: use numbers")
        totals = [d * (k - 1) for k, d in zip(reversed(kernel), reversed(delta), strict=True)]
        return tuple(side for total in totals for side in (total // 2, total - total // 2))
    numbers = tuple(padding) if isinstance(padding, tuple | list) else (padding,) * dims
    if len(numbers) == dims:  # from the first dimension on -> two sides each, from the last
        numbers = tuple(side for number in reversed(numbers) for side in (number, number))
    if len(numbers) != 2 * dims or not all(_is_int(n) and n >= 0 for n in numbers):
        raise ValueError(
            f"padding={padding!r}: use a non-negative int, {AXES[dims - 1]}, ({SIDES[dims - 1]}), "
            "'valid' or 'same'"
        )
    return numbers


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_input(x: Tensor, window: Window) -> None:
    """Refuse an input (N, C, *S) of integers, or too small for one window."""
    if not x.is_floating_point():
        raise TypeError(
            f"kernel normalization of {x.dtype}: use a floating-point input, such as x.float(); in "
            "a quantized model leave these layers out (qconfig = None) and dequantize before them"
        )
    dims = len(window.kernel_size)
    if x.dim() != dims + 2:
        raise ValueError(f"input of {x.dim()} dimensions: use {dims + 2}, or {dims + 1} unbatched")
    fits = True
    spans: list[int] = []
    sizes: list[int] = []
    for i in range(dims):
        spans.append(window.dilation[i] * (window.kernel_size[i] - 1) + 1)
        sizes.append(x.shape[i + 2] + window.padding[-2 * i - 1] + window.padding[-2 * i - 2])
        fits = fits and spans[i] <= sizes[i]
    if not fits:
        raise ValueError(
            f"a window of {' x '.join([str(n) for n in spans])} pixels does not fit the padded "
            f"input of {' x '.join([str(n) for n in sizes])}: use a larger input, more padding or "
            "a smaller kernel"
        )
