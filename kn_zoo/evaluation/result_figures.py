"""Figures of docs/results.md; one color for each norm."""

import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from kn_zoo.checkpoints import bundle, files
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.evaluation.results import (
    CAMVID,
    FIGURES,
    NORMS,
    SMALL_BATCH,
    STATISTICS,
    Row,
    by_dataset,
    by_recipe,
    by_shape,
    core_hours,
    in_order,
    read_table,
    top1,
    trained_here,
    values,
    with_reestimated,
)

COLORS = {
    "kernel": "C0",
    "batch": "C2",
    "batch_reestimated": "C8",
    "group": "C4",
    "layer": "C5",
    "local_context": "C6",
    "none": "0.5",
}


def plot() -> list[Path]:
    """Write the figures of the page; returns their paths."""
    checkpoints, private = trained_here(), trained_here(private=True)
    figures = {f"curves_{name}": curves(group) for name, group in by_recipe(checkpoints).items()}
    figures["statistics"] = statistics([c for c in checkpoints + private if c.norm == "kernel"])
    if private:
        figures["private"] = private_curves(private)
    for dataset, group in by_dataset(checkpoints).items():
        figures[f"accuracy_{dataset}"] = accuracy(group)
    if rows := with_reestimated(read_table(SMALL_BATCH)):
        figures["small_batch"] = by_batch_size(rows, "top1", "Top-1 by batch size, equal epochs")
    if rows := read_table(CAMVID):
        title = "Mean IoU on CamVid by batch size, equal epochs"
        figures["camvid_small_batch"] = by_batch_size(rows, "miou", title)
    return [save(figure, FIGURES / f"{name}.png") for name, figure in figures.items()]


def accuracy(group: Sequence[Checkpoint]) -> Figure:
    """Draw accuracy against training time and FLOPs: a marker for each recipe and shape."""
    figure, (left, right) = panels(2, f"Top-1 on {group[0].dataset.name}, mean and SD of the seeds")
    compared = [shape for recipe in by_recipe(group).values() for shape in by_shape(recipe)]
    for marker, checkpoints in zip(cycle("osD^vP"), compared):
        for checkpoint in checkpoints:
            style = dict(
                color=COLORS[checkpoint.norm], fmt=marker, markersize=7, capsize=3, alpha=0.7
            )
            value, error = checkpoint.mean_and_sd() or (top1(checkpoint), None)
            right.errorbar(checkpoint.flops / 1e9, value, error, label=checkpoint.name, **style)
            if (hours := core_hours(checkpoint)) is not None:
                left.errorbar(hours, value, error, **style)
    values = [top1(checkpoint) for checkpoint in group]
    limits = (min(values) - 2, max(values) + 2)
    left.set(xlabel="core-hours of training", ylabel="top-1 %", xlim=(0, None), ylim=limits)
    right.set(xlabel="GFLOPs of one image", ylabel="top-1 %", xlim=(0, None), ylim=limits)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    return figure


def statistics(checkpoints: Sequence[Checkpoint]) -> Figure:
    figure, axes = panels(1, "Top-1 under the three inference statistics")
    for place, checkpoint in enumerate(checkpoints):
        reported = checkpoint.reported.statistics
        for shift, name in enumerate(STATISTICS):
            value, height = reported[name].top1, place + 0.27 * (1 - shift)
            label = name if place == 0 else None
            axes.barh(height, value, 0.25, color=f"C{shift}", label=label)
            axes.text(value, height, f" {value:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(checkpoints)), [c.name for c in checkpoints], fontsize=8)
    axes.set(xlabel="top-1 %", xlim=(0, 112), ylim=(-0.5, len(checkpoints) - 0.5))
    axes.grid(visible=False)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    return figure


def curves(group: Sequence[Checkpoint]) -> Figure:
    figure, (left, right) = panels(2, group[0].recipe or "")
    for linestyle, checkpoints in zip(cycle(("-", "--", ":")), by_shape(group)):
        for checkpoint in checkpoints:
            rows = read_table(checkpoint.folder / bundle.LOG)
            epochs = [int(row["epoch"]) for row in rows]
            color, label = COLORS[checkpoint.norm], checkpoint.name
            style = dict(color=color, linestyle=linestyle, label=label)
            left.plot(epochs, [float(row["loss"]) for row in rows], **style)
            right.plot(epochs, [float(row["top1"]) for row in rows], **style)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="top-1 % during training", ylim=(0, 100))
    right.legend(fontsize=7, loc="lower right")
    return figure


def private_curves(checkpoints: Sequence[Checkpoint]) -> Figure:
    """Draw the accuracy on test images by epoch; training losses are not published."""
    figure, axes = panels(1, "Top-1 on test images, differentially private training")
    for place, checkpoint in enumerate(checkpoints):
        rows = read_table(checkpoint.folder / bundle.LOG)
        epochs = [int(row["epoch"]) for row in rows]
        label = f"{NORMS[checkpoint.norm]}, epsilon {float(rows[-1]['epsilon']):.2f}"
        style = dict(color=COLORS[checkpoint.norm], linestyle=("-", "--", ":")[place % 3])
        axes.plot(epochs, [float(row["top1"]) for row in rows], label=label, **style)
    axes.set(xlabel="epoch", ylabel="top-1 %", ylim=(0, 100))
    axes.legend(fontsize=8, loc="lower right")
    return figure


def by_batch_size(rows: Sequence[Row], score: str, title: str) -> Figure:
    """Draw mean and SD of the column `score`, "top1" or "miou", over batch sizes, a line a norm."""
    figure, axes = panels(1, title)
    sizes = sorted({int(row["batch_size"]) for row in rows})
    for norm in in_order(rows, "norm"):
        runs = [values(rows, norm, size, score) for size in sizes]
        errors = [stdev(scores) if len(scores) > 1 else 0.0 for scores in runs]
        style = dict(color=COLORS[norm], fmt="o-", markersize=4, capsize=3)
        axes.errorbar(sizes, [mean(scores) for scores in runs], errors, label=NORMS[norm], **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    label = {"top1": "top-1 %", "miou": "mean IoU %"}[score]
    bars = "; bars: SD over seeds" if len(in_order(rows, "seed")) > 1 else ""
    axes.set(xlabel=f"batch size{bars}", ylabel=label, ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


def panels(count: int, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(1 + 3.6 * count, 3.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, count)
    for panel in [axes] if count == 1 else axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", linewidth=0.4)
    return figure, axes


def save(figure: Figure, path: Path, dpi: int = 110) -> Path:
    """Write a figure as a PNG file, as a whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png", metadata={"Software": None})
    files.write_bytes(path, buffer.getvalue())
    return path
