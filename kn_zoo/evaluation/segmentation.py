"""Comparison of predicted label maps with a bundle, and of their scores with the manifest.

Under `expected` statistics the class of every pixel must equal that of predictions.npz up to
near-ties (`kn_zoo.segmentation.evaluate.compare`), and the stored label maps must have the reported
scores. Only scores are stored under the others: `plain` may differ by its near-ties, `sampled` is
random (seed 0) and may differ by what chance explains.
"""

import zipfile
from collections.abc import Iterator, Sequence
from math import isclose, sqrt
from os import cpu_count
from typing import Any

import numpy as np
import torch
from torch import nn

from kn_zoo import set_inference_statistics
from kn_zoo.checkpoints import bundle, loading, networks
from kn_zoo.checkpoints.label_maps import LabelMaps, Scores
from kn_zoo.checkpoints.manifest import Accuracy, Checkpoint
from kn_zoo.evaluation.classification import DEVIATIONS, DRAWS, SHOWN
from kn_zoo.evaluation.result import Result, Score, Settings
from kn_zoo.segmentation.data import LabelledImages
from kn_zoo.segmentation.evaluate import (
    Segmented,
    compare,
    confusion_matrix,
    miou_bound,
    near_ties,
    segment,
)
from kn_zoo.segmentation.transforms import eval_transform

ROUNDING = 1e-3  # percent; the manifest has four decimals


def check(
    checkpoint: Checkpoint, images: LabelledImages, settings: Settings, result: Result
) -> None:
    """Recompute label maps and scores; add to `result` what was compared and what differs.

    Raises:
        Skipped: no accuracy was reported under the chosen statistics.
        WeightsError: a file of the bundle is missing or corrupt.
    """
    reported = checkpoint.reported.statistics
    chosen = settings.choose(reported)
    stored = stored_label_maps(checkpoint)
    model = networks.create(checkpoint, pretrained=True)
    if "SHA-256" not in result.checked:
        result.checked.append("SHA-256")  # compared by whoever loads a checkpoint
    for statistics in chosen:
        if checkpoint.norm == "kernel":
            set_inference_statistics(model, statistics)
        torch.manual_seed(0)  # only "sampled" uses random numbers
        passes = [
            predict(model, images, settings, f"{checkpoint.name}, {statistics}")
            for _ in range(DRAWS if statistics == "sampled" else 1)
        ]
        if statistics == "expected":
            scores = [compare_label_maps(passes[0], stored, result)]
            compare_scores(stored.scores, reported[statistics], result)
        elif statistics == "plain":
            scores = [compare_plain(passes[0], reported[statistics], result)]
        else:
            scores = compare_sampled(passes, reported[statistics], result)
        result.scores.append(
            Score(
                statistics,
                reported_metrics(reported[statistics]),
                {
                    "miou": sum(s.miou for s in scores) / len(scores),
                    "pixel_accuracy": sum(s.pixel_accuracy for s in scores) / len(scores),
                },
                len(scores),
            )
        )


def stored_label_maps(checkpoint: Checkpoint) -> LabelMaps:
    """Read the label maps of a bundle."""
    folder = bundle.get(checkpoint)
    try:
        return folder.label_maps()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise loading.CorruptWeights(
            f"{folder.folder / bundle.PREDICTIONS} cannot be read ({type(error).__name__}): "
            "get the bundle again, or restore the file with git"
        ) from None


def predict(
    model: nn.Module, images: LabelledImages, settings: Settings, progress: str
) -> Iterator[Segmented]:
    """Segment all images."""
    preprocessing: Any = model.pretrained_cfg
    return segment(
        model,
        images,
        eval_transform(preprocessing),
        device=settings.device,
        workers=min(8, cpu_count() or 1) if settings.device != "cpu" else 0,
        progress=progress,
    )


def reported_metrics(accuracy: Accuracy) -> dict[str, float | None]:
    scores = accuracy.segmentation
    return {"miou": scores.miou if scores else None, "pixel_accuracy": accuracy.top1}


def compare_label_maps(
    predictions: Iterator[Segmented], stored: LabelMaps, result: Result
) -> Scores:
    """Compare pixel by pixel; record in `result` which images differ."""
    comparison = compare(predictions, stored, result.near_tie_bound)
    result.checked.append("class of each pixel")
    result.mismatches = list(comparison.mismatches)
    result.near_tie_pixels = comparison.near_ties
    result.reordered_pixels = comparison.reordered
    if mismatches := result.mismatches:
        shown = ", ".join(map(str, mismatches[:SHOWN]))
        rest = f" and {len(mismatches) - SHOWN:,} more" if len(mismatches) > SHOWN else ""
        result.reasons.append(
            f"{len(mismatches):,} of {result.images:,} label maps differ from predictions.npz: "
            f"those of images {shown}{rest}"
        )
    elif not comparison.matches:
        result.reasons.append(
            f"mIoU differs by {comparison.miou_difference:.4f} from that of predictions.npz, its "
            f"near-ties explain {comparison.miou_bound:.4f}"
        )
    return comparison.computed


