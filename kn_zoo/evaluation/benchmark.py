"""What kernel normalization costs: time and memory of one network with different layers in it.

    python eval/benchmark.py                        KNResNet-18 and -50 at 32 and 224 pixels
    python eval/benchmark.py knpreactresnet20_cifar --device cuda --batch-size 128
    python eval/benchmark.py --quick                two minutes on two cores
    python eval/benchmark.py --render               results/*.csv into the tables of the documents

Every KNConv2d of the network is replaced; the rest, activations included, is the same, and a ReLU
that a KNConv2d takes upon itself follows what replaces it, in place:

    floor      bare convolutions, the final KernelNorm taken out
    ours       kn_zoo's layer              frozen     kn_zoo.freeze of it, for inference
    batch      BatchNorm after each convolution, without its bias; no final KernelNorm
    group      the same with GroupNorm of 32 groups, or the largest number below that divides
    published  Algorithm 1 of the paper as written, which unfolds every window
    namesake   another network: the ResNet of this name, timm's or for low resolution ours

One combination of network, task, number format and mode at a time: its lines take turns, round by
round and to and fro, after warm-up. A ratio divides two times of one round; the median over the
rounds is reported. Each combination runs in a process that is given up when it is killed or late.
Before all that the layers are compared with the paper's formulas in float64; the header tells the
errors.
"""

import gc
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from datetime import datetime, timezone
from logging import ERROR, getLogger
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import kn_zoo
from kn_zoo import KernelNorm2d, KNConv2d, cli, freeze
from kn_zoo.checkpoints import bundle, manifest
from kn_zoo.evaluation.benchmark_check import errors
from kn_zoo.evaluation.report import TASKS, Layer, Results, Row, Setting, layer_of, render, summary
from kn_zoo.layers.reference import ReferenceKNConv2d

ROOT = Path(__file__).parents[2]
MODELS = ["knresnet18_cifar", "knresnet50", "knresnet18", "knresnet50_cifar"]
SWEEP = [*(Layer(kernel, 64) for kernel in (1, 3, 5, 7)), Layer(3, 16), Layer(3, 256)]
SWEEP_SIDE = 32  # pixels
BATCH = {"cpu": {32: 64, 224: 16}, "cuda": {32: 256, 224: 64}}  # by side of the image, in pixels
QUICK_BATCH = 8
CHECKED = {"eager": (1, 3, 5, 7), "compiled": (3,)}  # kernel sizes; --quick checks the eager ones
MINUTES = {"quick": 1.6, "cpu": 60.0, "cuda": 7.5}
WARM_UP_STEPS = 3
SAMPLE_SECONDS = 0.05  # a time is taken over as many steps as fill this
ROUNDS = (3, 9)  # at least, at most; --quick takes the least
LAYER_ROUNDS = 3  # times as many for single layers: small differences of large times
OUT_OF_TIME = "not measured: the time was up; give it more with --minutes, or name one network"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def bare(layer: KNConv2d, bias: bool) -> nn.Module:
    """The convolution of `layer`; nn.Conv2d pads evenly only, anything else is padded before."""
    left, right, top, bottom = layer.padding_sides
    even = left == right and top == bottom
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        pair(layer.kernel_size),
        pair(layer.stride),
        (top, left) if even else 0,
        pair(layer.dilation),
        layer.groups,
        bias,
    )
    conv.weight.data.copy_(layer.weight)
    return conv if even else nn.Sequential(nn.ZeroPad2d(layer.padding_sides), conv)


def pair(numbers: tuple[int, ...]) -> tuple[int, int]:
    return numbers[0], numbers[1]


def batch_norm(layer: KNConv2d) -> nn.Module:
    return nn.Sequential(bare(layer, False), nn.BatchNorm2d(layer.out_channels))


def group_norm(layer: KNConv2d) -> nn.Module:
    channels = layer.out_channels
    groups = next(n for n in range(min(32, channels), 0, -1) if channels % n == 0)
    return nn.Sequential(bare(layer, False), nn.GroupNorm(groups, channels))


def published(layer: KNConv2d) -> nn.Module:
    layer.__class__ = ReferenceKNConv2d  # the same parameters and settings
    return layer


REPLACEMENTS: dict[str, Callable[[KNConv2d], nn.Module]] = {
    "floor": lambda layer: bare(layer, layer.bias is not None),
    "batch": batch_norm,
    "group": group_norm,
    "published": published,
}


