"""Per-sample gradients of private layers and networks, and what private training refuses."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kn_zoo
from kn_zoo import KNConv2d
from kn_zoo.layers.reference import ReferenceKNConv2d

pytest.importorskip("opacus", reason="Opacus is not installed: pip install 'kn_zoo[privacy]'")

from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule, prepare_module
from opacus.validators import ModuleValidator

from kn_zoo import privacy

NETWORKS = [
    "knresnet8_cifar",
    "knresnet13_cifar",
    "kndensenet20x16_cifar",
    "knpreactresnet20_cifar",
]


@st.composite
def layers(draw: st.DrawFn) -> KNConv2d:
    groups = draw(st.sampled_from([1, 2]))
    torch.manual_seed(draw(st.integers(0, 99)))
    kernel_size: Any = draw(st.sampled_from([1, 2, 3, (1, 3)]))
    padding: Any = draw(st.sampled_from([0, 1, (1, 0, 1, 0), (0, 2, 1, 1)]))
    return KNConv2d(
        in_channels=groups * draw(st.integers(1, 9)),
        out_channels=groups * draw(st.integers(1, 3)),
        kernel_size=kernel_size,
        stride=draw(st.integers(1, 2)),
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.1])),
        dropout=draw(st.sampled_from(["mask", "gaussian"])),
        relu=draw(st.booleans()),
        weight_standardization=draw(st.booleans()),
        dtype=torch.float64,
    )


def losses(model: nn.Module, x: Tensor) -> Tensor:
    """One loss an image, (N,), whose gradient depends on every output."""
    out = model(x).flatten(1)
    return (out * torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)).sin().sum(1)


def prepared(model: nn.Module, mode: str = "hooks", **kwargs: Any) -> GradSampleModule:
    model = copy.deepcopy(model).train()
    ModuleValidator.validate(model, strict=True)
    return prepare_module(model, mode, loss_reduction="sum", **kwargs)


def per_sample(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of every image by Opacus, and by differentiating each loss of the same forward."""
    private = prepared(model)
    private.hooks_enabled = True
    value = losses(private, x)
    parameters = list(private.parameters())
    private.disable_hooks()
    one_by_one = [torch.autograd.grad(v, parameters, retain_graph=True) for v in value]
    private.enable_hooks()
    value.sum().backward()
    expected = [torch.stack(grads) for grads in zip(*one_by_one, strict=True)]
    return [p.grad_sample for p in parameters], expected


