"""Train a segmentation network from a recipe, evaluate it, and write its bundle.

- `python train_scripts/train_segmentation.py train_scripts/recipes/segmentation/camvid.yaml NAME`
- `python train_scripts/train_segmentation.py RECIPE --table FILE.csv` (all recipes of the file)
- `accelerate launch --num_processes 2 train_scripts/train_segmentation.py RECIPE NAME`

The recipe contains all settings that affect the result. The run folder runs/NAME/ contains training
states, train_log.csv, TensorBoard events and, at the end, result.json and bundle/.

Rerun the same command to resume an interrupted run. On a CPU the result is bit-identical to that of
an uninterrupted run.

Exit status: 0 success; 2 invalid input or no disk space; 75 --minutes reached; 130 Ctrl-C.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kn_zoo.segmentation.training import SegmentationRecipe, scores, train
from kn_zoo.training import command as options
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import UserError, variant_names
from kn_zoo.training.search import run_grid
from kn_zoo.training.trainer import RunConfig

app = options.create_app()


@app.command(help=__doc__)
def main(
    path: options.RecipePath,
    variant: options.Variant = None,
    output: options.Output = None,
    data_dir: options.DataDir = None,
    workers: options.Workers = 0,
    seeds: Annotated[
        list[int] | None,
        typer.Option(help="with --table, train once per seed, e.g. --seeds 0 1 2"),
    ] = None,
    epochs: options.Epochs = None,
    updates: options.Updates = None,
    minutes: options.Minutes = float("inf"),
    save_minutes: options.SaveMinutes = 10.0,
    table: options.Table = None,
    in_package: options.InPackage = False,
) -> int:
    def train_recipes() -> None:
        if table and in_package:
            raise UserError("--table stores no weights: omit --in-package")
        variants = variant_names(path) if table and variant is None else [variant]
        recipes = [
            SegmentationRecipe.read(path, name).override(epochs, updates) for name in variants
        ]
        folder = output or Path("runs") / (path.stem if table else recipes[0].name)
        data_config, run_config = DataConfig(data_dir), RunConfig(workers, save_minutes, minutes)
        if table:
            train_run = partial(scores, data_config=data_config, run_config=run_config)
            run_grid(recipes, folder, seeds or [recipes[0].seed], table, train_run)
        else:
            train(recipes[0], path, folder, data_config, run_config, in_package)

    return options.exit_status(train_recipes)


if __name__ == "__main__":
    sys.exit(options.run(app))
