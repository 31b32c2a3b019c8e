"""First losses of every recipe, stored in fingerprints.csv to detect unintended changes.

    python -m tests.training.fingerprint            # recompute all
    python -m tests.training.fingerprint NAME ...   # recompute these recipes

Each recipe runs with its own seed, images, augmentation, network, optimizer and schedule, but
eager, in float32 and at batch size 8. Recipes whose images are missing keep their rows. ImageNet's
run on imagenet-sample/val, a folder in KN_ZOO_DATA with one image per class.
"""

import csv
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import Tensor

from kn_zoo import data
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import Recipe, variant_names
from kn_zoo.training.trainer import RunConfig, Trainer, console, write_csv

RECIPES = Path(__file__).parents[2] / "train_scripts" / "recipes"
PATH = Path(__file__).with_name("fingerprints.csv")
UPDATES, IMAGES = 4, 8

Rows = list[dict[str, float]]


class Recorder(Trainer):
    """A trainer that records learning rate and loss, and neither evaluates nor saves."""

    def prepare(self, *args: Any) -> None:
        super().prepare(*args)
        self.recorded: Rows = []

    def update(self, pixels: Tensor, targets: Tensor) -> Tensor:
        lr, loss = self.lr, super().update(pixels, targets)
        self.recorded.append({"update": len(self.recorded) + 1, "lr": lr, "loss": float(loss)})
        return loss

    def end_epoch(self, epoch: int, updates: int) -> None:
        pass

    def save(self) -> None:
        pass


def first_losses(recipe: Recipe) -> Rows:
    """Return learning rate and loss of the first updates; raises MissingData."""
    short = replace(
        recipe,
        batch_size=IMAGES,
        updates=UPDATES,
        accumulation=1,
        compile=False,
        winograd=False,
        mixed_precision="no",
    )
    config = DataConfig()
    if recipe.dataset == "imagenet-1k":
        config = DataConfig(data.data_dir() / "imagenet-sample")
        short = replace(short, train_split="validation")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recorder(short, Path(folder), config, RunConfig())
        trainer.train()
    return trainer.recorded


def read() -> dict[str, Rows]:
    """Return the stored losses by recipe."""
    losses: dict[str, Rows] = {}
    with PATH.open(newline="") as file:
        for row in csv.DictReader(file):
            name = row.pop("recipe")
            losses.setdefault(name, []).append({k: float(v) for k, v in row.items()})
    return losses


def all_recipes() -> dict[str, Recipe]:
    recipes = [Recipe.read(p, v) for p in sorted(RECIPES.glob("*.yaml")) for v in variant_names(p)]
    return {recipe.name: recipe for recipe in recipes if recipe.privacy is None}  # private: random


def main(names: list[str]) -> None:
    recipes, losses = all_recipes(), read()
    for name in track(names or list(recipes), "fingerprints", console=console):
        try:
            losses[name] = first_losses(recipes[name])
        except data.MissingData as error:
            console.print(f"{name} is unchanged: {error}")
        rows = [{"recipe": key} | row for key in recipes for row in losses.get(key, ())]
        write_csv(PATH, rows, float_format=".6g")


if __name__ == "__main__":
    main(sys.argv[1:])
