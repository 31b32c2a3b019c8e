"""Label maps of a segmentation network, and their comparison with stored ones.

Label maps on another machine agree up to float32 rounding. Where the two best scores of a pixel are
closer than `NEAR_TIE`, the classes may change their order; nothing else may differ.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kn_zoo.checkpoints.label_maps import LabelMaps, Scores, confusion_matrix, labels_sha256
from kn_zoo.checkpoints.predictions import NEAR_TIE
from kn_zoo.evaluation.predict import exact_float32
from kn_zoo.segmentation.fcn import resize_scores


@dataclass(frozen=True)
class Segmented:
    """Scores of one image, and its labels."""

    scores: Tensor  # (K, H, W) float32
    labels: np.ndarray  # (H, W) uint8, true classes, and void

    @property
    def label_map(self) -> np.ndarray:
        """The best class of each pixel, (H, W) uint8; of equal ones that of the lowest id."""
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

    Scores are resized to the size of the labels. The model is moved to `device`; its training flag
    is restored. `workers` processes decode images. `progress` is the label of a progress bar on
    stderr.
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
                scores = resize_scores(model(pixels[None].to(device)).float(), labels.shape)
            yield Segmented(scores[0].cpu(), labels.numpy().astype(np.uint8))
    finally:
        model.train(was_training)


def collect_label_maps(predictions: Iterator[Segmented], classes: int) -> LabelMaps:
    """Collect label maps, hashes and confusion matrices of images of one size.

    Raises:
        ValueError: there are no images, or images of several sizes.
    """
    maps, hashes, confusion = [], [], []
    for image in predictions:
        maps.append(image.label_map)
        hashes.append(labels_sha256(image.labels))
        confusion.append(confusion_matrix(maps[-1], image.labels, classes))
    sizes = {label_map.shape for label_map in maps}
    if len(sizes) != 1:
        raise ValueError(f"label maps must have one size, not {sorted(sizes)}")
    return LabelMaps(np.stack(maps), np.array(hashes), np.stack(confusion))


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`. Images are numbered from 0."""

    images: int
    mismatches: tuple[int, ...]  # images that differ by more than rounding can explain
    reordered: int  # pixels of another class, explained by a near-tie
    near_ties: int  # pixels whose two best scores are within the bound
    computed: Scores
    stored: Scores
    miou_bound: float  # percent by which the reordered pixels can change the mIoU

    @property
    def matches(self) -> bool:
        return not self.mismatches and self.miou_difference <= self.miou_bound + 1e-9

    @property
    def miou_difference(self) -> float:
        return abs(self.computed.miou - self.stored.miou)


def compare(
    predictions: Iterator[Segmented], stored: LabelMaps, bound: float = NEAR_TIE
) -> Comparison:
    """Compare predictions with stored label maps, image by image and pixel by pixel.

    An image matches if its labels have the stored hash, its stored confusion matrix is that of the
    stored label map, and the stored class of each pixel scores within `bound` of the best one.
    """
    classes = stored.confusion.shape[-1]
    mismatches: list[int] = []
    confusion = np.zeros((classes, classes), np.int64)
    touched = np.zeros(classes, np.int64)  # reordered pixels by the classes they left and joined
    reordered = ties = images = 0
    for index, image in enumerate(predictions):
        images = index + 1
        label_map = image.label_map
        confusion += confusion_matrix(label_map, image.labels, classes)
        if index >= len(stored.maps) or label_map.shape != stored.maps.shape[1:]:
            mismatches.append(index)
            continue
        stored_map = stored.maps[index]
        ties += int(near_ties(image.scores, bound).sum()) // 2
        changed = label_map != stored_map
        reordered += int(changed.sum())
        for classes_of_pixels in (label_map, stored_map):
            touched += np.bincount(classes_of_pixels[changed], minlength=classes)[:classes]
        if not (
            _explained(image.scores, stored_map, bound)
            and labels_sha256(image.labels) == stored.labels_sha256[index]
            and np.array_equal(
                confusion_matrix(stored_map, image.labels, classes), stored.confusion[index]
            )
        ):
            mismatches.append(index)
    mismatches += range(images, len(stored.maps))  # stored, but not predicted
    return Comparison(
        images,
        tuple(mismatches),
        reordered,
        ties,
        Scores(confusion),
        stored.scores,
        miou_bound(stored.scores, touched),
    )


def near_ties(scores: Tensor, bound: float = NEAR_TIE) -> np.ndarray:
    """Count, (K,), the pixels whose two best scores are within `bound`, under both classes."""
    classes = len(scores)
    if classes < 2:
        return np.zeros(classes, np.int64)
    best = scores.topk(2, dim=0)  # (2, H, W)
    tied = best.values[0] - best.values[1] <= bound
    return best.indices[:, tied].flatten().bincount(minlength=classes).numpy()


def _explained(scores: Tensor, stored_map: np.ndarray, bound: float) -> bool:
    """Return whether each stored class exists and scores within `bound` of the best (no NaN)."""
    if stored_map.max(initial=0) >= len(scores):
        return False
    stored_scores = scores.gather(0, torch.from_numpy(stored_map.astype(np.int64))[None])[0]
    return bool((scores.amax(dim=0) - stored_scores <= bound).all())


def miou_bound(scores: Scores, touched: np.ndarray) -> float:
    """Bound the change of the mIoU, in percent, if `touched[c]` pixels leave or join class c.

    With intersection I and union U, f such pixels leave the IoU between (I - f) / U and
    (I + f) / U. If they make a class appear or disappear, any value is possible.
    """
    hits = np.diag(scores.confusion)
    union = scores.confusion.sum(0) + scores.confusion.sum(1) - hits
    occurs = union > 0
    if (touched[~occurs] > 0).any() or (touched[occurs] >= union[occurs]).any():
        return 100.0
    return float(100 * np.mean(touched[occurs] / union[occurs])) if occurs.any() else 0.0
