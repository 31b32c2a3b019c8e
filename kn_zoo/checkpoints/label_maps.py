"""Label maps of an evaluation set, as a segmentation bundle stores them, and their scores.

All scores follow from confusion matrices, one per image. Void pixels are not counted.
"""

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from kn_zoo.checkpoints.predictions import NEAR_TIE


@dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix, in percent."""

    confusion: np.ndarray  # (K, K) int64, pixels: true class by row, predicted class by column

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union, (K,); NaN for a class in neither labels nor predictions."""
        hits = np.diag(self.confusion).astype(float)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        return 100 * _ratio(hits, union)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes in labels or predictions; NaN if there is none."""
        return _mean(self.iou)

    @property
    def pixel_accuracy(self) -> float:
        return float(100 * _ratio(np.trace(self.confusion), self.confusion.sum()))

    @property
    def class_accuracy(self) -> float:
        """Mean recall over the classes in the labels; NaN if there is none."""
        return _mean(100 * _ratio(np.diag(self.confusion), self.confusion.sum(1)))


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """Divide; 0 / 0 is NaN."""
    with np.errstate(invalid="ignore"):
        return np.true_divide(numerator, denominator)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Count pixels by true and predicted class, (K, K) int64; labels >= K are void."""
    counted = labels < classes
    cells = classes * labels[counted].astype(np.int64) + predicted[counted]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class LabelMaps:
    """Predicted label maps of an evaluation set, as a bundle's ``predictions.npz`` stores them.

    The true label maps are not stored. Their hashes are, and the confusion matrix of each image,
    from which every score follows.
    """

    maps: np.ndarray  # (N, H, W) uint8, predicted classes
    labels_sha256: np.ndarray  # (N,) S64, of the true label maps (uint8, row by row)
    confusion: np.ndarray  # (N, K, K) int64

    @property
    def scores(self) -> Scores:
        return Scores(self.confusion.sum(0))

    def to_bytes(self) -> bytes:
        """Return the contents of predictions.npz."""
        file = BytesIO()
        np.savez_compressed(
            file,
            label_maps=self.maps,
            labels_sha256=self.labels_sha256,
            confusion=self.confusion.astype(np.int32),
            statistics=np.asarray("expected"),
            near_tie_bound=np.asarray(NEAR_TIE),
        )
        return file.getvalue()

    @classmethod
    def read(cls, file: Path | BytesIO) -> "LabelMaps":
        """Read the contents of predictions.npz.

        Raises:
            ValueError: an array is missing, or the shapes do not fit together.
        """
        with np.load(file, allow_pickle=False) as arrays:
            names = ("label_maps", "labels_sha256", "confusion")
            if missing := [name for name in names if name not in arrays]:
                raise ValueError(f"{file} contains no label maps: {', '.join(missing)} missing")
            maps, sha256, confusion = (arrays[name] for name in names)
        images, classes = len(maps), confusion.shape[-1]
        if sha256.shape != (images,) or confusion.shape != (images, classes, classes):
            raise ValueError(
                f"{file}: shapes of maps {maps.shape}, hashes {sha256.shape} and confusion "
                f"matrices {confusion.shape} do not fit together"
            )
        return cls(maps, sha256, confusion.astype(np.int64))


def labels_sha256(labels: np.ndarray) -> bytes:
    """Hash the true label map of an image."""
    return hashlib.sha256(np.ascontiguousarray(labels, np.uint8).tobytes()).hexdigest().encode()
