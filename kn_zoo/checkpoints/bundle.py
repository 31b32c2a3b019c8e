"""A weight's bundle: one folder that is laid out as its Hugging Face Hub repository.

``model.safetensors``   the tensors; their hash is in the manifest
``config.json``         timm's description of the network, with the class names
``README.md``           model card
``recipe.yaml``         the settings that the training ran with
``train_log.csv``       its progress
``predictions.npz``     top-5 classes and logits of every image of the evaluation set
``environment.txt``     versions and hardware

``config.json`` and ``README.md`` follow from the manifest: ``python -m kn_zoo.checkpoints.bundle`` writes them
anew for every bundle that travels with the package.
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
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from kn_zoo import __version__
from kn_zoo.checkpoints import loading, manifest
from kn_zoo.checkpoints.card import card
from kn_zoo.checkpoints.loading import CONFIG
from kn_zoo.checkpoints.manifest import WEIGHTS_FILE, Checkpoint, File
from kn_zoo.checkpoints.predictions import NEAR_TIE, Predictions

CARD, RECIPE = "README.md", "recipe.yaml"
LOG, PREDICTIONS, ENVIRONMENT = "train_log.csv", "predictions.npz", "environment.txt"
_RECORDED = ("timm", "numpy", "safetensors", "huggingface_hub")
FILES = (WEIGHTS_FILE, CONFIG, CARD, RECIPE, LOG, PREDICTIONS, ENVIRONMENT)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    folder: Path

    @property
    def weight(self) -> Checkpoint:
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
        """Two logits of an image closer than this may change places on other hardware."""
        return float(self._arrays()["near_tie_bound"])

    def predictions(self) -> Predictions:
        """What the stored weights say about each image, under the statistics ``expected``."""
        arrays = self._arrays()
        return Predictions(arrays["indices"], arrays["logits"], arrays["targets"])

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors in float32, after their file's hash was compared with the manifest's."""
        return loading.read(self.folder / WEIGHTS_FILE, self.weight)

    def _config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        try:
            with path.open("rb") as file:
                return manifest.parse_json(file.read(manifest.MAX_BYTES + 1))
        except (OSError, ValueError) as error:
            raise loading.CorruptWeights(
                f"{path} cannot be read ({loading.first_line(error)}): get the bundle again, or "
                "restore the file with git."
            ) from error

    def _arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / PREDICTIONS, allow_pickle=False) as arrays:
            return dict(arrays)


def get(weight: Checkpoint, cache_dir: str | Path | None = None) -> Bundle:
    """The bundle of a weight: the one that travels with the package, else the Hub's.

    Raises:
        MissingWeights: a file of it is in neither.
    """
    files = [loading.locate(weight, name, cache_dir) for name in FILES]
    return Bundle(files[0].parent)


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, input_size: Sequence[int]) -> int:
    """Operations of the convolutions and linear layers for one image of `input_size` (C, H, W).

    A multiplication and an addition are two operations. What normalizes is left out, as is usual,
    so the number says what the network is and not how a layer is implemented today.
    """
    counted = 0

    def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal counted
        weight: Any = layer.weight  # (outputs, what each of them is a sum over)
        counted += 2 * output.numel() * weight[0].numel()

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
    return counted


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's numbers to those that `dtype` can store; their type stays what it is.

    Call it before the evaluation whose predictions go into the bundle.
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
    predictions: Predictions | bytes,
    class_names: Sequence[str],
    dtype: torch.dtype = torch.float32,
    seconds: float | None = None,
    folder: Path | None = None,
) -> Checkpoint:
    """Write a trained model as a bundle of the package, and enter it in the manifest.

    Everything is written beside and put into place at the end: a bundle of that name is replaced by
    the whole new one or stays as it is.

    Args:
        draft: what the manifest shall say; file, parameters and FLOPs are taken from the model.
        recipe: the settings that the training ran with.
        log: the CSV file of its progress.
        predictions: made by ``model`` as it is stored, see `round_weights`; or the file's contents.
        dtype: how floating-point numbers are stored.
        seconds: that the training took, where that is known.
        folder: a place outside the package: the bundle is then the user's own, not in the manifest.

    Returns:
        The weight as the manifest has it.

    Raises:
        ValueError: the model's numbers are not those that ``dtype`` stores, a class has no name, or
            ``folder`` holds something else than a bundle.
        OSError: the disk is full or not writable; what was there before is untouched.
    """
    if len(class_names) != draft.dataset.num_classes:
        raise ValueError(f"Give {draft.dataset.num_classes} class names, not {len(class_names)}.")
    data = to_safetensors(_stored(model, dtype), metadata={"format": "pt"})
    sha256 = hashlib.sha256(data).hexdigest()
    weight = replace(
        draft,
        file=File(sha256, len(data), str(dtype).removeprefix("torch.")),
        parameters=parameters(model),
        flops=flops(model, draft.preprocessing.input_size),
        bundle=folder is None,
    )
    took = "" if seconds is None else f"training {seconds / 3600:.3g} hours\n"
    contents = {
        WEIGHTS_FILE: data,
        CONFIG: config(weight, model, class_names, in_manifest=folder is None).encode(),
        CARD: card(weight).encode(),
        RECIPE: yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).encode(),
        LOG: log.read_bytes(),
        PREDICTIONS: predictions
        if isinstance(predictions, bytes)
        else _predictions_file(predictions),
        ENVIRONMENT: (environment() + took).encode(),
    }
    with _replaced(folder or weight.folder, contents):
        if folder is None:
            manifest.write_entry(weight)
    return weight


