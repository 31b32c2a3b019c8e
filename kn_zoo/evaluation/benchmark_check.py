"""Errors of the layers relative to the formulas in float64, on the device that is timed."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor

from kn_zoo import KNConv2d
from kn_zoo.layers.reference import ReferenceKNConv2d

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHANNELS, SIDE, IMAGES = 64, 16, 4


def errors(device: str, kernels: Mapping[str, Iterable[int]]) -> dict[str, str]:
    """By number format and mode: relative errors, the largest over the `kernels` of that mode.

    Of the output at inference, and of output and gradients in training without dropout, which is
    random. An error is the norm of the difference over the norm of what is right; inputs and
    filters are rounded to the format beforehand, so that it is the computation's alone.
    """
    report = {}
    for name, dtype in DTYPES.items():
        for mode, sizes in kernels.items():
            per_kernel = [layer_errors(size, dtype, device, mode) for size in sizes]
            infer, output, gradients = (max(column) for column in zip(*per_kernel, strict=True))
            report[f"error, {name}, {mode}"] = (
                f"inference {infer:.1e}; training: output {output:.1e}, gradients {gradients:.1e}"
            )
    return report


def layer_errors(
    kernel: int, dtype: torch.dtype, device: str, mode: str
) -> tuple[float, float, float]:
    """Errors at inference, of the output in training, and the largest of a gradient."""
    torch.manual_seed(kernel)
    layer = KNConv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2).to(device, dtype)
    x = torch.randn(IMAGES, CHANNELS, SIDE, SIDE, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = deepcopy(layer).double()
    exact.__class__ = ReferenceKNConv2d  # the same parameters and settings
    torch.compiler.reset()
    forward = torch.compile(layer) if mode == "compiled" else layer

    for module in (layer, exact):
        module.eval()
    with torch.no_grad():
        infer = relative(forward(x), exact(x.double()))
    for module in (layer, exact):
        module.train().dropout_p = 0.0
    torch.compiler.reset()
    output, *gradients = passes(forward, layer, x)
    wanted, *others = passes(exact, exact, x.double())
    pairs = zip(gradients, others, strict=True)
    return infer, relative(output, wanted), max(relative(a, b) for a, b in pairs)


def passes(forward: Callable[[Tensor], Tensor], layer: KNConv2d, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of a fixed sum of it for x, weight and bias."""
    x = x.detach().requires_grad_()
    out = forward(x)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64)
    direction = weights.view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], direction)]


def relative(actual: Tensor, right: Tensor) -> float:
    actual, right = actual.detach().double(), right.detach()
    return float((actual - right).norm() / right.norm())