def build(name: str, line: str) -> nn.Module:
    """Network `name` with its KNConv2d replaced by what `line` stands for."""
    if line == "namesake":
        other = name.removeprefix("kn")
        if other == name or not timm.is_model(other):
            raise LookupError(f"there is no network {other!r} without kernel normalization")
        channels, _, _ = input_size(name)
        return timm.create_model(other, in_chans=channels)
    if layer := layer_of(name):
        network: nn.Module = nn.Sequential(
            KNConv2d(layer.channels, layer.channels, layer.kernel, padding=layer.kernel // 2)
        )
    else:
        network = timm.create_model(name)
    if line == "ours":
        return network
    if line == "frozen":
        return freeze(network)
    for path, module in list(network.named_modules()):
        if isinstance(module, KNConv2d):
            layers = REPLACEMENTS[line](module)
            if module.relu and line != "published":
                layers = nn.Sequential(layers, nn.ReLU(inplace=True))
            network.set_submodule(path, layers)
        elif isinstance(module, KernelNorm2d) and line != "published":
            network.set_submodule(path, nn.Identity())
    return network


def input_size(name: str) -> tuple[int, int, int]:
    """Channels, height and width of the images that a network is made for."""
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None  # every network of timm's registry that has a KNConv2d has one
    return cfg.input_size


class Contender:
    """One line of a setting, ready to run.

    A training step is forward, cross entropy (of a single layer: a given gradient), backward and
    SGD with momentum, at a learning rate of 0 so that every step does the same work. bfloat16 is
    autocast in training and the whole network's type at inference.
    """

    def __init__(self, setting: Setting, line: str) -> None:
        gc.collect()
        self.setting, self.training = setting, setting.task == "train"
        self.cuda = setting.device.startswith("cuda")
        self.allocated = torch.cuda.memory_allocated(setting.device) if self.cuda else 0
        torch.manual_seed(0)
        low = setting.dtype == "bfloat16"
        self.autocast = low and self.training
        dtype = torch.bfloat16 if low and not self.training else torch.float32
        self.network = build(setting.model, line).train(self.training)
        like: Any = dict(device=setting.device, dtype=dtype)
        self.network.to(memory_format=torch.channels_last, **like)
        self.forward = torch.compile(self.network) if setting.mode == "compiled" else self.network

        layer = layer_of(setting.model)
        shape = (setting.batch_size, setting.channels, setting.pixels, setting.pixels)
        self.x = torch.rand(shape, **like).contiguous(memory_format=torch.channels_last)
        self.target: Tensor | None = None
        if self.training:
            self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.0, momentum=0.9)
            self.x.requires_grad_(layer is not None)
            with torch.no_grad():  # for its shape; not compiled
                out = self.network(self.x)
            classes = torch.randint(out.shape[1], (len(out),), device=setting.device)
            self.target = torch.randn_like(out) if layer else classes

    def output(self) -> Tensor:
        with torch.autocast(self.setting.device.partition(":")[0], torch.bfloat16, self.autocast):
            return self.forward(self.x)

    def backward(self, out: Tensor) -> None:
        assert self.target is not None
        if self.target.dim() == 1:
            F.cross_entropy(out.float(), self.target).backward()
        else:
            out.backward(self.target)

    def step(self) -> None:
        if not self.training:
            with torch.inference_mode():
                self.output()
            return
        self.optimizer.zero_grad()
        self.x.grad = None
        self.backward(self.output())
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        """Seconds a step."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.synchronize()
        return (time.perf_counter() - start) / steps

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.setting.device)

    def memory_mib(self) -> float | None:
        """CUDA: the allocator's peak in a step, with this network's parameters and optimizer.

        CPU: what is held for backward, None at inference.
        """
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.setting.device)
            self.step()
            peak = torch.cuda.max_memory_allocated(self.setting.device)
            return (peak - self.allocated) / 2**20
        return self.held_for_backward() / 2**20 if self.training else None

    def held_for_backward(self) -> int:
        """Bytes of the distinct storages that autograd saves, those of parameters left out."""
        own = {p.untyped_storage().data_ptr() for p in self.network.parameters()}
        held: dict[int, int] = {}

        def note(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            out = self.output()  # as long as it lives nothing saved is freed, so no address is
        self.backward(out)  # counted twice
        return sum(held.values())


def measure(setting: Setting, seconds: float, rounds: int = ROUNDS[1]) -> list[Row]:
    """Time all lines of one setting in turn, for about `seconds`; what fails tells why."""
    started = time.perf_counter()
    torch.compiler.reset()
    torch.backends.cudnn.benchmark = True
    rows = {line: Row(setting, line) for line in setting.lines}
    ready: dict[str, Contender] = {}
    steps: dict[str, int] = {}
    slowest = a_round = 0.0
    for line, row in rows.items():
        start = time.perf_counter()
        # Without the floor and ours the setting would say nothing.
        if len(ready) > 1 and start - started + slowest + ROUNDS[0] * a_round > seconds:
            row.reason = OUT_OF_TIME
            continue
        try:
            contender = Contender(setting, line)
            contender.seconds(WARM_UP_STEPS if setting.device != "cpu" else 1)
            memory = contender.memory_mib()
            row.memory_mib = None if memory is None else round(memory, 3)
            one = contender.seconds(1)
        except Exception as error:
            row.reason = reason(error)
            continue
        ready[line] = contender
        steps[line] = min(100, ceil(SAMPLE_SECONDS / one))
        slowest = max(slowest, time.perf_counter() - start)
        a_round += one * steps[line]
    for number in range(rounds):
        elapsed = time.perf_counter() - started
        if number >= ROUNDS[0] and elapsed + a_round > seconds:
            break
        for line in list(ready)[:: 1 if number % 2 == 0 else -1]:
            try:
                rows[line].samples_ms.append(round(1000 * ready[line].seconds(steps[line]), 4))
            except Exception as error:  # of memory, most likely
                rows[line].reason = reason(error)
                del ready[line]
    return list(rows.values())


def reason(error: Exception) -> str:
    """What failed, in one line."""
    if isinstance(error, LookupError):
        return str(error.args[0])
    text = cli.one_line(str(error).strip().partition("\n")[0])[:200]
    return f"failed: {type(error).__name__}: {text}"


class Worker:
    """The process that measures; it is started again after it was killed."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.pid = 0

    def measure(
        self, setting: Setting, left: float, seconds: float, rounds: int = ROUNDS[1]
    ) -> list[Row]:
        """`measure`, for about `seconds` and at most `left`; being killed or late is a reason."""
        start = time.monotonic()
        try:
            if self.pool is None:
                # Also of the processes it starts: they would write into the progress bar.
                os.environ.setdefault("PYTHONWARNINGS", "ignore")
                self.pool = ProcessPoolExecutor(1, get_context("spawn"), _quiet_group)
                self.pid = self.pool.submit(os.getpid).result(left)
            left -= time.monotonic() - start
            return self.pool.submit(measure, setting, seconds, rounds).result(max(0.0, left))
        except (TimeoutError, FutureTimeout):  # one and the same from Python 3.11
            self.kill()
            return without(setting, OUT_OF_TIME)
        except BrokenProcessPool:
            self.kill()
            return without(setting, "failed: the process was killed, out of memory most likely")

    def kill(self) -> None:
        """End the process and those it started to compile."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        self.pool, self.pid = None, 0


def _quiet_group() -> None:
    os.setsid()  # so that it can be killed together with its children
    for name in ("torch", "torch._inductor", "torch._dynamo"):
        getLogger(name).setLevel(ERROR)


def without(setting: Setting, why: str) -> list[Row]:
    return [Row(setting, line, reason=why) for line in setting.lines]


def run(settings: list[Setting], seconds: float, rounds: int) -> tuple[list[Row], bool]:
    """Rows of all settings, most important first, and whether it was interrupted."""
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    worker = Worker()
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        done = progress.add_task("", total=len(settings))
        try:
            for number, setting in enumerate(settings):
                progress.update(done, description=str(setting), completed=number)
                left = deadline - time.monotonic()
                if left > 1:
                    # Several times its part, as most need less, and the first ones matter most;
                    # but never so much that what is compiled, which comes last, gets none.
                    share = left * min(0.5, 4 / (len(settings) - number + 1))
                    times = LAYER_ROUNDS if layer_of(setting.model) else 1
                    rows += worker.measure(setting, left, share, rounds * times)
                else:
                    rows += without(setting, OUT_OF_TIME)
                if not progress.console.is_terminal:
                    progress.console.print(f"{number + 1}/{len(settings)} {setting}")
            progress.update(done, description="done", completed=len(settings))
        except KeyboardInterrupt:
            return rows, True
        finally:
            worker.kill()
    return rows, False


def plan(models: list[str], device: str, batch_size: int | None, quick: bool) -> Iterator[Setting]:
    """What to measure, most important first: the number format of the goals, eager, the sweep."""
    kind = device.partition(":")[0]
    dtypes = ("bfloat16", "float32") if kind == "cuda" else ("float32", "bfloat16")

    def batch(pixels: int) -> int:
        usual = BATCH[kind][32 if pixels <= 64 else 224]
        return batch_size or (QUICK_BATCH if quick else usual)

    sizes = {name: input_size(name) for name in models}
    for dtype in dtypes[: 1 if quick else 2]:
        for mode in ("eager", "compiled"):
            for name, (channels, pixels, _) in sizes.items():
                for task in TASKS:
                    size = batch(pixels)
                    yield Setting(name, channels, pixels, size, device, task, dtype, mode)
            if dtype == dtypes[0] and mode == "eager":
                for layer in SWEEP:
                    for task in TASKS:
                        shape = (layer.channels, SWEEP_SIDE, batch(SWEEP_SIDE))
                        yield Setting(layer.name, *shape, device, task, dtype, mode)


def environment(device: str) -> dict[str, str]:
    """Hardware, versions and conventions, for the header of the results."""
    found = {
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
        found["device"] = f"{properties.name}, {memory}; host: {found['device']}"
        found["versions"] += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    found["times"] = (
        "milliseconds a step, median [least, most] over rounds in which the lines take turns; "
        "ratios are of one round, to the floor: the same network with bare convolutions"
    )
    found["train"] = "forward, cross entropy, backward, SGD step with momentum"
    found["bfloat16"] = "autocast in training, the whole network's type at inference"
    found["memory"] = (
        "the allocator's peak in a step, parameters and optimizer included"
        if device != "cpu"
        else "bytes held for backward (distinct storages that autograd saves, without parameters)"
    )
    found["layout"] = "channels_last"
    return found


def check_models(models: list[str]) -> None:
    for name in models:
        if "." in name or not timm.is_model(name):
            known = " ".join(timm.list_models("kn*"))
            raise cli.UsageError(f"no network {name!r}: use some of {known}")
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
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise cli.UsageError(f"device {device!r} cannot be used: {why}") from None


@app.command(epilog="Exit status: 0; 2 for bad usage; 130 if interrupted, what was measured kept.")
def main(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[NETWORK]...", help="Registered networks.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda where there is one.")] = (
        "cuda" if torch.cuda.is_available() else "cpu"
    ),
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of every network.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="At most; by default 60, with a GPU 7.5.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes: small, indicative.")] = False,
    output: Annotated[Path | None, typer.Option(help="CSV to write; plots beside it.")] = None,
    render_only: Annotated[
        bool, typer.Option("--render", help="Only write results/*.csv into the documents.")
    ] = False,
) -> int:
    """Measure what kernel normalization costs, as ratios to bare convolutions."""
    if render_only:
        for line in render(ROOT):
            print(line)
        return 0
    chosen = list(dict.fromkeys(models or (MODELS[:1] if quick else MODELS)))
    check_models(chosen)
    check_device(device)
    kind = device.partition(":")[0]
    if output is None:
        output = ROOT / "results" / f"{'quick' if quick else 'benchmark'}_{kind}.csv"
        output.parent.mkdir(exist_ok=True)
    if output.suffix != ".csv" or not output.parent.is_dir():
        raise cli.UsageError(f"--output {output}: name a .csv file in a folder that exists")

    header, start = environment(device), time.monotonic()
    print("comparing the layers with float64 ...", file=sys.stderr)
    header |= errors(device, {"eager": CHECKED["eager"]} if quick else CHECKED)
    seconds = 60 * (minutes or MINUTES["quick" if quick else kind]) - (time.monotonic() - start)
    settings = list(plan(chosen, device, batch_size, quick))
    rows, interrupted = run(settings, seconds, ROUNDS[0 if quick else 1])
    results = Results(header, rows)
    if interrupted:  # and leave earlier, whole results alone
        output = output.with_name(f"partial_{output.name}")
    from kn_zoo.evaluation.plots import plot  # the process that measures has no need of matplotlib

    manifest.write_text(output, results.to_csv())
    written = [output, *plot(results, output)]
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)  # a file has room for a row
    summary(results, console)
    console.print("written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return 130 if interrupted else 0
