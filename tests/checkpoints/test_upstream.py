"""The import of the authors' checkpoints, which refuses every other and every hostile file."""

import argparse
import io
import json
import os
import pickle
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
import timm
import torch

from kn_zoo import cli
from kn_zoo.checkpoints import loading, manifest, upstream
from kn_zoo.checkpoints.manifest import WEIGHTS_FILE, Checkpoint
from kn_zoo.checkpoints.upstream import PIN, UnpinnedWeights, convert
from tests.conftest import Peak
from tests.support import loopback
from tests.support.authors import published_name, saved_checkpoint
from tests.support.loopback import Drive, Fault

NAME, ID = "knresnet18.upstream_in1k", "1oU4IGxErW4l-oqY6vn8V1DL0dBMt1KUO"


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("knresnet18")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return network()


@pytest.fixture(scope="module")
def published(model: torch.nn.Module) -> bytes:
    return saved_checkpoint(model)


@pytest.fixture(autouse=True)
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("KN_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KN_ZOO_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    entry = manifest.find(NAME)
    return entry if entry.file is None else pytest.skip("the project has pinned it by now")


@pytest.fixture
def drive(published: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drive]:
    """Redirect the downloader's requests for Google Drive to the loopback interface."""
    server = Drive({ID: published})

    class Rerouted(requests.adapters.HTTPAdapter):
        def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
            url = urlsplit(request.url)
            assert url.scheme == "https" and url.netloc.endswith(".google.com")
            request.url = f"{server.endpoint}{url.path}?{url.query}"
            response = super().send(request, *arguments, **options)
            response.url = url.geturl()
            return response

    monkeypatch.setattr("requests.sessions.HTTPAdapter", Rerouted)
    yield server
    server.stop()


def same(loaded: torch.nn.Module, model: torch.nn.Module) -> bool:
    expected = model.state_dict()
    return all(torch.equal(x, expected[key]) for key, x in loaded.state_dict().items())


def load(name: str = "knresnet18") -> torch.nn.Module:
    return timm.create_model(name, pretrained=True)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {".lock"}


def test_the_names_are_the_authors(upstream: Path, model: torch.nn.Module) -> None:
    with np.load(upstream / "knresnet18.npz") as numbers:
        keys = [key for key, _ in json.loads(str(numbers["state_dict"]))]
    assert {published_name(key) for key in model.state_dict()} == set(keys)


@pytest.mark.parametrize("size", [18, 34, 50])
def test_every_tensor_of_the_authors_has_its_place(upstream: Path, size: int) -> None:
    with np.load(upstream / f"knresnet{size}.npz") as numbers:
        shapes = json.loads(str(numbers["state_dict"]))
    published = {key: torch.zeros(shape) for key, shape in shapes}
    checkpoint = manifest.find(f"knresnet{size}.upstream_in1k")
    converted = convert(checkpoint, published)
    assert sum(x.numel() for x in converted.values()) == checkpoint.parameters


@pytest.mark.parametrize("asks", [True, False])
def test_the_first_use_downloads_checks_and_pins(
    checkpoint: Checkpoint, model: torch.nn.Module, drive: Drive, asks: bool
) -> None:
    drive.asks = asks
    with pytest.warns(UnpinnedWeights, match="not yet pinned by the project"):
        assert same(load(), model)
    assert drive.count("GET", "confirm=t") == int(asks)
    asked = len(drive.requests)
    folder = upstream.folder(checkpoint)
    assert files(folder) == {WEIGHTS_FILE, PIN}
    drive.stop()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnpinnedWeights)
        for name in ("knresnet18", NAME):
            assert same(load(name), model)
    assert len(drive.requests) == asked
    assert NAME in timm.list_pretrained("knresnet18")


def test_another_file_is_refused_later(
    checkpoint: Checkpoint, model: torch.nn.Module, published: bytes, drive: Drive
) -> None:
    with pytest.warns(UnpinnedWeights):
        load()
    converted = upstream.folder(checkpoint) / WEIGHTS_FILE
    right = converted.read_bytes()
    drive.files[ID] = saved_checkpoint(network(seed=1))
    converted.unlink()
    with pytest.raises(loading.CorruptWeights, match=r"this machine .* has pinned"):
        load()
    assert not converted.exists()
    drive.files[ID] = published
    with pytest.warns(UnpinnedWeights):
        assert same(load(), model)
    assert converted.read_bytes() == right
    converted.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(loading.CorruptWeights, match=r"SHA-256 .* Delete"):
        load()


