"""Train a network from a recipe, evaluate what is stored, and write its bundle.

    python train_scripts/train.py train_scripts/recipes/knpreactresnet20_cifar.digits.yaml
    accelerate launch --num_processes 8 train_scripts/train.py RECIPE           # several devices

A checkpoint is written after every epoch to runs/NAME/; the same command takes up from the last
one, with the state of every random generator, so an interrupted run ends where an uninterrupted one
does.
The recipe decides everything that changes the result; the options only say where things are.
"""

import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import kn_zoo
from batches import DeviceBatches
from kn_zoo import bundle, cli, data, evaluate, manifest

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)


@dataclass
class Recipe:
    """All that decides a training run; the YAML files in recipes/ hold these fields."""

    name: str  # architecture.tag
    model_args: dict[str, Any]
    dataset: str
    train_split: str
    eval_split: str
    preprocessing: dict[str, Any]
    epochs: int
    batch_size: int  # over all devices
    optimizer: dict[str, Any]  # arguments of timm's create_optimizer_v2
    scheduler: dict[str, Any]  # arguments of timm's create_scheduler_v2, stepped every update
    licenses: dict[str, str]
    augmentation: list[dict[str, dict]] = field(default_factory=list)  # torchvision transforms
    label_smoothing: float = 0.0
    mixed_precision: str = "no"  # or bf16; evaluation is in float32
    channels_last: bool = True
    compile: bool = False  # the training step; evaluation is eager
    on_device: bool = False  # the training images lie in one tensor and are augmented there
    ema_decay: float | None = None  # evaluate, and store, the moving average of the weights
    ema_warmup: bool = False  # a decay that rises to ema_decay, for short runs
    stored_dtype: str = "float32"
    sampled_draws: int = 5  # evaluations under random statistics, averaged
    seed: int = 0

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, TypeError) as error:
            known = ", ".join(cls.__dataclass_fields__)
            raise UserError(f"{path} is not a recipe ({error}); its fields are: {known}") from None

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]


class UserError(Exception):
    """Bad input; the message is one line that says what to do."""


