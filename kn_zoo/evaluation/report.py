"""The benchmark's results: CSV, goals and tables, all derived from the measured rows.

`table(csv)` is the Markdown of the documents; `python eval/benchmark.py --render` writes it there.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from kn_zoo.checkpoints import manifest

LINES = {  # what is compared, most important first
    "floor": "bare convolutions",
    "ours": "kn_zoo",
    "frozen": "kn_zoo, frozen",
    "batch": "BatchNorm",
    "group": "GroupNorm",
    "namesake": "namesake",
    "published": "published",
}
TASKS = {"infer": "inference", "train": "training step"}
MODES = ("eager", "compiled")
WAYS = [(task, mode) for task in TASKS for mode in MODES]
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
ON_GPU = (
    "On a GPU: not measured. `make benchmark` on a machine with one measures it within eight "
    "minutes, and `python eval/benchmark.py --render` writes the result here.\n"
)


class Layer(NamedTuple):
    """A single KNConv2d of the sweep, with as many output as input channels."""

    kernel: int
    channels: int

    @property
    def name(self) -> str:
        return f"layer:{self.kernel}:{self.channels}"


def layer_of(name: str) -> Layer | None:
    """The layer of this `Layer.name`; None for a network's name."""
    kind, *numbers = name.split(":")
    return Layer(*map(int, numbers)) if kind == "layer" else None


@dataclass(frozen=True)
class Setting:
    """What is timed together: one network or layer, in one way."""

    model: str
    channels: int  # of the image, or of the layer's map
    pixels: int  # a side of it
    batch_size: int
    device: str
    task: str  # "infer" or "train"
    dtype: str  # "float32" or "bfloat16"
    mode: str  # "eager" or "compiled"

    @property
    def key(self) -> "Key":
        return self.model, self.task, self.dtype, self.mode

    @property
    def lines(self) -> list[str]:
        absent = set() if self.task == "infer" else {"frozen"}
        if layer_of(self.model):
            absent |= {"frozen", "namesake"}
        return [line for line in LINES if line not in absent]

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, {self.mode}, {TASKS[self.task]}"


Key = tuple[str, str, str, str]  # network, task, dtype, mode


@dataclass
class Row:
    """One line of one setting: a time for each round, or the reason why there is none."""

    setting: Setting
    line: str
    samples_ms: list[float] = field(default_factory=list)
    memory_mib: float | None = None
    reason: str = ""


