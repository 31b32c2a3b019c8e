"""Differentially private training of a recipe with a `privacy` section, by Opacus' DP-SGD.

Poisson sampling, clipping and accounting are Opacus'. The noise is made from the operating system's
random bytes, and the operating system seeds the sampling; the recipe's `seed` decides the initial
weights alone. What readers of the published files must not learn is neither logged nor bundled:
training losses, gradient norms, sizes of batches, states of generators. The training state in the
run folder holds weights and the optimizer and stays on the private machine.
"""

import io
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _mark_as_processed
from opacus.utils.batch_memory_manager import BatchMemoryManager
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import kn_zoo.privacy  # registers the layers with Opacus
from kn_zoo.checkpoints.files import write_bytes
from kn_zoo.checkpoints.manifest import Privacy
from kn_zoo.checkpoints.predictions import Predictions
from kn_zoo.evaluation.predict import eval_transform, predict
from kn_zoo.training import data
from kn_zoo.training.batches import DeviceBatches, Shard
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import PrivacyConfig, Recipe, UserError, recipe_settings
from kn_zoo.training.trainer import (
    LOG,
    Interrupted,
    RunConfig,
    console,
    create_model,
    defer_signals,
    write_csv,
)

ACCOUNTANT, SECOND_ACCOUNTANT = "prv", "rdp"
STATE = "private_state.pt"


class SystemNoiseOptimizer(DPOptimizer):
    """Opacus' optimizer with Gaussian noise from the operating system's random bytes."""

    def add_noise(self) -> None:
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            noise = std * system_normal(p.summed_grad.numel()).to(p.summed_grad)
            p.grad = (p.summed_grad.flatten() + noise).view_as(p)
            _mark_as_processed(p.summed_grad)


def system_normal(count: int) -> Tensor:
    """Return `count` standard normal numbers (float64), by Box and Muller from `os.urandom`."""
    pairs = -(-count // 2)
    bits = np.frombuffer(os.urandom(16 * pairs), np.uint64) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    numbers = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy(numbers[:count])


@dataclass
class RunProgress:
    """Progress of a private run, part of its training state."""

    steps: int = 0  # executed by the optimizer, each with noise
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)  # log of the finished epochs


