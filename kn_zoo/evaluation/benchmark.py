"""Time and memory of a network's variants, measured in turns.

The variants of one setting (network, task, number format, mode) take turns, round by round and to
and fro, after warm-up; a ratio divides two times of one round. Each setting runs in a process that
is given up when it is killed or late.
"""

import gc
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from logging import ERROR, getLogger
from math import ceil
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from kn_zoo import cli
from kn_zoo.evaluation.measurements import BASELINE, Row, Setting
from kn_zoo.evaluation.variants import build

WARM_UP_STEPS = 3
SAMPLE_SECONDS = 0.05  # a time is taken over as many steps as fill this
ROUNDS = (3, 9)  # minimum and maximum
LAYER_ROUNDS = 3  # times as many for single layers: small differences of large times
OUT_OF_TIME = "not measured: out of time; allow more with --minutes, or select fewer cells"


class Job(NamedTuple):
    """Variants of one setting that are measured in turns, the bare convolutions included."""

    setting: Setting
    variants: tuple[str, ...]


class Runner:
    """One variant of a setting, ready to run.

    A training step is forward, cross entropy (of a single layer: a given gradient), backward and
    SGD with momentum, at a learning rate of 0 so that every step does the same work. bfloat16 is
    autocast in training and the whole network's type at inference.
    """

    def __init__(self, setting: Setting, variant: str) -> None:
        gc.collect()
        self.setting, self.training = setting, setting.task == "train"
        self.cuda = setting.device.startswith("cuda")
        self.allocated = torch.cuda.memory_allocated(setting.device) if self.cuda else 0
        torch.manual_seed(0)
        low = setting.dtype == "bfloat16"
        self.autocast = low and self.training
        dtype = torch.bfloat16 if low and not self.training else torch.float32
        self.network = build(setting.workload.model, variant).train(self.training)
        options: Any = dict(device=setting.device, dtype=dtype)
        self.network.to(memory_format=torch.channels_last, **options)
        self.forward = torch.compile(self.network) if setting.mode == "compiled" else self.network

        _, channels, pixels, batch_size = setting.workload
        shape = (batch_size, channels, pixels, pixels)
        self.x = torch.rand(shape, **options).contiguous(memory_format=torch.channels_last)
        self.target: Tensor | None = None
        if self.training:
            self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.0, momentum=0.9)
            self.x.requires_grad_(setting.layer is not None)
            with torch.no_grad():  # for its shape; not compiled
                out = self.network(self.x)
            classes = torch.randint(out.shape[1], (len(out),), device=setting.device)
            self.target = torch.randn_like(out) if setting.layer else classes

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
        """Run some steps; return the seconds that one took."""
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
        """Return the memory of a step.

        CUDA: the allocator's peak, with this network's parameters and optimizer. CPU: what is held
        for backward, None at inference.
        """
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.setting.device)
            self.step()
            peak = torch.cuda.max_memory_allocated(self.setting.device)
            return (peak - self.allocated) / 2**20
        return self.held_for_backward() / 2**20 if self.training else None

    def held_for_backward(self) -> int:
        """Count the bytes of the distinct storages that autograd saves, without parameters."""
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


