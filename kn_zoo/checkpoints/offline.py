"""A directory of weights for machines without a network, which ``KN_ZOO_WEIGHTS`` serves there.

It holds one bundle a weight, under its name, and ``SHA256SUMS`` as ``sha256sum --check`` reads it.
The sums tell what an accident on the way has changed. Against malice a weights file is compared
with the manifest of the kn_zoo that reads it, as wherever else it lies.
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


def add(chosen: Iterable[Checkpoint], directory: Path) -> None:
    """Put whole bundles into a directory, downloading what is not on this machine.

    Raises:
        WeightsError: a bundle cannot be had, or is not the manifest's.
        OSError: the directory cannot be written.
        ValueError: its SHA256SUMS is damaged, or a link lies where a bundle should.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sums = _read_sums(directory) if (directory / SUMS).exists() else {}
    for weight in chosen:
        folder = directory / weight.name
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link: remove it, or name another directory")
        folder.mkdir(exist_ok=True)
        for name, data in _contents(weight).items():
            manifest.write_bytes(folder / name, data)
            sums[f"{weight.name}/{name}"] = hashlib.sha256(data).hexdigest()
        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
        manifest.write_text(directory / SUMS, "".join(lines))


def _contents(weight: Checkpoint) -> dict[str, bytes]:
    """The files of a weight that belong into a directory, its tensors checked."""
    place = loading.locate(weight)
    loading.read(place, weight)
    if not (weight.bundle or weight.hub):  # imported: there is no more to it than the tensors
        names = [WEIGHTS_FILE] if weight.file else [WEIGHTS_FILE, upstream.PIN]
        return {name: (place.parent / name).read_bytes() for name in names}
    folder = bundle.get(weight).folder
    return {name: (folder / name).read_bytes() for name in bundle.FILES}


def problems(directory: Path) -> list[str]:
    """What is wrong with a directory, a line each.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no proper SHA256SUMS.
    """
    found, sums = [], _read_sums(directory)
    for name, digest in sums.items():
        path = directory / name
        if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
            found.append(f"{name}: missing, or not a plain file")
        elif files.sha256(path) != digest:
            found.append(f"{name}: its SHA-256 is not the one in {SUMS}")
    for name in sorted({name.partition("/")[0] for name in sums}):
        weight = manifest.load().get(name)
        if weight is None:
            found.append(f"{name}: not in the manifest of this kn_zoo: upgrade it")
            continue
        try:
            loading.read(directory / name / WEIGHTS_FILE, weight)
        except loading.WeightsError as error:
            found.append(f"{name}: {error}")
    present = {path.relative_to(directory).as_posix() for path in directory.glob("*/*")}
    return found + [f"{name}: not listed in {SUMS}" for name in sorted(present - sums.keys())]


def _read_sums(directory: Path) -> dict[str, str]:
    """SHA-256 by relative name; a ValueError says which line is no such thing."""
    with (directory / SUMS).open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{directory / SUMS} has more than {MAX_BYTES:,} bytes")
    sums: dict[str, str] = {}
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise ValueError(f"{directory / SUMS}, line {number}: not a sum and a name, or twice")
        sums[match[2]] = match[1]
    return sums
