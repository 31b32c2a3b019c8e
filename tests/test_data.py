"""Data sets: fixed images in a fixed order, found by one rule, downloaded on request."""

import hashlib
import pickle
import socket
import tarfile
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets
from torchvision.transforms.functional import to_tensor

from kn_zoo import data
from kn_zoo.data import MissingData


@pytest.fixture(autouse=True)
def isolated_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KN_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KN_ZOO_DATA", str(tmp_path / "data"))


def test_the_digits_never_change() -> None:
    """Stored predictions refer to images by index: order and pixels must not change."""
    digests = {}
    for split in data.SPLITS["digits"]:
        digits = data.Digits(train=split == "train")
        content = digits.data.tobytes() + bytes(digits.targets)
        digests[split] = (len(digits), hashlib.sha256(content).hexdigest()[:16])
    assert digests == {"train": (1201, "37baaac6a1da89e8"), "test": (596, "9f4ce1d4998b8e8f")}


def test_every_digit_is_in_one_split_in_proportion() -> None:
    from sklearn.datasets import load_digits

    grey, targets = load_digits(return_X_y=True)
    train, test = data.Digits(train=True), data.Digits(train=False)
    both = np.concatenate([train.data, test.data]).reshape(-1, 64)
    assert sorted(map(bytes, both)) == sorted(map(bytes, np.round(grey * 255 / 16).astype("uint8")))
    held_out = np.bincount(test.targets) / np.bincount(targets)
    assert (abs(held_out - 1 / 3) < 0.01).all()


def test_a_digit_saved_as_png_is_the_same_input(tmp_path: Path) -> None:
    digits = data.load("digits", "test")
    image, target = digits[100]
    image.save(tmp_path / "digit.png")
    assert torch.equal(to_tensor(Image.open(tmp_path / "digit.png")), to_tensor(image))
    assert to_tensor(image).min() >= 0 and to_tensor(image).max() == 1
    digits.transform = to_tensor
    assert torch.equal(digits[100][0], to_tensor(image)) and digits[100][1] == target
    assert digits.class_names[target] == str(target)


def test_eight_bits_become_the_quotient_by_255() -> None:
    every = torch.arange(256, dtype=torch.float32) / 255
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert torch.equal(to_tensor(image).flatten(), every)


@pytest.mark.parametrize(
    ("name", "split", "choices"),
    [("mnist", "test", "digits, cifar10, cifar100"), ("digits", "validation", "train, test")],
)
def test_unknown_names_are_answered_with_the_choices(name: str, split: str, choices: str) -> None:
    with pytest.raises(ValueError, match=choices):
        data.load(name, split)


LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
each_cifar = pytest.mark.parametrize("name", LABELS)


