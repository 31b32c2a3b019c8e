"""Differentially private training of a recipe with a `privacy` section, by DP-SGD.

Per-sample gradients, clipping and accounting are Opacus'. The guarantee rests on two random
choices, the images of each step and the noise. Both are made from the operating system's random
bytes, so no seed exists that could leak; the recipe's `seed` determines the initial weights only.

Losses, norms of gradients and sizes of batches are not covered by the guarantee: they are neither
logged nor published. The training state holds what the guarantee covers (weights, their average,
the optimizer), contains no generator, and is readable by its owner only.
"""

import io
import math
import os
import pickle
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from opacus import GradSampleModule
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchSplittingSampler
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from timm.models.resnet import ResNet
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from kn_zoo import privacy  # registers the layers with Opacus
from kn_zoo.checkpoints.files import first_line, write_bytes
from kn_zoo.checkpoints.manifest import Privacy
from kn_zoo.checkpoints.predictions import Predictions
from kn_zoo.evaluation.accounting import spent_epsilon
from kn_zoo.evaluation.predict import eval_transform, predict
from kn_zoo.training import data, report
from kn_zoo.training.batches import DeviceBatches, Shard, resize
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import PrivacyConfig, Recipe, UserError, recipe_settings
from kn_zoo.training.resume import prepare_run_dir
from kn_zoo.training.trainer import (
    LOG,
    Interrupted,
    RunConfig,
    console,
    create_model,
    defer_signals,
    memory_format,
    progress_bar,
    write_csv,
)

STATE = "private_state.pt"


def train_private(
    recipe: Recipe,
    recipe_path: Path,
    folder: Path,
    data_config: DataConfig,
    run_config: RunConfig,
    in_package: bool,
) -> None:
    """Train a private recipe once, evaluate it, and write its bundle with its guarantee."""
    check_recipe(recipe)
    prepare_run_dir(folder, recipe)
    trainer = PrivateTrainer(recipe, folder, data_config, run_config)
    trainer.train()
    dtype, predictions = report.write_result(trainer)
    runs, target = [report.read_result(folder)], None if in_package else folder / "bundle"
    guarantee = trainer.guarantee()
    report.write_bundle(trainer, recipe_path, runs, dtype, predictions, target, guarantee)


class PoissonSampler(UniformWithReplacementSampler):
    """Opacus' Poisson sampling, with the operating system's random bytes."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield np.flatnonzero(system_uniform(self.num_samples) < self.sample_rate).tolist()


class SystemNoiseOptimizer(DPOptimizer):
    """Opacus' optimizer, with Gaussian noise from the operating system's random bytes."""

    def add_noise(self) -> None:
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            noise = std * system_normal(p.numel()).view_as(p)
            p.grad = p.summed_grad.view_as(p) + noise.to(p)


def system_uniform(count: int) -> np.ndarray:
    """Return `count` float64 numbers, uniform in (0, 1], from `os.urandom`."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(11)
    return (bits + 0.5) * 2.0**-53


