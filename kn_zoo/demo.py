"""A page that classifies an image under each inference statistic, and shows what KNConv sees.

Needs the extra `demo` (Gradio). `kn-zoo demo` serves it on loopback; `space/` holds the same app
for a Hugging Face Space. Nothing is sent anywhere: there are no analytics, and no fonts or
scripts of other hosts.
"""

import os
import tempfile
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

from kn_zoo import cli, data
from kn_zoo.checkpoints import manifest
from kn_zoo.evaluation.predict import eval_transform, exact_float32
from kn_zoo.layers import KNConv2d, set_inference_statistics
from kn_zoo.segmentation import create_segmentation_model, list_segmentation_models
from kn_zoo.segmentation import overlay as pictures

STATISTICS = {
    "expected": "Expected: the mean over dropout masks",
    "plain": "Plain: without dropout",
    "sampled": "Sampled: one dropout mask",
}
MAPS = ("Window means", "Window standard deviations")
# No button of a picture, as one of them shares it with a hub.
PICTURE: Any = dict(interactive=False, format="png", buttons=["fullscreen"])
SIDE = 384  # pixels of a map on the page
COLOURS = ("#16205b", "#fbe45b", "#2f9e8f")  # of the lowest value, the highest, the middle
INTRODUCTION = """# Kernel normalization
A kernel-normalized convolution subtracts the mean of each window of its input and divides by the
window's standard deviation. In training, dropout acts on these two statistics. At inference, they
are the expectation over dropout masks, are computed without dropout, or are sampled as in training.
Upload an image or choose a sample, to compare the three and to see the first layer's statistics."""
CSS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: 0 auto; }
.gradio-container img { image-rendering: pixelated; }
#samples, #samples .grid-wrap { min-height: 0 !important; }
"""


def checkpoints() -> list[str]:
    """Names of kernel-normalized classifiers, those that travel with the package first."""
    known = [c for c in manifest.load().values() if c.architecture.startswith("kn") and c.available]
    return [c.name for c in sorted(known, key=lambda c: not c.bundle)]


@lru_cache(maxsize=4)
def load(name: str) -> tuple[nn.Module, Sequence[str]]:
    """A checkpoint's network in eval mode, and the names of its classes."""
    return cli.load_classifier(name)


def classify(path: str | None, name: str) -> list[Any]:
    """The image, the five best classes under each inference statistic, and the first layer's maps.

    Raises:
        gr.Error: the file is not an image that can be classified, or the checkpoint cannot be had.
    """
    if path is None:
        return [None] * (len(STATISTICS) + 3)
    try:
        picture = cli.open_image(path)
        model, class_names = load(name)
    except (cli.UnusableImage, cli.UsageError) as error:
        raise gr.Error(f"This file cannot be classified: {error}", duration=None) from None
    x = eval_transform(model)(picture)[None]
    results: list[Any] = []
    with torch.inference_mode(), exact_float32():
        for statistics in STATISTICS:
            set_inference_statistics(model, statistics)
            values, indices = model(x)[0].double().softmax(0).topk(min(5, len(class_names)))
            pairs = zip(indices.tolist(), values.tolist(), strict=True)
            results.append({class_names[i].replace("_", " "): value for i, value in pairs})
        mean, std = window_statistics(model, x)
    return [enlarge(picture.convert("RGB")), *results, picture_of(mean), picture_of(std)]