class Spread(NamedTuple):
    """A median with the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, numbers: list[float]) -> "Spread | None":
        return cls(median(numbers), min(numbers), max(numbers)) if numbers else None

    def text(self, style: str) -> str:
        middle, least, most = (format(number, style) for number in self)
        return f"{middle} [{least}, {most}]"


class Results:
    """Rows of one run under its header: date, hardware, versions, conventions."""

    def __init__(self, header: dict[str, str], rows: list[Row]) -> None:
        self.header, self.rows = header, rows
        self.settings = {row.setting.key: row.setting for row in rows}
        self.at = {(row.setting.key, row.line): row for row in rows}
        names = dict.fromkeys(row.setting.model for row in rows)
        self.networks = [name for name in names if not layer_of(name)]
        self.layers = [layer for layer in map(layer_of, names) if layer]
        formats = list(dict.fromkeys(row.setting.dtype for row in rows))
        measured = {row.setting.dtype for row in rows if row.samples_ms}
        # that of the goals first, then those of which there is something to show
        self.dtypes = [dtype for dtype in formats if dtype == formats[0] or dtype in measured]
        self.cuda = any(row.setting.device.startswith("cuda") for row in rows)

    def time(self, key: Key, line: str) -> Spread | None:
        """Milliseconds a step."""
        row = self.at.get((key, line))
        return Spread.of(row.samples_ms) if row else None

    def images_per_s(self, key: Key, line: str) -> float | None:
        time = self.time(key, line)
        return 1000 * self.settings[key].batch_size / time.median if time else None

    def ratio(self, key: Key, line: str, to: str = "floor") -> Spread | None:
        """Time of `line` to that of `to` in the same round."""
        return Spread.of([a / b for a, b in self._rounds(key, line, to)])

    def overhead(self, key: Key, line: str) -> Spread | None:
        """Milliseconds that `line` takes above the floor in the same round."""
        return Spread.of([a - b for a, b in self._rounds(key, line, "floor")])

    def _rounds(self, key: Key, line: str, to: str) -> list[tuple[float, float]]:
        row, other = self.at.get((key, line)), self.at.get((key, to))
        # not strict: one of them may have failed in a later round
        return list(zip(row.samples_ms, other.samples_ms, strict=False)) if row and other else []

    def memory(self, model: str, dtype: str, mode: str, line: str) -> float | None:
        """MiB in training."""
        row = self.at.get(((model, "train", dtype, mode), line))
        return row.memory_mib if row else None

    def memory_ratio(self, model: str, dtype: str, mode: str, to: str) -> float | None:
        """Memory of ours in training to that of `to`."""
        ours, other = (self.memory(model, dtype, mode, line) for line in ("ours", to))
        return ours / other if ours and other else None

    def to_csv(self) -> str:
        text = io.StringIO()
        text.writelines(f"# {key}: {value}\n" for key, value in self.header.items())
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(self._as_columns, self.rows))
        return text.getvalue()

    def _as_columns(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {**vars(row.setting), "line": row.line, "reason": row.reason}
        key = row.setting.key
        if time := self.time(key, row.line):
            found["rounds"] = len(row.samples_ms)
            found.update(
                zip(("ms", "ms_least", "ms_most"), map("{:.4g}".format, time), strict=True)
            )
            found["images_per_s"] = f"{self.images_per_s(key, row.line):.4g}"
        if ratio := self.ratio(key, row.line):
            texts = map("{:.3f}".format, ratio)
            found.update(zip(("ratio", "ratio_least", "ratio_most"), texts, strict=True))
        if row.memory_mib is not None:
            found["memory_mib"] = f"{row.memory_mib:.3f}"
        found["samples_ms"] = " ".join(f"{sample:.4f}" for sample in row.samples_ms)
        return found


SETTING = list(Setting.__dataclass_fields__)
DERIVED = ["rounds", "ms", "ms_least", "ms_most", "images_per_s"]
DERIVED += ["ratio", "ratio_least", "ratio_most"]
COLUMNS = [*SETTING, "line", *DERIVED, "memory_mib", "reason", "samples_ms"]


def read(path: Path) -> Results:
    """Results from their CSV; medians and ratios are computed anew from the samples."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    rows = []
    for found in csv.DictReader(line for line in lines if not line.startswith("#")):
        columns: dict[str, Any] = {name: found[name] for name in SETTING}
        columns.update({name: int(found[name]) for name in ("channels", "pixels", "batch_size")})
        samples = [float(sample) for sample in found["samples_ms"].split()]
        memory = float(found["memory_mib"]) if found["memory_mib"] else None
        rows.append(Row(Setting(**columns), found["line"], samples, memory, found["reason"]))
    return Results(header, rows)


class Verdict(NamedTuple):
    """A goal beside what was measured; `met` is None when nothing was."""

    goal: str
    found: str
    met: bool | None

    @property
    def text(self) -> str:
        if self.met is None:
            return "not measured"
        return f"{'met' if self.met else 'not met'}: {self.found}"


Test = Callable[[float], bool]


def verdict(goal: str, found: dict[str, float | None], meets: Test, one: bool = False) -> Verdict:
    """All numbers that were measured have to meet the goal, or with `one` any of them."""
    numbers = {name: number for name, number in found.items() if number is not None}
    text = ", ".join(f"{number:.2f} {name}".strip() for name, number in numbers.items())
    hits = [meets(number) for number in numbers.values()]
    return Verdict(goal, text, (any(hits) if one else all(hits)) if hits else None)


