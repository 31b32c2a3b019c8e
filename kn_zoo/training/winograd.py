"""Winograd's algorithm for convolutions in float32 on a CPU.

For filters of r x r, k x k pixels of the input give m x m of the output, m = k - r + 1, with k^2
multiplications a pair of channels instead of (m r)^2:

    y = A^t [(G w G^t) * (B^t x B)] A

(Lavin and Gray, 2016, arXiv 1509.09308). Sums over the input channels are k^2 matrix products. The
gradients have the same form. With k = 6, a convolution takes 36 multiplications instead of 144 for
r = 3 and of 100 for r = 2. Rounding errors are up to ten times those of a direct convolution.

Forward and backward pass of a compiled network, batch size 128, in seconds on one core of an AMD
EPYC with AVX2, otherwise idle (torch 2.15, timm 1.0.31; medians of five alternating rounds):

    network, side of the images    PyTorch    Winograd
    knpreactresnet18_cifar, 16        1.80        1.07
    knpreactresnet18_cifar, 32        6.15        3.41
    knresnet18_cifar, 16              4.26        3.00

150 updates of preactresnet18_cifar at 16x16 pixels, one run each: training loss 4.284 without and
4.281 with it, 8.2 and 7.8 % of 2,000 held-out images correct.
"""

import subprocess
from collections.abc import Callable
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kn_zoo.training.recipe import UserError

MIN_CHANNELS = 64  # with fewer, the transforms take longer than the products save
# Rows of G for k, without that of infinity: FACTORS[k][i] * POINTS[k][i] ** [0, ..., r - 1].
POINTS = {4: [0, 1, -1], 6: [0, 1, -1, 2, -2]}
FACTORS = {4: [1, 1 / 2, 1 / 2], 6: [1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24]}


class WinogradConvolutions(TorchFunctionMode):
    """Compute convolutions of many channels by Winograd's algorithm in this context.

    Those are convolutions on a CPU in float32 with filters of 2x2 or 3x3, stride 1, one group, zero
    padding less than the filter's size, and at least 64 channels on both sides. All others remain
    as they are. Gradients are computed in the same way. Raises UserError without a C++ compiler.
    """

    def __init__(self) -> None:
        super().__init__()
        load_transforms()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return (conv2d if func is torch.conv2d else func)(*args, **kwargs or {})


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Compute torch.conv2d, by Winograd's algorithm where that gains."""
    out_channels, in_channels, *size = weight.shape
    gains = (
        input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and input.dim() == 4
        and size in ([2, 2], [3, 3])
        and (to_2tuple(stride), to_2tuple(dilation), groups) == ((1, 1), (1, 1), 1)
        and to_2tuple(padding) in [(p, p) for p in range(size[0])]
        and min(in_channels, out_channels) >= MIN_CHANNELS
    )
    if not gains:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = winograd_conv2d(input, weight, to_2tuple(padding)[0])
    return y if bias is None else y + bias.view(-1, 1, 1)


@lru_cache
def load_transforms() -> Any:
    """Compile winograd.cpp, once a machine, and return its operators; raises UserError."""
    from torch.utils import cpp_extension  # imports setuptools, and looks for CUDA

    try:
        cpp_extension.load(
            "kn_zoo_winograd",
            [str(Path(__file__).with_suffix(".cpp"))],
            extra_cflags=["-O3", "-march=native", "-fopenmp"],
            is_python_module=False,
        )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise UserError(
            "winograd: true needs a C++ compiler and ninja (pip install ninja); install them or "
            f"set winograd: false: {str(error).splitlines()[0]}"
        ) from error
    return torch.ops.kn_zoo_winograd


def tile_size(height: int, width: int, r: int) -> int:
    """Return k with the fewest multiplications for an output of this size."""

    def multiplications(k: int) -> int:
        m = k - r + 1
        return ceil(height / m) * ceil(width / m) * k * k

    return min(POINTS, key=multiplications)


