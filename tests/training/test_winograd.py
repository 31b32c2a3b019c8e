"""Winograd's convolutions against PyTorch's in float64."""

import csv
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kn_zoo.training import winograd
from kn_zoo.training.recipe import UserError
from kn_zoo.training.trainer import LOG
from kn_zoo.training.winograd import WinogradConvolutions, winograd_conv2d
from tests.training.runs import run, weights, write_recipe


def problem(
    n: int = 2, c: int = 64, o: int = 72, h: int = 9, w: int = 6, channels_last: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = torch.randn(n, c, h, w), torch.randn(o, c, 3, 3)
    return (
        x.to(memory_format=layout).requires_grad_(),
        weight.to(memory_format=layout).requires_grad_(),
    )


@given(
    n=st.integers(1, 4),
    c=st.sampled_from([64, 72, 128]),
    o=st.sampled_from([64, 80]),
    h=st.integers(1, 13),
    w=st.integers(1, 13),
    channels_last=st.booleans(),
)
def test_output_and_gradients_are_the_convolutions(**shape: Any) -> None:
    x, weight = problem(**shape)
    y = winograd_conv2d(x, weight)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, weight), grad)
    expected_gradients = torch.autograd.grad(expected, (x, weight), grad.double())
    for ours, exact in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).norm() <= 1e-5 * exact.norm()


def test_operators_satisfy_the_rules_of_the_compiler() -> None:
    x, weight = problem()
    torch.library.opcheck(winograd_conv2d, (x, weight))
    grad = torch.randn(2, 72, 9, 6)
    torch.library.opcheck(winograd.winograd_conv2d_backward, (grad, x.detach(), weight.detach()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 0},
        {"padding": "same", "groups": 8},
        {"padding": 1, "stride": 2},
        {"padding": 2, "dilation": 2},
    ],
    ids=str,
)
def test_other_convolutions_remain_as_they_are(arguments: dict[str, Any]) -> None:
    x, weight = problem()
    weight = weight[:, : 64 // arguments.get("groups", 1)]
    with WinogradConvolutions():
        y = F.conv2d(x, weight, **arguments)
    assert torch.equal(y, F.conv2d(x, weight, **arguments))


@pytest.mark.parametrize("channels", [(32, 64), (64, 32), (68, 64), (64, 68)], ids=str)
def test_few_or_odd_numbers_of_channels_are_not_eligible(channels: tuple[int, int]) -> None:
    x, weight = problem(c=channels[0], o=channels[1])
    assert not winograd.is_eligible(x, weight, padding=1)


def test_eligible_convolutions() -> None:
    x, weight = problem()
    assert winograd.is_eligible(x, weight, None, 1, 1)
    assert winograd.is_eligible(x, weight, None, (1,), [1, 1])
    assert not winograd.is_eligible(x.bfloat16(), weight.bfloat16(), None, 1, 1)


def test_bias_is_added() -> None:
    layer = torch.nn.Conv2d(64, 64, 3, padding=1)
    x, _ = problem()
    with WinogradConvolutions():
        y = layer(x)
    assert not torch.equal(y, layer(x))  # other rounding: computed by the algorithm
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("name", ["knpreactresnet20_cifar", "preactresnet20_cifar"])
def test_a_compiled_network_computes_the_same(name: str) -> None:
    model = timm.create_model(name, num_classes=10, depths=[1, 1, 1])
    model = model.to(memory_format=torch.channels_last).eval()
    x = torch.randn(4, 3, 16, 16)
    torch.compiler.reset()
    with WinogradConvolutions():
        compiled = torch.compile(model, fullgraph=True)(x)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(compiled.square().sum(), parameters)
    expected = model(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    exact = torch.autograd.grad(expected.square().sum(), parameters)
    for ours, other in zip(gradients, exact, strict=True):
        assert (ours - other).norm() <= 1e-3 * other.norm() + 1e-6


def test_a_recipe_with_winograd_trains_the_same_network(tmp_path: Path) -> None:
    losses = []
    for setting in (False, True):
        recipe = write_recipe(tmp_path / "recipe.yaml", winograd=setting)
        folder = tmp_path / str(setting)
        assert run(recipe, "--output", folder, "--updates", 2, "--epochs", 1) == 0
        with open(folder / LOG, newline="") as file:
            losses += [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    plain, fast = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert any(not torch.equal(plain[key], fast[key]) for key in plain)


def test_without_a_compiler_the_message_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions\nsecond line")

    monkeypatch.setattr(winograd.cpp_extension, "load", load)
    winograd.load_transforms.cache_clear()
    with pytest.raises(UserError, match=r"pip install ninja.*set winograd: false: Ninja is requi"):
        WinogradConvolutions()
    winograd.load_transforms.cache_clear()
