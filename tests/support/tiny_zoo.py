"""A zoo of one real, untrained checkpoint in a temporary folder, for tests."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import PretrainedCfg, _registry
from torch import nn

import kn_zoo
from kn_zoo.checkpoints import bundle, manifest
from kn_zoo.checkpoints.manifest import Checkpoint

ROOT = Path(__file__).parents[2]
ARCHITECTURE = "knpreactresnet20_cifar"
NAME = f"{ARCHITECTURE}.tiny"
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def draft(name: str = NAME, **changes: Any) -> Checkpoint:
    """Return the entry of a checkpoint before its bundle is written."""
    checkpoint = Checkpoint(
        name=name,
        model_args={"dropout_p": 0.125},
        dataset=manifest.Dataset("digits", "test", 12, 10),
        reported=manifest.Reported("kn_zoo", {"expected": manifest.Accuracy(25.0, 75.0)}),
        preprocessing=manifest.Preprocessing((1, 8, 8), (0.0,), (1.0,), "bilinear", 1.0, "center"),
        licenses=manifest.Licenses("MIT", "MIT", "CC-BY-4.0"),
        recipe="train_scripts/recipes/tiny.yaml",
        seeds=(3, 4),
        parameters=1,
        flops=1,
    )
    return replace(checkpoint, **changes)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(ARCHITECTURE, num_classes=10, in_chans=1, dropout_p=0.125)


def write(model: nn.Module, checkpoint: Checkpoint, log: Path, **changes: Any) -> Checkpoint:
    """Call `bundle.write` with plausible other arguments."""
    log.write_text("epoch,loss\n0,2.5\n1,2.25\n", encoding="utf-8")
    random = np.random.RandomState(0)
    logits = -np.sort(-random.standard_normal((12, 5)), axis=1)
    indices = np.array([random.permutation(10)[:5] for _ in range(12)])
    predictions = SimpleNamespace(indices=indices, logits=logits, targets=indices[:, 2])
    arguments: dict[str, Any] = {
        "recipe": {"model": checkpoint.architecture, "lr": 0.1},
        "log": log,
        "predictions": predictions,
        "class_names": CLASSES,
    }
    return bundle.write(model, checkpoint, **{**arguments, **changes})


@dataclass(frozen=True)
class Zoo:
    checkpoint: Checkpoint
    model: nn.Module  # whose numbers the weights file contains

    @property
    def file(self) -> Path:
        return self.checkpoint.folder / manifest.WEIGHTS_FILE

    def same(self, model: nn.Module) -> bool:
        """Return whether the parameters of a model are exactly the stored ones."""
        loaded, stored = model.state_dict(), self.model.state_dict()
        return loaded.keys() == stored.keys() and all(
            loaded[key].dtype == torch.float32 and torch.equal(loaded[key], stored[key])
            for key in stored
        )


def make(
    folder: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint | None = None
) -> Zoo:
    """Put the manifest and the bundles into `folder`, with one checkpoint stored as float16."""
    folder.mkdir(exist_ok=True)
    empty_manifest(folder, monkeypatch)
    model = network()
    bundle.round_weights(model, torch.float16)
    written = write(model, checkpoint or draft(), folder / "log.csv", dtype=torch.float16)
    register(monkeypatch)
    return Zoo(written, model)


def empty_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PATH", folder / "weights_manifest.json")
    monkeypatch.setattr(manifest, "PRETRAINED", folder / "pretrained")
    monkeypatch.setattr(manifest, "REPOSITORY", folder / "checkpoints")
    manifest.PATH.write_text('{"namespace": "owner", "checkpoints": []}', encoding="utf-8")


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the checkpoints of the manifest with timm, as importing kn_zoo does."""
    registered = _registry._model_pretrained_cfgs
    shared = registered[ARCHITECTURE]
    names = {key: getattr(shared, key) for key in ("first_conv", "classifier")}
    for key, cfg in manifest.pretrained_cfgs(ARCHITECTURE, **names).items():
        architecture, _, tag = key.strip("*").partition(".")
        ready = PretrainedCfg(**cfg, architecture=architecture, tag=tag or None)
        monkeypatch.setitem(registered, key.strip("*"), ready)
        if key.endswith("*") or not tag:
            monkeypatch.setitem(registered, architecture, ready)


def copy_package(folder: Path, checkpoints: list[Checkpoint]) -> Path:
    """Make a checkout with these checkpoints in its manifest and without bundles."""
    ignore = shutil.ignore_patterns("__pycache__", "pretrained")
    shutil.copytree(Path(kn_zoo.__file__).parent, folder / "kn_zoo", ignore=ignore)
    shutil.copy(ROOT / "hubconf.py", folder)
    for name in ("eval/verify.py", "train_scripts/push_to_hub.py"):
        (folder / name).parent.mkdir()
        shutil.copy(ROOT / name, folder / name)
    document = {
        "namespace": "owner",
        "checkpoints": [checkpoint.to_json() for checkpoint in checkpoints],
    }
    (folder / "weights_manifest.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


CHILD = """
import hashlib, huggingface_hub, json, os, sys, time, timm, kn_zoo
time.sleep = lambda seconds: None  # the Hub's client waits 23 s before it gives up a dead server
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # small files come in several pieces too
for line in sys.stdin:
    name, options = json.loads(line)
    last_as_root = options.pop("last_as_root", False)
    try:
        model = timm.create_model(name, pretrained=True, **options)
        numbers = b"".join(x.numpy().tobytes() for x in model.state_dict().values())
        answer = {"sha256": hashlib.sha256(numbers).hexdigest()}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    if last_as_root and os.getuid() == 0:  # who could write what is read-only
        os.setegid(65534), os.seteuid(65534)
    print(json.dumps(answer), flush=True)
"""


class Child:
    """Another process that loads models by name from the package in `folder`."""

    def __init__(self, folder: Path, **environment: str):
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )

    def load(self, name: str, **options: Any) -> dict[str, str]:
        """Return the SHA-256 of the model's numbers, or the error and its message."""
        self.ask(name, **options)
        return self.answer()

    def ask(self, name: str, **options: Any) -> None:
        """Start to load a model; `answer` waits for it."""
        assert self.process.stdin
        print(json.dumps([name, options]), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, str]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()
