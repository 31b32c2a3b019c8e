"""Checkpoints that are whole or not there: written beside, checked by hash when they are read."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors import SafetensorError

from kn_zoo.checkpoints.files import sha256
from kn_zoo.training.recipe import UserError

KEPT = 2  # the newest, and the one before in case the newest is damaged
SUMS = "SHA256SUMS"
FAILURES = (OSError, RuntimeError, SafetensorError)  # as a full disk shows, by who was writing


def save(accelerator: Accelerator, folder: Path, update: int) -> None:
    """Write all state as `folder`/checkpoint-UPDATE, and drop all but the last `KEPT`.

    Raises UserError if it cannot be written; those before are then as they were.
    """
    part = folder / ".part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_sums(part)
            put_in_place(part, folder / f"checkpoint-{update:09d}")
    except FAILURES as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(
            f"no checkpoint could be written to {folder} ({error}); the last good one is intact: "
            "make room, and give the same command"
        ) from None
    if accelerator.is_main_process:
        for path in list(newest_first(folder))[KEPT:]:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def restore(accelerator: Accelerator, folder: Path, console: Console) -> Path | None:
    """Load the newest checkpoint that is whole; None if there is none."""
    found: list[str | None] = [None]
    if accelerator.is_main_process:
        for path in newest_first(folder):
            damaged = first_damaged(path)
            if damaged is None:
                found = [str(path)]
                break
            console.print(f"{damaged} is damaged: taking the one before, or starting anew")
    broadcast_object_list(found)
    if found[0] is None:
        return None
    accelerator.load_state(found[0])
    return Path(found[0])


def newest_first(folder: Path) -> Iterator[Path]:
    return reversed(sorted(folder.glob("checkpoint-*")))


def write_sums(folder: Path) -> None:
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def first_damaged(folder: Path) -> Path | None:
    """The first file of a checkpoint that is not what was written."""
    sums = folder / SUMS
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
        digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name, digest in digests.items():
            if sha256(folder / name) != digest:
                return folder / name
    except (OSError, ValueError):
        return sums
    return None if digests.keys() == {p.name for p in folder.iterdir()} - {SUMS} else sums


def put_in_place(part: Path, target: Path) -> None:
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same update
    os.replace(part, target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name itself
    finally:
        os.close(handle)
