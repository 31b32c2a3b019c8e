"""The first losses of every recipe, committed, which show a change of it that nobody meant.

- `python train_scripts/fingerprint.py` writes recipes/fingerprints.csv anew
- `python train_scripts/fingerprint.py NAME ...` only those rows

Each recipe's own seed, images, augmentation, network, optimizer and schedule, but eager, in float32
and in batches of 8 images, so that a CPU can follow. Recipes whose images are not there keep their
rows; ImageNet's are computed on the sample of one image a class.
"""

import csv
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from kn_zoo import cli, data
from kn_zoo.training.data import Place
from kn_zoo.training.experiments import write_table
from kn_zoo.training.recipe import Recipe, UserError, names
from kn_zoo.training.trainer import Pace, Trainer, console

RECIPES = Path(__file__).parents[2] / "train_scripts" / "recipes"
PATH = RECIPES / "fingerprints.csv"
SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"
UPDATES, IMAGES = 4, 8

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def first_losses(recipe: Recipe) -> list[dict[str, float]]:
    """Learning rate and loss of the first updates; raises MissingData without the images."""
    short = replace(
        recipe,
        batch_size=IMAGES,
        updates=UPDATES,
        accumulation=1,
        compile=False,
        mixed_precision="no",
    )
    place = Place()
    if recipe.dataset == "imagenet-1k":
        place, short = Place(SAMPLE), replace(short, train_split="validation")
    rows: list[dict[str, float]] = []

    class Followed(Trainer):
        def update(self, *batch):
            rate, loss = self.rate, super().update(*batch)
            rows.append({"update": len(rows) + 1, "lr": rate, "loss": float(loss)})
            return loss

        def end_epoch(self, *_):
            pass  # nothing to measure yet

        def save(self):
            pass

    with tempfile.TemporaryDirectory() as folder:
        Followed(short, Path(folder), place, Pace()).train()
    return rows


def read() -> dict[str, list[dict[str, float]]]:
    """What is committed, by recipe."""
    found: dict[str, list[dict[str, float]]] = {}
    if PATH.exists():
        with PATH.open(newline="") as file:
            for row in csv.DictReader(file):
                name = row.pop("recipe")
                found.setdefault(name, []).append({k: float(v) for k, v in row.items()})
    return found


def everything() -> dict[str, Recipe]:
    """All recipes of the folder by name."""
    found = [Recipe.read(p, v) for p in sorted(RECIPES.glob("*.yaml")) for v in names(p)]
    return {recipe.name: recipe for recipe in found}


@app.command(help=__doc__)
def main(chosen: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None) -> int:
    recipes, curves = everything(), read()
    try:
        if unknown := set(chosen or ()) - set(recipes):
            raise UserError(f"no recipe is called {min(unknown)}")
        for name in track(chosen or list(recipes), "fingerprints", console=console):
            try:
                curves[name] = first_losses(recipes[name])
            except data.MissingData as error:
                console.print(f"{name} stays as it is: {error}")
            rows = [{"recipe": key} | row for key in recipes for row in curves.get(key, ())]
            write_table(PATH, [{k: shown(v) for k, v in row.items()} for row in rows])
    except (UserError, OSError) as error:
        print(f"fingerprint.py: {cli.one_line(error)}", file=sys.stderr)
        return 2
    return 0


def shown(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
