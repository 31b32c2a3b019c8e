"""The training script on real images: from recipe to bundle, and resuming."""

import csv
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kn_zoo import data
from kn_zoo.checkpoints import bundle, manifest, predictions
from kn_zoo.evaluation import predict as evaluate
from kn_zoo.training import data as images
from kn_zoo.training import report, search
from kn_zoo.training import trainer as training
from kn_zoo.training.recipe import Recipe, variant_names
from tests.training.runs import (
    ROOT,
    UPDATES,
    assert_same_result,
    at_update,
    interrupt,
    newest,
    run,
    write_recipe,
)

SCRIPT = ROOT / "train_scripts" / "train.py"
RECIPES = sorted((ROOT / "train_scripts" / "recipes").glob("*.yaml"))

CROP: dict[str, Any] = {"augmentation": [{"RandomCrop": {"size": 8, "padding": 1}}]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "on_device": {"on_device": True, **CROP},
    "bf16 ema": {"mixed_precision": "bf16", "ema_decay": 0.9, "ema_warmup": True},
    "progressive": {"resolutions": {1: 6, 2: 8}, "on_device": True, **CROP},
    "progressive compiled": {
        "model_args": {"dropout_p": 0.05, "depths": [1, 1, 1]},  # compiles faster
        "resolutions": {1: 6, 2: 8},
        "compile": True,
        "on_device": True,
        **CROP,
    },
    "mixup": {
        "mixup": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
        "label_smoothing": 0.1,
        "repeated_augmentation": 2,
        "accumulation": 2,
        "erasing": {"p": 0.5},
    },
}


@pytest.fixture
def recipe(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", **VARIANTS[getattr(request, "param", "plain")])


@pytest.mark.parametrize(
    ("recipe", "stops"),
    [
        ("bf16 ema", (2, UPDATES + 3)),
        ("mixup", (2, UPDATES + 3)),
        ("progressive", (UPDATES, UPDATES + 1)),  # last update of a resolution, first of the next
        ("progressive compiled", (UPDATES - 1, UPDATES + 1)),
    ],
    indirect=["recipe"],
)
def test_resuming_after_ctrl_c_is_bit_exact(
    recipe: Path, stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(recipe, "--output", whole) == 0
    for stop in stops:
        with monkeypatch.context() as patch:
            at_update(patch, stop, interrupt)
            assert run(recipe, "--output", parts) == 130
        assert (parts / f"state-{stop:09d}").is_dir()
    assert run(recipe, "--output", parts) == 0
    assert_same_result(whole, parts)
    log = np.genfromtxt(whole / training.LOG, delimiter=",", names=True)
    # Files that one process writes within a second do not sort by time: keep all events.
    events = EventAccumulator(str(parts / "tensorboard"), purge_orphaned_data=False).Reload()
    for name in ("loss", "top1", "lr"):
        logged = {event.step: event.value for event in events.Scalars(f"epoch/{name}")}
        assert [logged[UPDATES], logged[2 * UPDATES]] == pytest.approx(log[name].tolist(), rel=1e-3)


@pytest.mark.parametrize("recipe", ["bf16 ema"], indirect=True)
@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False)])
def test_bfloat16_without_its_instructions_is_warned_of(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: str,
    warned: bool,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert run(recipe, "--output", tmp_path / "run", "--epochs", 1) == 0
    assert ('set mixed_precision: "no"' in capsys.readouterr().err) == warned


def test_resuming_after_sigkill_is_bit_exact(recipe: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(recipe, "--output", whole) == 0
    arguments = [SCRIPT, recipe, "--output", parts, "--save-minutes", "0"]
    command = [sys.executable, *map(str, arguments)]
    for least in (2, UPDATES + 1):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
            while child.poll() is None and newest(parts) < least:
                time.sleep(0.01)
            child.kill()
        assert child.returncode == -signal.SIGKILL
    assert newest(parts) < 2 * UPDATES
    assert run(recipe, "--output", parts) == 0
    assert_same_result(whole, parts)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "SHA256SUMS", None])
