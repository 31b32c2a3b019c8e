"""Recipes: all settings that determine the result of a training run, read from YAML."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import Self

from kn_zoo.checkpoints.manifest import norm_of


class UserError(Exception):
    """Bad input; the message is one line that names the fix."""


@dataclass(frozen=True)
class PrivacyConfig:
    """The `privacy` section of a recipe: differentially private training with Opacus."""

    epsilon: float  # budget, from which the noise is computed
    delta: float  # probability with which epsilon may be exceeded
    max_grad_norm: float  # norm that each image's gradient is clipped to
    physical_batch_size: int = 64  # images per forward and backward pass
    earlier_runs: int = 0  # runs on the same private images before this one; not part of epsilon
    public_data: str = "none"  # what initial weights and settings owe to other data

    def __post_init__(self) -> None:
        for name, high in (("epsilon", inf), ("delta", 1), ("max_grad_norm", inf)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < high):
                raise UserError(
                    f"privacy.{name} must be a number above 0{' and below 1' if high == 1 else ''},"
                    f" not {value!r} (YAML reads 1.0e-5 as a number, but not 1e-5)"
                )
        if not (isinstance(self.physical_batch_size, int) and self.physical_batch_size > 0):
            raise UserError("privacy.physical_batch_size must be a positive integer")


@dataclass
class Recipe:
    """One training run. A YAML file sets these fields, and `variants` of them by name.

    `lr` is accepted in place of `optimizer.lr`; the scheduler's `min_lr` and `warmup_lr` then keep
    their ratio to it.
    """

    name: str  # architecture.tag of the checkpoint
    model_args: dict[str, Any]  # keyword arguments of the network
    dataset: str  # data set to evaluate on: a name in kn_zoo.data or of timm's create_dataset
    train_split: str  # split to train on, or a slice of it: "train[:10000]" (kn_zoo.data)
    eval_split: str  # split to evaluate on, or a slice of it
    preprocessing: dict[str, Any]  # of evaluation, as in pretrained_cfg; training shares mean, std
    epochs: int  # number of epochs
    batch_size: int  # images per update, summed over devices and accumulation steps
    optimizer: dict[str, Any]  # arguments of timm's create_optimizer_v2
    scheduler: dict[str, Any]  # of timm's create_scheduler_v2; per update unless step_on_epochs
    licenses: dict[str, str]  # of code, weights and data
    train_dataset: str | None = None  # data set to train on, if not `dataset`: a name of timm's
    num_classes: int | None = None  # number of classes, if the data set does not provide it
    augmentation: list[dict[str, dict]] = field(default_factory=list)  # torchvision transforms
    erasing: dict[str, Any] | None = None  # arguments of torchvision's RandomErasing
    mixup: dict[str, Any] | None = None  # arguments of timm's Mixup
    repeated_augmentation: int = 1  # augmented copies of each sampled image in a batch
    resolutions: dict[int, int] = field(default_factory=dict)  # {first epoch (from 1): image side}
    label_smoothing: float = 0.0  # of the cross-entropy loss
    accumulation: int = 1  # forward and backward passes per update (gradient accumulation)
    mixed_precision: str = "no"  # "no" or "bf16" in training; evaluation runs in float32
    channels_last: bool = True  # memory format of network and images
    compile: bool = False  # torch.compile the training step; evaluation is eager
    winograd: bool = False  # on a CPU, Winograd's algorithm for convolutions in training
    on_device: bool = False  # keep the training images on the device and augment them there
    ema_decay: float | None = None  # evaluate and store a moving average of the weights
    ema_warmup: bool = False  # increase the decay up to ema_decay, for short runs
    stored_dtype: str = "float32"  # of weights; float32 if it changes predictions, up to 25 MB
    sampled_draws: int = 5  # evaluations to average under "sampled" inference statistics
    held_out: float = 0.0  # fraction of training images held out to evaluate each epoch on
    updates: int | None = None  # stop after this many updates; the schedule remains the full run's
    privacy: PrivacyConfig | None = None  # train_scripts/train_private.py trains such a recipe
    seed: int = 0  # of initialization, order, augmentation and dropout

    def __post_init__(self) -> None:
        if isinstance(self.privacy, dict):
            self.privacy = PrivacyConfig(**self.privacy)
        if self.resolutions:
            _check_resolutions(self)
        if self.winograd and self.mixed_precision != "no":
            raise UserError('winograd computes in float32: set mixed_precision: "no"')

    @classmethod
    def read(cls, path: Path, variant: str | None = None) -> Self:
        """Read a recipe, or one of the variants of a file; raises UserError."""
        fields = _read_yaml(path)
        variants = fields.pop("variants", None)
        if variants is not None:
            if variant not in variants:
                raise UserError(f"{path} contains several recipes; name one: {' '.join(variants)}")
            fields = _merge(fields | {"name": variant}, variants[variant] or {})
        elif variant not in (None, fields.get("name")):
            raise UserError(f"{path} contains only the recipe {fields.get('name')}, not {variant}")
        lr = fields.pop("lr", None)
        try:
            recipe = cls(**fields)
            return recipe if lr is None else recipe.with_lr(lr)
        except TypeError as error:
            known = ", ".join(cls.__dataclass_fields__)
            raise UserError(
                f"{path} is not a recipe ({error}); the fields of a recipe are: {known}"
            ) from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    @property
    def norm(self) -> str:
        return norm_of(self.architecture, self.model_args)

    def resolution(self, epoch: int) -> int | None:
        """Return the side of the training images in an epoch (from 1); None: not resized."""
        started = [first for first in self.resolutions if first <= epoch]
        return self.resolutions[max(started)] if started else None

    def override(self, epochs: int | None = None, updates: int | None = None) -> Self:
        """Return a copy with other epochs, or for a dry run, which evaluates one sampled draw."""
        recipe = self if epochs is None else replace(self, epochs=epochs)
        return recipe if updates is None else replace(recipe, updates=updates, sampled_draws=1)

    def with_lr(self, lr: float) -> Self:
        """Return a copy with another learning rate; the scheduler's rates keep their ratio."""
        factor = lr / self.optimizer["lr"]
        rates = {
            k: self.scheduler[k] * factor for k in ("min_lr", "warmup_lr") if k in self.scheduler
        }
        return replace(
            self, optimizer=self.optimizer | {"lr": lr}, scheduler=self.scheduler | rates
        )


