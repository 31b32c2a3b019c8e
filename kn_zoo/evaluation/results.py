"""docs/results.md, from the manifest, the bundles and the tables in results/."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
import yaml

from kn_zoo.checkpoints import bundle, manifest
from kn_zoo.checkpoints.manifest import Checkpoint, Privacy
from kn_zoo.evaluation import measurements
from kn_zoo.evaluation.goals import SMALL_BATCH_SIZE
from kn_zoo.evaluation.measurements import TASKS, Results, Setting, Spread, Workload
from kn_zoo.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "results"
SMALL_BATCH = FIGURES / "small_batch.csv"
SMALL_BATCH_RATES = FIGURES / "small_batch_rates.csv"
SMALL_BATCH_RECIPE = "train_scripts/recipes/small_batch.yaml"
GAP = FIGURES / "gap.csv"
GAP_RECIPE = "train_scripts/recipes/cifar100_gap.yaml"
CAMVID = FIGURES / "camvid_small_batch.csv"
CAMVID_RECIPE = "train_scripts/recipes/segmentation/camvid_small_batch.yaml"
BENCHMARK = FIGURES / "benchmark_cpu.csv"
NORMS = {
    "kernel": "kernel normalization",
    "batch": "BatchNorm",
    "batch_reestimated": "BatchNorm, re-estimated",
    "group": "GroupNorm",
    "layer": "LayerNorm",
    "local_context": "LocalContextNorm",
    "none": "no normalization",
}
REESTIMATED = (
    "Re-estimated: after training, BatchNorm's statistics are averaged anew over the augmented "
    "training images (`torch.optim.swa_utils.update_bn`), because running averages are noisy at "
    "small batch sizes."
)
WITHOUT_NORM = (
    "At batch size {sizes}, no normalization is the most accurate: {depth} layers train without "
    "it. There, the table shows how much accuracy each norm loses, not that a norm is needed."
)
ACTIVATIONS = {"mish": "Mish", "prelu": "PReLU"}
STATISTICS = ("expected", "plain", "sampled")

Row = Mapping[str, str]


def page() -> str:
    """The text of docs/results.md."""
    checkpoints, private = trained_here(), trained_here(private=True)
    rows = with_reestimated(read_table(SMALL_BATCH))
    recipe = yaml.safe_load((ROOT / SMALL_BATCH_RECIPE).read_text(encoding="utf-8"))
    parts = [
        "# Results",
        "This page is generated from `weights_manifest.json`, the checkpoints' bundles and "
        "`results/`. `make verify` recomputes the accuracy of each checkpoint.",
        *answer_section(checkpoints, rows),
        *accuracy_section(checkpoints),
        *cost_section(measurements.read(BENCHMARK)),
        *statistics_section([c for c in checkpoints + private if c.norm == "kernel"]),
        *curves_section(checkpoints),
        *gap_section(read_table(GAP), as_mapping(comments(GAP))),
        *small_batch_section(
            rows, read_table(SMALL_BATCH_RATES), recipe, as_mapping(comments(SMALL_BATCH))
        ),
        *camvid_section(read_table(CAMVID), as_mapping(comments(CAMVID))),
        *private_section(private),
        "## Machines and versions",
        "\n".join(f"- `{c.name}`: {machine(environment(c))}" for c in checkpoints + private),
    ]
    return "\n\n".join(parts) + "\n"


def trained_here(private: bool = False) -> list[Checkpoint]:
    """Classifiers with a bundle, trained without or with differential privacy."""
    known = [c for c in manifest.load().values() if c.bundle and c.task == "classification"]
    return [c for c in known if bool(c.privacy) == private]


# Is it worth it?


def answer_section(checkpoints: Sequence[Checkpoint], rows: Sequence[Row]) -> list[str]:
    compared = comparisons(checkpoints)
    return [
        "## Is kernel normalization worth it?",
        f"**Accuracy.** {most_accurate(compared, rows)}",
        "\n".join(difference(group) for group in compared),
        f"**Cost.** {cost_sentence(measurements.read(BENCHMARK))} [Cost](#cost) has the table.",
        "**When to use it.** The output for an image never depends on the rest of the batch, not "
        "even in training. Use kernel normalization where batch statistics are unreliable or "
        "forbidden: batches of a few images, or per-example gradients as in differentially private "
        "training. Where BatchNorm sees large batches, the comparisons below decide.",
    ]


def comparisons(checkpoints: Iterable[Checkpoint]) -> list[list[Checkpoint]]:
    """Checkpoints of one recipe file, shape of network and epsilon; kernel normalization first."""

    def key(checkpoint: Checkpoint) -> tuple[str | None, str, float | None]:
        epsilon = checkpoint.privacy.epsilon if checkpoint.privacy else None
        return checkpoint.recipe, shape(checkpoint), epsilon

    groups = grouped(checkpoints, key).values()
    compared = [sorted(group, key=lambda c: c.norm != "kernel") for group in groups]
    return [group for group in compared if len(group) > 1 and group[0].norm == "kernel"]


def grouped(checkpoints: Iterable[Checkpoint], key: Callable) -> dict[Any, list[Checkpoint]]:
    """Checkpoints by the value of `key`, in their order."""
    groups: dict[Any, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        groups.setdefault(key(checkpoint), []).append(checkpoint)
    return groups


def shape(checkpoint: Checkpoint) -> str:
    """The architecture without its norm: networks of one shape differ in their norm only."""
    return checkpoint.architecture.removeprefix("kn")


def most_accurate(compared: Iterable[Sequence[Checkpoint]], rows: Sequence[Row]) -> str:
    """Name the most accurate norm at each batch size, over all comparisons."""
    winners: dict[str, set[int]] = {}
    for group in compared:
        best = max(group, key=mean_top1)
        winners.setdefault(best.norm, set()).add(int(settings(best)["batch_size"]))
    for size in {int(row["batch_size"]) for row in rows}:
        winner = most_accurate_at(rows, size).removesuffix("_reestimated")
        winners.setdefault(winner, set()).add(size)
    phrases = [
        f"{NORMS[norm]} at batch size {listed(map(str, sorted(winners[norm])))}"
        for norm in NORMS
        if norm in winners
    ]
    return f"In classification, the most accurate on this page: {'; '.join(phrases)}."


def most_accurate_at(rows: Sequence[Row], size: int) -> str:
    """The norm with the largest mean top-1 at a batch size."""
    return max(in_order(rows, "norm"), key=lambda norm: mean_of(rows, norm, size, "top1"))


def difference(group: Sequence[Checkpoint]) -> str:
    """One list item: the accuracy of a kernel-normalized network beside that of its baselines."""
    kernel, *baselines = group
    recipe = settings(kernel)
    phrases = []
    for baseline in baselines:
        points = mean_top1(kernel) - mean_top1(baseline)
        details = [mean_and_spread(baseline), changes(baseline.model_args)]
        about = "; ".join(filter(None, details))
        side = "below" if points < 0 else "above"
        phrases.append(f"{abs(points):.2f} points {side} {NORMS[baseline.norm]} ({about})")
    changed = f" ({words})" if (words := changes(kernel.model_args)) else ""
    epsilon = f", epsilon {kernel.privacy.epsilon:.2f}" if kernel.privacy else ""
    return (
        f"- `{kernel.name}`{changed}, {recipe['epochs']} epochs at batch size "
        f"{recipe['batch_size']}{epsilon}: top-1 {mean_and_spread(kernel)}; {listed(phrases)}."
    )


def top1(checkpoint: Checkpoint) -> float:
    """Top-1 in percent under the default inference statistics."""
    return checkpoint.reported.statistics["expected"].top1


def mean_top1(checkpoint: Checkpoint) -> float:
    """The mean of `top1` over the seeds, the stored one among them."""
    several = checkpoint.mean_and_sd()
    return several[0] if several else top1(checkpoint)


def mean_and_spread(checkpoint: Checkpoint) -> str:
    """Mean top-1, its SD and the number of runs, in words."""
    several = checkpoint.mean_and_sd()
    spread = f"SD {several[1]:.2f}, {len(checkpoint.runs)} runs" if several else "one run"
    return f"{mean_top1(checkpoint):.2f} %, {spread}"


def listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


# Accuracy against training time and FLOPs

ACCURACY_HEAD = "checkpoint|norm|data|epochs|batch|seeds|top-1 %|mean (SD)|GFLOPs|core-hours"


def accuracy_section(checkpoints: Sequence[Checkpoint]) -> list[str]:
    return [
        "## Accuracy, training time and FLOPs",
        "All checkpoints trained by this project. Accuracy is that of the stored file under "
        "`expected` statistics; each row is one run unless it names several seeds, whose mean and "
        "SD follow. FLOPs are for one image, with multiplications and additions counted "
        "separately. Core-hours are the time of one run's parameter updates on a CPU, multiplied "
        "by the number of threads. [Processors](#machines-and-versions) differ and were shared "
        "with other work, so core-hours are indicative; [Cost](#cost) was measured separately.",
        table(ACCURACY_HEAD, [accuracy_row(checkpoint) for checkpoint in checkpoints]),
        "GroupNorm has 32 groups, or fewer where that leaves less than two channels to a group.",
        *(
            image(f"accuracy_{dataset}", f"top-1 on {dataset} against core-hours and against FLOPs")
            for dataset in by_dataset(checkpoints)
        ),
    ]


def accuracy_row(checkpoint: Checkpoint) -> list[str]:
    recipe = settings(checkpoint)
    several = checkpoint.mean_and_sd()
    return [
        f"`{checkpoint.name}`",
        NORMS[checkpoint.norm].removesuffix(" normalization"),
        checkpoint.dataset.name,
        str(recipe["epochs"]),
        str(recipe["batch_size"]),
        ", ".join(map(str, checkpoint.seeds)),
        f"{top1(checkpoint):.2f}",
        f"{several[0]:.2f} ({several[1]:.2f})" if several else "",
        f"{checkpoint.flops / 1e9:#.3g}",
        "" if (hours := core_hours(checkpoint)) is None else f"{hours:.2f}",
    ]


def by_dataset(checkpoints: Iterable[Checkpoint]) -> dict[str, list[Checkpoint]]:
    """The data sets on which several checkpoints can be compared."""
    groups = grouped(checkpoints, lambda checkpoint: checkpoint.dataset.name)
    return {name: group for name, group in groups.items() if len(group) > 1}


def settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The recipe in the checkpoint's bundle."""
    return yaml.safe_load((checkpoint.folder / bundle.RECIPE).read_text(encoding="utf-8"))


