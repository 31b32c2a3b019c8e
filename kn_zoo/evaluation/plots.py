"""Figures of the benchmark's results; every axis starts at 0."""

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kn_zoo.evaluation.report import (
    LINES,
    MODES,
    TASKS,
    WAYS,
    Results,
    Spread,
    sweep_key,
    swept,
    titles,
)

COLORS = dict(zip(LINES, ["0.6", "C0", "C9", "C2", "C4", "C5", "C3"], strict=True))


def plot(results: Results, path: Path) -> list[Path]:
    """Figures beside the CSV `path`: times, memory, and the sweep over single layers."""
    figures = {}
    for dtype in results.dtypes:
        figures[f"_{dtype}"] = _times(results, dtype)
        figures[f"_{dtype}_memory"] = _memory(results, dtype)
    if results.layers:
        figures["_layers"] = _sweep(results)
    written = []
    for suffix, figure in figures.items():
        written.append(path.with_name(f"{path.stem}{suffix}.png"))
        beside = written[-1].with_name(f".{written[-1].name}")
        figure.savefig(beside, dpi=110, format="png")
        os.replace(beside, written[-1])
    return written


def _figure(results: Results, title: str, rows: int, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.2 * columns, 1.4 + 2.6 * rows), layout="constrained")
    head = results.header
    hardware = "\n".join(head[name] for name in ("device", "versions", "load") if name in head)
    figure.suptitle(f"{title}\n", fontsize=13)
    figure.supxlabel(f"{hardware}\n{titles(results)}", fontsize=8)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bars(axes: Any, found: dict[str, Spread | None], digits: int) -> None:
    """One horizontal bar a line, from 0, with its number; least to most as whiskers."""
    names = list(found)[::-1]
    axes.spines[["top", "right"]].set_visible(False)
    if not any(found.values()):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not measured", ha="center", fontsize=9, transform=axes.transAxes)
        return
    for place, line in enumerate(names):
        spread = found[line]
        if spread is None:
            axes.text(0, place, " not measured", va="center", fontsize=8, color="0.4")
            continue
        whiskers = [[spread.median - spread.least], [spread.most - spread.median]]
        axes.barh(place, spread.median, color=COLORS[line], xerr=whiskers, ecolor="0.3")
        axes.text(spread.most, place, f" {spread.median:,.{digits}f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [LINES[line] for line in names], fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, 1.2 * max(spread.most for spread in found.values() if spread))


def _times(results: Results, dtype: str) -> Figure:
    title = f"Time as a ratio to the same network with bare convolutions, {dtype}, channels_last"
    figure, axes = _figure(results, title, len(results.networks), len(WAYS))
    for row, name in zip(axes, results.networks, strict=True):
        for one, (task, mode) in zip(row, WAYS, strict=True):
            lines = [line for line in LINES if task == "infer" or line != "frozen"]
            key = (name, task, dtype, mode)
            _bars(one, {line: results.ratio(key, line) for line in lines}, 2)
            one.axvline(1, color="0.6", linewidth=0.8)
            one.set_title(f"{name}\n{TASKS[task]}, {mode}", fontsize=10)
    return figure


def _memory(results: Results, dtype: str) -> Figure:
    memory = results.header.get("memory", "memory")
    title = f"Training, MiB, {dtype}: {memory}"
    figure, axes = _figure(results, title, len(results.networks), len(MODES))
    for row, name in zip(axes, results.networks, strict=True):
        for one, mode in zip(row, MODES, strict=True):
            lines = [line for line in LINES if line != "frozen"]
            found = {line: results.memory(name, dtype, mode, line) for line in lines}
            _bars(one, {k: Spread(m, m, m) if m else None for k, m in found.items()}, 0)
            one.set_title(f"{name}, {mode}", fontsize=10)
    return figure


def _sweep(results: Results) -> Figure:
    """Overhead over kernel sizes and channels; the published layer needs a scale of its own."""
    size = next(s for s in results.settings.values() if s.model == results.layers[0].name)
    title = "Milliseconds a layer takes above its bare convolution, eager, "
    title += f"{size.dtype}, batch {size.batch_size}, {size.pixels} x {size.pixels} pixels"
    figure, axes = _figure(results, title, 2, 4)
    usual = ["ours", "batch", "group"]
    for row, by in zip(axes, ("kernel", "channels"), strict=True):
        panels = [(task, lines) for task in TASKS for lines in (usual, [*usual, "published"])]
        for one, (task, lines) in zip(row, panels, strict=True):
            _curves(one, results, by, task, lines)
    return figure


def _curves(axes: Any, results: Results, by: str, task: str, lines: list[str]) -> None:
    """Overhead of some lines over "kernel" sizes or "channels"; least to most as whiskers."""
    layers = swept(results, by)
    for line in lines:
        found = [results.overhead(sweep_key(results, layer, task), line) for layer in layers]
        points = [(getattr(layer, by), ms) for layer, ms in zip(layers, found, strict=True) if ms]
        if points:
            places, spreads = zip(*points, strict=True)
            whiskers = [[s.median - s.least for s in spreads], [s.most - s.median for s in spreads]]
            middle = [s.median for s in spreads]
            style = dict(marker="o", color=COLORS[line], capsize=2, label=LINES[line])
            axes.errorbar(places, middle, whiskers, **style)
    other = f"{layers[0].channels} channels" if by == "kernel" else f"kernel {layers[0].kernel}"
    axes.set_xticks([getattr(layer, by) for layer in layers])
    axes.set_xlabel(f"{by} ({other})", fontsize=9)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_title(TASKS[task] + (", with published" if "published" in lines else ""), fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
