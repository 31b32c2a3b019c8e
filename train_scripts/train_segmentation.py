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
from pathlib import Path
from typing import Annotated

import typer

from kn_zoo import cli, data
from kn_zoo.checkpoints import manifest
from kn_zoo.segmentation.training import SegmentationRecipe, run_grid, train
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import UserError, variant_names
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
    workers: Annotated[int, typer.Option(help="number of processes that load images")] = 0,
    seeds: Annotated[
        list[int] | None, typer.Option(help="with --table; repeat the option for several")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="replaces the recipe's epochs")] = None,
    updates: Annotated[
        int | None, typer.Option(help="dry run: stop after this many updates, then evaluate")
    ] = None,
    minutes: Annotated[float, typer.Option(help="stop after this time; rerun to resume")] = float(
        "inf"
    ),
    save_minutes: Annotated[float, typer.Option(help="time between training states")] = 10.0,
    table: Annotated[
        Path | None,
        typer.Option(help="train all recipes of the file and write their results to this CSV file"),
    ] = None,
    in_package: Annotated[
        bool, typer.Option(help="write the bundle to kn_zoo/pretrained and the manifest")
    ] = False,
) -> int:
    try:
        if table and in_package:
            raise UserError("--table stores no weights: omit --in-package")
        variants = variant_names(path) if table and variant is None else [variant]
        recipes = [
            SegmentationRecipe.read(path, name).override(epochs, updates) for name in variants
        ]
        folder = output or Path("runs") / (path.stem if table else recipes[0].name)
        data_config, run_config = DataConfig(data_dir), RunConfig(workers, save_minutes, minutes)
        if table:
            run_grid(recipes, folder, data_config, run_config, seeds or [recipes[0].seed], table)
        else:
            train(recipes[0], path, folder, data_config, run_config, in_package)
    except Interrupted as error:
        print(f"train_segmentation.py: {error}", file=sys.stderr)
        return error.status
    except (UserError, data.MissingData, manifest.ManifestError, OSError, ValueError) as error:
        print(f"train_segmentation.py: {cli.one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(app, sys.argv[1:] or ["--help"]))