def verdicts(results: Results, model: str, dtype: str) -> list[Verdict]:
    """The goals of one network. Times are ratios to the floor unless the goal says otherwise."""
    cpu, cuda = (1.10, 1.25, 1.40, 1.90), (1.05, 1.30, 1.15, 1.40)
    fast, infer, train_compiled, train = cuda if results.cuda else cpu

    def ratio(task: str, mode: str, line: str = "ours", to: str = "floor") -> float | None:
        spread = results.ratio((model, task, dtype, mode), line, to)
        return spread.median if spread else None

    def memory(to: str) -> dict[str, float | None]:
        return {mode: results.memory_ratio(model, dtype, mode, to) for mode in MODES}

    def at_most(bound: float) -> Test:
        return lambda number: number <= bound

    deployed = {
        "compiled": ratio("infer", "compiled"),
        "frozen": ratio("infer", "eager", "frozen"),
        "frozen and compiled": ratio("infer", "compiled", "frozen"),
    }
    trained = {"": ratio("train", "compiled")}
    speedup = {mode: ratio("train", mode, "published", "ours") for mode in MODES}
    group = {f"{TASKS[task]} {mode}": ratio(task, mode, "ours", "group") for task, mode in WAYS}
    return [
        verdict(f"inference, compiled or frozen <= {fast:.2f}", deployed, at_most(fast), one=True),
        verdict(f"inference, eager <= {infer:.2f}", {"": ratio("infer", "eager")}, at_most(infer)),
        verdict(f"training, compiled <= {train_compiled:.2f}", trained, at_most(train_compiled)),
        verdict(f"training, eager <= {train:.2f}", {"": ratio("train", "eager")}, at_most(train)),
        verdict("training memory / BatchNorm's <= 1.05", memory("batch"), at_most(1.05)),
        verdict("training speed / published >= 4", speedup, lambda times: times >= 4),
        verdict("training memory / published <= 0.55", memory("published"), at_most(0.55)),
        verdict("time / GroupNorm's <= 1", group, at_most(1.0)),
    ]


def sweep_verdict(results: Results) -> Verdict:
    """Whether the time above the bare convolution grows from the least kernel to the most."""
    layers = swept(results, "kernel")
    small, large = (f"{layer.kernel}x{layer.kernel}" for layer in (layers[0], layers[-1]))
    found: dict[str, float | None] = {}
    for task, title in TASKS.items():
        above = [results.overhead(sweep_key(results, layer, task), "ours") for layer in layers]
        first, last = above[0], above[-1]
        if first and last and first.median > 0:
            found[title] = last.median / first.median
    goal = f"overhead of a layer in ms, {large} / {small} <= 1.1"
    return verdict(goal, found, lambda growth: growth <= 1.1)


def swept(results: Results, by: str) -> list[Layer]:
    """Layers of the sweep over "kernel" or "channels": those that have the other in common."""
    other = "channels" if by == "kernel" else "kernel"
    others = [getattr(layer, other) for layer in results.layers]
    common = max(others, key=others.count, default=None)
    return sorted(layer for layer in results.layers if getattr(layer, other) == common)


def sweep_key(results: Results, layer: Layer, task: str) -> Key:
    return layer.name, task, results.dtypes[0], "eager"


Grid = list[list[str]]  # a heading, then rows of as many cells


def goal_grid(results: Results, dtype: str) -> Grid:
    """The goals and, network by network, what was measured."""
    found = [verdicts(results, name, dtype) for name in results.networks]
    rows = [[same[0].goal, *(one.text for one in same)] for same in zip(*found, strict=True)]
    return [["goal", *results.networks], *rows]


