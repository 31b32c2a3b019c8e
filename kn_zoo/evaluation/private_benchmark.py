"""Time and memory of a private training step of KNResNet-8 under Opacus.

Each case runs in a process of its own, and the processes take turns. Memory is what the steps add
to the largest resident size of the process, so on a CPU it includes the allocator's slack.
"""

import csv
import io
import resource
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from kn_zoo import KernelNorm2d, KNConv2d
from kn_zoo.evaluation.goals import at_most, verdict
from kn_zoo.evaluation.results import table as markdown_table
from kn_zoo.evaluation.variants import build

NETWORK = "knresnet8_cifar"
BATCH_SIZE = 128
ROUNDS, STEPS = 7, 2


class Case(NamedTuple):
    """A network and the way in which Opacus computes its per-sample gradients."""

    norm: str  # a variant of the benchmark: "kernel_norm" or "group_norm"
    mode: str  # Opacus' grad_sample_mode, or "none": the same step without privacy
    dropout: bool = True

    @property
    def label(self) -> str:
        name = {"kernel_norm": "kernel norm", "group_norm": "GroupNorm"}[self.norm]
        return name if self.dropout else f"{name}, dropout_p=0"


CASES = (
    Case("kernel_norm", "hooks"),
    Case("group_norm", "hooks"),
    Case("kernel_norm", "ghost"),
    Case("group_norm", "ghost"),
    Case("kernel_norm", "none"),
    Case("group_norm", "none"),
    Case("kernel_norm", "hooks", dropout=False),
    Case("kernel_norm", "functorch", dropout=False),
)


class Measured(NamedTuple):
    """A case, its milliseconds a step in each round, and the memory its steps added."""

    case: Case
    samples_ms: list[float]
    memory_mib: float


def measure(rounds: int = ROUNDS, batch_size: int = BATCH_SIZE) -> list[Measured]:
    """Measure all cases in turns."""
    pools = {case: ProcessPoolExecutor(1, get_context("spawn")) for case in CASES}
    try:
        memory = {case: pools[case].submit(prepare, case, batch_size).result() for case in CASES}
        samples: dict[Case, list[float]] = {case: [] for case in CASES}
        for number in range(rounds):
            for case in CASES[:: 1 if number % 2 == 0 else -1]:
                samples[case].append(pools[case].submit(milliseconds, STEPS).result())
    finally:
        for pool in pools.values():
            pool.shutdown()
    return [Measured(case, samples[case], memory[case]) for case in CASES]


class Step:
    """A training step on a batch of random images."""

    def __init__(self, case: Case, batch_size: int) -> None:
        torch.manual_seed(0)
        network: Any = build(NETWORK, case.norm).train()
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # Opacus needs the outputs of layers as they were
            if isinstance(module, KNConv2d | KernelNorm2d) and not case.dropout:
                module.dropout_p = 0.0
        self.network = network
        self.images = torch.rand(batch_size, 3, 32, 32)
        self.labels = torch.randint(network.num_classes, (batch_size,))
        self.optimizer: Any = torch.optim.SGD(self.network.parameters(), lr=0.1)
        self.criterion: Any = nn.CrossEntropyLoss()
        self.model: Any = self.network
        if case.mode != "none":
            self.make_private(case.mode)

    def make_private(self, mode: str) -> None:
        """Hand the network to Opacus; the batch is given, so nothing is sampled."""
        from opacus import PrivacyEngine

        import kn_zoo.privacy  # noqa: F401  registers the layers with Opacus

        data = torch.utils.data.TensorDataset(self.images, self.labels)
        made: Any = PrivacyEngine().make_private(
            module=self.network,
            optimizer=self.optimizer,
            criterion=self.criterion,
            data_loader=torch.utils.data.DataLoader(data, batch_size=len(self.images)),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        self.model, self.optimizer = made[:2]
        if mode == "ghost":
            self.criterion = made[2]

    def __call__(self) -> None:
        self.criterion(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


_step: Step | None = None  # of the process that measures one case


def prepare(case: Case, batch_size: int) -> float:
    """Make the step of this process and take it; returns the memory it added, in MiB."""
    global _step
    before = _peak_mib()
    _step = Step(case, batch_size)
    for _ in range(2):
        _step()
    return _peak_mib() - before


def milliseconds(steps: int) -> float:
    assert _step is not None
    start = time.perf_counter()
    for _ in range(steps):
        _step()
    return 1000 * (time.perf_counter() - start) / steps


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def to_csv(measured: Iterable[Measured], header: dict[str, str]) -> str:
    """Return the CSV text: comments that describe the machine, then a row a case."""
    text = io.StringIO()
    text.writelines(f"# {name}: {value}\n" for name, value in header.items())
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["norm", "mode", "dropout", "memory_mib", "samples_ms"])
    for case, samples, memory in measured:
        times = " ".join(f"{sample:.3f}" for sample in samples)
        writer.writerow([case.norm, case.mode, int(case.dropout), f"{memory:.1f}", times])
    return text.getvalue()


def from_csv(text: str) -> list[Measured]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [
        Measured(
            Case(row["norm"], row["mode"], row["dropout"] == "1"),
            [float(sample) for sample in row["samples_ms"].split()],
            float(row["memory_mib"]),
        )
        for row in csv.DictReader(lines)
    ]


def table(measured: Sequence[Measured]) -> str:
    """Return a Markdown table; ratios are medians of those of one round, to hooks of GroupNorm."""
    head = "network|per-sample gradients|ms a step|ratio to GroupNorm, hooks|memory, MiB"
    rows = [
        [
            row.case.label,
            row.case.mode,
            f"{median(row.samples_ms):.0f}",
            f"{ratio(measured, row.case, Case('group_norm', 'hooks')):.2f}",
            f"{row.memory_mib:.0f}",
        ]
        for row in measured
    ]
    return markdown_table(head, rows)


def goals(measured: Sequence[Measured]) -> str:
    """Return a Markdown table of the goals of kernel normalization and what was measured."""
    hooks, ghost = Case("kernel_norm", "hooks"), Case("kernel_norm", "ghost")
    no_dropout = Case("kernel_norm", "hooks", dropout=False)
    functorch = Case("kernel_norm", "functorch", dropout=False)
    to_group_norm = ratio(measured, hooks, Case("group_norm", "hooks"))
    speedup = ratio(measured, functorch, no_dropout)
    memory = {row.case: row.memory_mib for row in measured}
    judged = [
        verdict("hooks, time / GroupNorm's <= 1.20", {"": to_group_norm}, at_most(1.2)),
        verdict("time of functorch / of hooks >= 3", {"": speedup}, lambda times: times >= 3),
        verdict("memory, ghost / hooks <= 1", {"": memory[ghost] / memory[hooks]}, at_most(1)),
    ]
    return markdown_table("goal|measured", [[each.goal, each.text] for each in judged])


def ratio(measured: Iterable[Measured], case: Case, to: Case) -> float:
    """Return the median over rounds of the time of `case` divided by that of `to`."""
    samples = {row.case: row.samples_ms for row in measured}
    return median(a / b for a, b in zip(samples[case], samples[to], strict=True))
