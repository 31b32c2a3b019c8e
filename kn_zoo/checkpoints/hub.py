"""Publish bundles on the Hugging Face Hub, and record their commits in the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from kn_zoo.checkpoints import bundle, loading, manifest
from kn_zoo.checkpoints.card import card
from kn_zoo.checkpoints.files import first_line
from kn_zoo.checkpoints.manifest import Checkpoint, Hub


class PublishError(RuntimeError):
    """A bundle was not published; the message names the fix."""


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files of a checkpoint's bundle as they are uploaded.

    Nothing else is ever uploaded, and no file is a pickle: the weights are parsed as safetensors
    after their hash was compared, the predictions as plain arrays.

    Raises:
        PublishError: the bundle is incomplete, has other files, or does not match the manifest.
    """
    name, folder = checkpoint.name, checkpoint.folder
    if not checkpoint.file:
        raise PublishError(f"{name}: its weights are not stored. Train it first.")
    if not checkpoint.bundle or not folder.is_dir():
        raise PublishError(f"{name}: {folder} is not a bundle. Train it first.")
    unexpected = {path.name for path in folder.iterdir()} ^ set(bundle.FILES)
    links = {file for file in bundle.FILES if (folder / file).is_symlink()}
    if wrong := sorted(unexpected | links):
        raise PublishError(f"{folder}: missing, unexpected or a link: {', '.join(wrong)}")
    files = {file: (folder / file).read_bytes() for file in bundle.FILES}
    if files[bundle.CARD] != card(checkpoint).encode():
        raise PublishError(f"{name}: {bundle.CARD} does not match the manifest. Run `make docs`.")
    stored = bundle.Bundle(folder)
    try:
        with torch.device("meta"):
            config = bundle.config(checkpoint, timm.create_model(name), stored.class_names)
        stored.predictions()
        loading.read(folder / manifest.WEIGHTS_FILE, checkpoint)
    except (loading.WeightsError, OSError, ValueError, KeyError, EOFError) as error:
        raise PublishError(f"{name}: {first_line(error)}") from error
    if files[bundle.CONFIG] != config.encode():
        raise PublishError(f"{name}: {bundle.CONFIG} does not match the manifest. Run `make docs`.")
    hub = Hub(f"{manifest.namespace()}/{name}", checkpoint.hub.revision if checkpoint.hub else "")
    # The uploaded card names its repository.
    return {**files, bundle.CARD: card(replace(checkpoint, hub=hub)).encode()}


def changed(api: HfApi, repository: str, files: Mapping[str, bytes]) -> tuple[str | None, set[str]]:
    """Compare files with a repository.

    Returns:
        The newest commit of the repository, None if it does not exist, and the names of the files
        that differ.
    """
    try:
        head = api.repo_info(repository).sha
    except RepositoryNotFoundError:
        return None, set(files)
    hashes = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.get_paths_info(repository, list(files), revision=head)
        if isinstance(entry, RepoFile)
    }
    # The Hub identifies a large file by its SHA-256, any other file by git's hash.
    return head, {
        name
        for name, data in files.items()
        if hashes.get(name)
        not in (
            hashlib.sha256(data).hexdigest(),
            hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        )
    }


def publish(
    checkpoint: Checkpoint, api: HfApi, private: bool = False, tags: Iterable[str] = ()
) -> Hub:
    """Upload the changed files of a bundle as one commit, and record it in the manifest.

    Args:
        private: whether a new repository is private.
        tags: names for the commit in the repository.

    Raises:
        PublishError: the bundle is invalid or the Hub refuses it; the manifest is unchanged.
    """
    files = contents(checkpoint)
    repository = f"{manifest.namespace()}/{checkpoint.name}"
    try:
        revision, names = changed(api, repository, files)
        if revision is None:
            api.create_repo(repository, private=private, exist_ok=True)
            revision = api.repo_info(repository).sha
        if names:
            assert checkpoint.file is not None
            revision = api.create_commit(
                repository,
                [CommitOperationAdd(name, files[name]) for name in sorted(names)],
                commit_message=f"{checkpoint.name}, SHA-256 {checkpoint.file.sha256}",
                parent_commit=revision,
            ).oid
        for tag in tags:
            _tag(api, repository, tag, str(revision))
    except Exception as error:  # network, token, rights: the client's classes differ by version
        raise PublishError(f"{checkpoint.name}: {describe(error, repository, api)}") from error
    hub = Hub(repository, str(revision))
    manifest.write_entry(replace(checkpoint, hub=hub))
    bundle.refresh()
    return hub


def _tag(api: HfApi, repository: str, tag: str, revision: str) -> None:
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repository).tags}
    if tags.get(tag, revision) != revision:
        raise PublishError(f"the tag {tag} is on commit {tags[tag]}: choose another tag")
    if tag not in tags:
        api.create_tag(repository, tag=tag, revision=revision)


def describe(error: Exception, repository: str, api: HfApi) -> str:
    """Describe an error of the Hub or the network in one line, with the fix."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, PublishError):
        return str(error)
    if status in (401, 403):
        return (
            f"{api.endpoint} does not let you write {repository} ({first_line(error)}). Log in "
            "with `hf auth login`, with a token that has write access, or set HF_TOKEN to one."
        )
    if status == 412:
        return f"{repository} was changed at the same time. Run the command again."
    return (
        f"{repository} cannot be reached on {api.endpoint} ({first_line(error)}). Run the "
        "command again: uploaded files are not sent twice."
    )