def ratio_grid(results: Results, dtype: str) -> Grid:
    """Images/s of the floor, and times of the other lines as ratios to it."""
    lines = [line for line in LINES if line != "floor"]
    grid = [["network", "", "floor, images/s", *(LINES[line] for line in lines)]]
    for name in results.networks:
        for task, mode in WAYS:
            key = (name, task, dtype, mode)
            speed = results.images_per_s(key, "floor")
            if speed is None:
                continue
            ratios = [results.ratio(key, line) for line in lines]
            cells = [f"{ratio.median:.2f}" if ratio else "" for ratio in ratios]
            grid.append([name, f"{TASKS[task]}, {mode}", f"{speed:.3g}", *cells])
    return grid


def memory_grid(results: Results, dtype: str) -> Grid:
    """MiB in training."""
    lines = [line for line in LINES if line != "frozen"]
    grid = [["network", "", *(LINES[line] for line in lines)]]
    for name in results.networks:
        for mode in MODES:
            memory = [results.memory(name, dtype, mode, line) for line in lines]
            if any(memory):
                grid.append([name, mode, *(f"{mib:,.0f}" if mib else "" for mib in memory)])
    return grid


def sweep_grid(results: Results) -> Grid:
    """Single layers: milliseconds of the bare convolution, and what the others take above it."""
    lines = ["ours", "batch", "group", "published"]
    grid = [["layer", "", "bare convolution, ms", *(f"{LINES[line]}, ms more" for line in lines)]]
    for layer in results.layers:
        for task, title in TASKS.items():
            key = sweep_key(results, layer, task)
            if floor := results.time(key, "floor"):
                name = f"{layer.kernel}x{layer.kernel}, {layer.channels} channels"
                above = [results.overhead(key, line) for line in lines]
                cells = [f"{ms.median:.3g}" if ms else "" for ms in above]
                grid.append([name, title, f"{floor.median:.3g}", *cells])
    return grid


def spread_grid(results: Results) -> Grid:
    """Every line of every network, with the spread over the rounds."""
    grid = [["network", "", "layers", "ms", "images/s", "ratio to the floor", "rounds"]]
    for row in results.rows:
        key = row.setting.key
        time, ratio = results.time(key, row.line), results.ratio(key, row.line)
        if time and not layer_of(row.setting.model):
            model, task, dtype, mode = key
            speed = f"{results.images_per_s(key, row.line):.3g}"
            cells = [time.text(".3g"), speed, ratio.text(".2f") if ratio else ""]
            way = f"{dtype}, {mode}, {TASKS[task]}"
            grid.append([model, way, LINES[row.line], *cells, str(len(row.samples_ms))])
    return grid


def missing(results: Results) -> list[str]:
    """Why some lines have no number, one reason an item, with the settings it concerns."""
    found: dict[str, dict[Setting, list[str]]] = {}
    for row in results.rows:
        if row.reason:
            found.setdefault(row.reason, {}).setdefault(row.setting, []).append(row.line)
    return [
        f"{why}: " + "; ".join(_lacking(setting, lines) for setting, lines in of.items())
        for why, of in found.items()
    ]


def _lacking(setting: Setting, lines: list[str]) -> str:
    if lines == setting.lines:
        return f"{setting} (all)"
    return f"{setting} ({', '.join(LINES[line] for line in lines)})"


def markdown(grid: Grid) -> str:
    head, *rows = grid
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def titles(results: Results) -> str:
    """Each network's input, which the tables leave out."""
    sizes = {s.model: f"{s.pixels} px, batch {s.batch_size}" for s in results.settings.values()}
    return "; ".join(f"{name} {size}" for name, size in sizes.items() if not layer_of(name))


def about(results: Results) -> str:
    """Hardware, versions and conventions, one paragraph of Markdown."""
    head = results.header
    order = ("device", "versions", "date", "load", "layout")
    return f"{'; '.join(head[name] for name in order if name in head)}. {titles(results)}.\n"


