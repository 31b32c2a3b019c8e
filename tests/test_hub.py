"""torch.hub from a clean process; the real Hugging Face client against a Hub on this machine."""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_zoo
import torch
from safetensors.torch import save as to_safetensors
from tiny_zoo import ARCHITECTURE, NAME, Child, Zoo

from kn_zoo import bundle, manifest, weights

REPOSITORY, MIRROR, OWN = "owner/tiny", "someone/mirror", "someone/own"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face Hub as its client asks for to download a file."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Request)
        self.files = files
        self.requests: list[str] = []
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """From here on connections are refused."""
        self.shutdown()
        self.server_close()
        self.thread.join()


class Request(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        repository, _, place = self.path.strip("/").partition("/resolve/")
        revision, _, name = place.partition("/")
        if repository not in (REPOSITORY, MIRROR, OWN):
            return self.refuse("RepoNotFound")
        if revision not in (COMMIT, "main"):
            return self.refuse("RevisionNotFound")
        if name not in self.server.files:
            return self.refuse("EntryNotFound")
        data = self.server.files[name]
        if repository == OWN and name == bundle.CONFIG:  # as timm saves a user's own model
            config = json.loads(data)
            config.pop(weights.MARKER)
            data = json.dumps(config).encode()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "not here")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    with pytest.MonkeyPatch.context() as patch:
        yield tiny_zoo.make(tmp_path_factory.mktemp("zoo"), patch)


