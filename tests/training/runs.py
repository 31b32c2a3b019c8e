"""Short runs of train.py on the digits: start, interrupt and compare them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kn_zoo import cli
from kn_zoo.checkpoints import manifest
from kn_zoo.training import command
from kn_zoo.training import trainer as training
from train_scripts import train

ROOT = Path(__file__).parents[2]
UPDATES = 4  # per epoch of 596 digits at batch size 128


def write_recipe(path: Path, **changes: Any) -> Path:
    digits = ROOT / "train_scripts/recipes/knpreactresnet20_cifar.digits.yaml"
    fields = yaml.safe_load(digits.read_text())
    fields |= {"epochs": 2, "batch_size": 128, "sampled_draws": 2, "train_split": "test"}
    fields["scheduler"] |= {"warmup_epochs": 1}
    path.write_text(yaml.safe_dump(fields | changes))
    return path


def run(*arguments: object) -> int:
    """Exit status of train.py with these arguments."""
    return cli.run(train.app, command.spread_seeds([str(a) for a in arguments]))


def at_update(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Call `action` during the given update of the next run."""
    update, count = training.Trainer.update, 0

    def watched(self: training.Trainer, *batch: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if self.progress.updates + 1 == number:
            action()
        return update(self, *batch)

    monkeypatch.setattr(training.Trainer, "update", watched)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def newest(folder: Path) -> int:
    """Update of the newest training state, 0 if there is none."""
    return max((int(p.name[-9:]) for p in folder.glob("state-*")), default=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "bundle" / manifest.WEIGHTS_FILE)


def assert_same_result(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert (one / training.LOG).read_bytes() == (other / training.LOG).read_bytes()
