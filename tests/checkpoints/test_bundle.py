"""Bundles: written atomically, and readable by timm, the Hub and an installed package."""

import errno
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from timm.models._hub import load_model_config_from_path

from kn_zoo import cli
from kn_zoo.checkpoints import bundle, hub, loading, manifest, networks, offline
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.checkpoints.predictions import NEAR_TIE
from tests.support import tiny_zoo
from tests.support.tiny_zoo import NAME, Zoo


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    return tiny_zoo.make(tmp_path, monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_can_be_read(zoo: Zoo) -> None:
    written = bundle.get(manifest.find(NAME))
    assert written.checkpoint == zoo.checkpoint
    assert written.class_names == tiny_zoo.CLASSES
    assert written.near_tie_bound == NEAR_TIE
    assert {path.name for path in written.folder.iterdir()} == set(bundle.FILES)
    assert zoo.checkpoint.bundle == "package" and zoo.checkpoint.sources == ("in the package",)
    predictions = written.predictions()
    assert predictions.indices.dtype == predictions.targets.dtype == np.int16
    assert predictions.logits.dtype == np.float32 and predictions.logits.shape == (12, 5)
    assert (predictions.indices[:, 2] == predictions.targets).all()
    stored = loading.read(zoo.file, zoo.checkpoint)
    assert all(torch.equal(stored[key], x) for key, x in zoo.model.state_dict().items())
    recipe = yaml.safe_load((written.folder / bundle.RECIPE).read_text("utf-8"))
    assert recipe == {"model": tiny_zoo.ARCHITECTURE, "lr": 0.1}
    environment = (written.folder / bundle.ENVIRONMENT).read_text("utf-8")
    assert f"torch {torch.__version__}" in environment


def test_changed_code_is_marked_and_changed_bundles_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "kn_zoo" / "code.py"
    stored = tmp_path / "kn_zoo" / "pretrained" / "name"
    larger = tmp_path / "checkpoints" / "name"
    table = tmp_path / "results" / "table.csv"
    generated = (stored, larger, tmp_path / "weights_manifest.json", table)
    for path in (code, *generated):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(manifest, "PACKAGE", tmp_path / "kn_zoo")
    clean = bundle.environment()
    assert " at commit " in clean
    for path in generated:
        path.write_text("after")
    assert bundle.environment() == clean
    code.write_text("after")
    assert "-dirty" in bundle.environment() and "-dirty" not in clean


def test_the_entry_is_computed_from_the_model(zoo: Zoo) -> None:
    checkpoint = zoo.checkpoint
    assert checkpoint.file is not None
    assert checkpoint.file.bytes == zoo.file.stat().st_size
    assert checkpoint.file.dtype == "float16"
    assert checkpoint.parameters == sum(x.numel() for x in zoo.model.parameters())
    assert checkpoint.flops == 5_065_984  # 16-32-64 channels on 8x8, 4x4 and 2x2 pixels, by hand
    assert zoo.file.stat().st_size < 2.2 * checkpoint.parameters


def test_a_bundle_is_a_timm_folder(zoo: Zoo) -> None:
    cfg, architecture, arguments = load_model_config_from_path(zoo.checkpoint.folder)
    assert architecture == zoo.checkpoint.architecture
    assert arguments == zoo.checkpoint.model_args
    assert tuple(cfg["label_names"]) == tiny_zoo.CLASSES
    ready = timm.models.PretrainedCfg(**cfg)
    assert tuple(ready.input_size) == (1, 8, 8) and ready.tag == "tiny"
    assert ready.classifier == "head.fc" and ready.license == "mit"


def test_the_card_is_a_hub_card(zoo: Zoo) -> None:
    card = ModelCard.load(zoo.checkpoint.folder / bundle.CARD)
    data = card.data
    assert (data.license, data.library_name) == ("mit", "timm")
    assert data.pipeline_tag == "image-classification"
    metrics = {result.metric_name: result.metric_value for result in data.eval_results or []}
    assert metrics == {"Top-1": 25.0, "Top-5": 75.0}
    assert zoo.checkpoint.file is not None
    for text in (
        NAME,
        zoo.checkpoint.file.sha256,
        zoo.checkpoint.licenses.data,
        str(zoo.checkpoint.recipe),
    ):
        assert text in card.text


def test_numbers_that_the_stored_type_lacks_are_refused(tmp_path: Path, zoo: Zoo) -> None:
    before = contents(tmp_path / "pretrained")
    model = tiny_zoo.network(seed=1)
    with pytest.raises(ValueError, match=r"bundle\.round_weights\(model, torch\.float16\)"):
        tiny_zoo.write(model, tiny_zoo.draft(), tmp_path / "log.csv", dtype=torch.float16)
    bundle.round_weights(model, torch.float16)
    tiny_zoo.write(model, tiny_zoo.draft(), tmp_path / "log.csv", dtype=torch.float16)
    assert contents(tmp_path / "pretrained") != before


def test_every_class_needs_a_name(tmp_path: Path, zoo: Zoo) -> None:
    with pytest.raises(ValueError, match="10 class names, not 2"):
        tiny_zoo.write(
            zoo.model, tiny_zoo.draft(), tmp_path / "log.csv", class_names=["one", "two"]
        )


def test_a_new_bundle_replaces_all_of_the_old(tmp_path: Path, zoo: Zoo) -> None:
    model = tiny_zoo.network(seed=1)
    checkpoint = tiny_zoo.write(model, tiny_zoo.draft(seeds=(8,)), tmp_path / "log.csv")
    assert manifest.find(NAME) == checkpoint != zoo.checkpoint
    assert Zoo(checkpoint, model).same(timm.create_model(NAME, pretrained=True))
    assert [path.name for path in (tmp_path / "pretrained").iterdir()] == [NAME]


@pytest.mark.parametrize("nth", range(len(bundle.FILES) + 4))
def test_a_full_disk_leaves_the_old_bundle(
    tmp_path: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """The disk is full at each file, at each renaming of a folder, and at the manifest."""
    calls = itertools.count()

    def fails_once(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments)

        return call

    before = contents(tmp_path / "pretrained"), manifest.PATH.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails_once(os.fsync))
        patch.setattr(os, "replace", fails_once(os.replace))
        with pytest.raises(OSError, match="content is unchanged") as caught:
            tiny_zoo.write(tiny_zoo.network(1), tiny_zoo.draft(), tmp_path / "log.csv")
    assert caught.value.errno == errno.ENOSPC
    assert (contents(tmp_path / "pretrained"), manifest.PATH.read_bytes()) == before
    assert zoo.same(timm.create_model(NAME, pretrained=True))


def test_a_bundle_of_the_users_own_is_not_in_the_manifest(tmp_path: Path, zoo: Zoo) -> None:
    own, folder = tiny_zoo.network(seed=1), tmp_path / "runs" / "own"
    checkpoint = tiny_zoo.write(own, tiny_zoo.draft(), tmp_path / "log.csv", target=folder)
    assert not checkpoint.bundle and manifest.find(NAME) == zoo.checkpoint
    assert Zoo(checkpoint, own).same(timm.create_model(f"local-dir:{folder}", pretrained=True))


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path, zoo: Zoo) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"thesis\.tex: choose a new folder"):
        tiny_zoo.write(zoo.model, tiny_zoo.draft(), tmp_path / "log.csv", target=tmp_path / "home")


