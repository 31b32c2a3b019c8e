"""Training batches: content, order, resolution, and resuming at any step."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF

from kn_zoo.training.batches import Batches, DeviceBatches, LoaderBatches, Shard, resize
from kn_zoo.training.recipe import Recipe, UserError

Augmentation = Sequence[dict[str, Any]]
CROP_AND_FLIP: Augmentation = [
    {"RandomCrop": {"size": 6, "padding": 2}},
    {"RandomHorizontalFlip": {}},
]


class Noise:
    """Images of random pixels; the class id of an image is its index."""

    transform = None

    def __init__(self, images: int = 40, channels: int = 3, size: int = 6) -> None:
        shape = (images, size, size, channels) if channels > 1 else (images, size, size)
        self.pixels = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), index


def recipe(augmentation: Augmentation = (), channels: int = 3, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": "knresnet18_cifar.test",
        "model_args": {},
        "dataset": "digits",
        "train_split": "train",
        "eval_split": "test",
        "preprocessing": {
            "input_size": [channels, 6, 6],
            "mean": [0.5] * channels,
            "std": [0.25] * channels,
        },
        "epochs": 6,
        "batch_size": 8,
        "optimizer": {},
        "scheduler": {},
        "licenses": {},
        "augmentation": list(augmentation),
    }
    return Recipe(**{**fields, **changes})


CPU = torch.device("cpu")


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_and_flips_are_distributed_as_torchvisions(channels: int) -> None:
    images = Noise(4, channels)
    loader = DeviceBatches(recipe(CROP_AND_FLIP, channels, batch_size=4), images, CPU, Shard())
    normalize = transforms.Normalize([0.5] * channels, [0.25] * channels)
    possible = {}
    for i in range(4):
        padded = TF.pad(images[i][0], 2)
        for top in range(5):
            for left in range(5):
                for flip in (False, True):
                    crop = TF.crop(padded, top, left, 6, 6)
                    crop = TF.hflip(crop) if flip else crop
                    possible[i, top, left, flip] = normalize(TF.to_tensor(crop))
    keys = list(possible)
    stack, owner = torch.stack(list(possible.values())), torch.tensor([key[0] for key in keys])
    seen = torch.zeros(len(keys))
    for epoch in range(200):
        for pixels, targets in loader.epoch(epoch):
            assert pixels.is_contiguous(memory_format=torch.channels_last) or channels == 1
            for image, target in zip(pixels, targets, strict=True):
                same = ((stack - image).abs().amax((1, 2, 3)) < 1e-5) & (owner == target)
                assert same.sum() == 1
                seen += same
    assert seen.sum() == 800
    # Each of 200 outcomes is expected 4 times; chi squared with 196 degrees of freedom.
    assert ((seen - 4) ** 2 / 4).sum() < 290


Kind = Callable[[Recipe, Shard], Batches]
KINDS: dict[str, Kind] = {
    "device": lambda settings, shard: DeviceBatches(settings, Noise(), CPU, shard),
    "loader": lambda settings, shard: LoaderBatches(settings, Noise(), AUGMENT, 0, CPU, shard),
}
AUGMENT: Callable = transforms.Compose(
    [
        transforms.RandomCrop(6, padding=2),
        transforms.RandomHorizontalFlip(),
        transforms.Lambda(lambda image: image.rotate(random.random() + np.random.rand())),
        transforms.ToTensor(),
    ]
)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_epoch_has_each_image_once_in_its_own_order(kind: Kind) -> None:
    loader = kind(recipe(CROP_AND_FLIP), Shard())
    orders = [torch.cat([y for _, y in loader.epoch(epoch)]).tolist() for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] == orders[2] != orders[1]
    assert kind(recipe(CROP_AND_FLIP, seed=1), Shard()).epoch(0).__next__()[1].tolist() != orders[0]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(
    epoch=st.integers(0, 200), start=st.integers(0, 4), processes=st.integers(1, 4), draws=st.data()
)
@settings(max_examples=20, deadline=None)
def test_batches_depend_only_on_epoch_and_step(
    kind: Kind, epoch: int, start: int, processes: int, draws: st.DataObject
) -> None:
    whole = list(kind(recipe(CROP_AND_FLIP), Shard()).epoch(epoch))
    torch.manual_seed(draws.draw(st.integers(0, 9)))  # the global generator does not matter
    before = torch.get_rng_state()
    parts = [
        list(kind(recipe(CROP_AND_FLIP), Shard(p, processes)).epoch(epoch, start))
        for p in range(processes)
    ]
    assert torch.equal(torch.get_rng_state(), before)  # and is not changed
    for step, (pixels, targets) in enumerate(whole[start:]):
        assert torch.equal(pixels, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(targets, torch.cat([part[step][1] for part in parts]))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_repeated_images_share_a_batch_and_differ_in_augmentation(kind: Kind) -> None:
    loader = kind(recipe(CROP_AND_FLIP, repeated_augmentation=4), Shard())
    assert len(loader) == 5
    for pixels, targets in loader.epoch(0):
        assert sorted(np.unique(targets, return_counts=True)[1]) == [4, 4]
        assert len({image.numpy().tobytes() for image in pixels}) > 2


def test_workers_augment_like_one_process() -> None:
    crop = transforms.Compose([transforms.RandomCrop(6, padding=2), transforms.ToTensor()])
    one, several = (
        LoaderBatches(recipe(), Noise(), crop, workers, CPU, Shard()) for workers in (0, 2)
    )
    for (a, _), (b, _) in zip(one.epoch(3), several.epoch(3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "augmentation",
    [
        [{"ColorJitter": {}}],
        [{"RandomCrop": {"size": 5}}],
        [{"RandomCrop": {"size": 6, "padding": 2, "padding_mode": "reflect"}}],
        [{"RandomCrop": {"size": 6, "padding": [1, 2]}}],
    ],
)
def test_unsupported_augmentation_on_the_device_is_refused_by_name(
    augmentation: Augmentation,
) -> None:
    with pytest.raises(UserError, match=f"support {next(iter(augmentation[0]))}.*on_device: false"):
        DeviceBatches(recipe(augmentation), Noise(), CPU, Shard())


@given(
    side=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 20),
    channels=st.sampled_from([1, 3]),
)
@settings(deadline=None)
def test_batches_are_resized_as_torchvision_resizes_the_crop(
    side: int, seed: int, epoch: int, channels: int
) -> None:
    full_size = recipe(CROP_AND_FLIP, channels, seed=seed)
    resized = replace(full_size, on_device=True, epochs=30, resolutions={1: side, 30: 6})
    images = Noise(16, channels)
    crops = DeviceBatches(full_size, images, CPU, Shard()).epoch(epoch)
    batches = DeviceBatches(resized, images, CPU, Shard()).epoch(epoch)
    for (crop, crop_target), (pixels, target) in zip(crops, batches, strict=True):
        expected = TF.resize(
            crop, [side, side], interpolation=TF.InterpolationMode.BILINEAR, antialias=True
        )
        assert torch.equal(target, crop_target)
        assert torch.allclose(pixels, expected, rtol=1e-5, atol=1e-5)


@given(
    sides=st.lists(st.integers(1, 8), max_size=3),
    switches=st.sets(st.integers(2, 6), min_size=3, max_size=3),
)
def test_each_epoch_has_the_side_of_the_last_switch(sides: list[int], switches: set[int]) -> None:
    """Epoch 1 begins with the first side, each switch with the next, the last with 6 pixels."""
    first_epochs = [1, *sorted(switches)[: len(sides)]]
    resolutions = dict(zip(first_epochs, [*sides, 6], strict=True))
    batches = DeviceBatches(
        recipe(CROP_AND_FLIP, resolutions=resolutions, on_device=True), Noise(), CPU, Shard()
    )
    side = 0
    for epoch in range(6):
        side = resolutions.get(epoch + 1, side)
        shapes = {tuple(pixels.shape) for pixels, _ in batches.epoch(epoch)}
        assert shapes == {(8, 3, side, side)}


def test_resizing_to_the_same_size_returns_the_images() -> None:
    pixels = torch.rand(2, 3, 6, 6)
    assert resize(pixels, 6) is pixels
    assert resize(pixels, 4).shape == (2, 3, 4, 4)
