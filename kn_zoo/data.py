"""Data sets by name, with a fixed order of images.

`load(name, split)` returns a torchvision data set of (PIL image, class id). Its `class_names` map a
class id to a name, and its `transform` can be set as usual. Image i of a split is the same image on
every machine, so that predictions can be compared image by image.

All data sets return 8-bit PIL images. torchvision's `to_tensor` converts them to x / 255 in
float32, so a network's input is bit-identical everywhere.

Data sets are read from `data_dir()`, which contains one folder per data set:

    cifar10/cifar-10-batches-py/    cifar100/cifar-100-python/    imagenet-1k/{train,val}/
    imagenet32/train_data_batch_1

"cifar100_coarse" are the images of CIFAR-100 with their 20 superclasses.
"""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets

from kn_zoo.imagenet32 import FILES, ImageNet32


class MissingData(RuntimeError):
    """A data set is missing or incomplete; the message says how to get it."""


class Images(Protocol):
    """A data set as `load` returns it: (PIL image or the result of `transform`, class id)."""

    class_names: list[str]
    transform: Callable[[Image.Image], Any] | None

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, int]: ...


class CoarseCIFAR100(datasets.CIFAR100):
    """CIFAR-100 with its 20 superclasses instead of its 100 classes."""

    meta = datasets.CIFAR100.meta | {"key": "coarse_label_names"}

    def __init__(self, root: Path, train: bool) -> None:
        super().__init__(root, train)  # checks the MD5 of the files
        files = self.train_list if train else self.test_list
        with (root / self.base_folder / files[0][0]).open("rb") as file:
            self.targets = pickle.load(file, encoding="latin1")["coarse_labels"]


SPLITS = {
    "digits": ("train", "test"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "cifar100_coarse": ("train", "test"),
    "imagenet-1k": ("train", "validation"),
    "imagenet32": ("train", "validation"),
}
CIFAR = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "cifar100_coarse": CoarseCIFAR100,
}
DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte from the server


def load(
    name: str, split: str, root: Path | str | None = None, *, download: bool = False
) -> Images:
    """Return the images of a split in their fixed order.

    Args:
        name: a key of `SPLITS`.
        split: one of the data set's splits.
        root: folder of the data sets, or of this data set alone; by default `data_dir()`.
        download: download CIFAR-10 or CIFAR-100 if missing; torchvision checks the MD5.

    Raises:
        MissingData: the images are missing, incomplete or could not be downloaded.
        ValueError: unknown name or split.
    """
    if name not in SPLITS:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(SPLITS)}")
    if split not in SPLITS[name]:
        raise ValueError(f"{name} has no split {split!r}: choose from {', '.join(SPLITS[name])}")
    if name == "digits":
        return Digits(train=split == "train")
    if root is not None and not Path(root).is_dir() and not download:
        raise MissingData(f"{root} is not a folder: --data-dir must contain the data sets")
    if name in CIFAR:
        return _load_cifar(name, split, data_dir(root), download)
    if name == "imagenet32":
        return _load_imagenet32(split, data_dir(root))
    return _load_imagenet(split, data_dir(root))


def data_dir(root: Path | str | None = None) -> Path:
    """Return the folder of the data sets: `root`, else `$KN_ZOO_DATA`, else `cache_dir()`."""
    chosen = root or os.environ.get("KN_ZOO_DATA")
    return Path(chosen).expanduser() if chosen else cache_dir()


