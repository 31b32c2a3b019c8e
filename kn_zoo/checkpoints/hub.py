"""Publish bundles on the Hugging Face Hub, and keep in the manifest under which commit."""

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
    """A bundle was not published; the message names the cure."""


def contents(weight: Checkpoint) -> dict[str, bytes]:
    """The files of a weight's bundle as they will lie in its repository.

    Nothing else is ever uploaded, and none of them is a pickle: the tensors are read as safetensors
    after their hash was compared, the predictions as plain arrays.

    Raises:
        PublishError: the bundle is not whole, holds something else, or does not fit the manifest.
    """
    folder = weight.folder
    if not weight.bundle or not folder.is_dir():
        raise PublishError(f"{weight.name} has no bundle at {folder}: train it first")
    strangers = {path.name for path in folder.iterdir()} ^ set(bundle.FILES)
    links = {name for name in bundle.FILES if (folder / name).is_symlink()}
    if odd := sorted(strangers | links):
        raise PublishError(f"{folder}: {', '.join(odd)} missing, a link, or not of a bundle")
    files = {name: (folder / name).read_bytes() for name in bundle.FILES}
    if files[bundle.CARD] != card(weight).encode():
        raise PublishError(f"{weight.name}: {bundle.CARD} is not the manifest's: run `make docs`")
    stored = bundle.Bundle(folder)
    try:
        with torch.device("meta"):
            config = bundle.config(weight, timm.create_model(weight.name), stored.class_names)
        stored.predictions()
        loading.read(folder / manifest.WEIGHTS_FILE, weight)
    except (loading.WeightsError, OSError, ValueError, KeyError, EOFError) as error:
        raise PublishError(f"{weight.name}: {first_line(error)}") from error
    if files[bundle.CONFIG] != config.encode():
        raise PublishError(f"{weight.name}: {bundle.CONFIG} is not the manifest's: run `make docs`")
    repository = f"{manifest.namespace()}/{weight.name}"
    there = replace(weight, hub=Hub(repository, weight.hub.revision if weight.hub else ""))
    return {**files, bundle.CARD: card(there).encode()}  # the card names its repository


def changed(api: HfApi, repository: str, files: Mapping[str, bytes]) -> tuple[str | None, set[str]]:
    """The commit at the head of a repository, None if there is no such, and which files differ."""
    try:
        head = api.repo_info(repository).sha
    except RepositoryNotFoundError:
        return None, set(files)
    there = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.get_paths_info(repository, list(files), revision=head)
        if isinstance(entry, RepoFile)
    }
    # the Hub knows a large file by its SHA-256, any other as git does
    return head, {
        name
        for name, data in files.items()
        if there.get(name)
        not in (
            hashlib.sha256(data).hexdigest(),
            hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        )
    }


def publish(weight: Checkpoint, api: HfApi, private: bool = False, tags: Iterable[str] = ()) -> Hub:
    """Upload what has changed of a bundle as one commit, and write its hash into the manifest.

    Args:
        private: whether a repository that has to be created is.
        tags: names that the commit shall have in the repository.

    Raises:
        PublishError: the bundle or the Hub refuses; the manifest is as it was.
    """
    files = contents(weight)
    repository = f"{manifest.namespace()}/{weight.name}"
    try:
        revision, names = changed(api, repository, files)
        if revision is None:
            api.create_repo(repository, private=private, exist_ok=True)
            revision = api.repo_info(repository).sha
        if names:
            assert weight.file is not None
            revision = api.create_commit(
                repository,
                [CommitOperationAdd(name, files[name]) for name in sorted(names)],
                commit_message=f"{weight.name}, SHA-256 {weight.file.sha256}",
                parent_commit=revision,
            ).oid
        for tag in tags:
            _tag(api, repository, tag, str(revision))
    except Exception as error:  # network, token, rights: the client's classes differ by version
        raise PublishError(f"{weight.name}: {cure(error, repository, api)}") from error
    hub = Hub(repository, str(revision))
    manifest.write_entry(replace(weight, hub=hub))
    bundle.refresh()
    return hub


def _tag(api: HfApi, repository: str, tag: str, revision: str) -> None:
    refs = api.list_repo_refs(repository)
    there = {ref.name: ref.target_commit for ref in refs.tags}
    if there.get(tag, revision) != revision:
        raise PublishError(f"the tag {tag} is on commit {there[tag]} already: choose another")
    if tag not in there:
        api.create_tag(repository, tag=tag, revision=revision)


def cure(error: Exception, repository: str, api: HfApi) -> str:
    """One line on what the Hub, or the way there, refused, and what helps."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, PublishError):
        return str(error)
    if status in (401, 403):
        return (
            f"{api.endpoint} does not let you write {repository} ({first_line(error)}). Log in "
            "with `hf auth login`, with a token that may write there, or set HF_TOKEN to one."
        )
    if status == 412:
        return f"{repository} was changed at the same time. Run the command again."
    return (
        f"{repository} is out of reach on {api.endpoint} ({first_line(error)}). Run the "
        "command again: what has arrived is not sent twice."
    )
