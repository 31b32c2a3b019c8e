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
from torch import Tensor, nn

from .checks import Ints, check_settings, check_window, padding_sides
from .normalized_conv import Settings, dense_normalized_conv, normalized_conv, runs_one_by_one


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
    dropout: str = "mask",
    frozen: bool = False,
    relu: bool = False,
) -> Tensor:
    """Functional form of `KNConv2d`; see there.

    `padding`: left, right, top, bottom. `statistics`: "expected", "plain" or "sampled"; `dropout`:
    "mask" or "gaussian". `frozen`: with one group, the mean of every filter has been taken off `weight`
    already, and no image is shifted. `relu`: the result is the ReLU of that.
    """
    unbatched = x.dim() == 3
    if unbatched:
        x = x.unsqueeze(0)
    check_window(x, [weight.shape[2], weight.shape[3]], padding, dilation)
    p = dropout_p if statistics == "sampled" else 0.0
    expected_p = dropout_p if statistics == "expected" else 0.0
    # Under dropout the noise of the mask is larger by far than the digits that are lost.
    careful = p == 0.0 and x.dtype == torch.float32 and not frozen
    centred = p == 0.0 and groups == 1
    if centred and not frozen:
        weight = centred_filters(weight)
    settings = Settings(
        stride, padding, dilation, groups, p, dropout, expected_p, eps, careful, centred, relu
    )
    if torch.jit.is_scripting():
        out = dense_normalized_conv(x, weight, bias, settings)
    else:
        form = normalized_conv if runs_one_by_one(x) else dense_normalized_conv
        out = form(x, weight, bias, settings)
    return out.squeeze(0) if unbatched else out


def centred_filters(weight: Tensor) -> Tensor:
    """Every filter minus its mean over its own inputs: (O, C, kh, kw) -> same."""
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    return (wide - wide.mean([1, 2, 3], keepdim=True)).to(weight.dtype)


class KNConv2d(nn.Conv2d):
    """Convolution over windows normalized by their own mean and variance; drop-in for `nn.Conv2d`.

    A unit is all channels of one window, zero padding included; with groups > 1 too, statistics
    run over all channels. In training they are taken after dropout with probability `dropout_p`
    (the numerator never is). At inference `inference_statistics` decides: "expected" (the
    statistics' expectation over dropout masks), "plain" (no dropout), "sampled" (random, as in
    training and in the authors' code). `dropout` is "mask", or "gaussian": what a mask leaves of the
    sums over channels is drawn from the normal distribution with the mask's first two moments
    (of 16 channels or more), which compilers fuse; at inference it changes "sampled" only. With
    `relu` the layer returns the ReLU of its output, and training keeps one tensor less than with
    `nn.ReLU` after it; as with that, the result must not be written over before the backward pass.

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
        dropout: str = "mask",
        relu: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(
                f"padding_mode={padding_mode!r}: zero padding is part of a window's statistics; "
                "use padding_mode='zeros', or pad the input with F.pad and use padding=0"
            )
        sides = padding_sides(padding)
        check_settings(dropout_p, eps, inference_statistics, dropout)
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
        self.dropout = dropout
        self.relu = relu

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
            self.dropout,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding_sides}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, dropout_p={self.dropout_p}, "
            f"eps={self.eps}, inference_statistics={self.inference_statistics!r}, "
            f"dropout={self.dropout!r}, relu={self.relu}"
        )