def environment(checkpoint: Checkpoint) -> dict[str, str]:
    """The lines of environment.txt, by their first word."""
    text = (checkpoint.folder / bundle.ENVIRONMENT).read_text(encoding="utf-8")
    return as_mapping(text.splitlines())


def core_hours(checkpoint: Checkpoint) -> float | None:
    """Duration of the training times the threads used; None if not recorded, or on a GPU."""
    recorded = environment(checkpoint)
    if "training" not in recorded or recorded["gpu"] != "none":
        return None
    hours, threads = recorded["training"].split()[0], recorded["cpu"].rpartition("threads used ")[2]
    return float(hours) * int(threads)


def as_mapping(lines: Iterable[str]) -> dict[str, str]:
    values = {}
    for line in lines:
        name, _, rest = line.partition(" ")
        if name == "cpu" and rest.startswith("cores"):
            name, rest = "cores", rest.partition(" ")[2]
        values[name.rstrip(":")] = rest
    return values


def machine(recorded: Mapping[str, str]) -> str:
    gpu = "" if recorded.get("gpu", "none") == "none" else f"{recorded['gpu']}, "
    cpu = recorded.get("cpu", "a CPU whose name was not recorded")
    versions = ", ".join(f"{name} {recorded[name]}" for name in ("torch", "timm", "python"))
    return f"{gpu}{cpu}, {recorded['cores']} cores; {versions}; kn_zoo {recorded['kn_zoo']}"


