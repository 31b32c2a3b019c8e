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
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kn_zoo import cli, data
from kn_zoo.checkpoints import manifest
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import Recipe, UserError, variant_names
from kn_zoo.training.report import train_seeds
from kn_zoo.training.search import run_grid, search_lr, search_lrs
from kn_zoo.training.trainer import Interrupted, RunConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, see recipes/")],
    variant: Annotated[
        str | None, typer.Argument(help="name of the recipe, if the file contains several")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="run folder (default: runs/NAME)")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="folder of the data sets (default: $KN_ZOO_DATA, else the cache)"),
    ] = None,
    download: Annotated[bool, typer.Option(help="download the data set if missing")] = False,
    workers: Annotated[int, typer.Option(help="number of processes that load images")] = 0,
    seeds: Annotated[
        list[int] | None,
        typer.Option(help="train once per seed, e.g. --seeds 0 1 2; the first one is stored"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="replaces the recipe's epochs")] = None,
    updates: Annotated[
        int | None, typer.Option(help="dry run: stop after this many updates, then evaluate")
    ] = None,
    minutes: Annotated[float, typer.Option(help="stop after this time; rerun to resume")] = float(
        "inf"
    ),
    save_minutes: Annotated[float, typer.Option(help="time between training states")] = 10.0,
    lr_search: Annotated[
        bool,
        typer.Option(
            "--lr-search",
            help="search the learning rate instead: halve it from 0.2 and compare on held-out "
            "images; with --table, for every recipe of the file",
        ),
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(help="train all recipes of the file and write their results to this CSV file"),
    ] = None,
    in_package: Annotated[
        bool, typer.Option(help="write the bundle to kn_zoo/pretrained and the manifest")
    ] = False,
) -> int:
    try:
        variants = variant_names(path) if table and variant is None else [variant]
        recipes = [override(Recipe.read(path, name), epochs, updates) for name in variants]
        recipe, data_config = recipes[0], DataConfig(data_dir, download)
        run_config = RunConfig(workers, save_minutes, minutes)
        folder = output or Path("runs") / (path.stem if table else recipe.name)
        seeds = seeds or [recipe.seed]
        if table and in_package:
            raise UserError("--table stores no weights: omit --in-package")
        if table and lr_search:
            search_lrs(recipes, folder, data_config, run_config, table)
        elif table:
            run_grid(recipes, folder, data_config, run_config, seeds, table)
        elif lr_search:
            search_lr(recipe, folder, data_config, run_config)
        else:
            train_seeds(recipe, path, folder, data_config, run_config, seeds, in_package)
    except Interrupted as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.status
    except (UserError, data.MissingData, manifest.ManifestError, OSError, ValueError) as error:
        print(f"train.py: {cli.one_line(error)}", file=sys.stderr)
        return 2
    return 0


def override(recipe: Recipe, epochs: int | None, updates: int | None) -> Recipe:
    """Apply the options that change a recipe; a dry run evaluates one sampled draw."""
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    return recipe if updates is None else replace(recipe, updates=updates, sampled_draws=1)


def spread_seeds(argv: list[str]) -> list[str]:
    """Rewrite `--seeds 0 1 2` as the repeated option that typer parses."""
    result: list[str] = []
    in_seeds = False
    for word in argv:
        in_seeds = word == "--seeds" or (in_seeds and word.isdecimal())
        if in_seeds and word != "--seeds" and result[-1] != "--seeds":
            result.append("--seeds")
        result.append(word)
    return result


if __name__ == "__main__":
    sys.exit(cli.run(app, spread_seeds(sys.argv[1:]) or ["--help"]))
