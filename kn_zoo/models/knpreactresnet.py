"""Pre-activation ResNets: kernel-normalized, and with batch, group, layer or no normalization.

In a KN-PreActResNet each norm + activation + convolution of a PreAct ResNet (He et al., Identity
Mappings in Deep Residual Networks, 2016) becomes activation + KNConv2d; a KernelNorm of single
pixels stands before the head.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from timm.layers import BatchNormAct2d, DropPath, GroupNormAct
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from kn_zoo.layers import KernelNorm2d, KNConv2d

from ._base import (
    ActLayer,
    Scale,
    Stage,
    StagedNetwork,
    activation,
    classifier_head,
    fused,
    init_weights,
    resnet_stem,
    scales,
)
from ._build import (
    CIFAR,
    CIFAR_MEAN_STD,
    IMAGENET,
    Cfgs,
    StateDict,
    build,
    cfgs,
    drop_path_rates,
)

__all__ = ["PreActResNet"]

Norm = Literal["kernel", "batch", "group", "layer", "none"]
NORMS = ("batch", "group", "layer", "none")  # of the baselines
Layer = Callable[..., nn.Module]


def norm_act(norm: Norm, channels: int, act: type[nn.Module], dd: dict[str, Any]) -> nn.Module:
    """What precedes a convolution: the norm, if it is a layer of its own, and the activation."""
    if norm == "batch":
        return BatchNormAct2d(channels, act_layer=act).to(**dd)
    if norm == "group":  # 32 groups, but never a group of one channel, which would erase it
        return GroupNormAct(channels, num_groups=min(32, channels // 2), act_layer=act).to(**dd)
    if norm == "layer":
        return GroupNormAct(channels, num_groups=1, act_layer=act).to(**dd)
    return act()


class PreActBasic(nn.Module):
    """Two 3x3 convolutions; a shortcut that convolves starts at the activated input."""

    expansion = 1

    def __init__(
        self,
        in_chs: int,
        width: int,
        stride: int,
        dilation: tuple[int, int],
        conv: Layer,
        pre: Layer,
        drop: float,
    ) -> None:
        super().__init__()
        self.pre1 = pre(in_chs)
        conv1 = conv(in_chs, width, 3, stride=stride, padding=dilation[0], dilation=dilation[0])
        self.conv1, self.pre2 = fused(conv1, pre(width))
        self.conv2 = conv(width, width, 3, padding=dilation[1], dilation=dilation[1])
        self.shortcut = None
        if stride != 1 or in_chs != width:
            self.shortcut = conv(in_chs, width, 1, stride=stride)
        self.drop_path = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre1(x)
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.conv2(self.pre2(self.conv1(y)))
        return self.drop_path(y) + x


class PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide."""

    expansion = 4

    def __init__(
        self,
        in_chs: int,
        width: int,
        stride: int,
        dilation: tuple[int, int],
        conv: Layer,
        pre: Layer,
        drop: float,
    ) -> None:
        super().__init__()
        out_chs = width * self.expansion
        self.pre1 = pre(in_chs)
        self.conv1, self.pre2 = fused(conv(in_chs, width, 1), pre(width))
        conv2 = conv(width, width, 3, stride=stride, padding=dilation[0], dilation=dilation[0])
        self.conv2, self.pre3 = fused(conv2, pre(width))
        self.conv3 = conv(width, out_chs, 1)
        self.shortcut = None
        if stride != 1 or in_chs != out_chs:
            self.shortcut = conv(in_chs, out_chs, 1, stride=stride)
        self.drop_path = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre1(x)
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.conv2(self.pre2(self.conv1(y)))
        y = self.conv3(self.pre3(y))
        return self.drop_path(y) + x


Block = type[PreActBasic] | type[PreActBottleneck]


