"""Many runs: a grid of recipes and seeds, and the search for a learning rate."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from torch.optim.swa_utils import update_bn

from kn_zoo.checkpoints import bundle
from kn_zoo.training.batches import Shard, create_batches
from kn_zoo.training.data import DataConfig, load_training, split_off, targets_of
from kn_zoo.training.recipe import Recipe
from kn_zoo.training.report import mean_accuracy, train_and_evaluate
from kn_zoo.training.resume import prepare_run_dir
from kn_zoo.training.trainer import LOG, Diverged, RunConfig, Trainer, console, write_csv

FIRST_LR = 0.2  # first of the paper's search
LAST_LR = FIRST_LR / 2**10
WORSE_RATES = 2  # consecutive rates worse than the best one that end the search
LEARNED = 2.0  # accuracy, in multiples of chance, below which a rate has not learned
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
REESTIMATION_BATCH = 256  # images per batch when BatchNorm's statistics are re-estimated
HELD_OUT = 0.1  # fraction of the training images held out, unless the recipe sets it


def run_grid(
    recipes: Sequence[AnyRecipe],
    folder: Path,
    seeds: Sequence[int],
    table: Path,
    train: Callable[[AnyRecipe, Path], dict[str, Any]],
) -> None:
    """Train each recipe from each seed; the table has one row per run and no weights are stored.

    Runs that the table contains are not trained again. It is read and rewritten after each run, so
    that it can grow over days and machines; its comment describes the environment of the last run.

    Args:
        train: trains a recipe in a run folder, unless that run is complete; returns its scores.
    """
    table.parent.mkdir(parents=True, exist_ok=True)  # fail before hours of training
    for seed in seeds:
        for recipe in recipes:
            settings = grid_settings(recipe, seed)
            if contains(read_rows(table), settings):
                continue
            run_dir = folder / recipe.name / f"seed-{seed}"
            row = settings | train(replace(recipe, seed=seed), run_dir)
            if PartialState().is_main_process:
                write_csv(table, [*read_rows(table), row], bundle.environment())


def accuracy(
    recipe: Recipe, run_dir: Path, data_config: DataConfig, run_config: RunConfig
) -> dict[str, Any]:
    """Return the accuracy of a run under "expected" statistics, for `run_grid`.

    Also returns the mean training loss of its last epoch, and BatchNorm's `reestimated_top1`.
    """
    reached = train_and_evaluate(recipe, run_dir, data_config, run_config).statistics["expected"]
    loss = float(read_rows(run_dir / LOG)[-1]["loss"])
    row = {"top1": reached.top1, "top5": reached.top5, "loss": loss}
    if recipe.norm == "batch":
        row["top1_reestimated"] = reestimated_top1(recipe, run_dir, data_config, run_config)
    return row


def reestimated_top1(
    recipe: Recipe, run_dir: Path, data_config: DataConfig, run_config: RunConfig
) -> float:
    """Return top-1 of a complete run with BatchNorm's statistics re-estimated.

    The running averages of training are noisy if batches are small. The statistics evaluated here
    are averages over all training images, augmented as in training.
    """
    trainer = Trainer(recipe, run_dir, data_config, run_config)
    trainer.train()  # restores the last training state
    images, device = load_training(recipe, data_config), trainer.accelerator.device
    epoch = len(trainer.batches) * recipe.batch_size  # images, also of a stream
    larger = replace(recipe, batch_size=min(REESTIMATION_BATCH, epoch))
    batches = create_batches(
        larger, images, trainer.network, data_config, run_config.workers, device, Shard()
    )
    update_bn(batches.epoch(recipe.epochs - 1), trainer.evaluated, device)
    return mean_accuracy([trainer.evaluate(trainer.test_set)]).top1


def grid_settings(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Return what identifies a run of a grid."""
    return {
        "recipe": recipe.name,
        "norm": recipe.norm,
        "batch_size": recipe.batch_size,
        "lr": recipe.optimizer["lr"],
        "epochs": recipe.epochs,
        "seed": seed,
    }


