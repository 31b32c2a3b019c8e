"""Directories of checkpoints for machines without a network, which ``KN_ZOO_WEIGHTS`` names there.

A directory contains one bundle per checkpoint, under its name, and ``SHA256SUMS`` as ``sha256sum
--check`` reads it. The sums detect accidental damage. Against manipulation, weights files are
compared with the manifest of the installed kn_zoo.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from kn_zoo.checkpoints import bundle, files, loading, manifest, upstream
from kn_zoo.checkpoints.manifest import WEIGHTS_FILE, Checkpoint

SUMS = "SHA256SUMS"
MAX_BYTES = 1 << 20  # of SHA256SUMS
_LINE = re.compile(r"([0-9a-f]{64})  ([a-z][a-z0-9_]*\.[a-z0-9][a-z0-9_]*/[A-Za-z_]+[.][a-z]+)")


def add(checkpoints: Iterable[Checkpoint], directory: Path) -> None:
    """Put complete bundles into a directory, downloading them if necessary.

    Raises:
        WeightsError: a bundle cannot be found, or does not match the manifest.
        OSError: the directory cannot be written.
        ValueError: its SHA256SUMS is damaged, or a link is in the place of a bundle.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sums = _read_sums(directory) if (directory / SUMS).exists() else {}
    for checkpoint in checkpoints:
        folder = directory / checkpoint.name
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link: remove it, or name another directory")
        folder.mkdir(exist_ok=True)
        for name, data in _contents(checkpoint).items():
            files.write_bytes(folder / name, data)
            sums[f"{checkpoint.name}/{name}"] = hashlib.sha256(data).hexdigest()
        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
        files.write_text(directory / SUMS, "".join(lines))


def _contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files of a checkpoint for a directory, after checking its weights."""
    path = loading.locate(checkpoint)
    loading.read(path, checkpoint)
    if checkpoint.bundle or checkpoint.hub:
        folder, names = bundle.get(checkpoint).folder, bundle.FILES
    else:  # the converted file of the authors' checkpoint, and its hash if only this machine has it
        folder, names = path.parent, (WEIGHTS_FILE, *(() if checkpoint.file else (upstream.PIN,)))
    return {name: (folder / name).read_bytes() for name in names}


def problems(directory: Path) -> list[str]:
    """Check every file of a directory; return one line per problem.

    Raises:
        OSError: the directory cannot be read.
        ValueError: its SHA256SUMS is missing or damaged.
    """
    lines, sums = [], _read_sums(directory)
    for name, digest in sums.items():
        path = directory / name
        if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
            lines.append(f"{name}: missing, or not a regular file")
        elif files.sha256(path) != digest:
            lines.append(f"{name}: its SHA-256 does not match {SUMS}")
    for name in sorted({name.partition("/")[0] for name in sums}):
        checkpoint = manifest.load().get(name)
        if checkpoint is None:
            lines.append(f"{name}: not in the manifest of this kn_zoo. Upgrade kn_zoo.")
            continue
        try:
            loading.read(directory / name / WEIGHTS_FILE, checkpoint)
        except loading.WeightsError as error:
            lines.append(f"{name}: {error}")
    present = {path.relative_to(directory).as_posix() for path in directory.glob("*/*")}
    return lines + [f"{name}: not listed in {SUMS}" for name in sorted(present - sums.keys())]


def _read_sums(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each relative path; a ValueError names an invalid line."""
    path = directory / SUMS
    if not path.exists() and directory.is_dir():
        raise ValueError(
            f"{directory} has no {SUMS}. Name a directory that `kn-zoo download` made."
        )
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes")
    sums: dict[str, str] = {}
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise ValueError(f"{path}, line {number}: not a hash and a path, or a duplicate")
        sums[match[2]] = match[1]
    return sums
