"""torch.hub: loading in a clean process, and list and help of every model."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

from kn_zoo.checkpoints import manifest
from tests.support import tiny_zoo
from tests.support.tiny_zoo import ARCHITECTURE, NAME, Zoo


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    return tiny_zoo.make(tmp_path / "zoo", monkeypatch)


TORCH_HUB = """
import sys, torch
root, name, tag, file, out = sys.argv[1:]
assert "kn_zoo" not in sys.modules
def load():
    return torch.hub.load(root, name, source="local", pretrained=True, tag=tag)
torch.save(load().state_dict(), out)
with open(file, "ab") as stored:
    stored.write(b"!")
load()
"""


@pytest.mark.parametrize(
    ("place", "root"), [("package", "kn_zoo/pretrained"), ("repository", "checkpoints")]
)
def test_torch_hub_in_a_clean_process(zoo: Zoo, tmp_path: Path, place: str, root: str) -> None:
    """It loads the stored numbers, and refuses the file once it has another byte."""
    checkout, out = tmp_path / "checkout", tmp_path / "out.pth"
    tiny_zoo.copy_package(checkout, [tiny_zoo.replace(zoo.checkpoint, bundle=place)])
    folder = checkout / root / NAME
    shutil.copytree(zoo.checkpoint.folder, folder)
    arguments = [checkout, ARCHITECTURE, "tiny", folder / manifest.WEIGHTS_FILE, out]
    command = [sys.executable, "-c", TORCH_HUB, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "CorruptWeights" in done.stderr.splitlines()[-1]
    loaded = torch.load(out, weights_only=True)
    assert all(torch.equal(loaded[key], x) for key, x in zoo.model.state_dict().items())


@pytest.fixture
def github(tmp_path: Path) -> Iterator[str]:
    """The checkout in torch.hub's cache, as a downloaded repository."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    (tmp_path / "owner_kn-zoo_main").symlink_to(tiny_zoo.ROOT)
    yield "owner/kn-zoo:main"
    torch.hub.set_dir(before)


def test_torch_hub_lists_and_describes_every_model(github: str) -> None:
    ours = [
        name
        for name in timm.list_models()
        if timm.models.model_entrypoint(name).__module__.startswith("kn_zoo")
    ]
    assert len(ours) > 10
    assert torch.hub.list(github, trust_repo=True) == sorted(ours)
    for name in ours:
        text = torch.hub.help(github, name, trust_repo=True)
        assert text.startswith(name)
        for checkpoint in manifest.load().values():
            accuracy = next(iter(checkpoint.reported.statistics.values()))
            mentioned = re.search(f"{checkpoint.tag}: .* {accuracy.top1:.2f} ", text) is not None
            assert mentioned == (checkpoint.architecture == name)


def test_torch_hub_hands_arguments_to_timm(github: str) -> None:
    model = torch.hub.load(github, ARCHITECTURE, num_classes=7, in_chans=2, trust_repo=True)
    assert model(torch.zeros(1, 2, 16, 16)).shape == (1, 7)
    with pytest.raises(TypeError):
        torch.hub.load(github, ARCHITECTURE, no_such_argument=1, trust_repo=True)
    with pytest.raises(RuntimeError, match="tag"):
        torch.hub.load(github, ARCHITECTURE, tag="no_such_tag", trust_repo=True)
