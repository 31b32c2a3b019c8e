"""One training run: a network on its way through a recipe, resumable at any update."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
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
from kn_zoo.checkpoints import manifest
from kn_zoo.checkpoints.predictions import Predictions
from kn_zoo.evaluation.predict import eval_transform, exact_float32, predict
from kn_zoo.training import data, resume
from kn_zoo.training.batches import Share, create_batches, seed_of, seeded
from kn_zoo.training.data import Place
from kn_zoo.training.recipe import Recipe, UserError, settings

LOG = "train_log.csv"
PULSE = 10  # updates between looks at the loss, each of which waits for the device
console = Console(stderr=True)


@dataclass
class Pace:
    """What changes how a run proceeds, and not what comes of it."""

    workers: int = 0  # processes that decode images
    checkpoint_minutes: float = 10.0
    minutes: float = math.inf  # stop resumably after that time
    start: float = field(default_factory=time.monotonic)

    def over(self) -> bool:
        return time.monotonic() - self.start > 60 * self.minutes


class Diverged(UserError):
    """The loss is not finite any more."""


class Interrupted(Exception):
    """A signal or the clock ended the run early; a checkpoint was written.

    `status` is for the shell: 128 and the signal's number, or 75, "try again", for the clock.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class State:
    """How far a run has come; goes through checkpoints."""

    updates: int = 0
    seconds: float = 0.0  # spent in updates
    loss: Tensor | None = None  # sum over the updates of the epoch that is under way
    rows: list[dict[str, float]] = field(default_factory=list)  # one a finished epoch

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Trainer:
    """The network of a recipe, in `folder`, with everything that trains and evaluates it.

    Args:
        progress_on: what each epoch's accuracy is measured on, `None` for the evaluation split.
        training_images: by default those of the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        place: Place,
        pace: Pace,
        training_images: Any = None,
        progress_on: Any = None,
    ) -> None:
        self.recipe, self.folder, self.place, self.pace = recipe, folder, place, pace
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes would not meet there
            mixed_precision=recipe.mixed_precision,
            log_with="tensorboard",
            project_config=ProjectConfiguration(logging_dir=str(folder)),
        )
        share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        parts = share.processes * recipe.accumulation * (2 if recipe.mixup else 1)  # it mixes pairs
        if recipe.batch_size % parts:
            raise UserError(
                f"batch_size {recipe.batch_size} must be a multiple of {parts}: "
                "processes x accumulation, x 2 with mixup"
            )
        # Each process has masks of its own; the weights are those of the first.
        set_seed(recipe.seed, device_specific=True)
        torch.backends.cudnn.benchmark = True
        with exact_float32():  # leaves the defaults said aloud; a compiled step heeds that too
            pass
        network = self.load(share, training_images, progress_on)
        self.prepare(network)

    def load(self, share: Share, training_images: Any, progress_on: Any) -> nn.Module:
        """Set `batches`, `test_set`, `progress_set` and `class_names`; return the network."""
        recipe, place = self.recipe, self.place
        train_set = training_images
        if train_set is None:
            train_set = data.load_training(recipe, place)
        self.test_set = data.load(recipe.dataset, recipe.eval_split, place)
        self.class_names = data.class_names(self.test_set, recipe)
        network = create_model(recipe, len(self.class_names)).to(self.accelerator.device)
        if training_images is None and recipe.held_out:
            train_set, progress_on = data.split_off(train_set, recipe.held_out)
        self.progress_set = self.test_set if progress_on is None else progress_on
        for each in (self.test_set, self.progress_set):
            each.transform = eval_transform(network)
        self.batches = create_batches(
            recipe, train_set, network, place, self.pace.workers, self.accelerator.device, share
        )
        if recipe.on_device:  # decoding them anew each epoch would take longer than to train
            self.progress_set = data.InMemory(self.progress_set)
        return network

    def prepare(self, network: nn.Module) -> None:
        """Hand the network to Accelerate, with all that changes it or is changed with it."""
        recipe = self.recipe
        self.state, self.ema = State(), None
        self.accelerator.register_for_checkpointing(self.state)
        if recipe.ema_decay is not None:
            self.ema = ModelEmaV3(network, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
            self.accelerator.register_for_checkpointing(self.ema)
        with settings("optimizer"):
            optimizer = create_optimizer_v2(network, **recipe.optimizer)
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        # Without the wrapper that casts: evaluation is in float32, and training casts by itself.
        self.network = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.evaluated = self.network if self.ema is None else self.ema.module
        torch.compiler.reset()  # of what another seed's run left behind
        # Each resolution is compiled for itself: a graph for any size is slower.
        dynamic = False if recipe.resolutions else None
        self.forward = self.model
        if recipe.compile:
            self.forward = torch.compile(self.model, dynamic=dynamic)
        self.by_epoch = recipe.scheduler.get("step_on_epochs", False)
        with settings("scheduler"):
            self.scheduler, _ = create_scheduler_v2(
                self.optimizer,
                num_epochs=recipe.epochs,
                updates_per_epoch=len(self.batches),
                **({"step_on_epochs": False} | recipe.scheduler),
            )
        smoothing, self.mixup = recipe.label_smoothing, None
        if recipe.mixup:
            classes = len(self.class_names)
            with settings("mixup"):
                self.mixup = Mixup(num_classes=classes, label_smoothing=smoothing, **recipe.mixup)
            smoothing = 0.0
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=smoothing)

    @property
    def updates(self) -> int:
        """Of the whole run."""
        whole = self.recipe.epochs * len(self.batches)
        return min(self.recipe.updates or whole, whole)

    def train(self) -> None:
        """Go on from the last checkpoint to the recipe's end.

        Raises Interrupted after a signal or `pace.minutes`, Diverged.
        """
        if found := resume.restore(self.accelerator, self.folder, console):
            self.say(f"resumed from {found}")
        self.accelerator.init_trackers(
            "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.state.updates}}
        )
        begin = self.state.updates
        self.saved_at = self.looked_at = time.monotonic()
        self.losses: list[Tensor] = []  # not looked at yet
        with progress_bar(self.accelerator) as self.bar, stop_signals() as self.signals:
            self.task = self.bar.add_task(
                self.recipe.name, total=self.updates, completed=begin, loss=math.nan, rate=0
            )
            while self.state.updates < self.updates:
                self.train_epoch()
            if self.state.updates > begin:
                self.save()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def train_epoch(self) -> None:
        epoch, state = len(self.state.rows), self.state
        first = epoch * len(self.batches)
        if state.loss is None:
            state.loss = torch.zeros((), device=self.accelerator.device)
        self.network.train()
        begin = time.perf_counter()
        for pixels, targets in self.batches.epoch(epoch, state.updates - first):
            if self.mixup is not None:
                with seeded(seed_of(self.recipe.seed, state.updates)):
                    pixels, targets = self.mixup(pixels, targets)
            loss = self.update(pixels, targets)
            state.updates += 1
            state.loss = state.loss.to(loss.device) + loss
            self.losses.append(loss)
            if not self.by_epoch:
                self.scheduler.step_update(state.updates)
            if self.ema is not None:
                self.ema.update(self.network, state.updates)
            if state.updates == self.updates:
                break
            now = time.perf_counter()
            state.seconds, begin = state.seconds + now - begin, now
            self.pulse()
        state.seconds += time.perf_counter() - begin
        self.look_at_losses()
        self.end_epoch(epoch, state.updates - first)

    def update(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """One step of the optimizer; returns the mean loss of this process's images."""
        pixels = pixels.to(memory_format=memory_format(self.recipe))
        parts = self.recipe.accumulation
        total = torch.zeros((), device=self.accelerator.device)
        for i, (x, y) in enumerate(zip(pixels.chunk(parts), targets.chunk(parts), strict=True)):
            last = i + 1 == parts
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    logits = self.forward(x)
                loss = self.criterion(logits.float(), y) / parts
                self.accelerator.backward(loss)
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def pulse(self) -> None:
        """Between two updates: look at the loss, save if it is time, stop if that is asked for."""
        on_beat = self.state.updates % PULSE == 0
        if on_beat:
            self.look_at_losses()
        alone = self.accelerator.num_processes == 1
        if not (on_beat or alone):  # only all processes together can save
            return
        late = time.monotonic() - self.saved_at > 60 * self.pace.checkpoint_minutes
        stop = bool(self.signals) or self.pace.over()
        if not alone:
            wishes = torch.tensor([int(late), int(stop)], device=self.accelerator.device)
            late, stop = self.accelerator.reduce(wishes).tolist()
        if late or stop:
            self.save()
        if stop:
            number = self.signals[0] if self.signals else 0
            why = signal.Signals(number).name if number else "the time is up"
            raise Interrupted(
                f"{why} after {self.state.updates} of {self.updates} updates; the same command "
                "goes on from there",
                128 + number if number else 75,
            )

    def look_at_losses(self) -> None:
        """Raise Diverged if one since the last look is not finite, else log the last one."""
        if not self.losses:
            return
        done, epoch = self.state.updates, len(self.state.rows)
        values = torch.stack(self.losses).tolist()
        for i, value in enumerate(values, done - len(values) - epoch * len(self.batches)):
            if not math.isfinite(value):
                raise Diverged(
                    f"the loss is {value} at batch {i} of epoch {epoch + 1}: lower the learning "
                    f"rate; the checkpoints in {self.folder} are of before"
                )
        self.losses.clear()
        self.accelerator.log({"loss": values[-1], "lr": self.rate}, step=done)
        now = time.monotonic()
        self.bar.update(
            self.task,
            completed=done,
            description=f"epoch {epoch + 1}/{self.recipe.epochs}",
            loss=values[-1],
            rate=len(values) * self.recipe.batch_size / (now - self.looked_at),
        )
        self.looked_at = now

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def end_epoch(self, epoch: int, updates: int) -> None:
        """Measure the accuracy and write the epoch's row."""
        state = self.state
        rate = self.rate
        if self.by_epoch:
            self.scheduler.step(epoch + 1)
        loss = float(self.accelerator.reduce(state.loss, "mean")) / updates
        found = self.metrics(self.evaluate(self.progress_set))
        row = {"epoch": epoch + 1, "loss": loss, **found, "lr": rate}
        state.rows.append(row)
        state.loss = None
        self.accelerator.log({f"epoch/{k}": v for k, v in row.items()}, step=state.updates)
        if self.accelerator.is_main_process:
            write_log(self.folder / LOG, state.rows)
        self.say("  ".join(f"{k} {v:.5g}" for k, v in row.items()))

    def save(self) -> None:
        self.look_at_losses()
        if self.state.loss is not None:  # the main process's sum is the one that is stored
            self.state.loss = self.accelerator.reduce(self.state.loss, "mean")
        resume.save(self.accelerator, self.folder, self.state.updates)
        self.saved_at = time.monotonic()

    def metrics(self, found: Any) -> dict[str, float]:
        """What `evaluate` found, as columns of the log."""
        return {"top1": found.top1, "top5": found.top5}

    def evaluate(self, dataset: Any, progress: str | None = None) -> Predictions:
        """Predictions for every image, each made by one process, known to all of them."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        device = self.accelerator.device
        workers = 0 if self.recipe.on_device else self.pace.workers
        options = dict(device=device, workers=workers, progress=progress if rank == 0 else None)
        if processes == 1:
            return predict(self.evaluated, dataset, **options)
        for tensor in self.evaluated.buffers():  # each process counted its own images in them
            tensor.copy_(broadcast(tensor.clone()))
        mine = data.Part(dataset, range(rank, len(dataset), processes))
        return interleave(gather_object([predict(self.evaluated, mine, **options)]))

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            console.print(text, highlight=False, soft_wrap=True)


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    with settings("name, preprocessing or model_args"):
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


def interleave(parts: list[Predictions]) -> Predictions:
    """Predictions for images 0, n, 2n ... and 1, n + 1 ... and so on, as one in order."""
    images = sum(len(part.targets) for part in parts)
    columns = {}
    for name in ("indices", "logits", "targets", "missed"):
        arrays = [getattr(part, name) for part in parts]
        columns[name] = np.empty((images, *arrays[0].shape[1:]), arrays[0].dtype)
        for first, array in enumerate(arrays):
            columns[name][first :: len(parts)] = array
    return Predictions(**columns)


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    lines = [",".join(rows[0]), *(",".join(f"{v:.6g}" for v in row.values()) for row in rows)]
    manifest.write_text(path, "\n".join(lines) + "\n")


def progress_bar(accelerator: Accelerator) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not accelerator.is_main_process,
    )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM instead of dying of it; a second one does what it did
    before."""
    found: list[int] = []
    before = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        found.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
