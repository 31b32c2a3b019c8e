"""The layers against the authors' numbers, Algorithm 1 as written, and float64."""

import copy
import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import kn_zoo
from kn_zoo.layers import (
    KernelNorm1d,
    KernelNorm2d,
    KNConv2d,
    functional,
    modules,
    set_inference_statistics,
)
from kn_zoo.layers.eager.custom_ops import channel_moments
from kn_zoo.layers.functional import Window, unit_statistics
from kn_zoo.layers.reference import ReferenceKNConv2d

LAYERS = {"KNConv2d": KNConv2d, "KernelNorm2d": KernelNorm2d, "KernelNorm1d": KernelNorm1d}
FORMATS = (torch.contiguous_format, torch.channels_last)


def reference_of(layer: KNConv2d) -> KNConv2d:
    """The same layer, unfolding every window, in float64."""
    slow = copy.deepcopy(layer).double()
    slow.__class__ = ReferenceKNConv2d
    return slow


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max())


@st.composite
def convolutions(draw: Any) -> Any:
    """A KNConv2d of any settings and an input it accepts."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(
        st.one_of(
            st.integers(0, 2),
            st.tuples(st.integers(0, 2), st.integers(0, 3)),
            st.tuples(*[st.integers(0, 3)] * 4),
        )
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = KNConv2d(
        groups * draw(st.integers(1, 8)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.05, 0.3])),
        inference_statistics=draw(st.sampled_from(["expected", "plain"])),
        weight_standardization=draw(st.booleans()),
    )
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    height, width = (n + draw(st.integers(0, 6)) for n in least)
    x = torch.randn(draw(st.integers(1, 3)), layer.in_channels, height, width)
    return layer, x.to(memory_format=draw(st.sampled_from(FORMATS)))


def upstream_cases(folder: Any) -> Any:
    arrays = np.load(folder / "layers.npz")
    for i, case in enumerate(json.loads(str(arrays["cases"]))):
        names = ["x", "y", "std", "weight", "bias"]
        names += ["grad_output", "grad_input", "grad_weight", "grad_bias"]
        actual = {k: torch.from_numpy(arrays[f"{i}_{k}"]) for k in names if f"{i}_{k}" in arrays}
        yield i, case, actual


def layer_of(case: Any) -> Any:
    """The layer of an authors' case. They mean (left/right, top/bottom) by two paddings."""
    settings = {k: v for k, v in case.items() if k not in ("kind", "draws")}
    for key in ("kernel_size", "stride", "padding"):
        if isinstance(settings[key], list):
            settings[key] = tuple(settings[key])
    if isinstance(settings["padding"], tuple) and len(settings["padding"]) == 2:
        a, b = settings["padding"]
        settings["padding"] = (a, a, b, b)
    kind = case["kind"].split("-")[0]
    return LAYERS[kind](**{"dropout_p": 0.0, **settings}).double()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_values_and_gradients_are_the_authors(upstream: Any, memory_format: Any) -> None:
    checked = 0
    for i, case, arrays in upstream_cases(upstream):
        if "dropout" in case["kind"]:
            continue
        layer, x = layer_of(case), arrays["x"].clone()
        if x.dim() == 4:
            x = x.to(memory_format=memory_format)
        if "weight" in arrays:
            layer.load_state_dict({k: arrays[k] for k in ("weight", "bias")})
        for training in (True, False):
            layer.train(training).zero_grad()
            x = x.detach().requires_grad_()
            y = layer(x)
            y.backward(arrays["grad_output"])
            actual = {"y": y, "grad_input": x.grad}
            actual |= {f"grad_{k}": p.grad for k, p in layer.named_parameters()}
            for key, value in actual.items():
                error = (value - arrays[key]).abs().max()
                assert error <= 1e-9, f"case {i} {case['kind']}: {key} is off by {error:.1e}"
            checked += 1
    assert checked == 28