def measure(job: Job, seconds: float, rounds: int = ROUNDS[1]) -> list[Row]:
    """Time the variants of a job in turns, for about `seconds`; a failure becomes a reason."""
    started = time.perf_counter()
    torch.compiler.reset()
    torch.backends.cudnn.benchmark = True
    rows = {variant: Row(job.setting, variant) for variant in job.variants}
    runners: dict[str, Runner] = {}
    steps: dict[str, int] = {}
    longest_start = round_seconds = 0.0
    for variant, row in rows.items():
        start = time.perf_counter()
        # With fewer than two variants the setting would say nothing.
        needed = start - started + longest_start + ROUNDS[0] * round_seconds
        if len(runners) > 1 and needed > seconds:
            row.reason = OUT_OF_TIME
            continue
        try:
            runner = Runner(job.setting, variant)
            runner.seconds(WARM_UP_STEPS if job.setting.device != "cpu" else 1)
            memory = runner.memory_mib()
            row.memory_mib = None if memory is None else round(memory, 3)
            step_seconds = runner.seconds(1)
        except Exception as error:
            row.reason = reason(error)
            continue
        runners[variant] = runner
        steps[variant] = min(100, ceil(SAMPLE_SECONDS / step_seconds))
        longest_start = max(longest_start, time.perf_counter() - start)
        round_seconds += step_seconds * steps[variant]
    for number in range(rounds):
        elapsed = time.perf_counter() - started
        if number >= ROUNDS[0] and elapsed + round_seconds > seconds:
            break
        for variant in list(runners)[:: 1 if number % 2 == 0 else -1]:
            try:
                milliseconds = 1000 * runners[variant].seconds(steps[variant])
                rows[variant].samples_ms.append(round(milliseconds, 4))
            except Exception as error:  # out of memory, most likely
                rows[variant].reason = reason(error)
                del runners[variant]
    if BASELINE in rows:
        for row in rows.values():
            row.baseline_ms = rows[BASELINE].samples_ms[: len(row.samples_ms)]
    return list(rows.values())


def reason(error: Exception) -> str:
    """Describe a failure in one line."""
    if isinstance(error, LookupError):
        return str(error.args[0])
    text = cli.one_line(str(error).strip().partition("\n")[0])[:200]
    return f"failed: {type(error).__name__}: {text}"


class Worker:
    """The process that measures; a new one is started after it was killed."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.pid = 0

    def measure(self, job: Job, left: float, seconds: float, rounds: int = ROUNDS[1]) -> list[Row]:
        """Call `measure` there, for about `seconds` and at most `left` of them.

        A process that is killed or late becomes the reason of every row.
        """
        start = time.monotonic()
        try:
            if self.pool is None:
                # Also of the processes it starts: they would write into the progress bar.
                os.environ.setdefault("PYTHONWARNINGS", "ignore")
                self.pool = ProcessPoolExecutor(1, get_context("spawn"), _quiet_group)
                self.pid = self.pool.submit(os.getpid).result(left)
            left -= time.monotonic() - start
            return self.pool.submit(measure, job, seconds, rounds).result(max(0.0, left))
        except (TimeoutError, FutureTimeout):  # one and the same from Python 3.11
            self.kill()
            return unmeasured(job, OUT_OF_TIME)
        except BrokenProcessPool:
            self.kill()
            return unmeasured(job, "failed: the process was killed, out of memory most likely")

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


def unmeasured(job: Job, reason: str) -> list[Row]:
    return [Row(job.setting, variant, reason=reason) for variant in job.variants]


def run(jobs: list[Job], seconds: float, rounds: int) -> tuple[list[Row], bool]:
    """Measure the jobs, most important first; return their rows and whether it was interrupted."""
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    worker = Worker()
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(jobs))
        try:
            for number, job in enumerate(jobs):
                progress.update(bar, description=str(job.setting), completed=number)
                left = deadline - time.monotonic()
                if left > 1:
                    # Several times its part, as most need less, and the first ones matter most;
                    # but never so much that what is compiled, which comes last, gets none.
                    share = left * min(0.5, 4 / (len(jobs) - number + 1))
                    times = LAYER_ROUNDS if job.setting.layer else 1
                    rows += worker.measure(job, left, share, rounds * times)
                else:
                    rows += unmeasured(job, OUT_OF_TIME)
                if not progress.console.is_terminal:
                    progress.console.print(f"{number + 1}/{len(jobs)} {job.setting}")
            progress.update(bar, description="done", completed=len(jobs))
        except KeyboardInterrupt:
            return rows, True
        finally:
            worker.kill()
    return rows, False
