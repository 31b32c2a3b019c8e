"""Training batches: what they hold, in which order, and that they can be taken up anywhere."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF

from kn_zoo.training.batches import DeviceBatches, LoaderBatches, Share
from kn_zoo.training.recipe import Recipe, UserError

CROP_AND_FLIP = [{"RandomCrop": {"size": 6, "padding": 2}}, {"RandomHorizontalFlip": {}}]


class Noise:
    """Images of random pixels."""

    transform = None

    def __init__(self, images=40, channels=3, size=6):
        shape = (images, size, size, channels) if channels > 1 else (images, size, size)
        self.pixels = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return Image.fromarray(self.pixels[index]), index


def recipe(augmentation=(), channels=3, **changes):
    pixels = {"mean": [0.5] * channels, "std": [0.25] * channels}
    fields = dict.fromkeys(NEEDED)
    fields |= {"preprocessing": pixels, "augmentation": list(augmentation), "batch_size": 8}
    return Recipe(**{**fields, **changes})


NEEDED = {"name", "model_args", "dataset", "train_split", "eval_split", "epochs", "optimizer"}
NEEDED |= {"scheduler", "licenses"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("channels", [1, 3])
def test_every_crop_and_flip_is_one_that_torchvision_makes_and_all_occur(channels):
    images = Noise(4, channels)
    loader = DeviceBatches(recipe(CROP_AND_FLIP, channels, batch_size=4), images, CPU, Share())
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


KINDS = {
    "device": lambda settings, share: DeviceBatches(settings, Noise(), CPU, share),
    "loader": lambda settings, share: LoaderBatches(settings, Noise(), AUGMENT, 0, CPU, share),
}
AUGMENT = transforms.Compose(
    [
        transforms.RandomCrop(6, padding=2),
        transforms.RandomHorizontalFlip(),
        transforms.Lambda(lambda image: image.rotate(random.random() + np.random.rand())),
        transforms.ToTensor(),
    ]
)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_epoch_visits_each_image_once_in_an_order_of_its_own(kind):
    loader = kind(recipe(CROP_AND_FLIP), Share())
    orders = [torch.cat([y for _, y in loader.epoch(epoch)]).tolist() for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] == orders[2] != orders[1]
    assert kind(recipe(CROP_AND_FLIP, seed=1), Share()).epoch(0).__next__()[1].tolist() != orders[0]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(
    epoch=st.integers(0, 200), start=st.integers(0, 4), processes=st.integers(1, 4), draws=st.data()
)
@settings(max_examples=20, deadline=None)
def test_batches_follow_from_epoch_and_step_alone(kind, epoch, start, processes, draws):
    whole = list(kind(recipe(CROP_AND_FLIP), Share()).epoch(epoch))
    torch.manual_seed(draws.draw(st.integers(0, 9)))  # other random numbers do not matter
    before = torch.get_rng_state()
    parts = [
        list(kind(recipe(CROP_AND_FLIP), Share(p, processes)).epoch(epoch, start))
        for p in range(processes)
    ]
    assert torch.equal(torch.get_rng_state(), before)  # and are not touched
    for step, (pixels, targets) in enumerate(whole[start:]):
        assert torch.equal(pixels, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(targets, torch.cat([part[step][1] for part in parts]))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_repeated_image_comes_in_the_same_batch_and_not_in_the_same_form(kind):
    loader = kind(recipe(CROP_AND_FLIP, repeated_augmentation=4), Share())
    assert len(loader) == 5
    for pixels, targets in loader.epoch(0):
        assert sorted(np.unique(targets, return_counts=True)[1]) == [4, 4]
        assert len({image.numpy().tobytes() for image in pixels}) > 2


def test_workers_augment_as_one_process_does():
    crop = transforms.Compose([transforms.RandomCrop(6, padding=2), transforms.ToTensor()])
    one, several = (
        LoaderBatches(recipe(), Noise(), crop, workers, CPU, Share()) for workers in (0, 2)
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
def test_what_the_device_cannot_do_is_refused_by_name(augmentation):
    with pytest.raises(UserError, match=f"no {next(iter(augmentation[0]))}.*on_device: false"):
        DeviceBatches(recipe(augmentation), Noise(), CPU, Share())
