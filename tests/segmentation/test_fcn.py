"""FCNs: the authors' architecture, sizes, alignment, batches, and checkpoints by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import kn_zoo
from kn_zoo.segmentation import FCN, create_segmentation_model, list_segmentation_models
from kn_zoo.segmentation.fcn import FCNHead
from kn_zoo.segmentation.training import PixelCrossEntropy

CHEAP = "fcn_knpreactresnet18_slim"
BASELINE = "fcn_preactresnet18_slim"


class AuthorsFCN(ResNet):
    """FCN-ResNet as in norm-torch: torchvision's ResNet with a head instead of its classifier."""

    def __init__(self, block: Any, layers: list[int], norm: Callable[[int], nn.Module]) -> None:
        super().__init__(block, layers, norm_layer=norm)
        self.avgpool = self.fc = nn.Identity()
        self.head = nn.Sequential(
            nn.Conv2d(512 * block.expansion, 512, 3, padding=1, bias=False),
            norm(512),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(512, 19, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.head(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(32, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("name", "block", "layers"),
    [
        ("fcn_resnet18", BasicBlock, [2, 2, 2, 2]),
        ("fcn_resnet34", BasicBlock, [3, 4, 6, 3]),
        ("fcn_resnet50", Bottleneck, [3, 4, 6, 3]),
    ],
)
def test_equals_the_authors_architecture(
    name: str, block: Any, layers: list[int], norm: str
) -> None:
    theirs = AuthorsFCN(block, layers, NORMS[norm])
    ours = create_segmentation_model(name, norm=norm, num_classes=19)
    renamed = {"head.0.": "head.conv.", "head.1.": "head.norm.", "head.4.": "head.classifier."}
    state = {}
    torch.manual_seed(0)
    for key, value in theirs.state_dict().items():
        if value.is_floating_point() and "running_var" not in key:  # so that no norm is trivial
            value.add_(0.1 * torch.randn_like(value) * (value.std() if value.dim() > 1 else 1))
        mine = next((key.replace(a, b) for a, b in renamed.items() if key.startswith(a)), None)
        state[mine or f"backbone.{key}"] = value
    ours.load_state_dict(state)  # no key more or less
    x = torch.randn(2, 3, 64, 96)
    for mode in (True, False):
        # dropout draws alike, because both networks have one mask of one shape
        outputs = []
        for model in (theirs.train(mode), ours.train(mode)):
            torch.manual_seed(1)
            outputs.append(model(x))
        expected = interpolate(outputs[0], (64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(outputs[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list_segmentation_models())
def test_scores_have_the_size_of_the_images(name: str) -> None:
    stride = 8 if name.endswith("_cifar") else 16
    for options in ({}, {"output_stride": stride}):
        model = create_segmentation_model(name, num_classes=3, **options).eval()
        size = (33, 40) if options else (67, 45)
        with torch.no_grad():
            assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("skips", [(), (8,), (8, 4)])
@pytest.mark.parametrize("size", [(96, 128), (90, 120)])
@pytest.mark.parametrize("norm", ["kernel", "group"])
def test_scores_stand_where_the_image_has_what_they_tell(
    norm: str, size: tuple[int, int], skips: tuple[int, ...]
) -> None:
    """The gradient of one score has its centre of mass near that pixel."""
    torch.manual_seed(0)
    name, options = (CHEAP, {}) if norm == "kernel" else (BASELINE, {"norm": norm})
    model = create_segmentation_model(name, skips=skips, **options).double().eval()
    y, x = size[0] // 2, size[1] // 2
    mass = torch.zeros(size, dtype=torch.float64)
    for _ in range(4):
        image = torch.randn(1, 3, *size, dtype=torch.float64, requires_grad=True)
        model(image)[0, :, y, x].pow(2).sum().backward()
        mass += image.grad[0].abs().sum(0)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in size)
    centre = [(mass.sum(1) * rows).sum() / mass.sum(), (mass.sum(0) * columns).sum() / mass.sum()]
    assert abs(centre[0] - y) < 8 and abs(centre[1] - x) < 8  # half a pixel of the last map


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad()
    PixelCrossEntropy([1.0] * 11, 11)(model(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("norm", ["kernel", "group", "layer", "batch"])
def test_images_of_a_batch_do_not_depend_on_each_other(norm: str) -> None:
    """A batch's gradient is the mean of its images', but for batch normalization."""
    torch.manual_seed(0)
    name, options = (CHEAP, {"dropout_p": 0.0}) if norm == "kernel" else (BASELINE, {"norm": norm})
    model = create_segmentation_model(name, drop_rate=0.0, **options).double().train()
    images = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    labels = torch.randint(0, 11, (3, 32, 48))
    whole = gradients(model, images, labels)
    single = [gradients(model, images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    difference = (whole - torch.stack(single).mean(0)).norm() / whole.norm()
    assert difference > 0.01 if norm == "batch" else difference < 1e-9


def test_void_pixels_give_no_gradient() -> None:
    scores = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = labels[1, 3, 3] = 7
    PixelCrossEntropy([1.0, 2.0, 0.5], void=7)(scores, labels).backward()
    touched = scores.grad.abs().sum(1) > 0
    assert torch.equal(touched, labels != 7)


@pytest.mark.parametrize("void", [3, 255])
def test_loss_is_torchs_and_zero_on_void(void: int) -> None:
    scores = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, 0] = void
    weights = [1.0, 2.0, 0.5]
    theirs = nn.CrossEntropyLoss(torch.tensor(weights), ignore_index=void)(scores, labels)
    torch.testing.assert_close(PixelCrossEntropy(weights, void)(scores, labels), theirs)
    nothing = PixelCrossEntropy(weights, void)(scores, torch.full_like(labels, void))
    nothing.backward()
    assert nothing == 0 and not scores.grad.any()


def test_all_options_reach_backbone_and_head() -> None:
    options = dict(dropout_p=0.2, dropout="gaussian", inference_statistics="plain")
    model = create_segmentation_model(CHEAP, **options)
    layers = [m for m in model.modules() if isinstance(m, kn_zoo.KNConv2d)]
    heads = [m for m in model.modules() if isinstance(m, FCNHead)]
    assert len(heads) == 3 and all(isinstance(head.conv, kn_zoo.KNConv2d) for head in heads)
    settings = {(m.dropout_p, m.dropout, m.inference_statistics) for m in layers}
    assert settings == {(0.2, "gaussian", "plain")}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    assert not norms and model.pretrained_cfg["num_classes"] == 11


def test_kernel_normalized_heads_take_the_backbones_dropout() -> None:
    model = create_segmentation_model("fcn_knpreactresnet18_cifar")
    layers = [m for m in model.modules() if isinstance(m, kn_zoo.KNConv2d)]
    assert len({m.dropout_p for m in layers}) == 1


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(LookupError, match="fcn_knresnet18"):
        create_segmentation_model("fcn_knresnet81")
    with pytest.raises(ValueError, match="batch, group, layer"):
        create_segmentation_model("fcn_resnet18", norm="kernel")
    with pytest.raises(LookupError):
        create_segmentation_model("fcn_resnet18.no_such_tag")
    backbone = timm.create_model("resnet18", features_only=True)
    with pytest.raises(ValueError, match=r"\[2, 4, 8, 16\]"):
        FCN(backbone, 3, "batch", skips=(32,))
    with pytest.raises(ValueError, match="kernel, batch"):
        FCN(backbone, 3, "instance")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dropout_p"):
        FCN(backbone, 3, "batch", dropout_p=0.1)


def test_names() -> None:
    assert "fcn_knresnet50" in list_segmentation_models()
    assert list_segmentation_models("fcn_resnet*") == [
        "fcn_resnet18",
        "fcn_resnet34",
        "fcn_resnet50",
    ]
    assert all("." in name for name in list_segmentation_models(pretrained=True))


def test_torch_hub_has_them() -> None:
    root = str(Path(kn_zoo.__file__).parents[1])
    model = torch.hub.load(root, CHEAP, source="local", num_classes=4)
    assert model.num_classes == 4 and model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
