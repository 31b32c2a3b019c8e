"""Private training: sampling, noise and accounting as stated, secrecy, resuming, and an audit."""

import copy
import functools
import json
import math
import re
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy.stats import beta, kstest
from torch import Tensor, nn

from kn_zoo import cli
from kn_zoo.checkpoints import bundle, manifest
from kn_zoo.checkpoints.manifest import Checkpoint, Privacy
from kn_zoo.evaluation import accounting
from kn_zoo.evaluation.result import Settings
from kn_zoo.evaluation.verify import verify
from kn_zoo.evaluation.verify_command import notes
from kn_zoo.layers import KNConv2d
from kn_zoo.training import report
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import Recipe, UserError, variant_names
from kn_zoo.training.trainer import RunConfig, Trainer, create_model
from tests.test_imagenet32 import write_miniature
from tests.training.runs import ROOT, interrupt
from train_scripts import train_private as script

pytest.importorskip("opacus", reason="Opacus is not installed: pip install 'kn_zoo[privacy]'")

from kn_zoo.training import private
from kn_zoo.training.private import PrivateTrainer

NAME = "knpreactresnet20_cifar.private"
noise_multiplier = functools.cache(private.get_noise_multiplier)  # the search takes seconds
epsilon_spent = functools.cache(private.spent_epsilon)


@pytest.fixture(autouse=True)
def search_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests have the same budget."""
    monkeypatch.setattr(private, "get_noise_multiplier", noise_multiplier)
    monkeypatch.setattr(private, "spent_epsilon", epsilon_spent)


STEPS = 6  # three epochs of 120 digits at batch size 60


def write_recipe(path: Path, **changes: Any) -> Path:
    fields: dict[str, Any] = {
        "name": NAME,
        "model_args": {"depths": [1], "widths": [4], "act_layer": "mish"},
        "dataset": "digits",
        "train_split": "train[:120]",
        "eval_split": "test",
        "preprocessing": {
            "input_size": [1, 8, 8],
            "mean": [0.0],
            "std": [1.0],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
        "epochs": 3,
        "batch_size": 60,
        "optimizer": {"opt": "momentum", "lr": 1.0, "momentum": 0.0},
        "scheduler": {"sched": "multistep", "decay_milestones": [1, 2], "decay_rate": 0.5},
        "licenses": {"code": "MIT", "weights": "MIT", "data": "CC-BY-4.0"},
        "privacy": {
            "epsilon": 8.0,
            "delta": 1e-4,
            "max_grad_norm": 0.5,
            "physical_batch_size": 16,
        },
        "on_device": True,
        "sampled_draws": 1,
        "seed": 0,
    }
    path.write_text(yaml.safe_dump(fields | changes))
    return path


def run(*arguments: object) -> int:
    """Exit status of train_private.py with these arguments."""
    return cli.run(script.app, [str(argument) for argument in arguments])


def make_trainer(folder: Path, **changes: Any) -> PrivateTrainer:
    recipe = Recipe.read(write_recipe(folder / "recipe.yml", **changes))
    return PrivateTrainer(recipe, folder, DataConfig(), RunConfig())


def after_steps(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[PrivateTrainer], object]
) -> None:
    """Call `action` after each step, before signals are looked at."""
    after_step = PrivateTrainer.after_step

    def watched(self: PrivateTrainer, signals: Any) -> None:
        action(self)
        after_step(self, signals)

    monkeypatch.setattr(PrivateTrainer, "after_step", watched)


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Train by the script, and return the checkpoint that it would write to the manifest."""
    written: list[Checkpoint] = []
    write = report.bundle.write

    def recorded(*arguments: Any, **options: Any) -> Checkpoint:
        written.append(write(*arguments, **options))
        return written[-1]

    monkeypatch.setattr(report.bundle, "write", recorded)
    assert run(write_recipe(folder / "recipe.yaml"), "--output", folder / "run") == 0
    return written[0]


# Random numbers


