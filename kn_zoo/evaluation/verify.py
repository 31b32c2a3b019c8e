"""Evaluate trained weights and compare them, image by image, with what was stored and reported.

    python eval/verify.py                                   the bundles that travel with the package
    python eval/verify.py knpreactresnet20_cifar.cifar100 --device cuda
    python eval/verify.py --all --data-dir DIR --json result.json

Under the inference statistics "expected" the five best classes of every image and their logits must
be those of the bundle's predictions.npz up to float rounding (`kn_zoo.evaluation.predict.compare`), and the
accuracy must be the manifest's. For "plain" and "sampled" only the accuracy is stored: "plain" may
be off by its near-ties, "sampled" is random (seed 0) and may be off by what chance explains.

An imported weight has no stored predictions, and its authors say neither how they normalized images
nor that other statistics would do. It is evaluated under all three, with and without mean and
standard deviation, and the table tells which of the six reproduces the published accuracy:

    python eval/verify.py knresnet50.upstream_in1k --data-dir IMAGENET --json result.json
    kn-zoo pin result.json                                  hash and accuracies into the manifest
"""

import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from json import dumps
from math import sqrt
from os import cpu_count
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from kn_zoo import cli, data, set_inference_statistics
from kn_zoo.checkpoints import bundle, loading, manifest
from kn_zoo.checkpoints.manifest import Accuracy, Checkpoint, File
from kn_zoo.checkpoints.predictions import NEAR_TIE, Predictions, compare
from kn_zoo.evaluation import predict as evaluate

DRAWS = 2  # passes under "sampled"; the images on which two differ tell how much one varies
DEVIATIONS = 4  # standard deviations that a "sampled" accuracy may be away from the reported one
SHOWN = 10  # images named in a line of text; --json names all
ROUNDING = 0.005  # of an accuracy in percent that is published with two decimals
INPUTS = {
    "mean and std": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "[0, 1]": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}  # to an imported network
