"""Recompute what is reported of trained checkpoints, and compare it image by image.

    python eval/verify.py                                   the checkpoints of the package
    python eval/verify.py knpreactresnet20_cifar.cifar100 --device cuda --statistics all
    python eval/verify.py --all --data-dir DIR --json result.json

Imported checkpoints are evaluated in every way that their publication leaves open, and the results
can be written into the manifest:

    python eval/verify.py knresnet50.upstream_in1k --data-dir IMAGENET --json result.json
    kn-zoo pin result.json                                  hash and accuracies into the manifest
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from enum import Enum
from json import dumps
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kn_zoo import cli
from kn_zoo.checkpoints import files, manifest
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.evaluation.classification import SHOWN
from kn_zoo.evaluation.imported import Sweep, sweep
from kn_zoo.evaluation.result import Result, Settings
from kn_zoo.evaluation.verify import verify

STYLES = {"match": "green", "mismatch": "bold red", "corrupt": "bold red", "skipped": "yellow"}
METRICS = {  # of a task, as columns of a table
    "classification": {"top1": "top-1", "top5": "top-5"},
    "segmentation": {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


class Statistics(str, Enum):
    expected = "expected"
    plain = "plain"
    sampled = "sampled"
    all = "all"


@app.command(epilog="Exit status: 0 all match; 1 a mismatch or a corrupt file; 2 bad usage, or "
             "no accuracy could be recomputed.")  # fmt: skip
def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="architecture[.tag]")
    ] = None,
    embedded: Annotated[
        bool,
        typer.Option(
            "--embedded", help="All checkpoints with a bundle in this checkout (default)."
        ),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="All checkpoints of the manifest, also from the Hub.")
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the data sets; default: $KN_ZOO_DATA, then the cache."),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download CIFAR-100 if it is missing (161 MiB).")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images per batch; the result does not depend on it.")
    ] = 256,
    statistics: Annotated[
        Statistics,
        typer.Option(help="Inference statistics. Imported checkpoints are evaluated under all."),
    ] = Statistics.expected,
    json: Annotated[Path | None, typer.Option(help="Also write the results to this file.")] = None,
) -> int:
    """Verify checkpoints against the manifest and their bundles.

    Parameters, FLOPs and the hash of the file are always compared; accuracy and the prediction for
    each image or pixel are recomputed where the evaluation set is available. A file whose SHA-256
    differs from the manifest is corrupt: it is not loaded, and the others are verified.
    """
    chosen = chosen_checkpoints(names or [], embedded, everything)
    if json and (json.is_dir() or not json.parent.is_dir()):
        raise cli.UsageError(f"--json: {json} cannot be written: name a file in a folder")
    settings = Settings(data_dir, download, usable_device(device), batch_size, statistics.value)
    results: list[Result] = []
    sweeps: list[Sweep] = []
    for checkpoint in chosen:
        try:
            if checkpoint.upstream:
                sweeps.append(sweep(checkpoint, settings))
            else:
                results.append(verify(checkpoint, settings))
        except torch.OutOfMemoryError:
            raise cli.UsageError(
                f"{device} has not enough memory for batches of {batch_size}: lower --batch-size"
            ) from None
    report(results, sweeps)
    if json:
        files.write_text(json, as_json(results, sweeps, settings))
    statuses = [*(result.status for result in results), *(result.status for result in sweeps)]
    if "mismatch" in statuses or "corrupt" in statuses:
        return 1
    if all(status == "skipped" for status in statuses):
        print("verify.py: no accuracy could be recomputed", file=sys.stderr)
        return 2
    return 0


def chosen_checkpoints(names: list[str], embedded: bool, everything: bool) -> list[Checkpoint]:
    """Return the checkpoints that the command line names; `--embedded` is the default."""
    if bool(names) + embedded + everything > 1:
        raise cli.UsageError("give names, or --embedded, or --all: not several of them")
    if everything:
        return list(manifest.load().values())
    if not names:
        return [checkpoint for checkpoint in manifest.load().values() if checkpoint.bundle]
    try:
        checkpoints = [manifest.find(name) for name in names]
    except LookupError as error:
        raise cli.UsageError(str(error.args[0])) from None
    return list({checkpoint.name: checkpoint for checkpoint in checkpoints}.values())


def usable_device(name: str) -> str:
    try:
        torch.empty(1, device=name).add(1)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise cli.UsageError(f"device {name!r} cannot be used: {reason}") from None
    return name


def report(results: list[Result], sweeps: list[Sweep]) -> None:
    """Print the tables and, below them, a line for each thing to know."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)  # a file has room for a row
    for same_task in by_task(results):
        console.print(result_table(same_task))
    for imported in sweeps:
        if imported.runs:
            console.print(sweep_table(imported))
    lines = [summary(same_task) for same_task in by_task(results)]
    lines += skipped([*results, *sweeps])
    for imported in sweeps:
        lines += sweep_notes(imported)
    for result in results:
        lines += notes(result)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True, highlight=False)


