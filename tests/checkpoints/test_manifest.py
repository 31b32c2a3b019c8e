"""The manifest: every entry obeys the schema, and every number in it is computed again."""

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
from jsonschema import Draft202012Validator
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from kn_zoo.checkpoints import bundle, manifest
from kn_zoo.checkpoints.manifest import Checkpoint
from tests.support import tiny_zoo

SCHEMA = json.loads(
    (manifest.PACKAGE / "checkpoints" / "weights_manifest.schema.json").read_text("utf-8")
)
VALID = Draft202012Validator(SCHEMA)
ENTRIES = json.loads(manifest.PATH.read_text("utf-8"))["weights"]
EMBEDDED = [weight for weight in manifest.load().values() if weight.bundle]
# an entry in which nothing is null
FULL = tiny_zoo.draft(
    parameters=5,
    flops=7,
    file=manifest.File("0" * 64, 9, "float16"),
    bundle=True,
    hub=manifest.Hub("owner/name", "a" * 40),
    upstream=manifest.Upstream(
        "https://drive.google.com/file/d/an-id/view",
        "torch",
        "a note",
        {"expected": manifest.Accuracy(1.0, 2.0)},
    ),
).to_json()


def by_name(weights: list[Checkpoint]) -> Any:
    return pytest.mark.parametrize("weight", weights, ids=[weight.name for weight in weights])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all objects of a JSON document, but for the free-form model arguments."""
    found = [path] if isinstance(value, dict) else []
    for key, inner in value.items() if isinstance(value, dict) else []:
        if key != "model_args":
            found += places(inner, (*path, key))
    return found


def at(entry: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        entry = entry[key]
    return entry


def valid(entry: dict[str, Any]) -> bool:
    return VALID.is_valid({"namespace": "owner", "weights": [entry]})


def test_the_manifest_obeys_its_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    VALID.validate(json.loads(manifest.PATH.read_text("utf-8")))
    assert len(manifest.load()) == len(ENTRIES), "two weights share a name"


@given(st.sampled_from(places(FULL)), st.data())
def test_the_schema_takes_no_more_and_no_less(path: tuple[Any, ...], data: st.DataObject) -> None:
    assert valid(FULL)
    more = copy.deepcopy(FULL)
    at(more, path)[data.draw(st.text(min_size=1).filter(lambda key: key not in at(FULL, path)))] = 1
    assert not valid(more)
    less = copy.deepcopy(FULL)
    del at(less, path)[data.draw(st.sampled_from(sorted(at(FULL, path))))]
    assert not valid(less)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "no_tag"},
        {"file": None},
        {"file": {**FULL["file"], "sha256": "A" * 64}},
        {"file": {**FULL["file"], "sha256": "0" * 63}},
        {"file": {**FULL["file"], "dtype": "float64"}},
        {"hub": {"repository": "owner/name", "revision": "main"}},
        {"recipe": None},
        {"seeds": []},
        {"model_args": {"num_classes": 3}},
        {"reported": {"by": "kn_zoo", "statistics": {}}},
        {"reported": {"by": "hearsay", "statistics": FULL["reported"]["statistics"]}},
        {"reported": {"by": "kn_zoo", "statistics": {"plain": {"top1": 1, "top5": 2, "draws": 2}}}},
        {"preprocessing": {**FULL["preprocessing"], "input_size": [8, 8]}},
        {"licenses": {**FULL["licenses"], "weights": " "}},
        {"runs": []},
        {"runs": [{"seed": 3, "statistics": {}}] * 2},
        {"runs": [{"seed": 3, "statistics": FULL["reported"]["statistics"]}]},
    ],
    ids=str,
)
def test_the_schema_refuses(changes: dict[str, Any]) -> None:
    assert not valid({**FULL, **changes})


@pytest.mark.parametrize("entry", [*ENTRIES, FULL], ids=lambda entry: entry["name"])
def test_reading_and_writing_an_entry_loses_nothing(entry: dict[str, Any]) -> None:
    assert Checkpoint.from_json(entry).to_json() == entry


def test_runs_of_several_seeds_are_kept_and_summed_up() -> None:
    def statistics(top1: float) -> dict[str, Any]:
        sampled = {"top1": top1, "top5": None, "draws": 10, "top1_sd": 0.25}
        return {"expected": {"top1": top1, "top5": 90.0, "draws": 1}, "sampled": sampled}

    runs = [{"seed": seed, "statistics": statistics(60.0 + seed)} for seed in (2, 0, 1)]
    entry = {**FULL, "seeds": [2, 0, 1], "runs": runs}
    assert valid(entry)
    weight = Checkpoint.from_json(entry)
    assert weight.to_json() == entry
    assert weight.mean_and_sd() == weight.mean_and_sd("sampled") == (61.0, 1.0)
    assert Checkpoint.from_json(FULL).mean_and_sd() is None


@by_name([weight for weight in manifest.load().values() if weight.runs])
def test_runs_are_those_of_the_seeds_and_the_first_is_the_reported_one(weight: Checkpoint) -> None:
    assert tuple(run.seed for run in weight.runs) == weight.seeds
    assert weight.runs[0].statistics == weight.reported.statistics


def test_classes_and_schema_have_the_same_fields() -> None:
    definitions = {key: value for key, value in SCHEMA["$defs"].items() if "properties" in value}
    for key in ("deterministic", "reported", "statistics"):
        definitions.pop(key)
    for key, definition in definitions.items():
        fields = {field.name for field in dataclasses.fields(getattr(manifest, key.title()))}
        assert fields == set(definition["properties"]), key


@by_name(list(manifest.load().values()))
def test_parameters_and_flops_are_those_of_the_model(weight: Checkpoint) -> None:
    model = timm.create_model(weight.name, device="meta", **weight.model_args)
    size = weight.preprocessing.input_size
    assert (model.num_classes, model.in_chans) == (weight.dataset.num_classes, size[0])
    assert weight.parameters == bundle.parameters(model)
    assert weight.flops == bundle.flops(model, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *size, device="meta"))
    # torch also counts the one-channel convolutions that some devices take statistics with
    assert weight.flops <= counter.get_total_flops() <= 1.06 * weight.flops


@by_name(EMBEDDED)
def test_bundles_are_the_ones_described(weight: Checkpoint) -> None:
    assert weight.file is not None
    data = (weight.folder / manifest.WEIGHTS_FILE).read_bytes()
    assert weight.file.sha256 == hashlib.sha256(data).hexdigest()
    assert weight.file.bytes == len(data)
    tensors = load_file(weight.folder / manifest.WEIGHTS_FILE)
    types = {str(x.dtype) for key, x in tensors.items() if not key.endswith("num_batches_tracked")}
    assert types == {f"torch.{weight.file.dtype}"}
    assert {path.name for path in weight.folder.iterdir()} == set(bundle.FILES)
    assert (manifest.PATH.parent / str(weight.recipe)).is_file()


@by_name(EMBEDDED)
def test_reported_accuracy_is_that_of_the_stored_predictions(weight: Checkpoint) -> None:
    stored = bundle.Bundle(weight.folder)
    predictions, reported = stored.predictions(), weight.reported.statistics["expected"]
    assert len(predictions.targets) == weight.dataset.images
    assert len(stored.class_names) == weight.dataset.num_classes
    assert reported.top1 == pytest.approx(predictions.top1, abs=0.005)
    assert reported.top5 == pytest.approx(predictions.top5, abs=0.005)


@by_name(list(manifest.load().values()))
def test_timm_knows_what_the_manifest_says(weight: Checkpoint) -> None:
    cfg = timm.get_pretrained_cfg(weight.name)
    found = {key: getattr(cfg, key) for key in ("input_size", "mean", "std", "interpolation")}
    expected = {key: getattr(weight.preprocessing, key) for key in found}
    assert found == expected
    assert cfg.num_classes == weight.dataset.num_classes
    assert bool(cfg.has_weights) == (weight.name in timm.list_pretrained()) == weight.available


def test_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_zoo.empty_manifest(tmp_path, monkeypatch)
    planned, ready = tiny_zoo.draft("some_net.planned"), Checkpoint.from_json(FULL)
    ready = dataclasses.replace(ready, name="some_net.ready")
    for weight in (planned, ready):
        manifest.write_entry(weight)
    assert manifest.find("some_net.planned") == planned
    assert manifest.find("some_net") == ready, "the default is the first that can be loaded"
    assert list(manifest.pretrained_cfgs("some_net")) == ["some_net.planned", "some_net.ready*"]
    default = timm.models.generate_default_cfgs(manifest.pretrained_cfgs("some_net"))["some_net"]
    assert default.tags[0] == "ready"
    with pytest.raises(LookupError, match=r"some_net\.ready"):
        manifest.find("some_net.redy")
    with pytest.raises(LookupError, match="There are"):
        manifest.find("zzz")


def test_an_architecture_without_weights_keeps_its_defaults() -> None:
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
    VALID.validate(
        {
            "namespace": manifest.namespace(),
            "weights": [
                {**w.to_json(), "parameters": 1, "flops": 1} for w in manifest.load().values()
            ],
        }
    )


def test_a_failed_write_leaves_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_zoo.empty_manifest(tmp_path, monkeypatch)
    before = manifest.PATH.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        manifest.write_entry(tiny_zoo.draft())
    assert manifest.PATH.read_bytes() == before
    assert list(tmp_path.iterdir()) == [manifest.PATH]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"weights": [{"name": "a.b"}]}'])
def test_an_unreadable_manifest_is_one_error_with_a_cure(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "weights_manifest.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(manifest.ManifestError, match="Install kn_zoo again") as caught:
        manifest.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


IMPORT = """
import sys, time, timm
package, opened = sys.argv[1], []
def watch(event, arguments):
    if event.startswith("socket."):
        raise RuntimeError(event)
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
        opened.append(str(arguments[0]))
sys.addaudithook(watch)
start = time.process_time()
import kn_zoo
print(time.process_time() - start)
outside = [path for path in opened if not path.startswith(package)]
assert not outside, outside
"""


def test_importing_is_cheap_and_touches_nothing() -> None:
    root = str(manifest.PACKAGE.parent)
    command = [sys.executable, "-c", IMPORT, root]
    for _ in range(3):  # another process may be in the way of one of them
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if float(done.stdout) < 0.2:
            return
    pytest.fail(f"importing kn_zoo took {done.stdout} s of processor time")
