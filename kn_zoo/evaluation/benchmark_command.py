"""Measure the cost of normalization: time and memory of one network with different layers in it.

    python eval/benchmark.py                        KNResNet-18 and -50 at 32 and 224 px, layers
    python eval/benchmark.py knpreactresnet20_cifar --device cuda --batch-size 128 --output FILE.csv
    python eval/benchmark.py --quick                two minutes on two cores
    python eval/benchmark.py --private              private training steps, with Opacus
    python eval/benchmark.py --render               results/*.csv into the tables of the documents

Chosen cells can be measured and merged into the results of the same machine and versions; the bare
convolutions are timed beside them, as every ratio is to them:

    python eval/benchmark.py knresnet18_cifar --dtype bfloat16 --mode compiled \\
        --variant group_norm --update
    python eval/benchmark.py knpreactresnet20_cifar --batch-size 2 --task train --dtype float32 \\
        --variant kernel_norm --variant group_norm --variant batch_norm --update

The variants are described in kn_zoo/evaluation/variants.py. Before the measurement the layers are
compared with the paper's formulas in float64; the header of the CSV file has the errors.
"""

import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console

import kn_zoo
from kn_zoo import KNConv2d, cli
from kn_zoo.checkpoints import bundle, files
from kn_zoo.evaluation import private_benchmark
from kn_zoo.evaluation.benchmark import ROUNDS, Job, run
from kn_zoo.evaluation.benchmark_check import errors
from kn_zoo.evaluation.measurements import (
    BASELINE,
    MODES,
    TASKS,
    VARIANTS,
    Layer,
    Results,
    Setting,
    Workload,
    read,
)
from kn_zoo.evaluation.report import print_tables, render
from kn_zoo.evaluation.variants import input_size

ROOT = Path(__file__).parents[2]
LAYERS = "layers"  # on the command line: the sweep over single layers
MODELS = ["knresnet18_cifar", "knresnet50", "knresnet18", LAYERS]
SWEEP = [*(Layer(kernel, 64) for kernel in (1, 3, 5, 7)), Layer(3, 16), Layer(3, 256)]
SWEEP_PIXELS = 32
BATCH = {"cpu": {32: 32, 224: 8}, "cuda": {32: 256, 224: 64}}  # by side of the image, in pixels
QUICK_BATCH = 8
CHECKED = {"eager": (1, 3, 5, 7), "compiled": (3,)}  # kernel sizes; --quick checks the eager ones
MINUTES = {"quick": 1.6, "cpu": 60.0, "cuda": 7.5}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

DTYPES = ("float32", "bfloat16")


