"""Training batches whose images, order and augmentation are a function of seed, epoch and step."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kn_zoo.data import Images


class DeviceBatches:
    """A data set of small images as one tensor on the device, augmented there, a batch at a time.

    The augmentations are torchvision's RandomCrop (size of the images, padding with zeros) and
    RandomHorizontalFlip, with the same distribution, drawn anew for every image. A crop and a flip
    are one gather from the padded images. Each of `processes` gets its slice of every batch; what
    is left over of an epoch is dropped.

    Raises ValueError for any other augmentation, or images of different sizes.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        augmentation: Sequence[dict[str, dict]],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        pixels, targets = zip(*(images[i] for i in range(len(images))), strict=True)
        stack = torch.from_numpy(
            np.stack([np.asarray(image) for image in pixels])
        )  # (N, H, W[, C])
        self.height, self.width = stack.shape[1:3]
        self.padding, self.flip_p = crop_and_flip(augmentation, (self.height, self.width))
        channels_first = stack.reshape(*stack.shape[:3], -1).permute(0, 3, 1, 2)
        padded = torch.nn.functional.pad(channels_first, [self.padding] * 4)
        self.images = padded.permute(0, 2, 3, 1).contiguous().to(device)  # (N, H + 2p, W + 2p, C)
        self.targets = torch.tensor(targets, device=device)
        self.mean, self.std = (255 * torch.tensor(v, device=device) for v in (mean, std))
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self.process, self.processes = process, processes
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.targets) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) in float32, channels last in memory, and class ids (B,)."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.targets))
        for step in range(len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            top, left = random.integers(0, 2 * self.padding + 1, (2, len(batch)))
            flip = random.random(len(batch)) < self.flip_p
            mine = slice(*self.share(len(batch)))
            yield self.gather(batch[mine], top[mine], left[mine], flip[mine])

    def share(self, images: int) -> tuple[int, int]:
        """First and last + 1 of this process's images in a batch."""
        return tuple(images * p // self.processes for p in (self.process, self.process + 1))

    def gather(self, index: Any, top: Any, left: Any, flip: Any) -> tuple[Tensor, Tensor]:
        rows = top[:, None] + np.arange(self.height)
        columns = np.where(flip[:, None], np.arange(self.width)[::-1], np.arange(self.width))
        columns = columns + left[:, None]
        i, r, c = (torch.from_numpy(a).to(self.device) for a in (index, rows, columns))
        crops = self.images[i[:, None, None], r[:, :, None], c[:, None, :]]  # (B, H, W, C)
        return ((crops - self.mean) / self.std).permute(0, 3, 1, 2), self.targets[i]


def crop_and_flip(
    augmentation: Sequence[dict[str, dict]], size: tuple[int, int]
) -> tuple[int, float]:
    """The padding of RandomCrop and the probability of RandomHorizontalFlip."""
    padding, p = 0, 0.0
    for name, arguments in ((k, dict(v)) for step in augmentation for k, v in step.items()):
        if name == "RandomCrop" and arguments.pop("size", None) in (size[0], list(size)):
            padding = arguments.pop("padding", 0)
        elif name == "RandomHorizontalFlip":
            p = arguments.pop("p", 0.5)
        else:
            arguments[name] = None
        if arguments or not isinstance(padding, int):
            raise ValueError(
                f"on_device has no {name} with {step_text(augmentation)}: it has RandomCrop of the "
                "images' size with one padding, and RandomHorizontalFlip; set on_device: false"
            )
    return padding, p


def step_text(augmentation: Sequence[dict[str, dict]]) -> str:
    return ", ".join(f"{k}({v})" for step in augmentation for k, v in step.items())
