"""Goals and tables of the documents, all derived from the benchmark's results.

`table(csv)` and `details(csv)` are the Markdown of the documents; `python eval/benchmark.py
--render` writes tables and plots there.
"""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kn_zoo.checkpoints.files import write_text
from kn_zoo.evaluation.goals import SMALL_BATCH_SIZE, sweep_verdict, verdicts
from kn_zoo.evaluation.measurements import (
    BASELINE,
    MODES,
    TASK_MODES,
    TASKS,
    VARIANTS,
    Results,
    Setting,
    read,
)

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
NO_GPU = (
    "On a GPU: not measured. `make benchmark` on a machine with one measures it within eight "
    "minutes, and `python eval/benchmark.py --render` writes the result here.\n"
)
ERRORS = "Largest relative errors of single layers against the paper's formulas in float64:"
SWEEP_LAYERS = "milliseconds more than the bare convolution, over kernel sizes and over channels"


Grid = list[list[str]]  # a heading, then rows of as many cells


def goal_grids(results: Results, dtype: str) -> list[Grid]:
    """Make tables of goals and, network by network, what was measured: usual and small batches."""
    measured = {
        row.setting.workload
        for row in results.rows
        if row.samples_ms and row.setting.dtype == dtype
    }
    grids = []
    for small in (False, True):
        workloads = [
            workload
            for workload in results.networks
            if (workload.batch_size <= SMALL_BATCH_SIZE) == small and workload in measured
        ]
        if workloads:
            columns = [verdicts(results, workload, dtype) for workload in workloads]
            rows = [
                [same[0].goal, *(verdict.text for verdict in same)]
                for same in zip(*columns, strict=True)
            ]
            grids.append([["goal", *map(results.label, workloads)], *rows])
    return grids


def ratio_grid(results: Results, dtype: str) -> Grid:
    """Make a table of images/s of the bare convolutions, and of the other variants' ratios."""
    variants = [variant for variant in VARIANTS if variant != BASELINE]
    grid = [["network", "", "conv only, images/s", *(VARIANTS[name] for name in variants)]]
    for workload in results.networks:
        for task, mode in TASK_MODES:
            setting = results.setting(workload, task, dtype, mode)
            speed = results.images_per_s(setting, BASELINE)
            if speed is None:
                continue
            ratios = [results.ratio(setting, variant) for variant in variants]
            cells = [f"{ratio.median:.2f}" if ratio else "" for ratio in ratios]
            name = results.label(workload)
            grid.append([name, f"{TASKS[task]}, {mode}", f"{speed:.3g}", *cells])
    return grid


def memory_grid(results: Results, dtype: str) -> Grid:
    """Make a table of MiB in training."""
    variants = [variant for variant in VARIANTS if variant != "frozen"]
    grid = [["network", "", *(VARIANTS[variant] for variant in variants)]]
    for workload in results.networks:
        for mode in MODES:
            memory = [results.memory(workload, dtype, mode, variant) for variant in variants]
            if any(memory):
                cells = [f"{mib:,.0f}" if mib else "" for mib in memory]
                grid.append([results.label(workload), mode, *cells])
    return grid


def sweep_grid(results: Results) -> Grid:
    """Make a table of single layers: the bare convolution, and what the variants take more."""
    variants = ["kernel_norm", "batch_norm", "group_norm", "unfold"]
    titles = [f"{VARIANTS[variant]}, ms more" for variant in variants]
    grid = [["layer", "", "conv only, ms", *titles]]
    for workload in results.layers:
        for task, title in TASKS.items():
            setting = results.sweep_setting(workload, task)
            layer = setting.layer
            if layer and (time := results.time(setting, BASELINE)):
                name = f"{layer.kernel}x{layer.kernel}, {layer.channels} channels"
                overheads = [results.overhead(setting, variant) for variant in variants]
                cells = [f"{ms.median:.3g}" if ms else "" for ms in overheads]
                grid.append([name, title, f"{time.median:.3g}", *cells])
    return grid


def spread_grid(results: Results) -> Grid:
    """Make a table of every variant of every network, with the spread over the rounds."""
    grid = [["network", "", "variant", "ms", "images/s", "ratio to conv only", "rounds"]]
    for row in results.rows:
        setting = row.setting
        time, ratio = results.time(setting, row.variant), results.ratio(setting, row.variant)
        if time and not setting.layer:
            conditions = f"{setting.dtype}, {setting.mode}, {TASKS[setting.task]}"
            speed = f"{results.images_per_s(setting, row.variant):.3g}"
            cells = [time.text(".3g"), speed, ratio.text(".2f") if ratio else ""]
            name = results.label(setting.workload)
            rounds = str(len(row.samples_ms))
            grid.append([name, conditions, VARIANTS[row.variant], *cells, rounds])
    return grid


def missing(results: Results) -> list[str]:
    """List why variants have no number, one reason per item, with the settings it concerns."""
    reasons: dict[str, dict[Setting, list[str]]] = {}
    for row in results.rows:
        if row.reason:
            reasons.setdefault(row.reason, {}).setdefault(row.setting, []).append(row.variant)
    return [
        f"{reason}: " + "; ".join(_lacking(*item) for item in settings.items())
        for reason, settings in reasons.items()
    ]


