"""Label maps of a segmentation network, their scores, and their comparison with stored ones.

Scores are taken from one confusion matrix over all pixels of all images; void pixels never count. A
label map is reproducible on another machine up to float32 rounding: where the two best scores of a
pixel are closer than `NEAR_TIE`, the classes may trade places, and nothing else may differ.
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kn_zoo.checkpoints.predictions import NEAR_TIE
from kn_zoo.evaluation.predict import exact_float32
from kn_zoo.segmentation.fcn import enlarged


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says, in percent."""

    confusion: np.ndarray  # (K, K) int64, pixels: true class by row, predicted class by column

    @property
    def iou(self) -> np.ndarray:
        """(K,) intersection over union; NaN for a class in neither labels nor predictions."""
        hits = np.diag(self.confusion).astype(float)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        return 100 * _ratio(hits, union)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur; NaN if none does."""
        return _mean(self.iou)

    @property
    def pixel_accuracy(self) -> float:
        return float(100 * _ratio(np.trace(self.confusion), self.confusion.sum()))

    @property
    def class_accuracy(self) -> float:
        """Mean recall over the classes that the labels have; NaN if they have none."""
        return _mean(100 * _ratio(np.diag(self.confusion), self.confusion.sum(1)))


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """Quotient, NaN where both are zero."""
    with np.errstate(invalid="ignore"):
        return np.true_divide(numerator, denominator)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(K, K) int64 counts of true class by predicted class; labels from K up are void."""
    counted = labels < classes
    cells = classes * labels[counted].astype(np.int64) + predicted[counted]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class Segmented:
    """One image's result."""

    scores: Tensor  # (K, H, W) float32
    labels: np.ndarray  # (H, W) uint8, the true classes, and void

    @property
    def label_map(self) -> np.ndarray:
        """(H, W) uint8: the best class of each pixel, the lowest id of equal ones."""
        return self.scores.argmax(dim=0).to(torch.uint8).numpy()


