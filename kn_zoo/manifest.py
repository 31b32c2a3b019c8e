"""What every trained weight of the zoo is, read from one file: ``weights_manifest.json``.

All that timm, the Hub, the documentation and the verification say about a weight is generated from
its entry here; ``weights_manifest.schema.json`` tells what an entry holds. Reading needs no network
and no file outside the package.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any

PACKAGE = Path(__file__).resolve().parent
PRETRAINED = PACKAGE / "pretrained"  # bundles that travel with the package
_INSTALLED = (
    PACKAGE / "weights_manifest.json"
)  # where a wheel puts the manifest of the checkout's root
PATH = _INSTALLED if _INSTALLED.is_file() else PACKAGE.parent / "weights_manifest.json"
WEIGHTS_FILE = "model.safetensors"


class ManifestError(RuntimeError):
    """The manifest is missing or cannot be read; the message names the cure."""


@dataclass(frozen=True)
class Dataset:
    """The evaluation set: ``images`` is how many of them the reported accuracy was taken on."""

    name: str
    split: str
    images: int
    num_classes: int


@dataclass(frozen=True)
class Accuracy:
    """Accuracies in percent; ``draws`` passes over the data were averaged (1 unless sampled).

    ``top1_sd`` is the standard deviation over the draws, where it was measured.
    """

    top1: float
    top5: float | None
    draws: int = 1
    top1_sd: float | None = None


@dataclass(frozen=True)
class Reported:
    """Accuracy by inference statistics (``expected``, ``plain``, ``sampled``); who measured it."""

    by: str
    statistics: Mapping[str, Accuracy]


@dataclass(frozen=True)
class Run:
    """What training from one seed came to, by inference statistics."""

    seed: int
    statistics: Mapping[str, Accuracy]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Run:
        return cls(entry["seed"], _accuracies(entry["statistics"]))


@dataclass(frozen=True)
class File:
    """The stored ``model.safetensors``: full hash, size in bytes, type of its numbers."""

    sha256: str
    bytes: int
    dtype: str


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network; ``input_size`` is (channels, height, width)."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str


@dataclass(frozen=True)
class Hub:
    """A Hugging Face Hub repository (``owner/name``) at one revision."""

    repository: str
    revision: str

    @property
    def id(self) -> str:
        """The way timm writes it: ``owner/name@revision``."""
        return f"{self.repository}@{self.revision}"


@dataclass(frozen=True)
class Upstream:
    """A checkpoint published by others, in a format that the zoo converts when it loads it."""

    source: str
    format: str
    note: str | None


@dataclass(frozen=True)
class Licenses:
    """Licences of the code, of the weights and of the data they were trained on."""

    code: str
    weights: str
    data: str


@dataclass(frozen=True)
class Weight:
    """One entry. ``flops``: convolutions and linear layers, one image, multiply and add apart."""

    name: str
    model_args: Mapping[str, Any]
    dataset: Dataset
    reported: Reported
    preprocessing: Preprocessing
    licenses: Licenses
    recipe: str | None
    seeds: tuple[int, ...]
    runs: tuple[Run, ...] = ()  # one a seed, if there are several
    # Taken from the trained model by `kn_zoo.bundle.write`, and from where it is published.
    parameters: int = 0
    flops: int = 0
    file: File | None = None
    bundle: bool = False
    hub: Hub | None = None
    upstream: Upstream | None = None

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        return self.name.partition(".")[2]

    @property
    def folder(self) -> Path:
        """Where the bundle lies if it travels with the package."""
        return PRETRAINED / self.name

    @property
    def available(self) -> bool:
        """Whether there is a file whose hash is known and a place to get it from."""
        return self.file is not None and (self.bundle or self.hub is not None)

    def mean_and_sd(self, statistics: str = "expected") -> tuple[float, float] | None:
        """Top-1 over the runs, and its sample standard deviation; None if there are no runs."""
        if len(self.runs) < 2:
            return None
        found = [run.statistics[statistics].top1 for run in self.runs]
        return mean(found), stdev(found)

    def pretrained_cfg(self) -> dict[str, Any]:
        """The fields of timm's ``PretrainedCfg`` that belong to the weight."""
        cfg: dict[str, Any] = asdict(self.preprocessing)
        cfg["num_classes"] = self.dataset.num_classes
        cfg["license"] = self.licenses.weights.lower()
        if self.file and self.bundle:
            cfg["file"] = str(self.folder / WEIGHTS_FILE)
        if self.file and self.hub:
            cfg["hf_hub_id"] = self.hub.id
        if self.upstream:
            cfg["origin_url"] = self.upstream.source
        return cfg

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Weight:
        """An entry as ``json.load`` gives it."""
        accuracies = _accuracies(entry["reported"]["statistics"])
        steps: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in entry["preprocessing"].items()
        }
        fields: dict[str, Any] = {
            "dataset": Dataset(**entry["dataset"]),
            "reported": Reported(entry["reported"]["by"], accuracies),
            "file": entry["file"] and File(**entry["file"]),
            "preprocessing": Preprocessing(**steps),
            "hub": entry["hub"] and Hub(**entry["hub"]),
            "upstream": entry["upstream"] and Upstream(**entry["upstream"]),
            "licenses": Licenses(**entry["licenses"]),
            "seeds": tuple(entry["seeds"]),
            "runs": tuple(Run.from_json(run) for run in entry.get("runs", ())),
        }
        return cls(**{**entry, **fields})

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in the manifest, which is silent of runs that were not made."""
        entry = json.loads(json.dumps(asdict(self, dict_factory=_measured)))
        if not entry["runs"]:
            del entry["runs"]
        return entry


def _measured(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if key != "top1_sd" or value is not None}


def _accuracies(statistics: Mapping[str, Any]) -> dict[str, Accuracy]:
    return {name: Accuracy(**accuracy) for name, accuracy in statistics.items()}


def load(path: Path | None = None) -> Mapping[str, Weight]:
    """All weights by name, in the order of the manifest (the package's own unless given)."""
    return _load(path or PATH)


@lru_cache
def _load(path: Path) -> Mapping[str, Weight]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["weights"]
        return MappingProxyType({entry["name"]: Weight.from_json(entry) for entry in entries})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"Cannot read {path} ({type(error).__name__}: {error}). "
            "Install kn_zoo again, or restore the file with git."
        ) from error


