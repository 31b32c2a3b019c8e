"""The command ``kn-zoo``: list, describe and download checkpoints, classify and segment images.

Exit status: 0 on success; 1 if `check` finds a problem; 2 for bad usage, for files that cannot be
found or written, or if an image could not be used (the others were).
"""

import io
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.data import ImageNetInfo
from torch import nn

import kn_zoo
from kn_zoo.checkpoints import bundle, files, loading, manifest, offline, upstream
from kn_zoo.checkpoints.manifest import Accuracy, Checkpoint
from kn_zoo.command import UsageError, cli_errors, one_line, run
from kn_zoo.evaluation import predict as evaluate
from kn_zoo.segmentation import create_segmentation_model, list_segmentation_models, load_bundle
from kn_zoo.segmentation import overlay as pictures

__all__ = ["UsageError", "app", "main", "one_line", "run"]

MAX_PIXELS = 100_000_000  # a photograph has 12 to 60 million; decoded to RGB this is 300 MB
MAX_ELONGATION = 50  # with a short side of 256 the long side stays below 12,800 pixels
FUNCTIONS = {  # that create a network
    "classification": "timm.create_model",
    "segmentation": "kn_zoo.create_segmentation_model",
}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Kernel Normalized networks: list, describe and download checkpoints, classify and "
    "segment images.",
)


class UnusableImage(ValueError):
    """An image file that cannot be used; the message gives the reason."""


def main() -> int:
    """Run ``kn-zoo`` and return its exit status."""
    return run(app, sys.argv[1:] or ["--help"])


@app.command("list")
def list_models(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name or data set, or a pattern with * and ?.")
    ] = "*",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Only checkpoints that can be loaded.")
    ] = False,
) -> int:
    """List networks and checkpoints, with their accuracy under the default inference statistics."""
    table = Table()
    table.add_column("name", overflow="fold")
    table.add_column("data set")
    for column in ("top-1 %", "top-5 %", "parameters", "GFLOPs"):
        table.add_column(column, justify="right")
    table.add_column("source")
    glob = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    entries = all_models()
    for name, checkpoint in entries.items():
        texts = [name, checkpoint.dataset.name] if checkpoint else [name]
        selected = not pretrained or (checkpoint is not None and checkpoint.available)
        if selected and any(fnmatch(text, glob.lower()) for text in texts):
            table.add_row(name, *(columns(checkpoint) if checkpoint else ()))
    if not table.rows:
        raise UsageError(f"nothing matches {pattern!r}. {hint(pattern, entries)}")
    console().print(table)
    return 0


def all_models() -> dict[str, Checkpoint | None]:
    """Return the checkpoints of the manifest and the architectures that have none, by name."""
    entries: dict[str, Checkpoint | None] = dict(manifest.load())
    trained = {checkpoint.architecture for checkpoint in manifest.load().values()}
    classifiers = [
        name
        for name in timm.list_models()
        if timm.models.model_entrypoint(name).__module__.startswith(f"{kn_zoo.__name__}.")
    ]
    for name in (*classifiers, *list_segmentation_models()):
        if name not in trained:
            entries[name] = None
    return dict(sorted(entries.items()))


def hint(name: str, known: Iterable[str]) -> str:
    """Suggest known names that are similar to a name."""
    similar = get_close_matches(name.lower(), known, n=3)
    if similar:
        return f"Did you mean {' or '.join(similar)}?"
    return "Run `kn-zoo list` to see all names."


def columns(checkpoint: Checkpoint) -> list[str]:
    # Published numbers may have been measured under other statistics than the default ones.
    reported = checkpoint.reported.statistics
    statistics = "expected" if "expected" in reported else next(iter(reported))
    note = "" if statistics == "expected" else f" ({statistics})"
    accuracy = reported[statistics]
    top1 = f"{accuracy.top1:.2f}"
    if scores := accuracy.segmentation:
        top1 = f"{scores.miou:.2f} (mIoU)"
    return [
        checkpoint.dataset.name,
        f"{top1}{note}",
        "" if accuracy.top5 is None else f"{accuracy.top5:.2f}{note}",
        f"{checkpoint.parameters:,}",
        manifest.gflops(checkpoint.flops),
        checkpoint.source,
    ]


