"""Eager kernels: the numbers of the dense form, and a mask that both passes share."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from kn_zoo.layers import KNConv2d, functional, modules
from kn_zoo.layers.eager import chunks, kn_conv_eager, use_eager_kernels
from kn_zoo.layers.eager.custom_ops import channel_moments
from kn_zoo.layers.eager.dropout import dropout_mask

from .test_layers import FORMATS, convolutions


def run(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients for a fixed direction."""
    x = x.detach().requires_grad_()
    y = layer(x)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], direction)]


def assert_all_close(actual: Any, expected: Any, tolerance: Any) -> None:
    for a, b in zip(actual, expected, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a / scale, b / scale, rtol=tolerance, atol=tolerance)


@given(convolutions(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_results_are_the_same_without_eager_kernels(drawn: Any, training: Any) -> None:
    """What remains if the folder is deleted: the dense form, for every layer."""
    layer, x = drawn
    layer = layer.double().train(training)
    layer.dropout_p = 0.0 if training else layer.dropout_p
    x = x.double()
    eager = run(layer, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "use_eager_kernels", lambda x, settings: False)
        patch.setattr(modules, "kn_conv_eager", None)
        dense = run(layer, x)
    assert_all_close(eager, dense, 1e-9)


@given(convolutions(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_results_are_the_same_for_the_same_mask(drawn: Any, relu: Any) -> Any:
    layer, x = drawn
    layer, x = layer.double().train(), x.double()
    layer.dropout_p, layer.relu = 0.2, relu
    torch.manual_seed(3)
    eager = run(layer, x)
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))

    def dense(x: Any, weight: Any, bias: Any, settings: Any) -> Any:
        mask = dropout_mask(chunks.dense_layout(x), settings.dropout_p, seed)
        moments = functional.channel_moments(x * mask, 0.0)
        return functional.kn_conv(x, weight, bias, settings, moments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "kn_conv_eager", dense)
        expected = run(layer, x)
    assert_all_close(eager, expected, 1e-9)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_chunks_make_no_difference(dropout_p: Any, memory_format: Any, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    layer = KNConv2d(16, 8, 3, padding=1, groups=2, dropout_p=dropout_p).double()
    x = torch.randn(7, 16, 6, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    results = []
    for numel in (2**19, 1, 3 * x[0].numel()):
        monkeypatch.setattr(chunks, "CHUNK_NUMEL", numel)
        torch.manual_seed(1)
        results.append(run(layer, x))
    for result in results[1:]:
        assert_all_close(result, results[0], 1e-12)


def test_statistics_are_those_of_the_call() -> None:
    torch.manual_seed(0)
    layer = KNConv2d(16, 4, 3, padding=1, dropout_p=0.2, relu=True).double().train()
    x = torch.randn(3, 16, 6, 5, dtype=torch.float64)
    y, mu, rstd = layer.forward_with_statistics(x)
    conv = nn.functional.conv2d(x, layer.weight, padding=1)
    weight_sum, bias = (v.view(1, -1, 1, 1) for v in (layer.weight.sum((1, 2, 3)), layer.bias))
    torch.testing.assert_close(y, torch.relu((conv - mu * weight_sum) * rstd + bias))
    assert mu.shape == rstd.shape == (3, 1, 6, 5)
    assert not mu.requires_grad
    assert [m.shape for m in layer.forward_with_statistics(x[0])] == [(4, 6, 5), *[(1, 6, 5)] * 2]

    (grad,) = torch.autograd.grad(y[1].sum(), layer.weight)  # the second image's alone
    scaled = (y.detach() > 0).double() * rstd
    per_sample = torch.nn.grad.conv2d_weight(x[1:2], layer.weight.shape, scaled[1:2], padding=1)
    per_sample -= (scaled * mu)[1].sum((1, 2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(grad, per_sample)


def test_where_eager_kernels_run() -> None:
    window = functional.Window([3, 3], [1, 1], [1] * 4, [1, 1])
    plain = functional.ConvSettings(window, 1, 0.0, "mask", 0.0, 1e-5, True, True, False)
    masks = plain._replace(dropout_p=0.1)
    x = torch.randn(1, 16, 4, 4)
    assert use_eager_kernels(x, plain)
    assert use_eager_kernels(x, masks)
    assert use_eager_kernels(x[:, :3], masks._replace(dropout="gaussian"))
    assert not use_eager_kernels(x, masks._replace(dropout="gaussian"))
    assert not use_eager_kernels(x[0], plain)
    assert not use_eager_kernels(x.to("meta"), plain)
    torch.vmap(lambda x: x if not use_eager_kernels(x, plain) else None)(x[None])
    with forward_ad.dual_level():
        assert not use_eager_kernels(x, plain)


@pytest.mark.parametrize("training", [False, True])
def test_forward_mode(training: Any) -> None:
    """Against reverse mode, by torch.func and by dual numbers."""
    torch.manual_seed(0)
    layer = KNConv2d(4, 3, 3, padding=1, dropout_p=0.0, relu=True).double().train(training)
    x, tangent = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64).unbind()
    out, actual = torch.func.jvp(layer, (x,), (tangent,))[:2]
    direction = torch.randn_like(out)
    (pulled,) = torch.autograd.grad(layer(x.requires_grad_()), x, direction)
    torch.testing.assert_close((actual * direction).sum(), (tangent * pulled).sum())
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x.detach(), tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, actual)


def test_vmap_in_training_draws_a_mask_each() -> None:
    layer = KNConv2d(16, 4, 3, padding=1, dropout_p=0.5).train()
    x = torch.randn(1, 16, 6, 5).expand(4, -1, -1, -1)
    y = torch.vmap(lambda x: layer(x[None])[0], randomness="different")(x)
    assert not torch.equal(y[0], y[1])
    same = torch.vmap(lambda x: layer(x[None])[0], randomness="same")(x)
    torch.testing.assert_close(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: layer(x[None])[0])(x)


def test_masks_have_independent_elements_of_probability_p() -> None:
    x = torch.empty(64, 3, 32, 32)
    for p in (0.02, 0.5, 0.9):
        kept = dropout_mask(x, p, 7) > 0
        assert abs(float(kept.double().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / x.numel())
        flat = kept.flatten().double() - (1 - p)
        for lag in (1, 2, 32, 1024):
            correlation = float((flat[lag:] * flat[:-lag]).mean() / (p * (1 - p)))
            assert abs(correlation) < 5 / math.sqrt(x.numel())
    assert torch.equal(dropout_mask(x, 0.5, 7), dropout_mask(x, 0.5, 7))
    assert not torch.equal(dropout_mask(x, 0.5, 7), dropout_mask(x, 0.5, 8))


def test_eager_kernels_take_the_layers_default() -> Any:
    layer, x = KNConv2d(3, 4, 3).eval(), torch.randn(1, 3, 5, 5)
    called = []

    def spy(*arguments: Any) -> Any:
        called.append(True)
        return kn_conv_eager(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "kn_conv_eager", spy)
        copy.deepcopy(layer)(x)
    assert called


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_dropout_has_the_moments_of_a_mask(channels: Any, memory_format: Any) -> None:
    """Means and variances of the per-pixel statistics over draws, both ways of drawing."""
    torch.manual_seed(0)
    p, draws = 0.2, 20_000
    x = (torch.randn(1, channels, 2, 3, dtype=torch.float64) + 1.0).expand(draws, -1, -1, -1)
    x = x.contiguous(memory_format=memory_format)
    mean, var = channel_moments(x, p, torch.tensor(3))
    y = torch.nn.functional.dropout(x, p)
    exact_mean, exact_var = y.mean(1, keepdim=True), y.var(1, keepdim=True, correction=0)
    for actual, exact in ((mean, exact_mean), (var, exact_var)):
        standard_error = exact.std(0) * math.sqrt(2 / draws)
        assert ((actual.mean(0) - exact.mean(0)).abs() <= 5 * standard_error).all()
        torch.testing.assert_close(actual.std(0), exact.std(0), rtol=0.05, atol=0)
    flat = mean[:, 0, 0, 0] - mean[:, 0, 0, 0].mean()
    neighbour = mean[:, 0, 0, 1] - mean[:, 0, 0, 1].mean()
    correlation = (flat * neighbour).mean() / (flat.std() * neighbour.std())
    assert abs(correlation) < 5 / math.sqrt(draws)


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_backward_uses_the_mask_of_the_forward_pass(channels: Any, memory_format: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, channels, 4, 3, dtype=torch.float64).to(memory_format=memory_format)
    x.requires_grad_()
    seed = torch.tensor(11)
    assert torch.autograd.gradcheck(lambda x: channel_moments(x, 0.3, seed), x)
