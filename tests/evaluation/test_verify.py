"""`eval/verify.py` says match only of what matches, names what does not, then goes on."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kn_zoo import cli, data, set_inference_statistics
from kn_zoo.checkpoints import bundle, manifest, predictions
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.checkpoints.predictions import NEAR_TIE
from kn_zoo.evaluation import classification
from kn_zoo.evaluation import predict as evaluate
from kn_zoo.evaluation.verify_command import app
from tests.support import tiny_zoo
from tests.support.tiny_zoo import ARCHITECTURE, NAME

SCRIPT = Path(__file__).parents[2] / "eval" / "verify.py"
OTHER, ELSEWHERE = f"{ARCHITECTURE}.other", f"{ARCHITECTURE}.elsewhere"
IMAGES = 40


class FewDigits(data.Digits):
    def __init__(self, train: bool) -> None:
        super().__init__(train)
        self.data, self.targets = self.data[:IMAGES], self.targets[:IMAGES]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two equal untrained checkpoints with their true accuracies, and one without its images."""
    folder = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        tiny_zoo.empty_manifest(folder, patch)
        patch.setattr(data, "Digits", FewDigits)
        model: Any = tiny_zoo.network()
        with torch.no_grad():
            model.get_classifier().weight.mul_(30)  # logits like those of a trained network
        model.pretrained_cfg.update(tiny_zoo.draft().pretrained_cfg())
        images, predictions = data.load("digits", "test"), {}
        for statistics in ("plain", "sampled", "expected"):
            torch.manual_seed(5)
            set_inference_statistics(model, statistics)
            predictions[statistics] = evaluate.predict(model, images)
        accuracies = {
            k: manifest.Accuracy(p.top1, round(p.top5, 4)) for k, p in predictions.items()
        }
        draft = tiny_zoo.draft(
            reported=manifest.Reported("kn_zoo", accuracies),
            dataset=manifest.Dataset("digits", "test", IMAGES, 10),
        )
        cifar100 = replace(
            draft, name=ELSEWHERE, dataset=manifest.Dataset("cifar100", "test", 7, 10)
        )
        for checkpoint in (draft, replace(draft, name=OTHER), cifar100):
            stored = predictions["expected"]
            tiny_zoo.write(model, checkpoint, folder / "log", predictions=stored)
    return folder


