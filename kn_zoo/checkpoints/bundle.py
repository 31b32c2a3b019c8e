"""Bundles: one folder per checkpoint, laid out as its Hugging Face Hub repository.

``model.safetensors``   tensors; their SHA-256 is in the manifest (left out for some baselines)
``config.json``         timm's description of the network, with the class names
``README.md``           model card
``recipe.yaml``         settings of the training run
``train_log.csv``       its metrics, one row per epoch
``predictions.npz``     top-5 classes and logits, or the label map, of every evaluation image
``environment.txt``     versions and hardware

``config.json`` and ``README.md`` are generated from the manifest: ``python -m
kn_zoo.checkpoints.bundle`` updates them in every bundle of the package and the repository.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from kn_zoo import __version__
from kn_zoo.checkpoints import files, loading, manifest, networks
from kn_zoo.checkpoints.card import card
from kn_zoo.checkpoints.label_maps import LabelMaps
from kn_zoo.checkpoints.loading import CONFIG
from kn_zoo.checkpoints.manifest import WEIGHTS_FILE, Checkpoint, File, Run
from kn_zoo.checkpoints.predictions import NEAR_TIE, Predictions

CARD, RECIPE = "README.md", "recipe.yaml"
LOG, PREDICTIONS, ENVIRONMENT = "train_log.csv", "predictions.npz", "environment.txt"
_RECORDED = ("timm", "numpy", "safetensors", "huggingface_hub")
FILES = (WEIGHTS_FILE, CONFIG, CARD, RECIPE, LOG, PREDICTIONS, ENVIRONMENT)
PACKAGE_LIMIT = 10_000_000  # bytes of all bundles in the wheel
FILE_LIMIT = 25_000_000  # bytes of the weights of a bundle in the repository


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    folder: Path

    @property
    def checkpoint(self) -> Checkpoint:
        """Its entry in the manifest; `LookupError` if it has none."""
        return manifest.find(str(self._config().get(loading.MARKER)))

    @property
    def class_names(self) -> tuple[str, ...]:
        names = self._config().get("label_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise loading.CorruptWeights(f"{self.folder / CONFIG} does not name the classes.")
        return tuple(names)

    @property
    def near_tie_bound(self) -> float:
        """Two logits of an image closer than this may be ordered differently on other hardware."""
        return float(self._arrays()["near_tie_bound"])

    def predictions(self) -> Predictions:
        """Return the predictions of the stored weights under the statistics ``expected``."""
        arrays = self._arrays()
        return Predictions(arrays["indices"], arrays["logits"], arrays["targets"])

    def label_maps(self) -> LabelMaps:
        """Return the label maps of a segmentation network under the statistics ``expected``."""
        return LabelMaps.read(self.folder / PREDICTIONS)

    def _config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        try:
            return files.read_json(path)
        except (OSError, ValueError) as error:
            raise loading.CorruptWeights(
                f"{path} cannot be read ({files.first_line(error)}): download the bundle again, or "
                "restore the file with git."
            ) from error

    def _arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / PREDICTIONS, allow_pickle=False) as arrays:
            return dict(arrays)


def files_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the files of a checkpoint's bundle."""
    return FILES if checkpoint.file else FILES[1:]


def get(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> Bundle:
    """Return the bundle of a checkpoint, after downloading it from the Hub if necessary.

    Raises:
        MissingWeights: a file of it cannot be found.
    """
    paths = [loading.locate(checkpoint, name, cache_dir) for name in files_of(checkpoint)]
    return Bundle(paths[0].parent)


def parameters(model: nn.Module) -> int:
    """Count the trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, input_size: Sequence[int]) -> int:
    """Count the operations of the convolutions and linear layers for one image.

    A multiplication and an addition count as two. Normalization is not counted, as is usual, so
    that the number describes the network and not the implementation of its layers.

    Args:
        input_size: shape of the image, (C, H, W).
    """
    total = 0

    def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        weight: Any = layer.weight  # weight[0]: the terms of the sum of one output
        total += 2 * output.numel() * weight[0].numel()

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    example, training = next(model.parameters()), model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size, device=example.device, dtype=example.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the numbers of a model to those that ``dtype`` can store; their type stays the same.

    Call it before the evaluation whose predictions are stored in the bundle.
    """
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))


