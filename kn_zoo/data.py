"""Evaluation and training images: the data sets that weights are trained on and verified with.

`load(name, split)` gives a torchvision data set of (PIL image, class id) whose `class_names` says
what an id means and whose `transform` may be set as usual. The order of the images never changes:
image i of a split is the same image on every machine, which is what lets a weight be compared image
by image.

Pixels: every data set hands out 8-bit PIL images, and 8-bit images become tensors as x / 255 in
float32 (torchvision's `to_tensor`), so the numbers a network sees are the same bits everywhere.

Nothing is downloaded unless `download=True` is given. What is unpacked or downloaded goes to
`cache_dir()`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets


class MissingData(RuntimeError):
    """The images of a data set are not there or not whole; the message says how to get them."""


class Images(Protocol):
    """What `load` returns: (PIL image or what `transform` makes of it, class id) by index."""

    class_names: list[str]
    transform: Callable[[Image.Image], Any] | None

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, int]: ...


SPLITS = {
    "digits": ("train", "test"),
    "cifar100": ("train", "test"),
    "imagenet-1k": ("train", "validation"),
}


def load(
    name: str, split: str, root: Path | str | None = None, *, download: bool = False
) -> Images:
    """The images of `split` of the data set `name` (see `SPLITS`), in their fixed order.

    `root` is looked in first: the data set's own folder or a folder that holds one such folder per
    data set. Without it `$KN_ZOO_DATA`, a checkout's neighbour `../shared/data` and `cache_dir()`
    are tried in turn. `download` fetches what is missing into `root`, or else `cache_dir()`, where
    a torchvision download exists.

    Raises `MissingData` when the images are not there, `ValueError` for an unknown name or split.
    """
    if name not in SPLITS:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(SPLITS)}")
    if split not in SPLITS[name]:
        raise ValueError(f"{name} has no split {split!r}: choose from {', '.join(SPLITS[name])}")
    if name == "digits":
        return Digits(train=split == "train")
    if name == "cifar100":
        return _cifar100(split, _folders(root), download)
    return _imagenet(split, _folders(root))


def cache_dir() -> Path:
    """`$KN_ZOO_CACHE`, or `kn_zoo` in `$XDG_CACHE_HOME` or `~/.cache`: where data is unpacked
    to."""
    if chosen := os.environ.get("KN_ZOO_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kn_zoo"


def _folders(root: Path | str | None) -> list[Path]:
    """Where data sets may lie, most wanted first. A `root` that was named is the only place looked
    in."""
    if root is not None:
        if not Path(root).is_dir():
            raise MissingData(f"{root} is not a folder: give the folder that holds the data sets")
        return [Path(root)]
    if chosen := os.environ.get("KN_ZOO_DATA"):
        return [Path(chosen).expanduser(), cache_dir()]
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "data"
    return [beside_checkout, cache_dir()]


class Digits(datasets.VisionDataset):
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels, one channel (PIL mode "L"); no
    download.

    The grey levels 0..16 are stretched to 0..255 by (255 x + 8) // 16, so that a digit saved as a
    PNG is the same input as the digit itself. Of each class every third image in file order (the
    3rd, 6th, ...) is held out for the test split: 596 images against 1201, in proportion to the
    classes, independent of any random generator. Both splits hold digits by the same writers.
    """

    def __init__(self, train: bool, transform: Callable | None = None) -> None:
        super().__init__(root="", transform=transform)
        self.class_names = [str(digit) for digit in range(10)]
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MissingData(
                "the digits come with scikit-learn: pip install scikit-learn"
            ) from None
        grey, targets = load_digits(return_X_y=True)
        rank = np.empty(len(targets), int)  # position of an image among those of its class
        for digit in range(10):
            rank[targets == digit] = np.arange(np.count_nonzero(targets == digit))
        chosen = (rank % 3 != 2) if train else (rank % 3 == 2)
        self.data = ((255 * grey[chosen].astype(int) + 8) // 16).astype(np.uint8).reshape(-1, 8, 8)
        self.targets = targets[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.data[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def _cifar100(split: str, folders: list[Path], download: bool) -> Images:
    """CIFAR-100 as torchvision reads it, every file checked by md5; packed strips are unpacked."""
    tried = [place for folder in folders for place in (folder, folder / "cifar100")]
    for place in tried:
        if (place / "cifar-100-python").is_dir():
            return _read_cifar100(place, split, download)
    for place in tried:
        if (place / "unpack.py").is_file() and (place / "test.rest.xz").is_file():
            return _read_cifar100(_unpack(place, cache_dir() / "cifar100"), split)
    if download:
        return _read_cifar100(folders[-1] / "cifar100", split, download)
    raise MissingData(
        f"CIFAR-100 is not in {' or '.join(map(str, folders))}: name the folder that holds "
        "cifar-100-python/ with --data-dir or $KN_ZOO_DATA, or let --download fetch it (161 MiB)"
    )


def _read_cifar100(root: Path, split: str, download: bool = False) -> Images:
    try:
        dataset = datasets.CIFAR100(root, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:  # torchvision's md5 checks; a failed download
        if download:
            message = f"CIFAR-100 could not be downloaded to {root} ({error}): try again"
        else:
            message = (
                f"{root / 'cifar-100-python'} is incomplete or corrupt: remove it and try again"
            )
        raise MissingData(message) from None
    dataset.class_names = dataset.classes
    return dataset


def _unpack(strips: Path, target: Path) -> Path:
    """Run the `unpack.py` beside the strips, once; the files appear in `target` whole or not."""
    if (target / "cifar-100-python").is_dir():
        return target
    print(f"Unpacking CIFAR-100 from {strips} to {target} (once) ...", file=sys.stderr, flush=True)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=target) as part:
            _run_unpack(strips, part)
            (Path(part) / "cifar-100-python").rename(target / "cifar-100-python")
    except OSError as error:
        if not (target / "cifar-100-python").is_dir():  # else another process was faster
            raise MissingData(
                f"cannot write to {target} ({error.strerror}): make room, or name another folder "
                "with $KN_ZOO_CACHE"
            ) from None
    return target


def _run_unpack(strips: Path, out: str) -> None:
    command = [sys.executable, str(strips / "unpack.py"), out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise MissingData(f"{strips} cannot be unpacked ({reason}): copy that folder again")


def _imagenet(split: str, folders: list[Path]) -> Images:
    """ImageNet-1k as folders named by WordNet id, classes in the sorted order of the ids (timm's
    order)."""
    info = ImageNetInfo()
    names = ("train",) if split == "train" else ("validation", "val")
    homes = [h for f in folders for h in (f, f / "imagenet-1k", f / "imagenet")]
    for place in (home / name for home in homes for name in names):
        if not place.is_dir():
            continue
        found = sorted(entry.name for entry in place.iterdir() if entry.is_dir())
        if found != sorted(info.label_names()):
            raise MissingData(
                f"{place} must hold the 1000 class folders n01440764 ... n15075141, and has "
                f"{len(found)} folders: move each image into its class's folder"
            )
        dataset = datasets.ImageFolder(place)
        dataset.class_names = [info.label_name_to_description(w) for w in dataset.classes]
        return dataset
    raise MissingData(
        f"ImageNet-1k is not in {' or '.join(map(str, folders))}: get it from image-net.org "
        "(registration), and name with --data-dir the folder that holds "
        f"{names[-1]}/n01440764/*.JPEG ..."
    )
