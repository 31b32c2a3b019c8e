"""From an entry point to a model: timm's builder, and its default cfgs from the manifest."""

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, load_state_dict
from torch import nn

from kn_zoo.checkpoints import loading, manifest

IMAGENET = dict(
    input_size=(3, 224, 224),
    num_classes=1000,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bilinear",
    crop_pct=0.875,
)
# Kernel-normalized networks see small images in [0, 1], without mean and deviation.
CIFAR = dict(
    input_size=(3, 32, 32),
    num_classes=100,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    interpolation="bilinear",
    crop_pct=1.0,
)
CIFAR_MEAN_STD = dict(CIFAR, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))

StateDict = dict[str, Any]  # of tensors; a checkpoint may hold it under "model"
Cfgs = dict[str, dict[str, Any] | PretrainedCfg]


def build(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    pretrained_filter_fn: Callable[[StateDict, Any], StateDict] | None = None,
    feature_cfg: dict[str, Any] | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    **kwargs: Any,
) -> nn.Module:
    """Build `variant` as timm does, with its weights checked before a tensor of them is read.

    `defaults` are arguments of the network that a weight may have been trained without.
    `features_only=True` takes its maps from `forward_intermediates`: one code path for both.
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    if pretrained:
        asked_for = (variant, kwargs.get("pretrained_cfg"), overlay)
        defaults = {**defaults, **loading.model_args(*asked_for)}
        overlay = _read_pickle(loading.checked_source(*asked_for, kwargs.get("cache_dir")))
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=pretrained_filter_fn,
        feature_cfg=dict(feature_cls="getter", **(feature_cfg or {})),
        **{**defaults, **kwargs},
    )
    for module in model.modules():  # also the network that a features wrapper holds
        # a model must not keep a second copy of its weights
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
    return model


def _read_pickle(overlay: dict[str, Any] | None) -> dict[str, Any] | None:
    """Replace a torch pickle named by `file` by its tensors, without running what a pickle can run.

    timm of older releases unpickles a `file` in full. The paper's checkpoints hold an
    argparse.Namespace beside the tensors: that one class is allowed, nothing else.
    """
    file = str((overlay or {}).get("file") or "")
    if not file or file.endswith(".safetensors"):
        return overlay
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(overlay or {}, state_dict=load_state_dict(file, weights_only=True))


def cfgs(architecture: str, last_map: Callable[[int], int], **defaults: Any) -> Cfgs:
    """timm default cfgs of one architecture and all its weights in the manifest.

    `last_map` gives the side of the last feature map for an input side, both in pixels.
    """
    found = manifest.pretrained_cfgs(architecture, **defaults)
    for cfg in found.values():
        cfg["pool_size"] = tuple(last_map(side) for side in cfg["input_size"][1:])
    return dict(found)


def drop_path_rates(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Stochastic depth's rates, a list a stage: 0 at the first block, `last` at the last."""
    # "cpu", because under a meta device context a tensor has no values.
    rates = torch.linspace(0, last, sum(depths), device="cpu")
    return [stage.tolist() for stage in rates.split(depths)]