@pytest.fixture(scope="module")
def package(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kn_zoo with a weight on the Hub only, one whose repository is gone, one that nobody has."""
    on_hub = tiny_zoo.replace(zoo.weight, bundle=False, hub=manifest.Hub(REPOSITORY, COMMIT))
    gone = manifest.Hub("owner/gone", COMMIT)
    others = [
        tiny_zoo.replace(on_hub, name=f"{ARCHITECTURE}.lost", hub=gone),
        tiny_zoo.draft(f"{ARCHITECTURE}.planned"),
    ]
    return tiny_zoo.copy_package(tmp_path_factory.mktemp("package"), [on_hub, *others])


@pytest.fixture
def hub(zoo: Zoo) -> Iterator[Hub]:
    server = Hub({path.name: path.read_bytes() for path in zoo.weight.folder.iterdir()})
    yield server
    if server.thread.is_alive():
        server.stop()


def digest(model: torch.nn.Module) -> str:
    numbers = b"".join(x.numpy().tobytes() for x in model.state_dict().values())
    return hashlib.sha256(numbers).hexdigest()


def refused(answer: dict[str, str], error: str, *said: str) -> None:
    assert answer.get("error") == error, answer
    for text in said:
        assert text in answer["message"], answer
    assert "\n" not in answer["message"]


def test_the_hub_client(zoo: Zoo, package: Path, hub: Hub, tmp_path: Path) -> None:
    right = {"sha256": digest(zoo.model)}
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    environment.update(HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1")
    caches = map(str, (tmp_path / f"cache{i}" for i in range(100)))
    with Child(package, **environment) as child:
        # every name, each with an empty cache
        assert child.load(NAME) == right
        assert any("GET" in request and COMMIT in request for request in hub.requests)
        for name in (
            ARCHITECTURE,
            f"hf-hub:{REPOSITORY}",
            f"hf-hub:{REPOSITORY}@{COMMIT}",
            f"hf-hub:{REPOSITORY}@main",
            f"hf-hub:{MIRROR}",
        ):
            assert child.load(name, cache_dir=next(caches)) == right

        # what is not there
        lost = child.load(f"{ARCHITECTURE}.lost")
        refused(lost, "MissingWeights", "owner/gone", hub.endpoint, "Upgrade kn_zoo")
        planned = child.load(f"{ARCHITECTURE}.planned")
        refused(planned, "MissingWeights", "train_scripts/train.py train_scripts/recipes/tiny.yaml")
        stored = hub.files.pop(manifest.WEIGHTS_FILE)
        missing = child.load(NAME, cache_dir=next(caches))
        refused(missing, "MissingWeights", "does not exist", "Upgrade kn_zoo")

        # another file in its place: longer, cut, empty, of the same length
        for wrong in (stored[:-1] + b"\0\0", stored[:-1], b"", stored[::-1]):
            hub.files[manifest.WEIGHTS_FILE] = wrong
            hashes = hashlib.sha256(wrong).hexdigest(), hashlib.sha256(stored).hexdigest()
            for name in (NAME, f"hf-hub:{REPOSITORY}", f"hf-hub:{MIRROR}@{COMMIT}"):
                refused(child.load(name, cache_dir=next(caches)), "CorruptWeights", *hashes)
        hub.files[manifest.WEIGHTS_FILE] = to_safetensors(tiny_zoo.network(1).state_dict())
        refused(child.load(f"hf-hub:{MIRROR}", cache_dir=next(caches)), "CorruptWeights")
        own = child.load(f"hf-hub:{OWN}", cache_dir=next(caches))
        assert own == {"sha256": digest(tiny_zoo.network(1))}, "not in the manifest, not compared"

        spoilt = next(caches)
        refused(child.load(NAME, cache_dir=spoilt), "CorruptWeights", f"Delete {spoilt}")

        # the cure works: delete the file that the message names, and load again
        hub.files[manifest.WEIGHTS_FILE] = stored
        message = child.load(NAME, cache_dir=spoilt)["message"]
        Path(message.partition("Delete ")[2].partition(" and get")[0]).unlink()
        assert child.load(NAME, cache_dir=spoilt) == right

        # no network: what is cached loads without asking anyone, the rest says what to do
        asked = len(hub.requests)
        assert child.load(NAME) == right
        assert len(hub.requests) == asked, "a commit in the cache needs no request"
        hub.stop()
        assert child.load(NAME) == right
        unreachable = child.load(NAME, cache_dir=next(caches))
        refused(unreachable, "MissingWeights", hub.endpoint, "cannot be reached", "kn-zoo download")
    with Child(package, **{**environment, "HF_HUB_OFFLINE": "1"}) as child:
        assert child.load(NAME) == right
        offline = child.load(NAME, cache_dir=next(caches))
        refused(offline, "MissingWeights", "unset HF_HUB_OFFLINE", "KN_ZOO_WEIGHTS")


def test_a_bundle_comes_from_the_hub_as_a_whole(
    zoo: Zoo, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = functools.partial(weights.hf_hub_download, endpoint=hub.endpoint)
    monkeypatch.setattr(weights, "hf_hub_download", client)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    weight = tiny_zoo.replace(zoo.weight, bundle=False, hub=manifest.Hub(REPOSITORY, COMMIT))
    found = bundle.get(weight, tmp_path)
    for path in zoo.weight.folder.iterdir():
        assert (found.folder / path.name).read_bytes() == path.read_bytes()


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


def test_torch_hub_in_a_clean_process(zoo: Zoo, tmp_path: Path) -> None:
    """It loads the stored numbers, and after a byte more is in the file it does not."""
    checkout, out = tmp_path / "checkout", tmp_path / "out.pth"
    tiny_zoo.copy_package(checkout, [zoo.weight])
    folder = checkout / "kn_zoo" / "pretrained" / NAME
    shutil.copytree(zoo.weight.folder, folder)
    arguments = [checkout, ARCHITECTURE, "tiny", folder / manifest.WEIGHTS_FILE, out]
    command = [sys.executable, "-c", TORCH_HUB, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "CorruptWeights" in done.stderr.splitlines()[-1]
    loaded = torch.load(out, weights_only=True)
    assert all(torch.equal(loaded[key], x) for key, x in zoo.model.state_dict().items())


@pytest.fixture
def github(tmp_path: Path) -> Iterator[str]:
    """The checkout as torch.hub keeps a repository that it has downloaded."""
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
        for weight in manifest.load().values():
            mentioned = f"{weight.tag}: {weight.dataset.name}" in text
            assert mentioned == (weight.architecture == name)


def test_torch_hub_hands_arguments_to_timm(github: str) -> None:
    model = torch.hub.load(github, ARCHITECTURE, num_classes=7, in_chans=2, trust_repo=True)
    assert model(torch.zeros(1, 2, 16, 16)).shape == (1, 7)
    with pytest.raises(TypeError):
        torch.hub.load(github, ARCHITECTURE, no_such_argument=1, trust_repo=True)
    with pytest.raises(RuntimeError, match="tag"):
        torch.hub.load(github, ARCHITECTURE, tag="no_such_tag", trust_repo=True)
