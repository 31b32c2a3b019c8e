"""Find a weight's file, check it against the manifest, hand its tensors to timm.

It is looked for in the bundles that travel with the package, in the directory that
``KN_ZOO_WEIGHTS`` names, in the Hub's cache, on the Hub at the manifest's revision, and, if others
published it, where `kn_zoo.checkpoints.upstream` gets it. The bytes whose SHA-256 is compared are the very
bytes that the tensors are made from: a file exchanged between the two cannot slip through.
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

CONFIG, MARKER = "config.json", "kn_zoo_weight"  # a bundle's config.json names its weight
ATTEMPTS = 3  # at a download that the network broke off; the client itself resumes and waits too
_SOURCES = ("state_dict", "file", "hf_hub_id", "url")  # in the order of timm's preference


def checked_source(
    variant: str,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """The overlay with which timm loads what was asked for: checked tensors if the manifest has it.

    The arguments are those that timm's ``create_model`` hands to an entry point. A file, URL,
    repository or state dict of the user's own stays what it is.

    Raises:
        WeightsError: the weight is nowhere to be had, or its file is not the manifest's.
    """
    overlay = _let_users_source_win(dict(pretrained_cfg_overlay or {}))
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    weight = identify(cfg, cache_dir)
    if weight is None:
        if not (cfg.has_weights or cfg.state_dict):
            raise MissingWeights(f"There are no weights for {variant}. {_how_to_train(None)}")
        if cfg.file and not Path(cfg.file).exists():
            raise MissingWeights(f"{cfg.file} does not exist. Give the path of a checkpoint.")
        return overlay
    return {**overlay, "state_dict": _tensors(weight, cfg, cache_dir), "source": None}


def model_args(
    variant: str,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments that the weight's network was trained with where they differ from the defaults.

    The arguments are those of `checked_source`. For what is the user's own there are none.
    """
    overlay = _let_users_source_win(dict(pretrained_cfg_overlay or {}))
    weight = identify(resolve_pretrained_cfg(variant, pretrained_cfg, overlay))
    return dict(weight.model_args) if weight else {}