def console() -> Console:
    """Return the console of standard output; in a file or pipe, lines are not wrapped."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, 132)
    return out


@app.command()
def info(name: Annotated[str, typer.Argument(help="architecture or architecture.tag")]) -> int:
    """Describe a checkpoint, or a network that has none."""
    entries = all_models()
    if name in entries and entries[name] is None:
        facts = describe_architecture(name)
    else:
        facts = describe_checkpoint(find_checkpoint(name, entries))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key, value)
    console().print(table, markup=False)
    return 0


def find_checkpoint(name: str, known: Iterable[str] = ()) -> Checkpoint:
    """Return the checkpoint of a name; a `UsageError` suggests one of the known names."""
    try:
        return manifest.find(name)
    except LookupError as error:
        if get_close_matches(name, known):
            raise UsageError(f"there is no {name!r}. {hint(name, known)}") from None
        raise UsageError(str(error.args[0])) from None


def describe_architecture(name: str) -> dict[str, str]:
    task = task_of(name) or "classification"
    create_model: Any = timm.create_model
    if task == "segmentation":
        create_model = create_segmentation_model
    with torch.device("meta"):  # shapes without numbers
        model = create_model(name)
    size = model.pretrained_cfg["input_size"]
    return {
        "network": name,
        "input": " x ".join(map(str, size)),
        "classes": str(model.num_classes),
        "parameters": f"{bundle.parameters(model):,}",
        "FLOPs": f"{bundle.flops(model, size):,} (one image)",
        "checkpoint": "none yet",
        "use": f'{FUNCTIONS[task]}("{name}")',
    }


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    steps, dataset, file = checkpoint.preprocessing, checkpoint.dataset, checkpoint.file
    licenses = checkpoint.licenses
    facts = {
        "checkpoint": checkpoint.name,
        "data set": f"{dataset.name}, {dataset.num_classes} classes",
        "measured on": f"{dataset.images:,} images ({dataset.split}) by {checkpoint.reported.by}",
    }
    for statistics, accuracy in checkpoint.reported.statistics.items():
        draws = f" (mean of {accuracy.draws} draws)" if accuracy.draws > 1 else ""
        facts[statistics] = f"{describe_accuracy(accuracy)}{draws}"
    if privacy := checkpoint.privacy:
        facts["privacy"] = (
            f"epsilon {privacy.epsilon:.4f} (Rényi: {privacy.epsilon_rdp:.4f}), delta "
            f"{privacy.delta:g}, for {privacy.unit}"
        )
    facts |= {
        "parameters": f"{checkpoint.parameters:,}",
        "FLOPs": f"{checkpoint.flops:,} (one image)",
        "input": " x ".join(map(str, steps.input_size))
        + f", {steps.interpolation}, {steps.crop_mode} crop {steps.crop_pct:g}",
        "mean, std": f"{list(steps.mean)}, {list(steps.std)}",
        "file": f"{file.bytes:,} bytes, {file.dtype}" if file else "",
        "SHA-256": file.sha256 if file else "",
        "source": ", ".join(checkpoint.sources) or checkpoint.source,
        "Hub": checkpoint.hub.id if checkpoint.hub else "",
        "published at": checkpoint.upstream.source if checkpoint.upstream else "",
        "licences": f"code {licenses.code}, weights {licenses.weights}, data {licenses.data}",
        "recipe": checkpoint.recipe or "",
    }
    if checkpoint.available:
        facts["use"] = f'{FUNCTIONS[checkpoint.task]}("{checkpoint.name}", pretrained=True)'
    return {key: value for key, value in facts.items() if value}


def describe_accuracy(accuracy: Accuracy) -> str:
    if scores := accuracy.segmentation:
        return (
            f"mIoU {scores.miou:.2f} %, pixel accuracy {accuracy.top1:.2f} %, "
            f"class accuracy {scores.class_accuracy:.2f} %"
        )
    top5 = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:.2f} %"
    return f"top-1 {accuracy.top1:.2f} %{top5}"


@app.command()
def download(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[NAME]... DIR", help="architecture[.tag]; the directory")
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Every checkpoint whose hash is in the manifest.")
    ] = False,
) -> int:
    """Put checkpoints into a directory, for KN_ZOO_WEIGHTS=DIR on a machine without a network."""
    *names, directory = arguments
    if bool(names) == everything:
        raise UsageError("give names and a directory, or --all and a directory")
    selected = [find_checkpoint(name) for name in names]
    if everything:
        selected = [entry for entry in manifest.load().values() if entry.file and entry.available]
    with cli_errors():
        for checkpoint in track(selected, "checkpoints", console=Console(stderr=True)):
            offline.add([checkpoint], Path(directory))
    print(f"{directory}: {', '.join(checkpoint.name for checkpoint in selected)}")
    return 0


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made by `kn-zoo download`.")],
) -> int:
    """Check the files of a directory: all against SHA256SUMS, the weights against the manifest."""
    with cli_errors():
        problems = offline.problems(directory)
    for line in problems:
        print(one_line(line))
    print(f"{directory}: {len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'}")
    return 1 if problems else 0


@app.command("import")
def import_checkpoint(
    name: Annotated[str, typer.Argument(help="A checkpoint of the authors, such as knresnet50.")],
    file: Annotated[Path, typer.Argument(help="The file, downloaded by hand.")],
) -> int:
    """Check and convert a checkpoint of the authors; timm.create_model loads it afterwards."""
    checkpoint = find_checkpoint(name)
    if checkpoint.upstream is None:
        raise UsageError(
            f"{checkpoint.name} is not a checkpoint of the authors. See `kn-zoo info {name}`."
        )
    with cli_errors():
        stored = upstream.import_checkpoint(checkpoint, file)
    print(f"{checkpoint.name}: SHA-256 {stored.sha256}, {stored.bytes:,} bytes")
    return 0


@app.command()
def pin(
    results: Annotated[
        Path, typer.Argument(help="Written by `eval/verify.py NAME --json FILE` on ImageNet.")
    ],
) -> int:
    """Write hash and measured accuracy of an imported checkpoint into the manifest of a clone."""
    if manifest.PATH.parent == manifest.PACKAGE:
        raise UsageError("the manifest of an installed package is not changed: run this in a clone")
    with cli_errors():
        for checkpoint in upstream.measured(files.read_json(results)):
            manifest.write_entry(checkpoint)
            print(f"{checkpoint.name}: pinned in {manifest.PATH}")
    return 0


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="architecture[.tag], or a bundle as timm names it: local-dir:FOLDER, "
            "hf-hub:REPOSITORY. Default: the first checkpoint in the package."
        ),
    ] = None,
) -> int:
    """Print the five most probable classes of each image.

    An image that cannot be used gives one line on stderr; the others are classified, and the exit
    status is 2.
    """
    network, names = load_classifier(model)
    transform = evaluate.eval_transform(network)
    failed = 0
    for path in images:
        try:
            picture = transform(open_image(path))
        except UnusableImage as error:
            failed += 1
            print(one_line(f"{path}: {error}"), file=sys.stderr)
            continue
        with torch.inference_mode(), evaluate.exact_float32():
            probabilities = network(picture[None]).double().softmax(dim=1)
        print(one_line(path))
        indices, values = evaluate.best(probabilities, 5)
        for index, value in zip(indices[0].tolist(), values[0].tolist(), strict=True):
            print(f"  {100 * value:6.2f} %  {names[index]}")
    return 2 if failed else 0


@app.command()
def segment(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    overlay: Annotated[
        Path | None, typer.Option(help="Write the image with the colors of its classes here.")
    ] = None,
    opacity: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Opacity of the colors over the image.")
    ] = pictures.OPACITY,
    label_map: Annotated[
        Path | None, typer.Option(help="Write the classes as a palette image (PNG) here.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="architecture[.tag], or a bundle: local-dir:FOLDER. Default: the first "
            "segmentation checkpoint that can be loaded."
        ),
    ] = None,
) -> int:
    """Print the share of each class in each image; write overlays and label maps.

    With several images, --overlay and --label-map name folders. An image that cannot be used gives
    one line on stderr; the others are segmented, and the exit status is 2.
    """
    network = load_segmenter(model)
    names, palette = pictures.class_names(network), pictures.palette(network)
    several = len(images) > 1
    failed = 0
    for path in images:
        try:
            picture = open_image(path).convert("RGB")
        except UnusableImage as error:
            failed += 1
            print(one_line(f"{path}: {error}"), file=sys.stderr)
            continue
        labels = pictures.label_map(network, picture)
        print(one_line(path))
        for name, share in pictures.shares(labels, names):
            print(f"  {share:6.2f} %  {name}")
        if overlay:
            blended = pictures.overlay(picture, labels, palette, names, opacity)
            save(blended, overlay, path, several)
        if label_map:
            save(pictures.colors(labels, palette), label_map, path, several)
    return 2 if failed else 0


def save(picture: Image.Image, out: Path, image: str, several: bool) -> None:
    """Write the picture of an image."""
    target = pictures.output_path(out, image, several)
    if not target.suffix:
        target = target.with_suffix(".png")
    content = io.BytesIO()
    try:
        picture.save(content, format=Image.registered_extensions()[target.suffix.lower()])
    except (KeyError, OSError):  # an unknown suffix, or one without palettes
        raise UsageError(f"{target} cannot hold a {picture.mode} image: use .png") from None
    with cli_errors():
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(target, content.getvalue())
    print(one_line(f"  {target}"))


@app.command()
def demo(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
) -> int:
    """Serve a page on this machine that classifies images and shows what KNConv sees."""
    try:
        from kn_zoo import demo as page
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}: pip install 'kn_zoo[demo]'") from None
    page.serve(port)
    return 0


def load_classifier(name: str | None) -> tuple[nn.Module, Sequence[str]]:
    """Return a model in eval mode and the names of its classes."""
    if name and task_of(name) == "segmentation":
        raise UsageError(f"{name} segments images: use `kn-zoo segment`")
    try:
        if name and ":" in name:
            model: Any = timm.create_model(name, pretrained=True).eval()
            numbers = [f"class {i}" for i in range(model.num_classes)]
            return model, model.pretrained_cfg.get("label_names") or numbers
        checkpoint = find_checkpoint(name) if name else default_checkpoint()
        model = timm.create_model(checkpoint.name, pretrained=True).eval()
        return model, class_names(checkpoint)
    except (loading.WeightsError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(str(error)) from None


def load_segmenter(name: str | None) -> nn.Module:
    """Return a segmentation network in eval mode."""
    known = list_segmentation_models(pretrained=True)
    if name is None and not known:
        raise UsageError("there is no segmentation checkpoint: name a bundle with --model")
    if name and task_of(name) == "classification":
        raise UsageError(f"{name} classifies images: use `kn-zoo predict`")
    try:
        if name and name.startswith("local-dir:"):
            return load_bundle(name.removeprefix("local-dir:"))
        return create_segmentation_model(name or known[0], pretrained=True).eval()
    except (loading.WeightsError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(str(error.args[0] if error.args else error)) from None


def task_of(name: str) -> str | None:
    """Return the task of a model or of the bundle ``local-dir:FOLDER``; None if it is unknown."""
    architecture = name.partition(".")[0]
    if name.startswith("local-dir:"):
        with suppress(OSError, ValueError):
            config = files.read_json(Path(name.removeprefix("local-dir:")) / loading.CONFIG)
            architecture = str(config.get("architecture"))
    if architecture in list_segmentation_models():
        return "segmentation"
    return "classification" if timm.is_model(architecture) else None


def class_names(checkpoint: Checkpoint) -> Sequence[str]:
    if checkpoint.upstream and not checkpoint.hub:  # it has no bundle
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(i) for i in range(checkpoint.dataset.num_classes)]
    return bundle.get(checkpoint).class_names


def default_checkpoint() -> Checkpoint:
    for checkpoint in manifest.load().values():
        embedded = checkpoint.file and checkpoint.bundle == "package"
        if embedded and checkpoint.task == "classification":
            return checkpoint
    raise UsageError("the package contains no checkpoint: name one with --model")


def open_image(path: str) -> Image.Image:
    """Decode an image with 8 bits a channel, and rotate it as its EXIF orientation says.

    Raises:
        UnusableImage: the file is not an image, is damaged, or is too large to decode safely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings; sizes are checked here
            with Image.open(path) as image:
                check_size(*image.size)
                image.load()
                upright = ImageOps.exif_transpose(image)
    except UnusableImage:
        raise
    except UnidentifiedImageError:
        raise UnusableImage("not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise UnusableImage(f"more than {MAX_PIXELS:,} pixels: make it smaller") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else f"corrupt image ({error})"
        raise UnusableImage(reason) from None
    except Exception as error:  # decoders raise anything on damaged files
        reason = f"corrupt image ({type(error).__name__}: {error})"
        raise UnusableImage(reason) from None
    if upright.mode.startswith(("I", "F")):  # 16 or 32 bits; Pillow would clip them, not scale
        raise UnusableImage(f"pixels of mode {upright.mode}: save it with 8 bits a channel")
    return upright


def check_size(width: int, height: int) -> None:
    """Raise `UnusableImage` for an image that is too large or too elongated."""
    if width * height > MAX_PIXELS:
        raise UnusableImage(
            f"{width:,} x {height:,} are more than {MAX_PIXELS:,} pixels: make it smaller"
        )
    if max(width, height) > MAX_ELONGATION * min(width, height):
        raise UnusableImage(
            f"{width:,} x {height:,} is longer than {MAX_ELONGATION} times its width: crop it"
        )


if __name__ == "__main__":
    sys.exit(main())