def write(
    model: nn.Module,
    draft: Checkpoint,
    *,
    recipe: Mapping[str, Any],
    log: Path,
    predictions: Predictions | LabelMaps,
    class_names: Sequence[str],
    dtype: torch.dtype = torch.float32,
    seconds: float | None = None,
    target: Path | str = "package",
    include_weights: bool = True,
) -> Checkpoint:
    """Write the bundle of a trained model, and its entry in the manifest.

    The bundle is replaced atomically: it is written completely, or stays as it was.

    Args:
        draft: the entry; its file, parameters, FLOPs and bundle are filled in.
        recipe: settings of the training run.
        log: CSV file of its metrics.
        predictions: made by ``model`` as it is stored, see `round_weights`.
        dtype: type that floating-point numbers are stored in.
        seconds: duration of the training.
        target: "package" or "repository" (see `Checkpoint.bundle`; what would grow the package
            beyond `PACKAGE_LIMIT` goes to the repository), or another folder: the bundle is then
            the user's own and not in the manifest.
        include_weights: False leaves the weights file out, for baselines of which the predictions
            are enough.

    Returns:
        The entry as it is in the manifest.

    Raises:
        ValueError: ``dtype`` cannot store the numbers of the model, a class has no name, the entry
            is invalid, or the folder holds other files than those of a bundle.
        WriteError: the bundle or the manifest cannot be written; both are unchanged.
    """
    if len(class_names) != draft.dataset.num_classes:
        raise ValueError(f"Give {draft.dataset.num_classes} class names, not {len(class_names)}.")
    data = to_safetensors(_stored(model, dtype), metadata={"format": "pt"})
    sha256 = hashlib.sha256(data).hexdigest()
    file = File(sha256, len(data), str(dtype).removeprefix("torch."))
    in_manifest = target in ("package", "repository")
    checkpoint = replace(
        draft,
        file=file if include_weights else None,
        parameters=parameters(model),
        flops=flops(model, draft.preprocessing.input_size),
        bundle=str(target) if in_manifest else None,
    )
    duration = "" if seconds is None else f"training {seconds / 3600:.3g} hours\n"
    contents = {
        WEIGHTS_FILE: data,
        CONFIG: config(checkpoint, model, class_names, in_manifest).encode(),
        CARD: card(checkpoint).encode(),
        RECIPE: yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).encode(),
        LOG: log.read_bytes(),
        PREDICTIONS: _predictions_file(predictions),
        ENVIRONMENT: (environment() + duration).encode(),
    }
    names = files_of(checkpoint)
    size = _packaged(checkpoint.name) + sum(len(contents[name]) for name in names)
    if target == "package" and size > PACKAGE_LIMIT:
        target, checkpoint = "repository", replace(checkpoint, bundle="repository")
        contents[CARD] = card(checkpoint).encode()  # it says where the file is
    folder = checkpoint.folder if in_manifest else Path(target)
    if unexpected := {path.name for path in folder.glob("*")} - set(FILES):
        raise ValueError(
            f"{folder} contains {min(unexpected)}: choose a new folder for the bundle."
        )
    with files.replace_folder(folder, {name: contents[name] for name in names}):
        if in_manifest:
            manifest.write_entry(checkpoint)
    if in_manifest:  # a retrained checkpoint may have outgrown the package
        other = "repository" if target == "package" else "package"
        shutil.rmtree(replace(checkpoint, bundle=other).folder, ignore_errors=True)
    return checkpoint


def _packaged(but: str) -> int:
    """Bytes of the bundles in the package, except one."""
    stored = (file for file in manifest.PRETRAINED.glob("*/*") if file.parent.name != but)
    return sum(file.stat().st_size for file in stored)


