"""Training batches: what they hold, in which order, and that they can be taken up anywhere."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF

from batches import DeviceBatches

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


def batches(images, augmentation, **options):
    channels = 3 if images.pixels.ndim == 4 else 1
    rest = dict(mean=[0.5] * channels, std=[0.25] * channels, device=torch.device("cpu"), seed=0)
    return DeviceBatches(images, options.pop("batch_size", 8), augmentation, **{**rest, **options})


@pytest.mark.parametrize("channels", [1, 3])
def test_every_crop_and_flip_is_one_that_torchvision_makes_and_all_occur(channels):
    images = Noise(4, channels)
    loader = batches(images, CROP_AND_FLIP, batch_size=4)
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
        loader.set_epoch(epoch)
        for pixels, targets in loader:
            assert pixels.is_contiguous(memory_format=torch.channels_last) or channels == 1
            for image, target in zip(pixels, targets, strict=True):
                same = ((stack - image).abs().amax((1, 2, 3)) < 1e-5) & (owner == target)
                assert same.sum() == 1
                seen += same
    assert seen.sum() == 800
    # Each of 200 outcomes is expected 4 times; chi squared with 196 degrees of freedom.
    assert ((seen - 4) ** 2 / 4).sum() < 290


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own():
    loader = batches(Noise(40), [])
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        orders.append(torch.cat([targets for _, targets in loader]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_what_one_process_sees(processes):
    whole = list(batches(Noise(), CROP_AND_FLIP))
    parts = [
        list(batches(Noise(), CROP_AND_FLIP, process=p, processes=processes))
        for p in range(processes)
    ]
    for step, (pixels, targets) in enumerate(whole):
        assert torch.equal(pixels, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(targets, torch.cat([part[step][1] for part in parts]))


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
    with pytest.raises(ValueError, match=f"no {next(iter(augmentation[0]))}.*on_device: false"):
        batches(Noise(), augmentation)
