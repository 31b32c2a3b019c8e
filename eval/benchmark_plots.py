"""Figures of the benchmark's results; every axis starts at 0."""

import os
from pathlib import Path
from typing import Any

from benchmark_report import (
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
from matplotlib.figure import Figure

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
    hardware = "\n".join(head.get(name, "") for name in ("device", "versions", "load"))
    figure.suptitle(f"{title}\n", fontsize=13)
    figure.supxlabel(f"{hardware}\n{titles(results)}", fontsize=8)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bars(axes: Any, found: dict[str, Spread | None], digits: int) -> None:
    """One horizontal bar a line, from 0, with its number; least to most as whiskers."""
    names = list(found)[::-1]
    for place, line in enumerate(names):
        spread = found[line]
        if spread is None:
            axes.text(0, place, " not measured", va="center", fontsize=8, color="0.4")
            continue
        whiskers = [[spread.median - spread.least], [spread.most - spread.median]]
        axes.barh(place, spread.median, color=COLORS[line], xerr=whiskers, ecolor="0.3")
        axes.text(spread.most, place, f" {spread.median:,.{digits}f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [LINES[line] for line in names], fontsize=8)
    most = max((spread.most for spread in found.values() if spread), default=1.0)
    axes.set_xlim(0, 1.2 * most)
    axes.spines[["top", "right"]].set_visible(False)


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
    title = f"Milliseconds a layer takes above its bare convolution, {results.dtypes[0]}, eager"
    figure, axes = _figure(results, title, 2, 4)
    for row, by in zip(axes, ("kernel", "channels"), strict=True):
        layers = swept(results, by)
        panels = [(task, others) for task in TASKS for others in ([], ["published"])]
        for one, (task, others) in zip(row, panels, strict=True):
            keys = {getattr(layer, by): sweep_key(results, layer, task) for layer in layers}
            most = 0.0
            for line in ["ours", "batch", "group", *others]:
                found = {place: results.overhead(key, line) for place, key in keys.items()}
                points = {place: spread for place, spread in found.items() if spread}
                if not points:
                    continue
                middle = [spread.median for spread in points.values()]
                least = [spread.median - spread.least for spread in points.values()]
                above = [spread.most - spread.median for spread in points.values()]
                one.errorbar(
                    list(points), middle, [least, above], marker="o", label=LINES[line],
                    color=COLORS[line], capsize=2,
                )  # fmt: skip
                most = max(most, *middle)
            one.set_xticks(list(keys))
            one.set_xlabel("kernel size" if by == "kernel" else "channels")
            one.set_ylim(min(0.0, one.get_ylim()[0]), 1.2 * most or 1.0)
            one.axhline(0, color="0.6", linewidth=0.8)
            one.set_title(
                TASKS[task] + (", with the published layer" if others else ""), fontsize=10
            )
            if one.get_legend_handles_labels()[0]:
                one.legend(fontsize=7)
    return figure
