"""Pre-activation ResNets with kernel normalization or another norm.

A KN-PreActResNet replaces each norm + activation + convolution of a PreAct ResNet (He et al.,
Identity Mappings in Deep Residual Networks, 2016) by activation + KNConv2d. A KernelNorm of single
pixels precedes the head.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import BatchNormAct2d, GroupNormAct
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from kn_zoo.layers import LocalContextNorm

from ._base import (
    ActLayer,
    KNLayers,
    Layers,
    Stage,
    StagedNetwork,
    StageGeometry,
    activation,
    classifier_head,
    drop_path,
    init_weights,
    resnet_stem,
    stage_geometries,
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
    network_args,
)

__all__ = ["PreActResNet"]

Norm = Literal["kernel", "batch", "group", "layer", "local_context", "none"]
BASELINE_NORMS = ("batch", "group", "layer", "local_context", "none")


@dataclass(frozen=True)
class BaselineLayers:
    """Layers of one network without kernel normalization; see `Layers`."""

    norm: Norm
    act_layer: ActLayer
    window_size: int  # of Local Context Normalization
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def conv(self, in_chs: int, out_chs: int, kernel_size: int, **geometry: Any) -> nn.Module:
        """Return an nn.Conv2d, with a bias if the network has no norm."""
        conv = nn.Conv2d(in_chs, out_chs, kernel_size, **geometry, bias=self.norm == "none")
        return conv.to(device=self.device, dtype=self.dtype)

    def stem(self, in_chs: int, out_chs: int, kernel_size: int, **geometry: Any) -> nn.Module:
        return self.conv(in_chs, out_chs, kernel_size, **geometry)

    def norm_act(self, channels: int) -> nn.Module:
        """Return the norm of `channels` channels and the activation after it."""
        act = activation(self.act_layer)
        norm_act: nn.Module
        if self.norm == "batch":
            norm_act = BatchNormAct2d(channels, act_layer=act)
        elif self.norm == "group":  # at least 2 channels per group: one would be instance norm
            norm_act = GroupNormAct(channels, num_groups=min(32, channels // 2), act_layer=act)
        elif self.norm == "layer":
            norm_act = GroupNormAct(channels, num_groups=1, act_layer=act)
        elif self.norm == "local_context":
            norm = LocalContextNorm(channels, window_size=self.window_size)
            norm_act = nn.Sequential(OrderedDict(norm=norm, act=act()))
        else:
            norm_act = act()
        return norm_act.to(device=self.device, dtype=self.dtype)

    def conv_norm_act(
        self, in_chs: int, out_chs: int, kernel_size: int, **geometry: Any
    ) -> tuple[nn.Module, nn.Module]:
        return self.conv(in_chs, out_chs, kernel_size, **geometry), self.norm_act(out_chs)


class PreActBasic(nn.Module):
    """Two 3x3 convolutions. A convolutional shortcut starts at the activated input."""

    expansion = 1

    def __init__(
        self,
        layers: Layers,
        in_chs: int,
        width: int,
        stride: int,
        dilation: tuple[int, int],
        drop: float,
    ) -> None:
        super().__init__()
        first, second = dilation
        self.pre1 = layers.norm_act(in_chs)
        self.conv1, self.pre2 = layers.conv_norm_act(
            in_chs, width, 3, stride=stride, padding=first, dilation=first
        )
        self.conv2 = layers.conv(width, width, 3, padding=second, dilation=second)
        self.shortcut = None
        if stride != 1 or in_chs != width:
            self.shortcut = layers.conv(in_chs, width, 1, stride=stride)
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre1(x)
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.conv2(self.pre2(self.conv1(y)))
        return self.drop_path(y) + x


class PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the last has four times the channels."""

    expansion = 4

    def __init__(
        self,
        layers: Layers,
        in_chs: int,
        width: int,
        stride: int,
        dilation: tuple[int, int],
        drop: float,
    ) -> None:
        super().__init__()
        out_chs = width * self.expansion
        first = dilation[0]
        self.pre1 = layers.norm_act(in_chs)
        self.conv1, self.pre2 = layers.conv_norm_act(in_chs, width, 1)
        self.conv2, self.pre3 = layers.conv_norm_act(
            width, width, 3, stride=stride, padding=first, dilation=first
        )
        self.conv3 = layers.conv(width, out_chs, 1)
        self.shortcut = None
        if stride != 1 or in_chs != out_chs:
            self.shortcut = layers.conv(in_chs, out_chs, 1, stride=stride)
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre1(x)
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.conv2(self.pre2(self.conv1(y)))
        y = self.conv3(self.pre3(y))
        return self.drop_path(y) + x


