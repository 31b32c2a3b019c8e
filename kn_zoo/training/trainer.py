"""One training run of a recipe, resumable at any update."""

import csv
import io
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast, gather_object, set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import kn_zoo  # noqa: F401  registers the networks
from kn_zoo.checkpoints import files
from kn_zoo.checkpoints.predictions import Predictions
from kn_zoo.evaluation.predict import eval_transform, exact_float32, predict
from kn_zoo.training import data
from kn_zoo.training.batches import Shard, create_batches, derive_seed, seeded
from kn_zoo.training.data import DataConfig
from kn_zoo.training.muon import orthogonalize_in
from kn_zoo.training.recipe import Recipe, UserError, recipe_settings
from kn_zoo.training.resume import restore_state, save_state
from kn_zoo.training.winograd import WinogradConvolutions

LOG = "train_log.csv"
SYNC_UPDATES = 10  # updates between reads of the loss, each of which waits for the device
console = Console(stderr=True)


@dataclass
class RunConfig:
    """Settings that affect how a run proceeds, but not its result."""

    workers: int = 0  # processes that decode images
    save_minutes: float = 10.0  # time between training states
    minutes: float = math.inf  # time after which the run stops, to be resumed
    start: float = field(default_factory=time.monotonic)

    def time_is_up(self) -> bool:
        return time.monotonic() - self.start > 60 * self.minutes


class Diverged(UserError):
    """The loss is no longer finite."""