def segment(
    model: nn.Module,
    images: Any,
    transform: Any,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: str | None = None,
) -> Iterator[Segmented]:
    """Segment every image in order, one at a time, in eval mode and float32.

    Where `transform` changes an image's size, scores are enlarged to that of its labels. The model
    is moved to `device` and left there; its training flag is restored. `workers` processes decode
    images. `progress` is the label of a progress bar on stderr.
    """
    images = copy.copy(images)
    images.transform = transform
    dataset: Dataset = images
    loader: Any = DataLoader(
        dataset, batch_size=None, num_workers=workers, generator=torch.Generator()
    )
    if progress is not None:
        loader = track(loader, progress, total=len(images), console=Console(stderr=True))
    was_training = model.training
    model.to(device).eval()
    try:
        for pixels, labels in loader:
            with torch.inference_mode(), exact_float32():
                scores = enlarged(model(pixels[None].to(device)).float(), labels.shape)
            yield Segmented(scores[0].cpu(), labels.numpy().astype(np.uint8))
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class LabelMaps:
    """What a network says about an evaluation set, as a bundle's predictions.npz stores it.

    The true label maps are the data set's and are not stored: their hashes are, and the confusion
    matrix of each image, from which every score can be computed without them.
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
        """Return what `to_bytes` wrote.

        Raises ValueError if maps, hashes and matrices do not belong together.
        """
        with np.load(file, allow_pickle=False) as arrays:
            names = ("label_maps", "labels_sha256", "confusion")
            if missing := [name for name in names if name not in arrays]:
                raise ValueError(f"{file} has no {', '.join(missing)}: it stores no label maps")
            maps, sha256, confusion = (arrays[name] for name in names)
        images, classes = len(maps), confusion.shape[-1]
        if sha256.shape != (images,) or confusion.shape != (images, classes, classes):
            raise ValueError(f"{file}: {maps.shape} maps, {sha256.shape} hashes, {confusion.shape}")
        return cls(maps, sha256, confusion.astype(np.int64))


def labels_sha256(labels: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(labels, np.uint8).tobytes()).hexdigest().encode()


def label_maps(results: Iterator[Segmented], classes: int) -> LabelMaps:
    """Collect label maps, hashes and confusion matrices of images of one size.

    Raises ValueError if there are no images, or images of several sizes.
    """
    maps, hashes, confusion = [], [], []
    for result in results:
        maps.append(result.label_map)
        hashes.append(labels_sha256(result.labels))
        confusion.append(confusion_matrix(maps[-1], result.labels, classes))
    sizes = {found.shape for found in maps}
    if len(sizes) != 1:
        raise ValueError(f"label maps are stored of images of one size, not of {sorted(sizes)}")
    return LabelMaps(np.stack(maps), np.array(hashes), np.stack(confusion))


@dataclass(frozen=True)
class Comparison:
    """How label maps that were found differ from stored ones."""

    images: int
    mismatches: tuple[int, ...]  # numbers of images that differ by more than rounding can explain
    flipped: int  # pixels whose class differs, explained by a near-tie
    near_ties: int  # pixels whose two best scores are within the bound
    found: Scores
    stored: Scores
    miou_bound: float  # by so many points the flipped pixels can move the mIoU

    @property
    def matches(self) -> bool:
        return not self.mismatches and self.miou_difference <= self.miou_bound + 1e-9

    @property
    def miou_difference(self) -> float:
        return abs(self.found.miou - self.stored.miou)


def compare(results: Iterator[Segmented], stored: LabelMaps, bound: float = NEAR_TIE) -> Comparison:
    """Compare what a network finds, image by image and pixel by pixel, with what is stored.

    An image matches if its true labels have the stored hash, its stored confusion matrix is that of
    the stored map, and the stored class of each pixel scores within `bound` of the best one.
    """
    classes = stored.confusion.shape[-1]
    mismatches: list[int] = []
    confusion = np.zeros((classes, classes), np.int64)
    touched = np.zeros(classes, np.int64)  # flipped pixels by the classes they left and joined
    flipped = near_ties = images = 0
    for images, result in enumerate(results, 1):
        found = result.label_map
        confusion += confusion_matrix(found, result.labels, classes)
        if images > len(stored.maps) or found.shape != stored.maps.shape[1:]:
            mismatches.append(images - 1)
            continue
        theirs = stored.maps[images - 1]
        near_ties += _near_ties(result.scores, bound)
        changed = found != theirs
        flipped += int(changed.sum())
        for side in (found, theirs):
            touched += np.bincount(side[changed], minlength=classes)[:classes]
        if not (
            _explained(result.scores, theirs, bound)
            and labels_sha256(result.labels) == stored.labels_sha256[images - 1]
            and np.array_equal(
                confusion_matrix(theirs, result.labels, classes), stored.confusion[images - 1]
            )
        ):
            mismatches.append(images - 1)
    mismatches += range(images, len(stored.maps))  # stored, but not found
    return Comparison(
        images,
        tuple(mismatches),
        flipped,
        near_ties,
        Scores(confusion),
        stored.scores,
        miou_bound(stored.scores, touched),
    )


def _near_ties(scores: Tensor, bound: float) -> int:
    if len(scores) < 2:
        return 0
    first, second = scores.topk(2, dim=0).values
    return int((first - second <= bound).sum())


def _explained(scores: Tensor, stored: np.ndarray, bound: float) -> bool:
    """Whether each stored class exists and scores within `bound` of the best; false for NaN."""
    if stored.max(initial=0) >= len(scores):
        return False
    theirs = scores.gather(0, torch.from_numpy(stored.astype(np.int64))[None])[0]
    return bool((scores.amax(dim=0) - theirs <= bound).all())


def miou_bound(scores: Scores, touched: np.ndarray) -> float:
    """By how many points the mIoU can differ if `touched[c]` pixels left or joined class c.

    With intersection I and union U, f such pixels leave IoU between (I - f) / U and (I + f) / U. If
    they make a class appear or disappear, any value is possible.
    """
    hits = np.diag(scores.confusion)
    union = scores.confusion.sum(0) + scores.confusion.sum(1) - hits
    occurs = union > 0
    if (touched[~occurs] > 0).any() or (touched[occurs] >= union[occurs]).any():
        return 100.0
    return float(100 * np.mean(touched[occurs] / union[occurs])) if occurs.any() else 0.0
