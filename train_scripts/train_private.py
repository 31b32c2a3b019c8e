"""Train a network with differential privacy from a recipe with a `privacy` section.

- `python train_scripts/train_private.py train_scripts/recipes/private_small.yaml
  knpreactresnet20_cifar.cifar10_dp8`

The noise follows from the recipe's epsilon and delta. The run folder runs/NAME/ contains the
training state, which stays on this machine, train_log.csv and, at the end, bundle/, which states
the guarantee. Requires `pip install -e '.[privacy]'`.

Rerun the same command to resume an interrupted run. Sampling and noise have no seed, so no two runs
are equal. Ctrl-C and SIGTERM stop the run after the current step.

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
from kn_zoo.training.recipe import Recipe, UserError
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
    epochs: Annotated[
        int | None, typer.Option(help="replaces the recipe's epochs; the noise follows")
    ] = None,
    minutes: Annotated[float, typer.Option(help="stop after this time; rerun to resume")] = float(
        "inf"
    ),
    save_minutes: Annotated[float, typer.Option(help="time between training states")] = 10.0,
    in_package: Annotated[
        bool, typer.Option(help="write the bundle to kn_zoo/pretrained and the manifest")
    ] = False,
) -> int:
    try:
        from kn_zoo.training.private import train_private
    except ModuleNotFoundError as error:
        print(f"train_private.py: {error}: pip install 'kn_zoo[privacy]'", file=sys.stderr)
        return 2
    try:
        recipe = Recipe.read(path, variant)
        if epochs is not None:
            recipe = replace(recipe, epochs=epochs)
        folder, data_config = output or Path("runs") / recipe.name, DataConfig(data_dir, download)
        run_config = RunConfig(save_minutes=save_minutes, minutes=minutes)
        train_private(recipe, path, folder, data_config, run_config, in_package)
    except Interrupted as error:
        print(f"train_private.py: {error}", file=sys.stderr)
        return error.status
    except (UserError, data.MissingData, manifest.ManifestError, OSError, ValueError) as error:
        print(f"train_private.py: {cli.one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(app, sys.argv[1:] or ["--help"]))
