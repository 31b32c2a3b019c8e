"""Training on a miniature of CamVid: what is learned, resumed, stored and loaded again."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.optim import AdamW

from kn_zoo.checkpoints import manifest
from kn_zoo.checkpoints.label_maps import LabelMaps, Scores, confusion_matrix
from kn_zoo.segmentation import create_segmentation_model, data, load_bundle
from kn_zoo.segmentation.evaluate import compare, segment
from kn_zoo.segmentation.training import (
    RESULT,
    PixelCrossEntropy,
    SegmentationRecipe,
    SegmentationTrainer,
    preprocessing,
    scores,
    train,
)
from kn_zoo.segmentation.transforms import eval_transform
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import UserError, variant_names
from kn_zoo.training.search import run_grid
from kn_zoo.training.trainer import Interrupted, RunConfig
from tests.segmentation import miniatures

RECIPES = Path(__file__).parents[2] / "train_scripts" / "recipes" / "segmentation"
SMALL = dict(widths=[8, 8, 16, 16], channels=16)
RECIPE = SegmentationRecipe(
    name="fcn_knpreactresnet18_slim.miniature",
    model_args=dict(SMALL, dropout="gaussian"),
    dataset="camvid",
    train_split="train",
    eval_split="test",
    progress_split="val",
    preprocessing=dict(
        input_size=[3, 45, 60],
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        interpolation="bilinear",
        crop_pct=1.0,
        crop_mode="center",
    ),
    augmentation=[
        {"RandomScale": {"scale": [0.5, 2.0]}},
        {"RandomCrop": {"size": [32, 32], "pad_if_needed": True}},
        {"RandomHorizontalFlip": {}},
        {"ColorJitter": {"brightness": 0.2}},
    ],
    epochs=3,
    batch_size=2,
    optimizer=dict(opt="adamw", lr=0.003),
    scheduler=dict(sched="poly", decay_rate=0.9, min_lr=0.0),
    licenses=dict(code="MIT", weights="MIT", data="none"),
    class_weights=[1.0] * 10 + [2.0],
    ema_decay=0.9,
    sampled_draws=2,
)
BASELINE = replace(
    RECIPE, name="fcn_preactresnet18_slim.miniature", model_args=dict(SMALL, norm="group"), epochs=1
)


@pytest.fixture
def data_config(tmp_path: Path) -> DataConfig:
    return DataConfig(miniatures.camvid(tmp_path / "data"))


def test_poly_decay_every_update(tmp_path: Path, data_config: DataConfig) -> None:
    """The rate before update i of n is lr (1 - i / n)^0.9."""
    trainer = SegmentationTrainer(replace(BASELINE, epochs=3), tmp_path, data_config, RunConfig())
    rates = []
    for update in range(6):
        trainer.scheduler.step_update(update)
        rates.append(trainer.lr)
    assert rates == pytest.approx([0.003 * (1 - i / 6) ** 0.9 for i in range(6)])


def test_a_run_its_bundle_and_its_verification(tmp_path: Path, data_config: DataConfig) -> None:
    train(RECIPE, Path("miniature.yaml"), tmp_path / "run", data_config, RunConfig())
    home = tmp_path / "run" / "bundle"
    result = json.loads((tmp_path / "run" / RESULT).read_text())
    assert result.keys() == {"expected", "plain", "sampled"} and result["sampled"]["draws"] == 2
    log = (tmp_path / "run" / "train_log.csv").read_text().splitlines()
    assert log[0] == "epoch,loss,miou,pixel_accuracy,class_accuracy,lr" and len(log) == 4

    maps = LabelMaps.read(home / "predictions.npz")
    assert maps.maps.shape == (3, 45, 60)
    assert maps.scores.miou == pytest.approx(result["expected"]["miou"], abs=1e-4)
    model = load_bundle(home)
    assert not model.training and model.pretrained_cfg["label_names"][3] == "road"
    images = data.load("camvid", "test", data_config.data_dir)
    results = segment(model, images, eval_transform(model.pretrained_cfg))
    comparison = compare(results, maps)
    assert comparison.matches and comparison.images == 3
    with torch.no_grad():
        model.head.classifier.bias[0] += 1.0
    assert not compare(segment(model, images, eval_transform(RECIPE.preprocessing)), maps).matches


def test_manifest_checkpoints_load_by_name(
    tmp_path: Path, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "PATH", tmp_path / "weights_manifest.json")
    monkeypatch.setattr(manifest, "PRETRAINED", tmp_path / "pretrained")
    manifest.PATH.write_text('{"namespace": "owner", "checkpoints": []}')
    train(
        BASELINE,
        Path("miniature.yaml"),
        tmp_path / "run",
        data_config,
        RunConfig(),
        in_package=True,
    )
    entry = manifest.find(BASELINE.name)
    scores = entry.reported.statistics["expected"].segmentation
    assert (
        entry.norm == "group"
        and scores is not None
        and scores.iou.keys() <= set(data.CLASSES["camvid"].names)
    )
    model = create_segmentation_model(BASELINE.name, pretrained=True)
    same = load_bundle(entry.folder)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )
    assert model.pretrained_cfg["label_names"] == data.CLASSES["camvid"].names
    other = create_segmentation_model("fcn_preactresnet18_slim", pretrained=True, num_classes=3)
    assert torch.equal(other.head.conv.weight, model.head.conv.weight)
    assert other.head.classifier.out_channels == 3


def weights(trainer: SegmentationTrainer) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in trainer.evaluated.state_dict().values()]


def test_resumed_runs_end_with_the_same_bits(tmp_path: Path, data_config: DataConfig) -> None:
    recipe = replace(RECIPE, epochs=2)
    whole = SegmentationTrainer(recipe, tmp_path / "whole", data_config, RunConfig())
    whole.train()
    with pytest.raises(Interrupted):
        SegmentationTrainer(recipe, tmp_path / "part", data_config, RunConfig(minutes=0)).train()
    resumed = SegmentationTrainer(recipe, tmp_path / "part", data_config, RunConfig())
    resumed.train()
    assert resumed.progress.updates == whole.progress.updates == 4
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    assert [row["loss"] for row in whole.progress.rows] == [
        row["loss"] for row in resumed.progress.rows
    ]


def test_recipes_are_compared_in_a_table(tmp_path: Path, data_config: DataConfig) -> None:
    table = tmp_path / "table.csv"
    train_run = partial(scores, data_config=data_config, run_config=RunConfig())
    run_grid([BASELINE], tmp_path / "runs", [0, 1], table, train_run)
    rows = [line for line in table.read_text().splitlines() if not line.startswith("#")]
    assert rows[0].startswith("recipe,norm,batch_size,lr,epochs,seed,miou") and len(rows) == 3
    assert rows[1].split(",")[1] == "group" and rows[1] != rows[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mixup={"mixup_alpha": 0.2}), "mixup"),
        (dict(on_device=True), "on_device"),
        (dict(class_weights=[1.0]), "11 numbers"),
        (dict(dataset="cifar100"), "camvid, cityscapes"),
        (dict(batch_size=6), "batch_size 6 exceeds"),
        (dict(name="fcn_resnet81.x"), "fcn_resnet18"),
    ],
)
def test_wrong_recipes_are_refused(
    tmp_path: Path, data_config: DataConfig, change: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SegmentationTrainer(replace(RECIPE, **change), tmp_path, data_config, RunConfig())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_complete(path: Path) -> None:
    for name in variant_names(path):
        recipe = SegmentationRecipe.read(path, name)
        model = create_segmentation_model(recipe.architecture, **recipe.model_args)
        assert recipe.norm == model.norm
        assert recipe.preprocessing["input_size"][0] == 3
        assert yaml.safe_load(yaml.safe_dump(asdict(recipe))) == asdict(recipe)
        assert preprocessing(recipe).crop_mode == "center"


@pytest.mark.parametrize("norm", ["kernel", "group"])
def test_overfits_four_images(norm: str) -> None:
    torch.manual_seed(0)
    name = f"fcn_{'kn' if norm == 'kernel' else ''}preactresnet18_slim"
    model = create_segmentation_model(
        name, norm=norm, drop_rate=0.0, widths=(16, 16, 32, 32), channels=32
    )
    pairs = [miniatures.pair(seed, 48, 64) for seed in range(4)]
    images = torch.stack([torch.from_numpy(image) for image, _ in pairs])
    images = images.permute(0, 3, 1, 2).float() / 255
    labels = torch.stack([torch.from_numpy(classes).long() for _, classes in pairs])
    loss_of = PixelCrossEntropy([1.0] * 11, 11)
    optimizer = AdamW(model.parameters(), 0.01)
    for _ in range(60):
        loss_of(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        predicted = model.eval()(images).argmax(dim=1)
    scores = Scores(confusion_matrix(predicted.numpy().astype(np.uint8), labels.numpy(), 11))
    assert scores.pixel_accuracy > 95
