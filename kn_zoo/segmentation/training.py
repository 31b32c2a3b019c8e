"""Training of segmentation networks: `kn_zoo.training` on pairs of image and label map."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast, gather_object
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kn_zoo
from kn_zoo.checkpoints import bundle, files, manifest
from kn_zoo.checkpoints.label_maps import LabelMaps, Scores, confusion_matrix
from kn_zoo.segmentation import data
from kn_zoo.segmentation.evaluate import Segmented, collect_label_maps, segment
from kn_zoo.segmentation.models import create_segmentation_model
from kn_zoo.segmentation.transforms import eval_transform, training_transform
from kn_zoo.training.batches import Augmented, LoaderBatches, Shard, derive_seed, seeded
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import Recipe, UserError, recipe_settings
from kn_zoo.training.report import RESULT, is_kernel_normalized, preprocessing
from kn_zoo.training.resume import prepare_run_dir
from kn_zoo.training.trainer import LOG, RunConfig, Trainer, memory_format

METRICS = ("miou", "pixel_accuracy", "class_accuracy")
UNUSED: dict[str, Any] = {  # fields of a recipe that segmentation does not have, and their defaults
    "train_dataset": None,
    "num_classes": None,
    "erasing": None,
    "mixup": None,
    "repeated_augmentation": 1,
    "resolutions": {},
    "label_smoothing": 0.0,
    "on_device": False,
    "held_out": 0.0,
}


@dataclass
class SegmentationRecipe(Recipe):
    """One training run of a segmentation network.

    `dataset`, `train_split` and `eval_split` are names of `kn_zoo.segmentation.data`;
    `augmentation` holds transforms of torchvision.transforms.v2, and RandomScale.
    """

    class_weights: list[float] | None = None  # of the loss
    progress_split: str | None = None  # split to evaluate each epoch on; by default `eval_split`


class PixelCrossEntropy(nn.Module):
    """Cross-entropy of scores (N, K, H, W) and labels (N, H, W), averaged over the labelled pixels.

    Void pixels have no loss and no gradient. The loss of a batch of void is zero.

    Args:
        weights: weight of each class in the mean, (K,).
        void: label of void pixels.
    """

    weights: Tensor

    def __init__(self, weights: Sequence[float], void: int) -> None:
        super().__init__()
        self.void = void
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        weights = self.weights.to(scores.dtype)
        total = cross_entropy(scores, labels, weights, ignore_index=self.void, reduction="sum")
        counted = labels != self.void
        size = (weights[labels.where(counted, 0)] * counted).sum()
        return total / torch.where(size > 0, size, 1)


class AugmentedPairs(Augmented):
    """Pairs of image and labels, augmented as in `Augmented`."""

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        epoch, position, index = key
        pair = self.images[index]
        with seeded(derive_seed(self.seed, epoch, position)):
            return self.transform(*pair)


class PairBatches(LoaderBatches):
    """Batches of augmented pairs of image and labels."""

    augmented_class = AugmentedPairs


class SegmentationTrainer(Trainer):
    """Trainer with a loss per pixel, evaluated by the scores of label maps."""

    recipe: SegmentationRecipe

    def load(self, shard: Shard, training_images: Any, progress_images: Any) -> nn.Module:
        """Load the pairs, create the batches, and return the network."""
        recipe, root = self.recipe, self.data_config.data_dir
        check_recipe(recipe)
        train_set = training_images or data.load(recipe.dataset, recipe.train_split, root)
        self.test_set = data.load(recipe.dataset, recipe.eval_split, root)
        self.progress_set = progress_images or data.load(
            recipe.dataset, recipe.progress_split or recipe.eval_split, root
        )
        self.classes = self.test_set.classes
        self.class_names = list(self.classes.names)
        if len(train_set) < recipe.batch_size:
            raise UserError(
                f"batch_size {recipe.batch_size} exceeds the {len(train_set)} training images"
            )
        self.network_transform = eval_transform(recipe.preprocessing)
        transform = training_transform(recipe.augmentation, recipe.preprocessing, self.classes.void)
        self.batches = PairBatches(
            recipe, train_set, transform, self.run_config.workers, self.accelerator.device, shard
        )
        network = create_network(recipe, self.class_names).to(self.accelerator.device)
        if shard.processes > 1 and self.accelerator.device.type == "cuda":
            network = convert_sync_batchnorm(network)  # as in the authors' code
        return network

    def prepare(self, network: nn.Module) -> None:
        """Create what classification has, with the loss per pixel."""
        super().prepare(network)
        weights = self.recipe.class_weights or [1.0] * len(self.classes)
        if len(weights) != len(self.classes):
            raise UserError(f"class_weights: give {len(self.classes)} numbers, not {len(weights)}")
        criterion = PixelCrossEntropy(weights, self.classes.void)
        self.criterion = criterion.to(self.accelerator.device)

    def metrics(self, predictions: Scores) -> dict[str, float]:
        return {name: getattr(predictions, name) for name in METRICS}

    def evaluate(self, dataset: Any, progress: str | None = None) -> Any:
        """Return the scores over all images, distributed over the processes."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        for tensor in self.evaluated.buffers() if processes > 1 else ():
            tensor.copy_(broadcast(tensor.clone()))  # each process updated its own
        own = copy.copy(dataset)
        own.files = dataset.files[rank::processes]
        classes = len(self.classes)
        confusion = np.zeros((classes, classes), np.int64)
        for image in self.segment(own, progress if rank == 0 else None):
            confusion += confusion_matrix(image.label_map, image.labels, classes)
        return Scores(sum(gather_object([confusion])))

    def segment(self, dataset: Any, progress: str | None = None) -> Iterator[Segmented]:
        return segment(
            self.evaluated,
            dataset,
            self.network_transform,
            device=self.accelerator.device,
            workers=self.run_config.workers,
            progress=progress,
        )


