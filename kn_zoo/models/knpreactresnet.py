"""Pre-activation ResNets: kernel-normalized, and with batch, group, layer or no normalization to compare with.

In a KN-PreActResNet each norm + activation + convolution of a PreAct ResNet (He et al., Identity Mappings in Deep
Residual Networks, 2016) becomes activation + KNConv2d; a KernelNorm of single pixels stands before the head.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from timm.layers import BatchNormAct2d, DropPath, GroupNormAct
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from kn_zoo.layers import KernelNorm2d, KNConv2d

from ._base import ActLayer, Stage, StagedNetwork, activation, classifier_head, init_weights
from ._build import StateDict, build, cfgs, drop_path_rates

__all__ = ["PreActResNet"]

Norm = Literal["kernel", "batch", "group", "layer", "none"]
Layer = Callable[..., nn.Module]


def norm_act(norm: Norm, channels: int, act: type[nn.Module], dd: dict[str, Any]) -> nn.Module:
    """What stands before a convolution: the norm if it has a layer of its own, and the activation."""
    if norm == "batch":
        return BatchNormAct2d(channels, act_layer=act).to(**dd)
    if norm == "group":  # 32 groups, but never a group of one channel, which would erase it
        return GroupNormAct(channels, num_groups=min(32, channels // 2), act_layer=act).to(**dd)
    if norm == "layer":
        return GroupNormAct(channels, num_groups=1, act_layer=act).to(**dd)
    return act()


class PreActBasic(nn.Module):
    """Two 3x3 convolutions, each after its activation; the shortcut starts at the activated input."""

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
        self.conv1 = conv(
            in_chs, width, 3, stride=stride, padding=dilation[0], dilation=dilation[0]
        )
        self.pre2 = pre(width)
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
        self.conv1 = conv(in_chs, width, 1)
        self.pre2 = pre(width)
        self.conv2 = conv(width, width, 3, stride=stride, padding=dilation[0], dilation=dilation[0])
        self.pre3 = pre(width)
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


class PreActResNet(StagedNetwork):
    """Pre-activation ResNet.

    Args:
        block: PreActBasic or PreActBottleneck.
        depths: blocks a stage.
        widths: channels inside the blocks of each stage.
        small_stem: a 3x3 convolution for low resolution, instead of 7x7 stride 2 and a max pool.
        norm: "kernel", "batch", "group" (32 groups), "layer" (one group) or "none".
        output_stride: input pixels a pixel of the last map, at most; beyond it stages dilate instead of striding,
            and every output_stride-th value is that of the strided network.
        dropout_p: probability of the layers' own dropout, in [0, 1); the last KernelNorm has five times it, up to
            0.5. For norm="kernel" only, as is `inference_statistics`.
    """

    def __init__(
        self,
        block: type[PreActBasic] | type[PreActBottleneck],
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
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        act = activation(act_layer)
        pre = partial(norm_act, norm, act=act, dd=dd)
        if norm == "kernel":
            statistics = dict(inference_statistics=inference_statistics, **dd)
            conv: Layer = partial(KNConv2d, dropout_p=dropout_p, **statistics)
        elif norm in ("batch", "group", "layer", "none"):
            conv = partial(nn.Conv2d, bias=norm == "none", **dd)
        else:
            raise ValueError(
                f"unknown norm {norm!r}: use 'kernel', 'batch', 'group', 'layer' or 'none'"
            )

        chs, reduction, dilation = widths[0], 1 if small_stem else 4, 1
        if output_stride < reduction or output_stride & (output_stride - 1):
            raise ValueError(
                f"output_stride {output_stride}: use a power of two from {reduction} upward"
            )
        feature_info = [] if small_stem else [dict(num_chs=chs, reduction=2, module="stem")]
        stages = []
        for i, (width, rates) in enumerate(
            zip(widths, drop_path_rates(drop_path_rate, depths), strict=True)
        ):
            stride, before = 1 if i == 0 else 2, dilation
            if reduction * stride > output_stride:
                stride, dilation = 1, dilation * stride
            blocks = []
            for j, drop in enumerate(rates):
                dilations = (before if j == 0 else dilation, dilation)
                blocks.append(
                    block(chs, width, stride if j == 0 else 1, dilations, conv, pre, drop)
                )
                chs = width * block.expansion
            reduction *= stride
            stages.append(Stage(blocks))
            feature_info.append(dict(num_chs=chs, reduction=reduction, module=f"stages.{i}"))

        last = pre(chs)
        if norm == "kernel":
            last = nn.Sequential(
                KernelNorm2d(1, dropout_p=min(5 * dropout_p, 0.5), **statistics), last
            )
        super().__init__(
            stem=conv(in_chans, widths[0], 3, padding=1)
            if small_stem
            else conv(in_chans, widths[0], 7, stride=2, padding=3),
            pool=None if small_stem else nn.MaxPool2d(3, stride=2, padding=1),
            stages=stages,
            feature_info=feature_info,
            norm=last,
            head=classifier_head(chs, num_classes, global_pool, drop_rate, dd),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=_reduction(len(depths), small_stem),
        )
        init_weights(self)


def _reduction(stages: int, small_stem: bool) -> int:
    return 2 ** (stages - 1) * (1 if small_stem else 4)


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


IMAGENET = dict(
    input_size=(3, 224, 224),
    num_classes=1000,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bilinear",
    crop_pct=0.875,
)
# Kernel-normalized networks see images in [0, 1] without mean and deviation.
CIFAR = dict(
    input_size=(3, 32, 32),
    num_classes=100,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    interpolation="bilinear",
    crop_pct=1.0,
)
CIFAR_MEAN_STD = dict(CIFAR, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))


def _cfg(architecture: str, reduction: int, **defaults: Any) -> dict[str, dict[str, Any]]:
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


def _create(variant: str, pretrained: bool, norm: Norm, **kwargs: Any) -> nn.Module:
    small_stem = kwargs["small_stem"] = variant.endswith("_cifar")
    maps = len(kwargs["depths"]) + (not small_stem)
    return build(
        PreActResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(maps))),
        norm=norm,
        **kwargs,
    )


RESNET18 = dict(block=PreActBasic, depths=(2, 2, 2, 2))
RESNET34 = dict(block=PreActBasic, depths=(3, 4, 6, 3))
RESNET50 = dict(block=PreActBottleneck, depths=(3, 4, 6, 3))
RESNET20 = dict(block=PreActBasic, depths=(3, 3, 3), widths=(16, 32, 64))


@register_model
def knpreactresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-18."""
    return _create("knpreactresnet18", pretrained, "kernel", **dict(RESNET18, **kwargs))


