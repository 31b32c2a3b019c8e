"""KNResNet-18, -34 and -50: residual networks of activation + KNConv2d, most of them 2x2.

Nasirigerdeh, Torkzadehmahani, Rueckert, Kaissis: Kernel Normalized Convolutional Networks, TMLR
2024. Max pooling after a convolution of stride 1 halves the resolution.
"""

import re
from collections import OrderedDict
from itertools import count
from typing import Any, NamedTuple

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._base import (
    ActLayer,
    KNLayers,
    Stage,
    StagedNetwork,
    StageGeometry,
    classifier_head,
    drop_path,
    init_weights,
    max_pool,
    resnet_stem,
    stage_geometries,
)
from ._build import CIFAR, IMAGENET, Cfgs, StateDict, build, cfgs, drop_path_rates, network_args

__all__ = ["KNResNet"]

NECK_CHANNELS = 512


class KNBasic(nn.Module):
    """2x2 convolution with padding 1 (one pixel more), 2x2 convolution without (one less)."""

    def __init__(self, layers: KNLayers, chs: int, inner: int, dilation: int, drop: float) -> None:
        super().__init__()
        self.act1 = layers.act()
        self.conv1, self.act2 = layers.conv_norm_act(
            chs, inner, 2, padding=dilation, dilation=dilation
        )
        self.conv2 = layers.conv(inner, chs, 2, dilation=dilation)
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act1(x))  # (N, C, H, W) -> (N, inner, H + 1, W + 1)
        y = self.conv2(self.act2(y))  # -> (N, C, H, W)
        return self.drop_path(y) + x


class KNBottleneck(nn.Module):
    """KNBasic with a 3x3 convolution between the two, where there are fewest channels.

    `kernel_size` is that of the first and last convolution: 2, or 1 (no padding).
    """

    def __init__(
        self,
        layers: KNLayers,
        chs: int,
        inner: int,
        dilation: int,
        drop: float,
        kernel_size: int,
    ) -> None:
        super().__init__()
        d = dilation
        self.act1 = layers.act()
        self.conv1, self.act2 = layers.conv_norm_act(
            chs, inner, kernel_size, padding=d * (kernel_size - 1), dilation=d
        )
        self.conv2, self.act3 = layers.conv_norm_act(inner, inner, 3, padding=d, dilation=d)
        self.conv3 = layers.conv(inner, chs, kernel_size, dilation=d)
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act1(x))
        y = self.conv2(self.act2(y))
        y = self.conv3(self.act3(y))
        return self.drop_path(y) + x


class Transition(NamedTuple):
    """Convolution between two stages; padding is (left, right, top, bottom)."""

    kernel_size: int
    padding: tuple[int, int, int, int]


def transitions(bottleneck: bool, wide_padding: bool) -> list[Transition]:
    """Return the three transitions; `wide_padding` makes the last map one pixel larger."""
    last = Transition(2, (2, 1, 2, 1) if wide_padding else (1, 0, 1, 0))
    return [
        Transition(2, (1, 0, 1, 0)),
        Transition(2, (0, 1, 0, 1)),
        Transition(1, (0, 0, 0, 0)) if bottleneck else last,
    ]


