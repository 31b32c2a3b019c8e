"""Times and memory that the benchmark measured, and the CSV file that holds them.

A row is one variant of one setting. It holds its time in each round beside that of the bare
convolutions in the same round, so every ratio is of times measured next to each other, also in a
file to which cells of a later run were added.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

BASELINE = "conv_only"
VARIANTS = {  # what is compared, most important first; see kn_zoo/evaluation/variants.py
    "conv_only": "conv only",
    "kernel_norm": "kernel norm",
    "frozen": "kernel norm, frozen",
    "gaussian": "kernel norm, gaussian",
    "batch_norm": "BatchNorm",
    "group_norm": "GroupNorm",
    "resnet": "ordinary ResNet",
    "unfold": "unfold",
}
TASKS = {"infer": "inference", "train": "training step"}
MODES = ("eager", "compiled")
TASK_MODES = [(task, mode) for task in TASKS for mode in MODES]


class Layer(NamedTuple):
    """A single KNConv2d of the sweep, with as many output as input channels."""

    kernel: int
    channels: int

    @property
    def name(self) -> str:
        return f"layer:{self.kernel}:{self.channels}"


def layer_of(name: str) -> Layer | None:
    """Return the layer of this `Layer.name`; None for a network's name."""
    kind, *numbers = name.split(":")
    return Layer(*map(int, numbers)) if kind == "layer" else None


class Workload(NamedTuple):
    """A network or layer with its input."""

    model: str
    channels: int  # of the image, or of the layer's map
    pixels: int  # of a side
    batch_size: int

    @property
    def input(self) -> str:
        return f"{self.pixels} px, batch {self.batch_size}"


class Setting(NamedTuple):
    """The circumstances under which all variants of a network are timed in turns."""

    workload: Workload
    device: str
    task: str  # "infer" or "train"
    dtype: str  # "float32" or "bfloat16"
    mode: str  # "eager" or "compiled"

    @property
    def layer(self) -> Layer | None:
        return layer_of(self.workload.model)

    @property
    def variants(self) -> list[str]:
        """Names of the variants that exist here."""
        absent = {"gaussian" if self.task == "infer" else "frozen"}
        if self.layer:
            absent |= {"frozen", "gaussian", "resnet"}
        elif not self.workload.model.startswith("knresnet"):
            absent |= {"resnet"}
        return [variant for variant in VARIANTS if variant not in absent]

    def __str__(self) -> str:
        model, *_, batch_size = self.workload
        return f"{model}, batch {batch_size}, {self.dtype}, {self.mode}, {TASKS[self.task]}"


@dataclass
class Row:
    """One variant of one setting: its time in each round, or the reason why there is none."""

    setting: Setting
    variant: str
    samples_ms: list[float] = field(default_factory=list)
    baseline_ms: list[float] = field(default_factory=list)  # bare convolutions, same rounds
    memory_mib: float | None = None
    reason: str = ""


