"""The manifest, ``weights_manifest.json``: the metadata of every checkpoint of the zoo.

timm's configurations, the model cards and the documentation are generated from it. The dataclasses
below are its format: one class per JSON object, one field per key. A field with a default is
optional, and omitted from the file where it has that default. To extend the format, add a field
with a default.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache, lru_cache
from math import inf, isfinite
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType, NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from kn_zoo.checkpoints.files import read_json, write_text

PACKAGE = Path(__file__).resolve().parents[1]
PRETRAINED = PACKAGE / "pretrained"  # bundles in the package
REPOSITORY = PACKAGE.parent / "checkpoints"  # larger bundles, in the repository only
_INSTALLED = PACKAGE / "weights_manifest.json"  # where a wheel puts the repository's manifest
PATH = _INSTALLED if _INSTALLED.is_file() else PACKAGE.parent / "weights_manifest.json"
WEIGHTS_FILE = "model.safetensors"
FCN = "fcn_"  # prefix of the segmentation architectures

# Types of fields: a string is annotated with a pattern, a number with its lowest and highest value.
Text = Annotated[str, r"(?s).*\S.*"]
Count = Annotated[int, (1, inf)]
Seed = Annotated[int, (0, inf)]
Percent = Annotated[float, (0, 100)]
Positive = Annotated[float, (sys.float_info.min, inf)]
Probability = Annotated[float, (sys.float_info.min, 1)]
Statistics = Annotated[str, r"expected|plain|sampled"]


class ManifestError(RuntimeError):
    """The manifest is missing or invalid; the message names the fix."""


@dataclass(frozen=True)
class Dataset:
    """Evaluation set; ``images`` is the number of images that accuracy was measured on."""

    name: Annotated[str, r"[a-z0-9][a-z0-9_-]*"]
    split: Annotated[str, r"[a-z]+"]
    images: Count
    num_classes: Annotated[int, (2, inf)]


@dataclass(frozen=True)
class Segmentation:
    """Scores of label maps in percent; ``iou`` contains the classes that occur, by name."""

    miou: Percent
    class_accuracy: Percent
    iou: Mapping[str, Percent]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy in percent, the mean of ``draws`` passes over the data (1 unless sampled).

    ``top1_sd`` is the standard deviation over the draws, None if it was not measured. A
    ``segmentation`` network classifies pixels: its top-1 accuracy is that of the labelled pixels.
    """

    top1: Percent
    top5: Percent | None
    draws: Count = 1
    top1_sd: Annotated[float, (0, inf)] | None = None
    segmentation: Segmentation | None = None


@dataclass(frozen=True)
class Reported:
    """Accuracy by inference statistics, and who measured it."""

    by: Annotated[str, r"kn_zoo|authors of the paper"]
    statistics: Mapping[Statistics, Accuracy]