class History:
    """One row an epoch; goes through checkpoints, and to train_log.csv."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]

    def write(self, path: Path) -> None:
        lines = [",".join(self.rows[0])]
        lines += [",".join(f"{v:.6g}" for v in row.values()) for row in self.rows]
        manifest.write_text(path, "\n".join(lines) + "\n")


@app.command()
def main(
    recipe: Annotated[Path, typer.Argument(help="a YAML file, such as those in recipes/")],
    output: Annotated[Path | None, typer.Option(help="run folder [default: runs/NAME]")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder that holds the data sets")] = None,
    download: Annotated[bool, typer.Option(help="fetch the data set if it is missing")] = False,
    workers: Annotated[int, typer.Option(help="processes that load images")] = 0,
    in_package: Annotated[
        bool, typer.Option(help="write the bundle into kn_zoo/pretrained and the manifest")
    ] = False,
) -> int:
    """Train RECIPE, or take up where its last checkpoint left off, and write its bundle."""
    try:
        settings = Recipe.read(recipe)
        folder = output or Path("runs") / settings.name
        train(settings, recipe, folder, data_dir, download, workers, in_package)
    except (UserError, data.MissingData, manifest.ManifestError, OSError, ValueError) as error:
        print(f"train.py: {cli.one_line(error)}", file=sys.stderr)
        return 2
    return 0


def train(
    recipe: Recipe,
    recipe_path: Path,
    folder: Path,
    data_dir: Path | None,
    download: bool,
    workers: int,
    in_package: bool,
) -> None:
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, split_batches=True),
    )
    set_seed(recipe.seed)
    # Said aloud, for evaluation puts it back by name, and a compiled step heeds the difference.
    torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())
    claim(folder, recipe)
    train_set = data.load(recipe.dataset, recipe.train_split, data_dir, download=download)
    eval_set = data.load(recipe.dataset, recipe.eval_split, data_dir, download=download)
    model = create_model(recipe, len(train_set.class_names))
    eval_set.transform = evaluate.eval_transform(model)
    loader = training_batches(recipe, train_set, model, workers, accelerator)
    model.to(accelerator.device)
    ema = None
    if recipe.ema_decay is not None:
        ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
        accelerator.register_for_checkpointing(ema)
    optimizer = create_optimizer_v2(model, **recipe.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Without the wrapper that casts: evaluation is in float32, and training casts by itself.
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    evaluated = network if ema is None else ema.module
    forward = torch.compile(model) if recipe.compile else model
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=recipe.epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
        **recipe.scheduler,
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    history = History()
    accelerator.register_for_checkpointing(history)
    if found := latest_checkpoint(folder):
        accelerator.load_state(str(found))
        console.print(f"resumed from {found}")

    for epoch in range(len(history.rows), recipe.epochs):
        start = time.perf_counter()
        network.train()
        loss = train_epoch(
            recipe,
            accelerator,
            forward,
            network,
            ema,
            optimizer,
            scheduler,
            criterion,
            loader,
            epoch,
        )
        seconds = time.perf_counter() - start
        found_now = evaluate.predict(evaluated, eval_set, device=accelerator.device)
        row = {"epoch": epoch + 1, "loss": loss, "top1": found_now.top1, "top5": found_now.top5}
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": seconds}
        history.rows.append(row)
        if accelerator.is_main_process:
            console.print("  ".join(f"{k} {v:.5g}" for k, v in row.items()))
            history.write(folder / "train_log.csv")
        save_checkpoint(accelerator, folder, epoch + 1)
    if accelerator.is_main_process:
        finish(recipe, recipe_path, folder, evaluated, eval_set, in_package)


def claim(folder: Path, recipe: Recipe) -> None:
    """Make the run's folder, or see that what lies there belongs to the same recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(asdict(recipe), sort_keys=False)
    path = folder / "recipe.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != settings:
        raise UserError(f"{folder} holds a run of another recipe: remove it, or give --output")
    manifest.write_text(path, settings)


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    channels = recipe.preprocessing["input_size"][0]
    model = timm.create_model(
        recipe.architecture,
        num_classes=num_classes,
        in_chans=channels,
        pretrained_cfg_overlay=dict(recipe.preprocessing, num_classes=num_classes),
        **recipe.model_args,
    )
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


