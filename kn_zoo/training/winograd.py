"""Winograd's algorithm for 3x3 convolutions in float32 on a CPU, which PyTorch lacks there.

y = A^t [(G w G^t) * (B^t x B)] A gives 4 x 4 pixels of the output from 6 x 6 of the input and 36
multiplications a pair of channels, instead of 144 (Lavin and Gray, 2016, arXiv 1509.09308). Sums
over the input channels are 36 matrix products. The gradients have the same form. Rounding errors
are a few times those of a direct convolution.
"""

import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import cpp_extension

from kn_zoo.training.recipe import UserError

MIN_CHANNELS = 64  # with fewer, the transforms take longer than the products save
FILTERS = {  # G for tiles of m x m output pixels
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}


class WinogradConvolutions(TorchFunctionMode):
    """Compute 3x3 convolutions of many channels by Winograd's algorithm in this context.

    Those are convolutions on a CPU in float32 with stride 1, padding 1, one group, and 64 channels
    or more on both sides, in multiples of 8; all others remain as they are. Gradients included.
    """

    def __init__(self) -> None:
        super().__init__()
        load_transforms()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and not kwargs and is_eligible(*args):
            y = winograd_conv2d(args[0], args[1])
            bias = args[2] if len(args) > 2 else None
            return y if bias is None else y + bias.view(-1, 1, 1)
        return func(*args, **kwargs)


def is_eligible(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Return whether a convolution with these arguments of torch.conv2d gains."""
    out_channels, in_channels, *size = weight.shape
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and size == [3, 3]
        and (pair(stride), pair(padding), pair(dilation), groups) == ((1, 1), (1, 1), (1, 1), 1)
        and min(in_channels, out_channels) >= MIN_CHANNELS
        and in_channels % 8 == out_channels % 8 == 0
    )


def pair(value: Any) -> Any:
    """Return a number, or a sequence of one or two, as two numbers; anything else as it is."""
    if isinstance(value, int):
        return value, value
    return tuple(value) * (3 - len(value)) if isinstance(value, tuple | list) else value


@lru_cache
def load_transforms() -> Any:
    """Compile winograd.cpp, once a machine, and return its operators; raises UserError."""
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


def tile_side(x: Tensor) -> int:
    return 2 if max(x.shape[1:3]) <= 2 else 4


def transform_filters(weight: Tensor, m: int, rotate: bool = False) -> Tensor:
    """G w G^t of filters or of filters rotated by 180 degrees: (O, C, 3, 3) -> (k * k, O, C)."""
    matrix = filter_matrix(m, rotate)
    filters = weight.permute(2, 3, 0, 1).reshape(9, -1)
    return (matrix @ filters).view(-1, weight.shape[0], weight.shape[1])


@lru_cache
def filter_matrix(m: int, rotate: bool = False) -> Tensor:
    """The transform of filters as a matrix (k * k, 9)."""
    g = torch.tensor(FILTERS[m], dtype=torch.float64)
    matrix = torch.kron(g, g)
    return (matrix.flip(1) if rotate else matrix).float().contiguous()


def channels_last(x: Tensor) -> Tensor:
    """View of x, or a copy, in memory as (N, H, W, C): (N, C, H, W) -> (N, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op(
    "kn_zoo::winograd_conv2d", mutates_args=(), schema="(Tensor x, Tensor weight) -> Tensor"
)
def winograd_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with padding 1: (N, C, H, W), (O, C, 3, 3) -> (N, O, H, W)."""
    transforms, x = load_transforms(), channels_last(x)
    m = tile_side(x)
    filters = transform_filters(weight, m)
    products = torch.bmm(transforms.input_tiles(x, m), filters.transpose(1, 2))
    return transforms.image(products, *x.shape[:3], m).permute(0, 3, 1, 2)


@winograd_conv2d.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    n, _, h, w = x.shape
    return x.new_empty((n, h, w, weight.shape[0])).permute(0, 3, 1, 2)


@torch.library.custom_op(
    "kn_zoo::winograd_conv2d_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)",
)
def winograd_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients for x and for the filters."""
    transforms, grad, x = load_transforms(), channels_last(grad), channels_last(x)
    m = tile_side(x)
    # With respect to x: a convolution of grad with the rotated filters.
    filters = transform_filters(weight, m, rotate=True)
    products = torch.bmm(transforms.input_tiles(grad, m), filters)
    grad_x = transforms.image(products, *x.shape[:3], m).permute(0, 3, 1, 2)
    # With respect to the filters: G^t [sum over tiles of (A grad A^t) * (B^t x B)] G.
    tiles = transforms.gradient_tiles(grad, m)
    products = torch.bmm(tiles.transpose(1, 2), transforms.input_tiles(x, m))
    grad_filters = filter_matrix(m).t() @ products.flatten(1)
    return grad_x, grad_filters.view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1)


@winograd_conv2d_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    grad_x = x.new_empty((n, h, w, c)).permute(0, 3, 1, 2)
    return grad_x, weight.new_empty((3, 3, *weight.shape[:2])).permute(2, 3, 0, 1)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return winograd_conv2d_backward(grad, *ctx.saved_tensors)


winograd_conv2d.register_autograd(_backward, setup_context=_setup_context)