def config(
    weight: Checkpoint, model: nn.Module, class_names: Sequence[str], in_manifest: bool = True
) -> str:
    """``config.json`` as timm reads it from a Hub repository or a folder.

    The mark that `kn_zoo.checkpoints.loading` knows a manifest weight by is set only if it is `in_manifest`.
    """
    registered: Any = model.pretrained_cfg
    cfg = {k: v for k, v in weight.pretrained_cfg().items() if k not in ("file", "hf_hub_id")}
    cfg.update({k: registered[k] for k in ("first_conv", "classifier")}, tag=weight.tag)
    document = {
        "architecture": weight.architecture,
        "num_classes": weight.dataset.num_classes,
        "num_features": model.num_features,
        "model_args": dict(weight.model_args),
        "label_names": list(class_names),
        "pretrained_cfg": cfg,
    }
    if in_manifest:
        document[loading.MARKER] = weight.name
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def environment() -> str:
    """Versions and hardware, one line each, and the commit if this is a checkout."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [f"kn_zoo {__version__}{_commit()}", f"python {platform.python_version()}"]
    lines += [f"torch {torch.__version__}", *(f"{name} {version(name)}" for name in _RECORDED)]
    processor = f"cpu {cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, threads used "
    lines += [f"platform {platform.platform()}", f"cpu cores {os.cpu_count()}"]
    lines += [f"{processor}{torch.get_num_threads()}", f"gpu {device}"]
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the code, if this is a checkout; what training writes is no code."""
    root = manifest.PACKAGE.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    written = [":!kn_zoo/pretrained", ":!weights_manifest.json", ":!results"]
    commands = (
        ["git", "describe", "--always"],
        ["git", "diff", "--quiet", "HEAD", "--", ".", *written],
    )
    found, changed = (
        subprocess.run(command, cwd=root, capture_output=True, text=True) for command in commands
    )
    dirty = "-dirty" if changed.returncode else ""
    return f" at commit {found.stdout.strip()}{dirty}" if found.returncode == 0 else ""


def refresh() -> list[Path]:
    """Write anew what follows from the manifest in each bundle of the package; what changed."""
    changed = []
    for weight in manifest.load().values():
        if not weight.bundle:
            continue
        model = timm.create_model(weight.name)
        names = Bundle(weight.folder).class_names
        for name, text in {CONFIG: config(weight, model, names), CARD: card(weight)}.items():
            path = weight.folder / name
            if path.read_text(encoding="utf-8") != text:
                manifest.write_text(path, text)
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


def _predictions_file(predictions: Predictions) -> bytes:
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


@contextlib.contextmanager
def _replaced(folder: Path, contents: Mapping[str, bytes]) -> Iterator[None]:
    """Put a folder of files in the place of another; the other comes back if the body fails."""
    strangers = {path.name for path in folder.glob("*")} - set(contents)
    if strangers:
        raise ValueError(f"{folder} holds {min(strangers)}: choose a new folder for the bundle.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            new, old = Path(beside) / "new", Path(beside) / "old"
            new.mkdir()
            for name, data in contents.items():
                _write_durably(new / name, data)
            with _exchanged(folder, new, old):
                yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder} could not be written ({error.strerror}); what was there is untouched. "
            "Make room, or choose another folder.",
        ) from error


@contextlib.contextmanager
def _exchanged(folder: Path, new: Path, old: Path) -> Iterator[None]:
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
        yield
    except BaseException:
        if old.exists():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(old, folder)
        raise


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    for changed_file in refresh():
        print(changed_file)
