"""Training batches: which images, in which order, with which augmentation.

Everything is a function of seed, epoch and step alone. A run can therefore resume at any update
without a random generator's state, and several processes share the batches that one process would
see. A `Batches` object has a length, and `epoch(number, start)` yields from update `start` this
process's images (B, C, H, W), float32 on the device, and class ids (B,).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kn_zoo.training.data import DataConfig, load_training, training_transform
from kn_zoo.training.recipe import Recipe, UserError

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    def __len__(self) -> int: ...
    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Shard:
    """The part of each batch that belongs to one of several processes."""

    process: int = 0
    processes: int = 1

    def of(self, images: int) -> slice:
        first, last = (images * p // self.processes for p in (self.process, self.process + 1))
        return slice(first, last)


def create_batches(
    recipe: Recipe,
    images: Any,
    model: nn.Module,
    config: DataConfig,
    workers: int,
    device: torch.device,
    shard: Shard,
) -> Batches:
    """Create the batches that fit the data set and the recipe."""
    if isinstance(images, IterableDataset):
        return StreamBatches(recipe, model, config, workers, device, shard)
    if len(images) < recipe.batch_size:
        raise UserError(f"batch_size {recipe.batch_size} exceeds the {len(images)} training images")
    if recipe.on_device:
        return DeviceBatches(recipe, images, device, shard)
    return LoaderBatches(recipe, images, training_transform(recipe, model), workers, device, shard)


def epoch_indices(recipe: Recipe, images: int, epoch: int) -> np.ndarray:
    """Return the shuffled image indices of an epoch, with repeated augmentation in succession."""
    sampler = RepeatAugSampler(
        range(images),
        num_replicas=1,
        rank=0,
        num_repeats=recipe.repeated_augmentation,
        selected_round=0,  # an epoch is as long as without repeats
    )
    sampler.set_epoch(derive_seed(recipe.seed, epoch))
    return np.fromiter(sampler, int)


def derive_seed(*numbers: int) -> int:
    """Return a generator's seed, derived from numbers that identify what is drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Augmented(Dataset):
    """Images by (epoch, position in the epoch, image index), which determine the augmentation."""

    def __init__(self, images: Any, transform: Callable, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        epoch, position, index = key
        image, target = self.images[index]
        with seeded(derive_seed(self.seed, epoch, position)):
            return self.transform(image), target


class LoaderBatches:
    """Images decoded and augmented on the CPU, in `workers` processes or (0) this one."""

    augmented_class = Augmented

    def __init__(
        self,
        recipe: Recipe,
        images: Any,
        transform: Callable,
        workers: int,
        device: torch.device,
        shard: Shard,
    ) -> None:
        images.transform = None
        self.recipe, self.images, self.workers = recipe, images, workers
        self.augmented = self.augmented_class(images, transform, recipe.seed)
        self.device, self.shard = device, shard

    def __len__(self) -> int:
        return len(self.images) // self.recipe.batch_size

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        size = self.recipe.batch_size
        indices = epoch_indices(self.recipe, len(self.images), number)
        keys = [(number, position, int(i)) for position, i in enumerate(indices)]
        batches = [keys[step * size :][self.shard.of(size)] for step in range(start, len(self))]
        loader = DataLoader(
            self.augmented,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # leaves the global generator untouched
        )
        for images, targets in loader:
            yield to_device(images, targets, self.device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator that a transform may use, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class StreamBatches:
    """Images read in sequence from shards or the Hub; timm distributes them over processes.

    A stream has no random access: to resume at `start`, the batches before it are read and skipped.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        config: DataConfig,
        workers: int,
        device: torch.device,
        shard: Shard,
    ) -> None:
        if recipe.repeated_augmentation > 1 or recipe.on_device:
            raise UserError(
                "streams support neither on_device nor repeated_augmentation: remove them"
            )
        self.recipe, self.config, self.workers = recipe, config, workers
        self.transform = training_transform(recipe, model)
        self.device, self.size = device, recipe.batch_size // shard.processes
        self.updates = len(self.open(seed=0)) // self.size

    def open(self, seed: int) -> Any:
        images = load_training(self.recipe, self.config, seed=seed, batch_size=self.size)
        images.set_loader_cfg(num_workers=self.workers)
        return images

    def __len__(self) -> int:
        return self.updates

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        # Reopened each epoch: a reader's own generator would continue from its last state.
        seed = derive_seed(self.recipe.seed, number)
        images = self.open(seed >> 32)
        images.transform = CountedTransform(self.transform, seed)
        loader = DataLoader(
            images,
            self.size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),  # seeds the readers in the workers
        )
        for step, (pixels, targets) in enumerate(loader):
            if step >= start:
                yield to_device(pixels, targets, self.device)


class CountedTransform:
    """A transform seeded by the number of images that this worker has transformed before."""

    def __init__(self, transform: Callable, seed: int) -> None:
        self.transform, self.seed, self.count = transform, seed, 0

    def __call__(self, image: Any) -> Tensor:
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.count += 1
        with seeded(derive_seed(self.seed, rank, worker, self.count)):
            return self.transform(image)


class DeviceBatches:
    """A data set of small images in one tensor on the device, augmented there by the batch.

    Supports torchvision's RandomCrop (to the images' size, zero padding) and RandomHorizontalFlip
    with the same distribution per image; crop and flip are one gather from the padded images. The
    recipe's `resolutions` resize the cropped images.

    Raises UserError for any other augmentation.
    """

    def __init__(self, recipe: Recipe, images: Any, device: torch.device, shard: Shard) -> None:
        pixels, targets = zip(*(images[i] for i in range(len(images))), strict=True)
        stack = torch.from_numpy(
            np.stack([np.asarray(image) for image in pixels])
        )  # (N, H, W[, C])
        self.height, self.width = stack.shape[1:3]
        self.padding, self.flip_p = crop_and_flip(recipe, (self.height, self.width))
        channels_last = stack.reshape(*stack.shape[:3], -1)
        p = self.padding
        self.images = pad(channels_last, (0, 0, p, p, p, p)).to(device)  # (N, H + 2p, W + 2p, C)
        self.targets = torch.tensor(targets, device=device)
        self.mean, self.std = (
            255 * torch.tensor(recipe.preprocessing[k], device=device) for k in ("mean", "std")
        )
        self.recipe, self.device, self.shard = recipe, device, shard

    def __len__(self) -> int:
        return len(self.targets) // self.recipe.batch_size

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        size = self.recipe.batch_size
        indices = epoch_indices(self.recipe, len(self.targets), number)
        side = self.recipe.resolution(number + 1)
        mine = self.shard.of(size)
        for step in range(start, len(self)):
            random = np.random.default_rng([self.recipe.seed, number, step])
            top, left, flip = self.draw(random, size)
            index = indices[step * size :][mine]
            pixels, targets = self.gather(index, top[mine], left[mine], flip[mine])
            yield resize(pixels, side), targets

    def draw(self, random: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        """Draw first rows, first columns and flips of the crops of `size` images: (size,) each."""
        top, left = random.integers(0, 2 * self.padding + 1, (2, size))
        return top, left, random.random(size) < self.flip_p

    def gather(
        self, index: np.ndarray, top: np.ndarray, left: np.ndarray, flip: np.ndarray
    ) -> Batch:
        columns = np.arange(self.width)
        columns = np.where(flip[:, None], columns[::-1], columns) + left[:, None]
        rows = top[:, None] + np.arange(self.height)
        i, r, c = (torch.from_numpy(a).to(self.device) for a in (index, rows, columns))
        crops = self.images[i[:, None, None], r[:, :, None], c[:, None, :]]  # (B, H, W, C)
        return ((crops - self.mean) / self.std).permute(0, 3, 1, 2), self.targets[i]


def resize(pixels: Tensor, side: int | None) -> Tensor:
    """Resize (B, C, H, W) to (B, C, side, side), bilinear with antialiasing; None: not at all."""
    if side is None or pixels.shape[-2:] == (side, side):
        return pixels
    return interpolate(pixels, (side, side), mode="bilinear", antialias=True)


def crop_and_flip(recipe: Recipe, size: Sequence[int]) -> tuple[int, float]:
    """Return RandomCrop's padding and RandomHorizontalFlip's probability; raises UserError."""
    padding, p = 0, 0.0
    if recipe.erasing is not None:
        raise UserError("on_device does not support erasing: remove it, or set on_device: false")
    for name, arguments in (item for step in recipe.augmentation for item in step.items()):
        unsupported = dict(arguments)
        if name == "RandomCrop" and unsupported.pop("size", None) in (size[0], list(size)):
            padding = unsupported.pop("padding", 0)
        elif name == "RandomHorizontalFlip":
            p = unsupported.pop("p", 0.5)
        else:
            unsupported[name] = arguments
        if unsupported or not isinstance(padding, int):
            raise UserError(
                f"on_device does not support {name} with {arguments}, only RandomCrop to the size "
                "of the images with one padding, and RandomHorizontalFlip: change the "
                "augmentation, or set on_device: false"
            )
    return padding, p


def to_device(images: Tensor, targets: Tensor, device: torch.device) -> Batch:
    return images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
