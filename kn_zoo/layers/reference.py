"""Algorithm 1 of the paper as written, every window unfolded: for tests and benchmarks only."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .modules import KNConv2d


class ReferenceKNConv2d(KNConv2d):
    """`KNConv2d` by unfolding C * kh * kw numbers a window: slow, and easy to check by eye."""

    def forward(self, x: Tensor) -> Tensor:
        sampled = self.training or self.inference_statistics == "sampled"
        p, n = self.dropout_p, self.weight[0].numel() * self.groups
        x = F.pad(x, self.padding_sides)
        dropped = F.dropout(x, p, training=sampled)
        units = F.unfold(dropped, self.kernel_size, self.dilation, 0, self.stride)  # (N, n, H'*W')
        mu = units.mean(1)
        var = units.var(1, correction=0)
        if self.inference_statistics == "expected" and not sampled:
            square = units.square().mean(1)
            var = square / (1 - p) - mu.square() - p / (1 - p) * square / n
        weight = self.effective_weight()
        conv = F.conv2d(x, weight, None, self.stride, 0, self.dilation, self.groups)
        maps = (conv.shape[0], 1, *conv.shape[2:])
        weight_sum = weight.sum((1, 2, 3)).view(1, -1, 1, 1)
        out = (conv - mu.view(maps) * weight_sum) / torch.sqrt(var.view(maps) + self.eps)
        out = out if self.bias is None else out + self.bias.view(1, -1, 1, 1)
        return F.relu(out) if self.relu else out
