"""The authors' checkpoints, imported on first use: downloaded, checked, converted, kept.

A checkpoint is a pickle, which can run anything. So its instructions are read first, without being
followed: they may name tensors, plain containers and one argparse.Namespace, and nothing else. Then
torch unpickles it with ``weights_only``, and every key, shape and number must be those of the
network. What is stored is a safetensors file.

Nobody has told us the hash of the true file. The first one that is imported on a machine is pinned
there: another one is refused later. Once the project knows the hash it is in the manifest.
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
BYTES_PER_PARAMETER = 16  # the weights, and up to three copies that an optimizer or an EMA keeps
MAX_OVERHEAD = 64 << 20  # bytes beside them
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
    """Weights are used whose hash the project does not know."""


def folder(weight: Checkpoint) -> Path:
    """Where the converted file of a weight lies, and its pin."""
    return cache_dir() / "upstream" / weight.name


def known_file(weight: Checkpoint) -> File | None:
    """The file that the project has pinned, else this machine, else ``KN_ZOO_WEIGHTS``, else none.

    Raises:
        CorruptWeights: the pin cannot be read.
    """
    if weight.file:
        return weight.file
    directory = files.directory()
    for place in (folder(weight), *([directory / weight.name] if directory else [])):
        path = place / PIN
        try:
            if path.exists():
                return manifest.as_file(manifest.parse_json(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise CorruptWeights(
                f"{path} cannot be read ({first_line(error)}). Delete {place} and import again."
            ) from error
    return None


def fetch(weight: Checkpoint) -> Path:
    """The converted file of a weight; it is downloaded and imported if it is not there yet.

    Raises:
        MissingWeights: it cannot be downloaded, or the disk cannot be written.
        CorruptWeights: what was downloaded is not what it should be; nothing of it is kept.
    """
    place = folder(weight)
    converted = place / WEIGHTS_FILE
    if converted.is_file() and known_file(weight):  # perhaps where nothing can be written
        return converted
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"):  # of several processes one downloads
            if not (converted.is_file() and known_file(weight)):
                for left_over in place.glob(".download-*"):  # by a process that was killed
                    shutil.rmtree(left_over, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=place, prefix=".download-") as part:
                    _import(weight, _download(weight, Path(part) / "checkpoint.pth"))
    except OSError as error:
        raise MissingWeights(
            f"{weight.name} cannot be stored in {place} ({first_line(error)}). Make room, or name "
            "another folder in KN_ZOO_CACHE."
        ) from error
    return converted


def import_checkpoint(weight: Checkpoint, checkpoint: Path) -> File:
    """Check and convert a checkpoint that was downloaded by hand, and keep it in the cache.

    Raises:
        MissingWeights: it cannot be read, or the disk cannot be written.
        CorruptWeights: it is not what it should be; what was in the cache before is untouched.
    """
    place = folder(weight)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"):
            return _import(weight, checkpoint)
    except OSError as error:
        raise MissingWeights(
            f"{checkpoint} cannot be imported into {place} ({first_line(error)})."
        ) from error


def _keep(weight: Checkpoint, data: bytes, file: File) -> None:
    """Compare a converted file with the pin, or pin it if it is the first, and keep it."""
    known = known_file(weight)
    if known and known != file:
        by = "the project" if weight.file else "this machine (by an earlier import)"
        raise CorruptWeights(
            f"These are not the weights of {weight.name} that {by} has pinned: SHA-256 "
            f"{file.sha256}, not {known.sha256}. Get the file again; only if the authors say that "
            f"they have replaced it, delete {folder(weight)} and upgrade kn_zoo."
        )
    if known is None:
        text = json.dumps(asdict(file)) + "\n"
        manifest.write_text(folder(weight) / PIN, text)
    manifest.write_bytes(folder(weight) / WEIGHTS_FILE, data)
    if weight.file is None:
        warnings.warn(
            f"The hash of {weight.name} is not yet pinned by the project: nobody has confirmed "
            f"that these are the authors' weights. SHA-256 {file.sha256} is from now on "
            "the only one that this machine accepts.",
            UnpinnedWeights,
            stacklevel=2,
        )


def measured(results: dict[str, Any]) -> list[Checkpoint]:
    """Manifest entries with the hash and accuracies of what `eval/verify.py` wrote as JSON.

    The inputs become those under which the published accuracy was reproduced.

    Raises:
        ValueError: nothing was evaluated, or under no inputs was it reproduced.
    """
    try:
        entries = [_measured(row) for row in results["upstream"]]
    except (LookupError, TypeError) as error:
        raise ValueError(f"not what eval/verify.py --json writes ({first_line(error)})") from error
    if not entries:
        raise ValueError("no imported weight was evaluated in these results")
    return entries


def _measured(row: dict[str, Any]) -> Checkpoint:
    weight = manifest.find(row["name"])
    if not row["reproduced"]:
        raise ValueError(f"{weight.name}: the published accuracy was not reproduced")
    inputs = row["reproduced"][0]["inputs"]
    runs = [run for run in row["runs"] if run["inputs"] == inputs]
    accuracies = {
        run["statistics"]: Accuracy(run["top1"], run["top5"], run["draws"]) for run in runs
    }
    entry = replace(
        weight,
        file=manifest.as_file(row["file"]),
        preprocessing=replace(weight.preprocessing, mean=runs[0]["mean"], std=runs[0]["std"]),
        upstream=replace(_upstream(weight), measured=accuracies),
    )
    return Checkpoint.from_json(entry.to_json())  # which checks the types of what was read


def _import(weight: Checkpoint, checkpoint: Path) -> File:
    tensors = convert(weight, unpickle(checkpoint, weight.parameters))
    data = to_safetensors(tensors, metadata={"format": "pt"})
    file = File(hashlib.sha256(data).hexdigest(), len(data), "float32")
    _keep(weight, data, file)
    return file


def _download(weight: Checkpoint, target: Path) -> Path:
    """Fetch the file from Google Drive with its progress shown, past the page that asks back."""
    by_hand = (
        f"Or download it in a browser from {_upstream(weight).source}, and run "
        f"`kn-zoo import {weight.name} FILE`."
    )
    if constants.is_offline_mode():
        raise MissingWeights(f"{weight.name} is not here. Unset HF_HUB_OFFLINE. {by_hand}")
    import gdown  # seldom needed, and slow to import

    found = re.search(r"/d/([\w-]+)/", _upstream(weight).source)
    assert found  # the manifest has no other sources
    print(f"Downloading {weight.name} from Google Drive (once) ...", file=sys.stderr)
    try:
        gdown.download(id=found[1], output=str(target), use_cookies=False)
    except OSError as error:
        if error.errno and not isinstance(error, ConnectionError):  # a full disk
            raise
        reason = first_line(error)
    except Exception as error:  # the downloader's classes differ by version
        reason = " ".join(str(error).split()) or type(error).__name__
    else:
        if target.is_file():
            return target
        reason = "no file came"
    raise MissingWeights(
        f"{weight.name} could not be downloaded from Google Drive ({reason[:300]}). "
        f"Try again later: Drive allows each file only so many downloads a day. {by_hand}"
    )


def _upstream(weight: Checkpoint) -> Upstream:
    assert weight.upstream is not None
    return weight.upstream


def unpickle(checkpoint: Path, parameters: int) -> dict[str, Tensor]:
    """The tensors under the key ``model`` of a checkpoint of a network with so many parameters.

    Raises:
        OSError: the file cannot be read.
        CorruptWeights: it is no checkpoint, or holds more than a checkpoint has to.
    """
    try:
        with checkpoint.open("rb") as file:
            _check_archive(file, BYTES_PER_PARAMETER * parameters + MAX_OVERHEAD)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(file, map_location="cpu", weights_only=True)
        _check_objects(found)
        return found["model"]
    except OSError:
        raise
    except Exception as error:  # zipfile, pickletools and torch raise anything on hostile files
        raise CorruptWeights(
            f"{checkpoint} is refused: {' '.join(str(error).split())[:300] or repr(error)}. "
            "Download it again; nothing of it was kept."
        ) from error


def _check_archive(file: BinaryIO, limit: int) -> None:
    """Read a checkpoint's table of contents and instructions; a ValueError says what is wrong."""
    if file.seek(0, os.SEEK_END) > limit:
        raise ValueError(f"more than the {limit:,} bytes that this network needs at most")
    if not zipfile.is_zipfile(file):
        raise ValueError("not a file that torch.save writes")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two entries of the archive have the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("the archive is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > limit:
            raise ValueError(f"the archive says that it holds more than {limit:,} bytes")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
            raise ValueError("the archive lacks a data.pkl of reasonable size")
        instructions = archive.read(pickles[0])
    for operation, argument, _ in pickletools.genops(instructions):
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"the pickle uses {operation.name}, which torch.save never does")
        if operation.name == "GLOBAL" and argument not in ALLOWED:
            raise ValueError(f"the pickle asks for {'.'.join(str(argument).split()[:2])}")