def check_recipe(recipe: SegmentationRecipe) -> None:
    """Raise UserError for fields that segmentation does not have, and unknown data sets."""
    for name, default in UNUSED.items():
        if getattr(recipe, name) != default:
            raise UserError(f"segmentation has no {name}: omit it from the recipe")
    if recipe.dataset not in data.SPLITS:
        raise UserError(
            f"unknown data set {recipe.dataset!r}: choose from {', '.join(data.SPLITS)}"
        )


def create_network(recipe: SegmentationRecipe, class_names: Sequence[str]) -> nn.Module:
    with recipe_settings("name, preprocessing or model_args"):
        model = create_segmentation_model(
            recipe.architecture,
            num_classes=len(class_names),
            pretrained_cfg_overlay=dict(recipe.preprocessing, label_names=list(class_names)),
            **recipe.model_args,
        )
    return model.to(memory_format=memory_format(recipe))


def train(
    recipe: SegmentationRecipe,
    recipe_path: Path,
    folder: Path,
    data_config: DataConfig,
    run_config: RunConfig,
    in_package: bool = False,
) -> None:
    """Train, evaluate the stored weights, and write the bundle to `folder` or the package."""
    prepare_run_dir(folder, recipe)
    trainer = SegmentationTrainer(recipe, folder, data_config, run_config)
    trainer.train()
    statistics, maps = report(trainer)
    if trainer.accelerator.is_main_process:
        target: Path | str = "package" if in_package else folder / "bundle"
        assert maps is not None
        write_bundle(trainer, recipe_path, statistics, maps, target)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.state.destroy_process_group()


def scores(
    recipe: SegmentationRecipe, run_dir: Path, data_config: DataConfig, run_config: RunConfig
) -> dict[str, Any]:
    """Return the scores of a run under "expected" statistics; train it unless it is complete."""
    prepare_run_dir(run_dir, recipe)
    if not (run_dir / RESULT).exists():
        trainer = SegmentationTrainer(recipe, run_dir, data_config, run_config)
        trainer.train()
        report(trainer)
        trainer.accelerator.wait_for_everyone()
    reached = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))["expected"]
    return {name: reached[name] for name in METRICS}


