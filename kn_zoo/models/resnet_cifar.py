"""ResNet-18, -34 and -50 for low resolution, the baselines of the kernel-normalized networks.

timm's ResNet with a 3x3 stem of stride 1 and a choice of norms.
"""

from functools import partial
from typing import Any, Literal

import torch
from timm.layers import GroupNorm, GroupNorm1
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from kn_zoo.layers import LocalContextNorm

from ._base import Features, check_size
from ._build import CIFAR_MEAN_STD, Cfgs, build, cfgs, network_args

__all__ = ["ResNetCifar"]

Norm = Literal["batch", "group", "layer", "local_context", "none"]
torch.fx.wrap("check_size")  # fx wraps a function in each module that calls it
NORMS: dict[str, Any] = dict(
    batch=nn.BatchNorm2d,
    group=GroupNorm,
    layer=GroupNorm1,
    local_context=partial(LocalContextNorm, window_size=16),
    none=nn.Identity,
)
REDUCTION = 8  # of the last stage; 32 in timm's ResNet


class Stem(nn.Conv2d):
    """3x3 convolution that rejects images smaller than one pixel of the last map."""

    def forward(self, x: Tensor) -> Tensor:
        x = check_size(x, 8)  # REDUCTION as a literal: TorchScript has no globals
        return self._conv_forward(x, self.weight, self.bias)


class ResNetCifar(ResNet):
    """Low-resolution ResNet. `feature_info` lists the four stages.

    Args:
        block: timm's BasicBlock or Bottleneck.
        layers: number of blocks in each stage.
        norm: "batch", "group" (32 groups), "layer" (one group), "local_context" (2 channels per
            group, windows of 16x16 pixels) or "none" (convolutions have biases).
        output_stride: largest reduction of the stages' maps: 2, 4, or 8 and more.
        kwargs: arguments of timm's ResNet.
    """

    def __init__(
        self,
        block: Any,
        layers: tuple[int, ...],
        norm: Norm = "batch",
        in_chans: int = 3,
        output_stride: int = REDUCTION,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: use one of {tuple(NORMS)}")
        if output_stride not in (2, 4, 8, 16, 32):
            raise ValueError(f"output_stride={output_stride}: use 2, 4, 8, 16 or 32")
        super().__init__(
            block,
            layers,
            in_chans=in_chans,
            output_stride=4 * min(output_stride, REDUCTION),
            norm_layer=NORMS[norm],
            **kwargs,
        )
        self.in_chans = in_chans
        width = self.feature_info[0]["num_chs"]
        stem = Stem(in_chans, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.conv1, self.maxpool = stem, nn.Identity()  # type: ignore[assignment]
        # Without timm's first map, which has the resolution of the second: one map per resolution.
        self.feature_info: Features = self.feature_info[1:]
        for info in self.feature_info:
            info["reduction"] //= 4
        if norm == "none":
            for m in self.modules():
                if isinstance(m, nn.Conv2d):
                    m.bias = nn.Parameter(torch.zeros(m.out_channels))
        self.to(device=device, dtype=dtype)  # older timm has no device argument

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """See `ResNet`; `indices` select from the four stages."""
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        shifted = [i + 1 for i in take_indices]  # timm counts from the stem
        return super().forward_intermediates(x, shifted, *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """See `ResNet`; `indices` select from the four stages."""
        take_indices, last = feature_take_indices(len(self.feature_info), indices)
        super().prune_intermediate_layers([i + 1 for i in take_indices], prune_norm, prune_head)
        if last < len(self.feature_info) - 1:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return take_indices


def _cfg(architecture: str) -> Cfgs:
    names = dict(first_conv="conv1", classifier="fc")
    return cfgs(architecture, lambda side: -(-side // REDUCTION), **names, **CIFAR_MEAN_STD)


default_cfgs = generate_default_cfgs(
    {**_cfg("resnet18_cifar"), **_cfg("resnet34_cifar"), **_cfg("resnet50_cifar")}
)


def _create(
    variant: str, pretrained: bool, architecture: dict[str, Any], **kwargs: Any
) -> nn.Module:
    # timm's list of submodules instead of `FeatureMaps`: TorchScript compiles it.
    feature_cfg = dict(feature_cls="list", out_indices=(0, 1, 2, 3))
    kwargs = network_args(variant, pretrained, architecture, kwargs)
    return build(ResNetCifar, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for low resolution; `norm`: see ResNetCifar, default "batch"."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create("resnet18_cifar", pretrained, model_args, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 for low resolution; `norm`: see ResNetCifar, default "batch"."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create("resnet34_cifar", pretrained, model_args, **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 for low resolution; `norm`: see ResNetCifar, default "batch"."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create("resnet50_cifar", pretrained, model_args, **kwargs)