@app.command(epilog="Exit status: 0; 2 for bad usage; 130 if interrupted, what was measured kept.")
def main(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NETWORK]...", help=f'Registered networks, or "{LAYERS}" for single layers.'
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda if available.")] = (
        "cuda" if torch.cuda.is_available() else "cpu"
    ),
    batch_size: Annotated[int | None, typer.Option(min=1, help="For every network.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help=f"Only {', '.join(VARIANTS)}; may be repeated.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Only {', '.join(DTYPES)}; may be repeated.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help=f"Only {', '.join(MODES)}; may be repeated.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help=f"Only {', '.join(TASKS)}; may be repeated.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Merge into the CSV file instead of replacing it.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="At most; default: 60, with a GPU 7.5.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two minutes: small batches, fewer rounds.")
    ] = False,
    private: Annotated[
        bool,
        typer.Option("--private", help="Private training steps on a CPU instead (20 minutes)."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="CSV file to write; plots are written beside it.")
    ] = None,
    render_only: Annotated[
        bool,
        typer.Option("--render", help="Only write results/*.csv into plots and documents."),
    ] = False,
) -> int:
    """Measure what kernel normalization costs, as ratios to bare convolutions."""
    if render_only:
        for line in render(ROOT):
            print(line)
        return 0
    selected = bool(models or variant or dtype or mode or task or batch_size)
    if private:
        if selected or update or quick or minutes:
            raise cli.UsageError("--private has one fixed set of steps: give only --output with it")
        return measure_private(output or ROOT / "results" / "private_cpu.csv")
    check_device(device)
    names = list(dict.fromkeys(models or (["knresnet18_cifar", LAYERS] if quick else MODELS)))
    check_models(names)
    kind = device.partition(":")[0]
    dtypes = chosen("--dtype", dtype, DTYPES) or default_dtypes(kind, quick)
    modes = chosen("--mode", mode, MODES) or MODES
    tasks = chosen("--task", task, TASKS) or tuple(TASKS)
    variants = chosen("--variant", variant, VARIANTS) or tuple(VARIANTS)
    output = checked_output(output, f"{'quick' if quick else 'benchmark'}_{kind}", selected, update)

    start, header = time.monotonic(), environment(device)
    previous = checked_previous(output, header) if update else None
    workloads = [*plan_workloads(names, kind, batch_size, quick)]
    jobs = [*plan(workloads, device, dtypes, modes, tasks, variants)]
    if not jobs:
        raise cli.UsageError("this selection has no cells: see --help for networks and variants")
    print("comparing the layers with float64 ...", file=sys.stderr)
    header |= errors(device, {"eager": CHECKED["eager"]} if quick else CHECKED)
    seconds = 60 * (minutes or MINUTES["quick" if quick else kind]) - (time.monotonic() - start)
    rows, interrupted = run(jobs, seconds, ROUNDS[0 if quick else 1])
    if previous:
        previous.header["updated"] = "; ".join(
            filter(None, [previous.header.get("updated"), f"{header['date']} ({header['load']})"])
        )
        results = previous.updated(rows, variants if variant else VARIANTS)
    else:
        results = Results(header, rows)
        if interrupted:  # and leave earlier, whole results alone
            output = output.with_name(f"partial_{output.name}")
    # Here, because the process that measures does not need matplotlib.
    from kn_zoo.evaluation.benchmark_figures import plot

    files.write_text(output, results.to_csv())
    written = [output, *plot(results, output)]
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)  # a file has room for a row
    print_tables(results, console)
    console.print("written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return 130 if interrupted else 0


def measure_private(output: Path) -> int:
    """Measure private training steps and print them."""
    try:
        import opacus
    except ModuleNotFoundError:
        raise cli.UsageError("--private needs Opacus: pip install 'kn_zoo[privacy]'") from None
    header = environment("cpu")
    header["versions"] += f", Opacus {opacus.__version__}"
    header["step"] = (
        f"{private_benchmark.NETWORK}, {private_benchmark.BATCH_SIZE} images of 32 x 32"
    )
    output = checked_output(output, "private_cpu", False, False)
    measured = private_benchmark.measure()
    files.write_text(output, private_benchmark.to_csv(measured, header))
    print(f"{private_benchmark.table(measured)}\nwritten: {output}")
    return 0


def chosen(option: str, names: list[str] | None, known: Iterable[str]) -> tuple[str, ...]:
    """Return the values of a repeated option in the order of `known`; a typo is bad usage."""
    for name in names or ():
        if name not in known:
            raise cli.UsageError(f"{option} {name!r}: use {', '.join(known)}")
    return tuple(name for name in known if name in (names or ()))


def default_dtypes(kind: str, quick: bool) -> tuple[str, ...]:
    """Return the number format of the goals first."""
    dtypes = ("bfloat16", "float32") if kind == "cuda" else ("float32", "bfloat16")
    return dtypes[:1] if quick else dtypes


def checked_output(output: Path | None, name: str, selected: bool, update: bool) -> Path:
    if output is None:
        output = ROOT / "results" / f"{name}.csv"
        output.parent.mkdir(exist_ok=True)
        if selected and not update and output.exists():
            raise cli.UsageError(
                f"{output} has more than the selected cells: add --update to merge them into it, "
                "or name another file with --output"
            )
    if output.suffix != ".csv" or not output.parent.is_dir():
        raise cli.UsageError(f"--output {output}: name a .csv file in a folder that exists")
    return output


def checked_previous(output: Path, header: dict[str, str]) -> Results:
    """Read the results to be updated; they must be of this machine and these versions."""
    try:
        previous = read(output)
    except (OSError, ValueError) as error:
        raise cli.UsageError(f"--update: {error}: measure without it first") from None
    for name in ("device", "versions"):
        if previous.header.get(name) != header[name]:
            raise cli.UsageError(
                f"--update: {output} was measured with {previous.header.get(name)}, here is "
                f"{header[name]}: measure without --update, or name another file with --output"
            )
    return previous


def plan_workloads(
    names: list[str], kind: str, batch_size: int | None, quick: bool
) -> Iterator[Workload]:
    """Yield the networks, then the layers of the sweep, with their inputs."""

    def batch(pixels: int) -> int:
        default = BATCH[kind][32 if pixels <= 64 else 224]
        return batch_size or (QUICK_BATCH if quick else default)

    for name in names:
        if name != LAYERS:
            channels, pixels, _ = input_size(name)
            yield Workload(name, channels, pixels, batch(pixels))
    if LAYERS in names:
        for layer in SWEEP:
            yield Workload(layer.name, layer.channels, SWEEP_PIXELS, batch(SWEEP_PIXELS))


def plan(
    workloads: list[Workload],
    device: str,
    dtypes: tuple[str, ...],
    modes: tuple[str, ...],
    tasks: tuple[str, ...],
    variants: tuple[str, ...],
) -> Iterator[Job]:
    """Yield what to measure, most important first: the number format of the goals, eager.

    Single layers are measured in the first number format and mode only.
    """
    for dtype in dtypes:
        for mode in modes:
            for workload in workloads:
                for task in tasks:
                    setting = Setting(workload, device, task, dtype, mode)
                    if setting.layer and (dtype, mode) != (dtypes[0], modes[0]):
                        continue
                    present = [name for name in setting.variants if name in variants]
                    if present:
                        yield Job(setting, tuple(dict.fromkeys([BASELINE, *present])))


def environment(device: str) -> dict[str, str]:
    """Describe hardware, versions and conventions, for the header of the results."""
    header = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{bundle.cpu_name()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "load": f"{os.getloadavg()[0]:.1f} processes were running when it started",
        "versions": f"kn_zoo {kn_zoo.__version__}, torch {torch.__version__}, "
        f"timm {timm.__version__}, Python {platform.python_version()}",
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        header["device"] = f"{properties.name}, {memory}; host: {header['device']}"
        cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        header["versions"] += f", {cuda}"
    header["times"] = (
        "milliseconds per step, median [minimum, maximum] over rounds in which the variants take "
        "turns; a ratio is to conv only, the same network with bare convolutions, in the same round"
    )
    header["train"] = "forward, cross entropy, backward, SGD step with momentum"
    header["bfloat16"] = "autocast in training, the whole network's type at inference"
    header["memory"] = (
        "the allocator's peak in a step, parameters and optimizer included"
        if device != "cpu"
        else "bytes held for backward (distinct storages that autograd saves, without parameters)"
    )
    header["layout"] = "channels_last"
    return header


def check_models(names: list[str]) -> None:
    for name in names:
        if name == LAYERS:
            continue
        if "." in name or not timm.is_model(name):
            known = " ".join(timm.list_models("kn*"))
            raise cli.UsageError(f"no network {name!r}: use {LAYERS} or some of {known}")
        with torch.device("meta"):
            network = timm.create_model(name)
        if not any(isinstance(module, KNConv2d) for module in network.modules()):
            raise cli.UsageError(f"{name} has no KNConv2d to replace: use one of kn*")


def check_device(device: str) -> None:
    if device != "cpu" and not device.startswith("cuda"):
        raise cli.UsageError(f"--device {device!r}: use cpu or cuda")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise cli.UsageError(f"device {device!r} cannot be used: {reason}") from None
