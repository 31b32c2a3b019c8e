"""Publishing: what is pushed loads elsewhere, and the manifest names the commit."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
from huggingface_hub import EvalResult, HfApi, ModelCard

from kn_zoo import cli, data, publish
from kn_zoo.checkpoints import bundle, hub, manifest
from kn_zoo.checkpoints.card import card, usage
from tests.support import loopback, tiny_zoo
from tests.support.loopback import Fault, Hub
from tests.support.tiny_zoo import NAME, Child, Zoo

REPOSITORY = f"owner/{NAME}"


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    return tiny_zoo.make(tmp_path, monkeypatch)


@pytest.fixture
def server() -> Iterator[Hub]:
    server = Hub(token="good")
    yield server
    server.stop()


@pytest.fixture
def api(server: Hub) -> HfApi:
    return HfApi(endpoint=server.endpoint, token="good")


def on_disk(zoo: Zoo) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in zoo.checkpoint.folder.iterdir()}


def test_a_push_is_one_commit_of_the_bundle(zoo: Zoo, server: Hub, api: HfApi) -> None:
    published = hub.publish(zoo.checkpoint, api, tags=["v1"])
    repository = server.repositories[REPOSITORY]
    (_, empty), (oid, files) = repository.commits
    assert files == {**empty, **on_disk(zoo)}, "the card names the repository, here and there"
    assert published == manifest.find(NAME).hub == manifest.Hub(REPOSITORY, oid)
    assert (repository.private, repository.tags) == (False, {"v1": oid})
    assert f"hf-hub:{REPOSITORY}" in files[bundle.CARD].decode()


def test_a_second_push_changes_nothing(zoo: Zoo, server: Hub, api: HfApi) -> None:
    hub.publish(zoo.checkpoint, api)
    before, written = len(server.requests), manifest.PATH.read_bytes()
    hub.publish(manifest.find(NAME), api)
    assert len(server.repositories[REPOSITORY].commits) == 2
    assert manifest.PATH.read_bytes() == written
    sent = {request.split("/")[-2] for request in server.requests[before:] if "POST" in request}
    assert sent == {"paths-info"}


def test_only_what_changed_is_sent(zoo: Zoo, server: Hub, api: HfApi) -> None:
    first = hub.publish(zoo.checkpoint, api)
    manifest.write_entry(tiny_zoo.replace(manifest.find(NAME), seeds=(8, 9)))
    bundle.refresh()
    second = hub.publish(manifest.find(NAME), api)
    assert first != second
    (_, before), (_, after) = server.repositories[REPOSITORY].commits[1:]
    assert {name for name in after if after[name] != before[name]} == {bundle.CARD}
    assert b"8, 9" in after[bundle.CARD]
    assert server.count("PUT", "/large/") == 2, "weights and predictions, once each"


def test_a_tag_is_not_moved(zoo: Zoo, server: Hub, api: HfApi) -> None:
    first = hub.publish(zoo.checkpoint, api, tags=["v1"])
    assert hub.publish(manifest.find(NAME), api, tags=["v1"]) == first
    manifest.write_entry(tiny_zoo.replace(manifest.find(NAME), seeds=(8,)))
    bundle.refresh()
    with pytest.raises(hub.PublishError, match=r"v1 is on commit .* choose another"):
        hub.publish(manifest.find(NAME), api, tags=["v1"])


def test_a_private_repository(zoo: Zoo, server: Hub, api: HfApi) -> None:
    hub.publish(zoo.checkpoint, api, private=True)
    assert server.repositories[REPOSITORY].private


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_by_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": 1}))


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def put_beside(path: Path) -> None:
    path.with_name("pytorch_model.bin").write_bytes(b"")


DAMAGES = [flip, replace_by_pickle, replace_by_link, put_beside, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [manifest.WEIGHTS_FILE, bundle.CONFIG, bundle.CARD])
def test_a_damaged_bundle_is_refused_before_anything_is_sent(
    zoo: Zoo, server: Hub, api: HfApi, name: str, damage: Callable[[Path], None]
) -> None:
    written = manifest.PATH.read_bytes()
    damage(zoo.checkpoint.folder / name)
    with pytest.raises(hub.PublishError) as caught:
        hub.publish(zoo.checkpoint, api)
    assert not server.requests and manifest.PATH.read_bytes() == written
    assert "\n" not in str(caught.value)


def test_predictions_that_are_a_pickle_are_refused(zoo: Zoo, api: HfApi) -> None:
    replace_by_pickle(zoo.checkpoint.folder / bundle.PREDICTIONS)
    with pytest.raises(hub.PublishError):
        hub.publish(zoo.checkpoint, api)


TRY_AGAIN, LOG_IN = "Run the command again", "hf auth login"
PREUPLOAD, BATCH, COMMIT = ("POST", "/preupload/"), ("POST", "/objects/batch"), ("POST", "/commit/")
LARGE, CREATE, INFO = ("PUT", "/large/"), ("POST", "/api/repos/create"), ("GET", "/api/models/")
INVALID = "Invalid credentials in Authorization header"
FAULTS = [
    *((where, loopback.status(code), 1, None) for where in (PREUPLOAD, BATCH, LARGE)
      for code in (429, 500, 503)),
    *((where, loopback.status(code), 99, TRY_AGAIN) for where in (PREUPLOAD, BATCH, LARGE)
      for code in (429, 500)),
    *((where, loopback.status(500), 1, TRY_AGAIN) for where in (CREATE, INFO, COMMIT)),
    *((where, loopback.status(401, X_Error_Message=INVALID), 99, LOG_IN)
      for where in (INFO, CREATE, PREUPLOAD, BATCH, COMMIT)),
    *((where, loopback.status(403), 99, LOG_IN) for where in (CREATE, PREUPLOAD, COMMIT)),
    *((where, loopback.html, 99, TRY_AGAIN) for where in (INFO, CREATE, PREUPLOAD, BATCH, COMMIT)),
    *((where, loopback.cut(0.3), 99, TRY_AGAIN) for where in (INFO, CREATE, PREUPLOAD, COMMIT)),
    (COMMIT, loopback.status(412), 1, TRY_AGAIN),
    (("POST", "validate-yaml"), loopback.status(500), 1, TRY_AGAIN),
]  # fmt: skip


def test_whatever_breaks_the_next_push_ends_as_it_should(
    zoo: Zoo, server: Hub, api: HfApi, tell: Callable[[str], None]
) -> None:
    """The manifest has a commit hash only if the push succeeded."""
    written, checkpoint = manifest.PATH.read_bytes(), manifest.find(NAME)
    card_before, done = (checkpoint.folder / bundle.CARD).read_bytes(), 0
    surprises: list[tuple[Any, ...]] = []
    for number, ((method, path), act, times, text) in enumerate(FAULTS):
        server.repositories.clear()
        server.large.clear()
        server.faults[:] = [Fault(method, path, act, times)]
        try:
            hub.publish(checkpoint, api)
            done += 1
            expected = text is None
        except hub.PublishError as error:
            expected = text is not None and text in str(error) and "\n" not in str(error)
            expected &= manifest.PATH.read_bytes() == written
        happened = server.faults.pop().times < times
        published = hub.publish(manifest.find(NAME), api)
        commit = server.repositories[REPOSITORY].at(published.revision)
        if not (expected and happened and commit and commit[1].items() >= on_disk(zoo).items()):
            surprises.append((number, method, path, text, expected, happened))
        if len(server.repositories[REPOSITORY].commits) != 2:
            surprises.append((number, "commits"))
        manifest.PATH.write_bytes(written)
        manifest._load.cache_clear()
        (checkpoint.folder / bundle.CARD).write_bytes(card_before)
    assert not surprises
    tell(
        f"Hub on loopback: {len(FAULTS)} faults while publishing: {done} overcome, "
        f"{len(FAULTS) - done} refused with a hint, then published whole"
    )


def test_an_expired_token_and_a_dead_server(zoo: Zoo, server: Hub) -> None:
    with pytest.raises(hub.PublishError, match="hf auth login"):
        hub.publish(zoo.checkpoint, HfApi(endpoint=server.endpoint, token="expired"))
    server.stop()
    with pytest.raises(hub.PublishError, match="Run the command again"):
        hub.publish(zoo.checkpoint, HfApi(endpoint=server.endpoint, token="good"))
    assert manifest.find(NAME).hub is None


# Model cards


CARDS = {
    entry.name: entry.folder / bundle.CARD
    for entry in manifest.load().values()
    if entry.bundle and entry.file
}


@pytest.mark.parametrize("name", [*CARDS, NAME])
def test_the_hub_takes_the_card(
    name: str, zoo: Zoo, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validator of huggingface_hub posts it to the Hub, here on the loopback interface."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
    text = card(zoo.checkpoint) if name == NAME else CARDS[name].read_text("utf-8")
    loaded = ModelCard(text)
    loaded.validate()
    assert server.count("POST", "/api/validate-yaml") == 1
    data: Any = loaded.data
    assert (data.license, data.library_name) == ("mit", "timm")
    assert "arxiv:2205.10089" in data.tags
    results = data.eval_results
    assert results and all(isinstance(result, EvalResult) for result in results)
    segments = data.pipeline_tag == "image-segmentation"
    own = ("train_scripts/train_segmentation.py", "kn_zoo.create_segmentation_model")
    script = "train_private.py" if "## Differential privacy" in text else "train.py"
    for part in (
        "Intended use and limitations",
        "seeds",
        *(own if segments else (f"train_scripts/{script}", "import timm, kn_zoo")),
    ):
        assert part in text
    with pytest.raises(ValueError):
        ModelCard(text.replace("license: mit", "license: MIT")).validate()


# The command


@pytest.fixture
def push(api: HfApi, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(publish, "HfApi", lambda: api)
    return lambda *arguments: cli.run(publish.app, arguments)


class FewDigits(data.Digits):
    def __init__(self, train: bool) -> None:
        super().__init__(train)
        self.data, self.targets = self.data[:12], self.targets[:12]


def test_an_unverified_checkpoint_is_published_only_if_waived(
    zoo: Zoo,
    server: Hub,
    push: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The entry names 12 images, and the stored predictions are random."""
    for needed, other, status in (("data", "verify", "skipped"), ("verify", "data", "mismatch")):
        for arguments in ([NAME], [NAME, "--waive", other], ["--all", "--dry-run"]):
            assert push(*arguments) == 2
            message = capsys.readouterr().err.splitlines()[-1]
            assert f"is not verified: {status}" in message and f"--waive {needed}" in message
        assert not server.repositories
        assert push(NAME, "--waive", needed, "--dry-run") == 0
        assert f"{REPOSITORY}, to be created: README.md" in capsys.readouterr().out
        assert not server.repositories
        monkeypatch.setattr(data, "Digits", FewDigits)
    assert push(NAME, "--waive", "verify", "--tag", "v1", "--private") == 0
    assert manifest.find(NAME).hub is not None
    assert push(NAME, "--waive", "verify", "--dry-run") == 0
    assert f"{REPOSITORY}: nothing has changed" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], [NAME, "--all"], ["no.such"], [NAME, "--waive", "all"]])
