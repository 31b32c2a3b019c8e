"""Figures of the benchmark's results; every axis of times and memory starts at 0."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kn_zoo.evaluation.measurements import (
    BASELINE,
    MODES,
    TASK_MODES,
    TASKS,
    VARIANTS,
    Results,
    Spread,
    Workload,
)
from kn_zoo.evaluation.report import inputs
from kn_zoo.evaluation.result_figures import save

COLORS = dict(zip(VARIANTS, ["0.6", "C0", "C9", "C1", "C2", "C4", "C5", "C3"], strict=True))
RATIO_LIMIT = 1.7  # of the axis of ratios; a longer bar is cut there and bears its number
LINE_INCHES = 0.17  # height of a bar

Bars = dict[str, dict[str, Spread]]  # network, variant: only what was measured


def plot(results: Results, path: Path) -> list[Path]:
    """Draw times, memory, and the sweep over single layers as PNG files beside the CSV `path`."""
    figures = {}
    for dtype in results.dtypes:
        figures[f"_{dtype}"] = times(results, dtype)
        figures[f"_{dtype}_memory"] = memory(results, dtype)
    if results.layers:
        figures["_layers"] = sweep(results)
    written = []
    for suffix, figure in figures.items():
        if figure is None:
            continue
        written.append(path.with_name(f"{path.stem}{suffix}.png"))
        save(figure, written[-1])
    return written


def times(results: Results, dtype: str) -> Figure | None:
    def bars(task: str, mode: str) -> Bars:
        return {
            results.label(workload): {
                variant: ratio
                for variant in VARIANTS
                if variant != BASELINE
                and (ratio := results.ratio(results.setting(workload, task, dtype, mode), variant))
            }
            for workload in results.networks
        }

    panels = {f"{TASKS[task]}, {mode}": bars(task, mode) for task, mode in TASK_MODES}
    title = f"Time as a ratio to the same network with bare convolutions, {dtype}"
    return _bar_panels(results, title, panels, digits=2, limit=RATIO_LIMIT)


def memory(results: Results, dtype: str) -> Figure | None:
    def spread(workload: Workload, mode: str, variant: str) -> Spread | None:
        mib = results.memory(workload, dtype, mode, variant)
        return Spread(mib, mib, mib) if mib else None

    panels = {
        mode: {
            results.label(workload): {
                variant: mib for variant in VARIANTS if (mib := spread(workload, mode, variant))
            }
            for workload in results.networks
        }
        for mode in MODES
    }
    title = f"Memory of a training step, MiB, {dtype}:\n{results.header.get('memory', '')}"
    return _bar_panels(results, title, panels, digits=0)


def _bar_panels(
    results: Results, title: str, panels: dict[str, Bars], digits: int, limit: float | None = None
) -> Figure | None:
    """Draw panels of horizontal bars, one per variant, grouped by network; None without bars."""
    panels = {
        name: {network: spreads for network, spreads in bars.items() if spreads}
        for name, bars in panels.items()
    }
    panels = {name: bars for name, bars in panels.items() if bars}
    if not panels:
        return None
    longest = max(
        spread.high
        for bars in panels.values()
        for spreads in bars.values()
        for spread in spreads.values()
    )
    end = min(limit or longest, longest)
    lines = [sum(len(spreads) + 1.5 for spreads in bars.values()) for bars in panels.values()]
    figure = _new_figure(results, title, 8.5, LINE_INCHES * sum(lines) + 0.6 * len(panels))
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=lines)[:, 0]
    for axis, (name, bars) in zip(axes, panels.items(), strict=True):
        _bars(axis, bars, end, digits)
        axis.set_title(name, fontsize=10)
        if limit:  # of ratios
            axis.axvline(1, color="0.6", linewidth=0.8)
    drawn = {
        variant for bars in panels.values() for spreads in bars.values() for variant in spreads
    }
    handles = [
        axes[0].barh(0, 0, color=COLORS[variant], label=VARIANTS[variant])
        for variant in VARIANTS
        if variant in drawn
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=8)
    return figure


def _bars(axis: Any, bars: Bars, end: float, digits: int) -> None:
    """Draw bars from 0 to `end` with their numbers, and minimum to maximum as whiskers."""
    axis.spines[["top", "right"]].set_visible(False)
    y, ticks = 0.0, []
    for spreads in bars.values():
        ticks.append(y + (len(spreads) - 1) / 2)
        for variant, spread in spreads.items():
            text = f" {spread.median:,.{digits}f}"
            low, length, high = (min(x, end) for x in (spread.low, spread.median, spread.high))
            axis.barh(y, length, 0.85, color=COLORS[variant])
            if spread.median <= end:
                axis.plot([low, high], [y, y], color="0.3", linewidth=1.5)
            else:
                text += " (bar cut)"
            axis.text(high, y, text, va="center", fontsize=7)
            y += 1
        y += 1.5
    axis.set_yticks(ticks, list(bars), fontsize=8)
    axis.set_ylim(y - 1.5, -1)  # the first network on top
    axis.set_xlim(0, 1.2 * end)


def sweep(results: Results) -> Figure:
    """Draw the overhead over kernel sizes and channels; unfold needs a scale of its own."""
    workload = results.layers[0]
    setting = results.sweep_setting(workload, next(iter(TASKS)))
    title = f"Milliseconds a layer takes more than its bare convolution, {setting.mode}, "
    title += f"{setting.dtype}, batch {workload.batch_size}, {workload.pixels} px"
    figure = _new_figure(results, title, 16.8, 5.2)
    axes = figure.subplots(2, 4)
    usual = ["kernel_norm", "batch_norm", "group_norm"]
    panels = [(task, variants) for task in TASKS for variants in (usual, [*usual, "unfold"])]
    for row, by in zip(axes, ("kernel", "channels"), strict=True):
        for axis, (task, variants) in zip(row, panels, strict=True):
            _curves(axis, results, by, task, variants)
    return figure


def _curves(axis: Any, results: Results, by: str, task: str, variants: list[str]) -> None:
    """Draw overheads over "kernel" sizes or "channels"; minimum to maximum as whiskers."""
    layers, medians = results.swept(by), [0.0]
    for variant in variants:
        points = [
            (getattr(layer, by), overhead)
            for layer, workload in layers
            if (overhead := results.overhead(results.sweep_setting(workload, task), variant))
        ]
        if points:
            x, spreads = zip(*points, strict=True)
            whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            style = dict(marker="o", color=COLORS[variant], capsize=2, label=VARIANTS[variant])
            axis.errorbar(x, [spread.median for spread in spreads], whiskers, **style)
            medians += [spread.median for spread in spreads]
    layer = layers[0][0]
    other = f"{layer.channels} channels" if by == "kernel" else f"kernel {layer.kernel}"
    axis.set_xticks([getattr(layer, by) for layer, _ in layers])
    axis.set_xlabel(f"{by} ({other})", fontsize=9)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set_ylim(1.3 * min(medians), 1.3 * max(medians) or 1)  # cuts the whiskers of outliers
    axis.set_title(TASKS[task] + (", with unfold" if "unfold" in variants else ""), fontsize=10)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def _new_figure(results: Results, title: str, width: float, height: float) -> Figure:
    """Make a figure with the hardware below it; width and height of the axes are in inches."""
    figure = Figure(figsize=(width, height + 1.5), layout="constrained")
    header = results.header
    lines = [header[name] for name in ("device", "versions", "load") if name in header]
    figure.suptitle(f"{title}\n", fontsize=11)
    figure.supxlabel("\n".join([*lines, inputs(results)]), fontsize=7)
    return figure