def test_dropout_moments_are_the_authors(upstream: Any) -> None:
    draws, checked = 40_000, 0
    for i, case, arrays in upstream_cases(upstream):
        if "dropout" not in case["kind"]:
            continue
        layer = layer_of(case).train()
        layer.load_state_dict({k: arrays[k] for k in ("weight", "bias")})
        torch.manual_seed(i)
        with torch.no_grad():
            y = layer(arrays["x"].expand(draws, -1, -1, -1))
        theirs = arrays["std"] / math.sqrt(case["draws"])
        error = (y.mean(0) - arrays["y"]).abs() / (y.std(0) / math.sqrt(draws)).hypot(theirs)
        assert error.max() <= 6, f"case {i}: a mean is off by {error.max():.1f} standard errors"
        ratio = (y.std(0) / arrays["std"]).median()
        assert abs(ratio - 1) <= 0.03, f"case {i}: deviations are off by {ratio:.3f}"
        checked += 1
    assert checked == 2


@given(convolutions())
@settings(max_examples=80, deadline=None)
def test_equals_algorithm_1_with_gradients(drawn: Any) -> None:
    layer, x = drawn
    layer, x = layer.double().eval(), x.double().requires_grad_()
    exact_layer, exact_x = reference_of(layer), x.detach().clone().requires_grad_()
    y, exact = layer(x), exact_layer(exact_x)
    weight = torch.randn_like(exact)
    y.backward(weight)
    exact.backward(weight)
    torch.testing.assert_close(y, exact, rtol=1e-9, atol=1e-9)
    # A window's gradient grows as 1/std^3: compare on the scale of the largest.
    scale = max(1.0, float(exact_x.grad.abs().max()))
    torch.testing.assert_close(x.grad / scale, exact_x.grad / scale, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(layer.weight.grad, exact_layer.weight.grad, rtol=1e-8, atol=1e-8)


@given(convolutions(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_relu_within_the_layer_is_relu_after_it(drawn: Any, training: Any) -> None:
    layer, x = drawn
    layer, x = layer.double().train(training), x.double().requires_grad_()
    within, same_x = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    within.relu = True
    torch.manual_seed(0)
    y = F.relu(layer(x))
    torch.manual_seed(0)
    actual = within(same_x)
    assert torch.equal(actual, y)
    weight = torch.randn_like(y)
    y.backward(weight)
    actual.backward(weight)
    for a, b in zip((same_x, *within.parameters()), (x, *layer.parameters()), strict=True):
        scale = max(1.0, float(b.grad.abs().max()))
        torch.testing.assert_close(a.grad / scale, b.grad / scale, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kn_zoo.freeze(within)(x), F.relu(layer.eval()(x)))


@pytest.mark.parametrize("p", [0.05, 0.25])
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_drawn_sums_have_the_moments_of_a_mask(p: Any, mean: Any) -> None:
    """Means, variances and covariance of S1 = sum(x m) and S2 = sum((x m)^2), and of units."""
    torch.manual_seed(0)
    draws, channels = 40_000, 32
    x = (torch.randn(1, channels, 1, 2, dtype=torch.float64) + mean).relu()
    many = x.expand(draws, -1, -1, -1).contiguous()
    q, power = 1 / (1 - p), [x.pow(k).sum(1) for k in range(5)]
    exact = torch.cat([power[1], q * power[2]], 0)
    cross = p * q**2 * power[3]
    exact_cov = torch.cat([p * q * power[2], cross, cross, p * q**3 * power[4]])
    for dropout in ("mask", "gaussian"):
        mu, var = functional.channel_moments(many, p, dropout)
        sums = torch.cat([mu * channels, (var + mu * mu) * channels], 1)  # (draws, 2, 1, W)
        error = (sums.mean(0) - exact).abs()
        assert (error <= 5 * sums.std(0) / math.sqrt(draws)).all(), dropout
        for w in range(2):
            cov = torch.cov(sums[:, :, 0, w].mT).flatten()
            scale = exact_cov[[0, 0, 3, 3], 0, w].sqrt() * exact_cov[[0, 3, 0, 3], 0, w].sqrt()
            assert ((cov - exact_cov[:, 0, w]).abs() <= 0.05 * scale).all(), dropout


@pytest.mark.parametrize("p", [0.05, 0.25])
def test_a_drawn_variance_stays_near_its_expectation(p: Any) -> None:
    """In small units with one large number, a normal distribution reaches below 0."""
    torch.manual_seed(0)
    x = 0.1 * torch.randn(1, 16, 1000, 1000)
    x[:, 0] += 1.0
    _, var = functional.channel_moments(x, p, "gaussian")
    mean, square = x.double().mean(1), x.double().square().mean(1)
    expected = functional.expected_factor(16, p) * square - mean * mean
    assert ((var[:, 0] / expected) >= 0.25 * (1 - 1e-5)).all()
    assert float((var[:, 0] / expected).mean()) == pytest.approx(1.0, abs=0.02)


def test_drawn_sums_need_many_channels() -> None:
    """Of few channels the sums are not nearly normal: they are dropped, not drawn."""
    torch.manual_seed(0)
    x = torch.ones(1000, 3, 1, 1)
    mean, _ = functional.channel_moments(x, 0.5, "gaussian")
    assert set((mean.flatten() * 3 / 2).round(decimals=4).tolist()) == {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2},
        {"padding": (2, 0, 1, 3)},
        {"dilation": 2, "padding": 1},
        {"groups": 2, "padding": (1, 0)},
        {"dilation": (1, 2), "stride": (2, 1), "padding": (0, 1, 2, 1), "groups": 2},
    ],
)
@pytest.mark.parametrize("statistics", ["plain", "expected", "sampled"])
def test_gradcheck(settings: Any, statistics: Any) -> Any:
    torch.manual_seed(0)
    layer = KNConv2d(4, 2, 3, **settings, dropout_p=0.2, inference_statistics=statistics)
    layer = layer.double().eval()
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Any, weight: Any, bias: Any) -> Any:
        torch.manual_seed(5)  # the same mask at every evaluation
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dropout", ["mask", "gaussian"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradcheck_of_many_channels(dropout: Any, memory_format: Any, relu: Any) -> Any:
    """Where gaps between dropped elements are drawn, or sums."""
    torch.manual_seed(0)
    layer = KNConv2d(16, 1, (1, 2), padding=(1, 0, 0, 0), dropout_p=0.2, dropout=dropout, relu=relu)
    layer = layer.double()
    x = torch.randn(2, 16, 1, 2, dtype=torch.float64)
    x = x.to(memory_format=memory_format).requires_grad_()

    def run(x: Any, weight: Any, bias: Any) -> Any:
        torch.manual_seed(5)
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@given(
    st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 10), st.floats(-5, 5), st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_standardized_filters(out: int, kernel: int, scale: float, shift: float, seed: int) -> None:
    """Their mean is 0 and their norm the gain, whatever the weight's scale and mean are."""
    torch.manual_seed(seed)
    layer = KNConv2d(3, out, kernel, weight_standardization=True).double()
    nn.init.uniform_(layer.gain, -2, 2)
    filters = layer.effective_weight().flatten(1)
    torch.testing.assert_close(filters.sum(1), torch.zeros(out, dtype=torch.float64))
    torch.testing.assert_close(filters.norm(dim=1), layer.gain.abs())
    layer.weight.data.mul_(scale).add_(shift)
    torch.testing.assert_close(layer.effective_weight().flatten(1), filters)