# Cost

COST_HEAD = (
    "network|batch|step|mode|kernel normalization|BatchNorm|GroupNorm|kernel normalization / ResNet"
)


def cost_section(results: Results) -> list[str]:
    return [
        "## Cost",
        "Time of a step, float32. The first three ratios are to the same network without "
        "normalization. The last is a KNResNet to the ordinary ResNet of the same depth (timm's, "
        "torchvision's), which has fewer FLOPs: see "
        "[Models](models.md). An empty cell was not measured. [Performance](performance.md) has "
        "every number.",
        table(COST_HEAD, [cost_row(results, setting) for setting in measured(results)]),
        "Measured on: "
        + "; ".join(results.header[name] for name in ("device", "versions", "date", "load"))
        + ".",
    ]


def cost_row(results: Results, setting: Setting) -> list[str]:
    ratios = [results.ratio(setting, v) for v in ("kernel_norm", "batch_norm", "group_norm")]
    ratios.append(results.ratio(setting, "kernel_norm", "resnet"))
    cells = ["" if ratio is None else f"{ratio.median:.2f}" for ratio in ratios]
    model, _, _, size = setting.workload
    return [f"`{model}`", str(size), TASKS[setting.task], setting.mode, *cells]


def cost_sentence(results: Results) -> str:
    """Cost of kernel normalization, and of a KNResNet-18 beside a ResNet-18, in one sentence.

    Small batches, for which the number of operations decides, are left to the tables.

    Raises LookupError if the results lack what the sentence is about.
    """

    usual = [s for s in measured(results) if s.workload.batch_size > SMALL_BATCH_SIZE]
    sizes = sorted({setting.workload.batch_size for setting in usual})

    def added(task: str, variant: str) -> str:
        return _range([results.ratio(s, variant) for s in usual if s.task == task])

    resnet18 = [s for s in usual if s.workload.model.startswith("knresnet18")]
    longer = _range([results.ratio(setting, "kernel_norm", "resnet") for setting in resnet18])
    flops = sorted({f"{flops_ratio(setting.workload):.1f}" for setting in resnet18})
    return (
        f"On a CPU in float32, at batch sizes {listed(map(str, sizes))}, a network with kernel "
        "normalization takes "
        f"{added('infer', 'kernel_norm')} times the time of the same network without "
        f"normalization at inference and {added('train', 'kernel_norm')} times in training "
        f"(BatchNorm: {added('infer', 'batch_norm')} and {added('train', 'batch_norm')}); a "
        f"KNResNet-18 has {' to '.join(flops)} times the FLOPs of an ordinary ResNet-18 and takes "
        f"{longer} times as long."
    )


