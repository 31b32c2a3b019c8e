"""Entry points of ``torch.hub`` for every model of the zoo, generated from timm's registry.

``torch.hub.load(repo, "knpreactresnet20_cifar", pretrained=True, tag="digits")`` is
``timm.create_model("knpreactresnet20_cifar.digits", pretrained=True)``.
"""

import typing as _typing

import timm as _timm
import torch as _torch

import kn_zoo as _kn_zoo
from kn_zoo.checkpoints import manifest as _manifest

dependencies = ["torch", "timm", "safetensors", "huggingface_hub"]


def _entry_point(architecture: str) -> _typing.Callable[..., _torch.nn.Module]:
    def create(
        pretrained: bool = False, tag: str | None = None, **kwargs: _typing.Any
    ) -> _torch.nn.Module:
        name = f"{architecture}.{tag}" if tag else architecture
        return _timm.create_model(name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = architecture
    create.__doc__ = f"""{architecture} of kn_zoo {_kn_zoo.__version__}.

    Args:
        pretrained: load a checkpoint whose SHA-256 matches the manifest.
        tag: tag of the checkpoint, by default the first.{_describe_checkpoints(architecture)}
        kwargs: arguments of timm.create_model (num_classes, in_chans, features_only, ...).
    """
    return create


def _describe_checkpoints(architecture: str) -> str:
    lines = []
    for checkpoint in _manifest.load().values():
        if checkpoint.architecture == architecture:
            accuracy = ", ".join(
                f"{accuracy.top1:.2f} ({statistics})"
                for statistics, accuracy in checkpoint.reported.statistics.items()
            )
            data = f"{checkpoint.dataset.name}, {checkpoint.dataset.images:,} images"
            lines.append(f"{checkpoint.tag}: {data}, top-1 % {accuracy}; {checkpoint.source}")
    return "".join(f"\n            {line}" for line in lines or ["there is none yet"])


for _name in _timm.list_models():
    if _timm.models.model_entrypoint(_name).__module__.startswith(f"{_kn_zoo.__name__}."):
        globals()[_name] = _entry_point(_name)
