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
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import deeplabv3, deeplabv3_resnet50, fcn, fcn_resnet50
from torchvision.models.video import r3d_18

import kn_zoo
from kn_zoo.layers import KernelNorm2d, KNConv2d

smp = pytest.importorskip("segmentation_models_pytorch", reason="the dev extra is not installed")

CLASSES = 4
SHORT = dict(layers=(1, 1, 1, 1))


def torchvision_segmenter(network: type[nn.Module], head: Callable[..., nn.Module]) -> nn.Module:
    """FCN or DeepLabV3 on the first two stages of a ResNet of bottlenecks, one block each."""
    backbone = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])
    return network(IntermediateLayerGetter(backbone, {"layer2": "out"}), head(512, CLASSES))


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
    "fcn_resnet50": partial(torchvision_segmenter, fcn.FCN, fcn.FCNHead),
    "deeplabv3_resnet50": partial(
        torchvision_segmenter, deeplabv3.DeepLabV3, deeplabv3.DeepLabHead
    ),
    "unet": partial(
        smp.Unet,
        "resnet18",
        3,
        encoder_weights=None,
        decoder_channels=(64, 32, 16),
        classes=CLASSES,
    ),
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
    actual = outputs(model.train()(torch.randn(1, 3, 64, 64)))
    sum(out.square().mean() for out in actual).backward()
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
    (expected,), (actual,) = outputs(model(images)), outputs(program.module()(images))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_compiles_without_a_graph_break(name: str) -> None:
    check_compiled(converted(name), backend="aot_eager")  # what comes before code generation


def test_compiles_to_machine_code() -> None:
    block = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    check_compiled(kn_zoo.convert(model, verbose=False), backend="inductor")


