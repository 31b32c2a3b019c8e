"""The images of a data set are the same, in the same order, everywhere, or an error is clear."""

import hashlib
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets
from torchvision.transforms.functional import to_tensor

from kn_zoo import data
from kn_zoo.data import MissingData

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def no_places_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KN_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KN_ZOO_DATA", str(tmp_path / "data"))


def test_the_digits_never_change() -> None:
    """Predictions are stored by image number: another order or pixel would void them."""
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
    ("name", "split", "cure"),
    [("cifar10", "test", "digits, cifar100"), ("digits", "validation", "train, test")],
)
def test_unknown_names_are_told_what_there_is(name: str, split: str, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        data.load(name, split)


def fake_cifar100(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in CIFAR-100's format with six and four images that torchvision takes for official."""
    official = folder / "cifar-100-python"
    official.mkdir(parents=True)
    random = np.random.RandomState(0)
    for split, count in (("train", 6), ("test", 4)):
        pixels = random.randint(0, 256, (count, 3072), np.uint8)
        content = {"data": pixels, "fine_labels": list(range(count))}
        (official / split).write_bytes(pickle.dumps(content))
    names = [f"class {i}" for i in range(100)]
    (official / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in official.iterdir()}
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5["test"]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    return folder


def test_cifar100_is_found_in_its_folder_or_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fake_cifar100(tmp_path / "data" / "cifar100", monkeypatch)
    for place in (root, root.parent, str(root.parent), None):
        test = data.load("cifar100", "test", place)
        assert [test[i][1] for i in range(len(test))] == [0, 1, 2, 3]
        assert test.class_names[3] == "class 3"
        assert test[0][0].size == (32, 32)
    assert len(data.load("cifar100", "train", root)) == 6


def test_a_flipped_bit_of_cifar100_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fake_cifar100(tmp_path / "cifar100", monkeypatch)
    file = root / "cifar-100-python" / "test"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    with pytest.raises(MissingData, match=r"cifar-100-python is incomplete or corrupt: remove it"):
        data.load("cifar100", "test", root)


def test_what_is_missing_is_told_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="--download fetch it"):
        data.load("cifar100", "test")
    with pytest.raises(MissingData, match=r"n01440764/\*\.JPEG"):
        data.load("imagenet-1k", "validation")
    with pytest.raises(MissingData, match="nowhere is not a folder:"):
        data.load("cifar100", "test", tmp_path / "nowhere")


def packed(folder: Path, official: Path, then: str = "") -> Path:
    """Strips, as far as the zoo knows them: a script beside them that writes the official files."""
    folder.mkdir()
    (folder / "test.rest.xz").touch()
    (folder / "unpack.py").write_text(
        "import shutil, sys, pathlib\n"
        "out = pathlib.Path(sys.argv[1]) / 'cifar-100-python'\n"
        "out.mkdir()\n"
        f"for name in ('train', 'test', 'meta'):\n"
        f"    shutil.copy({str(official / 'cifar-100-python')!r} + '/' + name, out)\n"
        f"    {then}\n"
    )
    return folder


def test_strips_are_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strips = packed(tmp_path / "strips", fake_cifar100(tmp_path / "official", monkeypatch))
    assert len(data.load("cifar100", "test", strips)) == 4
    assert "Unpacking CIFAR-100 from" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "cache" / "cifar100").iterdir()] == ["cifar-100-python"]
    assert len(data.load("cifar100", "train", strips)) == 6
    assert capsys.readouterr().err == ""


def test_strips_that_cannot_be_unpacked_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = fake_cifar100(tmp_path / "official", monkeypatch)
    strips = packed(tmp_path / "strips", official, then="assert name != 'test', 'not the official'")
    with pytest.raises(MissingData, match=r"not the official.*: copy that folder again"):
        data.load("cifar100", "test", strips)
    assert list((tmp_path / "cache" / "cifar100").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strips = packed(tmp_path / "strips", fake_cifar100(tmp_path / "official", monkeypatch))
    (tmp_path / "cache").touch()
    with pytest.raises(MissingData, match=r"cannot write to .*\$KN_ZOO_CACHE"):
        data.load("cifar100", "test", strips)


def test_download_only_when_asked_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = fake_cifar100(tmp_path / "official", monkeypatch)
    archive = tmp_path / "served" / "cifar.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(official / "cifar-100-python", "cifar-100-python")
    served = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(archive.parent))
    )
    threading.Thread(target=served.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{served.server_port}/{archive.name}"
    monkeypatch.setattr(datasets.CIFAR100, "url", url)
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", "0" * 32)
    (tmp_path / "data").mkdir()
    try:
        with pytest.raises(MissingData, match="or let --download fetch it"):
            data.load("cifar100", "test")
        with pytest.raises(MissingData, match="could not be downloaded to"):
            data.load("cifar100", "test", download=True)  # another md5
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", md5)
        assert len(data.load("cifar100", "test", tmp_path / "data", download=True)) == 4
        assert (tmp_path / "data" / "cifar100" / "cifar-100-python").is_dir()
    finally:
        served.shutdown()
        served.server_close()


@pytest.mark.skipif(not (SHARED / "cifar100").is_dir(), reason="no CIFAR-100 beside the checkout")
def test_the_real_cifar100_has_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KN_ZOO_DATA")
    monkeypatch.delenv("KN_ZOO_CACHE")  # unpack into the user's cache, once
    test = data.load("cifar100", "test")
    assert len(test) == 10_000 and len(test.class_names) == 100
    targets = [test[i][1] for i in range(len(test))]
    assert np.bincount(targets).tolist() == [100] * 100
    assert [test.class_names[i] for i in targets[:3]] == ["mountain", "forest", "seal"]


def test_imagenet_is_ordered_by_wordnet_id(tmp_path: Path) -> None:
    info = ImageNetInfo()
    place = tmp_path / "imagenet" / "val"
    for synset in info.label_names():
        (place / synset).mkdir(parents=True)
        Image.new("RGB", (4, 3)).save(place / synset / "image.JPEG")
    for root in (tmp_path, tmp_path / "imagenet"):
        images = data.load("imagenet-1k", "validation", root)
        assert [images[i][1] for i in range(len(images))] == list(range(1000))
        assert images.class_names[0] == info.index_to_description(0) == "tench, Tinca tinca"
    (place / "n01440764").rename(place / "tench")
    with pytest.raises(MissingData, match="must hold the 1000 class folders"):
        data.load("imagenet-1k", "validation", tmp_path)
