"""`kn_zoo.convert` on networks of timm, torchvision and segmentation_models_pytorch."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.segmentation import deeplabv3, deeplabv3_resnet50, fcn, fcn_resnet50

import kn_zoo
from kn_zoo.layers import KernelNorm2d, KNConv2d
from kn_zoo.layers import reference

smp = pytest.importorskip("segmentation_models_pytorch", reason="the dev extra is not installed")

CLASSES = 4
SHORT = dict(layers=(1, 1, 1, 1))


def torchvision_segmenter(build: Callable[..., nn.Module]) -> nn.Module:
    """torchvision's own factory of FCN or DeepLabV3, on a ResNet of four bottlenecks."""
    backbone = resnet.ResNet(
        resnet.Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True]
    )
    return build(backbone, CLASSES, aux=None)


# The networks with as few blocks as their libraries let them have.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(timm.create_model, "resnet18", num_classes=CLASSES, **SHORT),
    "resnet50": partial(timm.create_model, "resnet50", num_classes=CLASSES, **SHORT),
    "resnetv2_50": partial(timm.create_model, "resnetv2_50", num_classes=CLASSES, **SHORT),
    "regnetx_002": partial(timm.create_model, "regnetx_002", num_classes=CLASSES),
    "efficientnet_b0": partial(timm.create_model, "efficientnet_b0", num_classes=CLASSES),
    "convnext_tiny": partial(
        timm.create_model, "convnext_tiny", num_classes=CLASSES, depths=(1, 1, 1, 1)
    ),
    "densenet121": partial(
        timm.create_model, "densenet121", num_classes=CLASSES, block_config=(2, 2, 2, 2)
    ),
    "fcn_resnet50": partial(torchvision_segmenter, fcn._fcn_resnet),
    "deeplabv3_resnet50": partial(torchvision_segmenter, deeplabv3._deeplabv3_resnet),
    "unet": partial(smp.Unet, "resnet18", encoder_weights=None, classes=CLASSES),
}
# As they are, with (KNConv2d, KernelNorm2d, norms that stay, convolutions that stay).
FULL: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int]]] = {
    "resnet18": (partial(timm.create_model, "resnet18"), (20, 1, 0, 0)),
    "resnet50": (partial(timm.create_model, "resnet50"), (53, 1, 0, 0)),
    "resnetv2_50": (partial(timm.create_model, "resnetv2_50"), (53, 1, 0, 1)),
    "regnetx_002": (partial(timm.create_model, "regnetx_002"), (31, 14, 0, 13)),
    "efficientnet_b0": (partial(timm.create_model, "efficientnet_b0"), (33, 17, 0, 48)),
    "convnext_tiny": (partial(timm.create_model, "convnext_tiny"), (4, 0, 19, 18)),
    "densenet121": (partial(timm.create_model, "densenet121"), (120, 1, 0, 0)),
    "fcn_resnet50": (
        partial(fcn_resnet50, weights=None, weights_backbone=None, aux_loss=True),
        (55, 2, 0, 2),
    ),
    "deeplabv3_resnet50": (
        partial(deeplabv3_resnet50, weights=None, weights_backbone=None),
        (60, 1, 0, 1),
    ),
    "unet": (partial(smp.Unet, "resnet18", encoder_weights=None), (30, 1, 0, 1)),
}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def converted(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return kn_zoo.convert(NETWORKS[name](), verbose=False, **arguments)


def outputs(result: Any) -> list[Tensor]:
    """Logits, or maps of logits, of the main and of auxiliary classifiers."""
    return list(result.values()) if isinstance(result, dict) else [result]


@pytest.mark.parametrize("name", FULL)
def test_every_layer_has_its_fate_and_trains_at_batch_size_1(name: str) -> None:
    build, counts = FULL[name]
    torch.manual_seed(0)
    model = kn_zoo.convert(build(), verbose=False)
    kinds = Counter(type(module) for module in model.modules())
    norms = sum(isinstance(module, NORMS) for module in model.modules())
    assert (kinds[KNConv2d], kinds[KernelNorm2d], norms, kinds[nn.Conv2d]) == counts
    found = outputs(model.train()(torch.randn(1, 3, 64, 64)))
    sum(out.square().mean() for out in found).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_does_not_depend_on_its_batch(name: str, training: bool) -> None:
    model = converted(name, dropout_p=0.0).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        (together,), (alone,) = outputs(model(images)), outputs(model(images[1:2]))
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize("name", NETWORKS)
def test_exports(name: str) -> None:
    model, images = converted(name).eval(), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (images,), strict=False)
    (expected,), (found,) = outputs(model(images)), outputs(program.module()(images))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "backend"), [(name, "aot_eager") for name in NETWORKS] + [("resnet18", "inductor")]
)
def test_compiles_without_a_graph_break(name: str, backend: str) -> None:
    model, images = converted(name).eval(), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    (expected,), (found,) = outputs(model(images)), outputs(compiled(images))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_overfits_32_images(name: str) -> None:
    """Random images and labels: a class for each image, or for each of its quarters."""
    model = converted(name).train()
    images = torch.randn(32, 3, 32, 32)
    labels = torch.randint(CLASSES, (32,))
    if model(images[:1]) if False else name in ("fcn_resnet50", "deeplabv3_resnet50", "unet"):
        labels = torch.randint(CLASSES, (32, 2, 2)).repeat_interleave(16, 1)
        labels = labels.repeat_interleave(16, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        loss = F.cross_entropy(outputs(model(images))[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = outputs(model.eval()(images))
    accuracy = (found.argmax(1) == labels).double().mean()
    assert accuracy > 0.9
