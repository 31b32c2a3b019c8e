"""Top-5 predictions of a classifier, image by image, and their comparison with stored ones.

Predictions on another machine agree up to float32 rounding, because another CPU, GPU or batch size
sums a convolution in another order. `LOGIT_TOLERANCE` bounds the change of a logit. Two logits
closer than `NEAR_TIE`, twice the tolerance, may change their order; nothing else may differ.

Measured with knpreactresnet20_cifar (logits up to 11; x86, torch 2.15): a logit changes by up to
3e-5 between batch sizes 1, 7 and 256, by 3e-4 without oneDNN, and by 5e-4 from float64. Kernel
normalization divides a window of nearly equal pixels by sqrt(eps) = 0.003, which amplifies
rounding. The tolerance is ten times the largest of these, a thousandth of the range of the logits.
"""

from dataclasses import dataclass

import numpy as np

LOGIT_TOLERANCE = 5e-3
NEAR_TIE = 2 * LOGIT_TOLERANCE


@dataclass(frozen=True)
class Predictions:
    """The five best classes of each image, best first (all if there are fewer), and the targets."""

    indices: np.ndarray  # (N, 5) int16, class ids; equal logits are ordered by class id
    logits: np.ndarray  # (N, 5) float32, not increasing along a row
    targets: np.ndarray  # (N,) int16
    # (N,) float32, the sixth logit, -inf if there is none; set by `predict`, not stored in bundles.
    missed: np.ndarray | None = None

    def hits(self, k: int) -> np.ndarray:
        """Return for each image, (N,) bool, whether its target is among the best ``k`` <= 5."""
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
    """Result of `compare`: indices of images, in increasing order."""

    mismatches: np.ndarray  # differ by more than rounding can explain
    reordered: np.ndarray  # another order of the five, explained by rounding: not a mismatch
    near_ties: np.ndarray  # the two best stored logits differ by at most the bound


def compare(computed: Predictions, stored: Predictions, bound: float = NEAR_TIE) -> Comparison:
    """Find the images whose predictions differ by more than rounding can explain.

    Rounding changes a logit by at most ``bound`` / 2. So the logits of a class that both list
    differ by no more than that, and a class that only one lists exceeds the best logit left out by
    the other by no more than that. Different targets, stored logits out of order, and NaN are
    mismatches too.

    Raises:
        ValueError: the two have different shapes.
    """
    if (
        computed.indices.shape != stored.indices.shape
        or computed.targets.shape != stored.targets.shape
    ):
        raise ValueError(
            f"computed predictions have shape {computed.indices.shape}, stored predictions "
            f"{stored.indices.shape}"
        )
    tolerance = bound / 2
    same = computed.indices[:, :, None] == stored.indices[:, None, :]  # (N, computed, stored)
    delta = np.abs(computed.logits[:, :, None] - stored.logits[:, None, :])
    explained = (~same | (delta <= tolerance)).all(axis=(1, 2))
    explained &= _may_be_unlisted(computed, ~same.any(axis=2), stored, tolerance)
    explained &= _may_be_unlisted(stored, ~same.any(axis=1), computed, tolerance)
    explained &= (np.diff(stored.logits) <= 0).all(axis=1)
    explained &= np.isfinite(computed.logits).all(axis=1) & np.isfinite(stored.logits).all(axis=1)
    explained &= computed.targets == stored.targets
    reordered = (computed.indices != stored.indices).any(axis=1)
    first, second = stored.logits[:, 0], stored.logits[:, min(1, stored.logits.shape[1] - 1)]
    return Comparison(
        mismatches=np.flatnonzero(~explained),
        reordered=np.flatnonzero(explained & reordered),
        near_ties=np.flatnonzero(explained & (first - second <= bound)),
    )


def _may_be_unlisted(
    listing: Predictions, classes: np.ndarray, other: Predictions, tolerance: float
) -> np.ndarray:
    """Return for each image, (N,) bool, whether ``other`` may lack ``classes`` of ``listing``.

    Args:
        classes: (N, 5) bool, the classes that only ``listing`` has.
    """
    limit = other.logits[:, -1] if other.missed is None else other.missed
    return np.all(~classes | (listing.logits <= limit[:, None] + tolerance), axis=1)