def add_run(checkpoint: Checkpoint, run: Run) -> Checkpoint:
    """Add the accuracy of another seed to a checkpoint's entry in the manifest and to its card.

    Returns:
        The entry as it is in the manifest.

    Raises:
        ValueError: the checkpoint has a run of this seed.
        WriteError: the manifest cannot be written.
    """
    first = Run(checkpoint.seeds[0], checkpoint.reported.statistics)
    runs = (*(checkpoint.runs or (first,)), run)
    extended = replace(checkpoint, runs=runs, seeds=tuple(run.seed for run in runs))
    manifest.write_entry(extended)
    files.write_text(extended.folder / CARD, card(extended))
    return extended


def config(
    checkpoint: Checkpoint, model: nn.Module, class_names: Sequence[str], in_manifest: bool = True
) -> str:
    """Return ``config.json`` as timm reads it from a Hub repository or a folder.

    The marker that identifies a checkpoint of the manifest is set only if it is ``in_manifest``.
    """
    registered: Any = model.pretrained_cfg
    cfg = {k: v for k, v in checkpoint.pretrained_cfg().items() if k not in ("file", "hf_hub_id")}
    cfg.update({k: registered[k] for k in ("first_conv", "classifier")}, tag=checkpoint.tag)
    document = {
        "architecture": checkpoint.architecture,
        "num_classes": checkpoint.dataset.num_classes,
        "num_features": model.num_features,
        "model_args": dict(checkpoint.model_args),
        "label_names": list(class_names),
        "pretrained_cfg": cfg,
    }
    if in_manifest:
        document[loading.MARKER] = checkpoint.name
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def environment() -> str:
    """Return versions and hardware, one per line, and the commit in a checkout."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [f"kn_zoo {__version__}{_commit()}", f"python {platform.python_version()}"]
    lines += [f"torch {torch.__version__}", *(f"{name} {version(name)}" for name in _RECORDED)]
    processor = f"cpu {cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, threads used "
    lines += [f"platform {platform.platform()}", f"cpu cores {os.cpu_count()}"]
    lines += [f"{processor}{torch.get_num_threads()}", f"gpu {device}"]
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """Return the model name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of a checkout, "-dirty" if files changed that are not generated."""
    root = manifest.PACKAGE.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    generated = ("kn_zoo/pretrained", "checkpoints", "weights_manifest.json", "results")
    exclude = [f":!{path}" for path in generated]
    commands = (
        ["git", "describe", "--always"],
        ["git", "diff", "--quiet", "HEAD", "--", ".", *exclude],
    )
    describe, diff = (
        subprocess.run(command, cwd=root, capture_output=True, text=True) for command in commands
    )
    dirty = "-dirty" if diff.returncode else ""
    return f" at commit {describe.stdout.strip()}{dirty}" if describe.returncode == 0 else ""


def refresh() -> list[Path]:
    """Update the generated files of the bundles in the package and the repository.

    Returns:
        The files that changed.
    """
    changed = []
    for checkpoint in manifest.load().values():
        if not checkpoint.bundle:
            continue
        model = networks.create(checkpoint)
        names = Bundle(checkpoint.folder).class_names
        generated = {CONFIG: config(checkpoint, model, names), CARD: card(checkpoint)}
        for name, text in generated.items():
            path = checkpoint.folder / name
            if path.read_text(encoding="utf-8") != text:
                files.write_text(path, text)
                changed.append(path)
    return changed


def _stored(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for key, tensor in model.state_dict().items():
        stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not torch.equal(stored.to(tensor.dtype), tensor):
            raise ValueError(
                f"{key} has numbers that {dtype} cannot store. Call bundle.round_weights(model, "
                f"{dtype}) before the evaluation, so that the predictions are those of the file."
            )
        tensors[key] = stored.cpu().contiguous()
    return tensors


def _predictions_file(predictions: Predictions | LabelMaps) -> bytes:
    if isinstance(predictions, LabelMaps):
        return predictions.to_bytes()
    file = io.BytesIO()
    np.savez_compressed(
        file,
        indices=np.asarray(predictions.indices, dtype=np.int16),
        logits=np.asarray(predictions.logits, dtype=np.float32),
        targets=np.asarray(predictions.targets, dtype=np.int16),
        statistics=np.asarray("expected"),
        near_tie_bound=np.asarray(NEAR_TIE),
    )
    return file.getvalue()


if __name__ == "__main__":
    for path in refresh():
        print(path)
