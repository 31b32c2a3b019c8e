"""Entry points of ``torch.hub`` for every model of the zoo, generated from timm's registry.

``torch.hub.load(repo, "knpreactresnet20_cifar", pretrained=True, tag="digits")`` is
``timm.create_model("knpreactresnet20_cifar.digits", pretrained=True)``.
"""

import typing as _typing

import timm as _timm
import torch as _torch

import kn_zoo as _kn_zoo
from kn_zoo import segmentation as _segmentation
from kn_zoo.checkpoints import manifest as _manifest

dependencies = ["torch", "timm", "safetensors", "huggingface_hub"]

_SEGMENTATION = _segmentation.list_segmentation_models()


def _entry_point(architecture: str) -> _typing.Callable[..., _torch.nn.Module]:
    def create(
        pretrained: bool = False, tag: str | None = None, **kwargs: _typing.Any
    ) -> _torch.nn.Module:
        name = f"{architecture}.{tag}" if tag else architecture
        create_model: _typing.Any = _timm.create_model
        if architecture in _SEGMENTATION:
            create_model = _segmentation.create_segmentation_model
        return create_model(name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = architecture
    create.__doc__ = f"""{architecture} of kn_zoo {_kn_zoo.__version__}.

    Args:
        pretrained: load a checkpoint whose SHA-256 matches the manifest.
        tag: tag of the checkpoint, by default the first.{_describe_checkpoints(architecture)}
        kwargs: arguments of {_describe_function(architecture)}.
    """
    return create


def _describe_function(architecture: str) -> str:
    if architecture in _SEGMENTATION:
        return "kn_zoo.create_segmentation_model (num_classes, norm, skips, ...)"
    return "timm.create_model (num_classes, in_chans, features_only, ...)"


def _describe_checkpoints(architecture: str) -> str:
    lines = []
    for checkpoint in _manifest.load().values():
        if checkpoint.architecture == architecture:
            accuracy = ", ".join(
                f"{_metric(accuracy)} ({statistics})"
                for statistics, accuracy in checkpoint.reported.statistics.items()
            )
            data = f"{checkpoint.dataset.name}, {checkpoint.dataset.images:,} images"
            lines.append(f"{checkpoint.tag}: {data}, {accuracy}; {checkpoint.source}")
    return "".join(f"\n            {line}" for line in lines or ["there is none yet"])


def _metric(accuracy: _manifest.Accuracy) -> str:
    if scores := accuracy.segmentation:
        return f"mIoU % {scores.miou:.2f}"
    return f"top-1 % {accuracy.top1:.2f}"


for _name in _timm.list_models():
    if _timm.models.model_entrypoint(_name).__module__.startswith(f"{_kn_zoo.__name__}."):
        globals()[_name] = _entry_point(_name)
for _name in _SEGMENTATION:
    globals()[_name] = _entry_point(_name)
