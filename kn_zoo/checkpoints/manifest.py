"""What every trained weight of the zoo is, read from one file: ``weights_manifest.json``.

All that timm, the Hub, the documentation and the verification say about a weight is generated from
its entry here; ``weights_manifest.schema.json`` tells what an entry holds. Reading needs no network
and no file outside the package, and takes nothing but what these classes describe.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache, lru_cache
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType, NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

PACKAGE = Path(__file__).resolve().parents[1]
PRETRAINED = PACKAGE / "pretrained"  # bundles that travel with the package
_INSTALLED = (
    PACKAGE / "weights_manifest.json"
)  # where a wheel puts the manifest of the checkout's root
PATH = _INSTALLED if _INSTALLED.is_file() else PACKAGE.parent / "weights_manifest.json"
WEIGHTS_FILE = "model.safetensors"
MAX_BYTES = 1 << 23  # of a JSON document
MAX_TEXT = 10_000  # characters of a string in it


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
class Segmentation:
    """Scores of label maps in percent; ``iou`` by class, without those that do not occur."""

    miou: float
    class_accuracy: float
    iou: Mapping[str, float]


@dataclass(frozen=True)
class Accuracy:
    """Accuracies in percent, of images or, with ``segmentation``, of pixels.

    ``draws`` passes over the data were averaged (1 unless sampled). ``top1_sd`` is the standard
    deviation over the draws, where it was measured.
    """

    top1: float
    top5: float | None
    draws: int = 1
    top1_sd: float | None = None
    segmentation: Segmentation | None = None


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
        """What ``dataclasses.asdict`` made of a run; a ValueError says what is wrong with it."""
        return _typed(cls, entry, "run")


@dataclass(frozen=True)
class File:
    """The stored ``model.safetensors``: full hash, size in bytes, type of its numbers."""

    sha256: Annotated[str, r"[0-9a-f]{64}"]
    bytes: int
    dtype: Annotated[str, r"float16|float32"]


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

    repository: Annotated[str, r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"]
    revision: Annotated[str, r"[0-9a-f]{40}"]

    @property
    def id(self) -> str:
        """The way timm writes it: ``owner/name@revision``."""
        return f"{self.repository}@{self.revision}"


@dataclass(frozen=True)
class Upstream:
    """A checkpoint published by others, which `kn_zoo.checkpoints.upstream` downloads and converts.

    ``measured``: accuracy by inference statistics as somebody has verified it, None before.
    """

    source: Annotated[str, r"https://drive\.google\.com/file/d/[A-Za-z0-9_-]+/view"]
    format: str
    note: str | None
    measured: Mapping[str, Accuracy] | None = None


@dataclass(frozen=True)
class Licenses:
    """Licences of the code, of the weights and of the data they were trained on."""

    code: str
    weights: str
    data: str


@dataclass(frozen=True)
class Checkpoint:
    """One entry. ``flops``: convolutions and linear layers, one image, multiply and add apart."""

    name: Annotated[str, r"[a-z][a-z0-9_]*\.[a-z0-9][a-z0-9_]*"]
    model_args: Mapping[str, Any]
    dataset: Dataset
    reported: Reported
    preprocessing: Preprocessing
    licenses: Licenses
    recipe: str | None
    seeds: tuple[int, ...]
    runs: tuple[Run, ...] = ()  # one a seed, if there are several
    # Taken from the trained model by `kn_zoo.checkpoints.bundle.write`, and from where it is published.
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
    def norm(self) -> str:
        """What normalizes: "kernel", or what a baseline has instead."""
        return norm_of(self.architecture, self.model_args)

    @property
    def folder(self) -> Path:
        """Where the bundle lies if it travels with the package."""
        return PRETRAINED / self.name

    @property
    def available(self) -> bool:
        """Whether there is a place to get it from."""
        hosted = self.file is not None and (self.bundle or self.hub is not None)
        return hosted or self.upstream is not None

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
            cfg["url"] = cfg["origin_url"] = self.upstream.source
        return cfg

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Checkpoint:
        """An entry as `parse_json` gives it; a ValueError says what is wrong with it."""
        return _typed(cls, entry, str(entry.get("name"))[:80])

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in the manifest, which is silent of runs that were not made."""
        entry = json.loads(json.dumps(asdict(self, dict_factory=_measured)))
        if not entry["runs"]:
            del entry["runs"]
        return entry


