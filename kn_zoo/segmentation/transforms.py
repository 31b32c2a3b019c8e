"""Joint transforms of images and label maps, from torchvision.transforms.v2."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from kn_zoo.training.recipe import recipe_settings

PADS = ("RandomCrop", "RandomAffine", "RandomRotation", "RandomPerspective", "RandomZoomOut", "Pad")


class RandomScale(v2.Transform):
    """Resize by a factor drawn uniformly from a range; labels by nearest-exact.

    torchvision's ScaleJitter resizes masks by "nearest", which shifts them by up to half a pixel
    relative to the image.
    """

    def __init__(self, scale: Sequence[float]) -> None:
        super().__init__()
        self.low, self.high = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = float(torch.empty(()).uniform_(self.low, self.high))
        height, width = functional.get_size(flat_inputs[0])
        return {"size": [round(factor * height), round(factor * width)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return resize(inpt, params["size"])


def resize(x: Any, size: Sequence[int]) -> Any:
    """Resize an Image bilinearly with antialiasing, or a Mask by nearest-exact."""
    if isinstance(x, tv_tensors.Mask):
        exact = InterpolationMode.NEAREST_EXACT
        return tv_tensors.Mask(functional.resize_image(x[None], list(size), exact)[0])
    return functional.resize(x, list(size), antialias=True)


class ResizeImage(v2.Transform):
    """Resize images, not label maps, to (height, width)."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = list(size)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        unchanged = isinstance(inpt, tv_tensors.Mask) or list(inpt.shape[-2:]) == self.size
        return inpt if unchanged else resize(inpt, self.size)


def training_transform(
    augmentation: Sequence[dict[str, dict]], preprocessing: Mapping[str, Any], void: int
) -> v2.Compose:
    """Return the augmentations, followed by normalization by mean and std in float32.

    Augmentations are named as in torchvision.transforms.v2, or RandomScale. Padding is the mean
    color in images, which becomes zero, and `void` in label maps.
    """
    color = tuple(round(255 * m) for m in preprocessing["mean"])
    fill = {tv_tensors.Image: color, tv_tensors.Mask: void}
    steps: list[nn.Module] = []
    with recipe_settings("augmentation"):
        for name, arguments in (item for step in augmentation for item in step.items()):
            kind: Any = RandomScale if name == "RandomScale" else getattr(v2, name)
            steps.append(kind(**({"fill": fill} if name in PADS else {}), **arguments))
    return v2.Compose([*steps, *_pixels(preprocessing)])


def eval_transform(preprocessing: Mapping[str, Any]) -> v2.Compose:
    """Return the transform to normalized float32 images of `input_size`; labels keep their size."""
    return v2.Compose([ResizeImage(preprocessing["input_size"][1:]), *_pixels(preprocessing)])


def _pixels(preprocessing: Mapping[str, Any]) -> list[nn.Module]:
    """Return steps from uint8 to normalized float32 images and int64 label maps, plain tensors."""
    dtypes: dict[Any, Any] = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
    mean, std = list(preprocessing["mean"]), list(preprocessing["std"])
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
