"""Training images by timm's names (folder, tar, WebDataset shards, Hub), and held-out images."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kn_zoo import data
from kn_zoo.checkpoints.bundle import Bundle
from kn_zoo.training import trainer as training
from kn_zoo.training.data import (
    DataConfig,
    Subset,
    class_names,
    load,
    load_training,
    split_off,
    targets_of,
)
from kn_zoo.training.recipe import Recipe, UserError
from tests.training import runs

IMAGES = 160


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files: folder/train/CLASS, all.tar and four shards."""
    root = tmp_path_factory.mktemp("digits")
    images = data.load("digits", "train")
    for shard in range(4):
        with tarfile.open(root / f"digits-{shard}.tar", "w") as tar:
            for number in range(shard, IMAGES, 4):
                image, target = images[number]
                file = root / "folder" / "train" / str(target) / f"{number:04d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
                for name, content in (("png", file.read_bytes()), ("cls", str(target).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    with tarfile.open(root / "all.tar", "w") as tar:
        tar.add(root / "folder" / "train", "digits")
    return root


def sources(root: Path) -> dict[str, tuple[str, str, Path]]:
    return {
        "folder": ("folder", "train", root / "folder"),
        "tar": ("tar", "train", root / "all.tar"),
        "wds": ("wds/digits", f"digits-{{0..3}}.tar|{IMAGES}", root),
        "hfds": (f"hfds/{root / 'folder'}", "train", root / "hub"),
        "hfids": (f"hfids/{root / 'folder'}", "train", root / "hub"),
    }


def write_recipe(path: Path, digits: Path, kind: str, **changes: Any) -> tuple[Path, Path]:
    name, split, root = sources(digits)[kind]
    changes = {"train_dataset": name, "train_split": split, "batch_size": 40} | changes
    return runs.write_recipe(path, epochs=1, sampled_draws=1, **changes), root


@pytest.mark.parametrize("kind", sources(runs.ROOT))
def test_a_run_trains_on_each_source_and_resumes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind in ("wds", "hfds", "hfids"):
        pytest.importorskip("webdataset" if kind == "wds" else "datasets")
    recipe, root = write_recipe(tmp_path / "recipe.yaml", digits, kind)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--data-dir", root, "--download"]
    assert runs.run(recipe, *options, "--output", whole) == 0
    with monkeypatch.context() as patch:
        runs.at_update(patch, 2, runs.interrupt)
        assert runs.run(recipe, *options, "--output", parts) == 130
    assert runs.run(recipe, *options, "--output", parts) == 0
    runs.assert_same_result(whole, parts)
    assert runs.newest(whole) == IMAGES // 40


def test_a_stream_yields_each_image_once_per_epoch_with_any_number_of_workers(
    digits: Path, tmp_path: Path
) -> None:
    pytest.importorskip("webdataset")
    recipe, root = write_recipe(tmp_path / "recipe.yaml", digits, "wds", augmentation=[])
    settings = Recipe(**yaml.safe_load(recipe.read_text()))
    for workers in (0, 2):
        config = training.RunConfig(workers=workers)
        trainer = training.Trainer(settings, tmp_path, DataConfig(root), config)
        seen = [
            np.concatenate([y.numpy() for _, y in trainer.batches.epoch(epoch)]) for epoch in (0, 1)
        ]
        expected = sorted(data.Digits(train=True).targets[:IMAGES])
        assert sorted(seen[0]) == sorted(seen[1]) == expected
        assert seen[0].tolist() != seen[1].tolist()


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (
            "wds",
            {"dataset": "wds/digits", "eval_split": "digits-0.tar|40"},
            "a fixed order of images",
        ),
        ("wds", {"repeated_augmentation": 2}, "streams support neither"),
        ("wds", {"held_out": 0.1}, "held out"),
        (
            "folder",
            {"dataset": "folder", "eval_split": "train", "batch_size": 1000},
            "batch_size 1000 exceeds the 160",
        ),
        ("folder", {"train_dataset": "wds/none", "train_split": "x"}, "no data set 'wds/none'"),
        ("hfds", {"train_dataset": "hfds//none"}, "no data set 'hfds//none'"),
    ],
)
def test_unsupported_sources_are_one_line_and_status_2(
    digits: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    changes: dict[str, Any],
    reason: str,
) -> None:
    recipe, root = write_recipe(tmp_path / "recipe.yaml", digits, kind, **changes)
    run = ["--data-dir", root, "--output", tmp_path / "run"]
    assert runs.run(recipe, *run) == 2
    said = capfd.readouterr().err
    assert reason in said and len(said.strip().splitlines()) == 1


def test_a_folder_can_be_evaluated_and_names_its_classes(digits: Path, tmp_path: Path) -> None:
    changes = {"dataset": "folder", "eval_split": "train"}
    recipe, root = write_recipe(tmp_path / "recipe.yaml", digits, "folder", **changes)
    assert runs.run(recipe, "--data-dir", root, "--output", tmp_path / "run") == 0
    bundle = Bundle(tmp_path / "run" / "bundle")
    assert bundle.class_names == tuple("0123456789")
    assert len(bundle.predictions().targets) == IMAGES


def test_a_slice_of_a_split(tmp_path: Path) -> None:
    path = runs.write_recipe(tmp_path / "recipe.yaml", train_split="train[:100]")
    last = load("digits", "train[1000:]", DataConfig())
    assert targets_of(last) == data.Digits(train=True).targets[1000:]
    assert class_names(last, Recipe.read(path)) == data.Digits(train=True).class_names
    part, whole = load_training(Recipe.read(path), DataConfig()), data.Digits(train=True)
    assert len(part) == 100 and targets_of(part) == whole.targets[:100]
    rest, held = split_off(part, 0.1)
    assert len(rest) + len(held) == 100
    assert rest[0][1] == whole.targets[rest.indices[0]]
    rest.transform = str
    assert held.transform is None
    for split in ("train[:0]", "train[:1202]", "train[1201:]", "train[7:7]"):
        with pytest.raises(UserError, match="has 1201 images"):
            load_training(replace(Recipe.read(path), train_split=split), DataConfig())


def test_held_out_images_are_stratified_and_reproducible() -> None:
    images = data.Digits(train=True)
    rest, held = split_off(images, 0.1)
    assert isinstance(rest, Subset) and sorted([*rest.indices, *held.indices]) == list(range(1201))
    assert split_off(data.load("digits", "train"), 0.1)[1].indices == held.indices
    targets = np.asarray(images.targets)
    for label in range(10):
        share = np.isin(np.flatnonzero(targets == label), held.indices).mean()
        assert share == pytest.approx(0.1, abs=0.005)
    rest.transform = str
    assert held.transform is None and images.transform is None
    with pytest.raises(UserError, match="leaves one side empty"):
        split_off(images, 0.001)


def test_an_unknown_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set 'nonsense', split 'train'"):
        load("nonsense", "train", DataConfig(tmp_path / "nowhere"))
