"""Local Context Normalization against a direct implementation and against group normalization."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kn_zoo.layers import LocalContextNorm


def direct(layer: LocalContextNorm, x: Tensor) -> Tensor:
    """The published formula, pixel by pixel."""
    out = torch.empty_like(x)
    height, width = x.shape[2:]
    p, q = min(layer.window_size[0], height), min(layer.window_size[1], width)
    for first in range(0, x.shape[1], layer.channels_per_group):
        group = slice(first, first + layer.channels_per_group)
        for i in range(height):
            for j in range(width):
                top = min(max(i - (p - 1) // 2, 0), height - p)
                left = min(max(j - (q - 1) // 2, 0), width - q)
                window = x[:, group, top : top + p, left : left + q].flatten(1)
                mu = window.mean(1, keepdim=True)
                std = (window.var(1, keepdim=True, correction=0) + layer.eps).sqrt()
                out[:, group, i, j] = (x[:, group, i, j] - mu) / std
    return out * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)


def layer_of(
    channels: int = 4, channels_per_group: int = 2, window_size: int | tuple[int, int] = 3
) -> LocalContextNorm:
    """A float64 layer with random affine parameters."""
    layer = LocalContextNorm(channels, channels_per_group, window_size, dtype=torch.float64)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer


@given(
    groups=st.integers(1, 3),
    channels_per_group=st.integers(1, 3),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    window=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_direct_formula(
    groups: int,
    channels_per_group: int,
    size: tuple[int, int],
    window: tuple[int, int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    channels = groups * channels_per_group
    layer = layer_of(channels, channels_per_group, window)
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), direct(layer, x), rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_direct_formula() -> None:
    torch.manual_seed(0)
    layer = layer_of(window_size=(3, 2))
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    inputs = (x, layer.weight, layer.bias)
    gradients = torch.autograd.grad((layer(x) * cotangent).sum(), inputs)
    expected = torch.autograd.grad((direct(layer, x) * cotangent).sum(), inputs)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-8)
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_window_of_the_whole_map_is_group_normalization() -> None:
    layer = layer_of(6, 2, 227)
    x = torch.randn(2, 6, 9, 5, dtype=torch.float64)
    expected = F.group_norm(x, 3, layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_matches_float64_of_the_same_input(
    dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    layer = LocalContextNorm(4, window_size=3, dtype=dtype)
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    expected = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_float32_keeps_its_digits_far_from_zero() -> None:
    """A mean of 1000 standard deviations; the input itself is rounded to 6e-5 of them."""
    torch.manual_seed(0)
    layer = LocalContextNorm(4, window_size=3)
    x = torch.randn(2, 4, 8, 8) + 1000
    expected = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=3e-4, atol=3e-4)


def test_output_does_not_depend_on_the_batch_and_keeps_the_memory_format() -> None:
    layer = layer_of()
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=0, atol=1e-13)
    channels_last = x.to(memory_format=torch.channels_last)
    out = layer(channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(x))


def test_script_compile_and_export_give_the_same_output() -> None:
    layer = layer_of(window_size=(3, 4)).eval()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for form in (torch.jit.script(layer), compiled, exported):
        torch.testing.assert_close(form(x), layer(x))
    larger = torch.randn(5, 4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(exported(larger), layer(larger))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="divisor of the 5 channels"):
        LocalContextNorm(5)
    with pytest.raises(ValueError, match="window_size"):
        LocalContextNorm(4, window_size=(3, 0))