@pytest.fixture
def zoo(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be damaged."""
    folder = tmp_path / "zoo"
    shutil.copytree(prepared, folder)
    monkeypatch.setattr(manifest, "PATH", folder / "weights_manifest.json")
    monkeypatch.setattr(manifest, "PRETRAINED", folder / "pretrained")
    monkeypatch.setattr(data, "Digits", FewDigits)
    monkeypatch.setenv("KN_ZOO_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("KN_ZOO_CACHE", str(tmp_path / "cache"))
    tiny_zoo.register(monkeypatch)
    return folder


def run(*arguments: object) -> int:
    return cli.run(app, [str(argument) for argument in arguments])


def results(folder: Path, *arguments: object) -> tuple[int, dict[str, dict[str, Any]]]:
    status = run(*arguments, "--json", folder / "results.json")
    document = json.loads((folder / "results.json").read_text())
    return status, {result["name"]: result for result in document["checkpoints"]}


def edit(name: str, **changes: np.ndarray) -> None:
    """Change a bundle's predictions."""
    path = manifest.find(name).folder / bundle.PREDICTIONS
    with np.load(path) as arrays:
        content = {**arrays, **changes}
    np.savez(path, **content)


def stored(name: str = NAME) -> predictions.Predictions:
    return bundle.get(manifest.find(name)).predictions()


def test_all_is_well_and_missing_data_is_skipped(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, actual = results(zoo)
    assert status == 0
    assert [result["status"] for result in actual.values()] == ["match", "match", "skipped"]
    assert "cifar100 is not in" in actual[ELSEWHERE]["reasons"][0]
    assert actual[ELSEWHERE]["checked"] == ["parameters", "FLOPs", "SHA-256"]
    accuracy = manifest.find(NAME).reported.statistics["expected"]
    (score,) = actual[NAME]["scores"]
    assert score["recomputed"]["top1"] == pytest.approx(accuracy.top1)
    assert score["reported"] == {"top1": accuracy.top1, "top5": accuracy.top5}
    printed = capsys.readouterr().out
    assert f"{NAME}" in printed and f"{accuracy.top5:.2f}" in printed
    assert f"Skipped {ELSEWHERE}: cifar100 is not in" in printed and "--download" in printed
    assert (
        "Recomputed and compared: parameters, FLOPs, SHA-256, five best classes of each image, "
        "top-1 and top-5 (expected). Not recomputed: top-1 and top-5 (plain, sampled); add "
        "--statistics all." in printed
    )


def test_without_a_network_the_rest_is_verified_and_one_line_says_what_is_not(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One failed attempt to download serves every checkpoint of that data set."""
    twin = replace(manifest.find(ELSEWHERE), name=f"{ARCHITECTURE}.twin")
    shutil.copytree(manifest.find(ELSEWHERE).folder, twin.folder)
    manifest.write_entry(twin)
    attempts = []

    def no_network(*arguments: Any, **options: Any) -> None:
        attempts.append(arguments)
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    status, actual = results(zoo, "--download")
    statuses = ["match", "match", "skipped", "skipped"]
    assert (status, [result["status"] for result in actual.values()]) == (0, statuses)
    assert len(attempts) == 1
    printed = capsys.readouterr().out.splitlines()
    (line,) = [line for line in printed if "could not be downloaded" in line]
    assert line.startswith(f"Skipped {ELSEWHERE}, {twin.name}: ") and "cifar-100" in line


@pytest.mark.parametrize("statistics", ["expected", "all"])
@pytest.mark.parametrize("name", [NAME, ELSEWHERE])
@pytest.mark.parametrize("count", ["parameters", "flops"])
def test_a_wrong_count_is_a_mismatch_with_and_without_images(
    zoo: Path, name: str, count: str, statistics: str
) -> None:
    checkpoint = manifest.find(name)
    right = getattr(checkpoint, count)
    manifest.write_entry(replace(checkpoint, **{count: right + 1}))
    status, actual = results(zoo, name, "--statistics", statistics)
    assert (status, actual[name]["status"]) == (1, "mismatch")
    assert actual[name]["reasons"][0].endswith(
        f": the network has {right:,}, the manifest says {right + 1:,}"
    )


@pytest.mark.parametrize("statistics", ["expected", "plain", "sampled"])
def test_all_statistics_are_checked(zoo: Path, statistics: str) -> None:
    status, actual = results(zoo, NAME, "--statistics", "all")
    assert (status, actual[NAME]["reasons"]) == (0, [])
    names = ["expected", "plain", "sampled"]
    assert sorted(score["statistics"] for score in actual[NAME]["scores"]) == names
    report_more_images(statistics)
    status, actual = results(zoo, NAME, "--statistics", "all")
    assert (status, len(actual[NAME]["reasons"])) == (1, 1)
    assert actual[NAME]["reasons"][0].startswith(f"top-1, {statistics}: ")


def report_more_images(statistics: str) -> None:
    """Let the manifest report more correct images than chance explains.

    One is enough where the evaluation is deterministic.
    """
    checkpoint = manifest.find(NAME)
    accuracies = dict(checkpoint.reported.statistics)
    right = accuracies[statistics]
    images = 25 if statistics == "sampled" else 1
    accuracies[statistics] = replace(right, top1=right.top1 + 100 * images / IMAGES)
    manifest.write_entry(replace(checkpoint, reported=manifest.Reported("kn_zoo", accuracies)))


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize("statistics", ["expected", "plain", "sampled"])
def test_the_result_is_that_of_any_batch_size(zoo: Path, batch_size: int, statistics: str) -> None:
    arguments = (NAME, "--batch-size", batch_size, "--statistics", statistics)
    status, actual = results(zoo, *arguments)
    assert (status, actual[NAME]["status"], actual[NAME]["reasons"]) == (0, "match", [])
    if statistics != "sampled":
        accuracy = manifest.find(NAME).reported.statistics[statistics]
        (score,) = actual[NAME]["scores"]
        assert score["recomputed"]["top1"] == pytest.approx(accuracy.top1)


def test_a_wrong_prediction_is_caught_and_named(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    indices = stored().indices.copy()
    before = int(indices[17, 0])
    indices[17, :2] = indices[17, 1::-1]
    edit(NAME, indices=indices)
    status, actual = results(zoo, NAME, OTHER)
    assert status == 1
    assert actual[NAME]["status"] == "mismatch" and actual[NAME]["mismatches"] == [17]
    assert actual[OTHER]["status"] == "match"
    expected = f"1 of {IMAGES} images differ from predictions.npz: 17 (recomputed {before}, stored "
    assert expected in capsys.readouterr().out


def test_the_last_class_and_a_logit_are_compared_too(zoo: Path) -> None:
    indices, logits = stored().indices.copy(), stored(OTHER).logits.copy()
    indices[3, 4] = next(i for i in range(10) if i not in indices[3])
    logits[5, 4] -= 3 * NEAR_TIE
    edit(NAME, indices=indices)
    edit(OTHER, logits=logits)
    status, actual = results(zoo, NAME, OTHER)
    assert status == 1
    assert (actual[NAME]["mismatches"], actual[OTHER]["mismatches"]) == ([3], [5])
    assert "3 (other classes after the first)" in actual[NAME]["reasons"][0]
    assert "5 (logits differ by 0.03)" in actual[OTHER]["reasons"][0]


def test_a_near_tie_is_listed_and_no_mismatch(
    zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hardware that made the predictions found two classes in another order."""
    truth = stored()
    image = int(np.argmin(truth.logits[:, 0] - truth.logits[:, 1]))
    logits, indices = truth.logits.copy(), truth.indices.copy()
    middle = logits[image, :2].mean()
    logits[image, :2] = middle + NEAR_TIE / 8, middle - NEAR_TIE / 8
    indices[image, :2] = indices[image, 1::-1]
    targets = truth.targets.copy()
    targets[image] = truth.indices[image, 0]  # right here, wrong there
    edit(NAME, logits=logits, indices=indices, targets=targets)

    def close(model: Any, *arguments: Any, **options: Any) -> predictions.Predictions:
        """The two are as close here, the other way round."""
        recomputed = predict(model, *arguments, **options)
        return replace(recomputed, logits=logits, indices=truth.indices, targets=targets)

    predict = evaluate.predict
    monkeypatch.setattr(evaluate, "predict", close)
    # The reported accuracy is that of the other order.
    checkpoint = manifest.find(NAME)
    edited = replace(truth, indices=indices, targets=targets)
    accuracy = manifest.Accuracy(edited.top1, edited.top5)
    manifest.write_entry(
        replace(checkpoint, reported=manifest.Reported("kn_zoo", {"expected": accuracy}))
    )
    status, actual = results(zoo, NAME)
    assert status == 0, actual
    assert actual[NAME]["near_ties"] == actual[NAME]["reordered"] == [image]
    note = f"images {image} have logits closer than {NEAR_TIE:g} in another order (float rounding)"
    assert note in capsys.readouterr().out


def test_a_bundle_cannot_widen_the_bound(zoo: Path) -> None:
    logits = stored().logits.copy()
    logits[9] += 1
    edit(NAME, logits=logits, near_tie_bound=np.asarray(1e9))
    status, actual = results(zoo, NAME)
    assert (status, actual[NAME]["mismatches"]) == (1, [9])


@pytest.mark.parametrize("statistics", ["expected", "plain", "sampled"])
def test_a_wrong_reported_accuracy_is_caught(zoo: Path, statistics: str) -> None:
    report_more_images(statistics)
    status, actual = results(zoo, NAME, "--statistics", statistics)
    assert status == 1
    assert len(actual[NAME]["reasons"]) == 1
    assert actual[NAME]["reasons"][0].startswith(f"top-1, {statistics}: ")


def test_a_flipped_bit_is_refused_and_the_others_go_on(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = manifest.find(NAME).folder / manifest.WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    status, actual = results(zoo, "--embedded")
    assert status == 1
    assert actual[NAME]["status"] == "corrupt" and actual[NAME]["scores"] == []
    assert actual[OTHER]["status"] == "match"
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "corrupt: " in x]
    assert "SHA-256" in line and "Reinstall kn_zoo" in line


def test_a_flipped_bit_is_seen_without_images(zoo: Path) -> None:
    file = manifest.find(ELSEWHERE).folder / manifest.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1])
    status, actual = results(zoo, ELSEWHERE)
    assert (status, actual[ELSEWHERE]["status"]) == (1, "corrupt")


@pytest.mark.parametrize("damage", ["garbage", "truncated", "missing array", "missing", "shorter"])
def test_broken_predictions_are_told(zoo: Path, damage: str) -> None:
    path = manifest.find(NAME).folder / bundle.PREDICTIONS
    if damage == "garbage":
        path.write_bytes(b"PK not a zip file")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "missing array":
        np.savez(path, logits=stored().logits)
    elif damage == "missing":
        path.unlink()
    else:
        whole = stored()
        edit(NAME, indices=whole.indices[1:], logits=whole.logits[1:], targets=whole.targets[1:])
    status, actual = results(zoo, NAME, OTHER)
    assert status == 1
    assert actual[NAME]["status"] == ("mismatch" if damage == "shorter" else "corrupt")
    assert "predictions.npz" in actual[NAME]["reasons"][0] or damage == "missing"
    assert actual[OTHER]["status"] == "match"


def test_fewer_images_than_reported_are_no_verdict(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "IMAGES", 30)
    status, actual = results(zoo, NAME)
    assert (status, actual[NAME]["status"]) == (2, "skipped")
    assert "has 30 images here, the accuracy was measured on 40" in actual[NAME]["reasons"][0]


def test_an_unavailable_checkpoint_is_skipped_with_a_hint(zoo: Path) -> None:
    checkpoint = replace(manifest.find(NAME), name=f"{ARCHITECTURE}.future", file=None, bundle=None)
    manifest.write_entry(checkpoint)
    status, actual = results(zoo, "--all")
    assert status == 0
    future = actual[checkpoint.name]
    assert future["status"] == "skipped" and "Train it with" in future["reasons"][0]
    assert [result["status"] for result in actual.values()] == [
        "match",
        "match",
        "skipped",
        "skipped",
    ]


@pytest.mark.parametrize("damage", [None, "classes", "targets"])
def test_without_weights_the_stored_predictions_are_checked(zoo: Path, damage: str | None) -> None:
    checkpoint, predicted = manifest.find(NAME), stored()
    tiny_zoo.write(
        tiny_zoo.network(), checkpoint, zoo / "log", predictions=predicted, include_weights=False
    )
    if damage == "classes":
        edit(NAME, indices=(predicted.indices + 1) % 10)
    elif damage == "targets":
        edit(NAME, targets=(predicted.targets + 1) % 10)
    _, actual = results(zoo, NAME, OTHER)
    result = actual[NAME]
    assert "accuracy of the stored predictions" in result["checked"]
    assert result["status"] == ("mismatch" if damage else "skipped")
    assert "has predictions only" in result["reasons"][-1]
    reasons = {None: "has predictions only", "classes": "top-1 is", "targets": "the targets"}
    assert reasons[damage] in result["reasons"][0]


def test_statistics_that_nobody_reported_are_skipped(zoo: Path) -> None:
    checkpoint: Checkpoint = manifest.find(NAME)
    expected = {"expected": checkpoint.reported.statistics["expected"]}
    manifest.write_entry(replace(checkpoint, reported=manifest.Reported("kn_zoo", expected)))
    status, actual = results(zoo, NAME, "--statistics", "plain")
    assert (status, actual[NAME]["status"]) == (2, "skipped")
    assert "use --statistics expected" in actual[NAME]["reasons"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.such"], "There is no checkpoint 'no.such'"),
        ([NAME, "--all"], "not several of them"),
        ([NAME, "--device", "abacus"], "device 'abacus' cannot be used"),
        ([NAME, "--batch-size", "0"], "--batch-size"),
        ([NAME, "--statistics", "best"], "'best'"),
        ([NAME, "--json", "no/such/folder.json"], "cannot be written"),
        ([ELSEWHERE], "no accuracy could be recomputed"),
        ([NAME, "--frobnicate"], "frobnicate"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    zoo: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_deviation_of_sampled_accuracies() -> None:
    """Two draws tell the spread of (mean of two) - (mean of five) within a fraction."""
    random = np.random.RandomState(0)
    right = random.beta(0.3, 0.3, 10_000)  # most images are surely right or surely wrong

    def draw() -> np.ndarray:
        return random.random_sample(len(right)) < right

    differences = [
        np.mean([draw().sum() for _ in range(2)]) - np.mean([draw().sum() for _ in range(5)])
        for _ in range(300)
    ]
    estimate = classification.standard_deviation([draw(), draw()], 5)
    assert np.std(differences) == pytest.approx(estimate, rel=0.15)


def test_from_the_command_line(tmp_path: Path) -> None:
    """As a process of its own: here no bundle's images are there, or all that are match."""
    environment = {**os.environ, "KN_ZOO_DATA": str(tmp_path), "KN_ZOO_CACHE": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--batch-size", "64"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    embedded = [checkpoint for checkpoint in manifest.load().values() if checkpoint.bundle]
    verified = [checkpoint.name for checkpoint in embedded if checkpoint.dataset.name == "digits"]
    assert done.returncode == (0 if verified else 2), done.stdout + done.stderr
    for checkpoint in embedded:
        row = next(line for line in done.stdout.splitlines() if checkpoint.name in line)
        assert row.split()[-1] == ("match" if checkpoint.name in verified else "skipped")