def test_gradcheck_of_standardized_filters() -> None:
    torch.manual_seed(0)
    layer = KNConv2d(4, 2, 3, groups=2, dropout_p=0.0, weight_standardization=True).double()
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)

    def run(weight: Tensor, gain: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "gain": gain}, (x,))

    assert torch.autograd.gradcheck(run, (layer.weight, layer.gain))
    assert torch.autograd.gradgradcheck(run, (layer.weight, layer.gain))


def test_a_standardized_filter_of_zeros_gives_the_bias() -> None:
    layer = KNConv2d(4, 2, 3, weight_standardization=True)
    nn.init.zeros_(layer.weight)
    out = layer(torch.randn(2, 4, 5, 5))
    torch.testing.assert_close(out, layer.bias.view(-1, 1, 1).expand_as(out))
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("padding", [0, 1, (1, 0, 1, 0)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("statistics", ["plain", "expected"])
def test_float32_is_exact_for_means_far_from_zero(
    padding: Any, groups: Any, memory_format: Any, statistics: Any
) -> None:
    torch.manual_seed(0)
    for mean in (0.0, 3.0, 10.0, 30.0, 300.0, 1000.0, -1000.0):
        layer = KNConv2d(
            256, 8, 3, padding=padding, groups=groups, inference_statistics=statistics
        ).eval()
        x = (torch.randn(2, 256, 9, 9) + mean).to(memory_format=memory_format)
        with torch.no_grad():
            exact = reference_of(layer)(x.double())
            inner = exact[:, :, 2:-2, 2:-2].abs().max()  # border windows hold zeros: a larger std
            for run in (layer, torch.jit.script(layer)):
                error = (run(x).double() - exact).abs()
                assert error.max() <= 5e-6 * exact.abs().max()
                assert error[:, :, 2:-2, 2:-2].max() <= 5e-6 * inner, f"mean {mean}"


@pytest.mark.parametrize("kernel_size", [1, 2])
def test_kernel_norm_is_exact_for_means_far_from_zero(kernel_size: Any) -> None:
    torch.manual_seed(0)
    layer = KernelNorm2d(kernel_size, dropout_p=0.0).eval()
    x = torch.randn(2, 64, 6, 6) + 1000.0
    assert relative_error(layer(x), layer(x.double())) <= 2e-6


def images_of_difficult_windows() -> Any:
    """Images by what is difficult about them, and the columns of the windows in question."""
    noise = torch.randn(2, 64, 24, 24)
    dark = 0.5 * noise + 1.0
    dark[..., :12] = 1e-3 + 1e-4 * noise[..., :12]
    return {
        "gaussian": (noise, slice(None)),
        "dark and even beside bright": (dark, slice(0, 10)),
        "steep gradient": (noise + torch.linspace(0, 300, 24), slice(None)),
        "mean of 1000 std": (noise + 1000.0, slice(None)),
    }


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 7])
@pytest.mark.parametrize("dense", [False, True])
def test_float32_statistics_have_six_digits(kernel_size: Any, dense: Any, monkeypatch: Any) -> None:
    """1 / std of every unit against unfolding in float64, in both forms."""
    torch.manual_seed(0)
    layer = KNConv2d(64, 1, kernel_size, inference_statistics="plain", eps=1e-12).eval()
    if dense:
        monkeypatch.setattr(modules, "use_eager_kernels", lambda x, settings: False)
    bound = 4e-6 if dense else 5e-7  # the dense form is relative to one of a pixel's numbers
    for name, (x, columns) in images_of_difficult_windows().items():
        _, mu, rstd = layer.forward_with_statistics(x)
        units = F.unfold(x.double(), kernel_size)
        exact = (units.var(1, correction=0) + layer.eps).rsqrt().view_as(rstd)
        error = ((rstd.double() / exact - 1).abs())[..., columns].max()
        assert error <= bound, f"{name}: 1 / std is off by {error:.1e}"
        offset = (mu.double() - units.mean(1).view_as(mu)).abs() * exact
        assert offset[..., columns].max() <= 1e-5, f"{name}: mu is off by {offset.max():.1e} std"


