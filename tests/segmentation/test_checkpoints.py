"""Segmentation checkpoints are listed, described, verified and refreshed as classifiers are."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from kn_zoo import cli
from kn_zoo.checkpoints import bundle, hub, manifest, networks
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.evaluation import segmentation
from kn_zoo.evaluation.verify_command import app as verify
from kn_zoo.segmentation.training import train
from kn_zoo.training.data import DataConfig
from kn_zoo.training.trainer import RunConfig
from tests.segmentation import miniatures
from tests.segmentation.test_training import RECIPE
from tests.support import tiny_zoo

NAME = RECIPE.name


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained miniature in a manifest of its own."""
    folder = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        tiny_zoo.empty_manifest(folder, patch)
        data_config = DataConfig(miniatures.camvid(folder / "data"))
        run = (Path("camvid.yaml"), folder / "run", data_config, RunConfig())
        train(RECIPE, *run, in_package=True)
    return folder


@pytest.fixture
def checkpoint(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A copy to be damaged."""
    folder = tmp_path / "zoo"
    shutil.copytree(prepared, folder)
    tiny_zoo.empty_manifest(folder, monkeypatch)
    shutil.copy(prepared / "weights_manifest.json", folder)
    monkeypatch.setenv("KN_ZOO_DATA", str(folder / "data"))
    manifest._load.cache_clear()
    return manifest.find(NAME)


def run(*arguments: object) -> int:
    return cli.run(cli.app, [str(argument) for argument in arguments])


def verified(folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    file = folder / "result.json"
    status = cli.run(verify, [*map(str, arguments), NAME, "--json", str(file)])
    (result,) = json.loads(file.read_text())["checkpoints"]
    return status, result


def test_the_entry_describes_the_network(checkpoint: Checkpoint) -> None:
    assert checkpoint.task == "segmentation" and checkpoint.norm == "kernel"
    assert Checkpoint.from_json(checkpoint.to_json()) == checkpoint
    with torch.device("meta"):
        model = networks.create(checkpoint)
    assert checkpoint.parameters == bundle.parameters(model)
    assert checkpoint.flops == bundle.flops(model, checkpoint.preprocessing.input_size)
    loaded = networks.create(checkpoint, pretrained=True)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_scores_of_segmentation_belong_to_segmentation_networks(checkpoint: Checkpoint) -> None:
    reported = {"expected": manifest.Accuracy(50.0, None)}
    without = replace(checkpoint, reported=manifest.Reported("kn_zoo", reported))
    with pytest.raises(ValueError, match="segmentation scores"):
        Checkpoint.from_json(without.to_json())
    classifier = tiny_zoo.draft(reported=checkpoint.reported)
    with pytest.raises(ValueError, match="segmentation scores"):
        Checkpoint.from_json(classifier.to_json())


def test_generated_files_are_refreshed(checkpoint: Checkpoint) -> None:
    assert bundle.refresh() == []
    expected = checkpoint.reported.statistics["expected"]
    changed = replace(expected, top1=12.34)
    reported = {**checkpoint.reported.statistics, "expected": changed}
    manifest.write_entry(replace(checkpoint, reported=manifest.Reported("kn_zoo", reported)))
    assert bundle.refresh() == [checkpoint.folder / bundle.CARD]
    assert "12.34" in (checkpoint.folder / bundle.CARD).read_text("utf-8")


def test_the_card_says_what_the_network_does(checkpoint: Checkpoint) -> None:
    card = ModelCard.load(checkpoint.folder / bundle.CARD)
    assert card.data.pipeline_tag == "image-segmentation"
    scores = checkpoint.reported.statistics["expected"].segmentation
    assert scores is not None
    metrics = {result.metric_name: result for result in card.data.eval_results or []}
    assert metrics["mIoU"].metric_value == scores.miou
    assert metrics["mIoU"].metric_type == "mean_iou"
    for text in (f'kn_zoo.create_segmentation_model("{NAME}"', "train_segmentation.py", "mIoU %"):
        assert text in card.text


def test_the_bundle_can_be_published(checkpoint: Checkpoint) -> None:
    assert set(hub.contents(checkpoint)) == set(bundle.FILES)


def test_list_and_info(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    scores = checkpoint.reported.statistics["expected"].segmentation
    assert scores is not None
    assert run("list", "camvid") == 0
    assert f"{scores.miou:.2f} (mIoU)" in capsys.readouterr().out
    assert run("info", NAME) == 0
    printed = capsys.readouterr().out
    assert f"mIoU {scores.miou:.2f} %" in printed and f"{checkpoint.flops:,}" in printed
    assert f'kn_zoo.create_segmentation_model("{NAME}", pretrained=True)' in printed
    assert run("info", "fcn_knresnet18") == 0
    printed = capsys.readouterr().out
    assert 'kn_zoo.create_segmentation_model("fcn_knresnet18")' in printed


@pytest.mark.parametrize("as_bundle", [False, True])
def test_each_command_names_the_other(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str], as_bundle: bool
) -> None:
    name = f"local-dir:{checkpoint.folder}" if as_bundle else NAME
    assert run("predict", "x.png", "--model", name) == 2
    out, err = capsys.readouterr()
    assert err.endswith(f"{name} segments images: use `kn-zoo segment`\n") and not out
    assert err.count("\n") == 1
    assert run("segment", "x.png", "--model", "knresnet18_cifar") == 2
    out, err = capsys.readouterr()
    assert err.endswith("knresnet18_cifar classifies images: use `kn-zoo predict`\n") and not out
    assert run("predict", "x.png") == 2  # the only checkpoint is no classifier
    assert "name one with --model" in capsys.readouterr().err


def test_segment_takes_the_first_checkpoint(
    checkpoint: Checkpoint, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((prepared / "data" / "camvid" / "test" / "images").iterdir())
    assert run("segment", image) == 0
    printed = capsys.readouterr().out
    assert run("segment", image, "--model", f"local-dir:{checkpoint.folder}") == 0
    assert capsys.readouterr().out == printed


def test_verification(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = verified(tmp_path, "--statistics", "all")
    assert (status, result["status"], result["reasons"]) == (0, "match", [])
    assert result["checked"] == ["parameters", "FLOPs", "SHA-256", "class of each pixel"]
    assert [score["statistics"] for score in result["scores"]] == ["expected", "plain", "sampled"]
    scores = checkpoint.reported.statistics["expected"].segmentation
    assert scores is not None
    assert result["scores"][0]["reported"]["miou"] == scores.miou
    printed = capsys.readouterr().out
    assert "mIoU and pixel accuracy (expected, plain, sampled)" in printed
    assert "pixels (0" in printed


def test_verification_without_images_or_with_fewer(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "zoo" / "data" / "camvid" / "test" / "images"
    next(images.iterdir()).unlink()
    status, result = verified(tmp_path)
    assert (status, result["status"]) == (2, "skipped") and "2 images here" in result["reasons"][0]
    monkeypatch.setenv("KN_ZOO_DATA", str(tmp_path / "nowhere"))
    status, result = verified(tmp_path)
    assert (status, result["status"]) == (2, "skipped") and "camvid" in result["reasons"][0]


def test_a_changed_pixel_is_a_mismatch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint.folder / bundle.PREDICTIONS
    with np.load(path) as arrays:
        content = dict(arrays)
    content["label_maps"][1, 2, 3] = (content["label_maps"][1, 2, 3] + 1) % 11
    np.savez(path, **content)
    status, result = verified(tmp_path)
    assert (status, result["status"], result["mismatches"]) == (1, "mismatch", [1])
    path.write_bytes(b"damaged")
    assert verified(tmp_path)[1]["status"] == "corrupt"


@pytest.mark.parametrize(
    ("statistics", "metric"),
    [
        *itertools.product(["expected"], ["top1", "miou", "class_accuracy", "iou"]),
        *itertools.product(["plain", "sampled"], ["top1", "miou"]),
    ],
)
def test_a_wrong_score_is_a_mismatch(
    checkpoint: Checkpoint, tmp_path: Path, statistics: str, metric: str
) -> None:
    """Class accuracy and IoU of the classes are compared under `expected` only."""
    reported = dict(checkpoint.reported.statistics)
    accuracy = reported[statistics]
    scores = accuracy.segmentation
    assert scores is not None
    if metric == "top1":
        wrong = replace(accuracy, top1=_other(accuracy.top1))
    elif metric == "iou":
        name, value = next(iter(scores.iou.items()))
        iou = {**scores.iou, name: _other(value)}
        wrong = replace(accuracy, segmentation=replace(scores, iou=iou))
    else:
        changes: dict[str, Any] = {metric: _other(getattr(scores, metric))}
        wrong = replace(accuracy, segmentation=replace(scores, **changes))
    reported[statistics] = wrong
    manifest.write_entry(replace(checkpoint, reported=manifest.Reported("kn_zoo", reported)))
    status, result = verified(tmp_path, "--statistics", statistics)
    assert (status, result["status"], len(result["reasons"])) == (1, "mismatch", 1)


def _other(percent: float) -> float:
    return percent + 50 if percent < 50 else percent - 50


def test_chance_is_estimated_from_two_draws() -> None:
    """The contributions of the images add up to the difference, to first order."""
    random = np.random.RandomState(0)
    first = random.randint(100, 200, (50, 4, 4))
    second = first + random.randint(-1, 2, (50, 4, 4))
    second[:, 0, 0] += first.sum((1, 2)) - second.sum((1, 2))  # as many pixels in each image
    for metric in ("miou", "pixel_accuracy"):
        scores = [segmentation.Scores(draw.sum(0)) for draw in (first, second)]
        difference = getattr(scores[0], metric) - getattr(scores[1], metric)
        summed = segmentation.influence(metric, first, second).sum()
        assert summed == pytest.approx(difference, rel=1e-3)
