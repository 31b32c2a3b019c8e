"""Options of the training commands, and errors as one line with an exit status."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kn_zoo import command, data
from kn_zoo.checkpoints import manifest
from kn_zoo.training.recipe import UserError
from kn_zoo.training.trainer import Interrupted

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, see recipes/")]
Variant = Annotated[
    str | None, typer.Argument(help="name of the recipe, if the file contains several")
]
Output = Annotated[Path | None, typer.Option(help="run folder (default: runs/NAME)")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="folder of the data sets (default: $KN_ZOO_DATA, else the cache)"),
]
Download = Annotated[bool, typer.Option(help="download the data set if missing")]
Workers = Annotated[int, typer.Option(help="number of processes that load images")]
Epochs = Annotated[int | None, typer.Option(help="replaces the recipe's epochs")]
Updates = Annotated[
    int | None, typer.Option(help="dry run: stop after this many updates, then evaluate")
]
Minutes = Annotated[float, typer.Option(help="stop after this time; rerun to resume")]
SaveMinutes = Annotated[float, typer.Option(help="time between training states")]
Table = Annotated[
    Path | None,
    typer.Option(help="train all recipes of the file and write their results to this CSV file"),
]
InPackage = Annotated[
    bool,
    typer.Option(
        help="write the bundle to the manifest and kn_zoo/pretrained, a large one to checkpoints"
    ),
]


def create_app() -> typer.Typer:
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )


def exit_status(train: Callable[[], None]) -> int:
    """Call `train`; return 0, or the status of an error after printing it as one line."""
    program = Path(sys.argv[0]).name
    try:
        train()
    except Interrupted as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.status
    except (UserError, data.MissingData, manifest.ManifestError, OSError, ValueError) as error:
        print(f"{program}: {command.one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run(app: typer.Typer) -> int:
    """Run a training command with the arguments of this process; return its exit status."""
    return command.run(app, spread_seeds(sys.argv[1:]) or ["--help"])


def spread_seeds(argv: Sequence[str]) -> list[str]:
    """Rewrite `--seeds 0 1 2` as the repeated option that typer parses."""
    result: list[str] = []
    in_seeds = False
    for word in argv:
        in_seeds = word == "--seeds" or (in_seeds and word.isdecimal())
        if in_seeds and word != "--seeds" and result[-1] != "--seeds":
            result.append("--seeds")
        result.append(word)
    return result