@dataclass(frozen=True)
class Run:
    """Accuracy by inference statistics of a training run with one seed."""

    seed: Seed
    statistics: Mapping[Statistics, Accuracy]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Run:
        """Read a run from JSON.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        return _typed(cls, entry, "run")


@dataclass(frozen=True)
class File:
    """The weights file: its SHA-256, its size in bytes, and the type its numbers are stored in."""

    sha256: Annotated[str, r"[0-9a-f]{64}"]
    bytes: Count
    dtype: Annotated[str, r"float16|float32"]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> File:
        """Read the description of a file from JSON.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        return _typed(cls, entry, "file")


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the network's input of shape ``input_size``, (channels, height, width).

    ``mean`` and ``std`` are those of pixels in [0, 1].
    """

    input_size: tuple[Count, Count, Count]
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    interpolation: Annotated[str, r"nearest|bilinear|bicubic"]
    crop_pct: Annotated[float, (sys.float_info.min, 1)]
    crop_mode: Annotated[str, r"center|squash|border"]


@dataclass(frozen=True)
class Hub:
    """Hugging Face Hub repository (``owner/name``) at one commit."""

    repository: Annotated[str, r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"]
    revision: Annotated[str, r"[0-9a-f]{40}"]

    @property
    def id(self) -> str:
        """``owner/name@revision``, as timm writes it."""
        return f"{self.repository}@{self.revision}"


@dataclass(frozen=True)
class Upstream:
    """Checkpoint of the authors, which `kn_zoo.checkpoints.upstream` downloads and converts.

    ``measured`` is the accuracy of the converted file, None until it has been verified.
    """

    source: Annotated[str, r"https://drive\.google\.com/file/d/[A-Za-z0-9_-]+/view"]
    format: Text
    note: Text | None
    measured: Mapping[Statistics, Accuracy] | None = None


@dataclass(frozen=True)
class Privacy:
    """Guarantee of a differentially private training run (DP-SGD), and what it was computed from.

    Attributes:
        epsilon: of all steps, by ``accountant``; `eval/verify.py` recomputes it.
        delta: probability with which ``epsilon`` may be exceeded.
        epsilon_rdp: the same by Rényi differential privacy, a second and looser upper bound.
        accountant: name and version of what computed ``epsilon``.
        unit: what two neighbouring training sets differ in.
        images: number of training images; it is public.
        noise_multiplier: standard deviation of the noise, as a multiple of ``max_grad_norm``.
        sample_rate: probability with which a step takes an image.
        steps: noisy steps that were taken.
        max_grad_norm: L2 norm that the gradient of each image was clipped to.
        normalizer: constant that the noisy sums of gradients were divided by.
        sampling: how the images of a step were chosen.
        generator: random generators, and whether they are cryptographically secure.
        released: what is published of the run.
        earlier_runs: runs on the same images before this one; ``epsilon`` does not include them.
        public_data: what initial weights and settings owe to other data.
    """

    epsilon: Positive
    delta: Probability
    epsilon_rdp: Positive
    accountant: Text
    unit: Text
    images: Count
    noise_multiplier: Positive
    sample_rate: Probability
    steps: Count
    max_grad_norm: Positive
    normalizer: Positive
    sampling: Annotated[str, r"Poisson"]
    generator: Text
    released: Text
    earlier_runs: Annotated[int, (0, inf)]
    public_data: Text


@dataclass(frozen=True)
class Licenses:
    """Licences of code, weights and training data; SPDX identifiers where they exist."""

    code: Text
    weights: Text
    data: Text


@dataclass(frozen=True)
class Checkpoint:
    """A trained model: its network, data, accuracy, licences, and where its files are.

    Attributes:
        name: ``architecture.tag``, as timm writes it.
        model_args: arguments of the architecture that differ from its defaults. The numbers of
            classes and of input channels follow from ``dataset`` and ``preprocessing``.
        recipe: training recipe, relative to the root of the repository.
        seeds: seed of each training run behind the reported accuracy, the stored one first.
        runs: accuracy of each seed, in that order; empty if there is only one.
        parameters: number of trained parameters.
        flops: operations of the convolutions and linear layers for one image of ``input_size``;
            a multiplication and an addition count as two.
        file: the weights file, None if the weights are not stored.
        bundle: "package" if the bundle is in the package, as ``kn_zoo/pretrained/NAME``;
            "repository" if it is in the repository only, as ``checkpoints/NAME``; None if neither.
        hub: where the bundle is published.
        upstream: where the authors published it; ``file`` then describes the converted file.
        privacy: guarantee of a differentially private training, None if there is none.
    """

    name: Annotated[str, r"[a-z][a-z0-9_]*\.[a-z0-9][a-z0-9_]*"]
    model_args: Mapping[str, Any]
    dataset: Dataset
    reported: Reported
    preprocessing: Preprocessing
    licenses: Licenses
    recipe: Annotated[str, r"train_scripts/recipes/(segmentation/)?[\w.-]+\.yaml"] | None
    seeds: tuple[Seed, ...]
    runs: tuple[Run, ...] = ()
    # Computed from the trained model by `kn_zoo.checkpoints.bundle.write`.
    parameters: Count = 0
    flops: Count = 0
    file: File | None = None
    bundle: Annotated[str, r"package|repository"] | None = None
    hub: Hub | None = None
    upstream: Upstream | None = None
    privacy: Privacy | None = None

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        return self.name.partition(".")[2]

    @property
    def task(self) -> str:
        """ "classification" or "segmentation"."""
        return "segmentation" if self.architecture.startswith(FCN) else "classification"

    @property
    def norm(self) -> str:
        """Normalization of the network: "kernel", or the ``norm`` of a baseline."""
        return norm_of(self.architecture, self.model_args)

    @property
    def folder(self) -> Path:
        """Folder of the bundle."""
        return (REPOSITORY if self.bundle == "repository" else PRETRAINED) / self.name

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the weights can be loaded from, in the order of preference."""
        stored = self.file is not None
        sources = {
            "in the package": stored and self.bundle == "package",
            "in the repository": stored and self.bundle == "repository",
            "on the Hub": stored and self.hub is not None,
            "imported on first use": self.upstream is not None,
        }
        return tuple(source for source, available in sources.items() if available)

    @property
    def source(self) -> str:
        """Where the weights come from, or that there are none."""
        return next(iter(self.sources), "predictions only" if self.bundle else "to train")

    @property
    def available(self) -> bool:
        """Whether the weights can be loaded."""
        return bool(self.sources)

    def mean_and_sd(self, statistics: str = "expected") -> tuple[float, float] | None:
        """Mean and sample standard deviation of top-1 over the runs; None if there are no runs."""
        if len(self.runs) < 2:
            return None
        top1 = [run.statistics[statistics].top1 for run in self.runs]
        return mean(top1), stdev(top1)

    def pretrained_cfg(self) -> dict[str, Any]:
        """Return the fields of timm's ``PretrainedCfg`` that describe the checkpoint."""
        cfg: dict[str, Any] = asdict(self.preprocessing)
        cfg["num_classes"] = self.dataset.num_classes
        cfg["license"] = self.licenses.weights.lower()
        if self.file and self.bundle:
            cfg["file"] = str(self.folder / WEIGHTS_FILE)
        if self.file and self.hub:
            cfg["hf_hub_id"] = self.hub.id
        if self.upstream:
            cfg["url"] = cfg["origin_url"] = self.upstream.source
        return cfg

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Checkpoint:
        """Read an entry of the manifest.

        Raises:
            ValueError: a field is missing, unknown or invalid, or contradicts another one.
        """
        checkpoint = _typed(cls, entry, str(entry.get("name"))[:80])
        if problem := next(_contradictions(checkpoint), None):
            raise ValueError(f"{checkpoint.name}: {problem}")
        return checkpoint

    def to_json(self) -> dict[str, Any]:
        """Return the entry for the manifest."""
        return _as_json(self)


