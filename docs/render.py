"""Write the generated parts of README.md and docs/: tables, one sentence on cost, figures.

    python docs/render.py            write what has changed
    python docs/render.py --check    write nothing; exit status 1 if a text is out of date

A generated part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; docs/results.md is
generated as a whole.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import kn_zoo
from kn_zoo.checkpoints import bundle, files, manifest
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.evaluation import measurements, private_benchmark, result_figures, results
from kn_zoo.evaluation.results import STATISTICS, table
from kn_zoo.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "assets" / "normalized_together.png"
FAMILIES = {  # the module of a network, and what it is called
    "knresnet": "KNResNet",
    "knpreactresnet": "KN-PreActResNet",
    "knconvnext": "KN-ConvNeXt",
    "kndensenet": "KN-DenseNet",
    "knresnet_small": "KNResNet, small",
    "resnet_cifar": "ResNet",
}
ORDINARY = ("resnet18", "resnet34", "resnet50", "convnext_tiny")  # timm's, to compare with


# Checkpoints


def checkpoints_table(every: bool = True) -> str:
    """Five columns; README.md has no room for baselines and private checkpoints."""
    rows = [
        [
            f"`{checkpoint.name}`",
            f"{checkpoint.dataset.name} {checkpoint.dataset.split}",
            headline(checkpoint),
            f"{checkpoint.parameters:,}",
            source(checkpoint),
        ]
        for checkpoint in manifest.load().values()
        if every or (checkpoint.norm == "kernel" and not checkpoint.privacy)
    ]
    return table("name|data|top-1 %|parameters|source", rows)


def headline(checkpoint: Checkpoint) -> str:
    """Top-1 or mIoU under the default statistics, or under those that the authors report."""
    reported = checkpoint.reported.statistics
    if "expected" in reported:
        accuracy = reported["expected"]
        scores = accuracy.segmentation
        return f"{scores.miou:.2f} (mIoU)" if scores else f"{accuracy.top1:.2f}"
    name, accuracy = next(iter(reported.items()))
    return f"{accuracy.top1:.2f} ({name}; reported by the {checkpoint.reported.by.split()[0]})"


def source(checkpoint: Checkpoint) -> str:
    if checkpoint.source == "on the Hub" and checkpoint.hub:
        return f"[on the Hub](https://huggingface.co/{checkpoint.hub.repository})"
    return checkpoint.source


def accuracies_table() -> str:
    """Every checkpoint under every inference statistic."""
    return table(
        "checkpoint|images|expected|plain|sampled|top-5|GFLOPs|seeds|licence",
        [accuracies_row(checkpoint) for checkpoint in manifest.load().values()],
    )


def accuracies_row(checkpoint: Checkpoint) -> list[str]:
    reported = checkpoint.reported.statistics
    top1 = [f"{reported[name].top1:.2f}" if name in reported else "" for name in STATISTICS]
    top5 = next(iter(reported.values())).top5
    return [
        f"`{checkpoint.name}`",
        f"{checkpoint.dataset.images:,}",
        *top1,
        "" if top5 is None else f"{top5:.2f}",
        manifest.gflops(checkpoint.flops),
        ", ".join(map(str, checkpoint.seeds)),
        checkpoint.licenses.weights,
    ]


def segmentation_table() -> str:
    """Mean IoU of the segmentation checkpoints under each inference statistic; other scores."""
    rows = [
        segmentation_row(checkpoint)
        for checkpoint in manifest.load().values()
        if checkpoint.task == "segmentation"
    ]
    if not rows:
        return "No segmentation checkpoint is in the manifest yet."
    head = (
        "name|data, images|mIoU % expected|plain|sampled|pixel accuracy %|class accuracy %|GFLOPs"
    )
    return table(head, rows)


def segmentation_row(checkpoint: Checkpoint) -> list[str]:
    scores = {
        name: accuracy.segmentation
        for name, accuracy in checkpoint.reported.statistics.items()
        if accuracy.segmentation
    }
    return [
        f"`{checkpoint.name}`",
        f"{checkpoint.dataset.name} {checkpoint.dataset.split}, {checkpoint.dataset.images}",
        *(f"{scores[name].miou:.2f}" if name in scores else "" for name in STATISTICS),
        f"{checkpoint.reported.statistics['expected'].top1:.2f}",
        f"{scores['expected'].class_accuracy:.2f}",
        manifest.gflops(checkpoint.flops),
    ]


def sources() -> str:
    """Which checkpoints are on the Hub, which are in the package, which are imported."""
    checkpoints = manifest.load().values()

    def names(source: str) -> str:
        return ", ".join(f"`{c.name}`" for c in checkpoints if source in c.sources)

    unpinned = any(c.upstream and not c.file for c in checkpoints)
    state = "this project has not pinned their hashes yet" if unpinned else "hashes are pinned"
    return "\n".join(
        [
            f"- On the Hugging Face Hub: {names('on the Hub') or 'none yet'}.",
            f"- In the package and the repository: {names('in the package') or 'none'}.",
            f"- In the repository only: {names('in the repository') or 'none'}.",
            "- Imported from the authors' Google Drive on first use: "
            f"{names('imported on first use')}; {state}.",
        ]
    )


# Networks


def models_table() -> str:
    """Every network of the zoo, and the ordinary ones of timm, with parameters and FLOPs."""
    own: list[tuple[str, str]] = []
    for name in timm.list_models():
        package, _, module = timm.models.model_entrypoint(name).__module__.rpartition(".")
        if package == kn_zoo.models.__name__:
            family = FAMILIES.get(module, module)
            own.append((family if name.startswith("kn") else family.removeprefix("KN-"), name))
    order = [*FAMILIES.values(), "PreActResNet"]
    own.sort(key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    rows = [model_row(family, name) for family, name in own]
    rows += [model_row("timm, for comparison", name) for name in ORDINARY]
    return table("family|name|input|classes|parameters|GFLOPs|norm", rows)


def model_row(family: str, name: str) -> list[str]:
    with torch.device("meta"):  # shapes without numbers
        model: Any = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    return [
        family,
        f"`{name}`",
        "x".join(map(str, size)),
        str(model.num_classes),
        f"{bundle.parameters(model):,}",
        manifest.gflops(bundle.flops(model, size)),
        norms(name),
    ]


def norms(name: str) -> str:
    if name.startswith("kn"):
        return "kernel, layer" if "convnext" in name else "kernel"
    if name in ORDINARY:
        return "layer" if "convnext" in name else "batch"
    return "batch, group, layer, none"


# Recipes


def recipe_table() -> str:
    """The fields of `Recipe`; what they mean is said by the comments beside them."""
    rows = [
        [
            f"`{name}`",
            f"`{kind}`".replace(" | None`", "` or None"),
            default and f"`{default}`",
            meaning,
        ]
        for name, kind, default, meaning in recipe_fields()
    ]
    return table("field|type|default|meaning", rows)


def recipe_fields() -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default ("" if required) and comment of every field, from the source."""
    source_lines = inspect.getsource(Recipe).splitlines()
    (definition,) = ast.parse("\n".join(source_lines)).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = ast.unparse(node.value) if node.value else ""
            if default.startswith("field("):
                default = {"list": "[]", "dict": "{}"}[default.split("default_factory=")[1][:-1]]
            _, _, meaning = source_lines[(node.end_lineno or 0) - 1].partition("  # ")
            yield node.target.id, ast.unparse(node.annotation), default, meaning