def _lacking(setting: Setting, variants: list[str]) -> str:
    if variants == setting.variants:
        return f"{setting} (all)"
    return f"{setting} ({', '.join(VARIANTS[variant] for variant in variants)})"


def markdown(grid: Grid) -> str:
    head, *rows = grid
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def inputs(results: Results) -> str:
    """Name each network with its input, which the tables leave out."""
    return "; ".join(f"{workload.model} {workload.input}" for workload in results.networks)


def about(results: Results) -> str:
    """Describe hardware, versions and conventions, as one paragraph of Markdown."""
    header = results.header
    order = ("device", "versions", "date", "load", "updated", "layout")
    facts = [f"{name} {header[name]}" if name == "updated" else header[name]
             for name in order if name in header]  # fmt: skip
    return f"{'; '.join(facts)}. {inputs(results)}.\n"


def table(path: Path) -> str:
    """Return the main results as Markdown, in the number format of the goals."""
    results = read(path)
    parts = [about(results)]
    for dtype in results.dtypes[:1]:
        memory = results.header.get("memory", "")
        parts += [
            f"Time as a ratio to conv only (bare convolutions), {dtype}.\n",
            markdown(ratio_grid(results, dtype)),
            f"Memory of a training step in MiB, {dtype}: {memory}.\n",
            markdown(memory_grid(results, dtype)),
        ]
    return "\n".join(parts)


def details(path: Path) -> str:
    """Return what `table` leaves out: goals, the other number format, the sweep, every spread."""
    results = read(path)
    parts = []
    for dtype in results.dtypes[:1]:
        parts.append(f"Goals, {dtype}: ratios to the same network with bare convolutions.\n")
        parts += map(markdown, goal_grids(results, dtype))
    if results.layers:
        growth = sweep_verdict(results)
        parts.append(f"Single layers, {growth.goal}: {growth.text}.\n")
    if checked := [f"- {k}: {v}\n" for k, v in results.header.items() if k.startswith("error")]:
        parts += [f"{ERRORS}\n", "".join(checked)]
    for dtype in results.dtypes[1:]:
        parts.append(f"The same in {dtype} ({results.header.get(dtype, '')}).\n")
        grids = [ratio_grid(results, dtype), memory_grid(results, dtype)]
        parts += map(markdown, [*grids, *goal_grids(results, dtype)])
    if results.layers:
        parts += [f"Single layers, eager: {SWEEP_LAYERS}.\n", markdown(sweep_grid(results))]
    parts += [
        f"Every variant: {results.header.get('times', '')}.\n",
        markdown(spread_grid(results)),
        *(f"- {reason}\n" for reason in missing(results)),
    ]
    return "\n".join(parts)


def render(root: Path) -> list[str]:
    """Write tables and plots of `root`/results/benchmark_*.csv into the documents; say which.

    Plots are drawn anew. Text goes between the markers of README.md (the sentence and the main
    tables) and docs/performance.md (everything); a document without markers stays as it is.
    """
    from kn_zoo.evaluation.benchmark_figures import plot  # matplotlib is an extra

    files = sorted((root / "results").glob("benchmark_*.csv"))
    figures = {file: sorted(plot(read(file), file)) for file in files}
    lines = [f"{file.name}: {len(figures[file])} plots" for file in files]
    no_gpu = [] if any(read(file).cuda for file in files) else [NO_GPU]
    for document, whole in (("README.md", False), ("docs/performance.md", True)):
        parts = [p for file in files for p in _parts(file, figures[file], whole)] + no_gpu
        path = root / document
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            lines.append(f"{document}: no {BEGIN} ... {END}, left as it is")
            continue
        body = "\n".join(parts)
        write_text(path, f"{before}{begin}\n{body}{end}{after}")
        lines.append(f"{document}: written from {len(files)} files of results")
    return lines


def _parts(path: Path, figures: Iterable[Path], whole: bool) -> list[str]:
    up = "../" if whole else ""
    images = "".join(f"![{figure.stem}]({up}results/{figure.name})\n" for figure in figures)
    return [table(path), *([images] if images else []), *([details(path)] if whole else [])]


def print_tables(results: Results, console: Console) -> None:
    """Print the tables and the goals on a terminal."""
    for dtype in results.dtypes:
        grids = [
            (f"Time as a ratio to conv only, {dtype}", ratio_grid(results, dtype)),
            (f"Memory of a training step, MiB, {dtype}", memory_grid(results, dtype)),
        ]
        grids += [(f"Goals, {dtype}", grid) for grid in goal_grids(results, dtype)]
        for title, grid in grids:
            if len(grid) > 1:
                console.print(_rich(title, grid))
    if results.layers:
        console.print(_rich("Single layers", sweep_grid(results)))
        growth = sweep_verdict(results)
        console.print(f"{growth.goal}: {growth.text}", markup=False)
    for reason in missing(results):
        console.print(reason, markup=False, soft_wrap=True)


def _rich(title: str, grid: Grid) -> Table:
    head, *rows = grid
    rich_table = Table(title=title)
    for name in head:
        rich_table.add_column(name, overflow="fold")
    for cells in rows:
        rich_table.add_row(*map(_colored, cells))
    return rich_table


def _colored(cell: str) -> str:
    for begin, color in (("met: ", "green"), ("not met: ", "red")):
        if cell.startswith(begin):
            return f"[{color}]{cell}[/{color}]"
    return cell