def test_float32_statistics_without_float64(monkeypatch: Any) -> None:
    """As on MPS: a pivot in place of digits."""
    monkeypatch.setattr(functional, "has_float64", lambda x: False)
    torch.manual_seed(0)
    window = Window([3, 3], [1, 1], [1, 1, 1, 1], [1, 1])
    for expected_p in (0.0, 0.1):
        for offset in (0.0, 1000.0):
            x = torch.randn(2, 64, 9, 9) + offset
            mean, var = functional.channel_moments(x, 0.0)
            actual = unit_statistics(mean, var, window, 64, expected_p, 1e-5)
            assert all(m.dtype == torch.float32 for m in actual)
            units = F.unfold(x.double(), 3, padding=1)
            mu, square = units.mean(1), units.square().mean(1)
            factor = (1 - expected_p / 576) / (1 - expected_p)
            rstd = (factor * square - mu**2 + 1e-5).rsqrt()
            torch.testing.assert_close(
                actual[0].double(), mu.view_as(actual[0]), rtol=1e-6, atol=1e-6
            )
            inner = (..., slice(1, -1), slice(1, -1))
            rstd = rstd.view_as(actual[2])
            torch.testing.assert_close(actual[2][inner].double(), rstd[inner], rtol=1e-4, atol=0)
            torch.testing.assert_close(actual[2].double(), rstd, rtol=1e-3, atol=0)


@pytest.mark.parametrize("groups", [1, 4])
def test_float32_gradients_are_exact_for_means_far_from_zero(groups: Any) -> None:
    torch.manual_seed(0)
    for mean in (0.0, 100.0, 1000.0):
        layer = KNConv2d(64, 32, 3, padding=1, groups=groups, dropout_p=0.0)
        x = (torch.randn(2, 64, 9, 9) + mean).requires_grad_()
        direction = torch.randn(2, 32, 9, 9)
        exact_x = x.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(reference_of(layer)(exact_x), exact_x, direction.double())
        inner = (..., slice(2, -2), slice(2, -2))
        for run in (layer, torch.jit.script(layer)):
            (actual,) = torch.autograd.grad(run(x), x, direction)
            assert relative_error(actual[inner], exact[inner]) <= 5e-6


