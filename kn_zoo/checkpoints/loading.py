"""Locate the weights of a checkpoint, compare them with the manifest, and pass them to timm.

These places are searched in order: the bundle in the package or the repository, the directory that
``KN_ZOO_WEIGHTS`` names, the Hub's cache, the Hub at the manifest's commit, and for the authors'
checkpoints `kn_zoo.checkpoints.upstream`. A file is loaded only if its SHA-256 matches the
manifest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import PretrainedCfg, resolve_pretrained_cfg
from torch import Tensor

from kn_zoo.checkpoints import files, manifest, upstream
from kn_zoo.checkpoints.files import (
    DIRECTORY,
    CorruptWeights,
    MissingWeights,
    WeightsError,
    first_line,
)
from kn_zoo.checkpoints.manifest import WEIGHTS_FILE, Checkpoint, File

__all__ = ["CorruptWeights", "MissingWeights", "WeightsError", "checked_source", "locate", "read"]

CONFIG, MARKER = "config.json", "kn_zoo_checkpoint"  # the key by which a config.json names its own
ATTEMPTS = 3  # downloads after a network error; the client itself retries and resumes as well
_SOURCES = ("state_dict", "file", "hf_hub_id", "url")  # in the order of timm's preference


def checked_source(
    variant: str,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Return the ``pretrained_cfg_overlay`` that makes timm load verified tensors.

    The arguments are those that timm's ``create_model`` passes to an entry point. A file, URL,
    repository or state dict of the user's own is left as it is.

    Raises:
        WeightsError: the checkpoint cannot be found, or its file does not match the manifest.
    """
    overlay = _prefer_users_source(dict(pretrained_cfg_overlay or {}))
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    checkpoint = identify(cfg, cache_dir)
    if checkpoint is None:
        if not (cfg.has_weights or cfg.state_dict):
            raise MissingWeights(f"There is no checkpoint of {variant}. {_how_to_train(None)}")
        if cfg.file and not Path(cfg.file).exists():
            raise MissingWeights(f"{cfg.file} does not exist. Give the path of a checkpoint.")
        return overlay
    return {**overlay, "state_dict": _load_tensors(checkpoint, cfg, cache_dir), "source": None}


