"""Predictions of a classifier for the images of a data set, in float32."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from kn_zoo.checkpoints.predictions import Predictions
from kn_zoo.data import Images


def eval_transform(model: nn.Module) -> transforms.Compose:
    """timm's evaluation transform for `model.pretrained_cfg`, after a conversion to its number of
    channels."""
    config = resolve_model_data_config(model)
    channels = 1 if config["input_size"][0] == 1 else 3
    grey_or_rgb = transforms.Lambda(_to_grey if channels == 1 else _to_rgb)
    return transforms.Compose([grey_or_rgb, create_transform(**config)])


def _to_grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def predict(
    model: nn.Module,
    dataset: Images,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: str | None = None,
) -> Predictions:
    """Evaluate `model` in eval mode and float32 on every image of `dataset`, in order.

    Images are transformed by `dataset.transform` if it is set, else as the model's `pretrained_cfg`
    says. The model is moved to `device` and left there, its training flag as it was. `workers`
    processes decode images (0: this one, right for images that lie in memory). `progress` is the
    label of a progress bar on stderr.

    The same for every batch size up to `LOGIT_TOLERANCE`. Under the statistics "sampled" the result
    is random: seed with `torch.manual_seed` before the call to repeat it with the same batch size
    and device.
    """
    if dataset.transform is None:
        dataset = copy.copy(dataset)
        dataset.transform = eval_transform(model)
    images_and_targets: Any = dataset  # as for torch: any sequence does
    loader: Iterable[Any] = DataLoader(images_and_targets, batch_size, num_workers=workers)
    if progress is not None:
        loader = track(loader, progress, console=Console(stderr=True))
    was_training = model.training
    model.to(device).eval()
    try:
        with torch.inference_mode(), exact_float32():
            batches = [(*best(model(images.to(device)), 6), targets) for images, targets in loader]
    finally:
        model.train(was_training)
    if not batches:
        raise ValueError("the data set has no images")
    indices, logits, targets = (
        torch.cat(column).cpu().numpy() for column in zip(*batches, strict=True)
    )
    missed = logits[:, 5] if logits.shape[1] > 5 else np.full(len(logits), -np.inf, np.float32)
    return Predictions(
        indices[:, :5].astype(np.int16), logits[:, :5], targets.astype(np.int16), missed
    )


def best(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ids and float32 logits of the `k` largest of (N, classes), both (N, k) on the CPU."""
    # A stable sort, because the order in which torch.topk returns equal values is not defined.
    values, indices = logits.float().sort(dim=1, descending=True, stable=True)
    return indices[:, :k].cpu(), values[:, :k].cpu()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Full float32 products; a GPU's TensorFloat-32 would move logits by more than `NEAR_TIE`."""
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
