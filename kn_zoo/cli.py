"""The command `kn-zoo`: list and describe networks and weights, fetch weights, classify images.

Exit status: 0; 1 if `verify` finds something wrong; 2 for bad usage, for what cannot be had, or if
an image could not be classified (the others were).
"""

import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from kn_zoo import segmentation
from kn_zoo.checkpoints import bundle, loading, manifest, offline, upstream
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.evaluation import predict as evaluate
from kn_zoo.segmentation import overlay as pictures

MAX_PIXELS = 100_000_000  # a photograph has 12 to 60 million; decoded to RGB this is 300 MB
MAX_ELONGATION = 50  # with a short side of 256 the long side stays below 12,800 pixels

# click's error for bad usage, wherever this version of typer keeps its click.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Kernel Normalized networks: list them, describe one, fetch weights, classify images.",
)


class UnusableImage(ValueError):
    """A file that cannot be classified; the message says why, and what would help."""


def main() -> int:
    """Entry point of `kn-zoo`; returns its exit status."""
    return run(app, sys.argv[1:] or ["--help"])


def run(command: typer.Typer, argv: Sequence[str] | None = None) -> int:
    """Run a typer app; bad usage is one line on stderr and exit status 2."""
    program = Path(sys.argv[0]).name
    try:
        status = typer.main.get_command(command).main(
            args=None if argv is None else list(argv), prog_name=program, standalone_mode=False
        )
    except UsageError as error:
        print(f"{program}: {one_line(error.format_message())}", file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return status or 0


def one_line(text: object) -> str:
    """Text, or a file name with whatever bytes, as one line that any terminal can show."""
    line = " ".join(str(text).split())
    return line.encode(errors="backslashreplace").decode()


@app.command("list")
def list_models(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name or data set, or a pattern with * and ?.")
    ] = "*",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Only weights that can be loaded.")
    ] = False,
) -> int:
    """List networks and their weights, with accuracy under the default inference statistics."""
    if not set(pattern) & set("*?["):
        pattern = f"*{pattern}*"
    table = Table()
    table.add_column("name", overflow="fold")
    table.add_column("data set")
    for column in ("top-1 %", "top-5 %", "parameters", "FLOPs"):
        table.add_column(column, justify="right")
    table.add_column("weights")
    for name, weight in everything().items():
        texts = [name, weight.dataset.name] if weight else [name]
        wanted = not pretrained or (weight is not None and weight.available)
        if wanted and any(fnmatch(text, pattern.lower()) for text in texts):
            table.add_row(name, *(columns(weight) if weight else ()))
    if not table.rows:
        raise UsageError(f"nothing is called {pattern!r}: `kn-zoo list` shows all names")
    console().print(table)
    return 0


def everything() -> dict[str, Checkpoint | None]:
    """All weights of the manifest, and the architectures that have none, by name."""
    found: dict[str, Checkpoint | None] = dict(manifest.load())
    trained = {weight.architecture for weight in manifest.load().values()}
    for name in timm.list_models():
        ours = timm.models.model_entrypoint(name).__module__.startswith(f"{kn_zoo.__name__}.")
        if ours and name not in trained:
            found[name] = None
    return dict(sorted(found.items()))


def columns(weight: Checkpoint) -> list[str]:
    # Published numbers may have been measured under other statistics than the default ones.
    reported = weight.reported.statistics
    name = "expected" if "expected" in reported else next(iter(reported))
    note = "" if name == "expected" else f" ({name})"
    accuracy = reported[name]
    return [
        weight.dataset.name,
        f"{accuracy.top1:.2f}{note}",
        "" if accuracy.top5 is None else f"{accuracy.top5:.2f}{note}",
        f"{weight.parameters:,}",
        f"{weight.flops / 1e9:.2f} G",
        origin(weight),
    ]


def origin(weight: Checkpoint) -> str:
    """Where the weights file comes from."""
    if weight.file and weight.bundle:
        return "in the package"
    if weight.file and weight.hub:
        return "on the Hub"
    return "imported on first use" if weight.upstream else "to train"