def training_batches(
    recipe: Recipe, images: data.Images, model: nn.Module, workers: int, accelerator: Accelerator
) -> Any:
    if recipe.on_device:
        return DeviceBatches(
            images,
            recipe.batch_size,
            recipe.augmentation,
            recipe.preprocessing["mean"],
            recipe.preprocessing["std"],
            accelerator.device,
            recipe.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
    images.transform = training_transform(recipe, model)
    loader = DataLoader(
        images, recipe.batch_size, shuffle=True, drop_last=True, num_workers=workers
    )
    return accelerator.prepare(loader)


def training_transform(recipe: Recipe, model: nn.Module) -> transforms.Compose:
    """The recipe's augmentations of the PIL image, then what evaluation does."""
    steps = [
        getattr(transforms, name)(**arguments)
        for step in recipe.augmentation
        for name, arguments in step.items()
    ]
    return transforms.Compose([*steps, evaluate.eval_transform(model)])


def train_epoch(
    recipe: Recipe,
    accelerator: Accelerator,
    forward: Any,
    network: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: Any,
    scheduler: Any,
    criterion: nn.Module,
    loader: Any,
    epoch: int,
) -> float:
    """One pass over the training images; returns the mean loss."""
    loader.set_epoch(epoch)
    memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
    total = torch.zeros((), device=accelerator.device)
    with Progress(
        *Progress.get_default_columns()[:2],
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not accelerator.is_main_process,
    ) as progress:
        task = progress.add_task(f"epoch {epoch + 1}/{recipe.epochs}", total=len(loader), loss=0.0)
        for step, (images, targets) in enumerate(loader):
            images = images.to(memory_format=memory_format)
            with accelerator.autocast():
                logits = forward(images)
            loss = criterion(logits.float(), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step_update(epoch * len(loader) + step + 1)
            if ema is not None:
                ema.update(network, epoch * len(loader) + step + 1)
            total += loss.detach()
            if step % 10 == 0:  # reading the loss waits for the device
                progress.update(task, completed=step + 1, loss=loss.item())
    mean = total / len(loader)
    if not torch.isfinite(mean):
        raise UserError(f"the loss is {mean:.3g} in epoch {epoch + 1}: lower the learning rate")
    return float(mean)


def latest_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("epoch-*"), default=None)


def save_checkpoint(accelerator: Accelerator, folder: Path, epoch: int) -> None:
    """Write the state beside, put it in place whole, and only then drop the one before."""
    part = folder / ".part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = sorted(folder.glob("epoch-*"))
        os.replace(part, folder / f"epoch-{epoch:04d}")
        for path in older:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def finish(
    recipe: Recipe,
    recipe_path: Path,
    folder: Path,
    model: nn.Module,
    eval_set: data.Images,
    in_package: bool,
) -> None:
    """Round the weights as they will be stored, evaluate those under each statistics, write all."""
    dtype = getattr(torch, recipe.stored_dtype)
    unrounded = evaluate.predict(model, eval_set, progress="evaluating")
    bundle.round_weights(model, dtype)
    statistics, predictions = accuracies(model, eval_set, recipe.sampled_draws)
    console.print(f"top-1 before storing as {recipe.stored_dtype}: {unrounded.top1:.2f}")
    draft = manifest.Weight(
        name=recipe.name,
        model_args=recipe.model_args,
        dataset=manifest.Dataset(
            recipe.dataset, recipe.eval_split, len(eval_set), len(eval_set.class_names)
        ),
        reported=manifest.Reported("kn_zoo", statistics),
        preprocessing=manifest.Preprocessing(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in recipe.preprocessing.items()}
        ),
        licenses=manifest.Licenses(**recipe.licenses),
        recipe=f"train_scripts/recipes/{recipe_path.name}",
        seeds=(recipe.seed,),
    )
    weight = bundle.write(
        model,
        draft,
        recipe=asdict(recipe),
        log=folder / "train_log.csv",
        predictions=predictions,
        class_names=eval_set.class_names,
        dtype=dtype,
        folder=None if in_package else folder / "bundle",
    )
    place = weight.folder if in_package else folder / "bundle"
    for name, accuracy in statistics.items():
        console.print(f"{name}: top-1 {accuracy.top1:.2f}  top-5 {accuracy.top5:.2f}")
    console.print(f"wrote {place}")


def accuracies(
    model: nn.Module, eval_set: data.Images, draws: int
) -> tuple[dict[str, manifest.Accuracy], evaluate.Predictions]:
    """Accuracy under each inference statistics, and the predictions under the default one."""
    found = {}
    for name in ("expected", "plain"):
        kn_zoo.set_inference_statistics(model, name)
        found[name] = evaluate.predict(model, eval_set, progress=name)
    kn_zoo.set_inference_statistics(model, "sampled")
    sampled = []
    for draw in range(draws):
        torch.manual_seed(draw)
        sampled.append(evaluate.predict(model, eval_set, progress=f"sampled {draw + 1}/{draws}"))
    kn_zoo.set_inference_statistics(model, "expected")
    table = {k: manifest.Accuracy(round(v.top1, 4), round(v.top5, 4)) for k, v in found.items()}
    mean1, mean5 = (sum(getattr(p, k) for p in sampled) / draws for k in ("top1", "top5"))
    table["sampled"] = manifest.Accuracy(round(mean1, 4), round(mean5, 4), draws)
    return table, found["expected"]


if __name__ == "__main__":
    sys.exit(cli.run(app))