def test_noise_is_standard_normal() -> None:
    numbers = private.system_normal(200_001).numpy()
    assert len(numbers) == 200_001 and np.isfinite(numbers).all()
    assert kstest(numbers, "norm").pvalue > 1e-6
    assert not np.array_equal(numbers, private.system_normal(200_001).numpy())


def test_sampling_is_poisson_at_the_stated_rate() -> None:
    rate, count, steps = 0.08192, 5000, 200
    batches = list(private.PoissonSampler(num_samples=count, sample_rate=rate, steps=steps))
    assert len(batches) == steps
    sizes = np.array([len(batch) for batch in batches])
    sd = math.sqrt(count * rate * (1 - rate))
    assert abs(sizes.mean() - count * rate) < 6 * sd / math.sqrt(steps)
    assert sizes.std() == pytest.approx(sd, rel=0.35)
    taken = np.bincount(np.concatenate(batches), minlength=count)  # of each image, binomial
    assert taken.var() == pytest.approx(steps * rate * (1 - rate), rel=0.2)


def test_noise_of_the_whole_trainer_has_the_stated_deviation(tmp_path: Path) -> None:
    """Without gradients, the weights after all steps differ by the noise and its learning rates."""
    trainer = make_trainer(tmp_path)
    zero_gradients(trainer)
    before = flat(trainer.network.state_dict())
    rates = []
    for _ in trainer.steps():
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    rates = [1.0, *rates[:-1]]  # each step uses the rate that the step before it set
    std = trainer.optimizer.noise_multiplier * 0.5 / 60 * math.sqrt(sum(r**2 for r in rates))
    moved = flat(trainer.network.state_dict()) - before
    assert len(rates) == STEPS and len(moved) > 300
    assert moved.std() == pytest.approx(std, rel=0.15)


def zero_gradients(trainer: PrivateTrainer) -> None:
    def clip_and_accumulate() -> None:
        for p in trainer.optimizer.params:
            p.summed_grad = torch.zeros_like(p)

    trainer.optimizer.clip_and_accumulate = clip_and_accumulate


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def test_the_step_is_the_clipped_sum_divided_by_the_batch_size(tmp_path: Path) -> None:
    """Without noise, a step with every image, in parts, against autograd image by image."""
    trainer = make_trainer(tmp_path, **DETERMINISTIC, train_split="train[:20]", batch_size=20)
    trainer.optimizer.noise_multiplier = 0.0
    plain = plain_copy(trainer)
    pixels, targets = gather(trainer, range(20))
    total = torch.zeros_like(flat(plain.state_dict()))
    for x, y in zip(pixels, targets, strict=True):
        gradient = gradient_of(plain, x, y)
        total += gradient * min(1.0, 0.5 / float(gradient.norm()))
    before = flat(trainer.network.state_dict())
    assert next(trainer.steps()) == 1
    moved = flat(trainer.network.state_dict()) - before
    torch.testing.assert_close(moved, -total / 20, rtol=1e-3, atol=1e-6)


def test_images_have_the_resolution_of_their_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, resolutions={1: 4, 3: 8})
    sides: list[int] = []
    trainer.network.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[-1]))
    seen = [sides[-1] for _ in trainer.steps()]
    assert seen == [4, 4, 4, 4, 8, 8] and set(sides) == {4, 8}


DETERMINISTIC: dict[str, Any] = {
    "model_args": {"depths": [1], "widths": [4], "act_layer": "mish", "dropout_p": 0.0},
    "scheduler": {"sched": "multistep", "decay_milestones": [1000]},
}


def plain_copy(trainer: PrivateTrainer) -> nn.Module:
    plain = create_model(trainer.recipe, len(trainer.class_names)).train()
    plain.load_state_dict(trainer.network.state_dict())
    return plain