def console() -> Console:
    """Standard output; in a file or pipe, lines are as long as they need to be."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, 132)
    return out


@app.command()
def info(name: Annotated[str, typer.Argument(help="architecture or architecture.tag")]) -> int:
    """Describe a weight, or a network that has none."""
    known = everything()
    if name in known and known[name] is None:
        facts = describe_architecture(name)
    else:
        facts = describe_weight(found_weight(name, among=known))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key, value)
    console().print(table, markup=False)
    return 0


def found_weight(name: str, among: Iterable[str] = ()) -> Checkpoint:
    try:
        return manifest.find(name)
    except LookupError as error:
        near = get_close_matches(name, among, n=3)
        hint = f"Nothing is called {name!r}. Did you mean {' or '.join(near)}?"
        raise UsageError(hint if near else str(error.args[0])) from None


def describe_architecture(name: str) -> dict[str, str]:
    with torch.device("meta"):  # shapes without numbers
        model: Any = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    return {
        "network": name,
        "input": " x ".join(map(str, size)),
        "classes": str(model.num_classes),
        "parameters": f"{bundle.parameters(model):,}",
        "FLOPs": f"{bundle.flops(model, size):,} (one image)",
        "weights": "none has been trained yet",
        "use": f'timm.create_model("{name}")',
    }


def describe_weight(weight: Checkpoint) -> dict[str, str]:
    steps, of = weight.preprocessing, weight.dataset
    facts = {
        "weight": weight.name,
        "data set": f"{of.name}, {of.num_classes} classes",
        "measured on": f"{of.images:,} images ({of.split}) by {weight.reported.by}",
    }
    for name, accuracy in weight.reported.statistics.items():
        top5 = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:.2f} %"
        draws = f" (mean of {accuracy.draws} draws)" if accuracy.draws > 1 else ""
        facts[name] = f"top-1 {accuracy.top1:.2f} %{top5}{draws}"
    facts |= {
        "parameters": f"{weight.parameters:,}",
        "FLOPs": f"{weight.flops:,} (one image)",
        "input": " x ".join(map(str, steps.input_size))
        + f", {steps.interpolation}, {steps.crop_mode} crop {steps.crop_pct:g}",
        "mean, std": f"{list(steps.mean)}, {list(steps.std)}",
        "file": f"{weight.file.bytes:,} bytes, {weight.file.dtype}" if weight.file else "none yet",
        "SHA-256": weight.file.sha256 if weight.file else "",
        "weights": origin(weight),
        "Hub": weight.hub.id if weight.hub else "",
        "published at": weight.upstream.source if weight.upstream else "",
        "licences": f"code {weight.licenses.code}, weights {weight.licenses.weights}, "
        f"data {weight.licenses.data}",
        "recipe": weight.recipe or "",
        "use": f'timm.create_model("{weight.name}", pretrained=True)',
    }
    return {key: value for key, value in facts.items() if value}


@app.command()
def download(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[NAME]... DIR", help="architecture[.tag]; the directory")
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Every weight whose hash is in the manifest.")
    ] = False,
) -> int:
    """Make a directory of weights that KN_ZOO_WEIGHTS=DIR serves on a machine without a network."""
    *names, place = arguments
    if bool(names) == everything:
        raise UsageError("give names and a directory, or --all and a directory")
    chosen = [found_weight(name) for name in names]
    if everything:
        chosen = [weight for weight in manifest.load().values() if weight.file and weight.available]
    with told():
        for weight in track(chosen, "weights", console=Console(stderr=True)):
            offline.add([weight], Path(place))
    print(f"{place}: {', '.join(weight.name for weight in chosen)}")
    return 0


@app.command()
def verify(
    place: Annotated[Path, typer.Argument(metavar="DIR", help="Made by `kn-zoo download`.")],
) -> int:
    """Check every file of a directory of weights: SHA256SUMS, and the manifest for the tensors."""
    with told():
        wrong = offline.problems(place)
    for line in wrong:
        print(one_line(line))
    print(f"{place}: {f'{len(wrong)} problems' if wrong else 'all is as it should be'}")
    return 1 if wrong else 0


@app.command("import")
def import_checkpoint(
    name: Annotated[str, typer.Argument(help="A weight of others, such as knresnet50.")],
    file: Annotated[Path, typer.Argument(help="The checkpoint, downloaded by hand.")],
) -> int:
    """Check and convert a checkpoint of the authors; from then on timm.create_model loads it."""
    weight = found_weight(name)
    if weight.upstream is None:
        raise UsageError(f"{weight.name} is not imported: `kn-zoo info {name}` tells about it")
    with told():
        stored = upstream.import_checkpoint(weight, file)
    print(f"{weight.name}: SHA-256 {stored.sha256}, {stored.bytes:,} bytes")
    return 0


@app.command()
def pin(
    results: Annotated[
        Path, typer.Argument(help="What `eval/verify.py NAME --json FILE` wrote on ImageNet.")
    ],
) -> int:
    """Write hash and measured accuracy of an imported weight into the manifest of a checkout."""
    if manifest.PATH.parent == manifest.PACKAGE:
        raise UsageError("only a checkout's manifest can be changed: run this in one")
    with told():
        with results.open("rb") as file:
            document = manifest.parse_json(file.read(manifest.MAX_BYTES + 1))
        for weight in upstream.measured(document):
            manifest.write_entry(weight)
            print(f"{weight.name}: pinned in {manifest.PATH}")
    return 0


@contextmanager
def told() -> Iterator[None]:
    """What cannot be had or written is one line; warnings are too."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(one_line(message), file=sys.stderr)
            yield
    except (loading.WeightsError, manifest.ManifestError, OSError, ValueError) as error:
        raise UsageError(str(error)) from None


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="architecture[.tag], or a bundle as timm names it: local-dir:FOLDER, "
            "hf-hub:REPOSITORY. By default the first weight that travels with the package."
        ),
    ] = None,
) -> int:
    """Print the five most probable classes of each image.

    An image that cannot be used gets one line on stderr; the others are classified, and the exit
    status is 2.
    """
    network, class_names = load_classifier(model)
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
            print(f"  {100 * value:6.2f} %  {class_names[index]}")
    return 2 if failed else 0


