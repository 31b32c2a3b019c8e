"""Winograd's convolutions against PyTorch's in float64."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import kn_zoo
from kn_zoo.training import winograd
from kn_zoo.training.recipe import Recipe, UserError
from kn_zoo.training.trainer import LOG
from kn_zoo.training.winograd import WinogradConvolutions, winograd_conv2d
from tests.training.runs import run, weights, write_recipe


def problem(
    n: int = 2,
    c: int = 64,
    o: int = 76,
    h: int = 9,
    w: int = 6,
    r: int = 3,
    channels_last: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = torch.randn(n, c, h, w), torch.randn(o, c, r, r)
    return (
        x.to(memory_format=layout).requires_grad_(),
        weight.to(memory_format=layout).requires_grad_(),
    )


def is_direct(x: torch.Tensor, weight: torch.Tensor, **arguments: Any) -> bool:
    """Whether torch.conv2d itself computes a convolution: another algorithm rounds otherwise."""
    with WinogradConvolutions():
        y = F.conv2d(x, weight, **arguments)
    expected = F.conv2d(x, weight, **arguments)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    return torch.equal(y, expected)


@settings(deadline=None)
@given(
    n=st.integers(1, 4),
    c=st.sampled_from([64, 67, 128]),
    o=st.sampled_from([64, 81]),
    h=st.integers(2, 13),
    w=st.integers(2, 13),
    r=st.sampled_from([2, 3]),
    padding=st.integers(0, 2),
    channels_last=st.booleans(),
)
def test_output_and_gradients_are_the_convolutions(padding: int, **shape: Any) -> None:
    padding = min(padding, shape["r"] - 1)
    assume(min(shape["h"], shape["w"]) + 2 * padding >= shape["r"])
    x, weight = problem(**shape)
    y = winograd_conv2d(x, weight, padding)
    expected = F.conv2d(x.double(), weight.double(), padding=padding)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, weight), grad)
    expected_gradients = torch.autograd.grad(expected, (x, weight), grad.double())
    for ours, exact in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("r", [2, 3])
def test_operators_satisfy_the_rules_of_the_compiler(r: int) -> None:
    x, weight = problem(r=r)
    torch.library.opcheck(winograd_conv2d, (x, weight, 1))
    grad = torch.randn_like(winograd_conv2d(x, weight, 1))
    arguments = (grad, x.detach(), weight.detach(), 1)
    torch.library.opcheck(winograd.winograd_conv2d_backward, arguments)


@pytest.mark.parametrize("arguments", [{}, {"padding": 1}, {"padding": (2, 2)}], ids=str)
def test_convolutions_that_gain(arguments: dict[str, Any]) -> None:
    assert not is_direct(*problem(), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 3},
        {"padding": (1, 0)},
        {"padding": "same"},
        {"padding": 1, "groups": 8},
        {"padding": 1, "stride": 2},
        {"padding": 1, "stride": (1, 2)},
        {"padding": 2, "dilation": 2},
    ],
    ids=str,
)
def test_other_convolutions_remain_as_they_are(arguments: dict[str, Any]) -> None:
    x, weight = problem(o=80)
    assert is_direct(x, weight[:, : 64 // arguments.get("groups", 1)], **arguments)


@pytest.mark.parametrize("shape", [{"c": 63}, {"o": 63}, {"r": 1}, {"r": 4}], ids=str)
def test_few_channels_and_other_filters_remain_as_they_are(shape: dict[str, int]) -> None:
    assert is_direct(*problem(**shape))


def test_other_types_remain_as_they_are() -> None:
    assert is_direct(*(t.double() for t in problem()))


def test_bias_is_added() -> None:
    x, _ = problem()
    layer = nn.Conv2d(64, 64, 3, padding=1)
    with WinogradConvolutions():
        y = layer(x)
    assert not torch.equal(y, layer(x))  # other rounding: computed by the algorithm
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


def test_a_compiled_network_computes_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        kn_zoo.KNConv2d(64, 72, 2, padding=1, relu=True),
        kn_zoo.KNConv2d(72, 64, 3, padding="same"),
        nn.Conv2d(64, 64, 3, padding=1),
    )
    model = model.to(memory_format=torch.channels_last).eval()
    x = torch.randn(4, 64, 7, 7)
    torch.compiler.reset()
    with WinogradConvolutions():
        compiled = torch.compile(model, fullgraph=True)(x)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(compiled.square().sum(), parameters)
    expected = model(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    exact = torch.autograd.grad(expected.square().sum(), parameters)
    for ours, other in zip(gradients, exact, strict=True):
        assert (ours - other).norm() <= 1e-5 * other.norm()


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

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    winograd.load_transforms.cache_clear()
    with pytest.raises(UserError, match=r"pip install ninja.*set winograd: false: Ninja is requi"):
        WinogradConvolutions()
    winograd.load_transforms.cache_clear()


def test_mixed_precision_is_excluded(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", winograd=True, mixed_precision="bf16")
    with pytest.raises(UserError, match="set mixed_precision"):
        Recipe.read(path)