def _range(ratios: Sequence[Spread | None]) -> str:
    known = [ratio.median for ratio in ratios if ratio is not None]
    if not known:
        raise LookupError("the benchmark lacks a variant that the sentence on cost is about")
    return f"{min(known):.2f} to {max(known):.2f}"


def flops_ratio(workload: Workload) -> float:
    """Return the FLOPs of a `kn*` network relative to the ordinary network of the same depth."""
    size = (workload.channels, workload.pixels, workload.pixels)
    with torch.device("meta"):  # shapes are enough
        kernel_norm, ordinary = (
            bundle.flops(timm.create_model(name, in_chans=workload.channels), size)
            for name in (workload.model, workload.model.removeprefix("kn"))
        )
    return kernel_norm / ordinary


def measured(results: Results) -> list[Setting]:
    """Settings of whole networks in float32 for which there is a time, in the file's order."""
    return list(
        dict.fromkeys(
            row.setting
            for row in results.rows
            if row.samples_ms and row.setting.dtype == "float32" and not row.setting.layer
        )
    )


# Inference statistics


def statistics_section(checkpoints: Sequence[Checkpoint]) -> list[str]:
    rows, best, better = [], 0, 0
    for checkpoint in checkpoints:
        reported = checkpoint.reported.statistics
        values = [reported[name].top1 for name in STATISTICS]
        best += values[0] >= max(values)
        better += values[0] >= values[1]
        sampled = reported["sampled"]
        sd = "" if sampled.top1_sd is None else f"{sampled.top1_sd:.2f}"
        cells = [f"{value:.2f}" for value in values]
        images = f"{checkpoint.dataset.images:,}"
        rows.append([f"`{checkpoint.name}`", images, *cells, sd, str(sampled.draws)])
    return [
        "## Inference statistics",
        "Top-1 in percent of the same file under the three [inference statistics]"
        "(kernel-normalization.md#inference-statistics): `expected` (the default), `plain` and "
        "`sampled` (mean and SD over draws).",
        table("checkpoint|images|expected|plain|sampled|SD|draws", rows),
        f"`expected` is at least as accurate as `plain`, the other deterministic choice, for "
        f"{better} of {len(checkpoints)} checkpoints, and the most accurate of the three for "
        f"{best}.",
        image("statistics", "top-1 under the three inference statistics"),
    ]


