"""KN-ConvNeXt-Tiny: ConvNeXt with kernel-normalized downsampling.

A ReLU and a KNConv2d replace the LayerNorm and the 2x2 convolution of stride 2 between stages.
Blocks, stem and head keep their LayerNorm (Liu et al., A ConvNet for the 2020s, 2022).
"""

import re
from collections import OrderedDict
from typing import Any

import torch
from timm.layers import LayerNorm2d, NormMlpClassifierHead
from timm.models import generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXtBlock
from torch import nn

from ._base import (
    ActLayer,
    Features,
    KNLayers,
    Stage,
    StagedNetwork,
    StageGeometry,
    stage_geometries,
)
from ._build import IMAGENET, StateDict, build, cfgs, drop_path_rates, network_args

__all__ = ["KNConvNeXt"]


class KNConvNeXt(StagedNetwork):
    """Kernel-normalized ConvNeXt. Each stage halves the map, rounding down.

    Args:
        depths: number of blocks in each stage.
        dims: channels of the stages.
        output_stride: largest reduction of the stages' maps; further stages dilate instead of
            striding.
        dense_maps: round up instead, for dense prediction, by zero padding at the right and bottom
            border; `features_only=True` sets it.
        act_layer: activation before a KNConv2d; the blocks use GELU.
        dropout_p: dropout probability of the KNConv2d's statistics, in [0, 1).
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        dims: tuple[int, ...],
        in_chans: int = 3,
        num_classes: int = 1000,
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
        layers = KNLayers(act_layer, dropout_p, inference_statistics, dropout)
        stem: OrderedDict[str, nn.Module] = OrderedDict()
        if dense_maps:
            stem["pad"] = nn.ZeroPad2d((0, 3, 0, 3))
        stem["conv"] = nn.Conv2d(in_chans, dims[0], 4, stride=4)
        stem["norm"] = LayerNorm2d(dims[0])
        stages = []
        feature_info: Features = []
        rates = drop_path_rates(drop_path_rate, depths)
        for i, geometry in enumerate(stage_geometries(4, len(depths), output_stride)):
            downsample = None
            if i > 0:
                downsample = _downsample(layers, dims[i - 1], dims[i], geometry, dense_maps)
            dilation = (geometry.dilation, geometry.dilation)
            blocks = [
                ConvNeXtBlock(dims[i], dilation=dilation, drop_path=rate) for rate in rates[i]
            ]
            stages.append(Stage(blocks, downsample))
            info = dict(num_chs=dims[i], reduction=geometry.reduction, module=f"stages.{i}")
            feature_info.append(info)

        super().__init__(
            stem=nn.Sequential(stem),
            stages=stages,
            feature_info=feature_info,
            norm=nn.Identity(),  # the head normalizes after pooling
            head=NormMlpClassifierHead(
                dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate
            ),
            in_chans=in_chans,
            num_classes=num_classes,
            min_size=1 if dense_maps else 4 * 2 ** (len(depths) - 1),
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        self.to(device=device, dtype=dtype)  # older timm's blocks have no device argument

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        stages = len(self.stages)
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.stages) < stages:
            self.head.norm = nn.Identity()  # sized for the last stage
        return take_indices


def _downsample(
    layers: KNLayers, in_chs: int, out_chs: int, geometry: StageGeometry, ceil_mode: bool
) -> nn.Sequential:
    d = geometry.first_dilation
    padding = (0, d, 0, d) if ceil_mode or geometry.stride == 1 else 0
    conv = layers.conv(in_chs, out_chs, 2, stride=geometry.stride, padding=padding, dilation=d)
    return nn.Sequential(OrderedDict(act=layers.act(), conv=conv))


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Rename keys of the published code, which are torchvision's (features.1.0.block.0)."""
    state_dict = state_dict.get("model", state_dict)
    if "features.0.0.weight" not in state_dict:
        return state_dict
    return {
        _our_name(key): value.flatten() if key.endswith("layer_scale") else value
        for key, value in state_dict.items()
    }


BLOCK = {"block.0": "conv_dw", "block.2": "norm", "block.3": "mlp.fc1", "block.5": "mlp.fc2"}


def _our_name(key: str) -> str:
    key = key.replace("features.0.0.", "stem.conv.").replace("features.0.1.", "stem.norm.")
    key = key.replace("classifier.0.", "head.norm.").replace("classifier.2.", "head.fc.")
    key = re.sub(
        r"^features\.([246])\.1\.", lambda m: f"stages.{int(m[1]) // 2}.downsample.conv.", key
    )
    key = re.sub(r"^features\.([1357])\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.", key)
    key = re.sub(r"block\.\d", lambda m: BLOCK[m[0]], key)
    return key.replace("layer_scale", "gamma")


default_cfgs = generate_default_cfgs(
    cfgs(
        "knconvnext_tiny",
        lambda side: side // 32,
        first_conv="stem.conv",
        classifier="head.fc",
        **dict(IMAGENET, crop_pct=224 / 232),
    )
)


@register_model
def knconvnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """KN-ConvNeXt-Tiny."""
    architecture = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
    kwargs.setdefault("dense_maps", kwargs.get("features_only", False))
    return build(
        KNConvNeXt,
        "knconvnext_tiny",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3)),
        **network_args("knconvnext_tiny", pretrained, architecture, kwargs),
    )