def cache_dir() -> Path:
    """Return `$KN_ZOO_CACHE`, else `kn_zoo` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("KN_ZOO_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kn_zoo"


class Digits(datasets.VisionDataset):
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels, one channel (PIL mode "L").

    Grey levels 0..16 are scaled to 0..255 as (255 x + 8) // 16, so a digit saved as PNG is the same
    input as the digit itself. Every third image of each class in file order is a test image: 596
    test and 1201 training images, stratified, independent of any random generator. Both splits
    contain digits of the same writers.
    """

    def __init__(self, train: bool, transform: Callable | None = None) -> None:
        super().__init__(root="", transform=transform)
        self.class_names = [str(digit) for digit in range(10)]
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MissingData("digits require scikit-learn: pip install scikit-learn") from None
        grey, targets = load_digits(return_X_y=True)
        rank = np.empty(len(targets), int)  # position of an image within its class
        for digit in range(10):
            rank[targets == digit] = np.arange(np.count_nonzero(targets == digit))
        selected = (rank % 3 != 2) if train else (rank % 3 == 2)
        pixels = (255 * grey[selected].astype(int) + 8) // 16
        self.data = pixels.astype(np.uint8).reshape(-1, 8, 8)
        self.targets = targets[selected].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.data[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def _load_cifar(name: str, split: str, root: Path, download: bool) -> Images:
    """CIFAR-10 or CIFAR-100 from the official Python files, whose MD5 torchvision checks."""
    dataset_class: Any = CIFAR[name]
    files, name = dataset_class.base_folder, name.removesuffix("_coarse")
    folder = root if (root / files).is_dir() else root / name
    if not (folder / files).is_dir():
        if not download:
            raise MissingData(
                f"{name} is not in {root}: set --data-dir or KN_ZOO_DATA to the folder that "
                f"contains {name}/{files}, or download it with --download (160 MiB)"
            )
        _download_cifar(CIFAR[name], folder)
    try:
        dataset = dataset_class(folder, train=split == "train")
    except (RuntimeError, OSError):  # a wrong MD5, an unreadable file
        raise MissingData(
            f"{folder / files} is incomplete or corrupt: remove it and try again"
        ) from None
    dataset.class_names = dataset.classes
    return dataset


def _download_cifar(dataset_class: Any, folder: Path) -> None:
    """Download and extract into `folder`, which is left as it was on failure."""
    files = dataset_class.base_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary,
            _default_timeout(DOWNLOAD_TIMEOUT),
        ):
            dataset_class(temporary, download=True)
            (Path(temporary) / files).rename(folder / files)
    except (RuntimeError, OSError) as error:  # a wrong MD5; no network, no space
        if (folder / files).is_dir():  # another process was faster
            return
        raise MissingData(
            f"{dataset_class.url} could not be downloaded to {folder} "
            f"({' '.join(str(error).split())}): check network and disk space, or copy "
            f"{files} to {folder}"
        ) from None


@contextmanager
def _default_timeout(seconds: float) -> Iterator[None]:
    """A time limit for sockets whose library sets none, such as torchvision's downloads."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


def _load_imagenet(split: str, root: Path) -> Images:
    """ImageNet-1k from one folder per class, classes sorted by WordNet id (as in timm)."""
    info = ImageNetInfo()
    names = ("train",) if split == "train" else ("validation", "val")
    roots = [root / "imagenet-1k", root / "imagenet", root]
    folder = next((r / name for r in roots for name in names if (r / name).is_dir()), None)
    if folder is None:
        raise MissingData(
            f"imagenet-1k is not in {root}: get it from image-net.org (registration required) and "
            "set --data-dir or KN_ZOO_DATA to the folder that contains "
            f"imagenet-1k/{names[-1]}/n01440764/*.JPEG ..."
        )
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if classes != sorted(info.label_names()):
        raise MissingData(
            f"{folder} must contain the 1000 class folders n01440764 ... n15075141, but contains "
            f"{len(classes)} folders: move each image to the folder of its class"
        )
    dataset: Any = datasets.ImageFolder(folder)
    dataset.class_names = [info.label_name_to_description(name) for name in dataset.classes]
    return dataset


def _load_imagenet32(split: str, root: Path) -> Images:
    """ImageNet downsampled to 32 x 32 pixels, in the form in which it is published."""
    folder = next((f for f in (root / "imagenet32", root) if (f / FILES[split][0]).is_file()), None)
    if folder is None:
        raise MissingData(
            f"imagenet32 is not in {root}: get it from image-net.org (registration required) and "
            "set --data-dir or KN_ZOO_DATA to the folder that contains imagenet32/"
            f"{FILES[split][0]}"
        )
    try:
        return ImageNet32(folder, split)
    except (OSError, ValueError) as error:
        raise MissingData(f"{error}: complete the folder, or unpack it again") from None