# Learning curves


def by_recipe(checkpoints: Iterable[Checkpoint]) -> dict[str, list[Checkpoint]]:
    return grouped(checkpoints, lambda c: Path(str(c.recipe)).stem.replace(".", "_"))


def by_shape(checkpoints: Iterable[Checkpoint]) -> list[list[Checkpoint]]:
    return list(grouped(checkpoints, shape).values())


def curves_section(checkpoints: Sequence[Checkpoint]) -> list[str]:
    parts = ["## Learning curves"]
    for name, group in by_recipe(checkpoints).items():
        recipe = settings(group[0])
        held_out, sides = recipe.get("held_out"), recipe.get("resolutions")
        on = f"{100 * held_out:g} % of the training images, held out" if held_out else "test images"
        if sides:
            grow = listed(f"{side} pixels from epoch {first}" for first, side in sides.items())
            on += f", at full size; training images have a side of {grow}"
        parts.append(f"`{group[0].recipe}`, accuracy measured on {on}:")
        parts.append(image(f"curves_{name}", "loss and accuracy by epoch"))
    return parts


# Changes to the small network


def gap_section(rows: Sequence[Row], recorded: Mapping[str, str]) -> list[str]:
    """Accuracy on held-out images of changed networks, the most accurate first."""
    if not rows:
        return []
    runs = {name: [r for r in rows if r["recipe"] == name] for name in in_order(rows, "recipe")}
    recipes = {name: Recipe.read(ROOT / GAP_RECIPE, name) for name in runs}
    scores = {name: [float(row["top1"]) for row in group] for name, group in runs.items()}
    names = sorted(scores, key=lambda name: -mean(scores[name]))
    cells = [
        [
            NORMS[runs[name][0]["norm"]],
            changes(recipes[name].model_args) or "none",
            f"{recipes[name].optimizer['lr']:g}",
            f"{recipes[name].optimizer['weight_decay']:g}",
            mean_and_sd(scores[name]),
            f"{mean(float(row['loss']) for row in runs[name]):.3f}",
        ]
        for name in names
    ]
    narrow = [name for name in names if "widths" not in recipes[name].model_args]
    best = []
    for norm in in_order([runs[name][0] for name in narrow], "norm"):
        tried = [mean(scores[name]) for name in narrow if runs[name][0]["norm"] == norm]
        best.append(f"{NORMS[norm]} {max(tried):.1f} % ({len(tried)} tried)")
    recipe = recipes[names[0]]
    side = recipe.preprocessing["input_size"][-1]
    return [
        "## Changes to the small network",
        "BatchNorm normalizes each channel over the batch; LayerNorm all channels of an image "
        "together, GroupNorm groups of them, and kernel normalization all channels of a window. "
        f"`{recipe.architecture.removeprefix('kn')}` with changes: "
        f"{recipe.epochs} epochs on {recipe.dataset} `{recipe.train_split}` at "
        f"{side}x{side} pixels, top-1 in percent on `{recipe.eval_split}` and mean training "
        "loss of the last epoch; one seed each, unless an SD follows. Test images are not used.",
        f"The most accurate row of each norm with the network's own channels: {listed(best)}.",
        table("norm|changes|rate|weight decay|top-1 %|loss", cells),
        f"Measured on: {machine(recorded)}. Recipe: `{GAP_RECIPE}`.",
    ]


