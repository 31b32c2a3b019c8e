"""Random numbers in compiled code on a CPU, as operators: Inductor's own take many times as long."""

from typing import Any

import torch
from torch import Tensor

from kn_zoo.layers import functional

from .moments import add_moments_gradient_, masked_moments


def compiled_moments(x: Tensor, p: float, dropout: str) -> tuple[Tensor, Tensor]:
    """As `functional.channel_moments`, differentiable, for p > 0."""
    seed = torch.randint(2**62, (), device="cpu")
    if not functional.uses_gaussian(x, dropout):
        return channel_moments(x, p, seed)
    sums = functional.power_sums(x)
    normal = seeded_normals(sums[0].detach(), seed)
    return functional.gaussian_moments(sums, normal, p, x.shape[1])


@torch.library.custom_op(
    "kn_zoo::seeded_normals", mutates_args=(), schema="(Tensor maps, Tensor seed) -> Tensor"
)
def seeded_normals(maps: Tensor, seed: Tensor) -> Tensor:
    """Two standard normal numbers for each of `maps`, (2, *), from an integer tensor on the CPU."""
    generator = torch.Generator(maps.device).manual_seed(int(seed))
    return maps.new_empty((2, *maps.shape)).normal_(generator=generator)


@seeded_normals.register_fake
def _(maps: Tensor, seed: Tensor) -> Tensor:
    return maps.new_empty((2, *maps.shape))


@torch.library.custom_op(
    "kn_zoo::channel_moments",
    mutates_args=(),
    schema="(Tensor x, float p, Tensor seed) -> (Tensor, Tensor)",
)
def channel_moments(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`masked_moments` with a seed in an integer tensor on the CPU."""
    return masked_moments(x, p, int(seed))


@channel_moments.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    maps = x.new_empty((x.shape[0], 1, x.shape[2], x.shape[3]), dtype=dtype)
    return maps, torch.empty_like(maps)


@torch.library.custom_op(
    "kn_zoo::channel_moments_backward",
    mutates_args=(),
    schema="(Tensor grad_mean, Tensor grad_var, Tensor mean, Tensor x, float p, Tensor seed)"
    " -> Tensor",
)
def channel_moments_backward(
    grad_mean: Tensor, grad_var: Tensor, mean: Tensor, x: Tensor, p: float, seed: Tensor
) -> Tensor:
    """The gradient for x, in its shape and type."""
    grad = torch.zeros_like(x)
    add_moments_gradient_(grad, x, grad_mean, grad_var, mean, p, int(seed))
    return grad


@channel_moments_backward.register_fake
def _(
    grad_mean: Tensor, grad_var: Tensor, mean: Tensor, x: Tensor, p: float, seed: Tensor
) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.p, seed = inputs
    ctx.save_for_backward(x, output[0], seed)


def _backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None, None]:
    x, mean, seed = ctx.saved_tensors
    return channel_moments_backward(grad_mean, grad_var, mean, x, ctx.p, seed), None, None


channel_moments.register_autograd(_backward, setup_context=_setup_context)