@pytest.mark.parametrize("value", [1e30, -1e30, 1e4, 3.0])
@pytest.mark.parametrize("statistics", ["expected", "plain"])
def test_a_constant_window_gives_the_bias(value: Any, statistics: Any) -> None:
    for channels in (1, 3, 64):
        layer = KNConv2d(channels, 4, 3, padding=1, inference_statistics=statistics).eval()
        x = torch.full((2, channels, 6, 5), value)
        for run in (layer, torch.jit.script(layer)):
            y = run(x)
            assert y.isfinite().all()
            inner = y[:, :, 1:-1, 1:-1]
            torch.testing.assert_close(inner, layer.bias.view(1, -1, 1, 1).expand_as(inner))
        assert KernelNorm2d(2, inference_statistics=statistics).eval()(x).isfinite().all()


@pytest.mark.parametrize("statistics", ["expected", "plain", "sampled"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_constant_zero_and_single_pixel_windows_are_finite(
    statistics: Any, memory_format: Any
) -> None:
    torch.manual_seed(0)
    for channels in (1, 3, 32):
        layers = [
            KNConv2d(channels, 2, k, padding=k // 2, inference_statistics=statistics)
            for k in (1, 3)
        ] + [KernelNorm2d(k, inference_statistics=statistics) for k in (1, 2)]
        for value in (0.0, 1.0, 1e4, 1e-20):
            for layer in layers:
                layer.eval()
                x = torch.full((2, channels, 4, 4), value).to(memory_format=memory_format)
                x.requires_grad_()
                y = layer(x)
                y.sum().backward()
                assert y.isfinite().all()
                assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_float32_under_autocast(dtype: Any, training: Any) -> None:
    """A mean of 3.1 and a deviation of 0.1 have hardly a digit left in bfloat16 squares."""
    torch.manual_seed(0)
    layer = KNConv2d(32, 8, 3, padding=1, dropout_p=0.0).train(training)
    x = (0.1 * torch.randn(2, 32, 8, 8) + 3.1).to(dtype)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    exact = reference_of(layer)(x.double())
    spread = float((y.double() / exact)[exact.abs() > 1].median())
    assert abs(spread - 1) <= 0.02, "the scale of the output is the statistics' scale"
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


def test_low_precision_modules_run_and_learn() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer = KNConv2d(32, 8, 3, padding=1, dtype=dtype)
        x = torch.randn(2, 32, 8, 8, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype


@given(convolutions())
@settings(max_examples=40, deadline=None)
def test_memory_format_is_kept(drawn: Any) -> None:
    layer, x = drawn
    wide = torch.cat([x, x]).double().to(memory_format=torch.channels_last)
    y = layer.double().eval()(wide)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(wide.contiguous()), rtol=1e-9, atol=1e-9)


@given(convolutions(), st.sampled_from([0.0, 100.0]))
@settings(max_examples=60, deadline=None)
def test_a_sample_does_not_depend_on_its_batch(drawn: Any, offset: Any) -> None:
    """Neighbours far from zero mean are shifted; the sample itself must not notice.

    A window of one number has no variance: its rstd of 316 enlarges what rounding leaves of zero.
    """
    layer, x = drawn
    layer.eval()
    others = torch.randn(2, *x.shape[1:]) + offset
    alone = layer(x[:1])
    together = layer(torch.cat([x[:1], others]))[:1]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=5e-4)


@given(convolutions())
@settings(max_examples=30, deadline=None)
def test_nan_stays_in_its_sample(drawn: Any) -> None:
    layer, x = drawn
    layer.eval()
    x = torch.cat([x[:1], torch.full_like(x[:1], torch.nan), x[:1]])
    y = layer(x)
    assert y[0].isfinite().all()
    assert y[2].isfinite().all()
    ones = torch.ones(1, 1, *layer.kernel_size)
    inside = F.pad(torch.ones_like(x[:1, :1]), layer.padding_sides)  # of the image, not of padding
    seen = F.conv2d(inside, ones, None, layer.stride, 0, layer.dilation)[0, 0] > 0
    assert y[1][:, seen].isnan().all()
    # Algorithm 1 makes the bias of a window of nothing but padding, unless the image is shifted.
    bias = torch.zeros(layer.out_channels) if layer.bias is None else layer.bias
    unseen = y[1][:, ~seen]
    assert (unseen.isnan() | (unseen == bias[:, None])).all()


@given(convolutions(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_empty_batch_gives_an_empty_result(drawn: Any, training: Any) -> None:
    layer, x = drawn
    layer.train(training)
    y = layer(x[:0].requires_grad_())
    assert y.shape == (0, *layer(x).shape[1:])
    y.sum().backward()
    assert KernelNorm2d(1).train(training)(x[:0]).shape == x[:0].shape


def test_unbatched_input_as_nn_conv2d() -> None:
    layer = KNConv2d(3, 4, 3, padding=1).eval()
    x = torch.randn(3, 6, 5)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    assert KernelNorm2d(2)(x).shape == (3, 6, 4)


def test_is_a_drop_in_for_conv2d() -> None:
    ours, theirs = KNConv2d(4, 6, (3, 2), 2, (1, 2), 1, 2), nn.Conv2d(4, 6, (3, 2), 2, (1, 2), 1, 2)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    x = torch.randn(2, 4, 9, 7)
    assert ours(x).shape == theirs(x).shape
    nn.Sequential(ours, nn.ReLU(inplace=True))(x).sum().backward()  # keeps no output that is lost


def test_inference_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(KNConv2d(3, 8, 3), nn.ReLU(), KernelNorm2d(1)).eval()
    x = torch.randn(4, 3, 8, 8)
    results = {}
    for name in ("expected", "plain", "sampled"):
        assert set_inference_statistics(model, name) is model
        results[name] = model(x)
        assert torch.equal(model(x), results[name]) == (name != "sampled")
    assert not torch.allclose(results["expected"], results["plain"], atol=1e-3)
    with pytest.raises(ValueError, match="expected"):
        set_inference_statistics(model, "exact")
    with pytest.raises(ValueError, match=r"is frozen.*before kn_zoo.freeze"):
        set_inference_statistics(kn_zoo.freeze(set_inference_statistics(model, "plain")), "plain")
    with pytest.raises(ValueError, match="no kernel-normalized layer"):
        set_inference_statistics(nn.Linear(2, 2), "plain")


def test_expected_statistics_are_the_mean_of_sampled_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64) + 0.5
    layer = KNConv2d(8, 2, 3, dropout_p=0.2, bias=False).double().eval()
    variances = []
    for seed in range(4000):
        mean, var = channel_moments(x, 0.2, torch.tensor(seed))
        windows = torch.nn.functional.unfold(mean, 3)
        spread = windows.var(1, correction=0)
        variances.append(torch.nn.functional.unfold(var, 3).mean(1) + spread)
    sampled = torch.stack(variances)
    set_inference_statistics(layer, "plain")
    plain = layer(x)
    set_inference_statistics(layer, "expected")
    variance = torch.nn.functional.unfold(x, 3).var(1, correction=0) + layer.eps
    expected = ((plain / layer(x)).square() * variance.view(1, 1, 4, 4) - layer.eps)[:, 0]
    error = (sampled.mean(0).view_as(expected) - expected).abs()
    assert (error <= 6 * sampled.std(0).view_as(expected) / math.sqrt(len(sampled))).all()


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ({"padding_mode": "reflect"}, "use padding_mode='zeros'"),
        ({"padding": -1}, "non-negative"),
        ({"padding": (1, 2, 3)}, "left, right, top, bottom"),
        ({"padding": "full"}, "non-negative int"),
        ({"dropout_p": 1.0}, r"\[0, 1\)"),
        ({"dropout_p": -0.1}, r"\[0, 1\)"),
        ({"dropout_p": math.nan}, r"\[0, 1\)"),
        ({"eps": 0.0}, "positive"),
        ({"stride": 0}, "stride=0: use a positive int"),
        ({"stride": (1, -1)}, "positive int"),
        ({"stride": (1, 1, 1)}, "or 2 of them"),
        ({"padding": True}, "non-negative int"),
        ({"padding": (0, True)}, "non-negative int"),
        ({"padding": 0.5}, "non-negative int"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
        ({"dropout": "sums"}, "gaussian"),
        ({"inference_statistics": "best"}, "expected"),
    ],
)
def test_unsupported_settings_name_the_fix(arguments: Any, fix: Any) -> None:
    with pytest.raises(ValueError, match=fix):
        KNConv2d(3, 4, 3, **arguments)
    if "padding_mode" not in arguments:
        with pytest.raises(ValueError, match=fix):
            KernelNorm2d(3, **arguments)


@pytest.mark.parametrize("size", [0, -1, (3, 0), (1, 2, 3), True, 1.5])
def test_kernel_sizes_that_are_none(size: Any) -> None:
    for layer in (KernelNorm2d, lambda kernel_size: KNConv2d(3, 4, kernel_size)):
        with pytest.raises(ValueError, match=r"kernel_size=.*: use a positive int"):
            layer(size)
    with pytest.raises(ValueError, match="dilation=0: use a positive int"):
        KNConv2d(3, 4, 3, dilation=0)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, (2, 5)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_padding_by_name(kernel_size: Any, dilation: Any) -> None:
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    for padding in ("same", "valid"):
        layer = KNConv2d(3, 4, kernel_size, padding=padding, dilation=dilation).double().eval()
        theirs = nn.Conv2d(3, 4, kernel_size, padding=padding, dilation=dilation).double()
        theirs.load_state_dict(layer.state_dict())
        y, mu, rstd = layer.forward_with_statistics(x)
        weight_sum = layer.weight.sum((1, 2, 3)).view(1, -1, 1, 1)
        bias = layer.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(y, (theirs(x) - bias - mu * weight_sum) * rstd + bias)
    assert KernelNorm2d(3, 1, "same").padding_sides == (1, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_inputs_that_are_no_floating_point_numbers(dtype: Any) -> None:
    x = torch.ones(1, 3, 4, 4, dtype=dtype)
    for layer in (KNConv2d(3, 4, 3), KernelNorm2d(2)):
        with pytest.raises(TypeError, match=r"use a floating-point input, such as x.float\(\)"):
            layer(x)


@pytest.mark.filterwarnings("ignore")
def test_static_quantization_says_what_to_do() -> None:
    scale = torch.quantize_per_tensor(torch.randn(1, 3, 4, 4), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match="qconfig = None"):
        KNConv2d(3, 4, 3).eval()(scale)


def test_window_larger_than_the_padded_input() -> None:
    with pytest.raises(ValueError, match="5 x 5 pixels does not fit the padded input of 4 x 6"):
        KNConv2d(3, 4, 3, padding=(1, 1, 0, 0), dilation=2)(torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="larger input"):
        KernelNorm2d(3)(torch.randn(1, 3, 2, 4))


class Pair(nn.Module):
    """Both layers in a row, as networks use them."""

    def __init__(self, dropout_p: Any = 0.1) -> None:
        super().__init__()
        self.conv = KNConv2d(
            3, 20, 3, padding=(1, 0, 1, 0), dropout_p=dropout_p, weight_standardization=True
        )
        self.inner = KNConv2d(20, 20, 2, stride=2, padding=1, dropout_p=dropout_p)
        self.norm = KernelNorm2d(1, dropout_p=dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.inner(torch.relu(self.conv(x)))))


@pytest.fixture
def pair() -> Any:
    torch.manual_seed(0)
    return Pair().eval(), torch.randn(2, 3, 9, 8)


@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph(pair: Any, training: Any) -> None:
    model, x = pair
    if training:
        model = Pair(dropout_p=0.0).train()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(model(x).square().sum(), model.inner.weight)[0]
    actual = torch.autograd.grad(compiled(x).square().sum(), model.inner.weight)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dropout", ["mask", "gaussian"])
def test_compile_with_dropout(dropout: Any) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(KNConv2d(16, 16, 3, dropout=dropout), nn.ReLU()),
        torch.randn(2, 16, 9, 8),
    )
    compiled = torch.compile(model.train(), fullgraph=True)
    torch.manual_seed(0)
    first = compiled(x)
    assert not torch.equal(first, compiled(x)), "every call draws a mask of its own"
    first.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_export(pair: Any, tmp_path: Any) -> None:
    model, x = pair
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    wide = torch.randn(5, 3, 9, 8)
    torch.testing.assert_close(loaded(wide), model(wide), rtol=1e-5, atol=1e-5)
    operators = {str(node.target) for node in program.graph.nodes}
    assert not any("kn_zoo" in name for name in operators), "exports need this package nowhere"


@pytest.mark.parametrize("training", [False, True])
def test_torchscript(pair: Any, training: Any) -> None:
    model, x = pair
    if training:
        model = Pair(dropout_p=0.0).train()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for _ in range(3):  # the profiling executor specializes on the second call
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_torchscript_trace(pair: Any) -> None:
    model, x = pair
    traced = torch.jit.trace(model, x)
    other = torch.randn(3, 3, 9, 8) + 50.0
    torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-4)