@app.command()
def segment(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    overlay: Annotated[
        Path | None,
        typer.Option(help="Write the image under the classes' colours, with a legend, here."),
    ] = None,
    label_map: Annotated[
        Path | None, typer.Option(help="Write the classes as a palette image (PNG) here.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="architecture[.tag], or a bundle: local-dir:FOLDER. By default the first "
            "segmentation checkpoint that travels with the package."
        ),
    ] = None,
) -> int:
    """Print which share of each image each class has; write overlays and label maps.

    With several images, --overlay and --label-map name folders. An image that cannot be used gets
    one line on stderr; the others are segmented, and the exit status is 2.
    """
    network = load_segmenter(model)
    names, palette = pictures.class_names(network), pictures.palette(network)
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
        several = len(images) > 1
        if overlay:
            save(pictures.overlay(picture, labels, palette, names), overlay, path, several)
        if label_map:
            save(pictures.colours(labels, palette), label_map, path, several)
    return 2 if failed else 0


def load_segmenter(name: str | None) -> nn.Module:
    """A segmentation network in eval mode."""
    try:
        if name and name.startswith("local-dir:"):
            return segmentation.load_bundle(name.removeprefix("local-dir:"))
        known = segmentation.list_segmentation_models(pretrained=True)
        if name is None and not known:
            raise UsageError(
                "no segmentation checkpoint travels with this package: name a bundle with "
                "--model local-dir:FOLDER"
            )
        return segmentation.create_segmentation_model(name or known[0], pretrained=True).eval()
    except (loading.WeightsError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(str(error.args[0] if error.args else error)) from None


def save(picture: Image.Image, out: Path, image: str, several: bool) -> None:
    """Write a picture as a whole or not at all."""
    target = pictures.output_path(out, image, several)
    if not target.suffix:
        target = target.with_suffix(".png")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        picture.save(data, format=Image.registered_extensions().get(target.suffix.lower(), "PNG"))
        manifest.write_bytes(target, data.getvalue())
    except OSError as error:
        raise UsageError(f"{target} could not be written ({error.strerror or error})") from None
    print(one_line(f"  {target}"))


def load_classifier(name: str | None) -> tuple[nn.Module, Sequence[str]]:
    """A model in eval mode, and what its classes are called."""
    try:
        if name and ":" in name:
            model: Any = timm.create_model(name, pretrained=True).eval()
            numbers = [f"class {i}" for i in range(model.num_classes)]
            return model, model.pretrained_cfg.get("label_names") or numbers
        weight = found_weight(name) if name else default_weight()
        model = timm.create_model(weight.name, pretrained=True).eval()
        return model, class_names(weight)
    except (loading.WeightsError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(str(error)) from None


def class_names(weight: Checkpoint) -> Sequence[str]:
    if weight.upstream and not weight.hub:  # imported: there is no bundle that could tell
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(weight.dataset.num_classes)]
    return bundle.get(weight).class_names


def default_weight() -> Checkpoint:
    embedded = [weight for weight in manifest.load().values() if weight.bundle]
    if not embedded:
        raise UsageError("no weight travels with this package: name one with --model")
    return embedded[0]


def open_image(path: str) -> Image.Image:
    """A decoded image with 8 bits a channel, upright as its camera says.

    Raises `UnusableImage` for what is no image, is broken, or is too large to be decoded safely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files; sizes are checked here
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
    except Exception as error:  # decoders raise anything on broken files
        reason = f"corrupt image ({type(error).__name__}: {error})"
        raise UnusableImage(reason) from None
    if upright.mode.startswith(("I", "F")):  # 16 or 32 bits; Pillow would clip them, not scale
        raise UnusableImage(f"pixels of mode {upright.mode}: save it with 8 bits a channel")
    return upright


def check_size(width: int, height: int) -> None:
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