@lru_cache
def filter_matrix(k: int, r: int, rotate: bool = False) -> Tensor:
    """Transform of filters, or of filters rotated by 180 degrees, as a matrix (k * k, r * r)."""
    points = torch.tensor(POINTS[k], dtype=torch.float64)
    g = torch.zeros(k, r, dtype=torch.float64)
    g[:-1] = points[:, None] ** torch.arange(r) * torch.tensor(FACTORS[k])[:, None]
    g[-1, -1] = 1.0
    matrix = torch.kron(g, g)
    return (matrix.flip(1) if rotate else matrix).float().contiguous()


def transform_filters(weight: Tensor, k: int, rotate: bool = False) -> Tensor:
    """G w G^t: (O, C, r, r) -> (k * k, O, C)."""
    filters = weight.permute(2, 3, 0, 1).flatten(0, 1).flatten(1)  # (r * r, O * C)
    matrix = filter_matrix(k, weight.shape[2], rotate)
    return (matrix @ filters).view(-1, weight.shape[0], weight.shape[1])


def channels_last(x: Tensor) -> Tensor:
    """View of x, or a copy, in memory as (N, H, W, C): (N, C, H, W) -> (N, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op(
    "kn_zoo::winograd_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, int padding) -> Tensor",
)
def winograd_conv2d(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Convolution with stride 1: (N, C, H, W), (O, C, r, r) -> (N, O, H', W')."""
    transforms, x, r = load_transforms(), channels_last(x), weight.shape[2]
    n, h, w = x.shape[0], *(size + 2 * padding - r + 1 for size in x.shape[1:3])
    k = tile_size(h, w, r)
    filters = transform_filters(weight, k).transpose(1, 2)
    products = torch.bmm(transforms.input_tiles(x, k, r, padding), filters)
    return transforms.output(products, n, h, w, k, r).permute(0, 3, 1, 2)


@winograd_conv2d.register_fake
def _(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    h, w = (size + 2 * padding - weight.shape[2] + 1 for size in x.shape[2:])
    return x.new_empty((x.shape[0], h, w, weight.shape[0])).permute(0, 3, 1, 2)


@torch.library.custom_op(
    "kn_zoo::winograd_conv2d_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, int padding) -> (Tensor, Tensor)",
)
def winograd_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int
) -> tuple[Tensor, Tensor]:
    """The gradients for x and for the filters."""
    transforms, r = load_transforms(), weight.shape[2]
    grad, x = channels_last(grad), channels_last(x)
    n, h, w = x.shape[:3]
    # For x: a convolution of grad with the rotated filters.
    k = tile_size(h, w, r)
    filters = transform_filters(weight, k, rotate=True)
    products = torch.bmm(transforms.input_tiles(grad, k, r, r - 1 - padding), filters)
    grad_x = transforms.output(products, n, h, w, k, r).permute(0, 3, 1, 2)
    # For the filters: G^t [sum over tiles of (A grad A^t) * (B^t x B)] G.
    k = tile_size(grad.shape[1], grad.shape[2], r)
    tiles = transforms.gradient_tiles(grad, k, r).transpose(1, 2)
    products = torch.bmm(tiles, transforms.input_tiles(x, k, r, padding))  # (k * k, O, C)
    filters = filter_matrix(k, r).t() @ products.flatten(1)
    return grad_x, filters.view(r, r, *weight.shape[:2]).permute(2, 3, 0, 1)


@winograd_conv2d_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    o, c, r, _ = weight.shape
    grad_x = x.new_empty((x.shape[0], *x.shape[2:], c)).permute(0, 3, 1, 2)
    return grad_x, weight.new_empty((r, r, o, c)).permute(2, 3, 0, 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.padding = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *winograd_conv2d_backward(grad, *ctx.saved_tensors, ctx.padding), None


winograd_conv2d.register_autograd(_backward, setup_context=_setup_context)
