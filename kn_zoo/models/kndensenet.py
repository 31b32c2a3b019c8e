"""KNDenseNet-20x16: a small densely connected network for differentially private training.

Every convolution is 3x3 and follows an activation. Each stage has five layers of 16 channels.
"""

import re
from collections import OrderedDict
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._base import (
    ActLayer,
    Features,
    KNLayers,
    Stage,
    StagedNetwork,
    classifier_head,
    init_weights,
    stage_geometries,
)
from ._build import CIFAR, StateDict, build, cfgs, network_args

__all__ = ["KNDenseNet"]


class DenseLayer(nn.Module):
    """Activate the input and append the channels of a convolution of it.

    (N, C, H, W) -> (N, C + growth, H, W). The activated channels are passed on, so that later
    layers activate them again; this is the published network.
    """

    def __init__(self, layers: KNLayers, in_chs: int, growth: int, dilation: int) -> None:
        super().__init__()
        self.act = layers.act()
        self.conv = layers.conv(in_chs, growth, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return torch.cat([x, self.conv(x)], 1)


class DilatedAvgPool2d(nn.Module):
    """`nn.AvgPool2d(2)` with dilation in place of its stride; the map keeps its size."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        d = self.dilation
        x = nn.functional.pad(x, (0, d, 0, d), mode="replicate")
        x = (x[:, :, :-d] + x[:, :, d:]) / 2
        return (x[:, :, :, :-d] + x[:, :, :, d:]) / 2


class KNDenseNet(StagedNetwork):
    """Kernel-normalized DenseNet. Average pools between stages halve the map, rounding down.

    Args:
        depths: number of layers in each stage.
        growth: channels that each layer adds.
        stem_chs: channels of the first convolution.
        output_stride: largest reduction of the stages' maps; further stages dilate instead of
            pooling. The maps contain the values of the strided network.
        dense_maps: round up instead, for dense prediction; `features_only=True` sets it.
        dropout_p: dropout probability of the layers' statistics, in [0, 1); the last KernelNorm
            uses min(5 * dropout_p, 0.5).
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        growth: int,
        stem_chs: int = 32,
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layers = KNLayers(act_layer, dropout_p, inference_statistics, dropout, device, dtype)
        chs = stem_chs
        stages = []
        feature_info: Features = []
        for i, geometry in enumerate(stage_geometries(1, len(depths), output_stride)):
            transition = None
            if i > 0:
                d = geometry.first_dilation
                conv = layers.conv(chs, chs, 3, padding=d, dilation=d)
                pool: nn.Module = nn.AvgPool2d(2, ceil_mode=dense_maps)
                if geometry.stride == 1:
                    pool = DilatedAvgPool2d(d)
                transition = nn.Sequential(OrderedDict(act=layers.act(), conv=conv, pool=pool))
            blocks = []
            for _ in range(depths[i]):
                blocks.append(DenseLayer(layers, chs, growth, geometry.dilation))
                chs += growth
            stages.append(Stage(blocks, transition))
            info = dict(num_chs=chs, reduction=geometry.reduction, module=f"stages.{i}")
            feature_info.append(info)

        super().__init__(
            stem=layers.conv(in_chans, stem_chs, 3, padding=1),
            stages=stages,
            feature_info=feature_info,
            norm=nn.Sequential(layers.norm(5, 0.5), layers.act()),
            head=classifier_head(
                chs, num_classes, global_pool, drop_rate, dict(device=device, dtype=dtype)
            ),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=1 if dense_maps else 2 ** (len(depths) - 1),
        )
        init_weights(self)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Rename keys of the published code (conv1, dense1.0.conv, transition1.conv); keep others."""
    state_dict = state_dict.get("model", state_dict)
    if "dense1.0.conv.weight" not in state_dict:
        return state_dict
    return {_our_name(key): value for key, value in state_dict.items()}


def _our_name(key: str) -> str:
    key = re.sub(r"^conv1\.", "stem.", key)
    key = re.sub(r"^dense(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    key = re.sub(r"^transition(\d+)\.", r"stages.\1.downsample.", key)
    return re.sub(r"^fc\.", "head.fc.", key)


default_cfgs = generate_default_cfgs(
    cfgs(
        "kndensenet20x16_cifar",
        lambda side: side // 4,
        first_conv="stem",
        classifier="head.fc",
        **dict(CIFAR, num_classes=10),
    )
)


@register_model
def kndensenet20x16_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KNDenseNet-20x16."""
    architecture = dict(depths=(5, 5, 5), growth=16)
    kwargs.setdefault("dense_maps", kwargs.get("features_only", False))
    return build(
        KNDenseNet,
        "kndensenet20x16_cifar",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2)),
        **network_args("kndensenet20x16_cifar", pretrained, architecture, kwargs),
    )