def read_rows(table: Path) -> list[dict[str, Any]]:
    """Return the rows of a table written by `write_csv`, as text; none if there is no such file."""
    if not table.exists():
        return []
    lines = table.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def contains(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> bool:
    """Return whether a row has these settings."""
    return any(all(row.get(k) == str(v) for k, v in settings.items()) for row in rows)


def search_lrs(
    recipes: Sequence[Recipe],
    folder: Path,
    data_config: DataConfig,
    run_config: RunConfig,
    table: Path,
) -> None:
    """Search the learning rate of each recipe; the table has one row per rate.

    Recipes that the table contains are not searched again. It is written after each recipe, so that
    it can grow over days and machines.
    """
    table.parent.mkdir(parents=True, exist_ok=True)
    for recipe in sorted(recipes, key=lambda recipe: -recipe.batch_size):
        known = read_rates(table)
        if any(row["recipe"] == recipe.name for row in known):
            continue
        run_dir = folder / recipe.name
        rates = search_lr(recipe, run_dir, data_config, run_config, first_lr(recipe, known))
        settings = {"recipe": recipe.name, "norm": recipe.norm, "batch_size": recipe.batch_size}
        if PartialState().is_main_process:
            rows = [*read_rates(table), *(settings | row for row in rates)]
            write_csv(table, rows, bundle.environment())
        PartialState().wait_for_everyone()  # the next search starts at a rate of the table


def first_lr(recipe: Recipe, known: Sequence[dict[str, Any]]) -> float:
    """Return the rate to try first: the best one of the same network at a larger batch size.

    `known` are rows of a table of rates. Without such rows, returns `FIRST_LR`.
    """
    larger: dict[str, list[dict[str, Any]]] = {}
    for row in known:
        architecture = row["recipe"].partition(".")[0]
        same = (architecture, row["norm"]) == (recipe.architecture, recipe.norm)
        if same and int(row["batch_size"]) > recipe.batch_size:
            larger.setdefault(row["recipe"], []).append(row)
    return min((best_of(rows)["lr"] for rows in larger.values()), default=FIRST_LR)


def read_rates(table: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of rates, with rate and accuracy as numbers."""
    return [row | {k: float(row[k]) for k in ("lr", "top1")} for row in read_rows(table)]


def search_lr(
    recipe: Recipe,
    folder: Path,
    data_config: DataConfig,
    run_config: RunConfig,
    first: float = FIRST_LR,
) -> list[dict[str, Any]]:
    """Search the rate with the highest accuracy on held-out images, starting at `first`.

    Test images are not used. Returns the rows of lr_search.csv, by descending rate, which is
    rewritten after each rate; rates that it contains are not trained again.
    """
    fraction = recipe.held_out or HELD_OUT
    table = folder / "lr_search.csv"
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_rates(table)
    images = load_training(recipe, data_config)
    chance = 100 / len(set(targets_of(split_off(images, fraction)[1])))
    while lr := next_lr(rows, first, chance):
        trial = replace(recipe.with_lr(lr), held_out=fraction)
        run_dir = folder / f"lr-{lr:g}"
        prepare_run_dir(run_dir, trial)
        train_set, held_out = split_off(images, fraction)
        trainer = Trainer(trial, run_dir, data_config, run_config, train_set, held_out)
        try:
            trainer.train()
            last = trainer.progress.rows[-1]
            row = {"lr": lr, "loss": last["loss"], "top1": last["top1"]}
        except Diverged as error:
            trainer.log(str(error))
            row = {"lr": lr, "loss": math.nan, "top1": 0.0}
        rows.append(row | {"images": len(held_out), "epochs": recipe.epochs, "seed": recipe.seed})
        rows.sort(key=lambda row: -row["lr"])
        if trainer.accelerator.is_main_process:
            write_csv(table, rows)
        trainer.accelerator.wait_for_everyone()
    best = best_of(rows)
    console.print(f"best on {best['images']} held-out images: lr {best['lr']:g}; {table}")
    return rows


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["top1"])


def next_lr(rows: Sequence[dict[str, Any]], first: float, chance: float) -> float | None:
    """Return the rate to try after those of `rows`, which descend; None to end the search.

    The rate is halved until `search_is_over`, then doubled while the largest one is the best.
    """
    if not rows:
        return first
    rates = [row["lr"] for row in rows]
    if rates[-1] / 2 >= LAST_LR and not search_is_over([row["top1"] for row in rows], chance):
        return rates[-1] / 2
    if rates[0] < FIRST_LR and best_of(rows)["lr"] == rates[0]:
        return 2 * rates[0]
    return None


def search_is_over(top1: Sequence[float], chance: float) -> bool:
    """Return whether the last `WORSE_RATES` rates are worse than one that learned."""
    if not top1 or max(top1) < LEARNED * chance:
        return False
    return len(top1) - 1 - max(range(len(top1)), key=top1.__getitem__) >= WORSE_RATES