def _measured(items: list[tuple[str, Any]]) -> dict[str, Any]:
    optional = ("top1_sd", "segmentation")
    return {key: value for key, value in items if key not in optional or value is not None}


def norm_of(architecture: str, model_args: Mapping[str, Any]) -> str:
    """What normalizes a network: "kernel", or the `norm` of a baseline, by default "batch"."""
    backbone = architecture.removeprefix("fcn_")
    return "kernel" if backbone.startswith("kn") else str(model_args.get("norm", "batch"))


def load(path: Path | None = None) -> Mapping[str, Checkpoint]:
    """All weights by name, in the order of the manifest (the package's own unless given)."""
    return _load(path or PATH)


@lru_cache
def _load(path: Path) -> Mapping[str, Checkpoint]:
    try:
        weights = [Checkpoint.from_json(entry) for entry in _document(path)["weights"]]
        if len({weight.name for weight in weights}) < len(weights):
            raise ValueError("two weights have the same name")
        return MappingProxyType({weight.name: weight for weight in weights})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"Cannot read {path} ({type(error).__name__}: {error}). "
            "Install kn_zoo again, or restore the file with git."
        ) from error


def namespace(path: Path | None = None) -> str:
    """Whose repositories on the Hub the weights are published in; the manifest's one setting."""
    owner = _document(path or PATH).get("namespace")
    if not isinstance(owner, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", owner):
        raise ManifestError(f'{path or PATH} needs a "namespace": the owner of its repositories.')
    return owner


def _document(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return parse_json(file.read(MAX_BYTES + 1))


def parse_json(data: bytes) -> dict[str, Any]:
    """An object of JSON in which no key comes twice, no number is endless and no text is.

    Raises:
        ValueError: it is anything else.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes of JSON")
    try:
        document = json.loads(
            data, object_pairs_hook=_without_duplicates, parse_constant=_not_a_number
        )
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("not an object of JSON")
    return document


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in an object of JSON")
    if any(len(text) > MAX_TEXT for pair in pairs for text in pair if isinstance(text, str)):
        raise ValueError(f"a text has more than {MAX_TEXT:,} characters")
    return found


def _not_a_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """`value` from JSON as a `kind` of field; a ValueError says where it is something else.

    The annotation of a text is a pattern that it has to match from its first character to its last.
    """
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        if not re.fullmatch(arguments[1], _typed(arguments[0], value, where)):
            raise ValueError(f"{where} is {value[:80]!r}, not {arguments[1]}")
        return value
    if NoneType in arguments:
        return None if value is None else _typed(arguments[0], value, where)
    if is_dataclass(kind):
        return _typed_fields(kind, _typed(dict, value, where), where)
    if get_origin(kind) is tuple:
        items = [_typed(arguments[0], item, where) for item in _typed(list, value, where)]
        if arguments[-1] is not ... and len(items) != len(arguments):
            raise ValueError(f"{where} has {len(items)} items, not {len(arguments)}")
        return tuple(items)
    if get_origin(kind) is Mapping:
        entries = _typed(dict, value, where).items()
        return {key: _typed(arguments[1], item, f"{where}.{key}") for key, item in entries}
    if kind is float and type(value) is int:
        return value
    if kind is not Any and (type(value) is not kind or (kind is float and not isfinite(value))):
        raise ValueError(f"{where} is {str(value)[:80]!r}, not of type {kind.__name__}")
    return value


def _typed_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    known = {field.name: field for field in fields(kind)}
    needed = {name for name, field in known.items() if field.default is MISSING}
    if wrong := sorted(value.keys() - known.keys()) or sorted(needed - value.keys()):
        raise ValueError(f"{where} lacks, or has in excess: {', '.join(wrong)[:200]}")
    kinds = _types(kind)
    return kind(**{key: _typed(kinds[key], item, f"{where}.{key}") for key, item in value.items()})


def as_file(value: Mapping[str, Any]) -> File:
    """A `File` from what `parse_json` gives; a ValueError says what is wrong with it."""
    return _typed(File, value, "file")


def find(name: str) -> Checkpoint:
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


def _default(architecture: str) -> Checkpoint | None:
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


def write_entry(weight: Checkpoint, path: Path | None = None) -> None:
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
    """Replace a file by new text, see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a reader, or a full disk, never meets a part of it."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # mkstemp's own mode hides the file from other users
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
