"""A weight's file: nothing is made of its bytes before they are known to be the right ones.

A file that hashes right was made by us; one that does not is never parsed. What parses is checked
all the same, so that even a file whose hash was forged with it ends in an error that says why.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from kn_zoo.checkpoints.manifest import File, parse_json

DIRECTORY = "KN_ZOO_WEIGHTS"  # names a directory that `kn-zoo download` made
MAX_HEADER = 1 << 20  # bytes; the largest network here has a header of 40 kB


class WeightsError(RuntimeError):
    """Weights that were asked for cannot be had; the message names the cure."""


class MissingWeights(WeightsError):
    """There is no file to load, here or on the Hub."""


class CorruptWeights(WeightsError):
    """A file is there, but it is not the one that it should be."""


def directory() -> Path | None:
    """The directory that ``KN_ZOO_WEIGHTS`` names, if it does; `MissingWeights` if it is none."""
    if not (chosen := os.environ.get(DIRECTORY)):
        return None
    if not (path := Path(chosen).expanduser()).is_dir():
        raise MissingWeights(
            f"{DIRECTORY} is {path}, which is not a directory. Name the one that `kn-zoo download` "
            "made, or unset it."
        )
    return path


def checked_bytes(path: Path, expected: File, name: str, cure: str) -> bytes:
    """All bytes of a file, after comparing their hash; no more than `expected` says are kept.

    Raises:
        MissingWeights: the file cannot be read.
        CorruptWeights: its SHA-256 is another one.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            data = file.read(expected.bytes + 1)
            digest.update(data)
            size = len(data)
            while rest := file.read(1 << 20):
                digest.update(rest)
                size += len(rest)
    except OSError as error:
        raise MissingWeights(f"Cannot read {path} for {name} ({error.strerror}). {cure}") from error
    if digest.hexdigest() != expected.sha256:
        raise CorruptWeights(
            f"{path} is not {name}: its SHA-256 is {digest.hexdigest()} ({size:,} bytes), it must "
            f"be {expected.sha256} ({expected.bytes:,} bytes). {cure}"
        )
    return data


def tensors(data: bytes, dtype: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all finite and, if floating-point, of one `dtype`.

    Raises:
        ValueError: it is no such file.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_HEADER, len(data) - 8):
        raise ValueError(f"not a safetensors file: a header of {size:,} bytes in {len(data):,}")
    parse_json(data[8 : 8 + size])  # the format's own parser takes the last of two equal keys
    try:
        found = parse_safetensors(data)
    except (SafetensorError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    for key, tensor in found.items():
        if tensor.is_floating_point():
            if str(tensor.dtype) != f"torch.{dtype}":
                raise ValueError(f"{key!r} is {tensor.dtype}, not {dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{key!r} has numbers that are not finite")
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """An error as one line: its class and the first line of what it says."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
