"""Comparison of a classifier's predictions with its bundle, and of its accuracy with the manifest.

Under `expected` statistics the five best classes of every image and their logits must equal those
of predictions.npz up to float rounding (`kn_zoo.checkpoints.predictions.compare`). Only the
accuracy is stored under the others: `plain` may differ by its near-ties, `sampled` is random
(seed 0) and may differ by what chance explains.
"""

import zipfile
from collections.abc import Sequence
from math import sqrt
from os import cpu_count

import numpy as np
import torch
from torch import nn

from kn_zoo import data, set_inference_statistics
from kn_zoo.checkpoints import bundle, loading, networks
from kn_zoo.checkpoints.manifest import Accuracy, Checkpoint
from kn_zoo.checkpoints.predictions import NEAR_TIE, Predictions, compare
from kn_zoo.evaluation import predict as evaluate
from kn_zoo.evaluation.result import Result, Score, Settings

DRAWS = 2  # passes under "sampled"; the images on which two differ estimate the variance of one
DEVIATIONS = 4  # standard deviations that a "sampled" accuracy may be away from the reported one
SHOWN = 10  # images named in a line of text


def check(checkpoint: Checkpoint, images: data.Images, settings: Settings, result: Result) -> None:
    """Recompute predictions and accuracy; add to `result` what was compared and what differs.

    Raises:
        Skipped: the accuracy was not reported under the chosen statistics.
        WeightsError: a file of the bundle is missing or corrupt.
    """
    reported = checkpoint.reported.statistics
    chosen = settings.choose(reported)
    stored, bound = stored_predictions(checkpoint)
    model = networks.create(checkpoint, pretrained=True)
    if "SHA-256" not in result.checked:
        result.checked.append("SHA-256")  # compared by whoever loads a checkpoint
    for statistics in chosen:
        draws = predict(model, images, checkpoint, settings, statistics)
        if statistics == "expected":
            compare_images(draws[0], stored, bound, images.class_names, result)
            result.checked.append("five best classes of each image")
        accuracy = reported[statistics]
        result.scores.append(
            Score(
                statistics,
                {"top1": accuracy.top1, "top5": accuracy.top5},
                {"top1": mean_top1(draws), "top5": mean_top5(draws)},
                len(draws),
            )
        )
        compare_accuracy(statistics, draws, stored, accuracy, result)


def check_stored(checkpoint: Checkpoint, images: data.Images, result: Result) -> None:
    """Recompute the accuracy of a checkpoint without weights from the predictions of its bundle.

    Raises:
        WeightsError: the predictions are missing or corrupt.
    """
    stored, _ = stored_predictions(checkpoint)
    reported = checkpoint.reported.statistics["expected"]
    targets = np.array([images[index][1] for index in range(len(images))])
    if not np.array_equal(stored.targets, targets):
        result.reasons.append("predictions.npz does not have the targets of the data set")
    for name, computed, percent in (
        ("top-1", stored.top1, reported.top1),
        ("top-5", stored.top5, reported.top5),
    ):
        if percent is not None and round(computed, 4) != percent:
            result.reasons.append(
                f"{name} is {computed:.4f} by predictions.npz, reported is {percent:.4f}"
            )
    result.checked.append("accuracy of the stored predictions")


def stored_predictions(checkpoint: Checkpoint) -> tuple[Predictions, float]:
    """Read the predictions of a bundle and the bound of its near-ties, at most `NEAR_TIE`."""
    folder = bundle.get(checkpoint)
    try:
        return folder.predictions(), min(folder.near_tie_bound, NEAR_TIE)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise loading.CorruptWeights(
            f"{folder.folder / bundle.PREDICTIONS} cannot be read ({type(error).__name__}): "
            "get the bundle again, or restore the file with git"
        ) from None


def predict(
    model: nn.Module,
    images: data.Images,
    checkpoint: Checkpoint,
    settings: Settings,
    statistics: str,
) -> list[Predictions]:
    """Evaluate under the given inference statistics: `DRAWS` passes if "sampled", else one."""
    if checkpoint.norm == "kernel":
        set_inference_statistics(model, statistics)
    torch.manual_seed(0)  # only "sampled" uses random numbers
    in_memory = checkpoint.dataset.name != "imagenet-1k"
    return [
        evaluate.predict(
            model,
            images,
            batch_size=settings.batch_size,
            device=settings.device,
            workers=0 if in_memory else min(8, cpu_count() or 1),
            progress=f"{checkpoint.name}, {statistics}",
        )
        for _ in range(DRAWS if statistics == "sampled" else 1)
    ]