class Spread(NamedTuple):
    """Median, minimum and maximum."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: list[float]) -> "Spread | None":
        return cls(median(numbers), min(numbers), max(numbers)) if numbers else None

    def text(self, style: str) -> str:
        middle, low, high = (format(number, style) for number in self)
        return f"{middle} [{low}, {high}]"


class Results:
    """Rows under their header: date, hardware, versions, conventions."""

    def __init__(self, header: dict[str, str], rows: Iterable[Row]) -> None:
        self.header, self.rows = header, list(rows)
        self.by_cell = {(row.setting, row.variant): row for row in self.rows}
        workloads = dict.fromkeys(row.setting.workload for row in self.rows)
        self.networks = [workload for workload in workloads if not layer_of(workload.model)]
        self.layers = [workload for workload in workloads if layer_of(workload.model)]
        dtypes = dict.fromkeys(row.setting.dtype for row in self.rows)
        measured = {row.setting.dtype for row in self.rows if row.samples_ms}
        self.dtypes = [dtype for dtype in dtypes if dtype in measured]
        self.device = self.rows[0].setting.device if self.rows else "cpu"
        self.cuda = self.device.startswith("cuda")

    def setting(self, workload: Workload, task: str, dtype: str, mode: str) -> Setting:
        return Setting(workload, self.device, task, dtype, mode)

    def label(self, workload: Workload) -> str:
        """Return the network's name, with the batch size if there are results for several."""
        same = [other for other in self.networks if other.model == workload.model]
        several = f", batch {workload.batch_size}" if len(same) > 1 else ""
        return workload.model + several

    def swept(self, by: str) -> list[tuple[Layer, Workload]]:
        """Return the layers of the sweep over "kernel" or "channels", which share the other."""
        layers = [(layer_of(workload.model), workload) for workload in self.layers]
        other = "channels" if by == "kernel" else "kernel"
        values = [getattr(layer, other) for layer, _ in layers]
        common = max(values, key=values.count, default=None)
        return sorted(
            (layer, workload)
            for layer, workload in layers
            if layer and getattr(layer, other) == common
        )

    def sweep_setting(self, workload: Workload, task: str) -> Setting:
        """Return the setting in which a layer of the sweep was measured."""
        measured = next(row.setting for row in self.rows if row.setting.workload == workload)
        return measured._replace(task=task)

    def time(self, setting: Setting, variant: str) -> Spread | None:
        """Return milliseconds per step."""
        row = self.by_cell.get((setting, variant))
        return Spread.of(row.samples_ms) if row else None

    def images_per_s(self, setting: Setting, variant: str) -> float | None:
        time = self.time(setting, variant)
        return 1000 * setting.workload.batch_size / time.median if time else None

    def ratio(self, setting: Setting, variant: str, to: str = BASELINE) -> Spread | None:
        """Return the time of `variant` relative to `to`, both relative to the bare convolutions.

        Of one run this is the ratio of times in the same round: the bare convolutions cancel.
        """
        relative = self._relative(setting, variant)
        if to == BASELINE:
            return Spread.of(relative)
        pairs = zip(relative, self._relative(setting, to), strict=False)
        return Spread.of([a / b for a, b in pairs])

    def overhead(self, setting: Setting, variant: str) -> Spread | None:
        """Return the milliseconds that `variant` takes more than the bare convolutions."""
        row = self.by_cell.get((setting, variant))
        pairs = zip(row.samples_ms, row.baseline_ms, strict=False) if row else ()
        return Spread.of([a - b for a, b in pairs])

    def _relative(self, setting: Setting, variant: str) -> list[float]:
        row = self.by_cell.get((setting, variant))
        # not strict: one of them may have failed in a later round
        pairs = zip(row.samples_ms, row.baseline_ms, strict=False) if row else ()
        return [a / b for a, b in pairs]

    def memory(self, workload: Workload, dtype: str, mode: str, variant: str) -> float | None:
        """Return MiB in training."""
        row = self.by_cell.get((self.setting(workload, "train", dtype, mode), variant))
        return row.memory_mib if row else None

    def updated(self, rows: Iterable[Row], named: Iterable[str]) -> "Results":
        """Return these results with the measured cells of a later run in place of their own.

        Bare convolutions are timed with whatever else is; unless they are `named`, those here stay.
        """
        cells, named = dict(self.by_cell), set(named)
        for row in rows:
            old = cells.get((row.setting, row.variant))
            auxiliary = row.variant == BASELINE and BASELINE not in named
            if not (old and old.samples_ms) or (row.samples_ms and not auxiliary):
                cells[row.setting, row.variant] = row
        return Results(self.header, cells.values())

    def to_csv(self) -> str:
        text = io.StringIO()
        text.writelines(f"# {key}: {value}\n" for key, value in self.header.items())
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(self._as_columns, self.rows))
        return text.getvalue()

    def _as_columns(self, row: Row) -> dict[str, Any]:
        workload, *rest = row.setting
        columns: dict[str, Any] = dict(zip(SETTING, (*workload, *rest), strict=True))
        columns |= {"variant": row.variant, "reason": row.reason}
        if time := self.time(row.setting, row.variant):
            columns["rounds"] = len(row.samples_ms)
            names = ("ms", "ms_low", "ms_high")
            columns |= dict(zip(names, map("{:.4g}".format, time), strict=True))
            columns["images_per_s"] = f"{self.images_per_s(row.setting, row.variant):.4g}"
        if ratio := self.ratio(row.setting, row.variant):
            names = ("ratio", "ratio_low", "ratio_high")
            columns |= dict(zip(names, map("{:.3f}".format, ratio), strict=True))
        if row.memory_mib is not None:
            columns["memory_mib"] = f"{row.memory_mib:.3f}"
        for name in ("samples_ms", "baseline_ms"):
            columns[name] = " ".join(f"{sample:.4f}" for sample in getattr(row, name))
        return columns


SETTING = [*Workload._fields, *Setting._fields[1:]]
DERIVED = ["rounds", "ms", "ms_low", "ms_high", "images_per_s", "ratio", "ratio_low", "ratio_high"]
COLUMNS = [*SETTING, "variant", *DERIVED, "memory_mib", "reason", "samples_ms", "baseline_ms"]


def read(path: Path) -> Results:
    """Read results from their CSV; medians and ratios are computed from the samples.

    Raises:
        ValueError: the file is not a CSV of the benchmark.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    header = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    try:
        table = csv.DictReader(line for line in lines if not line.startswith("#"))
        return Results(header, map(_as_row, table))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a CSV file of eval/benchmark.py ({error!r})") from None


def _as_row(columns: dict[str, str]) -> Row:
    numbers = (int(columns[name]) for name in ("channels", "pixels", "batch_size"))
    workload = Workload(columns["model"], *numbers)
    setting = Setting(workload, *(columns[name] for name in Setting._fields[1:]))
    samples, baseline = (
        [float(sample) for sample in columns[name].split()]
        for name in ("samples_ms", "baseline_ms")
    )
    memory = float(columns["memory_mib"]) if columns["memory_mib"] else None
    return Row(setting, columns["variant"], samples, baseline, memory, columns["reason"])
