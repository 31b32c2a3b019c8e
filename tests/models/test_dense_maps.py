"""Feature maps for dense prediction, and the decoders of other libraries on top of them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork

from tests.models.test_models import OURS, create, shallow

BACKBONES = {name: shallow(name, features_only=True) for name in OURS}
IMAGENET = ("knresnet18", "knresnet34", "knresnet50", "knpreactresnet18", "knpreactresnet50")
ENCODERS = (*IMAGENET, "knconvnext_tiny")
LOW_RESOLUTION = {  # and the number of maps after the first, which has the images' resolution
    "knresnet18_cifar": 3,
    "knpreactresnet18_cifar": 3,
    "resnet18_cifar": 3,
    "knresnet13_cifar": 3,
    "knpreactresnet20_cifar": 2,
    "knresnet8_cifar": 2,
    "kndensenet20x16_cifar": 2,
}


def image(*size: int, device: str = "meta") -> Tensor:
    return torch.randn(2, 3, *size, device=device)


@pytest.mark.parametrize("architecture", OURS)
@given(size=st.tuples(st.integers(32, 200), st.integers(32, 200)))
@example(size=(512, 1024))
@example(size=(33, 65))
@settings(max_examples=10, deadline=None)
def test_maps_have_the_size_of_the_input_over_their_reduction(
    architecture: str, size: tuple[int, int]
) -> None:
    """Rounded up, as in timm's ResNets; the first reduction is 1, 2 or 4 and each doubles it."""
    backbone = BACKBONES[architecture]
    info = backbone.feature_info
    reductions = info.reduction()
    assert reductions[0] in (1, 2, 4)
    assert reductions == [reductions[0] * 2**i for i in range(len(reductions))]
    for map_, channels, reduction in zip(
        backbone(image(*size)), info.channels(), reductions, strict=True
    ):
        assert map_.shape[1:] == (channels, *(math.ceil(side / reduction) for side in size))


@pytest.mark.parametrize("architecture", OURS)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride_limits_the_reductions(architecture: str, output_stride: int) -> None:
    backbone = shallow(architecture, features_only=True, output_stride=output_stride)
    full = BACKBONES[architecture].feature_info.reduction()
    reductions = [min(output_stride, reduction) for reduction in full]
    assert backbone.feature_info.reduction() == reductions
    maps = backbone(image(90, 65))
    for map_, reduction in zip(maps, reductions, strict=True):
        assert map_.shape[2:] == (math.ceil(90 / reduction), math.ceil(65 / reduction))


@pytest.mark.parametrize("architecture", ["knresnet18", "knresnet34", "knresnet50"])
def test_classifiers_keep_the_published_padding(architecture: str) -> None:
    """One pixel more than input / reduction in KNResNet-18 and -34; the same parameters."""
    classifier = shallow(architecture)
    maps = classifier.forward_intermediates(image(512, 1024), intermediates_only=True)
    more = int(architecture != "knresnet50")
    assert maps[-1].shape[2:] == (16 + more, 32 + more)
    dense = shallow(architecture, dense_maps=True).state_dict()
    assert {k: v.shape for k, v in dense.items()} == {
        k: v.shape for k, v in classifier.state_dict().items()
    }


@pytest.mark.parametrize("architecture", ["knresnet18", "knconvnext_tiny", "kndensenet20x16_cifar"])
def test_parameters_of_a_classifier_give_the_maps_of_its_backbone(architecture: str) -> None:
    """At a size without rounding all but the last map of a KNResNet-18 are the classifier's."""
    model = create(architecture).eval()
    backbone = create(architecture, features_only=True).eval()
    backbone.model.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in backbone.model.state_dict()}
    )
    x = image(96, 128, device="cpu")
    with torch.inference_mode():
        expected = model.forward_intermediates(x, intermediates_only=True)
        maps = backbone(x)
    count = len(maps) - (architecture == "knresnet18")
    for map_, reference in zip(maps[:count], expected[:count], strict=True):
        torch.testing.assert_close(map_, reference)


@pytest.mark.parametrize("architecture", OURS)
def test_scripted_backbone_gives_the_same_maps(architecture: str) -> None:
    torch.manual_seed(0)
    backbone = shallow(architecture, features_only=True, device="cpu", dtype=torch.float64)
    scripted = torch.jit.script(backbone)
    x = image(33, 49, device="cpu").double()
    with torch.inference_mode():
        for map_, expected in zip(scripted(x), backbone(x), strict=True):
            torch.testing.assert_close(map_, expected)


@pytest.mark.parametrize("architecture", ["knresnet18", "knpreactresnet18", "knconvnext_tiny"])
def test_feature_pyramid_of_torchvision(architecture: str) -> None:
    dense = {} if "preact" in architecture else dict(dense_maps=True)  # strides always round up
    model = create(architecture, **dense).eval()
    nodes = {f"stages.{i}": str(i) for i in range(4)}
    body = create_feature_extractor(model, nodes)
    channels = [info["num_chs"] for info in model.feature_info[-4:]]
    pyramid = FeaturePyramidNetwork(channels, 16)
    maps = pyramid(body(image(97, 129, device="cpu")))
    sides = [(math.ceil(97 / r), math.ceil(129 / r)) for r in (4, 8, 16, 32)]
    assert [map_.shape[1:] for map_ in maps.values()] == [(16, *side) for side in sides]


def decoders(smp: Any) -> list[Any]:
    """All segmentation networks of the library but DPT, which takes transformers only."""
    names = (
        "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer"
    )
    return [getattr(smp, name) for name in names.split()]


@pytest.mark.parametrize("architecture", ENCODERS)
def test_decoders_of_segmentation_models_pytorch(architecture: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    for decoder in decoders(smp):
        with torch.device("meta"):
            model = decoder("tu-" + architecture, encoder_weights=None, classes=5).eval()
        sizes = [(128, 192)]
        if not decoder.requires_divisible_input_shape:
            sizes.append((129, 191))
        for size in sizes:
            assert model(image(*size)).shape == (2, 5, *size), (decoder, size)


@pytest.mark.parametrize("architecture", LOW_RESOLUTION)
def test_decoders_on_low_resolution_encoders(architecture: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    depth = LOW_RESOLUTION[architecture]
    deep_only = (smp.FPN, smp.PAN, smp.DeepLabV3Plus, smp.UPerNet, smp.Segformer)  # 3 or more
    for decoder in decoders(smp):
        if depth < 3 and decoder in deep_only:
            continue
        kwargs: dict[str, Any] = dict(encoder_depth=depth)
        if decoder in (smp.Unet, smp.UnetPlusPlus, smp.MAnet):
            kwargs["decoder_channels"] = (32, 16, 8)[:depth]
        if decoder is smp.FPN:  # its finest map has the images' resolution
            kwargs["upsampling"] = 1
        if decoder is smp.PSPNet:
            kwargs["upsampling"] = 2**depth
        with torch.device("meta"):
            model = decoder("tu-" + architecture, encoder_weights=None, classes=5, **kwargs).eval()
        assert model(image(64, 96)).shape == (2, 5, 64, 96), decoder


@pytest.mark.parametrize(
    "architecture", ["knresnet18", "knconvnext_tiny", "knpreactresnet20_cifar"]
)
def test_scripted_unet_gives_the_same_scores(architecture: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    depth = 2 if "20" in architecture else 5
    channels = (64, 32, 16, 8, 8)[:depth]
    torch.manual_seed(0)
    model = smp.Unet(
        "tu-" + architecture, encoder_weights=None, encoder_depth=depth, decoder_channels=channels
    )
    model = model.eval().double()
    x = image(64, 96, device="cpu").double()
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
