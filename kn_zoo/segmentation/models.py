"""Segmentation networks by name, with their checkpoints: `create_segmentation_model`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kn_zoo.checkpoints import files, loading, manifest
from kn_zoo.layers import KNConv2d
from kn_zoo.segmentation.data import CLASSES
from kn_zoo.segmentation.fcn import FCN

KN_ARGS = ("dropout_p", "dropout", "inference_statistics")  # of backbone and head alike
HEAD_ARGS = ("channels", "skips", "drop_rate")
# Mean and standard deviation of ImageNet, for pretrained backbones; input size of CamVid.
DEFAULT_CFG = dict(
    input_size=(3, 360, 480),
    num_classes=11,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bilinear",
    crop_pct=1.0,
    crop_mode="center",
    classifier="head.classifier",
)
TIMM_NORMS: dict[str, Any] = dict(
    batch=nn.BatchNorm2d, group=timm.layers.GroupNorm, layer=timm.layers.GroupNorm1
)


@dataclass(frozen=True)
class Architecture:
    """FCN on a backbone of timm's registry."""

    backbone: str
    first_conv: str
    norms: tuple[str, ...] = ("kernel",)  # the first is the default
    raw_maps: bool = True
    args: Mapping[str, Any] = field(default_factory=dict)


BASELINES = ("batch", "group", "layer")
SLIM: Mapping[str, Any] = dict(
    widths=(32, 64, 128, 256), output_stride=16, channels=128, skips=(8, 4)
)
ARCHITECTURES = {
    # The authors' FCN-ResNets, and the same on kernel-normalized backbones
    "fcn_resnet18": Architecture("resnet18", "conv1", BASELINES, raw_maps=False),
    "fcn_resnet34": Architecture("resnet34", "conv1", BASELINES, raw_maps=False),
    "fcn_resnet50": Architecture("resnet50", "conv1", BASELINES, raw_maps=False),
    "fcn_knresnet18": Architecture("knresnet18", "stem"),
    "fcn_knresnet34": Architecture("knresnet34", "stem"),
    "fcn_knresnet50": Architecture("knresnet50", "stem"),
    # One network for all norms
    "fcn_knpreactresnet18": Architecture("knpreactresnet18", "stem"),
    "fcn_preactresnet18": Architecture("preactresnet18", "stem", BASELINES),
    "fcn_knpreactresnet18_cifar": Architecture("knpreactresnet18_cifar", "stem"),
    "fcn_preactresnet18_cifar": Architecture("preactresnet18_cifar", "stem", BASELINES),
    # Half as wide, 3.1 M parameters, stride 16 with skips, to train on a CPU
    "fcn_knpreactresnet18_slim": Architecture("knpreactresnet18", "stem", args=SLIM),
    "fcn_preactresnet18_slim": Architecture("preactresnet18", "stem", BASELINES, args=SLIM),
}


def list_segmentation_models(filter: str = "*", pretrained: bool = False) -> list[str]:
    """Return the sorted names that match a pattern with * and ?.

    With `pretrained`, these are the checkpoints that can be loaded, as "architecture.tag".
    """
    names: Sequence[str] = list(ARCHITECTURES)
    if pretrained:
        checkpoints = manifest.load().values()
        names = [c.name for c in checkpoints if c.architecture in ARCHITECTURES and c.available]
    return sorted(name for name in names if fnmatch(name, filter))