def by_task(results: list[Result]) -> list[list[Result]]:
    """Group results by the task of the network."""
    groups = [[result for result in results if result.task == task] for task in METRICS]
    return [group for group in groups if group]


def result_table(results: list[Result]) -> Table:
    """Make a table with one row per checkpoint and kind of inference statistics."""
    metrics = METRICS[results[0].task]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("evaluated on", overflow="fold")
    table.add_column("images", justify="right")
    table.add_column("statistics")
    for metric in metrics.values():
        table.add_column(f"{metric} %\nreported", justify="right")
        table.add_column("recomputed", justify="right")
    for column in ("near-\nties", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("status")
    for result in results:
        status = f"[{STYLES[result.status]}]{result.status}"
        name = (result.name, f"{result.dataset} {result.split}", f"{result.images:,}")
        if not result.scores:
            table.add_row(*name, *[""] * 6, f"{result.seconds:.1f}", status)
        for row, score in enumerate(result.scores):
            columns = (score.reported, score.recomputed)
            table.add_row(
                *(name if row == 0 else ("", "", "")),
                score.statistics,
                *(percent(column.get(key)) for key in metrics for column in columns),
                near_ties(result) if score.statistics == "expected" else "",
                *((f"{result.seconds:.1f}", status) if row == 0 else ("", "")),
            )
    return table


def near_ties(result: Result) -> str:
    if result.task == "segmentation":
        return f"{result.near_tie_pixels:,} pixels ({result.reordered_pixels:,} moved)"
    moved = f" ({len(result.reordered)} moved)" if result.reordered else ""
    return f"{len(result.near_ties)}{moved}"


def sweep_table(result: Sweep) -> Table:
    """Make a table with one row per run of an imported checkpoint."""
    table = Table(title=f"{result.name}: published top-1 {result.published:.2f} %", box=SIMPLE_HEAD)
    table.add_column("inputs")
    table.add_column("statistics")
    for column in ("top-1 %", "top-5 %", "difference", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("reproduces it")
    for run in result.runs:
        table.add_row(
            run.inputs.replace("[", "\\["),
            f"{run.statistics} ({run.draws} draws)" if run.draws > 1 else run.statistics,
            percent(run.top1),
            percent(run.top5),
            f"{run.top1 - result.published:+.2f}",
            percent(result.tolerance[run.inputs]),
            "[green]yes" if run.reproduces else "no",
        )
    return table


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def summary(results: list[Result]) -> str:
    """Say which columns of the manifest were recomputed, and which were not."""
    checked = dict.fromkeys(item for result in results for item in result.checked)
    evaluated = {score.statistics for result in results for score in result.scores}
    reported = {
        statistics
        for result in results
        for statistics in manifest.find(result.name).reported.statistics
    }
    metrics = " and ".join(METRICS[results[0].task].values())
    accuracy = [f"{metrics} ({', '.join(sorted(evaluated))})"] if evaluated else []
    line = f"Recomputed and compared: {', '.join([*checked, *accuracy]) or 'nothing'}."
    if missing := sorted(reported - evaluated):
        line += f" Not recomputed: {metrics} ({', '.join(missing)})"
        line += "; add --statistics all." if evaluated else "."
    return line


def skipped(results: Iterable[Result | Sweep]) -> list[str]:
    """Make one line per reason for which accuracy was not recomputed."""
    names: dict[str, list[str]] = {}
    for result in results:
        if result.status == "skipped":
            names.setdefault(result.reasons[-1], []).append(result.name)
    return [f"Skipped {', '.join(same)}: {reason}" for reason, same in names.items()]


def sweep_notes(result: Sweep) -> list[str]:
    if result.status == "skipped":
        return []
    runs = [f"{run.statistics} statistics on inputs with {run.inputs}" for run in result.reproduced]
    reasons = result.reasons or [f"the published accuracy is that of {', '.join(runs)}"]
    return [f"{result.name}: {result.status}: {reason}" for reason in reasons]


def notes(result: Result) -> list[str]:
    lines = [f"{result.name}: {note}" for note in result.notes]
    if result.status != "skipped":
        lines += [f"{result.name}: {result.status}: {reason}" for reason in result.reasons]
    if result.reordered:
        images = ", ".join(map(str, result.reordered[:SHOWN]))
        rest = len(result.reordered) - SHOWN
        lines.append(
            f"{result.name}: images {images}{f' and {rest:,} more' if rest > 0 else ''} have "
            f"logits closer than {result.near_tie_bound:g} in another order (float rounding)"
        )
    return lines


def as_json(results: list[Result], sweeps: list[Sweep], settings: Settings) -> str:
    versions = {"torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__}
    document = {
        "device": settings.device,
        "batch_size": settings.batch_size,
        "versions": versions,
        "checkpoints": [asdict(result) for result in results],
        "upstream": [asdict(result) for result in sweeps],
    }
    return dumps(document, indent=2) + "\n"
