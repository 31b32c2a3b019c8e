"""Evaluation of an imported checkpoint in each way that its publication leaves open.

The authors' checkpoints have no stored predictions, and the publication states neither how images
were normalized nor which inference statistics were used. Each is evaluated under all three
statistics, with and without mean and standard deviation; `reproduced` lists which of the six runs
have the published accuracy. `kn-zoo pin` writes them into the manifest.
"""

import time
from dataclasses import dataclass, field

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from kn_zoo import data
from kn_zoo.checkpoints import loading
from kn_zoo.checkpoints.manifest import Checkpoint, File
from kn_zoo.evaluation import classification
from kn_zoo.evaluation.result import Settings, Skipped
from kn_zoo.evaluation.verify import load_images, wrong_counts

ROUNDING = 0.005  # of an accuracy in percent that is published with two decimals
INPUTS = {  # mean and standard deviation that images are normalized by
    "mean and std": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "[0, 1]": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass
class Run:
    """An evaluation under one kind of inputs and statistics; accuracies are in percent."""

    inputs: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    statistics: str
    draws: int
    top1: float
    top5: float
    reproduces: bool


@dataclass
class Sweep:
    """The six runs of an imported checkpoint; `tolerance` is what chance explains, in percent."""

    name: str
    images: int
    published: float
    file: File | None = None
    status: str = "match"
    reasons: list[str] = field(default_factory=list)
    tolerance: dict[str, float] = field(default_factory=dict)  # by inputs
    runs: list[Run] = field(default_factory=list)
    reproduced: list[Run] = field(default_factory=list)  # the nearest first
    seconds: float = 0.0


def sweep(checkpoint: Checkpoint, settings: Settings) -> Sweep:
    """Evaluate an imported checkpoint under every combination of inputs and statistics."""
    start = time.perf_counter()
    (published,) = checkpoint.reported.statistics.values()
    result = Sweep(checkpoint.name, checkpoint.dataset.images, published.top1)
    result.reasons += wrong_counts(checkpoint)
    try:
        images = load_images(checkpoint, settings)  # before 100 MB are downloaded
        for inputs in INPUTS:
            run_inputs(checkpoint, settings, images, inputs, result)
        result.file = loading.expected_file(checkpoint)
        result.reproduced = sorted(
            (run for run in result.runs if run.reproduces),
            key=lambda run: abs(run.top1 - published.top1),
        )
        if not result.reproduced:
            result.reasons.append("no run has the published accuracy")
        result.status = "mismatch" if result.reasons else "match"
    except (Skipped, data.MissingData, loading.MissingWeights) as error:
        result.status = "mismatch" if result.reasons else "skipped"
        result.reasons.append(str(error))
    except loading.CorruptWeights as error:
        result.status = "corrupt"
        result.reasons.append(str(error))
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def run_inputs(
    checkpoint: Checkpoint, settings: Settings, images: data.Images, inputs: str, result: Sweep
) -> None:
    """Add the runs under one kind of inputs. The draws of "sampled" give the tolerance."""
    mean, std = INPUTS[inputs]
    overlay = {"mean": mean, "std": std}
    model = timm.create_model(checkpoint.name, pretrained=True, pretrained_cfg_overlay=overlay)
    for statistics in ("sampled", "expected", "plain"):
        draws = classification.predict(model, images, checkpoint, settings, statistics)
        if statistics == "sampled":
            hits = [draw.hits(1) for draw in draws]
            chance = classification.DEVIATIONS * classification.standard_deviation(hits, 1)
            result.tolerance[inputs] = 100 * chance / result.images + ROUNDING
        top1, top5 = classification.mean_top1(draws), classification.mean_top5(draws)
        reproduces = abs(top1 - result.published) <= result.tolerance[inputs]
        run = Run(inputs, mean, std, statistics, len(draws), top1, top5, reproduces)
        result.runs.append(run)