def gather(trainer: PrivateTrainer, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    zeros = np.zeros(len(indices), int)
    return trainer.images.gather(np.asarray(indices), zeros, zeros, zeros.astype(bool))


def gradient_of(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    network.zero_grad()
    nn.functional.cross_entropy(network(x[None]), y[None]).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


# Accounting


def test_the_run_takes_the_steps_that_it_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noises: list[int]
) -> None:
    stated = trained(tmp_path, monkeypatch).privacy
    assert stated is not None
    assert len(noises) == stated.steps == STEPS
    assert stated.sample_rate == stated.normalizer / stated.images == 0.5
    assert 7.98 <= stated.epsilon <= 8.0 < stated.epsilon_rdp


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for every time that noise was added."""
    calls: list[int] = []
    add_noise = private.SystemNoiseOptimizer.add_noise

    def counted(self: private.SystemNoiseOptimizer) -> None:
        calls.append(1)
        add_noise(self)

    monkeypatch.setattr(private.SystemNoiseOptimizer, "add_noise", counted)
    return calls


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "epsilon", "delta"),
    [(50_000, 2000, 50, 8.0, 1e-5), (50_000, 2000, 50, 3.0, 1e-5), (120, 60, 3, 8.0, 1e-4)],
)
def test_epsilon_agrees_with_another_library(
    count: int, batch: int, epochs: int, epsilon: float, delta: float
) -> None:
    dp_accounting = pytest.importorskip("dp_accounting", reason="pip install dp-accounting")
    from dp_accounting.pld import PLDAccountant

    rate, steps = batch / count, epochs * round(count / batch)
    sigma = private.get_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=delta,
        sample_rate=rate,
        steps=steps,
        accountant="prv",
    )
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    other = PLDAccountant().compose(step, steps).get_epsilon(delta)
    ours = accounting.spent_epsilon("prv", sigma, rate, steps, delta)
    assert other <= ours + 1e-3 and other == pytest.approx(ours, abs=0.03)
    assert ours <= epsilon


GUARANTEE = Privacy(
    epsilon=7.995,
    delta=1e-5,
    epsilon_rdp=8.7,
    accountant="PRV",
    unit="one image",
    images=50_000,
    noise_multiplier=1.1041259765625,
    sample_rate=0.04,
    steps=1250,
    max_grad_norm=1.0,
    normalizer=2000,
    sampling="Poisson",
    generator="os.urandom",
    released="final weights",
    earlier_runs=0,
    public_data="none",
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epsilon": 7.99}, "epsilon by prv: the steps spent 7.9950, the manifest says 7.9900"),
        ({"epsilon_rdp": 8.6}, "epsilon by rdp: the steps spent 8.7000, the manifest says 8.6000"),
        ({"steps": 1300}, "epsilon by prv"),
        ({"sample_rate": 0.041}, "epsilon by prv"),
        ({"noise_multiplier": 1.09}, "epsilon by prv"),
        ({"delta": 1e-6}, "epsilon by prv"),
    ],
)
def test_a_checkpoint_that_understates_epsilon_is_refused(
    change: dict[str, Any], words: str
) -> None:
    assert accounting.understated(GUARANTEE) == []
    assert words in accounting.understated(replace(GUARANTEE, **change))[0]


def test_verify_recomputes_epsilon_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = next(iter(manifest.load().values()))
    honest, dishonest = (
        replace(checkpoint, privacy=replace(GUARANTEE, epsilon=epsilon)) for epsilon in (8.0, 1.0)
    )
    settings = Settings(data_dir=Path("/nonexistent"))
    result = verify(honest, settings)
    assert "epsilon" in result.checked and not any("epsilon" in r for r in result.reasons)
    result = verify(dishonest, settings)
    assert result.status == "mismatch" and "the manifest says 1.0000" in result.reasons[0]
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    result = verify(honest, settings)
    assert "epsilon" not in result.checked
    assert any("epsilon was not recomputed" in line for line in notes(result))


def test_the_guarantee_is_in_manifest_card_and_info(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = trained(tmp_path, monkeypatch)
    assert Checkpoint.from_json(json.loads(json.dumps(checkpoint.to_json()))) == checkpoint
    text = (tmp_path / "run" / "bundle" / "README.md").read_text()
    assert "## Differential privacy" in text and "train_private.py" in text
    for value in asdict(checkpoint.privacy).values():  # type: ignore[arg-type]
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        assert shown.rstrip("0").rstrip(".") in text.replace(",", "") or str(value) in text
    assert "delta 0.0001" in cli.describe_checkpoint(checkpoint)["privacy"]
    assert "privacy" not in cli.describe_checkpoint(replace(checkpoint, privacy=None))


# Secrecy


def test_nothing_secret_is_published_or_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes: list[int] = []
    accumulate = PrivateTrainer.accumulate

    def watched(self: PrivateTrainer, indices: Sequence[int]) -> None:
        sizes.append(len(indices))
        accumulate(self, indices)

    monkeypatch.setattr(PrivateTrainer, "accumulate", watched)
    checkpoint = trained(tmp_path, monkeypatch)
    folder = tmp_path / "run"
    assert sizes and not list(folder.rglob("events.*"))
    header = (folder / "train_log.csv").read_text().splitlines()[0]
    assert header == "epoch,steps,epsilon,top1,top5,lr"
    files = sorted(path.name for path in (folder / "bundle").iterdir())
    assert files == sorted(bundle.FILES)
    recipe = yaml.safe_load((folder / "bundle" / "recipe.yaml").read_text())
    assert Recipe(**recipe) == Recipe.read(tmp_path / "recipe.yaml")
    keys = load_file(folder / "bundle" / manifest.WEIGHTS_FILE).keys()
    assert keys == create_model(Recipe(**recipe), 10).state_dict().keys()
    with np.load(folder / "bundle" / "predictions.npz") as arrays:
        assert len(arrays["targets"]) == checkpoint.dataset.images == 596  # test images only
    words = r"\bloss|grad_norm:|random_state|generator_state|get_rng_state|hours"
    for path in (folder / "bundle").iterdir():
        if path.suffix in (".md", ".json", ".csv", ".txt"):
            assert not re.search(words, path.read_text()), path
    assert not re.search(r"\bloss", "".join(capfd.readouterr()))


def test_the_training_state_has_no_generator_and_belongs_to_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, monkeypatch)
    path = tmp_path / "run" / private.STATE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    state = torch.load(path, weights_only=True)
    assert state.keys() == {"network", "optimizer", "ema", "progress"}
    assert state["progress"].keys() == {"noise_multiplier", "steps", "seconds", "rows"}
    assert not any(tensor.dtype == torch.uint8 for tensor in state["network"].values())


def test_two_runs_of_a_recipe_differ(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trainer = make_trainer(tmp_path / name)
        initial = flat(trainer.network.state_dict()).clone()
        next(trainer.steps())
        weights.append((initial, flat(trainer.network.state_dict()).clone()))
    assert torch.equal(weights[0][0], weights[1][0])  # the recipe's seed
    assert (weights[0][1] - weights[1][1]).abs().min() > 0


# Resuming


def test_an_interrupted_run_resumes_and_takes_every_step_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    noises: list[int],
) -> None:
    def stop(self: PrivateTrainer) -> None:
        if self.progress.steps == 3 and len(noises) == 3:
            interrupt()

    after_steps(monkeypatch, stop)
    arguments = (
        write_recipe(tmp_path / "recipe.yaml", ema_decay=0.9),
        "--output",
        tmp_path / "run",
    )
    assert run(*arguments) == 130
    assert "SIGINT after 3 of 6 steps; rerun the same command" in capfd.readouterr().err
    state = torch.load(tmp_path / "run" / private.STATE, weights_only=True)
    trainer = make_trainer(tmp_path / "run", ema_decay=0.9)
    assert trainer.progress.steps == 3 and trainer.ema is not None
    assert torch.equal(flat(trainer.ema.module.state_dict()), flat(state["ema"]))
    assert trainer.optimizer.param_groups[0]["lr"] == 0.25  # timm's milestones are one update early
    assert run(*arguments) == 0
    assert len(noises) == STEPS
    log = (tmp_path / "run" / "train_log.csv").read_text().splitlines()
    assert len(log) == 4 and log[-1].startswith("3,6,")
    assert run(*arguments) == 0 and len(noises) == STEPS  # nothing is left to do


def test_the_time_limit_and_a_damaged_state_end_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = (write_recipe(tmp_path / "recipe.yaml"), "--output", tmp_path / "run")
    assert run(*arguments, "--minutes", "0") == 75
    assert "time limit reached after 1 of 6 steps" in capfd.readouterr().err
    path = tmp_path / "run" / private.STATE
    path.write_bytes(path.read_bytes()[:1000])
    assert run(*arguments) == 2
    assert "another run on the private images" in capfd.readouterr().err


def test_the_network_is_an_ordinary_one_after_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    layers = [m for m in trainer.network.modules() if isinstance(m, KNConv2d)]
    assert layers and {type(layer) for layer in layers} == {KNConv2d}
    assert not any(m._forward_hooks or m._backward_hooks for m in trainer.network.modules())


def test_an_empty_batch_is_a_step_of_noise(tmp_path: Path, noises: list[int]) -> None:
    trainer = make_trainer(tmp_path)
    trainer.sample_rate = 1e-12
    assert list(trainer.steps()) == [1, 2, 3, 4, 5, 6] and len(noises) == 6
    assert flat(trainer.network.state_dict()).isfinite().all()


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixup": {"mixup_alpha": 0.2}}, "excludes mixup: a mixed image belongs to two gradients"),
        ({"held_out": 0.1}, "excludes held_out"),
        ({"mixed_precision": "bf16"}, "excludes mixed_precision"),
        ({"compile": True}, "excludes compile"),
        ({"repeated_augmentation": 2}, "excludes repeated_augmentation"),
        ({"accumulation": 2}, "set privacy.physical_batch_size instead"),
        ({"updates": 3}, "excludes updates"),
        ({"on_device": False}, "set on_device: true"),
        ({"batch_size": 121}, "batch_size 121 exceeds the 120 images"),
        ({"privacy": None}, "use train_scripts/train.py"),
        ({"privacy": {"epsilon": 8, "delta": "1e-5", "max_grad_norm": 1}}, "YAML reads 1.0e-5"),
        ({"privacy": {"epsilon": 0, "delta": 0.1, "max_grad_norm": 1}}, "number above 0"),
        (
            {"name": "preactresnet20_cifar.x", "model_args": {"norm": "batch"}},
            "kernel-normalized network, or set model_args: {norm: group}",
        ),
        (
            {"name": "resnet18_cifar.x", "model_args": {"norm": "group"}},
            "timm's ResNet, which adds in place: use a preactresnet",
        ),
    ],
)
def test_settings_that_void_the_guarantee_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", **changes)
    assert run(recipe, "--output", tmp_path / "run") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


def test_the_ordinary_trainer_refuses_a_private_recipe(tmp_path: Path) -> None:
    recipe = Recipe.read(write_recipe(tmp_path / "recipe.yaml"))
    with pytest.raises(UserError, match=r"train_private\.py"):
        Trainer(recipe, tmp_path, DataConfig(), RunConfig())


# From data to bundle


def test_imagenet32_is_trained_end_to_end(tmp_path: Path, noises: list[int]) -> None:
    (tmp_path / "imagenet32").mkdir()
    write_miniature(tmp_path / "imagenet32")
    changes: dict[str, Any] = yaml.safe_load(
        (ROOT / "train_scripts/recipes/private.yaml").read_text()
    )
    variant = changes.pop("variants")["knresnet18_cifar.imagenet32_dp8"]
    del variant["lr"], changes["model_args"]
    recipe = write_recipe(
        tmp_path / "recipe.yaml", **changes | variant | {"batch_size": 15, "epochs": 1}
    )
    assert run(recipe, "--output", tmp_path / "run", "--data-dir", tmp_path) == 0
    assert len(noises) == 2
    with np.load(tmp_path / "run" / "bundle" / "predictions.npz") as arrays:
        assert len(arrays["targets"]) == 3


def test_published_recipes_state_the_noise_in_their_comments() -> None:
    for path, names in (
        ("private_small.yaml", ("cifar10_dp8", "cifar10_dp3")),
        ("private.yaml", ("cifar10_dp6",)),
    ):
        text = (ROOT / "train_scripts/recipes" / path).read_text()
        recipes = (
            Recipe.read(ROOT / "train_scripts/recipes" / path, v)
            for v in variant_names(ROOT / "train_scripts/recipes" / path)
        )
        for recipe in recipes:
            if recipe.name.partition(".")[2] not in names or recipe.privacy is None:
                continue
            steps = recipe.epochs * round(50_000 / recipe.batch_size)
            sigma = private.get_noise_multiplier(
                target_epsilon=recipe.privacy.epsilon,
                target_delta=recipe.privacy.delta,
                sample_rate=recipe.batch_size / 50_000,
                steps=steps,
                accountant="prv",
            )
            assert f"{sigma:.3f}" in text


# Audit


def test_an_audit_stays_below_epsilon_and_finds_missing_noise(tmp_path: Path) -> None:
    """Distinguish runs with and without one image by how far they moved along its gradient."""
    epsilon, delta = 1.0, 1e-2
    privacy = {"epsilon": epsilon, "delta": delta, "max_grad_norm": 0.1}
    trainer = make_trainer(
        tmp_path,
        **DETERMINISTIC,
        train_split="train[:16]",
        batch_size=8,
        epochs=2,
        optimizer={"opt": "momentum", "lr": 0.01, "momentum": 0.0},
        privacy=privacy,
    )
    stated = trainer.optimizer.noise_multiplier
    assert audited(trainer, 100, delta) < epsilon
    trainer.optimizer.noise_multiplier = stated / 100
    assert audited(trainer, 100, delta) > epsilon


def audited(trainer: PrivateTrainer, runs: int, delta: float) -> float:
    """Return a lower bound of epsilon at confidence 99.8 % from `runs` runs with the last image,
    and as many without it."""
    initial = copy.deepcopy(trainer.network.state_dict())
    canary = trainer.count - 1
    pixels, targets = gather(trainer, range(trainer.count))
    plain = plain_copy(trainer)
    gradients = [gradient_of(plain, x, y) for x, y in zip(pixels, targets, strict=True)]
    others = torch.linalg.qr(torch.stack(gradients[:-1]).T)[0]  # (parameters, images - 1)
    direction = others @ (others.T @ gradients[-1]) - gradients[-1]  # of the last image alone

    def score(included: bool) -> float:
        trainer.network.load_state_dict(initial)
        trainer.progress.steps = 0
        trainer.accumulate = lambda indices: PrivateTrainer.accumulate(  # type: ignore[method-assign]
            trainer, [i for i in indices if included or i != canary]
        )
        assert list(trainer.steps())[-1] == trainer.total_steps
        return float((flat(trainer.network.state_dict()) - flat(initial)) @ direction)

    with_canary, without = ([score(included) for _ in range(runs)] for included in (True, False))
    trainer.network.load_state_dict(initial)
    half = runs // 2
    threshold = max(
        with_canary[:half] + without[:half],
        key=lambda t: lower_bound(with_canary[:half], without[:half], t, delta),
    )
    return lower_bound(with_canary[half:], without[half:], threshold, delta)


def lower_bound(
    positive: list[float], negative: list[float], threshold: float, delta: float
) -> float:
    """Return a bound of epsilon from Clopper-Pearson bounds of both rates, each at 99.9 %."""
    n = len(positive)
    hits, alarms = (sum(s > threshold for s in scores) for scores in (positive, negative))
    hit_rate = beta.ppf(1e-3, hits, n - hits + 1) if hits else 0.0
    alarm_rate = beta.ppf(1 - 1e-3, alarms + 1, n - alarms) if alarms < n else 1.0
    return math.log(max(hit_rate - delta, 1e-9) / alarm_rate)
