"""ImageNet 32x32 is read in its published form, and nothing else is unpickled."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kn_zoo.imagenet32 import FILES, ImageNet32, read_batch


def write_miniature(root: Path, images: int = 3, protocol: int = 2) -> np.ndarray:
    """The files of the data set with `images` in each; returns the training pixels (N, 3072)."""
    random = np.random.default_rng(0)
    pixels = []
    for name in (*FILES["train"], *FILES["validation"]):
        data = random.integers(0, 256, (images, 3072), dtype=np.uint8)
        content: dict[str, Any] = {
            "data": data,
            "labels": random.integers(1, 1001, images).tolist(),
        }
        if name.startswith("train"):
            content["mean"] = data.mean(0)
            pixels.append(data)
        (root / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return np.concatenate(pixels)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_images_and_labels_are_those_of_the_files(tmp_path: Path, protocol: int) -> None:
    pixels = write_miniature(tmp_path, protocol=protocol)
    train = ImageNet32(tmp_path, "train")
    assert len(train) == len(pixels) == 30
    for i in (0, 2, 3, 29):
        image, label = train[i]
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1).ravel(), pixels[i])
        assert 0 <= label < 1000
    with pytest.raises(IndexError):
        train[30]
    assert train.class_names[7] == "class 7"
    assert len(ImageNet32(tmp_path, "validation")) == 3


def test_class_names_come_from_the_map(tmp_path: Path) -> None:
    write_miniature(tmp_path)
    lines = [f"n{i:08d} {i} name_{i}" for i in range(1, 1001)]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines))
    names = ImageNet32(tmp_path, "validation").class_names
    assert (names[0], names[999]) == ("name 1", "name 1000")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def test_a_pickle_that_calls_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "val_data"
    path.write_bytes(pickle.dumps({"data": Malicious(), "labels": []}))
    with pytest.raises(ValueError, match="mkdir, which is not allowed"):
        read_batch(path)
    assert not (tmp_path / "unpickled").exists()


@given(st.binary(max_size=64))
def test_other_files_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("batch") / "val_data"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="no batch of ImageNet"):
        read_batch(path)


@pytest.mark.parametrize(
    "content",
    [
        {"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]},
        {"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 1001]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]},
        {"labels": [1]},
        [1, 2],
    ],
)
def test_damaged_batches_are_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "val_data"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="val_data"):
        read_batch(path)