STYLES = {"match": "green", "mismatch": "bold red", "corrupt": "bold red", "skipped": "yellow"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


class Statistics(str, Enum):
    expected = "expected"
    plain = "plain"
    sampled = "sampled"


@dataclass(frozen=True)
class Settings:
    """How to evaluate; the fields are the command's options."""

    data_dir: Path | None
    download: bool
    device: str
    batch_size: int
    statistics: str


@dataclass
class Result:
    """A row of the table. Accuracies are in percent; images are numbered from 0."""

    name: str
    dataset: str
    split: str
    images: int
    statistics: str
    status: str = "match"
    reasons: list[str] = field(default_factory=list)
    reported: dict[str, float | None] = field(default_factory=dict)
    found: dict[str, float] = field(default_factory=dict)
    near_tie_bound: float = NEAR_TIE
    mismatches: list[int] = field(default_factory=list)
    reordered: list[int] = field(default_factory=list)
    near_ties: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Run:
    """An imported weight under one kind of inputs and statistics; accuracies are in percent."""

    inputs: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    statistics: str
    draws: int
    top1: float
    top5: float
    reproduces: bool


@dataclass
class Sweep:
    """The six runs of an imported weight; `allowed` is what chance explains, in percent."""

    name: str
    images: int
    published: float
    file: File | None = None
    status: str = "match"
    reasons: list[str] = field(default_factory=list)
    allowed: dict[str, float] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    reproduced: list[Run] = field(default_factory=list)  # the nearest first
    seconds: float = 0.0


def sweep(weight: Checkpoint, settings: Settings) -> Sweep:
    """Evaluate an imported weight in every way that its publication leaves open."""
    start = time.perf_counter()
    (published,) = weight.reported.statistics.values()
    result = Sweep(weight.name, weight.dataset.images, published.top1)
    try:
        images = whole_data_set(weight, settings)  # before 100 MB are downloaded
        for inputs, (mean, std) in INPUTS.items():
            run_inputs(weight, settings, images, (inputs, mean, std), result)
        result.file = loading.expected_file(weight)
        result.reproduced = sorted(
            (run for run in result.runs if run.reproduces),
            key=lambda run: abs(run.top1 - published.top1),
        )
        if not result.reproduced:
            result.status, result.reasons = "mismatch", ["no run has the published accuracy"]
    except (data.MissingData, loading.MissingWeights) as error:
        result.status, result.reasons = "skipped", [str(error)]
    except loading.CorruptWeights as error:
        result.status, result.reasons = "corrupt", [str(error)]
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def run_inputs(
    weight: Checkpoint,
    settings: Settings,
    images: data.Images,
    inputs: tuple[str, tuple[float, ...], tuple[float, ...]],
    result: Sweep,
) -> None:
    """Add the runs under one kind of inputs. Two draws of "sampled" tell what chance does there."""
    name, mean, std = inputs
    overlay = {"mean": mean, "std": std}
    model = timm.create_model(weight.name, pretrained=True, pretrained_cfg_overlay=overlay)
    for statistics in ("sampled", "expected", "plain"):
        set_inference_statistics(model, statistics)
        torch.manual_seed(0)
        draws = [
            predict(model, images, weight, settings)
            for _ in range(DRAWS if statistics == "sampled" else 1)
        ]
        if statistics == "sampled":
            chance = DEVIATIONS * deviation([draw.hits(1) for draw in draws], 1)
            result.allowed[name] = 100 * chance / result.images + ROUNDING
        top1 = sum(draw.top1 for draw in draws) / len(draws)
        top5 = sum(draw.top5 for draw in draws) / len(draws)
        near = abs(top1 - result.published) <= result.allowed[name]
        result.runs.append(Run(name, mean, std, statistics, len(draws), top1, top5, near))


def verify(weight: Checkpoint, settings: Settings) -> Result:
    """Evaluate one weight; what is wrong with it or its data becomes the status of the result."""
    start = time.perf_counter()
    of = weight.dataset
    result = Result(weight.name, of.name, of.split, of.images, settings.statistics)
    try:
        evaluate_weight(weight, settings, result)
        result.status = "mismatch" if result.reasons else "match"
    except (data.MissingData, loading.MissingWeights) as error:
        # What should have come with the package and has not is damage; the rest can be had.
        damaged = weight.bundle and weight.file and isinstance(error, loading.MissingWeights)
        result.status, result.reasons = "corrupt" if damaged else "skipped", [str(error)]
    except loading.CorruptWeights as error:
        result.status, result.reasons = "corrupt", [str(error)]
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def evaluate_weight(weight: Checkpoint, settings: Settings, result: Result) -> None:
    """Fill in `result`; a reason is added for whatever does not match."""
    if weight.bundle or not weight.available:  # a hash, or what to do, needs no images
        loading.read(loading.locate(weight), weight)
    reported = weight.reported.statistics.get(settings.statistics)
    if reported is None:
        known = " or ".join(weight.reported.statistics)
        raise data.MissingData(f"its accuracy was reported under other statistics: use {known}")
    images = whole_data_set(weight, settings)
    stored, bound = stored_predictions(weight)
    model = timm.create_model(weight.name, pretrained=True)
    if settings.statistics != "expected":  # the default, and all that other normalizations have
        set_inference_statistics(model, settings.statistics)
    torch.manual_seed(0)  # "sampled" is the only user of random numbers
    draws = [
        predict(model, images, weight, settings)
        for _ in range(DRAWS if settings.statistics == "sampled" else 1)
    ]
    result.reported = {"top1": reported.top1, "top5": reported.top5}
    result.found = {
        "top1": sum(draw.top1 for draw in draws) / len(draws),
        "top5": sum(draw.top5 for draw in draws) / len(draws),
    }
    if settings.statistics == "expected":
        against_stored(draws[0], stored, bound, images.class_names, result)
    check_accuracy(draws, stored, reported, result)


def whole_data_set(weight: Checkpoint, settings: Settings) -> data.Images:
    of = weight.dataset
    images = data.load(of.name, of.split, settings.data_dir, download=settings.download)
    if len(images) != of.images:
        raise data.MissingData(
            f"{of.name} has {len(images):,} images here, the accuracy was measured on "
            f"{of.images:,}: complete the folder"
        )
    return images


def stored_predictions(weight: Checkpoint) -> tuple[Predictions, float]:
    """The predictions of the bundle and the bound of its near-ties, never above this version's."""
    folder = bundle.get(weight)
    try:
        stored, bound = folder.predictions(), folder.near_tie_bound
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise loading.CorruptWeights(
            f"{folder.folder / bundle.PREDICTIONS} cannot be read ({type(error).__name__}): "
            "get the bundle again, or restore the file with git"
        ) from None
    return stored, min(bound, NEAR_TIE)


def predict(
    model: nn.Module, images: data.Images, weight: Checkpoint, settings: Settings
) -> Predictions:
    in_memory = weight.dataset.name != "imagenet-1k"
    return evaluate.predict(
        model,
        images,
        batch_size=settings.batch_size,
        device=settings.device,
        workers=0 if in_memory else min(8, cpu_count() or 1),
        progress=weight.name,
    )


def against_stored(
    found: Predictions,
    stored: Predictions,
    bound: float,
    class_names: Sequence[str],
    result: Result,
) -> None:
    """Compare image by image, and note which images differ."""
    result.near_tie_bound = bound
    try:
        comparison = compare(found, stored, bound)
    except ValueError as error:
        result.reasons.append(f"predictions.npz does not fit the data set: {error}")
        return
    result.mismatches = comparison.mismatches.tolist()
    result.reordered = comparison.reordered.tolist()
    result.near_ties = comparison.near_ties.tolist()
    if result.mismatches:
        shown = [describe(i, found, stored, class_names) for i in result.mismatches[:SHOWN]]
        rest = len(result.mismatches) - len(shown)
        result.reasons.append(
            f"{len(result.mismatches):,} of {result.images:,} images differ from predictions.npz: "
            f"{', '.join(shown)}{f' and {rest:,} more' if rest else ''}"
        )


def describe(
    image: int, found: Predictions, stored: Predictions, class_names: Sequence[str]
) -> str:
    """`12 (found cat, stored dog)`, or what else differs on an image whose first class does not."""
    if found.targets[image] != stored.targets[image]:
        return f"{image} (another target)"
    first, before = int(found.indices[image, 0]), int(stored.indices[image, 0])
    if first != before:
        known = range(len(class_names))
        was = class_names[before] if before in known else f"class {before}"
        return f"{image} (found {class_names[first]}, stored {was})"
    if (found.indices[image] != stored.indices[image]).any():
        return f"{image} (other classes after the first)"
    return f"{image} (logits {np.abs(found.logits[image] - stored.logits[image]).max():.2g} apart)"


def check_accuracy(
    draws: list[Predictions], stored: Predictions, reported: Accuracy, result: Result
) -> None:
    """Compare the number of images that are right with the reported one, for top-1 and top-5."""
    for name, k, percent in (("top-1", 1, reported.top1), ("top-5", 5, reported.top5)):
        if percent is None:
            continue
        hits = [draw.hits(k) for draw in draws]
        found = sum(int(hit.sum()) for hit in hits) / len(hits)
        expected = percent * result.images / 100
        if result.statistics == "sampled":
            allowed = DEVIATIONS * deviation(hits, reported.draws)
        elif result.statistics == "plain":
            allowed = near_ties(draws[0], k)
        else:
            allowed = 0
            ties = result.reordered  # their gains and losses are known
            expected += int(hits[0][ties].sum()) - int(stored.hits(k)[ties].sum())
        if abs(found - expected) > allowed + 0.5:  # half an image: the percentage was rounded
            result.reasons.append(
                f"{name}: {found:g} of {result.images:,} images are right, reported were "
                f"{expected:.0f}" + (f" (+- {allowed:.0f} may be chance)" if allowed else "")
            )


def near_ties(found: Predictions, k: int) -> int:
    """How many images may gain or lose their class among the best `k` on other hardware."""
    assert found.missed is not None  # it comes from an evaluation
    logits = np.column_stack([found.logits, found.missed])
    return int(np.count_nonzero(logits[:, k - 1] - logits[:, k] <= NEAR_TIE))


def deviation(hits: list[np.ndarray], reported_draws: int) -> float:
    """Standard deviation, in images, of (mean of two draws) - (mean of the reported draws).

    An image that is right with probability p differs between two draws with probability 2 p (1-p),
    twice its variance: the variance of a draw is half the number d of images that differ. As d is
    random too, with a deviation of sqrt(d), it is taken a little high: (sqrt(d) + 1)^2.
    """
    differing = (sqrt(np.count_nonzero(hits[0] != hits[1])) + 1) ** 2
    return sqrt(differing / 2 * (1 / len(hits) + 1 / reported_draws))


def chosen_weights(names: list[str], embedded: bool, everything: bool) -> list[Checkpoint]:
    """The weights that the command line names; `--embedded` is the default."""
    if bool(names) + embedded + everything > 1:
        raise cli.UsageError("give names, or --embedded, or --all: not several of them")
    if everything:
        return list(manifest.load().values())
    if not names:
        return [weight for weight in manifest.load().values() if weight.bundle]
    try:
        found = [manifest.find(name) for name in names]
    except LookupError as error:
        raise cli.UsageError(str(error)) from None
    return list({weight.name: weight for weight in found}.values())


def usable_device(name: str) -> str:
    try:
        torch.empty(1, device=name).add(1)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise cli.UsageError(f"device {name!r} cannot be used: {reason}") from None
    return name


def table(results: list[Result], statistics: str) -> Table:
    """One row a weight."""
    rows = Table(title=f"Inference statistics: {statistics}", box=SIMPLE_HEAD)
    rows.add_column("weight", overflow="fold")
    rows.add_column("evaluated on", overflow="fold")
    for column in ("images", "top-1 %\nreported", "found", "top-5 %\nreported", "found"):
        rows.add_column(column, justify="right")
    for column in ("near-\nties", "seconds"):
        rows.add_column(column, justify="right")
    rows.add_column("status")
    for row in results:
        ties = f"{len(row.near_ties)}" + (f" ({len(row.reordered)} moved)" * bool(row.reordered))
        rows.add_row(
            row.name,
            f"{row.dataset} {row.split}",
            f"{row.images:,}",
            *(percent(of.get(key)) for key in ("top1", "top5") for of in (row.reported, row.found)),
            ties if row.found and statistics == "expected" else "",
            f"{row.seconds:.1f}",
            f"[{STYLES[row.status]}]{row.status}",
        )
    return rows


def sweep_table(result: Sweep) -> Table:
    """One row a run of an imported weight."""
    rows = Table(title=f"{result.name}: published top-1 {result.published:.2f} %", box=SIMPLE_HEAD)
    rows.add_column("inputs")
    rows.add_column("statistics")
    for column in ("top-1 %", "top-5 %", "off by", "chance allows"):
        rows.add_column(column, justify="right")
    rows.add_column("reproduces it")
    for run in result.runs:
        rows.add_row(
            run.inputs.replace("[", "\\["),
            f"{run.statistics} ({run.draws} draws)" if run.draws > 1 else run.statistics,
            percent(run.top1),
            percent(run.top5),
            f"{run.top1 - result.published:+.2f}",
            percent(result.allowed[run.inputs]),
            "[green]yes" if run.reproduces else "no",
        )
    return rows


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def report(results: list[Result], sweeps: list[Sweep], settings: Settings) -> None:
    """The tables and, below them, a line for each thing to know."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 132)  # a file has room for a row
    if results:
        console.print(table(results, settings.statistics))
    for found in sweeps:
        if found.runs:
            console.print(sweep_table(found))
        best = [
            f"{run.statistics} statistics on inputs with {run.inputs}" for run in found.reproduced
        ]
        notes = found.reasons or [f"the published accuracy is that of {', '.join(best)}"]
        for note in notes:
            console.print(f"{found.name}: {found.status}: {note}", markup=False, soft_wrap=True)
    for row in results:
        notes = [f"{row.status}: {reason}" for reason in row.reasons]
        if row.reordered:
            images = ", ".join(map(str, row.reordered[:SHOWN]))
            rest = len(row.reordered) - SHOWN
            notes.append(
                f"images {images}{f' and {rest:,} more' if rest > 0 else ''} have logits closer "
                f"than {row.near_tie_bound:g} in another order, which is float rounding"
            )
        for note in notes:
            console.print(f"{row.name}: {note}", markup=False, soft_wrap=True)


def as_json(results: list[Result], sweeps: list[Sweep], settings: Settings) -> str:
    made_with = {"torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__}
    document = {
        "device": settings.device,
        "batch_size": settings.batch_size,
        "versions": made_with,
        "weights": [asdict(result) for result in results],
        "upstream": [asdict(found) for found in sweeps],
    }
    return dumps(document, indent=2) + "\n"


@app.command(epilog="Exit status: 0 all match; 1 a mismatch or a corrupt file; 2 bad usage, or "
             "nothing could be verified.")  # fmt: skip
def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="architecture[.tag]")
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="All that travel with the package (default).")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="All of the manifest, from the Hub too.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data sets, or of the one needed.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing CIFAR-100.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="No influence on the result.")] = 256,
    statistics: Annotated[
        Statistics, typer.Option(help="Inference statistics; imported weights: always all.")
    ] = Statistics.expected,
    json: Annotated[Path | None, typer.Option(help="Write the results here too.")] = None,
) -> int:
    """Verify weights: accuracy against the manifest, each image against the bundle.

    Weights whose data set or file is not there are listed as skipped, with how to get it. A weights
    file that is not the one of the manifest (its SHA-256 differs) is corrupt: it is not loaded, and
    the others are verified.
    """
    chosen = chosen_weights(names or [], embedded, everything)
    if json and (json.is_dir() or not json.parent.is_dir()):
        raise cli.UsageError(f"--json: {json} cannot be written: name a file in a folder")
    settings = Settings(data_dir, download, usable_device(device), batch_size, statistics.value)
    results: list[Result] = []
    sweeps: list[Sweep] = []
    for weight in chosen:
        try:
            if weight.upstream:
                sweeps.append(sweep(weight, settings))
            else:
                results.append(verify(weight, settings))
        except torch.OutOfMemoryError:
            raise cli.UsageError(
                f"{device} has not enough memory for batches of {batch_size}: lower --batch-size"
            ) from None
    report(results, sweeps, settings)
    if json:
        manifest.write_text(json, as_json(results, sweeps, settings))
    statuses = [found.status for found in (*results, *sweeps)]
    if "mismatch" in statuses or "corrupt" in statuses:
        return 1
    if all(status == "skipped" for status in statuses):
        print("verify.py: nothing could be verified", file=sys.stderr)
        return 2
    return 0
