"""Training of segmentation networks: `kn_zoo.training.trainer` on pairs of image and label map."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
from kn_zoo.checkpoints import bundle, manifest
from kn_zoo.segmentation import data
from kn_zoo.segmentation.evaluate import (
    LabelMaps,
    Scores,
    Segmented,
    confusion_matrix,
    label_maps,
    segment,
)
from kn_zoo.segmentation.models import create_segmentation_model
from kn_zoo.segmentation.transforms import eval_transform, training_transform
from kn_zoo.training.batches import Augmented, LoaderBatches, Share, seed_of, seeded
from kn_zoo.training.data import Place
from kn_zoo.training.experiments import claim, is_kernel_normalized, write_table
from kn_zoo.training.recipe import Recipe, UserError, settings
from kn_zoo.training.trainer import LOG, Pace, Trainer, memory_format

RESULT = "result.json"
METRICS = ("miou", "pixel_accuracy", "class_accuracy")


@dataclass
class SegmentationRecipe(Recipe):
    """One training run of a segmentation network.

    `dataset`, `train_split` and `eval_split` are names of `kn_zoo.segmentation.data`;
    `augmentation` holds transforms of torchvision.transforms.v2, and RandomScale.
    """

    class_weights: list[float] | None = None  # of the loss
    progress_split: str | None = None  # what each epoch is measured on; by default `eval_split`


class PixelCrossEntropy(nn.Module):
    """Cross-entropy of scores (N, K, H, W) and labels (N, H, W), averaged over the labelled pixels.

    Void pixels add nothing to loss and gradient; of a batch of void the loss is zero.

    Args:
        weights: (K,) of the classes, by which the mean is weighted.
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
    """A pair by (epoch, position in it, image number), augmented as those three decide."""

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        epoch, position, index = key
        pair = self.images[index]
        with seeded(seed_of(self.seed, epoch, position)):
            return self.transform(*pair)


class PairBatches(LoaderBatches):
    """`LoaderBatches` of pairs."""

    def __init__(
        self,
        recipe: Recipe,
        images: Any,
        transform: Callable,
        workers: int,
        device: torch.device,
        share: Share,
    ) -> None:
        super().__init__(recipe, images, transform, workers, device, share)
        self.augmented = AugmentedPairs(images, transform, recipe.seed)