KERNEL_ONLY = (
    "dropout_p",
    "inference_statistics",
    "dropout",
    "weight_standardization",
    "stem_norm",
)
Block = type[PreActBasic] | type[PreActBottleneck]


class PreActResNet(StagedNetwork):
    """Pre-activation ResNet.

    Args:
        block: PreActBasic or PreActBottleneck.
        depths: number of blocks in each stage.
        widths: channels inside the blocks of each stage.
        small_stem: use a 3x3 convolution (low resolution) instead of 7x7 stride 2 and a max pool.
        norm: "kernel", "batch", "group" (32 groups), "layer" (one group), "local_context" (2
            channels per group, windows of 227x227 pixels, or of 16x16 with `small_stem`) or "none".
        output_stride: largest reduction of the stages' maps; further stages dilate instead of
            striding. The maps contain the values of the strided network.
        dropout_p: dropout probability of the layers' statistics, in [0, 1); the last KernelNorm
            uses min(5 * dropout_p, 0.5). Like `inference_statistics`, `dropout` and the options
            below, only for norm="kernel".
        weight_standardization: standardize the filters, see KNConv2d; not in the paper.
        stem_norm: normalize the images' windows, as in the paper. False makes the stem an ordinary
            convolution, which keeps brightness and contrast; standardize the images then.
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
        weight_standardization: bool = False,
        stem_norm: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kn_layers = KNLayers(
            act_layer,
            dropout_p,
            inference_statistics,
            dropout,
            device,
            dtype,
            weight_standardization,
            stem_norm,
        )
        layers: Layers = kn_layers
        if norm in BASELINE_NORMS:
            layers = BaselineLayers(norm, act_layer, 16 if small_stem else 227, device, dtype)
        elif norm != "kernel":
            raise ValueError(f"norm={norm!r}: use one of {('kernel', *BASELINE_NORMS)}")
        chs = widths[0]
        stem, pool, feature_info = resnet_stem(layers, in_chans, chs, small_stem)
        stages = []
        rates = drop_path_rates(drop_path_rate, depths)
        geometries = stage_geometries(1 if small_stem else 4, len(depths), output_stride)
        for i, geometry in enumerate(geometries):
            stages.append(_stage(layers, block, chs, widths[i], geometry, rates[i]))
            chs = widths[i] * block.expansion
            info = dict(num_chs=chs, reduction=geometry.reduction, module=f"stages.{i}")
            feature_info.append(info)

        last = layers.norm_act(chs)
        super().__init__(
            stem=stem,
            pool=pool,
            stages=stages,
            feature_info=feature_info,
            norm=nn.Sequential(kn_layers.norm(5, 0.5), last) if norm == "kernel" else last,
            head=classifier_head(
                chs, num_classes, global_pool, drop_rate, dict(device=device, dtype=dtype)
            ),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=(1 if small_stem else 4) * 2 ** (len(depths) - 1),
        )
        init_weights(self)


def _stage(
    layers: Layers,
    block: Block,
    in_chs: int,
    width: int,
    geometry: StageGeometry,
    rates: list[float],
) -> Stage:
    """Return a stage with one block for each of `rates`; the first block strides."""
    first, dilation = geometry.first_dilation, geometry.dilation
    chs = width * block.expansion
    blocks = [block(layers, in_chs, width, geometry.stride, (first, dilation), rates[0])]
    blocks += [block(layers, chs, width, 1, (dilation, dilation), rate) for rate in rates[1:]]
    return Stage(blocks)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Rename keys of the published code (conv1, layer2.0.shortcut.0, fc); keep others."""
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