def model_args(
    variant: str,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the arguments that the checkpoint's network was trained with, beyond its defaults.

    The arguments are those of `checked_source`. The result is empty for weights of the user's own.
    """
    overlay = _prefer_users_source(dict(pretrained_cfg_overlay or {}))
    checkpoint = identify(resolve_pretrained_cfg(variant, pretrained_cfg, overlay))
    return dict(checkpoint.model_args) if checkpoint else {}


def identify(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Checkpoint | None:
    """Return the checkpoint that timm would load for a cfg; None for weights of the user's own.

    A bundle is identified by its folder, or by the marker in its ``config.json``. A model that the
    user fine-tuned and saved with timm has neither, although it keeps the tag.
    """
    if cfg.source == "hf-hub":
        return _in_hub_repository(cfg.hf_hub_id, cache_dir)
    if cfg.state_dict:
        return None
    if cfg.file:
        return _in_folder(_bundle_folder(cfg.file))
    if cfg.hf_hub_id:
        return _in_hub_repository(cfg.hf_hub_id, cache_dir)
    checkpoint = manifest.load().get(f"{cfg.architecture}.{cfg.tag}")
    published = checkpoint.upstream.source if checkpoint and checkpoint.upstream else None
    return checkpoint if cfg.url in (None, "", published) else None


def locate(
    checkpoint: Checkpoint,
    filename: str = WEIGHTS_FILE,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
) -> Path:
    """Return the path of a file of a checkpoint's bundle, after downloading it if necessary.

    Args:
        cache_dir: the Hub's cache; ``HF_HOME`` chooses it by default.
        force_download: download the file even if it is in the cache.

    Raises:
        MissingWeights: the file is in none of the places.
        CorruptWeights: the directory that ``KN_ZOO_WEIGHTS`` names has something else there.
    """
    for folder in _local_folders(checkpoint):
        if (folder / filename).is_file():
            return folder / filename
    if directory := files.directory():
        _check_layout(directory, checkpoint, filename)
    if checkpoint.hub and checkpoint.file:
        hub = checkpoint.hub
        return _download(hub.repository, hub.revision, filename, cache_dir, force_download)
    if checkpoint.upstream and filename == WEIGHTS_FILE:
        return upstream.fetch(checkpoint)
    raise MissingWeights(_not_available(checkpoint))


def read(path: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors, in float32, of a weights file whose SHA-256 matches the manifest.

    Raises:
        MissingWeights: the file cannot be read, or its hash is not known.
        CorruptWeights: its hash differs (then it is not parsed), or it is not a safetensors file.
    """
    expected = expected_file(checkpoint, path)
    data = files.checked_bytes(path, expected, checkpoint.name, _replace_hint(path))
    try:
        tensors = files.tensors(data, expected.dtype)
    except ValueError as error:
        raise CorruptWeights(f"{path} is damaged: {error}. {_replace_hint(path)}") from error
    # float16 converts exactly. Otherwise timm would adapt a stem to other channels in float16.
    return {key: x.float() if x.dtype == torch.float16 else x for key, x in tensors.items()}


def expected_file(checkpoint: Checkpoint, path: Path | None = None) -> File:
    """Return the description of the weights file, from the manifest or from this machine's pin.

    Raises:
        MissingWeights: neither has it; the message names the file at ``path``, which was found.
    """
    file = upstream.known_file(checkpoint) if checkpoint.upstream else checkpoint.file
    if file is None and path is not None and checkpoint.upstream:
        raise MissingWeights(
            f"{path} cannot be checked: the SHA-256 of {checkpoint.name} is not in the manifest, "
            f"and {path.parent / upstream.PIN} is missing. {_replace_hint(path)}"
        )
    if file is None:
        raise MissingWeights(_not_available(checkpoint))
    return file


def _local_folders(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield the folders, outside the Hub's cache, that may hold the bundle."""
    if checkpoint.bundle:
        yield checkpoint.folder
    if directory := files.directory():
        yield directory / checkpoint.name


def _check_layout(directory: Path, checkpoint: Checkpoint, filename: str) -> None:
    """Refuse a directory where something else is in the place of a bundle or of its file."""
    folder = directory / checkpoint.name
    if folder.exists() and not folder.is_dir():
        problem = f"{folder} is not a folder"
    elif (folder / filename).exists():
        problem = f"{folder / filename} is not a regular file"
    else:
        return
    raise CorruptWeights(
        f"{problem}, so {DIRECTORY}={directory} does not provide {checkpoint.name}. "
        f"Remove it and run `kn-zoo download {checkpoint.name} {directory}`."
    )


def _load_tensors(
    checkpoint: Checkpoint, cfg: PretrainedCfg, cache_dir: str | Path | None
) -> dict[str, Tensor]:
    """Read the weights; a damaged file in the Hub's cache is downloaded once more."""
    path = _resolve(checkpoint, cfg, cache_dir)
    try:
        return read(path, checkpoint)
    except CorruptWeights:
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
        renewable = path.is_relative_to(cache) and os.access(path.parent, os.W_OK)
        if not renewable or constants.is_offline_mode():
            raise
    path.unlink(missing_ok=True)  # the client would keep this link even to another file
    return read(_resolve(checkpoint, cfg, cache_dir, force_download=True), checkpoint)


def _prefer_users_source(overlay: dict[str, Any]) -> dict[str, Any]:
    """Clear the registered sources that timm would prefer to the one that the user named."""
    named = next((source for source in _SOURCES if overlay.get(source)), None)
    if named is None:
        return overlay
    return {"source": None, **dict.fromkeys(_SOURCES[: _SOURCES.index(named)]), **overlay}


def _in_hub_repository(hub_id: str | None, cache_dir: str | Path | None) -> Checkpoint | None:
    repository, _, revision = (hub_id or "").partition("@")
    for checkpoint in manifest.load().values():
        hub = checkpoint.hub if checkpoint.file else None
        if hub and hub.repository.lower() == repository.lower():
            return checkpoint
    # A copy of a bundle under another name: timm has just fetched its config.json.
    config = try_to_load_from_cache(repository, CONFIG, cache_dir, revision or None)
    return _marked(Path(config)) if isinstance(config, str) else None


def _marked(config: Path) -> Checkpoint | None:
    """Return the checkpoint that a ``config.json`` says it belongs to."""
    try:
        name = files.read_json(config).get(MARKER)
    except (OSError, ValueError):
        return None
    return manifest.load().get(name) if isinstance(name, str) else None


def _bundle_folder(file: str) -> Path | None:
    """Return the folder of the bundle that ``file`` names, or whose weights file it names."""
    path = Path(file)
    if path.is_dir():
        return path
    return path.parent if path.name == WEIGHTS_FILE else None


def _in_folder(folder: Path | None) -> Checkpoint | None:
    if folder is None:
        return None
    checkpoint = manifest.load().get(folder.name)
    if checkpoint and checkpoint.bundle and folder.resolve() == checkpoint.folder:
        return checkpoint
    return _marked(folder / CONFIG)


def _resolve(
    checkpoint: Checkpoint,
    cfg: PretrainedCfg,
    cache_dir: str | Path | None,
    force_download: bool = False,
) -> Path:
    """Return the file that timm would load for a cfg that ``checkpoint`` was identified from."""
    if cfg.source == "hf-hub" and cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        return _download(repository, revision or None, WEIGHTS_FILE, cache_dir, force_download)
    folder = _bundle_folder(cfg.file) if cfg.file else None
    if folder and folder.resolve() != checkpoint.folder:
        return folder / WEIGHTS_FILE
    return locate(checkpoint, cache_dir=cache_dir, force_download=force_download)


def _download(
    repository: str,
    revision: str | None,
    filename: str,
    cache_dir: str | Path | None,
    force_download: bool = False,
) -> Path:
    """Download a file of a Hub repository, with several attempts after network errors."""
    name = f"{filename} of {repository}@{revision or 'main'}"
    options: dict[str, Any] = {"cache_dir": cache_dir, "force_download": force_download}
    for attempt in range(ATTEMPTS):
        try:
            return Path(hf_hub_download(repository, filename, revision=revision, **options))
        except LocalEntryNotFoundError as error:
            raise MissingWeights(
                f"{name} is not in the cache, and {constants.ENDPOINT} cannot be reached or is not "
                f"a Hub ({first_line(error.__cause__ or error)}). Connect to the network once and "
                f"unset HF_HUB_OFFLINE, or run `kn-zoo download` on another machine, copy the "
                f"directory here and set {DIRECTORY} to it."
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise MissingWeights(
                f"{name} does not exist on {constants.ENDPOINT} ({type(error).__name__}). Upgrade "
                "kn_zoo with pip; if the repository is private, log in with `hf auth login`."
            ) from error
        except Exception as error:  # network, proxy, disk: the client's classes differ by version
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status in (401, 403):
                raise MissingWeights(
                    f"{constants.ENDPOINT} does not accept your token for {name} "
                    f"({first_line(error)}). Public checkpoints need none: unset HF_TOKEN and run "
                    "`hf auth logout`, or log in again with `hf auth login`."
                ) from error
            disk = isinstance(error, OSError) and error.errno is not None and status is None
            if disk or attempt == ATTEMPTS - 1:
                raise MissingWeights(
                    f"{name} could not be downloaded from {constants.ENDPOINT} "
                    f"({first_line(error)}). Try again; HF_HOME or cache_dir= chooses another "
                    "directory for the cache."
                ) from error
        time.sleep(2**attempt)
    raise AssertionError  # the last attempt returns or raises


def _replace_hint(path: Path) -> str:
    """Say how to replace a wrong weights file by the right one."""
    bundles = (manifest.PRETRAINED, manifest.REPOSITORY)
    if any(path.resolve().is_relative_to(folder) for folder in bundles):
        return "Reinstall kn_zoo, or restore the file with git."
    directory = files.directory()
    if directory and path.resolve().is_relative_to(directory.resolve()):
        return (
            f"Run `kn-zoo check {directory}`, and `kn-zoo download` to make {DIRECTORY} again, or "
            "unset it."
        )
    return (
        f"Delete {path.resolve()} and download it again, at the manifest's revision; if the "
        f"weights are your own, remove {MARKER} from the {CONFIG} next to them."
    )


def _not_available(checkpoint: Checkpoint) -> str:
    """Say why a checkpoint cannot be loaded, and what to do."""
    name = checkpoint.name
    how_to_train = _how_to_train(f"{checkpoint.recipe} {name}" if checkpoint.recipe else None)
    if checkpoint.bundle and not checkpoint.file:
        return f"{name} has predictions only: its weights are not stored. {how_to_train}"
    if checkpoint.bundle == "repository" and not manifest.REPOSITORY.is_dir():
        return (
            f"{name} is in the repository of kn_zoo, not in the installed package, and it is not "
            "on the Hub yet. Install a clone with `pip install -e .`, use torch.hub.load, or run "
            f"`kn-zoo download {name} DIR` in a clone and set {DIRECTORY}=DIR here."
        )
    if checkpoint.bundle:
        return (
            f"{name} should be in {checkpoint.folder}, where a file is missing. "
            "Reinstall kn_zoo, or restore the folder with git."
        )
    return f"{name} is neither bundled with kn_zoo nor on the Hub. {how_to_train}"


def _how_to_train(recipe: str | None) -> str:
    return f"Train it with `python train_scripts/train.py {recipe or 'RECIPE.yaml'}`."
