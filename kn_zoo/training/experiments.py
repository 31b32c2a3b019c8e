"""What is done with runs: one per seed, reported and bundled; one per learning rate, compared."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from torch import nn

import kn_zoo
from kn_zoo import data
from kn_zoo.checkpoints import bundle, manifest
from kn_zoo.checkpoints.manifest import Accuracy, Run
from kn_zoo.checkpoints.predictions import Predictions
from kn_zoo.layers import KNConv2d
from kn_zoo.training.data import Place, load_training, split_off, targets_of
from kn_zoo.training.recipe import Recipe, UserError
from kn_zoo.training.trainer import LOG, Diverged, Pace, Trainer, console

RESULT = "result.json"
FIRST_RATE = 0.2  # the paper's search begins there
LOWEST_RATE = FIRST_RATE / 2**10
WORSE_RATES = 2  # in a row below the best, after which the search is over
LEARNED = 2.0  # times the accuracy of chance, below which a rate has taught nothing
SEARCH_SHARE = 0.1  # of the training images, held out, unless the recipe says


def train_seeds(
    recipe: Recipe,
    recipe_path: Path,
    folder: Path,
    place: Place,
    pace: Pace,
    seeds: Sequence[int],
    in_package: bool,
) -> None:
    """Train once from each seed, and bundle the first one's weights with the results of all.

    Several seeds have folders of their own; the first comes last, when the others are known.
    """
    others = [
        result_of(replace(recipe, seed=seed), folder / f"seed-{seed}", place, pace)
        for seed in seeds[1:]
    ]
    home = folder / f"seed-{seeds[0]}" if others else folder
    recipe = replace(recipe, seed=seeds[0])
    claim(home, recipe)
    trainer = Trainer(recipe, home, place, pace)
    trainer.train()
    dtype, predictions = report(trainer)
    if trainer.accelerator.is_main_process:
        runs = [read_result(home), *others]
        target = None if in_package else folder / "bundle"
        write_bundle(trainer, recipe_path, runs, dtype, predictions, target)
        if others:
            top1 = [run.statistics["expected"].top1 for run in runs]
            trainer.say(f"top-1 of {len(runs)} seeds: {mean(top1):.2f}, SD {stdev(top1):.2f}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.state.destroy_process_group()


def result_of(recipe: Recipe, home: Path, place: Place, pace: Pace) -> Run:
    """Train and report, unless that was done."""
    claim(home, recipe)
    if not (home / RESULT).exists():
        trainer = Trainer(recipe, home, place, pace)
        trainer.train()
        report(trainer)
        trainer.accelerator.wait_for_everyone()
    return read_result(home)


def compare(
    recipes: Sequence[Recipe],
    folder: Path,
    place: Place,
    pace: Pace,
    seeds: Sequence[int],
    table: Path,
) -> None:
    """Train each recipe from each seed and write a table of the results, one row a run.

    No weights are kept. The table grows with every run; its head says on what, and with which
    versions, the last one was made.
    """
    rows: list[dict[str, Any]] = []
    table.parent.mkdir(parents=True, exist_ok=True)  # not after hours of training
    for seed in seeds:
        for recipe in recipes:
            home = folder / recipe.name / f"seed-{seed}"
            run = result_of(replace(recipe, seed=seed), home, place, pace)
            settings = {
                "recipe": recipe.name,
                "norm": recipe.norm,
                "batch_size": recipe.batch_size,
                "lr": recipe.optimizer["lr"],
                "epochs": recipe.epochs,
            }
            found = run.statistics["expected"]
            rows.append(settings | {"seed": seed, "top1": found.top1, "top5": found.top5})
            write_table(table, rows, bundle.environment())


def claim(folder: Path, recipe: Recipe) -> None:
    """Make the run's folder, or see that what lies there belongs to the same recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(asdict(recipe), sort_keys=False)
    path = folder / "recipe.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != settings:
        raise UserError(f"{folder} holds a run of another recipe: remove it, or give --output")
    manifest.write_text(path, settings)


def read_result(folder: Path) -> Run:
    return Run.from_json(json.loads((folder / RESULT).read_text(encoding="utf-8")))


def report(trainer: Trainer) -> tuple[torch.dtype, Predictions]:
    """Round the weights as they will be stored, evaluate those, and write the result beside."""
    dtype, predictions = round_if_harmless(trainer)
    statistics = {"expected": rounded([predictions])} | other_statistics(trainer)
    for name, accuracy in statistics.items():
        trainer.say(f"{name}: top-1 {accuracy.top1:.2f}  top-5 {accuracy.top5:.2f}")
    trainer.say(f"{trainer.state.seconds / 3600:.3g} hours of training")
    if trainer.accelerator.is_main_process:
        run = asdict(Run(trainer.recipe.seed, statistics))
        manifest.write_text(trainer.folder / RESULT, json.dumps(run, indent=2) + "\n")
    return dtype, predictions


def round_if_harmless(trainer: Trainer) -> tuple[torch.dtype, Predictions]:
    """Round to the recipe's type, unless that changes a prediction; what was done, and those."""
    model, wanted = trainer.evaluated, getattr(torch, trainer.recipe.stored_dtype)
    exact = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = trainer.evaluate(trainer.test_set, "expected")
    if wanted is torch.float32:
        return wanted, before
    bundle.round_weights(model, wanted)
    after = trainer.evaluate(trainer.test_set, f"as {trainer.recipe.stored_dtype}")
    changed = int((before.indices[:, 0] != after.indices[:, 0]).sum())
    if not changed:
        return wanted, after
    trainer.say(f"{trainer.recipe.stored_dtype} changes {changed} predictions: storing float32")
    model.load_state_dict(exact)
    return torch.float32, before


