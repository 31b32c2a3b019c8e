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

from kn_zoo.checkpoints import loading, manifest
from kn_zoo.layers import KNConv2d
from kn_zoo.segmentation.data import CLASSES
from kn_zoo.segmentation.fcn import FCN

KN_ARGS = ("dropout_p", "dropout", "inference_statistics")  # of backbone and head alike
HEAD_ARGS = ("channels", "skips", "drop_rate")
# Mean and deviation of ImageNet, which pretrained backbones expect; the size is CamVid's.
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
    """A backbone of timm's registry under an FCN head."""

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
    # The authors' FCN-ResNets, and the same with kernel-normalized backbones
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
    # Half as wide, 3.1 M parameters, stride 16 with skips: for two cores
    "fcn_knpreactresnet18_slim": Architecture("knpreactresnet18", "stem", args=SLIM),
    "fcn_preactresnet18_slim": Architecture("preactresnet18", "stem", BASELINES, args=SLIM),
}


def list_segmentation_models(filter: str = "*", pretrained: bool = False) -> list[str]:
    """Return names, in order, that match a pattern with * and ?.

    With `pretrained`, "architecture.tag" of the checkpoints that can be loaded.
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
    """Create a segmentation network, which maps images (N, 3, H, W) to scores (N, classes, H, W).

    Its `pretrained_cfg` says what images it expects (mean, std, input size) and what its classes
    are called (label_names), where that is known.

    Args:
        name: "architecture" or "architecture.tag", see `list_segmentation_models`.
        pretrained: load the checkpoint of that tag, or the architecture's first one; its hash is
            compared with the manifest's. With another `num_classes` the classifiers stay untrained.
        norm: "batch", "group" or "layer", of a baseline.
        pretrained_backbone: load the backbone's classification checkpoint, as timm does.
        cache_dir: the Hub's cache.
        kwargs: channels, skips and drop_rate of `FCN`; dropout_p, dropout and
            inference_statistics of kernel normalization; others are the backbone's.

    Raises:
        LookupError: there is no such network or checkpoint; the message lists similar names.
        WeightsError: the checkpoint cannot be had, or its file is not the manifest's.
    """
    architecture = name.partition(".")[0]
    if architecture not in ARCHITECTURES:
        near = get_close_matches(architecture, ARCHITECTURES, n=3, cutoff=0.4)
        hint = (
            f"Did you mean {' or '.join(near)}?" if near else f"Choose from {list(ARCHITECTURES)}"
        )
        raise LookupError(f"No segmentation model is called {architecture!r}. {hint}")
    checkpoint = manifest.find(name) if pretrained or "." in name else None
    cfg: dict[str, Any] = DEFAULT_CFG | dict(first_conv=ARCHITECTURES[architecture].first_conv)
    if checkpoint is not None:
        cfg |= checkpoint.pretrained_cfg()
        if checkpoint.dataset.name in CLASSES:
            cfg["label_names"] = CLASSES[checkpoint.dataset.name].names
        kwargs = {**checkpoint.model_args, **kwargs}
        norm = norm or kwargs.pop("norm", None)
    cfg |= dict(pretrained_cfg_overlay or {})
    model = _build(
        architecture, num_classes or cfg["num_classes"], norm, pretrained_backbone, **kwargs
    )
    cfg |= dict(architecture=architecture, tag=name.partition(".")[2])
    if pretrained and checkpoint is not None:
        state_dict = loading.read(loading.locate(checkpoint, cache_dir=cache_dir), checkpoint)
        _load(model, state_dict, same_classes=model.num_classes == cfg["num_classes"])
    cfg["num_classes"] = model.num_classes
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
    return model


def _build(
    architecture: str, num_classes: int, norm: str | None, pretrained_backbone: bool, **kwargs: Any
) -> FCN:
    of = ARCHITECTURES[architecture]
    norm = norm or of.norms[0]
    if norm not in of.norms:
        raise ValueError(f"{architecture} has no norm={norm!r}: use one of {', '.join(of.norms)}")
    arguments: dict[str, Any] = {**of.args, **kwargs}
    head = {key: arguments.pop(key) for key in HEAD_ARGS if key in arguments}
    kn_args = {key: arguments[key] for key in KN_ARGS if key in arguments}
    if not of.raw_maps:  # timm's own ResNets
        arguments["norm_layer"] = TIMM_NORMS[norm]
    elif norm != "kernel":
        arguments["norm"] = norm
    backbone = timm.create_model(
        of.backbone, pretrained=pretrained_backbone, features_only=True, **arguments
    )
    if norm == "kernel" and "dropout_p" not in kn_args:  # the head's is the backbone's
        layer = next(m for m in backbone.modules() if isinstance(m, KNConv2d))
        kn_args["dropout_p"] = layer.dropout_p
    model = FCN(backbone, num_classes, norm, of.raw_maps, **head, **kn_args)  # type: ignore[arg-type]
    model.num_features = head.get("channels", 512)  # type: ignore[assignment]
    return model


def _load(model: FCN, state_dict: dict[str, Any], same_classes: bool) -> None:
    """Load a checkpoint, without its classifiers where the classes are others."""
    if not same_classes:
        state_dict = {k: v for k, v in state_dict.items() if ".classifier." not in k}
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    missing = [key for key in missing if same_classes or ".classifier." not in key]
    if missing or unexpected:
        raise loading.CorruptWeights(
            f"the checkpoint is of another network: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}; leave out the arguments that change the network"
        )


def load_bundle(folder: Path | str) -> FCN:
    """Return the network of a bundle that a training run wrote, in eval mode.

    Raises WeightsError if the folder is no bundle of a segmentation network.
    """
    folder = Path(folder)
    try:
        document = manifest.parse_json((folder / loading.CONFIG).read_bytes())
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
            f"{folder} is no bundle of a segmentation network ({loading.first_line(error)}): name "
            "the folder bundle/ that train_segmentation.py wrote"
        ) from error
    _load(model, tensors, same_classes=True)
    return model.eval()


def class_names(model: nn.Module) -> Sequence[str]:
    """Return what the classes are called; their numbers where nobody says."""
    cfg: Any = model.pretrained_cfg
    return cfg.get("label_names") or [f"class {i}" for i in range(cfg["num_classes"])]
