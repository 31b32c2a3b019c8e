"""The images of a recipe: loaded by name, split for choices, transformed."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from torch import nn
from torch.utils.data import IterableDataset, Subset
from torchvision import transforms

from kn_zoo import data
from kn_zoo.evaluation import predict as evaluate
from kn_zoo.training.recipe import Recipe, UserError, settings


@dataclass
class Place:
    """Where images lie, and whether they may be fetched."""

    data_dir: Path | None = None
    download: bool = False


class Part(Subset):
    """Some images of a data set, with a transform of their own."""

    def __init__(self, images: Any, indices: Sequence[int]) -> None:
        if isinstance(images, Part):  # whose transform the parts of it would share
            images, indices = images.dataset, [images.indices[i] for i in indices]
        super().__init__(copy.copy(images), indices)

    @property
    def transform(self) -> Callable | None:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        self.dataset.transform = transform


class InMemory:
    """A data set of small images that keeps what the transform makes of them."""

    def __init__(self, images: Any) -> None:
        self.images = images
        self.made: dict[int, Any] = {}
        self.transform = images.transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if index not in self.made:
            self.made[index] = self.images[index]
        return self.made[index]


def load(name: str, split: str, place: Place, *, training: bool = False, **stream: Any) -> Any:
    """A data set of `kn_zoo.data`, or else one by timm's name: folder (or a tar), torch/, hfds/,
    and for training also wds/, hfids/ and tfds/, which stream.

    `stream`: seed and batch_size of one that streams. Raises MissingData or UserError.
    """
    if name in data.SPLITS:
        return data.load(name, split, place.data_dir, download=place.download)
    try:
        found = create_dataset(
            name,
            root=None if place.data_dir is None else str(place.data_dir),
            split=split,
            is_training=training,
            download=place.download,
            **stream,
        )
    except ImportError as error:
        raise UserError(f"{name}: {error}; pip install -e '.[stream]'") from None
    except (AssertionError, RuntimeError, ValueError, TypeError, OSError) as error:
        reason = error or f"nothing at {place.data_dir}"
        raise UserError(f"no data set {name!r}, split {split!r}: {reason}") from None
    if isinstance(found, IterableDataset) and not training:
        raise UserError(
            f"{name} streams, and an evaluation needs images in a fixed order: name a folder, a "
            "tar, torch/ or hfds/ data set as `dataset`, and the stream as `train_dataset`"
        )
    return found


def load_training(recipe: Recipe, place: Place, **stream: Any) -> Any:
    name, split = recipe.train_dataset or recipe.dataset, recipe.train_split
    part = re.fullmatch(r"(\w+)\[:(\d+)\]", split) if name in data.SPLITS else None
    if part is None:  # timm's readers that know parts take them apart themselves
        return load(name, split, place, training=True, **stream)
    images, count = load(name, part[1], place), int(part[2])
    if not 0 < count <= len(images):
        raise UserError(f"train_split {split}: {name} {part[1]} has {len(images)} images")
    return Part(images, range(count))


def class_names(images: Any, recipe: Recipe) -> list[str]:
    """What the class ids mean; their numbers where the data set has no names."""
    if names := getattr(images, "class_names", None) or getattr(images, "classes", None):
        return list(names)
    ids = getattr(getattr(images, "reader", None), "class_to_idx", None)
    if ids:
        return [str(name) for name, _ in sorted(ids.items(), key=lambda item: item[1])]
    if recipe.num_classes is None:
        raise UserError(f"{recipe.dataset} does not say how many classes it has: set num_classes")
    return [str(i) for i in range(recipe.num_classes)]


def split_off(images: Any, share: float) -> tuple[Part, Part]:
    """(the rest, `share` of the images of each class): the same ones in every run."""
    if isinstance(images, IterableDataset):
        raise UserError("a stream has no part that can be held out: name a folder or hfds/ data")
    targets = np.asarray(targets_of(images))
    random = np.random.default_rng(0)
    held = np.zeros(len(targets), bool)
    for label in np.unique(targets):
        members = random.permutation(np.flatnonzero(targets == label))
        held[members[: round(share * len(members))]] = True
    if not held.any() or held.all():
        raise UserError(f"held_out: {share} of {len(targets)} images leaves nothing on one side")
    return Part(images, np.flatnonzero(~held)), Part(images, np.flatnonzero(held))


def targets_of(images: Any) -> list[int]:
    if isinstance(images, Part):
        targets = targets_of(images.dataset)
        return [targets[i] for i in images.indices]
    if hasattr(images, "targets"):
        return images.targets
    reader = getattr(images, "reader", None)
    if hasattr(reader, "iter_targets"):
        return list(reader.iter_targets())
    return [images[i][1] for i in range(len(images))]


def training_transform(recipe: Recipe, model: nn.Module) -> transforms.Compose:
    """The recipe's augmentations of the PIL image, then pixels as evaluation has them."""
    colours, resize_and_normalize = evaluate.eval_transform(model).transforms
    pixels = resize_and_normalize.transforms[-2:]  # to a tensor, normalized
    with settings("augmentation or erasing"):
        steps = [
            getattr(transforms, name)(**arguments)
            for step in recipe.augmentation
            for name, arguments in step.items()
        ]
        erasing = [] if recipe.erasing is None else [transforms.RandomErasing(**recipe.erasing)]
    return transforms.Compose([colours, *steps, *pixels, *erasing])