class SegmentationTrainer(Trainer):
    """The trainer of classification with pairs, pixel-wise loss, and scores of label maps."""

    recipe: SegmentationRecipe

    def load(self, share: Share, training_images: Any, progress_on: Any) -> nn.Module:
        recipe, root = self.recipe, self.place.data_dir
        refuse_unused(recipe)
        train_set = training_images or data.load(recipe.dataset, recipe.train_split, root)
        self.test_set = data.load(recipe.dataset, recipe.eval_split, root)
        self.progress_set = progress_on or data.load(
            recipe.dataset, recipe.progress_split or recipe.eval_split, root
        )
        self.classes = self.test_set.classes
        self.class_names = list(self.classes.names)
        if len(train_set) < recipe.batch_size:
            raise UserError(
                f"a batch of {recipe.batch_size} needs more than {len(train_set)} images"
            )
        self.network_transform = eval_transform(recipe.preprocessing)
        transform = training_transform(recipe.augmentation, recipe.preprocessing, self.classes.void)
        self.batches = PairBatches(
            recipe, train_set, transform, self.pace.workers, self.accelerator.device, share
        )
        network = create_network(recipe, self.class_names).to(self.accelerator.device)
        if share.processes > 1 and self.accelerator.device.type == "cuda":
            network = convert_sync_batchnorm(network)  # as the authors' batch normalization
        return network

    def prepare(self, network: nn.Module) -> None:
        super().prepare(network)
        weights = self.recipe.class_weights or [1.0] * len(self.classes)
        if len(weights) != len(self.classes):
            raise UserError(f"class_weights: give {len(self.classes)} numbers, not {len(weights)}")
        criterion = PixelCrossEntropy(weights, self.classes.void)
        self.criterion = criterion.to(self.accelerator.device)

    def metrics(self, found: Scores) -> dict[str, float]:
        return {name: getattr(found, name) for name in METRICS}

    def evaluate(self, dataset: Any, progress: str | None = None) -> Any:
        """Scores over all images, of which each process segments some."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        for tensor in self.evaluated.buffers() if processes > 1 else ():
            tensor.copy_(broadcast(tensor.clone()))  # each process counted its own images in them
        mine = copy.copy(dataset)
        mine.files = dataset.files[rank::processes]
        classes = len(self.classes)
        confusion = np.zeros((classes, classes), np.int64)
        for result in self.segment(mine, progress if rank == 0 else None):
            confusion += confusion_matrix(result.label_map, result.labels, classes)
        return Scores(sum(gather_object([confusion])))

    def segment(self, dataset: Any, progress: str | None = None) -> Iterator[Segmented]:
        return segment(
            self.evaluated,
            dataset,
            self.network_transform,
            device=self.accelerator.device,
            workers=self.pace.workers,
            progress=progress,
        )


UNUSED: dict[
    str, Any
] = {  # fields of a recipe that segmentation has no use for, with their defaults
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


def refuse_unused(recipe: SegmentationRecipe) -> None:
    for name, default in UNUSED.items():
        if getattr(recipe, name) != default:
            raise UserError(f"segmentation has no {name}: leave it out of the recipe")
    if recipe.dataset not in data.SPLITS:
        raise UserError(f"no data set {recipe.dataset!r}: choose from {', '.join(data.SPLITS)}")


def create_network(recipe: SegmentationRecipe, class_names: Sequence[str]) -> nn.Module:
    with settings("name, preprocessing or model_args"):
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
    place: Place,
    pace: Pace,
    in_package: bool = False,
) -> None:
    """Train, evaluate what is stored, and write the bundle into `folder` or the package."""
    claim(folder, recipe)
    trainer = SegmentationTrainer(recipe, folder, place, pace)
    trainer.train()
    statistics, maps = report(trainer)
    if trainer.accelerator.is_main_process:
        target = None if in_package else folder / "bundle"
        assert maps is not None
        write_bundle(trainer, recipe_path, statistics, maps, target)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.state.destroy_process_group()


def compare(
    recipes: Sequence[SegmentationRecipe],
    folder: Path,
    place: Place,
    pace: Pace,
    seeds: Sequence[int],
    table: Path,
) -> None:
    """Train each recipe from each seed and write a table of the results, one row a run."""
    rows: list[dict[str, Any]] = []
    table.parent.mkdir(parents=True, exist_ok=True)  # not after hours of training
    for seed in seeds:
        for each in recipes:
            recipe, home = replace(each, seed=seed), folder / each.name / f"seed-{seed}"
            claim(home, recipe)
            if not (home / RESULT).exists():
                trainer = SegmentationTrainer(recipe, home, place, pace)
                trainer.train()
                report(trainer)
                trainer.accelerator.wait_for_everyone()
            found = json.loads((home / RESULT).read_text(encoding="utf-8"))["expected"]
            run = {
                "recipe": recipe.name,
                "norm": recipe.norm,
                "batch_size": recipe.batch_size,
                "lr": recipe.optimizer["lr"],
                "epochs": recipe.epochs,
                "seed": seed,
            }
            rows.append(run | {name: found[name] for name in METRICS})
            write_table(table, rows, bundle.environment())


def report(trainer: SegmentationTrainer) -> tuple[dict[str, dict[str, Any]], LabelMaps | None]:
    """Round the weights as they will be stored, evaluate those, and write result.json.

    Returns the scores by inference statistics, and in the main process the label maps.
    """
    model, recipe = trainer.evaluated, trainer.recipe
    bundle.round_weights(model, getattr(torch, recipe.stored_dtype))
    found = {"expected": [trainer.evaluate(trainer.test_set, "expected")]}
    if is_kernel_normalized(model):
        kn_zoo.set_inference_statistics(model, "plain")
        found["plain"] = [trainer.evaluate(trainer.test_set, "plain")]
        kn_zoo.set_inference_statistics(model, "sampled")
        draws = recipe.sampled_draws
        for draw in range(draws):
            torch.manual_seed(draw + draws * trainer.accelerator.process_index)
            scores = trainer.evaluate(trainer.test_set, f"sampled {draw + 1}/{draws}")
            found.setdefault("sampled", []).append(scores)
        kn_zoo.set_inference_statistics(model, "expected")
    statistics = {name: summary(draws, trainer.class_names) for name, draws in found.items()}
    for name, scores in statistics.items():
        trainer.say(f"{name}: " + "  ".join(f"{m} {scores[m]:.2f}" for m in METRICS))
    trainer.say(f"{trainer.state.seconds / 3600:.3g} hours of training")
    maps = None
    if trainer.accelerator.is_main_process:
        maps = label_maps(trainer.segment(trainer.test_set, "label maps"), len(trainer.classes))
        text = json.dumps(statistics, indent=2) + "\n"
        manifest.write_text(trainer.folder / RESULT, text)
    return statistics, maps


def summary(draws: Sequence[Scores], class_names: Sequence[str]) -> dict[str, Any]:
    """Means over draws, in percent; per-class IoU without the classes that do not occur."""
    iou = np.mean([draw.iou for draw in draws], axis=0)
    named = zip(class_names, iou.tolist(), strict=True)
    means = {name: round(mean(getattr(draw, name) for draw in draws), 4) for name in METRICS}
    return {
        **means,
        "iou": {name: round(value, 4) for name, value in named if value == value},
        "draws": len(draws),
    }


def preprocessing(recipe: SegmentationRecipe) -> manifest.Preprocessing:
    """The recipe's preprocessing as the manifest has it."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in recipe.preprocessing.items()
    }
    return manifest.Preprocessing(**fields)


def write_bundle(
    trainer: SegmentationTrainer,
    recipe_path: Path,
    statistics: dict[str, dict[str, Any]],
    maps: LabelMaps,
    folder: Path | None,
) -> None:
    """Write the checkpoint's bundle; `folder` is None for the package and its manifest."""
    recipe = trainer.recipe
    reported = {
        name: manifest.Accuracy(
            top1=found["pixel_accuracy"],
            top5=None,
            draws=found["draws"],
            segmentation=manifest.Segmentation(
                found["miou"], found["class_accuracy"], found["iou"]
            ),
        )
        for name, found in statistics.items()
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
        predictions=maps.to_bytes(),
        class_names=trainer.class_names,
        dtype=getattr(torch, recipe.stored_dtype),
        seconds=trainer.state.seconds,
        folder=folder,
    )
    trainer.say(f"wrote {folder or checkpoint.folder}")
