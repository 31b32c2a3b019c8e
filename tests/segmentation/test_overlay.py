"""`kn-zoo segment` writes pictures whose colors are the classes'; bad files get one line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kn_zoo import cli
from kn_zoo.segmentation import create_segmentation_model, data, overlay
from kn_zoo.segmentation.training import train
from kn_zoo.training.data import DataConfig
from kn_zoo.training.trainer import RunConfig
from tests.segmentation import miniatures
from tests.segmentation.test_training import BASELINE

NAMES, PALETTE = data.CLASSES["camvid"].names, data.CLASSES["camvid"].palette


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("run")
    data_config = DataConfig(miniatures.camvid(home / "data"))
    recipe = replace(BASELINE, updates=1)
    train(recipe, Path("miniature.yaml"), home, data_config, RunConfig())
    return home / "bundle"


def segment(*arguments: object) -> int:
    return cli.run(cli.app, ["segment", *map(str, arguments)])


def test_pictures_and_shares(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "street.png"
    Image.fromarray(miniatures.pair(7, 90, 130)[0]).save(photo)
    over, classes = tmp_path / "over.png", tmp_path / "classes.png"
    model = f"local-dir:{bundle}"
    assert segment(photo, "--overlay", over, "--label-map", classes, "--model", model) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(photo)
    percent = [float(line.split()[0]) for line in printed[1:] if line.endswith(NAMES)]
    assert sum(percent) == pytest.approx(100, abs=0.1) and percent == sorted(percent, reverse=True)
    labels = Image.open(classes)
    assert labels.mode == "P" and labels.size == (130, 90)
    ids = np.asarray(labels)
    assert np.array_equal(np.asarray(labels.convert("RGB")), np.array(PALETTE)[ids])
    assert Image.open(over).height > 90
    assert segment(photo, "--overlay", over, "--opacity", 1, "--model", model) == 0
    covered = np.asarray(Image.open(over).convert("RGB"))[:90]  # above the legend
    assert np.array_equal(covered, np.array(PALETTE)[ids])


def test_unusable_images_get_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, photo = tmp_path / "notes.png", tmp_path / "street.png"
    text.write_text("no image")
    Image.fromarray(miniatures.pair(7, 45, 60)[0]).save(photo)
    out = tmp_path / "out"
    assert segment(text, photo, "--overlay", out, "--model", f"local-dir:{bundle}") == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"{text}: not an image that Pillow can read"]
    assert [path.name for path in out.iterdir()] == ["street.png"]


@pytest.mark.parametrize("name", ["classes.jpg", "classes.nosuch"])
def test_a_format_without_palettes_is_refused(
    name: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "street.png"
    Image.fromarray(miniatures.pair(7, 45, 60)[0]).save(photo)
    classes = tmp_path / name
    assert segment(photo, "--label-map", classes, "--model", f"local-dir:{bundle}") == 2
    assert capsys.readouterr().err.endswith(f"{classes} cannot hold a P image: use .png\n")
    assert not classes.exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [("local-dir:nowhere", "train_segmentation.py"), ("fcn_knresnet81", "fcn_knresnet18")],
)
def test_wrong_models_are_refused(
    model: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment("street.png", "--model", model) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, blocked = tmp_path / "street.png", tmp_path / "file"
    Image.fromarray(miniatures.pair(7, 45, 60)[0]).save(photo)
    blocked.write_text("")
    model = f"local-dir:{bundle}"
    assert segment(photo, "--overlay", blocked / "over.png", "--model", model) == 2
    assert capsys.readouterr().err.endswith(f": {blocked}: File exists\n")


def test_legend_has_the_colours_of_the_classes_that_occur() -> None:
    labels = np.full((60, 400), 3, np.uint8)
    labels[:20] = 0
    picture = np.asarray(overlay.overlay(Image.new("RGB", (400, 60)), labels, PALETTE, NAMES))
    legend = {tuple(color) for color in picture[60:].reshape(-1, 3).tolist()}
    assert {PALETTE[3], PALETTE[0]} <= legend and PALETTE[8] not in legend
    assert overlay.shares(labels, NAMES)[0] == ("road", pytest.approx(200 / 3))


def test_label_maps_have_the_images_size() -> None:
    torch.manual_seed(0)
    model = create_segmentation_model("fcn_preactresnet18_slim", widths=(8, 8, 8, 8), channels=8)
    model.pretrained_cfg["input_size"] = (3, 32, 64)
    label_map = overlay.label_map(model.eval(), Image.new("RGB", (200, 50)))
    assert label_map.shape == (50, 200) and label_map.max() < 11
    assert overlay.fitting_size(Image.new("RGB", (200, 50)), 32) == (32, 128)
    assert len(set(overlay.palette(model))) == 11
