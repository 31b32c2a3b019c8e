"""One and three dimensions against the formula itself, every window unfolded in float64."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kn_zoo
from kn_zoo.layers import KernelNorm1d, KernelNorm2d, KernelNorm3d, KNConv1d, KNConv2d, KNConv3d

CONVS = {1: KNConv1d, 2: KNConv2d, 3: KNConv3d}
NORMS = {1: KernelNorm1d, 2: KernelNorm2d, 3: KernelNorm3d}
PARENTS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def windows_of(x: Any, kernel_size: Any, stride: Any, dilation: Any) -> Any:
    """(N, C, *S) -> (N, C, *S', *kernel_size), all windows of a padded input."""
    for i, (size, step, delta) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        x = x.unfold(i + 2, delta * (size - 1) + 1, step)[..., ::delta]
    return x


def statistics_of(windows: Any, dims: Any, p: Any) -> Any:
    """mu and variance expected under dropout p, of all channels: two (N, 1, *S')."""
    n_dims = (1, *range(2 + dims, 2 + 2 * dims))
    n = windows.shape[1] * windows[0, 0].flatten(0, dims - 1)[0].numel()
    mu = windows.mean(n_dims)
    square = windows.square().mean(n_dims)
    var = square / (1 - p) - mu.square() - p / (1 - p) * square / n
    return mu.unsqueeze(1), var.unsqueeze(1)


def direct_conv(layer: Any, x: Any) -> Any:
    """KNConv of any dimensions by its definition."""
    dims = len(layer.kernel_size)
    x = F.pad(x, layer.padding_sides)
    windows = windows_of(x, layer.kernel_size, layer.stride, layer.dilation)
    p = layer.dropout_p if layer.inference_statistics == "expected" else 0.0
    mu, var = statistics_of(windows, dims, p)
    groups, outs = layer.groups, layer.out_channels // layer.groups
    parts = []
    for g, weight in enumerate(layer.weight.split(outs)):
        chans = x.shape[1] // groups
        part = windows[:, g * chans : (g + 1) * chans] - mu.view(*mu.shape, *[1] * dims)
        kernel_dims = list(range(2 + dims, 2 + 2 * dims))
        parts.append(torch.tensordot(part, weight, ([1, *kernel_dims], list(range(1, 2 + dims)))))
    out = torch.cat(parts, -1).movedim(-1, 1) / (var + layer.eps).sqrt()
    if layer.bias is not None:
        out = out + layer.bias.view(1, -1, *[1] * dims)
    return out.relu() if layer.relu else out


def direct_norm(layer: Any, x: Any) -> Any:
    """KernelNorm of any dimensions by its definition."""
    dims = len(layer.kernel_size)
    windows = windows_of(F.pad(x, layer.padding_sides), layer.kernel_size, layer.stride, [1] * dims)
    p = layer.dropout_p if layer.inference_statistics == "expected" else 0.0
    mu, var = (m.view(*m.shape, *[1] * dims) for m in statistics_of(windows, dims, p))
    normalized = (windows - mu) / (var + layer.eps).sqrt()
    order = [axis for i in range(dims) for axis in (2 + i, 2 + dims + i)]  # each S' by its kernel
    side_by_side = normalized.permute(0, 1, *order)
    sizes = [windows.shape[2 + i] * layer.kernel_size[i] for i in range(dims)]
    return side_by_side.reshape(*x.shape[:2], *sizes)


@st.composite
def layers_of_any_dimensions(draw: Any) -> Any:
    """A convolution or a norm of 1, 2 or 3 dimensions, its definition, and an input it accepts."""
    dims = draw(st.sampled_from([1, 2, 3]))

    def numbers(low: Any, high: Any, count: Any = dims) -> Any:
        return tuple(draw(st.integers(low, high)) for _ in range(count))

    kernel_size, stride = numbers(1, 3), numbers(1, 2)
    padding = draw(st.sampled_from([numbers(0, 2), numbers(0, 2, 2 * dims), 1]))
    shared = dict(
        dropout_p=draw(st.sampled_from([0.0, 0.2])),
        inference_statistics=draw(st.sampled_from(["expected", "plain"])),
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups = draw(st.sampled_from([1, 2]))
    channels = groups * draw(st.integers(1, 3))
    dilation = numbers(1, 2)
    if draw(st.booleans()):
        layer: nn.Module = CONVS[dims](
            channels,
            2 * groups,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=draw(st.booleans()),
            relu=draw(st.booleans()),
            **shared,
        )
        definition = direct_conv
    else:
        dilation = (1,) * dims
        layer = NORMS[dims](kernel_size, stride, padding, **shared)
        definition = direct_norm
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    sizes = [n + draw(st.integers(0, 3)) for n in least]
    x = torch.randn(draw(st.integers(1, 2)), channels, *sizes, dtype=torch.float64)
    return layer.double().eval(), definition, x


@given(layers_of_any_dimensions())
@settings(max_examples=100, deadline=None)
def test_equals_the_definition_with_gradients(drawn: Any) -> None:
    layer, definition, x = drawn
    results = []
    for run in (layer, lambda x: definition(layer, x)):
        given_x = x.clone().requires_grad_()
        y = run(given_x)
        direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        inputs = [given_x, *layer.parameters()]
        results.append([y, *torch.autograd.grad(y, inputs, direction)])
    for actual, exact in zip(*results, strict=True):
        scale = max(1.0, float(exact.detach().abs().max()))
        torch.testing.assert_close(actual / scale, exact / scale, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(layer(x[0]), layer(x)[0], msg="unbatched")


@pytest.mark.parametrize("dims", [1, 3])
def test_options_are_those_of_two_dimensions(dims: Any) -> None:
    torch.manual_seed(0)
    layer, parent = CONVS[dims](16, 4, 3, 2, 1), PARENTS[dims](16, 4, 3, 2, 1)
    assert isinstance(layer, PARENTS[dims])
    layer.load_state_dict(parent.state_dict())
    x = torch.randn(2, 16, *[7] * dims)
    assert layer(x).shape == parent(x).shape
    same = CONVS[dims](16, 4, (2,) * dims, padding="same", dilation=3)
    assert same(x).shape[2:] == x.shape[2:]
    with pytest.raises(ValueError, match="use a positive int"):
        CONVS[dims](16, 4, 0)
    with pytest.raises(ValueError, match="left, right"):
        CONVS[dims](16, 4, 3, padding=(1,) * (2 * dims + 1))
    with pytest.raises(ValueError, match=f"use {dims + 2}, or {dims + 1} unbatched"):
        layer(torch.randn(2, 16, *[7] * (dims + 1)))
    model = nn.Sequential(layer, nn.ReLU(), NORMS[dims](1)).eval()
    for statistics in ("expected", "plain", "sampled"):
        kn_zoo.set_inference_statistics(model, statistics)
    assert not torch.equal(model(x), model(x))
    for dropout in ("mask", "gaussian"):
        layer.train().dropout = dropout
        layer.dropout_p = 0.3
        torch.manual_seed(1)
        first = layer(x)
        assert not torch.equal(first, layer(x))
        torch.manual_seed(1)
        torch.testing.assert_close(first, layer(x))
        first.sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dims", [1, 3])
def test_frozen_scripted_exported_and_copied(dims: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(CONVS[dims](3, 16, 3, padding=1, relu=True), CONVS[dims](16, 2, 2)).eval()
    x = torch.randn(2, 3, *[6] * dims)
    expected = model(x)
    frozen = kn_zoo.freeze(model)
    assert not any(isinstance(m, CONVS[dims]) for m in frozen.modules())
    forms = [frozen, torch.jit.script(model), torch.fx.symbolic_trace(model), copy.deepcopy(model)]
    forms += [pickle.loads(pickle.dumps(model)), torch.export.export(model, (x,)).module()]
    for form in forms:
        torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_compiles(dims: Any, training: Any) -> None:
    torch.manual_seed(0)
    layer = CONVS[dims](4, 3, 3, padding=1, dropout_p=0.0).train(training)
    x = torch.randn(2, 4, *[6] * dims)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    actual = torch.autograd.grad(compiled(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dims", [1, 3])
def test_second_derivatives(dims: Any) -> None:
    torch.manual_seed(0)
    layer = CONVS[dims](2, 2, 2, padding=1).double().eval()
    x = torch.randn(1, 2, *[2] * dims, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_float32_is_exact_for_volumes_far_from_zero() -> None:
    torch.manual_seed(0)
    for groups, mean in itertools.product([1, 4], [0.0, 30.0, 1000.0]):
        layer = KNConv3d(32, 8, 3, padding=1, groups=groups, inference_statistics="plain").eval()
        x = torch.randn(1, 32, 7, 7, 7) + mean
        with torch.no_grad():
            actual, exact = layer(x), direct_conv(copy.deepcopy(layer).double(), x.double())
        for part in ((...,), (..., *[slice(2, -2)] * 3)):
            assert (actual - exact)[part].abs().max() <= 2e-6 * exact[part].abs().max()