def compare_scores(stored: Scores, reported: Accuracy, result: Result) -> None:
    """Compare the scores of the stored label maps with those of the manifest."""
    scores = reported.segmentation
    assert scores is not None  # the manifest requires it
    pairs = {
        "mIoU": (scores.miou, stored.miou),
        "pixel accuracy": (reported.top1, stored.pixel_accuracy),
        "class accuracy": (scores.class_accuracy, stored.class_accuracy),
    }
    occurring = stored.iou[np.isfinite(stored.iou)].tolist()
    if len(scores.iou) == len(occurring):
        for (name, value), iou in zip(scores.iou.items(), occurring, strict=True):
            pairs[f"IoU of {name}"] = value, iou
    else:
        result.reasons.append(
            f"{len(occurring)} classes occur, the manifest has the IoU of {len(scores.iou)}"
        )
    for name, (value, recomputed) in pairs.items():
        compare_value(f"{name}, expected", recomputed, value, ROUNDING, result)


def compare_plain(predictions: Iterator[Segmented], reported: Accuracy, result: Result) -> Scores:
    """Compare scores that may differ by the pixels of near-ties."""
    confusion, ties = [], []
    for image in predictions:
        confusion.append(confusion_matrix(image.label_map, image.labels, len(image.scores)))
        ties.append(near_ties(image.scores, result.near_tie_bound))
    scores, touched = Scores(np.sum(confusion, axis=0)), np.sum(ties, axis=0)
    tolerances = {
        "miou": miou_bound(scores, touched),
        "pixel_accuracy": 100 * touched.sum() / 2 / scores.confusion.sum(),
    }
    for metric, value in reported_metrics(reported).items():
        assert value is not None
        tolerance = tolerances[metric] + ROUNDING
        compare_value(f"{metric}, plain", getattr(scores, metric), value, tolerance, result)
    return scores


def compare_sampled(
    draws: Sequence[Iterator[Segmented]], reported: Accuracy, result: Result
) -> list[Scores]:
    """Compare the mean scores of two draws, which may differ from the reported ones by chance."""
    confusion = np.stack(
        [[confusion_matrix(r.label_map, r.labels, len(r.scores)) for r in draw] for draw in draws]
    )  # (draws, N, K, K)
    scores = [Scores(draw.sum(0)) for draw in confusion]
    for metric, value in reported_metrics(reported).items():
        assert value is not None
        mean = sum(getattr(score, metric) for score in scores) / len(scores)
        difference = influence(metric, confusion[0], confusion[1])
        variance = float((difference**2).sum()) / 2  # of one draw
        deviation = sqrt(variance * (1 / len(draws) + 1 / reported.draws))
        tolerance = DEVIATIONS * deviation + ROUNDING
        compare_value(f"{metric}, sampled", mean, value, tolerance, result)
    return scores


def influence(metric: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Contribution of each image, (N,), to the difference of a metric between two draws.

    The metric is linearized around the mean of the draws, whose confusion matrices are (N, K, K).
    The images are independent, so that the squares add up to the variance of the difference.
    """
    total = (first + second).sum(0) / 2
    delta = (first - second).astype(float)
    hits = np.diagonal(delta, axis1=1, axis2=2)  # (N, K)
    if metric == "pixel_accuracy":
        return 100 * hits.sum(1) / total.sum()
    union = total.sum(0) + total.sum(1) - np.diag(total)
    occurs = union > 0
    iou = np.diag(total)[occurs] / union[occurs]
    delta_union = (delta.sum(1) + delta.sum(2) - hits)[:, occurs]
    return 100 * ((hits[:, occurs] - iou * delta_union) / union[occurs]).mean(1)


def compare_value(
    name: str, recomputed: float, reported: float, tolerance: float, result: Result
) -> None:
    if not isclose(recomputed, reported, rel_tol=0, abs_tol=tolerance):
        result.reasons.append(
            f"{name.replace('miou', 'mIoU').replace('_', ' ')}: {recomputed:.4f} %, reported are "
            f"{reported:.4f} % (tolerance {tolerance:.4f})"
        )