def test_fx(pair: Any) -> None:
    model, x = pair
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(torch.jit.script(traced)(x), model(x), rtol=1e-5, atol=1e-5)


def test_deepcopy(pair: Any) -> None:
    model, x = pair
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


def test_vmap_of_functional_call() -> None:
    torch.manual_seed(0)
    models = [Pair(dropout_p=0.0) for _ in range(3)]
    x = torch.randn(2, 3, 9, 8)
    params = {
        k: torch.stack([dict(m.named_parameters())[k].detach() for m in models])
        for k, _ in models[0].named_parameters()
    }
    together = vmap(lambda p: functional_call(models[0], p, (x,)))(params)
    for i, model in enumerate(models):
        torch.testing.assert_close(together[i], model(x), rtol=1e-4, atol=1e-4)


def test_per_sample_gradients() -> Any:
    torch.manual_seed(0)
    model = Pair(dropout_p=0.0)
    params = {k: p.detach() for k, p in model.named_parameters()}
    x = torch.randn(3, 3, 9, 8)

    def loss(params: Any, sample: Any) -> Any:
        return functional_call(model, params, (sample[None],)).square().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(actual[key][i], parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant: Any) -> None:
    model = Pair().train()
    x = torch.randn(2, 3, 9, 8)
    gradients = []
    for wrap in (False, True):
        torch.manual_seed(7)
        sample = x.clone().requires_grad_()
        y = checkpoint(model, sample, use_reentrant=reentrant) if wrap else model(sample)
        torch.rand(5)  # the state of the generator moves on before the backward pass
        y.square().sum().backward()
        gradients.append(sample.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_training_keeps_no_second_copy_of_its_input(memory_format: Any) -> Any:
    """Kept for backward: x, one result of the convolution's size, one-channel maps, a seed."""
    layer = KNConv2d(64, 64, 3, padding=1).train()
    x = torch.randn(2, 64, 16, 16).to(memory_format=memory_format).requires_grad_()
    kept = {}

    def pack(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    weights = 3 * layer.weight.numel() * 4
    maps = 16 * y[:, :1].numel() * 4
    assert sum(kept.values()) <= x.numel() * 4 + y.numel() * 4 + weights + maps
    kept.clear()
    layer.relu = True
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del kept[y.untyped_storage().data_ptr()]  # which the next layer keeps anyway
    assert sum(kept.values()) <= x.numel() * 4 + weights + maps


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = KNConv2d(20, 4, 3, padding=1)
        x = torch.randn(2, 20, 8, 8)
        assert layer.eval()(x).shape == layer.train()(x).shape == (2, 4, 8, 8)
    layer = KNConv2d(20, 4, 3, device="meta").eval()
    assert layer(torch.randn(2, 20, 8, 8, device="meta")).shape == (2, 4, 6, 6)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_dark_even_window_in_a_bright_image_keeps_its_variance(size: Any) -> None:
    mean, var = torch.rand(2, 2, 1, 24, 24).unbind()
    mean[..., :12] *= 1e-3
    var[..., :12] *= 1e-6
    window = Window([size] * 2, [1, 1], [0] * 4, [1, 1])
    _, actual, _ = unit_statistics(mean, var, window, 3, 0.0, 1e-5)
    ones = torch.ones(1, 1, size, size, dtype=torch.float64) / size**2
    m, v = mean.double(), var.double()
    mu = F.conv2d(m, ones)
    spread = F.unfold(m, size).var(1, correction=0).view_as(mu)
    exact = F.conv2d(v, ones) + spread
    dark = (..., slice(0, 13 - size))
    torch.testing.assert_close(actual[dark], exact[dark], rtol=1e-9, atol=0)
