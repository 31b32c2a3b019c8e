"""Hostile files raise a precise exception, within bounded time and memory."""

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors

from kn_zoo.checkpoints import bundle, files, hub, loading, manifest, offline, upstream
from tests.conftest import TOLD, Peak
from tests.support import tiny_zoo
from tests.support.tiny_zoo import NAME, Zoo

COUNTS: Counter[str] = Counter()
SLOWEST = [0.0]  # seconds of processor time
SECONDS, MEBIBYTES = 10, 200  # bounds against bombs; what was measured is printed
FUZZ = settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    with pytest.MonkeyPatch.context() as patch:
        yield tiny_zoo.make(tmp_path_factory.mktemp("zoo"), patch)


@pytest.fixture(scope="module", autouse=True)
def told(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the counts at the end of the run, and hold memory to its bound."""
    peak = Peak()
    yield
    grown = peak.grown
    counts = ", ".join(f"{count:,} {what}" for what, count in sorted(COUNTS.items()))
    request.config.stash.setdefault(TOLD, []).append(
        f"Hostile files: {COUNTS.total():,} in all: {counts}; the slowest took {SLOWEST[0]:.2f} s, "
        f"memory grew by {grown:.0f} MiB"
    )
    assert grown < MEBIBYTES and SLOWEST[0] < SECONDS


def refused(what: str, read: Callable[[], Any], *errors: type[Exception]) -> Exception | None:
    """Return the expected exception that reading raises, if any; another one fails the test."""
    start = time.process_time()
    caught = None
    try:
        read()
    except errors as error:
        caught = error
        assert len(str(error)) < 5000 and str(error)
    COUNTS[f"{what} {'refused' if caught else 'taken as right'}"] += 1
    SLOWEST[0] = max(SLOWEST[0], time.process_time() - start)
    return caught


# safetensors


def parsed(data: bytes, dtype: str = "float32") -> dict[str, torch.Tensor]:
    return files.tensors(data, dtype)


RIGHT = to_safetensors({"a": torch.ones(3, 4), "b": torch.arange(5.0)})


def with_header(header: object, body: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@given(st.data())
@FUZZ
def test_safetensors_with_flipped_bits_or_cut(data: st.DataObject) -> None:
    """The file is refused, or only numbers within tensors have changed."""
    changed = bytearray(RIGHT)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(changed))))
    wrong = bytes(changed[:cut])

    def read() -> None:
        for tensor in parsed(wrong).values():
            assert tensor.numel() <= 17 and tensor.isfinite().all()

    refused("safetensors with flipped bits", read, ValueError)


sizes = st.one_of(
    st.integers(-2, 20), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5, None])
)
headers = st.dictionaries(
    st.one_of(
        st.text(max_size=8), st.sampled_from(["__metadata__", "../../x", "/etc/x", "\uff41"])
    ),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "F64", "I64", "BOOL", "F8_E4M3", "X", 3, None]),
            "shape": st.one_of(st.lists(sizes, max_size=4), sizes),
            "data_offsets": st.one_of(st.lists(sizes, min_size=2, max_size=2), st.lists(sizes)),
        }
    )
    | st.text(max_size=5)
    | st.none(),
    max_size=4,
)


@given(headers)
@example({"a": entry(), "b": entry(offsets=(8, 24))})
@example({"a": entry(offsets=(0, 2**40), shape=(2**38,))})
@example({"a": entry(offsets=(16, 0))})
@example({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))})
@example({"a": entry(shape=(0, 2**62))})
@example({"a": entry(offsets=(32, 48))})
@example({"__metadata__": entry()})
@FUZZ
def test_safetensors_with_another_header(header: dict[str, Any]) -> None:
    data = with_header(header)

    def read() -> None:
        tensors = parsed(data)
        assert sum(x.numel() * x.element_size() for x in tensors.values()) <= 64
        assert tensors.keys() <= header.keys()

    refused("safetensors with other headers", read, ValueError)


nan, inf = torch.tensor([math.nan]), torch.tensor([math.inf, 1])
BOMBS = {
    "header length": (2**63).to_bytes(8, "little") + RIGHT[8:],
    "header length of the file": (len(RIGHT) * 1000).to_bytes(8, "little") + RIGHT[8:],
    "header of 90 MB": with_header(b"{" + b" " * 90_000_000 + b"}"),
    "nested header": with_header(b'{"a":' + b"[" * 400_000 + b"]" * 400_000 + b"}"),
    "equal keys": with_header(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    "a name of a megabyte": with_header({"a" * 1_000_000: entry()}),
    "NaN": to_safetensors({"a": nan}),
    "infinity": to_safetensors({"a": inf}),
    "another type": to_safetensors({"a": torch.ones(2, dtype=torch.float64)}),
    "half": to_safetensors({"a": torch.ones(2, dtype=torch.float16)}),
    "nothing": b"",
    "seven bytes": b"1234567",
    "no JSON": with_header(b"not json at all."),
    "another JSON": with_header(b"[1, 2, 3]"),
    "latin-1": with_header('{"ä":1}'.encode("latin-1")),
    "longer": RIGHT + b"\0" * 8,
    "bits of a number": with_header(b'{"a":' + b"9" * 100_000 + b"}"),
    "NaN of JSON": with_header(b'{"a":NaN}'),
}


@pytest.mark.parametrize("what", BOMBS)
def test_safetensors_bombs(what: str) -> None:
    assert refused("safetensors bombs", lambda: parsed(BOMBS[what]), ValueError), what


def test_a_file_of_another_network_does_not_load(zoo: Zoo) -> None:
    """Even with its hash in the manifest: wrong shapes and missing tensors end in an error."""
    right = zoo.file.read_bytes()
    tensors = files.tensors(right, "float16")
    key = next(iter(tensors))
    wrong = [
        {k: v for k, v in tensors.items() if k != key},
        {**tensors, "x": tensors[key].clone()},
        {**tensors, key: tensors[key][:1]},
        {**tensors, key: torch.full_like(tensors[key], math.nan)},
        {**tensors, key: tensors[key].float()},
    ]
    try:
        for content in wrong:
            data = to_safetensors({k: v.contiguous() for k, v in content.items()})
            zoo.file.write_bytes(data)
            file = manifest.File(hashlib.sha256(data).hexdigest(), len(data), "float16")
            manifest.write_entry(tiny_zoo.replace(zoo.checkpoint, file=file))

            def read() -> None:
                timm.create_model(NAME, pretrained=True)

            assert refused("files of other networks", read, loading.CorruptWeights, RuntimeError)
    finally:
        zoo.file.write_bytes(right)
        manifest.write_entry(zoo.checkpoint)


# manifest


def read_manifest(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    manifest._load.cache_clear()
    for checkpoint in manifest.load(path).values():
        assert checkpoint.folder.parent == manifest.PRETRAINED
        assert checkpoint.folder.name.isascii() and checkpoint.folder.name not in (".", "..")


ENTRY = tiny_zoo.draft(
    file=manifest.File("0" * 64, 9, "float16"),
    hub=manifest.Hub("owner/name", "a" * 40),
    parameters=1,
    flops=1,
).to_json()
odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just([]),
    st.just({}), st.lists(st.integers(), max_size=3), st.just("a" * 10_000_000),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "knre\u0455net18.x", "a.b\n", "\uff41.b",
                     "..", "x\0.y"]),
)  # fmt: skip


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    nested = [path] if path else []
    for key in (
        value if isinstance(value, dict) else range(len(value) if type(value) is list else 0)
    ):
        nested += paths(value[key], (*path, key))
    return nested


PLACES = [path for path in paths(ENTRY) if path[0] != "model_args"]


@given(st.sampled_from(PLACES), odd)
@FUZZ
def test_a_manifest_with_another_value(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    """A field with any value is refused, or has the type and the form of its class."""
    changed = json.loads(json.dumps(ENTRY))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    before = inner[place[-1]]
    inner[place[-1]] = value
    text = json.dumps({"namespace": "owner", "checkpoints": [changed]}).encode()
    path = tmp_path / "manifest.json"
    error = refused(
        "manifests with other values", lambda: read_manifest(path, text), manifest.ManifestError
    )
    if error is None:
        assert value is None or isinstance(value, type(before) | int | float | list | dict), place
        assert place != ("name",) or (str(value).isascii() and "/" not in str(value))


@given(st.data())
@FUZZ
def test_a_manifest_with_other_bytes(tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray(json.dumps({"namespace": "owner", "checkpoints": [ENTRY]}).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    wrong = bytes(text[: data.draw(st.one_of(st.none(), st.integers(0, len(text))))])
    path = tmp_path / "manifest.json"
    refused(
        "manifests with other bytes", lambda: read_manifest(path, wrong), manifest.ManifestError
    )


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"null", b"{}", b"\xff\xfe", b'{"checkpoints": 3}', b'{"checkpoints": [3]}',
        b'{"checkpoints": [], "checkpoints": []}',
        b'{"checkpoints": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"checkpoints": ["' + b"a" * 10_000_000 + b'"]}', b'{"a": "' + b"a" * 1_000_000 + b'"}',
        b'{"checkpoints": [' + b"9" * 1_000_000 + b"]}", b'{"checkpoints": [1e999]}',
        json.dumps({"checkpoints": [ENTRY, ENTRY]}).encode(),
        json.dumps({"checkpoints": [ENTRY]}).replace('"bytes"', '"bytes": 1, "bytes"').encode(),
        json.dumps({"checkpoints": [{**ENTRY, "seeds": [math.nan]}]}).encode(),
        b" " * 10_000_000,
    ],
    ids=range(17),
)  # fmt: skip
def test_manifest_bombs(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "manifest.json"
    assert refused("manifest bombs", lambda: read_manifest(path, text), manifest.ManifestError)


# config.json, cards, and directories of checkpoints


@given(st.data())
@settings(FUZZ, max_examples=100)
def test_a_bundle_with_another_config_or_card(zoo: Zoo, data: st.DataObject) -> None:
    """It is neither published nor read: the manifest determines all of it but the class names."""
    name = data.draw(st.sampled_from([bundle.CONFIG, bundle.CARD]))
    path = zoo.checkpoint.folder / name
    right = path.read_bytes()
    wrong = bytearray(right)
    for _ in range(data.draw(st.integers(1, 3))):
        wrong[data.draw(st.integers(0, len(wrong) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(wrong))))
    more = data.draw(st.sampled_from([b"", b"\n", b"---\n!!python/object/apply:os.system [ls]\n"]))
    written = bytes(wrong[:cut]) + more
    try:
        path.write_bytes(written)

        def read() -> None:
            stored = bundle.Bundle(zoo.checkpoint.folder)
            assert all(isinstance(text, str) for text in stored.class_names)
            loading._marked(path)
            hub.contents(zoo.checkpoint)

        error = refused(f"{name} with other bytes", read, hub.PublishError, loading.CorruptWeights)
        if name == bundle.CONFIG and not error:
            named, rightly = json.loads(written), json.loads(right)
            assert len(named.pop("label_names")) == len(rightly.pop("label_names"))
            assert named == rightly
        else:
            assert error or written == right
    finally:
        path.write_bytes(right)


CONFIGS = [
    b"", b"[]", b"{}", b"{" * 100_000, b'{"label_names": 3}', b'{"label_names": [1]}', b"\xff",
    b'{"kn_zoo_checkpoint": "a", "kn_zoo_checkpoint": "b"}',
    b'{"label_names": ["' + b"a" * 10**7 + b'"]}',
    b'{"label_names": NaN}', b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_config_bombs(zoo: Zoo, text: bytes) -> None:
    path = zoo.checkpoint.folder / bundle.CONFIG
    right = path.read_bytes()
    try:
        path.write_bytes(text)
        stored = bundle.Bundle(zoo.checkpoint.folder)
        assert refused("config bombs", lambda: stored.class_names, loading.CorruptWeights)
        assert loading._marked(path) is None
    finally:
        path.write_bytes(right)


lines = st.one_of(
    st.text(max_size=90),
    st.builds(
        lambda digest, name: f"{digest}  {name}",
        st.text("0123456789abcdef", min_size=63, max_size=65),
        st.one_of(
            st.text(max_size=20),
            st.sampled_from(
                ["../x.y/z.a", "/etc/passwd", "a.b/../../z.a", "a.b/\uff5a.a", f"{NAME}/x.y"]
            ),
        ),
    ),
)


@given(st.lists(lines, max_size=5), st.binary(max_size=20))
@FUZZ
def test_sums_of_a_directory(tmp_path: Path, text: list[str], more: bytes) -> None:
    data = "\n".join(text).encode(errors="replace") + more
    (tmp_path / offline.SUMS).write_bytes(data)

    def read() -> None:
        for name in offline._read_sums(tmp_path):
            assert (tmp_path / name).resolve().parent.parent == tmp_path.resolve()

    refused("SHA256SUMS with other lines", read, ValueError)


def test_links_in_a_directory_are_not_followed(zoo: Zoo, tmp_path: Path) -> None:
    """Nothing is written through a link, and its target is not a file of the directory."""
    place, outside = tmp_path / "place", tmp_path / "outside"
    outside.mkdir()
    offline.add([zoo.checkpoint], place)
    assert offline.problems(place) == []
    victim = outside / "victim"
    victim.write_bytes((place / NAME / bundle.CARD).read_bytes())
    (place / NAME / bundle.CARD).unlink()
    (place / NAME / bundle.CARD).symlink_to(victim)
    assert any("not a regular file" in line for line in offline.problems(place))
    victim.write_text("mine")
    offline.add([zoo.checkpoint], place)
    assert victim.read_text() == "mine" and offline.problems(place) == []
    os.rename(place / NAME, outside / NAME)
    (place / NAME).symlink_to(outside / NAME)
    with pytest.raises(ValueError, match="is a link"):
        offline.add([zoo.checkpoint], place)
    assert offline.problems(place)
    COUNTS["links refused"] += 3


def test_the_pins_of_a_machine_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KN_ZOO_CACHE", str(tmp_path))
    checkpoint = next(
        w for w in manifest._load(tiny_zoo.ROOT / "weights_manifest.json").values() if w.upstream
    )
    checkpoint = tiny_zoo.replace(checkpoint, file=None)
    path = upstream.folder(checkpoint) / upstream.PIN
    path.parent.mkdir(parents=True)
    good = asdict(manifest.File("0" * 64, 9, "float32"))
    changes: list[Any] = [{"sha256": "0"}, {"bytes": "9"}, {"more": 1}]
    wrong: Any
    for wrong in ({}, [], *({**good, **change} for change in changes)):
        path.write_text(json.dumps(wrong))
        assert refused("pins", lambda: upstream.known_file(checkpoint), loading.CorruptWeights)
    path.write_text(json.dumps(good))
    assert upstream.known_file(checkpoint) == manifest.File(**good)
