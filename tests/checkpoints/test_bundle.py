"""Bundles: whole or not at all, and the same to timm, to the Hub and to a wheel."""

import errno
import importlib.util
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

from kn_zoo.checkpoints import bundle, loading, manifest
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
    assert written.weight == zoo.weight
    assert written.class_names == tiny_zoo.CLASSES
    assert written.near_tie_bound == NEAR_TIE
    assert {path.name for path in written.folder.iterdir()} == set(bundle.FILES)
    predictions = written.predictions()
    assert predictions.indices.dtype == predictions.targets.dtype == np.int16
    assert predictions.logits.dtype == np.float32 and predictions.logits.shape == (12, 5)
    assert (predictions.indices[:, 2] == predictions.targets).all()
    stored = written.state_dict()
    assert all(torch.equal(stored[key], x) for key, x in zoo.model.state_dict().items())
    recipe = yaml.safe_load((written.folder / bundle.RECIPE).read_text("utf-8"))
    assert recipe == {"model": tiny_zoo.ARCHITECTURE, "lr": 0.1}
    environment = (written.folder / bundle.ENVIRONMENT).read_text("utf-8")
    assert f"torch {torch.__version__}" in environment


def test_changed_code_is_told_and_written_bundles_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, weight = tmp_path / "kn_zoo" / "code.py", tmp_path / "kn_zoo" / "pretrained" / "weight"
    table = tmp_path / "results" / "table.csv"
    weight.parent.mkdir(parents=True)
    table.parent.mkdir()
    written = (weight, tmp_path / "weights_manifest.json", table)
    for path in (code, *written):
        path.write_text("before")
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(manifest, "PACKAGE", tmp_path / "kn_zoo")
    clean = bundle.environment()
    assert " at commit " in clean
    for path in written:
        path.write_text("after")
    assert bundle.environment() == clean
    code.write_text("after")
    assert "-dirty" in bundle.environment() and "-dirty" not in clean


def test_the_entry_is_computed_from_the_model(zoo: Zoo) -> None:
    weight = zoo.weight
    assert weight.file is not None
    assert weight.file.bytes == zoo.file.stat().st_size
    assert weight.file.dtype == "float16"
    assert weight.parameters == sum(x.numel() for x in zoo.model.parameters())
    assert weight.flops == 5_065_984  # 16-32-64 channels on 8x8, 4x4 and 2x2 pixels, by hand
    assert zoo.file.stat().st_size < 2.2 * weight.parameters


def test_a_bundle_is_a_timm_folder(zoo: Zoo) -> None:
    cfg, architecture, arguments = load_model_config_from_path(zoo.weight.folder)
    assert architecture == zoo.weight.architecture
    assert arguments == zoo.weight.model_args
    assert tuple(cfg["label_names"]) == tiny_zoo.CLASSES
    ready = timm.models.PretrainedCfg(**cfg)
    assert tuple(ready.input_size) == (1, 8, 8) and ready.tag == "tiny"
    assert ready.classifier == "head.fc" and ready.license == "mit"


def test_the_card_is_a_hub_card(zoo: Zoo) -> None:
    card = ModelCard.load(zoo.weight.folder / bundle.CARD)
    data = card.data
    assert (data.license, data.library_name) == ("mit", "timm")
    assert data.pipeline_tag == "image-classification"
    found = {result.metric_name: result.metric_value for result in data.eval_results or []}
    assert found == {"Top-1": 25.0, "Top-5": 75.0}
    assert zoo.weight.file is not None
    for said in (NAME, zoo.weight.file.sha256, zoo.weight.licenses.data, str(zoo.weight.recipe)):
        assert said in card.text


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
    weight = tiny_zoo.write(model, tiny_zoo.draft(seeds=(8,)), tmp_path / "log.csv")
    assert manifest.find(NAME) == weight != zoo.weight
    assert Zoo(weight, model).same(timm.create_model(NAME, pretrained=True))
    assert [path.name for path in (tmp_path / "pretrained").iterdir()] == [NAME]