@register_model
def knpreactresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-34."""
    return _create("knpreactresnet34", pretrained, "kernel", **dict(RESNET34, **kwargs))


@register_model
def knpreactresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-50."""
    return _create("knpreactresnet50", pretrained, "kernel", **dict(RESNET50, **kwargs))


@register_model
def knpreactresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-18 for low resolution."""
    return _create("knpreactresnet18_cifar", pretrained, "kernel", **dict(RESNET18, **kwargs))


@register_model
def knpreactresnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-34 for low resolution."""
    return _create("knpreactresnet34_cifar", pretrained, "kernel", **dict(RESNET34, **kwargs))


@register_model
def knpreactresnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-50 for low resolution."""
    return _create("knpreactresnet50_cifar", pretrained, "kernel", **dict(RESNET50, **kwargs))


@register_model
def knpreactresnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-20 (16-32-64 channels)."""
    return _create("knpreactresnet20_cifar", pretrained, "kernel", **dict(RESNET20, **kwargs))


@register_model
def preactresnet18(pretrained: bool = False, norm: Norm = "batch", **kwargs: Any) -> nn.Module:
    """PreActResNet-18 with `norm` "batch", "group", "layer" or "none"."""
    return _create("preactresnet18", pretrained, norm, **dict(RESNET18, **kwargs))


@register_model
def preactresnet34(pretrained: bool = False, norm: Norm = "batch", **kwargs: Any) -> nn.Module:
    """PreActResNet-34 with `norm` "batch", "group", "layer" or "none"."""
    return _create("preactresnet34", pretrained, norm, **dict(RESNET34, **kwargs))


@register_model
def preactresnet50(pretrained: bool = False, norm: Norm = "batch", **kwargs: Any) -> nn.Module:
    """PreActResNet-50 with `norm` "batch", "group", "layer" or "none"."""
    return _create("preactresnet50", pretrained, norm, **dict(RESNET50, **kwargs))


@register_model
def preactresnet18_cifar(
    pretrained: bool = False, norm: Norm = "batch", **kwargs: Any
) -> nn.Module:
    """PreActResNet-18 for low resolution with `norm` "batch", "group", "layer" or "none"."""
    return _create("preactresnet18_cifar", pretrained, norm, **dict(RESNET18, **kwargs))


@register_model
def preactresnet34_cifar(
    pretrained: bool = False, norm: Norm = "batch", **kwargs: Any
) -> nn.Module:
    """PreActResNet-34 for low resolution with `norm` "batch", "group", "layer" or "none"."""
    return _create("preactresnet34_cifar", pretrained, norm, **dict(RESNET34, **kwargs))


@register_model
def preactresnet50_cifar(
    pretrained: bool = False, norm: Norm = "batch", **kwargs: Any
) -> nn.Module:
    """PreActResNet-50 for low resolution with `norm` "batch", "group", "layer" or "none"."""
    return _create("preactresnet50_cifar", pretrained, norm, **dict(RESNET50, **kwargs))


@register_model
def preactresnet20_cifar(
    pretrained: bool = False, norm: Norm = "batch", **kwargs: Any
) -> nn.Module:
    """PreActResNet-20 (16-32-64 channels) with `norm` "batch", "group", "layer" or "none"."""
    return _create("preactresnet20_cifar", pretrained, norm, **dict(RESNET20, **kwargs))
