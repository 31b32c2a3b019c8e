"""Training images by timm's names: a folder, a tar, WebDataset shards, the Hub's format."""

import io
import os
import signal
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import yaml

from kn_zoo import data
from kn_zoo.training import trainer as training
from kn_zoo.training.data import Part, Place, load, load_training, split_off, targets_of
from kn_zoo.training.recipe import Recipe, UserError
from tests.training import test_trainer as test_train
from tests.training.test_trainer import fresh_accelerator  # noqa: F401  used by every test here

IMAGES = 160


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Some of the digits as PNG files: folder/train/CLASS, all.tar and four shards."""
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


def sources(root):
    return {
        "folder": ("folder", "train", root / "folder"),
        "tar": ("tar", "train", root / "all.tar"),
        "wds": ("wds/digits", f"digits-{{0..3}}.tar|{IMAGES}", root),
        "hfds": (f"hfds/{root / 'folder'}", "train", root / "hub"),
        "hfids": (f"hfids/{root / 'folder'}", "train", root / "hub"),
    }


def write_recipe(path, digits, kind, **changes):
    name, split, root = sources(digits)[kind]
    changes = {"train_dataset": name, "train_split": split, "batch_size": 40} | changes
    return test_train.write_recipe(path, epochs=1, sampled_draws=1, **changes), root


@pytest.mark.parametrize("kind", sources(test_train.ROOT))
def test_a_run_trains_on_it_and_is_taken_up_in_its_midst(digits, tmp_path, monkeypatch, kind):
    if kind in ("wds", "hfds", "hfids"):
        pytest.importorskip("webdataset" if kind == "wds" else "datasets")
    recipe, root = write_recipe(tmp_path / "recipe.yaml", digits, kind)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--data-dir", root, "--download"]
    assert test_train.run(recipe, *options, "--output", whole) == 0
    with monkeypatch.context() as patch:
        test_train.at_update(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert test_train.run(recipe, *options, "--output", parts) == 130
    assert test_train.run(recipe, *options, "--output", parts) == 0
    test_train.assert_same_end(whole, parts)
    assert test_train.newest(whole) == IMAGES // 40


def test_a_stream_shows_each_image_once_an_epoch_whatever_the_workers(digits, tmp_path):
    pytest.importorskip("webdataset")
    recipe, root = write_recipe(tmp_path / "recipe.yaml", digits, "wds", augmentation=[])
    settings = test_train.Recipe(**yaml.safe_load(recipe.read_text()))
    for workers in (0, 2):
        pace = training.Pace(workers=workers)
        trainer = training.Trainer(settings, tmp_path, Place(root), pace)
        seen = [
            np.concatenate([y.numpy() for _, y in trainer.batches.epoch(epoch)]) for epoch in (0, 1)
        ]
        expected = sorted(data.load("digits", "train").targets[:IMAGES])
        assert sorted(seen[0]) == sorted(seen[1]) == expected
        assert seen[0].tolist() != seen[1].tolist()


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (
            "wds",
            {"dataset": "wds/digits", "eval_split": "digits-0.tar|40"},
            "images in a fixed order",
        ),
        ("wds", {"repeated_augmentation": 2}, "a stream has no"),
        ("wds", {"held_out": 0.1}, "held out"),
        ("folder", {"dataset": "folder", "eval_split": "train", "batch_size": 1000}, "1000 needs"),
        ("folder", {"train_dataset": "wds/none", "train_split": "x"}, "no data set 'wds/none'"),
        ("hfds", {"train_dataset": "hfds//none"}, "no data set 'hfds//none'"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(digits, tmp_path, capfd, kind, changes, reason):
    recipe, root = write_recipe(tmp_path / "recipe.yaml", digits, kind, **changes)
    run = ["--data-dir", root, "--output", tmp_path / "run"]
    assert test_train.run(recipe, *run) == 2
    said = capfd.readouterr().err
    assert reason in said and len(said.strip().splitlines()) == 1


def test_a_folder_is_evaluated_too_and_names_its_classes(digits, tmp_path):
    changes = {"dataset": "folder", "eval_split": "train"}
    recipe, root = write_recipe(tmp_path / "recipe.yaml", digits, "folder", **changes)
    assert test_train.run(recipe, "--data-dir", root, "--output", tmp_path / "run") == 0
    bundle = test_train.bundle.Bundle(tmp_path / "run" / "bundle")
    assert bundle.class_names == tuple("0123456789")
    assert len(bundle.predictions().targets) == IMAGES


def test_the_first_images_of_a_split_can_be_all_that_is_trained_on(tmp_path):
    path = test_train.write_recipe(tmp_path / "recipe.yaml", train_split="train[:100]")
    part, whole = load_training(Recipe.read(path), Place()), data.load("digits", "train")
    assert len(part) == 100 and targets_of(part) == whole.targets[:100]
    rest, held = split_off(part, 0.1)
    assert len(rest) + len(held) == 100
    assert rest[0][1] == whole.targets[rest.indices[0]]
    rest.transform = str
    assert held.transform is None
    for split in ("train[:0]", "train[:1202]"):
        with pytest.raises(UserError, match="has 1201 images"):
            load_training(replace(Recipe.read(path), train_split=split), Place())


def test_held_out_images_are_a_share_of_each_class_and_always_the_same():
    images = data.load("digits", "train")
    rest, held = split_off(images, 0.1)
    assert isinstance(rest, Part) and sorted([*rest.indices, *held.indices]) == list(range(1201))
    assert split_off(data.load("digits", "train"), 0.1)[1].indices.tolist() == held.indices.tolist()
    targets = np.asarray(images.targets)
    for label in range(10):
        share = np.isin(np.flatnonzero(targets == label), held.indices).mean()
        assert share == pytest.approx(0.1, abs=0.005)
    rest.transform = str
    assert held.transform is None and images.transform is None
    with pytest.raises(UserError, match="nothing on one side"):
        split_off(images, 0.001)


def test_an_unknown_data_set_is_named(tmp_path):
    with pytest.raises(UserError, match="no data set 'nonsense', split 'train'"):
        load("nonsense", "train", Place(tmp_path / "nowhere"))
