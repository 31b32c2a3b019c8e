"""KNResNet-8 and -13: small kernel-normalized networks for differentially private training.

All convolutions are 3x3, and the classifier sees the last map pooled to 2x2 pixels.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import DropPath, SelectAdaptivePool2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from kn_zoo.layers import KernelNorm2d, KNConv2d

from ._base import (
    ActLayer,
    Features,
    Stage,
    StagedNetwork,
    activation,
    fused,
    init_weights,
    max_pool,
    scales,
)
from ._build import CIFAR, Cfgs, StateDict, build, cfgs, drop_path_rates

__all__ = ["KNResNetSmall"]

STEM_CHANNELS = 64
Layer = Callable[..., nn.Module]
Unit = Callable[[int, int, int], "OrderedDict[str, nn.Module]"]


def conv_act(
    preact: bool,
    conv: Layer,
    act: Layer,
    in_chs: int,
    out_chs: int,
    dilation: int,
) -> "OrderedDict[str, nn.Module]":
    """A convolution with its activation before it (`preact`) or after it."""
    convolution = conv(in_chs, out_chs, 3, padding=dilation, dilation=dilation)
    if preact:
        return OrderedDict(act=act(), conv=convolution)
    convolution, after = fused(convolution, act())
    return OrderedDict(conv=convolution, act=after)


class Residual(nn.Module):
    """Two convolutions, and the identity past both."""

    def __init__(self, chs: int, dilation: int, drop: float, unit: Unit) -> None:
        super().__init__()
        self.unit1 = nn.Sequential(unit(chs, chs, dilation))
        self.unit2 = nn.Sequential(unit(chs, chs, dilation))
        self.drop_path = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.unit2(self.unit1(x))) + x


class GridPool(SelectAdaptivePool2d):
    """timm's pooling by name, to 2x2 pixels instead of one; "" is none."""

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

    Maps halve from stage to stage, rounded down.

    Args:
        widths: channels of the stages.
        preact: activations stand before their convolutions, the first stage follows the stem
            without pooling; otherwise they stand after them, the first stage pools too, and a last
            max pool precedes the norm.
        output_stride: at most so many input pixels a pixel of the stages' maps; from there on
            pooling gives way to dilation.
        dropout_p: probability of the layers' own dropout, in [0, 1); the last KernelNorm has more:
            five times it if `preact`, else two and a half times, up to 0.5.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        preact: bool,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        output_stride: int = 32,
        act_layer: ActLayer = "relu",
        dropout_p: float = 0.1,
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
        conv: Layer = partial(KNConv2d, dropout_p=dropout_p, **statistics, **dd)
        act = activation(act_layer)
        unit: Unit = partial(conv_act, preact, conv, act)

        chs = STEM_CHANNELS
        stem = unit(in_chans, chs, 1)
        feature_info: Features = []
        plan = scales(1, len(widths) + (not preact), output_stride)
        if preact:
            del stem["act"]  # images come unactivated
        else:
            feature_info = [dict(num_chs=chs, reduction=1, module="stem")]
            plan = plan[1:]
        stages = []
        rates = drop_path_rates(drop_path_rate, (1,) * len(widths))
        for i, (width, scale) in enumerate(zip(widths, plan, strict=True)):
            way = None
            if i > 0 or not preact:
                layers = unit(chs, width, scale.first_dilation)
                layers["pool"] = max_pool(scale.stride, scale.first_dilation)
                way = nn.Sequential(layers)
            stages.append(Stage([Residual(width, scale.dilation, rates[i][0], unit)], way))
            feature_info.append(
                dict(num_chs=width, reduction=scale.reduction, module=f"stages.{i}")
            )
            chs = width

        dilation = plan[-1].dilation
        last_p = min((5 if preact else 2.5) * dropout_p, 0.5)
        kernel_norm = KernelNorm2d(dropout_p=last_p, **statistics)
        super().__init__(
            stem=nn.Sequential(stem),
            stages=stages,
            feature_info=feature_info,
            neck=None if preact else max_pool(2 if dilation == 1 else 1, dilation),
            norm=nn.Sequential(kernel_norm, act()) if preact else kernel_norm,
            head=GridHead(chs, num_classes, global_pool, drop_rate).to(**dd),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=2 ** (len(widths) - preact),
            neck_min_size=2 ** (len(widths) + 1 - 2 * preact),
        )
        init_weights(self)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Names of the published code (conv0, conv_block1.1, res_block1.conv1) to ours; ours stay."""
    state_dict = state_dict.get("model", state_dict)
    if "res_block1.conv1.weight" not in state_dict:
        return state_dict
    first_way = 1 if "conv0.weight" in state_dict else -1  # conv_block1 of KNResNet-8 is the stem
    return {_our_name(key, first_way): value for key, value in state_dict.items()}


def _our_name(key: str, first_way: int) -> str:
    if first_way < 0:
        key = key.replace("conv_block1.0.", "stem.conv.")
    key = re.sub(r"^conv0\.", "stem.conv.", key)
    way = r"^conv_block(\d+)\.\d+\."
    shift = 0 if first_way > 0 else -2
    key = re.sub(way, lambda m: f"stages.{int(m[1]) + shift}.downsample.conv.", key)
    block = r"^res_block(\d+)\.conv(\d)\."
    key = re.sub(block, lambda m: f"stages.{int(m[1]) - 1}.blocks.0.unit{m[2]}.conv.", key)
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


def _create(variant: str, pretrained: bool, maps: int, **kwargs: Any) -> nn.Module:
    return build(
        KNResNetSmall,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(maps))),
        **kwargs,
    )


@register_model
def knresnet8_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-8."""
    model_args = dict(widths=(128, 256), preact=False)
    return _create("knresnet8_cifar", pretrained, 3, **dict(model_args, **kwargs))


@register_model
def knresnet13_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNResNet-13."""
    model_args = dict(widths=(64, 64, 128, 256), preact=True)
    return _create("knresnet13_cifar", pretrained, 4, **dict(model_args, **kwargs))
