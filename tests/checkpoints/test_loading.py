"""Loading a checkpoint: the right numbers on every path, or an error with a hint."""

import copy
import hashlib
import inspect
import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import adapt_input_conv, save_for_hf
from timm.models._registry import _model_has_pretrained
from torch import nn

import kn_zoo
from kn_zoo.checkpoints import files, loading, manifest
from tests.support import tiny_zoo
from tests.support.tiny_zoo import ARCHITECTURE, NAME, Zoo


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    return tiny_zoo.make(tmp_path, monkeypatch)


def load(name: str = NAME, **options: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, **options)


def by_name(zoo: Zoo) -> nn.Module:
    return load(NAME)


def by_default_tag(zoo: Zoo) -> nn.Module:
    return load(ARCHITECTURE)


def by_tag_argument(zoo: Zoo) -> nn.Module:
    return load(ARCHITECTURE, pretrained_cfg=zoo.checkpoint.tag)


def by_folder(zoo: Zoo) -> nn.Module:
    return load(f"local-dir:{zoo.checkpoint.folder}")


def by_copied_folder(zoo: Zoo) -> nn.Module:
    copied = zoo.checkpoint.folder.parents[1] / "a copy"
    shutil.copytree(zoo.checkpoint.folder, copied, dirs_exist_ok=True)
    return load(f"local-dir:{copied}")


def by_overlay(zoo: Zoo) -> nn.Module:
    options = {"dropout_p": 0.125, "num_classes": 10, "in_chans": 1}
    overlay = {"file": str(zoo.file), "input_size": (1, 8, 8), "num_classes": 10}
    return load(ARCHITECTURE, pretrained_cfg_overlay=overlay, **options)


def registered_cfg() -> Any:
    return timm.get_pretrained_cfg(NAME)


def by_whole_cfg(zoo: Zoo) -> nn.Module:
    return load(ARCHITECTURE, pretrained_cfg=registered_cfg().to_dict())


PATHS = [
    by_name, by_default_tag, by_tag_argument, by_folder, by_copied_folder, by_overlay, by_whole_cfg
]  # fmt: skip
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
Path_ = Callable[[Zoo], nn.Module]


@every_path
def test_every_path_gives_the_stored_numbers(zoo: Zoo, path: Path_) -> None:
    model = path(zoo)
    assert zoo.same(model), "float16 numbers must arrive unchanged in float32"
    convolutions = [m for m in model.modules() if hasattr(m, "dropout_p")]
    assert convolutions[0].dropout_p == 0.125, "the arguments that the network was trained with"


def truncate(data: bytes) -> bytes:
    return data[:-1]


def empty(data: bytes) -> bytes:
    return b""


def flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def append(data: bytes) -> bytes:
    return data + b"\0"


