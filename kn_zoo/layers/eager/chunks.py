"""Memory order, and walks over it a few images at a time.

On a CPU several passes over a chunk that stays in a core's cache cost little more than one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_NUMEL = 2**19  # two megabytes of float32


def iter_chunks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of all tensors, as many images at a time as `images_per_chunk(x)`."""
    size = images_per_chunk(x)
    if size >= len(x):
        return iter([(x, *others)])
    return zip(*(tensor.split(size) for tensor in (x, *others)), strict=True)


def images_per_chunk(x: Tensor) -> int:
    """Return how many images of x stay in the cache; all of them on other devices than a CPU."""
    if x.device.type != "cpu" or x.numel() == 0:
        return max(1, len(x))
    return max(1, CHUNK_NUMEL * len(x) // x.numel())


def dense_layout(x: Tensor) -> Tensor:
    """Return x laid out as channels_last or contiguous, so that `flat_view` is a view."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def match_memory_format(maps: Tensor, x: Tensor) -> Tensor:
    """Return one-channel maps with strides that let x * maps keep the memory format of x."""
    if x.is_contiguous(memory_format=torch.channels_last):
        n, _, h, w = maps.stride()
        return maps.as_strided(maps.shape, (n, 1, h, w))
    return maps


def flat_view(x: Tensor) -> Tensor:
    """Return x as a vector, in memory order."""
    if x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.view(-1)
