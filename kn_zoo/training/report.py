"""From recipe to bundle: train each seed, evaluate what is stored, write the result."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import yaml
from accelerate import PartialState
from torch import nn

import kn_zoo
from kn_zoo import data
from kn_zoo.checkpoints import bundle, files, manifest
from kn_zoo.checkpoints.manifest import Accuracy, Privacy, Run
from kn_zoo.checkpoints.predictions import Predictions
from kn_zoo.layers import KNConv2d
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import Recipe, UserError
from kn_zoo.training.resume import prepare_run_dir
from kn_zoo.training.trainer import LOG, RunConfig, Trainer

if TYPE_CHECKING:
    from kn_zoo.training.private import PrivateTrainer  # requires Opacus

RESULT = "result.json"
AnyTrainer: TypeAlias = "Trainer | PrivateTrainer"


def train_seeds(
    recipe: Recipe,
    recipe_path: Path,
    folder: Path,
    data_config: DataConfig,
    run_config: RunConfig,
    seeds: Sequence[int],
    in_package: bool,
    include_weights: bool = True,
) -> None:
    """Train once per seed; the bundle has the first seed's weights and the results of all.

    Several seeds have one run folder each. The first seed is trained last, when the results of the
    others are known.
    """
    others = [
        train_and_evaluate(
            replace(recipe, seed=seed), folder / f"seed-{seed}", data_config, run_config
        )
        for seed in seeds[1:]
    ]
    run_dir = folder / f"seed-{seeds[0]}" if others else folder
    recipe = replace(recipe, seed=seeds[0])
    prepare_run_dir(run_dir, recipe)
    trainer = Trainer(recipe, run_dir, data_config, run_config)
    trainer.train()
    dtype, predictions = write_result(trainer)
    if trainer.accelerator.is_main_process:
        runs = [read_result(run_dir), *others]
        target = None if in_package else folder / "bundle"
        write_bundle(
            trainer, recipe_path, runs, dtype, predictions, target, include_weights=include_weights
        )
        if others:
            top1 = [run.statistics["expected"].top1 for run in runs]
            trainer.log(f"top-1 of {len(runs)} seeds: {mean(top1):.2f}, SD {stdev(top1):.2f}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.state.destroy_process_group()


def add_seeds(
    recipe: Recipe,
    folder: Path,
    data_config: DataConfig,
    run_config: RunConfig,
    seeds: Sequence[int],
) -> None:
    """Train further seeds of a stored checkpoint and add their accuracy to its entry and card.

    Each seed is added when its run is complete, so that seeds can be trained on different days.
    Raises UserError if there is no such checkpoint, or if it was trained by another recipe.
    """
    stored = manifest.load().get(recipe.name)
    if stored is None or not stored.bundle:
        raise UserError(f"{recipe.name} has no bundle: train it first, with --in-package")
    settings = yaml.safe_load((stored.folder / bundle.RECIPE).read_text(encoding="utf-8"))
    if replace(recipe, seed=settings["seed"]) != Recipe(**settings):
        raise UserError(
            f"{stored.folder / bundle.RECIPE} differs from this recipe, and seeds are comparable "
            "only if nothing else changed: restore the recipe with git, omit --epochs and --updates"
        )
    for seed in seeds:
        if seed in manifest.find(recipe.name).seeds:
            continue
        run = train_and_evaluate(
            replace(recipe, seed=seed), folder / f"seed-{seed}", data_config, run_config
        )
        if PartialState().is_main_process:
            bundle.add_run(manifest.find(recipe.name), run)


def train_and_evaluate(
    recipe: Recipe, run_dir: Path, data_config: DataConfig, run_config: RunConfig
) -> Run:
    """Return the result of a run, which is trained unless it is complete."""
    prepare_run_dir(run_dir, recipe)
    if not (run_dir / RESULT).exists():
        trainer = Trainer(recipe, run_dir, data_config, run_config)
        trainer.train()
        write_result(trainer)
        trainer.accelerator.wait_for_everyone()
    return read_result(run_dir)


def read_result(run_dir: Path) -> Run:
    return Run.from_json(json.loads((run_dir / RESULT).read_text(encoding="utf-8")))


def write_result(trainer: AnyTrainer) -> tuple[torch.dtype, Predictions]:
    """Round the weights for storage, evaluate them and write the result to the run folder.

    Returns the stored type and the predictions under "expected" statistics.
    """
    dtype, predictions = round_for_storage(trainer)
    statistics = {"expected": mean_accuracy([predictions])} | other_statistics(trainer)
    for name, accuracy in statistics.items():
        trainer.log(f"{name}: top-1 {accuracy.top1:.2f}  top-5 {accuracy.top5:.2f}")
    trainer.log(f"{trainer.progress.seconds / 3600:.3g} hours of training")
    if trainer.accelerator.is_main_process:
        run = asdict(Run(trainer.recipe.seed, statistics))
        files.write_text(trainer.folder / RESULT, json.dumps(run, indent=2) + "\n")
    return dtype, predictions


def round_for_storage(trainer: AnyTrainer) -> tuple[torch.dtype, Predictions]:
    """Round to the recipe's `stored_dtype` unless that changes a prediction.

    If the weights exceed `bundle.FILE_LIMIT` in float32, they are rounded in any case. Returns the
    type of the weights, and the predictions of the weights as they are stored.
    """
    model, dtype = trainer.evaluated, getattr(torch, trainer.recipe.stored_dtype)
    exact = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = trainer.evaluate(trainer.test_set, "expected")
    if dtype is torch.float32:
        return dtype, before
    bundle.round_weights(model, dtype)
    after = trainer.evaluate(trainer.test_set, trainer.recipe.stored_dtype)
    changed = int((before.indices[:, 0] != after.indices[:, 0]).sum())
    if not changed:
        return dtype, after
    size = sum(tensor.nbytes for tensor in exact.values())
    kept = dtype if size > bundle.FILE_LIMIT else torch.float32
    trainer.log(
        f"{trainer.recipe.stored_dtype} changes {changed} of {len(before.indices)} predictions; "
        f"float32 takes {size / 1e6:.0f} MB: storing {str(kept).removeprefix('torch.')}"
    )
    if kept is dtype:
        return dtype, after
    model.load_state_dict(exact)
    return torch.float32, before


def other_statistics(trainer: AnyTrainer) -> dict[str, Accuracy]:
    """Accuracy under "plain" and "sampled" inference statistics, if the network has them."""
    model, images, draws = trainer.evaluated, trainer.test_set, trainer.recipe.sampled_draws
    if not is_kernel_normalized(model):
        return {}
    kn_zoo.set_inference_statistics(model, "plain")
    plain = trainer.evaluate(images, "plain")
    kn_zoo.set_inference_statistics(model, "sampled")
    sampled = []
    for draw in range(draws):
        torch.manual_seed(draw + draws * trainer.accelerator.process_index)
        sampled.append(trainer.evaluate(images, f"sampled {draw + 1}/{draws}"))
    kn_zoo.set_inference_statistics(model, "expected")
    return {"plain": mean_accuracy([plain]), "sampled": mean_accuracy(sampled)}


def is_kernel_normalized(model: nn.Module) -> bool:
    return any(isinstance(layer, KNConv2d) for layer in model.modules())


def mean_accuracy(draws: list[Predictions]) -> Accuracy:
    top1, top5 = [draw.top1 for draw in draws], [draw.top5 for draw in draws]
    sd = round(stdev(top1), 4) if len(draws) > 1 else None
    return Accuracy(round(mean(top1), 4), round(mean(top5), 4), len(draws), sd)


def write_bundle(
    trainer: AnyTrainer,
    recipe_path: Path,
    runs: Sequence[Run],
    dtype: torch.dtype,
    predictions: Predictions,
    folder: Path | None,
    privacy: Privacy | None = None,
    include_weights: bool = True,
) -> None:
    """Write the checkpoint's bundle to `folder`; None: to the package and its manifest.

    The bundle of a private run omits its duration, which depends on the sampled batches.
    """
    recipe = trainer.recipe
    if folder is None and recipe.dataset not in data.SPLITS:
        raise UserError(f"{recipe.dataset} is not a data set of kn_zoo: omit --in-package")
    draft = manifest.Checkpoint(
        name=recipe.name,
        model_args=recipe.model_args,
        dataset=manifest.Dataset(
            recipe.dataset, recipe.eval_split, len(trainer.test_set), len(trainer.class_names)
        ),
        reported=manifest.Reported("kn_zoo", runs[0].statistics),
        preprocessing=preprocessing(recipe),
        licenses=manifest.Licenses(**recipe.licenses),
        recipe=f"train_scripts/recipes/{recipe_path.name}",
        seeds=tuple(run.seed for run in runs),
        runs=tuple(runs) if len(runs) > 1 else (),
        privacy=privacy,
    )
    checkpoint = bundle.write(
        trainer.evaluated,
        draft,
        recipe=asdict(recipe),
        log=trainer.folder / LOG,
        predictions=predictions,
        class_names=trainer.class_names,
        dtype=dtype,
        seconds=None if privacy else trainer.progress.seconds,
        target=folder or "package",
        include_weights=include_weights,
    )
    trainer.log(f"wrote {folder or checkpoint.folder}")


def preprocessing(recipe: Recipe) -> manifest.Preprocessing:
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in recipe.preprocessing.items()
    }
    return manifest.Preprocessing(**fields)
