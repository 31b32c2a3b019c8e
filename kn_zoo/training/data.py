"""Data sets of a recipe: loading by name, held-out images, transforms."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from torch import nn
from torch.utils import data as torch_data
from torchvision import transforms

from kn_zoo import data
from kn_zoo.evaluation.predict import eval_transform
from kn_zoo.training.recipe import Recipe, UserError, recipe_settings


@dataclass
class DataConfig:
    """Where data sets are stored (see `kn_zoo.data.data_dir`) and whether to download them."""

    data_dir: Path | None = None
    download: bool = False


class Subset(torch_data.Subset):
    """Some images of a data set, with their own transform."""

    def __init__(self, images: Any, indices: Sequence[int]) -> None:
        if isinstance(images, Subset):  # flatten: nested subsets would share a transform
            images, indices = images.dataset, [images.indices[i] for i in indices]
        super().__init__(copy.copy(images), indices)

    @property
    def transform(self) -> Callable | None:
        images: Any = self.dataset
        return images.transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        images: Any = self.dataset
        images.transform = transform


class InMemory:
    """A data set of small images that transforms each image once and keeps the result."""

    def __init__(self, images: Any) -> None:
        self.images = images
        self.transform = images.transform
        self.transformed: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if index not in self.transformed:
            self.transformed[index] = self.images[index]
        return self.transformed[index]


def load(
    name: str, split: str, config: DataConfig, *, training: bool = False, **stream: Any
) -> Any:
    """Load a data set of `kn_zoo.data`, or one of timm's `create_dataset`.

    A split can be a slice: "train[:1000]" or "train[48000:]" (for timm's, of a reader that slices).
    timm's names are `folder`, `tar`, `torch/...` and `hfds/...`, and for training also the streams
    `wds/...`, `hfids/...` and `tfds/...`. `stream` passes seed and batch_size to a stream.

    Raises MissingData or UserError.
    """
    if name in data.SPLITS:
        return _load_slice(name, split, config)
    root = data.data_dir(config.data_dir)
    try:
        dataset = create_dataset(
            name,
            root=str(root),
            split=split,
            is_training=training,
            download=config.download,
            **stream,
        )
    except ImportError as error:
        raise UserError(f"{name}: {error}; pip install -e '.[stream]'") from None
    except (AssertionError, RuntimeError, ValueError, TypeError, OSError) as error:
        reason = error or f"not found in {root}"
        raise UserError(f"no data set {name!r}, split {split!r}: {reason}") from None
    if isinstance(dataset, torch_data.IterableDataset) and not training:
        raise UserError(
            f"{name} is a stream, but evaluation needs a fixed order of images: set `dataset` to a "
            "folder, a tar, torch/ or hfds/ data set, and `train_dataset` to the stream"
        )
    return dataset


def _load_slice(name: str, split: str, config: DataConfig) -> Any:
    """Load a split of a data set of `kn_zoo.data`, or a slice of one."""
    part = re.fullmatch(r"(\w+)\[(\d*):(\d*)\]", split)
    if part is None:
        return data.load(name, split, config.data_dir, download=config.download)
    images = data.load(name, part[1], config.data_dir, download=config.download)
    start, stop = int(part[2] or 0), int(part[3] or len(images))
    if not start < stop <= len(images):
        raise UserError(f"split {split}: {name} {part[1]} has {len(images)} images")
    return Subset(images, range(start, stop))


def load_training(recipe: Recipe, config: DataConfig, **stream: Any) -> Any:
    """Load the training images of a recipe."""
    name = recipe.train_dataset or recipe.dataset
    return load(name, recipe.train_split, config, training=True, **stream)


def class_names(images: Any, recipe: Recipe) -> list[str]:
    """Return the names of the classes; their ids if the data set has no names."""
    if isinstance(images, Subset):
        images = images.dataset
    if names := getattr(images, "class_names", None) or getattr(images, "classes", None):
        return list(names)
    ids = getattr(getattr(images, "reader", None), "class_to_idx", None)
    if ids:
        return [str(name) for name, _ in sorted(ids.items(), key=lambda item: item[1])]
    if recipe.num_classes is None:
        raise UserError(f"{recipe.dataset} does not provide its classes: set num_classes")
    return [str(i) for i in range(recipe.num_classes)]


def split_off(images: Any, fraction: float) -> tuple[Subset, Subset]:
    """Split into (training images, held-out images), stratified by class, the same in every run."""
    if isinstance(images, torch_data.IterableDataset):
        raise UserError("no images can be held out from a stream: use a folder or hfds/ data set")
    targets = np.asarray(targets_of(images))
    random = np.random.default_rng(0)
    held_out = np.zeros(len(targets), bool)
    for label in np.unique(targets):
        members = random.permutation(np.flatnonzero(targets == label))
        held_out[members[: round(fraction * len(members))]] = True
    if not held_out.any() or held_out.all():
        raise UserError(f"held_out: {fraction} of {len(targets)} images leaves one side empty")
    return (
        Subset(images, np.flatnonzero(~held_out).tolist()),
        Subset(images, np.flatnonzero(held_out).tolist()),
    )


def targets_of(images: Any) -> list[int]:
    """Return the class id of every image, without decoding images where possible."""
    if isinstance(images, Subset):
        targets = targets_of(images.dataset)
        return [targets[i] for i in images.indices]
    if hasattr(images, "targets"):
        return images.targets
    reader: Any = getattr(images, "reader", None)
    if hasattr(reader, "iter_targets"):
        return list(reader.iter_targets())
    return [images[i][1] for i in range(len(images))]


def training_transform(recipe: Recipe, model: nn.Module) -> transforms.Compose:
    """The recipe's augmentation of the PIL image, then the conversion to a tensor of evaluation."""
    to_channels, resize_and_normalize = eval_transform(model).transforms
    to_normalized_tensor = resize_and_normalize.transforms[-2:]
    with recipe_settings("augmentation or erasing"):
        augmentation = [
            getattr(transforms, name)(**arguments)
            for step in recipe.augmentation
            for name, arguments in step.items()
        ]
        erasing = [] if recipe.erasing is None else [transforms.RandomErasing(**recipe.erasing)]
    return transforms.Compose([to_channels, *augmentation, *to_normalized_tensor, *erasing])