def test_the_projects_hash_wins(
    checkpoint: Checkpoint, published: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hand.pth"
    path.write_bytes(published)
    with pytest.warns(UnpinnedWeights):
        file = upstream.import_checkpoint(checkpoint, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert upstream.import_checkpoint(replace(checkpoint, file=file), path) == file
    other = replace(checkpoint, file=replace(file, sha256="0" * 64))
    with pytest.raises(loading.CorruptWeights, match="the project has pinned"):
        upstream.import_checkpoint(other, path)


def test_what_drive_may_answer(
    checkpoint: Checkpoint, published: bytes, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is an error of one line with the manual way; no file of it is kept."""
    wrong: list[tuple[str, Callable[[], object], type[Exception], str]] = [
        ("quota", lambda: setattr(drive, "quota", True), loading.MissingWeights, "Too many users"),
        ("gone", lambda: drive.files.clear(), loading.MissingWeights, "404|link of the file"),
        ("truncated", lambda: drive.files.update({ID: published[:9999]}), loading.CorruptWeights,
         "not a file written by torch.save"),
        ("page", lambda: drive.files.update({ID: loopback.HTML}), loading.CorruptWeights,
         "not a file written by torch.save"),
        ("cut", lambda: drive.faults.append(Fault("GET", "confirm", loopback.cut(0.5), 9)),
         loading.WeightsError, "incomplete|IncompleteRead|not a file"),
        ("error", lambda: drive.faults.append(Fault("GET", "/", loopback.status(503), 9)),
         loading.MissingWeights, "could not be downloaded"),
        ("dead", drive.stop, loading.MissingWeights, "could not be downloaded"),
    ]  # fmt: skip
    for what, happens, error, text in wrong:
        drive.files[ID], drive.quota = published, False
        drive.faults.clear()
        happens()
        with pytest.raises(error, match=text) as caught:
            load()
        message = str(caught.value)
        assert "\n" not in message, what
        if isinstance(caught.value, loading.MissingWeights):
            assert f"kn-zoo import {NAME} FILE" in message and f"/d/{ID}/" in message, what
        assert files(upstream.folder(checkpoint)) == set(), what
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(loading.MissingWeights, match=r"Unset HF_HUB_OFFLINE.*kn-zoo import"):
        load()


def test_by_hand(
    model: torch.nn.Module,
    published: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`kn-zoo import`, then a directory for a machine without network and pin."""
    path, place = tmp_path / "knresnet18_imagenet.pth", tmp_path / "usb stick"
    path.write_bytes(published)
    assert cli.run(cli.app, ["import", "knresnet18", str(path)]) == 0
    assert "not yet pinned by the project" in capsys.readouterr().err
    assert cli.run(cli.app, ["download", NAME, str(place)]) == 0
    assert files(place) == {"SHA256SUMS", f"{NAME}/{WEIGHTS_FILE}", f"{NAME}/{PIN}"}
    monkeypatch.setenv("KN_ZOO_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("KN_ZOO_WEIGHTS", str(place))
    assert same(load(), model)
    assert cli.run(cli.app, ["check", str(place)]) == 0
    stored = place / NAME / WEIGHTS_FILE
    stored.write_bytes(stored.read_bytes()[:-1] + b"!")
    assert cli.run(cli.app, ["check", str(place)]) == 1
    with pytest.raises(loading.CorruptWeights, match="kn-zoo check"):
        load()


def test_another_networks_tensors_are_refused(
    checkpoint: Checkpoint, model: torch.nn.Module
) -> None:
    right = {published_name(key): value for key, value in model.state_dict().items()}
    assert convert(checkpoint, right).keys() == model.state_dict().keys()
    key = "res_block3.conv1.weight"
    assert key in right
    wrong = {
        "missing": {k: v for k, v in right.items() if k != key},
        "unknown": {**right, "res_block3.conv9.weight": right[key]},
        "more blocks": {**right, "res_block9.conv1.weight": right[key]},
        "shape": {**right, key: right[key][:-1]},
        "nan": {**right, key: torch.full_like(right[key], torch.nan)},
        "inf": {**right, "fc.bias": torch.full_like(right["fc.bias"], torch.inf)},
        "integers": {**right, key: right[key].int()},
        "complex": {**right, key: right[key].to(torch.complex64)},
        "sparse": {**right, "fc.weight": right["fc.weight"].to_sparse()},
        "nothing": {},
    }
    for what, tensors in wrong.items():
        with pytest.raises(loading.CorruptWeights, match="Not the weights of") as caught:
            convert(checkpoint, tensors)
        assert "\n" not in str(caught.value), what


# Hostile files


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def saved(document: Any) -> bytes:
    file = io.BytesIO()
    torch.save(document, file)
    return file.getvalue()


def with_pickle(instructions: bytes, name: str = "archive/data.pkl", **options: Any) -> bytes:
    """Return an archive as torch.save writes it, with other pickle instructions."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr(name, instructions)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", bytes(16))
    return file.getvalue()


def tensor(size: str, stride: str, numel: int) -> bytes:
    """Instructions for {"model": {"w": a float tensor of this size and stride}}."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + b"\x8a\x08" + numel.to_bytes(8, "little", signed=True) + b"tQ"
    )  # fmt: skip
    shape = b"(" + size.encode("latin-1") + b"t(" + stride.encode("latin-1") + b"t"
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + b"\x89N" + b"tR"
    )
    return b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00w" + rebuilt + b"ss."


def bombs(tmp_path: Path) -> dict[str, bytes]:
    ran = str(tmp_path / "ran")
    nested = argparse.Namespace(inner=argparse.Namespace(inner=argparse.Namespace()))
    laughs: Any = ["ha"]
    for _ in range(60):
        laughs = [laughs] * 10
    twice = io.BytesIO(with_pickle(b"\x80\x02}."))
    with warnings.catch_warnings(), zipfile.ZipFile(twice, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("archive/data.pkl", b"cposix\nsystem\n.")
    system = f"cposix\nsystem\n(X{len(ran) + 6:c}\x00\x00\x00touch {ran}tR.".encode()
    return {
        "os.system": saved({"model": {}, "args": Calls(os.system, f"touch {ran}")}),
        "eval": saved({"model": {}, "epoch": Calls(eval, f"open({ran!r}, 'w')")}),
        "open": saved({"model": Calls(open, ran, "w")}),
        "exec as a key": saved({"model": {Calls(exec, f"open({ran!r}, 'w')"): torch.ones(1)}}),
        "posix.system by name": with_pickle(b"\x80\x02" + system),
        "os.system, plain pickle": pickle.dumps(Calls(os.system, f"touch {ran}")),
        "os.system, protocol 4": with_pickle(pickle.dumps(Calls(os.system, f"touch {ran}"), 4)),
        "os.system, protocol 0": with_pickle(b"cos\nsystem\n(S'touch " + ran.encode() + b"'\ntR."),
        "INST": with_pickle(b"(S'true'\nios\nsystem\n."),
        "a getattr chain": with_pickle(b"\x80\x02cos.path\nos.system\n."),
        "unicode look-alike": with_pickle("carg\u0440arse\nNamespace\n.".encode()),
        "bytearray of a terabyte": saved({"model": {}, "x": Calls(bytearray, 10**12)}),
        "torch.empty of a terabyte": saved({"model": {"w": Calls(torch.zeros, 10**12)}}),
        "a storage of a terabyte": with_pickle(tensor("K\x04", "K\x01", 10**12)),
        "a tensor that repeats one number": with_pickle(
            tensor("\x8a\x06" + "\x00" * 5 + "\x01", "K\x00", 4)
        ),
        "a tensor beyond its storage": with_pickle(tensor("K\x7f", "K\x01", 4)),
        "a text of an exabyte": with_pickle(b"\x8d" + (2**60).to_bytes(8, "little") + b"a."),
        "a number of 2 GB": with_pickle(b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"1."),
        "lists in lists": with_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        "billion laughs": saved({"model": laughs}),
        "an endless loop": with_pickle(b"\x80\x02]q\x00h\x00a."),
        "nested Namespace": saved({"model": {}, "args": nested}),
        "two Namespaces": saved({"model": {}, "b": [argparse.Namespace(), argparse.Namespace()]}),
        "Namespace for tensors": saved({"model": argparse.Namespace(w=torch.ones(1))}),
        "Namespace for all": saved(argparse.Namespace(model={})),
        "Namespace as a tensor": saved({"model": {"w": argparse.Namespace()}}),
        "numbers as keys": saved({"model": {1: torch.ones(1)}}),
        "another class": saved({"model": torch.nn.Linear(1, 1)}),
        "a parameter list": saved([torch.ones(1)]),
        "no model": saved({"state_dict": {}}),
        "compressed": with_pickle(b"\x80\x02}." + bytes(10**7), compression=zipfile.ZIP_DEFLATED),
        "a zip bomb": with_pickle(bytes(2 * 10**8), compression=zipfile.ZIP_DEFLATED),
        "two of a name": twice.getvalue(),
        "no pickle": with_pickle(b"", name="archive/other"),
        "endless instructions": with_pickle(b"\x80\x02" + b"N0" * 500_000),
        "unfinished": with_pickle(b"\x80\x02}q\x00"),
        "nothing": b"",
        "a page": loopback.HTML,
        "safetensors": (2).to_bytes(8, "little") + b"{}",
    }  # fmt: skip


def test_hostile_checkpoints_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """Each is an error of one line; no code is run and no file is kept."""
    hostile = bombs(tmp_path)
    path, slowest = tmp_path / "hostile.pth", 0.0
    peak = Peak()
    for what, data in hostile.items():
        path.write_bytes(data)
        start = time.process_time()
        with pytest.raises(loading.CorruptWeights) as caught:
            upstream.import_checkpoint(checkpoint, path)
        slowest = max(slowest, time.process_time() - start)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000, what
        assert not (tmp_path / "ran").exists(), what
        assert files(upstream.folder(checkpoint)) == set(), what
    assert peak.grown < 500
    tell(
        f"{len(hostile)} hostile checkpoints: all refused, nothing run; the slowest took "
        f"{slowest:.2f} s, memory grew by {peak.grown:.0f} MiB"
    )