def check_compiled(model: nn.Module, backend: str) -> None:
    images = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model.eval(), backend=backend, fullgraph=True)
    with torch.no_grad():
        (expected,), (actual,) = outputs(model(images)), outputs(compiled(images))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_overfits_32_images(name: str) -> None:
    """Random images and labels: a class for each image, or for each of its quarters."""
    model = converted(name).train()
    images = torch.randn(32, 3, 32, 32)
    labels = torch.randint(CLASSES, (32,))
    if name in ("fcn_resnet50", "deeplabv3_resnet50", "unet"):
        labels = torch.randint(CLASSES, (32, 2, 2)).repeat_interleave(16, 1)
        labels = labels.repeat_interleave(16, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        loss = F.cross_entropy(outputs(model(images))[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        (actual,) = outputs(model.eval()(images))
    accuracy = (actual.argmax(1) == labels).double().mean()
    assert accuracy > 0.9


class Branching(nn.Sequential):
    """A sequence that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() == x.sum() else x


@st.composite
def plain_networks(draw: st.DrawFn) -> list[nn.Module]:
    """Convolutions, each with a norm after it or before it, then a head."""
    modules: list[nn.Module] = []
    channels = 4
    for _ in range(draw(st.integers(1, 4))):
        width = draw(st.sampled_from([4, 8]))
        kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        padding = draw(st.sampled_from(["same", "valid", 0, 1, 2]))
        groups = draw(st.sampled_from([1, 1, 2]))
        conv = nn.Conv2d(
            channels, width, kernel, 1 if padding == "same" else stride, padding,
            groups=groups, bias=draw(st.booleans()),
        )  # fmt: skip
        before = draw(st.booleans())
        features = channels if before else width
        batch = draw(st.booleans())
        norm_act = [nn.BatchNorm2d(features) if batch else nn.GroupNorm(2, features), nn.ReLU()]
        modules += [*norm_act, conv] if before else [conv, *norm_act]
        channels = width
    return [*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


@given(modules=plain_networks(), grouped=st.booleans())
@settings(max_examples=40, deadline=None)
def test_sequences(modules: list[nn.Module], grouped: bool) -> None:
    """No batch statistics remain, and no dense convolution if the order is known for sure."""
    converted: list[set[str]] = []
    for kind in (nn.Sequential, Branching):
        try:
            network = kn_zoo.convert(kind(*modules), 0.0, grouped=grouped, verbose=False)
        except ValueError as error:
            dense = [m for m in modules if isinstance(m, nn.Conv2d) and m.groups == 1]
            nothing = "nothing to convert" in str(error) and not grouped and not dense
            assert nothing or (kind is Branching and "follows another norm" in str(error))
            return
        assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
        converted.append({n for n, m in network.named_modules() if isinstance(m, KNConv2d)})
        images = torch.randn(2, 4, 64, 64, dtype=torch.float64)
        network.double()
        torch.testing.assert_close(network(images)[:1], network(images[:1]))
    traced, in_order = converted
    assert in_order <= traced
    assert traced == {
        str(i)
        for i, m in enumerate(modules)
        if isinstance(m, nn.Conv2d) and (grouped or m.groups == 1)
    }


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["same", "valid", 1]),
)
@settings(max_examples=30, deadline=None)
def test_a_convolution_and_its_norm_become_algorithm_1(
    kernel: tuple[int, int], dilation: int, padding: str | int
) -> None:
    conv = nn.Conv2d(3, 5, kernel, padding=padding, dilation=dilation)
    model = nn.Sequential(conv, nn.BatchNorm2d(5), nn.ReLU()).double()
    x = torch.randn(2, 3, 12, 11, dtype=torch.float64)
    actual = kn_zoo.convert(model, 0.0, keep_weights=True, verbose=False).eval()(x)
    sides = conv._reversed_padding_repeated_twice
    units = F.unfold(F.pad(x, sides), kernel, dilation)
    units = (units - units.mean(1, True)) / (units.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    out = conv.weight.flatten(1) @ units + conv.bias[:, None]
    torch.testing.assert_close(actual, out.view_as(actual).relu())


def test_the_model_given_stays_as_it_is() -> None:
    model = NETWORKS["resnet18"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = kn_zoo.convert(model, keep_weights=True, verbose=False)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name in before:  # biases of KNConv2d are new
                assert torch.equal(parameter, before[name])
            parameter.add_(1.0)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    fresh = kn_zoo.convert(model, verbose=False)
    assert not torch.equal(fresh.conv1.weight, model.conv1.weight)
    assert torch.equal(fresh.fc.weight, model.fc.weight)


def test_skip_keeps_convolutions_with_their_norms() -> None:
    model = kn_zoo.convert(NETWORKS["resnet18"](), skip=["layer1", "conv?"], verbose=False)
    kept = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert kept == {"bn1", "layer1.0.bn1", "layer1.0.bn2"}
    assert type(model.conv1) is nn.Conv2d and type(model.layer2[0].conv1) is KNConv2d


def test_every_use_of_a_shared_block_is_converted() -> None:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(block, nn.MaxPool2d(2), block)
    result = kn_zoo.convert(model, verbose=False)
    assert result[0] is result[2] and type(result[2][0]) is KNConv2d


def test_the_table_names_every_convolution_and_norm(capsys: pytest.CaptureFixture[str]) -> None:
    kn_zoo.convert(NETWORKS["efficientnet_b0"]())
    printed = capsys.readouterr().out
    assert "traced by torch.fx" in printed
    rows = {
        row[1].strip(): row
        for row in (line.split("│") for line in printed.splitlines() if "│" in line)
    }
    for name, module in NETWORKS["efficientnet_b0"]().named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            assert type(module).__name__ in rows[name][2]
    assert "KernelNorm2d, SiLU" in rows["bn2"][3] and "before the head" in rows["bn2"][4]


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda *_: None)
    return model


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class TwoNorms(nn.Module):
    """One norm after a convolution and after a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.depthwise = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, groups=3)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.depthwise(self.norm(self.dense(x))))


class Unordered(Branching):
    """Registers its convolutions first, and its norms then."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "nothing to convert"),
    "a name too many": (NETWORKS["resnet18"], dict(skip="layer9"), "skip='layer9'"),
    "reflection": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)
        ),
        {},
        "'0' has padding_mode='reflect'",
    ),
    "padding by input size": (
        partial(timm.create_model, "tf_efficientnet_b0"),
        {},
        "'conv_stem': Conv2dSame does more than Conv2d",
    ),
    "hooks": (hooked, {}, "'0' has hooks"),
    "parametrized": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)
        ),
        {},
        "'0' is parametrized",
    ),
    "norm of its own kind": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ScaledNorm(4)), {}, "'1': what ScaledNorm does"
    ),
    "batch statistics elsewhere": (
        partial(timm.create_model, "levit_128s"), {}, r"\(BatchNorm1d\) would still normalize over"
    ),
    "two roles": (TwoNorms, {}, "'norm' is called more than once"),
    "no order": (Unordered, {}, "'norm2' follows another norm"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_know(case: str) -> None:
    build, arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        kn_zoo.convert(build(), verbose=False, **arguments)


@pytest.mark.skipif(not hasattr(kn_zoo.layers, "KNConv3d"), reason="there is no KNConv3d yet")
def test_volumes() -> None:
    model = kn_zoo.convert(r3d_18(num_classes=CLASSES), 0.0, verbose=False)
    kinds = Counter(type(module).__name__ for module in model.modules())
    assert (kinds["KNConv3d"], kinds["KernelNorm3d"], kinds["BatchNorm3d"]) == (20, 1, 0)
    videos = torch.randn(2, 3, 4, 32, 32)
    output = model(videos)
    torch.testing.assert_close(output[:1], model(videos[:1]), atol=1e-4, rtol=1e-4)
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
