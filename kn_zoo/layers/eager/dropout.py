"""Dropout masks drawn from a seed, so that the backward pass draws the same one again.

On a CPU random numbers cost more than arithmetic: one is drawn for each *dropped* element, the
geometrically distributed gap to the next, p * N * C * H * W in all.
"""

import math

import torch
from torch import Tensor

from .chunks import flat_view, images_per_chunk


def dropout_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """Return factors for x (N, C, H, W): 1 / (1 - p) with probability 1 - p, else 0."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":
        mask = torch.full_like(x, 1.0 / (1.0 - p), dtype=dtype)
        flat_view(mask).index_fill_(0, _bernoulli_positions(x.numel(), p, seed), 0.0)
        return mask
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty_like(x, dtype=dtype).bernoulli_(1.0 - p, generator=generator)
    return keep.div_(1.0 - p)


def dropped_per_chunk(x: Tensor, p: float, seed: int) -> list[Tensor | None]:
    """Return for each of `iter_chunks(x)` where in its memory elements are dropped; None if p is 0."""
    size = images_per_chunk(x)
    count = max(1, -(-len(x) // size))
    if p == 0.0:
        return [None] * count
    positions = _bernoulli_positions(x.numel(), p, seed)
    if count == 1:
        return [positions]
    chunk = size * x[:1].numel()
    bounds = torch.searchsorted(positions, torch.arange(1, count) * chunk)
    return [part - i * chunk for i, part in enumerate(positions.tensor_split(bounds))]


def _bernoulli_positions(count: int, p: float, seed: int) -> Tensor:
    """Return the sorted positions of successes among `count` independent trials of probability p."""
    generator = torch.Generator().manual_seed(seed)
    draws = int(count * p + 6.0 * math.sqrt(count * p) + 16.0)  # hardly ever too few
    parts: list[Tensor] = []
    last = -1
    while True:
        uniform = torch.rand(draws, generator=generator)
        gaps = uniform.neg_().log1p_().div_(math.log1p(-p)).to(torch.int64)
        positions = gaps.add_(1).cumsum_(0).add_(last)
        found = int(torch.searchsorted(positions, count))
        parts.append(positions[:found])
        if found < draws:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        last = int(positions[-1])