def find(name: str) -> Weight:
    """The weight ``architecture.tag``, or the default one of ``architecture``.

    Raises:
        LookupError: there is no such weight; the message lists names that are near.
    """
    weights = load()
    if name in weights:
        return weights[name]
    if default := _default(name):
        return default
    near = difflib.get_close_matches(name, weights, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(weights)}."
    raise LookupError(f"No weight is called {name!r}. {hint}")


def _default(architecture: str) -> Weight | None:
    """The first weight of an architecture that is available, else its first, else nothing."""
    weights = [weight for weight in load().values() if weight.architecture == architecture]
    return next((weight for weight in weights if weight.available), weights[0] if weights else None)


def pretrained_cfgs(architecture: str, **defaults: Any) -> dict[str, dict[str, Any]]:
    """What ``timm.models.generate_default_cfgs`` takes: one cfg for each weight of an architecture.

    ``defaults`` are timm's fields that belong to the architecture (``first_conv``, ``classifier``,
    the sizes it was made for); an architecture without weights has them for its only cfg.
    """
    default = _default(architecture)
    if default is None:
        return {architecture: defaults}
    weights = [weight for weight in load().values() if weight.architecture == architecture]
    cfgs = {w.name: {**defaults, **w.pretrained_cfg()} for w in weights if w != default}
    # timm makes the tag with a star the default, whatever came before it.
    cfgs[f"{default.name}*"] = {**defaults, **default.pretrained_cfg()}
    return cfgs


def write_entry(weight: Weight, path: Path | None = None) -> None:
    """Put a weight into the manifest, in the place of the one of that name if there is one."""
    path = path or PATH
    document = json.loads(path.read_text(encoding="utf-8"))
    entries = document["weights"]
    names = [entry["name"] for entry in entries]
    if weight.name in names:
        entries[names.index(weight.name)] = weight.to_json()
    else:
        entries.append(weight.to_json())
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    _load.cache_clear()


def write_text(path: Path, text: str) -> None:
    """Replace a file by new text as a whole: a reader, or a full disk, never meets a part of it."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # mkstemp's own mode hides the file from other users
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