def system_normal(count: int) -> Tensor:
    """Return `count` float64 standard normal numbers from `os.urandom`, by Box and Muller."""
    uniform = system_uniform(2 * -(-count // 2)).reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return torch.from_numpy(
        np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    )


@dataclass
class PrivateProgress:
    """Progress of a private run, part of its training state."""

    noise_multiplier: float | None = None  # computed once, before the first step
    steps: int = 0  # taken by the optimizer, each with noise
    seconds: float = 0.0  # spent in steps
    rows: list[dict[str, float]] = field(default_factory=list)  # log of the finished epochs


class PrivateTrainer:
    """The network of a recipe in DP-SGD, resumable in `folder`.

    A step takes each image with probability batch_size / images, and divides the noisy sum of the
    clipped gradients by batch_size. An epoch has images / batch_size steps, rounded.

    Raises UserError for settings that would void the guarantee.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, data_config: DataConfig, run_config: RunConfig
    ) -> None:
        self.recipe, self.folder, self.run_config = recipe, folder, run_config
        self.config = check_recipe(recipe)
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        if self.accelerator.num_processes > 1:
            raise UserError("private training runs in one process: start it without a launcher")
        set_seed(recipe.seed)
        images = data.load_training(recipe, data_config)
        test_set = data.load(recipe.dataset, recipe.eval_split, data_config)
        self.class_names = data.class_names(test_set, recipe)
        self.network = create_model(recipe, len(self.class_names)).to(self.accelerator.device)
        test_set.transform = eval_transform(self.network)
        self.test_set = data.InMemory(test_set)
        self.images = DeviceBatches(recipe, images, self.accelerator.device, Shard())
        self.count = len(images)
        if recipe.batch_size > self.count:
            raise UserError(f"batch_size {recipe.batch_size} exceeds the {self.count} images")
        self.sample_rate = recipe.batch_size / self.count
        self.steps_per_epoch = round(self.count / recipe.batch_size)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.random = np.random.default_rng()  # augmentation; seeded by the operating system
        torch.seed()  # dropout masks
        self.prepare()
        self.restore()

    def prepare(self) -> None:
        """Create optimizer, schedule and average, and register the network with Opacus."""
        recipe, self.progress, self.ema = self.recipe, PrivateProgress(), None
        if recipe.ema_decay is not None:  # a copy, before the network gets Opacus' hooks
            decay, warmup = recipe.ema_decay, recipe.ema_warmup
            self.ema = ModelEmaV3(self.network, decay=decay, use_warmup=warmup)
        self.evaluated = self.network if self.ema is None else self.ema.module
        with recipe_settings("optimizer"):
            optimizer = create_optimizer_v2(self.network, **recipe.optimizer)
        with recipe_settings("scheduler"):
            self.scheduler, _ = create_scheduler_v2(
                optimizer,
                num_epochs=recipe.epochs,
                updates_per_epoch=self.steps_per_epoch,
                **({"step_on_epochs": False} | recipe.scheduler),
            )
        self.model = with_sample_gradients(self.network.train())
        self.optimizer = SystemNoiseOptimizer(
            optimizer,
            noise_multiplier=math.nan,  # set by `restore`
            max_grad_norm=self.config.max_grad_norm,
            expected_batch_size=recipe.batch_size,
        )

    def train(self) -> None:
        """Train to the recipe's end, and turn the network back into an ordinary one.

        Raises Interrupted after a signal or `run_config.minutes`.
        """
        self.saved_at = time.monotonic()
        columns = "epsilon {task.fields[epsilon]:.2f}"
        with progress_bar(columns) as bar, defer_signals() as signals, expected_warnings():
            task = bar.add_task(self.recipe.name, total=self.total_steps, epsilon=0.0)
            for step in self.steps():
                if step % self.steps_per_epoch == 0:
                    self.end_epoch()
                bar.update(task, completed=step, epsilon=self.logged_epsilon)
                self.after_step(signals)
        self.save()
        self.model.to_standard_module()
        privacy.restore(self.network)

    def steps(self) -> Iterator[int]:
        """Take the remaining steps; yields their total number after each."""
        progress = self.progress
        sampler = PoissonSampler(
            num_samples=self.count,
            sample_rate=self.sample_rate,
            steps=self.total_steps - progress.steps,
        )
        parts = BatchSplittingSampler(
            sampler=sampler,
            max_batch_size=self.config.physical_batch_size,
            optimizer=self.optimizer,
        )
        for indices in parts:
            start = time.perf_counter()
            self.accumulate(indices)
            progress.seconds += time.perf_counter() - start
            if self.optimizer._is_last_step_skipped:
                continue
            progress.steps += 1
            self.scheduler.step_update(progress.steps)
            if self.ema is not None:
                self.ema.update(self.network, progress.steps)
            yield progress.steps

    def accumulate(self, indices: Sequence[int]) -> None:
        """Add the clipped gradients of a part of a batch; after its last part, take the step."""
        crops = self.images.draw(self.random, len(indices))
        pixels, targets = self.images.gather(np.asarray(indices, int), *crops)
        side = self.recipe.resolution(1 + self.progress.steps // self.steps_per_epoch)
        pixels = resize(pixels, side)
        logits = self.model(pixels.to(memory_format=memory_format(self.recipe)))
        smoothing = self.recipe.label_smoothing
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def end_epoch(self) -> None:
        """Evaluate, and append what may be published to the log."""
        accuracy = self.evaluate(self.test_set)
        row = {
            "epoch": self.progress.steps // self.steps_per_epoch,
            "steps": self.progress.steps,
            "epsilon": self.spent("prv"),
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.progress.rows.append(row)
        write_csv(self.folder / LOG, self.progress.rows, float_format=".6g")
        self.log("  ".join(f"{k} {v:.5g}" for k, v in row.items()))

    def after_step(self, signals: Sequence[int]) -> None:
        """Save the training state if due, and stop if requested."""
        stop = bool(signals) or self.run_config.time_is_up()
        if stop or time.monotonic() - self.saved_at > 60 * self.run_config.save_minutes:
            self.save()
        if stop:
            raise Interrupted.by(signals, f"{self.progress.steps} of {self.total_steps} steps")

    @property
    def logged_epsilon(self) -> float:
        return self.progress.rows[-1]["epsilon"] if self.progress.rows else 0.0

    def spent(self, accountant: str) -> float:
        """Return epsilon of the steps so far, rounded up to four decimals."""
        sigma, steps = self.optimizer.noise_multiplier, self.progress.steps
        epsilon = spent_epsilon(accountant, sigma, self.sample_rate, steps, self.config.delta)
        return math.ceil(1e4 * epsilon) / 1e4

    def save(self) -> None:
        """Write the training state, readable by its owner only."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.original_optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "progress": asdict(self.progress),
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_bytes(self.folder / STATE, content.getvalue(), mode=0o600)
        self.saved_at = time.monotonic()

    def restore(self) -> None:
        """Load the training state, or else compute the noise that the budget requires."""
        path = self.folder / STATE
        if path.exists():
            try:
                self.load(torch.load(path, map_location="cpu", weights_only=True))
            except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError) as error:
                raise UserError(
                    f"{path} is damaged ({first_line(error)}): restore it from a copy, or remove "
                    "it to start again, which is another run on the private images"
                ) from None
            self.log(f"resumed after {self.progress.steps} of {self.total_steps} steps")
        else:
            with recipe_settings("privacy"), expected_warnings():
                self.progress.noise_multiplier = get_noise_multiplier(
                    target_epsilon=self.config.epsilon,
                    target_delta=self.config.delta,
                    sample_rate=self.sample_rate,
                    steps=self.total_steps,
                    accountant="prv",
                )
        self.optimizer.noise_multiplier = self.progress.noise_multiplier

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.original_optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.progress = PrivateProgress(**state["progress"])
        self.scheduler.step_update(self.progress.steps)

    def evaluate(self, dataset: Any, progress: str | None = None) -> Predictions:
        """Predict every image once."""
        return predict(self.evaluated, dataset, device=self.accelerator.device, progress=progress)

    def guarantee(self) -> Privacy:
        """Return what the published checkpoint states about its privacy."""
        return Privacy(
            epsilon=self.spent("prv"),
            delta=self.config.delta,
            epsilon_rdp=self.spent("rdp"),
            accountant=f"PRV, Opacus {version('opacus')}",
            unit="one image and its label, added or removed",
            images=self.count,
            noise_multiplier=self.optimizer.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.progress.steps,
            max_grad_norm=self.config.max_grad_norm,
            normalizer=self.recipe.batch_size,
            sampling="Poisson",
            generator="sampling and noise from the operating system (os.urandom); Gaussian noise "
            "by Box-Muller in float64, not hardened against floating-point attacks",
            released="final weights, accuracy after each epoch",
            earlier_runs=self.config.earlier_runs,
            public_data=self.config.public_data,
        )

    def log(self, text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Ignore what PyTorch and Opacus warn of in every private run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # images need no gradient
        warnings.filterwarnings("ignore", "Optimal order is")  # of the search's first guesses
        yield


def with_sample_gradients(network: nn.Module) -> GradSampleModule:
    """Add Opacus' hooks for per-sample gradients of summed losses; raises UserError."""
    if isinstance(network, ResNet):
        raise UserError(
            "Opacus does not support timm's ResNet, which adds in place: use a preactresnet"
        )
    try:
        ModuleValidator.validate(network, strict=True)
        return GradSampleModule(network, loss_reduction="sum")
    except (UnsupportedModuleError, NotImplementedError) as error:
        if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules()):
            raise UserError(
                "private training excludes BatchNorm, which mixes the images of a batch: train a "
                "kernel-normalized network, or set model_args: {norm: group}"
            ) from None
        raise UserError(f"Opacus does not support the network: {first_line(error)}") from None


