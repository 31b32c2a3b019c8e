"""An imported checkpoint: the sweep finds how its accuracy was published, and can be pinned."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from kn_zoo import cli, data, set_inference_statistics
from kn_zoo.checkpoints import bundle, manifest, predictions, upstream
from kn_zoo.checkpoints.manifest import Accuracy, Checkpoint
from kn_zoo.evaluation import classification, imported
from kn_zoo.evaluation import predict as evaluate
from tests.evaluation.test_verify import results, run
from tests.support.authors import saved_checkpoint as pickled

NAME, SIDE, IMAGES = "knresnet18.upstream_in1k", 96, 12


class Sample:
    """A few pictures of smooth noise; the targets are set by the test."""

    class_names: list[str] = [str(i) for i in range(1000)]  # noqa: RUF012
    transform: Any = None

    def __init__(self) -> None:
        random = np.random.RandomState(0)
        noise = random.randint(0, 256, (IMAGES, 9, 9, 3), np.uint8)
        self.pictures = [Image.fromarray(x).resize((120, 120)) for x in noise]
        self.targets = [0] * IMAGES

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = self.pictures[index]
        return (self.transform(picture) if self.transform else picture), self.targets[index]


def prepared(
    checkpoint: Checkpoint, sample: Sample, inputs: str, statistics: str
) -> torch.nn.Module:
    """A random network that tells the pictures apart under these inputs and statistics."""
    torch.manual_seed(0)
    model: Any = timm.create_model("knresnet18")
    mean, std = imported.INPUTS[inputs]
    steps = replace(checkpoint.preprocessing, mean=mean, std=std)
    model.pretrained_cfg.update(replace(checkpoint, preprocessing=steps).pretrained_cfg())
    set_inference_statistics(model, statistics)
    transform = evaluate.eval_transform(model)
    with torch.inference_mode():
        features = model.eval().forward_head(
            model.forward_features(torch.stack([transform(p) for p in sample.pictures])),
            pre_logits=True,
        )
        fc = model.get_classifier()
        fc.bias.copy_(-fc.weight @ features.mean(0))
    sample.targets = evaluate.predict(model, copy.copy(sample)).indices[:, 0].tolist()
    return model


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest whose checkpoint was measured on a few small pictures."""
    monkeypatch.setenv("KN_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "PATH", tmp_path / "weights_manifest.json")
    shutil.copy(manifest.PACKAGE.parent / "weights_manifest.json", manifest.PATH)
    checkpoint = manifest.find(NAME)
    with torch.device("meta"):
        flops = bundle.flops(timm.create_model("knresnet18"), (3, SIDE, SIDE))
    manifest.write_entry(
        replace(
            checkpoint,
            file=None,
            flops=flops,
            dataset=replace(checkpoint.dataset, images=IMAGES),
            preprocessing=replace(checkpoint.preprocessing, input_size=(3, SIDE, SIDE)),
            reported=replace(checkpoint.reported, statistics={"sampled": Accuracy(100.0, None)}),
        )
    )
    cfg: Any = copy.deepcopy(timm.get_pretrained_cfg(NAME))
    cfg.input_size = (3, SIDE, SIDE)
    for name in (NAME, "knresnet18"):
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, name, cfg)
    return tmp_path


@pytest.mark.filterwarnings("ignore::kn_zoo.checkpoints.upstream.UnpinnedWeights")
def test_the_sweep_finds_what_reproduces_the_published_accuracy(
    zoo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs, statistics, sample = "[0, 1]", "plain", Sample()
    checkpoint = manifest.find(NAME)
    model = prepared(checkpoint, sample, inputs, statistics)
    monkeypatch.setattr(data, "load", lambda *_, **__: copy.copy(sample))
    predict = evaluate.predict  # so few pictures need no processes to decode them
    here = lambda *args, **options: predict(*args, **{**options, "workers": 0})  # noqa: E731
    monkeypatch.setattr(evaluate, "predict", here)
    (zoo / "checkpoint.pth").write_bytes(pickled(model))
    stored = upstream.import_checkpoint(checkpoint, zoo / "checkpoint.pth")

    status = run(NAME, "--json", zoo / "found.json")
    (found,) = json.loads((zoo / "found.json").read_text())["upstream"]
    printed = capsys.readouterr().out
    assert (status, found["status"]) == (0, "match"), printed
    assert len(found["runs"]) == 6 and found["file"]["sha256"] == stored.sha256
    top1 = {(run["inputs"], run["statistics"]): run["top1"] for run in found["runs"]}
    assert top1[inputs, statistics] == 100
    assert found["reproduced"][0]["inputs"] == inputs
    others = {run["inputs"] for run in found["reproduced"]} - {inputs}
    assert not others, "the other inputs give another accuracy"
    assert (
        f"published accuracy is that of {statistics} statistics on inputs with {inputs}" in printed
    )

    # one command pins hash and accuracies
    assert cli.run(cli.app, ["pin", str(zoo / "found.json")]) == 0
    pinned = manifest.find(NAME)
    assert pinned.file == stored and pinned.upstream and pinned.upstream.measured
    assert pinned.upstream.measured[statistics].top1 == 100
    assert (pinned.preprocessing.mean, pinned.preprocessing.std) == imported.INPUTS[inputs]
    assert pinned.reported == checkpoint.reported, "what the authors say stays what they say"

    # an accuracy that no run has
    wrong = np.full((IMAGES, 5), -1, np.int16)
    logits = np.zeros((IMAGES, 5), np.float32)
    nothing = predictions.Predictions(wrong, logits, np.zeros(IMAGES, np.int16))
    monkeypatch.setattr(classification, "predict", lambda *_: [nothing, nothing])
    assert run(NAME, "--json", zoo / "found.json") == 1
    assert "no run has the published accuracy" in capsys.readouterr().out
    before = manifest.PATH.read_bytes()
    assert cli.run(cli.app, ["pin", str(zoo / "found.json")]) == 2
    assert "was not reproduced" in capsys.readouterr().err and manifest.PATH.read_bytes() == before


def test_without_images_or_file_it_is_skipped(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KN_ZOO_DATA", str(zoo / "nothing"))
    assert run(NAME) == 2
    sample = Sample()
    monkeypatch.setattr(data, "load", lambda *_, **__: sample)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _ = results(zoo, NAME)
    (found,) = json.loads((zoo / "results.json").read_text())["upstream"]
    assert status == 2 and "kn-zoo import" in found["reasons"][0]
    manifest.write_entry(replace(manifest.find(NAME), parameters=1))
    assert run(NAME) == 1, "parameters and FLOPs need neither images nor file"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"upstream": [{}]}', '{"upstream": [{"name": 3}]}']
)
def test_what_verify_did_not_write_is_not_pinned(
    zoo: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (zoo / "wrong.json").write_text(text)
    before = manifest.PATH.read_bytes()
    assert cli.run(cli.app, ["pin", str(zoo / "wrong.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and manifest.PATH.read_bytes() == before