@pytest.mark.parametrize("nth", range(len(bundle.FILES) + 4))
def test_a_full_disk_leaves_the_old_bundle(
    tmp_path: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Full at the first file, at the second, ..., when folders change places, at the manifest."""
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
        with pytest.raises(OSError, match="is untouched") as caught:
            tiny_zoo.write(tiny_zoo.network(1), tiny_zoo.draft(), tmp_path / "log.csv")
    assert caught.value.errno == errno.ENOSPC
    assert (contents(tmp_path / "pretrained"), manifest.PATH.read_bytes()) == before
    assert zoo.same(timm.create_model(NAME, pretrained=True))


def test_a_bundle_of_the_users_own_is_not_in_the_manifest(tmp_path: Path, zoo: Zoo) -> None:
    own, folder = tiny_zoo.network(seed=1), tmp_path / "runs" / "own"
    weight = tiny_zoo.write(own, tiny_zoo.draft(), tmp_path / "log.csv", folder=folder)
    assert not weight.bundle and manifest.find(NAME) == zoo.weight
    assert Zoo(weight, own).same(timm.create_model(f"local-dir:{folder}", pretrained=True))


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path, zoo: Zoo) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"thesis\.tex: choose a new folder"):
        tiny_zoo.write(zoo.model, tiny_zoo.draft(), tmp_path / "log.csv", folder=tmp_path / "home")


def test_a_missing_part_of_a_bundle_is_named(zoo: Zoo) -> None:
    (zoo.weight.folder / bundle.PREDICTIONS).unlink()
    with pytest.raises(loading.MissingWeights, match="Install kn_zoo again"):
        bundle.get(zoo.weight)


def test_counting_leaves_the_model_as_it_was(zoo: Zoo) -> None:
    zoo.model.train()
    assert bundle.flops(zoo.model, (1, 8, 8)) == zoo.weight.flops
    assert zoo.model.training
    assert not any(module._forward_hooks for module in zoo.model.modules())


def test_generated_files_follow_the_manifest(zoo: Zoo) -> None:
    assert bundle.refresh() == []
    hub = manifest.Hub("owner/name", "a" * 40)
    manifest.write_entry(tiny_zoo.replace(zoo.weight, hub=hub))
    assert bundle.refresh() == [zoo.weight.folder / bundle.CARD]
    card = (zoo.weight.folder / bundle.CARD).read_text("utf-8")
    assert '"hf-hub:owner/name"' in card


def test_generated_files_of_the_package_are_up_to_date() -> None:
    for weight in manifest.load().values():
        if weight.bundle:
            stored = bundle.Bundle(weight.folder)
            model = timm.create_model(weight.name)
            assert (weight.folder / bundle.CARD).read_text("utf-8") == bundle.card(weight)
            assert json.loads((weight.folder / bundle.CONFIG).read_text("utf-8")) == json.loads(
                bundle.config(weight, model, stored.class_names)
            )


@pytest.mark.parametrize(
    "weight", [w for w in manifest.load().values() if w.bundle], ids=lambda w: w.name
)
def test_a_weight_of_the_package_makes_the_network_it_was_trained_in(weight: Checkpoint) -> None:
    model = timm.create_model(weight.name, pretrained=True)
    stored = load_file(weight.folder / manifest.WEIGHTS_FILE)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, stored[key], rtol=0, atol=0, check_dtype=False)
    assert sum(p.numel() for p in model.parameters()) == weight.parameters
    given = timm.create_model(weight.architecture, **weight.model_args)
    assert list(given.state_dict()) == list(model.state_dict())


@pytest.mark.skipif(not importlib.util.find_spec("hatchling"), reason="hatchling is not installed")
def test_a_wheel_has_the_manifest_and_every_bundle(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tiny_zoo.ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        listed = archive.read("kn_zoo/weights_manifest.json")
    assert listed == (tiny_zoo.ROOT / "weights_manifest.json").read_bytes()
    wanted = {"kn_zoo/weights_manifest.schema.json"}
    for weight in manifest.load().values():
        if weight.bundle:
            wanted |= {f"kn_zoo/pretrained/{weight.name}/{name}" for name in bundle.FILES}
    assert wanted <= names