def test_bad_usage_is_one_line(
    zoo: Zoo, push: Callable[..., int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


# From a checkout to another machine


def environment(server: Hub, home: Path, package: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "good",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.skipif(
    not any(w.dataset.name == "digits" and w.bundle for w in manifest.load().values()),
    reason="the package has no checkpoint on digits",
)
def test_the_journey_of_a_checkpoint(server: Hub, tmp_path: Path) -> None:
    """Verify, push from a checkout, load on another machine, run the code of the card."""
    checkpoint = next(
        w for w in manifest.load().values() if w.dataset.name == "digits" and w.bundle
    )
    checkout = tiny_zoo.copy_package(
        tmp_path / "checkout", [tiny_zoo.replace(checkpoint, hub=None)]
    )
    (checkout / "kn_zoo" / "pretrained").mkdir()
    folder = checkout / "kn_zoo" / "pretrained" / checkpoint.name
    shutil.copytree(checkpoint.folder, folder)
    (folder / bundle.CARD).write_text(card(tiny_zoo.replace(checkpoint, hub=None)), "utf-8")
    repository = f"owner/{checkpoint.name}"
    variables = environment(server, tmp_path / "home", checkout)

    command = [sys.executable, "train_scripts/push_to_hub.py", checkpoint.name, "--tag", "v1"]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done
    (written,) = json.loads((checkout / "weights_manifest.json").read_text())["checkpoints"]
    oid, _ = server.repositories[repository].commits[-1]
    assert written["hub"] == {"repository": repository, "revision": oid}
    assert f"{repository}@{oid}" in done.stdout

    # another machine, with an empty cache
    elsewhere = tiny_zoo.replace(checkpoint, hub=manifest.Hub(repository, oid), bundle=None)
    machine = tiny_zoo.copy_package(tmp_path / "machine", [elsewhere])
    variables = environment(server, tmp_path / "another home", machine)
    with Child(machine, **variables) as child:
        by_name, by_hub = child.load(checkpoint.name), child.load(f"hf-hub:{repository}")
    model = timm.create_model(checkpoint.name, pretrained=True)
    numbers = b"".join(x.numpy().tobytes() for x in model.state_dict().values())
    assert by_name == by_hub == {"sha256": loopback.sha256(numbers)}

    # the code of the card
    published = server.repositories[repository].commits[-1][1][bundle.CARD].decode()
    (snippet,) = re.findall(r"```python\n(import timm, kn_zoo.*?)\n```", published, re.S)
    assert snippet == usage(elsewhere) and "hf-hub:" in snippet
    pasted = f"{snippet}\nassert not model.training and model.num_classes == 10"
    subprocess.run(
        [sys.executable, "-c", pasted], cwd=tmp_path, env={**os.environ, **variables}, check=True
    )
