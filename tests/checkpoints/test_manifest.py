"""The manifest: entries are valid, and every number in it is recomputed."""

import copy
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from kn_zoo import data, segmentation
from kn_zoo.checkpoints import bundle, manifest, networks
from kn_zoo.checkpoints.manifest import Checkpoint
from tests.support import tiny_zoo

ENTRIES = json.loads(manifest.PATH.read_text("utf-8"))["checkpoints"]
BUNDLED = [entry for entry in manifest.load().values() if entry.bundle]
# An entry with a value for every field but `runs`.
FULL = tiny_zoo.draft(
    parameters=5,
    flops=7,
    file=manifest.File("0" * 64, 9, "float16"),
    bundle="package",
    hub=manifest.Hub("owner/name", "a" * 40),
    upstream=manifest.Upstream(
        "https://drive.google.com/file/d/an-id/view",
        "torch",
        "a note",
        {"expected": manifest.Accuracy(1.0, 2.0)},
    ),
).to_json()


def by_name(checkpoints: list[Checkpoint]) -> Any:
    names = [checkpoint.name for checkpoint in checkpoints]
    return pytest.mark.parametrize("checkpoint", checkpoints, ids=names)


def objects(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all objects of an entry, except for the free-form model arguments."""
    paths = [path] if isinstance(value, dict) else []
    for key, inner in value.items() if isinstance(value, dict) else []:
        if key != "model_args":
            paths += objects(inner, (*path, key))
    return paths


def at(entry: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        entry = entry[key]
    return entry


def is_valid(entry: dict[str, Any]) -> bool:
    try:
        Checkpoint.from_json(entry)
    except ValueError:
        return False
    return True


OPTIONAL = {"runs", "file", "bundle", "hub", "upstream", "measured", "draws", "top1_sd"}


@given(st.sampled_from(objects(FULL)), st.data())
def test_every_object_has_its_required_fields_and_no_unknown_ones(
    path: tuple[Any, ...], data: st.DataObject
) -> None:
    assert is_valid(FULL)
    more = copy.deepcopy(FULL)
    at(more, path)[data.draw(st.text(min_size=1).filter(lambda key: key not in at(FULL, path)))] = 1
    assert not is_valid(more)
    less = copy.deepcopy(FULL)
    removed = data.draw(st.sampled_from(sorted(at(FULL, path))))
    del at(less, path)[removed]
    if removed == "file":  # which a checkpoint on the Hub needs
        del less["hub"]
    assert is_valid(less) == (removed in OPTIONAL)


EXPECTED = FULL["reported"]["statistics"]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "no_tag"},
        {"file": None},
        {"file": {**FULL["file"], "sha256": "A" * 64}},
        {"file": {**FULL["file"], "sha256": "0" * 63}},
        {"file": {**FULL["file"], "dtype": "float64"}},
        {"file": {**FULL["file"], "bytes": 0}},
        {"bundle": "elsewhere"},
        {"bundle": True},
        {"hub": {"repository": "owner/name", "revision": "main"}},
        {"recipe": None},
        {"recipe": "../recipe.yaml"},
        {"seeds": []},
        {"seeds": [3, 3]},
        {"seeds": [-1]},
        {"parameters": 0},
        {"model_args": {"num_classes": 3}},
        {"reported": {"by": "kn_zoo", "statistics": {}}},
        {"reported": {"by": "hearsay", "statistics": EXPECTED}},
        {"reported": {"by": "kn_zoo", "statistics": {"guessed": EXPECTED["expected"]}}},
        {"reported": {"by": "kn_zoo", "statistics": {"plain": {"top1": 1, "top5": 2, "draws": 2}}}},
        {"reported": {"by": "kn_zoo", "statistics": {"plain": {"top1": 101, "top5": 2}}}},
        {"upstream": {**FULL["upstream"], "measured": {}}},
        {"upstream": {**FULL["upstream"], "source": "http://example.org"}},
        {"dataset": {**FULL["dataset"], "num_classes": 1}},
        {"preprocessing": {**FULL["preprocessing"], "input_size": [8, 8]}},
        {"preprocessing": {**FULL["preprocessing"], "std": [0]}},
        {"preprocessing": {**FULL["preprocessing"], "crop_pct": 1.5}},
        {"preprocessing": {**FULL["preprocessing"], "interpolation": "guess"}},
        {"licenses": {**FULL["licenses"], "weights": " "}},
        {"runs": [{"seed": 3, "statistics": {}}, {"seed": 4, "statistics": {}}]},
        {"runs": [{"seed": 3, "statistics": EXPECTED}]},
        {"runs": [{"seed": 4, "statistics": EXPECTED}, {"seed": 3, "statistics": EXPECTED}]},
    ],
    ids=str,
)
def test_invalid_entries_are_refused(changes: dict[str, Any]) -> None:
    assert not is_valid({**FULL, **changes})


def test_the_names_of_the_manifest_are_unique() -> None:
    assert len(manifest.load()) == len(ENTRIES)


@by_name(list(manifest.load().values()))
def test_data_sets_are_those_of_the_zoo(checkpoint: Checkpoint) -> None:
    splits = data.SPLITS | segmentation.data.SPLITS
    assert checkpoint.dataset.split in splits[checkpoint.dataset.name]


@pytest.mark.parametrize("entry", [*ENTRIES, FULL], ids=lambda entry: entry["name"])
def test_reading_and_writing_an_entry_loses_nothing(entry: dict[str, Any]) -> None:
    assert Checkpoint.from_json(entry).to_json() == entry


def test_runs_of_several_seeds_are_kept_and_summed_up() -> None:
    def statistics(top1: float) -> dict[str, Any]:
        sampled = {"top1": top1, "top5": None, "draws": 10, "top1_sd": 0.25}
        return {"expected": {"top1": top1, "top5": 90.0}, "sampled": sampled}

    runs = [{"seed": seed, "statistics": statistics(60.0 + seed)} for seed in (2, 0, 1)]
    entry = {**FULL, "seeds": [2, 0, 1], "runs": runs}
    checkpoint = Checkpoint.from_json(entry)
    assert checkpoint.to_json() == entry
    assert checkpoint.mean_and_sd() == checkpoint.mean_and_sd("sampled") == (61.0, 1.0)
    assert Checkpoint.from_json(FULL).mean_and_sd() is None


@by_name([checkpoint for checkpoint in manifest.load().values() if checkpoint.runs])
def test_runs_are_those_of_the_seeds_and_the_first_is_the_reported_one(
    checkpoint: Checkpoint,
) -> None:
    assert tuple(run.seed for run in checkpoint.runs) == checkpoint.seeds
    assert checkpoint.runs[0].statistics == checkpoint.reported.statistics


@dataclasses.dataclass(frozen=True)
class Extension:
    epsilon: manifest.Positive


@dataclasses.dataclass(frozen=True)
class Extended(Checkpoint):
    extension: Extension | None = None


def test_an_optional_object_extends_the_format() -> None:
    """Entries without it stay as they are; with it they are read, validated and written."""
    without = Extended.from_json(FULL)
    assert isinstance(without, Extended) and without.to_json() == FULL
    entry = {**FULL, "extension": {"epsilon": 8.0}}
    extended = Extended.from_json(entry)
    assert isinstance(extended, Extended) and extended.extension == Extension(8.0)
    assert extended.to_json() == entry
    with pytest.raises(ValueError, match=r"extension\.epsilon"):
        Extended.from_json({**FULL, "extension": {"epsilon": -1.0}})


@by_name(list(manifest.load().values()))
def test_parameters_and_flops_are_those_of_the_model(checkpoint: Checkpoint) -> None:
    with torch.device("meta"):
        model = networks.create(checkpoint)
    size = checkpoint.preprocessing.input_size
    assert model.num_classes == checkpoint.dataset.num_classes
    assert checkpoint.parameters == bundle.parameters(model)
    assert checkpoint.flops == bundle.flops(model, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *size, device="meta"))
    # torch also counts the one-channel convolutions that some devices take statistics with
    assert checkpoint.flops <= counter.get_total_flops() <= 1.06 * checkpoint.flops


@by_name(BUNDLED)
def test_bundles_are_the_ones_described(checkpoint: Checkpoint) -> None:
    assert {path.name for path in checkpoint.folder.iterdir()} == set(bundle.files_of(checkpoint))
    assert (manifest.PATH.parent / str(checkpoint.recipe)).is_file()
    if checkpoint.file is None:
        return
    data = (checkpoint.folder / manifest.WEIGHTS_FILE).read_bytes()
    assert checkpoint.file.sha256 == hashlib.sha256(data).hexdigest()
    assert checkpoint.file.bytes == len(data)
    tensors = load_file(checkpoint.folder / manifest.WEIGHTS_FILE)
    types = {str(x.dtype) for key, x in tensors.items() if not key.endswith("num_batches_tracked")}
    assert types == {f"torch.{checkpoint.file.dtype}"}


def test_every_bundle_has_an_entry_and_a_bounded_size() -> None:
    """At most 10 MB travel in the wheel; the repository holds 75 MB of bundles up to 25 MB."""
    folders = [
        path for root in (manifest.PRETRAINED, manifest.REPOSITORY) for path in root.glob("*")
    ]
    assert sorted(folders) == sorted(checkpoint.folder for checkpoint in BUNDLED)
    sizes = {folder: sum(path.stat().st_size for path in folder.iterdir()) for folder in folders}
    package = [size for folder, size in sizes.items() if folder.parent == manifest.PRETRAINED]
    assert sum(package) < 10e6
    assert all(size <= 25e6 for size in sizes.values())
    assert sum(sizes.values()) - sum(package) <= 75e6


@by_name(BUNDLED)
def test_reported_accuracy_is_that_of_the_stored_predictions(checkpoint: Checkpoint) -> None:
    stored = bundle.Bundle(checkpoint.folder)
    reported = checkpoint.reported.statistics["expected"]
    assert len(stored.class_names) == checkpoint.dataset.num_classes
    if reported.segmentation:
        maps = stored.label_maps()
        assert len(maps.maps) == checkpoint.dataset.images
        assert reported.top1 == pytest.approx(maps.scores.pixel_accuracy, abs=0.005)
        assert reported.segmentation.miou == pytest.approx(maps.scores.miou, abs=0.005)
        return
    predictions = stored.predictions()
    assert len(predictions.targets) == checkpoint.dataset.images
    assert reported.top1 == pytest.approx(predictions.top1, abs=0.005)
    assert reported.top5 == pytest.approx(predictions.top5, abs=0.005)


@by_name([entry for entry in manifest.load().values() if entry.task == "classification"])
def test_timm_knows_what_the_manifest_says(checkpoint: Checkpoint) -> None:
    cfg: Any = timm.get_pretrained_cfg(checkpoint.name)
    registered = {key: getattr(cfg, key) for key in ("input_size", "mean", "std", "interpolation")}
    expected = {key: getattr(checkpoint.preprocessing, key) for key in registered}
    assert registered == expected
    assert cfg.num_classes == checkpoint.dataset.num_classes
    assert (
        bool(cfg.has_weights) == (checkpoint.name in timm.list_pretrained()) == checkpoint.available
    )


def test_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_zoo.empty_manifest(tmp_path, monkeypatch)
    planned, ready = tiny_zoo.draft("some_net.planned"), Checkpoint.from_json(FULL)
    ready = dataclasses.replace(ready, name="some_net.ready")
    for checkpoint in (planned, ready):
        manifest.write_entry(checkpoint)
    assert manifest.find("some_net.planned") == planned
    assert manifest.find("some_net") == ready, "the default is the first that can be loaded"
    assert list(manifest.pretrained_cfgs("some_net")) == ["some_net.planned", "some_net.ready*"]
    cfgs: Any = manifest.pretrained_cfgs("some_net")
    default = timm.models.generate_default_cfgs(cfgs)["some_net"]
    assert default.tags[0] == "ready"
    with pytest.raises(LookupError, match=r"some_net\.ready"):
        manifest.find("some_net.redy")
    with pytest.raises(LookupError, match="Choose from"):
        manifest.find("zzz")


def test_an_architecture_without_checkpoints_keeps_its_defaults() -> None:
    assert manifest.pretrained_cfgs("none", first_conv="a") == {"none": {"first_conv": "a"}}


def test_write_entry_replaces_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_zoo.empty_manifest(tmp_path, monkeypatch)
    names = [f"net.{tag}" for tag in "abc"]
    for name in names:
        manifest.write_entry(tiny_zoo.draft(name))
    changed = tiny_zoo.draft("net.b", seeds=(99,))
    manifest.write_entry(changed)
    assert list(manifest.load()) == names
    assert manifest.find("net.b") == changed
    assert manifest.namespace() == "owner"


def test_an_invalid_entry_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_zoo.empty_manifest(tmp_path, monkeypatch)
    before = manifest.PATH.read_bytes()
    with pytest.raises(ValueError, match="parameters and flops are missing"):
        manifest.write_entry(tiny_zoo.draft(parameters=0))
    assert manifest.PATH.read_bytes() == before


def test_a_failed_write_leaves_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_zoo.empty_manifest(tmp_path, monkeypatch)
    before = manifest.PATH.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"{manifest.PATH} cannot be written .*No space"):
        manifest.write_entry(tiny_zoo.draft())
    assert manifest.PATH.read_bytes() == before
    assert list(tmp_path.iterdir()) == [manifest.PATH]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"checkpoints": [{"name": "a.b"}]}'])
def test_an_unreadable_manifest_is_one_error_with_a_hint(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "weights_manifest.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(manifest.ManifestError, match="Reinstall kn_zoo") as caught:
        manifest.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


IMPORT = """
import sys, timm
package, opened = sys.argv[1], []
loaded = {name.partition(".")[0] for name in sys.modules}
def watch(event, arguments):
    if event.startswith("socket."):
        raise RuntimeError(event)
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
        opened.append(str(arguments[0]))
sys.addaudithook(watch)
import kn_zoo
outside = [path for path in opened if not path.startswith(package)]
assert not outside, outside
print(*{name.partition(".")[0] for name in sys.modules} - loaded)
"""


def test_importing_loads_no_extras_and_touches_nothing() -> None:
    root = str(manifest.PACKAGE.parent)
    command = [sys.executable, "-c", IMPORT, root]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    others = set(done.stdout.split()) - {"kn_zoo", "rich"} - sys.stdlib_module_names
    assert not others, f"importing kn_zoo also imports {', '.join(sorted(others))}"