def changes(args: Mapping[str, Any]) -> str:
    """Describe what arguments of a network change in it, apart from its norm; "" if nothing."""
    phrases = ["standardized filters"] if args.get("weight_standardization") else []
    phrases += ["ordinary convolution as stem"] if not args.get("stem_norm", True) else []
    phrases += [f"{ACTIVATIONS[args['act_layer']]} for ReLU"] if "act_layer" in args else []
    phrases += [f"{'-'.join(map(str, args['widths']))} channels"] if "widths" in args else []
    return ", ".join(phrases)


# Batch size


def small_batch_section(
    rows: Sequence[Row],
    rates: Sequence[Row],
    recipe: Mapping[str, Any],
    recorded: Mapping[str, str],
) -> list[str]:
    parts = ["## Batch size"]
    if not rows:
        return [*parts, f"Not measured yet: `{SMALL_BATCH_RECIPE}`."]
    norms, sizes = in_order(rows, "norm"), sorted({int(row["batch_size"]) for row in rows})
    cells = [
        [str(size), *(mean_and_sd(values(rows, norm, size, "top1")) for norm in norms)]
        for size in sizes
    ]
    seeds, epochs = in_order(rows, "seed"), rows[0]["epochs"]
    winners = [most_accurate_at(rows, size) for size in sizes]
    unneeded = [str(size) for size, norm in zip(sizes, winners, strict=True) if norm == "none"]
    depth = 2 + 2 * sum(recipe["model_args"]["depths"])
    _, height, width = recipe["preprocessing"]["input_size"]
    return [
        *parts,
        f"PreActResNet-{depth} on {recipe['dataset']} `{recipe['train_split']}` at "
        f"{height}x{width}, {epochs} epochs at every batch size, seeds {listed(seeds)}; top-1 in "
        "percent on the test images, mean (SD) over the seeds. Each learning rate is the best of a "
        f"search in factors of two, {rates[0]['epochs']} epochs for each rate, on "
        f"{int(rates[0]['images']):,} held-out training images "
        f"(`{SMALL_BATCH_RATES.relative_to(ROOT)}`).",
        *([REESTIMATED] if "batch_reestimated" in norms else []),
        table("|".join(["batch", *(NORMS[norm] for norm in norms)]), cells),
        image("small_batch", "top-1 by batch size"),
        effect_of_batch_size(rows, "top1", "top-1"),
        f"In equal epochs, batch size {sizes[0]} makes {sizes[-1] // sizes[0]} times as many "
        f"updates as batch size {sizes[-1]}. The table therefore compares norms within a row, in a "
        "short training; it does not compare networks trained to convergence, or at another scale.",
        *([WITHOUT_NORM.format(sizes=listed(unneeded), depth=depth)] if unneeded else []),
        f"Measured on: {machine(recorded)}. Recipe: `{SMALL_BATCH_RECIPE}`.",
    ]


def with_reestimated(rows: Sequence[Row]) -> list[Row]:
    """Repeat each BatchNorm run after itself, with its accuracy under re-estimated statistics."""
    result: list[Row] = []
    for row in rows:
        result.append(row)
        if reestimated := row.get("top1_reestimated"):
            result.append({**row, "norm": "batch_reestimated", "top1": reestimated})
    return result


def camvid_section(rows: Sequence[Row], recorded: Mapping[str, str]) -> list[str]:
    parts = ["## Segmentation: batch size"]
    if not rows:
        return [*parts, f"Not measured yet: `{CAMVID_RECIPE}`."]
    norms, sizes = in_order(rows, "norm"), sorted({int(row["batch_size"]) for row in rows})
    cells = [
        [str(size), *(mean_and_sd(values(rows, norm, size, "miou")) for norm in norms)]
        for size in sizes
    ]
    seeds = in_order(rows, "seed")
    return [
        *parts,
        f"FCN on a PreActResNet-18 of half width, CamVid at 240x180, {rows[0]['epochs']} epochs at "
        f"every batch size, {'seeds' if len(seeds) > 1 else 'seed'} {listed(seeds)}; mean IoU in "
        "percent on the test images, on labels of 480x360. The rate is the same for all norms at "
        f"one batch size; it was not searched. In equal epochs, batch size {sizes[0]} makes "
        f"{sizes[-1] // sizes[0]} times as many updates as batch size {sizes[-1]}.",
        table("|".join(["batch", *(NORMS[norm] for norm in norms)]), cells),
        image("camvid_small_batch", "mean IoU by batch size"),
        effect_of_batch_size(rows, "miou", "mean IoU"),
        f"Measured on: {machine(recorded)}. Recipe: `{CAMVID_RECIPE}`.",
    ]