class Trap:
    """Unpickling this is noticed."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Trap, "sprung", True)


def exchange_for_pickle(data: bytes) -> bytes:
    return pickle.dumps({"weights": Trap()})


DAMAGES = [truncate, empty, flip_last_bit, append, exchange_for_pickle]


@every_path
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_refused_before_a_tensor_is_read(
    zoo: Zoo, path: Path_, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = damage(zoo.file.read_bytes())
    zoo.file.write_bytes(data)
    monkeypatch.setattr(files, "parse_safetensors", lambda data: pytest.fail("tensors were read"))
    with pytest.raises(loading.CorruptWeights) as caught:
        path(zoo)
    message = str(caught.value)
    assert zoo.checkpoint.file is not None
    assert (
        zoo.checkpoint.file.sha256 in message and f"{zoo.checkpoint.file.bytes:,} bytes" in message
    )
    assert hashlib.sha256(data).hexdigest() in message and f"{len(data):,} bytes" in message
    assert "Reinstall kn_zoo" in message or "Delete" in message
    assert "\n" not in message
    assert not Trap.sprung


@given(st.integers(min_value=0), st.integers(1, 255))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_noticed(zoo: Zoo, where: int, change: int) -> None:
    right = zoo.file.read_bytes()
    wrong = bytearray(right)
    wrong[where % len(wrong)] ^= change
    try:
        zoo.file.write_bytes(wrong)
        with pytest.raises(loading.CorruptWeights):
            loading.read(zoo.file, zoo.checkpoint)
    finally:
        zoo.file.write_bytes(right)


def test_a_pickle_is_refused_even_with_its_hash_in_the_manifest(zoo: Zoo) -> None:
    data = exchange_for_pickle(b"")
    zoo.file.write_bytes(data)
    file = manifest.File(hashlib.sha256(data).hexdigest(), len(data), "float16")
    manifest.write_entry(tiny_zoo.replace(zoo.checkpoint, file=file))
    with pytest.raises(loading.CorruptWeights, match="not a safetensors file"):
        load()
    assert not Trap.sprung


def test_a_file_exchanged_after_the_check_is_not_used(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = files.checked_bytes

    def exchange(path: Path, *rest: Any) -> bytes:
        data = checked(path, *rest)
        path.write_bytes(b"something else")
        return data

    monkeypatch.setattr(files, "checked_bytes", exchange)
    assert zoo.same(load())


@every_path
def test_a_missing_file_is_one_error_with_a_hint(zoo: Zoo, path: Path_) -> None:
    zoo.file.unlink()
    with pytest.raises((loading.MissingWeights, FileNotFoundError)) as caught:
        path(zoo)
    assert "\n" not in str(caught.value)
    if path is not by_copied_folder:
        assert "Reinstall kn_zoo" in str(caught.value)


def test_an_architecture_without_checkpoints_says_how_to_train() -> None:
    with pytest.raises(loading.MissingWeights, match=r"train_scripts/train\.py"):
        load("preactresnet50_cifar")


def test_a_known_file_that_is_nowhere_says_how_to_train(zoo: Zoo) -> None:
    manifest.write_entry(tiny_zoo.replace(zoo.checkpoint, bundle=None))
    with pytest.raises(loading.MissingWeights, match=r"train_scripts/recipes/tiny\.yaml"):
        loading.locate(manifest.find(NAME))


# What is the user's own


OWN = {"num_classes": 10, "in_chans": 1}
SHAPE = {"input_size": (1, 8, 8), "num_classes": 10}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_users_own_file_is_not_compared(zoo: Zoo, tmp_path: Path, suffix: str) -> None:
    own = tiny_zoo.network(seed=1)
    file = str(tmp_path / f"own{suffix}")
    save = save_file if suffix == ".safetensors" else torch.save
    save(own.state_dict(), file)
    model = load(pretrained_cfg_overlay={"file": file})
    assert Zoo(zoo.checkpoint, own).same(model)


def test_a_users_own_state_dict_wins_over_the_bundle(zoo: Zoo) -> None:
    own = tiny_zoo.network(seed=1)
    model = load(pretrained_cfg_overlay={"state_dict": own.state_dict()})
    assert Zoo(zoo.checkpoint, own).same(model)


def test_a_users_own_url_wins_over_the_bundle(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiny_zoo.network(seed=1)
    torch.save(own.state_dict(), tmp_path / "own.pth")
    overlay = {"url": (tmp_path / "own.pth").as_uri()}
    model = load(pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path / "cache"))
    assert Zoo(zoo.checkpoint, own).same(model)


def test_a_users_own_repository_wins_over_the_bundle(zoo: Zoo) -> None:
    overlay = loading.checked_source(ARCHITECTURE, "tiny", {"hf_hub_id": "someone/else"})
    assert overlay == {
        "source": None,
        "state_dict": None,
        "file": None,
        "hf_hub_id": "someone/else",
    }


def test_a_file_that_does_not_exist_is_named(zoo: Zoo) -> None:
    with pytest.raises(loading.MissingWeights, match=r"/nowhere/x\.pth does not exist"):
        load(pretrained_cfg_overlay={"file": "/nowhere/x.pth"})


def test_a_model_trained_further_and_saved_by_timm_is_the_users_own(
    zoo: Zoo, tmp_path: Path
) -> None:
    model = load()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_for_hf(model, str(tmp_path / "mine"), safe_serialization=True)
    assert Zoo(zoo.checkpoint, model).same(load(f"local-dir:{tmp_path / 'mine'}", dropout_p=0.125))
    config = (tmp_path / "mine" / "config.json").read_text("utf-8")
    assert str(zoo.checkpoint.folder) not in config and loading.MARKER not in config
    assert json.loads(config)["pretrained_cfg"]["tag"] == zoo.checkpoint.tag


# What timm does with the tensors


@pytest.mark.skipif(
    "base_chans" not in inspect.signature(adapt_input_conv).parameters,
    reason="this timm adapts weights made for three channels only",
)
def test_other_channels_and_classes_are_adapted_in_float32(zoo: Zoo) -> None:
    model = load(in_chans=3, num_classes=4)
    expected = zoo.model.state_dict()["stem.weight"].expand(-1, 3, -1, -1) / 3
    torch.testing.assert_close(model.get_submodule("stem").weight, expected, rtol=1e-6, atol=1e-9)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert load(num_classes=0)(torch.zeros(2, 1, 8, 8)).ndim == 2


@pytest.mark.parametrize("features", [False, True])
def test_the_model_keeps_no_second_copy_of_its_weights(zoo: Zoo, features: bool) -> None:
    model = load(features_only=features)
    for module in model.modules():
        for cfg in (getattr(module, "pretrained_cfg", {}), getattr(module, "default_cfg", {})):
            assert "state_dict" not in cfg
    file = io.BytesIO()
    torch.save(copy.deepcopy(model), file)
    assert file.tell() < 1.5 * sum(x.numel() * x.element_size() for x in model.parameters())


def test_the_registered_cfg_is_left_alone(zoo: Zoo) -> None:
    before = copy.deepcopy(registered_cfg())
    load()
    assert registered_cfg() == before
    assert before.file == str(zoo.file) and before.state_dict is None


def test_a_users_argument_wins_over_the_checkpoints(zoo: Zoo) -> None:
    model = load(dropout_p=0.25)
    assert next(m.dropout_p for m in model.modules() if hasattr(m, "dropout_p")) == 0.25
    assert zoo.same(model)


def test_a_checkpoint_of_another_depth_and_width_loads(
    tmp_path: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's arguments come before the architecture's own."""
    arguments: dict[str, Any] = {"depths": [1, 2], "widths": [4, 8]}
    model = timm.create_model(ARCHITECTURE, num_classes=10, in_chans=1, **arguments)
    name = f"{ARCHITECTURE}.shallow"
    draft = replace(tiny_zoo.draft(name), model_args=arguments)
    tiny_zoo.write(model, draft, tmp_path / "log.csv")
    tiny_zoo.register(monkeypatch)
    assert Zoo(draft, model).same(timm.create_model(name, pretrained=True))
    features: Any = timm.create_model(name, pretrained=True, features_only=True)
    assert features.feature_info.channels() == [4, 8]
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(name, pretrained=True, widths=(8, 8))


def test_timm_lists_what_is_available() -> None:
    available = [checkpoint for checkpoint in manifest.load().values() if checkpoint.available]
    classifiers = {c.name for c in available if c.task == "classification"}
    assert classifiers == {name for name in _model_has_pretrained if name in manifest.load()}
    assert classifiers <= set(timm.list_pretrained())
    segmenters = {c.name for c in available} - classifiers
    assert segmenters == set(kn_zoo.list_segmentation_models(pretrained=True))