def other_statistics(trainer: Trainer) -> dict[str, Accuracy]:
    """Accuracy under "plain" and "sampled" statistics, of a network that has them."""
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
    return {"plain": rounded([plain]), "sampled": rounded(sampled)}


def is_kernel_normalized(model: nn.Module) -> bool:
    return any(isinstance(layer, KNConv2d) for layer in model.modules())


def rounded(draws: list[Predictions]) -> Accuracy:
    top1, top5 = [draw.top1 for draw in draws], [draw.top5 for draw in draws]
    sd = round(stdev(top1), 4) if len(draws) > 1 else None
    return Accuracy(round(mean(top1), 4), round(mean(top5), 4), len(draws), sd)


def write_bundle(
    trainer: Trainer,
    recipe_path: Path,
    runs: Sequence[Run],
    dtype: torch.dtype,
    predictions: Predictions,
    folder: Path | None,
) -> None:
    """Everything that is stored of a weight; `folder` is None for the package and its manifest."""
    recipe = trainer.recipe
    if folder is None and recipe.dataset not in data.SPLITS:
        raise UserError(f"the manifest knows no data set {recipe.dataset}: leave --in-package out")
    draft = manifest.Checkpoint(
        name=recipe.name,
        model_args=recipe.model_args,
        dataset=manifest.Dataset(
            recipe.dataset, recipe.eval_split, len(trainer.test_set), len(trainer.class_names)
        ),
        reported=manifest.Reported("kn_zoo", runs[0].statistics),
        preprocessing=manifest.Preprocessing(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in recipe.preprocessing.items()}
        ),
        licenses=manifest.Licenses(**recipe.licenses),
        recipe=f"train_scripts/recipes/{recipe_path.name}",
        seeds=tuple(run.seed for run in runs),
        runs=tuple(runs) if len(runs) > 1 else (),
    )
    weight = bundle.write(
        trainer.evaluated,
        draft,
        recipe=asdict(recipe),
        log=trainer.folder / LOG,
        predictions=predictions,
        class_names=trainer.class_names,
        dtype=dtype,
        seconds=trainer.state.seconds,
        target=folder or "package",
    )
    trainer.say(f"wrote {folder or weight.folder}")


def lr_searches(
    recipes: Sequence[Recipe], folder: Path, place: Place, pace: Pace, table: Path
) -> None:
    """`lr_search` of each recipe, all rates in one table.

    A search begins where that of the same network at a larger batch was best, since a smaller batch
    wants no higher rate.
    """
    rows: list[dict[str, Any]] = []
    best: list[tuple[Recipe, float]] = []
    table.parent.mkdir(parents=True, exist_ok=True)
    for recipe in sorted(recipes, key=lambda recipe: -recipe.batch_size):
        larger = [rate for other, rate in best if is_larger_batch_of(other, recipe)]
        first = min(larger, default=FIRST_RATE)
        found = lr_search(recipe, folder / recipe.name, place, pace, first)
        best.append((recipe, best_of(found)["lr"]))
        settings = {"recipe": recipe.name, "norm": recipe.norm, "batch_size": recipe.batch_size}
        rows += [settings | row for row in found]
        write_table(table, rows, bundle.environment())


def is_larger_batch_of(other: Recipe, recipe: Recipe) -> bool:
    same = (other.architecture, other.norm) == (recipe.architecture, recipe.norm)
    return same and other.batch_size > recipe.batch_size


def lr_search(
    recipe: Recipe, folder: Path, place: Place, pace: Pace, first: float = FIRST_RATE
) -> list[dict[str, Any]]:
    """Train with `first`, half of it, a quarter ... and compare on held-out training images.

    The table lr_search.csv, which is returned, grows with every rate; a rate that is in it is not
    trained again. The test images are never looked at.
    """
    share = recipe.held_out or SEARCH_SHARE
    path = folder / "lr_search.csv"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if path.exists():
        known = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        rows = [row | {key: float(row[key]) for key in ("lr", "top1")} for row in known]
    images = load_training(recipe, place)
    chance = 100 / len(set(targets_of(split_off(images, share)[1])))
    rate = rows[-1]["lr"] / 2 if rows else first
    while rate >= LOWEST_RATE and not is_over([row["top1"] for row in rows], chance):
        mine = replace(recipe.with_rate(rate), held_out=share)
        home = folder / f"lr-{rate:g}"
        claim(home, mine)
        train_set, held_out = split_off(images, share)
        trainer = Trainer(mine, home, place, pace, train_set, held_out)
        try:
            trainer.train()
            last = trainer.state.rows[-1]
            row = {"lr": rate, "loss": last["loss"], "top1": last["top1"]}
        except Diverged as error:
            trainer.say(str(error))
            row = {"lr": rate, "loss": math.nan, "top1": 0.0}
        rows.append(row | {"images": len(held_out), "epochs": recipe.epochs, "seed": recipe.seed})
        rate /= 2
        if trainer.accelerator.is_main_process:
            write_table(path, rows)
        trainer.accelerator.wait_for_everyone()
    best = best_of(rows)
    console.print(f"best on {best['images']} held-out images: lr {best['lr']:g}; {path}")
    return rows


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["top1"])


def is_over(top1: Sequence[float], chance: float) -> bool:
    """Whether the last rates were worse than the best one, which learned something."""
    if not top1 or max(top1) < LEARNED * chance:
        return False
    return len(top1) - 1 - max(range(len(top1)), key=top1.__getitem__) >= WORSE_RATES


def write_table(path: Path, rows: Sequence[dict[str, Any]], head: str = "") -> None:
    """A CSV file; each line of `head` becomes a comment above it."""
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in head.splitlines())
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    manifest.write_text(path, text.getvalue())