class Interrupted(Exception):
    """A signal or the time limit stopped the run; its training state is written.

    `status` is the exit status: 128 + signal, or 75 (EX_TEMPFAIL) for the time limit.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status

    @classmethod
    def by(cls, signals: Sequence[int], done: str) -> "Interrupted":
        """Return the exception for the received signals; without any, for the time limit."""
        number = signals[0] if signals else 0
        reason = signal.Signals(number).name if number else "time limit reached"
        status = 128 + number if number else 75
        return cls(f"{reason} after {done}; rerun the same command to resume", status)


@dataclass
class RunProgress:
    """Progress of a run, part of its training state."""

    updates: int = 0
    seconds: float = 0.0  # spent in updates
    loss: Tensor | None = None  # sum over the updates of the current epoch
    rows: list[dict[str, float]] = field(default_factory=list)  # log of the finished epochs

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Trainer:
    """The network of a recipe with everything that trains and evaluates it.

    Args:
        recipe: settings that determine the result.
        folder: run folder, for training states and logs.
        data_config: where data sets are stored.
        run_config: settings that do not affect the result.
        training_images: by default the recipe's.
        progress_images: images to evaluate each epoch on; by default the recipe's held-out images,
            else its evaluation split.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data_config: DataConfig,
        run_config: RunConfig,
        training_images: Any = None,
        progress_images: Any = None,
    ) -> None:
        if recipe.privacy is not None:
            raise UserError("the recipe has a privacy section: use train_scripts/train_private.py")
        self.recipe, self.folder = recipe, folder
        self.data_config, self.run_config = data_config, run_config
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else CPU processes form no group
            mixed_precision=recipe.mixed_precision,
            log_with="tensorboard",
            project_config=ProjectConfiguration(logging_dir=str(folder)),
        )
        if recipe.mixed_precision == "bf16" and emulates_bfloat16(self.accelerator.device):
            self.log(
                "warning: this CPU has no AVX-512, without which PyTorch convolves bfloat16 slower "
                'than float32: set mixed_precision: "no"'
            )
        shard = Shard(self.accelerator.process_index, self.accelerator.num_processes)
        divisor = shard.processes * recipe.accumulation * (2 if recipe.mixup else 1)  # mixes pairs
        if recipe.batch_size % divisor:
            raise UserError(
                f"batch_size {recipe.batch_size} must be a multiple of {divisor}: "
                "processes x accumulation, x 2 with mixup"
            )
        # Each process draws its own dropout masks; the initial weights are the first one's.
        set_seed(recipe.seed, device_specific=True)
        torch.backends.cudnn.benchmark = True
        with exact_float32():  # sets the defaults explicitly, which a compiled step depends on
            pass
        self.prepare(self.load(shard, training_images, progress_images))

    def load(self, shard: Shard, training_images: Any, progress_images: Any) -> nn.Module:
        """Load the images, create the batches, and return the network."""
        recipe = self.recipe
        train_set = training_images
        if train_set is None:
            train_set = data.load_training(recipe, self.data_config)
        self.test_set = data.load(recipe.dataset, recipe.eval_split, self.data_config)
        self.class_names = data.class_names(self.test_set, recipe)
        network = create_model(recipe, len(self.class_names)).to(self.accelerator.device)
        if training_images is None and recipe.held_out:
            train_set, progress_images = data.split_off(train_set, recipe.held_out)
        self.progress_set = self.test_set if progress_images is None else progress_images
        for images in (self.test_set, self.progress_set):
            images.transform = eval_transform(network)
        self.batches = create_batches(
            recipe,
            train_set,
            network,
            self.data_config,
            self.run_config.workers,
            self.accelerator.device,
            shard,
        )
        if recipe.on_device:  # decoding each epoch would take longer than training
            self.progress_set = data.InMemory(self.progress_set)
        return network

    def prepare(self, network: nn.Module) -> None:
        """Create optimizer, scheduler, average and loss, and pass them to Accelerate."""
        recipe = self.recipe
        self.progress, self.ema = RunProgress(), None
        self.accelerator.register_for_checkpointing(self.progress)
        if recipe.ema_decay is not None:
            self.ema = ModelEmaV3(network, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
            self.accelerator.register_for_checkpointing(self.ema)
        if self.accelerator.device.type == "cpu":
            bfloat16 = recipe.mixed_precision == "bf16" and not emulates_bfloat16(
                self.accelerator.device
            )
            orthogonalize_in(torch.bfloat16 if bfloat16 else torch.float32)
        with recipe_settings("optimizer"):
            optimizer = create_optimizer_v2(network, **recipe.optimizer)
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        # Without Accelerate's autocast wrapper: evaluation is float32, training autocasts itself.
        self.network = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.evaluated = self.network if self.ema is None else self.ema.module
        torch.compiler.reset()  # drops what a previous run compiled
        # Each resolution is compiled separately: a graph for dynamic sizes is slower.
        dynamic = False if recipe.resolutions else None
        self.forward = self.model
        if recipe.compile:
            self.forward = torch.compile(self.model, dynamic=dynamic)
        self.convolutions: AbstractContextManager = nullcontext()
        if recipe.winograd and self.accelerator.device.type == "cpu":
            self.convolutions = WinogradConvolutions()
        self.by_epoch = recipe.scheduler.get("step_on_epochs", False)
        with recipe_settings("scheduler"):
            self.scheduler, _ = create_scheduler_v2(
                self.optimizer,
                num_epochs=recipe.epochs,
                updates_per_epoch=len(self.batches),
                **({"step_on_epochs": False} | recipe.scheduler),
            )
        smoothing, self.mixup = recipe.label_smoothing, None
        if recipe.mixup:
            classes = len(self.class_names)
            with recipe_settings("mixup"):
                self.mixup = Mixup(num_classes=classes, label_smoothing=smoothing, **recipe.mixup)
            smoothing = 0.0
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=smoothing)

    @property
    def updates(self) -> int:
        """Number of updates of the run."""
        total = self.recipe.epochs * len(self.batches)
        return min(self.recipe.updates or total, total)

    def train(self) -> None:
        """Train from the last training state to the end of the recipe.

        Raises Interrupted after a signal or `run_config.minutes`, Diverged.
        """
        if state := restore_state(self.accelerator, self.folder, console):
            self.log(f"resumed from {state}")
        self.accelerator.init_trackers(
            "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.progress.updates}}
        )
        first = self.progress.updates
        self.saved_at = self.synced_at = time.monotonic()
        self.losses: list[Tensor] = []  # since the last sync
        columns = "loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} images/s"
        main = self.accelerator.is_main_process
        with progress_bar(columns, main) as self.bar, defer_signals() as self.signals:
            self.task = self.bar.add_task(
                self.recipe.name, total=self.updates, completed=first, loss=math.nan, rate=0
            )
            while self.progress.updates < self.updates:
                self.train_epoch()
            if self.progress.updates > first:
                self.save()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def train_epoch(self) -> None:
        progress = self.progress
        epoch = len(progress.rows)
        first = epoch * len(self.batches)
        if progress.loss is None:
            progress.loss = torch.zeros((), device=self.accelerator.device)
        self.network.train()
        start = time.perf_counter()
        for pixels, targets in self.batches.epoch(epoch, progress.updates - first):
            if self.mixup is not None:
                with seeded(derive_seed(self.recipe.seed, progress.updates)):
                    pixels, targets = self.mixup(pixels, targets)
            loss = self.update(pixels, targets)
            progress.updates += 1
            progress.loss = progress.loss.to(loss.device) + loss
            self.losses.append(loss)
            if not self.by_epoch:
                self.scheduler.step_update(progress.updates)
            if self.ema is not None:
                self.ema.update(self.network, progress.updates)
            if progress.updates == self.updates:
                break
            now = time.perf_counter()
            progress.seconds, start = progress.seconds + now - start, now
            self.after_update()
        progress.seconds += time.perf_counter() - start
        self.sync_losses()
        self.end_epoch(epoch, progress.updates - first)

    def update(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Take an optimizer step; returns the mean loss of this process's images."""
        pixels = pixels.to(memory_format=memory_format(self.recipe))
        steps = self.recipe.accumulation
        total = torch.zeros((), device=self.accelerator.device)
        for i, (x, y) in enumerate(zip(pixels.chunk(steps), targets.chunk(steps), strict=True)):
            last = i + 1 == steps
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast(), self.convolutions:
                    logits = self.forward(x)
                loss = self.criterion(logits.float(), y) / steps
                self.accelerator.backward(loss)
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def after_update(self) -> None:
        """Check the loss, save the training state if due, and stop if requested."""
        sync = self.progress.updates % SYNC_UPDATES == 0
        if sync:
            self.sync_losses()
        single = self.accelerator.num_processes == 1
        if not (sync or single):  # saving needs all processes
            return
        due = time.monotonic() - self.saved_at > 60 * self.run_config.save_minutes
        stop = bool(self.signals) or self.run_config.time_is_up()
        if not single:
            requests = torch.tensor([int(due), int(stop)], device=self.accelerator.device)
            due, stop = self.accelerator.reduce(requests).tolist()
        if due or stop:
            self.save()
        if stop:
            raise Interrupted.by(self.signals, f"{self.progress.updates} of {self.updates} updates")

    def sync_losses(self) -> None:
        """Log the last loss; raises Diverged if one since the last sync is not finite."""
        if not self.losses:
            return
        done, epoch = self.progress.updates, len(self.progress.rows)
        losses = torch.stack(self.losses).tolist()
        for i, loss in enumerate(losses, done - len(losses) - epoch * len(self.batches)):
            if not math.isfinite(loss):
                raise Diverged(
                    f"the loss is {loss} at batch {i} of epoch {epoch + 1}: lower the learning "
                    f"rate; the training states in {self.folder} are from before"
                )
        self.losses.clear()
        self.accelerator.log({"loss": losses[-1], "lr": self.lr}, step=done)
        now = time.monotonic()
        self.bar.update(
            self.task,
            completed=done,
            description=f"epoch {epoch + 1}/{self.recipe.epochs}",
            loss=losses[-1],
            rate=len(losses) * self.recipe.batch_size / (now - self.synced_at),
        )
        self.synced_at = now

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def end_epoch(self, epoch: int, updates: int) -> None:
        """Evaluate, and append the epoch to the log."""
        progress, lr = self.progress, self.lr
        if self.by_epoch:
            self.scheduler.step(epoch + 1)
        loss = float(self.accelerator.reduce(progress.loss, "mean")) / updates
        metrics = self.metrics(self.evaluate(self.progress_set))
        row = {"epoch": epoch + 1, "loss": loss, **metrics, "lr": lr}
        progress.rows.append(row)
        progress.loss = None
        self.accelerator.log({f"epoch/{k}": v for k, v in row.items()}, step=progress.updates)
        if self.accelerator.is_main_process:
            write_csv(self.folder / LOG, progress.rows, float_format=".6g")
        self.log("  ".join(f"{k} {v:.5g}" for k, v in row.items()))

    def save(self) -> None:
        """Write the training state."""
        self.sync_losses()
        if self.progress.loss is not None:  # only the main process's sum is stored
            self.progress.loss = self.accelerator.reduce(self.progress.loss, "mean")
        save_state(self.accelerator, self.folder, self.progress.updates)
        self.saved_at = time.monotonic()

    def metrics(self, predictions: Any) -> dict[str, float]:
        """Return the columns of the log for what `evaluate` returned."""
        return {"top1": predictions.top1, "top5": predictions.top5}

    def evaluate(self, dataset: Any, progress: str | None = None) -> Predictions:
        """Predict every image once, distributed over the processes; all get all predictions."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        predict_images = partial(
            predict,
            self.evaluated,
            device=self.accelerator.device,
            workers=0 if self.recipe.on_device else self.run_config.workers,
            progress=progress if rank == 0 else None,
        )
        if processes == 1:
            return predict_images(dataset)
        for tensor in self.evaluated.buffers():  # each process updated its own
            tensor.copy_(broadcast(tensor.clone()))
        own: Any = data.Subset(dataset, range(rank, len(dataset), processes))
        return interleave(gather_object([predict_images(own)]))

    def log(self, text: str) -> None:
        """Print a line on the main process."""
        if self.accelerator.is_main_process:
            console.print(text, highlight=False, soft_wrap=True)


def emulates_bfloat16(device: torch.device) -> bool:
    """Return whether oneDNN, which convolves on x86 CPUs, lacks the instructions for bfloat16."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    with recipe_settings("name, preprocessing or model_args"):
        model = timm.create_model(
            recipe.architecture,
            num_classes=num_classes,
            in_chans=recipe.preprocessing["input_size"][0],
            pretrained_cfg_overlay=dict(recipe.preprocessing, num_classes=num_classes),
            **recipe.model_args,
        )
    return model.to(memory_format=memory_format(recipe))


def memory_format(recipe: Recipe) -> torch.memory_format:
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def interleave(shards: list[Predictions]) -> Predictions:
    """Merge predictions for images 0, n, 2n ...; 1, n + 1 ...; and so on into one in order."""
    images = sum(len(shard.targets) for shard in shards)
    columns = {}
    for name in ("indices", "logits", "targets", "missed"):
        arrays = [getattr(shard, name) for shard in shards]
        columns[name] = np.empty((images, *arrays[0].shape[1:]), arrays[0].dtype)
        for first, array in enumerate(arrays):
            columns[name][first :: len(shards)] = array
    return Predictions(**columns)


def write_csv(
    path: Path, rows: Sequence[Mapping[str, Any]], comment: str = "", float_format: str = ""
) -> None:
    """Write a table; the lines of `comment` precede it, each after "# ".

    Columns are those of all rows. A cell is empty where a row lacks its column.
    """
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in comment.splitlines())
    columns = dict.fromkeys(column for row in rows for column in row)
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow(
            {k: format(v, float_format) if isinstance(v, float) else v for k, v in row.items()}
        )
    files.write_text(path, text.getvalue())


def progress_bar(columns: str, visible: bool = True) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(columns),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not visible,
    )


@contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Defer the first SIGINT or SIGTERM; restore the handler for the next."""
    received: list[int] = []
    handlers = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