def window_statistics(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, without dropout, of each window of a network's first KNConv2d.

    x: a batch of one image (1, C, H, W). Returns two maps (H', W').
    """
    layer = next(module for module in model.modules() if isinstance(module, KNConv2d))
    seen: list[tuple[Tensor, torch.Size]] = []
    handle = layer.register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0], output.shape[2:]))
    )
    try:
        model(x)
    finally:
        handle.remove()
    (maps, size), *_ = seen
    padded = F.pad(maps.double(), layer.padding_sides)
    units = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)  # (1, n, H'*W')
    return units.mean(1).view(size), units.std(1, correction=0).view(size)


def picture_of(values: Tensor) -> tuple[Image.Image, str]:
    """A map (H, W) in colours, and its range."""
    low, high = float(values.min()), float(values.max())
    grey = (values - low).div(max(high - low, 1e-12)).mul(255).round().to(torch.uint8)
    picture = ImageOps.colorize(Image.fromarray(grey.numpy()), *COLOURS)
    return enlarge(picture), f"{low:.3f} (blue) to {high:.3f} (yellow)"


def enlarge(picture: Image.Image) -> Image.Image:
    """Show each pixel of a small picture as a square."""
    return ImageOps.scale(picture, max(1, SIDE // max(picture.size)), Image.Resampling.NEAREST)


def segmenters() -> list[str]:
    """Names of the segmentation checkpoints that can be loaded."""
    return list_segmentation_models(pretrained=True)


def segment(path: str | None, name: str) -> Image.Image | None:
    """The image under the colours of its classes, with a legend."""
    if path is None:
        return None
    try:
        picture = cli.open_image(path).convert("RGB")
        model = create_segmentation_model(name, pretrained=True).eval()
    except (cli.UnusableImage, OSError, RuntimeError, ValueError) as error:
        raise gr.Error(f"This file cannot be segmented: {error}", duration=None) from None
    labels, names = pictures.label_map(model, picture), pictures.class_names(model)
    return pictures.overlay(picture, labels, pictures.palette(model), names)


def samples(folder: Path, known: Sequence[str]) -> list[list[str]]:
    """Write the images of the gallery; return each file with a checkpoint for it.

    Digits of scikit-learn, if it is installed, and drawings of things that CIFAR-100 has a class
    for: no image of a data set is needed.
    """
    gallery: list[list[str]] = []
    for dataset in ("cifar100", "digits"):
        name = next((n for n in known if n.endswith(f".{dataset}")), None)
        pictures = {"cifar100": drawings, "digits": digits}[dataset]() if name else {}
        for title, picture in pictures.items():
            picture.save(path := folder / f"{title}.png")
            gallery.append([str(path), str(name)])
    return gallery


def digits() -> dict[str, Image.Image]:
    """A 3, a 5 and an 8 of the images that the digits checkpoint was not trained on."""
    try:
        images = data.load("digits", "test")
    except data.MissingData:
        return {}
    gallery = {f"digit {label}": image for image, label in map(images.__getitem__, range(30))}
    return {
        title: gallery[title] for title in ("digit 3", "digit 5", "digit 8") if title in gallery
    }


def drawings() -> dict[str, Image.Image]:
    """An orange, a sea and a sunflower, 256 x 256."""
    side = 256
    orange = Image.new("RGB", (side, side), "#f4f1ea")
    pen = ImageDraw.Draw(orange)
    pen.ellipse((36, 44, 220, 228), fill="#f08a12")
    pen.ellipse((70, 72, 130, 122), fill="#f7ad4a")
    pen.ellipse((116, 34, 176, 66), fill="#3c7a2a")

    sea = Image.new("RGB", (side, side), "#9cc9ea")
    pen = ImageDraw.Draw(sea)
    for row in range(116, side):
        shade = (row - 116) // 3
        pen.line((0, row, side, row), fill=(20 + shade // 2, 96 - shade // 2, 150 - shade // 2))
    for row in range(128, side, 18):
        pen.arc((-20 + row % 37, row, 140 + row % 37, row + 12), 190, 350, fill="#cfe6f2", width=2)

    sunflower = Image.new("RGB", (side, side), "#3f7d3a")
    pen = ImageDraw.Draw(sunflower)
    for turn in range(16):
        petal = Image.new("L", (side, side))
        ImageDraw.Draw(petal).ellipse((112, 14, 144, 120), fill=255)
        sunflower.paste("#f6c21c", mask=petal.rotate(22.5 * turn))
    pen.ellipse((84, 84, 172, 172), fill="#5b3414")
    return {"orange": orange, "sea": sea, "sunflower": sunflower}


def build() -> gr.Blocks:
    """The page; `launch` serves it."""
    known = checkpoints()
    folder = tempfile.TemporaryDirectory(prefix="kn_zoo_demo_")
    gallery = samples(Path(folder.name), known)
    with gr.Blocks(title="Kernel normalization", analytics_enabled=False) as page:
        weakref.finalize(page, folder.cleanup)
        gr.Markdown(INTRODUCTION)
        path = gr.State(None)
        with gr.Row():
            with gr.Column(min_width=280):
                # Not gr.Image, which would open the file itself, and name no reason if it cannot.
                file = gr.File(label="Upload an image", file_types=["image"], height=140)
                chosen = gr.Gallery(
                    [(file, Path(file).stem) for file, _ in gallery],
                    label="Samples",
                    columns=3,
                    height="auto",
                    allow_preview=False,
                    buttons=[],
                    elem_id="samples",
                )
                checkpoint = gr.Dropdown(known, value=known[0], label="Checkpoint")
                preview = gr.Image(label="Image", height=260, **PICTURE)
            with gr.Column(min_width=280):
                labels = [
                    gr.Label(label=title, num_top_classes=5, show_heading=False)
                    for title in STATISTICS.values()
                ]
        gr.Markdown("## First layer")
        with gr.Row():
            maps: list[gr.components.Component] = []
            for title in MAPS:
                with gr.Column(min_width=280):
                    maps += [gr.Markdown(f"### {title}"), gr.Image(**PICTURE, show_label=False)]

        def choose(event: gr.SelectData) -> list[str]:
            return gallery[event.index]

        gr.on([file.upload, file.clear], lambda uploaded: uploaded, file, path)
        chosen.select(choose, None, [path, checkpoint])
        gr.on(
            [path.change, checkpoint.input],
            _show,
            [path, checkpoint],
            [preview, *labels, *maps],
        )
        if names := segmenters():
            gr.Markdown("## Segmentation")
            segmenter = gr.Dropdown(names, value=names[0], label="Segmentation checkpoint")
            overlay = gr.Image(label="Classes", **PICTURE)
            gr.on([path.change, segmenter.input], segment, [path, segmenter], overlay)
    return page


def _show(path: str | None, name: str) -> list[Any]:
    """The image, its classes and its maps, for the components of the page."""
    picture, *labels, means, stds = classify(path, name)
    maps: list[Any] = []
    for title, shown in zip(MAPS, (means, stds), strict=True):
        maps += [f"### {title}\n{shown[1]}", shown[0]] if shown else [f"### {title}", None]
    return [picture, *labels, *maps]


def launch(page: gr.Blocks, **settings: Any) -> str:
    """Serve a page; returns its address. `settings` are those of `gr.Blocks.launch`."""
    defaults = dict(share=False, quiet=True, footer_links=[], css=CSS, ssr_mode=False)
    _, address, _ = page.launch(**{**defaults, **settings})
    return address


def serve(port: int = 7860) -> None:
    """Serve the page on loopback until interrupted; port 0 takes a free one."""
    page = build()
    address = launch(
        page, server_name="127.0.0.1", server_port=port or None, prevent_thread_lock=True
    )
    print(f"{address}  (stop with Ctrl-C)", flush=True)
    page.block_thread()
