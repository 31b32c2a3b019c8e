"""ResNet-18, -34 and -50 for low resolution, with batch, group, layer or no normalization.

timm's ResNet with a 3x3 stem that does not stride, to compare kernel-normalized networks with.
"""

from typing import Any, Literal

import torch
from timm.layers import GroupNorm, GroupNorm1
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ._base import Features, check_size
from ._build import CIFAR_MEAN_STD, Cfgs, build, cfgs

__all__ = ["ResNetCifar"]

Norm = Literal["batch", "group", "layer", "none"]
NORMS = dict(batch=nn.BatchNorm2d, group=GroupNorm, layer=GroupNorm1, none=nn.Identity)
REDUCTION = 8  # of the last stage, where ResNet has 32


class Stem(nn.Conv2d):
    """A 3x3 convolution that refuses images smaller than a pixel of the last map."""

    def forward(self, x: Tensor) -> Tensor:
        x = check_size(x, 8)  # a literal REDUCTION: a script knows no globals
        return self._conv_forward(x, self.weight, self.bias)


class ResNetCifar(ResNet):
    """Low-resolution ResNet.

    Args:
        block: timm's BasicBlock or Bottleneck.
        layers: blocks a stage.
        norm: "batch", "group" (32 groups), "layer" (one group) or "none" (convolutions get biases).
        output_stride: 8, 4 or 2 input pixels a pixel of the last map.
        kwargs: of timm's ResNet.
    """

    def __init__(
        self,
        block: Any,
        layers: tuple[int, ...],
        norm: Norm = "batch",
        in_chans: int = 3,
        output_stride: int = REDUCTION,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: use 'batch', 'group', 'layer' or 'none'")
        if output_stride not in (8, 4, 2):
            raise ValueError(f"output_stride={output_stride}: use 8, 4 or 2")
        super().__init__(
            block,
            layers,
            in_chans=in_chans,
            output_stride=4 * output_stride,
            norm_layer=NORMS[norm],
            **kwargs,
        )
        self.in_chans = in_chans
        feature_info: Features = self.feature_info
        width = feature_info[0]["num_chs"]
        stem = Stem(in_chans, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.conv1, self.maxpool = stem, nn.Identity()  # type: ignore[assignment]
        for info in feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)
        if norm == "none":
            for m in self.modules():
                if isinstance(m, nn.Conv2d):
                    m.bias = nn.Parameter(torch.zeros(m.out_channels))
        self.to(device=device, dtype=dtype)  # only newer timm takes a device


def _cfg(architecture: str) -> Cfgs:
    names = dict(first_conv="conv1", classifier="fc")
    return cfgs(architecture, lambda side: -(-side // REDUCTION), **names, **CIFAR_MEAN_STD)


default_cfgs = generate_default_cfgs(
    {**_cfg("resnet18_cifar"), **_cfg("resnet34_cifar"), **_cfg("resnet50_cifar")}
)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for low resolution with `norm` "batch", "group", "layer" or "none"."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return build(ResNetCifar, "resnet18_cifar", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 for low resolution with `norm` "batch", "group", "layer" or "none"."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return build(ResNetCifar, "resnet34_cifar", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 for low resolution with `norm` "batch", "group", "layer" or "none"."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return build(ResNetCifar, "resnet50_cifar", pretrained, **dict(model_args, **kwargs))
