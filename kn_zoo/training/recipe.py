"""Recipes: all that decides a training run, read from the YAML files in recipes/."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kn_zoo.checkpoints.manifest import norm_of


class UserError(Exception):
    """Bad input; the message is one line that says what to do."""


@dataclass
class Recipe:
    """One training run; the YAML files hold these fields."""

    name: str  # architecture.tag
    model_args: dict[str, Any]
    dataset: str  # evaluated on: a name of kn_zoo.data, or of timm's create_dataset
    train_split: str  # "train", or of a set of kn_zoo.data "train[:10000]": its first images
    eval_split: str
    preprocessing: dict[str, Any]  # of evaluation; mean and std of training too
    epochs: int
    batch_size: int  # images an update, over all devices and accumulated steps
    optimizer: dict[str, Any]  # arguments of timm's create_optimizer_v2
    scheduler: dict[str, Any]  # of timm's create_scheduler_v2; every update unless step_on_epochs
    licenses: dict[str, str]
    train_dataset: str | None = None  # timm's name of the training images, if not `dataset`
    num_classes: int | None = None  # where the data set does not say it
    augmentation: list[dict[str, dict]] = field(default_factory=list)  # torchvision, on PIL images
    erasing: dict[str, Any] | None = None  # arguments of torchvision's RandomErasing
    mixup: dict[str, Any] | None = None  # arguments of timm's Mixup
    repeated_augmentation: int = 1  # times that an image that is drawn comes, differently augmented
    resolutions: dict[int, int] = field(default_factory=dict)  # first epoch (from 1): image side
    label_smoothing: float = 0.0
    accumulation: int = 1  # parts that a batch goes through the network in
    mixed_precision: str = "no"  # or bf16; evaluation is in float32
    channels_last: bool = True
    compile: bool = False  # the training step; evaluation is eager
    on_device: bool = False  # the images lie in one tensor and are augmented there
    ema_decay: float | None = None  # evaluate, and store, the moving average of the weights
    ema_warmup: bool = False  # a decay that rises to ema_decay, for short runs
    stored_dtype: str = "float32"
    sampled_draws: int = 5  # evaluations under random statistics, averaged
    held_out: float = 0.0  # share of the training images that progress is measured on, not the test
    updates: int | None = None  # a run cut off there, on the schedule of the whole one
    seed: int = 0

    @classmethod
    def read(cls, path: Path, variant: str | None = None) -> "Recipe":
        """The recipe of a file, which may be named, or one of the `variants` that a file lists.

        Raises UserError, naming what would have been right.
        """
        settings = contents(path)
        variants = settings.pop("variants", None)
        if variants is not None:
            if variant not in variants:
                raise UserError(f"{path} holds several recipes; name one: {' '.join(variants)}")
            settings = merged(settings | {"name": variant}, variants[variant] or {})
        elif variant not in (None, settings.get("name")):
            raise UserError(f"{path} holds one recipe, {settings.get('name')}: name that or none")
        rate = settings.pop("lr", None)
        try:
            recipe = cls(**settings)
            return recipe if rate is None else recipe.with_rate(rate)
        except TypeError as error:
            raise _no_recipe(path, error) from None

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    def resolution(self, epoch: int) -> int:
        """Side of the training images, in pixels, in an epoch (from 1)."""
        begun = [side for first, side in sorted(self.resolutions.items()) if first <= epoch]
        return begun[-1] if begun else self.preprocessing["input_size"][-1]

    @property
    def norm(self) -> str:
        return norm_of(self.architecture, self.model_args)

    def with_rate(self, lr: float) -> "Recipe":
        """The same with another learning rate; the schedule's other rates keep their ratio."""
        factor = lr / self.optimizer["lr"]
        rates = {
            k: self.scheduler[k] * factor for k in ("min_lr", "warmup_lr") if k in self.scheduler
        }
        return replace(
            self, optimizer=self.optimizer | {"lr": lr}, scheduler=self.scheduler | rates
        )


BLAMED = (AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def settings(name: str) -> Iterator[None]:
    """Turns what a library says of the recipe's settings into a UserError that names them."""
    try:
        yield
    except BLAMED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the recipe's {name} will not do: {reason}") from None


def contents(path: Path) -> dict[str, Any]:
    """What a file of recipes says; raises UserError."""
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise _no_recipe(path, error) from None


def _no_recipe(path: Path, error: Exception) -> UserError:
    known = ", ".join(Recipe.__dataclass_fields__)
    return UserError(f"{path} is not a recipe ({error}); its fields are: {known}")


def names(path: Path) -> list[str | None]:
    """The variants that a file lists, or [None] for a file of one recipe."""
    return list(contents(path).get("variants") or [None])


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes on top; mappings are merged key by key."""
    result = deepcopy(settings)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = result[key] | value if both else deepcopy(value)
    return result
