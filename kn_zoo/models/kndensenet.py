"""KNDenseNet-20x16: a small densely connected network for differentially private training.

Every convolution is 3x3, after its activation. Five layers a stage, each adding 16 channels.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from kn_zoo.layers import KernelNorm2d, KNConv2d

from ._base import (
    ActLayer,
    Features,
    Stage,
    StagedNetwork,
    activation,
    classifier_head,
    init_weights,
)
from ._build import CIFAR, StateDict, build, cfgs

__all__ = ["KNDenseNet"]


class DenseLayer(nn.Module):
    """Activates all channels so far and appends what it makes of them.

    (N, C, H, W) -> (N, C + growth, H, W). That the activated channels are passed on, so that a
    layer activates those of all before it again, is the published network.
    """

    def __init__(self, act: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return torch.cat([x, self.conv(x)], 1)


class KNDenseNet(StagedNetwork):
    """Kernel-normalized DenseNet; average pools between stages halve the map, rounded down.

    Args:
        depths: layers a stage.
        growth: channels a layer adds.
        stem_chs: channels of the first convolution.
        dropout_p: probability of the layers' own dropout, in [0, 1); the last KernelNorm has five
            times it, up to 0.5.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        growth: int,
        stem_chs: int = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        act_layer: ActLayer = "relu",
        dropout_p: float = 0.1,
        inference_statistics: str = "expected",
        dropout: str = "mask",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        statistics: dict[str, Any] = dict(
            inference_statistics=inference_statistics, dropout=dropout
        )
        shape: dict[str, Any] = dict(kernel_size=3, padding=1, dropout_p=dropout_p, **dd)
        conv: Callable[..., nn.Module] = partial(KNConv2d, **shape, **statistics)
        act = activation(act_layer)
        chs = stem_chs
        stages = []
        feature_info: Features = []
        for i, depth in enumerate(depths):
            way = None
            if i > 0:
                pool = nn.AvgPool2d(2)
                way = nn.Sequential(OrderedDict(act=act(), conv=conv(chs, chs), pool=pool))
            widths = [chs + growth * j for j in range(depth)]
            stages.append(Stage([DenseLayer(act(), conv(w, growth)) for w in widths], way))
            chs += growth * depth
            feature_info.append(dict(num_chs=chs, reduction=2**i, module=f"stages.{i}"))

        kernel_norm = KernelNorm2d(dropout_p=min(5 * dropout_p, 0.5), **statistics)
        super().__init__(
            stem=conv(in_chans, stem_chs),
            stages=stages,
            feature_info=feature_info,
            norm=nn.Sequential(kernel_norm, act()),
            head=classifier_head(chs, num_classes, global_pool, drop_rate, dd),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=2 ** (len(depths) - 1),
        )
        init_weights(self)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Names of the published code (conv1, dense1.0.conv, transition1.conv) to ours; ours stay."""
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
    return build(
        KNDenseNet,
        "kndensenet20x16_cifar",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2)),
        **dict(dict(depths=(5, 5, 5), growth=16), **kwargs),
    )