def map_sides(side: int, small_stem: bool, bottleneck: bool) -> list[int]:
    """Return the sides of the stages' maps and of the neck's two, in pixels, without `dense_maps`.

    A number below 1 means that the input is too small.
    """
    sides = [side if small_stem else -(-side // 4)]
    for transition in transitions(bottleneck, wide_padding=not small_stem):
        left, right = transition.padding[:2]
        sides.append((sides[-1] + left + right + 1 - transition.kernel_size) // 2)
    if not bottleneck:
        sides.append(sides[-1] // 2)
        sides.append(sides[-1] + (1 if small_stem else -1))
    return sides


def min_side(maps: int, small_stem: bool, bottleneck: bool) -> int:
    """Return the smallest input side, in pixels, for which the first maps of `map_sides` exist."""
    return next(s for s in count(1) if min(map_sides(s, small_stem, bottleneck)[:maps]) > 0)


class KNResNet(StagedNetwork):
    """Kernel-normalized residual network.

    Each stage halves the map, rounding down. The published padding makes the last map of an
    ImageNet KNResNet-18 or -34 one pixel larger than that. In these two networks a neck (max pool
    and 2x2 convolution) precedes the last norm and the classifier.

    Args:
        depths: number of blocks in each stage.
        channels: channels between the blocks of each stage.
        inner: channels inside the blocks of each stage.
        bottleneck: use blocks of three convolutions, with 1x1 convolutions in the last stage and in
            the transition to it, and no neck.
        small_stem: use a 3x3 convolution (low resolution) instead of 7x7 stride 2 and a max pool.
        output_stride: largest reduction of the stages' maps; further stages and the neck dilate
            instead of striding. The maps contain the values of the strided network.
        dense_maps: make every map exactly ceil(input / reduction) pixels, for dense prediction;
            `features_only=True` sets it. Parameters are the same, the last map is not: it is
            padded by (1, 0, 1, 0) instead of (2, 1, 2, 1).
        dropout_p: dropout probability of the layers' statistics, in [0, 1); the last KernelNorm
            uses min(5 * dropout_p, 0.25).
        weight_standardization, stem_norm: as in `PreActResNet`.
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
        dense_maps: bool = False,
        act_layer: ActLayer = "relu",
        dropout_p: float = 0.05,
        inference_statistics: str = "expected",
        dropout: str = "mask",
        weight_standardization: bool = False,
        stem_norm: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layers = KNLayers(
            act_layer,
            dropout_p,
            inference_statistics,
            dropout,
            device,
            dtype,
            weight_standardization,
            stem_norm,
        )
        chs = channels[0]
        stem, pool, feature_info = resnet_stem(layers, in_chans, chs, small_stem)
        geometries = stage_geometries(1 if small_stem else 4, len(depths), output_stride)
        between = [None, *transitions(bottleneck, not (small_stem or dense_maps))]
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (geometry, transition) in enumerate(zip(geometries, between, strict=True)):
            downsample = None
            if transition:
                downsample = _downsample(layers, chs, channels[i], transition, geometry, dense_maps)
            chs = channels[i]
            blocks: list[nn.Module] = []
            for rate in rates[i]:
                if bottleneck:
                    kernel_size = transition.kernel_size if transition else 2
                    block = (chs, inner[i], geometry.dilation, rate, kernel_size)
                    blocks.append(KNBottleneck(layers, *block))
                else:
                    blocks.append(KNBasic(layers, chs, inner[i], geometry.dilation, rate))
            stages.append(Stage(blocks, downsample))
            info = dict(num_chs=chs, reduction=geometry.reduction, module=f"stages.{i}")
            feature_info.append(info)

        neck = None
        if not bottleneck:
            neck = _neck(layers, chs, padding=int(small_stem), dilation=geometries[-1].dilation)
            chs = NECK_CHANNELS
        super().__init__(
            stem=stem,
            pool=pool,
            stages=stages,
            feature_info=feature_info,
            neck=neck,
            norm=nn.Sequential(layers.norm(5, 0.25), layers.act()),
            head=classifier_head(
                chs, num_classes, global_pool, drop_rate, dict(device=device, dtype=dtype)
            ),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=1 if dense_maps else min_side(4, small_stem, bottleneck),
            neck_min_size=min_side(6, small_stem, bottleneck),
        )
        init_weights(self)


def _downsample(
    layers: KNLayers,
    in_chs: int,
    out_chs: int,
    transition: Transition,
    geometry: StageGeometry,
    ceil_mode: bool,
) -> nn.Sequential:
    d = geometry.first_dilation
    padding = tuple(d * p for p in transition.padding)
    return nn.Sequential(
        OrderedDict(
            act=layers.act(),
            conv=layers.conv(in_chs, out_chs, transition.kernel_size, padding=padding, dilation=d),
            pool=max_pool(geometry.stride, d, ceil_mode),
        )
    )


def _neck(layers: KNLayers, in_chs: int, padding: int, dilation: int) -> nn.Sequential:
    d = 1 if dilation == 1 else 2 * dilation  # after a dilated pool
    return nn.Sequential(
        OrderedDict(
            pool=max_pool(2 if d == 1 else 1, dilation),
            act=layers.act(),
            conv=layers.conv(in_chs, NECK_CHANNELS, 2, padding=d * padding, dilation=d),
        )
    )


def checkpoint_filter_fn(state_dict: StateDict, model: KNResNet) -> StateDict:
    """Rename keys of the published code (block0.0, res_block1, trans_block1); keep others."""
    state_dict = state_dict.get("model", state_dict)
    if "block0.0.weight" not in state_dict:
        return state_dict
    blocks = []
    for i, stage in enumerate(model.stages.children()):
        depth = len(stage.get_submodule("blocks")._modules)
        blocks += [f"stages.{i}.blocks.{j}." for j in range(depth)]
    return {_our_name(key, blocks): value for key, value in state_dict.items()}


def _our_name(key: str, blocks: list[str]) -> str:
    """Return our key; `blocks` are our prefixes of the blocks that the published code numbers."""
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


def _create(
    variant: str, pretrained: bool, architecture: dict[str, Any], **kwargs: Any
) -> nn.Module:
    small_stem = kwargs["small_stem"] = variant.endswith("_cifar")
    kwargs.setdefault("dense_maps", kwargs.get("features_only", False))
    return build(
        KNResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(4 if small_stem else 5))),
        **network_args(variant, pretrained, architecture, kwargs),
    )


@register_model
def knresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-18."""
    return _create("knresnet18", pretrained, RESNET18, **kwargs)


@register_model
def knresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-34."""
    return _create("knresnet34", pretrained, RESNET34, **kwargs)


@register_model
def knresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-50."""
    return _create("knresnet50", pretrained, RESNET50, **kwargs)


@register_model
def knresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-18 for low resolution."""
    return _create("knresnet18_cifar", pretrained, RESNET18, **kwargs)


@register_model
def knresnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-34 for low resolution."""
    return _create("knresnet34_cifar", pretrained, RESNET34, **kwargs)


@register_model
def knresnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-50 for low resolution."""
    return _create("knresnet50_cifar", pretrained, RESNET50, **kwargs)