def _check_objects(found: Any) -> None:
    """A checkpoint is a dict with tensors by name under ``model``, and at most one Namespace."""
    if type(found) is not dict or not isinstance(found.get("model"), dict):
        raise ValueError("no dict of tensors under the key 'model'")
    for key, value in found["model"].items():
        if type(key) is not str:
            raise ValueError("a key in 'model' is no text")
        if type(value) is not Tensor:
            raise ValueError(f"{key[:80]!r} in 'model' is no tensor")
    namespaces, seen, waiting = 0, set(), [found]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, argparse.Namespace):
            namespaces += 1
            waiting += vars(value).values()
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
    if namespaces > 1:
        raise ValueError("more than one argparse.Namespace")


def convert(weight: Checkpoint, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the published code under our names, contiguous and in float32.

    Raises:
        CorruptWeights: a key or shape is not the network's, or a number is not finite.
    """
    entry_point = timm.models.model_entrypoint(weight.architecture)
    with torch.device("meta"):
        network = timm.create_model(weight.architecture, **weight.model_args)
    rename = vars(sys.modules[entry_point.__module__])["checkpoint_filter_fn"]
    wanted = network.state_dict()
    try:
        tensors = rename(published, network)
    except (IndexError, KeyError) as error:  # more blocks than the network has
        raise CorruptWeights(f"Not the weights of {weight.name}: {first_line(error)}.") from error
    wrong = sorted(tensors.keys() ^ wanted.keys())
    wrong += [k for k, x in tensors.items() if k in wanted and x.shape != wanted[k].shape]
    wrong += [k for k, x in tensors.items() if k not in wrong and not _finite(x)]
    if wrong:
        raise CorruptWeights(
            f"Not the weights of {weight.name}: {len(wrong)} of {len(wanted)} tensors are missing, "
            f"unknown, of another shape or not finite, among them {', '.join(wrong[:3])[:200]}."
        )
    return {key: tensors[key].detach().float().contiguous() for key in wanted}


def _finite(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.is_floating_point()
        and bool(tensor.isfinite().all())
    )