@settings(deadline=None, max_examples=60)
@given(layers(), st.integers(1, 3))
def test_layers_gradients_are_those_of_each_image(layer: KNConv2d, images: int) -> None:
    x = torch.randn(images, layer.in_channels, 6, 7, dtype=torch.float64)
    samples, expected = per_sample(nn.Sequential(layer), x)
    for sample, wanted in zip(samples, expected, strict=True):
        torch.testing.assert_close(sample, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("act_layer", ["relu", "mish"])
def test_networks_gradients_are_those_of_each_image(name: str, act_layer: str) -> None:
    model = timm.create_model(name, num_classes=5, act_layer=act_layer).double()
    samples, expected = per_sample(model, torch.randn(3, 3, 16, 16, dtype=torch.float64))
    for sample, wanted in zip(samples, expected, strict=True):
        torch.testing.assert_close(sample, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("act_layer", ["relu", "mish"])
def test_group_norms_gradients_are_those_of_each_image(act_layer: str) -> None:
    options: dict[str, Any] = dict(num_classes=5, norm="group", act_layer=act_layer)
    model = timm.create_model("preactresnet20_cifar", **options).double()
    samples, expected = per_sample(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    for sample, wanted in zip(samples, expected, strict=True):
        torch.testing.assert_close(sample, wanted, rtol=1e-7, atol=1e-9)


def test_gradients_equal_those_of_the_reference_at_batch_size_one() -> None:
    torch.manual_seed(0)
    layer = KNConv2d(6, 4, 3, padding=1, dropout_p=0.0, relu=True, dtype=torch.float64)
    reference = ReferenceKNConv2d(6, 4, 3, padding=1, dropout_p=0.0, relu=True, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6, 8, 8, dtype=torch.float64)
    samples, _ = per_sample(nn.Sequential(layer), x)
    for i in range(len(x)):
        reference.zero_grad()
        losses(nn.Sequential(reference), x[i : i + 1]).sum().backward()
        for sample, parameter in zip(samples, reference.parameters(), strict=True):
            torch.testing.assert_close(sample[i], parameter.grad, rtol=1e-9, atol=1e-11)


def test_another_image_leaves_an_images_gradient_alone() -> None:
    model = timm.create_model("knresnet8_cifar", dropout_p=0.0).double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    before, _ = per_sample(model, x)
    x[1] = 100 * torch.randn_like(x[1])
    after, _ = per_sample(model, x)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one[[0, 2]], other[[0, 2]], rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(layers(), st.integers(1, 3))
def test_norms_for_ghost_clipping_are_those_of_the_gradients(layer: KNConv2d, images: int) -> None:
    x = torch.randn(images, layer.in_channels, 6, 7, dtype=torch.float64)
    torch.manual_seed(1)
    samples, _ = per_sample(nn.Sequential(layer), x)
    ghost = prepared(nn.Sequential(layer), "ghost", max_grad_norm=1.0)
    torch.manual_seed(1)
    losses(ghost, x).sum().backward()
    for parameter, sample in zip(ghost.parameters(), samples, strict=True):
        wanted = sample.flatten(1).norm(2, dim=1)
        torch.testing.assert_close(parameter._norm_sample, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("side", [2, 12])  # by units, and by the gradient
def test_both_ways_to_a_norm_agree(side: int) -> None:
    torch.manual_seed(0)
    layer = privacy.PrivateKNConv2d(16, 8, 3, padding=1, groups=2, dtype=torch.float64)
    x = torch.randn(3, 16, side, side, dtype=torch.float64)
    scaled = torch.randn(3, 8, side, side, dtype=torch.float64)
    mu = torch.randn(3, 1, side, side, dtype=torch.float64)
    norms = privacy._weight_norms(layer, x, scaled, mu)
    gradients = privacy._weight_gradients(layer, x, scaled, mu)
    torch.testing.assert_close(norms, gradients.flatten(1).norm(2, dim=1))


# With the engine


def engine(
    model: nn.Module, images: int = 24, batch: int = 8, mode: str = "hooks", **settings: Any
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x, y = torch.randn(images, 3, 16, 16), torch.randint(0, 10, (images,))
    loader = DataLoader(TensorDataset(x, y), batch_size=batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = dict(noise_multiplier=1.0, max_grad_norm=0.5) | settings
    return PrivacyEngine().make_private(
        module=model.train(),
        optimizer=optimizer,
        data_loader=loader,
        criterion=nn.CrossEntropyLoss(),
        grad_sample_mode=mode,
        **options,
    )


@pytest.fixture
def model() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield timm.create_model("knresnet8_cifar", dropout_p=0.1)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_contribution_is_at_most_the_clipping_norm(model: nn.Module, mode: str) -> None:
    """Without noise the update of one image is no longer than the clipping norm."""
    x, y = 50 * torch.randn(1, 3, 16, 16), torch.tensor([3])
    private, optimizer, *criterion, _ = engine(model, batch=8, mode=mode, noise_multiplier=0.0)
    loss = criterion[0] if criterion else nn.CrossEntropyLoss()
    loss(private(x), y).backward()
    optimizer.step()
    norm = torch.cat([p.grad.flatten() for p in private.parameters()]).norm()
    assert 0 < norm * optimizer.expected_batch_size <= 0.5 * (1 + 1e-5)


def clipped_gradient(mode: str, parts: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("knresnet8_cifar", dropout_p=0.0)
    private, optimizer, *criterion, _ = engine(
        model, mode=mode, noise_multiplier=0.0, poisson_sampling=False
    )
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
    loss = criterion[0] if criterion else nn.CrossEntropyLoss()
    chunks = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    for i, (images, targets) in enumerate(chunks):
        optimizer.signal_skip_step(do_skip=i + 1 < parts)
        loss(private(images), targets).backward()
        optimizer.step()
        if i + 1 < parts:
            optimizer.zero_grad()
    return [p.grad.clone() for p in private.parameters()]


def test_hooks_and_ghost_clip_alike_and_a_split_batch_is_the_whole() -> None:
    whole = clipped_gradient("hooks", 1)
    for mode, parts in (("ghost", 1), ("hooks", 2), ("ghost", 2)):
        for one, other in zip(whole, clipped_gradient(mode, parts), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_noise_has_the_stated_deviation_and_differs_from_run_to_run(model: nn.Module) -> None:
    private, optimizer, _ = engine(model, noise_multiplier=2.0)
    draws = []
    for _ in range(2):
        (0.0 * private(torch.randn(4, 3, 16, 16))).sum().backward()
        optimizer.step()
        draws.append(torch.cat([p.grad.flatten() for p in private.parameters()]))
        optimizer.zero_grad()
    wanted = 2.0 * 0.5 / optimizer.expected_batch_size
    for noise in draws:
        assert noise.std() == pytest.approx(wanted, rel=0.01)
    assert not torch.equal(*draws)


def test_an_empty_batch_makes_a_finite_step(model: nn.Module) -> None:
    private, optimizer, _ = engine(model)
    logits = private(torch.zeros(0, 3, 16, 16))
    nn.functional.cross_entropy(
        logits, torch.zeros(0, dtype=torch.long), reduction="sum"
    ).backward()
    optimizer.step()
    assert all(p.grad.isfinite().all() and p.isfinite().all() for p in private.parameters())


def test_nothing_is_left_behind(model: nn.Module) -> None:
    keys, x = list(model.state_dict()), torch.randn(2, 3, 16, 16)
    before = model.eval()(x)
    private, optimizer, _ = engine(model)
    private(x).sum().backward()
    optimizer.zero_grad()
    layers = [m for m in model.modules() if isinstance(m, privacy.PrivateKNConv2d)]
    assert layers and all(layer.kept == [] for layer in layers)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=0)
    assert all(layer.kept == [] for layer in layers)
    private.to_standard_module()
    restored = privacy.restore(model)
    assert {type(m) for m in restored.modules() if isinstance(m, KNConv2d)} == {KNConv2d}
    torch.testing.assert_close(kn_zoo.freeze(restored)(x), before, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(restored.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), before, rtol=1e-4, atol=1e-4)


# What is refused


def test_functorch_with_dropout_is_refused(model: nn.Module) -> None:
    private, *_ = engine(model, mode="functorch")
    with pytest.raises(RuntimeError, match="another dropout mask"):
        private(torch.randn(2, 3, 16, 16)).sum().backward()


def test_functorch_without_dropout_agrees_with_hooks() -> None:
    model = timm.create_model("knresnet8_cifar", dropout_p=0.0).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    samples, _ = per_sample(model, x)
    private = prepared(model, "functorch")
    losses(private, x).sum().backward()
    for parameter, sample in zip(private.parameters(), samples, strict=True):
        torch.testing.assert_close(parameter.grad_sample, sample, rtol=1e-7, atol=1e-9)


def test_activation_checkpointing_is_refused(model: nn.Module) -> None:
    network: Any = model
    network.set_grad_checkpointing(True)
    private, *_ = engine(model)
    with pytest.raises(RuntimeError, match="set_grad_checkpointing"):
        private(torch.randn(2, 3, 16, 16)).sum().backward()


def test_batch_norm_is_refused() -> None:
    with pytest.raises(Exception, match="BatchNorm"):
        engine(timm.create_model("preactresnet20_cifar", norm="batch"))


def test_autocast_is_refused(model: nn.Module) -> None:
    private, *_ = engine(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        private(torch.randn(2, 3, 16, 16))
