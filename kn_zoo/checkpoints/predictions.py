"""Top-5 predictions of a classifier, image by image, and their comparison with stored ones.

A prediction is reproducible on another machine up to float32 rounding: another CPU, GPU or batch
size sums a convolution in another order. `LOGIT_TOLERANCE` says how far that can move a logit; two
logits closer than `NEAR_TIE`, twice that, may trade places, and nothing else may differ.

Measured with weights of knpreactresnet20_cifar (logits up to 11; x86, torch 2.15): a logit moves by
up to 3e-5 between batch sizes 1, 7 and 256, by 3e-4 without oneDNN, and is within 5e-4 of float64.
Kernel normalization divides a window of nearly equal pixels by sqrt(eps) = 0.003, which enlarges
rounding there. The tolerance is ten times the largest of these, a thousandth of the logits' range.
"""

from dataclasses import dataclass

import numpy as np

LOGIT_TOLERANCE = 5e-3
NEAR_TIE = 2 * LOGIT_TOLERANCE


@dataclass(frozen=True)
class Predictions:
    """The five best classes of each image, best first, or all if there are fewer, and the truth."""

    indices: np.ndarray  # (N, 5) int16, class ids; equal logits are ordered by class id
    logits: np.ndarray  # (N, 5) float32, never increasing along a row
    targets: np.ndarray  # (N,) int16
    # (N,) float32, the sixth logit, -inf if there is none; `predict` knows it, bundles do not.
    missed: np.ndarray | None = None

    def hits(self, k: int) -> np.ndarray:
        """(N,) bool: whether the true class is among the best `k` (at most 5)."""
        return (self.indices[:, :k] == self.targets[:, None]).any(axis=1)

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * float(self.hits(1).mean())

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * float(self.hits(5).mean())


@dataclass(frozen=True)
class Comparison:
    """Image numbers, in rising order, of what `compare` found."""

    mismatches: np.ndarray  # differ by more than rounding can explain
    reordered: np.ndarray  # another order of the five, explained by rounding: no mismatch
    near_ties: np.ndarray  # the two best stored logits differ by no more than the bound


def compare(found: Predictions, stored: Predictions, bound: float = NEAR_TIE) -> Comparison:
    """Find the images of which `found` and `stored` cannot be the same up to rounding.

    They can if every logit need only have moved by up to `bound` / 2: a class that both list has
    logits no further apart than that, and a class that only one lists was no further above the
    best logit that the other left out. So classes trade places only where their logits are closer
    than `bound`. Another target, stored logits out of order, and NaN are mismatches too.

    Raises `ValueError` if the two have different shapes.
    """
    if found.indices.shape != stored.indices.shape or found.targets.shape != stored.targets.shape:
        raise ValueError(f"{found.indices.shape} predictions against {stored.indices.shape} stored")
    tolerance = bound / 2
    same = found.indices[:, :, None] == stored.indices[:, None, :]  # (N, found, stored)
    apart = np.abs(found.logits[:, :, None] - stored.logits[:, None, :])
    explained = (~same | (apart <= tolerance)).all(axis=(1, 2))
    explained &= _may_be_unlisted(found, ~same.any(axis=2), stored, tolerance)
    explained &= _may_be_unlisted(stored, ~same.any(axis=1), found, tolerance)
    explained &= (np.diff(stored.logits) <= 0).all(axis=1)
    explained &= np.isfinite(found.logits).all(axis=1) & np.isfinite(stored.logits).all(axis=1)
    explained &= found.targets == stored.targets
    reordered = (found.indices != stored.indices).any(axis=1)
    first, second = stored.logits[:, 0], stored.logits[:, min(1, stored.logits.shape[1] - 1)]
    return Comparison(
        mismatches=np.flatnonzero(~explained),
        reordered=np.flatnonzero(explained & reordered),
        near_ties=np.flatnonzero(explained & (first - second <= bound)),
    )


def _may_be_unlisted(
    one: Predictions, classes: np.ndarray, other: Predictions, tolerance: float
) -> np.ndarray:
    """(N,) bool: whether the `classes` (N, 5) of `one` were low enough for `other` not to list."""
    limit = other.logits[:, -1] if other.missed is None else other.missed
    return np.all(~classes | (one.logits <= limit[:, None] + tolerance), axis=1)
