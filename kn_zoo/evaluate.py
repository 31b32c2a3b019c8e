"""Top-5 predictions of a classifier, image by image, and their comparison with stored ones.

A prediction is reproducible on another machine up to float32 rounding: another CPU, GPU or batch
size sums a convolution in another order. `LOGIT_TOLERANCE` says how far that can move a logit; two
logits closer than `NEAR_TIE`, twice that, may trade places, and nothing else may differ.

Measured with weights of knpreactresnet20_cifar (logits up to 11; x86, torch 2.15): a logit moves by
up to 3e-5 between batch sizes 1, 7 and 256, by 3e-4 without oneDNN, and is within 5e-4 of float64.
Kernel normalization divides a window of nearly equal pixels by sqrt(eps) = 0.003, which enlarges
rounding there. The tolerance is ten times the largest of these, a thousandth of the logits' range.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from kn_zoo.data import Images

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


def eval_transform(model: nn.Module) -> transforms.Compose:
    """timm's evaluation transform for `model.pretrained_cfg`, after a conversion to its number of
    channels."""
    config = resolve_model_data_config(model)
    channels = 1 if config["input_size"][0] == 1 else 3
    grey_or_rgb = transforms.Lambda(_to_grey if channels == 1 else _to_rgb)
    return transforms.Compose([grey_or_rgb, create_transform(**config)])


def _to_grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def predict(
    model: nn.Module,
    dataset: Images,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: str | None = None,
) -> Predictions:
    """Evaluate `model` in eval mode and float32 on every image of `dataset`, in order.

    Images are transformed by `dataset.transform` if it is set, else as the model's `pretrained_cfg`
    says. The model is moved to `device` and left there, its training flag as it was. `workers`
    processes decode images (0: this one, right for images that lie in memory). `progress` is the
    label of a progress bar on stderr.

    The same for every batch size up to `LOGIT_TOLERANCE`. Under the statistics "sampled" the result
    is random: seed with `torch.manual_seed` before the call to repeat it with the same batch size
    and device.
    """
    if dataset.transform is None:
        dataset = copy.copy(dataset)
        dataset.transform = eval_transform(model)
    loader: Iterable[Any] = DataLoader(dataset, batch_size, num_workers=workers)  # type: ignore[arg-type]
    if progress is not None:
        loader = track(loader, progress, console=Console(stderr=True))
    was_training = model.training
    model.to(device).eval()
    try:
        with torch.inference_mode(), exact_float32():
            batches = [(*best(model(images.to(device)), 6), targets) for images, targets in loader]
    finally:
        model.train(was_training)
    if not batches:
        raise ValueError("the data set has no images")
    indices, logits, targets = (
        torch.cat(column).cpu().numpy() for column in zip(*batches, strict=True)
    )
    missed = logits[:, 5] if logits.shape[1] > 5 else np.full(len(logits), -np.inf, np.float32)
    return Predictions(
        indices[:, :5].astype(np.int16), logits[:, :5], targets.astype(np.int16), missed
    )


def best(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ids and float32 logits of the `k` largest of (N, classes), both (N, k) on the CPU."""
    # A stable sort, because the order in which torch.topk returns equal values is not defined.
    values, indices = logits.float().sort(dim=1, descending=True, stable=True)
    return indices[:, :k].cpu(), values[:, :k].cpu()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Full float32 products; a GPU's TensorFloat-32 would move logits by more than `NEAR_TIE`."""
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


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
