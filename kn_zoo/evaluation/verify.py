"""Verification of one trained checkpoint against its manifest entry and its bundle.

The hash of the file and the numbers of parameters and FLOPs are always compared. The predictions
are recomputed where the evaluation set is available, and compared as the task requires, see
`kn_zoo.evaluation.classification` and `kn_zoo.evaluation.segmentation`.
"""

import time
from typing import Any

import torch

from kn_zoo import data
from kn_zoo.checkpoints import bundle, loading, networks
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.evaluation import accounting, classification, segmentation
from kn_zoo.evaluation.result import Result, Settings, Skipped
from kn_zoo.segmentation import data as segmentation_data

__all__ = ["Result", "Settings", "load_images", "verify", "wrong_counts"]


def verify(checkpoint: Checkpoint, settings: Settings) -> Result:
    """Verify one checkpoint. Errors of its files or data become the status of the result."""
    start = time.perf_counter()
    dataset = checkpoint.dataset
    result = Result(checkpoint.name, dataset.name, dataset.split, dataset.images, checkpoint.task)
    try:
        result.reasons += wrong_counts(checkpoint)
        result.checked += ["parameters", "FLOPs"]
        check_privacy(checkpoint, result)
        if checkpoint.bundle and not checkpoint.file and checkpoint.task == "classification":
            images = load_images(checkpoint, settings)
            classification.check_stored(checkpoint, images, result)
        if checkpoint.bundle or not checkpoint.available:  # no download before the data is there
            loading.read(loading.locate(checkpoint), checkpoint)
            result.checked.append("SHA-256")
        images = load_images(checkpoint, settings)
        task = segmentation if checkpoint.task == "segmentation" else classification
        task.check(checkpoint, images, settings, result)
        result.status = "mismatch" if result.reasons else "match"
    except (Skipped, data.MissingData, loading.MissingWeights) as error:
        result.status = "mismatch" if result.reasons else "skipped"
        if checkpoint.bundle and checkpoint.file and isinstance(error, loading.MissingWeights):
            result.status = "corrupt"  # a file of the package is missing
        result.reasons.append(str(error))
    except loading.CorruptWeights as error:
        result.status = "corrupt"
        result.reasons.append(str(error))
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def wrong_counts(checkpoint: Checkpoint) -> list[str]:
    """Recompute parameters and FLOPs; return a sentence for each that the manifest has wrong."""
    with torch.device("meta"):  # shapes are enough
        model = networks.create(checkpoint)
    flops = bundle.flops(model, checkpoint.preprocessing.input_size)
    counts = {
        "parameters": (bundle.parameters(model), checkpoint.parameters),
        "FLOPs": (flops, checkpoint.flops),
    }
    return [
        f"{name}: the network has {recomputed:,}, the manifest says {reported:,}"
        for name, (recomputed, reported) in counts.items()
        if recomputed != reported
    ]


def check_privacy(checkpoint: Checkpoint, result: Result) -> None:
    """Recompute epsilon of a private checkpoint, if Opacus is installed."""
    if checkpoint.privacy is None:
        return
    try:
        result.reasons += accounting.understated(checkpoint.privacy)
        result.checked.append("epsilon")
    except Skipped as reason:
        result.notes.append(str(reason))


def load_images(checkpoint: Checkpoint, settings: Settings) -> Any:
    """Load the evaluation set of a checkpoint.

    Raises:
        MissingData: it is not available, also when an earlier call with these settings found so.
        Skipped: it has another number of images than the reported accuracy was measured on.
    """
    dataset = checkpoint.dataset
    key = dataset.name, dataset.split
    if key in settings.missing_data:
        raise settings.missing_data[key]
    try:
        if checkpoint.task == "segmentation":
            images: Any = segmentation_data.load(*key, settings.data_dir)
        else:
            images = data.load(*key, settings.data_dir, download=settings.download)
    except data.MissingData as error:
        settings.missing_data[key] = error
        raise
    if len(images) != dataset.images:
        raise Skipped(
            f"{dataset.name} has {len(images):,} images here, the accuracy was measured on "
            f"{dataset.images:,}: complete the folder"
        )
    return images
