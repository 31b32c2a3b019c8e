"""KNResNet-18, -34 and -50: residual networks made of activation + KNConv2d, most of it 2x2.

Nasirigerdeh, Torkzadehmahani, Rueckert, Kaissis: Kernel Normalized Convolutional Networks, TMLR
2024. Resolution is halved by max pooling after a convolution of stride 1.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from timm.layers import DropPath
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
    max_pool,
    resnet_stem,
    scales,
)
from ._build import CIFAR, IMAGENET, Cfgs, StateDict, build, cfgs, drop_path_rates

__all__ = ["KNResNet"]

Conv = Callable[..., nn.Module]
Act = Callable[[], nn.Module]
NECK_CHANNELS = 512


class KNBasic(nn.Module):
    """2x2 convolution with padding 1 (one pixel more), 2x2 without (one less)."""

    def __init__(self, chs: int, inner: int, dilation: int, conv: Conv, act: Act, drop: float):
        super().__init__()
        self.act1 = act()
        conv1 = conv(chs, inner, 2, padding=dilation, dilation=dilation)
        self.conv1, self.act2 = fused(conv1, act())
        self.conv2 = conv(inner, chs, 2, dilation=dilation)
        self.drop_path = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act1(x))  # (N, C, H, W) -> (N, inner, H + 1, W + 1)
        y = self.conv2(self.act2(y))
        return self.drop_path(y) + x


class KNBottleneck(nn.Module):
    """The same with a 3x3 convolution between, where there are fewest channels.

    `kernel_size` is that of the outer two convolutions: 2, or 1, which needs no padding.
    """

    def __init__(
        self,
        chs: int,
        inner: int,
        dilation: int,
        conv: Conv,
        act: Act,
        drop: float,
        kernel_size: int,
    ) -> None:
        super().__init__()
        d = dilation
        self.act1 = act()
        conv1 = conv(chs, inner, kernel_size, padding=d * (kernel_size - 1), dilation=d)
        self.conv1, self.act2 = fused(conv1, act())
        self.conv2, self.act3 = fused(conv(inner, inner, 3, padding=d, dilation=d), act())
        self.conv3 = conv(inner, chs, kernel_size, dilation=d)
        self.drop_path = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act1(x))
        y = self.conv2(self.act2(y))
        y = self.conv3(self.act3(y))
        return self.drop_path(y) + x


class Way(NamedTuple):
    """The convolution between two stages; padding is (left, right, top, bottom)."""

    kernel_size: int
    padding: tuple[int, int, int, int]


def ways(small_stem: bool, bottleneck: bool) -> list[Way]:
    """The three ways between the stages."""
    last = Way(2, (1, 0, 1, 0) if small_stem else (2, 1, 2, 1))
    return [
        Way(2, (1, 0, 1, 0)),
        Way(2, (0, 1, 0, 1)),
        Way(1, (0, 0, 0, 0)) if bottleneck else last,
    ]


def map_sides(side: int, small_stem: bool, bottleneck: bool) -> list[int]:
    """Sides of the stages' maps and the neck's two, in pixels; below 1: the input is too small."""
    sides = [side if small_stem else -(-side // 4)]
    for way in ways(small_stem, bottleneck):
        sides.append((sides[-1] + way.padding[0] + way.padding[1] + 1 - way.kernel_size) // 2)
    if not bottleneck:
        sides.append(sides[-1] // 2)
        sides.append(sides[-1] + (1 if small_stem else -1))
    return sides


def min_side(maps: int, small_stem: bool, bottleneck: bool) -> int:
    """The smallest input side, in pixels, at which the first maps of `map_sides` exist."""
    return next(s for s in count(1) if min(map_sides(s, small_stem, bottleneck)[:maps]) > 0)


class KNResNet(StagedNetwork):
    """Kernel-normalized residual network.

    A stage's map is half as large as the one before, rounded down; the last stage's of an ImageNet
    KNResNet-18 or -34 is one pixel larger than that. The last norm and the classifier of these two
    see what the neck (max pool and 2x2 convolution) makes of it.

    Args:
        depths: blocks a stage.
        channels: between the blocks of each stage.
        inner: inside the blocks of each stage.
        bottleneck: blocks of three convolutions, 1x1 in the last stage and on the way there;
            there is no neck.
        small_stem: a 3x3 convolution for low resolution, instead of 7x7 stride 2 and a max pool.
        output_stride: at most so many input pixels a pixel of the stages' maps; from there on
            stages, and the neck, dilate instead of striding; the strided network's values are
            among theirs.
        dropout_p: probability of the layers' own dropout, in [0, 1); the last KernelNorm has five
            times it, up to 0.25.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        channels: tuple[int, ...],
        inner: tuple[int, ...],
        bottleneck: bool = False,
        small_stem: bool = False,
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
        conv: Conv = partial(KNConv2d, dropout_p=dropout_p, **statistics, **dd)
        act = activation(act_layer)
        chs = channels[0]
        stem, pool, feature_info = resnet_stem(conv, in_chans, chs, small_stem)
        stages = []
        rates = drop_path_rates(drop_path_rate, depths)
        plan = scales(1 if small_stem else 4, len(depths), output_stride)
        for i, (scale, way) in enumerate(
            zip(plan, [None, *ways(small_stem, bottleneck)], strict=True)
        ):
            downsample = _transition(chs, channels[i], way, scale, conv, act) if way else None
            chs = channels[i]
            block: Conv = KNBasic
            if bottleneck:
                block = partial(KNBottleneck, kernel_size=way.kernel_size if way else 2)
            blocks = [block(chs, inner[i], scale.dilation, conv, act, rate) for rate in rates[i]]
            stages.append(Stage(blocks, downsample))
            feature_info.append(dict(num_chs=chs, reduction=scale.reduction, module=f"stages.{i}"))

        neck = None
        if not bottleneck:
            neck, chs = _neck(chs, int(small_stem), plan[-1].dilation, conv, act), NECK_CHANNELS
        kernel_norm = KernelNorm2d(dropout_p=min(5 * dropout_p, 0.25), **statistics)
        super().__init__(
            stem=stem,
            pool=pool,
            stages=stages,
            feature_info=feature_info,
            neck=neck,
            norm=nn.Sequential(kernel_norm, act()),
            head=classifier_head(chs, num_classes, global_pool, drop_rate, dd),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=min_side(4, small_stem, bottleneck),
            neck_min_size=min_side(6, small_stem, bottleneck),
        )
        init_weights(self)


