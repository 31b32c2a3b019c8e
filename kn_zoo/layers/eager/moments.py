"""Mean and variance over the channels of each pixel under a dropout mask, and their gradient."""

import torch
from torch import Tensor

from kn_zoo.layers.functional import upcast

from .chunks import dense_layout, flat_view, iter_chunks, match_memory_format
from .dropout import dropout_mask, dropped_per_chunk


def masked_moments(x: Tensor, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """As `functional.channel_moments` with the mask of `seed`, in float32, not differentiable."""
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
        norm = torch.linalg.vector_norm(x - mean, dim=1, keepdim=True)
        return mean, norm * norm / x.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    flat_view(x).index_fill_(0, dropped, 0.0)
    mean = x.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(x.sub_(mean), dim=1, keepdim=True)
    return mean / (1.0 - p), norm * norm / (x.shape[1] * (1.0 - p) ** 2)


def add_moments_gradient_(
    grad: Tensor, x: Tensor, grad_mean: Tensor, grad_var: Tensor, mean: Tensor, p: float, seed: int
) -> None:
    """Add the gradient that `masked_moments` passes on to `grad`, of shape, type and strides of x.

    With y = x * mask it is mask / C * (grad_mean + 2 * grad_var * (y - mean)).
    """
    scale = 1.0 / (1.0 - p)
    slope = grad_var * (2.0 * scale * scale / x.shape[1])
    constant = grad_mean * (scale / x.shape[1])
    if p > 0.0:  # one pass less; the mask's noise is larger by far than the digits that are lost
        constant = constant - slope * mean * (1.0 - p)
    dtype = torch.promote_types(x.dtype, torch.float32)
    constant, slope = (match_memory_format(m.to(dtype), x) for m in (constant, slope))
    if x.device.type != "cpu":
        added = torch.addcmul(constant, x if p > 0.0 else x - mean, slope)
        grad += added * (dropout_mask(x, p, seed) * (1.0 - p)) if p > 0.0 else added
        return
    mean = match_memory_format(mean, x)
    chunks = iter_chunks(x, grad, slope, constant, mean)
    for tensors, dropped in zip(chunks, dropped_per_chunk(x, p, seed), strict=True):
        given, target, slopes, constants, means = tensors
        total = upcast(target)
        if dropped is None:
            total.addcmul_(given - means, slopes).add_(constants)
        else:
            kept = flat_view(total).index_select(0, dropped)
            total.addcmul_(upcast(given), slopes).add_(constants)
            flat_view(total).index_copy_(0, dropped, kept)
        if total is not target:
            target.copy_(total)
