"""Find a weight's file, check it against the manifest, hand its tensors to timm.

The bytes whose SHA-256 is compared are the very bytes that the tensors are made from: a file that
is exchanged between the two cannot slip through.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from timm.models import PretrainedCfg, resolve_pretrained_cfg
from torch import Tensor

from kn_zoo import manifest
from kn_zoo.manifest import WEIGHTS_FILE, File, Weight

CONFIG, MARKER = "config.json", "kn_zoo_weight"  # a bundle's config.json names its weight
_SOURCES = ("state_dict", "file", "hf_hub_id", "url")  # in the order of timm's preference


class WeightsError(RuntimeError):
    """Weights that were asked for cannot be had; the message names the cure."""


class MissingWeights(WeightsError):
    """There is no file to load, here or on the Hub."""


class CorruptWeights(WeightsError):
    """A file is there, but it is not the one that the manifest describes."""


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
    tensors = read(_place(weight, cfg, cache_dir), weight)
    return {**overlay, "state_dict": tensors, "source": None}


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


def identify(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Weight | None:
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
    return None if cfg.url else manifest.load().get(f"{cfg.architecture}.{cfg.tag}")


def locate(
    weight: Weight, filename: str = WEIGHTS_FILE, cache_dir: str | Path | None = None
) -> Path:
    """A file of a weight's bundle: the one that travels with the package, else the Hub's.

    Raises:
        MissingWeights: it is in neither.
    """
    embedded = weight.folder / filename
    if weight.bundle and embedded.is_file():
        return embedded
    if weight.hub is None or weight.file is None:
        raise MissingWeights(_not_available(weight))
    return _download(weight.hub.repository, weight.hub.revision, filename, cache_dir)


def read(path: Path, weight: Weight) -> dict[str, Tensor]:
    """The tensors of a file whose hash is that of the manifest, in float32.

    Raises:
        MissingWeights: the file cannot be read.
        CorruptWeights: it is another file, or no safetensors file; no tensor was looked at.
    """
    if weight.file is None:
        raise MissingWeights(_not_available(weight))
    data = _checked_bytes(path, weight.file, weight.name)
    try:
        tensors = parse_safetensors(data)
    except SafetensorError as error:
        message = f"{path} is not a safetensors file ({error}). {_replace(path)}"
        raise CorruptWeights(message) from error
    # Every float16 is a float32. timm would otherwise adapt a stem to other channels in float16.
    return {key: x.float() if x.dtype == torch.float16 else x for key, x in tensors.items()}


def _let_users_source_win(overlay: dict[str, Any]) -> dict[str, Any]:
    """Clear the registered sources that timm would prefer to the one that the user named."""
    named = next((source for source in _SOURCES if overlay.get(source)), None)
    if named is None:
        return overlay
    return {"source": None, **dict.fromkeys(_SOURCES[: _SOURCES.index(named)]), **overlay}


def _in_repository(hub_id: str | None, cache_dir: str | Path | None) -> Weight | None:
    repository, _, revision = (hub_id or "").partition("@")
    published = [weight for weight in manifest.load().values() if weight.file and weight.hub]
    for weight in published:
        if weight.hub and weight.hub.repository.lower() == repository.lower():
            return weight
    # A copy of a bundle under another name: timm has just fetched its config.json.
    config = try_to_load_from_cache(repository, CONFIG, cache_dir, revision or None)
    return _marked(Path(config)) if isinstance(config, str) else None


def _marked(config: Path) -> Weight | None:
    """The weight that a ``config.json`` says it belongs to."""
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get(MARKER)
    except (OSError, ValueError, AttributeError):
        return None
    return manifest.load().get(name)


def _folder(file: str) -> Path | None:
    """The bundle's folder that ``file`` is, or is the weights file of."""
    given = Path(file)
    if given.is_dir():
        return given
    return given.parent if given.name == WEIGHTS_FILE else None


def _in_folder(folder: Path | None) -> Weight | None:
    if folder is None:
        return None
    if folder.resolve().parent == manifest.PRETRAINED:
        return manifest.load().get(folder.name)
    return _marked(folder / CONFIG)


def _place(weight: Weight, cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    """The file that timm would load for a cfg that a manifest weight was identified from."""
    if cfg.source == "hf-hub" and cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        return _download(repository, revision or None, WEIGHTS_FILE, cache_dir)
    folder = _folder(cfg.file) if cfg.file else None
    if folder and folder.resolve() != weight.folder:
        return folder / WEIGHTS_FILE
    return locate(weight, cache_dir=cache_dir)


def _checked_bytes(path: Path, expected: File, name: str) -> bytes:
    """All bytes of a file, after comparing their hash; no more are kept than the manifest tells."""
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
        message = f"Cannot read {path} for {name} ({error.strerror}). {_replace(path)}"
        raise MissingWeights(message) from error
    if digest.hexdigest() != expected.sha256:
        raise CorruptWeights(
            f"{path} is not {name}: its SHA-256 is {digest.hexdigest()} ({size:,} bytes), in the "
            f"manifest it is {expected.sha256} ({expected.bytes:,} bytes). {_replace(path)}"
        )
    return data


def _download(
    repository: str, revision: str | None, filename: str, cache_dir: str | Path | None
) -> Path:
    where = f"{filename} of {repository}@{revision or 'main'}"
    try:
        return Path(hf_hub_download(repository, filename, revision=revision, cache_dir=cache_dir))
    except LocalEntryNotFoundError as error:
        raise MissingWeights(
            f"{where} is not in the cache, and {constants.ENDPOINT} cannot be reached "
            f"({_first_line(error.__cause__ or error)}). Connect to the network once and unset "
            "HF_HUB_OFFLINE, or copy the repository into a FOLDER and load 'local-dir:FOLDER'."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise MissingWeights(
            f"{where} does not exist on {constants.ENDPOINT} ({type(error).__name__}). Upgrade "
            "kn_zoo with pip; if the repository is private, log in with `hf auth login`."
        ) from error
    except Exception as error:  # network, proxy, disk: the client's classes differ by version
        raise MissingWeights(
            f"{where} could not be downloaded from {constants.ENDPOINT} ({_first_line(error)}). "
            "Try again; HF_HOME or cache_dir= chooses another place on disk."
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _replace(path: Path) -> str:
    """How to get the right file into the place of a wrong one."""
    if path.resolve().is_relative_to(manifest.PRETRAINED):
        return "Install kn_zoo again, or restore the file with git."
    return (
        f"Delete {path.resolve()} and get it again, at the revision that the manifest names; "
        f"if the weights are your own, take {MARKER} out of the {CONFIG} beside them."
    )


def _not_available(weight: Weight) -> str:
    if weight.file and weight.bundle:
        return (
            f"{weight.name} travels with kn_zoo, but {weight.folder} lacks it. "
            "Install kn_zoo again, or restore the folder with git."
        )
    message = (
        f"{weight.name} is not available: it is neither bundled with kn_zoo nor on the Hub. "
        f"{_how_to_train(weight.recipe)}"
    )
    if weight.upstream is None:
        return message
    return (
        f"{message} Or get {weight.upstream.source} ({weight.upstream.format}) and call "
        f"timm.create_model('{weight.architecture}', pretrained=True, "
        "pretrained_cfg_overlay=dict(file=PATH))."
    )


def _how_to_train(recipe: str | None) -> str:
    return f"Train it with `python train_scripts/train.py {recipe or 'RECIPE.yaml'}`."
