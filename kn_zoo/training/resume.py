"""Resuming a run: its folder belongs to one recipe and contains its last training states.

A training state (network, optimizer, schedule, average, random generators, progress) is what a run
resumes from; a checkpoint is the trained network that it ends with. A state is written beside,
synced and renamed, and verified by SHA-256 before it is loaded.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors import SafetensorError

from kn_zoo.checkpoints import files
from kn_zoo.checkpoints.files import sha256
from kn_zoo.training.recipe import Recipe, UserError

PREFIX = "state-"
KEPT = 2  # the newest, and the previous one in case the newest is damaged
SUMS = "SHA256SUMS"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # raised on a full disk, by writer


def prepare_run_dir(folder: Path, recipe: Recipe) -> None:
    """Create a run's folder; raises UserError if it belongs to another recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(asdict(recipe), sort_keys=False)
    path = folder / "recipe.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{folder} contains a run of another recipe: remove it, or choose another --output"
        )
    files.write_text(path, text)


def save_state(accelerator: Accelerator, folder: Path, update: int) -> None:
    """Write the training state to `folder`/state-UPDATE and remove all but the last `KEPT`.

    Raises UserError if it cannot be written; earlier states remain intact.
    """
    temporary = folder / f".{PREFIX}temporary"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_sums(temporary)
            _move_into_place(temporary, folder / f"{PREFIX}{update:09d}")
    except WRITE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"could not write the training state to {folder} ({error}); the previous one is "
            "intact: free disk space and rerun the same command"
        ) from None
    if accelerator.is_main_process:
        for path in list(_newest_first(folder))[KEPT:]:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def restore_state(accelerator: Accelerator, folder: Path, console: Console) -> Path | None:
    """Load the newest undamaged training state; returns its path, or None if there is none."""
    newest: list[str | None] = [None]
    if accelerator.is_main_process:
        for path in _newest_first(folder):
            damaged = _first_damaged_file(path)
            if damaged is None:
                newest = [str(path)]
                break
            console.print(f"{damaged} is damaged: using the previous training state, if any")
    broadcast_object_list(newest)
    if newest[0] is None:
        return None
    accelerator.load_state(newest[0])
    return Path(newest[0])


def _newest_first(folder: Path) -> Iterator[Path]:
    return reversed(sorted(folder.glob(f"{PREFIX}*")))


def _write_sums(folder: Path) -> None:
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _first_damaged_file(folder: Path) -> Path | None:
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


def _move_into_place(temporary: Path, target: Path) -> None:
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)  # a damaged state of the same update
    os.replace(temporary, target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # makes the rename durable
    finally:
        os.close(directory)
