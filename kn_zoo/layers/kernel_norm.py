"""KernelNorm1d and KernelNorm2d: every window normalized, the windows laid side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import Ints, check_settings, check_window, padding_sides
from .moments import pixel_moments
from .statistics import expected_variance, unit_moments


@torch.fx.wrap
def kernel_norm(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dropout_p: float,
    statistics: str,
    eps: float,
    dropout: str = "mask",
) -> Tensor:
    """Functional form of `KernelNorm2d`; see there. `padding`: left, right, top, bottom."""
    unbatched = x.dim() == 3
    if unbatched:
        x = x.unsqueeze(0)
    check_window(x, kernel_size, padding, [1, 1])
    x = _side_by_side(x, kernel_size, stride, padding)
    p = dropout_p if statistics == "sampled" else 0.0
    mean, var = pixel_moments(x, p, dropout)
    pivot = mean.mean([2, 3], keepdim=True)
    mu, var = unit_moments(mean - pivot, var, pivot, kernel_size, kernel_size, [0, 0, 0, 0], [1, 1])
    if statistics == "expected":
        n = x.shape[1] * kernel_size[0] * kernel_size[1]
        var = expected_variance(mu + pivot, var, dropout_p, n)
    rstd = _over_windows((var + eps).rsqrt(), kernel_size)
    out = ((x - pivot) - _over_windows(mu, kernel_size)) * rstd
    out = out.to(x.dtype)
    return out.squeeze(0) if unbatched else out


def _side_by_side(x: Tensor, kernel_size: Ints, stride: Ints, padding: Ints) -> Tensor:
    """Windows of kh x kw, copied so that none overlaps: (N, C, H, W) -> (N, C, H'*kh, W'*kw)."""
    if max(padding) > 0:
        x = F.pad(x, padding)
    if max(kernel_size) == 1 and max(stride) == 1:
        return x
    windows = x.unfold(2, kernel_size[0], stride[0]).unfold(3, kernel_size[1], stride[1])
    windows = windows.transpose(3, 4)  # (N, C, H', W', kh, kw) -> (N, C, H', kh, W', kw)
    return windows.flatten(4, 5).flatten(2, 3)


def _over_windows(maps: Tensor, kernel_size: Ints) -> Tensor:
    """One number a window to one a pixel: (N, 1, H', W') -> (N, 1, H'*kh, W'*kw)."""
    if max(kernel_size) == 1:
        return maps
    return maps.repeat_interleave(kernel_size[0], 2).repeat_interleave(kernel_size[1], 3)


class KernelNorm2d(nn.Module):
    """Normalizes every window by its own mean and variance over all channels, without parameters.

    Input (N, C, H, W) or (C, H, W); output (N, C, H'*kh, W'*kw), the H' x W' windows side by side,
    so a following convolution of stride `kernel_size` sees each window once. `stride` defaults to
    `kernel_size`; `padding` is an int, (height, width) or (left, right, top, bottom). Dropout acts
    on the statistics only, with a mask of its own for each window; `inference_statistics` and
    `dropout` as in `KNConv2d`.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, ...] = 0,
        dropout_p: float = 0.1,
        eps: float = 1e-5,
        inference_statistics: str = "expected",
        dropout: str = "mask",
    ) -> None:
        super().__init__()
        check_settings(dropout_p, eps, inference_statistics, dropout)
        self.kernel_size = nn.modules.utils._pair(kernel_size)
        self.stride = self.kernel_size if stride is None else nn.modules.utils._pair(stride)
        self.padding_sides = padding_sides(padding)
        self.dropout_p = float(dropout_p)
        self.eps = float(eps)
        self.inference_statistics = inference_statistics
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        statistics = "sampled" if self.training else self.inference_statistics
        return kernel_norm(
            x,
            self.kernel_size,
            self.stride,
            self.padding_sides,
            self.dropout_p,
            statistics,
            self.eps,
            self.dropout,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding_sides}, "
            f"dropout_p={self.dropout_p}, eps={self.eps}, "
            f"inference_statistics={self.inference_statistics!r}, dropout={self.dropout!r}"
        )


class KernelNorm1d(nn.Module):
    """`KernelNorm2d` over windows of a sequence: (N, C, L) -> (N, C, L'*k)."""

    def __init__(
        self,
        kernel_size: int = 1,
        stride: int | None = None,
        padding: int | tuple[int, int] = 0,
        dropout_p: float = 0.1,
        eps: float = 1e-5,
        inference_statistics: str = "expected",
        dropout: str = "mask",
    ) -> None:
        super().__init__()
        check_settings(dropout_p, eps, inference_statistics, dropout)
        left, right = (padding, padding) if isinstance(padding, int) else padding
        self.kernel_size = (1, kernel_size)
        self.stride = (1, kernel_size if stride is None else stride)
        self.padding_sides = padding_sides((left, right, 0, 0))
        self.dropout_p = float(dropout_p)
        self.eps = float(eps)
        self.inference_statistics = inference_statistics
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        statistics = "sampled" if self.training else self.inference_statistics
        return kernel_norm(
            x.unsqueeze(-2),
            self.kernel_size,
            self.stride,
            self.padding_sides,
            self.dropout_p,
            statistics,
            self.eps,
            self.dropout,
        ).squeeze(-2)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size[1]}, stride={self.stride[1]}, "
            f"padding={self.padding_sides[:2]}, dropout_p={self.dropout_p}, eps={self.eps}, "
            f"inference_statistics={self.inference_statistics!r}, dropout={self.dropout!r}"
        )