def report(trainer: SegmentationTrainer) -> tuple[dict[str, dict[str, Any]], LabelMaps | None]:
    """Round the weights for storage, evaluate them and write the result to the run folder.

    Returns the scores by inference statistics and, on the main process, the label maps.
    """
    model, recipe = trainer.evaluated, trainer.recipe
    bundle.round_weights(model, getattr(torch, recipe.stored_dtype))
    draws = {"expected": [trainer.evaluate(trainer.test_set, "expected")]}
    if is_kernel_normalized(model):
        kn_zoo.set_inference_statistics(model, "plain")
        draws["plain"] = [trainer.evaluate(trainer.test_set, "plain")]
        kn_zoo.set_inference_statistics(model, "sampled")
        draws["sampled"] = []
        for draw in range(recipe.sampled_draws):
            torch.manual_seed(draw + recipe.sampled_draws * trainer.accelerator.process_index)
            label = f"sampled {draw + 1}/{recipe.sampled_draws}"
            draws["sampled"].append(trainer.evaluate(trainer.test_set, label))
        kn_zoo.set_inference_statistics(model, "expected")
    statistics = {name: mean_scores(draw, trainer.class_names) for name, draw in draws.items()}
    for name, scores in statistics.items():
        trainer.log(f"{name}: " + "  ".join(f"{m} {scores[m]:.2f}" for m in METRICS))
    trainer.log(f"{trainer.progress.seconds / 3600:.3g} hours of training")
    maps = None
    if trainer.accelerator.is_main_process:
        maps = collect_label_maps(
            trainer.segment(trainer.test_set, "label maps"), len(trainer.classes)
        )
        text = json.dumps(statistics, indent=2) + "\n"
        files.write_text(trainer.folder / RESULT, text)
    return statistics, maps


def mean_scores(draws: Sequence[Scores], class_names: Sequence[str]) -> dict[str, Any]:
    """Average the scores of draws, in percent; IoU is that of the classes that occur."""
    iou = np.mean([draw.iou for draw in draws], axis=0)
    means = {name: round(mean(getattr(draw, name) for draw in draws), 4) for name in METRICS}
    return {
        **means,
        "iou": {
            name: round(float(value), 4)
            for name, value in zip(class_names, iou, strict=True)
            if np.isfinite(value)
        },
        "draws": len(draws),
    }


def write_bundle(
    trainer: SegmentationTrainer,
    recipe_path: Path,
    statistics: dict[str, dict[str, Any]],
    maps: LabelMaps,
    target: Path | str,
) -> None:
    """Write the bundle to a folder, or to the "package" and its manifest."""
    recipe = trainer.recipe
    reported = {
        name: manifest.Accuracy(
            top1=scores["pixel_accuracy"],
            top5=None,
            draws=scores["draws"],
            segmentation=manifest.Segmentation(
                scores["miou"], scores["class_accuracy"], scores["iou"]
            ),
        )
        for name, scores in statistics.items()
    }
    draft = manifest.Checkpoint(
        name=recipe.name,
        model_args=recipe.model_args,
        dataset=manifest.Dataset(
            recipe.dataset, recipe.eval_split, len(trainer.test_set), len(trainer.class_names)
        ),
        reported=manifest.Reported("kn_zoo", reported),
        preprocessing=preprocessing(recipe),
        licenses=manifest.Licenses(**recipe.licenses),
        recipe=f"train_scripts/recipes/segmentation/{recipe_path.name}",
        seeds=(recipe.seed,),
    )
    checkpoint = bundle.write(
        trainer.evaluated,
        draft,
        recipe=asdict(recipe),
        log=trainer.folder / LOG,
        predictions=maps,
        class_names=trainer.class_names,
        dtype=getattr(torch, recipe.stored_dtype),
        seconds=trainer.progress.seconds,
        target=target,
    )
    trainer.log(f"wrote {checkpoint.folder if target == 'package' else target}")
