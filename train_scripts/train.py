"""Train a network from a recipe, evaluate it, and write its bundle.

- `python train_scripts/train.py train_scripts/recipes/knpreactresnet20_cifar.digits.yaml`
- `python train_scripts/train.py train_scripts/recipes/cifar100.yaml knresnet18_cifar.cifar100_b256`
- `accelerate launch --num_processes 8 train_scripts/train.py RECIPE` (several GPUs)
- `torchrun --nproc-per-node 2 train_scripts/train.py RECIPE` (several processes on CPUs)

The recipe contains all settings that affect the result. The run folder runs/NAME/ contains training
states, train_log.csv, TensorBoard events and, at the end, bundle/.

Rerun the same command to resume an interrupted run. On a CPU the result is bit-identical to that of
an uninterrupted run. Ctrl-C and SIGTERM stop the run after the current update.

Exit status: 0 success; 2 invalid input or no disk space; 75 --minutes reached; 130 Ctrl-C.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kn_zoo.training import command as options
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import Recipe, UserError, variant_names
from kn_zoo.training.report import add_seeds, train_seeds
from kn_zoo.training.search import accuracy, run_grid, search_lr, search_lrs
from kn_zoo.training.trainer import RunConfig

app = options.create_app()


@app.command(help=__doc__)
def main(
    path: options.RecipePath,
    variant: options.Variant = None,
    output: options.Output = None,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    workers: options.Workers = 0,
    seeds: Annotated[
        list[int] | None,
        typer.Option(help="train once per seed, e.g. --seeds 0 1 2; the first one is stored"),
    ] = None,
    add: Annotated[
        bool,
        typer.Option(
            "--add-seeds",
            help="add the accuracy of these --seeds to the stored checkpoint, whose weights stay",
        ),
    ] = False,
    epochs: options.Epochs = None,
    updates: options.Updates = None,
    minutes: options.Minutes = float("inf"),
    save_minutes: options.SaveMinutes = 10.0,
    lr_search: Annotated[
        bool,
        typer.Option(
            "--lr-search",
            help="search the learning rate instead, from 0.2 in factors of two, by accuracy on "
            "held-out images; with --table, for every recipe of the file, and from the best rate "
            "of a larger batch size",
        ),
    ] = False,
    table: options.Table = None,
    in_package: options.InPackage = False,
    include_weights: Annotated[
        bool,
        typer.Option(
            "--weights/--no-weights",
            help="whether the bundle has the weights; --no-weights stores a large baseline's "
            "predictions, log and recipe only",
        ),
    ] = True,
) -> int:
    def train() -> None:
        variants = variant_names(path) if table and variant is None else [variant]
        recipes = [Recipe.read(path, name).override(epochs, updates) for name in variants]
        recipe, data_config = recipes[0], DataConfig(data_dir, download)
        run_config = RunConfig(workers, save_minutes, minutes)
        folder = output or Path("runs") / (path.stem if table else recipe.name)
        chosen_seeds = seeds or [recipe.seed]
        if table and in_package:
            raise UserError("--table stores no weights: omit --in-package")
        if add and (table or lr_search or in_package or not seeds):
            raise UserError(
                "--add-seeds needs --seeds, and no --table, --lr-search or --in-package"
            )
        if table and lr_search:
            search_lrs(recipes, folder, data_config, run_config, table)
        elif table:
            train_run = partial(accuracy, data_config=data_config, run_config=run_config)
            run_grid(recipes, folder, chosen_seeds, table, train_run)
        elif add:
            add_seeds(recipe, folder, data_config, run_config, chosen_seeds)
        elif lr_search:
            search_lr(recipe, folder, data_config, run_config)
        else:
            train_seeds(
                recipe,
                path,
                folder,
                data_config,
                run_config,
                chosen_seeds,
                in_package,
                include_weights,
            )

    return options.exit_status(train)


if __name__ == "__main__":
    sys.exit(options.run(app))
