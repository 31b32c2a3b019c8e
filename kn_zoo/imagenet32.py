"""ImageNet downsampled to 32 x 32 pixels, in the form in which it is published.

Ten pickled batches ``train_data_batch_1`` ... ``train_data_batch_10`` and ``val_data`` hold rows of
3072 bytes (red, green, blue, each row by row) and labels from 1 to 1000, in the order of
``map_clsloc.txt``, which names a class a line: ``n02119789 1 kit_fox``.

Source: Chrabaszcz, Loshchilov, Hutter: A Downsampled Variant of ImageNet as an Alternative to the
CIFAR datasets, arXiv 1707.08819.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torchvision.datasets import VisionDataset

SIDE = 32
FILES = {
    "train": tuple(f"train_data_batch_{i}" for i in range(1, 11)),
    "validation": ("val_data",),
}
CLASSES = 1000
CLASS_FILE = "map_clsloc.txt"


class ImageNet32(VisionDataset):
    """(PIL image, class id) of ImageNet 32 x 32; class ids count from 0.

    The batches stay in memory as they are, 3.9 GB for the training images. Raises FileNotFoundError
    where a file is missing, and ValueError where one is not what it should be.
    """

    def __init__(self, root: Path, split: str, transform: Callable[[Any], Any] | None = None):
        super().__init__(root=str(root), transform=transform)
        batches = [read_batch(root / name) for name in FILES[split]]
        self.pixels = [pixels for pixels, _ in batches]
        self.ends = np.cumsum([len(pixels) for pixels in self.pixels])
        self.targets = [label for _, labels in batches for label in labels]
        self.class_names = read_class_names(root / CLASS_FILE)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        batch = int(np.searchsorted(self.ends, index, side="right"))
        row = self.pixels[batch][index - int(self.ends[batch])]  # IndexError past the end
        image = Image.fromarray(row.reshape(3, SIDE, SIDE).transpose(1, 2, 0))  # to (H, W, 3)
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Pixels (N, 3072) uint8, and class ids from 0, of one file."""
    with path.open("rb") as file:
        try:
            content = NumpyUnpickler(file).load()
            pixels, labels = np.asarray(content["data"]), [int(i) - 1 for i in content["labels"]]
        except Exception as error:  # an unpickler raises anything on damaged bytes
            raise ValueError(f"{path} is no batch of ImageNet 32x32 ({error})") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * SIDE * SIDE):
        raise ValueError(f"{path}: pixels are {pixels.dtype} {pixels.shape}, not bytes (N, 3072)")
    if labels and not 0 <= min(labels) <= max(labels) < CLASSES:
        raise ValueError(f"{path}: labels from {min(labels) + 1} to {max(labels) + 1}, not 1..1000")
    return pixels, labels


def read_class_names(path: Path) -> list[str]:
    """Names by class id, or "class 0" ... where the file of names is missing."""
    if not path.is_file():
        return [f"class {i}" for i in range(CLASSES)]
    names = [""] * CLASSES
    for line in path.read_text(encoding="utf-8").splitlines():
        _, number, name = line.split(maxsplit=2)
        names[int(number) - 1] = name.replace("_", " ")
    return names


class NumpyUnpickler(pickle.Unpickler):
    """Builds NumPy arrays, containers, numbers and strings, and refuses everything else."""

    ALLOWED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),  # how protocol 2 spells bytes
        }
    )

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")  # written by Python 2

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return super().find_class(module, name)