def mean_top1(draws: Sequence[Predictions]) -> float:
    return sum(draw.top1 for draw in draws) / len(draws)


def mean_top5(draws: Sequence[Predictions]) -> float:
    return sum(draw.top5 for draw in draws) / len(draws)


def compare_images(
    recomputed: Predictions,
    stored: Predictions,
    bound: float,
    class_names: Sequence[str],
    result: Result,
) -> None:
    """Compare image by image; record in `result` which images differ."""
    result.near_tie_bound = bound
    try:
        comparison = compare(recomputed, stored, bound)
    except ValueError as error:
        result.reasons.append(f"predictions.npz does not fit the data set: {error}")
        return
    result.mismatches = comparison.mismatches.tolist()
    result.reordered = comparison.reordered.tolist()
    result.near_ties = comparison.near_ties.tolist()
    if result.mismatches:
        described = [
            describe_image(image, recomputed, stored, class_names)
            for image in result.mismatches[:SHOWN]
        ]
        rest = len(result.mismatches) - len(described)
        result.reasons.append(
            f"{len(result.mismatches):,} of {result.images:,} images differ from predictions.npz: "
            f"{', '.join(described)}{f' and {rest:,} more' if rest else ''}"
        )


def describe_image(
    image: int, recomputed: Predictions, stored: Predictions, class_names: Sequence[str]
) -> str:
    """Describe a mismatch: `12 (recomputed cat, stored dog)`, or what else differs."""
    if recomputed.targets[image] != stored.targets[image]:
        return f"{image} (another target)"
    first, stored_first = int(recomputed.indices[image, 0]), int(stored.indices[image, 0])
    if first != stored_first:
        known = 0 <= stored_first < len(class_names)
        stored_name = class_names[stored_first] if known else f"class {stored_first}"
        return f"{image} (recomputed {class_names[first]}, stored {stored_name})"
    if (recomputed.indices[image] != stored.indices[image]).any():
        return f"{image} (other classes after the first)"
    difference = np.abs(recomputed.logits[image] - stored.logits[image]).max()
    return f"{image} (logits differ by {difference:.2g})"


def compare_accuracy(
    statistics: str,
    draws: Sequence[Predictions],
    stored: Predictions,
    reported: Accuracy,
    result: Result,
) -> None:
    """Compare the number of correct images with the reported one, for top-1 and top-5."""
    for name, k, percent in (("top-1", 1, reported.top1), ("top-5", 5, reported.top5)):
        if percent is None:
            continue
        hits = [draw.hits(k) for draw in draws]
        correct = sum(int(hit.sum()) for hit in hits) / len(hits)
        expected = percent * result.images / 100
        tolerance = 0.0
        if statistics == "sampled":
            tolerance = DEVIATIONS * standard_deviation(hits, reported.draws)
        elif statistics == "plain":
            tolerance = count_near_ties(draws[0], k)
        else:  # the images that rounding explains are known, with their gains and losses
            ties = result.reordered
            expected += int(hits[0][ties].sum()) - int(stored.hits(k)[ties].sum())
        if abs(correct - expected) > tolerance + 0.5:  # half an image: the percentage is rounded
            chance = f" (tolerance {tolerance:.0f})" if tolerance else ""
            result.reasons.append(
                f"{name}, {statistics}: {correct:g} of {result.images:,} images are correct, "
                f"reported are {expected:.0f}{chance}"
            )


def count_near_ties(predictions: Predictions, k: int) -> int:
    """Count the images that may gain or lose their class among the best `k` by rounding."""
    assert predictions.missed is not None  # `predict` sets it
    logits = np.column_stack([predictions.logits, predictions.missed])
    return int(np.count_nonzero(logits[:, k - 1] - logits[:, k] <= NEAR_TIE))


def standard_deviation(hits: Sequence[np.ndarray], reported_draws: int) -> float:
    """Standard deviation, in images, of (mean of two draws) - (mean of the reported draws).

    An image that is correct with probability p differs between two draws with probability
    2 p (1-p), twice its variance: the variance of a draw is half the number d of images that
    differ. As d is random too, with a deviation of sqrt(d), it is taken a little high:
    (sqrt(d) + 1)^2.
    """
    differing = (sqrt(np.count_nonzero(hits[0] != hits[1])) + 1) ** 2
    return sqrt(differing / 2 * (1 / len(hits) + 1 / reported_draws))
