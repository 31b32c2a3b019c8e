"""Read files that may be damaged or hostile; replace files and folders atomically.

A weights file is parsed only if its SHA-256 is the expected one; the hashed bytes are parsed, not
read again. The content is validated all the same, so that a file with a forged hash is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

if TYPE_CHECKING:
    from kn_zoo.checkpoints.manifest import File

DIRECTORY = "KN_ZOO_WEIGHTS"  # names a directory that `kn-zoo download` made
MAX_JSON = 1 << 23  # bytes of a JSON document
MAX_TEXT = 10_000  # characters of a string in it
MAX_HEADER = 1 << 20  # bytes of a safetensors header; the largest network here has 40 kB
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class WeightsError(RuntimeError):
    """Weights cannot be loaded; the message names the fix."""


class MissingWeights(WeightsError):
    """No weights file was found, on this machine or on the Hub."""


class CorruptWeights(WeightsError):
    """A weights file exists, but it is not the expected one."""


class WriteError(OSError):
    """A file or folder could not be written; its previous content is unchanged.

    The message names the path and the fix.
    """


def directory() -> Path | None:
    """Return the directory that ``KN_ZOO_WEIGHTS`` names, None if the variable is not set.

    Raises:
        MissingWeights: the variable does not name a directory.
    """
    if not (chosen := os.environ.get(DIRECTORY)):
        return None
    if not (path := Path(chosen).expanduser()).is_dir():
        raise MissingWeights(
            f"{DIRECTORY} is {path}, which is not a directory. Set it to a directory made by "
            "`kn-zoo download`, or unset it."
        )
    return path


def checked_bytes(path: Path, expected: File, name: str, hint: str) -> bytes:
    """Return the bytes of a file after comparing their SHA-256 with the expected one.

    At most ``expected.bytes`` + 1 bytes are kept in memory.

    Raises:
        MissingWeights: the file cannot be read.
        CorruptWeights: its SHA-256 differs.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            data = file.read(expected.bytes + 1)
            digest.update(data)
            size = len(data)
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise MissingWeights(f"Cannot read {path} for {name} ({error.strerror}). {hint}") from error
    if digest.hexdigest() != expected.sha256:
        raise CorruptWeights(
            f"{path} is not {name}: its SHA-256 is {digest.hexdigest()} ({size:,} bytes), expected "
            f"{expected.sha256} ({expected.bytes:,} bytes). {hint}"
        )
    return data


def tensors(data: bytes, dtype: str) -> dict[str, Tensor]:
    """Parse a safetensors file whose floating-point tensors are finite and of type ``dtype``.

    Raises:
        ValueError: the data is anything else.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_HEADER, len(data) - 8):
        raise ValueError(f"not a safetensors file: a header of {size:,} bytes in {len(data):,}")
    parse_json(data[8 : 8 + size])  # the format's own parser takes the last of two equal keys
    try:
        parsed = parse_safetensors(data)
    except (SafetensorError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    for key, tensor in parsed.items():
        if tensor.is_floating_point():
            if str(tensor.dtype) != f"torch.{dtype}":
                raise ValueError(f"{key!r} is {tensor.dtype}, expected {dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{key!r} has non-finite values")
    return parsed


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, see `parse_json`."""
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON + 1))


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys, non-finite numbers or very long strings.

    Raises:
        ValueError: the data is anything else.
    """
    if len(data) > MAX_JSON:
        raise ValueError(f"more than {MAX_JSON:,} bytes of JSON")
    try:
        document = json.loads(data, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate key in a JSON object")
    if any(len(text) > MAX_TEXT for pair in pairs for text in pair if isinstance(text, str)):
        raise ValueError(f"a string has more than {MAX_TEXT:,} characters")
    return dict(pairs)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text, see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file atomically: it holds the old or the new content, never a part of either.

    Args:
        mode: permissions of the new file.

    Raises:
        WriteError: the file cannot be written.
    """
    with _write_errors(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                _write_durably(file, data)
            os.chmod(temporary, mode)  # mkstemp makes files that only their owner can read
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


@contextlib.contextmanager
def replace_folder(folder: Path, contents: Mapping[str, bytes]) -> Iterator[None]:
    """Replace a folder by one that holds ``contents``, in a with statement.

    The body runs after the new folder is in place. If it raises, the old folder is restored.

    Raises:
        WriteError: the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _write_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.")
                )
            )
            new, old = temporary / "new", temporary / "old"
            new.mkdir()
            for name, data in contents.items():
                with (new / name).open("wb") as file:
                    _write_durably(file, data)
            if folder.exists():
                os.replace(folder, old)
        try:
            with _write_errors(folder):
                os.replace(new, folder)
            yield
        except BaseException:
            if not new.exists():
                shutil.rmtree(folder, ignore_errors=True)
            if old.exists():
                os.replace(old, folder)
            raise


def _write_durably(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "Free some space" if error.errno in DISK_FULL else "Check its permissions"
        raise WriteError(
            error.errno,
            f"{path} cannot be written ({reason}); its previous content is unchanged. "
            f"{hint}, or choose another directory.",
        ) from error
