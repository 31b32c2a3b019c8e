"""The training script on real images: recipe in, bundle out, and back after an interruption."""

import csv
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import train
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kn_zoo  # noqa: F401
from kn_zoo import cli, data
from kn_zoo.checkpoints import bundle, manifest, predictions
from kn_zoo.evaluation import predict as evaluate
from kn_zoo.training import data as images
from kn_zoo.training import experiments
from kn_zoo.training import trainer as training
from kn_zoo.training.recipe import Recipe, names

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_scripts" / "train.py"
RECIPES = sorted((ROOT / "train_scripts" / "recipes").glob("*.yaml"))
SHARED = ROOT.parent / "shared"
UPDATES = 4  # an epoch of 596 digits in batches of 128

CROP = {"augmentation": [{"RandomCrop": {"size": 8, "padding": 1}}]}
VARIANTS = {
    "plain": {},
    "on_device": {"on_device": True, **CROP},
    "bf16 ema": {"mixed_precision": "bf16", "ema_decay": 0.9, "ema_warmup": True},
    "compiled": {"compile": True, "on_device": True, **CROP},
    "mixup": {
        "mixup": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
        "label_smoothing": 0.1,
        "repeated_augmentation": 2,
        "accumulation": 2,
        "erasing": {"p": 0.5},
    },
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate's settings are those of the process; each test has a run of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def recipe(tmp_path, request):
    return write_recipe(tmp_path / "recipe.yaml", **VARIANTS[getattr(request, "param", "plain")])


def write_recipe(path, **changes):
    digits = ROOT / "train_scripts/recipes/knpreactresnet20_cifar.digits.yaml"
    settings = yaml.safe_load(digits.read_text())
    settings |= {"epochs": 2, "batch_size": 128, "sampled_draws": 2, "train_split": "test"}
    settings["scheduler"] |= {"warmup_epochs": 1}
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def run(*arguments):
    return cli.run(train.app, train.spread_seeds([str(a) for a in arguments]))


def at_update(monkeypatch, number, action):
    """Does something in the midst of the given update of the next run."""
    update, count = training.Trainer.update, 0

    def watched(self, *args):
        nonlocal count
        count += 1
        if self.state.updates + 1 == number:
            action()
        return update(self, *args)

    monkeypatch.setattr(training.Trainer, "update", watched)


def weights(folder):
    return load_file(folder / "bundle" / manifest.WEIGHTS_FILE)


def assert_same_end(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert (one / training.LOG).read_bytes() == (other / training.LOG).read_bytes()


@pytest.mark.parametrize("recipe", ["bf16 ema", "compiled", "mixup"], indirect=True)
def test_ctrl_c_in_either_epoch_does_not_change_a_bit_of_the_end(recipe, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(recipe, "--output", whole) == 0
    for stop in (2, UPDATES + 3):
        with monkeypatch.context() as patch:
            at_update(patch, stop, lambda: os.kill(os.getpid(), signal.SIGINT))
            assert run(recipe, "--output", parts) == 130
        assert (parts / f"checkpoint-{stop:09d}").is_dir()
    assert run(recipe, "--output", parts) == 0
    assert_same_end(whole, parts)
    log = np.genfromtxt(whole / training.LOG, delimiter=",", names=True)
    events = EventAccumulator(str(parts / "tensorboard")).Reload()
    for name in ("loss", "top1", "lr"):
        logged = {event.step: event.value for event in events.Scalars(f"epoch/{name}")}
        assert [logged[UPDATES], logged[2 * UPDATES]] == pytest.approx(log[name].tolist(), rel=1e-3)


def test_killed_twice_it_ends_where_an_uninterrupted_run_does(recipe, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(recipe, "--output", whole) == 0
    command = [sys.executable, SCRIPT, recipe, "--output", parts, "--checkpoint-minutes", "0"]
    for least in (2, UPDATES + 1):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
            while child.poll() is None and newest(parts) < least:
                time.sleep(0.01)
            child.kill()
        assert child.returncode == -signal.SIGKILL
    assert newest(parts) < 2 * UPDATES
    assert run(recipe, "--output", parts) == 0
    assert_same_end(whole, parts)


def newest(folder):
    return max((int(p.name[-9:]) for p in folder.glob("checkpoint-*")), default=0)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "SHA256SUMS", None])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    recipe, tmp_path, monkeypatch, capfd, name
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_update(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(recipe, "--output", folder, "--checkpoint-minutes", "0") == 143
    last = folder / "checkpoint-000000003"
    if name is None:
        shutil.rmtree(last)
        last.mkdir()
    else:
        file = last / name
        os.truncate(file, file.stat().st_size // 2)
    assert run(recipe, "--output", folder, "--updates", "3") == 2  # another recipe: nothing is done
    capfd.readouterr()
    with monkeypatch.context() as patch:
        at_update(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run(recipe, "--output", folder) == 130
    said = "".join(capfd.readouterr().err.split())
    assert f"{last / (name or 'SHA256SUMS')}isdamaged" in said
    assert f"resumedfrom{folder / 'checkpoint-000000002'}" in said


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(recipe, tmp_path, monkeypatch, capfd):
    folder, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_update(patch, 4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)))
        try:
            assert run(recipe, "--output", folder, "--checkpoint-minutes", "0") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the last good one is intact: make room" in capfd.readouterr().err
    assert sorted(p.name[-1] for p in folder.glob("checkpoint-*")) == ["2", "3"]
    assert not (folder / ".part").exists()
    assert run(recipe, "--output", folder) == 0
    assert "checkpoint-000000003" in "".join(capfd.readouterr().err.split())


def test_a_loss_that_is_no_number_stops_with_its_batch(tmp_path, monkeypatch, capfd):
    recipe = write_recipe(tmp_path / "recipe.yaml")
    forward = training.Trainer.update

    def poisoned(self, pixels, targets):
        return forward(self, pixels * (float("nan") if self.state.updates == 6 else 1), targets)

    monkeypatch.setattr(training.Trainer, "update", poisoned)
    folder = tmp_path / "run"
    assert run(recipe, "--output", folder, "--checkpoint-minutes", "0") == 2
    assert "the loss is nan at batch 2 of epoch 2" in capfd.readouterr().err
    assert newest(folder) == 6


def test_the_clock_stops_a_run_resumably(recipe, tmp_path, capfd):
    folder = tmp_path / "run"
    for update in (1, 2):
        assert run(recipe, "--output", folder, "--minutes", "0") == 75
        assert f"after {update} of 8 updates; the same command" in capfd.readouterr().err


@pytest.mark.parametrize("recipe", ["bf16 ema"], indirect=True)
def test_bf16_is_used_in_training_alone_and_the_average_is_what_is_stored(
    recipe, tmp_path, monkeypatch
):
    used = {True: set(), False: set()}
    create = training.create_model

    def watched(*args):
        model = create(*args)
        model.stem.register_forward_hook(
            lambda module, args, output: used[module.training].add(output.dtype)
        )
        return model

    monkeypatch.setattr(training, "create_model", watched)
    assert run(recipe, "--output", tmp_path / "run") == 0
    assert used == {True: {torch.bfloat16}, False: {torch.float32}}

    stored = timm.create_model(f"local-dir:{tmp_path / 'run' / 'bundle'}", pretrained=True)
    last = next((tmp_path / "run").glob("checkpoint-*"))
    averaged = torch.load(last / "custom_checkpoint_1.pkl")
    trained = load_file(last / "model.safetensors")
    for key, tensor in stored.state_dict().items():
        assert torch.allclose(tensor, averaged[f"module.{key}"], rtol=1e-3, atol=1e-7)
    assert any(
        not torch.allclose(tensor, averaged[f"module.{key}"], rtol=1e-3, atol=1e-7)
        for key, tensor in trained.items()
    )


def test_two_processes_do_what_one_does_and_evaluate_each_image_once(tmp_path):
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        model_args={"dropout_p": 0.0},
        optimizer={"opt": "sgd", "lr": 0.015},  # higher rates amplify what rounding makes different
        scheduler={"sched": "cosine", "min_lr": 0.015},
        batch_size=148,  # four updates an epoch
        **VARIANTS["on_device"],
    )
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(recipe, "--output", one) == 0
    in_processes(*torchrun(), SCRIPT, recipe, "--output", two)
    assert (two / "checkpoint-000000008" / "random_states_1.pkl").is_file()
    logs = [np.genfromtxt(f / training.LOG, delimiter=",", names=True) for f in (one, two)]
    assert np.allclose(logs[0]["loss"], logs[1]["loss"], rtol=1e-3)
    assert np.ptp(logs[0]["loss"]) > 0.005 * logs[0]["loss"][0]  # the tolerance is not all there is
    stored = [bundle.Bundle(folder / "bundle").predictions() for folder in (one, two)]
    test = data.load("digits", "test")
    assert stored[1].targets.tolist() == test.targets
    model = timm.create_model(f"local-dir:{two / 'bundle'}", pretrained=True)
    again = evaluate.predict(model, test)
    assert not len(predictions.compare(again, stored[1]).mismatches)


def torchrun():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]


def in_processes(*command, folder=ROOT):
    """Run a module in processes of their own, one thread each, with the package in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_imagenet_recipe_from_launch_to_verification(tmp_path):
    """Two processes, three updates, all 1000 classes; only network and images are smaller."""
    images = SHARED / "data" / "imagenet-sample"
    if not images.is_dir():
        pytest.skip(f"no ImageNet sample at {images}")
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
    assert (tmp_path / "runs" / name / "checkpoint-000000003" / "random_states_1.pkl").is_file()
    entry = manifest.load(tmp_path / "weights_manifest.json")[name]
    assert (entry.dataset.images, entry.dataset.num_classes) == (1000, 1000)
    in_processes("eval.verify", name, "--data-dir", images, folder=tmp_path)


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    losses = []
    for parts in (1, 4):
        path = write_recipe(
            tmp_path / f"{parts}.yaml", accumulation=parts, model_args={"dropout_p": 0.0}
        )
        assert run(path, "--output", tmp_path / str(parts), "--updates", "5") == 0
        log = (tmp_path / str(parts) / training.LOG).read_text().splitlines()[1]
        losses.append(float(log.split(",")[1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_seeds_are_kept_apart_and_reported_together(recipe, tmp_path, capfd):
    folder = tmp_path / "run"
    options = ["--output", folder, "--updates", "2"]
    assert run(recipe, "--seeds", "3", "1", "2", *options) == 0
    runs = {seed: experiments.read_result(folder / f"seed-{seed}") for seed in (3, 1, 2)}
    top1 = [runs[seed].statistics["expected"].top1 for seed in (3, 1, 2)]
    assert len(set(top1)) > 1
    assert f"{np.mean(top1):.2f}, SD {np.std(top1, ddof=1):.2f}" in capfd.readouterr().err
    card = (folder / "bundle" / bundle.CARD).read_text()
    assert f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f} over 3 seeds" in card
    predictions = bundle.Bundle(folder / "bundle").predictions()
    assert predictions.top1 == pytest.approx(top1[0], abs=1e-3)


def test_a_rate_is_searched_on_held_out_images_alone(tmp_path, monkeypatch, capfd):
    recipe = write_recipe(tmp_path / "recipe.yaml", epochs=1)
    accuracy = {0.2: 0.0, 0.1: 12.0, 0.05: 40.0, 0.025: 35.0, 0.0125: 30.0}
    seen = []

    def watched(self, dataset, progress=None):
        seen.append(len(dataset))
        assert dataset is not self.test_set
        found = evaluate.predict(self.evaluated, dataset)
        lr = self.recipe.optimizer["lr"]
        hit = np.arange(len(found.targets)) < len(found.targets) * accuracy[lr] / 100
        indices = np.where(hit, found.targets, (found.targets + 1) % 10)[:, None].repeat(5, 1)
        return predictions.Predictions(indices, found.logits, found.targets)

    def diverging(self, *batch):
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
    monkeypatch.setattr(training.Trainer, "train", None)  # what is known is not trained again
    assert run(recipe, "--output", folder, "--lr-search") == 0


@pytest.mark.parametrize(
    ("top1", "over"),
    [
        ([], False),
        ([0.0, 0.0, 0.0], False),  # nothing learned: on with the halving
        ([1.4, 1.0, 1.2], False),  # of 100 classes, that is chance
        ([1.4, 1.0, 9.0], False),
        ([1.0, 9.0, 8.0], False),
        ([1.0, 9.0, 8.0, 8.9], True),
        ([9.0, 8.0, 9.5, 9.0], False),
    ],
)
def test_a_search_ends_after_two_worse_rates_than_one_that_learned(top1, over):
    assert experiments.is_over(top1, chance=1.0) is over


def test_a_smaller_batch_is_searched_from_the_best_rate_of_a_larger_one(tmp_path, monkeypatch):
    best = {"knpreactresnet20_cifar.a": 0.05, "knpreactresnet20_cifar.b": 0.025}
    best |= {"preactresnet20_cifar.c": 0.1}
    variants = {name: {"batch_size": size} for name, size in zip(best, (8, 128, 8), strict=True)}
    path = write_recipe(tmp_path / "several.yaml", model_args={}, epochs=1, variants=variants)

    def evaluated(self, dataset, progress=None):
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
    assert rates["knpreactresnet20_cifar.a"] == [0.025, 0.0125, 0.00625]  # from the other's best
    assert rates["preactresnet20_cifar.c"] == [0.2, 0.1, 0.05, 0.025]  # another norm
    assert [row["norm"] for row in rows[-4:]] == ["batch"] * 4


def test_a_table_holds_every_run_of_a_file(tmp_path, monkeypatch):
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
        found = experiments.read_result(tmp_path / row["recipe"] / f"seed-{row['seed']}")
        assert float(row["top1"]) == found.statistics["expected"].top1
    monkeypatch.setattr(training.Trainer, "train", None)  # what is known is not trained again
    before = table.read_text()
    assert run(*command) == 0 and table.read_text() == before


def test_a_table_keeps_no_weights(recipe, tmp_path, capfd):
    table = tmp_path / "new" / "table.csv"
    assert run(recipe, "--table", table, "--in-package", "--output", tmp_path / "run") == 2
    assert "leave --in-package out" in capfd.readouterr().err
    assert not table.parent.exists() and not (tmp_path / "run").exists()


def csv_with_head(path):
    lines = path.read_text().splitlines()
    head = [line[2:] for line in lines if line.startswith("# ")]
    return head, list(csv.DictReader(lines[len(head) :]))


def test_a_folder_of_another_recipe_is_left_alone(recipe, tmp_path):
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
        (None, "not a recipe"),
    ],
)
def test_a_bad_recipe_is_one_line_and_status_2(tmp_path, monkeypatch, capfd, text, reason):
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
        ({"name": "nonsense.digits"}, "name, preprocessing or model_args will not do"),
        ({"model_args": {"nonsense": 1}}, "model_args will not do"),
        ({"optimizer": {"opt": "nonsense", "lr": 0.1}}, "optimizer will not do"),
        ({"scheduler": {"sched": "cosine", "nonsense": 1}}, "scheduler will not do"),
        ({"mixup": {"nonsense": 1}}, "mixup will not do"),
        ({"augmentation": [{"Nonsense": {}}]}, "augmentation or erasing will not do"),
        ({"mixup": {"mixup_alpha": 0.2}, "batch_size": 127}, "a multiple of 2"),
        ({"batch_size": 600}, "a batch of 600 needs more than 596 images"),
        ({"held_out": 1.0}, "leaves nothing on one side"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_will_not_do_is_named(tmp_path, capfd, changes, reason):
    path = write_recipe(tmp_path / "recipe.yaml", **changes)
    assert run(path, "--output", tmp_path / "run") == 2
    said = capfd.readouterr().err
    assert reason in said and len(said.strip().splitlines()) == 1


def test_held_out_images_are_what_progress_is_measured_on(tmp_path, monkeypatch):
    path = write_recipe(tmp_path / "recipe.yaml", held_out=0.2)
    evaluated = []
    evaluate = training.Trainer.evaluate

    def watched(self, dataset, progress=None):
        evaluated.append(len(dataset))
        return evaluate(self, dataset, progress)

    monkeypatch.setattr(training.Trainer, "evaluate", watched)
    assert run(path, "--output", tmp_path / "run", "--updates", "2") == 0
    progress, *report = evaluated
    assert 110 < progress < 130 and set(report) == {596}


def test_the_small_batch_comparison_has_the_rates_that_were_searched():
    path = ROOT / "train_scripts/recipes/small_batch.yaml"
    _, rows = csv_with_head(ROOT / "results/small_batch_rates.csv")
    best: dict[str, float] = {}
    for name in names(path):
        found = [{k: float(r[k]) for k in ("lr", "top1")} for r in rows if r["recipe"] == name]
        best[name] = experiments.best_of(found)["lr"]
    assert {name: Recipe.read(path, name).optimizer["lr"] for name in best} == best
    _, runs = csv_with_head(ROOT / "results/small_batch.csv")
    assert {run["recipe"]: float(run["lr"]) for run in runs} == best
    assert len(runs) == 2 * len(best)


def test_missing_images_are_status_2(tmp_path):
    recipe = ROOT / "train_scripts/recipes/cifar100_cpu.yaml"
    places = ["--output", tmp_path / "run", "--data-dir", tmp_path]
    assert run(recipe, "preactresnet20_cifar.cifar100_bn", *places) == 2


@pytest.mark.parametrize(
    ("path", "variant"),
    [(path, variant) for path in RECIPES for variant in names(path)],
    ids=lambda value: getattr(value, "stem", value),
)
def test_recipes_are_whole_and_those_of_the_bundles(path, variant):
    recipe = Recipe.read(path, variant)
    assert recipe.name == (variant or path.stem)
    with torch.device("meta"):
        assert training.create_model(recipe, num_classes=3).num_classes == 3
    weight = manifest.load().get(recipe.name)
    if weight is not None and weight.bundle:
        stored = yaml.safe_load((weight.folder / "recipe.yaml").read_text())
        assert Recipe(**stored) == recipe
        assert weight.recipe == str(path.relative_to(ROOT))