class PrivateTrainer:
    """The network of a recipe in DP-SGD, resumable in `folder`.

    Raises UserError for settings that void the stated guarantee.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, data_config: DataConfig, run_config: RunConfig
    ) -> None:
        self.recipe, self.folder, self.run_config = recipe, folder, run_config
        self.privacy = checked_privacy(recipe)
        torch.manual_seed(recipe.seed)
        images = data.load_training(recipe, data_config)
        self.test_set = data.load(recipe.dataset, recipe.eval_split, data_config)
        self.class_names = data.class_names(self.test_set, recipe)
        self.network = create_model(recipe, len(self.class_names)).train()
        self.test_set.transform = eval_transform(self.network)
        self.images = DeviceBatches(recipe, images, torch.device("cpu"), Shard())
        torch.seed()  # augmentation and dropout masks do not follow from the recipe
        self.progress, self.ema = RunProgress(), None
        if recipe.ema_decay is not None:
            warmup = recipe.ema_warmup
            self.ema = ModelEmaV3(self.network, decay=recipe.ema_decay, use_warmup=warmup)
        self.evaluated = self.network if self.ema is None else self.ema.module
        self.images_count = len(images)
        self.prepare()

    def prepare(self) -> None:
        """Hand network, optimizer and sampling to Opacus; the noise follows from the budget."""
        recipe, privacy = self.recipe, self.privacy
        self.steps_per_epoch = self.images_count // recipe.batch_size
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.noise_multiplier = get_noise_multiplier(
            target_epsilon=privacy.epsilon,
            target_delta=privacy.delta,
            sample_rate=1 / self.steps_per_epoch,
            steps=self.total_steps,
            accountant=ACCOUNTANT,
        )
        sampling = torch.Generator()
        sampling.seed()  # by the operating system
        indices = TensorDataset(torch.arange(self.images_count))
        loader = DataLoader(indices, recipe.batch_size, drop_last=True, generator=sampling)
        with recipe_settings("optimizer"):
            optimizer = create_optimizer_v2(self.network, **recipe.optimizer)
        with recipe_settings("scheduler"):
            self.scheduler, _ = create_scheduler_v2(
                optimizer,
                num_epochs=recipe.epochs,
                updates_per_epoch=self.steps_per_epoch,
                **({"step_on_epochs": False} | recipe.scheduler),
            )
        self.engine = PrivacyEngine(accountant=ACCOUNTANT)
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=self.network,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
        )
        self.optimizer.__class__ = SystemNoiseOptimizer
        self.sample_rate = self.loader.sample_rate
        if self.loader.batch_sampler.steps != self.steps_per_epoch:  # int(1 / (1 / n)) may be n - 1
            raise UserError(
                f"batch_size {recipe.batch_size} of {self.images_count} images is sampled "
                f"{self.loader.batch_sampler.steps} instead of {self.steps_per_epoch} times an "
                "epoch: choose another batch_size"
            )

    def train(self) -> None:
        """Resume from the training state, if there is one, and train to the recipe's end.

        Raises Interrupted after a signal or `run_config.minutes`.
        """
        self.restore()
        self.saved_at = time.monotonic()
        with progress_bar() as bar, defer_signals() as self.signals:
            task = bar.add_task(self.recipe.name, total=self.total_steps, epsilon=0.0)
            while self.progress.steps < self.total_steps:
                self.train_steps(lambda: bar.update(task, **self.status()))
        self.save()

    def train_steps(self, report: Callable[[], None]) -> None:
        """Train on one pass of the sampler: as many batches as an epoch has, or what is left."""
        start = time.perf_counter()
        with BatchMemoryManager(
            data_loader=self.loader,
            max_physical_batch_size=self.privacy.physical_batch_size,
            optimizer=self.optimizer,
        ) as loader:
            for (indices,) in loader:
                self.accumulate(indices)
                if self.optimizer._is_last_step_skipped:
                    continue
                now = time.perf_counter()
                self.progress.seconds += now - start
                start = now
                self.after_step()
                report()
                if self.progress.steps == self.total_steps:
                    return

    def accumulate(self, indices: Tensor) -> None:
        """Clip and add the gradients of a part of a batch; its last part makes the step."""
        crops = self.images.draw(np.random.default_rng(), len(indices))  # seeded by the system
        pixels, targets = self.images.gather(indices.numpy(), *crops)
        logits = self.model(pixels)
        # Opacus multiplies by the number of images; a mean over none would be NaN.
        loss = F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def after_step(self) -> None:
        """Advance the schedule and the average, log a finished epoch, save, stop if asked to."""
        progress = self.progress
        progress.steps += 1
        self.scheduler.step_update(progress.steps)
        if self.ema is not None:
            self.ema.update(self.network, progress.steps)
        if progress.steps % self.steps_per_epoch == 0:
            self.end_epoch()
        late = time.monotonic() - self.saved_at > 60 * self.run_config.save_minutes
        stop = bool(self.signals) or self.run_config.time_is_up()
        if late or stop:
            self.save()
        if stop:
            status = 128 + self.signals[0] if self.signals else 75
            raise Interrupted(
                f"stopped after {progress.steps} of {self.total_steps} steps; rerun the same "
                "command to resume",
                status,
            )

    def end_epoch(self) -> None:
        """Log what may be published: the budget spent and the learning rate."""
        epoch = self.progress.steps // self.steps_per_epoch
        lr = self.optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch, "steps": self.progress.steps, "epsilon": self.spent(), "lr": lr}
        self.progress.rows.append(row)
        write_csv(self.folder / LOG, self.progress.rows)
        self.log("  ".join(f"{key} {value:.5g}" for key, value in row.items()))

    def spent(self, accountant: str = ACCOUNTANT) -> float:
        """Return epsilon of the steps so far."""
        steps = self.progress.steps
        if steps == 0:
            return 0.0
        return spent_epsilon(
            accountant, self.noise_multiplier, self.sample_rate, steps, self.privacy.delta
        )

    def status(self) -> dict[str, Any]:
        """Return what the progress bar shows; epsilon is that of the last finished epoch."""
        epsilon = self.progress.rows[-1]["epsilon"] if self.progress.rows else 0.0
        return {"completed": self.progress.steps, "epsilon": epsilon}

    def save(self) -> None:
        """Write the training state, readable by its owner alone."""
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
        """Load the training state, if there is one."""
        path = self.folder / STATE
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.original_optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.progress = RunProgress(**state["progress"])
        self.scheduler.step_update(self.progress.steps)
        self.log(f"resumed after {self.progress.steps} of {self.total_steps} steps")

    def evaluate(self, dataset: Any, progress: str | None = None) -> Predictions:
        """Return the predictions of the network, or of its average, under its own statistics."""
        return predict(kn_zoo.privacy.restore(self.evaluated), dataset, progress=progress)

    def record(self) -> Privacy:
        """Return what a published checkpoint states about its privacy."""
        privacy = self.privacy
        return Privacy(
            epsilon=self.spent(),
            delta=privacy.delta,
            adjacency="add or remove one image with its label",
            images=self.images_count,
            accountant=f"{ACCOUNTANT}, opacus {version('opacus')}",
            epsilon_rdp=self.spent(SECOND_ACCOUNTANT),
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.progress.steps,
            max_grad_norm=privacy.max_grad_norm,
            normalizer=self.optimizer.expected_batch_size,
            sampling="Poisson",
            generator="noise from os.urandom (Box-Muller, float64); sampling by torch's Mersenne "
            "Twister, seeded by the operating system, not cryptographically secure",
            earlier_runs=privacy.earlier_runs,
            public_data=privacy.public_data,
        )

    def log(self, text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)


def spent_epsilon(
    accountant: str, noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> float:
    """Return epsilon of `steps` subsampled Gaussian mechanisms by one of Opacus' accountants."""
    counted = create_accountant(accountant)
    counted.history = [(noise_multiplier, sample_rate, steps)]
    return float(counted.get_epsilon(delta))


def checked_privacy(recipe: Recipe) -> PrivacyConfig:
    """Return the recipe's `privacy` section; raises UserError for what would void it."""
    if recipe.privacy is None:
        raise UserError("the recipe has no `privacy` section: use train_scripts/train.py")
    refused = {
        "mixup": (recipe.mixup, "mixed images belong to two gradients"),
        "held_out": (recipe.held_out, "accuracy on held-out private images is not accounted for"),
        "repeated_augmentation": (recipe.repeated_augmentation > 1, "an image counts once"),
        "mixed_precision": (recipe.mixed_precision != "no", "per-sample gradients are float32"),
        "compile": (recipe.compile, "Opacus' hooks run eagerly"),
        "accumulation": (recipe.accumulation > 1, "set privacy.physical_batch_size instead"),
        "updates": (recipe.updates, "the noise is computed for the whole run"),
    }
    for name, (given, reason) in refused.items():
        if given:
            raise UserError(f"private training takes no {name}: leave it out ({reason})")
    if not recipe.on_device:
        raise UserError("private training keeps the images in memory: set on_device: true")
    return recipe.privacy


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("epsilon {task.fields[epsilon]:.2f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
