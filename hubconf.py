"""Every model of the zoo for ``torch.hub``, generated from timm's registry.

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
        factory: _typing.Any = _timm.create_model
        if architecture in _SEGMENTATION:
            factory = _segmentation.create_segmentation_model
        return factory(name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = architecture
    create.__doc__ = f"""{architecture} of kn_zoo {_kn_zoo.__version__}.

    Args:
        pretrained: load trained weights; their SHA-256 is compared with the manifest's.
        tag: which of them, the first if not given.{_describe_weights(architecture)}
        kwargs: anything that timm.create_model, or for fcn_* create_segmentation_model, takes.
    """
    return create


def _describe_weights(architecture: str) -> str:
    lines = []
    for weight in _manifest.load().values():
        if weight.architecture == architecture:
            accuracy = ", ".join(
                f"{accuracy.top1:.2f} ({statistics})"
                for statistics, accuracy in weight.reported.statistics.items()
            )
            state = "" if weight.available else "; not available yet"
            data = f"{weight.dataset.name}, {weight.dataset.images:,} images"
            lines.append(f"{weight.tag}: {data}, top-1 % {accuracy}{state}")
    return "".join(f"\n            {line}" for line in lines or ["none has been trained yet"])


for _name in _timm.list_models():
    if _timm.models.model_entrypoint(_name).__module__.startswith(f"{_kn_zoo.__name__}."):
        globals()[_name] = _entry_point(_name)
for _name in _SEGMENTATION:
    globals()[_name] = _entry_point(_name)
