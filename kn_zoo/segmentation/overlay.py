"""Pictures of label maps: palette images, and overlays with a legend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import functional

from kn_zoo.evaluation.predict import exact_float32
from kn_zoo.segmentation.data import CLASSES
from kn_zoo.segmentation.fcn import resize_scores
from kn_zoo.segmentation.models import class_names
from kn_zoo.segmentation.transforms import eval_transform

__all__ = ["class_names", "colors", "label_map", "overlay", "palette", "shares"]

Palette = Sequence[tuple[int, int, int]]
OPACITY = 0.55  # of the colors over the image, unless given
LEGEND_ROW = 22  # pixels


def label_map(model: nn.Module, image: Image.Image) -> np.ndarray:
    """Return the class of each pixel of an image, (H, W) uint8.

    The image is resized so that its short side is that of the model's `input_size`; scores are
    resized to the image's own size before the best class is taken. The model must be in eval mode.
    """
    cfg: Any = model.pretrained_cfg
    size = fitting_size(image, min(cfg["input_size"][1:]))
    transform = eval_transform(dict(cfg, input_size=(3, *size)))
    pixels = transform(tv_tensors.Image(functional.pil_to_tensor(image.convert("RGB"))))
    with torch.inference_mode(), exact_float32():
        scores = resize_scores(model(pixels[None]).float(), (image.height, image.width))
    return scores[0].argmax(dim=0).to(torch.uint8).numpy()


def fitting_size(image: Image.Image, short_side: int) -> tuple[int, int]:
    """Return (height, width) of the image with its short side resized to `short_side`."""
    factor = short_side / min(image.size)
    return max(1, round(factor * image.height)), max(1, round(factor * image.width))


def palette(model: nn.Module) -> Palette:
    """Return the colors of the data set with the model's class names, or evenly spaced hues."""
    cfg: Any = model.pretrained_cfg
    names = tuple(class_names(model))
    for classes in CLASSES.values():
        if classes.names == names:
            return classes.palette
    count = cfg["num_classes"]
    return [ImageColor.getrgb(f"hsv({360 * i // count}, 78%, 90%)")[:3] for i in range(count)]


def colors(labels: np.ndarray, palette: Palette) -> Image.Image:
    """Return a label map as a palette image, whose pixel values are the class ids."""
    picture = Image.fromarray(labels)  # mode "L"
    picture.putpalette([channel for color in palette for channel in color])
    return picture


def shares(labels: np.ndarray, names: Sequence[str]) -> list[tuple[str, float]]:
    """Return the percentage of pixels of each class that occurs, the largest first."""
    counts = np.bincount(labels.ravel(), minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    return [(names[i], 100 * counts[i] / labels.size) for i in order if counts[i]]


def overlay(
    image: Image.Image,
    labels: np.ndarray,
    palette: Palette,
    names: Sequence[str],
    opacity: float = OPACITY,
) -> Image.Image:
    """Blend the image with the colors of its classes, and add a legend below."""
    blended = Image.blend(image.convert("RGB"), colors(labels, palette).convert("RGB"), opacity)
    present = [name for name, _ in shares(labels, names)]
    font = ImageFont.load_default(size=14)
    column = 40 + round(max(font.getlength(name) for name in present))
    columns = max(1, image.width // column)
    rows = -(-len(present) // columns)
    width = max(image.width, column)
    picture = Image.new("RGB", (width, image.height + rows * LEGEND_ROW + 6), "white")
    picture.paste(blended)
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(present):
        x = 6 + column * (i % columns)
        y = image.height + 6 + LEGEND_ROW * (i // columns)
        color = palette[list(names).index(name)]
        draw.rectangle((x, y, x + 20, y + 14), fill=tuple(color), outline="black")
        draw.text((x + 26, y - 2), name, fill="black", font=font)
    return picture


def output_path(out: Path, image: str, several: bool) -> Path:
    """Return the path of an image's picture: `out`, or for several images a file in it."""
    return out / f"{Path(image).stem}.png" if several or out.is_dir() else out