# Bundles in the repository


@pytest.fixture
def larger(tmp_path: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    """A checkpoint whose bundle is in the repository, not in the package."""
    model = tiny_zoo.network(seed=1)
    draft = tiny_zoo.draft(f"{tiny_zoo.ARCHITECTURE}.larger")
    checkpoint = tiny_zoo.write(model, draft, tmp_path / "log.csv", target="repository")
    tiny_zoo.register(monkeypatch)
    return Zoo(checkpoint, model)


def test_a_bundle_for_which_the_package_has_no_room_goes_to_the_repository(
    tmp_path: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = tiny_zoo.draft(f"{tiny_zoo.ARCHITECTURE}.grown")
    written = tiny_zoo.write(zoo.model, draft, tmp_path / "log.csv", target="package")
    assert written.bundle == "package"
    size = sum(file.stat().st_size for file in manifest.PRETRAINED.glob("*/*"))
    for limit, place in ((size, "package"), (size - 1, "repository")):
        monkeypatch.setattr(bundle, "PACKAGE_LIMIT", limit)
        written = tiny_zoo.write(zoo.model, draft, tmp_path / "log.csv", target="package")
        assert written.bundle == place
        assert manifest.load()[draft.name] == written
        assert written.file is not None
        assert (written.folder / "model.safetensors").stat().st_size == written.file.bytes
        assert bundle.refresh() == []  # the card says where the file is
        assert len([*tmp_path.rglob(draft.name)]) == 1  # the other one is gone


def test_a_bundle_in_the_repository_loads_from_a_checkout(tmp_path: Path, larger: Zoo) -> None:
    name = larger.checkpoint.name
    assert larger.checkpoint.folder == tmp_path / "checkpoints" / name
    assert larger.checkpoint.bundle == "repository"
    assert larger.checkpoint.sources == ("in the repository",)
    assert manifest.find(name) == larger.checkpoint
    for path in (name, f"local-dir:{larger.checkpoint.folder}"):
        assert larger.same(timm.create_model(path, pretrained=True))
    assert bundle.get(larger.checkpoint).folder == larger.checkpoint.folder
    assert bundle.refresh() == []


def test_a_damaged_bundle_in_the_repository_is_refused(larger: Zoo) -> None:
    larger.file.write_bytes(larger.file.read_bytes()[:-1] + b"!")
    with pytest.raises(loading.CorruptWeights, match="restore the file with git"):
        timm.create_model(larger.checkpoint.name, pretrained=True)


def test_a_bundle_of_the_repository_is_not_in_a_wheel(
    tmp_path: Path, larger: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package names the other places; KN_ZOO_WEIGHTS and the Hub serve it there."""
    name, served = larger.checkpoint.name, tmp_path / "served"
    offline.add([larger.checkpoint], served)
    monkeypatch.setattr(manifest, "REPOSITORY", tmp_path / "site-packages" / "checkpoints")
    tiny_zoo.register(monkeypatch)
    with pytest.raises(loading.MissingWeights) as caught:
        timm.create_model(name, pretrained=True)
    message = str(caught.value)
    for place in ("clone", "torch.hub.load", "Hub", "KN_ZOO_WEIGHTS"):
        assert place in message
    assert "\n" not in message
    monkeypatch.setenv("KN_ZOO_WEIGHTS", str(served))
    assert larger.same(timm.create_model(name, pretrained=True))
    assert bundle.get(manifest.find(name)).folder == served / name


# Bundles without weights


@pytest.fixture
def baseline(tmp_path: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A checkpoint without weights, written in place of one that had them."""
    draft, log = tiny_zoo.draft(f"{tiny_zoo.ARCHITECTURE}.baseline"), tmp_path / "log.csv"
    tiny_zoo.write(zoo.model, draft, log, target="repository")
    written = tiny_zoo.write(zoo.model, draft, log, target="repository", include_weights=False)
    tiny_zoo.register(monkeypatch)
    return written


def test_a_bundle_without_weights_has_everything_else(baseline: Checkpoint) -> None:
    assert baseline.file is None and not baseline.available
    assert baseline.source == "predictions only" and baseline.parameters > 1
    assert manifest.find(baseline.name) == baseline
    stored = bundle.get(baseline)
    assert {path.name for path in stored.folder.iterdir()} == {*bundle.FILES} - {
        manifest.WEIGHTS_FILE
    }
    assert stored.checkpoint == baseline and stored.predictions().logits.shape == (12, 5)
    assert "The weights are not stored" in (stored.folder / bundle.CARD).read_text("utf-8")
    assert bundle.refresh() == []


def test_loading_a_checkpoint_without_weights_says_so(baseline: Checkpoint) -> None:
    assert baseline.name not in timm.list_pretrained()
    with pytest.raises(loading.MissingWeights, match=r"has predictions only.*Train it with .*tiny"):
        timm.create_model(baseline.name, pretrained=True)
    assert manifest.find(tiny_zoo.ARCHITECTURE).name == NAME, "the default is a loadable one"


def test_commands_skip_a_checkpoint_without_weights(
    baseline: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        status = cli.run(cli.app, [str(argument) for argument in arguments])
        return status, "".join(capsys.readouterr())

    status, printed = run("list", "baseline")
    assert status == 0 and "predictions only" in printed
    status, printed = run("info", baseline.name)
    assert status == 0 and "predictions only" in printed and "create_model" not in printed
    status, printed = run("list", "--pretrained")
    assert status == 0 and baseline.name not in printed
    status, printed = run("download", "--all", tmp_path / "all")
    assert status == 0 and not (tmp_path / "all" / baseline.name).exists()
    for arguments in (
        ["download", baseline.name, tmp_path / "one"],
        ["predict", "x.png", "--model", baseline.name],
    ):
        status, printed = run(*arguments)
        assert status == 2 and "has predictions only" in printed
    with pytest.raises(hub.PublishError, match="not stored"):
        hub.contents(baseline)


def test_a_missing_part_of_a_bundle_is_named(zoo: Zoo) -> None:
    (zoo.checkpoint.folder / bundle.PREDICTIONS).unlink()
    with pytest.raises(loading.MissingWeights, match="Reinstall kn_zoo"):
        bundle.get(zoo.checkpoint)


def test_counting_leaves_the_model_as_it_was(zoo: Zoo) -> None:
    zoo.model.train()
    assert bundle.flops(zoo.model, (1, 8, 8)) == zoo.checkpoint.flops
    assert zoo.model.training
    assert not any(module._forward_hooks for module in zoo.model.modules())


def test_generated_files_follow_the_manifest(zoo: Zoo) -> None:
    assert bundle.refresh() == []
    published = manifest.Hub("owner/name", "a" * 40)
    manifest.write_entry(tiny_zoo.replace(zoo.checkpoint, hub=published))
    assert bundle.refresh() == [zoo.checkpoint.folder / bundle.CARD]
    card = (zoo.checkpoint.folder / bundle.CARD).read_text("utf-8")
    assert '"hf-hub:owner/name"' in card


def test_generated_files_of_the_package_are_up_to_date() -> None:
    for checkpoint in manifest.load().values():
        if checkpoint.bundle:
            stored = bundle.Bundle(checkpoint.folder)
            model = networks.create(checkpoint)
            assert (checkpoint.folder / bundle.CARD).read_text("utf-8") == bundle.card(checkpoint)
            assert json.loads((checkpoint.folder / bundle.CONFIG).read_text("utf-8")) == json.loads(
                bundle.config(checkpoint, model, stored.class_names)
            )


@pytest.mark.parametrize(
    "checkpoint",
    [entry for entry in manifest.load().values() if entry.bundle and entry.file],
    ids=lambda entry: entry.name,
)
def test_a_stored_checkpoint_makes_the_network_that_was_trained(checkpoint: Checkpoint) -> None:
    model = networks.create(checkpoint, pretrained=True)
    stored = load_file(checkpoint.folder / manifest.WEIGHTS_FILE)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, stored[key], rtol=0, atol=0, check_dtype=False)
    assert sum(p.numel() for p in model.parameters()) == checkpoint.parameters
    given = networks.create(checkpoint)
    assert list(given.state_dict()) == list(model.state_dict())


def test_a_wheel_has_the_manifest_and_every_bundle(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tiny_zoo.ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        listed = archive.read("kn_zoo/weights_manifest.json")
    assert listed == (tiny_zoo.ROOT / "weights_manifest.json").read_bytes()
    expected = set()
    for checkpoint in manifest.load().values():
        if checkpoint.bundle == "package":
            files = bundle.files_of(checkpoint)
            expected |= {f"kn_zoo/pretrained/{checkpoint.name}/{name}" for name in files}
    bundles = {name for name in names if name.startswith("kn_zoo/pretrained/")}
    assert expected == bundles
    assert {name.partition("/")[0] for name in names} == {
        "kn_zoo",
        wheel.name.rsplit("-", 3)[0] + ".dist-info",
    }
    assert wheel.stat().st_size < 10e6
