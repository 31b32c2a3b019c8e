"""Training batches: which images, in which order, how augmented.

All of it is a function of seed, epoch and position in the epoch, and of nothing else: a run can be
taken up at any step without a random generator's state, and several processes share what one would
see. Each kind of batches has a length, and `epoch(number, start)`, which yields from update `start`
on this process's images (B, C, H, W), in float32 on the device, and class ids (B,).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kn_zoo.training.data import Place, load_training, training_transform
from kn_zoo.training.recipe import Recipe, UserError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Share:
    """Which part of every batch is this process's."""

    process: int = 0
    processes: int = 1

    def of(self, images: int) -> slice:
        first, last = (images * p // self.processes for p in (self.process, self.process + 1))
        return slice(first, last)


def create_batches(
    recipe: Recipe,
    images: Any,
    model: nn.Module,
    place: Place,
    workers: int,
    device: torch.device,
    share: Share,
) -> Any:
    """The kind of batches that the data set and the recipe ask for."""
    if isinstance(images, IterableDataset):
        return StreamBatches(recipe, model, place, workers, device, share)
    if len(images) < recipe.batch_size:
        raise UserError(f"a batch of {recipe.batch_size} needs more than {len(images)} images")
    if recipe.on_device:
        return DeviceBatches(recipe, images, device, share)
    return LoaderBatches(recipe, images, training_transform(recipe, model), workers, device, share)


def order(recipe: Recipe, images: int, epoch: int) -> np.ndarray:
    """Image numbers of an epoch: shuffled, each in turn as often as it is augmented."""
    sampler = RepeatAugSampler(
        range(images),
        num_replicas=1,
        rank=0,
        num_repeats=recipe.repeated_augmentation,
        selected_round=0,  # an epoch is as long as without repeats
    )
    sampler.set_epoch(seed_of(recipe.seed, epoch))
    return np.fromiter(sampler, int)


def seed_of(*numbers: int) -> int:
    """A seed for a generator, from numbers that name what is to be drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class LoaderBatches:
    """Images that are decoded and augmented on the CPU, by `workers` processes or this one."""

    def __init__(
        self,
        recipe: Recipe,
        images: Any,
        transform: Callable,
        workers: int,
        device: torch.device,
        share: Share,
    ) -> None:
        images.transform = None
        self.recipe, self.images, self.workers = recipe, images, workers
        self.augmented = Augmented(images, transform, recipe.seed)
        self.device, self.share = device, share

    def __len__(self) -> int:
        return len(self.images) // self.recipe.batch_size

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        size = self.recipe.batch_size
        index = order(self.recipe, len(self.images), number)
        keys = [(number, position, int(i)) for position, i in enumerate(index)]
        batches = [keys[step * size :][self.share.of(size)] for step in range(start, len(self))]
        loader = DataLoader(
            self.augmented,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the global one would be drawn from
        )
        for images, targets in loader:
            yield to_device(images, targets, self.device)


class Augmented(Dataset):
    """An image by (epoch, position in it, image number), augmented as those three decide."""

    def __init__(self, images: Any, transform: Callable, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        epoch, position, index = key
        image, target = self.images[index]
        with seeded(seed_of(self.seed, epoch, position)):
            return self.transform(image), target


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` for all that may augment; the generators go back afterwards."""
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
    """Images that come from shards or the Hub one after the other; timm shares them out.

    A stream cannot be entered in its middle: to go on from `start`, what lies before is read and
    passed over.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        place: Place,
        workers: int,
        device: torch.device,
        share: Share,
    ) -> None:
        if recipe.repeated_augmentation > 1 or recipe.on_device:
            raise UserError(
                "a stream has no on_device and no repeated_augmentation: leave them out"
            )
        self.recipe, self.place, self.workers = recipe, place, workers
        self.transform = training_transform(recipe, model)
        self.device, self.size = device, recipe.batch_size // share.processes
        self.updates = len(self.open(seed=0)) // self.size

    def open(self, seed: int) -> Any:
        images = load_training(self.recipe, self.place, seed=seed, batch_size=self.size)
        images.set_loader_cfg(num_workers=self.workers)
        return images

    def __len__(self) -> int:
        return self.updates

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        # A new stream each epoch: readers' own generators would go on from wherever they were.
        seed = seed_of(self.recipe.seed, number)
        images = self.open(seed >> 32)
        images.transform = Counted(self.transform, seed)
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


class Counted:
    """A transform whose random numbers follow from a seed and how many images came before."""

    def __init__(self, transform: Callable, seed: int) -> None:
        self.transform, self.seed, self.count = transform, seed, 0

    def __call__(self, image: Any) -> Tensor:
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.count += 1
        with seeded(seed_of(self.seed, rank, worker, self.count)):
            return self.transform(image)


class DeviceBatches:
    """A data set of small images as one tensor on the device, augmented there, a batch at a time.

    The augmentations are torchvision's RandomCrop (size of the images, padding with zeros) and
    RandomHorizontalFlip, with the same distribution, drawn anew for every image. A crop and a flip
    are one gather from the padded images.

    Raises UserError for any other augmentation.
    """

    def __init__(self, recipe: Recipe, images: Any, device: torch.device, share: Share) -> None:
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
        self.recipe, self.device, self.share = recipe, device, share

    def __len__(self) -> int:
        return len(self.targets) // self.recipe.batch_size

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        size = self.recipe.batch_size
        index = order(self.recipe, len(self.targets), number)
        side = self.recipe.resolution(number + 1)
        for step in range(start, len(self)):
            draw = np.random.default_rng([self.recipe.seed, number, step])
            top, left = draw.integers(0, 2 * self.padding + 1, (2, size))
            flip = draw.random(size) < self.flip_p
            mine = self.share.of(size)
            chosen = index[step * size :][mine]
            pixels, targets = self.gather(chosen, top[mine], left[mine], flip[mine])
            yield resize(pixels, side), targets

    def gather(
        self, index: np.ndarray, top: np.ndarray, left: np.ndarray, flip: np.ndarray
    ) -> Batch:
        columns = np.arange(self.width)
        columns = np.where(flip[:, None], columns[::-1], columns) + left[:, None]
        rows = top[:, None] + np.arange(self.height)
        i, r, c = (torch.from_numpy(a).to(self.device) for a in (index, rows, columns))
        crops = self.images[i[:, None, None], r[:, :, None], c[:, None, :]]  # (B, H, W, C)
        return ((crops - self.mean) / self.std).permute(0, 3, 1, 2), self.targets[i]


def resize(pixels: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) to `side` pixels, bilinear with antialiasing; the shape of others."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    return interpolate(pixels, (side, side), mode="bilinear", antialias=True)


def crop_and_flip(recipe: Recipe, size: Sequence[int]) -> tuple[int, float]:
    """The padding of RandomCrop and the probability of RandomHorizontalFlip."""
    padding, p = 0, 0.0
    if recipe.erasing is not None:
        raise UserError("on_device has no erasing: leave it out, or set on_device: false")
    for name, given in ((k, v) for step in recipe.augmentation for k, v in step.items()):
        arguments = dict(given)
        if name == "RandomCrop" and arguments.pop("size", None) in (size[0], list(size)):
            padding = arguments.pop("padding", 0)
        elif name == "RandomHorizontalFlip":
            p = arguments.pop("p", 0.5)
        else:
            arguments[name] = "unknown"
        if arguments or not isinstance(padding, int):
            raise UserError(
                f"on_device has no {name} with {given}: it has RandomCrop of the images' size with "
                "one padding, and RandomHorizontalFlip; else set on_device: false"
            )
    return padding, p


def to_device(images: Tensor, targets: Tensor, device: torch.device) -> Batch:
    return images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
