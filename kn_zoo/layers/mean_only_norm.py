"""Mean-only normalization with running means.

    y = x - running_mean + bias

Mean-only batch normalization (Salimans and Kingma, Weight Normalization, 2016, arXiv 1602.07868)
subtracts the batch's mean in training. Here it is a running mean of earlier batches, which holds at
any batch size, so that an image's output never depends on the rest of its batch.
"""

import torch
from torch import Tensor, nn


class MeanOnlyNorm2d(nn.Module):
    """Subtract each channel's running mean and add a learned bias.

    Input and output (N, C, H, W). In training, every forward pass then moves the running mean
    towards the mean of its input; the gradient does not pass through it. At inference, the layer
    adds one constant to each channel.

    Args:
        num_channels: channels C.
        momentum: share of the input's mean in the new running mean.
    """

    running_mean: Tensor

    def __init__(
        self,
        num_channels: int,
        momentum: float = 0.05,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum={momentum}: use a number in (0, 1]")
        self.momentum = float(momentum)
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros_like(self.bias.detach()))

    def forward(self, x: Tensor) -> Tensor:
        offset = self.bias - self.running_mean
        if self.training:
            mean = x.detach().mean((0, 2, 3), dtype=self.running_mean.dtype)
            self.running_mean.lerp_(mean, self.momentum)
        return x + offset.to(x.dtype).view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.bias.shape[0]}, momentum={self.momentum}"