def _create(
    variant: str, pretrained: bool, architecture: dict[str, Any], **kwargs: Any
) -> nn.Module:
    baseline = not variant.startswith("kn")
    if baseline:
        _check_baseline(variant, kwargs)
    elif "norm" in kwargs:
        raise TypeError(f"{variant} got an unexpected argument 'norm': use {variant[2:]}")
    small_stem = variant.endswith("_cifar")
    defaults = dict(architecture, norm="batch" if baseline else "kernel")
    kwargs = network_args(variant, pretrained, defaults, kwargs) | {"small_stem": small_stem}
    maps = len(kwargs["depths"]) + (not small_stem)
    return build(
        PreActResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(maps))),
        **kwargs,
    )


def _check_baseline(variant: str, kwargs: dict[str, Any]) -> None:
    """Reject norm="kernel" and the arguments that only kernel normalization uses."""
    if kwargs.get("norm") == "kernel":
        raise ValueError(f"norm='kernel': use kn{variant}")
    for name in KERNEL_ONLY:
        if name in kwargs:
            raise TypeError(f"{variant} got an unexpected argument {name!r}: use kn{variant}")


RESNET18 = dict(block=PreActBasic, depths=(2, 2, 2, 2))
RESNET34 = dict(block=PreActBasic, depths=(3, 4, 6, 3))
RESNET50 = dict(block=PreActBottleneck, depths=(3, 4, 6, 3))
RESNET20 = dict(block=PreActBasic, depths=(3, 3, 3), widths=(16, 32, 64))


@register_model
def knpreactresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-18."""
    return _create("knpreactresnet18", pretrained, RESNET18, **kwargs)


@register_model
def knpreactresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-34."""
    return _create("knpreactresnet34", pretrained, RESNET34, **kwargs)


@register_model
def knpreactresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-50."""
    return _create("knpreactresnet50", pretrained, RESNET50, **kwargs)


@register_model
def knpreactresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-18 for low resolution."""
    return _create("knpreactresnet18_cifar", pretrained, RESNET18, **kwargs)


@register_model
def knpreactresnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-34 for low resolution."""
    return _create("knpreactresnet34_cifar", pretrained, RESNET34, **kwargs)


@register_model
def knpreactresnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-50 for low resolution."""
    return _create("knpreactresnet50_cifar", pretrained, RESNET50, **kwargs)


@register_model
def knpreactresnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-PreActResNet-20 (16-32-64 channels)."""
    return _create("knpreactresnet20_cifar", pretrained, RESNET20, **kwargs)


@register_model
def preactresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-18; `norm`: see PreActResNet, default "batch"."""
    return _create("preactresnet18", pretrained, RESNET18, **kwargs)


@register_model
def preactresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-34; `norm`: see PreActResNet, default "batch"."""
    return _create("preactresnet34", pretrained, RESNET34, **kwargs)


@register_model
def preactresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-50; `norm`: see PreActResNet, default "batch"."""
    return _create("preactresnet50", pretrained, RESNET50, **kwargs)


@register_model
def preactresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-18 for low resolution; `norm`: see PreActResNet, default "batch"."""
    return _create("preactresnet18_cifar", pretrained, RESNET18, **kwargs)


@register_model
def preactresnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-34 for low resolution; `norm`: see PreActResNet, default "batch"."""
    return _create("preactresnet34_cifar", pretrained, RESNET34, **kwargs)


@register_model
def preactresnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-50 for low resolution; `norm`: see PreActResNet, default "batch"."""
    return _create("preactresnet50_cifar", pretrained, RESNET50, **kwargs)


@register_model
def preactresnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-20 (16-32-64 channels); `norm`: see PreActResNet, default "batch"."""
    return _create("preactresnet20_cifar", pretrained, RESNET20, **kwargs)