def check_recipe(recipe: Recipe) -> PrivacyConfig:
    """Return the recipe's `privacy` section; raises UserError for excluded settings."""
    if recipe.privacy is None:
        raise UserError("the recipe has no privacy section: use train_scripts/train.py")
    excluded = {
        "mixup": (recipe.mixup, "a mixed image belongs to two gradients"),
        "held_out": (recipe.held_out, "accuracy on private images is not accounted for"),
        "repeated_augmentation": (recipe.repeated_augmentation > 1, "copies are not accounted for"),
        "mixed_precision": (recipe.mixed_precision != "no", "per-sample gradients are float32"),
        "compile": (recipe.compile, "per-sample gradients come from eager hooks"),
        "winograd": (recipe.winograd, "per-sample gradients come from eager hooks"),
        "accumulation": (recipe.accumulation > 1, "set privacy.physical_batch_size instead"),
        "updates": (recipe.updates, "the noise is computed for the whole run"),
        "scheduler.step_on_epochs": (recipe.scheduler.get("step_on_epochs"), "it steps per update"),
    }
    for name, (value, reason) in excluded.items():
        if value:
            raise UserError(f"private training excludes {name}: {reason}; remove it")
    if not recipe.on_device:
        raise UserError("private training keeps the images in memory: set on_device: true")
    return recipe.privacy
