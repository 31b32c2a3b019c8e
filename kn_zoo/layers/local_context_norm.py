"""Local Context Normalization, a baseline that also normalizes by windows.

Ortiz, Robinson, Morris, Fuentes, Kiekintveld, Hassan, Jojic: Local Context Normalization:
Revisiting Local Normalization, CVPR 2020.

    y = weight * (x - mu) / sqrt(var + eps) + bias

mu and var are the mean and biased variance of one group of channels in the window around the pixel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def local_context_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    channels_per_group: int,
    window_size: tuple[int, int],
    eps: float,
) -> Tensor:
    """Functional form of `LocalContextNorm`; see there."""
    n, c, h, w = x.shape
    groups = x if x.dtype == torch.float64 else x.float()
    # Splitting a dimension copies nothing: (N, C, H, W) -> (N, G, C / G, H, W)
    groups = groups.reshape(n, c // channels_per_group, channels_per_group, h, w)
    mean, rstd = _window_moments(groups, window_size, eps)
    out = ((groups - mean.unsqueeze(2)) * rstd.unsqueeze(2)).reshape(n, c, h, w)
    return (out * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)).to(x.dtype)


def _window_moments(
    groups: Tensor, window_size: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor]:
    """Return mean and 1/std of each pixel's window: (N, G, C / G, H, W) -> two (N, G, H, W)."""
    height, width = min(window_size[0], groups.shape[3]), min(window_size[1], groups.shape[4])
    mean = groups.mean(2)
    var = groups.var(2, correction=0)
    if groups.device.type != "mps":  # the one device without float64
        mean, var = mean.double(), var.double()
    mu = _box_mean(mean, height, width)
    # In float64 the difference of squares keeps float32's digits: (mean / std)^2 may reach 1e8.
    window_var = (_box_mean(var + mean * mean, height, width) - mu * mu).clamp(min=0.0)
    moments = torch.stack([mu, (window_var + eps).rsqrt()]).to(groups.dtype)
    # A window that would leave the map is shifted inside it: its neighbour's moments are repeated.
    top, left = (height - 1) // 2, (width - 1) // 2
    borders = [left, width - 1 - left, top, height - 1 - top]
    moments = F.pad(moments.flatten(0, 1), borders, mode="replicate").unflatten(0, (2, -1))
    return moments[0], moments[1]


def _box_mean(maps: Tensor, height: int, width: int) -> Tensor:
    """Mean over windows inside the maps: (N, C, H, W) -> (N, C, H - height + 1, W - width + 1).

    The cost does not depend on the size of the window: differences of cumulative sums.
    """
    sums = F.pad(maps, [1, 0, 1, 0]).cumsum(2).cumsum(3)
    sums = sums[:, :, height:] - sums[:, :, : sums.shape[2] - height]
    sums = sums[:, :, :, width:] - sums[:, :, :, : sums.shape[3] - width]
    return sums / (height * width)


class LocalContextNorm(nn.Module):
    """Normalize each value by its group of channels in a window around its pixel.

    Input and output (N, C, H, W). The window of pixel y covers the rows from y - (p - 1) // 2 to
    y + p // 2, and columns likewise; at the border it is shifted to lie inside the map, as in the
    authors' code, and it is cut to the size of a smaller map. A window as large as the map is group
    normalization. The gradient passes through mu and var.

    Args:
        num_channels: channels C, a multiple of `channels_per_group`.
        channels_per_group: channels that share their statistics; 2 in the paper.
        window_size: p or (p, q), height and width in pixels of the map; 227 in the paper.
        eps: added to the variance.
    """

    def __init__(
        self,
        num_channels: int,
        channels_per_group: int = 2,
        window_size: int | tuple[int, int] = 227,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels_per_group < 1 or num_channels % channels_per_group:
            raise ValueError(
                f"channels_per_group={channels_per_group}: use a divisor of the {num_channels} "
                "channels"
            )
        sizes = (window_size, window_size) if isinstance(window_size, int) else window_size
        if min(sizes) < 1:
            raise ValueError(f"window_size={window_size}: use at least 1 pixel")
        self.channels_per_group = channels_per_group
        self.window_size = (sizes[0], sizes[1])
        self.eps = float(eps)
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return local_context_norm(
            x, self.weight, self.bias, self.channels_per_group, self.window_size, self.eps
        )

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[0]}, channels_per_group={self.channels_per_group}, "
            f"window_size={self.window_size}, eps={self.eps}"
        )
