"""CamVid and Cityscapes are read as their authors lay them out; image and labels stay aligned."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from kn_zoo.data import MissingData
from kn_zoo.segmentation import data
from kn_zoo.segmentation.transforms import RandomScale, eval_transform, training_transform
from kn_zoo.training.recipe import UserError
from tests.segmentation import miniatures

PIXELS = dict(input_size=(3, 45, 60), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("flat", [False, True])
def test_camvid_splits(tmp_path: Path, flat: bool) -> None:
    root = miniatures.camvid(tmp_path, flat=flat)
    members = {
        s: [p.stem for p, _ in data.load("camvid", s, root).files] for s in data.SPLITS["camvid"]
    }
    assert {s: tuple(members[s]) for s in ("train", "val", "test")} == miniatures.CAMVID_NAMES
    assert members["held_out"] == ["0006R0_f00930", "0006R0_f00960"]
    assert sorted(members["fit"] + members["held_out"]) == members["train"]
    assert len(data.load("camvid", "train[::2]", root)) == 3
    assert len(data.load("camvid", "train", root / "camvid")) == 5


def test_camvid_pairs(tmp_path: Path) -> None:
    image, labels = data.load("camvid", "train", miniatures.camvid(tmp_path))[0]
    pixels, classes = miniatures.pair(0, 45, 60)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(labels.numpy(), classes)
    assert isinstance(image, tv_tensors.Image) and isinstance(labels, tv_tensors.Mask)


def test_cityscapes_train_ids(tmp_path: Path) -> None:
    images = data.load("cityscapes", "val", miniatures.cityscapes(tmp_path))
    cities = [path.parent.name for path, _ in images.files]
    assert cities == ["lindau", "lindau", "munster", "munster"]
    assert [path.name for path, _ in images.files] == sorted(p.name for p, _ in images.files)
    labels = images[0][1].flatten()[:34].tolist()
    # gtFine's label ids by train id, as cityscapesScripts' labels.py lists them
    official = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert labels == [official.index(i) if i in official else 255 for i in range(34)]
    assert images.class_names[:3] == ["road", "sidewalk", "building"]
    assert len(images.classes) == len(images.classes.palette) == 19


def test_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingData, match="--data-dir"):
        data.load("camvid", "train", tmp_path)
    with pytest.raises(ValueError, match="camvid, cityscapes"):
        data.load("kitti", "train", tmp_path)
    with pytest.raises(ValueError, match="held_out"):
        data.load("camvid", "trainval", tmp_path)
    monkeypatch.setenv("KN_ZOO_DATA", str(miniatures.camvid(tmp_path)))
    _, labels = data.load("camvid", "val").files[0]
    os.remove(labels)
    with pytest.raises(MissingData, match=labels.name):
        data.load("camvid", "val")


def test_a_color_image_is_not_a_label_map(tmp_path: Path) -> None:
    images = data.load("camvid", "val", miniatures.camvid(tmp_path))
    Image.new("RGB", (60, 45)).save(images.files[0][1])
    with pytest.raises(MissingData, match="not a label map"):
        images[0]


AUGMENTATION: list[dict[str, dict]] = [
    {"RandomScale": {"scale": [0.5, 2.0]}},
    {"RandomCrop": {"size": [56, 56], "pad_if_needed": True}},
    {"RandomHorizontalFlip": {}},
]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_joint_transforms_keep_image_and_labels_aligned(seed: int) -> None:
    """A vertical and a horizontal edge, in image and labels, stay at the same position."""
    labels = torch.zeros(45, 60, dtype=torch.uint8)
    labels[20:, :] += 1
    labels[:, 33:] += 2
    image = (50 + 40 * labels)[None].repeat(3, 1, 1)  # void would be black
    transform = training_transform(AUGMENTATION, PIXELS, void=11)
    torch.manual_seed(seed)
    pixels, mask = transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
    assert pixels.shape == (3, 56, 56) and mask.shape == (56, 56) and mask.dtype == torch.int64
    # void exactly where padding is; inside, the class whose grey level is nearest, but for pixels
    # that lie on an edge and are a mixture of both sides
    assert torch.equal(mask == 11, pixels[0] == 0)
    nearest = ((255 * pixels[0] - 50) / 40).round().long().clamp(0, 3)
    wrong = (mask != 11) & (nearest != mask)
    inner = (mask[1:-1, 1:-1] == mask[:-2, 1:-1]) & (mask[1:-1, 1:-1] == mask[2:, 1:-1])
    inner &= (mask[1:-1, 1:-1] == mask[1:-1, :-2]) & (mask[1:-1, 1:-1] == mask[1:-1, 2:])
    assert not (wrong[1:-1, 1:-1] & inner).any()
    assert wrong.float().mean() < 0.05


def test_labels_are_scaled_by_nearest_exact() -> None:
    """Halving takes pixel 1, 3, ..., as PIL does; "nearest" would take 0, 2, ..."""
    labels = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    half = RandomScale((0.5, 0.5))(tv_tensors.Image(torch.zeros(3, 8, 8)), tv_tensors.Mask(labels))
    theirs = Image.fromarray(labels.numpy()).resize((4, 4), Image.Resampling.NEAREST)
    assert np.array_equal(half[1].numpy(), np.asarray(theirs))
    assert half[1][0, 0] == 9


def test_evaluation_resizes_images_only() -> None:
    image = tv_tensors.Image(torch.full((3, 90, 120), 51, dtype=torch.uint8))
    labels = tv_tensors.Mask(torch.full((90, 120), 11, dtype=torch.uint8))
    pixels, mask = eval_transform(PIXELS)(image, labels)
    torch.testing.assert_close(pixels, torch.full((3, 45, 60), 0.2))
    assert mask.shape == (90, 120) and (mask == 11).all()


def test_an_unknown_augmentation_is_named() -> None:
    with pytest.raises(UserError, match="NoSuchTransform"):
        training_transform([{"NoSuchTransform": {}}], PIXELS, void=11)
    assert hasattr(v2, "ColorJitter")