class PreActResNet(StagedNetwork):
    """Pre-activation ResNet.

    Args:
        block: PreActBasic or PreActBottleneck.
        depths: blocks a stage.
        widths: channels inside the blocks of each stage.
        small_stem: a 3x3 convolution for low resolution, instead of 7x7 stride 2 and a max pool.
        norm: "kernel", "batch", "group" (32 groups), "layer" (one group) or "none".
        output_stride: at most so many input pixels a pixel of the last map; from there on stages
            dilate instead of striding, and the strided network's values are among theirs.
        dropout_p: probability of the layers' own dropout, in [0, 1); the last KernelNorm has five
            times it, up to 0.5. For norm="kernel" only, as is `inference_statistics`.
    """

    def __init__(
        self,
        block: Block,
        depths: tuple[int, ...],
        widths: tuple[int, ...] = (64, 128, 256, 512),
        small_stem: bool = False,
        norm: Norm = "kernel",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        act_layer: ActLayer = "relu",
        dropout_p: float = 0.05,
        inference_statistics: str = "expected",
        dropout: str = "mask",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        statistics: dict[str, Any] = dict(
            inference_statistics=inference_statistics, dropout=dropout
        )
        pre: Layer = partial(norm_act, norm, act=activation(act_layer), dd=dd)
        if norm == "kernel":
            conv: Layer = partial(KNConv2d, dropout_p=dropout_p, **statistics, **dd)
        elif norm in NORMS:
            conv = partial(nn.Conv2d, bias=norm == "none", **dd)
        else:
            raise ValueError(f"norm={norm!r}: use 'kernel', 'batch', 'group', 'layer' or 'none'")
        chs = widths[0]
        stem, pool, feature_info = resnet_stem(conv, in_chans, chs, small_stem)
        stages = []
        rates = drop_path_rates(drop_path_rate, depths)
        for i, scale in enumerate(scales(1 if small_stem else 4, len(depths), output_stride)):
            stages.append(_stage(block, chs, widths[i], scale, rates[i], conv, pre))
            chs = widths[i] * block.expansion
            info = dict(num_chs=chs, reduction=scale.reduction, module=f"stages.{i}")
            feature_info.append(info)

        norm_layer = pre(chs)
        if norm == "kernel":
            kernel_norm = KernelNorm2d(dropout_p=min(5 * dropout_p, 0.5), **statistics)
            norm_layer = nn.Sequential(kernel_norm, norm_layer)
        super().__init__(
            stem=stem,
            pool=pool,
            stages=stages,
            feature_info=feature_info,
            norm=norm_layer,
            head=classifier_head(chs, num_classes, global_pool, drop_rate, dd),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=(1 if small_stem else 4) * 2 ** (len(depths) - 1),
        )
        init_weights(self)


def _stage(
    block: Block,
    in_chs: int,
    width: int,
    scale: Scale,
    rates: list[float],
    conv: Layer,
    pre: Layer,
) -> Stage:
    """As many blocks as `rates`, the first of which strides."""
    first, dilation = scale.first_dilation, scale.dilation
    chs = width * block.expansion
    blocks = [block(in_chs, width, scale.stride, (first, dilation), conv, pre, rates[0])]
    blocks += [block(chs, width, 1, (dilation, dilation), conv, pre, rate) for rate in rates[1:]]
    return Stage(blocks)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Names of the published code (conv1, layer2.0.shortcut.0, fc) to ours; ours stay."""
    state_dict = state_dict.get("model", state_dict)
    if "conv1.weight" not in state_dict:
        return state_dict
    return {_our_name(key): value for key, value in state_dict.items()}


def _our_name(key: str) -> str:
    key = re.sub(r"^conv1\.", "stem.", key)
    key = re.sub(r"^layer(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    return re.sub(r"^fc\.", "head.fc.", key.replace(".shortcut.0.", ".shortcut."))


def _cfg(architecture: str, reduction: int, **defaults: Any) -> Cfgs:
    names = dict(first_conv="stem", classifier="head.fc")
    return cfgs(architecture, lambda side: -(-side // reduction), **names, **defaults)


default_cfgs = generate_default_cfgs(
    {
        **_cfg("knpreactresnet18", 32, **IMAGENET),
        **_cfg("knpreactresnet34", 32, **IMAGENET),
        **_cfg("knpreactresnet50", 32, **IMAGENET),
        **_cfg("knpreactresnet18_cifar", 8, **CIFAR),
        **_cfg("knpreactresnet34_cifar", 8, **CIFAR),
        **_cfg("knpreactresnet50_cifar", 8, **CIFAR),
        **_cfg("knpreactresnet20_cifar", 4, **CIFAR),
        **_cfg("preactresnet18", 32, **IMAGENET),
        **_cfg("preactresnet34", 32, **IMAGENET),
        **_cfg("preactresnet50", 32, **IMAGENET),
        **_cfg("preactresnet18_cifar", 8, **CIFAR_MEAN_STD),
        **_cfg("preactresnet34_cifar", 8, **CIFAR_MEAN_STD),
        **_cfg("preactresnet50_cifar", 8, **CIFAR_MEAN_STD),
        **_cfg("preactresnet20_cifar", 4, **CIFAR_MEAN_STD),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    baseline = not variant.startswith("kn")
    if baseline:
        _check_baseline(variant, kwargs)
    elif "norm" in kwargs:
        raise TypeError(f"{variant} got an unexpected argument 'norm': use {variant[2:]}")
    small_stem = kwargs["small_stem"] = variant.endswith("_cifar")
    maps = len(kwargs["depths"]) + (not small_stem)
    return build(
        PreActResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(maps))),
        defaults=dict(norm="batch" if baseline else "kernel"),
        **kwargs,
    )


def _check_baseline(variant: str, kwargs: dict[str, Any]) -> None:
    """A baseline has no kernel normalization, nor takes what only that has a use for."""
    if kwargs.get("norm") == "kernel":
        raise ValueError(f"norm='kernel': use kn{variant}")
    for name in ("dropout_p", "inference_statistics", "dropout"):
        if name in kwargs:
            raise TypeError(f"{variant} got an unexpected argument {name!r}: use kn{variant}")


RESNET18 = dict(block=PreActBasic, depths=(2, 2, 2, 2))
RESNET34 = dict(block=PreActBasic, depths=(3, 4, 6, 3))
RESNET50 = dict(block=PreActBottleneck, depths=(3, 4, 6, 3))
RESNET20 = dict(block=PreActBasic, depths=(3, 3, 3), widths=(16, 32, 64))


@register_model
def knpreactresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-18."""
    return _create("knpreactresnet18", pretrained, **dict(RESNET18, **kwargs))


@register_model
def knpreactresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-34."""
    return _create("knpreactresnet34", pretrained, **dict(RESNET34, **kwargs))


@register_model
def knpreactresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-50."""
    return _create("knpreactresnet50", pretrained, **dict(RESNET50, **kwargs))


@register_model
def knpreactresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-18 for low resolution."""
    return _create("knpreactresnet18_cifar", pretrained, **dict(RESNET18, **kwargs))


@register_model
def knpreactresnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-34 for low resolution."""
    return _create("knpreactresnet34_cifar", pretrained, **dict(RESNET34, **kwargs))


@register_model
def knpreactresnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-50 for low resolution."""
    return _create("knpreactresnet50_cifar", pretrained, **dict(RESNET50, **kwargs))


@register_model
def knpreactresnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-20 (16-32-64 channels)."""
    return _create("knpreactresnet20_cifar", pretrained, **dict(RESNET20, **kwargs))


@register_model
def preactresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-18; `norm`: "batch" (default), "group", "layer" or "none"."""
    return _create("preactresnet18", pretrained, **dict(RESNET18, **kwargs))


@register_model
def preactresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-34; `norm`: "batch" (default), "group", "layer" or "none"."""
    return _create("preactresnet34", pretrained, **dict(RESNET34, **kwargs))


@register_model
def preactresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-50; `norm`: "batch" (default), "group", "layer" or "none"."""
    return _create("preactresnet50", pretrained, **dict(RESNET50, **kwargs))


@register_model
def preactresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-18 for low resolution; `norm`: "batch" (default), "group", "layer" or "none"."""
    return _create("preactresnet18_cifar", pretrained, **dict(RESNET18, **kwargs))


@register_model
def preactresnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-34 for low resolution; `norm`: "batch" (default), "group", "layer" or "none"."""
    return _create("preactresnet34_cifar", pretrained, **dict(RESNET34, **kwargs))


@register_model
def preactresnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-50 for low resolution; `norm`: "batch" (default), "group", "layer" or "none"."""
    return _create("preactresnet50_cifar", pretrained, **dict(RESNET50, **kwargs))


@register_model
def preactresnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-20, 16-32-64 channels; `norm`: "batch" (default), "group", "layer", "none"."""
    return _create("preactresnet20_cifar", pretrained, **dict(RESNET20, **kwargs))
