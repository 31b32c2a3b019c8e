"""The authors' checkpoints: downloaded, checked and converted on first use.

A torch checkpoint is a pickle, which can run any code. So its instructions are inspected before any
is executed: they may name tensors, plain containers and one argparse.Namespace, and nothing else.
Then torch unpickles it with ``weights_only``, and every key, shape and number has to be that of the
network. The result is stored as a safetensors file.

The authors publish no hashes. Trust on first use: the first import on a machine pins the hash, and
another file is refused later. Once the project has verified a hash, it is in the manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickletools
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from filelock import FileLock
from huggingface_hub import constants
from safetensors.torch import save as to_safetensors
from torch import Tensor

from kn_zoo.checkpoints import files, manifest
from kn_zoo.checkpoints.files import CorruptWeights, MissingWeights, first_line
from kn_zoo.checkpoints.manifest import WEIGHTS_FILE, Accuracy, Checkpoint, File, Upstream
from kn_zoo.data import cache_dir

PIN = "pinned.json"
BYTES_PER_PARAMETER = 16  # the weights, and up to three copies for an optimizer or an EMA
MAX_OVERHEAD = 64 << 20  # bytes for everything else
MAX_PICKLE = 1 << 20  # bytes of instructions; a KNResNet-50 with its optimizer has 0.1 MB
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Byte", "Char", "Bool")
ALLOWED = {
    *(f"torch {name}Storage" for name in _STORAGES),
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "collections Counter",
    "argparse Namespace",
}


class UnpinnedWeights(UserWarning):
    """Weights are used whose hash is not in the manifest."""


def folder(checkpoint: Checkpoint) -> Path:
    """Return the folder of the converted file and its pin."""
    return cache_dir() / "upstream" / checkpoint.name


def known_file(checkpoint: Checkpoint) -> File | None:
    """Return the expected weights file: the manifest's, this machine's pin, or ``KN_ZOO_WEIGHTS``'.

    Raises:
        CorruptWeights: the pin cannot be read.
    """
    if checkpoint.file:
        return checkpoint.file
    directory = files.directory()
    folders = [folder(checkpoint), *([directory / checkpoint.name] if directory else [])]
    for path in [place / PIN for place in folders]:
        try:
            if path.exists():
                return File.from_json(files.read_json(path))
        except (OSError, ValueError) as error:
            raise CorruptWeights(
                f"{path} cannot be read ({first_line(error)}). Delete {path.parent} and import "
                "the checkpoint again."
            ) from error
    return None


def fetch(checkpoint: Checkpoint) -> Path:
    """Return the path of the converted file, after downloading and importing it if necessary.

    Raises:
        MissingWeights: it cannot be downloaded, or the cache cannot be written.
        CorruptWeights: the download is not the expected checkpoint; nothing of it is kept.
    """
    target = folder(checkpoint)
    converted = target / WEIGHTS_FILE
    if converted.is_file() and known_file(checkpoint):  # the cache may be read-only
        return converted
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / ".lock"):  # only one of several processes downloads
            if not (converted.is_file() and known_file(checkpoint)):
                for partial in target.glob(".download-*"):  # of a process that was killed
                    shutil.rmtree(partial, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=target, prefix=".download-") as temporary:
                    _import(checkpoint, _download(checkpoint, Path(temporary) / "checkpoint.pth"))
    except OSError as error:
        raise MissingWeights(
            f"{checkpoint.name} cannot be stored in {target} ({first_line(error)}). Free some "
            "space, or set KN_ZOO_CACHE to another directory."
        ) from error
    return converted


def import_checkpoint(checkpoint: Checkpoint, path: Path) -> File:
    """Check and convert a torch checkpoint that was downloaded by hand, and keep it in the cache.

    Raises:
        MissingWeights: it cannot be read, or the cache cannot be written.
        CorruptWeights: it is not the expected checkpoint; the cache is unchanged.
    """
    target = folder(checkpoint)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / ".lock"):
            return _import(checkpoint, path)
    except OSError as error:
        raise MissingWeights(
            f"{path} cannot be imported into {target} ({first_line(error)}). Check the path; "
            "KN_ZOO_CACHE chooses another directory for the result."
        ) from error


def _keep(checkpoint: Checkpoint, data: bytes, file: File) -> None:
    """Compare a converted file with the pin, pin it if there is none, and store it."""
    known = known_file(checkpoint)
    if known and known != file:
        pinned_by = "the project" if checkpoint.file else "this machine (by an earlier import)"
        raise CorruptWeights(
            f"These are not the weights of {checkpoint.name} that {pinned_by} has pinned: SHA-256 "
            f"{file.sha256}, expected {known.sha256}. Download the file again. Only if the authors "
            f"announce a new file, delete {folder(checkpoint)} and upgrade kn_zoo."
        )
    if known is None:
        text = json.dumps(asdict(file)) + "\n"
        files.write_text(folder(checkpoint) / PIN, text)
    files.write_bytes(folder(checkpoint) / WEIGHTS_FILE, data)
    if checkpoint.file is None:
        warnings.warn(
            f"The hash of {checkpoint.name} is not yet pinned by the project: it is not confirmed "
            f"that these are the authors' weights. From now on this machine accepts only SHA-256 "
            f"{file.sha256}.",
            UnpinnedWeights,
            stacklevel=2,
        )


def measured(results: dict[str, Any]) -> list[Checkpoint]:
    """Return manifest entries with the hashes and accuracies that ``eval/verify.py --json`` wrote.

    The preprocessing becomes the one that reproduces the published accuracy.

    Raises:
        ValueError: nothing was evaluated, or the published accuracy was not reproduced.
    """
    try:
        entries = [_measured(row) for row in results["upstream"]]
    except (LookupError, TypeError) as error:
        raise ValueError(f"not written by eval/verify.py --json ({first_line(error)})") from error
    if not entries:
        raise ValueError("these results contain no checkpoint of the authors")
    return entries


def _measured(row: dict[str, Any]) -> Checkpoint:
    checkpoint = manifest.find(row["name"])
    if not row["reproduced"]:
        raise ValueError(f"{checkpoint.name}: the published accuracy was not reproduced")
    inputs = row["reproduced"][0]["inputs"]
    runs = [run for run in row["runs"] if run["inputs"] == inputs]
    accuracies = {
        run["statistics"]: Accuracy(run["top1"], run["top5"], run["draws"]) for run in runs
    }
    mean, std = runs[0]["mean"], runs[0]["std"]
    entry = replace(
        checkpoint,
        file=File.from_json(row["file"]),
        preprocessing=replace(checkpoint.preprocessing, mean=mean, std=std),
        upstream=replace(_upstream(checkpoint), measured=accuracies),
    )
    return Checkpoint.from_json(entry.to_json())  # validates what was read


def _import(checkpoint: Checkpoint, path: Path) -> File:
    tensors = convert(checkpoint, unpickle(path, checkpoint.parameters))
    data = to_safetensors(tensors, metadata={"format": "pt"})
    file = File(hashlib.sha256(data).hexdigest(), len(data), "float32")
    _keep(checkpoint, data, file)
    return file


def _download(checkpoint: Checkpoint, target: Path) -> Path:
    """Download the file from Google Drive, past its confirmation page, with a progress bar."""
    source = _upstream(checkpoint).source
    command = f"kn-zoo import {checkpoint.name} FILE"
    manually = f"Or download it in a browser from {source}, and run `{command}`."
    if constants.is_offline_mode():
        directory = files.directory()
        missing = f" and not in {files.DIRECTORY}={directory}" if directory else ""
        raise MissingWeights(
            f"{checkpoint.name} is not in {folder(checkpoint)}{missing}. Unset HF_HUB_OFFLINE. "
            f"{manually}"
        )
    import gdown  # rarely needed, and slow to import

    match = re.search(r"/d/([\w-]+)/", source)
    assert match  # by the pattern of `Upstream.source`
    print(f"Downloading {checkpoint.name} from Google Drive (once) ...", file=sys.stderr)
    try:
        gdown.download(id=match[1], output=str(target), use_cookies=False)
    except OSError as error:
        if error.errno and not isinstance(error, ConnectionError):  # a full disk
            raise
        reason = first_line(error)
    except Exception as error:  # the downloader's classes differ by version
        reason = " ".join(str(error).split()) or type(error).__name__
    else:
        if target.is_file():
            return target
        reason = "no file was received"
    raise MissingWeights(
        f"{checkpoint.name} could not be downloaded from Google Drive ({reason[:300]}). "
        f"Try again later: Drive limits the downloads of a file per day. {manually}"
    )


def _upstream(checkpoint: Checkpoint) -> Upstream:
    assert checkpoint.upstream is not None
    return checkpoint.upstream


def unpickle(path: Path, parameters: int) -> dict[str, Tensor]:
    """Return the tensors under the key ``model`` of a torch checkpoint.

    Args:
        parameters: number of parameters of the network, which bounds the size of the file.

    Raises:
        OSError: the file cannot be read.
        CorruptWeights: it is not a checkpoint, or contains more than a checkpoint needs.
    """
    try:
        with path.open("rb") as file:
            _check_archive(file, BYTES_PER_PARAMETER * parameters + MAX_OVERHEAD)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                document = torch.load(file, map_location="cpu", weights_only=True)
        _check_objects(document)
        return document["model"]
    except OSError:
        raise
    except Exception as error:  # zipfile, pickletools and torch raise anything on hostile files
        raise CorruptWeights(
            f"{path} is refused: {' '.join(str(error).split())[:300] or repr(error)}. "
            "Download it again. Nothing of it was kept."
        ) from error


def _check_archive(file: BinaryIO, limit: int) -> None:
    """Check the table of contents and the pickle instructions of a checkpoint.

    Raises:
        ValueError: torch.save would not write such a file for a network.
    """
    if file.seek(0, os.SEEK_END) > limit:
        raise ValueError(f"larger than {limit:,} bytes, the most that this network needs")
    if not zipfile.is_zipfile(file):
        raise ValueError("not a file written by torch.save")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two entries of the archive have the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("the archive is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > limit:
            raise ValueError(f"the archive unpacks to more than {limit:,} bytes")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
            raise ValueError("the archive has no data.pkl of a plausible size")
        instructions = archive.read(pickles[0])
    for operation, argument, _ in pickletools.genops(instructions):
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"the pickle uses {operation.name}, which torch.save never does")
        if operation.name == "GLOBAL" and argument not in ALLOWED:
            raise ValueError(f"the pickle names {'.'.join(str(argument).split()[:2])}")


def _check_objects(document: Any) -> None:
    """Check that a checkpoint is a dict of tensors under ``model``, with at most one Namespace.

    Raises:
        ValueError: it is anything else.
    """
    if type(document) is not dict or not isinstance(document.get("model"), dict):
        raise ValueError("no dict of tensors under the key 'model'")
    for key, value in document["model"].items():
        if type(key) is not str:
            raise ValueError("a key in 'model' is not a string")
        if type(value) is not Tensor:
            raise ValueError(f"{key[:80]!r} in 'model' is not a tensor")
    namespaces, seen, pending = 0, set(), [document]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, argparse.Namespace):
            namespaces += 1
            pending += vars(value).values()
        elif isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            pending += value
    if namespaces > 1:
        raise ValueError("more than one argparse.Namespace")


def convert(checkpoint: Checkpoint, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return published tensors under the names of this network, contiguous and in float32.

    Raises:
        CorruptWeights: a key or shape is not that of the network, or a number is not finite.
    """
    entry_point = timm.models.model_entrypoint(checkpoint.architecture)
    with torch.device("meta"):
        network = timm.create_model(checkpoint.architecture, **checkpoint.model_args)
    rename = vars(sys.modules[entry_point.__module__])["checkpoint_filter_fn"]
    expected = network.state_dict()
    try:
        tensors = rename(published, network)
    except (IndexError, KeyError) as error:  # more blocks than the network has
        raise CorruptWeights(
            f"Not the weights of {checkpoint.name}: {first_line(error)}."
        ) from error
    wrong = sorted(tensors.keys() ^ expected.keys())
    wrong += [k for k, x in tensors.items() if k in expected and x.shape != expected[k].shape]
    wrong += [k for k, x in tensors.items() if k not in wrong and not _finite(x)]
    if wrong:
        raise CorruptWeights(
            f"Not the weights of {checkpoint.name}: {len(wrong)} of {len(expected)} tensors are "
            "missing, unexpected, of another shape or not finite, among them "
            f"{', '.join(wrong[:3])[:200]}."
        )
    return {key: tensors[key].detach().float().contiguous() for key in expected}


def _finite(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.is_floating_point()
        and bool(tensor.isfinite().all())
    )