def identify(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Checkpoint | None:
    """The manifest's weight that timm would load for a cfg; None for what is the user's own.

    A bundle is known by its place, or by the mark in its ``config.json``. A model that the user
    trained further and saved with timm has neither, though it keeps the tag.
    """
    if cfg.source == "hf-hub":
        return _in_repository(cfg.hf_hub_id, cache_dir)
    if cfg.state_dict:
        return None
    if cfg.file:
        return _in_folder(_folder(cfg.file))
    if cfg.hf_hub_id:
        return _in_repository(cfg.hf_hub_id, cache_dir)
    weight = manifest.load().get(f"{cfg.architecture}.{cfg.tag}")
    published = weight.upstream.source if weight and weight.upstream else None
    return weight if cfg.url in (None, "", published) else None


def locate(
    weight: Checkpoint,
    filename: str = WEIGHTS_FILE,
    cache_dir: str | Path | None = None,
    again: bool = False,
) -> Path:
    """A file of a weight's bundle on this machine, after downloading it if it has to be.

    Args:
        cache_dir: the Hub's cache, where ``HF_HOME`` says unless given.
        again: download it even if it is in that cache.

    Raises:
        MissingWeights: it is nowhere to be had.
    """
    for folder in _folders(weight):
        if (folder / filename).is_file():
            return folder / filename
    if weight.hub and weight.file:
        return _download(weight.hub.repository, weight.hub.revision, filename, cache_dir, again)
    if weight.upstream and filename == WEIGHTS_FILE:
        return upstream.fetch(weight)
    raise MissingWeights(_not_available(weight))


def read(path: Path, weight: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a file whose hash is that of the manifest, in float32.

    Raises:
        MissingWeights: the file cannot be read, or nobody knows its hash.
        CorruptWeights: it is another file, or no safetensors file; no tensor was looked at.
    """
    expected = expected_file(weight)
    data = files.checked_bytes(path, expected, weight.name, _replace(path))
    try:
        tensors = files.tensors(data, expected.dtype)
    except ValueError as error:
        raise CorruptWeights(f"{path} is damaged: {error}. {_replace(path)}") from error
    # Every float16 is a float32. timm would otherwise adapt a stem to other channels in float16.
    return {key: x.float() if x.dtype == torch.float16 else x for key, x in tensors.items()}


def expected_file(weight: Checkpoint) -> File:
    """What the file of a weight has to be: as the manifest says, else as this machine has pinned.

    Raises:
        MissingWeights: neither knows.
    """
    file = upstream.known_file(weight) if weight.upstream else weight.file
    if file is None:
        raise MissingWeights(_not_available(weight))
    return file


def _folders(weight: Checkpoint) -> Iterator[Path]:
    """Where a weight's bundle may lie without the Hub's client."""
    if weight.bundle:
        yield weight.folder
    if directory := files.directory():
        yield directory / weight.name


def _tensors(
    weight: Checkpoint, cfg: PretrainedCfg, cache_dir: str | Path | None
) -> dict[str, Tensor]:
    """Read a weight's file; one that came wrong through the network is fetched once more."""
    path = _place(weight, cfg, cache_dir)
    try:
        return read(path, weight)
    except CorruptWeights:
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
        renewable = path.is_relative_to(cache) and os.access(path.parent, os.W_OK)
        if not renewable or constants.is_offline_mode():
            raise
    path.unlink(missing_ok=True)  # the client would keep this link even to another file
    return read(_place(weight, cfg, cache_dir, again=True), weight)


def _let_users_source_win(overlay: dict[str, Any]) -> dict[str, Any]:
    """Clear the registered sources that timm would prefer to the one that the user named."""
    named = next((source for source in _SOURCES if overlay.get(source)), None)
    if named is None:
        return overlay
    return {"source": None, **dict.fromkeys(_SOURCES[: _SOURCES.index(named)]), **overlay}


def _in_repository(hub_id: str | None, cache_dir: str | Path | None) -> Checkpoint | None:
    repository, _, revision = (hub_id or "").partition("@")
    published = [weight for weight in manifest.load().values() if weight.file and weight.hub]
    for weight in published:
        if weight.hub and weight.hub.repository.lower() == repository.lower():
            return weight
    # A copy of a bundle under another name: timm has just fetched its config.json.
    config = try_to_load_from_cache(repository, CONFIG, cache_dir, revision or None)
    return _marked(Path(config)) if isinstance(config, str) else None


def _marked(config: Path) -> Checkpoint | None:
    """The weight that a ``config.json`` says it belongs to."""
    try:
        with config.open("rb") as file:
            name = manifest.parse_json(file.read(manifest.MAX_BYTES + 1)).get(MARKER)
    except (OSError, ValueError):
        return None
    return manifest.load().get(name) if isinstance(name, str) else None


def _folder(file: str) -> Path | None:
    """The bundle's folder that ``file`` is, or is the weights file of."""
    given = Path(file)
    if given.is_dir():
        return given
    return given.parent if given.name == WEIGHTS_FILE else None


def _in_folder(folder: Path | None) -> Checkpoint | None:
    if folder is None:
        return None
    if folder.resolve().parent == manifest.PRETRAINED:
        return manifest.load().get(folder.name)
    return _marked(folder / CONFIG)


def _place(
    weight: Checkpoint, cfg: PretrainedCfg, cache_dir: str | Path | None, again: bool = False
) -> Path:
    """The file that timm would load for a cfg that a manifest weight was identified from."""
    if cfg.source == "hf-hub" and cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        return _download(repository, revision or None, WEIGHTS_FILE, cache_dir, again)
    folder = _folder(cfg.file) if cfg.file else None
    if folder and folder.resolve() != weight.folder:
        return folder / WEIGHTS_FILE
    return locate(weight, cache_dir=cache_dir, again=again)


def _download(
    repository: str,
    revision: str | None,
    filename: str,
    cache_dir: str | Path | None,
    again: bool = False,
) -> Path:
    """A file of a Hub repository; what may be a fault of the network is tried several times."""
    where = f"{filename} of {repository}@{revision or 'main'}"
    options: dict[str, Any] = {"cache_dir": cache_dir, "force_download": again}
    for attempt in range(ATTEMPTS):
        try:
            return Path(hf_hub_download(repository, filename, revision=revision, **options))
        except LocalEntryNotFoundError as error:
            raise MissingWeights(
                f"{where} is not in the cache, and {constants.ENDPOINT} cannot be reached or is "
                f"no Hub ({first_line(error.__cause__ or error)}). Connect to the network once and "
                f"unset HF_HUB_OFFLINE, or let `kn-zoo download` make a directory elsewhere, copy "
                f"it here and name it in {DIRECTORY}."
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise MissingWeights(
                f"{where} does not exist on {constants.ENDPOINT} ({type(error).__name__}). Upgrade "
                "kn_zoo with pip; if the repository is private, log in with `hf auth login`."
            ) from error
        except Exception as error:  # network, proxy, disk: the client's classes differ by version
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status in (401, 403):
                raise MissingWeights(
                    f"{constants.ENDPOINT} does not accept your token for {where} "
                    f"({first_line(error)}). Public weights need none: unset HF_TOKEN and run "
                    "`hf auth logout`, or log in anew with `hf auth login`."
                ) from error
            disk = isinstance(error, OSError) and error.errno is not None and status is None
            if disk or attempt == ATTEMPTS - 1:
                raise MissingWeights(
                    f"{where} could not be downloaded from {constants.ENDPOINT} "
                    f"({first_line(error)}). Try again; HF_HOME or cache_dir= chooses another "
                    "place on disk."
                ) from error
        time.sleep(2**attempt)
    raise AssertionError  # the last attempt returns or raises


def _replace(path: Path) -> str:
    """How to get the right file into the place of a wrong one."""
    if path.resolve().is_relative_to(manifest.PRETRAINED):
        return "Install kn_zoo again, or restore the file with git."
    directory = files.directory()
    if directory and path.resolve().is_relative_to(directory.resolve()):
        return f"Run `kn-zoo verify {directory}`, and make the directory again."
    return (
        f"Delete {path.resolve()} and get it again, at the revision that the manifest names; "
        f"if the weights are your own, take {MARKER} out of the {CONFIG} beside them."
    )


def _not_available(weight: Checkpoint) -> str:
    if weight.file and weight.bundle:
        return (
            f"{weight.name} travels with kn_zoo, but {weight.folder} lacks it. "
            "Install kn_zoo again, or restore the folder with git."
        )
    return (
        f"{weight.name} is not available: it is neither bundled with kn_zoo nor on the Hub. "
        f"{_how_to_train(f'{weight.recipe} {weight.name}' if weight.recipe else None)}"
    )


def _how_to_train(recipe: str | None) -> str:
    return f"Train it with `python train_scripts/train.py {recipe or 'RECIPE.yaml'}`."