def _transition(
    in_chs: int, out_chs: int, way: Way, scale: Scale, conv: Conv, act: Act
) -> nn.Sequential:
    d = scale.first_dilation
    padding = tuple(d * p for p in way.padding)
    return nn.Sequential(
        OrderedDict(
            act=act(),
            conv=conv(in_chs, out_chs, way.kernel_size, padding=padding, dilation=d),
            pool=max_pool(scale.stride, d),
        )
    )


def _neck(in_chs: int, padding: int, dilation: int, conv: Conv, act: Act) -> nn.Sequential:
    d = 1 if dilation == 1 else 2 * dilation  # after a pool that does not stride
    return nn.Sequential(
        OrderedDict(
            pool=max_pool(2 if d == 1 else 1, dilation),
            act=act(),
            conv=conv(in_chs, NECK_CHANNELS, 2, padding=d * padding, dilation=d),
        )
    )


def checkpoint_filter_fn(state_dict: StateDict, model: KNResNet) -> StateDict:
    """Names of the published code (block0.0, res_block1, trans_block1) to ours; ours stay."""
    state_dict = state_dict.get("model", state_dict)
    if "block0.0.weight" not in state_dict:
        return state_dict
    blocks = []
    for i, stage in enumerate(model.stages.children()):
        depth = len(stage.get_submodule("blocks")._modules)
        blocks += [f"stages.{i}.blocks.{j}." for j in range(depth)]
    return {_our_name(key, blocks): value for key, value in state_dict.items()}


def _our_name(key: str, blocks: list[str]) -> str:
    """`blocks` are our prefixes of the blocks that the published code numbers from 1."""
    key = key.replace(".conv1x1.", ".")
    key = re.sub(r"^block0\.0\.", "stem.", key)
    key = re.sub(r"^res_block(\d+)\.", lambda m: blocks[int(m[1]) - 1], key)
    key = re.sub(r"^trans_block(\d+)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^conv_block_f\.", "neck.", key)
    return re.sub(r"^fc\.", "head.fc.", key)


RESNET18 = dict(depths=(2, 2, 1, 1), channels=(64, 256, 512, 724), inner=(256, 256, 512, 724))
RESNET34 = dict(depths=(4, 5, 3, 2), channels=(64, 256, 512, 512), inner=(256, 320, 640, 843))
RESNET50 = dict(
    depths=(4, 5, 4, 2), channels=(256, 512, 810, 2048), inner=(64, 128, 201, 512), bottleneck=True
)


def _cfg(architecture: str, small_stem: bool, bottleneck: bool) -> Cfgs:
    return cfgs(
        architecture,
        lambda side: map_sides(side, small_stem, bottleneck)[-1],
        first_conv="stem",
        classifier="head.fc",
        **(CIFAR if small_stem else IMAGENET),
    )


default_cfgs = generate_default_cfgs(
    {
        **_cfg("knresnet18", small_stem=False, bottleneck=False),
        **_cfg("knresnet34", small_stem=False, bottleneck=False),
        **_cfg("knresnet50", small_stem=False, bottleneck=True),
        **_cfg("knresnet18_cifar", small_stem=True, bottleneck=False),
        **_cfg("knresnet34_cifar", small_stem=True, bottleneck=False),
        **_cfg("knresnet50_cifar", small_stem=True, bottleneck=True),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    small_stem = kwargs["small_stem"] = variant.endswith("_cifar")
    return build(
        KNResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(4 if small_stem else 5))),
        **kwargs,
    )


@register_model
def knresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-18."""
    return _create("knresnet18", pretrained, **dict(RESNET18, **kwargs))


@register_model
def knresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-34."""
    return _create("knresnet34", pretrained, **dict(RESNET34, **kwargs))


@register_model
def knresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-50."""
    return _create("knresnet50", pretrained, **dict(RESNET50, **kwargs))


@register_model
def knresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-18 for low resolution."""
    return _create("knresnet18_cifar", pretrained, **dict(RESNET18, **kwargs))


@register_model
def knresnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-34 for low resolution."""
    return _create("knresnet34_cifar", pretrained, **dict(RESNET34, **kwargs))


@register_model
def knresnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-50 for low resolution."""
    return _create("knresnet50_cifar", pretrained, **dict(RESNET50, **kwargs))
