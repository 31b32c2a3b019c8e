"""KNResNet-8 and -13: small kernel-normalized networks for differentially private training.

All convolutions are 3x3. The classifier takes the last map pooled to 2x2 pixels.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._base import (
    ActLayer,
    Features,
    KNLayers,
    Stage,
    StagedNetwork,
    drop_path,
    init_weights,
    max_pool,
    stage_geometries,
)
from ._build import CIFAR, Cfgs, StateDict, build, cfgs, drop_path_rates, network_args

__all__ = ["KNResNetSmall"]

STEM_CHANNELS = 64
ConvAct = Callable[[int, int, int], "OrderedDict[str, nn.Module]"]


def conv_act(
    layers: KNLayers, preact: bool, in_chs: int, out_chs: int, dilation: int
) -> "OrderedDict[str, nn.Module]":
    """Return a 3x3 convolution with its activation before it (`preact`) or after it."""
    geometry: dict[str, Any] = dict(padding=dilation, dilation=dilation)
    if preact:
        return OrderedDict(act=layers.act(), conv=layers.conv(in_chs, out_chs, 3, **geometry))
    conv, act = layers.conv_norm_act(in_chs, out_chs, 3, **geometry)
    return OrderedDict(conv=conv, act=act)


class Residual(nn.Module):
    """Two convolutions with an identity shortcut; `conv_act` makes them."""

    def __init__(self, chs: int, dilation: int, drop: float, conv_act: ConvAct) -> None:
        super().__init__()
        self.unit1 = nn.Sequential(conv_act(chs, chs, dilation))
        self.unit2 = nn.Sequential(conv_act(chs, chs, dilation))
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.unit2(self.unit1(x))) + x


class GridPool(SelectAdaptivePool2d):
    """timm's pooling by name, to 2x2 pixels instead of one; "" disables it."""

    def __init__(self, pool_type: str) -> None:
        super().__init__(output_size=2, pool_type=pool_type, flatten=bool(pool_type))

    def feat_mult(self) -> int:
        return super().feat_mult() * (4 if self.pool_type else 1)


class GridHead(nn.Module):
    """timm's ClassifierHead with GridPool."""

    def __init__(self, in_features: int, num_classes: int, pool_type: str, drop: float) -> None:
        super().__init__()
        self.in_features = in_features
        self.drop = nn.Dropout(drop)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        if pool_type is not None:
            self.global_pool = GridPool(pool_type)
        width = self.in_features * self.global_pool.feat_mult()
        self.fc = nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


class KNResNetSmall(StagedNetwork):
    """Stages of one residual block each, after a convolution and a 2x2 max pool.

    Each stage halves the map, rounding down.

    Args:
        widths: channels of the stages.
        preact: activations precede their convolutions, and the first stage does not pool. Otherwise
            they follow them, the first stage pools too, and a max pool precedes the last norm.
        output_stride: largest reduction of the stages' maps; further stages dilate instead of
            pooling.
        dense_maps: round up instead, for dense prediction; `features_only=True` sets it.
        dropout_p: dropout probability of the layers' statistics, in [0, 1); the last KernelNorm
            uses min(5 * dropout_p, 0.5) if `preact`, otherwise min(2.5 * dropout_p, 0.5).
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        preact: bool,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        output_stride: int = 32,
        dense_maps: bool = False,
        act_layer: ActLayer = "relu",
        dropout_p: float = 0.1,
        inference_statistics: str = "expected",
        dropout: str = "mask",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layers = KNLayers(act_layer, dropout_p, inference_statistics, dropout, device, dtype)
        conv_act_of = partial(conv_act, layers, preact)
        chs = STEM_CHANNELS
        stem = conv_act_of(in_chans, chs, 1)
        feature_info: Features = []
        geometries = stage_geometries(1, len(widths) + (not preact), output_stride)
        if preact:
            del stem["act"]  # images are not activated
        else:
            feature_info = [dict(num_chs=chs, reduction=1, module="stem")]
            geometries = geometries[1:]
        stages = []
        rates = drop_path_rates(drop_path_rate, (1,) * len(widths))
        for i, (width, geometry) in enumerate(zip(widths, geometries, strict=True)):
            transition = None
            if i > 0 or not preact:
                modules = conv_act_of(chs, width, geometry.first_dilation)
                modules["pool"] = max_pool(geometry.stride, geometry.first_dilation, dense_maps)
                transition = nn.Sequential(modules)
            block = Residual(width, geometry.dilation, rates[i][0], conv_act_of)
            stages.append(Stage([block], transition))
            info = dict(num_chs=width, reduction=geometry.reduction, module=f"stages.{i}")
            feature_info.append(info)
            chs = width

        dilation = geometries[-1].dilation
        kernel_norm = layers.norm(5 if preact else 2.5, 0.5)
        head = GridHead(chs, num_classes, global_pool, drop_rate)
        super().__init__(
            stem=nn.Sequential(stem),
            stages=stages,
            feature_info=feature_info,
            neck=None if preact else max_pool(2 if dilation == 1 else 1, dilation),
            norm=nn.Sequential(kernel_norm, layers.act()) if preact else kernel_norm,
            head=head.to(device=device, dtype=dtype),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=1 if dense_maps else 2 ** (len(widths) - preact),
            neck_min_size=2 ** (len(widths) + 1 - 2 * preact),
        )
        init_weights(self)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Rename keys of the published code (conv0, conv_block1.1, res_block1.conv1); keep others."""
    state_dict = state_dict.get("model", state_dict)
    if "res_block1.conv1.weight" not in state_dict:
        return state_dict
    preact = "conv0.weight" in state_dict
    return {_our_name(key, preact): value for key, value in state_dict.items()}


def _our_name(key: str, preact: bool) -> str:
    first = 1  # stage of the transition that the published code calls conv_block1
    if not preact:  # conv_block1 of KNResNet-8 is the stem, conv_block2 leads to stage 0
        key = key.replace("conv_block1.0.", "stem.conv.")
        first = -1
    key = re.sub(r"^conv0\.", "stem.conv.", key)
    key = re.sub(
        r"^conv_block(\d+)\.\d+\.",
        lambda m: f"stages.{int(m[1]) - 1 + first}.downsample.conv.",
        key,
    )
    key = re.sub(
        r"^res_block(\d+)\.conv(\d)\.",
        lambda m: f"stages.{int(m[1]) - 1}.blocks.0.unit{m[2]}.conv.",
        key,
    )
    return re.sub(r"^fc\.", "head.fc.", key)


def _cfg(architecture: str) -> Cfgs:
    return cfgs(
        architecture,
        lambda side: side // 8,
        first_conv="stem.conv",
        classifier="head.fc",
        **dict(CIFAR, num_classes=10),
    )


default_cfgs = generate_default_cfgs({**_cfg("knresnet8_cifar"), **_cfg("knresnet13_cifar")})


def _create(
    variant: str, pretrained: bool, maps: int, architecture: dict[str, Any], **kwargs: Any
) -> nn.Module:
    kwargs.setdefault("dense_maps", kwargs.get("features_only", False))
    return build(
        KNResNetSmall,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(maps))),
        **network_args(variant, pretrained, architecture, kwargs),
    )


@register_model
def knresnet8_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-8."""
    model_args = dict(widths=(128, 256), preact=False)
    return _create("knresnet8_cifar", pretrained, 3, model_args, **kwargs)


@register_model
def knresnet13_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-13."""
    model_args = dict(widths=(64, 64, 128, 256), preact=True)
    return _create("knresnet13_cifar", pretrained, 4, model_args, **kwargs)
