"""MeanOnlyNorm2d: independence of the batch, running means, gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kn_zoo.layers import MeanOnlyNorm2d


@given(momentum=st.floats(0.01, 1.0), steps=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_mean_is_that_of_the_batches_before(momentum: float, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = MeanOnlyNorm2d(3, momentum, dtype=torch.float64)
    torch.nn.init.normal_(layer.bias)
    expected = torch.zeros(3, dtype=torch.float64)
    for _ in range(steps):
        x = torch.randn(4, 3, 5, 6, dtype=torch.float64) + 2
        out = layer(x)
        torch.testing.assert_close(out, x + (layer.bias - expected).view(-1, 1, 1))
        expected = (1 - momentum) * expected + momentum * x.mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, expected)
    layer.eval()
    torch.testing.assert_close(layer(x), x + (layer.bias - expected).view(-1, 1, 1))
    torch.testing.assert_close(layer.running_mean, expected)


def test_an_image_does_not_depend_on_its_batch() -> None:
    batch = torch.randn(4, 3, 5, 5)
    together, alone = MeanOnlyNorm2d(3), MeanOnlyNorm2d(3)
    assert torch.equal(together(batch)[:1], alone(batch[:1]))


def test_the_gradient_does_not_pass_through_the_mean() -> None:
    layer = MeanOnlyNorm2d(3, dtype=torch.float64)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    layer(x).backward(grad)
    assert x.grad is not None and torch.equal(x.grad, grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type(dtype: torch.dtype) -> None:
    layer = MeanOnlyNorm2d(3)
    assert layer(torch.randn(2, 3, 4, 4).to(dtype)).dtype is dtype
    assert layer.running_mean.dtype is torch.float32


def test_compiled_and_scripted_layers_move_the_mean_too() -> None:
    x = torch.randn(2, 3, 4, 4)
    eager = MeanOnlyNorm2d(3)
    expected = eager(x)
    for wrap in (torch.compile, torch.jit.script):
        layer = MeanOnlyNorm2d(3)
        torch.testing.assert_close(wrap(layer)(x), expected)
        torch.testing.assert_close(layer.running_mean, eager.running_mean)


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.5])
def test_wrong_momentum_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum"):
        MeanOnlyNorm2d(3, momentum)