def _check_resolutions(recipe: Recipe) -> None:
    resolutions, size = recipe.resolutions, recipe.preprocessing["input_size"][1:]
    if not recipe.on_device:
        raise UserError("resolutions require on_device: true")
    numbers = [*resolutions, *resolutions.values()]
    if min(resolutions) != 1 or not all(isinstance(n, int) and n >= 1 for n in numbers):
        raise UserError(
            f"resolutions must map first epochs, starting at 1, to sides in pixels: {resolutions}"
        )
    last = recipe.resolution(recipe.epochs)
    if [last, last] != list(size):
        raise UserError(
            f"resolutions must end at the full size {size[0]} x {size[1]}, but epoch "
            f"{recipe.epochs} has {last} x {last}: change resolutions or epochs"
        )


INVALID_SETTING = (
    AttributeError,
    AssertionError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def recipe_settings(name: str) -> Iterator[None]:
    """Convert a library's error about the recipe's settings to a UserError that names them."""
    try:
        yield
    except INVALID_SETTING as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"invalid {name} settings in the recipe: {reason}") from None


def variant_names(path: Path) -> list[str | None]:
    """Return the names of a file's variants, or [None] if it contains a single recipe."""
    return list(_read_yaml(path).get("variants") or [None])


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name a file such as those in "
            "train_scripts/recipes"
        ) from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a recipe ({error}): write its fields as YAML, as the files in "
            "train_scripts/recipes do"
        ) from None


def _merge(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields with changes on top; mappings are merged by key, one level deep."""
    result = deepcopy(fields)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = result[key] | value if both else deepcopy(value)
    return result