def norm_of(architecture: str, model_args: Mapping[str, Any]) -> str:
    """Return the normalization of a network: "kernel", or the ``norm`` of a baseline."""
    backbone = architecture.removeprefix(FCN)
    return "kernel" if backbone.startswith("kn") else str(model_args.get("norm", "batch"))


def gflops(flops: int) -> str:
    """Format a number of operations as GFLOPs."""
    return f"{flops / 1e9:#.3g}"


def load(path: Path | None = None) -> Mapping[str, Checkpoint]:
    """Return all checkpoints by name, in the order of the manifest (the package's by default).

    Raises:
        ManifestError: the manifest cannot be read.
    """
    return _load(path or PATH)


@lru_cache
def _load(path: Path) -> Mapping[str, Checkpoint]:
    try:
        entries = [Checkpoint.from_json(entry) for entry in read_json(path)["checkpoints"]]
        checkpoints = {entry.name: entry for entry in entries}
        if len(checkpoints) < len(entries):
            raise ValueError("two checkpoints have the same name")
        return MappingProxyType(checkpoints)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"Cannot read {path} ({type(error).__name__}: {error}). "
            "Reinstall kn_zoo, or restore the file with git."
        ) from error


def namespace() -> str:
    """Return the owner of the Hub repositories that checkpoints are published in.

    Raises:
        ManifestError: the manifest does not name one.
    """
    owner = read_json(PATH).get("namespace")
    if not isinstance(owner, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", owner):
        raise ManifestError(f'{PATH} needs a "namespace": the owner of its Hub repositories.')
    return owner


def find(name: str) -> Checkpoint:
    """Return the checkpoint ``architecture.tag``, or the default one of ``architecture``.

    Raises:
        LookupError: there is no such checkpoint; the message suggests similar names.
    """
    checkpoints = load()
    if name in checkpoints:
        return checkpoints[name]
    if default := _default(name):
        return default
    similar = difflib.get_close_matches(name, checkpoints, n=3, cutoff=0.4)
    hint = (
        f"Did you mean {' or '.join(similar)}?"
        if similar
        else f"Choose from: {', '.join(checkpoints)}."
    )
    raise LookupError(f"There is no checkpoint {name!r}. {hint}")


def _default(architecture: str) -> Checkpoint | None:
    """Return the first available checkpoint of an architecture, else its first, else None."""
    checkpoints = [entry for entry in load().values() if entry.architecture == architecture]
    available = [entry for entry in checkpoints if entry.available]
    return next(iter(available or checkpoints), None)


def pretrained_cfgs(architecture: str, **defaults: Any) -> dict[str, dict[str, Any]]:
    """Return the argument of ``timm.models.generate_default_cfgs``: one cfg per checkpoint.

    ``defaults`` are the fields that belong to the architecture (``first_conv``, ``classifier``, its
    sizes); they are the only cfg of an architecture without checkpoints.
    """
    default = _default(architecture)
    if default is None:
        return {architecture: defaults}
    cfgs = {
        entry.name: {**defaults, **entry.pretrained_cfg()}
        for entry in load().values()
        if entry.architecture == architecture and entry != default
    }
    # timm takes the tag with a star as the default.
    cfgs[f"{default.name}*"] = {**defaults, **default.pretrained_cfg()}
    return cfgs


def write_entry(checkpoint: Checkpoint) -> None:
    """Add a checkpoint to the manifest, or replace the one of that name.

    Raises:
        ValueError: the checkpoint is incomplete or invalid.
        WriteError: the manifest cannot be written.
    """
    entry = checkpoint.to_json()
    Checkpoint.from_json(entry)
    document = json.loads(PATH.read_text(encoding="utf-8"))
    entries = document["checkpoints"]
    names = [other["name"] for other in entries]
    if checkpoint.name in names:
        entries[names.index(checkpoint.name)] = entry
    else:
        entries.append(entry)
    write_text(PATH, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    _load.cache_clear()


def _contradictions(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the rules that involve several fields and that a checkpoint breaks."""
    if not (checkpoint.parameters and checkpoint.flops):
        yield "parameters and flops are missing"
    if checkpoint.hub and not checkpoint.file:
        yield "a checkpoint on the Hub needs a file"
    if checkpoint.reported.by == "kn_zoo" and not (checkpoint.recipe and checkpoint.seeds):
        yield "accuracy measured by kn_zoo needs a recipe and seeds"
    if derived := {"num_classes", "in_chans"} & checkpoint.model_args.keys():
        yield f"model_args must not contain {min(derived)}"
    seeds = [run.seed for run in checkpoint.runs]
    if len(set(checkpoint.seeds)) < len(checkpoint.seeds):
        yield "a seed occurs twice"
    if seeds and (len(seeds) < 2 or tuple(seeds) != checkpoint.seeds):
        yield "runs must be those of the seeds, in their order, and at least two"
    measured = checkpoint.upstream.measured if checkpoint.upstream else None
    for statistics in (
        checkpoint.reported.statistics,
        *(run.statistics for run in checkpoint.runs),
        *([] if measured is None else [measured]),
    ):
        if not statistics:
            yield "no accuracy is given"
        segments = checkpoint.task == "segmentation"
        if any((accuracy.segmentation is not None) != segments for accuracy in statistics.values()):
            yield "segmentation scores belong to fcn_* architectures, and to these only"
        if any(a.draws > 1 for name, a in statistics.items() if name != "sampled"):
            yield "only sampled statistics have several draws"


def _as_json(value: Any) -> Any:
    """Convert dataclasses to objects of JSON, without the fields that have their default."""
    if is_dataclass(value):
        values = {field: getattr(value, field.name) for field in fields(value)}
        return {f.name: _as_json(inner) for f, inner in values.items() if inner != f.default}
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return value


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to the type of a field.

    Raises:
        ValueError: the value does not have that type; the message says where.
    """
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return _within(arguments[1], _typed(arguments[0], value, where), where)
    if NoneType in arguments:
        return None if value is None else _typed(arguments[0], value, where)
    if is_dataclass(kind):
        return _typed_fields(kind, _typed(dict, value, where), where)
    if get_origin(kind) is tuple:
        items = [_typed(arguments[0], item, where) for item in _typed(list, value, where)]
        if arguments[-1] is not ... and len(items) != len(arguments):
            raise ValueError(f"{where} has {len(items)} items, expected {len(arguments)}")
        return tuple(items)
    if get_origin(kind) is Mapping:
        return {
            _typed(arguments[0], key, where): _typed(arguments[1], item, f"{where}.{key[:80]}")
            for key, item in _typed(dict, value, where).items()
        }
    if kind is float and type(value) is int:
        return value
    if kind is not Any and (type(value) is not kind or (kind is float and not isfinite(value))):
        raise ValueError(f"{where} is {str(value)[:80]!r}, expected type {kind.__name__}")
    return value


def _within(limit: str | tuple[float, float], value: Any, where: str) -> Any:
    """Return a string that matches a pattern, or a number within bounds, as it is."""
    if isinstance(limit, str):
        if not re.fullmatch(limit, value):
            raise ValueError(f"{where} is {value[:80]!r}, expected {limit}")
    elif not limit[0] <= value <= limit[1]:
        raise ValueError(f"{where} is {str(value)[:80]}, expected {limit[0]} to {limit[1]}")
    return value


def _typed_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    known = {field.name: field for field in fields(kind)}
    required = {name for name, field in known.items() if field.default is MISSING}
    if unknown := sorted(value.keys() - known.keys()):
        raise ValueError(f"{where}: unknown fields: {', '.join(unknown)[:200]}")
    if missing := sorted(required - value.keys()):
        raise ValueError(f"{where}: missing fields: {', '.join(missing)}")
    types = _types(kind)
    return kind(**{key: _typed(types[key], item, f"{where}.{key}") for key, item in value.items()})