def test_a_damaged_training_state_is_named_and_the_previous_one_is_used(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_update(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(recipe, "--output", folder, "--save-minutes", "0") == 143
    last = folder / "state-000000003"
    if name is None:
        shutil.rmtree(last)
        last.mkdir()
    else:
        file = last / name
        os.truncate(file, file.stat().st_size // 2)
    assert run(recipe, "--output", folder, "--updates", "3") == 2  # another recipe: refused
    capfd.readouterr()
    with monkeypatch.context() as patch:
        at_update(patch, 4, interrupt)
        assert run(recipe, "--output", folder) == 130
    said = "".join(capfd.readouterr().err.split())
    assert f"{last / (name or 'SHA256SUMS')}isdamaged" in said
    assert f"resumedfrom{folder / 'state-000000002'}" in said


def test_a_full_disk_leaves_the_last_training_state_intact(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_update(patch, 4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)))
        try:
            assert run(recipe, "--output", folder, "--save-minutes", "0") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the previous one is intact: free disk space" in capfd.readouterr().err
    assert sorted(p.name[-1] for p in folder.glob("state-*")) == ["2", "3"]
    assert not (folder / ".state-temporary").exists()
    assert run(recipe, "--output", folder) == 0
    assert "state-000000003" in "".join(capfd.readouterr().err.split())


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    forward = training.Trainer.update

    def poisoned(
        self: training.Trainer, pixels: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        return forward(self, pixels * (float("nan") if self.progress.updates == 6 else 1), targets)

    monkeypatch.setattr(training.Trainer, "update", poisoned)
    folder = tmp_path / "run"
    assert run(recipe, "--output", folder, "--save-minutes", "0") == 2
    assert "the loss is nan at batch 2 of epoch 2" in capfd.readouterr().err
    assert newest(folder) == 6


def test_the_time_limit_stops_a_run_that_can_be_resumed(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    for update in (1, 2):
        assert run(recipe, "--output", folder, "--minutes", "0") == 75
        assert f"after {update} of 8 updates; rerun the same command" in capfd.readouterr().err


@pytest.mark.parametrize("recipe", ["bf16 ema"], indirect=True)
def test_bf16_is_used_only_in_training_and_the_average_is_stored(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    create = training.create_model

    def watched(*args: Any) -> torch.nn.Module:
        model: Any = create(*args)
        model.stem.register_forward_hook(
            lambda module, args, output: used[module.training].add(output.dtype)
        )
        return model

    monkeypatch.setattr(training, "create_model", watched)
    assert run(recipe, "--output", tmp_path / "run") == 0
    assert used == {True: {torch.bfloat16}, False: {torch.float32}}

    stored = timm.create_model(f"local-dir:{tmp_path / 'run' / 'bundle'}", pretrained=True)
    last = next((tmp_path / "run").glob("state-*"))
    averaged = torch.load(last / "custom_checkpoint_1.pkl")
    trained = load_file(last / "model.safetensors")
    for key, tensor in stored.state_dict().items():
        assert torch.allclose(tensor, averaged[f"module.{key}"], rtol=1e-3, atol=1e-7)
    assert any(
        not torch.allclose(tensor, averaged[f"module.{key}"], rtol=1e-3, atol=1e-7)
        for key, tensor in trained.items()
    )


def test_two_processes_match_one_and_evaluate_each_image_once(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        model_args={"dropout_p": 0.0},
        optimizer={"opt": "sgd", "lr": 0.015},  # higher rates amplify rounding differences
        scheduler={"sched": "cosine", "min_lr": 0.015},
        batch_size=148,  # four updates an epoch
        **VARIANTS["on_device"],
    )
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(recipe, "--output", one) == 0
    in_processes(*torchrun(), SCRIPT, recipe, "--output", two)
    assert (two / "state-000000008" / "random_states_1.pkl").is_file()
    logs = [np.genfromtxt(f / training.LOG, delimiter=",", names=True) for f in (one, two)]
    assert np.allclose(logs[0]["loss"], logs[1]["loss"], rtol=1e-3)
    assert np.ptp(logs[0]["loss"]) > 0.005 * logs[0]["loss"][0]  # more than the tolerance
    stored = [bundle.Bundle(folder / "bundle").predictions() for folder in (one, two)]
    test = data.Digits(train=False)
    assert stored[1].targets.tolist() == test.targets
    model = timm.create_model(f"local-dir:{two / 'bundle'}", pretrained=True)
    recomputed = evaluate.predict(model, test)
    assert not len(predictions.compare(recomputed, stored[1]).mismatches)


def torchrun() -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]


def in_processes(*command: Any, folder: Path = ROOT) -> None:
    """Run a module in a child process, with one thread and the package in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_imagenet_recipe_from_launch_to_verification(
    tmp_path: Path, dataset_folder: Callable[[str], Path]
) -> None:
    """Two processes, three updates, all 1000 classes; a smaller network and smaller images."""
    images = dataset_folder("imagenet-sample")
    for part in ("kn_zoo", "eval", "train_scripts"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "weights_manifest.json", tmp_path)
    recipe = tmp_path / "train_scripts" / "recipes" / "imagenet.yaml"
    settings = yaml.safe_load(recipe.read_text())
    settings["preprocessing"]["input_size"] = [3, 32, 32]
    settings["augmentation"][0]["RandomResizedCrop"]["size"] = 32
    settings |= {"train_split": "validation", "batch_size": 16, "sampled_draws": 2}
    name = "knpreactresnet20_cifar.in1k_kn_zoo"
    settings["variants"] = {name: {}}
    recipe.write_text(yaml.safe_dump(settings))
    script, options = (
        tmp_path / "train_scripts" / "train.py",
        ["--data-dir", images, "--in-package"],
    )
    in_processes(*torchrun(), script, recipe, name, *options, "--updates", "3", folder=tmp_path)
    assert (tmp_path / "runs" / name / "state-000000003" / "random_states_1.pkl").is_file()
    entry = manifest.load(tmp_path / "weights_manifest.json")[name]
    assert (entry.dataset.images, entry.dataset.num_classes) == (1000, 1000)
    in_processes("eval.verify", name, "--data-dir", images, folder=tmp_path)


def test_accumulated_gradients_add_up_to_the_batch(tmp_path: Path) -> None:
    losses = []
    for parts in (1, 4):
        path = write_recipe(
            tmp_path / f"{parts}.yaml", accumulation=parts, model_args={"dropout_p": 0.0}
        )
        assert run(path, "--output", tmp_path / str(parts), "--updates", "5") == 0
        log = (tmp_path / str(parts) / training.LOG).read_text().splitlines()[1]
        losses.append(float(log.split(",")[1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_seeds_have_separate_folders_and_one_bundle(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ["--output", folder, "--updates", "2"]
    assert run(recipe, "--seeds", "3", "1", "2", *options) == 0
    runs = {seed: report.read_result(folder / f"seed-{seed}") for seed in (3, 1, 2)}
    top1 = [runs[seed].statistics["expected"].top1 for seed in (3, 1, 2)]
    assert len(set(top1)) > 1
    assert f"{np.mean(top1):.2f}, SD {np.std(top1, ddof=1):.2f}" in capfd.readouterr().err
    card = (folder / "bundle" / bundle.CARD).read_text()
    assert f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f} over 3 seeds" in card
    predictions = bundle.Bundle(folder / "bundle").predictions()
    assert predictions.top1 == pytest.approx(top1[0], abs=1e-3)


def test_seeds_are_added_to_a_stored_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights_manifest.json"
    path.write_text('{"checkpoints": []}')
    monkeypatch.setattr(manifest, "PATH", path)
    monkeypatch.setattr(manifest, "PRETRAINED", tmp_path / "pretrained")
    command = [recipe, "--output", tmp_path / "run", "--updates", "2"]
    assert run(*command, "--seeds", "1", "--add-seeds") == 2
    assert "--in-package" in capfd.readouterr().err
    assert run(*command, "--in-package") == 0
    (stored,) = manifest.load().values()
    assert run(*command, "--seeds", "1", "--add-seeds") == 0
    assert run(*command, "--seeds", "1", "2", "--add-seeds") == 0
    (extended,) = manifest.load().values()
    assert extended.seeds == (*stored.seeds, 1, 2) and extended.file == stored.file
    assert extended.runs[0].statistics == extended.reported.statistics
    for result in extended.runs[1:]:
        assert result == report.read_result(tmp_path / "run" / f"seed-{result.seed}")
    assert "over 3 seeds" in (extended.folder / bundle.CARD).read_text()
    before = path.read_text()
    assert run(recipe, "--updates", "3", "--seeds", "4", "--add-seeds") == 2, "another recipe"
    assert run(*command, "--add-seeds") == 2, "without seeds"
    assert path.read_text() == before


def test_a_baseline_is_stored_without_its_weights(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights_manifest.json"
    path.write_text('{"checkpoints": []}')
    monkeypatch.setattr(manifest, "PATH", path)
    monkeypatch.setattr(manifest, "PRETRAINED", tmp_path / "pretrained")
    command = [recipe, "--output", tmp_path / "run", "--updates", "2", "--in-package"]
    assert run(*command, "--no-weights") == 0
    (stored,) = manifest.load().values()
    assert {file.name for file in stored.folder.iterdir()} == {*bundle.FILES[1:]}
    assert stored.source == "predictions only"
    assert run(*command) == 0, "the weights of the same run"
    (complete,) = manifest.load().values()
    assert complete.file and replace(complete, file=None) == stored


def test_the_learning_rate_is_searched_on_held_out_images_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", epochs=1)
    accuracy = {0.2: 0.0, 0.1: 12.0, 0.05: 40.0, 0.025: 35.0, 0.0125: 30.0}
    seen = []

    def watched(
        self: training.Trainer, dataset: Any, progress: str | None = None
    ) -> predictions.Predictions:
        seen.append(len(dataset))
        assert dataset is not self.test_set
        result = evaluate.predict(self.evaluated, dataset)
        lr = self.recipe.optimizer["lr"]
        hit = np.arange(len(result.targets)) < len(result.targets) * accuracy[lr] / 100
        indices = np.where(hit, result.targets, (result.targets + 1) % 10)[:, None].repeat(5, 1)
        return predictions.Predictions(indices, result.logits, result.targets)

    def diverging(self: training.Trainer, *batch: torch.Tensor) -> torch.Tensor:
        loss = update(self, *batch)
        return loss * float("inf") if self.recipe.optimizer["lr"] == 0.2 else loss

    update = training.Trainer.update
    monkeypatch.setattr(training.Trainer, "update", diverging)
    monkeypatch.setattr(training.Trainer, "evaluate", watched)
    folder = tmp_path / "run"
    assert run(recipe, "--output", folder, "--lr-search") == 0
    table = np.genfromtxt(folder / "lr_search.csv", delimiter=",", names=True)
    assert table["lr"].tolist() == list(accuracy)
    assert np.allclose(table["top1"], list(accuracy.values()), atol=2)
    assert set(seen) == {int(table["images"][0])} and 50 < seen[0] < 70
    assert "lr 0.05;" in capfd.readouterr().err
    monkeypatch.setattr(training.Trainer, "train", None)  # completed runs are not trained again
    assert run(recipe, "--output", folder, "--lr-search") == 0


@pytest.mark.parametrize(
    ("top1", "over"),
    [
        ([], False),
        ([0.0, 0.0, 0.0], False),  # nothing learned: continue
        ([1.4, 1.0, 1.2], False),  # chance for 100 classes
        ([1.4, 1.0, 9.0], False),
        ([1.0, 9.0, 8.0], False),
        ([1.0, 9.0, 8.0, 8.9], True),
        ([9.0, 8.0, 9.5, 9.0], False),
    ],
)
def test_a_search_ends_after_two_rates_worse_than_one_that_learned(
    top1: list[float], over: bool
) -> None:
    assert search.search_is_over(top1, chance=1.0) is over


@given(st.integers(0, 10), st.integers(0, 10))
def test_a_search_tries_the_best_rate_and_its_neighbours(best: int, first: int) -> None:
    halvings: list[int] = []  # of the largest rate, for each rate tried
    rows: list[dict[str, float]] = []
    while lr := search.next_lr(rows, search.FIRST_LR / 2**first, chance=1.0):
        halvings.append(round(np.log2(search.FIRST_LR / lr)))
        assert len(halvings) == len(set(halvings)) and 0 <= halvings[-1] <= 10
        rows.append({"lr": lr, "top1": 50.0 - abs(halvings[-1] - best)})
        rows.sort(key=lambda row: -row["lr"])
    assert {best - 1, best, best + 1} & set(range(11)) <= set(halvings)


def test_a_search_starts_at_the_best_rate_of_a_larger_batch_and_goes_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"knpreactresnet20_cifar.a": 0.05, "knpreactresnet20_cifar.b": 0.025}
    best |= {"preactresnet20_cifar.c": 0.1}
    variants = {name: {"batch_size": size} for name, size in zip(best, (8, 128, 8), strict=True)}
    path = write_recipe(tmp_path / "several.yaml", model_args={}, epochs=1, variants=variants)

    def evaluated(
        self: training.Trainer, dataset: Any, progress: str | None = None
    ) -> predictions.Predictions:
        rate = self.recipe.optimizer["lr"]
        share = 0.9 - 0.1 * abs(np.log2(rate / best[self.recipe.name]))
        targets = np.asarray(images.targets_of(dataset))
        hit = np.arange(len(targets)) < len(targets) * share
        indices = np.where(hit, targets, (targets + 1) % 10)[:, None].repeat(5, 1)
        return predictions.Predictions(indices, np.zeros((len(targets), 10), np.float32), targets)

    monkeypatch.setattr(training.Trainer, "update", lambda self, *batch: torch.tensor(1.0))
    monkeypatch.setattr(training.Trainer, "evaluate", evaluated)
    table = tmp_path / "rates.csv"
    assert run(path, "--lr-search", "--table", table, "--output", tmp_path / "run") == 0
    _, rows = csv_with_head(table)
    rates = {name: [float(r["lr"]) for r in rows if r["recipe"] == name] for name in best}
    assert rates["knpreactresnet20_cifar.b"] == [0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625]
    a = rates["knpreactresnet20_cifar.a"]
    assert a == [0.1, 0.05, 0.025, 0.0125, 0.00625]  # starts at 0.025, the best of b
    assert rates["preactresnet20_cifar.c"] == [0.2, 0.1, 0.05, 0.025]  # another norm
    assert [row["norm"] for row in rows[-4:]] == ["batch"] * 4
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if "20_cifar.a" not in line))
    other = tmp_path / "another machine"
    assert run(path, "--lr-search", "--table", table, "--output", other) == 0
    assert [folder.name for folder in other.iterdir()] == ["knpreactresnet20_cifar.a"]
    assert sorted(table.read_text().splitlines()) == sorted(map(str.rstrip, lines))


@pytest.mark.parametrize(
    ("instructions", "precision", "dtype"),
    [
        ("AVX512", "bf16", torch.bfloat16),
        ("AVX512", "no", torch.float32),
        ("AVX2", "bf16", torch.float32),
    ],
)
def test_muon_orthogonalizes_in_bfloat16_only_with_its_instructions(
    instructions: str,
    precision: str,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    muon = pytest.importorskip("timm.optim.muon")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    changes = {"mixed_precision": precision, "optimizer": {"opt": "nmuon", "lr": 0.01}}
    path = write_recipe(tmp_path / "recipe.yaml", **changes)
    training.Trainer(Recipe.read(path), tmp_path, images.DataConfig(), training.RunConfig())
    made = muon.zeropower_via_newtonschulz(torch.randn(4, 6), 5, [(3.4445, -4.775, 2.0315)])
    assert made.dtype is dtype
    values = torch.linalg.svdvals(made.float())
    assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize(
    ("limit", "dtype"), [(bundle.FILE_LIMIT, torch.float32), (0, torch.float16)]
)
def test_rounding_that_changes_predictions_is_undone_if_float32_is_not_too_large(
    limit: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", stored_dtype="float16")
    trainer = training.Trainer(
        Recipe.read(path), tmp_path, images.DataConfig(), training.RunConfig()
    )
    head = trainer.network.get_classifier()
    bias = 1 + 1e-5 * torch.arange(10)  # float16 rounds all to 1: class 0 instead of 9
    head.load_state_dict({"weight": torch.zeros_like(head.weight), "bias": bias})
    monkeypatch.setattr(bundle, "FILE_LIMIT", limit)
    stored, made = report.round_for_storage(trainer)
    assert stored is dtype
    assert set(made.indices[:, 0]) == ({9} if dtype is torch.float32 else {0})
    assert torch.equal(head.bias, bias if dtype is torch.float32 else torch.ones(10))


def test_a_grid_has_one_row_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {
        "knpreactresnet20_cifar.a": {"batch_size": 64},
        "preactresnet20_cifar.b": {"lr": 0.4},
    }
    path = write_recipe(tmp_path / "several.yaml", model_args={}, variants=variants)
    table = tmp_path / "new" / "table.csv"
    command = [path, "--table", table, "--seeds", "0", "1", "--updates", "1", "--output", tmp_path]
    assert run(*command) == 0
    head, rows = csv_with_head(table)
    assert any(line.startswith("torch ") for line in head)
    assert [(row["recipe"], row["norm"], row["seed"]) for row in rows] == [
        (name, norm, seed)
        for seed in "01"
        for name, norm in zip(variants, ("kernel", "batch"), strict=True)
    ]
    assert [(row["batch_size"], row["lr"]) for row in rows[:2]] == [("64", "0.1"), ("128", "0.4")]
    for row in rows:
        run_dir = tmp_path / row["recipe"] / f"seed-{row['seed']}"
        assert float(row["top1"]) == report.read_result(run_dir).statistics["expected"].top1
        _, epochs = csv_with_head(run_dir / training.LOG)
        assert float(row["loss"]) == float(epochs[-1]["loss"])
    monkeypatch.setattr(training.Trainer, "train", None)  # completed runs are not trained again
    before = table.read_text()
    assert run(*command) == 0 and table.read_text() == before
    shutil.rmtree(tmp_path / "preactresnet20_cifar.b")  # as on another machine
    assert run(*command) == 0 and table.read_text() == before
    assert run(*command, "--epochs", "9") == 2, "another recipe is another run"


def test_reestimated_statistics_do_not_depend_on_the_running_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "preactresnet20_cifar.b"
    path = write_recipe(tmp_path / "recipe.yaml", name=name, model_args={"norm": "batch"})
    recipe = Recipe.read(path).override(updates=20)
    run_dir, configs = tmp_path / "run", (images.DataConfig(), training.RunConfig())
    running = search.accuracy(recipe, run_dir, *configs)
    train = training.Trainer.train

    def spoil(self: training.Trainer) -> None:
        train(self)
        for buffer in self.network.buffers():
            buffer.fill_(7)

    monkeypatch.setattr(training.Trainer, "train", spoil)
    reestimated = search.reestimated_top1(recipe, run_dir, *configs)
    assert reestimated == running["top1_reestimated"]
    assert reestimated > running["top1"], "20 updates leave the averages near their initial values"


def test_a_table_may_gain_a_column(tmp_path: Path) -> None:
    training.write_csv(tmp_path / "table.csv", [{"seed": "0"}, {"seed": "1", "loss": 0.5}])
    assert (tmp_path / "table.csv").read_text() == "seed,loss\n0,\n1,0.5\n"


def test_a_grid_stores_no_weights(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "new" / "table.csv"
    assert run(recipe, "--table", table, "--in-package", "--output", tmp_path / "run") == 2
    assert "omit --in-package" in capfd.readouterr().err
    assert not table.parent.exists() and not (tmp_path / "run").exists()


def csv_with_head(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    lines = path.read_text().splitlines()
    head = [line[2:] for line in lines if line.startswith("# ")]
    return head, list(csv.DictReader(lines[len(head) :]))


def test_a_folder_of_another_recipe_is_unchanged(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: another\n")
    assert run(recipe, "--output", folder) == 2
    assert (folder / "recipe.yaml").read_text() == "name: another\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: [", "not a recipe"),
        ("name: a.b\nlearning_rate: 1\n", "learning_rate"),
        ("- 1\n", "not a recipe"),
        ("variants: {a.b: {}, a.c: {}}\n", "name one: a.b a.c"),
        ("epochs: 1\n", "'dataset'"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_recipe_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    text: str | None,
    reason: str,
) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert run(path) == 2
    said = capfd.readouterr().err
    assert reason in said and len(said.strip().splitlines()) == 1
    assert list(tmp_path.glob("runs")) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "nonsense.digits"}, "invalid name, preprocessing or model_args settings"),
        ({"model_args": {"nonsense": 1}}, "model_args settings"),
        ({"optimizer": {"opt": "nonsense", "lr": 0.1}}, "invalid optimizer settings in the recipe"),
        (
            {"scheduler": {"sched": "cosine", "nonsense": 1}},
            "invalid scheduler settings in the recipe",
        ),
        ({"mixup": {"nonsense": 1}}, "invalid mixup settings in the recipe"),
        (
            {"augmentation": [{"Nonsense": {}}]},
            "invalid augmentation or erasing settings in the recipe",
        ),
        ({"mixup": {"mixup_alpha": 0.2}, "batch_size": 127}, "a multiple of 2"),
        ({"batch_size": 600}, "batch_size 600 exceeds the 596 training images"),
        ({"resolutions": {1: 8}}, "resolutions require on_device: true"),
        ({"resolutions": {0: 4, 2: 8}, "on_device": True}, "starting at 1"),
        ({"resolutions": {2: 8}, "on_device": True}, "starting at 1"),
        ({"resolutions": {1: 0, 2: 8}, "on_device": True}, "starting at 1"),
        ({"resolutions": {1: 4, 2: 6}, "on_device": True}, "end at the full size 8 x 8, but epoch"),
        ({"resolutions": {1: 4, 3: 8}, "on_device": True}, "epoch 2 has 4 x 4"),
        ({"held_out": 1.0}, "leaves one side empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_setting_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", **changes)
    assert run(path, "--output", tmp_path / "run") == 2
    said = capfd.readouterr().err
    assert reason in said and len(said.strip().splitlines()) == 1


def test_progress_is_measured_on_held_out_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", held_out=0.2)
    evaluated: list[int] = []
    evaluate = training.Trainer.evaluate

    def watched(
        self: training.Trainer, dataset: Any, progress: str | None = None
    ) -> predictions.Predictions:
        evaluated.append(len(dataset))
        return evaluate(self, dataset, progress)

    monkeypatch.setattr(training.Trainer, "evaluate", watched)
    assert run(path, "--output", tmp_path / "run", "--updates", "2") == 0
    progress, *report = evaluated
    assert 110 < progress < 130 and set(report) == {596}


def test_the_small_batch_recipes_have_the_rates_of_the_search() -> None:
    path = ROOT / "train_scripts/recipes/small_batch.yaml"
    _, rows = csv_with_head(ROOT / "results/small_batch_rates.csv")
    best: dict[str | None, float] = {}
    for name in variant_names(path):
        rates = [{k: float(r[k]) for k in ("lr", "top1")} for r in rows if r["recipe"] == name]
        best[name] = search.best_of(rates)["lr"]
    assert {name: Recipe.read(path, name).optimizer["lr"] for name in best} == best
    _, runs = csv_with_head(ROOT / "results/small_batch.csv")
    assert {run["recipe"]: float(run["lr"]) for run in runs} == best
    assert len(runs) == 2 * len(best)


def test_missing_images_are_status_2(tmp_path: Path) -> None:
    recipe = ROOT / "train_scripts/recipes/cifar100_cpu.yaml"
    places = ["--output", tmp_path / "run", "--data-dir", tmp_path]
    assert run(recipe, "preactresnet20_cifar.cifar100_bn", *places) == 2


@pytest.mark.parametrize(
    ("path", "variant"),
    [(path, variant) for path in RECIPES for variant in variant_names(path)],
    ids=lambda value: getattr(value, "stem", value),
)
def test_recipes_are_valid_and_match_the_bundles(path: Path, variant: str | None) -> None:
    recipe = Recipe.read(path, variant)
    assert recipe.name == (variant or path.stem)
    with torch.device("meta"):
        assert training.create_model(recipe, num_classes=3).num_classes == 3
    checkpoint = manifest.load().get(recipe.name)
    if checkpoint is not None and checkpoint.bundle:
        stored = yaml.safe_load((checkpoint.folder / "recipe.yaml").read_text())
        assert Recipe(**stored) == recipe
        assert checkpoint.recipe == str(path.relative_to(ROOT))


def test_recipe_names_are_unique() -> None:
    names = [variant or path.stem for path in RECIPES for variant in variant_names(path)]
    assert len(set(names)) == len(names)


def test_fewer_epochs_than_the_last_resolution_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", **VARIANTS["progressive"])
    assert run(recipe, "--epochs", "1", "--output", tmp_path / "run") == 2
    assert "but epoch 1 has 6 x 6: change resolutions or epochs" in capfd.readouterr().err