# Private training


def private_table() -> str:
    """The guarantee and the accuracy of the private checkpoints."""
    checkpoints = results.trained_here(private=True)
    return results.private_table(checkpoints) if checkpoints else "None is in the manifest yet."


def private_cost() -> str:
    """Times and memory of private training steps, and where they were measured."""
    path = ROOT / "results" / "private_cpu.csv"
    if not path.exists():
        return "Not measured yet: `python eval/benchmark.py --private`."
    measured = private_benchmark.from_csv(path.read_text(encoding="utf-8"))
    header = results.as_mapping(results.comments(path))
    machine = "; ".join(header[name] for name in ("device", "versions", "date"))
    count = len(measured[0].samples_ms)
    return (
        f"A training step ({header['step']}, float32), medians of {count} rounds in which the "
        "cases take turns; "
        "`none` is a step without privacy. Memory is what the steps add to the process.\n\n"
        f"{private_benchmark.table(measured)}\n\n{private_benchmark.goals(measured)}\n\n{machine}."
    )


# Figure


def normalized_together() -> Figure:
    """Which numbers of a batch share one mean and variance, for four normalizations."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    panels: dict[str, Callable[[int, int, int, int], bool]] = {
        "BatchNorm": lambda n, c, i, j: c == 0,
        "LayerNorm": lambda n, c, i, j: n == 0,
        "GroupNorm": lambda n, c, i, j: n == 0 and c < 2,
        "Kernel normalization": lambda n, c, i, j: n == 0 and i < 2 and j > 2,
    }
    for axes, (title, together) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axes.set_title(title, fontsize=13)
        axes.set_aspect("equal")
        axes.set_axis_off()
        for image in range(2):
            draw_image(axes, image, together)
    return figure


def draw_image(axes: Axes, n: int, together: Callable[[int, int, int, int], bool]) -> None:
    """Four channels of 5 x 5 pixels, one behind the other; those normalized together in color."""
    side, channels, step = 5, 4, 0.8
    for c in reversed(range(channels)):
        left, bottom = c * step + n * 9.5, c * step
        for i in range(side):
            for j in range(side):
                color = "#3f51b5" if together(n, c, i, j) else "#e8eaf6"
                cell = Rectangle(
                    (left + j, bottom + side - 1 - i), 1, 1, fc=color, ec="#7986cb", lw=0.6
                )
                axes.add_patch(cell)
    axes.text(n * 9.5 + 2.5, -0.5, f"image {n + 1}", ha="center", va="top", fontsize=11)
    axes.set(xlim=(-0.3, 17.5), ylim=(-1.8, 7.8))


# Files

PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "checkpoints": lambda: checkpoints_table(every=False),
        "cost": lambda: results.cost_sentence(measurements.read(results.BENCHMARK)),
    },
    "docs/models.md": {"models": models_table},
    "docs/checkpoints.md": {
        "checkpoints": checkpoints_table,
        "accuracies": accuracies_table,
        "sources": sources,
    },
    "docs/recipe.md": {"fields": recipe_table},
    "docs/segmentation.md": {"checkpoints": segmentation_table},
    "docs/privacy.md": {"checkpoints": private_table, "cost": private_cost},
}


def replaced(text: str, section: str, content: str) -> str:
    """`text` with what stands between the markers of `section` replaced."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    head, _, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not closed:
        raise SystemExit(f"a page has lost its markers {begin} ... {end}: restore them with git")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def texts() -> dict[Path, str]:
    """Content of each file that is generated as a whole or in part."""
    pages = {results.PAGE: results.page()}
    for name, parts in PARTS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for section, content in parts.items():
            text = replaced(text, section, content())
        pages[ROOT / name] = text
    return pages


def main(check: bool) -> int:
    stale = {
        path: text
        for path, text in texts().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run `make docs`")
        return int(bool(stale))
    for path, text in stale.items():
        files.write_text(path, text)
    for path in [
        *stale,
        *result_figures.plot(),
        result_figures.save(normalized_together(), FIGURE, dpi=200),
    ]:
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
