"""Build a model with timm's builder; default cfgs from the manifest."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, load_state_dict
from torch import nn

from kn_zoo.checkpoints import loading, manifest

from ._base import FeatureMaps

IMAGENET = dict(
    input_size=(3, 224, 224),
    num_classes=1000,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bilinear",
    crop_pct=0.875,
)
# Kernel-normalized networks take small images in [0, 1], without mean and std.
CIFAR = dict(
    input_size=(3, 32, 32),
    num_classes=100,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    interpolation="bilinear",
    crop_pct=1.0,
)
CIFAR_MEAN_STD = dict(CIFAR, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))

StateDict = dict[str, Any]  # tensors, or {"model": tensors, ...} as the authors store it
Cfgs = dict[str, dict[str, Any] | PretrainedCfg]


def build(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    pretrained_filter_fn: Callable[[StateDict, Any], StateDict] | None = None,
    feature_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build `variant` as timm does, and verify a checkpoint before reading its tensors.

    `kwargs` are complete: see `network_args`.
    `features_only=True` returns `FeatureMaps` unless `feature_cfg` names another `feature_cls`.
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    if pretrained:
        asked_for = (variant, kwargs.get("pretrained_cfg"), overlay)
        overlay = _read_pickle(loading.checked_source(*asked_for, kwargs.get("cache_dir")))
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=pretrained_filter_fn,
        feature_cfg={"feature_cls": FeatureMaps, **(feature_cfg or {})},
        **kwargs,
    )
    for module in model.modules():  # includes the network inside a features wrapper
        # Do not keep a second copy of the tensors.
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
    return model


def network_args(
    variant: str, pretrained: bool, defaults: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge arguments: `kwargs` override the checkpoint's own, which override `defaults`."""
    trained: dict[str, Any] = {}
    if pretrained:
        asked_for = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
        trained = loading.model_args(variant, *asked_for)
    return {**defaults, **trained, **kwargs}


def _read_pickle(overlay: dict[str, Any] | None) -> dict[str, Any] | None:
    """Replace a torch pickle named by `file` with its tensors, without executing pickled code.

    Older timm unpickles a `file` without restriction. The paper's checkpoints hold an
    argparse.Namespace beside the tensors; no other class is allowed.
    """
    file = str((overlay or {}).get("file") or "")
    if not file or file.endswith(".safetensors"):
        return overlay
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(overlay or {}, state_dict=load_state_dict(file, weights_only=True))


def cfgs(architecture: str, last_map: Callable[[int], int], **defaults: Any) -> Cfgs:
    """Return timm default cfgs of an architecture and of its checkpoints in the manifest.

    `last_map` maps the side of the input to the side of the last feature map, both in pixels.
    """
    cfgs_by_name = manifest.pretrained_cfgs(architecture, **defaults)
    for cfg in cfgs_by_name.values():
        cfg["pool_size"] = tuple(last_map(side) for side in cfg["input_size"][1:])
    return dict(cfgs_by_name)


def drop_path_rates(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Return a list of stochastic depth rates per stage, from 0 (first block) to `last`."""
    # On the CPU, because meta tensors have no values.
    rates = torch.linspace(0, last, sum(depths), device="cpu")
    return [stage.tolist() for stage in rates.split(depths)]
