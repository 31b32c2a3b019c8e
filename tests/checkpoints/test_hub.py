"""Loading with the real Hugging Face client from a Hub on the loopback interface, with faults."""

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_safetensors

from kn_zoo.checkpoints import bundle, loading, manifest
from tests.support import loopback, tiny_zoo
from tests.support.loopback import Fault, Hub
from tests.support.tiny_zoo import ARCHITECTURE, NAME, Child, Zoo

REPOSITORY, MIRROR, OWN = "owner/tiny", "someone/mirror", "someone/own"
ALWAYS = 10**6
LARGE = f"/{manifest.WEIGHTS_FILE}"  # in the address of the file, on the Hub and at its storage


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    with pytest.MonkeyPatch.context() as patch:
        yield tiny_zoo.make(tmp_path_factory.mktemp("zoo"), patch)


@pytest.fixture(scope="module")
def files(zoo: Zoo) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in zoo.checkpoint.folder.iterdir()}


@pytest.fixture(scope="module")
def commit(files: dict[str, bytes]) -> str:
    return loopback.Repository().commit(files)


@pytest.fixture(scope="module")
def package(zoo: Zoo, commit: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kn_zoo with checkpoints on the Hub, in a deleted repository, and not trained yet."""
    on_hub = tiny_zoo.replace(zoo.checkpoint, bundle=None, hub=manifest.Hub(REPOSITORY, commit))
    gone = manifest.Hub("owner/gone", commit)
    others = [
        tiny_zoo.replace(on_hub, name=f"{ARCHITECTURE}.lost", hub=gone),
        tiny_zoo.draft(f"{ARCHITECTURE}.planned"),
    ]
    return tiny_zoo.copy_package(tmp_path_factory.mktemp("package"), [on_hub, *others])


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    server = Hub()
    server.put(REPOSITORY, files)
    server.put(MIRROR, files)
    config = json.loads(files[bundle.CONFIG])
    config.pop(loading.MARKER)  # as timm saves a user's own model
    server.put(OWN, {**files, bundle.CONFIG: json.dumps(config).encode()})
    yield server
    server.stop()


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "critical",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
    }


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[str]:
    return (str(tmp_path / f"cache{i}") for i in itertools.count())


def digest(model: torch.nn.Module) -> str:
    numbers = b"".join(x.numpy().tobytes() for x in model.state_dict().values())
    return hashlib.sha256(numbers).hexdigest()


def refused(answer: dict[str, str], error: str, *texts: str) -> None:
    assert answer.get("error") == error, answer
    for text in texts:
        assert text in answer["message"], answer
    assert "\n" not in answer["message"]


def test_every_name_loads_and_missing_files_are_reported(
    zoo: Zoo,
    package: Path,
    hub: Hub,
    commit: str,
    environment: dict[str, str],
    caches: Iterator[str],
) -> None:
    right = {"sha256": digest(zoo.model)}
    with Child(package, **environment) as child:
        assert child.load(NAME) == right
        assert any("GET" in request and LARGE in request for request in hub.requests)
        for name in (
            ARCHITECTURE,
            f"hf-hub:{REPOSITORY}",
            f"hf-hub:{REPOSITORY}@{commit}",
            f"hf-hub:{REPOSITORY}@main",
            f"hf-hub:{MIRROR}",
        ):
            assert child.load(name, cache_dir=next(caches)) == right

        lost = child.load(f"{ARCHITECTURE}.lost")
        refused(lost, "MissingWeights", "owner/gone", hub.endpoint, "Upgrade kn_zoo")
        planned = child.load(f"{ARCHITECTURE}.planned")
        refused(planned, "MissingWeights", "train_scripts/train.py train_scripts/recipes/tiny.yaml")
        stored = {name: r.commits[-1][1] for name, r in hub.repositories.items()}
        whole = stored[REPOSITORY].pop(manifest.WEIGHTS_FILE)
        missing = child.load(NAME, cache_dir=next(caches))
        refused(missing, "MissingWeights", "does not exist", "Upgrade kn_zoo")

        # a wrong file: longer, cut, empty, of the same length, of another network
        other = to_safetensors(tiny_zoo.network(1).state_dict())
        for wrong in (whole[:-1] + b"\0\0", whole[:-1], b"", whole[::-1], other):
            hashes = hashlib.sha256(wrong).hexdigest(), hashlib.sha256(whole).hexdigest()
            for repository, name in (
                (REPOSITORY, NAME),
                (REPOSITORY, f"hf-hub:{REPOSITORY}"),
                (MIRROR, f"hf-hub:{MIRROR}"),
            ):
                stored[repository][manifest.WEIGHTS_FILE] = wrong
                refused(child.load(name, cache_dir=next(caches)), "CorruptWeights", *hashes)
        stored[OWN][manifest.WEIGHTS_FILE] = other
        own = child.load(f"hf-hub:{OWN}", cache_dir=next(caches))
        assert own == {"sha256": digest(tiny_zoo.network(1))}, (
            "a repository of the user's own is not compared"
        )

        # a wrong file in the cache is named, and downloaded again by the next call
        spoilt = next(caches)
        refused(child.load(NAME, cache_dir=spoilt), "CorruptWeights", f"Delete {spoilt}")
        stored[REPOSITORY][manifest.WEIGHTS_FILE] = whole
        assert child.load(NAME, cache_dir=spoilt) == right

        # without a network the cache serves its files without a request; other files give a hint
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


def reverse(data: bytes) -> bytes:
    return data[::-1]


def shorten(data: bytes) -> bytes:
    return data[:-7]


def lengthen(data: bytes) -> bytes:
    return data + b"something"


def page(data: bytes) -> bytes:
    return loopback.HTML


def page_of_that_length(data: bytes) -> bytes:
    return loopback.HTML.ljust(len(data))


def same(data: bytes) -> bytes:
    return data


LOADS = ("loads",)
UNREACHABLE = ("MissingWeights", "cannot be reached or is not a Hub", "kn-zoo download")
TRY_AGAIN = ("MissingWeights", "could not be downloaded", "Try again")
CORRUPT = ("CorruptWeights", "SHA-256", "Delete ")
TOKEN = ("MissingWeights", "does not accept your token", "unset HF_TOKEN")
ABSENT = ("MissingWeights", "does not exist", "Upgrade kn_zoo")
HEAD, GET = ("HEAD", "/resolve/"), ("GET", "/cdn/")
status, cut, replaced, head = loopback.status, loopback.cut, loopback.replaced, loopback.head
OUTSIDE = "kn_zoo_was_here"
hostile = "../" * 9 + f"tmp/{OUTSIDE}"
FAULTS: list[tuple[tuple[str, str], Any, int, tuple[str, ...]]] = [
    # the request for the address of the file
    *((HEAD, status(code), 1, LOADS) for code in (408, 429, 500, 502, 503, 504)),
    *((HEAD, status(code), ALWAYS, UNREACHABLE) for code in (429, 500, 503)),
    (HEAD, status(429, Retry_After="1"), 2, LOADS),
    (HEAD, status(401, X_Error_Message="Invalid credentials in Authorization header"), 9, TOKEN),
    (HEAD, status(403), ALWAYS, UNREACHABLE),
    (HEAD, status(404, X_Error_Code="RepoNotFound"), ALWAYS, ABSENT),
    (HEAD, status(404, X_Error_Code="RevisionNotFound"), ALWAYS, ABSENT),
    (HEAD, status(404, X_Error_Code="EntryNotFound"), ALWAYS, ABSENT),
    (HEAD, status(204), ALWAYS, UNREACHABLE),
    (HEAD, status(418), ALWAYS, UNREACHABLE),
    (HEAD, loopback.html, ALWAYS, UNREACHABLE),
    (HEAD, head(without="X-Linked-ETag"), ALWAYS, UNREACHABLE),
    (HEAD, head(without="X-Repo-Commit"), ALWAYS, UNREACHABLE),
    (HEAD, head(without="X-Linked-Size"), ALWAYS, LOADS),
    (HEAD, head(X_Linked_ETag='"' + "0" * 64 + '"'), ALWAYS, LOADS),
    (HEAD, head(X_Repo_Commit=hostile), ALWAYS, ("MissingWeights",)),
    (HEAD, head(X_Repo_Commit="0" * 40), ALWAYS, LOADS),
    (HEAD, head(X_Linked_Size="1"), ALWAYS, TRY_AGAIN),
    (HEAD, head(X_Linked_Size="1000000000000000"), ALWAYS, TRY_AGAIN),
    (HEAD, head(X_Linked_Size="-1"), ALWAYS, TRY_AGAIN),
    (HEAD, head(X_Linked_Size="many"), ALWAYS, LOADS),
    (HEAD, head(Location="http://127.0.0.1:1/nothing"), ALWAYS, TRY_AGAIN),
    (HEAD, head(Location="file:///etc/passwd"), ALWAYS, TRY_AGAIN),
    # the file itself
    *((GET, status(code), 2, LOADS) for code in (408, 429, 500, 502, 503, 504)),
    *((GET, status(code), ALWAYS, TRY_AGAIN) for code in (404, 429, 500, 503)),
    (GET, status(403), ALWAYS, TOKEN),
    *((GET, cut(part), 1, LOADS) for part in (0, 0.001, 0.5, 0.999)),
    (GET, cut(0.5), 2, LOADS),
    (GET, cut(0), ALWAYS, TRY_AGAIN),
    (GET, replaced(shorten), 2, LOADS),
    (GET, replaced(shorten), ALWAYS, TRY_AGAIN),
    (GET, replaced(lengthen), 1, LOADS),
    (GET, replaced(lengthen), ALWAYS, TRY_AGAIN),
    (GET, loopback.html, 1, LOADS),
    (GET, loopback.html, ALWAYS, TRY_AGAIN),
    (GET, replaced(page, Content_Type="text/html"), ALWAYS, TRY_AGAIN),
    (GET, replaced(page_of_that_length, Content_Type="text/html"), 1, LOADS),
    (GET, replaced(page_of_that_length, Content_Type="text/html"), ALWAYS, CORRUPT),
    (GET, replaced(reverse), 1, LOADS),
    (GET, replaced(reverse), ALWAYS, CORRUPT),
    (GET, replaced(bytes.upper), ALWAYS, CORRUPT),
    (GET, replaced(same, ETag='"another"'), ALWAYS, LOADS),
    (GET, replaced(same, Content_Encoding="gzip"), 2, LOADS),
    (GET, replaced(same, Content_Encoding="gzip"), ALWAYS, TRY_AGAIN),
    (GET, loopback.trickle(20, 2), ALWAYS, LOADS),
    (GET, loopback.stall(0.5, threading.Event()), 1, LOADS),
]


def test_whatever_breaks_nothing_wrong_is_loaded(
    zoo: Zoo,
    package: Path,
    hub: Hub,
    environment: dict[str, str],
    caches: Iterator[str],
    tell: Callable[[str], None],
    tmp_path: Path,
) -> None:
    """Each fault meets an empty cache; afterwards the same cache provides the right numbers."""
    right = {"sha256": digest(zoo.model)}
    loaded, refusals, surprises = 0, 0, []
    before = set(Path("/tmp").iterdir())
    with Child(package, **environment) as child:
        for number, ((method, path), act, times, (outcome, *texts)) in enumerate(FAULTS):
            hub.faults[:] = [Fault(method, path, act, times)]
            cache = next(caches)
            answer = child.load(NAME, cache_dir=cache)
            happened = hub.faults.pop().times < times
            recovered = child.load(NAME, cache_dir=cache) == right
            unfinished = [path for path in Path(cache).rglob("*") if "incomplete" in path.name]
            if answer == right:
                loaded += 1
                expected = outcome == "loads"
            else:
                refusals += 1
                message = answer["message"]
                expected = answer["error"] == outcome and all(text in message for text in texts)
                expected &= "\n" not in message
            if not (happened and recovered and expected) or unfinished:
                surprises.append((number, happened, recovered, unfinished, texts, answer))
    assert not surprises
    assert hub.resumed >= 4, "what was cut is resumed where it broke off"
    assert not [
        path for path in set(Path("/tmp").iterdir()) - before if path.name.startswith(OUTSIDE)
    ]
    tell(
        f"Hub on loopback: {len(FAULTS)} faults while loading: {loaded} overcome, {refusals} "
        "refused with a hint, 0 loaded wrong"
    )


def test_a_cache_that_cannot_be_written(
    zoo: Zoo, package: Path, hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    """A read-only cache provides its files; a missing file is an error with a hint."""
    right = {"sha256": digest(zoo.model)}
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    # pytest makes its folders for their owner alone, at a depth that depends on pytest-xdist.
    mine = Path(tempfile.gettempdir()).resolve()
    for folder in (tmp_path, *tmp_path.parents, package, *package.parents):
        if folder.is_relative_to(mine) and folder != mine:
            folder.chmod(0o755)
    with Child(package, **environment) as child:
        assert child.load(NAME, cache_dir=str(full), last_as_root=True) == right
        folders = [empty, full, *(p for p in full.rglob("*") if p.is_dir() and not p.is_symlink())]
        for folder in folders:
            folder.chmod(0o555)
        answer = child.load(NAME, cache_dir=str(empty))
        refused(answer, "MissingWeights", "PermissionError", "HF_HOME or cache_dir=")
        assert child.load(NAME, cache_dir=str(full)) == right
    for folder in folders:
        folder.chmod(0o755)


EIGHT = """
import hashlib, os, sys, timm, kn_zoo
name, out = sys.argv[1:]
for i in range(8):
    if os.fork() == 0:
        model = timm.create_model(name, pretrained=True)
        numbers = b"".join(x.numpy().tobytes() for x in model.state_dict().values())
        open(f"{out}/{i}", "w").write(hashlib.sha256(numbers).hexdigest())
        os._exit(0)
assert [os.wait()[1] for i in range(8)] == [0] * 8
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")
def test_eight_processes_download_once(
    zoo: Zoo,
    package: Path,
    hub: Hub,
    environment: dict[str, str],
    tmp_path: Path,
    tell: Callable[[str], None],
) -> None:
    """The processes are forked after the imports, so that they request the file together."""
    hub.faults.append(Fault("GET", "/cdn/", loopback.trickle(20, 6), ALWAYS))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", EIGHT, NAME, str(tmp_path / "out")]
    variables = {**os.environ, **environment, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=variables, cwd=package, check=True)
    answers = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert answers == [digest(zoo.model)] * 8
    downloads = hub.count("GET", "/cdn/")
    assert downloads == 1 and hub.count("HEAD", "/resolve/") >= 8
    tell(f"8 processes, one empty cache: {downloads} download, {len(answers)} with right tensors")


def test_a_process_killed_in_mid_download_leaves_nothing_that_counts(
    zoo: Zoo, package: Path, hub: Hub, environment: dict[str, str]
) -> None:
    over = threading.Event()
    hub.faults.append(Fault("GET", "/cdn/", loopback.stall(0.7, over), 1))
    environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "60"
    with Child(package, **environment) as killed:
        killed.ask(NAME)
        deadline = time.monotonic() + 60
        cache = Path(environment["HF_HOME"]) / "hub"
        while not any(path.stat().st_size for path in cache.glob("**/blobs/*.incomplete")):
            assert time.monotonic() < deadline, list(cache.rglob("*"))
            time.sleep(0.05)
        killed.process.kill()
    over.set()
    left = [path for path in cache.glob("**/blobs/*") if path.is_file()]
    assert left and all(path.name.endswith(".incomplete") for path in left)
    with Child(package, **environment) as child:
        assert child.load(NAME) == {"sha256": digest(zoo.model)}


def test_a_bundle_comes_from_the_hub_as_a_whole(
    zoo: Zoo, hub: Hub, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = functools.partial(loading.hf_hub_download, endpoint=hub.endpoint)
    monkeypatch.setattr(loading, "hf_hub_download", client)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    checkpoint = tiny_zoo.replace(zoo.checkpoint, bundle=None, hub=manifest.Hub(REPOSITORY, commit))
    downloaded = bundle.get(checkpoint, tmp_path)
    for path in zoo.checkpoint.folder.iterdir():
        assert (downloaded.folder / path.name).read_bytes() == path.read_bytes()