def create_segmentation_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    norm: str | None = None,
    pretrained_backbone: bool = False,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> FCN:
    """Create a segmentation network from images (N, 3, H, W) to scores (N, num_classes, H, W).

    Its `pretrained_cfg` has mean, std and size of the images and, if known, the names of the
    classes (label_names).

    Args:
        name: "architecture" or "architecture.tag", see `list_segmentation_models`.
        pretrained: load the checkpoint of that tag, by default the first; its SHA-256 must match
            the manifest. With another `num_classes`, the classifiers are initialized at random.
        norm: normalization of a baseline: "batch", "group" or "layer".
        pretrained_backbone: load the backbone's classification checkpoint, as timm does.
        pretrained_cfg_overlay: entries of `pretrained_cfg` to replace.
        cache_dir: the Hub's cache.
        kwargs: channels, skips and drop_rate of `FCN`; dropout_p, dropout and
            inference_statistics of kernel normalization; other arguments of the backbone.

    Raises:
        LookupError: there is no such network or checkpoint; the message suggests similar names.
        WeightsError: the checkpoint cannot be found, or its file does not match the manifest.
    """
    architecture = name.partition(".")[0]
    if architecture not in ARCHITECTURES:
        similar = get_close_matches(architecture, ARCHITECTURES, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "Choose from "
        hint += "" if similar else ", ".join(ARCHITECTURES)
        raise LookupError(f"There is no segmentation model {architecture!r}. {hint}")
    checkpoint = manifest.find(name) if pretrained or "." in name else None
    cfg: dict[str, Any] = DEFAULT_CFG | dict(first_conv=ARCHITECTURES[architecture].first_conv)
    if checkpoint is not None:
        cfg |= checkpoint.pretrained_cfg()
        if checkpoint.dataset.name in CLASSES:
            cfg["label_names"] = CLASSES[checkpoint.dataset.name].names
        kwargs = {**checkpoint.model_args, **kwargs}
        trained_norm = kwargs.pop("norm", None)
        norm = norm or trained_norm
    cfg |= dict(pretrained_cfg_overlay or {})
    model = _build(
        architecture, num_classes or cfg["num_classes"], norm, pretrained_backbone, **kwargs
    )
    cfg |= dict(architecture=architecture, tag=name.partition(".")[2])
    if pretrained and checkpoint is not None:
        state_dict = loading.read(loading.locate(checkpoint, cache_dir=cache_dir), checkpoint)
        _load(model, state_dict, same_classes=model.num_classes == cfg["num_classes"])
    cfg["num_classes"] = model.num_classes
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def _build(
    architecture: str, num_classes: int, norm: str | None, pretrained_backbone: bool, **kwargs: Any
) -> FCN:
    spec = ARCHITECTURES[architecture]
    norm = norm or spec.norms[0]
    if norm not in spec.norms:
        raise ValueError(f"{architecture} has no norm={norm!r}: use one of {', '.join(spec.norms)}")
    arguments: dict[str, Any] = {**spec.args, **kwargs}
    head = {key: arguments.pop(key) for key in HEAD_ARGS if key in arguments}
    kn_args = {key: arguments[key] for key in KN_ARGS if key in arguments}
    if not spec.raw_maps:  # timm's own ResNets
        arguments["norm_layer"] = TIMM_NORMS[norm]
    elif norm != "kernel":
        arguments["norm"] = norm
    backbone: Any = timm.create_model(
        spec.backbone, pretrained=pretrained_backbone, features_only=True, **arguments
    )
    if norm == "kernel" and "dropout_p" not in kn_args:  # the head's is the backbone's
        layer = next(m for m in backbone.modules() if isinstance(m, KNConv2d))
        kn_args["dropout_p"] = layer.dropout_p
    known_norm: Any = norm
    model = FCN(backbone, num_classes, known_norm, spec.raw_maps, **head, **kn_args)
    model.num_features = head.get("channels", 512)
    return model


def _load(model: FCN, state_dict: dict[str, Any], same_classes: bool) -> None:
    """Load the tensors of a checkpoint, without the classifiers if the classes differ."""
    if not same_classes:
        state_dict = {k: v for k, v in state_dict.items() if ".classifier." not in k}
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    missing = [key for key in missing if same_classes or ".classifier." not in key]
    if missing or unexpected:
        raise loading.CorruptWeights(
            f"the checkpoint is of another network: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}; omit the arguments that change the network"
        )


def load_bundle(folder: Path | str) -> FCN:
    """Return the network of a training run's bundle in eval mode.

    Raises:
        WeightsError: the folder is not a bundle of a segmentation network.
    """
    folder = Path(folder)
    try:
        document = files.read_json(folder / loading.CONFIG)
        cfg = dict(document["pretrained_cfg"], label_names=document["label_names"])
        model = create_segmentation_model(
            document["architecture"],
            num_classes=document["num_classes"],
            pretrained_cfg_overlay=cfg,
            **document["model_args"],
        )
        tensors = load_file(folder / manifest.WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, TypeError, LookupError, SafetensorError) as error:
        raise loading.CorruptWeights(
            f"{folder} is not a bundle of a segmentation network ({files.first_line(error)}): name "
            "the folder bundle/ written by train_segmentation.py"
        ) from error
    _load(model, tensors, same_classes=True)
    return model.eval()


def class_names(model: nn.Module) -> Sequence[str]:
    """Return the names of the classes; "class 0" and so on if they are not known."""
    cfg: Any = model.pretrained_cfg
    return cfg.get("label_names") or [f"class {i}" for i in range(cfg["num_classes"])]