def table(path: Path) -> str:
    """The main results as Markdown, in the number format of the goals."""
    results = read(path)
    dtype = results.dtypes[0]
    parts = [
        about(results),
        f"Goals, {dtype}: ratios to the same network with bare convolutions.\n",
        markdown(goal_grid(results, dtype)),
    ]
    if results.layers:
        growth = sweep_verdict(results)
        parts.append(f"Single layers, {growth.goal}: {growth.text}.\n")
    if checked := [f"- {k}: {v}\n" for k, v in results.header.items() if k.startswith("error")]:
        parts += [f"{ERRORS}\n", "".join(checked)]
    memory = results.header.get("memory", "")
    parts += [
        f"Time as a ratio to bare convolutions, {dtype}.\n",
        markdown(ratio_grid(results, dtype)),
        f"Memory of a training step in MiB, {dtype}: {memory}.\n",
        markdown(memory_grid(results, dtype)),
    ]
    return "\n".join(parts)


def details(path: Path) -> str:
    """What `table` leaves out, as Markdown: the other number format, the sweep, every spread."""
    results = read(path)
    parts = []
    for dtype in results.dtypes[1:]:
        parts += [f"The same, {dtype} ({results.header.get(dtype, '')}).\n"]
        grids = (goal_grid, ratio_grid, memory_grid)
        parts += [markdown(grid(results, dtype)) for grid in grids]
    if results.layers:
        parts += [
            f"Single layers, {results.dtypes[0]}, eager: {SWEEP_LAYERS}.\n",
            markdown(sweep_grid(results)),
        ]
    parts += [
        f"Every line: {results.header.get('times', '')}.\n",
        markdown(spread_grid(results)),
        *(f"- {why}\n" for why in missing(results)),
    ]
    return "\n".join(parts)


ERRORS = "Largest relative errors of single layers against the paper's formulas in float64:"
SWEEP_LAYERS = "milliseconds above the bare convolution, over kernel sizes and over channels"


def render(root: Path) -> list[str]:
    """Write the results between the markers of README.md and docs/performance.md, and say so.

    A document without markers stays as it is.
    """
    files = sorted((root / "results").glob("benchmark_*.csv"))
    gpu = [] if any(read(path).cuda for path in files) else [ON_GPU]
    said = []
    for document, whole in (("README.md", False), ("docs/performance.md", True)):
        parts = [part for path in files for part in _parts(path, whole)] + gpu
        path = root / document
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            said.append(f"{document}: no {BEGIN} ... {END}, left as it is")
            continue
        body = "\n".join(parts)
        manifest.write_text(path, f"{before}{begin}\n{body}{end}{after}")
        said.append(f"{document}: written from {len(files)} files of results")
    return said


def _parts(path: Path, whole: bool) -> list[str]:
    figures = sorted(path.parent.glob(f"{path.stem}*.png"))
    up = "../" if whole else ""
    images = "".join(f"![{figure.stem}]({up}results/{figure.name})\n" for figure in figures)
    return [table(path), *([images] if images else []), *([details(path)] if whole else [])]


def summary(results: Results, console: Console) -> None:
    """The goals beside what was measured, on a terminal."""
    for dtype in results.dtypes:
        for title, grid in (
            (f"Time as a ratio to bare convolutions, {dtype}", ratio_grid(results, dtype)),
            (f"Memory of a training step, MiB, {dtype}", memory_grid(results, dtype)),
            (f"Goals and what was measured, {dtype}", goal_grid(results, dtype)),
        ):
            console.print(_rich(title, grid))
    if results.layers:
        console.print(_rich("Single layers", sweep_grid(results)))
        growth = sweep_verdict(results)
        console.print(f"{growth.goal}: {growth.text}", markup=False)
    for why in missing(results):
        console.print(why, markup=False, soft_wrap=True)


def _rich(title: str, grid: Grid) -> Table:
    head, *rows = grid
    found = Table(title=title)
    for name in head:
        found.add_column(name, overflow="fold")
    for cells in rows:
        found.add_row(*map(_colored, cells))
    return found


def _colored(cell: str) -> str:
    for begin, color in (("met: ", "green"), ("not met: ", "red")):
        if cell.startswith(begin):
            return f"[{color}]{cell}[/{color}]"
    return cell