def fake_cifar(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in the format of CIFAR with six and four images, which torchvision accepts."""
    dataset_class: Any = data.CIFAR[name]
    files = folder / dataset_class.base_folder
    files.mkdir(parents=True)
    random = np.random.RandomState(0)
    for split, count in (("train", 6), ("test", 4)):
        pixels = random.randint(0, 256, (count, 3072), np.uint8)
        content = {"data": pixels, LABELS[name]: list(range(count))}
        (files / split).write_bytes(pickle.dumps(content))
    key = dataset_class.meta["key"]
    (files / "meta").write_bytes(pickle.dumps({key: [f"class {i}" for i in range(100)]}))
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in files.iterdir()}
    monkeypatch.setattr(dataset_class, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(dataset_class, "test_list", [["test", md5["test"]]])
    meta = {"filename": "meta", "key": key, "md5": md5["meta"]}
    monkeypatch.setattr(dataset_class, "meta", meta)
    return files


@each_cifar
def test_cifar_is_read_from_the_folder_of_the_data_sets_or_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = fake_cifar(name, tmp_path / "data" / name, monkeypatch).parent
    for root in (own, own.parent, str(own.parent), None):
        test = data.load(name, "test", root)
        assert [test[i][1] for i in range(len(test))] == [0, 1, 2, 3]
        assert test.class_names[3] == "class 3"
        assert test[0][0].size == (32, 32)
    assert len(data.load(name, "train", own)) == 6


def test_the_folder_is_the_argument_else_the_variable_else_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data.data_dir("elsewhere") == Path("elsewhere")
    assert data.data_dir() == tmp_path / "data"
    monkeypatch.delenv("KN_ZOO_DATA")
    assert data.data_dir() == data.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("KN_ZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.data_dir() == tmp_path / "xdg" / "kn_zoo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.data_dir() == Path.home() / ".cache" / "kn_zoo"


@each_cifar
def test_a_flipped_bit_of_cifar_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fake_cifar(name, tmp_path / name, monkeypatch)
    content = bytearray((files / "test").read_bytes())
    content[500] ^= 1
    (files / "test").write_bytes(content)
    with pytest.raises(MissingData, match=f"{files} is incomplete or corrupt: remove it"):
        data.load(name, "test", tmp_path)


def test_errors_about_missing_images_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(
        MissingData, match=r"KN_ZOO_DATA .*cifar100/cifar-100-python, .* --download"
    ):
        data.load("cifar100", "test")
    with pytest.raises(MissingData, match=r"imagenet-1k/val/n01440764/\*\.JPEG"):
        data.load("imagenet-1k", "validation")
    with pytest.raises(MissingData, match="nowhere is not a folder:"):
        data.load("cifar100", "test", tmp_path / "nowhere")


@each_cifar
def test_a_download_is_checked_and_complete(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset_class: Any = data.CIFAR[name]
    files = fake_cifar(name, tmp_path / "official", monkeypatch)
    archive = tmp_path / "served" / "cifar.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(files, files.name)
    served = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(archive.parent))
    )
    threading.Thread(target=served.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{served.server_port}/{archive.name}"
    monkeypatch.setattr(dataset_class, "url", url)
    monkeypatch.setattr(dataset_class, "tgz_md5", "0" * 32)
    folder = tmp_path / "data" / name
    try:
        with pytest.raises(MissingData, match="download it with --download"):
            data.load(name, "test")
        assert not folder.exists()
        with pytest.raises(MissingData, match=f"{url} could not be downloaded to {folder}"):
            data.load(name, "test", download=True)  # another MD5
        assert list(folder.iterdir()) == []
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(dataset_class, "tgz_md5", md5)
        assert len(data.load(name, "test", download=True)) == 4
        assert [path.name for path in folder.iterdir()] == [files.name]
    finally:
        served.shutdown()
        served.server_close()
    assert len(data.load(name, "train", download=True)) == 6  # nothing left to download


def test_a_download_without_a_server_or_without_an_answer_fails_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = silent.getsockname()
        monkeypatch.setattr(datasets.CIFAR100, "url", f"http://127.0.0.1:{address[1]}/cifar.tar.gz")
        with pytest.raises(MissingData, match=r"timed out.*: check network and disk space"):
            data.load("cifar100", "test", download=True)
    with pytest.raises(MissingData, match=r"refused.*: check network and disk space"):
        data.load("cifar100", "test", download=True)
    assert socket.getdefaulttimeout() is None
    (tmp_path / "file").touch()
    with pytest.raises(MissingData, match="could not be downloaded to"):
        data.load("cifar100", "test", tmp_path / "file", download=True)


@pytest.mark.parametrize(
    ("name", "first"),
    [("cifar10", ["cat", "ship", "ship"]), ("cifar100", ["mountain", "forest", "seal"])],
)
def test_the_real_test_images_have_their_classes(
    name: str, first: list[str], dataset_folder: Callable[[str], Path]
) -> None:
    test = data.load(name, "test", dataset_folder(name))
    classes = len(test.class_names)
    assert len(test) == 10_000 and classes == int(name.removeprefix("cifar"))
    targets = [test[i][1] for i in range(len(test))]
    assert np.bincount(targets).tolist() == [10_000 // classes] * classes
    assert [test.class_names[i] for i in targets[:3]] == first


def test_imagenet_is_ordered_by_wordnet_id(tmp_path: Path) -> None:
    info = ImageNetInfo()
    folder = tmp_path / "imagenet" / "val"
    for synset in info.label_names():
        (folder / synset).mkdir(parents=True)
        Image.new("RGB", (4, 3)).save(folder / synset / "image.JPEG")
    for root in (tmp_path, tmp_path / "imagenet"):
        images = data.load("imagenet-1k", "validation", root)
        assert [images[i][1] for i in range(len(images))] == list(range(1000))
        assert images.class_names[0] == info.index_to_description(0) == "tench, Tinca tinca"
    (folder / "n01440764").rename(folder / "tench")
    with pytest.raises(MissingData, match="must contain the 1000 class folders"):
        data.load("imagenet-1k", "validation", tmp_path)
