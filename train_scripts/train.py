"""Train a network from a recipe, evaluate what is stored, and write its bundle.

- `python train_scripts/train.py train_scripts/recipes/knpreactresnet20_cifar.digits.yaml`
- `python train_scripts/train.py train_scripts/recipes/cifar100.yaml knresnet18_cifar.cifar100_b256`
- `accelerate launch --num_processes 8 train_scripts/train.py RECIPE` (or torchrun: several devices)
- `torchrun --nproc-per-node 2 train_scripts/train.py RECIPE` (on CPUs accelerate would need MPI)

The recipe decides everything that changes the result. A run lives in runs/NAME/: checkpoints,
train_log.csv, TensorBoard's events, and at the end bundle/. Stopped at any moment, in whatever way,
the same command takes it up again, and on a CPU it ends with the same bits as if it had never
stopped. Ctrl-C and SIGTERM stop it after the update that is under way.

Exit status: 0 the bundle is written, 2 bad input or no room, 75 --minutes are over, 130 Ctrl-C.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kn_zoo import cli, data
from kn_zoo.checkpoints import manifest
from kn_zoo.training.data import Place
from kn_zoo.training.experiments import compare, lr_search, lr_searches, train_seeds
from kn_zoo.training.recipe import Recipe, UserError, names
from kn_zoo.training.trainer import Interrupted, Pace

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    recipe: Annotated[Path, typer.Argument(help="a YAML file, such as those in recipes/")],
    variant: Annotated[
        str | None, typer.Argument(help="which recipe of the file, if it holds several")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="run folder (default: runs/NAME)")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder that holds the data sets")] = None,
    download: Annotated[bool, typer.Option(help="fetch the data set if it is missing")] = False,
    workers: Annotated[int, typer.Option(help="processes that load images")] = 0,
    seeds: Annotated[
        list[int] | None,
        typer.Option(help="train once from each, e.g. --seeds 0 1 2; the first one's is stored"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="instead of the recipe's")] = None,
    updates: Annotated[
        int | None, typer.Option(help="a dry run: cut it off there, evaluate, bundle; one draw")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="stop, resumably, when training has taken so long")
    ] = float("inf"),
    checkpoint_minutes: Annotated[float, typer.Option(help="time between checkpoints")] = 10.0,
    search_lr: Annotated[
        bool,
        typer.Option(
            "--lr-search",
            help="find the learning rate instead: halve it from 0.2, judged on held-out images; "
            "with --table, for every recipe of the file",
        ),
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(help="do all recipes of the file instead, and write their results here"),
    ] = None,
    in_package: Annotated[
        bool, typer.Option(help="write the bundle into kn_zoo/pretrained and the manifest")
    ] = False,
) -> int:
    try:
        every = names(recipe) if table and variant is None else [variant]
        chosen = [replace(Recipe.read(recipe, one), **changes(epochs, updates)) for one in every]
        settings, place = chosen[0], Place(data_dir, download)
        pace = Pace(workers, checkpoint_minutes, minutes)
        folder = output or Path("runs") / (recipe.stem if table else settings.name)
        if table:
            if in_package:
                raise UserError("--table only compares: leave --in-package out")
            if search_lr:
                lr_searches(chosen, folder, place, pace, table)
            else:
                compare(chosen, folder, place, pace, seeds or [settings.seed], table)
        elif search_lr:
            lr_search(settings, folder, place, pace)
        else:
            train_seeds(settings, recipe, folder, place, pace, seeds or [settings.seed], in_package)
    except Interrupted as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        return stop.status
    except (UserError, data.MissingData, manifest.ManifestError, OSError, ValueError) as error:
        print(f"train.py: {cli.one_line(error)}", file=sys.stderr)
        return 2
    return 0


def changes(epochs: int | None, updates: int | None) -> dict[str, int]:
    """What the command line changes in a recipe."""
    found = {} if epochs is None else {"epochs": epochs}
    return found if updates is None else found | {"updates": updates, "sampled_draws": 1}


def spread_seeds(argv: list[str]) -> list[str]:
    """`--seeds 0 1 2` as the repeated option that typer knows."""
    result: list[str] = []
    of_seeds = False
    for word in argv:
        of_seeds = word == "--seeds" or (of_seeds and word.isdecimal())
        if of_seeds and word != "--seeds" and result[-1] != "--seeds":
            result.append("--seeds")
        result.append(word)
    return result


if __name__ == "__main__":
    sys.exit(cli.run(app, spread_seeds(sys.argv[1:]) or ["--help"]))
