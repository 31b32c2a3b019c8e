"""Train a segmentation network from a recipe, evaluate what is stored, and write its bundle.

- `python train_scripts/train_segmentation.py train_scripts/recipes/segmentation/camvid.yaml NAME`
- `python train_scripts/train_segmentation.py RECIPE --table FILE.csv` (all recipes of the file)
- `accelerate launch --num_processes 2 train_scripts/train_segmentation.py RECIPE NAME`

The recipe decides everything that changes the result. A run lives in runs/NAME/: checkpoints,
train_log.csv, TensorBoard's events, and at the end result.json and bundle/. Rerun the command to
resume an interrupted run; on a CPU it ends with the same bits as an uninterrupted one.

Exit status: 0 the bundle is written, 2 bad input or no room, 75 --minutes are over, 130 Ctrl-C.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kn_zoo import cli, data
from kn_zoo.checkpoints import manifest
from kn_zoo.segmentation.training import SegmentationRecipe, compare, train
from kn_zoo.training.data import Place
from kn_zoo.training.recipe import UserError, names
from kn_zoo.training.trainer import Interrupted, Pace

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    recipe: Annotated[Path, typer.Argument(help="a YAML file, such as recipes/camvid.yaml")],
    variant: Annotated[
        str | None, typer.Argument(help="which recipe of the file, if it holds several")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="run folder (default: runs/NAME)")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder that holds the data sets")] = None,
    workers: Annotated[int, typer.Option(help="processes that load images")] = 0,
    seeds: Annotated[list[int] | None, typer.Option(help="for --table; repeat for several")] = None,
    epochs: Annotated[int | None, typer.Option(help="instead of the recipe's")] = None,
    updates: Annotated[
        int | None, typer.Option(help="a dry run: stop there, evaluate, write the bundle")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="stop, resumably, when training has taken so long")
    ] = float("inf"),
    checkpoint_minutes: Annotated[float, typer.Option(help="time between checkpoints")] = 10.0,
    table: Annotated[
        Path | None,
        typer.Option(help="train all recipes of the file; write their results here"),
    ] = None,
    in_package: Annotated[
        bool, typer.Option(help="write the bundle into kn_zoo/pretrained and the manifest")
    ] = False,
) -> int:
    try:
        if table and in_package:
            raise UserError("--table only compares: leave --in-package out")
        every = names(recipe) if table and variant is None else [variant]
        changes = {"epochs": epochs, "updates": updates, "sampled_draws": 1 if updates else None}
        given = {key: value for key, value in changes.items() if value is not None}
        chosen = [replace(SegmentationRecipe.read(recipe, each), **given) for each in every]
        folder = output or Path("runs") / (recipe.stem if table else chosen[0].name)
        place, pace = Place(data_dir), Pace(workers, checkpoint_minutes, minutes)
        if table:
            compare(chosen, folder, place, pace, seeds or [chosen[0].seed], table)
        else:
            train(chosen[0], recipe, folder, place, pace, in_package)
    except Interrupted as stop:
        print(f"train_segmentation.py: {stop}", file=sys.stderr)
        return stop.status
    except (UserError, data.MissingData, manifest.ManifestError, OSError, ValueError) as error:
        print(f"train_segmentation.py: {cli.one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(app, sys.argv[1:] or ["--help"]))
