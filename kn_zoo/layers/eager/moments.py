"""Mean and variance over the channels of each pixel under a dropout mask, and their gradient."""

import torch
from torch import Tensor

from kn_zoo.layers.functional import upcast

from .chunks import dense_layout, flat_view, iter_chunks, match_memory_format
from .dropout import dropout_mask, dropped_per_chunk


def masked_moments(x: Tensor, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """As `functional.channel_moments` with the mask of `seed`, not differentiable."""
    x = dense_layout(x)
    if x.device.type != "cpu":  # one fused pass there
        x = upcast(x) * dropout_mask(x, p, seed) if p > 0.0 else upcast(x)
        return torch.var_mean(x, 1, correction=0, keepdim=True)[::-1]
    chunks = [
        _moments(chunk, dropped, p)
        for (chunk,), dropped in zip(iter_chunks(x), dropped_per_chunk(x, p, seed), strict=True)
    ]
    if len(chunks) == 1:
        return chunks[0]
    mean, var = zip(*chunks, strict=True)
    return torch.cat(mean), torch.cat(var)


def _moments(x: Tensor, dropped: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    if dropped is None:
        x = upcast(x)
        mean = x.mean(1, keepdim=True)
        x = x - mean
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return mean.double() + x.mean(1, keepdim=True), norm * norm / x.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    flat_view(x).index_fill_(0, dropped, 0.0)
    mean = x.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(x.sub_(mean), dim=1, keepdim=True)
    return mean / (1.0 - p), norm * norm / (x.shape[1] * (1.0 - p) ** 2)


def add_moments_gradient_(
    grad: Tensor,
    x: Tensor,
    grad_mean: Tensor,
    grad_square: Tensor,
    mean: Tensor,
    p: float,
    seed: int,
) -> None:
    """Add the gradient that passes through `masked_moments` to `grad`, of shape and strides of x.

    With y = x * mask it is mask / C * (grad_mean + 2 * grad_square * y), from the gradients of the
    means of y and y^2 over channels. Without a mask y is taken relative to `mean`, to keep digits;
    with one, its noise is larger by far.
    """
    scale = 1.0 / (1.0 - p)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if p == 0.0:
        grad_mean = torch.addcmul(grad_mean, grad_square, mean.to(grad_square.dtype), value=2.0)
    maps = [match_memory_format(m.to(dtype), x) for m in (grad_mean, grad_square, mean)]
    if x.device.type != "cpu":
        constant, slope, center = maps
        if p > 0.0:
            mask = dropout_mask(x, p, seed)
            grad += torch.addcmul(constant, x * mask, slope, value=2.0) * (mask / x.shape[1])
        else:
            grad += torch.addcmul(constant, x - center, slope, value=2.0) / x.shape[1]
        return
    chunks = iter_chunks(x, grad, *maps)
    for tensors, dropped in zip(chunks, dropped_per_chunk(x, p, seed), strict=True):
        given, target, constant, slope, center = tensors
        y = given - center if dropped is None else upcast(given)
        total = upcast(target)
        kept = None if dropped is None else flat_view(total).index_select(0, dropped)
        total.addcmul_(y, slope, value=2.0 * scale * scale / x.shape[1])
        total.add_(constant, alpha=scale / x.shape[1])
        if dropped is not None and kept is not None:
            flat_view(total).index_copy_(0, dropped, kept)
        if total is not target:
            target.copy_(total)