def effect_of_batch_size(rows: Sequence[Row], score: str, name: str) -> str:
    """Compare each norm's mean at the smallest and largest batch size, and norms within each."""
    sizes = sorted({int(row["batch_size"]) for row in rows})
    ends = {size: means_at(rows, size, score) for size in (sizes[0], sizes[-1])}
    small, large = ends.values()
    changes = [f"{small[norm] - large[norm]:+.1f} ({NORMS[norm]})" for norm in small]
    gains = []
    for size, means in ends.items():
        others = [f"{means['kernel'] - means[n]:+.1f} ({NORMS[n]})" for n in means if n != "kernel"]
        gains.append(f"{listed(others)} at batch size {size}")
    return (
        f"From batch size {sizes[-1]} to {sizes[0]}, {name} changes by {listed(changes)} points. "
        f"Kernel normalization's {name} minus that of the others is {'; '.join(gains)}."
    )


def means_at(rows: Sequence[Row], size: int, score: str) -> dict[str, float]:
    return {norm: mean_of(rows, norm, size, score) for norm in in_order(rows, "norm")}


def values(rows: Iterable[Row], norm: str, size: int, column: str) -> list[float]:
    """A column of the runs of one norm at one batch size."""
    wanted = (norm, str(size))
    return [float(row[column]) for row in rows if (row["norm"], row["batch_size"]) == wanted]


def mean_of(rows: Iterable[Row], norm: str, size: int, score: str) -> float:
    return mean(values(rows, norm, size, score))


def mean_and_sd(numbers: Sequence[float]) -> str:
    return f"{mean(numbers):.1f}" + (f" ({stdev(numbers):.1f})" if len(numbers) > 1 else "")


def in_order(rows: Iterable[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


# Differential privacy

PRIVATE_HEAD = "checkpoint|norm|data, images|epsilon|delta|epsilon, RDP|noise|steps|top-1 %"


def private_section(checkpoints: Sequence[Checkpoint]) -> list[str]:
    if not checkpoints:
        return []
    return [
        "## Differential privacy",
        "Checkpoints trained by DP-SGD, one run each. [Differential privacy](privacy.md) says what "
        "epsilon and delta promise. `make verify` recomputes accuracy and epsilon.",
        private_table(checkpoints),
        *map(difference, comparisons(checkpoints)),
        image("private", "top-1 of the privately trained networks by epoch"),
    ]


def private_table(checkpoints: Iterable[Checkpoint]) -> str:
    return table(PRIVATE_HEAD, [private_row(c, c.privacy) for c in checkpoints if c.privacy])


def private_row(checkpoint: Checkpoint, privacy: Privacy) -> list[str]:
    return [
        f"`{checkpoint.name}`",
        NORMS[checkpoint.norm].removesuffix(" normalization"),
        f"{checkpoint.dataset.name}, {privacy.images:,}",
        f"{privacy.epsilon:.2f}",
        f"{privacy.delta:g}",
        f"{privacy.epsilon_rdp:.2f}",
        f"{privacy.noise_multiplier:.3f}",
        f"{privacy.steps:,}",
        f"{top1(checkpoint):.2f}",
    ]


# Tables and files


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV file without its comments; none if there is no file."""
    return list(csv.DictReader(line for line in lines_of(path) if not line.startswith("#")))


def comments(path: Path) -> list[str]:
    return [line.removeprefix("# ") for line in lines_of(path) if line.startswith("#")]


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `head` holds the column names, separated by |."""
    names = head.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def image(name: str, alt: str) -> str:
    return f"![{alt}](../results/{name}.png)"
